"""Gradients of A and B corrected by the other factor, for any optax optimizer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._checks import check_optimizer, check_params, check_positive
from .._tables import listed
from ..errors import TreeError
from ..factors import Factors, Leaf, PyTree, Spec, Trainable
from ..methods import low_rank_pair
from ..quantised import typed_as, whole
from ._labels import check_trainables, is_trainable

if TYPE_CHECKING:
    import optax


PAIRED = ("lora", "dora")  # methods whose leaves a and b are A and B


def lora_fa(
    tx: "optax.GradientTransformation",
) -> "optax.GradientTransformationExtraArgs":
    """Returns `tx` for LoRA-FA, which fixes A and corrects the gradient of B.

    With A fixed, the step of B that brings the update nearest to the gradient of the
    dense weight is `(Aᵀ A)⁻¹ g_B / scale²`, in float32. `tx` is given that gradient.
    If the ranks of A are linearly dependent (an orthogonal initialisation), the
    pseudo-inverse replaces the inverse. There is no optimizer state for A, and one
    `jax.jit` around gradient and step does not compute A's gradient.

    In an embedding table B is the random factor, and A is initialised to zero. There
    the roles are swapped: B is fixed, and `tx` is given `g_A (B Bᵀ)⁻¹ / scale²` for A.

    The correction applies to factors of the methods `"lora"` and `"dora"`, and to each
    part of a fused weight by itself. Gradients of magnitudes, of trained token rows, of
    leaves trained in full and of other methods go to `tx` unchanged. PEFT and the paper
    use AdamW as `tx`.

    Args:
      tx: any optax transformation, schedules and chains included.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      ConfigError: if `tx` is not an optimizer.
      TreeError: (from `update`) if a mask removes only one of A and B, or if there is
        no `Trainable` in the tree.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, jlora
      >>> from jlora.factors import Factors, Spec
      >>> own = Factors(2 * jnp.ones((3, 1)), jnp.ones((1, 2)), Spec(rank=1, alpha=1))
      >>> t = jlora.Trainable({"w": own})
      >>> tx = jlora.optim.lora_fa(optax.sgd(1.0))
      >>> updates, _ = tx.update(t, tx.init(t), t)
      >>> updates.lora["w"].a.sum(), updates.lora["w"].b[0, 0]  # 1 / (2² + 2² + 2²)
      (Array(0., dtype=float32), Array(-0.08333334, dtype=float32))
      >>> state = jlora.optim.lora_fa(optax.trace(0.9)).init(t)
      >>> [x.shape for x in jax.tree.leaves(state)]
      [(1, 2)]

    References:
      Zhang et al., 2023, LoRA-FA, https://arxiv.org/abs/2308.03303
    """
    import optax

    check_optimizer("optim.lora_fa", tx)
    inner = optax.with_extra_args_support(tx)

    def correct(gradient: Factors, own: Factors) -> Factors:
        scales = _scales(own.spec)
        if own.spec.op == "embedding":
            inverse = _divided(_inverse(_gram_b(own), 0.0), scales)
            return dataclasses.replace(
                gradient, a=_right(gradient.a, inverse, own), b=None
            )
        inverse = _divided(_inverse(_gram_a(own), 0.0), scales)
        b = _left(inverse, gradient.b, own)
        return dataclasses.replace(gradient, a=None, b=b)

    def without_fixed(own: Factors) -> Factors:
        return dataclasses.replace(own, **{_fixed(own): None})

    def with_zero(update: Factors, own: Factors) -> Factors:
        fixed = _fixed(own)
        zero = jnp.zeros_like(getattr(own, fixed))
        return dataclasses.replace(update, **{fixed: zero})

    def init(params: "optax.Params") -> "optax.OptState":
        return inner.init(_on_pairs(without_fixed, params))

    def update(
        updates: "optax.Updates",
        state: "optax.OptState",
        params: "optax.Params | None" = None,
        **extra: Any,
    ) -> tuple["optax.Updates", "optax.OptState"]:
        _check_pairs(params, "lora_fa")
        corrected = _on_pairs(correct, updates, params)
        trained = _on_pairs(without_fixed, params)
        updates, state = inner.update(corrected, state, trained, **extra)
        return _on_pairs(with_zero, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def riemannian(
    tx: "optax.GradientTransformation", *, damping: float = 1e-2
) -> "optax.GradientTransformationExtraArgs":
    """Returns `tx` on gradients preconditioned by the other factor's Gram matrix.

    `tx` is given `g_A (B Bᵀ + damping I)⁻¹` and `(Aᵀ A + damping I)⁻¹ g_B`, computed in
    float32. The inverses are of rank × rank matrices, so a step costs little more. The
    step no longer depends on the relative sizes of A and B, and training is less
    sensitive to high ranks and large learning rates. With AdamW as `tx` this is the
    paper's scaled AdamW.

    The correction applies to factors of the methods `"lora"` and `"dora"`, and to each
    part of a fused weight by itself. Gradients of magnitudes, of trained token rows, of
    leaves trained in full and of other methods go to `tx` unchanged.

    Args:
      tx: any optax transformation, schedules and chains included.
      damping: added to the diagonal of each Gram matrix.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      ConfigError: if `damping` is not a positive number, or `tx` is not an optimizer.
      TreeError: (from `update`) if a mask removes only one of A and B, or if there is
        no `Trainable` in the tree.

    Examples:
      >>> import jax.numpy as jnp, optax, jlora
      >>> from jlora.factors import Factors, Spec
      >>> own = Factors(2 * jnp.ones((3, 1)), jnp.ones((1, 2)), Spec(rank=1, alpha=1))
      >>> t = jlora.Trainable({"w": own})
      >>> tx = jlora.optim.riemannian(optax.sgd(1.0), damping=1.0)
      >>> updates, _ = tx.update(t, tx.init(t), t)
      >>> step = updates.lora["w"]  # -2 / (1² + 1² + 1) and -1 / (2² + 2² + 2² + 1)
      >>> round(float(step.a[0, 0]), 4), round(float(step.b[0, 0]), 4)
      (-0.6667, -0.0769)

    References:
      Zhang and Pilanci, 2024, Riemannian Preconditioned LoRA for Fine-Tuning
      Foundation Models, https://arxiv.org/abs/2402.02347
    """
    import optax

    check_positive(damping=damping)
    check_optimizer("optim.riemannian", tx)
    inner = optax.with_extra_args_support(tx)

    def precondition(gradient: Factors, own: Factors) -> Factors:
        a = _right(gradient.a, _inverse(_gram_b(own), damping), own)
        b = _left(_inverse(_gram_a(own), damping), gradient.b, own)
        return dataclasses.replace(gradient, a=a, b=b)

    def update(
        updates: "optax.Updates",
        state: "optax.OptState",
        params: "optax.Params | None" = None,
        **extra: Any,
    ) -> tuple["optax.Updates", "optax.OptState"]:
        _check_pairs(params, "riemannian")
        updates = _on_pairs(precondition, updates, params)
        return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _check_pairs(params: PyTree, name: str) -> None:
    """Raises a TreeError that lists the factors of which a mask left only A or B."""
    check_params(name, params)
    check_trainables(name, params)
    nodes = jax.tree.leaves(params, is_leaf=is_trainable)
    halves = [
        path
        for node in nodes
        if isinstance(node, Trainable)
        for path, own in node.lora.items()
        if _is_pair(own) and not (_has_leaves(own.a) and _has_leaves(own.b))
    ]
    if halves:
        raise TreeError(
            f"{name} needs A and B together, but a mask left only one of them at "
            f"{listed(map(repr, halves), separator=', ')}. Give both one label in "
            "optax.multi_transform or optax.masked."
        )


def _is_pair(own: Factors) -> bool:
    """Returns whether `own` has A and B, or the one of them that a mask left."""
    is_method = own.spec.method in PAIRED and not own.spec.rows
    return is_method and (_has_leaves(own.a) or _has_leaves(own.b))


def _has_leaves(x: Leaf) -> bool:
    return bool(jax.tree.leaves(x))


def _fixed(own: Factors) -> str:
    """Returns which factor is random at initialisation, and so can stay fixed."""
    return "b" if own.spec.op == "embedding" else "a"


def _on_pairs(change: Callable[..., Factors], tree: PyTree, *rest: PyTree) -> PyTree:
    """Returns `tree` with `change(factors, *rest)` at each pair of factors.

    The last of the trees holds the parameters.
    """

    def of(node: PyTree, *others: PyTree) -> PyTree:
        if not isinstance(node, Trainable):
            return node
        params = (node, *others)[-1]
        lora = {
            path: change(own, *(other.lora[path] for other in others))
            if _is_pair(params.lora[path])
            else own
            for path, own in node.lora.items()
        }
        return Trainable(lora, node.full)

    return jax.tree.map(of, tree, *rest, is_leaf=is_trainable)


def _scales(spec: Spec) -> np.ndarray:
    """Returns the scale of each rank, `[rank]`; parts of a weight differ in scale."""
    if spec.parts is None:
        return np.full(spec.rank, spec.scale, np.float32)
    own = [spec.part_scale(rank) for rank in spec.parts.ranks if rank]
    return np.repeat(np.array(own, np.float32), [r for r in spec.parts.ranks if r])


def _divided(x: jax.Array, scales: np.ndarray) -> jax.Array:
    """Returns `x`, `[*batch, rank, rank]`, divided by the scales of both ranks."""
    return x / jnp.broadcast_to(np.outer(scales, scales).astype(x.dtype), x.shape)


def _gram_a(own: Factors) -> jax.Array:
    """Returns `Aᵀ A`, `[*batch, rank, rank]`, in float32; zero between parts."""
    batch, parts = len(own.spec.axes.batch), own.spec.parts
    gram = _gram(own.a, batch, range(batch, own.a.ndim - 1))
    if parts is None:
        return gram
    part = np.repeat(np.arange(len(parts.ranks)), parts.ranks)
    return jnp.where(np.equal.outer(part, part), gram, jnp.zeros_like(gram))


def _gram_b(own: Factors) -> jax.Array:
    """Returns `B Bᵀ`, `[*batch, rank, rank]`, in float32; zero between parts."""
    batch = len(own.spec.axes.batch)
    _, b = low_rank_pair(
        own
    )  # has the parts side by side, each scaled relative to `scale`
    gram = _gram(b, batch, range(batch + 1, b.ndim))
    return _divided(gram, _scales(own.spec) / np.float32(own.scale))


def _gram(x: jax.Array, batch: int, summed: range) -> jax.Array:
    x = whole(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return _product(x, x, (tuple(summed), tuple(summed)), batch)


def _inverse(gram: jax.Array, damping: ArrayLike) -> jax.Array:
    """Returns the pseudo-inverse of `gram + damping I`."""
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    eye = eye * jnp.asarray(damping).astype(gram.dtype)
    damped = gram + jnp.broadcast_to(eye, gram.shape)
    return jnp.linalg.pinv(damped, hermitian=True)


def _right(g_a: jax.Array, inverse: jax.Array, own: Factors) -> jax.Array:
    """Returns `g_A inverse`, `[*batch, *fan_in, rank]`, dtype of `g_a`."""
    batch = len(own.spec.axes.batch)
    axes = ((g_a.ndim - 1,), (batch,))

    def product(g_a: jax.Array, inverse: jax.Array) -> jax.Array:
        wide = g_a.astype(inverse.dtype)
        return _product(wide, inverse, axes, batch).astype(g_a.dtype)

    return typed_as(g_a, product, g_a, inverse)


def _left(inverse: jax.Array, g_b: jax.Array, own: Factors) -> jax.Array:
    """Returns `inverse g_B`, `[*batch, rank, *fan_out]`, dtype of `g_b`."""
    batch = len(own.spec.axes.batch)
    axes = ((batch + 1,), (batch,))

    def product(g_b: jax.Array, inverse: jax.Array) -> jax.Array:
        wide = g_b.astype(inverse.dtype)
        return _product(inverse, wide, axes, batch).astype(g_b.dtype)

    return typed_as(g_b, product, g_b, inverse)


def _product(
    x: jax.Array,
    y: jax.Array,
    summed: tuple[Sequence[int], Sequence[int]],
    batch: int,
) -> jax.Array:
    """Returns `x` times `y`, summed over `summed`, with `batch` leading batch axes."""
    leading = tuple(range(batch))
    return jax.lax.dot_general(
        x, y, (summed, (leading, leading)), precision=jax.lax.Precision.HIGHEST
    )
