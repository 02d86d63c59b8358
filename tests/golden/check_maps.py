"""The maps of `jlora.peft.maps` beside the libraries that they are for.

    python tests/golden/check_maps.py LIBRARY DIR [--bonsai CHECKOUT]

DIR is what `make_maps.py write DIR` made. Run it where the library is installed, with
jlora: `tunix` (google-tunix 0.1.7), `gemma` (gemma 4.0.1 with protobuf 7.36.1 or
newer), `keras` (keras-hub 0.32.0, KERAS_BACKEND=jax), `bonsai` (a checkout of
jax-ml/bonsai), `flax` (transformers 4.57), `chat` (the decoder of examples/chat).

For each model: `load_base` reads the directory of the Hub into the library's own tree;
the library's logits are compared with those of transformers, and each leaf with the one
of the library's own loader, where it has one. Then jlora trains an adapter, saves it as
PEFT and loads it again. The exit code is 1 if something differs by more than 1e-4.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import pathlib
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import map_cases
import numpy as np

import jlora
from jlora.peft import NameMap, maps

LIMIT, TOKENS = 1e-4, jnp.asarray(map_cases.tokens())
LENGTH = map_cases.LENGTH
CAUSAL = jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
POSITIONS = jnp.arange(LENGTH)[None]
SIZES = map_cases.SIZES
EMBED = {
    "num_layers": SIZES["num_hidden_layers"],
    "embed_dim": SIZES["hidden_size"],
    "hidden_dim": SIZES["intermediate_size"],
    "num_heads": SIZES["num_attention_heads"],
}
Tree = Any


class Checked(NamedTuple):
    """A model of a library.

    Attributes:
      case: which model of the Hub.
      cls: the library's class.
      names: the name of its map.
      params: the parameters, arrays or shapes.
      apply: the logits of `(params, tokens)`.
      own: the parameters that the library's own loader reads from a directory, if any.
    """

    case: str
    cls: str
    names: str
    params: Tree
    apply: Callable[[Tree, jax.Array], jax.Array]
    own: Callable[[str], Tree] | None = None


def _nnx(case: str, names: str, model: Callable[[], Any], call: Any, own: Any = None):
    """Returns what checks a model of Flax NNX."""
    from flax import nnx

    made = nnx.eval_shape(model)
    graph, state, rest = nnx.split(made, nnx.Param, ...)
    if jax.tree.leaves(rest):  # keys of dropout, which have numbers
        graph, state, rest = nnx.split(model(), nnx.Param, ...)
    params = nnx.to_pure_dict(state)

    def apply(params: Tree, tokens: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(own, params)
        return call(nnx.merge(graph, own, rest), tokens)

    def read(folder: str) -> Tree:
        return nnx.to_pure_dict(nnx.state(own(folder), nnx.Param))

    cls = f"{type(made).__module__}.{type(made).__name__}"
    return Checked(case, cls, names, params, apply, own and read)


def tunix(given: argparse.Namespace) -> Iterator[Checked | None]:
    """Yields the models of tunix."""
    from flax import nnx

    def call(model: Any, tokens: jax.Array) -> jax.Array:
        return model(tokens, POSITIONS, None, CAUSAL)[0]

    def one(case: str, place: str, cls: str, names: str, loader: str, **fields: Any):
        if given.only not in (None, case):
            return None
        lib = importlib.import_module(f"tunix.models.{place}.model")
        params = importlib.import_module(f"tunix.models.{place}.{loader}")
        config = lib.ModelConfig(**EMBED, **fields)
        return _nnx(
            case,
            names,
            lambda: getattr(lib, cls)(config, rngs=nnx.Rngs(0)),
            call,
            None
            if names == "TUNIX_GEMMA"  # whose loader is for Gemma 2 only
            else functools.partial(
                params.create_model_from_safe_tensors,
                config=config,
                mesh=jax.make_mesh(
                    (1, 1),
                    ("fsdp", "tp"),
                    axis_types=(jax.sharding.AxisType.Auto,) * 2,
                ),
                dtype=jnp.float32,
            ),
        )

    rope = {"rope_theta": 10_000, "norm_eps": 1e-6, "vocab_size": SIZES["vocab_size"]}
    rope["num_kv_heads"] = SIZES["num_key_value_heads"]
    full = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    wide = {**rope, **full, "head_dim": 16}
    yield one("llama3", "llama3", "Llama3", "TUNIX_LLAMA3", "params",
              **rope, head_dim=8, weight_tying=False)  # fmt: skip
    yield one("qwen2", "qwen2", "Qwen2", "TUNIX_QWEN2", "params",
              **rope, **full, head_dim=8, use_tied_embedding=False)  # fmt: skip
    yield one("qwen3", "qwen3", "Qwen3", "TUNIX_QWEN3", "params",
              **wide, use_tied_embedding=True)  # fmt: skip
    yield one("qwen3_moe", "qwen3", "Qwen3", "TUNIX_QWEN3", "params", **wide,
              use_tied_embedding=False, num_experts=3,
              num_experts_per_tok=2)  # fmt: skip
    gemma = importlib.import_module("tunix.models.gemma.model")
    kinds = (gemma.AttentionType.GLOBAL,) * 2
    common = {"num_embed": SIZES["vocab_size"], "head_dim": 16}
    for case, names, heads, four in (
        ("gemma", "TUNIX_GEMMA", 2, False),
        ("gemma_mha", "TUNIX_GEMMA", 4, False),
        ("gemma2", "TUNIX_GEMMA2", 2, True),
    ):
        caps = {"final_logit_softcap": 30.0, "attn_logits_soft_cap": 50.0}
        yield one(
            case, "gemma", "Gemma", names, "params_safetensors", **common,
            num_kv_heads=heads, use_post_attn_norm=four, use_post_ffw_norm=four,
            attention_types=kinds,
            **(caps if four else {"final_logit_softcap": None}),
        )  # fmt: skip
    yield one("gemma3", "gemma3", "Gemma3", "TUNIX_GEMMA3", "params_safetensors",
              **common, num_kv_heads=2, sliding_window_size=64,
              param_dtype=jnp.float32)  # fmt: skip


def gemma(given: argparse.Namespace) -> Iterator[Checked | None]:
    """Yields models of DeepMind's gemma, plain and with its own LoRA around them."""
    from gemma import gm, peft

    kind = gm.nn.AttentionType.LOCAL_SLIDING
    sizes = {
        "num_embed": SIZES["vocab_size"],
        **{k: v for k, v in EMBED.items() if k != "num_layers"},
        "head_dim": 16,
        "attention_types": (kind,) * 2,
        "sliding_window_size": 64,
        "vision_encoder": None,
    }

    def one(case: str, names: str, base: Any, lora: bool = False, **fields: Any):
        if given.only not in (None, case):
            return None
        config = dataclasses.replace(base.config, **sizes, **fields)
        model = gm.nn.Transformer(config=config, dtype=jnp.float32, tokens="tokens")
        cls = f"gm.nn.Transformer ({base.__name__})"
        if lora:
            model = gm.nn.LoRA(rank=2, model=model, dtype=jnp.float32)
            cls = f"gm.nn.LoRA ({base.__name__})"
        like = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        kept, added = peft.split_params(params)

        def apply(params: Tree, tokens: jax.Array) -> jax.Array:
            whole = peft.merge_params(params, added) if lora else params
            return model.apply({"params": whole}, tokens).logits

        return Checked(case, cls, names, kept if lora else params, apply)

    one_norm = {"use_post_attn_norm": False, "use_post_ffw_norm": False}
    one_norm |= {"final_logit_softcap": None, "attn_logits_soft_cap": None}
    two = gm.nn.Gemma2_2B
    yield one("gemma", "GEMMA1_EINSUM", two, num_kv_heads=2, **one_norm)
    yield one("gemma_mha", "GEMMA_EINSUM", two, num_kv_heads=4,
              transpose_gating_einsum=True, **one_norm)  # fmt: skip
    yield one("gemma2", "GEMMA2_2B_EINSUM", two, num_kv_heads=2)
    large = {"query_pre_attn_norm": two.config.query_pre_attn_norm}
    yield one("gemma2", "GEMMA2_EINSUM", gm.nn.Gemma2_9B, num_kv_heads=2, **large)
    yield one("gemma3", "GEMMA3_EINSUM", gm.nn.Gemma3_1B, num_kv_heads=2)
    yield one("gemma3", "GEMMA3_EINSUM", gm.nn.Gemma3_1B, lora=True, num_kv_heads=2)


