"""What vLLM's own code says of adapters made by jlora, without its engine.

The two sides live in different environments, so it runs in two steps:

    python -m tests.golden.check_vllm write DIR        # jlora, transformers 4.57
    python tests/golden/check_vllm.py check DIR VLLM   # torch, safetensors, regex

VLLM is the folder where a wheel of vLLM is unpacked (`pip download --no-deps vllm`,
then `unzip`); it need not be installed. Real is all that reads an adapter, from
`WorkerLoRAManager._load_adapter` on: `PEFTHelper`, the parsing and checking of names,
`LoRAModel`, and the packing of q, k and v. The rest of vLLM is stubs.

    python tests/golden/check_vllm.py run RUN VLLM         # after `examples.chat`

The first step writes each adapter as `peft.save` does, and notes whether
`portable=True` refuses it. The second loads all of them, and exits with 1 where the two
disagree, or where the update that vLLM holds is not jlora's to a part in 1e5. The third
reads the base and the merged model of a run as vLLM reads weights, and asks that their
difference is the update that vLLM holds of the run's adapter.
"""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import json
import pathlib
import sys
import types

P = "base_model.model."
REAL = {
    f"vllm.lora.{name}"
    for name in (
        "lora_model", "lora_weights", "model_manager", "peft_helper", "request",
        "utils", "worker_manager",
    )
}  # fmt: skip
LOADER = "vllm.model_executor.model_loader.weight_utils"
REAL |= {LOADER, "vllm.model_executor.model_loader.ep_weight_filter"}
INDEX = "model.safetensors.index.json"
STUBS = ("vllm", "huggingface_hub", "transformers")
STUBS += ("fastsafetensors", "runai_model_streamer")
PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def by_hand() -> dict:
    """Adapters of single leaves, most of which vLLM cannot take: (adapter, options)."""
    import jax.numpy as jnp
    import numpy as np

    from jlora.factors import Axes, Factors, Spec, Trainable

    rng = np.random.default_rng(0)

    def factors(n=4, m=6, rank=2, dtype="float32", **spec):
        a, b = (
            jnp.asarray(rng.normal(size=shape), dtype)
            for shape in ((n, rank), (rank, m))
        )
        magnitude = jnp.ones(m) if spec.get("method") == "dora" else None
        return Factors(a, b, Spec(rank=rank, alpha=3, **spec), magnitude)

    q, head = {"up/kernel": factors()}, jnp.ones((4, 2))
    table = factors(9, 4, op="embedding")
    conv = Axes((), (0, 1, 2), (3,))
    kernel = Factors(
        jnp.ones((3, 3, 2, 2)),
        jnp.ones((2, 4)),
        Spec(op="conv", axes=conv, rank=2, alpha=2),
    )
    rows = Spec(op="embedding", rank=1, alpha=1, method="rows", rows=(2,), shape=(9, 4))
    return {
        "plain": (Trainable(q), {}),
        "rank_512": (Trainable({"up/kernel": factors(600, 600, 512)}), {}),
        "rank_513": (Trainable({"up/kernel": factors(600, 600, 513)}), {}),
        "float16": (Trainable({"up/kernel": factors(dtype="float16")}), {}),
        "float64": (Trainable(q), {"dtype": "float64"}),
        "shards": (Trainable(q), {"max_shard_bytes": 40}),
        "one_shard": (Trainable(q), {"max_shard_bytes": 10**6}),
        "dora": (Trainable({"up/kernel": factors(method="dora")}), {}),
        "bias": (Trainable(q, {"up/bias": jnp.ones(6)}), {}),
        "head": (Trainable(q, {"score/kernel": head}), {}),
        "head_and_bias": (
            Trainable(q, {"score/kernel": head, "score/bias": jnp.ones(2)}),
            {},
        ),
        "bias_of_a_head": (Trainable(q, {"score/bias": jnp.ones(2)}), {}),
        "head_alone": (Trainable({}, {"score/kernel": head}), {}),
        "two_heads": (
            Trainable(q, {"score/kernel": head, "classifier/kernel": head}),
            {},
        ),
        "inner_head": (Trainable(q, {"x/score/kernel": head}), {}),
        "other_head": (Trainable(q, {"out/kernel": head}), {}),
        "head_with_lora": (Trainable({**q, "score/kernel": factors(4, 2)}), {}),
        "table": (Trainable({**q, "embed_tokens/embedding": table}), {}),
        "other_table": (Trainable({**q, "words/embedding": table}), {}),
        "tied_table": (
            Trainable({"model/embed_tokens/embedding": table}),
            {"names": "LLAMA", "tied": True},
        ),
        "conv": (Trainable({**q, "conv/kernel": kernel}), {}),
        "norm": (Trainable(q, {"norm/scale": jnp.ones(4)}), {}),
        "rows": (
            Trainable(
                {**q, "embed_tokens/embedding": Factors(None, jnp.ones((1, 4)), rows)}
            ),
            {"base": {"embed_tokens": {"embedding": jnp.ones((9, 4))}}},
        ),
        "lora_in_a_name": (Trainable({"lora_A/kernel": factors()}), {}),
    }


