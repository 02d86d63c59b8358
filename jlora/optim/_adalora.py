"""AdaLoRA's training: singular values pruned by importance under a budget."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import check_optimizer, check_params, check_positive
from ..errors import ConfigError, TreeError
from ..factors import Factors
from ..quantised import typed_as, whole

if TYPE_CHECKING:
    import optax


class RankBudgetState(NamedTuple):
    """State of `adalora`.

    Attributes:
      inner: state of the wrapped optimizer.
      step: how many updates were made.
      sensitivity: running mean of `|parameter * gradient|`, like each `Factors`.
      uncertainty: running mean of how far a step's sensitivity is from that mean.
      kept: for each `Factors` which singular values are kept, `[*batch, rank]`.

    Examples:
      >>> import numpy as np, optax, jlora
      >>> from jlora.factors import Factors, Spec
      >>> spec = Spec(rank=2, alpha=2, method="adalora")
      >>> own = Factors(np.eye(3, 2), np.eye(2, 4), spec, np.ones(2))
      >>> tx = jlora.optim.adalora(optax.sgd(1.0), target_rank=1, steps=10)
      >>> tx.init(jlora.Trainable({"w": own})).kept
      [Array([ True,  True], dtype=bool)]
    """

    inner: Any
    step: jax.Array
    sensitivity: list[Factors]
    uncertainty: list[Factors]
    kept: list[jax.Array]


def adalora(
    tx: "optax.GradientTransformation",
    *,
    target_rank: float,
    steps: int,
    warmup: int = 0,
    final: int = 0,
    every: int = 1,
    sensitivity_decay: float = 0.85,
    uncertainty_decay: float = 0.85,
) -> "optax.GradientTransformationExtraArgs":
    """Returns `tx` that also prunes singular values of `method="adalora"` adapters.

    After each update the singular values with the least importance, over all adapted
    weights together, are set to zero, so that a budget of them is left. The budget
    falls as a cubic from all of them to `target_rank` a weight; those pruned on the way
    may come back, until the last `final` steps, in which the choice stands. Importance
    is that of the singular value and the means over its two singular vectors, each a
    product of sensitivity and its uncertainty, as in the paper and in PEFT.

    Args:
      tx: any optax optimizer.
      target_rank: how many singular values a weight keeps on average; a stacked weight
        counts as many weights as it has layers.
      steps: how many steps the training takes.
      warmup: steps before the budget begins to fall.
      final: steps at the end with the budget at its target.
      every: prune at every so many steps.
      sensitivity_decay: of the running mean of sensitivity, β1.
      uncertainty_decay: of the running mean of uncertainty, β2.

    Raises:
      ConfigError: for numbers that cannot work, or if `tx` is not an optimizer.
      TreeError: (from `init`) if no factors of the method `"adalora"` are in the tree,
        or a mask parts them.
      ConfigError: (from `update`) without `params`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, jlora
      >>> params = {"w": jnp.ones((8, 8))}
      >>> fn = lambda p, x: x @ p["w"]
      >>> config = jlora.LoraConfig(rank=4, method="adalora")
      >>> plan = jlora.plan(fn, params, jnp.ones((1, 8)), config=config)
      >>> _, trainable = jlora.split(jax.random.key(0), params, plan)
      >>> tx = jlora.optim.adalora(optax.adam(1e-2), target_rank=2, steps=2, final=1)
      >>> state = tx.init(trainable)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(2):
      ...     gradient = jax.tree.map(jnp.ones_like, trainable)
      ...     updates, state = update(gradient, state, trainable)
      ...     trainable = optax.apply_updates(trainable, updates)
      >>> int((trainable.lora["w"].magnitude != 0).sum())
      2

    References:
      Zhang et al., 2023, AdaLoRA, https://arxiv.org/abs/2303.10512
    """
    import optax

    check_optimizer("optim.adalora", tx)
    if not (warmup >= 0 and final >= 0 and warmup + final <= steps and every > 0):
        raise ConfigError(
            f"adalora: warmup {warmup} and final {final} must fit in {steps} steps, "
            f"and every must be positive, got {every}."
        )
    check_positive(target_rank=target_rank)
    optimizer = optax.with_extra_args_support(tx)
    schedule = _Schedule(target_rank, steps, warmup, final, every)

    def init(params: Any) -> Any:
        factors = _checked(_adaptive(params))
        zeros = [jax.tree.map(jnp.zeros_like, f) for f in factors]
        kept = [jnp.ones(f.magnitude.shape, bool) for f in factors]
        count = jnp.zeros((), jnp.int32)
        return RankBudgetState(optimizer.init(params), count, zeros, zeros, kept)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        check_params("adalora", params)
        gradient = _adaptive(updates)
        updates, inner = optimizer.update(updates, state.inner, params, **extra)
        count = state.step + 1
        moved = jax.tree.map(
            lambda p, u: p + u.astype(p.dtype), _adaptive(params), _adaptive(updates)
        )
        now = jax.tree.map(lambda p, g: jnp.abs(p * g.astype(p.dtype)), moved, gradient)
        # The last choice goes by the importance before its step, as in PEFT.
        mean, spread = jax.tree.map(
            lambda new, old: jnp.where(count < schedule.last, new, old),
            _running_means(state, now, sensitivity_decay, uncertainty_decay),
            (state.sensitivity, state.uncertainty),
        )
        scores = [
            _importance(jax.tree.map(lambda m, u: m * u, *pair))
            for pair in zip(mean, spread, strict=True)
        ]
        chosen = _keep(scores, schedule.budget(count, scores))
        falling = schedule.falls(count)
        kept = [
            jnp.where(falling | (count == schedule.last), new, old)
            for new, old in zip(chosen, state.kept, strict=True)
        ]
        pruning = falling | (count >= schedule.last)
        updates = _pruned(params, updates, [mask | ~pruning for mask in kept])
        return updates, RankBudgetState(inner, count, mean, spread, kept)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """When `adalora` prunes, and how many singular values it keeps by then."""

    target_rank: float
    steps: int
    warmup: int
    final: int
    every: int

    @property
    def last(self) -> int:
        """The step at which the choice is made for good."""
        return self.steps - self.final

    def falls(self, count: jax.Array) -> jax.Array:
        """Returns whether the budget falls, and a choice is made, at step `count`."""
        return (count > self.warmup) & (count < self.last) & (count % self.every == 0)

    def budget(self, count: jax.Array, scores: Sequence[jax.Array]) -> jax.Array:
        """Returns how many singular values are kept at step `count`: a cubic fall."""
        total = sum(s.size for s in scores)
        kept = self.target_rank * sum(s.size / s.shape[-1] for s in scores)
        target = min(kept, total)
        length = max(self.last - self.warmup, 1)
        left = jnp.clip(1 - (count - self.warmup) / length, 0, 1)
        return jnp.floor((total - target) * left**3 + target).astype(jnp.int32)


def _running_means(
    state: "RankBudgetState", now: Any, decay: float, spread_decay: float
) -> tuple[Any, Any]:
    """Returns the running means of the sensitivity `now`, and of its spread."""
    mean = jax.tree.map(
        lambda m, x: decay * m + (1 - decay) * x, state.sensitivity, now
    )
    spread = jax.tree.map(
        lambda u, x, m: spread_decay * u + (1 - spread_decay) * jnp.abs(x - m),
        state.uncertainty,
        now,
        mean,
    )
    return mean, spread


def _checked(factors: list[Factors]) -> list[Factors]:
    """Returns the factors to prune, or raises if there are none or some are masked."""
    if not factors:
        raise TreeError(
            "adalora found no factors of its method. Give LoraConfig method='adalora', "
            "and this optimizer the trainable side."
        )
    if any(len(jax.tree.leaves(f)) < 3 for f in factors):
        raise TreeError(
            "adalora needs A, B and the singular values together, but sees only some "
            "of them. Give all three one label in optax.multi_transform or "
            "optax.masked."
        )
    return factors


def _pruned(params: Any, updates: Any, masks: list[jax.Array]) -> Any:
    """Returns updates that make each singular value zero where its mask is False."""
    own = iter(masks)

    def prune(params: Any, updates: Any) -> Any:
        if not _is_adaptive(params):
            return updates
        old, new = params.magnitude, updates.magnitude
        magnitude = typed_as(old, jnp.where, next(own), new, -old)
        return dataclasses.replace(updates, magnitude=magnitude)

    return jax.tree.map(prune, params, updates, is_leaf=_is_adaptive)


def orthogonality_penalty(trainable: Any) -> jax.Array:
    """Returns how far singular vectors are from orthonormal: the mean of `‖AᵀA − I‖`.

    Add it to the loss of `method="adalora"`, times 0.5 as in PEFT: pruning singular
    values makes sense as long as A and B hold singular vectors. The mean goes over the
    A and B of all adapted weights, of the Frobenius norms of `AᵀA − I` and `BBᵀ − I`.

    Args:
      trainable: a `Trainable`, or any pytree that holds `Factors`; those of other
        methods do not count.

    Returns:
      A scalar, dtype of the factors; zero without factors of the method.

    Examples:
      >>> import jax, numpy as np
      >>> from jlora.factors import Factors, Spec
      >>> spec = Spec(rank=2, alpha=2, method="adalora")
      >>> a, b = np.eye(3, 2, dtype=np.float32), np.eye(2, 4, dtype=np.float32)
      >>> jax.jit(orthogonality_penalty)([Factors(a, b, spec, np.ones(2))])
      Array(0., dtype=float32)

    References:
      Zhang et al., 2023, AdaLoRA, equation 4, https://arxiv.org/abs/2303.10512
    """
    distances = []
    for f in _adaptive(trainable):
        n_batch = len(f.spec.axes.batch)
        batch, rank = f.a.shape[:n_batch], f.rank
        a, b = whole(f.a), whole(f.b)
        a = jnp.swapaxes(a.reshape(*batch, -1, rank), -1, -2)
        for x in (a, b.reshape(*batch, rank, -1)):
            gram = jnp.matmul(x, jnp.swapaxes(x, -1, -2))
            identity = jnp.broadcast_to(jnp.eye(rank, dtype=x.dtype), gram.shape)
            squares = jnp.sum(jnp.square(gram - identity), axis=(-1, -2))
            is_zero = squares == 0  # where the norm has no derivative
            norm = jnp.sqrt(jnp.where(is_zero, jnp.ones_like(squares), squares))
            distances.append(jnp.where(is_zero, jnp.zeros_like(norm), norm).ravel())
    return jnp.mean(jnp.concatenate(distances)) if distances else jnp.zeros(())


def _is_adaptive(x: Any) -> bool:
    """Returns whether `x` is factors of the method, with leaves that no mask took."""
    is_method = isinstance(x, Factors) and x.spec.method == "adalora"
    return is_method and bool(jax.tree.leaves(x))


def _adaptive(tree: Any) -> list[Factors]:
    """Returns the factors of the method in `tree`, in its order."""
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_adaptive) if _is_adaptive(x)]


def _importance(score: Factors) -> jax.Array:
    """Returns the importance of each singular value, `[*batch, rank]`."""
    n_batch = len(score.spec.axes.batch)
    of_a = jnp.mean(score.a, axis=tuple(range(n_batch, score.a.ndim - 1)))
    of_b = jnp.mean(score.b, axis=tuple(range(n_batch + 1, score.b.ndim)))
    return score.magnitude + of_a + of_b


def _keep(scores: list[jax.Array], budget: jax.Array) -> list[jax.Array]:
    """Returns for each score whether it is among the `budget` highest of all."""
    flat = jnp.concatenate([whole(s).ravel() for s in scores])
    order = jnp.argsort(-flat)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=order.dtype))
    kept = rank < budget.astype(order.dtype)
    ends = np.cumsum([s.size for s in scores])[:-1]
    parts = jnp.split(kept, ends)
    return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]
