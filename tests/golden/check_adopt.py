"""`jlora.adopt` and `jlora.hand_back` beside the libraries whose factors they take.

    python tests/golden/check_adopt.py LIBRARY [--openpi CHECKOUT] [--easydel WHEEL]
        [--maxtext CHECKOUT] [--write]

Run it where the library is installed, with jlora: `qwix` (0.1.8, with Flax), `nnx`
(Flax), `tunix` (google-tunix 0.1.7), `gemma` (gemma 4.0.1), `keras` (3.15.1,
KERAS_BACKEND=jax), `openpi` (a checkout of Physical-Intelligence/openpi, with Flax),
`easydel` (the wheel of easydel 0.3.0, with Flax: its `eLoRA` around Flax's layers),
`maxtext` (a checkout of AI-Hypercomputer/maxtext, Python 3.12, with what it imports),
`skyrl` (skyrl-tx 0.3.0, with Flax).

For each model, with random factors: the library's own forward is compared with
`apply_lora` of the base model's function, with a plan and without, and with the merged
model. An adapter that jlora changed is handed back, and the library's forward compared
again. `--write` puts what was found into `adopt.json`. The exit code is 1 if something
differs by more than 1e-5, relative to the largest output.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import operator
import pathlib
import subprocess
import sys
import tempfile
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora

LIMIT, RESULTS = 1e-5, pathlib.Path(__file__).parent / "adopt.json"
TOKENS = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])
Tree = Any


class Case(NamedTuple):
    """A model with a library's own LoRA in it.

    Attributes:
      name: of the model.
      library: which rules are for it.
      bare: the parameters of its base model, by themselves.
      params: its parameters with the factors, as `adopt` takes them.
      theirs: its forward function of `params`.
      base: the base model's function of `frozen`.
      settings: `alpha` and `rslora`.
      names: the map of its base, to save its adapter for PEFT.
      alone: whether shapes tell the axes without a plan.
    """

    name: str
    library: str
    bare: Tree
    params: Tree
    theirs: Callable[[Tree], jax.Array]
    base: Callable[[Tree], jax.Array]
    settings: dict[str, Any]
    names: Any = None
    alone: bool = True


def filled(params: Tree) -> Tree:
    """Returns `params` with random numbers in each factor, the base as it is."""

    def fill(keys: Any, x: Any) -> Any:
        path = jax.tree_util.keystr(keys)
        if "lora" not in path.casefold():
            return x
        seed = sum(map(ord, path))
        return 0.3 * jax.random.normal(jax.random.key(seed), x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, params)


def nnx_case(
    name: str, library: str, make: Any, adapted: Any, call: Any, **fields: Any
) -> Case:
    """Returns a case of NNX: `make()` is the base, `adapted(make())` has LoRA."""
    from flax import nnx

    graph, state, rest = nnx.split(make(), nnx.Param, ...)
    theirs, params, more = nnx.split(adapted(make()), nnx.Param, ...)

    def copied(state: Tree) -> Tree:  # a scanned layer counts its keys in it
        return jax.tree.map(lambda x: x, state)

    def base(frozen: Tree) -> jax.Array:
        return call(nnx.merge(graph, frozen, copied(rest)))

    def forward(params: Tree) -> jax.Array:
        return call(nnx.merge(theirs, params, copied(more)))

    return Case(name, library, state, filled(params), forward, base, **fields)


def qwix(given: argparse.Namespace) -> Iterator[Case]:
    """Yields models of NNX and Linen under `qwix.LoraProvider`."""
    import qwix as lib
    from flax import linen as nn, nnx

    provider = lib.LoraProvider(module_path=".*", rank=2, alpha=6.0)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))

    class Net(nnx.Module):
        def __init__(self, square: int):
            rngs = nnx.Rngs(0)
            self.up = nnx.Linear(8, 16, rngs=rngs)
            self.square = nnx.Linear(16, square, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                2, square, qkv_features=12, decode=False, rngs=rngs
            )
            self.conv = nnx.Conv(square, 6, (3,), rngs=rngs)
            self.blocks = nnx.List([nnx.Linear(6, 4, rngs=rngs)])
            self.experts = nnx.Einsum("ebd,edf->ebf", (3, 4, 7), rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = self.square(nnx.relu(self.up(x)))
            x = self.conv(x + self.attention(x))
            for block in self.blocks:
                x = block(x)
            return self.experts(jnp.broadcast_to(x.reshape(1, -1, 4), (3, 10, 4)))

    for square in (18, 16):
        yield nnx_case(
            f"nnx, {'square' if square == 16 else 'oblong'} kernels",
            "qwix",
            lambda square=square: Net(square),
            lambda net: lib.apply_lora_to_model(net, provider, x, rngs=nnx.Rngs(1)),
            lambda net: net(x),
            settings={"alpha": 6.0},
            alone=square == 18,
        )

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            y = nn.DenseGeneral((2, 3), name="heads")(x)
            y = nn.DenseGeneral(12, axis=(-2, -1), name="join")(nn.relu(y))
            return x + nn.Dense(8, name="out")(y), None

    for library, axis in (("qwix", 0), ("maxtext", 1)):
        scanned = nn.scan(
            Block,
            variable_axes={"params": axis},
            split_rngs={"params": True},
            length=3,
        )

        class Stack(nn.Module):
            scanned: Any

            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                return self.scanned(name="layers")(x, None)[0]

        class Model(nn.Module):
            scanned: Any

            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                return Stack(self.scanned, name="decoder")(x)

        model = Model(scanned)
        adapted = lib.apply_lora_to_model(model, provider)
        params = filled(adapted.init(jax.random.key(0), x))
        yield Case(
            f"linen, scanned along axis {axis}",
            library,
            model.init(jax.random.key(0), x),
            params,
            lambda p, adapted=adapted: adapted.apply(p, x),
            lambda p, model=model: model.apply(p, x),
            {"alpha": 6.0},
        )


def nnx(given: argparse.Namespace) -> Iterator[Case]:
    """Yields models with `nnx.LoRA` and `nnx.LoRALinear`."""
    from flax import nnx as lib

    yield wrapped("nnx.LoRA and nnx.LoRALinear", "nnx", lib.LoRA)


def easydel(given: argparse.Namespace) -> Iterator[Case]:
    """Yields a model with EasyDeL's `eLoRA`."""
    with zipfile.ZipFile(given.easydel) as wheel:
        text = wheel.read("easydel/layers/linears/_lora.py").decode()
    lib: dict[str, Any] = {"__name__": "easydel_lora"}
    exec(compile(text, "_lora.py", "exec"), lib)
    yield wrapped("eLoRA", "easydel", lib["eLoRA"])


