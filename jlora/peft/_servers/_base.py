"""What a model's directory says of its modules, without reading a weight."""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping

import jax.numpy as jnp

from ..._io.disk import Json, Path, read_json, told
from ..._io.shards import open_tensors
from ..._io.torch_models import CONFIG, Facts, facts_of, is_table
from ...errors import PeftError

Shape = tuple[int, ...]
# Ends of the tensors that are a module's weight, dense or quantised.
_WEIGHTS = (".weight", ".qweight", ".weight_packed", ".weight_q")
_NORM = re.compile(r"(^|[._])(norm|layernorm|ln|rmsnorm|layer_norm)\d*([._]|$)|_norm$")
_INDICES = ("*.safetensors.index.json", "*.bin.index.json")


@dataclasses.dataclass(frozen=True)
class Base:
    """The modules of a model.

    Attributes:
      architecture: the name of its class in `transformers`.
      config: the fields of its `config.json`.
      facts: see `facts_of`.
      tensors: shape of each tensor; None where only an index names it, or its numbers
        are codes.
    """

    architecture: str
    config: Json
    facts: Facts
    tensors: Mapping[str, Shape | None]

    @functools.cached_property
    def modules(self) -> dict[str, Shape | None]:
        """Modules with a weight of two or more axes, or of unknown shape."""
        found: dict[str, Shape | None] = {}
        for name, shape in self.tensors.items():
            end = next((end for end in _WEIGHTS if name.endswith(end)), None)
            if end is None or (shape is not None and len(shape) < 2):
                continue
            module = name.removesuffix(end)
            if shape is not None or not _NORM.search(module):
                found[module] = shape
        return found

    @functools.cached_property
    def linear(self) -> dict[str, Shape | None]:
        """Modules whose weight is a matrix, without embedding tables."""
        return {
            name: shape
            for name, shape in self.modules.items()
            if not is_table(name) and (shape is None or len(shape) == 2)
        }

    @functools.cached_property
    def tables(self) -> dict[str, Shape | None]:
        """Embedding tables."""
        return {name: s for name, s in self.modules.items() if is_table(name)}

    @property
    def text(self) -> Json:
        """The fields of the text model's config."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def vocabulary(self) -> int | None:
        """How many tokens it has, if the config says so."""
        size = self.text.get("vocab_size", self.config.get("vocab_size"))
        return size if type(size) is int else None


def read_base(path: Path) -> Base:
    """Returns what the directory of a model says of its modules.

    Only `config.json`, an index and headers are read. An index is enough.

    Raises:
      PeftError: if one of them is missing or damaged.
    """
    folder = pathlib.Path(path)
    with told(f"{str(path)!r} cannot be read", PeftError):
        if not os.path.isdir(path):
            raise PeftError(
                f"There is no directory {str(path)!r}. Give the model's, with its "
                "config.json and its index or weights."
            )
    config = read_json(folder / CONFIG, PeftError)
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise PeftError(
            f"{str(folder / CONFIG)!r} has no `architectures`, which says what class "
            "the model is. Take the config.json that came with the model."
        )
    with told(f"{str(path)!r} cannot be read", PeftError):
        facts = facts_of(path, inside=True)
        return Base(names[0], config, facts, _tensors(folder))


def _tensors(folder: pathlib.Path) -> dict[str, Shape | None]:
    """Returns the tensors of a model, by an index alone where shards are not there."""
    indices = [file for glob in _INDICES for file in sorted(folder.glob(glob))]
    for index in indices:
        weight_map = read_json(index, PeftError).get("weight_map")
        if not isinstance(weight_map, dict):
            raise PeftError(f"{str(index)!r} is not an index: it has no `weight_map`.")
        files = [file for file in weight_map.values() if isinstance(file, str)]
        if index.name.startswith("pytorch") or not all(
            "/" not in file and os.path.isfile(folder / file) for file in files
        ):
            return dict.fromkeys(weight_map)
    slots, _ = open_tensors(folder, fault=PeftError)
    return {
        name: slot.shape if jnp.issubdtype(slot.dtype, jnp.floating) else None
        for name, slot in slots.items()
    }
