"""A model of the Hub on disk, read into the tree of `model.forward`.

    config, params = hub.load("Llama-3.2-1B", dtype="bfloat16")
    config, params = hub.load(directory, dtype="bfloat16", quantize="nf4",
                              shardings=lambda like: layout(like, mesh))
    jlora.peft.save("adapter", trainable, names=hub.names(config),
                    base_model=str(directory), tied=config.tied)

`layout` is that of `examples/sharded`. `generate.generate` writes tokens with what
comes back.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import jlora

from .model import DecoderConfig, Params, shapes

# What `quantize` is for: the linear weights of layers, as QLoRA does. Embeddings, norms
# and the output head stay as they are.
LINEAR = "model/layers/**/kernel"


def load(
    directory: Path | str,
    *,
    dtype: Any,
    quantize: str | Mapping[str, Any] | None = None,
    shardings: Callable[[Params], Any] | None = None,
    scan: bool = True,
    remat: bool = False,
    ignore: Sequence[str] = (),
) -> tuple[DecoderConfig, Params]:
    """Returns the config and the parameters of the model in `directory`.

    Each leaf is read, quantised and put in its place before the next one is read: the
    host holds one leaf beside what stays there.

    Args:
      directory: has `config.json` and `model.safetensors` or its shards.
      dtype: of the parameters.
      quantize: None, a kind (`"nf4"`, `"int8"`) for the leaves of `LINEAR`, or a
        mapping of options of `jlora.quantize`.
      shardings: takes the tree of `jax.ShapeDtypeStruct`s, and returns a tree of
        shardings; None puts everything on the first device.
      scan, remat: see `DecoderConfig`.
      ignore: see `DecoderConfig.from_hub`.

    Raises:
      ValueError: see `DecoderConfig.from_hub`.
      jlora.errors.PeftError: lists the tensors that are missing, extra or misshapen.
    """
    config = DecoderConfig.from_hub(directory, ignore=ignore, scan=scan, remat=remat)
    like = shapes(config, dtype)
    if shardings is not None:
        like = jax.tree.map(lambda x, s: x.update(sharding=s), like, shardings(like))
    if isinstance(quantize, str):
        quantize = {"kind": quantize, "targets": LINEAR}
    params = jlora.peft.load_base(
        directory, like, names=names(config), quantize=quantize
    )
    return config, params


def names(config: DecoderConfig) -> jlora.peft.NameMap:
    """Returns what the leaves are called on the Hub, for `jlora.peft`."""
    maps = jlora.peft.maps
    return maps.LLAMA_STACKED if config.scan else maps.LLAMA
