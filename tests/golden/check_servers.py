"""What vLLM's own code, PEFT and transformers do with adapters of `server_cases.py`.

    python tests/golden/check_servers.py vllm VLLM         # torch, safetensors, regex
    python tests/golden/check_servers.py memory VLLM       # the same, and msgspec
    python -m tests.golden.check_servers peft              # jlora, torch, peft
    python -m tests.golden.check_servers transformers      # the same

VLLM is the folder where a wheel of vLLM is unpacked, see `check_vllm.py`. Its readers
run as they are, from `WorkerLoRAManager._load_adapter` to the loop that hands A and B
to modules. Only the modules are made here: their names are those of the base's tensors,
mapped by vLLM's own `WeightsMapper` with what the model's class says. The result is
`servers.json`, with which `tests/peft/test_servers.py` compares `jlora.peft.validate`.

`memory` takes `load` from `docs/live_servers.md` and gives vLLM each whole adapter's
tensors with it. What vLLM then holds is what its own `_load_adapter` reads of files.

PEFT and transformers load each adapter into a model of torch's, and what `validate`
says is compared here: is it loaded, and does each tensor reach the model?
"""

import dataclasses
import json
import pathlib
import random
import re
import sys
import tempfile
import types

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.golden import check_vllm, server_cases
from tests.golden.make_servers import Models

TABLE = pathlib.Path(__file__).parent / "servers.json"
MARK = 0.375  # what the tensors of an adapter hold, and nothing else does
CLASSIFIER = "ForSequenceClassification"


def mapper_class(root: pathlib.Path) -> type:
    """vLLM's `WeightsMapper`, from the file that has much else."""
    text = (root / "vllm/model_executor/models/utils.py").read_text()
    start = text.index("@dataclass\nclass WeightsMapper")
    source = text[start : text.index("\n\n\n", start)]
    names = {n: getattr(dataclasses, n) for n in ("dataclass", "field", "replace")}
    names["re"] = re
    exec(
        "from __future__ import annotations\nfrom collections.abc import *\n" + source,
        names,
    )
    return names["WeightsMapper"]