def keras(given: argparse.Namespace) -> Iterator[Checked | None]:
    """Yields backbones of KerasHub."""
    import keras_hub

    def one(case: str, cls: str, names: str, **fields: Any):
        if given.only not in (None, case):
            return None
        models = keras_hub.models
        backbone = getattr(models, cls)(
            vocabulary_size=SIZES["vocab_size"],
            num_layers=SIZES["num_hidden_layers"],
            hidden_dim=SIZES["hidden_size"],
            num_query_heads=SIZES["num_attention_heads"],
            num_key_value_heads=SIZES["num_key_value_heads"],
            layer_norm_epsilon=1e-6,
            dtype="float32",
            **fields,
        )
        values = {v.path: v.value for v in backbone.trainable_variables}

        def apply(params: Tree, tokens: jax.Array) -> jax.Array:
            inputs = {"token_ids": tokens, "padding_mask": jnp.ones_like(tokens)}
            own = [params[v.path] for v in backbone.trainable_variables]
            rest = [v.value for v in backbone.non_trainable_variables]
            x, _ = backbone.stateless_call(own, rest, inputs)
            table = params.get("token_embedding/reverse_embeddings")
            if table is None:
                table = params["token_embedding/embeddings"].T
            x = x @ table
            cap = fields.get("final_logit_soft_cap")
            return x if cap is None else jnp.tanh(x / cap) * cap

        def own(folder: str) -> Tree:
            read = getattr(models, cls).from_preset(folder, dtype="float32")
            return {v.path: v.value for v in read.trainable_variables}

        rounds = cls == "MistralBackbone"  # its loader does, to 16 bits
        place, read = f"keras_hub.models.{cls}", None if rounds else own
        return Checked(case, place, names, values, apply, read)

    wide = {"head_dim": 16, "intermediate_dim": 2 * SIZES["intermediate_size"]}
    narrow = {"intermediate_dim": SIZES["intermediate_size"]}
    yield one("llama", "LlamaBackbone", "KERAS_LLAMA", **narrow)
    wave = {"rope_max_wavelength": 1_000_000}
    yield one("llama3", "Llama3Backbone", "KERAS_LLAMA", **narrow, **wave)
    yield one("mistral", "MistralBackbone", "KERAS_LLAMA", **narrow)
    yield one("gemma", "GemmaBackbone", "KERAS_GEMMA", **wide)
    yield one(
        "gemma2", "GemmaBackbone", "KERAS_GEMMA2", **wide,
        use_post_ffw_norm=True, use_post_attention_norm=True,
        attention_logit_soft_cap=50.0, final_logit_soft_cap=30.0,
        use_sliding_window_attention=True, sliding_window_size=64,
    )  # fmt: skip
    yield one(
        "gemma3", "Gemma3Backbone", "KERAS_GEMMA3", head_dim=16, **narrow,
        image_size=None, vision_encoder=None, use_query_key_norm=True,
        use_post_ffw_norm=True, use_post_attention_norm=True,
        use_sliding_window_attention=True, sliding_window_size=64,
    )  # fmt: skip


