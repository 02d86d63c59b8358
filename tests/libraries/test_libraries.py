"""Haiku, Equinox, transformers and plain JAX, models unchanged: one row a model.

A library that is not installed skips its rows.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jlora
from tests.helpers import normal
from tests.libraries.library_cases import (
    PLAN,
    VALUES,
    Case,
    check_plan,
    check_values,
    equal,
    fill,
    params,
)

IDS = jnp.array([[0, 3, 1], [2, 2, 4]])


@pytest.fixture(autouse=True, scope="module")
def loose_promotion(strict_promotion) -> Iterator[None]:
    """Other people's models promote as JAX does by default."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# Plain JAX


class Layer(NamedTuple):
    weight: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Network:
    embed: Any
    layers: list[Layer]
    activation: Any = dataclasses.field(metadata={"static": True})


def tuples():
    params = [(normal((4, 6)), normal((6,))), (normal((6, 3)), normal((3,)))]

    def fn(params, x):
        for w, b in params:
            x = jnp.tanh(x @ w + b)
        return x

    return fn, params, (normal((5, 4)),)


def named_tuples():
    params = {
        "up": Layer(normal((4, 6)), normal((6,))),
        "down": Layer(normal((6, 3)), None),
    }

    def fn(params, x):
        return jnp.tanh(x @ params["up"].weight + params["up"].bias) @ (
            params["down"].weight
        )

    return fn, params, (normal((5, 4)),)


def one_array():
    return lambda w, x: jnp.tanh(x @ w), normal((4, 3)), (normal((5, 4)),)


def data_class():
    layers = [Layer(normal((4, 6)), normal((6,))), Layer(normal((6, 4)), normal((4,)))]

    def fn(network, ids):
        x = network.embed[ids]
        for layer in network.layers:
            x = network.activation(x @ layer.weight + layer.bias)
        return x @ network.embed.T

    return fn, Network(normal((5, 4)), layers, jnp.tanh), (IDS,)


def mixed_leaves():
    """Functions, strings, numbers and None among the arrays, and in the output."""
    params = {
        "activation": jnp.tanh,
        "name": "model",
        "none": None,
        "rate": 0.5,
        "depth": 2,
        "flag": True,
        "w": normal((4, 4)),
        "table": jnp.arange(4),
    }

    def fn(params, x):
        assert params["name"] == "model"
        assert params["none"] is None
        for _ in range(params["depth"]):
            x = params["activation"](x @ params["w"]) * params["rate"]
        return {"x": x if params["flag"] else None, "name": None}

    return fn, params, (normal((5, 4)),)


# Haiku


def haiku(make: Callable[[Any], Callable], *args: Any, state=False) -> Callable:
    """`make(hk)` returns the function that a user gives to `hk.transform`."""

    def build():
        hk = pytest.importorskip("haiku")
        if state:
            model = hk.transform_with_state(make(hk))
            shapes, stats = jax.eval_shape(model.init, jax.random.key(0), *args)
            stats = fill(stats)
            return model.apply, fill(shapes), (stats, jax.random.key(1), *args)
        model = hk.without_apply_rng(hk.transform(make(hk)))
        shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
        return model.apply, fill(shapes), args

    return build


def haiku_tied(hk):
    def f(ids):
        embed = hk.Embed(5, 4)
        return jnp.tanh(embed(ids)) @ embed.embeddings.T

    return f