def of_models() -> dict:
    """Adapters of the golden models, with what else is known of them."""
    import jax
    import numpy as np

    import jlora
    from tests.golden.peft_round_trip import CLASSES, kinds
    from tests.peft.models import BASE_NAMES, model

    found = {}
    for name in (*CLASSES, "moe"):
        m = model(name)
        base_names = BASE_NAMES.get(name, m.names)
        for n, (kind, config) in enumerate(kinds(name).items()):
            fn = lambda p, inputs, m=m: m.fn(p, **inputs)  # noqa: E731
            with jax.numpy_dtype_promotion("standard"):
                plan = jlora.plan(fn, m.params, m.inputs, config=config)
                _, adapter = jlora.split(jax.random.key(n), m.params, plan)
            rng = np.random.default_rng(n)
            adapter = jax.tree.map(
                lambda x, rng=rng: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype),
                adapter,
            )
            tied = name == "gpt2"
            options = {"names": m.names, "tied": tied, "base": m.params}
            found[f"{name}.{kind}"] = adapter, options, m.params, base_names
    return found


def write(folder: pathlib.Path) -> None:
    import jax.numpy as jnp

    import jlora
    from jlora.errors import PeftError
    from jlora.factors import Trainable
    from jlora.peft import GENERIC, maps
    from jlora.peft.layers import RAW

    cases = {k: (*v, None, None) for k, v in by_hand().items()} | of_models()
    for name, (adapter, options, params, base_names) in cases.items():
        if isinstance(options.get("names"), str):
            options["names"] = getattr(maps, options["names"])
        here = folder / name
        told = ""
        try:
            jlora.peft.save(here, adapter, **options)
            jlora.peft.save(here / "portable", adapter, portable=True, **options)
        except PeftError as error:
            told = str(error)
        # What each module's weight gains: the adapter merged into zeros.
        plain = {p: f for p, f in adapter.lora.items() if f.spec.method == "lora"}
        if params is None:
            kernels = {
                p: jnp.zeros((f.a.shape[0], f.b.shape[1]))
                for p, f in plain.items()
                if f.spec.op != "conv"
            }
        else:
            leaves, _ = jlora.paths.flatten(params)
            kernels = {p: jnp.zeros_like(x) for p, x in leaves.items()}
        gains = Trainable({p: f for p, f in plain.items() if p in kernels})
        tree = jlora.merge({p: kernels[p] for p in gains.lora}, gains)
        nested: dict = {}
        for path, x in tree.items():
            *parents, last = path.split("/")
            node = nested
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = x
        names = base_names or options.get("names", GENERIC)
        places = [
            place
            for p, x in kernels.items()
            if x.ndim > 1
            for place in names.places(p, x.shape)
        ]
        linear = {
            p.module.rpartition(".")[2]
            for p in places
            if p.kind in ("linear", "conv1d")
        }
        if any(p.kind in RAW for p in places):  # as in models that keep them fused
            linear.add("experts")
        if nested:
            jlora.peft.save_base(here / "gain", nested, names=names)
        about = {"refused": told, "linear": sorted(linear | {"up"})}
        (here / "about.json").write_text(json.dumps(about))
        print(f"{name:22} {told or 'portable'}")


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the real modules of a server by file, and a stub for every other one."""

    def __init__(self, root: pathlib.Path, real=REAL, stubs=STUBS):
        self.root, self.real, self.stubs = root, real, stubs

    def find_spec(self, name, path=None, target=None):
        if name in self.real:
            file = self.root / (name.replace(".", "/") + ".py")
            return importlib.util.spec_from_file_location(name, file)
        if name.partition(".")[0] in self.stubs:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


class Stub(types.ModuleType):
    """A module that has a class of every name."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__class_getitem__": classmethod(lambda cls, _: cls)})