class Vllm:
    """vLLM with one model."""

    def __init__(self, root: pathlib.Path, base: pathlib.Path):
        from safetensors.torch import load_file

        self.root = root
        self.config = json.loads((base / "config.json").read_text())
        self.tensors = load_file(base / "model.safetensors")
        name = self.config["architectures"][0]
        self.pooling = name.endswith(CLASSIFIER)
        models = Models(root / "vllm/model_executor/models")
        self.about = attributes(models, name)
        self.mapper = mapper_class(root)(**self.about.get("hf_to_vllm_mapper") or {})
        self.packed = {
            k: list(v) for k, v in self.about["packed_modules_mapping"].items()
        }
        lasts = {n.split(".")[-2] for n in self.tensors if n.count(".")}
        for whole, parts in self.about.get("siblings", {}).items():
            if {*parts} <= lasts:  # its `__init__` goes by the config
                self.packed[whole] = parts
        self.modules = self._modules()

    def _modules(self) -> dict[str, tuple[int, ...]]:
        """vLLM's linear modules, tables and banks of experts, as weights name them."""
        found: dict[str, tuple[int, ...]] = {}
        part_of = {p: k for k, parts in self.packed.items() for p in parts}
        for name, tensor in self.tensors.items():
            mapped = self.mapper.map_name(name)
            if mapped is None or tensor.ndim < 2:
                continue
            if ".experts." in mapped:
                found[mapped[: mapped.index(".experts") + 8]] = ()
                continue
            module = mapped.removesuffix(".weight")
            parent, _, last = module.rpartition(".")
            last = part_of.get(last, last)
            found[f"{parent}.{last}".strip(".")] = tuple(tensor.shape)
        if "lm_head" in self.about["embedding_modules"]:
            head = self.mapper.map_name("lm_head.weight").removesuffix(".weight")
            found.setdefault(head, found.get("model.embed_tokens", ()))
        return found

    def manager(self, max_rank: int = 512):
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.model_manager import LoRAModelManager
        from vllm.lora.worker_manager import WorkerLoRAManager

        m = object.__new__(LoRAModelManager)
        packed = dict(self.packed)
        m._enable_moe_shared_loras = m._enable_mixed_moe_lora_format = False
        stacked = bool(self.about.get("is_3d_moe_weight"))
        if any(n.endswith(".experts") for n in self.modules) and not stacked:
            packed["experts"] = self.experts()
        tables = set(self.about["embedding_modules"])
        names = {
            n: shape
            for n, shape in self.modules.items()
            if not n.endswith(("embed_tokens", "lm_head", "embeddings", "wte", "wpe"))
            or n.rpartition(".")[2] in tables
        }
        language = re.search(r"language_model='([^']+)'", self.about.get("mm", ""))
        m.supports_mm = language is not None
        if language:
            m.mm_mapping = types.SimpleNamespace(language_model=[language[1]])
        m.supported_lora_modules = [
            *{n.rpartition(".")[2] for n in names} - {"lm_head", "embed_tokens"},
            *tables,
        ]
        m.packed_modules_mapping, m.packed_modules = packed, {}
        m.modules = {
            n: object() for n in names if not language or n.startswith(language[1])
        }
        for n in m.modules:
            m._register_packed_modules(n)
        m.model = types.SimpleNamespace(hf_to_vllm_mapper=self.mapper)
        m.model.lora_skip_prefixes = self.about.get("lora_skip_prefixes") or []
        m.moe_ep_load_spec, m.is_pooling_model = None, self.pooling
        m._is_non_gated_moe, m._pooling_task = False, "classify"
        m._is_3d_moe_model = stacked
        m._classification_head = None
        if self.pooling:
            wrapper = types.SimpleNamespace(max_lora_cls_labels=100)
            wrapper.input_size = self.config["hidden_size"]
            head = "score" if "score.weight" in self.tensors else "classifier"
            m._classification_head = head, wrapper
        w = object.__new__(WorkerLoRAManager)
        w._adapter_manager, w._lora_model_cls = m, LoRAModel
        w.lora_config = types.SimpleNamespace(max_lora_rank=max_rank, lora_dtype=None)
        w.max_position_embeddings = None
        w.vocab_size = self.config.get("vocab_size")
        return w, m

    def experts(self) -> list[str]:
        found = [re.search(r"(experts\.\d+\.\w+)\.weight$", n) for n in self.tensors]
        return list(dict.fromkeys(f[1] for f in found if f))

    def shape(self, name: str, target: str) -> tuple[int, ...] | None:
        """The base's shape of what an adapter names, by vLLM's name of it."""
        rename = self.mapper.get_rename_mapper()
        for key, tensor in self.tensors.items():
            mapped = rename.map_name(key)
            if mapped in (f"{name}.weight", f"model.{name}.weight"):
                return tuple(tensor.shape)
        return None

    def says(self, folder: pathlib.Path, max_rank: int = 512) -> str | list[str]:
        """What vLLM does: its error, or for each tensor what becomes of it."""
        import torch
        from safetensors import safe_open
        from vllm.lora.utils import (
            is_base_embedding_weights,
            parse_fine_tuned_lora_name,
        )

        config = json.loads((folder / "adapter_config.json").read_text())
        if self.about["packed_modules_mapping"] is None or not self.lora:
            return "does not support LoRA yet"
        worker, manager = self.manager(max_rank)
        request = types.SimpleNamespace(
            lora_path=str(folder), lora_int_id=1, lora_name="", is_3d_lora_weight=False
        )
        touched: dict[str, object] = {}
        look_up = manager._get_lora_layer_weights

        def looked_up(model, name):
            lora = look_up(model, name)
            if lora is not None:
                touched[lora.module_name] = name
            return lora

        try:
            adapter = worker._load_adapter(request)
            raw = {n: (x.lora_a, x.lora_b) for n, x in adapter.loras.items()}
            manager._get_lora_layer_weights = looked_up
            if manager._is_3d_moe_model:
                for n in [n for n in manager.modules if n.endswith(".experts")]:
                    half = look_up(adapter, n), look_up(adapter, f"{n}.base_layer")
                    if half[0] is not None:  # `_stack_moe_lora_weights`
                        assert half[1] is not None
                        touched |= dict.fromkeys((n, f"{n}.base_layer"))
            manager._create_merged_loras_inplace(adapter)
            for name in manager.modules:
                looked_up(adapter, name)
            altered = set()
            for name in touched.keys() & raw.keys():
                altered |= (
                    {name}
                    if self.copied(name, *raw[name], config, max_rank, torch)
                    else set()
                )
        except Exception as error:  # whatever vLLM raises
            return f"{type(error).__name__}: {error}"
        rename, slots = self.mapper.get_rename_mapper(), {}
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            for name in sorted(file.keys()):
                left = is_base_embedding_weights(name)
                parse = parse_fine_tuned_lora_name
                slots[name] = None if left else parse(name, rename)
        return [
            self._fate(slot, slots, adapter, touched, altered)
            for slot in slots.values()
        ]

    def _fate(self, slot, slots, adapter, touched, altered) -> str:
        """What becomes of a tensor, which vLLM takes for one factor of a module."""
        if slot is None:
            return "left"
        if slot[0] in adapter.modules_to_save:
            return "used"
        if slot[0] not in touched:
            return "lost"
        own = [other for other in slots.values() if other and other[0] == slot[0]]
        part = len(own) > len({*own}) or slot[0] in altered
        return "altered" if part else "used"  # it keeps one of several, or a part

    def copied(self, name, a, b, config, most, torch) -> bool:
        """`BaseLinearLayerWithLoRA.set_lora`; whether it leaves some weights out."""
        if a is None or b is None:
            parts = [p for own in self.packed.values() if len(own) > 1 for p in own]
            if name.rpartition(".")[2] in parts:
                return True  # `MergedColumnParallelLinearWithLoRA.set_lora`
            raise TypeError(f"{name} lacks a factor")
        shape = self.shape(name, name)
        if name.endswith((".experts", ".experts.base_layer")):
            return False
        n_out, n_in = shape or (b.shape[0], a.shape[1])
        last = name.rpartition(".")[2]
        if last in self.about["embedding_modules"] and last != "lm_head":
            n_out, n_in = n_in, n_out  # `VocabParallelEmbeddingWithLoRA.set_lora`
        for x, sizes in ((a, (most, n_in)), (b, (n_out, most))):
            slot = torch.zeros(sizes)
            slot[: x.shape[0], : x.shape[1]].copy_(x)
        rank = config["r"]
        for key, value in (config.get("rank_pattern") or {}).items():
            rank = value if re.match(rf"(.*\.)?({key})$", name) else rank
        full = a.shape == (rank, n_in) and b.shape == (n_out, rank)
        return not full

    @property
    def lora(self) -> bool:
        return "SupportsLoRA" in self.about["bases"]


