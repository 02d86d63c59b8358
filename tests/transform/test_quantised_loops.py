"""No loop carries a widened or unpacked weight: read in the optimised HLO of the CPU.

XLA moves what a loop computes from constants before the loop. There it would widen all
layers at once, or a weight that every step uses, and keep them all through the loop.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jlora
from tests.helpers import normal
from tests.transform.quantised_helpers import KINDS, carried

L, N, T = 3, 64, 5
STORED = {"nf4": set(), "int4": set(), "int8": {"s8"}}  # codes of four bits are half


def model(p, x):
    """A scan over layers, and layers by index, with one weight that each step uses."""

    def step(h, w):
        return jnp.tanh(h @ w) @ p["v"], None

    def by_index(i, h):
        return jnp.tanh(h @ p["w"][i])

    h = lax.scan(jax.checkpoint(step), x, p["w"])[0]
    h = lax.scan(step, h, p["w"])[0]
    return lax.fori_loop(0, L, by_index, h)


def sharded(p, x):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def steps(p, x):
        return lax.scan(lambda h, _: (jnp.tanh(h @ p["v"]), None), x, None, length=L)[0]

    return jax.shard_map(
        steps, mesh=mesh, in_specs=(jax.P(), jax.P("d")), out_specs=jax.P("d")
    )(p, x)


def wide_carries(kind, model=model, rows=T, **options):
    params = normal({"w": (L, N, N), "v": (N, N)}, dtype="bfloat16")
    codes = jlora.quantize(params, kind=kind, block=16, **options)
    run = jlora.apply_lora(model)

    def steps(codes, x):
        """The whole model is in a loop, as where gradients are accumulated."""

        def gradient(x):
            return jax.grad(lambda x: jnp.sum(run(codes, jlora.Trainable(), x)))(x)

        return lax.scan(lambda x, _: (gradient(x), None), x, None, length=2)[0]

    x = normal((rows, N), 1, "bfloat16")
    hlo = jax.jit(steps).lower(codes, x).compile().as_text()
    found = carried(hlo)
    assert any(shape[:1] == (L,) for _, shape in found)  # the carries are read
    return {(dtype, shape) for dtype, shape in found if math.prod(shape) >= N * N}


@pytest.mark.parametrize("kind", KINDS)
def test_no_loop_carries_a_widened_weight(kind):
    stacks = wide_carries(kind)
    packed = {("u8", (L, N // 2, N)), ("u8", (L, 1, N // 2, N))}
    wide = {(dtype, shape) for dtype, shape in stacks if dtype not in STORED[kind]}
    assert wide <= packed


@pytest.mark.once
def test_no_loop_inside_shards_carries_a_widened_weight():
    assert {dtype for dtype, _ in wide_carries("int8", sharded, 8)} == {"s8"}


def test_a_loop_that_carries_unpacked_codes_is_found():
    # XLA's CPU compiler does so with its own type of four bits.
    assert ("u8", (L, N, N)) in wide_carries("int4", storage="native")
