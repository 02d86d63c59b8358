"""Flax Linen modules, unchanged: one table, one row a module."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.helpers import normal
from tests.libraries.library_cases import (
    PLAN,
    VALUES,
    Case,
    check_plan,
    check_values,
    fill,
    params,
)

pytestmark = pytest.mark.once

IDS = jnp.array([[0, 3, 1], [2, 2, 4]])


def linen(module, *args: Any, **kwargs: Any):
    """Returns how to build the case of a module: `apply`, variables, arguments."""

    def build():
        made = module() if isinstance(module, type) else module
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        init = {k: v for k, v in kwargs.items() if k not in ("mutable", "rngs")}
        shapes = jax.eval_shape(functools.partial(made.init, **init), keys, *args)
        return made.apply, fill(shapes), args, kwargs

    return build


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(5, 4)
        return embed.attend(jnp.tanh(embed(ids)))


class Norms(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
        x = nn.RMSNorm()(jnp.tanh(nn.LayerNorm()(x)))
        return nn.GroupNorm(num_groups=2)(nn.Dense(12)(x))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(6)(x))
        return nn.Dense(3)(x)


class Methods(nn.Module):
    def setup(self):
        self.encoder = nn.Dense(3)
        self.decoder = nn.Dense(4)

    def __call__(self, x):
        return self.decoder(self.encoder(x))

    def encode(self, x):
        return jnp.tanh(self.encoder(x))


class Transposed(nn.Module):
    """An autoencoder whose decoder uses the encoder's kernel."""

    @nn.compact
    def __call__(self, x):
        encoder = nn.Dense(3, name="encoder")
        h = jnp.tanh(encoder(x))
        return h @ encoder.variables["params"]["kernel"].T


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(6, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(4, name="down")(jnp.tanh(h))


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


class Scanned(nn.Module):
    remat: bool = False
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Step, prevent_cse=False) if self.remat else Step
        stack = nn.scan(
            layer,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return stack(name="layers")(x, None)[0]


class StatisticsStep(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.BatchNorm(use_running_average=False)(nn.Dense(4, name="up")(x))
        return x + nn.Dropout(0.3, deterministic=False)(jnp.tanh(h)), None


class ScannedStatistics(nn.Module):
    """Each layer has statistics and a mask of its own."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            StatisticsStep,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        return stack(name="layers")(x, None)[0]


class SharedScan(nn.Module):
    """The same layer three times: its weights are constants of the loop."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            Step, variable_broadcast="params", split_rngs={"params": False}, length=3
        )
        return stack(name="layer")(x, None)[0]


class Remat(nn.Module):
    policy: Any = None

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Block, policy=self.policy)
        return layer(name="b")(layer(name="a")(x))


class RematScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat_scan(Block, lengths=(2, 2))(name="layers")(x)


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x):
        members = nn.vmap(
            Block,
            in_axes=None,
            axis_size=3,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        return members(name="members")(x)


class SharedVmap(nn.Module):
    @nn.compact
    def __call__(self, x):
        rows = nn.vmap(
            Block, variable_axes={"params": None}, split_rngs={"params": False}
        )
        return rows(name="block")(x)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.jit(Block)
        return layer(name="b")(layer(name="a")(x))


class Branches(nn.Module):
    def setup(self):
        self.a, self.b = nn.Dense(4), nn.Dense(4)

    def __call__(self, x):
        if self.is_initializing():
            return self.a(x) + self.b(x)
        y = nn.cond(x.sum() > 0, lambda m, x: m.a(x), lambda m, x: m.b(m.a(x)), self, x)
        return nn.switch(
            1, [lambda m, x: m.a(x), lambda m, x: jnp.tanh(m.b(x))], self, y
        )


class Looped(nn.Module):
    """`while_loop` has no reverse mode, so its output stops gradients but one."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="layer")
        x = layer(x)
        if self.is_initializing():
            return x
        _, loop = nn.while_loop(
            lambda m, state: state[0] < 3,
            lambda m, state: (state[0] + 1, jnp.tanh(m(state[1]))),
            layer,
            (0, lax.stop_gradient(x)),
        )
        return x + lax.stop_gradient(loop)


class WeightNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.WeightNorm(nn.Dense(6))(x))


class SpectralNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.SpectralNorm(nn.Dense(6))(x, update_stats=True))


class Mapped(nn.Module):
    """A layer whose kernel is stored `[out, in]`, or masked, by `map_variables`."""

    mask: bool = False

    @nn.compact
    def __call__(self, x):
        def change(variables):
            if self.mask:
                return jax.tree.map(jnp.triu, variables)
            return jax.tree.map(jnp.transpose, variables)

        layer = nn.map_variables(
            nn.Dense, "params", change, change, init=self.is_initializing()
        )
        return jnp.tanh(layer(6, use_bias=False, name="layer")(x))


class OwnGradient(nn.Module):
    """Kernels get three times their gradient, inputs a clipped one."""

    @nn.compact
    def __call__(self, x):
        def call(layer, x):
            return layer(x)

        def forward(layer, x):
            return nn.vjp(call, layer, x)

        def backward(vjp, dy):
            d_params, dx = vjp(dy)
            return jax.tree.map(lambda d: 3 * d, d_params), jnp.clip(dx, -0.1, 0.1)

        own = nn.custom_vjp(call, forward, backward)
        x = jnp.tanh(nn.Dense(6, name="up")(x))
        return own(nn.Dense(4, name="own"), x)


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        logical = nn.with_logical_partitioning(
            nn.initializers.lecun_normal(), ("model", "embed")
        )
        x = jnp.tanh(nn.Dense(6, kernel_init=init)(x))
        return nn.Dense(3, kernel_init=logical)(x)


class RawEinsum(nn.Module):
    """Parameters of the user's own, one per expert."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal()
        up = self.param("up", init, (3, 4, 6))
        down = self.param("down", init, (3, 6, 4))
        h = jnp.tanh(jnp.einsum("td,edf->tef", x, up))
        return jnp.einsum("tef,efd->td", h, down)


class Transformer(nn.Module):
    """A decoder block with everything usual around attention."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(5, 8, name="embed")
        x = embed(ids) + self.param("position", nn.initializers.normal(), (1, 3, 8))
        mask = nn.make_causal_mask(ids)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(
            nn.LayerNorm()(x), mask=mask
        )
        x = x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(x)))
        return embed.attend(x)


class Pooled(nn.Module):
    """Learned queries, the same for each of the batch, ask twice."""

    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.normal(), (1, 3, 8))
        probe = jnp.tile(probe, (x.shape[0], 1, 1))
        first = attention(name="first", use_bias=False)
        again = attention(name="second", use_bias=False)
        return first(probe, x) + again(nn.LayerNorm()(probe), x)


def attention(**settings: Any) -> nn.Module:
    return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, **settings)


def decode():
    """Attention a token at a time, its cache carried by `lax.scan`."""
    module = attention(decode=True)
    tokens = normal((2, 4, 8))
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)
    variables = fill(shapes)

    def fn(params, cache, tokens):
        def step(cache, token):
            out, new = module.apply(
                {"params": params, "cache": cache}, token[:, None], mutable=["cache"]
            )
            return new["cache"], out[:, 0]

        return lax.scan(step, cache, jnp.swapaxes(tokens, 0, 1))

    return fn, variables["params"], (variables["cache"], tokens)


def decode_variables():
    """As `decode`, all variables in one tree, the third step only."""
    module = attention(decode=True)
    tokens = normal((2, 4, 8))
    variables = fill(jax.eval_shape(module.init, jax.random.key(0), tokens))
    variables["cache"]["cache_index"] += 2
    return module.apply, variables, (tokens[:, :1],), {"mutable": ["cache"]}


def conv(features: int, window: tuple[int, ...], **settings: Any) -> Any:
    sizes = (7, 6, 5)[: len(window)]
    channels = settings.pop("channels", 4)
    module = settings.pop("module", nn.Conv)
    return linen(module(features, window, **settings), normal((2, *sizes, channels)))


LSTM = ("params/cell/{ii,if,ig,io,hi,hf,hg,ho}/kernel",)
UP_DOWN = "params/**/{up,down}/kernel"
STACKED = {UP_DOWN: ((0,), (1,), (2,))}

CASES = [
    Case("Dense", linen(nn.Dense(5), normal((2, 3, 4))), "params/kernel"),
    Case(
        "Dense in bfloat16",
        linen(nn.Dense(5, dtype=jnp.bfloat16), normal((2, 3, 4))),
        tolerance=0.05,
    ),
    Case(
        "Dense, parameters in bfloat16",
        linen(
            nn.Dense(5, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16), normal((2, 3, 4))
        ),
        tolerance=0.05,
    ),
    Case(
        "DenseGeneral, axes out",
        linen(nn.DenseGeneral((2, 3)), normal((2, 4))),
        axes={"**/kernel": ((), (0,), (1, 2))},
    ),
    Case(
        "DenseGeneral, axes in",
        linen(nn.DenseGeneral(6, axis=(-2, -1)), normal((5, 2, 3))),
        axes={"**/kernel": ((), (0, 1), (2,))},
    ),
    Case(
        "DenseGeneral, axes in and out",
        linen(nn.DenseGeneral((3, 2), axis=(1, -1)), normal((5, 2, 3, 4))),
        axes={"**/kernel": ((), (0, 1), (2, 3))},
    ),
    Case(
        "DenseGeneral, batch axes",
        linen(nn.DenseGeneral(6, batch_dims=(0,)), normal((3, 5, 4))),
        axes={"**/kernel": ((0,), (1,), (2,))},
    ),
    Case(
        "Einsum",
        linen(nn.Einsum((4, 2, 3), "...d,dhk->...hk"), normal((2, 5, 4))),
        axes={"**/kernel": ((), (0,), (1, 2))},
    ),
    Case(
        "Einsum, experts",
        linen(nn.Einsum((3, 4, 6), "etd,edf->etf", use_bias=False), normal((3, 5, 4))),
        axes={"**/kernel": ((0,), (1,), (2,))},
    ),
    Case("Embed", linen(nn.Embed(5, 4), IDS), "params/embedding"),
    Case(
        "Embed and attend, tied",
        linen(Tied, IDS),
        "params/Embed_0/embedding",
        axes={"**": ((), (0,), (1,))},
    ),
    Case("own parameters in einsum", linen(RawEinsum, normal((5, 4))), "params/*"),
    Case(
        "Conv, 1-D, stride",
        conv(6, (3,), strides=2),
        axes={"**/kernel": ((), (0, 1), (2,))},
    ),
    Case(
        "Conv, 2-D, stride",
        conv(6, (3, 2), strides=(2, 1)),
        axes={"**/kernel": ((), (0, 1, 2), (3,))},
    ),
    Case("Conv, 3-D", conv(6, (3, 2, 2), strides=(2, 1, 1))),
    Case("Conv, kernel dilation", conv(6, (3, 2), kernel_dilation=(2, 1))),
    Case(
        "Conv, input dilation",
        conv(6, (3, 2), input_dilation=(1, 2), padding=((1, 1), (0, 1))),
    ),
    Case("Conv, groups", conv(6, (3, 2), feature_group_count=2)),
    Case("Conv, depthwise", conv(8, (3, 2), feature_group_count=4)),
    Case("Conv, pointwise", conv(6, (1, 1))),
    *(
        Case(f"Conv, padding {padding}", conv(6, (3, 2), padding=padding))
        for padding in ("VALID", "CIRCULAR", "REFLECT", 1)
    ),
    Case("Conv, padding CAUSAL", conv(6, (3,), padding="CAUSAL")),
    Case(
        "Conv, mask",
        conv(6, (3,), mask=jnp.tril(jnp.ones((3, 4, 6)))),
        merged="params/kernel",
    ),
    Case("Conv, batch of two axes", linen(nn.Conv(6, (3,)), normal((2, 3, 7, 4)))),
    Case("ConvTranspose, 1-D", conv(6, (3,), strides=(2,), module=nn.ConvTranspose)),
    Case(
        "ConvTranspose, 2-D, dilated",
        conv(
            6,
            (3, 2),
            strides=(2, 1),
            kernel_dilation=(1, 2),
            padding="VALID",
            module=nn.ConvTranspose,
        ),
    ),
    Case(
        "ConvTranspose, transpose_kernel",
        conv(6, (3, 2), strides=(2, 2), transpose_kernel=True, module=nn.ConvTranspose),
        axes={"**/kernel": ((), (0, 1, 3), (2,))},
    ),
    Case(
        "ConvTranspose, padding CIRCULAR",
        conv(6, (3,), strides=(2,), padding="CIRCULAR", module=nn.ConvTranspose),
    ),
    Case(
        "ConvLocal",
        conv(3, (3,), module=nn.ConvLocal),
        axes={"**/kernel": ((0,), (1,), (2,))},
    ),
    Case(
        "norms, statistics updated",
        linen(Norms, normal((5, 4)), mutable=["batch_stats"]),
    ),
    Case("norms, statistics used", linen(Norms, normal((5, 4)), train=False)),
    Case(
        "Dropout", linen(Dropped, normal((5, 4)), rngs={"dropout": jax.random.key(2)})
    ),
    Case(
        "method=",
        linen(Methods, normal((5, 4)), method="encode"),
        "params/encoder/kernel",
    ),
    Case(
        "kernel used again, transposed",
        linen(Transposed, normal((5, 4))),
        axes={"**/kernel": ((), (0,), (1,))},
    ),
    Case(
        "attention",
        linen(attention(), normal((2, 3, 8))),
        "params/{query,key,value,out}/kernel",
        axes={
            "params/{query,key,value}/kernel": ((), (0,), (1, 2)),
            "params/out/kernel": ((), (0, 1), (2,)),
        },
    ),
    Case(
        "attention, normalised, dropout",
        linen(
            attention(normalize_qk=True, dropout_rate=0.3, deterministic=False),
            normal((2, 3, 8)),
            rngs={"dropout": jax.random.key(2)},
        ),
        "params/{query,key,value,out}/kernel",
    ),
    Case(
        "attention, learned queries",
        linen(Pooled, normal((2, 4, 8))),
        ("params/{first,second}/{query,key,value,out}/kernel", "params/probe"),
        merged="params/probe",
    ),
    Case("attention, decoding in scan", decode, "{query,key,value,out}/kernel"),
    Case("attention, decoding, one tree", decode_variables, "params/*/kernel"),
    Case("Transformer", linen(Transformer, IDS), ("params/**/kernel", "**/embedding")),
    Case("LSTM", linen(nn.RNN(nn.LSTMCell(6)), normal((2, 3, 4))), LSTM),
    Case(
        "LSTM, optimised",
        linen(nn.RNN(nn.OptimizedLSTMCell(6)), normal((2, 3, 4))),
        LSTM,
    ),
    Case(
        "GRU",
        linen(nn.RNN(nn.GRUCell(6)), normal((2, 3, 4))),
        "params/cell/{ir,iz,in,hr,hz,hn}/kernel",
    ),
    Case(
        "MGU, SimpleCell, reversed",
        linen(
            nn.Sequential(
                [nn.RNN(nn.MGUCell(6)), nn.RNN(nn.SimpleCell(4), reverse=True)]
            ),
            normal((2, 3, 4)),
        ),
        "params/layers_*/cell/**/kernel",
    ),
    Case(
        "Bidirectional",
        linen(
            nn.Bidirectional(nn.RNN(nn.SimpleCell(6)), nn.RNN(nn.SimpleCell(6))),
            normal((2, 3, 4)),
        ),
    ),
    Case(
        "ConvLSTM",
        linen(nn.RNN(nn.ConvLSTMCell(3, (2, 2))), normal((2, 3, 4, 4, 2))),
        "params/cell/{ih,hh}/kernel",
    ),
    Case("scan", linen(Scanned, normal((5, 4))), UP_DOWN, axes=STACKED),
    Case(
        "scan, layers last",
        linen(Scanned(axis=-1), normal((5, 4))),
        UP_DOWN,
        axes={UP_DOWN: ((2,), (0,), (1,))},
    ),
    Case("scan and remat", linen(Scanned(remat=True), normal((5, 4))), UP_DOWN),
    Case(
        "scan, statistics, dropout",
        linen(
            ScannedStatistics,
            normal((5, 4)),
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(2)},
        ),
        axes={"**/kernel": ((0,), (1,), (2,))},
    ),
    Case(
        "scan, shared layer",
        linen(SharedScan, normal((5, 4))),
        UP_DOWN,
        axes={UP_DOWN: ((), (0,), (1,))},
    ),
    Case("remat", linen(Remat, normal((5, 4))), UP_DOWN),
    Case(
        "remat, policy",
        linen(Remat(jax.checkpoint_policies.dots_saveable), normal((5, 4))),
        UP_DOWN,
    ),
    Case(
        "remat_scan",
        linen(RematScan, normal((5, 4))),
        UP_DOWN,
        axes={UP_DOWN: ((0, 1), (2,), (3,))},
    ),
    Case("vmap, ensemble", linen(Ensemble, normal((5, 4))), UP_DOWN, axes=STACKED),
    Case("vmap, shared", linen(SharedVmap, normal((5, 4))), UP_DOWN),
    Case("jit", linen(Jitted, normal((5, 4))), UP_DOWN),
    Case("cond and switch", linen(Branches, normal((5, 4))), "params/{a,b}/kernel"),
    Case("while_loop", linen(Looped, normal((5, 4))), "params/layer/kernel"),
    Case(
        "WeightNorm",
        linen(WeightNormed, normal((5, 4))),
        merged="params/Dense_1/kernel",
    ),
    Case(
        "SpectralNorm",
        linen(SpectralNormed, normal((5, 4)), mutable=["batch_stats"]),
        "params/Dense_{0,1}/kernel",
    ),
    Case(
        "map_variables",
        linen(Mapped, normal((5, 4))),
        axes={"**/kernel": ((), (1,), (0,))},
    ),
    Case(
        "map_variables, masked",
        linen(Mapped(mask=True), normal((5, 6))),
        merged="**/kernel",
    ),
    Case(
        "custom_vjp",
        linen(OwnGradient, normal((5, 4))),
        "params/{up,own}/kernel",
        merged="params/own/kernel",
    ),
    Case("Partitioned", linen(Boxed, normal((5, 4))), "params/Dense_{0,1}/kernel"),
]


@pytest.mark.parametrize("case", params(CASES, PLAN))
def test_plan_adapts_every_weight(case):
    check_plan(case)


@pytest.mark.parametrize("case", params(CASES, VALUES))
def test_adapted_equals_merged_in_value_and_gradient(case):
    check_values(case)
