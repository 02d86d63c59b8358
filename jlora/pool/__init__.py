"""Adapters that come and go while one compiled program serves: a pool of slots.

`Pool` is a stack of adapters of fixed capacity: a pytree with pure functions. `Cache`
does what the host has to do: it keeps names, replaces the least recently used adapter,
and loads in the background. `Trainer` trains adapters in `Slots` of their own.
May import the vocabulary, `methods`, `_core` and `adapters`.
"""

from ._batch import Batch as Batch
from ._cache import Cache as Cache
from ._pool import (
    Pool as Pool,
    bytes_of as bytes_of,
    capacity_for as capacity_for,
    create as create,
    evict as evict,
    fit as fit,
    insert as insert,
    lookup as lookup,
)
from ._trainer import Slots as Slots, Trainer as Trainer

__all__ = [
    "Batch",
    "Cache",
    "Pool",
    "Slots",
    "Trainer",
    "bytes_of",
    "capacity_for",
    "create",
    "evict",
    "fit",
    "insert",
    "lookup",
]
