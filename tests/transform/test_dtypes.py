"""Activations and weights of different dtypes: the numbers of the merged weight.

Complex activations, integers, and floats wider or narrower than the weight's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from tests.helpers import close, normal

WIC = ("NWC", "WIO", "NWC")


def complexes(shape, seed=1):
    return lax.complex(normal(shape, seed), normal(shape, seed + 1))


def dot(x, w, dtype=None):
    """A product of operands of any dtypes; promotion is strict in these tests."""
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x, w, numbers, preferred_element_type=dtype)


def layers(w, x):
    def layer(h, w):
        return dot(h, w) * lax.complex(0.5, 0.5), jnp.sum(h)

    return lax.scan(layer, x, w)[0]


def spectrum(w, x):
    """A layer between two Fourier transforms."""
    return jnp.fft.irfft(dot(jnp.fft.rfft(x, axis=1), w), axis=1)


def phases(n):
    return jnp.exp(lax.complex(jnp.zeros(n), jnp.arange(float(n))))


ROWS = complexes((3, 4))
IDS = jnp.array([0, 2, 1])
CASES = {
    "product": (dot, (4, 6), ROWS),
    "weight first": (lambda w, x: dot(w.T, x.T), (4, 6), ROWS),
    "two free axes": (dot, (4, 2, 3), ROWS),
    "batch": (
        lambda w, x: lax.dot_general(x, w, (((2,), (1,)), ((0,), (0,)))),
        (2, 4, 5),
        complexes((2, 3, 4)),
    ),
    "vector": (dot, (4, 6), complexes((4,))),
    "many rows": (dot, (4, 6), complexes((40, 4))),
    "cast": (lambda w, x: dot(x, w.astype(x.dtype)), (4, 6), ROWS),
    "cast, many rows": (
        lambda w, x: dot(x, w.astype(x.dtype)),
        (4, 6),
        complexes((40, 4)),
    ),
    "cast, real rows": (
        lambda w, x: dot(x, w.astype("complex64")),
        (4, 6),
        normal((3, 4)),
    ),
    "turned": (
        lambda w, x: dot(x, w.astype(x.dtype) * lax.complex(1.0, 2.0)),
        (4, 6),
        ROWS,
    ),
    "columns turned": (
        lambda w, x: dot(x, w.astype(x.dtype) * phases(6)[None]),
        (4, 6),
        ROWS,
    ),
    "rows turned": (
        lambda w, x: dot(x, w.astype(x.dtype) / phases(4)[:, None]),
        (4, 6),
        ROWS,
    ),
    "real result": (lambda w, x: dot(x, w, "float32"), (4, 6), ROWS),
    "complex result": (lambda w, x: dot(x, w, "complex64"), (4, 6), normal((3, 4))),
    "scan": (layers, (3, 4, 4), ROWS),
    "jit, remat": (
        lambda w, x: jax.jit(jax.checkpoint(lambda w, x: dot(dot(x, w), w)))(w, x),
        (4, 4),
        ROWS,
    ),
    "cond": (
        lambda w, x: lax.cond(x[0, 0].real > -9, dot, lambda x, w: x, x, w),
        (4, 4),
        ROWS,
    ),
    "vmap": (
        lambda w, x: jax.vmap(lambda x: jnp.abs(dot(x, w)))(x),
        (4, 6),
        complexes((2, 3, 4)),
    ),
    "embedding": (lambda w, x: w[IDS].astype(x.dtype) * x, (4, 6), complexes((3, 6))),
    "embedding cast": (
        lambda w, x: w.astype(x.dtype)[IDS] * x,
        (4, 6),
        complexes((3, 6)),
    ),
    "ragged": (lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 1])), (2, 4, 6), ROWS),
    "ragged cast": (
        lambda w, x: lax.ragged_dot(x, w.astype(x.dtype), jnp.array([2, 1])),
        (2, 4, 6),
        ROWS,
    ),
    "ragged integers": (
        lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 1])),
        (2, 4, 6),
        jnp.arange(12).reshape(3, 4) - 5,
    ),
    "conv": (
        lambda w, x: lax.conv_general_dilated(
            x, w.astype(x.dtype), (1,), "SAME", dimension_numbers=WIC
        ),
        (3, 4, 6),
        complexes((2, 5, 4)),
    ),
    "conv, channels first": (
        lambda w, x: lax.conv_general_dilated(x, w.astype(x.dtype), (1,), "SAME"),
        (6, 4, 3),
        complexes((2, 4, 5)),
    ),
    "fft": (spectrum, (4, 6), normal((2, 8, 4))),
    "integers": (
        lambda w, x: dot(x, w, "float32"),
        (4, 6),
        jnp.arange(12).reshape(3, 4) - 5,
    ),
    "booleans": (lambda w, x: dot(x, w, "float32"), (4, 6), normal((3, 4)) > 0),
    "narrow rows": (dot, (4, 6), normal((3, 4), dtype="bfloat16")),
    "narrow rows, ragged": (
        lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 1])),
        (2, 4, 6),
        normal((3, 4), dtype="bfloat16"),
    ),
    "8-bit rows": (
        lambda w, x: dot(x, w, "float32"),
        (4, 6),
        normal((3, 4), dtype="float8_e4m3fn"),
    ),
}


def adapted(use, shape, x, method="lora", dropout=0.0, dtype="float32"):
    """`(factored, merged, trainable)`, both functions of `(trainable, x)`."""
    params = {"w": normal(shape, 5, dtype)}

    def fn(p, x):
        return use(p["w"], x)

    if use is dot:
        fn = lambda p, x: dot(x, p["w"])  # noqa: E731
    config = jlora.LoraConfig(
        rank=2, alpha=3, targets="w", method=method, dropout=dropout
    )
    plan = jlora.plan(fn, params, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = jax.tree.map(lambda a: normal(a.shape, a.size) / 2, trainable)
    run = jlora.apply_lora(fn, on_merge="error")
    factored = functools.partial(run, frozen)

    def merged(trainable, x):
        return fn(jlora.merge(frozen, trainable), x)

    return factored, merged, trainable


ALSO_DORA = ["product", "cast", "columns turned", "integers", "ragged cast", "conv"]


@pytest.mark.filterwarnings("ignore:Casting complex")  # by JAX's own ragged product
@pytest.mark.parametrize(
    ("case", "method"),
    [*((case, "lora") for case in CASES), *((case, "dora") for case in ALSO_DORA)],
)
def test_value_and_gradients_are_those_of_the_merged_weight(case, method):
    """The cotangents are complex; the gradient of a real factor is the real part."""
    use, shape, x = CASES[case]
    factored, merged, trainable = adapted(use, shape, x, method)

    def everything(fn):
        y = fn(trainable, x)
        dy = complexes(y.shape, 9) if jnp.iscomplexobj(y) else normal(y.shape, 9)
        _, pull_t = jax.vjp(lambda t: fn(t, x), trainable)
        results = [y, pull_t(dy)]
        if jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize >= 4:
            results += jax.vjp(lambda x: fn(trainable, x), x)[1](dy)
        return results

    both = jax.jit(lambda: (everything(factored), everything(merged)))
    close(*both(), 1e-5, 1e-5)


def test_second_derivatives_of_a_complex_product():
    factored, merged, trainable = adapted(dot, (4, 6), ROWS)

    def product(fn):
        def loss(t, x):
            return jnp.sum(jnp.square(jnp.abs(jnp.sin(fn(t, x)))))

        grad = jax.grad(loss, argnums=(0, 1))
        return jax.jvp(grad, (trainable, ROWS), (trainable, ROWS))

    close(product(factored), product(merged), 1e-4, 1e-4)


def test_weights_that_meet_one_complex_activation():
    params = normal({"q": (40, 5), "k": (40, 5)})
    x = complexes((30, 40))

    def fn(p, x):
        return dot(x, p["q"]) * dot(x, p["k"])

    plan = jlora.plan(fn, params, x, config=jlora.LoraConfig(rank=2))
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = jax.tree.map(lambda a: normal(a.shape, a.size) / 9, trainable)
    out = jlora.apply_lora(fn)(frozen, trainable, x)
    close(out, fn(jlora.merge(frozen, trainable), x), 1e-4, largest=1e-5)


@pytest.mark.parametrize("x", [ROWS, normal((3, 4))], ids=["complex", "real"])
@pytest.mark.parametrize("adapted_leaves", ["*", "real", "imag"])
def test_a_weight_of_a_real_and_an_imaginary_leaf(adapted_leaves, x):
    params = normal({"real": (4, 6), "imag": (4, 6)})

    def fn(p, x):
        return dot(x, lax.complex(p["real"], p["imag"]))

    config = jlora.LoraConfig(rank=2, alpha=3, targets=adapted_leaves)
    plan = jlora.plan(fn, params, x, config=config)
    assert "merged on the fly" not in str(plan)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = jax.tree.map(lambda a: normal(a.shape, a.size) / 2, trainable)
    run = jlora.apply_lora(fn, on_merge="error")

    def everything(fn):
        y, pull = jax.vjp(fn, trainable, x)
        return y, pull(complexes(y.shape, 9))

    close(
        everything(lambda t, x: run(frozen, t, x)),
        everything(lambda t, x: fn(jlora.merge(frozen, t), x)),
        1e-5,
    )


def test_a_real_part_of_a_weight_is_merged():
    x = normal((3, 4))
    params = {"w": normal((4, 6))}

    def fn(p, x):
        w = p["w"].astype("complex64") * lax.complex(1.0, 2.0)
        return dot(x, jnp.imag(w * w))

    config = jlora.LoraConfig(rank=2, targets="w")
    plan = jlora.plan(fn, params, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = jax.tree.map(jnp.ones_like, trainable)
    out = jlora.apply_lora(fn, on_merge="allow")(frozen, trainable, x)
    close(out, fn(jlora.merge(frozen, trainable), x), 1e-4)


@pytest.mark.parametrize("case", ["integers", "ragged integers", "product"])
def test_dropout_drops_entries_of_any_dtype(case):
    """The mean over keys is the value without dropout."""
    use, shape, x = CASES[case]
    factored, merged, trainable = adapted(use, shape, x, dropout=0.5)
    keys = jax.random.split(jax.random.key(1), 4096)
    out = lax.map(lambda key: factored(trainable, x, lora_key=key), keys)
    expected = np.asarray(merged(trainable, x))
    assert out.dtype == expected.dtype
    error = np.abs(np.asarray(out).mean(0) - expected)
    assert (error < 6 * np.asarray(out).std(0) / 64 + 1e-4).all()


def test_a_product_rounded_to_integers_is_merged():
    x, params = 9 * normal((3, 4)), {"w": normal((4, 6))}

    def fn(p, x):
        return dot(x, p["w"], "int32")

    config = jlora.LoraConfig(rank=2, targets="w")
    plan = jlora.plan(fn, params, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = jax.tree.map(jnp.ones_like, trainable)
    with pytest.warns(jlora.MergeWarning, match="dot_general"):
        out = jlora.apply_lora(fn)(frozen, trainable, x)
    close(out, fn(jlora.merge(frozen, trainable), x))
