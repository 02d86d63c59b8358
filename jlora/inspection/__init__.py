"""Tells what an adapter or a model is, without running it: report, inspect, diff.

May import the vocabulary, `methods`, `_core` and `_io`.
"""

from ._diff import Difference as Difference, diff as diff, diff_files as diff_files
from ._inspect import (
    InspectedLeaf as InspectedLeaf,
    Inspection as Inspection,
    inspect as inspect,
    singular_values as singular_values,
)

__all__ = [
    "Difference",
    "InspectedLeaf",
    "Inspection",
    "diff",
    "diff_files",
    "inspect",
    "singular_values",
]
