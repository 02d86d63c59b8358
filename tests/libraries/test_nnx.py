"""Flax NNX models, unchanged: one table, one row a model.

Each goes through the same three lines: `nnx.split` into parameters and the rest, a
function that merges them and returns the new rest, and `nnx.update` on the way back.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jlora
from tests.helpers import normal
from tests.libraries.library_cases import (
    PLAN,
    VALUES,
    Case,
    check_plan,
    check_values,
    near,
    params,
)

IDS = jnp.array([[0, 3, 1], [2, 2, 4]])


def functional(model: Any) -> tuple[Callable[..., Any], nnx.State, nnx.State]:
    """Returns `fn(params, rest, *args) -> (output, rest)`, `params` and `rest`."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, rest, *args):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return model(*args), nnx.state(model, nnx.Not(nnx.Param))

    return fn, params, rest


def model(make: Callable[[nnx.Rngs], Any], *args: Any) -> Callable[[], tuple]:
    def build():
        fn, params, rest = functional(make(nnx.Rngs(0, dropout=1)))
        return fn, params, (rest, *args)

    return build


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(jnp.tanh(self.embed(ids)))


class Shared(nnx.Module):
    """One layer under two names: one leaf."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.second = self.first

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.down = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(self.norm(x))))


class Listed(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Stacked(nnx.Module):
    """Layers made by `nnx.vmap`, run by `nnx.scan`."""

    def __init__(self, rngs, block=Block, *, remat=False):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return block(rngs)

        self.layers = make(rngs)
        self.remat = remat

    def __call__(self, x):
        def layer(block, x):
            return block(x)

        if self.remat:
            layer = nnx.remat(layer)
        return nnx.scan(layer, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(
            self.layers, x
        )


class StatisticsBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(jnp.tanh(self.norm(self.up(x))))


class Ensemble(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.members = make(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(self.members, x)


class Wrapped(nnx.Module):
    """`nnx.remat` and `nnx.jit` around blocks."""

    def __init__(self, rngs, wrap):
        self.a, self.b = Block(rngs), Block(rngs)
        self.wrap = wrap

    def __call__(self, x):
        call = self.wrap(lambda block, x: block(x))
        return call(self.b, call(self.a, x))


class Branches(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(4, 4, rngs=rngs)
        self.b = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.cond(
            x.sum() > -100, lambda m, x: m.b(m.a(x)), lambda m, x: m.a(x), self, x
        )
        return nnx.switch(
            1, [lambda m, x: m.a(x), lambda m, x: jnp.tanh(m.b(x))], self, x
        )


class Loop(nnx.Module):
    """The same layer three times, as `nnx.fori_loop` would for inference."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        def step(i, state):
            layer, x = state
            return layer, jnp.tanh(layer(x))

        return nnx.fori_loop(0, 3, step, (self.layer, x))[1]


class Looped(nnx.Module):
    """`while_loop` has no reverse mode, so its output stops gradients."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        def step(state):
            i, layer, x = state
            return i + 1, layer, jnp.tanh(layer(x))

        start = (0, self.layer, x)
        loop = nnx.while_loop(lambda state: state[0] < 3, step, start)
        return self.layer(x) + lax.stop_gradient(loop[2])


class OwnGradient(nnx.Module):
    """The last kernel gets three times its gradient."""

    def __init__(self, rngs):
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.own = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.custom_vjp
        def call(layer, x):
            return layer(x)

        def forward(layer, x):
            return call(layer, x), (layer.kernel[...], x)

        def backward(kept, gradients):
            kernel, x = kept
            (d_layer, _), dy = gradients
            d_layer["kernel"][...] = 3 * x.T @ dy
            return d_layer, dy @ kernel.T

        call.defvjp(forward, backward)
        return call(self.own, jnp.tanh(self.up(x)))


class Experts(nnx.Module):
    """Parameters of the user's own, named as tunix and gemma name theirs."""

    def __init__(self, rngs):
        init = nnx.initializers.normal()
        self.gate_proj = nnx.Param(init(rngs.params(), (3, 4, 6)))
        self.down_proj = nnx.Param(init(rngs.params(), (3, 6, 4)))

    def __call__(self, x):
        h = jnp.tanh(jnp.einsum("td,edf->tef", x, self.gate_proj[...]))
        return jnp.einsum("tef,efd->td", h, self.down_proj[...])


