"""Factors added to weights for good, taken off again, and found from a fine-tune."""

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from . import paths
from ._numerics import at_least_float32
from ._plan.plan import Plan
from ._split import (
    MISSING,
    check,
    check_plan,
    check_trainable,
    combine,
    flatten_frozen,
)
from .errors import ConfigError, TreeError
from .factors import Factors, Spec, Trainable
from .methods import method_of, plain
from .methods.dora import column_norms, dense_gain
from .transform.compat import is_staging, placed_like
from .transform.stage import is_array


def delta(factors: Factors, dtype: Any = jnp.float32) -> jax.Array:
    """Returns the dense update `scale * a @ b` of a weight, computed in `dtype`.

    Shapes: A `[*batch, *fan_in, rank]` and B `[*batch, rank, *fan_out]` give an array
    with the weight's own axes in the weight's own order.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Spec
      >>> f = Factors(jnp.ones((3, 2)), jnp.ones((2, 4)), Spec(rank=2, alpha=1))
      >>> delta(f).shape, float(delta(f)[0, 0])
      ((3, 4), 1.0)
    """
    dense = method_of(factors.spec).dense
    if dense is not None:
        return dense(factors, dtype)
    axes = factors.spec.axes
    a, b = plain(factors)
    batch = a.shape[: len(axes.batch)]
    fan_in = a.shape[len(axes.batch) : -1]
    fan_out = b.shape[len(axes.batch) + 1 :]
    rows = a.astype(dtype).reshape(*batch, math.prod(fan_in), factors.rank)
    columns = b.astype(dtype).reshape(*batch, factors.rank, math.prod(fan_out))
    product = jnp.matmul(rows, columns, precision=jax.lax.Precision.HIGHEST)
    product = (factors.scale * product).reshape(*batch, *fan_in, *fan_out)
    return jnp.transpose(product, [axes.order.index(i) for i in range(product.ndim)])


def merge(frozen: Any, trainable: Trainable) -> Any:
    """Returns plain parameters: `w + scale * a @ b` at each adapted weight.

    With DoRA, `magnitude * (w + scale * a @ b) / ‖w + scale * a @ b‖`. Computed in
    float32 (float64 for float64 weights) and rounded once to the weight's dtype. Tree,
    dtypes and shardings are those of the original parameters, so
    `fn(merge(frozen, trainable), ...)` costs what `fn` costs.

    Args:
      frozen: from `split`.
      trainable: from `split`, trained.

    Raises:
      TreeError: if the two do not fit together; lists every misfit.

    Examples:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
      >>> config = jlora.LoraConfig(rank=2, targets="w")
      >>> plan = jlora.plan(fn, params, jnp.ones((1, 4)), config=config)
      >>> frozen, trainable = jlora.split(jax.random.key(0), params, plan)
      >>> bool((jlora.merge(frozen, trainable)["w"] == params["w"]).all())
      True
    """
    return _shift(combine(frozen, trainable), trainable, sign=1)


def unmerge(params: Any, trainable: Trainable) -> Any:
    """Returns `frozen` from merged parameters: the inverse of `merge`.

    The inverse of `merge` up to one rounding of each adapted weight; in low precision
    keep the original `frozen` instead.

    Args:
      params: from `merge`.
      trainable: what was merged, unchanged.

    Raises:
      TreeError: if `trainable` does not fit `params`, or holds DoRA, whose merged
        weights no longer tell the length that their columns had.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> head = jlora.Trainable(full={"head": jnp.ones(2)})
      >>> unmerge({"w": jnp.ones(1), "head": jnp.ones(2)}, head)
      {'head': Missing(), 'w': Array([1.], dtype=float32)}
    """
    check_trainable(trainable)
    leaves, treedef = paths.flatten(params)
    unknown = [path for path in trainable.full if path not in leaves]
    if unknown:
        raise TreeError(f"params has no leaf {', '.join(map(repr, unknown))}.")
    frozen = treedef.unflatten(
        MISSING if path in trainable.full else leaf for path, leaf in leaves.items()
    )
    check(flatten_frozen(frozen)[0], trainable)
    rescaled = [p for p, f in trainable.lora.items() if method_of(f.spec).gain]
    if rescaled:
        raise TreeError(
            f"{', '.join(map(repr, rescaled[:3]))} have a magnitude (DoRA): the merged "
            "weights do not tell what they were. Keep frozen from jlora.split instead."
        )
    return _shift(frozen, trainable, sign=-1)


def _shift(tree: Any, trainable: Trainable, *, sign: int) -> Any:
    """Returns `tree` with `sign * delta` added to each adapted weight."""
    leaves, treedef = flatten_frozen(tree)
    for path, factors in trainable.lora.items():
        leaves[path] = _add_delta(leaves[path], factors, sign)
    return treedef.unflatten(leaves.values())


