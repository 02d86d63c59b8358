"""Weighted sums of adapters, exact in the update, and what follows from them."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.algebra import cut, decompose, join, recompose
from ..errors import ConfigError
from ..factors import Factors, PyTree, Trainable
from ..transform.compat import is_staging
from ._fold import combine, weighted_sum
from ._several import (
    as_lora,
    check_base,
    check_share,
    checked_rank,
    dora_leaves,
    leaves_of,
    sequence,
    weights_for,
)


def scale(
    trainable: Trainable, weight: ArrayLike, *, params: PyTree = None
) -> Trainable:
    """Returns the adapter whose update is `weight` times that of `trainable`.

    B is multiplied by the weight. Rank, alpha and method stay, so nothing is compiled
    again. The weight may be traced. With a weight of 1 the adapter comes back as it is.

    Args:
      trainable: any adapter.
      weight: a number or a scalar array.
      params: the base parameters (those that `split` was given). DoRA and leaves
        trained in full need them, since their update depends on the base. DoRA becomes
        plain LoRA of full rank, which `truncate` can cut.

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
    found = sequence("scale", [trainable])
    return _sum("scale", found, weights_for("scale", found, [weight]), params)


def negate(trainable: Trainable, *, params: PyTree = None) -> Trainable:
    """Returns the adapter that subtracts what `trainable` adds, `scale(..., -1)`.

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
    return _sum("negate", sequence("negate", [trainable]), [-1], params)


def add(trainables: Sequence[Trainable], *, params: PyTree = None) -> Trainable:
    """Returns the adapter whose update is the sum of the updates, as `linear` does.

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
    return _sum("add", found, [1] * len(found), params)


def linear(
    trainables: Sequence[Trainable],
    weights: Sequence[ArrayLike] | None = None,
    *,
    rank: int | None = None,
    params: PyTree = None,
) -> Trainable:
    """Returns the adapter whose update is the weighted sum of the updates.

    The update is exact. The factors are not summed: the product of a sum of A's and a
    sum of B's would have cross terms. The rank is the sum of the ranks, or the largest
    rank of such a weight if that is lower. A leaf that an adapter lacks counts as zero.

    A leaf that only one adapter has, with a weight of 1, comes back as it is, whatever
    its method. All others are plain LoRA with a scale of 1, which is exact for rsLoRA
    too. A leaf keeps its drop rate if the adapters agree on it; otherwise it is 0.

    Args:
      trainables: adapters of one model.
      weights: a number or a scalar array for each adapter; None means ones.
      rank: cut the sum to the nearest one of this rank, see `truncate`.
      params: the base parameters (those that `split` was given). DoRA needs them, and
        so do leaves trained in full, unless all adapters have the leaf and the weights
        are numbers that sum to 1: then the base cancels.

    Raises:
      TreeError: if the adapters are not of one model, or if leaves need `params`; lists
        them.

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
    return _sum("linear", found, weights, params, rank)


def _sum(
    name: str,
    trainables: Sequence[Trainable],
    weights: Sequence[ArrayLike],
    params: PyTree,
    rank: int | None = None,
) -> Trainable:
    """Returns the weighted sum, cut to `rank` where one is given."""
    out = combine(name, trainables, weights, params, weighted_sum)
    return out if rank is None else truncate(out, rank, params=params)


def average(
    trainables: Sequence[Trainable], *, rank: int | None = None, params: PyTree = None
) -> Trainable:
    """Returns the adapter whose update is the mean of the updates, see `linear`.

    A leaf that all adapters train in full is averaged without `params`.

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
    return _sum("average", found, [1 / len(found)] * len(found), params, rank)


def interpolate(
    x: Trainable,
    y: Trainable,
    t: ArrayLike,
    *,
    rank: int | None = None,
    params: PyTree = None,
) -> Trainable:
    """Returns the adapter whose update is that of `(1 - t) x + t y`, see `linear`.

    It is `x` itself at 0, and `y` itself at 1.

    Args:
      x: an adapter.
      y: another one of the same model.
      t: a number or a scalar array. The result is an extrapolation outside [0, 1].
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
    (t,) = weights_for("interpolate", found[:1], [t])
    if isinstance(t, int | float) and t in (0, 1):
        end = found[int(t)]
        return end if rank is None else truncate(end, rank, params=params)
    return _sum("interpolate", found, [1 - t, t], params, rank)


def concat(
    trainables: Sequence[Trainable],
    weights: Sequence[ArrayLike] | None = None,
    *,
    params: PyTree = None,
) -> Trainable:
    """Returns the weighted sum of the updates, with all factors side by side.

    The update is that of `linear`. The columns of A are those of the adapters, and the
    rank is always the sum of the ranks, even above the largest rank that such a weight
    can have. This is PEFT's `cat`.

    Args:
      trainables: adapters of one model.
      weights: a number or a scalar array for each adapter; None means ones.
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
    params: PyTree = None,
) -> Trainable:
    """Returns the adapter of lower rank whose update is nearest in the Frobenius norm.

    The SVD of the update comes from a QR of both factors; the dense update is not
    formed. A leaf whose rank is not above `rank` comes back as it is. So do all leaves
    trained in full.

    Args:
      trainable: any adapter.
      rank: the highest rank to keep.
      energy: in place of `rank`, the share of the sum of squared singular values to
        keep, in (0, 1]. Each leaf gets the least rank that keeps this share in all its
        matrices. Cannot be used under `jit` or `vmap`: the shapes depend on values.
      params: the base parameters, needed for DoRA, see `linear`.

    Raises:
      ConfigError: unless exactly one of `rank` and `energy` is given; if `rank` is not
        a positive integer; if `energy` is outside (0, 1], or given under `jit`.
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
    if rank is not None and energy is None:
        shorten = functools.partial(cut, rank=checked_rank(rank))
    elif energy is not None and rank is None:
        check_share(energy=energy)
        shorten = functools.partial(_keep_energy, energy=energy)
    else:
        raise ConfigError("truncate takes exactly one of rank= and energy=.")
    (trainable,) = sequence("truncate", [trainable])
    base = leaves_of(params)
    wide = {p: f for p, f in trainable.lora.items() if rank is None or f.rank > rank}
    check_base("truncate", dora_leaves(wide), base)
    short = {path: shorten(as_lora(path, f, base)) for path, f in wide.items()}
    return Trainable({**trainable.lora, **short}, trainable.full)


def _keep_energy(factors: Factors, energy: float) -> Factors:
    """Returns the update of least rank that keeps the share `energy` of its squares."""
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
    trainable: Trainable, *, rank: int | None = None, params: PyTree = None
) -> Trainable:
    """Returns the adapter with each leaf converted to plain LoRA with the same update.

    AdaLoRA's middle factor, for example, is multiplied into B. A DoRA leaf needs
    `params`, and its update has full rank; `rank` cuts it.

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
    check_base("to_lora", dora_leaves(trainable.lora), base)
    lora = {path: as_lora(path, f, base) for path, f in trainable.lora.items()}
    out = Trainable(lora, trainable.full)
    return out if rank is None else truncate(out, rank)
