"""Two small models and five methods, for the properties that PEFT asks of all."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jlora

WORDS = WIDTH = 8  # one shape of kernels, so that little is compiled
IDS = jnp.array([[0, 3, 1, 7], [2, 2, 4, 6], [7, 5, 6, 1]])


class Language(nn.Module):
    """Next-word scores from words, or from their embeddings."""

    @nn.compact
    def __call__(self, ids=None, embeds=None):
        table = nn.Embed(WORDS, WIDTH, name="embed")
        x = table(ids) if embeds is None else embeds
        for i in range(2):
            x = x + jnp.tanh(nn.Dense(WIDTH, name=f"layers_{i}")(x))
        return nn.Dense(WORDS, name="head")(x)


def plain(params, ids=None, embeds=None):
    """The same in plain JAX, with layers in a list."""
    x = params["embed"]["embedding"][ids] if embeds is None else embeds
    for layer in params["layers"]:
        x = x + jnp.tanh(x @ layer["kernel"] + layer["bias"][None, None])
    head = params["head"]
    return x @ head["kernel"] + head["bias"][None, None]


def dense(rng, fan_in, fan_out):
    kernel, bias = rng.normal(size=(fan_in, fan_out)), rng.normal(size=fan_out)
    return {"kernel": jnp.float32(kernel / 2), "bias": jnp.float32(bias / 2)}


def plain_params():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(WORDS, WIDTH)), "float32")
    return {
        "embed": {"embedding": table},
        "layers": [dense(rng, WIDTH, WIDTH) for _ in range(2)],
        "head": dense(rng, WIDTH, WORDS),
    }


def linen_params():
    own = plain_params()
    first, second = own.pop("layers")
    return {"params": {**own, "layers_0": first, "layers_1": second}}


MODELS: dict[str, tuple[Callable[..., Any], Any]] = {
    "linen": (Language().apply, linen_params()),
    "plain": (plain, plain_params()),
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"method": "dora"},
    "vera": {"method": "vera"},
    "adalora": {"method": "adalora"},
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model with two trained adapters of one method, and what they compute."""

    model: str
    method: str

    @property
    def fn(self):
        return MODELS[self.model][0]

    @property
    def params(self):
        return MODELS[self.model][1]

    def config(self, **fields):
        own = {"rank": 2, "alpha": 4, "targets": "**/kernel", **METHODS[self.method]}
        return jlora.LoraConfig(**{**own, **fields})

    def split(self, seed=0, params=None, **fields):
        """Returns a plan, the frozen side and an adapter whose numbers are random."""
        params = self.params if params is None else params
        plan = jlora.plan(self.fn, params, IDS, config=self.config(**fields))
        frozen, trainable = jlora.split(jax.random.key(seed), params, plan)
        return plan, frozen, moved(trainable, seed)

    @functools.cached_property
    def parts(self):
        return self.split()

    @property
    def plan(self):
        return self.parts[0]

    @property
    def frozen(self):
        return self.parts[1]

    @property
    def own(self):
        """An adapter."""
        return self.parts[2]

    @functools.cached_property
    def other(self):
        """Another adapter of the same plan and seed, as VeRA's sums need."""
        return moved(self.parts[2], 5)

    @functools.cached_property
    def apply(self):
        return jax.jit(jlora.apply_lora(self.fn))

    def out(self, trainable, frozen=None):
        """Returns what the model with an adapter computes."""
        return self.apply(self.frozen if frozen is None else frozen, trainable, IDS)

    @functools.cached_property
    def rows(self):
        """The model with an adapter of its own for each row."""
        return jax.jit(jlora.adapters.per_row(self.fn))

    @functools.cached_property
    def stack(self):
        return jlora.adapters.stack([self.own, self.other])

    @functools.cached_property
    def jitted(self):
        return jax.jit(self.fn)

    @functools.cached_property
    def base(self):
        return self.jitted(self.params, IDS)

    @functools.cached_property
    def gradient(self):
        return jax.jit(jax.grad(self.loss, argnums=1))

    def loss(self, frozen, trainable, ids):
        return (jlora.apply_lora(self.fn)(frozen, trainable, ids) ** 2).sum()


def moved(trainable, seed):
    """Returns an adapter with its numbers moved at random, as by training."""
    rng = np.random.default_rng(seed + 100)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), trainable
    )


def differs(one, two, least=1e-3):
    """Returns whether two outputs are clearly not the same."""
    return float(jnp.abs(one - two).max()) > least


SETUPS = {(m, k): Setup(m, k) for m in MODELS for k in METHODS}