def bonsai(given: argparse.Namespace) -> Iterator[Checked | None]:
    """Yields bonsai's Qwen 3, from a checkout."""
    sys.path.insert(0, str(given.bonsai))
    from bonsai.models.qwen3 import modeling, params
    from flax import nnx

    config = modeling.ModelConfig(
        num_layers=SIZES["num_hidden_layers"], vocab_size=SIZES["vocab_size"],
        emb_dim=SIZES["hidden_size"], mlp_dim=SIZES["intermediate_size"],
        num_heads=SIZES["num_attention_heads"], head_dim=16,
        num_kv_heads=SIZES["num_key_value_heads"], rope_theta=1_000_000,
        rope_scaling_factor=8.0, local_rope_theta=1e4, norm_eps=1e-6,
        tie_word_embeddings=True,
    )  # fmt: skip

    def call(model: Any, tokens: jax.Array) -> jax.Array:
        cache = modeling.init_cache(config, 1, LENGTH, 0, jnp.float32)
        return model(tokens, cache=cache, segment_ids=jnp.ones_like(tokens))

    yield _nnx(
        "qwen3",
        "BONSAI_QWEN3",
        lambda: modeling.Qwen3(config, rngs=nnx.Rngs(0)),
        call,
        lambda folder: params.create_model_from_safe_tensors(folder, config),
    )


def flax(_: argparse.Namespace) -> Iterator[Checked | None]:
    """Yields the Flax classes of transformers 4."""
    import transformers

    for case, name, names in (
        ("llama", "Llama", "LLAMA"),
        ("mistral", "Mistral", "MISTRAL"),
        ("gemma", "Gemma", "GEMMA"),
    ):
        fields = {k: v for k, v in map_cases.CASES[case].items() if k != "model_type"}
        config = getattr(transformers, f"{name}Config")(**fields)
        cls = getattr(transformers, f"Flax{name}ForCausalLM")
        model = cls(config, _do_init=False)
        init = functools.partial(model.init_weights, input_shape=TOKENS.shape)
        shapes = jax.eval_shape(init, jax.random.key(0))

        def apply(params: Tree, tokens: jax.Array, model: Any = model) -> jax.Array:
            return model(tokens, params=params).logits

        yield Checked(case, f"transformers.{cls.__name__}", names, shapes, apply)


def chat(_: argparse.Namespace) -> Iterator[Checked | None]:
    """Yields the decoder of examples/chat with the weights of Phi-3."""
    from examples.chat import model

    fields = {**map_cases.CASES["phi3"], "model_type": "llama"}
    config = dataclasses.replace(model.DecoderConfig.from_hub(fields), scan=False)

    def apply(params: Tree, tokens: jax.Array) -> jax.Array:
        return model.forward(params, tokens, config=config)

    shapes = model.shapes(config, jnp.float32)
    yield Checked("phi3", "examples.chat.model", "phi3", shapes, apply)