def haiku_convnet(hk):
    def f(x):
        x = hk.Conv2D(6, (3, 2), stride=(2, 1))(x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
        x = jnp.tanh(hk.Conv2DTranspose(4, 2, stride=2)(x))
        x = hk.DepthwiseConv2D(1, 3)(x)
        return hk.Linear(3)(hk.dropout(hk.next_rng_key(), 0.2, x.mean((1, 2))))

    return f


def haiku_lstm(hk):
    def f(x):
        core = hk.LSTM(6)
        return hk.dynamic_unroll(core, x, core.initial_state(2))

    return f


def haiku_stack(hk):
    def f(x):
        return hk.layer_stack(3)(lambda x: x + jnp.tanh(hk.Linear(4, name="mid")(x)))(x)

    return f


def haiku_control(hk):
    """Every loop, branch and wrapper that Haiku lifts; `while_loop` stops gradients."""

    def f(x):
        layers = {
            name: hk.Linear(4, name=name)
            for name in ("scan", "remat", "cond", "switch", "fori", "while", "vmap")
        }
        x, _ = hk.scan(lambda x, _: (layers["scan"](jnp.tanh(x)), None), x, None, 2)
        x = x + hk.remat(lambda x: jnp.tanh(layers["remat"](x)))(x)
        x = hk.cond(x.sum() > -1e3, layers["cond"], lambda x: -layers["cond"](x), x)
        branches = [layers["switch"], lambda x: jnp.tanh(layers["switch"](x))]
        x = hk.switch(1, branches, x)
        x = hk.fori_loop(0, 2, lambda i, x: jnp.tanh(layers["fori"](x)), x)
        x = x + hk.vmap(layers["vmap"], split_rng=False)(x)
        y = layers["while"](x)
        if hk.running_init():  # Haiku makes no parameters in a while loop
            return y
        _, z = hk.while_loop(
            lambda state: state[0] < 2,
            lambda state: (state[0] + 1, jnp.tanh(layers["while"](state[1]))),
            (0, lax.stop_gradient(x)),
        )
        return y + lax.stop_gradient(z)

    return f


def haiku_unrolled(hk):
    def f(x):
        core = hk.DeepRNN([hk.GRU(4), hk.LSTM(3)])
        return hk.static_unroll(core, x, core.initial_state(2))

    return f


# Equinox


def equinox(make: Callable[[Any, Any], Any], fn: Callable, *args: Any) -> Callable:
    """`make(eqx, key)` returns the model; it is itself the tree of parameters."""

    def build():
        eqx = pytest.importorskip("equinox")
        return fn, make(eqx, jax.random.key(0)), args

    return build


def each(model, x):
    return jax.vmap(model)(x)


def equinox_lstm(cell, x):
    def step(state, x):
        return cell(x, state), None

    zeros = jnp.zeros(cell.hidden_size)
    return jax.vmap(lambda x: lax.scan(step, (zeros, zeros), x)[0])(x)


def equinox_gru(cell, x):
    zeros = jnp.zeros(cell.hidden_size)
    return jax.vmap(lambda x: lax.scan(lambda h, x: (cell(x, h), None), zeros, x)[0])(x)


def equinox_statistics():
    """The three lines of a model with state."""
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        up: Any
        norm: Any
        down: Any

        def __init__(self, key):
            self.up = eqx.nn.Linear(4, 6, key=key)
            self.norm = eqx.nn.BatchNorm(6, axis_name="batch", mode="batch")
            self.down = eqx.nn.Linear(6, 3, key=key)

        def __call__(self, x, state):
            x, state = self.norm(self.up(x), state)
            return self.down(jnp.tanh(x)), state

    model, state = eqx.nn.make_with_state(Model)(jax.random.key(0))

    def fn(model, state, x):
        batched = jax.vmap(
            model, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )
        return batched(x, state)

    return fn, model, (state, normal((5, 4)))


def equinox_stacked():
    """Layers made by `filter_vmap`, run by `lax.scan`."""
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)
    layers = eqx.filter_vmap(lambda key: eqx.nn.MLP(4, 4, 6, 1, key=key))(keys)

    def fn(layers, x):
        arrays, static = eqx.partition(layers, eqx.is_array)

        def step(x, layer):
            return x + jax.vmap(eqx.combine(layer, static))(x), None

        return lax.scan(step, x, arrays)[0]

    return fn, layers, (normal((5, 4)),)


def equinox_ensemble(layers, x):
    eqx = pytest.importorskip("equinox")
    call = eqx.filter_vmap(each, in_axes=(eqx.if_array(0), None))
    return call(layers, x)


def equinox_spectral():
    """The state of its power iteration is an argument and a result."""
    eqx = pytest.importorskip("equinox")
    model, state = eqx.nn.make_with_state(
        lambda key: eqx.nn.SpectralNorm(eqx.nn.Linear(4, 6, key=key), "weight", key=key)
    )(jax.random.key(0))

    def fn(model, state, x):
        call = jax.vmap(model, in_axes=(0, None), out_axes=(0, None))
        return call(x, state)

    return fn, model, (state, normal((5, 4)))


