"""What the tests of quantised weights in the transform share."""

import re
from typing import Any

import jax
import jax.numpy as jnp

import jlora

KINDS = ("nf4", "int8", "int4")


def is_quantized(x: Any) -> bool:
    return isinstance(x, jlora.Quantized)


def widened(tree: Any) -> Any:
    """Returns `tree` with the dense arrays that its quantised leaves stand for."""
    return jax.tree.map(
        lambda x: x.dense() if is_quantized(x) else x, tree, is_leaf=is_quantized
    )


def floats(out: Any) -> jax.Array:
    """Returns one number that depends on all float arrays of `out`."""
    leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum(jnp.sum(jnp.cos(jnp.real(x).astype(jnp.float32))) for x in leaves)


def equations(jaxpr: Any, name: str) -> list[Any]:
    """Returns the equations of a primitive in a jaxpr, also in inner ones."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    found = []
    for eqn in jaxpr.eqns:
        found += [eqn] if eqn.primitive.name == name else []
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += equations(inner, name)
    return found


def products(fun: Any, *args: Any) -> int:
    """Returns how many products with codes `fun` makes, forward and backward."""
    return len(equations(jax.make_jaxpr(fun)(*args), "quantised_linear"))


def carried(hlo: str) -> set[tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of each array in the carry of a while loop."""
    found = set()
    for line in hlo.splitlines():
        carry = re.match(r"\s*(?:ROOT )?%?\S+ = (.*?) while\(", line)
        if carry:
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", carry[1]):
                found.add((dtype, tuple(int(n) for n in shape.split(",") if n)))
    return found
