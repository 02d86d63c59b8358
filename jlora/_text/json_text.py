"""JSON from anyone: one value, or one error that says why not."""

import collections
import json
from collections.abc import Iterator
from typing import Any

from .._tables import listed

_MAX_DEPTH = 100


def parse_json(data: str | bytes) -> Any:
    """Returns the value of a JSON text, in UTF-8 if it is bytes.

    Raises:
      ValueError: if it is not JSON, names a field twice, is nested too deep, or has a
        number that no program needs. No other error is raised, whatever the text is.
    """
    try:
        data = data.decode() if isinstance(data, bytes) else data
        value = json.loads(data, object_pairs_hook=_fields_once)
        for text in _texts(value):
            text.encode()  # half of a surrogate pair is not text
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeError as error:
        raise ValueError(f"it is not text, {error}") from error
    return value


def _fields_once(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    """Returns the fields of a JSON object.

    Raises:
      ValueError: if a name stands there twice.
    """
    fields = dict(pairs)
    if len(fields) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = [f"{name!r:.100}" for name, n in counts.items() if n > 1]
        raise ValueError(f"it names {listed(twice, 5, ', ')} twice")
    return fields


def _texts(value: object) -> Iterator[str]:
    """Yields all texts in a JSON value."""
    level: list[object] = [value]
    for _ in range(_MAX_DEPTH):
        inner: list[object] = []
        for one in level:
            if isinstance(one, str):
                yield one
            elif isinstance(one, dict):
                yield from one
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")
