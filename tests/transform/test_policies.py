"""Policies of `jax.checkpoint` decide about adapted products as about the frozen ones.

So a step costs as many products of the model's size as a step of the frozen model. It
keeps as many arrays of an activation's size as full fine-tuning, which needs the same.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jlora
from tests.helpers import close, normal
from tests.transform.quantised_helpers import KINDS

ROWS, N, LAYERS = 40, 7, 3  # many rows: a temporary weight pays on every platform
cp = jax.checkpoint_policies
POLICIES = {
    "none": None,
    "nothing": cp.nothing_saveable,
    "everything": cp.everything_saveable,
    "dots": cp.dots_saveable,
    "dots without batch": cp.dots_with_no_batch_dims_saveable,
    "names": cp.save_only_these_names("act"),
    "other names": cp.save_any_names_but_these("act"),
    "all but names": cp.save_anything_except_these_names("act"),
    "dots or names": cp.save_from_both_policies(
        cp.dots_saveable, cp.save_only_these_names("act")
    ),
    "offloaded dots": cp.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "offloaded names": cp.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["act"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "own": lambda prim, *_, **params: (
        prim.name == "dot_general" and params["dimension_numbers"][0] == ((1,), (0,))
    ),
}


def layer(x, p):
    h = checkpoint_name(jnp.sin(x @ p["w"]), "act")
    return jnp.sin(h @ p["v"])


def first_layer(p, x):
    return layer(x, jax.tree.map(lambda w: w[0], p))


def inside(policy):
    """The user's function has the checkpoint in it."""
    fn = jax.checkpoint(first_layer, policy=policy)
    return fn, lambda lora_fn: lora_fn


def in_scan(policy):
    def fn(p, x):
        one = jax.checkpoint(layer, policy=policy)
        return lax.scan(lambda h, w: (one(h, w), None), x, p)[0]

    return fn, lambda lora_fn: lora_fn


def in_jit(policy):
    one = jax.checkpoint(jax.jit(first_layer), policy=policy)
    return jax.jit(one), lambda lora_fn: lora_fn


def around(policy):
    """The checkpoint is around the adapted function."""
    return first_layer, lambda lora_fn: jax.checkpoint(lora_fn, policy=policy)


def scan_around(policy):
    """The whole scan is in one checkpoint."""

    def fn(p, x):
        return lax.scan(lambda h, w: (layer(h, w), None), x, p)[0]

    return fn, lambda lora_fn: jax.checkpoint(lora_fn, policy=policy)


PLACES = [inside, in_scan, in_jit, around, scan_around]


