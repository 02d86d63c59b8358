"""LoRA for JAX as pure functions.

`plan` says what will be adapted, `split` takes the parameters apart, `apply_lora` wraps
the function, `merge` puts all together again:

    plan = jlora.plan(fn, params, x, config=jlora.LoraConfig(rank=8))
    frozen, trainable = jlora.split(key, params, plan)
    lora_fn = jlora.apply_lora(fn)
    y = lora_fn(frozen, trainable, x)
    params = jlora.merge(frozen, trainable)
"""

import importlib
import importlib.metadata
from types import ModuleType
from typing import TYPE_CHECKING

from . import (
    adapters as adapters,
    citations as citations,
    inspection as inspection,
    libraries as libraries,
    methods as methods,
    optim as optim,
    paths as paths,
)
from ._core.apply import apply_lora as apply_lora
from ._core.extract import extract as extract
from ._core.merge import merge as merge, unmerge as unmerge
from ._core.quantize import quantize as quantize
from ._core.rebase import rebase as rebase
from ._core.shardings import shardings as shardings
from ._core.split import split as split
from ._core.statistics import (
    activation_statistics as activation_statistics,
    gradient_statistics as gradient_statistics,
)
from ._core.tree import MISSING as MISSING, combine as combine
from ._io.adapter_file import load as load, save as save
from ._plan.coverage import Coverage as Coverage
from ._plan.plan import Plan as Plan, plan as plan
from ._plan.ranks import redistribute_ranks as redistribute_ranks
from ._plan.row import Row as Row
from .citations import cite as cite
from .config import LoraConfig as LoraConfig, Rule as Rule, TokenRows as TokenRows
from .errors import (
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    JloraError as JloraError,
    MergeError as MergeError,
    MergeWarning as MergeWarning,
    PeftError as PeftError,
    PoolError as PoolError,
    TargetError as TargetError,
    TreeError as TreeError,
)
from .factors import (
    Axes as Axes,
    Factors as Factors,
    FusedParts as FusedParts,
    Spec as Spec,
    Trainable as Trainable,
)
from .inspection._report import Report as Report, report as report
from .libraries._adopt import adopt as adopt
from .libraries._hand_back import hand_back as hand_back
from .methods.moments import InputMoments as InputMoments, Statistics as Statistics
from .quantised import Quantized as Quantized, from_qwix as from_qwix

if TYPE_CHECKING:
    from . import (
        checkpoint as checkpoint,
        export as export,
        files as files,
        peft as peft,
        pool as pool,
    )

try:
    __version__ = importlib.metadata.version("jlora")
except importlib.metadata.PackageNotFoundError:  # a source tree on the path
    __version__ = "0+unknown"

_AT_FIRST_USE = ("checkpoint", "export", "files", "peft", "pool")

__all__ = [
    "MISSING",
    "Axes",
    "CheckpointError",
    "ConfigError",
    "Coverage",
    "Factors",
    "FusedParts",
    "InputMoments",
    "JloraError",
    "LoraConfig",
    "MergeError",
    "MergeWarning",
    "PeftError",
    "Plan",
    "PoolError",
    "Quantized",
    "Report",
    "Row",
    "Rule",
    "Spec",
    "Statistics",
    "TargetError",
    "TokenRows",
    "Trainable",
    "TreeError",
    "__version__",
    "activation_statistics",
    "adapters",
    "adopt",
    "apply_lora",
    "checkpoint",
    "citations",
    "cite",
    "combine",
    "export",
    "extract",
    "files",
    "from_qwix",
    "gradient_statistics",
    "hand_back",
    "inspection",
    "libraries",
    "load",
    "merge",
    "methods",
    "optim",
    "paths",
    "peft",
    "plan",
    "pool",
    "quantize",
    "rebase",
    "redistribute_ranks",
    "report",
    "save",
    "shardings",
    "split",
    "unmerge",
]


def __getattr__(name: str) -> ModuleType:
    """Imports a module that is heavy, and that not every program needs."""
    if name in _AT_FIRST_USE:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
