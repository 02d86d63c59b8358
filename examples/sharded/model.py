"""A decoder with random weights on a mesh, and A and B beside them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jlora
from examples.chat.model import DecoderConfig, forward, init, shapes

from .config import Options
from .layout import batch_sharding, layout


class Model(NamedTuple):
    """A decoder that lies on a mesh.

    Attributes:
      fn: `(params, tokens) -> logits`.
      params: the parameters, perhaps quantised.
      places: a sharding for each leaf, as it was before it was quantised.
      plan: what is adapted.
    """

    fn: Callable[..., jax.Array]
    params: Any
    places: Any
    plan: jlora.Plan


def make_model(options: Options, mesh: Mesh) -> Model:
    """Returns a decoder of random weights; each device makes only its part of them."""
    sizes = DecoderConfig(
        vocab=options.vocab,
        width=options.width,
        hidden=options.hidden,
        layers=options.layers,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head=options.width // options.heads,
        scan=True,
        remat=True,
    )
    places = layout(shapes(sizes, options.dtype), mesh)
    make = jax.jit(init, static_argnums=(1, 2), out_shardings=places)
    params = make(jax.random.key(options.seed), sizes, options.dtype)
    rows = batch_sharding(mesh)

    def stream(x: jax.Array) -> jax.Array:
        """Keeps each row of the batch on its devices from layer to layer."""
        return jax.lax.with_sharding_constraint(x, rows)

    fn = functools.partial(forward, config=sizes, stream=stream)
    config = jlora.LoraConfig(
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        train="lm_head/kernel",  # a random head has nothing to say yet
    )
    tokens = jax.ShapeDtypeStruct((options.batch, options.length), jnp.int32)
    plan = jlora.plan(fn, params, tokens, config=config)
    if options.quantize != "none":
        params = jlora.quantize(params, plan, kind=options.quantize)
        plan = jlora.plan(fn, params, tokens, config=config)
    return Model(fn, params, places, plan)


def split(
    model: Model, *, seed: int, spread: bool
) -> tuple[Any, jlora.Trainable, jlora.Trainable]:
    """Returns the frozen side, the adapter, and a sharding for each of its leaves.

    Under `jax.jit`, each device makes its part of A and B. The parameters are donated:
    their arrays become those of the frozen side, and nothing is copied.
    """
    fn, key = functools.partial(jlora.split, plan=model.plan), jax.random.key(seed)
    _, like = jax.eval_shape(fn, key, model.params)
    own = jlora.shardings(model.places, like, spread=spread)
    on_mesh = jax.jit(fn, donate_argnums=1, out_shardings=(None, own))
    return *on_mesh(key, model.params), own