def adapt(fn, method="lora"):
    params = normal({"w": (LAYERS, N, N), "v": (LAYERS, N, N)}, 3)
    x = normal((ROWS, N), 4)
    config = jlora.LoraConfig(rank=2, targets=("w", "v"), method=method)
    plan = jlora.plan(fn, params, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = jax.tree.map(lambda a: normal(a.shape, a.size) / 3, trainable)
    return frozen, trainable, x


def products(jaxpr, times=1):
    """How many products of the model's size a jaxpr computes."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner = times * eqn.params["length"] if name == "scan" else times
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                total += products(getattr(value, "jaxpr", value), inner)
        total += times * (name == "quantised_linear")
        sizes = [v.aval.size for v in (*eqn.invars[:2], *eqn.outvars)]
        cost = math.isqrt(math.prod(sizes)) if name.endswith(("general", "dot")) else 0
        total += times * (cost == ROWS * N * N)
    return total


def cost(run, *args):
    """Products of a gradient, and arrays of an activation's size that it keeps."""

    def gradient(*args):
        out, pull = jax.vjp(run, *args)
        return pull(jnp.ones_like(out))

    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(run, *a)[1], *args))
    wide = sum(math.prod(a.shape) // (ROWS * N) for a in kept)
    return products(jax.make_jaxpr(gradient)(*args).jaxpr), wide


@pytest.mark.once
@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_computes_and_keeps_what_the_frozen_models_does(policy, place):
    fn, wrap = place(POLICIES[policy])
    frozen, trainable, x = adapt(fn)
    floor = wrap(lambda frozen, _, x: fn(frozen, x))
    floor_products, _ = cost(lambda x: floor(frozen, trainable, x), x)
    # The gradient of A takes the input of each layer, as that of a full weight does.
    _, floor_kept = cost(lambda p, x: floor(p, trainable, x), frozen, x)
    for form in ("auto", "factored"):
        run = wrap(jlora.apply_lora(fn, form=form))
        found, kept = cost(functools.partial(run, frozen), trainable, x)
        assert found == floor_products, form
        assert kept == floor_kept, form


@pytest.mark.once
@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_over_codes_widens_as_often_and_keeps_as_much(policy, place):
    fn, wrap = place(POLICIES[policy])
    frozen, trainable, x = adapt(fn)
    codes = jlora.quantize(frozen, kind=KINDS[len(policy) % 3], block=4)
    floor = wrap(lambda frozen, _, x: fn(frozen, x))
    floor_products, _ = cost(lambda x: floor(frozen, trainable, x), x)
    _, floor_kept = cost(lambda p, x: floor(p, trainable, x), frozen, x)
    run = functools.partial(wrap(jlora.apply_lora(fn)), codes)
    assert cost(run, trainable, x) == (floor_products, floor_kept)
    kept = jax.eval_shape(lambda *a: jax.vjp(run, *a)[1], trainable, x)
    kept = [a for a in jax.tree.leaves(kept) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert not any(a.shape[-2:] == (N, N) for a in kept)  # nothing widened


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_gain_and_a_shared_product_follow_the_policy(method):
    def fn(p, x):
        def layer(h, w):
            return jnp.sin(h @ w["w"]) * jnp.cos(h @ w["v"]), None

        one = jax.checkpoint(layer, policy=cp.dots_saveable)
        return lax.scan(one, x, p)[0]

    frozen, trainable, x = adapt(fn, method)
    run = jlora.apply_lora(fn)
    floor, _ = cost(lambda x: fn(frozen, x), x)
    found, _ = cost(lambda t, x: run(frozen, t, x), trainable, x)
    assert found == floor


@pytest.mark.once
@pytest.mark.parametrize("place", [in_scan, around], ids=lambda f: f.__name__)
@pytest.mark.parametrize("policy", ["dots", "names", "offloaded dots", "own"])
def test_values_and_gradients_do_not_depend_on_the_policy(policy, place):
    fn, wrap = place(POLICIES[policy])
    plain, _ = place(None)
    frozen, trainable, x = adapt(fn)
    run = wrap(jlora.apply_lora(fn))

    def loss(run, trainable, x):
        return jnp.sum(jnp.sin(run(frozen, trainable, x)))

    def gradient(run):
        return jax.value_and_grad(lambda t, x: loss(run, t, x), (0, 1))

    expected = gradient(lambda f, t, x: plain(jlora.merge(f, t), x))
    close(jax.jit(gradient(run))(trainable, x), expected(trainable, x), 1e-4, 1e-5)
    if policy != "offloaded dots":  # JAX maps no copies between memories
        xs = jnp.stack([x, 2 * x])
        mapped = jax.vmap(gradient(run), (None, 0))
        close(mapped(trainable, xs)[0][0], expected(trainable, x)[0], 1e-4, 1e-5)


def test_a_named_embedding_is_kept_with_its_low_rank_term():
    table, ids = {"table": normal((5, N), 2)}, jnp.arange(ROWS) % 5
    policy = cp.save_only_these_names("rows")

    @functools.partial(jax.checkpoint, policy=policy)
    def fn(p, ids):
        return jnp.sin(jnp.sin(checkpoint_name(p["table"][ids], "rows")))

    plan = jlora.plan(fn, table, ids, config=jlora.LoraConfig(rank=2, targets="table"))
    frozen, trainable = jlora.split(jax.random.key(0), table, plan)
    run = jlora.apply_lora(fn)

    def gradient(t):
        out, pull = jax.vjp(lambda t: run(frozen, t, ids), t)
        return pull(jnp.ones_like(out))

    jaxpr = jax.make_jaxpr(gradient)(trainable)
    (again,) = [e for e in jaxpr.eqns if e.primitive.name == "remat2"]
    shapes = [
        eqn.outvars[0].aval.shape
        for eqn in again.params["jaxpr"].eqns
        if eqn.primitive.name == "add"
    ]
    assert (ROWS, N) not in shapes