class Quiet:
    """A logger that keeps everything to itself."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def engine(root: pathlib.Path, linear: list[str], head: tuple | None) -> tuple:
    """Returns vLLM's manager of a worker, as if its engine had built it."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import WorkerLoRAManager

    (ranks,) = (
        ast.literal_eval(node.value.slice)
        for node in ast.parse((root / "vllm/config/lora.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "MaxLoRARanks"
    )
    manager = object.__new__(LoRAModelManager)
    packed = {k: list(v) for k, v in PACKED.items() if {*v} <= {*linear}}
    inside = {name for names in packed.values() for name in names}
    manager.supported_lora_modules = [
        *(name for name in linear if name not in inside),
        *packed,
        "embed_tokens",
        "lm_head",
    ]
    manager.packed_modules_mapping = packed
    manager.packed_modules = {}
    manager.modules = {}
    manager.model = types.SimpleNamespace()
    manager.moe_ep_load_spec = None
    manager.is_pooling_model = head is not None
    manager._pooling_task = "classify"
    manager._is_non_gated_moe = manager._enable_moe_shared_loras = False
    manager._enable_mixed_moe_lora_format = False
    manager._classification_head = head
    worker = object.__new__(WorkerLoRAManager)
    worker._adapter_manager, worker._lora_model_cls = manager, LoRAModel
    worker.lora_config = types.SimpleNamespace(
        max_lora_rank=max(ranks), lora_dtype=None
    )
    worker.max_position_embeddings, worker.vocab_size = None, None
    return worker, manager


def load(root: pathlib.Path, here: pathlib.Path, linear: list[str]):
    """Returns the adapter as vLLM holds it, or raises what vLLM raises."""
    config = json.loads((here / "adapter_config.json").read_text())
    head = None
    if config["modules_to_save"]:
        name = config["modules_to_save"][0].rpartition(".")[2]
        wrapper = types.SimpleNamespace(max_lora_cls_labels=100, input_size=None)
        head = name, wrapper
        from safetensors.torch import load_file

        tensor = load_file(here / "adapter_model.safetensors").get(f"{P}{name}.weight")
        wrapper.input_size = None if tensor is None else tensor.shape[-1]
    worker, manager = engine(root, linear, head)
    request = types.SimpleNamespace(
        lora_path=str(here), lora_int_id=1, lora_name="", is_3d_lora_weight=False
    )
    adapter = worker._load_adapter(request)
    held = {
        name: (lora.scaling, *(x.double().clone() for x in (lora.lora_a, lora.lora_b)))
        for name, lora in adapter.loras.items()
    }
    for name in held:
        stem, _, last = name.rpartition(".")
        for whole, names in manager.packed_modules_mapping.items():
            if last in names:
                manager.packed_modules[f"{stem}.{whole}"] = [
                    f"{stem}.{part}" for part in names
                ]
    manager._create_merged_loras_inplace(adapter)
    return held


def set_up(root: pathlib.Path) -> None:
    """Makes the modules of vLLM importable."""
    sys.meta_path.insert(0, Stubs(root))
    import vllm.logger
    import vllm.tracing
    import vllm.utils.torch_utils

    vllm.logger.init_logger = lambda name: Quiet()
    vllm.tracing.instrument = lambda **_: lambda function: function
    vllm.utils.torch_utils.PIN_MEMORY = False
    from vllm.lora import worker_manager

    worker_manager.get_adapter_absolute_path = lambda path: path


def weights(folder: pathlib.Path) -> dict:
    """Returns the tensors of a model, found and read by vLLM's own functions."""
    loader = importlib.import_module(LOADER)
    loader._get_available_ram_bytes = lambda: 2**40
    files = [str(file) for file in folder.glob("*.safetensors")]
    files = loader.filter_duplicate_safetensors_files(files, str(folder), INDEX)
    return dict(loader.safetensors_weights_iterator(files, use_tqdm_on_load=False))


def check_run(run: pathlib.Path, root: pathlib.Path) -> int:
    set_up(root)
    about = json.loads((run / "adapter" / "adapter_config.json").read_text())
    linear = sorted({name.rpartition(".")[2] for name in about["target_modules"]})
    held = load(root, run / "adapter", linear)
    base = weights(pathlib.Path(about["base_model_name_or_path"]))
    merged = weights(run / "merged")
    bad, worst = int(base.keys() != merged.keys()), 0.0
    for name, tensor in base.items():
        gain = merged[name].double() - tensor.double()
        scaling, a, b = held.pop(name.removesuffix(".weight"), (0, gain * 0, gain * 0))
        update = scaling * (b @ a) if scaling else gain * 0
        off = (update - gain).abs().max().item()
        worst = max(worst, off / tensor.double().abs().max().item())
    print(f"{len(merged)} tensors, {len(about['target_modules'])} adapted modules")
    print(f"update and merged - base differ by {worst:.1e} of the largest weight")
    return int(bad or held or worst > 1e-6)


def check(folder: pathlib.Path, root: pathlib.Path) -> int:
    from safetensors.torch import load_file

    set_up(root)
    bad, compared, worst = 0, 0, 0.0
    for here in sorted(folder.glob("*/")):
        about = json.loads((here / "about.json").read_text())
        portable = here / "portable"
        told, held = "", {}
        try:
            held = load(root, portable if portable.exists() else here, about["linear"])
        except Exception as error:  # whatever vLLM raises
            told = f"{type(error).__name__}: {error}"
        gains = {}
        if (here / "gain").exists() and not told:
            gains = load_file(here / "gain" / "model.safetensors")
        for name, (scaling, a, b) in held.items():
            gain = gains.get(f"{name}.weight")
            if gain is None:
                continue
            update = scaling * (b @ a)
            wanted = gain.double()
            sides = [s for s in (update, update.T) if s.shape == wanted.shape]
            off = min((s - wanted).abs().max() for s in sides)
            error = (off / wanted.abs().max()).item()
            worst, compared = max(worst, error), compared + 1
            if error > 1e-5:
                print(f"!! {here.name}: {name} is off by {error:.1e}")
        agree = bool(told) == bool(about["refused"])
        bad += not agree
        says = f"vLLM rejects: {told[:150]}" if told else "vLLM loads"
        own = "jlora refuses" if about["refused"] else "portable"
        print(f"{'   ' if agree else '!! '}{here.name:22} {own:14} {says}")
    print(f"{bad} disagreements; {compared} updates, worst relative error {worst:.1e}")
    return int(bad > 0 or worst > 1e-5)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(pathlib.Path(sys.argv[2]))
    else:
        step = check_run if sys.argv[1] == "run" else check
        sys.exit(step(*map(pathlib.Path, sys.argv[2:])))
