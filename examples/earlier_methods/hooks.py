"""Where a method may reach into a layer; a model calls each hook once a layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Params = dict[str, Any]


def _same(x: Array) -> Array:
    return x


def _both(k: Array, v: Array) -> tuple[Array, Array]:
    return k, v


class Hooks(NamedTuple):
    """What one layer does beside its own arithmetic; by default nothing.

    Shapes: `B` rows, `T` tokens, `H` heads of width `K`, `D` width, `F` hidden width.

    Attributes:
      keys_values: of `[B, T, H, K]` keys and values; tokens may be put before them.
      attention: of what attention adds to the stream, `[B, T, D]`.
      hidden: of the hidden activations of the perceptron, `[B, T, F]`.
      mlp: of what the perceptron adds to the stream, `[B, T, D]`.
    """

    keys_values: Callable[[Array, Array], tuple[Array, Array]] = _both
    attention: Callable[[Array], Array] = _same
    hidden: Callable[[Array], Array] = _same
    mlp: Callable[[Array], Array] = _same


class Extra(NamedTuple):
    """What a method adds to a model, all of it trained.

    Attributes:
      layers: a tree whose leaves have a first axis for the layer, or None.
      hooks: makes the hooks of one layer of its slice of `layers`.
      prompt: `[P, D]` vectors that go before those of the input, or None.
    """

    layers: Any = None
    hooks: Callable[[Any], Hooks] = lambda own: Hooks()
    prompt: Array | None = None

    def prompted(self, x: Array, mask: Array) -> tuple[Array, Array]:
        """Returns the stream `[B, T, D]` and its mask with the prompt before them."""
        if self.prompt is None:
            return x, mask
        before = jnp.broadcast_to(self.prompt, (len(x), *self.prompt.shape))
        x = jnp.concatenate([before.astype(x.dtype), x], axis=1)
        return x, prepended(mask, len(self.prompt))


NOTHING = Extra()


def prepended(mask: Array, count: int) -> Array:
    """Returns the mask with `count` tokens more, all seen, before the others."""
    return jnp.pad(mask, ((0, 0), (count, 0)), constant_values=True)


Block = Callable[[Array, Array, Params, Hooks, int], Array]


def through(
    block: Block,
    layers: Params,
    x: Array,
    mask: Array,
    *,
    heads: int,
    extra: Extra = NOTHING,
) -> Array:
    """Returns the stream after stacked `layers`, with the tokens of a prompt first."""
    x, mask = extra.prompted(x, mask)

    def body(x: Array, own: tuple[Params, Params]) -> tuple[Array, None]:
        layer, added = own
        return block(x, mask, layer, extra.hooks(added), heads), None

    return jax.lax.scan(body, x, (layers, extra.layers))[0]
