"""LoRA+: a higher learning rate for B."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._checks import check_optimizer, check_positive
from ..factors import Factors, PyTree, Trainable
from ._labels import check_trainables, is_trainable

if TYPE_CHECKING:
    import optax


def lora_plus(
    tx: "optax.GradientTransformation",
    *,
    ratio: float = 16.0,
    embedding_ratio: float = 1.0,
) -> "optax.GradientTransformationExtraArgs":
    """Returns `tx` with a larger learning rate for B than for A.

    Updates of B are multiplied by `ratio`. So are those of magnitudes and of vectors
    trained in full, as in PEFT. If the update of `tx` is proportional to its learning
    rate (SGD, Adam, AdamW with its decay), this is the same as a learning rate `ratio`
    times as large. `tx` may have a schedule.

    Args:
      tx: any optax transformation, whose learning rate is that of A.
      ratio: the learning rate of B divided by that of A.
      embedding_ratio: in place of `ratio`, the multiplier of the updates of both
        factors of an embedding table. PEFT's default is a fixed learning rate of 1e-6,
        which is `1e-6 / learning_rate` here.

    Raises:
      ConfigError: if a ratio is not a positive number, or `tx` is not an optimizer.
      TreeError: (from `update`) if there is no `Trainable` in the tree.

    Examples:
      >>> import jax.numpy as jnp, optax, jlora
      >>> from jlora.factors import Factors, Spec
      >>> own = Factors(jnp.ones((3, 1)), jnp.ones((1, 2)), Spec(rank=1, alpha=1))
      >>> t = jlora.Trainable({"w": own})
      >>> tx = jlora.optim.lora_plus(optax.sgd(0.5), ratio=4)
      >>> updates, _ = tx.update(t, tx.init(t), t)
      >>> float(updates.lora["w"].a[0, 0]), float(updates.lora["w"].b[0, 0])
      (-0.5, -2.0)

    References:
      Hayou et al., 2024, LoRA+, https://arxiv.org/abs/2402.12354
    """
    import optax

    check_positive(ratio=ratio, embedding_ratio=embedding_ratio)
    check_optimizer("optim.lora_plus", tx)

    def times(x: jax.Array, factor: ArrayLike) -> jax.Array:
        return x * jnp.asarray(factor).astype(x.dtype)

    def factors(own: Factors) -> Factors:
        if own.spec.op == "embedding":
            return jax.tree.map(lambda x: times(x, embedding_ratio), own)
        fast = dataclasses.replace(own, a=None)
        fast = jax.tree.map(lambda x: times(x, ratio), fast)
        return dataclasses.replace(fast, a=own.a)

    def scale(node: PyTree) -> PyTree:
        if not isinstance(node, Trainable):
            return node
        full = {
            path: jax.tree.map(lambda x: times(x, ratio) if x.ndim < 2 else x, leaf)
            for path, leaf in node.full.items()
        }
        return Trainable({path: factors(own) for path, own in node.lora.items()}, full)

    def update(
        updates: "optax.Updates",
        state: "optax.OptState",
        params: "optax.Params | None" = None,
        **extra: Any,
    ) -> tuple["optax.Updates", "optax.OptState"]:
        check_trainables("lora_plus", updates)
        updates, state = inner.update(updates, state, params, **extra)
        return jax.tree.map(scale, updates, is_leaf=is_trainable), state

    inner = optax.with_extra_args_support(tx)
    return optax.GradientTransformationExtraArgs(inner.init, update)
