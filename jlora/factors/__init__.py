"""The records of an adapter, which describe themselves: `Factors`, `Spec`, `Trainable`.

May import `_tables` and `errors`, and Flax once a program has done so.
"""

from ._records import (
    FORMS as FORMS,
    Array as Array,
    Axes as Axes,
    Factors as Factors,
    Form as Form,
    FusedParts as FusedParts,
    Leaf as Leaf,
    PyTree as PyTree,
    Spec as Spec,
    Trainable as Trainable,
    tuples as tuples,
)
