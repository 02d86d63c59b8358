"""Where an adapter's config and its tensors contradict each other."""

from collections.abc import Collection, Iterable

import jax
import numpy as np

from .._io.torch_models import is_head
from ..errors import PeftError
from ._leaves import TargetLeaf
from ._places import Place
from ._selection import left_out_by
from .config import PeftConfig, endings, names_module
from .layers import ENDS, LENGTHS

ADAPTER_LEAVES = (
    *ENDS["linear"],
    *ENDS["embedding"],
    *LENGTHS,
    "lora_B.bias",
)  # what the names of an adapter's tensors end with
_HEADS = frozenset({"classifier", "score"})


def contradictions(
    file: PeftConfig,
    *,
    used: Collection[tuple[str, str]],
    modules: Collection[str],
    stems: Collection[Place],
    heads: set[str],
    tables: Collection[str],
    saved: Collection[str],
    shared: bool,
    every: Collection[str],
) -> list[str]:
    """Returns what the config names and the tensors do not have, and the reverse.

    Args:
      file: the config.
      used: `(field, pattern)` of the patterns that some module matched.
      modules: names of the modules that have an adapter.
      stems: bare parameters that have one.
      heads: modules that share the weight of an embedding.
      tables: modules with trained rows.
      saved: names of the tensors that are in the file whole.
      shared: whether an embedding has an adapter, rows, or is whole.
      every: names of the model's modules.
    """
    found: list[str] = []
    for field in ("rank_pattern", "alpha_pattern"):
        found += [
            f"{field} has {key!r:.100}, which names no adapted module"
            for key, _ in getattr(file, field)
            if (field, key) not in used
        ]
    raw = {place.module for place in stems}
    found += _unlike_targets(
        file, [m for m in modules if m not in raw | heads], modules, every
    )
    ends = {end for place in stems for end in endings(place.name)}
    found += [
        f"target_parameters names {t!r:.100}, which the model does not have"
        for t in file.parameters
        if t not in ends
    ]
    found += [
        f"trainable_token_indices names {name!r:.100}, the file has no rows for it"
        for name, _ in file.tokens
        if not any(not name or names_module(name, table) for table in tables)
    ]
    if file.tying and not shared:
        found.append("ensure_weight_tying is set, no embedding is adapted")
    idle = [
        entry
        for entry in file.saved
        if not any(_is_part(entry, name) for name in saved)
    ]
    one = bool(saved) and _HEADS.issuperset(idle)  # PEFT names both for a classifier
    found += [
        f"modules_to_save names {entry!r:.100}, for which there are no tensors"
        for entry in ([] if one else idle)
    ]
    return found


def _unlike_targets(
    file: PeftConfig,
    named: Collection[str],
    adapted: Collection[str],
    every: Collection[str],
) -> list[str]:
    """Returns where PEFT would adapt other modules than have tensors.

    A pattern that cannot be matched in one pass decides nothing.

    Args:
      file: the config.
      named: the modules with an adapter that `target_modules` has to name.
      adapted: all modules with an adapter.
      every: the model's modules.
    """
    try:
        field = left_out_by(file)
    except PeftError:
        return []
    told = {
        "target_modules": "target_modules does not name it",
        "exclude_modules": "exclude_modules takes it out",
        "layers_to_transform": "layers_to_transform does not have its layer",
    }
    found = [
        f"{module} has an adapter, {told[by]}"
        for module in named
        if (by := field(module))
    ]
    if isinstance(file.targets, tuple):
        ends = {end for module in adapted for end in endings(module)}
        taken = [module for module in every if not field(module)]
        left = {end for module in every for end in endings(module)}
        left -= {end for module in taken for end in endings(module)}
        found += [
            f"target_modules names {t!r:.100}, for which there are no tensors"
            for t in file.targets
            if t not in ends | left and field(f".{t}") != "exclude_modules"
        ]
    return found


def is_whole_by(file: PeftConfig, name: str) -> bool:
    """Returns whether the config says that the tensor `name` is in the file whole."""
    if any(_is_part(entry, name) for entry in file.saved):
        return True
    if file.tying and is_head(name.removesuffix(".weight")):
        return True  # beside its table, which is named
    return f".{name}".endswith(".bias") and file.bias != "none"


def _is_part(entry: str, name: str) -> bool:
    """Returns whether an entry of `modules_to_save` names the module of a tensor.

    PEFT compares the end of the module's name, without a dot before it.
    """
    module = name.rpartition(".")[0]
    return module.endswith(entry) or f".{entry}." in f".{module}."


def biases_missing(
    file: PeftConfig,
    places: Iterable[Place],
    *,
    modules: Collection[str],
    saved: Collection[str],
) -> list[str]:
    """Returns in words the biases that were trained, by the config, and are not there.

    Args:
      file: the config.
      places: the model's tensors.
      modules: names of the modules that have an adapter.
      saved: names of the tensors that are in the file whole.
    """
    if file.bias == "none":
        return []
    adapted, there = {*modules}, {*saved}
    return [
        f"{place.name}, though bias is {file.bias!r}"
        for place in places
        if f".{place.name}".endswith(".bias")
        and place.name not in there
        and (file.bias == "all" or place.name.removesuffix(".bias") in adapted)
    ]


def rows_misfit(
    leaf: TargetLeaf, places: tuple[Place, ...], rows: np.ndarray, ids: tuple[int, ...]
) -> str:
    """Returns in words why the rows `ids` of a table are not the leaf's, or nothing."""
    place = places[0]
    if not ids:
        return "trainable_token_indices does not say which rows they are"
    if len(places) > 1 or place.kind != "embedding":
        return "the leaf is not an embedding table"
    if rows.shape != (len(ids), leaf.shape[place.groups[1][0]]):
        return f"{list(rows.shape)} for {len(ids)} token ids"
    if max(ids) >= leaf.shape[place.groups[0][0]]:
        return f"row {max(ids)} of a table of {list(leaf.shape)}"
    if isinstance(leaf.value, jax.ShapeDtypeStruct | None):
        return "the file has rows, not differences: give the parameters' arrays"
    if leaf.planned and leaf.planned != "adapted":
        return f"in the plan {leaf.path!r} is {leaf.planned}"
    return ""