def named(name: str) -> NameMap:
    """Returns the map of a name; `phi3` is a function of the numbers of heads."""
    if name != "phi3":
        return getattr(maps, name)
    return maps.phi3(SIZES["num_attention_heads"], SIZES["num_key_value_heads"])


def trained(model: Checked, params: Tree) -> tuple[jlora.Trainable, jax.Array]:
    """Returns an adapter of all linear layers after some steps, and its logits."""
    # PEFT keeps experts in one parameter, which no file of the Hub has.
    experts = ("layers/*/mlp/*",) if model.case.endswith("_moe") else ()
    config = jlora.LoraConfig(rank=3, alpha=5, exclude=experts)
    plan = jlora.plan(model.apply, params, TOKENS, config=config)
    frozen, trainable = jlora.split(jax.random.key(1), params, plan)
    fn = jlora.apply_lora(model.apply)

    @jax.jit
    def step(trainable: jlora.Trainable) -> jlora.Trainable:
        def loss(trainable: jlora.Trainable) -> jax.Array:
            scores = jax.nn.log_softmax(fn(frozen, trainable, TOKENS)[:, :-1])
            picked = jnp.take_along_axis(scores, TOKENS[:, 1:, None], -1)
            return -picked.mean()

        grads = jax.grad(loss)(trainable)
        return jax.tree.map(lambda x, g: x - 0.3 * g, trainable, grads)

    for _ in range(5):
        trainable = step(trainable)
    return trainable, jax.jit(fn)(frozen, trainable, TOKENS)


def distance(a: Any, b: Any) -> float:
    """Returns the largest difference of two arrays or trees, infinite for NaN."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        apart = float(np.abs(np.asarray(x, np.float32) - np.asarray(y)).max())
        worst = max(worst, apart if apart == apart else float("inf"))
    return worst


def check(model: Checked, root: pathlib.Path, number: int) -> dict[str, Any]:
    """Returns what was found of a model, and writes its adapter for PEFT."""
    names, folder = named(model.names), root / model.case
    out = folder / f"{model.names}_{number}"
    out.mkdir(exist_ok=True)
    params = jlora.peft.load_base(folder / "model", model.params, names=names)
    wanted = np.load(folder / "logits.npy")
    leaves, _ = jlora.paths.flatten(params)
    found: dict[str, Any] = {
        "class": model.cls,
        "map": model.names,
        "logits": distance(jax.jit(model.apply)(params, TOKENS), wanted),
        "leaves": {
            path: [list(x.shape), zlib.crc32(np.asarray(x, "<f4").tobytes())]
            for path, x in leaves.items()
        },
    }
    if model.own is not None:
        own, _ = jlora.paths.flatten(model.own(str(folder / "model")))
        assert own.keys() == leaves.keys(), own.keys() ^ leaves.keys()
        found["own loader"] = distance(own, leaves)
    adapter, logits = trained(model, params)
    found["effect"] = distance(logits, wanted)
    tied = map_cases.CASES[model.case].get("tie_word_embeddings")
    jlora.peft.save(out / "adapter", adapter, names=names, params=params, tied=tied)
    back = jlora.peft.load(out / "adapter", params, names=names, tied=tied)
    found["read back"] = distance(
        jlora.merge(params, back), jlora.merge(params, adapter)
    )
    np.save(out / "adapted.npy", np.asarray(logits, np.float32))
    return found


LIBRARIES = {
    "tunix": (tunix, "google-tunix"),
    "gemma": (gemma, "gemma"),
    "keras": (keras, "keras-hub"),
    "bonsai": (bonsai, ""),
    "flax": (flax, "transformers"),
    "chat": (chat, ""),
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--bonsai", type=pathlib.Path)
    parser.add_argument("--only", help="the model of map_cases.py")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    models, package = LIBRARIES[given.library]
    version = importlib.metadata.version(package) if package else ""
    worst = 0.0
    for number, model in enumerate(models(given)):
        if model is None:
            continue
        found = check(model, given.folder, number)
        found |= {"package": package, "version": version, "jax": jax.__version__}
        out = given.folder / model.case / f"{model.names}_{number}"
        (out / "about.json").write_text(json.dumps(found, indent=1))
        errors = {k: found[k] for k in ("logits", "own loader", "read back", "effect")
                  if k in found}  # fmt: skip
        print(f"{model.case:10} {model.names:18} {model.cls}")
        print("           ", *(f"{k} {v:.1e}" for k, v in errors.items()))
        worst = max(worst, *(v for k, v in errors.items() if k != "effect"))
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