def attributes(models: Models, architecture: str) -> dict:
    """What the registry's class of an architecture says."""
    import ast

    made = architecture.replace(CLASSIFIER, "ForCausalLM")
    for name in (architecture, made):
        for node in models.tree("registry").body:
            value = getattr(node, "value", None)
            if isinstance(value, ast.Dict):
                for key, where in zip(value.keys, value.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == name:
                        return {
                            "packed_modules_mapping": {},
                            "embedding_modules": {},
                            **models.attributes(*ast.literal_eval(where)),
                        }
    raise KeyError(architecture)


def vllm(root: pathlib.Path) -> int:
    check_vllm.set_up(root)
    return server_cases.recorded(
        "vLLM", server_cases.cases(), lambda base: Vllm(root, base), TABLE
    )


def memory(root: pathlib.Path) -> int:
    """Compares the documented way from memory with vLLM's own from files."""
    import msgspec
    import torch
    from safetensors.torch import load_file

    check_vllm.set_up(root)
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.request import LoRARequest

    page = pathlib.Path(__file__).parents[2] / "docs" / "live_servers.md"
    text = re.search(r"class TensorRequest.*?\n    \)\n", page.read_text(), re.DOTALL)[
        0
    ]
    own = {"msgspec": msgspec, "LoRARequest": LoRARequest, "PEFTHelper": PEFTHelper}
    exec(text, own)
    loaded = unchecked = bad = 0
    for number, case in enumerate([*server_cases.of_golden(), *server_cases.plain()]):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            base = server_cases.write_base(folder / "bases", case.base)
            here = folder / str(number)
            server_cases.write_adapter(here, case)
            worker, _ = Vllm(root, base).manager()
            tensors = load_file(here / "adapter_model.safetensors")
            request = own["TensorRequest"](
                "own", 1, str(here), config=case.config, tensors=tensors
            )
            held = []
            for load in (worker._load_adapter, lambda r, w=worker: own["load"](w, r)):
                try:
                    held.append(load(request).loras)
                except Exception as error:  # whatever vLLM raises
                    held.append(f"{type(error).__name__}: {error}")
        files, dicts = held
        if "expected target modules" in files:
            unchecked += 1  # only files have their names checked
            continue
        if isinstance(files, str) or isinstance(dicts, str):
            same = files == dicts
        else:
            loaded += 1
            same = files.keys() == dicts.keys() and all(
                torch.equal(x.lora_a, dicts[n].lora_a)
                and torch.equal(x.lora_b, dicts[n].lora_b)
                and x.scaling == dicts[n].scaling
                for n, x in files.items()
            )
        if not same:
            bad += 1
            print(f"!! {case.name}: from files {files!r:.150}, else {dicts!r:.150}")
    print(
        f"from memory: {loaded} adapters loaded, {bad} otherwise than from files, "
        f"{unchecked} with names that only files have checked"
    )
    return int(bad > 0)


def torch_cases() -> list[server_cases.Case]:
    """PEFT's golden adapters, and each break on one of each model."""
    whole = list(server_cases.of_golden())
    first = (
        "llama.linear",
        "llama.embedding",
        "tied.tied",
        "gpt2.linear",
        "bert.linear",
    )
    rng = random.Random(1)
    broken = [
        server_cases.broken(case, rng, name)
        for name in server_cases.BREAKS
        for case in whole
        if case.name in first and server_cases.changes(case, name)
    ]
    return whole + broken


def loaded(folder: pathlib.Path, case: server_cases.Case, server: str) -> dict | str:
    """Which tensors of an adapter reach a model of torch's, or the error."""
    import peft
    import torch
    import transformers

    here = pathlib.Path(__file__).parent / "peft" / case.base
    config = transformers.AutoConfig.from_pretrained(here)
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(config)
    try:
        if server == "peft":
            model = peft.PeftModel.from_pretrained(model, str(folder))
        else:
            model.load_adapter(str(folder))
    except Exception as error:  # whatever they raise
        return f"{type(error).__name__}: {error}"[:150]
    begin = "" if server == "peft" else server_cases.P
    short = {".default": "", "modules_to_save.": "", "_vector.weight": "_vector"}
    there = {}
    for name, x in model.state_dict().items():
        for old, new in short.items():
            name = name.replace(old, new)
        if bool((x == MARK).all()):
            there[begin + name] = tuple(x.shape)
    own = {n: n if n.startswith(server_cases.P) else begin + n for n in case.tensors}
    own = {n: name.replace(".default", "") for n, name in own.items()}  # as `there`
    return {
        n: any(there.get(name) == x.shape for name in _also(own[n], server))
        for n, x in case.tensors.items()
    }


def _also(name: str, server: str) -> tuple[str, ...]:
    """A tensor's names in memory: transformers takes `model.` in and out of them."""
    inner = name.removeprefix(server_cases.P)
    if server == "peft":
        return (name,)
    added, less = f"model.{inner}", inner.removeprefix("model.")
    return name, server_cases.P + added, server_cases.P + less


def compared(server: str) -> int:
    """Compares `validate` with a library of torch's; returns the exit code."""
    import jlora

    bad, cases = 0, torch_cases()
    for case in cases:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            case.tensors = {n: x * 0 + MARK for n, x in case.tensors.items()}
            server_cases.write_adapter(folder, case)
            base = pathlib.Path(__file__).parent / "peft" / case.base
            said = loaded(folder, case, server)
            report = jlora.peft.validate(folder, base, server=server)
        outcomes = {v.name: v.outcome for v in report.verdicts}
        refused = "refused" in outcomes.values()
        guessed = outcomes.get("adapter_config.json: target_modules") == "altered"
        wrong = isinstance(said, str) != refused
        if not refused and not wrong and not guessed:
            wrong = any(
                got != (outcomes[n] in ("applied", "altered"))
                for n, got in said.items()
                if outcomes[n] != "copy"
            )
        if wrong:
            bad += 1
            print(f"!! {case.name}: {said if refused or isinstance(said, str) else ''}")
    print(f"{server}: {bad} of {len(cases)} adapters are judged otherwise")
    return int(bad > 0)


if __name__ == "__main__":
    step, *folders = sys.argv[1:]
    with_vllm = {"vllm": vllm, "memory": memory}
    code = with_vllm[step](pathlib.Path(*folders)) if folders else compared(step)
    sys.exit(code)