def equinox_filtered():
    """`filter_jit` and `filter_checkpoint` inside the function."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 3, 6, 1, key=jax.random.key(0))

    def fn(model, x):
        call = eqx.filter_jit(eqx.filter_checkpoint(lambda m, x: jax.vmap(m)(x)))
        return call(model, x)

    return fn, model, (normal((5, 4)),)


# transformers


def flax_model(name: str, config: dict[str, Any], shape: Any) -> tuple[Any, Any]:
    """Returns a Flax model and random values for it, without running its `init`."""
    library = pytest.importorskip("transformers", exc_type=ImportError)
    if not hasattr(library, f"Flax{name}"):
        pytest.skip("transformers 5 has no Flax models")
    base = name.split("For")[0].removesuffix("Model").removesuffix("LMHead")
    settings = getattr(library, f"{base}Config")(**config)
    model = getattr(library, f"Flax{name}")(settings, _do_init=False)
    shapes = jax.eval_shape(lambda: model.init_weights(jax.random.key(0), shape))
    return model, fill(shapes)


def transformers(
    name: str,
    config: dict[str, Any],
    *args: Any,
    shape: tuple[int, ...] = (1, 4),
    output: str = "last_hidden_state",
    **kwargs: Any,
) -> Callable:
    def build():
        model, params = flax_model(name, config, shape)

        def fn(params, *args):
            out = model(*args, params=params, **kwargs)
            return out[0][output] if isinstance(out, tuple) else out[output]

        return fn, params, args

    return build


TINY = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}
VISION = {**TINY, "image_size": 4, "patch_size": 2, "num_channels": 3}
GPT2 = {
    "vocab_size": 11,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 6,
    "n_inner": 12,
}
LLAMA = {**TINY, "num_key_value_heads": 1}
TOKENS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])
DROPOUT = {"train": True, "dropout_rng": jax.random.PRNGKey(1)}
OUT_IN = ((), (1,), (0,))
GPT2_WEIGHTS = ("transformer/h/{0,1}/**/kernel", "transformer/{wte,wpe}/embedding")
LLAMA_WEIGHTS = (
    "model/layers/{0,1}/self_attn/{q,k,v,o}_proj/kernel",
    "model/layers/{0,1}/mlp/{gate,up,down}_proj/kernel",
    "model/embed_tokens/embedding",
    "lm_head/kernel",
)


def cached(name: str, config: dict[str, Any]) -> Callable:
    """Decoding a token at a time, the cache of keys and values carried by a scan."""

    def build():
        model, params = flax_model(name, config, (1, 4))
        n_batch, length = TOKENS.shape
        cache = fill(jax.eval_shape(lambda: model.init_cache(n_batch, length)))

        def fn(params, cache, tokens):
            def step(cache, inputs):
                i, ids = inputs
                out = model(
                    ids[:, None],
                    params=params,
                    past_key_values=cache,
                    attention_mask=jnp.ones((n_batch, length), jnp.int32),
                    position_ids=jnp.full((n_batch, 1), i),
                )
                return out.past_key_values, out.logits[:, 0]

            return lax.scan(step, cache, (jnp.arange(length), tokens.T))

        return fn, params, (cache, TOKENS)

    return build


def resnet(training: bool) -> Callable:
    def build():
        library = pytest.importorskip("transformers", exc_type=ImportError)
        if not hasattr(library, "FlaxResNetForImageClassification"):
            pytest.skip("transformers 5 has no Flax models")
        config = library.ResNetConfig(
            embedding_size=4,
            hidden_sizes=[4, 8],
            depths=[1, 1],
            layer_type="basic",
            num_labels=3,
        )
        model = library.FlaxResNetForImageClassification(config, _do_init=False)
        shapes = jax.eval_shape(
            lambda: model.init_weights(jax.random.key(0), (1, 8, 8, 3))
        )

        def fn(params, x):
            if not training:
                return model(x, params=params).logits
            out, statistics = model(x, params=params, train=True)
            return out.logits, statistics["batch_stats"]

        return fn, fill(shapes), (normal((4, 3, 8, 8)),)

    return build


CASES = [
    Case("tuples", tuples, "*/0"),
    Case("NamedTuple", named_tuples, "*/weight"),
    Case("one array", one_array, "**"),
    Case("dataclass", data_class, ("embed", "layers/*/weight")),
    Case("leaves that are no arrays", mixed_leaves, "w"),
    Case(
        "Haiku MLP",
        haiku(lambda hk: lambda x: hk.nets.MLP([6, 3])(x), normal((5, 4))),
        "mlp/~/linear_{0,1}/w",
    ),
    Case("Haiku, tied", haiku(haiku_tied, IDS), "embed/embeddings"),
    Case(
        "Haiku, convolutions and state",
        haiku(haiku_convnet, normal((2, 6, 6, 4)), state=True),
        "{conv2_d,conv2_d_transpose,depthwise_conv2_d,linear}/w",
    ),
    Case("Haiku LSTM", haiku(haiku_lstm, normal((3, 2, 4))), "lstm/linear/w"),
    Case(
        "Haiku attention",
        haiku(
            lambda hk: (
                lambda x: hk.MultiHeadAttention(
                    2, 3, w_init=hk.initializers.VarianceScaling(1.0)
                )(x, x, x)
            ),
            normal((2, 3, 8)),
        ),
        "multi_head_attention/{query,key,value,linear}/w",
    ),
    Case(
        "Haiku layer_stack",
        haiku(haiku_stack, normal((5, 4))),
        "**/mid/w",
        axes={"**/w": ((0,), (1,), (2,))},
    ),
    Case("Haiku, control flow", haiku(haiku_control, normal((5, 4))), "*/w"),
    Case(
        "Haiku, static_unroll",
        haiku(haiku_unrolled, normal((3, 2, 4))),
        ("gru/{w_i,w_h}", "lstm/linear/w"),
    ),
    Case(
        "Equinox MLP",
        equinox(lambda e, key: e.nn.MLP(4, 3, 6, 1, key=key), each, normal((5, 4))),
        "layers/{0,1}/weight",
        axes={"**/weight": OUT_IN},
    ),
    Case(
        "Equinox Embedding",
        equinox(
            lambda e, key: e.nn.Embedding(5, 4, key=key),
            lambda model, ids: jax.vmap(jax.vmap(model))(ids),
            IDS,
        ),
        "weight",
    ),
    Case(
        "Equinox Conv2d",
        equinox(
            lambda e, key: e.nn.Conv2d(4, 6, (3, 2), groups=2, stride=2, key=key),
            each,
            normal((2, 4, 7, 6)),
        ),
        "weight",
    ),
    Case(
        "Equinox ConvTranspose1d",
        equinox(
            lambda e, key: e.nn.ConvTranspose1d(4, 6, 3, stride=2, key=key),
            each,
            normal((2, 4, 7)),
        ),
        "weight",
    ),
    Case(
        "Equinox attention",
        equinox(
            lambda e, key: e.nn.MultiheadAttention(2, 8, key=key),
            lambda model, x: jax.vmap(model)(x, x, x),
            normal((2, 3, 8)),
        ),
        "{query,key,value,output}_proj/weight",
    ),
    Case(
        "Equinox LSTM",
        equinox(
            lambda e, key: e.nn.LSTMCell(4, 6, key=key), equinox_lstm, normal((2, 3, 4))
        ),
        ("weight_ih", "weight_hh"),
    ),
    Case(
        "Equinox GRU",
        equinox(
            lambda e, key: e.nn.GRUCell(4, 6, key=key), equinox_gru, normal((2, 3, 4))
        ),
        ("weight_ih", "weight_hh"),
    ),
    Case("Equinox, statistics", equinox_statistics, "{up,down}/weight"),
    Case(
        "Equinox, stacked layers",
        equinox_stacked,
        "layers/{0,1}/weight",
        axes={"**/weight": ((0,), (2,), (1,))},
    ),
    Case(
        "Equinox, ensemble",
        equinox(
            lambda e, key: e.filter_vmap(lambda k: e.nn.MLP(4, 3, 6, 1, key=k))(
                jax.random.split(key, 3)
            ),
            equinox_ensemble,
            normal((5, 4)),
        ),
        "layers/{0,1}/weight",
        axes={  # the members' first layers are one wide layer: they share the input
            "layers/0/weight": ((), (2,), (0, 1)),
            "layers/1/weight": ((0,), (2,), (1,)),
        },
    ),
    Case(
        "Equinox WeightNorm",
        equinox(
            lambda e, key: e.nn.WeightNorm(e.nn.Linear(4, 6, key=key)),
            each,
            normal((5, 4)),
        ),
        "layer/weight",
        merged="layer/weight",
    ),
    Case("Equinox SpectralNorm", equinox_spectral, "layer/weight"),
    Case("Equinox, filter_jit", equinox_filtered, "layers/{0,1}/weight"),
    Case(
        "transformers BERT",
        transformers("BertModel", {**TINY, "type_vocab_size": 2}, TOKENS),
        ("encoder/layer/{0,1}/**/kernel", "embeddings/*_embeddings/embedding"),
        axes={"encoder/**/kernel": ((), (0,), (1,))},
    ),
    Case(
        "transformers GPT-2",
        transformers("GPT2LMHeadModel", GPT2, TOKENS, output="logits"),
        GPT2_WEIGHTS,
        axes={"**/kernel": OUT_IN, "**/embedding": ((), (0,), (1,))},
    ),
    Case(
        "transformers Llama",
        transformers(
            "LlamaForCausalLM",
            LLAMA,
            TOKENS,
            output="logits",
        ),
        LLAMA_WEIGHTS,
    ),
    Case(
        "transformers GPT-2, dropout",
        transformers("GPT2LMHeadModel", GPT2, TOKENS, output="logits", **DROPOUT),
        GPT2_WEIGHTS,
    ),
    Case("transformers GPT-2, cached", cached("GPT2LMHeadModel", GPT2), GPT2_WEIGHTS),
    Case(
        "transformers Llama, cached",
        cached("LlamaForCausalLM", LLAMA),
        LLAMA_WEIGHTS,
    ),
    Case(
        "transformers ViT",
        transformers(
            "ViTForImageClassification",
            {**VISION, "num_labels": 3},
            normal((2, 3, 4, 4)),
            shape=(1, 4, 4, 3),
            output="logits",
        ),
        ("vit/encoder/**/kernel", "vit/**/projection/kernel", "classifier/kernel"),
    ),
    Case("transformers ResNet", resnet(training=False), "params/**/kernel"),
    Case(
        "transformers ResNet, training",
        resnet(training=True),
        "params/**/kernel",
    ),
    Case(
        "transformers CLIP",
        transformers(
            "CLIPModel",
            {
                "text_config": {**TINY, "eos_token_id": 2},
                "vision_config": VISION,
                "projection_dim": 6,
            },
            TOKENS,
            normal((2, 3, 4, 4)),
            shape=((1, 4), (1, 4, 4, 3)),
            output="logits_per_image",
        ),
        ("**/kernel", "**/embedding"),
    ),
]


@pytest.mark.once
@pytest.mark.parametrize("case", params(CASES, PLAN))
def test_plan_adapts_every_weight(case):
    check_plan(case)


@pytest.mark.once
@pytest.mark.parametrize("case", params(CASES, VALUES))
def test_adapted_equals_merged_in_value_and_gradient(case):
    check_values(case)


def test_gpt2_factors_are_on_the_input_side():
    """Its kernels are stored `[out, in]`: A has the model's width, B the layer's."""
    model = next(case for case in CASES if case.name == "transformers GPT-2")
    fn, params, args = model.build()
    config = jlora.LoraConfig(rank=2, targets="**/c_attn/kernel")
    plan = jlora.plan(fn, params, *args, config=config)
    _, trainable = jlora.split(jax.random.key(0), params, plan)
    for factors in trainable.lora.values():
        assert factors.a.shape == (8, 2)
        assert factors.b.shape == (2, 24)


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "config"), [("GPT2LMHeadModel", GPT2), ("LlamaForCausalLM", LLAMA)]
)
def test_generate_does_not_merge_in_its_loop(name, config):
    """`generate` as transformers has it: a prompt, then a `while_loop` with a cache."""
    model, params = flax_model(name, config, (1, 4))

    def fn(params, ids):
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, params=params, **settings).sequences

    prompt = TOKENS[:, :2]
    config = jlora.LoraConfig(rank=2, targets="**/{kernel,embedding}")
    plan = jlora.plan(fn, params, prompt, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = fill(trainable)
    lora_fn = jax.jit(jlora.apply_lora(fn, on_merge="error"))
    merged = jlora.merge(frozen, trainable)
    equal(lora_fn(frozen, trainable, prompt), jax.jit(fn)(merged, prompt))