class Statistics(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.down = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(jnp.tanh(self.norm(self.up(x)))))


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(
            2, 8, qkv_features=6, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.attn(self.norm(x), mask=nnx.make_causal_mask(ids))
        return self.embed.attend(x + self.down(nnx.gelu(self.up(x))))


def rnn(cell: Any, **settings: Any) -> Callable[[], tuple]:
    return model(
        lambda rngs: nnx.RNN(cell(4, 6, rngs=rngs), rngs=rngs, **settings),
        normal((2, 3, 4)),
    )


def conv(features: int, window: tuple[int, ...], **settings: Any) -> Any:
    layer = settings.pop("layer", nnx.Conv)
    sizes = (7, 6, 5)[: len(window)]
    return model(
        lambda rngs: layer(4, features, window, rngs=rngs, **settings),
        normal((2, *sizes, 4)),
    )


def normed(norm: Any) -> Callable[[], tuple]:
    return model(
        lambda rngs: nnx.Sequential(
            norm(nnx.Linear(4, 6, rngs=rngs), rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        ),
        normal((5, 4)),
    )


def attention(rngs: nnx.Rngs, **settings: Any) -> nnx.MultiHeadAttention:
    return nnx.MultiHeadAttention(2, 8, qkv_features=6, rngs=rngs, **settings)


def decode():
    """Attention a token at a time, its cache carried by `lax.scan`."""
    layer = attention(nnx.Rngs(0), decode=True)
    layer.init_cache((2, 4, 8))
    one_step, params, rest = functional(layer)

    def fn(params, cache, tokens):
        def step(cache, token):
            out, cache = one_step(params, cache, token[:, None])
            return cache, out[:, 0]

        return lax.scan(step, cache, jnp.swapaxes(tokens, 0, 1))

    return fn, params, (rest, normal((2, 4, 8)))


UP_DOWN = "**/{up,down}/kernel"
STACKED = {UP_DOWN: ((0,), (1,), (2,))}
GATES = "cell/{ii,if_,ig,io,hi,hf,hg,ho}/kernel"

CASES = [
    Case(
        "Linear", model(lambda r: nnx.Linear(4, 5, rngs=r), normal((2, 3, 4))), "kernel"
    ),
    Case(
        "Linear in bfloat16",
        model(
            lambda r: nnx.Linear(4, 5, dtype=jnp.bfloat16, rngs=r), normal((2, 3, 4))
        ),
        tolerance=0.05,
    ),
    Case(
        "LinearGeneral",
        model(
            lambda r: nnx.LinearGeneral((2, 3), (3, 2), axis=(1, -1), rngs=r),
            normal((5, 2, 4, 3)),
        ),
        axes={"kernel": ((), (0, 1), (2, 3))},
    ),
    Case(
        "Einsum",
        model(
            lambda r: nnx.Einsum("bd,dhk->bhk", (4, 2, 3), (2, 3), rngs=r),
            normal((5, 4)),
        ),
        axes={"kernel": ((), (0,), (1, 2))},
    ),
    Case("Embed", model(lambda r: nnx.Embed(5, 4, rngs=r), IDS), "embedding"),
    Case("Embed and attend, tied", model(Tied, IDS), "embed/embedding"),
    Case("shared layer", model(Shared, normal((5, 4))), "first/kernel"),
    Case(
        "Sequential",
        model(
            lambda r: nnx.Sequential(
                nnx.Linear(4, 6, rngs=r), jnp.tanh, nnx.Linear(6, 3, rngs=r)
            ),
            normal((5, 4)),
        ),
        ("layers/0/kernel", "layers/2/kernel"),
    ),
    Case("List", model(Listed, normal((5, 4))), "blocks/{0,1}/{up,down}/kernel"),
    Case("own parameters", model(Experts, normal((5, 4))), ("gate_proj", "down_proj")),
    Case("Conv, stride, dilation", conv(6, (3, 2), strides=(2, 1), kernel_dilation=2)),
    Case("Conv, depthwise", conv(4, (3, 2), feature_group_count=4)),
    *(
        Case(f"Conv, padding {padding}", conv(6, (3,), padding=padding))
        for padding in ("CIRCULAR", "REFLECT", "CAUSAL")
    ),
    Case("ConvTranspose", conv(6, (3,), strides=2, layer=nnx.ConvTranspose)),
    Case(
        "ConvTranspose, transpose_kernel",
        conv(6, (3,), strides=2, transpose_kernel=True, layer=nnx.ConvTranspose),
        axes={"kernel": ((), (0, 2), (1,))},
    ),
    Case("BatchNorm and Dropout", model(Statistics, normal((8, 4))), UP_DOWN),
    Case(
        "attention",
        model(lambda r: attention(r, decode=False), normal((2, 3, 8))),
        "{query,key,value,out}/kernel",
    ),
    Case("attention, decoding in scan", decode, "{query,key,value,out}/kernel"),
    Case("Transformer", model(Transformer, IDS), ("**/kernel", "embed/embedding")),
    Case("LSTM", rnn(nnx.LSTMCell), GATES),
    Case("LSTM, optimised", rnn(nnx.OptimizedLSTMCell), "cell/**/kernel"),
    Case("GRU", rnn(nnx.GRUCell), "cell/**/kernel"),
    Case(
        "Bidirectional",
        model(
            lambda r: nnx.Bidirectional(
                nnx.RNN(nnx.SimpleCell(4, 6, rngs=r), rngs=r),
                nnx.RNN(nnx.SimpleCell(4, 6, rngs=r), rngs=r),
                rngs=r,
            ),
            normal((2, 3, 4)),
        ),
    ),
    Case("scan", model(Stacked, normal((5, 4))), UP_DOWN, axes=STACKED),
    Case(
        "scan and remat",
        model(lambda r: Stacked(r, remat=True), normal((5, 4))),
        UP_DOWN,
        axes=STACKED,
    ),
    Case(
        "scan, statistics, dropout",
        model(lambda r: Stacked(r, StatisticsBlock), normal((5, 4))),
        axes={"**/kernel": ((0,), (1,), (2,))},
    ),
    Case("vmap, ensemble", model(Ensemble, normal((5, 4))), UP_DOWN, axes=STACKED),
    Case("remat", model(lambda r: Wrapped(r, nnx.remat), normal((5, 4))), UP_DOWN),
    Case("jit", model(lambda r: Wrapped(r, nnx.jit), normal((5, 4))), UP_DOWN),
    Case("cond and switch", model(Branches, normal((5, 4))), "{a,b}/kernel"),
    Case("fori_loop", model(Loop, normal((5, 4))), "layer/kernel"),
    Case("while_loop", model(Looped, normal((5, 4))), "layer/kernel"),
    Case(
        "custom_vjp",
        model(OwnGradient, normal((5, 4))),
        "{up,own}/kernel",
        merged="own/kernel",
    ),
    Case(
        "WeightNorm",
        normed(nnx.WeightNorm),
        merged="layers/0/layer_instance/kernel",
    ),
    Case("SpectralNorm", normed(nnx.SpectralNorm)),  # products alone
]


@pytest.mark.once
@pytest.mark.parametrize("case", params(CASES, PLAN))
def test_plan_adapts_every_weight(case):
    check_plan(case)


@pytest.mark.once
@pytest.mark.parametrize("case", params(CASES, VALUES))
def test_adapted_equals_merged_in_value_and_gradient(case):
    check_values(case)


def test_three_lines_there_and_back():
    """Statistics and random counts flow through training and into the model."""
    model, x = Statistics(nnx.Rngs(0)), normal((8, 4))

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, rest, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return model(x), nnx.state(model, nnx.Not(nnx.Param))

    config = jlora.LoraConfig(rank=2)
    plan = jlora.plan(fn, params, rest, x, config=config)
    assert plan.adapted == ("up/kernel",)  # the head is left
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    lora_fn = jlora.apply_lora(fn, on_merge="error")

    @jax.jit
    def train(trainable, rest):
        def loss(trainable):
            y, new = lora_fn(frozen, trainable, rest, x)
            return jnp.mean(y**2), new

        gradient, rest = jax.grad(loss, has_aux=True)(trainable)
        return jax.tree.map(lambda t, g: t - 0.5 * g, trainable, gradient), rest

    before = rest
    for _ in range(3):
        trainable, rest = train(trainable, rest)
    assert rest["dropout"]["rngs"]["count"][...] == 3
    mean = before["norm"]["mean"][...]
    assert np.abs(rest["norm"]["mean"][...] - mean).max() > 1e-3

    nnx.update(model, jlora.merge(frozen, trainable), rest)

    expected, after = lora_fn(frozen, trainable, rest, x)
    near(model(x), expected, 1e-5)
    near(nnx.state(model, nnx.Not(nnx.Param)), after, 1e-5)
