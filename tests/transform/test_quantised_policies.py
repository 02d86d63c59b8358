"""Policies of `jax.checkpoint` decide about products with codes as about dense ones.

A step widens a weight as often as the frozen dense model's step takes a product with
it, and keeps no widened weight between the passes.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

import jlora
from tests.transform.quantised_helpers import KINDS, widened
from tests.transform.test_policies import (
    PLACES,
    POLICIES,
    ROWS,
    N,
    adapt,
    cost,
)


def coded(fn, kind="nf4"):
    frozen, trainable, x = adapt(fn)
    return jlora.quantize(frozen, kind=kind, block=4), trainable, x


def widenings(jaxpr, times=1):
    """How often a jaxpr widens a weight."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner = times * eqn.params["length"] if name == "scan" else times
        total += times * (name == "quantised_linear")
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                total += widenings(getattr(value, "jaxpr", value), inner)
    return total


def gradient(run):
    def pulled(*args):
        out, pull = jax.vjp(run, *args)
        return pull(jnp.ones_like(out))

    return pulled


@pytest.mark.once
@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_widens_and_keeps_what_the_policy_says(policy, place):
    fn, wrap = place(POLICIES[policy])
    frozen, trainable, x = coded(fn, KINDS[len(policy) % 3])
    floor = wrap(lambda frozen, _, x: fn(frozen, x))
    dense = widened(frozen)
    floor_products, _ = cost(lambda x: floor(dense, trainable, x), x)
    _, floor_kept = cost(lambda p, x: floor(p, trainable, x), dense, x)
    run = functools.partial(wrap(jlora.apply_lora(fn)), frozen)
    assert widenings(jax.make_jaxpr(gradient(run))(trainable, x)) == floor_products
    kept = jax.eval_shape(lambda *a: jax.vjp(run, *a)[1], trainable, x)
    kept = [a for a in jax.tree.leaves(kept) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert sum(math.prod(a.shape) // (ROWS * N) for a in kept) == floor_kept
    assert not any(a.shape[-2:] == (N, N) for a in kept)