def _add_delta(w: Any, factors: Factors, sign: int) -> jax.Array:
    def add(w: Any, factors: Factors) -> jax.Array:
        wide = at_least_float32(w.dtype)
        own_delta = functools.partial(delta, dtype=wide)
        total = w.astype(wide) + sign * placed_like(w, own_delta, factors)
        if method_of(factors.spec).gain is not None:
            total = total * dense_gain(factors, total)
        return total.astype(w.dtype)

    out = add(w, factors)
    if isinstance(w, jax.Array) and not is_staging(out) and out.sharding != w.sharding:
        return jax.device_put(out, w.sharding)
    return out


def extract(params: Any, base_params: Any, plan: Plan) -> Trainable:
    """Returns the adapter of `plan` nearest to a full fine-tune's change.

    Each adapted weight's difference is cut to its rank by a truncated SVD, the best
    approximation in the Frobenius norm; the singular values are shared evenly by A and
    B. Leaves that `plan` trains in full are taken over whole.

    Args:
      params: fine-tuned parameters.
      base_params: the parameters the fine-tune began with.
      plan: ranks and axes, from `jlora.plan`.

    Raises:
      TreeError: if the trees differ from each other or from `plan`.
      ConfigError: if `plan` has methods other than LoRA and DoRA.

    Warns:
      UserWarning: names the leaves that changed although `plan` leaves them frozen;
        their change is not in the adapter.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> base = {"w": jnp.zeros((3, 4))}
      >>> fn = lambda p, x: x @ p["w"]
      >>> config = jlora.LoraConfig(rank=1)
      >>> plan = jlora.plan(fn, base, jnp.ones((1, 3)), config=config)
      >>> tuned = {"w": jnp.ones((3, 4))}
      >>> adapter = jlora.extract(tuned, base, plan)
      >>> bool(jnp.allclose(jlora.merge(base, adapter)["w"], tuned["w"], atol=1e-6))
      True

    References:
      Eckart and Young, 1936, https://doi.org/10.1007/BF02288367
    """
    tuned, treedef = paths.flatten(params)
    base, base_treedef = paths.flatten(base_params)
    if treedef != base_treedef:
        raise TreeError(
            "params and base_params are trees of different structure: leaves "
            f"{sorted(set(tuned) ^ set(base)) or 'equal, containers differ'}."
        )
    check_plan(base, plan)
    check_plan(tuned, plan)
    dtype = jnp.dtype(plan.config.dtype or "float32")
    unable = [
        row.path
        for row in plan.rows()
        if row.spec is not None and not _is_extractable(row.spec)
    ]
    if unable:
        raise ConfigError(
            f"extract finds factors for the methods lora and dora, not for those of "
            f"{', '.join(map(repr, unable[:3]))}. Make the plan with method='lora'."
        )
    lora = {
        row.path: _nearest(tuned[row.path], base[row.path], row.spec, dtype)
        for row in plan.rows()
        if row.spec is not None
    }
    left = [
        path
        for path, leaf in tuned.items()
        if path not in lora and path not in plan.full and _differ(leaf, base[path])
    ]
    if left:
        warnings.warn(
            "These leaves changed, but the plan leaves them frozen, so the adapter "
            f"lacks their change: {', '.join(left)}. Add them to train= or targets=.",
            stacklevel=2,
        )
    return Trainable(lora, {path: tuned[path] for path in plan.full})


def _differ(a: Any, b: Any) -> bool:
    """Returns whether two leaves are floating-point arrays with other numbers."""
    if not is_array(a) or not jnp.issubdtype(a.dtype, jnp.inexact):
        return False
    return not bool(jnp.array_equal(a, b, equal_nan=True))


def _nearest(tuned: Any, base: Any, spec: Spec, dtype: Any) -> Factors:
    """Returns factors with the best approximation of `tuned - base` of their rank."""
    axes = spec.axes
    wide = at_least_float32(base.dtype)
    change = tuned.astype(wide) - base.astype(wide)
    _, n_in, n_out = axes.sizes(change.shape)
    batch = [change.shape[i] for i in axes.batch]
    matrix = jnp.transpose(change, axes.order).reshape(*batch, n_in, n_out)
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    half = jnp.sqrt(s[..., : spec.rank] / spec.scale)
    a = u[..., : spec.rank] * half[..., None, :]
    b = half[..., :, None] * vt[..., : spec.rank, :]
    factors = Factors(
        a.reshape(axes.a_shape(change.shape, spec.rank)).astype(dtype),
        b.reshape(axes.b_shape(change.shape, spec.rank)).astype(dtype),
        spec,
    )
    if method_of(spec).gain is None:
        return factors
    return dataclasses.replace(
        factors, magnitude=column_norms(tuned.astype(wide), axes)
    )


def _is_extractable(spec: Spec) -> bool:
    return spec.method in ("lora", "dora") and spec.parts is None and not spec.rows
