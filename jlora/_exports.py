"""`jax.export`: how a serialised program describes jlora's records among its arguments.

A program that reads one imports jlora first.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from jax import export


def register(
    record: type,
    to_json: Callable[..., Sequence[Any]] = lambda *static: static,
    of_json: Callable[..., Sequence[Any]] = lambda *static: static,
) -> None:
    """Lets `jax.export` serialise a program that takes or returns a record.

    Args:
      record: a dataclass that JAX knows as a pytree node.
      to_json: from its static fields, in order, to values that JSON has.
      of_json: back.
    """
    fields = dataclasses.fields(record)
    static = [f.name for f in fields if f.metadata.get("static")]
    leaves = [f.name for f in fields if f.name not in static]

    def build(aux_data: Any, children: Sequence[Any]) -> Any:
        known = dict(zip(static, aux_data, strict=True))
        return record(**known, **dict(zip(leaves, children, strict=True)))

    export.register_pytree_node_serialization(
        record,
        serialized_name=f"jlora.{record.__name__}",
        serialize_auxdata=lambda known: json.dumps([*to_json(*known)]).encode(),
        deserialize_auxdata=lambda text: tuple(of_json(*json.loads(text))),
        from_children=build,
    )
