"""How large adapters are, and how alike."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .._core.algebra import HIGHEST, decompose, delta, inner, norm
from .._numerics import at_least_float32, root_of_squares
from ..factors import Array, PyTree, Trainable
from ..quantised import whole
from ._several import (
    FULL,
    Base,
    as_lora,
    base_weight,
    check_base,
    check_fit,
    dora_leaves,
    leaves_of,
    sequence,
    union,
)


def norms(trainable: Trainable, *, params: PyTree = None) -> dict[str, jax.Array]:
    """Returns the Frobenius norm of each leaf's change, by path.

    Args:
      trainable: any adapter.
      params: the base parameters, needed for DoRA and for leaves trained in full.

    Raises:
      TreeError: lists the leaves that need `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> x = Trainable({"w": Factors(jnp.ones((2, 1)), jnp.ones((1, 2)),
      ...                             Spec(rank=1, alpha=2.0))})
      >>> {path: round(float(norm), 4) for path, norm in norms(x).items()}
      {'w': 4.0}
    """
    (trainable,) = sequence("norms", [trainable])
    base = _base("norms", [trainable], params)
    lora = {path: norm(as_lora(path, f, base)) for path, f in trainable.lora.items()}
    return lora | {
        path: root_of_squares(_change(trainable, path, base)) for path in trainable.full
    }


def cosine(x: Trainable, y: Trainable, *, params: PyTree = None) -> jax.Array:
    """Returns the cosine of the angle between two adapters' changes of all weights.

    The cosine is 1 for changes in the same direction, 0 for orthogonal changes, and -1
    for opposite ones. It is NaN if either adapter changes nothing. Gram matrices give
    it; the dense change of a leaf with factors is not formed.

    Args:
      x: an adapter.
      y: another adapter of the same model. A leaf that only one of the two has counts
        as zero in the other.
      params: the base parameters, needed for DoRA and for leaves trained in full.

    Raises:
      TreeError: if they are not of one model, or if leaves need `params`; lists them.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> x = Trainable({"w": Factors(jnp.ones((3, 1)), jnp.ones((1, 4)),
      ...                             Spec(rank=1, alpha=2.0))})
      >>> cosine(x, jlora.adapters.scale(x, -3.0)).round(4)
      Array(-1., dtype=float32)
    """
    found = sequence("cosine", [x, y])
    check_fit("cosine", found)
    base = _base("cosine", found, params)
    xx, xy, yy = (
        sum(
            _product(one, other, path, base)
            for path in union([one.lora, one.full])
            if path in other
        )
        for one, other in ((x, x), (x, y), (y, y))
    )
    return jnp.asarray(xy) / (jnp.sqrt(jnp.asarray(xx)) * jnp.sqrt(jnp.asarray(yy)))


def orthogonality(
    x: Trainable, y: Trainable, *, params: PyTree = None
) -> dict[str, jax.Array]:
    """Returns how little the inputs that two adapters react to overlap, by path.

    Each change of a weight reacts to a space of inputs. The result is 1 minus the mean
    squared cosine of the principal angles between the two spaces. At 1 neither change
    reacts to what the other one does, so that they do not interfere. At 0 one space
    contains the other. The result has only the leaves for which both have factors.

    Args:
      x: an adapter.
      y: another adapter of the same model.
      params: the base parameters, needed for DoRA.

    Raises:
      TreeError: if they are not of one model, or if leaves need `params`; lists them.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> def reads(feature):
      ...     a, b = jnp.array([feature]).T, jnp.ones((1, 4))
      ...     return Trainable({"w": Factors(a, b, Spec(rank=1, alpha=1.0))})
      >>> jax.jit(orthogonality)(reads([1.0, 0, 0]), reads([0, 1.0, 0]))
      {'w': Array(1., dtype=float32)}

    References:
      Wang et al., 2023, O-LoRA, section 3.2, https://arxiv.org/abs/2310.14152
    """
    found = sequence("orthogonality", [x, y])
    check_fit("orthogonality", found)
    shared = [path for path in x.lora if path in y.lora]
    base = leaves_of(params)
    dora = dora_leaves(x.lora) | dora_leaves(y.lora)
    check_base("orthogonality", {p: dora[p] for p in shared if p in dora}, base)

    def space(trainable: Trainable, path: str) -> tuple[jax.Array, jax.Array]:
        u, s, _ = decompose(as_lora(path, trainable.lora[path], base))
        small = jnp.finfo(s.dtype).eps * max(u.shape[-2:])
        alive = (s > small * s[..., :1]) & (s > 0)
        return u * alive[..., None, :].astype(u.dtype), jnp.sum(alive, axis=-1)

    def overlap(path: str) -> jax.Array:
        (ux, nx), (uy, ny) = space(x, path), space(y, path)
        cosines = jnp.matmul(jnp.swapaxes(ux, -1, -2), uy, precision=HIGHEST)
        least = jnp.maximum(jnp.minimum(nx, ny), 1).astype(ux.dtype)
        return jnp.mean(jnp.sum(jnp.square(cosines), axis=(-2, -1)) / least)

    return {path: 1 - overlap(path) for path in shared}


def _base(name: str, trainables: Sequence[Trainable], params: PyTree) -> Base:
    """Returns the base parameters by path; they may be None only if not needed."""
    base = leaves_of(params)
    needed = {p: why for t in trainables for p, why in dora_leaves(t.lora).items()}
    needed |= {path: FULL for t in trainables for path in t.full}
    check_base(name, needed, base)
    return base


def _product(x: Trainable, y: Trainable, path: str, base: Base) -> jax.Array:
    """Returns the inner product of two changes of one weight, over all entries."""
    if path in x.lora and path in y.lora:
        return inner(*(as_lora(path, t.lora[path], base) for t in (x, y)))
    return jnp.sum(whole(_change(x, path, base)) * whole(_change(y, path, base)))


def _change(trainable: Trainable, path: str, base: Base) -> Array:
    """Returns the dense change of one weight, in at least float32."""
    w = base_weight(base, path)
    dtype = at_least_float32(w.dtype)
    if path in trainable.full:
        return trainable.full[path].astype(dtype) - w.astype(dtype)
    return delta(as_lora(path, trainable.lora[path], base), dtype)
