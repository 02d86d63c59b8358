"""Takes over factors that other JAX libraries trained, and hands them back.

May import the vocabulary, `methods`, `_plan` and `_core`.
"""

from ._rules import Library as Library, Place as Place
from ._shipped import (
    EASYDEL as EASYDEL,
    GEMMA as GEMMA,
    KERAS as KERAS,
    MAXTEXT as MAXTEXT,
    NNX as NNX,
    OPENPI as OPENPI,
    QWIX as QWIX,
    SKYRL as SKYRL,
)

__all__ = [
    "EASYDEL",
    "GEMMA",
    "KERAS",
    "MAXTEXT",
    "NNX",
    "OPENPI",
    "QWIX",
    "SKYRL",
    "Library",
    "Place",
]
