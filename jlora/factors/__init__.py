"""The records of an adapter, which describe themselves: `Factors`, `Spec`, `Trainable`.

May import `_tables` and `errors`, and Flax once a program has done so.
"""

from ._records import (
    Array as Array,
    Axes as Axes,
    Factors as Factors,
    FusedParts as FusedParts,
    Leaf as Leaf,
    PyTree as PyTree,
    Spec as Spec,
    Trainable as Trainable,
    tuples as tuples,
)
