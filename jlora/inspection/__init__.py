"""What an adapter or a model is: report, inspect, diff; no model is run.

May import the vocabulary, `methods`, `_core` and `_io`.
"""

from ._diff import Difference as Difference, diff as diff, diff_files as diff_files
from ._inspect import (
    Inspection as Inspection,
    Leaf as Leaf,
    inspect as inspect,
    singular_values as singular_values,
)
from ._report import Entry as Entry, Report as Report, report as report

__all__ = [
    "Difference",
    "Entry",
    "Inspection",
    "Leaf",
    "Report",
    "diff",
    "diff_files",
    "inspect",
    "report",
    "singular_values",
]
