"""SmolLM2 as the decoder of `examples/chat`: dense, or with the codes of its file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import jlora
from examples.chat import hub, smollm2
from examples.chat.model import DecoderConfig, Params, shapes
from examples.sentiment import assets

from . import codes
from .codes import Blocks

Tensor = np.ndarray | Blocks


def pretrained(
    cache: Path, dtype: str, *, coded: bool = False
) -> tuple[Params, DecoderConfig, Tokenizer]:
    """Returns the parameters, the config and the tokenizer of SmolLM2.

    If `coded`, quantised tensors stay the codes of the file, and none is widened.
    """
    directory = smollm2.directory(cache)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    if not coded:
        config, params = hub.load(directory, dtype=dtype)
        return params, config, tokenizer
    with smollm2.opened(assets.fetch(smollm2.SMOLLM2, cache)) as reader:
        fields = smollm2.fields_of(reader)
        tensors = {
            t.name: np.array(t.data)
            if t.tensor_type.name in ("F32", "F16")
            else Blocks(np.array(t.data), t.tensor_type.name)
            for t in reader.tensors
        }
    config = DecoderConfig.from_hub(directory)
    return from_gguf(tensors, fields, config, dtype), config, tokenizer


def from_gguf(
    tensors: Mapping[str, Tensor],
    fields: smollm2.Fields,
    config: DecoderConfig,
    dtype: str = "float32",
) -> Params:
    """Returns the parameters of `config`; `Blocks` become `jlora.Quantized`.

    Args:
      tensors: those of a GGUF file, by its names.
      fields: the file's fields.
      config: what `fields` say, with layers scanned.
      dtype: of the arrays, and of those that the codes stand for.
    """
    names, gguf = hub.names(config), smollm2.names_of(fields)

    def tensor(hub_name: str) -> Any:
        found = tensors[f"{gguf[hub_name]}.weight"]
        heads = smollm2.heads_of(hub_name, fields)
        if not isinstance(found, Blocks):
            return found
        if heads:
            found = found._replace(data=smollm2.halves(found.data, heads))
        if hub_name == "model.embed_tokens":
            return codes.table(found, dtype)
        return codes.kernel(found, dtype)

    leaves, treedef = jlora.paths.flatten(shapes(config))
    made = []
    for path, like in leaves.items():
        places = names.places(path, like.shape)
        own = [tensor(place.name.removesuffix(".weight")) for place in places]
        stacked = "/layers/" in path
        leaf = jax.tree.map(lambda *x: np.stack(x), *own) if stacked else own[0]
        made.append(_placed(leaf, dtype))
    return treedef.unflatten(made)


def _placed(x: Any, dtype: str) -> Any:
    """Returns an array of `dtype` on the device; codes and scales keep their own."""
    if isinstance(x, jlora.Quantized):
        return jax.tree.map(jnp.asarray, x)
    return jnp.asarray(x, dtype)
