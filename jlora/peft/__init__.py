"""Hugging Face files: adapters as PEFT writes them, and whole models.

`save` and `load` are for adapters, `save_base` and `load_base` for models. What a leaf
is called in torch is data, a `NameMap`; `jlora.peft.maps` holds those of common models.
May import the vocabulary, `methods`, `_plan`, `_core` and `_io`.
"""

from . import maps as maps
from ._base import (
    load_base as load_base,
    load_base_partial as load_base_partial,
    save_base as save_base,
)
from ._experts import ExpertLayout as ExpertLayout
from ._load import (
    from_tensors as from_tensors,
    load as load,
    load_partial as load_partial,
)
from ._save import save as save, tensors as tensors
from ._servers import (
    ServerReport as ServerReport,
    Verdict as Verdict,
    validate as validate,
)
from .names import GENERIC as GENERIC, Entry as Entry, NameMap as NameMap
from .report import LoadReport as LoadReport

__all__ = [
    "GENERIC",
    "Entry",
    "ExpertLayout",
    "LoadReport",
    "NameMap",
    "ServerReport",
    "Verdict",
    "from_tensors",
    "load",
    "load_base",
    "load_base_partial",
    "load_partial",
    "maps",
    "save",
    "save_base",
    "tensors",
    "validate",
]
