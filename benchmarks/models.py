"""The models that are measured: small, self-contained, one function for each kind.

A model takes `at_input` and `at_first`, biases that are not part of it: added to its
input and to the outputs of its first linear layers. Training only one of them sends
gradients through every layer, but to no weight.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

Array = jax.Array
SIDE = "_lora_"  # in the names of the layers of a side path


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a model and its batch are; what a kind has no use for is ignored."""

    width: int = 512
    layers: int = 4
    batch: int = 4
    length: int = 128
    vocab: int = 1024
    head: int = 64
    dtype: str = "float32"

    @property
    def heads(self) -> int:
        """The number of attention heads, of `head` channels."""
        return max(self.width // self.head, 1)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as pure functions; nothing is allocated until one is called.

    Attributes:
      init: `(key) -> params`.
      apply: `(params, x, *, at_input=None, at_first=None) -> logits`.
      init_side: `(key, rank) -> side`, low-rank layers beside the linear ones.
      apply_side: `(params, side, x) -> logits`, written as one would by hand.
      batch: `(key) -> (x, targets)`.
      shift: shapes of the biases `at_input` and `at_first`.
    """

    init: Callable[[Array], Any]
    apply: Callable[..., Any]
    init_side: Callable[[Array, int], Any]
    apply_side: Callable[[Any, Any, Array], Any]
    batch: Callable[[Array], tuple[Array, Array]]
    shift: dict[str, jax.ShapeDtypeStruct]


def attention(q: Array, k: Array, v: Array, heads: int) -> Array:
    """Returns causal softmax attention of `[batch, length, width]` arrays."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return out.reshape(*out.shape[:2], -1)


def add(x: Array, shift: Array | None) -> Array:
    """Returns `x`, with `shift` added if there is one."""
    return x if shift is None else x + jnp.broadcast_to(shift, x.shape)


def linear(layer: Any, x: Array, features: int, name: str, rank: int) -> Array:
    """Returns `layer(x)`, plus a low-rank path left to autodiff if `rank` is not 0."""
    y = layer(features, name=name)(x)
    if not rank:
        return y
    thin = functools.partial(layer, param_dtype=jnp.float32)
    up = nn.Dense(
        features,
        use_bias=False,
        dtype=y.dtype,
        kernel_init=nn.initializers.zeros,
        name=f"{name}{SIDE}b",
    )
    return y + up(thin(rank, name=f"{name}{SIDE}a")(x))


class Block(nn.Module):
    """A pre-norm transformer block, with a gated feed-forward part if asked."""

    size: Size
    gated: bool
    rank: int

    @nn.compact
    def __call__(self, x: Array, at_first: Array | None) -> tuple[Array, None]:
        width, dtype = self.size.width, self.size.dtype
        dense = functools.partial(
            nn.Dense, use_bias=False, dtype=dtype, param_dtype=dtype
        )
        norm = functools.partial(nn.RMSNorm, dtype=dtype, param_dtype=dtype)
        h = norm(name="norm_1")(x)
        q, k, v = (
            add(linear(dense, h, width, name, self.rank), at_first) for name in "qkv"
        )
        a = attention(q, k, v, self.size.heads)
        x = x + linear(dense, a, width, "o", self.rank)
        h = norm(name="norm_2")(x)
        up = linear(dense, h, 4 * width, "up", self.rank)
        if self.gated:
            up = up * nn.silu(linear(dense, h, 4 * width, "gate", self.rank))
        else:
            up = nn.gelu(up)
        return x + linear(dense, up, width, "down", self.rank), None


class Decoder(nn.Module):
    """A decoder with a tied head; layers one by one, or scanned and rematerialised."""

    size: Size
    gated: bool = False
    scanned: bool = False
    remat: bool = True
    rank: int = 0

    @nn.compact
    def __call__(
        self, ids: Array, at_input: Array | None = None, at_first: Array | None = None
    ) -> Array:
        size = self.size
        embed = nn.Embed(
            size.vocab, size.width, dtype=size.dtype, param_dtype=size.dtype
        )
        place = self.param(
            "place", nn.initializers.normal(0.02), (size.length, size.width), size.dtype
        )
        x = add(embed(ids) + place[None], at_input)
        if self.scanned:  # one body: gradients reach the input of each layer anyhow
            block = nn.scan(
                nn.remat(Block, prevent_cse=False) if self.remat else Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=size.layers,
            )
            x, _ = block(size, self.gated, self.rank, name="layers")(
                add(x, at_first), None
            )
        else:
            for i in range(size.layers):
                block = Block(size, self.gated, self.rank, name=f"layer_{i}")
                x, _ = block(x, None if i else at_first)
        x = nn.RMSNorm(dtype=size.dtype, param_dtype=size.dtype, name="norm")(x)
        return embed.attend(x)


class ConvNet(nn.Module):
    """A residual convolution net on images of 8 × 8 pixels, stride 1."""

    size: Size
    rank: int = 0

    @nn.compact
    def __call__(
        self, x: Array, at_input: Array | None = None, at_first: Array | None = None
    ) -> Array:
        width, dtype = self.size.width, self.size.dtype
        conv = functools.partial(
            nn.Conv,
            kernel_size=(3, 3),
            use_bias=False,
            dtype=dtype,
            param_dtype=dtype,
        )
        norm = functools.partial(nn.LayerNorm, dtype=dtype, param_dtype=dtype)
        x = linear(conv, add(x, at_input), width, "stem", self.rank)
        x = add(x, at_first)
        for i in range(self.size.layers):
            h = nn.relu(norm(name=f"norm_{i}_1")(x))
            h = linear(conv, h, width, f"conv_{i}_1", self.rank)
            h = nn.relu(norm(name=f"norm_{i}_2")(h))
            x = x + linear(conv, h, width, f"conv_{i}_2", self.rank)
        x = norm(name="norm")(x).mean((1, 2))
        return nn.Dense(self.size.vocab, dtype=dtype, param_dtype=dtype, name="head")(x)


class NnxBlock(nnx.Module):
    """`Block` in NNX; `rank` makes its layers `nnx.LoRALinear`, left to autodiff."""

    def __init__(self, size: Size, rank: int, rngs: nnx.Rngs) -> None:
        width, dtype = size.width, jnp.dtype(size.dtype)
        kwargs = {"use_bias": False, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        if rank:
            dense = functools.partial(
                nnx.LoRALinear,
                lora_rank=rank,
                lora_dtype=dtype,
                lora_param_dtype=jnp.float32,
            )
        else:
            dense = nnx.Linear
        norm = functools.partial(
            nnx.RMSNorm, width, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.heads = size.heads
        self.norm_1, self.norm_2 = norm(), norm()
        self.q, self.k, self.v, self.o = (
            dense(width, width, **kwargs) for _ in range(4)
        )
        self.up = dense(width, 4 * width, **kwargs)
        self.down = dense(4 * width, width, **kwargs)

    def __call__(self, x: Array, at_first: Array | None) -> Array:
        h = self.norm_1(x)
        q, k, v = (add(layer(h), at_first) for layer in (self.q, self.k, self.v))
        x = x + self.o(attention(q, k, v, self.heads))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class NnxDecoder(nnx.Module):
    """`Decoder` in NNX, with layers one by one."""

    def __init__(self, size: Size, rank: int, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(size.dtype)
        kwargs = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(size.vocab, size.width, **kwargs)
        place = 0.02 * jax.random.normal(rngs.params(), (size.length, size.width))
        self.place = nnx.Param(place.astype(dtype))
        self.layers = nnx.List([NnxBlock(size, rank, rngs) for _ in range(size.layers)])
        self.norm = nnx.RMSNorm(size.width, **kwargs)

    def __call__(
        self, ids: Array, at_input: Array | None = None, at_first: Array | None = None
    ) -> Array:
        x = add(self.embed(ids) + self.place[...][None], at_input)
        for i, layer in enumerate(self.layers):
            x = layer(x, None if i else at_first)
        return self.embed.attend(self.norm(x))


def tokens(size: Size, key: Array) -> tuple[Array, Array]:
    """Returns token ids and the ones to predict, `[batch, length]`."""
    ids = jax.random.randint(key, (size.batch, size.length + 1), 0, size.vocab)
    return ids[:, :-1], ids[:, 1:]


def images(size: Size, key: Array) -> tuple[Array, Array]:
    """Returns images with as many pixels as there are tokens, and classes."""
    n = max(size.batch * size.length // 64, 1)
    x = jax.random.normal(key, (n, 8, 8, 3)).astype(size.dtype)
    return x, jax.random.randint(key, (n,), 0, size.vocab)


def linen_model(
    module: Callable[..., nn.Module],
    batch: Callable[[Array], tuple[Array, Array]],
    shift: dict[str, jax.ShapeDtypeStruct],
) -> Model:
    """Returns the model of a Linen module that takes a `rank`."""

    def init(key: Array) -> Any:
        return module().init(key, batch(key)[0])

    def init_side(key: Array, rank: int) -> Any:
        every = flatten_dict(module(rank=rank).init(key, batch(key)[0]))
        return unflatten_dict({k: v for k, v in every.items() if SIDE in str(k)})

    def apply_side(params: Any, side: Any, x: Array) -> Any:
        every: dict[Any, Any] = flatten_dict(params) | flatten_dict(side)
        (a, *_) = (v for k, v in every.items() if f"{SIDE}a" in str(k))
        return module(rank=a.shape[-1]).apply(unflatten_dict(every), x)

    return Model(init, module().apply, init_side, apply_side, batch, shift)


def shifts(at_input: int, at_first: int, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the two biases."""
    shape = jax.ShapeDtypeStruct
    sizes = {"at_input": at_input, "at_first": at_first}
    return {name: shape((n,), dtype) for name, n in sizes.items()}


def linen(size: Size, **options: bool) -> Model:
    """Returns a decoder in Flax Linen."""
    return linen_model(
        functools.partial(Decoder, size, **options),
        functools.partial(tokens, size),
        shifts(size.width, size.width, size.dtype),
    )


def conv(size: Size) -> Model:
    """Returns a convolution net in Flax Linen."""
    return linen_model(
        functools.partial(ConvNet, size),
        functools.partial(images, size),
        shifts(3, size.width, size.dtype),
    )


def scanned(size: Size) -> Model:
    """Returns a gated decoder whose layers are scanned and rematerialised."""
    return linen(size, gated=True, scanned=True)


def nnx_decoder(size: Size) -> Model:
    """Returns a decoder in Flax NNX; its side path is `nnx.LoRALinear`."""

    def build(key: Array, rank: int = 0) -> NnxDecoder:
        return NnxDecoder(size, rank, nnx.Rngs(params=key))

    def structure(rank: int) -> Any:
        return nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0), rank)))

    base = structure(0)

    def init(key: Array) -> Any:
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    def init_side(key: Array, rank: int) -> Any:
        return nnx.state(build(key, rank), nnx.LoRAParam)

    def apply(params: Any, x: Array, **shift: Array | None) -> Array:
        return nnx.merge(base, nnx.State(params))(x, **shift)

    def apply_side(params: Any, side: Any, x: Array) -> Array:
        rank = side["layers"][0]["q"]["lora"]["lora_a"][...].shape[-1]
        return nnx.merge(structure(rank), nnx.State(params), side)(x)

    return Model(
        init,
        apply,
        init_side,
        apply_side,
        functools.partial(tokens, size),
        shifts(size.width, size.width, size.dtype),
    )


KINDS: dict[str, Callable[[Size], Model]] = {
    "linen": linen,
    "nnx": nnx_decoder,
    "scan": scanned,
    "conv": conv,
}
