"""Random products and convolutions, and random steps before them: adapted = merged.

In value and in the gradients of A, B and the activation, under `jit`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, reject, settings, strategies as st
from jax import lax

import jlora
from tests.helpers import normal
from tests.transform.quantised_helpers import KINDS, same_over_codes

SIZES = st.lists(st.integers(1, 3), max_size=2)


def check(fn, shape, x_shape, *, on_merge, rank=1):
    """Compares the adapted function with the function of merged weights."""
    params, x = {"w": normal(shape, 0)}, normal(x_shape, 1)
    config = jlora.LoraConfig(rank=rank, alpha=2, targets="w")
    plan = jlora.plan(fn, params, x, config=config)
    _, trainable = jax.eval_shape(
        lambda params: jlora.split(jax.random.key(0), params, plan), params
    )
    leaves, treedef = jax.tree.flatten(trainable)
    drawn = [normal(leaf.shape, 2 + i) for i, leaf in enumerate(leaves)]
    trainable = treedef.unflatten(drawn)
    # What the plan says is what happens: merged if and only if it says so.
    (row,) = plan.rows()
    if row.route == "factored":
        on_merge = "error"
    elif on_merge == "allow":
        with pytest.raises(jlora.MergeError):
            jax.eval_shape(jlora.apply_lora(fn, on_merge="error"), params, trainable, x)
    lora_fn = jlora.apply_lora(fn, on_merge=on_merge)

    def with_grads(function):
        def loss(trainable, x):
            out = function(trainable, x)
            # Linear in the result, so that rounding is not made larger.
            return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(trainable, x)

    @jax.jit
    def both(params, trainable, x):
        return (
            with_grads(lambda t, x: lora_fn(params, t, x)),
            with_grads(lambda t, x: fn(jlora.merge(params, t), x)),
        )

    actual, expected = map(jax.tree.leaves, both(params, trainable, x))
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        scale = 1 + np.abs(b).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * scale)
    return plan


@st.composite
def dot_generals(draw):
    """`(weight's shape, x's shape, weight first, dimension numbers)`."""
    summed, batch, free_w, free_x = (draw(SIZES) for _ in range(4))
    size = {"s": summed, "b": batch}

    def operand(free):
        size["f"] = free
        names = [(kind, i) for kind in "sbf" for i in range(len(size[kind]))]
        names = draw(st.permutations(names))
        shape = tuple(size[kind][i] for kind, i in names)
        where = {
            kind: [names.index((kind, i)) for i in range(len(size[kind]))]
            for kind in "sb"
        }
        return shape, where["s"], where["b"]

    w, cw, bw = operand(free_w)
    x, cx, bx = operand(free_x)
    assume(len(w) >= 2 and summed and free_w)  # else it is elementwise
    first = draw(st.booleans())
    numbers = ((cw, cx), (bw, bx)) if first else ((cx, cw), (bx, bw))
    return w, x, first, numbers


@pytest.mark.slow
@given(dot_generals())
def test_any_dot_general_is_factored(drawn):
    w_shape, x_shape, first, numbers = drawn

    def fn(p, x):
        return lax.dot_general(*((p["w"], x) if first else (x, p["w"])), numbers)

    check(fn, w_shape, x_shape, on_merge="error")


@settings(max_examples=10)
@given(st.permutations("abcd"), st.integers(1, 3), st.booleans(), st.data())
def test_any_einsum_of_higher_rank_is_factored(letters, n_in, batched, data):
    """Rank two, so that a transposed or mislabelled rank axis would show."""
    weight = "".join(letters)
    batch = weight[0] if batched and n_in < 3 else ""
    summed = "".join(c for c in weight if c not in batch)[:n_in]
    out = data.draw(st.permutations([c for c in weight + "t" if c not in summed]))
    x = "".join(data.draw(st.permutations([*batch, *summed, "t"])))
    subscripts = f"{x},{weight}->{''.join(out)}"
    size = dict(zip("abcdt", (2, 3, 4, 2, 3), strict=True))

    def fn(p, x):
        return jnp.einsum(subscripts, x, p["w"])

    shapes = (tuple(size[c] for c in weight), tuple(size[c] for c in x))
    check(fn, *shapes, on_merge="error", rank=2)


def factorisations(n):
    return [
        (a, b, n // (a * b))
        for a in range(1, n + 1)
        for b in range(1, n + 1)
        if n % (a * b) == 0
    ]


@st.composite
def steps(draw, shape):
    """A step for an array of `shape`: its name, what it does, the shape after it."""
    ndim = len(shape)
    kinds = ["reshape", "expand", "broadcast", "scale", "scale by data"]
    kinds += ["transpose", "slice", "rev", "index", "take", "barrier"] if ndim else []
    kinds += ["remat", "scale rows", "split", "dynamic slice"] if ndim else []
    kinds += ["modulate", "modulate for each example", "add data"]
    kind = draw(st.sampled_from(kinds))
    axis = draw(st.integers(0, max(ndim - 1, 0)))
    n = shape[axis] if ndim else 1
    at = draw(st.integers(0, n - 1))
    if kind == "transpose":
        order = draw(st.permutations(range(ndim)))
        return kind, lambda w, x: w.transpose(order)
    if kind == "reshape":
        new = draw(st.sampled_from(factorisations(math.prod(shape))))
        return f"{kind} {new}", lambda w, x: w.reshape(new)
    if kind == "expand":
        return kind, lambda w, x: jnp.expand_dims(w, axis)
    if kind == "broadcast":
        return kind, lambda w, x: jnp.broadcast_to(w[None], (2, *w.shape))
    if kind == "scale":
        return kind, lambda w, x: -w * 0.5
    if kind == "scale by data":
        return kind, lambda w, x: w / (2 + jnp.sin(x.ravel()[0]))
    if kind == "scale rows":
        along = [n if i == axis else 1 for i in range(ndim)]
        return kind, lambda w, x: w / jnp.arange(1.0, n + 1).reshape(along)
    if kind in ("modulate", "add data", "modulate for each example"):
        lead = (2,) if kind.endswith("example") else ()
        varies = draw(st.lists(st.booleans(), min_size=ndim, max_size=ndim))
        along = (*lead, *(n if v else 1 for n, v in zip(shape, varies, strict=True)))
        waves = jnp.cos(jnp.arange(math.prod(along))).reshape(along)
        if kind == "add data":
            return kind, lambda w, x: w + jnp.sin(x.ravel()[0]) * waves
        return (
            kind,
            lambda w, x: (
                jnp.expand_dims(w, range(len(lead)))
                * (2 + jnp.sin(x.ravel()[0]) * waves)
            ),
        )
    if kind == "slice":
        stride = draw(st.integers(1, 2))
        return kind, lambda w, x: lax.slice_in_dim(w, at, n, stride, axis)
    if kind == "dynamic slice":
        return kind, lambda w, x: lax.dynamic_slice_in_dim(
            w, jnp.argmax(x.ravel()) * 0 + at, n - at, axis
        )
    if kind == "rev":
        return kind, lambda w, x: jnp.flip(w, axis)
    if kind == "index":
        return kind, lambda w, x: lax.index_in_dim(w, at, axis, keepdims=False)
    if kind == "take":
        ids = jnp.array([at, 0, n - 1])
        return kind, lambda w, x: jnp.take(w, ids, axis=axis)
    if kind == "split":
        return kind, lambda w, x: jnp.split(w, [at], axis=axis)[1]
    if kind == "barrier":
        return kind, lambda w, x: lax.optimization_barrier(w)
    return kind, lambda w, x: jax.checkpoint(lambda w: w.swapaxes(0, axis))(w)


@st.composite
def chains(draw):
    """`(shape of the weight, names of steps, fn, shape of x)`."""
    shape = draw(
        st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=3).map(tuple)
    )
    now, names, done = shape, [], []
    for _ in range(draw(st.integers(1, 4))):
        name, do = draw(steps(now))
        names.append(name)
        done.append(do)
        probe = jax.ShapeDtypeStruct(now, jnp.float32)
        now = jax.eval_shape(do, probe, jax.ShapeDtypeStruct((2,), jnp.float32)).shape
    assume(0 < math.prod(now) <= 200)
    order = draw(st.permutations(range(len(now))))
    n_summed = draw(st.integers(0, len(now)))
    n_batch = draw(st.integers(0, len(now) - n_summed))
    summed, batch = order[:n_summed], order[n_summed : n_summed + n_batch]
    x_shape = (2, *(now[i] for i in batch), *(now[i] for i in summed))
    numbers = (
        ([1 + n_batch + i for i in range(n_summed)], list(summed)),
        ([1 + i for i in range(n_batch)], list(batch)),
    )
    first = draw(st.booleans())

    def fn(p, x):
        w = p["w"]
        for do in done:
            w = do(w, x)
        if first:
            (cx, cw), (bx, bw) = numbers
            return lax.dot_general(w, x, ((cw, cx), (bw, bx)))
        return lax.dot_general(x, w, numbers)

    return shape, names, fn, x_shape


@pytest.mark.slow
@given(chains())
def test_any_steps_before_a_product(chain):
    shape, _, fn, x_shape = chain
    try:
        check(fn, shape, x_shape, on_merge="allow")
    except jlora.TargetError:  # a vector is left of it, or nothing
        reject()


@pytest.mark.once
@settings(max_examples=8)
@given(chains(), st.sampled_from(KINDS), st.integers(2, 5), st.booleans())
def test_any_steps_before_a_product_over_codes(chain, kind, block, double):
    shape, _, fn, x_shape = chain
    codes = jlora.quantize(
        {"w": normal(shape, 0)}, kind=kind, block=block, double=double
    )
    run = jlora.apply_lora(fn, on_merge="allow")

    def value_and_gradient(codes, x):
        out, pull = jax.vjp(lambda x: run(codes, jlora.Trainable(), x), x)
        return out, pull(jnp.cos(out))

    same_over_codes(value_and_gradient, codes, normal(x_shape, 1))


LAYOUTS = {
    1: [("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW"), ("NCW", "WIO", "NWC")],
    2: [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NHWC", "OIHW", "CHWN")],
    3: [("NDHWC", "DHWIO", "NDHWC"), ("NCDHW", "OIDHW", "NCDHW")],
}


@st.composite
def convolutions(draw):
    """`(shape of w, shape of x, settings)` of one convolution."""
    n = draw(st.sampled_from([1, 1, 2, 2, 3]))
    layout = draw(st.sampled_from(LAYOUTS[n]))
    small = st.integers(1, 2)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    ins, outs = draw(small), draw(small) * groups
    window = [draw(st.integers(1, 3)) for _ in range(n)]
    spatial = [draw(st.integers(5, 6)) for _ in range(n)]
    dilation = [draw(small) for _ in range(n)]
    paddings = [[(draw(st.integers(0, 2)), 1)] * n]
    if dilation == [1] * n:  # JAX reads a string only then
        paddings += ["SAME", "VALID"]
    settings = {
        "window_strides": [draw(small) for _ in range(n)],
        "padding": draw(st.sampled_from(paddings)),
        "lhs_dilation": dilation,
        "rhs_dilation": [draw(small) for _ in range(n)],
        "dimension_numbers": layout,
        "feature_group_count": groups,
    }

    def shape(letters, sizes):
        rest = iter(spatial if letters == layout[0] else window)
        return tuple(sizes[c] if c in sizes else next(rest) for c in letters)

    x_shape = shape(layout[0], {"N": 2, "C": ins * groups})
    w_shape = shape(layout[1], {"I": ins, "O": outs})
    return w_shape, x_shape, settings


@pytest.mark.slow
@given(convolutions())
def test_any_convolution_is_factored(drawn):
    w_shape, x_shape, config = drawn

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], **config)

    (row,) = check(fn, w_shape, x_shape, on_merge="error").rows()
    out_dim = config["dimension_numbers"][1].index("O")
    assert row.spec.axes.fan_out == (out_dim,)


IDS = jnp.array([1, 0, 2])


@pytest.mark.parametrize("subscripts", ["tij,ijk->tk", "tij,ijk->itk", "tij,ijk->ijt"])
@pytest.mark.parametrize("axes", [(0, 0, 1), (1, 1, 0), (0, 1, 0, 1), (1, 0, 0, 0)])
def test_rows_of_rows_of_a_weight(axes, subscripts):
    """Each lookup makes an axis of its own, also where one before it is gone."""

    def fn(p, x):
        w = p["w"]
        for axis in axes:
            w = jnp.take(w, IDS, axis=axis)
        return jnp.einsum(subscripts, x, w)

    check(fn, (4, 3, 2), (2, 3, 3), on_merge="allow")


def test_promises_about_index_pairs_are_not_made_for_single_indices():
    """The pairs (0, 0), (0, 1), (1, 0) are unique and sorted; 0, 0, 1 and 0, 1, 0 are
    not, and a scatter that is promised so may lose sums on an accelerator."""
    rows, columns = jnp.array([0, 0, 1]), jnp.array([0, 1, 0])

    def fn(p, x):
        found = p["w"].at[rows, columns]
        return found.get(unique_indices=True, indices_are_sorted=True) * x

    params, x = {"w": normal((3, 3, 4), 0)}, normal((1, 4), 1)
    axes = jlora.Axes((), (0,), (1, 2))
    config = jlora.LoraConfig(rank=1, targets="w", rules=jlora.Rule("w", axes=axes))
    plan = jlora.plan(fn, params, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    run = jlora.apply_lora(fn)
    jaxpr = jax.make_jaxpr(jax.grad(lambda t: run(frozen, t, x).sum()))(trainable)
    scatters = {
        eqn.outvars[0].aval.shape: eqn.params
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "scatter-add"
    }
    of_a, of_b = scatters[(3, 1)], scatters[(1, 3, 4)]
    assert not of_a["unique_indices"]
    assert not of_b["unique_indices"]
    assert not of_b["indices_are_sorted"]


@settings(max_examples=12)
@given(
    order=st.permutations(range(3)),
    heads=st.sampled_from([(2, 2, 3, 4), (4, 3, 4), (4, 12), (2, 2, 12), (4, 6, 2)]),
    data=st.data(),
)
def test_axes_that_are_only_permuted_split_or_joined_stay_factored(order, heads, data):
    """Reshapes that cut between axes, or divide one, need no merging."""
    shape = (4, 3, 4)
    transposed = [shape[i] for i in order]

    def fn(p, x):
        w = p["w"].transpose(order).transpose(np.argsort(order))
        w = w.reshape(heads)
        n_in = next(i for i in range(len(heads) + 1) if math.prod(heads[:i]) == 4)
        return jnp.tensordot(x, w.reshape(4, *heads[n_in:]), axes=[[1], [0]])

    assert math.prod(transposed) == 48
    plan = check(fn, shape, (3, 4), on_merge="error", rank=2)
    (row,) = plan.rows()
    assert row.route == "factored"
    assert (row.spec.axes.fan_in, row.spec.axes.fan_out) == ((0,), (1, 2))
