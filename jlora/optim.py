"""Glue to optax: which leaves are trained, and optimizers that keep state for those."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ._checks import check_positive
from .factors import Factors, Trainable

if TYPE_CHECKING:
    import optax

Label = str  # "a", "b", "magnitude", "full" or "frozen"


def labels(tree: Any) -> Any:
    """Returns `tree` with the name of its role at each leaf, for optax's partitions.

    Args:
      tree: a `Trainable`, or any pytree that holds some, as
        `{"frozen": frozen, "trainable": trainable}`.

    Returns:
      A tree of the same structure; leaves of `Trainable`s are `"a"`, `"b"`,
      `"magnitude"` or `"full"`, all others `"frozen"`.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> head = jlora.Trainable(full={"head": jnp.ones(2)})
      >>> labels({"base": {"w": jnp.ones(2)}, "trained": head})
      {'base': {'w': 'frozen'}, 'trained': Trainable(lora={}, full={'head': 'full'})}
    """

    def of_factors(factors: Factors) -> Factors:
        named = Factors("a", "b", factors.spec, "magnitude")
        return jax.tree.map(lambda _, name: name, factors, _prune(named, factors))

    def of(node: Any) -> Any:
        if not isinstance(node, Trainable):
            return "frozen"
        return Trainable(
            {path: of_factors(factors) for path, factors in node.lora.items()},
            {path: jax.tree.map(lambda _: "full", x) for path, x in node.full.items()},
        )

    return jax.tree.map(of, tree, is_leaf=_is_trainable)


def _prune(named: Factors, factors: Factors) -> Factors:
    """Returns `named` without the leaves that `factors` does not have."""
    a = None if factors.a is None else named.a
    magnitude = None if factors.magnitude is None else named.magnitude
    return Factors(a, named.b, named.spec, magnitude)


def mask(tree: Any) -> Any:
    """Returns `tree` with True at the leaves that are trained and False at all others.

    Args:
      tree: a `Trainable`, or any pytree that holds some.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> mask({"w": jnp.ones(2), "t": jlora.Trainable(full={"head": jnp.ones(2)})})
      {'t': Trainable(lora={}, full={'head': True}), 'w': False}
    """
    return jax.tree.map(lambda label: label != "frozen", labels(tree))


NO_DECAY = ("b", "beta", "bias", "gain", "gamma", "offset", "scale")


def decay_mask(tree: Any) -> Any:
    """Returns `tree` with True at the leaves that weight decay may shrink.

    Those are the factors, and matrices trained in full. Not decayed are magnitudes,
    factors that are vectors (VeRA), leaves trained in full that have fewer than two
    axes, and biases and norms by name, since stacked layers and attention heads give
    them more axes: the last component of the path ends in `bias`, or is `b`, `beta`,
    `gain`, `gamma`, `offset` or `scale`, or a component contains `norm`. Frozen leaves
    are False too.

    Args:
      tree: a `Trainable`, or any pytree that holds some.

    Examples:
      >>> import jax.numpy as jnp, optax, jlora
      >>> heads = {"head/kernel": jnp.ones((2, 2)), "q/bias": jnp.ones((2, 2))}
      >>> decay_mask(jlora.Trainable(full=heads)).full
      {'head/kernel': True, 'q/bias': False}
      >>> tx = optax.adamw(1e-3, weight_decay=0.1, mask=jlora.decay_mask)
    """

    def of_factors(factors: Factors) -> Factors:
        decays = factors.spec.method != "vera"
        answers = jax.tree.map(lambda _: decays, factors)
        if factors.magnitude is None:
            return answers
        return dataclasses.replace(answers, magnitude=False)

    def of_full(path: str, leaf: Any) -> Any:
        *outer, last = path.lower().split("/")
        named = last in NO_DECAY or last.endswith("bias")
        named = named or any("norm" in part for part in (*outer, last))
        return jax.tree.map(lambda x: not named and x.ndim >= 2, leaf)

    def of(node: Any) -> Any:
        if not isinstance(node, Trainable):
            return False
        return Trainable(
            {path: of_factors(factors) for path, factors in node.lora.items()},
            {path: of_full(path, leaf) for path, leaf in node.full.items()},
        )

    return jax.tree.map(of, tree, is_leaf=_is_trainable)


def lora_plus(
    tx: "optax.GradientTransformation",
    *,
    ratio: float = 16.0,
    embedding_ratio: float = 1.0,
) -> "optax.GradientTransformationExtraArgs":
    """Returns `tx` with a larger learning rate for B than for A.

    Updates of B (and of magnitudes, and of vectors trained in full, as in PEFT) are
    multiplied by `ratio`. For every optimizer whose update is proportional to its
    learning rate (SGD, Adam, AdamW with its decay) that is a learning rate `ratio`
    times as large. `tx` may have a schedule.

    Args:
      tx: any optax transformation, whose learning rate is that of A.
      ratio: the learning rate of B over that of A.
      embedding_ratio: multiplies the updates of both factors of an embedding table, in
        place of `ratio`. PEFT's default is a fixed learning rate of 1e-6, which is
        `1e-6 / learning_rate` here.

    Raises:
      ConfigError: if a ratio is not a positive number.

    Examples:
      >>> import jax.numpy as jnp, optax, jlora
      >>> from jlora.factors import Factors, Spec
      >>> own = Factors(jnp.ones((3, 1)), jnp.ones((1, 2)), Spec(rank=1, alpha=1))
      >>> t = jlora.Trainable({"w": own})
      >>> tx = jlora.lora_plus(optax.sgd(0.5), ratio=4)
      >>> updates, _ = tx.update(t, tx.init(t), t)
      >>> float(updates.lora["w"].a[0, 0]), float(updates.lora["w"].b[0, 0])
      (-0.5, -2.0)

    References:
      Hayou et al., 2024, LoRA+, https://arxiv.org/abs/2402.12354
    """
    import optax

    check_positive(ratio=ratio, embedding_ratio=embedding_ratio)

    def times(x: Any, factor: Any) -> Any:
        return x * jnp.asarray(factor).astype(x.dtype)

    def factors(own: Factors) -> Factors:
        if own.spec.op == "embedding":
            return jax.tree.map(lambda x: times(x, embedding_ratio), own)
        fast = dataclasses.replace(own, a=None)
        fast = jax.tree.map(lambda x: times(x, ratio), fast)
        return dataclasses.replace(fast, a=own.a)

    def scale(node: Any) -> Any:
        if not isinstance(node, Trainable):
            return node
        full = {
            path: jax.tree.map(lambda x: times(x, ratio) if x.ndim < 2 else x, leaf)
            for path, leaf in node.full.items()
        }
        return Trainable({path: factors(own) for path, own in node.lora.items()}, full)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, state = inner.update(updates, state, params, **extra)
        return jax.tree.map(scale, updates, is_leaf=_is_trainable), state

    inner = optax.with_extra_args_support(tx)
    return optax.GradientTransformationExtraArgs(inner.init, update)


def _is_trainable(node: Any) -> bool:
    return isinstance(node, Trainable)


def masked(
    tx: "optax.GradientTransformation",
) -> "optax.GradientTransformationExtraArgs":
    """Returns `tx` for trees that hold the frozen side too, as in Flax's `TrainState`.

    Optimizer state exists for the leaves of `Trainable`s alone, `tx` sees their
    gradients alone (a global norm is theirs), and `optax.apply_updates` leaves every
    other leaf bit for bit as it was, weight decay or not (outside `jax.jit` XLA may
    flush a subnormal number to zero). Under one `jax.jit` the gradients of frozen
    leaves are never computed. Put `optax.MultiSteps` inside.

    Args:
      tx: any optax transformation, chains, schedules and `optax.MultiSteps` included.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, jlora
      >>> params = {
      ...     "frozen": {"w": jnp.ones(4)},
      ...     "trainable": jlora.Trainable(full={"head": jnp.ones(2)}),
      ... }
      >>> tx = jlora.masked(optax.adamw(1e-3))
      >>> state = tx.init(params)
      >>> [x.size for x in jax.tree.leaves(state)]  # count, and two moments of the head
      [1, 2, 2]
    """
    import optax

    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    inner = optax.masked(tx, mask)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, state = inner.update(updates, state, params, **extra)
        like = updates if params is None else params
        updates = jax.tree.map(
            lambda trained, u, p: u if trained else _nothing(p),
            mask(updates),
            updates,
            like,
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _nothing(leaf: Any) -> Any:
    """Returns what leaves the bits of any number alone when added: minus zero."""
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return -jnp.zeros_like(leaf)
    return jnp.zeros_like(leaf)
