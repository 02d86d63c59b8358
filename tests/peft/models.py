"""Models with golden PEFT files: the functions, their weights, what torch gives."""

import contextlib
import dataclasses
import functools
import importlib
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora._io.shards import read_header
from jlora.peft import Entry, NameMap, maps

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "peft"


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model with its weights, and what the golden files say it gives."""

    fn: Callable[..., Any]
    params: Any
    names: NameMap
    inputs: dict[str, jax.Array]
    outputs: dict[str, np.ndarray]
    folder: pathlib.Path


def tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: slot.read() for name, slot in read_header(file)[0].items()}


@contextlib.contextmanager
def as_users() -> Iterator[None]:
    """JAX as transformers expects it, which promotes types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class OldNumpy:
    """`jax.numpy` with the arguments of `clip` that transformers 4 writes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    def clip(self, x, a_min=None, a_max=None):
        return jnp.clip(x, a_min, a_max)


def flax_model(folder: pathlib.Path, name: str, config: str) -> tuple:
    """Returns `(fn, shapes)` of a Flax class of transformers for a golden model."""
    library = pytest.importorskip("transformers", exc_type=ImportError)
    if not hasattr(library, "FlaxBertModel"):
        pytest.skip("transformers 5 has no Flax models")
    settings = getattr(library, config).from_pretrained(folder)
    with warnings.catch_warnings(), as_users():
        warnings.simplefilter("ignore")
        if "T5" in name:
            importlib.import_module(
                "transformers.models.t5.modeling_flax_t5"
            ).jnp = OldNumpy()
        model = getattr(library, f"Flax{name}")(settings, _do_init=False)
        shape = (1, 8, 8, 3) if "ViT" in name else (1, 4)
        shapes = jax.eval_shape(lambda: model.init_weights(jax.random.key(0), shape))

    def fn(params, **inputs):
        return model(params=params, **inputs).logits

    return fn, shapes


def moe(params, *, x):
    """The torch module `Moe` of the script that made the files."""
    gates = jax.nn.softmax(x @ params["router"]["kernel"])
    y = jnp.einsum("ti,eio->teo", x, params["experts"]["up"])
    y = jnp.einsum("tei,eio->teo", jnp.tanh(y), params["experts"]["down"])
    return jnp.einsum("teo,te->to", y, gates)


MOE_SHAPES = {
    "router": {"kernel": jax.ShapeDtypeStruct((8, 3), jnp.float32)},
    "experts": {
        "up": jax.ShapeDtypeStruct((3, 8, 12), jnp.float32),
        "down": jax.ShapeDtypeStruct((3, 12, 8), jnp.float32),
    },
}


def moe_names(kind: str, axes: str) -> NameMap:
    entries = [
        Entry(f"experts/{name}", f"experts.{name}", axes, kind)
        for name in ("up", "down")
    ]
    return NameMap((*entries, Entry("router/kernel", "router.weight")))


def convs(params, *, x):
    """The torch module `Convs`, channels last."""

    def conv(name, x, strides=None, padding=None, groups=1):
        kernel, n = params[name]["kernel"], x.ndim - 2
        axes = "DHW"[3 - n :]
        y = jax.lax.conv_general_dilated(
            jnp.moveaxis(x, 1, -1), kernel, strides or (1,) * n,
            padding or [(0, 0)] * n,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            feature_group_count=groups,
        )  # fmt: skip
        y = y + jnp.broadcast_to(params[name]["bias"], y.shape)
        return jnp.moveaxis(y, -1, 1).reshape(x.shape[0], -1)

    one = conv("one", x[:, :, 0, 0])
    two = conv("two", x[:, :, 0], (2, 1), [(1, 1), (0, 0)])
    four = conv("groups", jnp.concatenate([x[:, :, 0], x[:, :1, 1]], 1), groups=2)
    return jnp.concatenate([one, two, conv("three", x), four], 1)


def conv_shapes() -> dict:
    kernels = {
        "one": (3, 3, 4),
        "two": (3, 2, 3, 4),
        "three": (2, 2, 2, 3, 4),
        "groups": (3, 3, 2, 6),
    }
    return {
        name: {
            "kernel": jax.ShapeDtypeStruct(shape, jnp.float32),
            "bias": jax.ShapeDtypeStruct(shape[-1:], jnp.float32),
        }
        for name, shape in kernels.items()
    }


ONE = Entry("one/kernel", "one.weight", "k i o -> o i k", "conv")
TWO_GROUPS = Entry("groups/kernel", "groups.weight", groups=2)
FLAX = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", maps.LLAMA),
    "tied": ("LlamaForCausalLM", "LlamaConfig", maps.LLAMA),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", maps.GPT2),
    "bert": ("BertForSequenceClassification", "BertConfig", maps.BERT),
    "vit": ("ViTForImageClassification", "ViTConfig", maps.VIT_V5),
    "t5": ("T5ForConditionalGeneration", "T5Config", maps.T5),
}
OWN = {
    "moe": (moe, MOE_SHAPES, moe_names("experts", "e i o -> e o i")),
    "moe_t": (moe, MOE_SHAPES, moe_names("experts_t", "e i o -> e i o")),
    "convs": (convs, conv_shapes(), NameMap((ONE, TWO_GROUPS), generic=True)),
}
# transformers 5 calls ViT's modules otherwise than it writes them.
BASE_NAMES = {"vit": maps.VIT}


@functools.lru_cache(maxsize=2)
def model(name: str) -> Model:
    folder = GOLDEN / name
    if name in OWN:
        fn, shapes, names = OWN[name]
    else:
        cls, config, names = FLAX[name]
        fn, shapes = flax_model(folder, cls, config)
    params = jlora.peft.load_base(folder, shapes, names=BASE_NAMES.get(name, names))
    io = tensors(folder / "io.safetensors")
    inputs = {
        k.removeprefix("input_"): jnp.asarray(x)
        for k, x in io.items()
        if k.startswith("input_")
    }
    outputs = {k: x for k, x in io.items() if not k.startswith("input_")}
    return Model(fn, params, names, inputs, outputs, folder)


def call(m: Model, params: Any) -> np.ndarray:
    """Calls the model as transformers does, which promotes types."""
    with as_users():
        return np.asarray(m.fn(params, **m.inputs))
