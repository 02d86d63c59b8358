"""Which uses of a weight are factored, and how exact is each beside the merged one?"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora._tables import table
from tests.transform.cases import ADAPTABLE, Case, build


def errors(case: Case) -> tuple[str, float, float]:
    """Returns the route, and the largest relative error in value and in gradient."""
    fn, _, x, plan, frozen, trainable = build(case)
    lora_fn = jlora.apply_lora(fn, on_merge="allow")

    def loss(out: object) -> jax.Array:
        floats = [o for o in jax.tree.leaves(out) if o.dtype == jnp.float32]
        return sum((jnp.sum(jnp.cos(o)) for o in floats), jnp.float32(0))

    def relative(a: object, b: object) -> float:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return max(
            float(np.abs(p - q).max() / max(np.abs(q).max(), 1e-9)) for p, q in pairs
        )

    def both(run: object) -> tuple[jax.Array, jax.Array | None]:
        value = jax.jit(run)(trainable, x)
        if not case.has_gradient:
            return value, value
        return value, jax.jit(jax.grad(lambda t: loss(run(t, x))))(trainable)

    value, gradient = both(lambda t, x: lora_fn(frozen, t, x))
    value0, gradient0 = both(lambda t, x: fn(jlora.merge(frozen, t), x))
    (row,) = [row for row in plan.rows() if row.path == "w"]
    return row.route, relative(value, value0), relative(gradient, gradient0)


def main() -> None:
    """Prints one line a case of the test table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    options = parser.parse_args()
    lines = []
    for case in ADAPTABLE:
        if options.only in case.name:
            route, value, gradient = errors(case)
            lines.append((case.name, route, f"{value:.0e}", f"{gradient:.0e}"))
    print(f"JAX {jax.__version__}: largest error relative to the merged weight's")
    head = ("case", "route", "value", "gradient of A and B")
    print(table(head, lines, right=head[2:]))


if __name__ == "__main__":
    main()
