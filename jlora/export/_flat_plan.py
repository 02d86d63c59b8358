"""A plan for a model on disk, whose function nobody has."""

import dataclasses
from collections.abc import Mapping, Sequence

from .. import paths
from .._io.disk import Path
from .._io.models import open_model
from .._io.torch_models import (
    Facts,
    facts_of,
    is_head,
    is_table,
    is_torch_named,
    sides,
    sides_by_bias,
)
from .._plan.plan import Plan
from .._plan.resolve import resolve
from .._plan.row import Row
from .._tables import listed
from ..config import LoraConfig, Rule
from ..errors import ConfigError, TargetError
from ..factors import Axes
from ..transform.discover import FACTORED, MERGED, Use

_KERNEL, _TURNED = Axes((), (0,), (1,)), Axes((), (1,), (0,))


def flat_plan(base: Path, config: LoraConfig) -> Plan:
    """Returns a plan for a model on disk, without its function.

    Without a trace, a floating-point leaf of two axes is taken to be a kernel
    `[fan-in, fan-out]`, as in Flax, or a table of embeddings if its name is
    `embedding`. In a model with torch's names, a `weight` is `[fan-out, fan-in]`, that
    of GPT-2's Conv1D `[fan-in, fan-out]` (the bias tells, or `config.json` beside the
    model), and `embed_tokens`, `wte` and the like are tables. A leaf of other axes is a
    kernel only if a `Rule` gives its `axes`; a `Rule` may give those of the others too.
    The rest of `config` means the same as in `jlora.plan`. Prefer `jlora.plan` where
    you have the function.

    Args:
      base: a model; for the formats see `merge_files`.
      config: what to adapt and how.

    Raises:
      ConfigError: if `targets` is a predicate.
      TargetError: for all that `jlora.plan` refuses, and targets of unknown axes.

    Examples:
      >>> import os, tempfile, numpy as np, jlora
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = os.path.join(folder, "model.safetensors")
      ...     jlora.export.safetensors(file, {"w": np.ones((2, 3)), "bias": np.ones(3)})
      ...     flat_plan(file, LoraConfig(rank=1)).adapted
      ('w',)
    """
    if callable(config.targets):
        raise ConfigError("Without a traced function, targets= takes only globs.")
    unknown = "its axes' roles are not known without a trace"
    found = resolve(assumed_rows(base, config.rules), config)
    guessed = [row.path for row in found if row.spec and row.op == "merged"]
    if guessed:
        raise TargetError(
            f"Without a trace nothing tells the roles of the axes of these targets: "
            f"{listed(map(repr, guessed), 5, ', ')}. Say with Rule({guessed[0]!r}, "
            "axes=Axes(...)) which axes are summed over."
        )
    return Plan(
        config,
        tuple(
            dataclasses.replace(row, note=unknown) if row.op == "merged" else row
            for row in found
        ),
    )


def assumed_rows(base: Path, rules: Sequence[Rule] = ()) -> tuple[Row, ...]:
    """Returns what is assumed of the leaves of a model on disk, see `flat_plan`."""
    shapes = open_model(base).shapes
    assumed = _assumed({n: tuple(x.shape) for n, x in shapes.items()}, facts_of(base))
    for rule in rules:
        if rule.axes is not None:
            for name in paths.select(rule.pattern, shapes):
                op, _ = assumed.get(name, ("dot_general", _KERNEL))
                assumed[name] = op, rule.axes
    rows = []
    for name, x in shapes.items():
        shape = tuple(x.shape)
        use = _assumed_use(name, shape, assumed.get(name))
        head = is_head(name.removesuffix(".weight").rpartition(".")[2])
        rows.append(Row(name, shape, str(x.dtype), (use,), head=head))
    return tuple(rows)


def _assumed(
    shapes: Mapping[str, tuple[int, ...]], facts: Facts
) -> dict[str, tuple[str, Axes]]:
    """Returns operation and axes of each matrix, as Flax or torch keeps it."""
    flat = [name for name, shape in shapes.items() if len(shape) == 2]
    if not is_torch_named(shapes):
        ops = {name: "gather" for name in flat if name.split("/")[-1] == "embedding"}
        return {name: (ops.get(name, "dot_general"), _KERNEL) for name in flat}
    modules = {n.removesuffix(".weight"): n for n in flat if n.endswith(".weight")}
    tables = {name: module for module, name in modules.items() if is_table(module)}
    proven = sides_by_bias(shapes)
    side = sides(modules.keys() - tables.values(), proven, facts) | proven
    layers = {
        name: _KERNEL if side[module] == "conv1d" else _TURNED
        for module, name in modules.items()
        if name not in tables and side[module] is not None
    }
    layers |= {name: _TURNED for name in flat if name.endswith(".in_proj_weight")}
    found = {name: ("dot_general", axes) for name, axes in layers.items()}
    return found | dict.fromkeys(tables, ("gather", _KERNEL))


def _assumed_use(
    name: str, shape: tuple[int, ...], assumed: tuple[str, Axes] | None
) -> Use:
    """Returns the use that a leaf is assumed to have."""
    if len(shape) < 2:
        return Use(name, "", "elementwise", (), (), (), where="", scope="")
    if assumed is None:
        return Use(name, "", MERGED, (), (), (), where="", scope="")
    op, axes = assumed
    roles = axes.batch, axes.fan_in, axes.fan_out
    return Use(name, op, FACTORED, *roles, where="", scope="")
