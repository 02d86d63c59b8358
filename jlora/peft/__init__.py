"""Hugging Face files: adapters as PEFT writes them, and whole models.

`save` and `load` are for adapters, `save_base` and `load_base` for models. What a leaf
is called in torch is data, a `NameMap`; `jlora.peft.maps` holds those of common models.
May import the vocabulary, `methods`, `_plan`, `_core` and `_io`.
"""

from . import maps as maps
from ._base import load_base as load_base, save_base as save_base
from ._load import load as load
from ._save import save as save
from .names import GENERIC as GENERIC, Entry as Entry, NameMap as NameMap
from .report import LoadReport as LoadReport

__all__ = [
    "GENERIC",
    "Entry",
    "LoadReport",
    "NameMap",
    "load",
    "load_base",
    "maps",
    "save",
    "save_base",
]
