"""What an initialisation is, and what several of them share."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._numerics import HIGHEST, add_rounded, at_least_float32
from ..factors import Array, Axes, Leaf, Spec
from ..quantised import is_quantized, whole

Needs = Literal["shape", "weight", "quantize", "inputs", "gradients"]
Base = Literal["same", "residual", "own"]


@dataclasses.dataclass(frozen=True)
class Init:
    """How A and B of one weight are initialised.

    Attributes:
      fun: `(key, w, spec, dtype) -> (a, b)`, where `w` is the weight, or its shape if
        that is all it `needs`. Anything else that it needs is a last argument.
      needs: only the `"shape"` or the `"weight"`; `"quantize"`, a function from the
        weight to the values that the quantised weight stands for; `"inputs"`, the
        `InputMoments` of the weight; `"gradients"`, its mean gradient.
      base: what the frozen weight becomes: the `"same"`; the `"residual"`
        `w - scale * a @ b`, so that the model computes what it did; or `fun`'s `"own"`
        weight, returned after A and B.
      ops: the operations that it is for.
      even: whether the rank must be even.
      rank_factor: the rank times this must fit into `min(fan_in, fan_out)`.

    Examples:
      >>> from jlora.methods import INITS
      >>> INITS["pissa"].needs, INITS["pissa"].base, INITS["pissa"].changes_base
      ('weight', 'residual', True)
      >>> INITS["eva"].needs, INITS["eva"].ops
      ('inputs', ('linear',))
    """

    fun: Callable[..., Any]
    needs: Needs = "shape"
    base: Base = "same"
    ops: tuple[str, ...] = ("linear", "embedding", "conv")
    even: bool = False
    rank_factor: int = 1

    @property
    def changes_base(self) -> bool:
        """Whether the frozen weight differs from the one in the parameters."""
        return self.base != "same"


def matrices(w: Array, axes: Axes) -> jax.Array:
    """Returns `w` as `n` matrices, `[n, fan_in, fan_out]`, in float32."""
    flat = jnp.transpose(whole(jnp.asarray(w)), axes.order).reshape(axes.sizes(w.shape))
    return flat.astype(at_least_float32(w.dtype))


def dense(w: Leaf) -> Array:
    """Returns the array that a weight is, or that its codes stand for."""
    return w.dense() if is_quantized(w) else w


def like_weight(
    x: Any, axes: Axes, shape: tuple[int, ...], xp: ModuleType = jnp
) -> Any:
    """Returns matrices `[n, fan_in, fan_out]` with the axes of a weight of `shape`.

    `xp` is `numpy` for an array on the host.
    """
    x = x.reshape([shape[i] for i in axes.order])
    return xp.transpose(x, [axes.order.index(i) for i in range(len(shape))])


def shaped(
    a: jax.Array, b: jax.Array, spec: Spec, shape: tuple[int, ...], dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns `a` `[n, fan_in, rank]` and `b` `[n, rank, fan_out]` as factors."""
    return (
        a.reshape(spec.axes.a_shape(shape, spec.rank)).astype(dtype),
        b.reshape(spec.axes.b_shape(shape, spec.rank)).astype(dtype),
    )


def residual(w: Array, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
    """Returns `w - scale * a @ b`, computed in float32, rounded once.

    Args:
      w: the weight.
      a: `[*batch, *fan_in, rank]`.
      b: `[*batch, rank, *fan_out]`.
      spec: axes, rank and scale.

    Returns:
      An array of the weight's shape and dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> w = jnp.full((3, 4), 5, jnp.float32)
      >>> residual(w, jnp.ones((3, 1)), jnp.ones((1, 4)), Spec(rank=1, alpha=2.0))[0]
      Array([3., 3., 3., 3.], dtype=float32)
    """
    n, n_in, n_out = spec.axes.sizes(w.shape)
    wide = at_least_float32(w.dtype)
    product = jnp.matmul(
        a.astype(wide).reshape(n, n_in, spec.rank),
        b.astype(wide).reshape(n, spec.rank, n_out),
        precision=HIGHEST,
    )
    change = like_weight(spec.scale * product, spec.axes, w.shape)
    return add_rounded(jnp.asarray(w), [-change])


def low_rank_svd(
    key: jax.Array, x: jax.Array, rank: int, n_iter: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns approximate `u, s, vt` of the `rank` largest singular values of matrices.

    `n_iter` rounds of subspace iteration from a random subspace: more are more exact.

    References:
      Halko et al., 2011, algorithms 4.4 and 5.1, https://arxiv.org/abs/0909.4061
    """

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x, y, precision=HIGHEST)

    n, _, n_out = x.shape
    basis = dot(x, jax.random.normal(key, (n, n_out, rank), x.dtype))
    basis, _ = jnp.linalg.qr(basis)
    xt = x.swapaxes(1, 2)
    for _ in range(n_iter):
        other, _ = jnp.linalg.qr(dot(xt, basis))
        basis, _ = jnp.linalg.qr(dot(x, other))
    u, s, vt = jnp.linalg.svd(dot(basis.swapaxes(1, 2), x), full_matrices=False)
    return dot(basis, u), s, vt
