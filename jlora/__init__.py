"""LoRA for JAX as pure functions.

`plan` says what will be adapted, `split` takes the parameters apart, `apply_lora` wraps
the function, `merge` puts all together again:

    plan = jlora.plan(fn, params, x, config=jlora.LoraConfig(rank=8))
    frozen, trainable = jlora.split(key, params, plan)
    lora_fn = jlora.apply_lora(fn)
    y = lora_fn(frozen, trainable, x)
    params = jlora.merge(frozen, trainable)
"""

from . import (
    adapters as adapters,
    checkpoint as checkpoint,
    export as export,
    peft as peft,
    pool as pool,
)
from ._core.apply import apply_lora as apply_lora
from ._core.extract import extract as extract
from ._core.merge import merge as merge, unmerge as unmerge
from ._core.rebase import to_plain as to_plain
from ._core.shardings import shardings as shardings
from ._core.split import split as split
from ._core.statistics import (
    activation_statistics as activation_statistics,
    gradient_statistics as gradient_statistics,
)
from ._core.tree import MISSING as MISSING, combine as combine
from ._io.adapter_file import load as load, save as save
from ._plan.plan import Plan as Plan, plan as plan
from ._plan.ranks import redistribute_ranks as redistribute_ranks
from ._plan.row import Row as Row
from .adapters._per_row import per_row as per_row
from .citations import cite as cite
from .config import LoraConfig as LoraConfig, Rows as Rows, Rule as Rule
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
    Parts as Parts,
    Trainable as Trainable,
)
from .inspection import Report as Report, report as report
from .methods.moments import InputMoments as InputMoments, Statistics as Statistics
from .optim import (
    adalora as adalora,
    decay_mask as decay_mask,
    labels as labels,
    lora_fa as lora_fa,
    lora_plus as lora_plus,
    mask as mask,
    masked as masked,
    orthogonality_penalty as orthogonality_penalty,
    riemannian as riemannian,
)

__all__ = [
    "MISSING",
    "Axes",
    "CheckpointError",
    "ConfigError",
    "Factors",
    "InputMoments",
    "JloraError",
    "LoraConfig",
    "MergeError",
    "MergeWarning",
    "Parts",
    "PeftError",
    "Plan",
    "PoolError",
    "Report",
    "Row",
    "Rows",
    "Rule",
    "Statistics",
    "TargetError",
    "Trainable",
    "TreeError",
    "activation_statistics",
    "adalora",
    "adapters",
    "apply_lora",
    "checkpoint",
    "cite",
    "combine",
    "decay_mask",
    "export",
    "extract",
    "gradient_statistics",
    "labels",
    "load",
    "lora_fa",
    "lora_plus",
    "mask",
    "masked",
    "merge",
    "orthogonality_penalty",
    "peft",
    "per_row",
    "plan",
    "pool",
    "redistribute_ranks",
    "report",
    "riemannian",
    "save",
    "shardings",
    "split",
    "to_plain",
    "unmerge",
]
