"""Statistics of data for initialisations that need them: moments and gradients."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp

from .. import paths
from .._plan.plan import Plan
from .._plan.row import Row
from .._tables import listed
from ..errors import ConfigError, JloraError
from ..factors import Axes, Leaf, PyTree, Trainable
from ..methods.moments import InputMoments, Statistics
from ..transform.inputs import Trace, input_moments
from ..transform.stage import is_array, stage
from .apply import apply_lora
from .tree import check_plan, widened

Sums = TypeVar("Sums")


def activation_statistics(
    fn: Callable[..., PyTree], params: PyTree, plan: Plan, batches: Iterable[PyTree]
) -> Statistics:
    """Returns the moments of the inputs that the weights of `plan` are multiplied by.

    Only leaves whose `init` needs moments, `"eva"` or `"corda"`, have them. Weights
    stacked for `scan` or `vmap`, and experts, have moments for each layer or expert.
    The moments are computed as a derivative of `fn`, which must be differentiable with
    respect to these weights. A weight of fan-in `n` takes `n²` numbers of memory. Each
    batch takes `2 tokens n²` multiply-adds beside the forward pass. Together these cost
    as much as a few forward passes. Quantised leaves stay codes in products, as in
    `apply_lora`.

    Args:
      fn: the function that `plan` was made for.
      params: the parameters, before `split`.
      plan: from `jlora.plan`.
      batches: any iterable. An item that is a tuple is used as `fn(params, *item)`, any
        other as `fn(params, item)`. Batches of one shape are compiled once.

    Raises:
      ConfigError: if no leaf of `plan` needs moments, `batches` is empty, or a use of a
        leaf is not a matrix product over its fan-in that the result depends on
        (ragged products, the inside of `shard_map` or `while_loop`); lists the leaves.
      TreeError: if `params` is not the tree that `plan` was made for.

    Examples:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"w": jnp.ones((3, 4))}
      >>> fn = lambda p, x: x @ p["w"]
      >>> x = jnp.eye(3)
      >>> config = jlora.LoraConfig(rank=2, init="eva")
      >>> plan = jlora.plan(fn, params, x, config=config)
      >>> statistics = jlora.activation_statistics(fn, params, plan, [x, 2 * x])
      >>> statistics.inputs["w"].count, statistics.inputs["w"].first
      (Array(6., dtype=float32), Array([3., 3., 3.], dtype=float32))
    """
    rows = _needing(plan, "inputs", params, "activation_statistics")

    def step(leaves: dict[str, Leaf], args: tuple[PyTree, ...]) -> dict[str, jax.Array]:
        staged = stage(fn, rebuild(leaves), args, {})
        places = dict(zip(names, staged.param_slots, strict=True))
        weights: dict[int, tuple[str, Axes]] = {}
        for row in rows:
            slot = places[row.path]
            assert slot is not None
            assert row.spec is not None
            weights[slot] = row.path, row.spec.axes
        trace = Trace()
        try:
            found = input_moments(staged.code, staged.inputs, weights, trace)
        except JloraError:
            raise
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ConfigError(
                "The moments of activations are computed as a derivative, but this "
                f"function has none: {error} Give a function of the same parameters "
                "that can be differentiated."
            ) from error
        problems = trace.problems()
        if problems:
            raise ConfigError(
                "Not every input of these weights can be seen: "
                + listed(f"{path!r}: {why}" for path, why in problems.items())
                + ". Give them another init with Rule(path, init='kaiming')."
            )
        return found

    names, rebuild, leaves = _arrays(params)
    sums, _ = _summed(step, leaves, batches)
    return Statistics(
        inputs={
            path: InputMoments(x[..., :-1, :-1], x[..., :-1, -1], x[..., -1, -1])
            for path, x in sums.items()
        }
    )


def gradient_statistics(
    loss_fn: Callable[..., jax.Array],
    params: PyTree,
    plan: Plan,
    batches: Iterable[PyTree],
) -> Statistics:
    """Returns the mean gradient of `loss_fn` over `batches`, for `init="lora_ga"`.

    Only leaves whose `init` needs a gradient have one. Each gradient takes as much
    memory as its weight in float32. So does each of these leaves that is quantised: it
    is widened. Other quantised leaves stay codes.

    Args:
      loss_fn: `loss_fn(params, *batch) -> scalar`.
      params: the parameters, before `split`.
      plan: from `jlora.plan`.
      batches: as in `activation_statistics`.

    Raises:
      ConfigError: if no leaf of `plan` needs gradients, or `batches` is empty.
      TreeError: if `params` is not the tree that `plan` was made for.

    Examples:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"w": jnp.ones((4, 4))}
      >>> fn = lambda p, x: x @ p["w"]
      >>> x = jnp.eye(4)
      >>> config = jlora.LoraConfig(rank=2, init="lora_ga")
      >>> plan = jlora.plan(fn, params, x, config=config)
      >>> loss = lambda p, x: fn(p, x).sum()
      >>> statistics = jlora.gradient_statistics(loss, params, plan, [x, x])
      >>> float(statistics.gradients["w"][0, 0])
      1.0
    """
    rows = _needing(plan, "gradients", params, "gradient_statistics")

    def step(leaves: dict[str, Leaf], args: tuple[PyTree, ...]) -> dict[str, jax.Array]:
        def loss(own: dict[str, Leaf]) -> jax.Array:
            return with_codes(rebuild({**leaves, **own}), Trainable(), *args)

        found = jax.grad(loss)({row.path: widened(leaves[row.path]) for row in rows})
        return {path: x.astype(jnp.float32) for path, x in found.items()}

    with_codes = apply_lora(loss_fn)
    _, rebuild, leaves = _arrays(params)
    sums, n = _summed(step, leaves, batches)
    return Statistics(gradients={path: x / n for path, x in sums.items()})


def _needing(plan: Plan, needs: str, params: PyTree, name: str) -> list[Row]:
    """Returns the rows of `plan` whose init needs statistics of the kind `needs`."""
    check_plan(paths.flatten(params)[0], plan)
    rows = [row for row in plan.rows() if row.init and row.init.needs == needs]
    if not rows:
        fits = {"inputs": "'eva' or 'corda'", "gradients": "'lora_ga'"}[needs]
        raise ConfigError(
            f"{name}: no adapted leaf has an init that needs this. Make the plan with "
            f"LoraConfig(init={fits})."
        )
    return rows


def _arrays(
    params: PyTree,
) -> tuple[list[str], Callable[[dict[str, Leaf]], PyTree], dict[str, Leaf]]:
    """Returns all paths, `arrays by path -> params`, and the arrays by path."""
    leaves, treedef = paths.flatten(params)

    def rebuild(arrays: dict[str, Leaf]) -> PyTree:
        return treedef.unflatten({**leaves, **arrays}.values())

    return list(leaves), rebuild, {k: x for k, x in leaves.items() if is_array(x)}


def _summed(
    step: Callable[..., Sums], leaves: dict[str, Leaf], batches: Iterable[PyTree]
) -> tuple[Sums, int]:
    """Returns the sum of `step(leaves, batch)` over `batches`, and their number."""
    compiled = jax.jit(step)
    total, n = None, 0
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        found = compiled(leaves, args)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        n += 1
    if total is None:
        raise ConfigError("batches is empty: give at least one batch of inputs.")
    return total, n
