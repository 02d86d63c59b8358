"""Codes in compositions that the table of cases.py has not: they stay codes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

import jlora
from tests.helpers import close, normal
from tests.transform.quantised_helpers import (
    KINDS,
    adapted,
    equations,
    gradients,
    products,
    same_over_codes,
    widened,
)

L, N, T = 3, 8, 5
STACK = {"w": (L, N, N)}
ONE = {"w": (N, N)}
QKV = {"q": (N, N), "k": (N, N), "v": (N, N)}
IDS = jnp.array([0, 10, 3, 3])


def layer(h, w):
    return jnp.tanh(h @ w), None


def scan_of(stack: Callable[[Any], Any], **options: Any):
    return lambda p, x: lax.scan(layer, x, stack(p), **options)[0]


def steps_by_index(p, x):
    def step(i, h):
        w = lax.dynamic_index_in_dim(p["w"], i, keepdims=False)
        return jnp.tanh(h @ w)

    return lax.fori_loop(0, L, step, x)


def tied(p, x):
    return jnp.tanh(p["w"][IDS] + x) @ p["w"].T


def transposed_conv(p, x):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_transpose(x, p["w"], (2,), "SAME", dimension_numbers=numbers)


@dataclasses.dataclass
class Program:
    """`fn(params, x)`, and how many products with codes a gradient of it has."""

    name: str
    fn: Callable[[Any, Any], Any]
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=lambda: ONE)
    n: int = 2
    x: tuple[int, ...] = (T, N)
    dtype: str = "float32"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


DOUBLE = {"double": True}
PROGRAMS = [
    Program("scan in reverse", scan_of(lambda p: p["w"], reverse=True), STACK),
    Program("scan unrolled", scan_of(lambda p: p["w"], unroll=3), STACK),
    Program("transposed first", scan_of(lambda p: p["w"].transpose(0, 2, 1)), STACK),
    Program(
        "layers last",
        scan_of(lambda p: jnp.moveaxis(p["w"], 2, 0)),
        {"w": (N, N, L)},
        options={"kind": "int8"},
    ),
    Program(
        "cast first",
        scan_of(lambda p: p["w"].astype("bfloat16").astype("float32")),
        STACK,
    ),
    Program("scales too", scan_of(lambda p: p["w"]), STACK, options=DOUBLE),
    Program("step by index", steps_by_index, STACK, options=DOUBLE),
    Program(
        "stack of leaves",
        scan_of(lambda p: jnp.stack([p["q"], p["k"], p["v"]])),
        QKV,
        options={"kind": "int4"},
    ),
    Program(
        "fused projections",
        lambda p, x: jnp.tanh(x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)),
        QKV,
        options=DOUBLE,
    ),
    Program("tied, rows are blocks", tied, {"w": (11, N)}, 2, (4, N)),
    Program(
        "tied, blocks across rows",
        tied,
        {"w": (11, N)},
        2,
        (4, N),
        options={"planned": False, "double": True},
    ),
    Program("conv, transposed", transposed_conv, {"w": (3, N, 6)}, 2, (2, 9, N)),
    Program(
        "for each example",
        lambda p, x: jax.vmap(
            lambda x: lax.cond(
                x[0] > 0, lambda: x @ p["w"], lambda: jnp.sin(x @ p["w"])
            )
        )(x),
        n=4,
    ),
    Program(
        "multiples",
        lambda p, x: x @ (p["w"] * 0.3) + x @ -p["w"] + x @ (p["w"] / x[0, 0]),
        n=6,
        options={"kind": "int8", "double": True},
    ),
    Program("odd sizes", lambda p, x: x @ p["w"], {"w": (7, 13)}, 2, (T, 7)),
    Program("bfloat16", lambda p, x: x.astype("bfloat16") @ p["w"], dtype="bfloat16"),
    Program("float16", lambda p, x: x.astype("float16") @ p["w"], dtype="float16"),
    Program(
        "two dtypes",
        lambda p, x: lax.dot_general(
            x.astype("bfloat16"), p["w"], (((1,), (0,)), ((), ()))
        ),
    ),
    Program(
        "complex activations",
        lambda p, x: jnp.abs(lax.complex(x, x[::-1]) @ p["w"].astype("complex64")),
    ),
    Program(
        "a gain",
        lambda p, x: jnp.tanh(x @ p["w"]),
        options={"method": "dora", "kind": "int8"},
    ),
]


@pytest.mark.once
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_programs_keep_codes(program):
    params = normal(program.shapes, 3, program.dtype)
    x = normal(program.x, 4)
    options = {"kind": "nf4"} | program.options
    frozen, trainable = adapted(program.fn, params, x, **options)
    run = gradients(jlora.apply_lora(program.fn, on_merge="error"))
    jaxpr = same_over_codes(run, frozen, trainable, x, tolerance=2e-5)
    assert products(jaxpr) == program.n


def two_layers(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"])


TWO = {"w": (N, N), "v": (N, 6)}


def two(**options):
    x = normal((T, N), 4)
    return *adapted(two_layers, normal(TWO, 3), x, **options), x


def test_dropout_over_codes():
    frozen, trainable, x = two()
    config = jlora.LoraConfig(rank=2, targets="*", dropout=0.5)
    plan = jlora.plan(two_layers, frozen, x, config=config)
    _, dropped = jlora.split(jax.random.key(0), frozen, plan)
    dropped = jax.tree.unflatten(
        jax.tree.structure(dropped), jax.tree.leaves(trainable)
    )
    run = jlora.apply_lora(two_layers, on_merge="error")
    keyed = gradients(run, lora_key=jax.random.key(7))
    assert products(same_over_codes(keyed, frozen, dropped, x)) == 4


def test_many_adapters_and_examples_share_one_widening():
    frozen, trainable, x = two()
    several = jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), trainable)
    xs = jnp.stack([x, x + 1, -x])
    run = jlora.apply_lora(two_layers, on_merge="error")

    def summed(axes):
        mapped = jax.vmap(run, axes)
        return gradients(lambda frozen, t, x: mapped(frozen, t, x))

    for t, inputs, axes in (
        (several, xs, (None, 0, 0)),
        (several, x, (None, 0, None)),
        (trainable, xs, (None, None, 0)),
    ):
        jaxpr = same_over_codes(summed(axes), frozen, t, inputs)
        for eqn in equations(jaxpr, "quantised_linear"):
            assert eqn.invars[1].aval.shape in [(N // 2, N), (N // 2, 6)]
    stacked = jax.tree.map(lambda a: jnp.stack([a, a, a]), frozen)
    mapped = jax.vmap(run, (0, None, 0))
    expected = jax.vmap(lambda x: run(frozen, trainable, x))(xs)
    close(mapped(stacked, trainable, xs), expected)
    ids = jnp.array([0, 1, -1, 2, 0])
    row_fn = jlora.adapters.per_row(two_layers)
    assert products(same_over_codes(row_fn, frozen, several, ids, x)) == 2


def test_second_derivatives_keep_codes():
    frozen, trainable, x = two()
    run = jlora.apply_lora(two_layers, on_merge="error")
    first = gradients(run)

    def reverse_over_reverse(frozen, trainable, x):
        def loss(trainable, x):
            return sum(map(jnp.sum, jax.tree.leaves(first(frozen, trainable, x)[0])))

        return jax.grad(loss, (0, 1))(trainable, x)

    def forward_over_reverse(frozen, trainable, x):
        along = jax.tree.map(jnp.ones_like, (trainable, x))
        return jax.jvp(lambda t, x: first(frozen, t, x)[0], (trainable, x), along)

    def forward_twice(frozen, trainable, x):
        def along(x):
            return jax.jvp(lambda x: run(frozen, trainable, x), (x,), (x,))[1]

        return jax.jvp(along, (x,), (x,))

    for fun in (reverse_over_reverse, forward_over_reverse, forward_twice):
        jaxpr = same_over_codes(fun, frozen, trainable, x, tolerance=3e-5)
        over_dense = jax.make_jaxpr(fun)(widened(frozen), trainable, x)
        dense = [w.shape for w in frozen.values()]
        of_weights = [
            eqn
            for eqn in equations(over_dense, "dot_general")
            if any(v.aval.shape in dense for v in eqn.invars)
        ]
        assert products(jaxpr) == len(of_weights)
        made = [v.aval.shape for eqn in jaxpr.jaxpr.eqns for v in eqn.outvars]
        assert not set(made) & set(dense)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_scales(kind):
    frozen, trainable, x = two(kind=kind)
    run = jlora.apply_lora(two_layers, on_merge="error")

    def gradient(frozen, trainable, x):
        def loss(scales, make):
            parts = {
                path: dataclasses.replace(q, scales=scales[path])
                for path, q in frozen.items()
            }
            return jnp.sum(run(make(parts), trainable, x))

        scales = {path: q.scales for path, q in frozen.items()}
        return jax.grad(loss)(scales, lambda p: p), jax.grad(loss)(scales, widened)

    close(*jax.jit(gradient)(frozen, trainable, x), largest=1e-5)


def test_transposes_and_both_jacobians():
    frozen, _, x = two()
    bare = jlora.Trainable()
    product = jlora.apply_lora(lambda p, x: x @ p["w"])
    run = jlora.apply_lora(two_layers)

    def all_three(frozen, x):
        pull = jax.linear_transpose(lambda x: product(frozen, bare, x), x)
        fun = lambda x: run(frozen, bare, x)  # noqa: E731
        return pull(x), jax.jacrev(fun)(x), jax.jacfwd(fun)(x)

    same_over_codes(all_three, frozen, x)


def test_double_precision():
    with jax.enable_x64(True):
        params, x = normal(TWO, 3, "float64"), normal((T, N), 4, "float64")
        codes = jlora.quantize(params, kind="nf4")
        run = jlora.apply_lora(two_layers, on_merge="error")
        fun = lambda frozen, x: run(frozen, jlora.Trainable(), x)  # noqa: E731
        same_over_codes(fun, codes, x, tolerance=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_export_for_three_platforms_and_any_number_of_rows(kind):
    frozen, trainable, x = two(kind=kind)
    run = jlora.apply_lora(two_layers)
    (rows,) = jax.export.symbolic_shape("rows")
    shape = jax.ShapeDtypeStruct((rows, N), x.dtype)
    make = jax.export.export(
        jax.jit(lambda x: run(frozen, trainable, x)), platforms=["cpu", "tpu", "cuda"]
    )
    again = jax.export.deserialize(make(shape).serialize())
    close(again.call(x), run(frozen, trainable, x))


def test_a_product_with_a_cast_to_more_digits_is_not_rounded_before():
    params, x = normal(ONE, 3, "bfloat16"), normal((T, N), 4)

    def fn(p, x):
        return x @ (p["w"].astype("float32") * 0.3)

    run = jlora.apply_lora(fn, on_merge="allow")
    fun = lambda frozen, x: run(frozen, jlora.Trainable(), x)  # noqa: E731
    same_over_codes(fun, jlora.quantize(params, kind="int8"), x)
    with pytest.raises(jlora.MergeError, match=r"`mul` at .* needs the whole array"):
        jlora.apply_lora(fn, on_merge="error")(
            jlora.quantize(params), jlora.Trainable(), x
        )


def test_a_complex_multiple_keeps_its_imaginary_part():
    def fn(p, x):
        return jnp.abs(x.astype("complex64") @ (p["w"].astype("complex64") * factor))

    factor = jnp.asarray(1 + 2j, "complex64")
    run = jlora.apply_lora(fn, on_merge="allow")
    fun = lambda frozen, x: run(frozen, jlora.Trainable(), x)  # noqa: E731
    same_over_codes(fun, jlora.quantize(normal(ONE)), normal((T, N), 4))


def test_a_quantised_scale_of_a_quantised_weight_is_told():
    params = normal({"w": (N, N), "g": (N, 1)})
    run = jlora.apply_lora(lambda p, x: x @ (p["w"] * p["g"]), on_merge="error")
    with pytest.raises(jlora.MergeError, match=r"w: `mul`.*\n  g: `mul`"):
        run(jlora.quantize(params), jlora.Trainable(), normal((T, N)))


@pytest.mark.once
@pytest.mark.parametrize("n", [10, 7])  # with a block that is shorter than the others
@pytest.mark.parametrize("kind", KINDS)
def test_lookups_read_rows_that_share_scales_and_bytes(kind, n):
    outside = jnp.array([n + 5, -n - 3, 1])
    lookups = {
        "index": lambda w: w[jnp.array([[0, 3, n - 1], [2, -1, n]])],
        "take": lambda w: jnp.take(w, outside, axis=0),
        "clamped": lambda w: jnp.take(w, outside, axis=0, mode="clip"),
        "filled": lambda w: w.at[outside].get(mode="fill", fill_value=0),
        "one": lambda w: w[jnp.int32(3)],
        "dynamic": lambda w: lax.dynamic_index_in_dim(w, n + 3),
        "large": lambda w: lax.gather(
            w,
            jnp.array([[2**32 - 1], [3]], "uint32"),
            lax.GatherDimensionNumbers((1,), (0,), (0,)),
            (1, 6),
            mode="clip",
        ),
        "mapped": lambda w: jax.vmap(lambda i: w[i])(jnp.arange(n)),
    }

    def fn(p):
        return {name: look(p["w"]) for name, look in lookups.items()}

    run = jlora.apply_lora(fn, on_merge="error")
    codes = jlora.quantize(normal({"w": (n, 6)}), kind=kind, block=4, double=n == 7)
    found, expected = jax.jit(lambda q: (run(q, jlora.Trainable()), fn(widened(q))))(
        codes
    )
    close(found, expected, 1e-6)
    one = jlora.apply_lora(lambda p: lookups["take"](p["w"]))
    jaxpr = jax.make_jaxpr(lambda q: one(q, jlora.Trainable()))(codes)
    shapes = [v.aval.shape for eqn in jaxpr.jaxpr.eqns for v in eqn.outvars]
    assert (n, 6) not in shapes


def test_a_small_integer_finds_a_row_of_a_long_table():
    codes = jlora.quantize(normal({"w": (300, 6)}), block=4)
    start = (jnp.uint8(250), jnp.uint8(0))
    run = jlora.apply_lora(lambda p: lax.dynamic_slice(p["w"], start, (1, 6)))
    close(run(codes, jlora.Trainable()), codes["w"].dense()[250:251])


@pytest.mark.once
@hypothesis.settings(max_examples=8)
@hypothesis.given(
    st.lists(st.integers(1, 7), min_size=2, max_size=3),
    st.integers(2, 9),
    st.sampled_from(KINDS),
    st.booleans(),
    st.booleans(),
)
def test_any_sizes_and_blocks(shape, block, kind, double, transposed):
    w, rng = normal(tuple(shape)), np.random.default_rng(0)
    codes = jlora.quantize({"w": w}, kind=kind, block=block, double=double)
    assert codes["w"].shape == w.shape
    width = shape[0 if not transposed else -1]
    x = jnp.asarray(rng.normal(size=(2, width)), "float32")

    def fn(p, x):
        return jnp.tensordot(x, p["w"].T if transposed else p["w"], 1)

    run = jlora.apply_lora(fn, on_merge="error")
    close(run(codes, jlora.Trainable(), x), fn(widened(codes), x))
