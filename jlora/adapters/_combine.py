"""Weighted sums of adapters, exact in the update, and what follows from them."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from .._core.algebra import (
    cut,
    decompose,
    join,
    recompose,
)
from ..errors import ConfigError
from ..factors import Factors, Trainable
from ..transform.compat import is_staging
from ._fold import combine, weighted_sum
from ._several import (
    DORA,
    as_lora,
    check_base,
    leaves_of,
    rescales,
    sequence,
    weights_for,
)


def scale(trainable: Trainable, weight: Any, *, params: Any = None) -> Trainable:
    """Returns the adapter whose update is `weight` times that of `trainable`.

    The weight goes into B; rank, alpha and method stay, so nothing compiles again, and
    the weight may be traced. With a weight of 1 the adapter comes back as it is.

    Args:
      trainable: any adapter.
      weight: a number or a scalar array.
      params: the base parameters (those that `split` was given). Needed where the
        update cannot be told without them: for DoRA, which becomes plain LoRA of full
        rank (see `truncate`), and for leaves trained in full, whose update is their
        distance from the base.

    Raises:
      TreeError: lists the leaves that need `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> x = Trainable({"w": Factors(jnp.ones((3, 2)), jnp.ones((2, 4)),
      ...                             Spec(rank=2, alpha=2.0))})
      >>> scale(x, 0.5).lora["w"].b[0, 0]
      Array(0.5, dtype=float32)
    """
    return combine(
        "scale", sequence("scale", [trainable]), [weight], params, weighted_sum
    )


def negate(trainable: Trainable, *, params: Any = None) -> Trainable:
    """Returns the adapter that takes off what `trainable` adds, `scale(..., -1)`.

    Args:
      trainable: any adapter.
      params: see `scale`.

    Raises:
      TreeError: lists the leaves that need `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> x = Trainable({"w": Factors(jnp.ones((3, 1)), jnp.ones((1, 4)),
      ...                             Spec(rank=1, alpha=2.0))})
      >>> negate(x).lora["w"].b[0, 0]
      Array(-1., dtype=float32)

    References:
      Ilharco et al., 2023, Editing Models with Task Arithmetic, section 3,
      https://arxiv.org/abs/2212.04089
    """
    return combine(
        "negate", sequence("negate", [trainable]), [-1], params, weighted_sum
    )


def add(trainables: Sequence[Trainable], *, params: Any = None) -> Trainable:
    """Returns the adapter whose update is the sum of the updates: `linear` of ones.

    Args:
      trainables: adapters of one model.
      params: see `linear`.

    Raises:
      TreeError: see `linear`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> x = Trainable({"w": Factors(jnp.ones((3, 1)), jnp.ones((1, 4)),
      ...                             Spec(rank=1, alpha=2.0))})
      >>> both = add([x, negate(x)]).lora["w"]
      >>> both.rank, both.scale, float(jnp.abs(both.a @ both.b).max())
      (2, 1.0, 0.0)
    """
    found = sequence("add", trainables)
    return combine("add", found, [1] * len(found), params, weighted_sum)


def linear(
    trainables: Sequence[Trainable],
    weights: Sequence[Any] | None = None,
    *,
    rank: int | None = None,
    params: Any = None,
) -> Trainable:
    """Returns the adapter whose update is the weighted sum of the updates.

    Exact in the update, not in the factors: the sum of A's times the sum of B's would
    have cross terms. Ranks add up, to no more than the weight itself can have. A leaf
    that an adapter lacks is zero there. A leaf that only one adapter has, with weight
    1, comes back as it is, whatever its method; all others are plain LoRA with a scale
    of 1 (exact for rsLoRA too). Drop rates stay where the adapters agree, else 0.

    Args:
      trainables: adapters of one model.
      weights: one number or scalar array each; None means ones.
      rank: cut the sum to this rank, the best approximation, see `truncate`.
      params: the base parameters (those that `split` was given). Needed for DoRA and
        for leaves trained in full, except where the base cancels: where all adapters
        have the leaf and the weights are numbers that sum to 1.

    Raises:
      TreeError: if the adapters are not of one model, or lists the leaves that need
        `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> x, y = (
      ...     Trainable({"w": Factors(jnp.full((3, 1), v), jnp.ones((1, 4)),
      ...                             Spec(rank=1, alpha=1.0))})
      ...     for v in (1.0, 2.0)
      ... )
      >>> both = linear([x, y], [0.5, 3]).lora["w"]
      >>> both.rank, float((both.a @ both.b)[0, 0])
      (2, 6.5)

    References:
      Ilharco et al., 2023, Editing Models with Task Arithmetic,
      https://arxiv.org/abs/2212.04089
    """
    found = sequence("linear", trainables)
    weights = weights_for("linear", found, weights)
    out = combine("linear", found, weights, params, weighted_sum)
    return out if rank is None else truncate(out, rank, params=params)


def average(
    trainables: Sequence[Trainable], *, rank: int | None = None, params: Any = None
) -> Trainable:
    """Returns the adapter whose update is the mean of the updates, see `linear`.

    Leaves that all train in full are averaged themselves; others need `params`.

    Args:
      trainables: adapters of one model.
      rank: cut the mean to this rank, see `truncate`.
      params: see `linear`.

    Raises:
      TreeError: see `linear`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> x, y = (
      ...     Trainable({"w": Factors(jnp.full((3, 1), v), jnp.ones((1, 4)),
      ...                             Spec(rank=1, alpha=1.0))})
      ...     for v in (1.0, 3.0)
      ... )
      >>> both = average([x, y]).lora["w"]
      >>> both.rank, float((both.a @ both.b)[0, 0])
      (2, 2.0)
    """
    found = sequence("average", trainables)
    weights = [1 / len(found)] * len(found)
    out = combine("average", found, weights, params, weighted_sum)
    return out if rank is None else truncate(out, rank, params=params)


def interpolate(
    x: Trainable,
    y: Trainable,
    t: Any,
    *,
    rank: int | None = None,
    params: Any = None,
) -> Trainable:
    """Returns `(1 - t) x + t y` in the update: `x` at 0, `y` at 1, see `linear`.

    Args:
      x: an adapter.
      y: another one of the same model.
      t: a number or a scalar array; outside [0, 1] it extrapolates.
      rank: cut the result to this rank, see `truncate`.
      params: see `linear`.

    Raises:
      TreeError: see `linear`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> x, y = (
      ...     Trainable({"w": Factors(jnp.full((3, 1), v), jnp.ones((1, 4)),
      ...                             Spec(rank=1, alpha=1.0))})
      ...     for v in (1.0, 3.0)
      ... )
      >>> near = interpolate(x, y, 0.25).lora["w"]
      >>> float((near.a @ near.b)[0, 0])
      1.5
    """
    found = sequence("interpolate", [x, y])
    if isinstance(t, int | float) and t in (0, 1):
        out = found[int(t)]
    else:
        out = combine("interpolate", found, [1 - t, t], params, weighted_sum)
    return out if rank is None else truncate(out, rank, params=params)


def concat(
    trainables: Sequence[Trainable],
    weights: Sequence[Any] | None = None,
    *,
    params: Any = None,
) -> Trainable:
    """Returns the weighted sum with all factors kept, A's and B's side by side.

    The same update as `linear`, but ranks always add up, also beyond what the weight
    can have, and the columns of A are those of the adapters: PEFT's `cat`.

    Args:
      trainables: adapters of one model.
      weights: one number or scalar array each; None means ones.
      params: see `linear`.

    Raises:
      TreeError: see `linear`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> x, y = (
      ...     Trainable({"w": Factors(jnp.full((3, 1), v), jnp.ones((1, 4)),
      ...                             Spec(rank=1, alpha=1.0))})
      ...     for v in (1.0, 3.0)
      ... )
      >>> both = concat([x, y], [1, 0.5]).lora["w"]
      >>> both.a.shape, both.a[0], float((both.a @ both.b)[0, 0])
      ((3, 2), Array([1., 3.], dtype=float32), 2.5)
    """
    found = sequence("concat", trainables)
    weights = weights_for("concat", found, weights)
    return combine("concat", found, weights, params, lambda _, f, w: join(f, w))


def truncate(
    trainable: Trainable,
    rank: int | None = None,
    *,
    energy: float | None = None,
    params: Any = None,
) -> Trainable:
    """Returns the adapter cut to a rank, the nearest one in the Frobenius norm.

    From the SVD of the update, by QR of both factors, without forming it. A leaf whose
    rank is not above `rank` comes back as it is; leaves trained in full always do.

    Args:
      trainable: any adapter.
      rank: the highest rank to keep.
      energy: in place of `rank`, the part of the sum of squared singular values to
        keep, in (0, 1]; each leaf gets the least rank that keeps it in all its
        matrices. Not under a transformation: shapes depend on values.
      params: the base parameters, needed for DoRA, see `linear`.

    Raises:
      ConfigError: unless one of `rank` and `energy` is given, and can work.
      TreeError: lists the leaves that need `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> x = Trainable({"w": Factors(jnp.ones((3, 2)), jnp.ones((2, 4)),
      ...                             Spec(rank=2, alpha=2.0))})
      >>> cut = truncate(x, energy=0.999).lora["w"]
      >>> cut.rank, cut.scale, round(float((cut.a @ cut.b)[0, 0]), 5)
      (1, 1.0, 2.0)

    References:
      Eckart and Young, 1936, https://doi.org/10.1007/BF02288367
    """
    if (rank is None) == (energy is None):
        raise ConfigError("truncate takes one of rank= and energy=.")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ConfigError(f"rank must be a positive integer, got {rank!r}.")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy must be in (0, 1], got {energy!r}.")
    (trainable,) = sequence("truncate", [trainable])
    base = leaves_of(params)
    wide = [
        path
        for path, f in trainable.lora.items()
        if rescales(f.spec) and (rank is None or f.rank > rank)
    ]
    check_base("truncate", dict.fromkeys(wide, DORA), base)

    def shorten(path: str, factors: Factors) -> Factors:
        if rank is not None and factors.rank <= rank:
            return factors
        own = as_lora(path, factors, base)
        return _keep_energy(own, energy) if rank is None else cut(own, rank)

    return Trainable(
        {path: shorten(path, f) for path, f in trainable.lora.items()},
        trainable.full,
    )


def _keep_energy(factors: Factors, energy: Any) -> Factors:
    u, s, vt = decompose(factors)
    power = jnp.cumsum(jnp.square(s), axis=-1)
    if is_staging(power):
        raise ConfigError(
            "truncate(energy=...) chooses ranks from values, which are not known under "
            "jit or vmap. Call it outside, or give rank=."
        )
    enough = power >= energy * power[..., -1:]
    rank = int(jnp.max(jnp.argmax(enough, axis=-1))) + 1
    return factors if rank >= factors.rank else recompose(u, s, vt, rank, factors)


def to_lora(
    trainable: Trainable, *, rank: int | None = None, params: Any = None
) -> Trainable:
    """Returns the adapter with every method written as plain LoRA.

    The update is the same: AdaLoRA's middle factor and the like go into B. A DoRA leaf
    has an update of full rank and needs `params`; cut it with `rank`.

    Args:
      trainable: any adapter.
      rank: cut each leaf to this rank, see `truncate`.
      params: the base parameters, needed for DoRA.

    Raises:
      TreeError: lists the leaves that need `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> spec = Spec(rank=2, alpha=2.0, method="adalora")
      >>> own = Factors(jnp.ones((3, 2)), jnp.ones((2, 4)), spec, jnp.array([5.0, 0.0]))
      >>> plain = to_lora(Trainable({"w": own})).lora["w"]
      >>> plain.spec.method, plain.magnitude, float((plain.a @ plain.b)[0, 0])
      ('lora', None, 5.0)
    """
    (trainable,) = sequence("to_lora", [trainable])
    base = leaves_of(params)
    dora = [p for p, f in trainable.lora.items() if rescales(f.spec)]
    check_base("to_lora", dict.fromkeys(dora, DORA), base)
    lora = {path: as_lora(path, f, base) for path, f in trainable.lora.items()}
    out = Trainable(lora, trainable.full)
    return out if rank is None else truncate(out, rank)
