"""State dicts of Flax: how `flax.serialization` reads and writes jlora's records."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from ._tables import listed


def register(*records: type) -> None:
    """Tells `flax.serialization` how to write and restore `records`, dataclasses.

    Does nothing before a program has imported Flax, and nothing the second time.
    """
    flax = sys.modules.get("flax.serialization")
    if flax is None:
        return
    for record in records:
        if not flax.is_serializable(record):
            flax.register_serialization_state(record, _state_of, _restored)


def _leaves(record: Any) -> dict[str, Any]:
    """Returns the fields of `record` that are not static, each mapping as a dict."""
    leaves = {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
        if not field.metadata.get("static")
    }
    return {k: dict(x) if isinstance(x, Mapping) else x for k, x in leaves.items()}


def _state_of(record: Any) -> dict[str, Any]:
    from flax.serialization import to_state_dict

    return {name: to_state_dict(x) for name, x in _leaves(record).items()}


def _restored(record: Any, state: Mapping[str, Any]) -> Any:
    """Returns `record` with the leaves of `state`, which must be all its leaves."""
    from flax.serialization import current_path, from_state_dict

    leaves = _leaves(record)
    named = {"": leaves, **{k: x for k, x in leaves.items() if isinstance(x, dict)}}
    for field, own in named.items():
        given = state[field] if field else state
        for word, names in (
            ("Missing", own.keys() - given.keys()),
            ("Unknown", given.keys() - own.keys()),
        ):
            if names:
                raise ValueError(
                    f"{word} field(s) {listed(map(repr, sorted(names)), 10, ', ')} in "
                    "state dict while restoring an instance of "
                    f"{type(record).__name__} at path {current_path()}/{field}"
                )
    new = {k: from_state_dict(x, state[k], name=k) for k, x in leaves.items()}
    return dataclasses.replace(record, **new)
