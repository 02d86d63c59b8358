"""Where an adapter's config and its tensors contradict each other."""

from collections.abc import Collection

from .config import PeftConfig, endings, names_module
from .names import Place


def contradictions(
    file: PeftConfig,
    *,
    used: Collection[tuple[str, str]],
    modules: Collection[str],
    stems: Collection[Place],
    heads: set[str],
    tables: Collection[str],
    embedding: bool,
) -> list[str]:
    """Returns what the config names and the tensors do not have, and the reverse.

    Args:
      file: the config.
      used: `(field, pattern)` of the patterns that some module matched.
      modules: names of the modules that have an adapter.
      stems: bare parameters that have one.
      heads: modules that share the weight of an embedding.
      tables: modules with trained rows.
      embedding: whether an embedding has an adapter.
    """
    found: list[str] = []
    for field in ("rank_pattern", "alpha_pattern"):
        found += [
            f"{field} has {key!r:.100}, which names no adapted module"
            for key, _ in getattr(file, field)
            if (field, key) not in used
        ]
    if file.targets is not None:
        ends = {end for module in modules for end in endings(module)}
        found += [
            f"target_modules names {t!r:.100}, for which there are no tensors"
            for t in file.targets
            if t not in ends
        ]
        raw = {place.module for place in stems}
        named = set(file.targets)
        found += [
            f"{module} has an adapter, target_modules does not name it"
            for module in modules
            if module not in raw | heads
            and not any(e in named for e in endings(module))
        ]
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
    if file.tying and not embedding:
        found.append("ensure_weight_tying is set, no embedding is adapted")
    return found
