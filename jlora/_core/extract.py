"""Finds the adapter nearest to the change that a full fine-tune made."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from .. import paths
from .._numerics import at_least_float32, sqrt_halves
from .._plan.plan import Plan
from .._tables import listed
from ..errors import ConfigError, TreeError
from ..factors import Factors, Leaf, PyTree, Spec, Trainable
from ..methods import find_init, method_of
from ..methods.dora import column_norms
from ..methods.init import matrices, shaped
from ..transform.compat import is_staging
from ..transform.stage import is_array
from .tree import check_plan, widened


def extract(params: PyTree, base_params: PyTree, plan: Plan) -> Trainable:
    """Returns the adapter of `plan` nearest to a full fine-tune's change.

    Each adapted weight's difference is cut to its rank by a truncated SVD, the best
    approximation in the Frobenius norm. A and B share the singular values evenly.
    Leaves that `plan` trains in full are copied. Quantised leaves of either tree are
    widened, one at a time: beside a quantised base the change includes what its codes
    lost of the weight.

    Args:
      params: fine-tuned parameters.
      base_params: the parameters that the fine-tune began with.
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
        odd = listed(map(repr, sorted(tuned.keys() ^ base.keys())), separator=", ")
        raise TreeError(
            "params and base_params are trees of different structure: "
            + (f"only one has {odd}." if odd else "leaves equal, containers differ.")
        )
    check_plan(base, plan)
    check_plan(tuned, plan)
    found, changed = extract_leaves(tuned, base, plan)
    warn_of_frozen(changed, plan)
    return found


def extract_leaves(
    tuned: Mapping[str, Leaf], base: Mapping[str, Leaf], plan: Plan
) -> tuple[Trainable, list[str]]:
    """Returns `extract` of leaves by path, and the paths of those that changed.

    Raises:
      ConfigError: if `plan` has methods other than LoRA and DoRA.
    """
    dtype = jnp.dtype(plan.config.dtype or "float32")
    unable = [
        row.path
        for row in plan.rows()
        if row.spec is not None and not _is_extractable(row.spec)
    ]
    if unable:
        raise ConfigError(
            f"extract finds factors for the methods lora and dora, not for those of "
            f"{listed(map(repr, unable), 3, ', ')}. Make the plan with method='lora'."
        )
    lora = {
        row.path: _nearest(tuned[row.path], base[row.path], row.spec, dtype)
        for row in plan.rows()
        if row.spec is not None
    }
    changed = [path for path, leaf in tuned.items() if _differ(leaf, base[path])]
    full = {path: widened(tuned[path]) for path in plan.full}
    return Trainable(lora, full), changed


def warn_of_frozen(changed: Sequence[str], plan: Plan) -> None:
    """Warns of leaves that changed although `plan` leaves them frozen."""
    left = [path for path in changed if path not in {*plan.adapted, *plan.full}]
    if left:
        names = listed(left, separator=", ")
        warnings.warn(
            "These leaves changed, but the plan leaves them frozen, so the adapter "
            f"lacks their change: {names}. Add them to train= or targets=.",
            stacklevel=3,
        )


def _differ(a: Leaf, b: Leaf) -> bool:
    """Returns whether two leaves are floating-point arrays of different numbers."""
    if is_staging(a) or is_staging(b):
        return True  # it is not known
    a, b = widened(a), widened(b)
    if not is_array(a) or not jnp.issubdtype(a.dtype, jnp.inexact):
        return False
    return not bool(jnp.array_equal(a, b, equal_nan=True))


def _nearest(tuned: Leaf, base: Leaf, spec: Spec, dtype: np.dtype) -> Factors:
    """Returns factors with the best approximation of `tuned - base` of their rank."""
    init = find_init(spec.init)
    if init is not None and init.changes_base:  # these apply to the unchanged base
        spec = dataclasses.replace(spec, init="kaiming")
    tuned, base = widened(tuned), widened(base)
    wide = at_least_float32(base.dtype)
    change = tuned.astype(wide) - base.astype(wide)
    u, s, vt = jnp.linalg.svd(matrices(change, spec.axes), full_matrices=False)
    r = spec.rank
    a, b = sqrt_halves(u[..., :r], s[..., :r], vt[..., :r, :], spec.scale)
    magnitude = None
    if method_of(spec).gain is not None:
        magnitude = column_norms(tuned.astype(wide), spec.axes)
    return Factors(*shaped(a, b, spec, change.shape, dtype), spec, magnitude)


def _is_extractable(spec: Spec) -> bool:
    return spec.method in ("lora", "dora") and spec.parts is None and not spec.rows
