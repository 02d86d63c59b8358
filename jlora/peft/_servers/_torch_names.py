"""Which tensors PEFT and transformers take an adapter's for, by their names.

Read from PEFT 0.21.2: `utils/transformers_weight_conversion.py:
convert_peft_adapter_state_dict_for_transformers`, `tuners/tuners_utils.py:
BaseTuner._remap_adapter_state_dict_for_load`; and from transformers:
`core_model_loading.py: convert_and_load_state_dict_in_model`.

In memory an adapter's tensors have its name in theirs, and both load a tensor that a
file calls so. The pieces that are returned have the names that PEFT writes.
"""

import dataclasses
import re
from collections.abc import Callable, Collection

from ..config import PREFIX
from ._adapter import Piece, piece_of

_ADAPTER = ".default"  # the name of an adapter that is given none
# The factor of one expert, where the model has all in one: PEFT reads no further.
_EXPERT = re.compile(r"(.*\.experts\.\d+\.\w+\.lora_[AB])\..*")
# What files of models that wrap a text model call the parts of the body.
_WRAPPED = ("language_model.", "vision_tower.", "multi_modal_projector.")
_OF_TABLE = re.compile(r".*\.lora_embedding_[AB]")


Renamed = Callable[[str], str]


def of_older_file(name: str) -> str:
    """Returns what transformers calls a tensor of an adapter of a wrapped text model.

    Examples:
      >>> of_older_file("language_model.model.layers.0.q.lora_A.weight")
      'model.language_model.layers.0.q.lora_A.weight'
    """
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    if name.startswith(_WRAPPED):
        name = f"model.{name}"
    twice, once = (f"model.language_model.{end}" for end in ("model.", ""))
    return once + name.removeprefix(twice) if name.startswith(twice) else name


def of_tower(name: str) -> str:
    """Returns a name without what files have around a vision tower of CLIP's kind.

    Examples:
      >>> of_tower("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1")
      'model.vision_tower.encoder.layers.0.mlp.fc1'
    """
    inner, once = (f"model.vision_tower.{end}" for end in ("vision_model.", ""))
    return once + name.removeprefix(inner) if name.startswith(inner) else name


def in_peft(piece: Piece, renamed: Renamed | None) -> Piece:
    """Returns the tensor that PEFT takes a tensor for.

    Args:
      piece: as the file has it.
      renamed: gives names of older files those of today, for a model whose weights
        transformers converts; None for others, whose names PEFT takes as they are.

    Examples:
      >>> own = piece_of("base_model.model.h.0.q.lora_A.default.weight", (2, 4))
      >>> in_peft(own, None).name
      'base_model.model.h.0.q.lora_A.weight'
      >>> in_peft(piece_of("h.0.q.lora_A.weight", (2, 4)), lambda name: name).name
      'base_model.model.h.0.q.lora_A.weight'
    """
    name = piece.name
    if renamed is not None and ".lora_" in name:
        if not name.startswith("base_model."):
            name = PREFIX + name
        new = renamed(name.removeprefix(PREFIX))
        if found := _EXPERT.fullmatch(name):
            name = f"{found[1]}.weight"
        elif name.startswith(PREFIX) and not piece.name.endswith(new):
            name = PREFIX + new
        else:  # PEFT has renamed nothing, and takes an adapter's name out
            name = _without(name)
    return piece_of(_as_stored(name), piece.shape)


def in_transformers(
    piece: Piece, renamed: Renamed, known: Collection[str], body: str
) -> Piece:
    """Returns the tensor that transformers takes a tensor for.

    It takes PEFT's prefix out, and what it calls a model's body in and out of names, to
    one that it has.

    Args:
      piece: as the file has it.
      renamed: gives names of older files those of today.
      known: the modules of the model.
      body: what the model's class puts before the names of its body.

    Examples:
      >>> own = piece_of("h.0.q.lora_A.weight", (2, 4))
      >>> modules = {"transformer.h.0.q"}
      >>> in_transformers(own, lambda name: name, modules, "transformer.").name
      'base_model.model.transformer.h.0.q.lora_A.weight'
    """
    stored = piece_of(_as_stored(piece.name), piece.shape)
    held = stored.name != piece.name and bare(stored.module) in known
    if held and not piece.prefixed:
        return dataclasses.replace(stored, name=PREFIX + stored.name)
    whole = piece.name[: len(piece.name) - len(_end(piece))]
    module = whole.replace(f"{PREFIX}model.", "model.", 1).replace(PREFIX, "", 1)
    module = renamed(module)
    inner = module.removeprefix(body)
    if inner != module and bare(inner) in known:
        module = inner
    elif bare(body + module) in known and piece.part != "tokens":
        module = body + module  # the names of rows are changed before, as they are
    return dataclasses.replace(piece, name=PREFIX + module + _end(piece), module=module)


def _end(piece: Piece) -> str:
    """Returns what the name of a tensor has after its module."""
    return piece.name.removeprefix(PREFIX)[len(piece.module) :]


def bare(module: str) -> str:
    """Returns a module's name without what PEFT puts around its layer.

    Examples:
      >>> bare("h.0.experts.base_layer.base_layer")
      'h.0.experts'
    """
    return module.replace(".base_layer", "")


def _without(name: str) -> str:
    """Returns a name without the adapter's, at its end or before its last part."""
    if name.endswith(_ADAPTER):
        return name.removesuffix(_ADAPTER)
    stem, dot, last = name.rpartition(".")
    return stem.removesuffix(_ADAPTER) + dot + last


def _as_stored(name: str) -> str:
    """Returns what files call a tensor that has its name in memory; another's as is.

    Examples:
      >>> _as_stored("x.lora_B.default.bias"), _as_stored("x.lora_B.bias.default")
      ('x.lora_B.bias', 'x.lora_B.bias.default')
    """
    inner = _without(name)
    at_end = _OF_TABLE.fullmatch(inner) is not None
    own = ".lora_" in name and name.endswith(_ADAPTER) == at_end
    return inner if own else name
