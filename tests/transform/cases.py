"""Every way a weight can be used: one table, one row a case."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jlora

FACTORED, MERGED, BOTH = "factored", "merged", "factored+merged"


@dataclasses.dataclass
class Case:
    """`fn({"w": w, ...}, x)`; `axes` are (batch, fan-in, fan-out) of `w`."""

    name: str
    shape: tuple[int, ...]
    x: tuple[int, ...]
    fn: Callable[[Any, Any], Any]
    axes: tuple = ((), (0,), (1,))
    op: str = "linear"
    route: str = FACTORED
    rank: int = 2
    has_gradient: bool = True
    others: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


MASK = jnp.arange(4)[:, None] < jnp.arange(6)[None]
IDS = jnp.array([[0, 3, 1], [2, 2, 4]])
IN_OUT = ((), (0,), (1,))
OUT_IN = ((), (1,), (0,))
STACK = ((0,), (1,), (2,))


@jax.custom_vjp
def scaled_grad(x, w):
    return x @ w


scaled_grad.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda res, g: (10 * g @ res[1].T, 10 * res[0].T @ g),
)


@jax.custom_jvp
def odd_grad(w):
    return w * 2


odd_grad.defjvp(lambda p, t: (odd_grad(p[0]), 20 * t[0]))


def scan_stack(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), h.sum()), x, p["w"])


def scan_const(p, x):
    return lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, length=3)[0]


def scan_carry(p, x):
    def body(state, _):
        w, h = state
        return (w, jnp.tanh(h @ w)), None

    return lax.scan(body, (p["w"], x), None, length=3)[0][1]


def scan_carry_jit(p, x):
    def body(state, _):
        return jax.jit(lambda w, h: (w, jnp.tanh(h @ w)))(*state), None

    return lax.scan(body, (p["w"], x), None, length=3)[0][1]


def scan_second_axis(p, x):
    return lax.scan(
        lambda h, w: (jnp.tanh(h @ w), None), x, jnp.moveaxis(p["w"], 1, 0)
    )[0]


def scan_rows(p, x):
    """Scans over the fan-in: a row of `w` and a column of `x` at a time."""
    total, _ = lax.scan(
        lambda t, row: (t + row[0][:, None] * row[1][None], None),
        jnp.zeros((x.shape[0], p["w"].shape[1])),
        (x.T, p["w"]),
    )
    return total


def while_const(p, x):
    def step(state):
        i, h = state
        return i + 1, jnp.tanh(h @ p["w"])

    return lax.fori_loop(0, 3, lambda i, h: step((i, h))[1], x)


def cond_const(p, x):
    return lax.cond(x.sum() > 0, lambda h: h @ p["w"], lambda h: 2 * h @ p["w"], x)


def switch_stack(p, x):
    branches = [lambda h, i=i: jnp.tanh(h @ p["w"][i]) for i in range(3)]
    return lax.switch(jnp.int32(1), branches, x)


def grows(w, x):
    """Steps until the sum is large: each example takes its own number of them."""
    return lax.while_loop(lambda h: h.sum() < 9, lambda h: jnp.abs(h @ w) + h, x)


def while_for_each(p, x):
    return jax.vmap(lambda x: grows(p["w"], jnp.abs(x)))(x)


def while_carry_for_each(p, x):
    def steps(x):
        return lax.while_loop(
            lambda state: state[1].sum() < 9,
            lambda state: (state[0], jnp.abs(state[1] @ state[0]) + state[1]),
            (p["w"], jnp.abs(x)),
        )[1]

    return jax.vmap(steps)(x)


def cond_for_each(p, x):
    """The second branch has an infinite derivative where the first is taken."""

    def choose(x):
        return lax.cond(
            x[0] > 0,
            lambda x: jnp.tanh(x @ p["w"]),
            lambda x: jnp.sqrt(jnp.abs(jnp.minimum(x, 0) @ p["w"])),
            x,
        )

    return jax.vmap(choose)(jnp.where(x[:, :1] > 0, jnp.abs(x), x))


def switch_for_each(p, x):
    branches = [lambda x, i=i: jnp.tanh(x @ p["w"][i]) for i in range(3)]
    return jax.vmap(lambda i, x: lax.switch(i, branches, x))(jnp.arange(4) % 3, x)


def fused_qkv(p, x):
    q, k, v = jnp.split(x @ p["w"], 3, axis=-1)
    return q * k + v


def split_weight(p, x):
    q, k, v = jnp.split(p["w"], 3, axis=1)
    return jnp.tanh(x @ q) + jnp.tanh(x @ k) * jnp.tanh(x @ v)


def moe(p, x):
    gates = jax.nn.one_hot(jnp.arange(x.shape[0]) % 3, 3)
    buffers = jnp.einsum("te,td->etd", gates, x)
    return jnp.einsum("te,etf->tf", gates, jnp.einsum("etd,edf->etf", buffers, p["w"]))


def tied(p, x):
    h = p["w"][IDS] * 2.0 + x
    return jnp.tanh(h) @ p["w"].T


def tied_take(p, x):
    return jnp.tanh(jnp.take(p["w"], IDS, axis=0) + x) @ p["w"].T


def weight_norm(p, x):
    w = p["w"]
    return x @ (w / jnp.sqrt(jnp.sum(w * w, axis=0, keepdims=True)))


def ragged(p, x):
    return lax.ragged_dot(x, p["w"], jnp.array([2, 1, 2]))


def concatenated(p, x):
    q, k = jnp.split(x @ jnp.concatenate([p["w"], p["k"]], axis=1), [6], axis=1)
    return jnp.tanh(q).sum() * k


def stacked(p, x):
    return jnp.einsum("td,sdf->tsf", x, jnp.stack([p["k"], p["w"]]))


def sharded(p, x):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)
    return jax.shard_map(
        lambda w, x: lax.psum(x @ w, "model"),
        mesh=mesh,
        in_specs=(jax.P("model", None), jax.P("data", "model")),
        out_specs=jax.P("data", None),
    )(p["w"], x)


@jax.custom_batching.custom_vmap
def batched_by_hand(x, w):
    return x @ w


@batched_by_hand.def_vmap
def _(size, batched, x, w):
    return jax.vmap(jnp.matmul, [0 if b else None for b in batched])(x, w), True


def merged_in_scan(p, x):
    return lax.scan(lambda h, _: (scaled_grad(h, p["w"]), None), x, None, length=3)[0]


def merged_in_while(p, x):
    return lax.fori_loop(0, 3, lambda _, h: scaled_grad(h, p["w"]), x)


def conv_1d(x, w, *, groups=1):
    return lax.conv_general_dilated(
        x,
        w,
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


def one_step(p, x):
    """A step of gradient descent before the product, as MAML takes it."""
    gradient = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(p["w"])
    return x @ (p["w"] - 0.1 * gradient)


def modulated(w, x, *, norm=False, out=False):
    """Kernels of StyleGAN2, one for each example; `x` is `[batch, positions, 4]`."""
    w = w[None] * (2 + jnp.tanh(x.mean(1)))[:, None, :, None]
    if norm:
        w = w * lax.rsqrt(jnp.sum(w * w, axis=(1, 2), keepdims=True) + 1e-6)
    if out:
        w = w * (2 + jnp.tanh(x.mean(1) @ jnp.ones((4, 6))))[:, None, None]
    return w


def vmapped_kernels(x, w):
    return jax.vmap(lambda x, w: conv_1d(x[None], w)[0])(x, w)


def kernels_as_groups(x, w):
    n, length, _ = x.shape
    x = x.transpose(1, 0, 2).reshape(1, length, n * 4)
    return conv_1d(x, w.transpose(1, 2, 0, 3).reshape(3, 4, n * 6), groups=n)


CONV = {"axes": ((), (0, 1), (2,)), "op": "conv"}

MODULATED = [
    Case(
        "inputs modulated for each example",
        (4, 6),
        (3, 4),
        lambda p, x: jnp.einsum(
            "bi,bio->bo", x, p["w"][None] * jnp.tanh(x)[:, :, None]
        ),
    ),
    Case(
        "inputs modulated, then transposed",
        (6, 4),
        (3, 4),
        lambda p, x: jnp.einsum("bi,bio->bo", x, (p["w"][None] * x[:, None]).mT),
        OUT_IN,
    ),
    Case(
        "outputs modulated under vmap",
        (4, 6),
        (3, 4),
        lambda p, x: jax.vmap(lambda x: x @ (p["w"] / (2 + x[:3].sum())))(x),
    ),
    Case(
        "inputs modulated under vmap",
        (4, 6),
        (3, 4),
        lambda p, x: jax.vmap(lambda x: x @ (p["w"] * x[:, None]))(x),
    ),
    Case(
        "inputs and outputs modulated",
        (4, 6),
        (3, 4),
        lambda p, x: jnp.einsum(
            "bi,bio->bo",
            x,
            p["w"][None] * x[:, :, None] * (x @ jnp.ones((4, 6)))[:, None],
        ),
    ),
    Case(
        "modulated stack in scan",
        (3, 4, 4),
        (2, 4),
        lambda p, x: lax.scan(
            lambda h, w: (jnp.einsum("bi,bio->bo", h, w[None] * h[:, :, None]), None),
            jnp.tanh(x),
            p["w"],
        )[0],
        STACK,
    ),
    Case(
        "experts modulated",
        (3, 4, 6),
        (3, 5, 4),
        lambda p, x: jnp.einsum("eti,eio->teo", x, p["w"] * x[:, 0, 0, None, None]),
        STACK,
    ),
    Case(
        "experts modulated by row",
        (3, 4, 6),
        (5, 4),
        lambda p, x: jnp.einsum("ti,teio->teo", x, p["w"][None] * x[:, :3, None, None]),
        ((), (1,), (0, 2)),
    ),
    Case(
        "two inputs modulated together",
        (2, 4, 6),
        (3, 2, 4),
        lambda p, x: jnp.tensordot(x, p["w"] * x[0, :, :, None], 2),
        ((), (0, 1), (2,)),
    ),
    Case(
        "looked-up modulation",
        (4, 6),
        (3, 4),
        lambda p, x: jnp.einsum(
            "bi,bio->bo", x, p["w"][None] * p["styles"][IDS[0]][:, :, None]
        ),
        others={"styles": (5, 4)},
    ),
    Case(
        "kernels modulated",
        (3, 4, 6),
        (2, 5, 4),
        lambda p, x: vmapped_kernels(x, modulated(p["w"], x)),
        **CONV,
    ),
    Case(
        "kernels modulated, as groups",
        (3, 4, 6),
        (2, 5, 4),
        lambda p, x: kernels_as_groups(x, modulated(p["w"], x)),
        **CONV,
    ),
    Case(
        "kernels modulated on both sides",
        (3, 4, 6),
        (2, 5, 4),
        lambda p, x: kernels_as_groups(x, modulated(p["w"], x, out=True)),
        **CONV,
    ),
    Case(
        "kernels modulated and demodulated",
        (3, 4, 6),
        (2, 5, 4),
        lambda p, x: vmapped_kernels(x, modulated(p["w"], x, norm=True)),
        **CONV,
        route=BOTH,
    ),
    Case(
        "kernels modulated, then not linear",
        (3, 4, 6),
        (2, 5, 4),
        lambda p, x: vmapped_kernels(x, jnp.tanh(modulated(p["w"], x))),
        route=MERGED,
    ),
    Case(
        "masked along the fan-in of a kernel",
        (3, 4, 6),
        (2, 5, 4),
        lambda p, x: conv_1d(x, p["w"] * jnp.tri(3, 4)[:, :, None]),
        **CONV,
    ),
    Case(
        "every entry scaled by data",
        (4, 6),
        (3, 4),
        lambda p, x: x @ (p["w"] * (x.T @ jnp.ones((3, 6)))),
        route=MERGED,
    ),
    Case(
        "every entry scaled for each example",
        (4, 6),
        (3, 4),
        lambda p, x: jnp.einsum(
            "bi,bio->bo", x, p["w"][None] * jnp.sin(x[:, :, None] + jnp.ones((1, 1, 6)))
        ),
        route=MERGED,
    ),
    Case(
        "less its median",
        (4, 6),
        (3, 4),
        lambda p, x: x @ (p["w"] - jnp.median(p["w"])),
        route=MERGED,
    ),
    Case("after a step", (4, 6), (3, 4), one_step),
    Case(
        "data added",
        (4, 6),
        (3, 4),
        lambda p, x: x @ (p["w"] + x.T @ jnp.ones((3, 6))),
    ),
    Case(
        "data beside",
        (4, 6),
        (3, 4),
        lambda p, x: x @ jnp.concatenate([p["w"], x.T], axis=1),
    ),
    Case(
        "computed weight added",
        (4, 6),
        (3, 4),
        lambda p, x: x @ (p["w"] + jnp.exp(p["k"])),
        others={"k": (4, 6)},
    ),
    Case(
        "a vector leaf meets it",
        (4, 6),
        (3, 6),
        lambda p, x: x * (p["v"] @ p["w"])[None],
        others={"v": (4,)},
    ),
    Case(
        "another leaf meets it",
        (4, 6),
        (3, 5),
        lambda p, x: x @ (p["u"] @ p["w"]),
        others={"u": (5, 4)},
    ),
    Case(
        "scaled by a leaf of one column",
        (4, 6),
        (3, 4),
        lambda p, x: x @ (p["g"] * p["w"]),
        others={"g": (4, 1)},
    ),
]

CASES = [
    *MODULATED,
    Case("matmul", (4, 6), (3, 4), lambda p, x: x @ p["w"]),
    Case("matmul, 3-D activation", (4, 6), (2, 3, 4), lambda p, x: x @ p["w"]),
    Case("matmul, vector", (4, 6), (4,), lambda p, x: x @ p["w"]),
    Case("weight on the left", (6, 4), (4, 3), lambda p, x: p["w"] @ x, OUT_IN),
    Case("transposed", (6, 4), (3, 4), lambda p, x: x @ p["w"].T, OUT_IN),
    Case("dot", (4, 6), (3, 4), lambda p, x: jnp.dot(x, p["w"])),
    Case(
        "tensordot, two inputs",
        (2, 4, 6),
        (3, 2, 4),
        lambda p, x: jnp.tensordot(x, p["w"], 2),
        ((), (0, 1), (2,)),
    ),
    Case(
        "einsum, heads out",
        (8, 2, 4),
        (3, 5, 8),
        lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["w"]),
        ((), (0,), (1, 2)),
    ),
    Case(
        "einsum, heads in",
        (2, 4, 8),
        (3, 5, 2, 4),
        lambda p, x: jnp.einsum("bthk,hkd->btd", x, p["w"]),
        ((), (0, 1), (2,)),
    ),
    Case(
        "einsum, output axis first",
        (2, 8, 4),
        (3, 5, 8),
        lambda p, x: jnp.einsum("btd,hdk->hbtk", x, p["w"]),
        ((), (1,), (0, 2)),
    ),
    Case(
        "einsum, weight first",
        (8, 2, 4),
        (3, 5, 8),
        lambda p, x: jnp.einsum("dhk,btd->kbht", p["w"], x),
        ((), (0,), (1, 2)),
    ),
    Case(
        "einsum, batch axis",
        (3, 4, 6),
        (5, 3, 4),
        lambda p, x: jnp.einsum("teb,ebf->tef", x, p["w"]),
        STACK,
    ),
    Case(
        "einsum, batch axis last",
        (4, 6, 3),
        (5, 4, 3),
        lambda p, x: jnp.einsum("tie,ioe->toe", x, p["w"]),
        ((2,), (0,), (1,)),
    ),
    Case("experts", (3, 4, 6), (5, 4), moe, STACK),
    Case(
        "vmapped experts",
        (3, 4, 6),
        (3, 5, 4),
        lambda p, x: jax.vmap(lambda x, w: jnp.tanh(x @ w))(x, p["w"]),
        STACK,
    ),
    Case(
        "experts picked by row",
        (5, 4, 6),
        (3, 4),
        lambda p, x: jnp.einsum("td,tdf->tf", x, p["w"][IDS[0]]),
        STACK,
    ),
    Case(
        "block-diagonal heads",
        (8, 4),
        (3, 2, 4),
        lambda p, x: jnp.einsum("thk,hkd->thd", x, p["w"].reshape(2, 4, 4)),
    ),
    Case(
        "precision and element type",
        (4, 6),
        (3, 4),
        lambda p, x: lax.dot_general(
            x,
            p["w"],
            (((1,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        ),
    ),
    Case(
        "embedding by index",
        (5, 4),
        (1, 1, 4),
        lambda p, x: p["w"][IDS] * x,
        op="embedding",
    ),
    Case(
        "embedding by take",
        (5, 4),
        (1, 1, 4),
        lambda p, x: jnp.take(p["w"], IDS, axis=0) + x,
        op="embedding",
    ),
    Case(
        "embedding then product",
        (5, 4),
        (4, 6),
        lambda p, x: p["w"][IDS] @ x,
        op="embedding",
    ),
    Case(
        "embedding of heads",
        (5, 2, 4),
        (1, 1, 1, 4),
        lambda p, x: p["w"][IDS] * x,
        ((), (0,), (1, 2)),
        op="embedding",
    ),
    Case(
        "embedding, one row",
        (5, 4),
        (4, 6),
        lambda p, x: p["w"][IDS[0, 1]] @ x,
        op="embedding",
    ),
    Case(
        "one-hot product",
        (5, 4),
        (1, 1, 4),
        lambda p, x: jax.nn.one_hot(IDS, 5) @ p["w"] * x,
    ),
    Case("tied head", (5, 4), (2, 3, 4), tied, op="embedding"),
    Case("tied head by take", (5, 4), (2, 3, 4), tied_take, op="embedding"),
    Case("static index", (3, 4, 6), (5, 4), lambda p, x: x @ p["w"][1], STACK),
    Case(
        "dynamic index",
        (3, 4, 6),
        (5, 4),
        lambda p, x: x @ p["w"][jnp.argmax(IDS[0])],
        STACK,
    ),
    Case(
        "dynamic_index_in_dim",
        (3, 4, 6),
        (5, 4),
        lambda p, x: x @ lax.dynamic_index_in_dim(p["w"], IDS[0, 2], keepdims=False),
        STACK,
    ),
    Case("scan, stacked", (3, 4, 4), (2, 4), scan_stack, STACK),
    Case("scan, constant", (4, 4), (2, 4), scan_const),
    Case("scan, handed on", (4, 4), (2, 4), scan_carry),
    Case("scan, handed on through jit", (4, 4), (2, 4), scan_carry_jit),
    Case("scan, second axis", (4, 3, 4), (2, 4), scan_second_axis, ((1,), (0,), (2,))),
    Case("fori_loop, constant", (4, 4), (2, 4), while_const),
    Case("cond", (4, 6), (2, 4), cond_const),
    Case("switch over layers", (3, 4, 6), (2, 4), switch_stack, STACK),
    Case("while for each", (4, 4), (3, 4), while_for_each, has_gradient=False),
    Case(
        "while for each, handed on",
        (4, 4),
        (3, 4),
        while_carry_for_each,
        has_gradient=False,
    ),
    Case("cond for each", (4, 6), (5, 4), cond_for_each),
    Case("switch for each", (3, 4, 6), (4, 4), switch_for_each, STACK),
    Case(
        "embedding, cond for each",
        (5, 4),
        (6, 4),
        lambda p, x: jax.vmap(
            lambda i, x: lax.cond(
                i > 2, lambda: p["w"][i] * x, lambda: jnp.sin(p["w"][i + 1])
            )
        )(jnp.argmax(x, axis=1), x),
        op="embedding",
    ),
    Case(
        "conv, cond for each",
        (3, 4, 6),
        (5, 7, 4),
        lambda p, x: jax.vmap(
            lambda x: lax.cond(
                x[0, 0] > 0,
                lambda: conv_1d(x[None], p["w"]),
                lambda: jnp.cos(conv_1d(x[None], p["w"])),
            )
        )(x),
        ((), (0, 1), (2,)),
        op="conv",
    ),
    Case(
        "cond for each expert",
        (3, 4, 6),
        (3, 5, 4),
        lambda p, x: jax.vmap(
            lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: 2 * x @ w)
        )(p["w"], x),
        STACK,
    ),
    Case(
        "a choice inside the matrix",
        (4, 6),
        (2, 4),
        lambda p, x: x @ jnp.where(MASK, p["w"], lax.stop_gradient(p["w"])),
        route=MERGED,
    ),
    Case("jit", (4, 6), (2, 4), lambda p, x: jax.jit(lambda w, x: x @ w)(p["w"], x)),
    Case(
        "jit that returns the weight",
        (6, 4),
        (2, 4),
        lambda p, x: x @ jax.jit(lambda w: w.T)(p["w"]),
        OUT_IN,
    ),
    Case(
        "remat",
        (4, 4),
        (2, 4),
        lambda p, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w) @ w)(p["w"], x),
    ),
    Case(
        "remat with a policy",
        (4, 4),
        (2, 4),
        jax.checkpoint(
            lambda p, x: jnp.sin(jnp.sin(x @ p["w"]) @ p["w"]),
            policy=jax.checkpoint_policies.dots_saveable,
        ),
    ),
    Case(
        "remat in scan",
        (3, 4, 4),
        (2, 4),
        lambda p, x: lax.scan(
            jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, p["w"]
        ),
        STACK,
    ),
    Case("ragged_dot", (3, 4, 6), (5, 4), ragged, STACK),
    Case("concatenated", (4, 6), (2, 4), concatenated, others={"k": (4, 3)}),
    Case("stacked", (4, 6), (2, 4), stacked, others={"k": (4, 6)}),
    Case(
        "sum of two",
        (4, 6),
        (2, 4),
        lambda p, x: x @ (p["k"] - p["w"]),
        others={"k": (4, 6)},
    ),
    Case("shard_map", (4, 6), (8, 4), sharded),
    Case(
        "custom_vmap",
        (4, 6),
        (2, 4),
        lambda p, x: batched_by_hand(x, p["w"]),
        has_gradient=False,  # JAX has none for it
    ),
    Case("fused qkv", (4, 12), (2, 4), fused_qkv),
    Case("split weight", (4, 12), (2, 4), split_weight),
    Case("sliced output", (4, 12), (2, 4), lambda p, x: x @ p["w"][:, 2:9]),
    Case("sliced, strided input", (8, 6), (2, 4), lambda p, x: x @ p["w"][::2]),
    Case(
        "reshaped to heads",
        (8, 8),
        (3, 8),
        lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"].reshape(8, 2, 4)),
    ),
    Case(
        "heads joined",
        (8, 2, 4),
        (3, 8),
        lambda p, x: x @ p["w"].reshape(8, 8),
        ((), (0,), (1, 2)),
    ),
    Case(
        "axes joined across roles",
        (4, 6),
        (3, 24),
        lambda p, x: x @ p["w"].reshape(24),
        ((), (0, 1), ()),
        route="elementwise",
    ),
    Case("axis added", (4, 6), (2, 3, 4), lambda p, x: x @ p["w"][None]),
    Case(
        "broadcast",
        (4, 6),
        (2, 3, 4),
        lambda p, x: jnp.matmul(x, jnp.broadcast_to(p["w"], (2, 4, 6))),
    ),
    Case("scaled", (4, 6), (2, 4), lambda p, x: x @ (p["w"] * 0.5)),
    Case("scaled by data", (4, 6), (2, 4), lambda p, x: x @ (p["w"] * x[0, 0])),
    Case(
        "columns scaled",
        (4, 6),
        (2, 4),
        lambda p, x: x @ (p["w"] * jnp.arange(6.0)[None]),
    ),
    Case(
        "rows scaled",
        (4, 6),
        (2, 4),
        lambda p, x: x @ (p["w"] / jnp.arange(1.0, 5)[:, None]),
    ),
    Case(
        "scaled by a parameter",
        (4, 6),
        (2, 4),
        lambda p, x: x @ (p["w"] * p["g"][None, :]),
        others={"g": (6,)},
    ),
    Case("negated", (4, 6), (2, 4), lambda p, x: x @ -p["w"]),
    Case("reversed", (4, 6), (2, 4), lambda p, x: x @ jnp.flip(p["w"], 0)),
    Case("stop_gradient", (4, 6), (2, 4), lambda p, x: x @ lax.stop_gradient(p["w"])),
    Case(
        "barrier",
        (4, 6),
        (2, 4),
        lambda p, x: x @ lax.optimization_barrier((p["w"], x))[0],
    ),
    Case(
        "named scope", (4, 6), (2, 4), lambda p, x: jax.named_call(lambda: x @ p["w"])()
    ),
    Case(
        "conv 1-D",
        (3, 4, 6),
        (2, 9, 4),
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        ((), (0, 1), (2,)),
        op="conv",
    ),
    Case(
        "conv 2-D, NCHW, dilated",
        (6, 4, 3, 2),
        (2, 4, 9, 8),
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 2), [(1, 2), (0, 1)], (2, 1), (1, 2)
        ),
        ((), (1, 2, 3), (0,)),
        op="conv",
    ),
    Case(
        "conv, groups",
        (3, 3, 2, 8),
        (2, 6, 6, 4),
        lambda p, x: lax.conv_general_dilated(
            x,
            p["w"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        ),
        ((), (0, 1, 2), (3,)),
        op="conv",
    ),
    Case(
        "conv, depthwise",
        (3, 3, 1, 4),
        (2, 6, 6, 4),
        lambda p, x: lax.conv_general_dilated(
            x,
            p["w"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        ),
        ((), (0, 1, 2), (3,)),
        op="conv",
    ),
    Case(
        "conv, vmapped kernels",
        (2, 3, 4, 6),
        (2, 2, 9, 4),
        lambda p, x: jax.vmap(conv_1d)(x, p["w"]),
        ((0,), (1, 2), (3,)),
        op="conv",
    ),
    Case(
        "conv, vmapped kernels of groups",
        (2, 3, 2, 6),
        (2, 2, 9, 4),
        lambda p, x: jax.vmap(lambda x, w: conv_1d(x, w, groups=2))(x, p["w"]),
        ((0,), (1, 2), (3,)),
        op="conv",
    ),
    Case(
        "conv, vmapped kernels, one input",
        (2, 3, 4, 6),
        (2, 9, 4),
        lambda p, x: jax.vmap(conv_1d, (None, 0))(x, p["w"]),
        ((), (1, 2), (0, 3)),
        op="conv",
    ),
    Case(
        "conv, kernel reshaped",
        (3, 4, 2, 3),
        (2, 9, 4),
        lambda p, x: conv_1d(x, p["w"].reshape(3, 4, 6)),
        ((), (0, 1), (2, 3)),
        op="conv",
    ),
    Case(
        "reshaped across uneven axes",
        (3, 4),
        (2, 4),
        lambda p, x: x @ p["w"].reshape(4, 3),
        route=MERGED,
    ),
    Case(
        "vmapped embeddings",
        (3, 4, 5),
        (3, 2, 5),
        lambda p, x: jax.vmap(lambda w, x: x + w[jnp.argmax(x, -1) % 4])(p["w"], x),
        ((), (1,), (0, 2)),
        op="embedding",
    ),
    Case(
        "custom_vjp", (4, 6), (2, 4), lambda p, x: scaled_grad(x, p["w"]), route=MERGED
    ),
    Case("merged in scan", (4, 4), (2, 4), merged_in_scan, route=MERGED),
    Case("merged in fori_loop", (4, 4), (2, 4), merged_in_while, route=MERGED),
    Case("custom_jvp", (4, 6), (2, 4), lambda p, x: x @ odd_grad(p["w"]), route=MERGED),
    Case("weight norm", (4, 6), (2, 4), weight_norm, route=BOTH),
    Case(
        "nonlinear in the weight",
        (4, 6),
        (2, 4),
        lambda p, x: x @ jnp.exp(p["w"]),
        route=MERGED,
    ),
    Case(
        "scale of a norm by einsum",
        (2, 4),
        (3, 2, 4),
        lambda p, x: jnp.einsum("bhd,hd->bhd", x, p["w"]),
        route="elementwise",
    ),
    Case(
        "scale of a norm by einsum, in scan",
        (3, 4),
        (2, 4),
        lambda p, x: lax.scan(
            lambda h, w: (jnp.einsum("bd,d->bd", h, w), None), x, p["w"]
        )[0],
        route="elementwise",
    ),
    Case(
        "computed scale of a norm by einsum",
        (2, 4),
        (3, 2, 4),
        lambda p, x: jnp.einsum("bhd,hd->bhd", x, jnp.exp(p["w"])),
        route="elementwise",
    ),
    Case(
        "scores by a vector a head",
        (2, 4),
        (3, 2, 4),
        lambda p, x: jnp.einsum("bhd,hd->bh", x, p["w"]),
        route="elementwise",
    ),
    Case(
        "outer product",
        (2, 4),
        (3,),
        lambda p, x: jnp.einsum("b,hd->bhd", x, p["w"]),
        route="elementwise",
    ),
    Case(
        "rows in turn by einsum",
        (4, 6),
        (3,),
        lambda p, x: lax.map(lambda w: jnp.einsum("b,o->bo", x, w), p["w"]),
        route="elementwise",
    ),
    Case("one row at a time", (4, 6), (3, 4), scan_rows, route="elementwise"),
    Case(
        "fft of a weight",
        (4, 6),
        (2, 4),
        lambda p, x: x @ jnp.fft.fft(p["w"]).real,
        route=MERGED,
    ),
]
ADAPTABLE = [case for case in CASES if case.route != "elementwise" and case.axes[2]]


def build(case: Case, *, rule: bool = False, method: str = "lora"):
    """Returns `(fn, params, x, plan, frozen, trainable)` with all factors random."""
    rng = np.random.default_rng(sum(map(ord, case.name)))

    def normal(shape):
        return jnp.asarray(rng.normal(size=shape), "float32")

    params = {name: normal(shape) for name, shape in case.others.items()}
    params["w"], x = normal(case.shape), normal(case.x)
    rules = (jlora.Rule("w", axes=jlora.Axes(*case.axes)),) if rule else ()
    config = jlora.LoraConfig(
        rank=case.rank, alpha=3, targets="w", rules=rules, method=method
    )
    plan = jlora.plan(case.fn, params, x, config=config)
    _, trainable = jax.eval_shape(
        lambda params: jlora.split(jax.random.key(0), params, plan), params
    )
    trainable = jax.tree.map(lambda t: normal(t.shape) / 2, trainable)
    return case.fn, params, x, plan, params, trainable
