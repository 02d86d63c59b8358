"""What the tests of quantised weights in the transform share."""

import re
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from tests.helpers import close, random_like

KINDS = ("nf4", "int8", "int4")


def is_quantized(x: Any) -> bool:
    return isinstance(x, jlora.Quantized)


def widened(tree: Any) -> Any:
    """Returns `tree` with the dense arrays that its quantised leaves stand for."""
    return jax.tree.map(
        lambda x: x.dense() if is_quantized(x) else x, tree, is_leaf=is_quantized
    )


def adapted(
    fn: Any, params: Any, x: Any, *, planned: bool = True, method="lora", **options: Any
) -> tuple[Any, jlora.Trainable]:
    """Returns weights as codes and a random adapter of them.

    Blocks lie along the fan-in, or without `planned` along the last axis but one.
    """
    config = jlora.LoraConfig(rank=2, alpha=3, targets="*", method=method)
    plan = jlora.plan(fn, params, x, config=config)
    options = {"kind": "nf4", "block": 4} | options
    own = {"plan": plan, "targets": "*"} if planned else {}
    codes = jlora.quantize(params, **own, **options)
    frozen, trainable = jlora.split(jax.random.key(0), codes, plan)
    return frozen, random_like(trainable, scale=0.5)


def floats(out: Any) -> jax.Array:
    """Returns one number that depends on all float arrays of `out`."""
    leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum(jnp.sum(jnp.cos(jnp.real(x).astype(jnp.float32))) for x in leaves)


def gradients(lora_fn: Any, **options: Any) -> Any:
    """Returns `(frozen, trainable, x) -> (gradients of A, B and x, value)`."""

    def loss(trainable, x, frozen):
        out = lora_fn(frozen, trainable, x, **options)
        return floats(out), out

    run = jax.grad(loss, (0, 1), has_aux=True)
    return lambda frozen, trainable, x: run(trainable, x, frozen)


def same_over_codes(run: Any, frozen: Any, *args: Any, tolerance=1e-5) -> Any:
    """Asserts that `run(frozen, *args)` equals that of the dense weights.

    Returns the jaxpr of the first. Both are one program, so that it compiles once.
    """
    jaxpr = jax.make_jaxpr(run)(frozen, *args)

    @jax.jit
    def both(frozen, dense, *args):
        return run(frozen, *args), run(dense, *args)

    close(*both(frozen, widened(frozen), *args), tolerance, largest=tolerance)
    return jaxpr


def equations(jaxpr: Any, name: str) -> list[Any]:
    """Returns the equations of a primitive in a jaxpr, also in inner ones."""
    found = []
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        found += [eqn] if eqn.primitive.name == name else []
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += equations(inner, name)
    return found


def products(jaxpr: Any) -> int:
    """Returns how many products with codes a jaxpr has, forward and backward."""
    return len(equations(jaxpr, "quantised_linear"))


def carried(hlo: str) -> set[tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of each array in the carry of a while loop."""
    found = set()
    for line in hlo.splitlines():
        carry = re.match(r"\s*(?:ROOT )?%?\S+ = (.*?) while\(", line)
        if carry:
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", carry[1]):
                found.add((dtype, tuple(int(n) for n in shape.split(",") if n)))
    return found
