"""What a config means for the leaves of a model: status, spec and note of each."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from .. import paths
from ..config import LoraConfig, Rule
from ..errors import TargetError
from ..factors import Axes, FusedParts, Spec
from ..methods import METHODS, init_clashes, init_name
from ..transform.discover import FACTORED
from .row import Row


def resolve(rows: tuple[Row, ...], config: LoraConfig) -> tuple[Row, ...]:
    """Returns `rows` with status, spec and note, or one error for all that is off."""
    wrong: list[str] = []
    excluded = _match("exclude", config.exclude, rows, wrong)
    trained = _match("train", config.train_whole, rows, wrong)
    tables = _tables(rows, config, trained, wrong)
    targets = _targets(rows, config, excluded, trained, wrong)
    for rule in config.rules:
        _match("rules", (rule.pattern,), rows, wrong, among=targets)
    out = []
    for row in rows:
        if row.path in targets:
            spec = _spec(row, config, wrong)
            row = dataclasses.replace(row, status="adapted", spec=spec)
            if row.path in tables:
                wrong.append(f"train: TokenRows of {row.path!r}, which has factors")
        elif row.path in tables:
            row = dataclasses.replace(row, status="adapted", spec=tables[row.path])
        elif row.path in trained:
            if not is_float(row):
                wrong.append(f"train: {row.path!r} is {row.dtype}, it has no gradient")
            row = dataclasses.replace(row, status="full")
        else:
            status = "frozen" if row.uses else "unused"
            row = dataclasses.replace(
                row, status=status, note=_why_left(row, config, excluded)
            )
        out.append(row)
    if wrong:
        raise TargetError(
            "This config does not fit the model: " + "; ".join(wrong) + "."
        )
    return tuple(out)


def _match(
    field: str,
    patterns: Iterable[str],
    rows: Sequence[Row],
    wrong: list[str],
    among: Iterable[str] | None = None,
) -> set[str]:
    """Returns the leaves that `patterns` match; notes each pattern without a match."""
    every = [row.path for row in rows]
    matched: set[str] = set()
    for pattern in patterns:
        hits = paths.select(pattern, every)
        kept = [path for path in hits if among is None or path in set(among)]
        if not hits:
            near = " or ".join(map(repr, paths.nearest(pattern, every, n=2)))
            wrong.append(
                f"{field}: {pattern!r} matched none of {len(every)} leaves, "
                f"nearest: {near}"
            )
        elif not kept:
            wrong.append(
                f"{field}: {pattern!r} matched {hits[0]!r}, but no adapted leaf, so it "
                "has no effect"
            )
        matched.update(kept)
    return matched


def _targets(
    rows: tuple[Row, ...],
    config: LoraConfig,
    excluded: set[str],
    trained: set[str],
    wrong: list[str],
) -> list[str]:
    """Returns the paths to adapt, in order."""
    if config.targets == "all-linear":
        usable = [
            row
            for row in rows
            if row.path not in excluded | trained and _is_plain_linear(row)
        ]
        chosen = [row for row in usable if not row.head] or usable
        if not chosen:
            wrong.append(
                "targets: 'all-linear' found no weight of a linear operation"
                + _hint([row for row in rows if row.op])
            )
        return [row.path for row in chosen]
    if callable(config.targets):
        hits = {row.path for row in rows if config.targets(row)}
        if not hits:
            wrong.append(f"targets: the predicate chose none of {len(rows)} leaves")
    else:
        hits = _match("targets", config.targets, rows, wrong)
        for pattern in config.targets:
            matched = set(paths.select(pattern, [row.path for row in rows]))
            if matched and matched <= excluded:
                wrong.append(f"targets: exclude= leaves nothing of {pattern!r}")
    both = sorted((hits & trained) - excluded)
    if both:
        wrong.append(f"{', '.join(map(repr, both))} in both targets and train")
    chosen = [row for row in rows if row.path in hits - excluded - trained]
    able = [row for row in rows if row.op and len(row.shape) > 1 and is_float(row)]
    for row in chosen:
        if row not in able:
            near = paths.nearest(row.path, [r.path for r in able], n=1)
            wrong.append(
                f"targets: {row.path!r} ({row.dtype}{list(row.shape)}) "
                f"{_what(row)}, so it takes no factors"
                + (f"; nearest that does: {near[0]!r}" if near else "")
            )
    return [row.path for row in chosen if row in able]


def _is_plain_linear(row: Row) -> bool:
    return row.op in ("linear", "conv") and len(row.shape) > 1 and is_float(row)


def is_float(row: Row) -> bool:
    """Returns whether a leaf is a floating-point array."""
    try:
        return bool(jnp.issubdtype(jnp.dtype(row.dtype), jnp.floating))
    except TypeError:
        return False


def _what(row: Row) -> str:
    """Returns in words what a leaf is that cannot be adapted."""
    if not is_float(row):
        return "is no floating-point array"
    if not row.uses:
        return "is not used by the function"
    if not row.op:
        use = row.uses[0]
        return f"is no weight of a linear operation (`{use.op}` at {use.where})"
    return "is a vector"


def _why_left(row: Row, config: LoraConfig, excluded: set[str]) -> str:
    """Returns why "all-linear" left out a leaf that could be adapted."""
    if not row.op or len(row.shape) < 2 or not is_float(row):
        return ""
    if row.path in excluded:
        return "excluded"
    if config.targets != "all-linear":
        return ""
    if row.op == "embedding":
        return "embedding: name it in targets to adapt it"
    if row.op == "merged":
        return "only merged on the fly: name it in targets to adapt it"
    return "output head: name it in targets, or in train"


def _hint(able: Sequence[Row]) -> str:
    names = ", ".join(repr(row.path) for row in able[:3])
    return f"; to adapt {names}, name it in targets" if able else ""


def _spec(row: Row, config: LoraConfig, wrong: list[str]) -> Spec:
    """Returns how `row` is adapted: the config, its rules, and what the trace found."""
    settings = _settings(config, row.path)
    parts: FusedParts | None = settings.get("parts")
    rank = parts.rank if parts else settings.get("rank", config.rank)
    alpha = settings.get("alpha", config.alpha)
    if alpha is None:
        alpha = max(parts.ranks) if parts else rank
    axes = settings.get("axes") or axes_of(row)
    method = settings.get("method", config.method)
    init = init_of(config, row.path)
    if sorted(axes.order) != list(range(len(row.shape))):
        wrong.append(
            f"axes: {axes} of {row.path!r} must name each of its {len(row.shape)} axes "
            "once"
        )
    else:
        _, n_in, n_out = axes.sizes(row.shape)
        if parts is not None:
            parts = _checked_parts(parts, row, axes, method, init, wrong)
        elif rank > min(n_in, n_out) and method != "vera":
            wrong.append(
                f"rank {rank} is above min(in, out) = min({n_in}, {n_out}) of "
                f"{row.path!r}: exclude it or give it Rule({row.path!r}, "
                f"rank={min(n_in, n_out)})"
            )
    spec = Spec(
        op="linear" if row.op == "merged" else row.op,
        axes=axes,
        rank=rank,
        alpha=float(alpha),
        rslora=config.rslora,
        dropout=float(settings.get("dropout", config.dropout)),
        method=method,
        init=init_name(init),
        shape=row.shape if method == "vera" else (),
        parts=parts,
    )
    wrong += init_clashes(row.path, row.shape, spec, init, METHODS[method], row.route)
    return spec


def init_of(config: LoraConfig, path: str) -> Any:
    """Returns the init of a leaf as the config or its rules have it, name or function.

    Examples:
      >>> init_of(LoraConfig(rules=(Rule("mlp/**", init="pissa"),)), "mlp/up")
      'pissa'
    """
    return _settings(config, path).get("init", config.init)


def _settings(config: LoraConfig, path: str) -> dict[str, Any]:
    """Returns what the rules set for a leaf."""
    settings: dict[str, Any] = {}
    for rule in config.rules:
        if paths.matches(rule.pattern, path):
            settings |= _set_fields(rule)
    return settings


def _checked_parts(
    parts: FusedParts, row: Row, axes: Axes, method: str, init: Any, wrong: list[str]
) -> FusedParts:
    """Returns `parts` with its axis counted from the front; notes what cannot be."""
    name = f"parts of {row.path!r}"
    axis = parts.axis + len(row.shape) if parts.axis < 0 else parts.axis
    if axis not in axes.fan_out:
        wrong.append(
            f"{name}: axis {parts.axis} is none of its fan-out axes {axes.fan_out}"
        )
        return parts
    if len(parts.sizes) != len(parts.ranks) or sum(parts.sizes) != row.shape[axis]:
        wrong.append(
            f"{name}: sizes {parts.sizes} must add up to {row.shape[axis]}, with a "
            f"rank for each, got ranks {parts.ranks}"
        )
        return parts
    _, n_in, n_out = axes.sizes(row.shape)
    rest = n_out // row.shape[axis]
    most = [min(n_in, size * rest) for size in parts.sizes]
    ranks_fit = all(0 <= r <= m for r, m in zip(parts.ranks, most, strict=True))
    if not ranks_fit or not parts.rank:
        wrong.append(f"{name}: ranks {parts.ranks} must be in 0 to {tuple(most)}")
    if (method, init) != ("lora", "kaiming"):
        wrong.append(
            f"{name}: they take method 'lora' with init 'kaiming', not {method!r} with "
            f"{init_name(init)!r}"
        )
    return dataclasses.replace(parts, axis=axis)


def _tables(
    rows: tuple[Row, ...], config: LoraConfig, trained: set[str], wrong: list[str]
) -> dict[str, Spec]:
    """Returns how the tables are adapted of which single rows are trained."""
    specs: dict[str, Spec] = {}
    for entry in config.train_rows:
        for path in sorted(_match("train", (entry.pattern,), rows, wrong)):
            row = next(row for row in rows if row.path == path)
            name = f"train: TokenRows({entry.pattern!r}): {path!r}"
            axes = axes_of(row)
            if row.op != "embedding" or len(axes.fan_in) != 1 or not is_float(row):
                wrong.append(f"{name} is no embedding table")
                continue
            n = row.shape[axes.fan_in[0]]
            if max(entry.ids) >= n:
                wrong.append(f"{name} has {n} rows, so no row {max(entry.ids)}")
            if path in trained or path in specs:
                wrong.append(f"{name} is trained twice")
            rank = len(entry.ids)
            specs[path] = Spec(
                op="embedding",
                axes=axes,
                rank=rank,
                alpha=float(rank),
                method="rows",
                init="zeros",
                shape=row.shape,
                rows=entry.ids,
            )
    return specs


def _set_fields(rule: Rule) -> dict[str, Any]:
    fields = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    return {k: v for k, v in fields.items() if k != "pattern" and v is not None}


def axes_of(row: Row) -> Axes:
    """Returns the roles of the leaf's axes, from all its factored uses.

    A lookup sets the direction; an axis is a batch axis only if every use has it so. A
    weight that is only merged has its last axis as fan-out.
    """
    uses = [use for use in row.uses if use.route == FACTORED]
    if not uses:
        ndim = len(row.shape)
        return Axes((), tuple(range(ndim - 1)), (ndim - 1,))
    uses.sort(key=lambda use: use.op != "gather")
    batch, fan_in, fan_out = [], [], []
    for i in range(len(row.shape)):
        use = next((use for use in uses if i not in use.batch), None)
        role = batch if use is None else fan_in if i in use.fan_in else fan_out
        role.append(i)
    return Axes(tuple(batch), tuple(fan_in), tuple(fan_out))