def wrapped(name: str, library: str, lora: Any) -> Case:
    """Returns a model with linear layers in `lora`, and one `nnx.LoRALinear`."""
    from flax import nnx as lib

    x = jax.random.normal(jax.random.key(0), (2, 5, 8))

    class Net(lib.Module):
        def __init__(self, wrap: Any = lambda x: x, **lora: Any):
            rngs = lib.Rngs(0)
            cls = lib.LoRALinear if lora else lib.Linear
            self.up = wrap(lib.Linear(8, 8, rngs=rngs))
            self.blocks = lib.List(
                [wrap(lib.Linear(8, 8, rngs=rngs)) for _ in range(2)]
            )
            self.down = cls(8, 3, **lora, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = lib.relu(self.up(x))
            for block in self.blocks:
                x = x + block(x)
            return self.down(x)

    def wrap(linear: Any) -> Any:
        sizes = linear.in_features, 2, linear.out_features
        return lora(*sizes, base_module=linear, rngs=lib.Rngs(1))

    return nnx_case(
        name,
        library,
        Net,
        lambda _: Net(wrap, lora_rank=3),
        lambda net: net(x),
        settings={},
    )


def tunix(given: argparse.Namespace) -> Iterator[Case]:
    """Yields models of tunix under qwix, as its trainers make them."""
    import qwix as lib
    from flax import nnx
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.qwen3 import model as qwen3

    from jlora.peft import maps

    n = TOKENS.shape[1]
    causal = jnp.tril(jnp.ones((1, n, n), bool))
    inputs = {"positions": jnp.arange(n)[None], "cache": None, "attention_mask": causal}
    sizes = {"num_layers": 2, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4,
             "head_dim": 8, "num_kv_heads": 2}  # fmt: skip
    small = {"rope_theta": 10_000, "norm_eps": 1e-6, "vocab_size": 64}
    full = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    models = {
        "qwen3": (
            qwen3.Qwen3,
            qwen3.ModelConfig(**sizes, **small, **full, use_tied_embedding=True),
            ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
            maps.TUNIX_QWEN3,
        ),
        "gemma3": (
            gemma3.Gemma3,
            gemma3.ModelConfig(
                **sizes, num_embed=64, sliding_window_size=64, param_dtype=jnp.float32
            ),
            ".*(q_einsum|kv_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj)",
            maps.TUNIX_GEMMA3,
        ),
    }
    for name, (cls, config, pattern, names) in models.items():
        provider = lib.LoraProvider(module_path=pattern, rank=3, alpha=6.0)

        def call(model: Any) -> jax.Array:
            positions, cache, mask = inputs.values()
            return model(TOKENS, positions, cache, mask)[0]

        yield nnx_case(
            f"tunix {name}",
            "qwix",
            lambda cls=cls, config=config: cls(config, rngs=nnx.Rngs(0)),
            lambda model, provider=provider: lib.apply_lora_to_model(
                model, provider, TOKENS, *inputs.values(), rngs=nnx.Rngs(1)
            ),
            call,
            settings={"alpha": 6.0},
            names=names,
            alone=False,
        )


def maxtext(given: argparse.Namespace) -> Iterator[Case]:
    """Yields MaxText's decoders with the LoRA that its trainers give them."""
    sys.path.insert(0, str(pathlib.Path(given.maxtext) / "src"))
    from flax import nnx
    from maxtext.configs import pyconfig
    from maxtext.utils import lora_utils, maxtext_utils, model_creation_utils

    settings = {
        "base_emb_dim": 32, "base_num_query_heads": 4, "base_num_kv_heads": 2,
        "head_dim": 8, "base_mlp_dim": 48, "base_num_decoder_layers": 3,
        "vocab_size": 64, "max_target_length": 8, "per_device_batch_size": 1,
        "enable_checkpointing": False, "dtype": "float32", "weight_dtype": "float32",
        "attention": "dot_product", "skip_jax_distributed_system": True,
        "matmul_precision": "highest", "run_name": "check", "pure_nnx": True,
        "enable_nnx": True, "pure_nnx_decoder": True,
        "lora": {"enable_lora": True, "lora_rank": 3, "lora_alpha": 6.0},
    }  # fmt: skip
    yml = str(pathlib.Path(given.maxtext) / "src/maxtext/configs/base.yml")
    for kind in ("llama2", "qwen3", "gemma2"):
        for scan in (False, True):
            own = settings | {"scan_layers": scan, "decoder_block": kind}
            if kind == "gemma2":
                own |= {"base_num_decoder_layers": 4}
                path = ".*(query|key|value|out|wi_0|wi_1|wo)"
                own["lora"] = settings["lora"] | {"lora_module_path": path}
            config = pyconfig.initialize(["check", yml], **own)
            mesh = maxtext_utils.get_mesh_from_config(config)

            def make(config: Any = config, mesh: Any = mesh) -> Any:
                rngs = nnx.Rngs(params=0, dropout=1)
                return model_creation_utils.from_config(config, mesh=mesh, rngs=rngs)

            positions = jnp.arange(TOKENS.shape[1])[None]
            yield nnx_case(
                f"maxtext {kind}, {'scanned' if scan else 'layer by layer'}",
                "maxtext",
                make,
                lambda model, config=config, mesh=mesh: lora_utils.apply_lora_to_model(
                    model, mesh, config
                ),
                lambda model, positions=positions: model(
                    TOKENS, positions, enable_dropout=False
                ),
                settings={"alpha": 6.0},
                alone=False,
            )


def skyrl(given: argparse.Namespace) -> Iterator[Case]:
    """Yields one slot of layers of SkyRL-tx, whose other slots have other factors."""
    from flax import nnx
    from tx.layers.lora import LoRAEmbed, LoRALinear

    slot, init = 1, nnx.initializers.normal()
    more = {"sharding": (None, None), "max_lora_adapters": 3, "max_lora_rank": 4}
    more |= {"rngs": nnx.Rngs(0)}

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.embed = LoRAEmbed(11, 8, embedding_init=init, **more)
            self.square = LoRALinear(8, 8, use_bias=True, kernel_init=init, **more)
            self.out = LoRALinear(8, 5, use_bias=False, kernel_init=init, **more)

        def __call__(self, ids: jax.Array | None) -> jax.Array:
            x = self.embed(jnp.tile(TOKENS, (2, 1)), ids)
            return self.out(nnx.relu(self.square(x, ids)), ids)

    with nnx.use_eager_sharding(False):
        graph, state, rest = nnx.split(Net(), nnx.Param, ...)

    def is_factor(keys: Any) -> bool:
        return "lora_" in jax.tree_util.keystr(keys)

    def picked(keys: Any, x: jax.Array) -> jax.Array:
        return x[slot] if is_factor(keys) else x

    def theirs(params: Tree) -> jax.Array:
        def put(keys: Any, x: jax.Array) -> jax.Array:
            return jnp.stack([x * 0 + 1, x, x * 2]) if is_factor(keys) else x

        whole = jax.tree_util.tree_map_with_path(put, params)
        return nnx.merge(graph, whole, rest)(jnp.full(2, slot))

    params = filled(jax.tree_util.tree_map_with_path(picked, state))
    flat = nnx.to_flat_state(state)
    bare = nnx.from_flat_state([(p, x) for p, x in flat if "lora" not in str(p)])

    def base(frozen: Tree) -> jax.Array:
        own = [*nnx.to_flat_state(frozen)]
        own += [(p, x) for p, x in flat if "lora" in str(p)]
        return nnx.merge(graph, nnx.from_flat_state(own), rest)(None)

    yield Case(
        "a slot of its layers", "skyrl", bare, params, theirs, base, {"alpha": 4.0}
    )


def gemma(given: argparse.Namespace) -> Iterator[Case]:
    """Yields `gm.nn.LoRA` around Gemma 3, and `gemma.peft` in a model of its own."""
    import dataclasses

    from flax import linen as nn
    from gemma import gm, peft

    from jlora.peft import maps

    sizes = {"num_embed": 64, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4,
             "num_kv_heads": 2, "head_dim": 16, "sliding_window_size": 64,
             "attention_types": (gm.nn.AttentionType.LOCAL_SLIDING,) * 2,
             "vision_encoder": None}  # fmt: skip
    for kind in (gm.nn.Gemma3_1B, gm.nn.Gemma2_2B):
        config = dataclasses.replace(kind.config, **sizes)
        model = gm.nn.Transformer(config=config, dtype=jnp.float32, tokens="tokens")
        adapted = gm.nn.LoRA(rank=3, model=model, dtype=jnp.float32)
        params = filled(adapted.init(jax.random.key(0), TOKENS)["params"])
        yield Case(
            f"gm.nn.LoRA ({kind.__name__})",
            "gemma",
            model.init(jax.random.key(0), TOKENS)["params"],
            params,
            lambda p, adapted=adapted: adapted.apply({"params": p}, TOKENS).logits,
            lambda p, model=model: model.apply({"params": p}, TOKENS).logits,
            {},
            maps.GEMMA3_EINSUM if kind is gm.nn.Gemma3_1B else maps.GEMMA2_2B_EINSUM,
        )

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.Dense(8, name="square")(x)
            x = nn.DenseGeneral((2, 3), name="heads")(x)
            return nn.DenseGeneral(5, axis=(-2, -1), name="join")(x)

    def replace(module: nn.Module) -> nn.Module:
        match module:
            case nn.Dense():
                return peft.LoRADense(rank=2, wrapped=module, dtype=jnp.float32)
            case nn.DenseGeneral():
                return peft.LoRADenseGeneral(rank=2, wrapped=module, dtype=jnp.float32)
        return module

    x, net = jax.random.normal(jax.random.key(0), (2, 4, 8)), Net()

    def forward(params: Tree) -> jax.Array:
        with peft.ModuleInterceptor(replace):
            return net.apply({"params": params}, x)

    with peft.ModuleInterceptor(replace):
        params = filled(net.init(jax.random.key(0), x)["params"])
    yield Case(
        "gemma.peft, Linen",
        "gemma",
        net.init(jax.random.key(0), x)["params"],
        params,
        forward,
        lambda p: net.apply({"params": p}, x),
        {},
        alone=False,
    )


def keras(given: argparse.Namespace) -> Iterator[Case]:
    """Yields layers with `enable_lora`, and a backbone of KerasHub if installed."""
    import keras as lib

    layers = [
        lib.layers.Embedding(11, 8),
        lib.layers.Dense(8),
        lib.layers.EinsumDense("btd,dnh->btnh", (None, 2, 4)),
        lib.layers.EinsumDense("btnh,nhd->btd", (None, 8)),
        lib.layers.Conv1D(6, 3),
    ]
    inputs = lib.Input((8,), dtype="int32")
    x = inputs
    for layer in layers:
        x = layer(x)
    model = lib.Model(inputs, x)
    yield keras_case("keras layers", model, layers, TOKENS)
    if importlib.util.find_spec("keras_hub"):
        import keras_hub

        backbone = keras_hub.models.Gemma3Backbone(
            vocabulary_size=64, image_size=16, num_layers=2, num_query_heads=4,
            num_key_value_heads=2, head_dim=16, hidden_dim=32, intermediate_dim=48,
            query_head_dim_normalize=False, use_query_key_norm=True,
            use_post_ffw_norm=True, use_post_attention_norm=True,
            sliding_window_size=64, use_sliding_window_attention=True,
            vision_encoder=None, dtype="float32",
        )  # fmt: skip
        targets = {"query_dense", "key_dense", "value_dense", "output_dense",
                   "attention_output", "gating_ffw", "gating_ffw_2", "ffw_linear",
                   "query", "key", "value"}  # fmt: skip
        found = [x for x in backbone._flatten_layers() if x.name in targets]
        given_to = {"token_ids": TOKENS, "padding_mask": jnp.ones_like(TOKENS, bool)}
        yield keras_case("keras-hub Gemma3Backbone", backbone, found, given_to)


def keras_case(name: str, model: Any, layers: list[Any], x: Any) -> Case:
    """Returns a Keras model as a function of its variables by path."""
    bare = {v.path: v.value for v in model.variables}
    for layer in layers:
        layer.enable_lora(2, lora_alpha=6.0)
    more = [v for layer in layers for v in layer.variables if "lora" in v.path]
    own = {v.path: v for v in (*model.variables, *more)}

    def stateless(params: Tree) -> jax.Array:
        from keras import StatelessScope

        known = {path: jnp.zeros(v.shape, v.dtype) for path, v in own.items()}
        mapping = [(v, {**known, **params}[path]) for path, v in own.items()]
        with StatelessScope(state_mapping=mapping):
            return model(x)

    params = filled({path: v.value for path, v in own.items()})
    return Case(name, "keras", bare, params, stateless, stateless, {"alpha": 6.0})


def openpi(given: argparse.Namespace) -> Iterator[Case]:
    """Yields the einsums and the feed-forward layer of openpi, scanned as there."""
    from flax import linen as nn

    stub = types.ModuleType("openpi.shared.array_typing")
    stub.Array = jax.Array  # type: ignore[attr-defined]
    for name in ("openpi", "openpi.shared"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[stub.__name__] = stub
    sys.modules["openpi.shared"].array_typing = stub  # type: ignore[attr-defined]
    text = subprocess.check_output(
        ["git", "-C", given.openpi, "show", "HEAD:src/openpi/models/lora.py"], text=True
    )
    lib: Any = types.ModuleType("openpi_lora")
    sys.modules[lib.__name__] = lib
    exec(compile(text, "lora.py", "exec"), lib.__dict__)

    class Block(nn.Module):
        config: Any

        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            def einsum(name: str, shape: Any, eqn: str, x: jax.Array) -> jax.Array:
                init = nn.initializers.lecun_normal()
                return lib.Einsum(shape, init, self.config, name=name)(eqn, x)

            q = einsum("q_einsum", (4, 8, 3), "BTD,NDH->BTNH", x)
            k, v = einsum("kv_einsum", (2, 4, 8, 3), "BSD,2KDH->2BSKH", x)
            y = nn.softmax(q * k) * v
            x = x + einsum("attn_vec_einsum_1", (4, 3, 8), "BTNH,NHD->BTD", y)
            mlp = lib.FeedForward(8, 10, lora_config=self.config, name="mlp")
            return x + mlp(x), None

    def model(config: Any) -> nn.Module:
        scanned = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                return scanned(config, name="layers")(x, None)[0]

        return Model()

    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    base = model(None)
    for rslora in (False, True):
        own = model(lib.LoRAConfig(rank=2, alpha=3.0, rslora=rslora))
        yield Case(
            f"openpi, rslora={rslora}",
            "openpi",
            base.init(jax.random.key(0), x),
            filled(own.init(jax.random.key(0), x)),
            lambda p, own=own: own.apply(p, x),
            lambda p: base.apply(p, x),
            {"alpha": 3.0, "rslora": rslora},
        )


def apart(x: Any, y: Any) -> float:
    """Returns the largest difference of two arrays, relative to the largest number."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.abs(x - y).max() / np.abs(y).max())


def check(case: Case) -> dict[str, Any]:
    """Returns the differences found of one model."""
    found: dict[str, Any] = {"library": case.library}
    wanted = jax.jit(case.theirs)(case.params)
    plan = plan_of(case)
    frozen, trainable = jlora.adopt(
        case.params, case.library, **case.settings, plan=plan
    )
    assert jax.tree.structure(frozen) == jax.tree.structure(case.bare)
    own = trainable
    if case.alone:
        _, own = jlora.adopt(case.params, case.library, **case.settings)
        found["forward"] = apart(run(case, frozen, own), wanted)
        told = ({p: f.spec.op for p, f in t.lora.items()} for t in (own, trainable))
        assert operator.eq(*told), "the plan tells another operation"
    found["leaves"] = len(trainable.lora)
    found["forward, with a plan"] = apart(run(case, frozen, trainable), wanted)
    merged = jax.jit(case.base)(jlora.merge(frozen, trainable))
    found["merged"] = apart(merged, wanted)
    plain = jax.jit(case.base)(frozen)
    assert apart(plain, wanted) > 0.01, "the factors change nothing"
    back = jlora.adapters.scale(own, 0.5)
    params = jlora.hand_back(case.params, back, case.library, **case.settings)
    assert jax.tree.structure(params) == jax.tree.structure(case.params)
    halved = jax.jit(case.theirs)(params)
    found["handed back"] = apart(halved, run(case, frozen, back))
    if case.names is not None:
        with tempfile.TemporaryDirectory() as folder:
            jlora.peft.save(folder, trainable, names=case.names, params=frozen)
            read = jlora.peft.load(folder, frozen, names=case.names)
        found["PEFT files"] = apart(run(case, frozen, read), wanted)
    return found


def plan_of(case: Case) -> jlora.Plan:
    """Returns a plan of the base model that adapts every weight."""
    config = jlora.LoraConfig(rank=1, targets=lambda row: row.op != "")
    return jlora.plan(case.base, case.bare, config=config)


def run(case: Case, frozen: Tree, trainable: jlora.Trainable) -> jax.Array:
    """Returns jlora's forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jlora.MergeWarning)
        return jax.jit(jlora.apply_lora(case.base))(frozen, trainable)


def main() -> int:
    """Checks the models of one library."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--openpi")
    parser.add_argument("--easydel")
    parser.add_argument("--maxtext")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    models = {}
    for case in globals()[given.library](given):
        models[case.name] = check(case)
    print(json.dumps(models, indent=1))
    worst = max(x for m in models.values() for x in m.values() if isinstance(x, float))
    if given.write:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        known[given.library] = {"version": version(given), "models": models}
        RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return int(not worst < LIMIT)


def version(given: argparse.Namespace) -> str:
    """Returns what was checked: a release, or a commit."""
    if given.library in ("openpi", "maxtext"):
        checkout = getattr(given, given.library)
        return subprocess.check_output(
            ["git", "-C", checkout, "rev-parse", "HEAD"], text=True
        ).strip()
    if given.library == "easydel":
        return f"easydel {pathlib.Path(given.easydel).name.split('-')[1]}"
    others = {"nnx": "flax", "tunix": "google-tunix", "skyrl": "skyrl-tx"}
    package = others.get(given.library, given.library)
    return f"{package} {importlib.metadata.version(package)}"


if __name__ == "__main__":
    sys.exit(main())
