"""MiniLM-L6, a BERT encoder, as a Flax Linen sentence classifier."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder, named as in its `config.json`."""

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    @classmethod
    def from_json(cls, text: str | bytes) -> "BertConfig":
        """Returns the sizes in a `config.json`; what else it holds is ignored."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in json.loads(text).items() if k in names})


def layer_norm(x: jax.Array, epsilon: float, name: str) -> jax.Array:
    """Returns `x` normalised in float32 by the layer `name` of the calling module."""
    y = nn.LayerNorm(epsilon=epsilon, name=name)(x.astype(jnp.float32))
    return y.astype(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention of every token to every token that is not padding."""

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        heads = self.config.num_attention_heads

        def project(name: str) -> jax.Array:
            y = nn.Dense(width, dtype=self.dtype, name=name)(x)
            return y.reshape(batch, length, heads, width // heads)

        query, key, value = project("query"), project("key"), project("value")
        scores = jnp.einsum(
            "bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32
        )
        scores = scores * (width // heads) ** -0.5
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        weights = nn.softmax(scores).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        mixed = mixed.reshape(batch, length, width)
        return nn.Dense(width, dtype=self.dtype, name="output")(mixed)


class Layer(nn.Module):
    """Attention, then a two-layer perceptron; the norm comes after each sum."""

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        config, dtype = self.config, self.dtype
        y = SelfAttention(config, dtype, name="attention")(x, mask)
        x = layer_norm(x + y, config.layer_norm_eps, "attention_norm")
        y = nn.Dense(config.intermediate_size, dtype=dtype, name="up")(x)
        y = nn.gelu(y, approximate=False)
        y = nn.Dense(config.hidden_size, dtype=dtype, name="down")(y)
        return layer_norm(x + y, config.layer_norm_eps, "output_norm")


class Embeddings(nn.Module):
    """The sum of word, position and token type embeddings, normalised."""

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        config = self.config

        def embed(count: int, name: str) -> nn.Embed:
            return nn.Embed(count, config.hidden_size, dtype=self.dtype, name=name)

        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        x = embed(config.vocab_size, "word")(ids)
        x = x + embed(config.max_position_embeddings, "position")(positions)
        x = x + embed(config.type_vocab_size, "token_type")(jnp.zeros_like(ids))
        return layer_norm(x, config.layer_norm_eps, "norm")


class Encoder(nn.Module):
    """The stack of layers."""

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        for index in range(self.config.num_hidden_layers):
            x = Layer(self.config, self.dtype, name=f"layer_{index}")(x, mask)
        return x


class SentenceClassifier(nn.Module):
    """MiniLM, the mean over tokens, and a linear head.

    Shapes: `N` sentences, `T` tokens, `D` hidden size, `C` classes. `dtype` is that
    of the computation; parameters, softmax and logits stay in float32.
    """

    config: BertConfig
    classes: int = 2
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config, self.dtype)
        self.encoder = Encoder(self.config, self.dtype)
        self.head = nn.Dense(self.classes)

    def embed(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the sentence embeddings, `[N, D]` float32, not normalised."""
        hidden = self.encoder(self.embeddings(ids), mask).astype(jnp.float32)
        kept = mask[:, :, None].astype(jnp.float32)
        return (hidden * kept).sum(1) / kept.sum(1)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the logits, `[N, C]` float32, of `[N, T]` ids and bool mask."""
        return self.head(self.embed(ids, mask))
