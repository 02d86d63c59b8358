"""What a config means for the leaves of a model: status, spec and note of each."""

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from .. import paths
from .._tables import listed
from ..config import LoraConfig, Predicate, Rule
from ..errors import TargetError
from ..factors import Axes, Form, FusedParts, Spec
from ..factors._scale import scale_fault
from ..methods import METHODS, find_init, init_clashes, init_name, method_of
from ..transform import LINEAR
from ..transform.discover import DERIVED, ELEMENTWISE, FACTORED, Use
from ..transform.primitives import OPERATIONS
from .row import Row

_HINTS = 10  # findings with the nearest path, which takes time to find

Settings = dict[str, Any]  # what the config and its rules set for one leaf


def resolve(rows: tuple[Row, ...], config: LoraConfig) -> tuple[Row, ...]:
    """Returns `rows` with status, spec and note; raises one error for all misfits."""
    wrong: list[str] = []
    excluded = _match("exclude", config.exclude, rows, wrong)
    trained = _match("train", config.train_whole, rows, wrong)
    tables = _tables(rows, config, trained, wrong)
    settings = _settings(config, [row.path for row in rows])
    targets = _targets(rows, config, settings, excluded, trained, wrong)
    notes = {
        row.path: _why_left(row, config, settings[row.path], excluded)
        for row in rows
        if row.path not in targets
    }
    _match("rules", [rule.pattern for rule in config.rules], rows, wrong, left=notes)
    out = []
    for row in rows:
        if row.path in targets:
            row = _adapted(row, config, settings[row.path], wrong)
            if row.path in tables:
                wrong.append(f"train: {row.path!r} takes no TokenRows: it has factors")
        elif row.path in tables:
            row = dataclasses.replace(row, status="adapted", spec=tables[row.path])
        elif row.path in trained:
            if not is_float(row):
                wrong.append(
                    f"train: {row.path!r} is {row.dtype}, which has no gradient"
                )
            if row.storage:
                wrong.append(
                    f"train: {row.path!r} is quantised ({row.storage}), and codes have "
                    "no gradient: leave it out of targets= of jlora.quantize"
                )
            row = dataclasses.replace(row, status="full", note=_no_weight(row))
        else:
            status = "frozen" if row.uses else "unused"
            row = dataclasses.replace(row, status=status, note=notes[row.path])
        out.append(row)
    if wrong:
        lines = listed(wrong, separator="\n  ")
        begin = "\n  " if "\n" in lines else " "
        raise TargetError(f"This config does not fit the model:{begin}{lines}.")
    return tuple(out)


def leave_merged(rows: tuple[Row, ...], config: LoraConfig) -> tuple[Row, ...]:
    """Returns `rows`; "all-linear" leaves out what turned out to be merged."""
    if config.targets != "all-linear":
        return rows
    left = {row.path for row in rows if row.spec and _unsuited(row)} - {
        row.path for row in rows if row.spec and row.op == "embedding"
    }
    if left and not any(row.spec for row in rows if row.path not in left):
        raise TargetError(
            "This config does not fit the model: targets: 'all-linear' found no weight "
            f"of a linear operation{_hint([r for r in rows if r.path in left])}."
        )
    return tuple(
        dataclasses.replace(
            row, status="frozen", spec=None, init=None, note=_unsuited(row)
        )
        if row.path in left
        else row
        for row in rows
    )


def _match(
    field: str,
    patterns: Iterable[str],
    rows: Sequence[Row],
    wrong: list[str],
    left: Mapping[str, str] | None = None,
    excluded: Collection[str] = (),
) -> set[str]:
    """Returns the leaves that `patterns` match; adds the other patterns to `wrong`.

    `left` says of the leaves that do not count why they do not. `excluded` are those
    that another field takes back.
    """
    every = {row.path: row for row in rows}
    matched: set[str] = set()
    for pattern in patterns:
        hits = paths.select(pattern, every)
        kept = [path for path in hits if left is None or path not in left]
        if not hits:
            told = f"{field}: {pattern!r} matched none of {len(every)} leaves"
            hint = len(wrong) < _HINTS and f", {_instead(field, pattern, rows)}"
            wrong.append(told + (hint or ""))
        elif left is not None and not kept:
            why = f" ({left[hits[0]]})" if left[hits[0]] else ""
            wrong.append(
                f"{field}: {pattern!r} matched {hits[0]!r}, but no adapted leaf, so it "
                f"has no effect{why}"
            )
        if excluded and hits and all(path in excluded for path in hits):
            wrong.append(f"{field}: exclude= removes every match of {pattern!r}")
        matched.update(kept)
    return matched


def _instead(field: str, pattern: str, rows: Sequence[Row]) -> str:
    """Returns what to write in place of a pattern that matches nothing."""
    if field == "targets" and re.sub("[-_ ]", "", pattern.lower()) == "alllinear":
        return "it is not a glob: write targets='all-linear', and nothing beside it"
    able = [row.path for row in rows if field != "targets" or _can_adapt(row)]
    tails = set()
    if not set("*/") & set(pattern):  # the name of a module, as PEFT takes it
        for path in able:
            names = path.split("/")
            at = [i for i, name in enumerate(names) if paths.matches(pattern, name)]
            tails |= {"/".join(names[i + 1 :]) for i in at[-1:]}
    if tails:
        tail = tails.pop() if len(tails) == 1 else "**"
        glob = f"**/{pattern}/{tail}".removesuffix("/")
        return f"a glob is for whole paths: write {glob!r}"
    begin = pattern.rstrip("/")
    below = paths.select(f"{begin}/**/*", able) if begin else ()
    if below:
        lasts = {path.rpartition("/")[2] for path in below}
        last = lasts.pop() if field == "targets" and len(lasts) == 1 else ""
        glob = f"{begin}/**/{last}".removesuffix("/")
        return f"it is the beginning of paths, and not a whole one: write {glob!r}"
    near = paths.nearest(pattern, [row.path for row in rows], n=2)
    return f"nearest: {' or '.join(map(repr, near))}"


def _targets(
    rows: tuple[Row, ...],
    config: LoraConfig,
    settings: Mapping[str, Settings],
    excluded: set[str],
    trained: set[str],
    wrong: list[str],
) -> set[str]:
    """Returns the paths to adapt."""
    taken = excluded | trained
    if config.targets == "all-linear":
        suited = [row for row in rows if _can_adapt(row) and not _unsuited(row)]
        usable = [row for row in suited if row.path not in taken]
        chosen = [row for row in usable if not row.head] or usable
        wide = [row for row in chosen if not _too_narrow(row, settings[row.path])]
        chosen = wide or chosen
        if suited and not chosen:
            wrong.append(
                "targets: exclude= and train= take every weight that 'all-linear' "
                "means. To train only what train= names, write targets=()"
            )
        elif not chosen:
            wrong.append(
                "targets: 'all-linear' found no weight of a linear operation"
                + _hint([row for row in rows if row.op])
            )
        return {row.path for row in chosen}
    if callable(config.targets):
        hits = {row.path for row in rows if _chooses(config.targets, row)}
        if not hits:
            wrong.append(f"targets: the predicate chose none of {len(rows)} leaves")
    else:
        hits = _match("targets", config.targets, rows, wrong, excluded=excluded)
    both = sorted((hits & trained) - excluded)
    if both:
        wrong.append(f"{listed(map(repr, both), 3, ', ')} in both targets and train")
    chosen = [row for row in rows if row.path in hits and row.path not in taken]
    able = dict.fromkeys(row.path for row in rows if _can_adapt(row))
    for row in chosen:
        if row.path not in able:
            few = len(wrong) < _HINTS
            near = paths.nearest(row.path, tuple(able), n=1) if few else ()
            wrong.append(
                f"targets: {row.path!r} ({row.dtype}{list(row.shape)}) "
                f"{_what(row)}, so it takes no factors"
                + (f"; nearest that does: {near[0]!r}" if near else "")
            )
    return {row.path for row in chosen if row.path in able}


def _chooses(predicate: Predicate, row: Row) -> bool:
    """Returns whether the user's `predicate` chooses `row`."""
    try:
        return bool(predicate(row))
    except Exception as error:
        raise TargetError(
            f"targets: the predicate failed at {row.path!r}: {type(error).__name__}: "
            f"{error}. It is called with a jlora.Row, as in "
            "targets=lambda row: 'attn' in row.path."
        ) from error


def _can_adapt(row: Row) -> bool:
    return bool(row.op) and len(row.shape) > 1 and is_float(row)


def is_float(row: Row) -> bool:
    """Returns whether a leaf is a floating-point array."""
    return _names_float(row.dtype)


@functools.cache
def _names_float(dtype: str) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


def _what(row: Row) -> str:
    """Returns in words why a leaf cannot be adapted."""
    if not is_float(row):
        return "is not a floating-point array"
    if not row.uses:
        return "is not used by the function"
    if len(row.shape) < 2 and any(use.op in LINEAR for use in row.uses):
        return "is a vector"
    if not row.op:
        use = row.uses[0]
        place = f" ({use.place})" if use.op else ""
        return f"is not a weight of a linear operation{place}"
    return "is a vector"


def _why_left(
    row: Row, config: LoraConfig, settings: Settings, excluded: set[str]
) -> str:
    """Returns why a leaf is not adapted; empty if the config just does not name it."""
    if not _can_adapt(row):
        return _no_weight(row)
    if row.path in excluded:
        return "excluded"
    if config.targets != "all-linear":
        return ""
    head = "output head: name it in targets, or in train" if row.head else ""
    return _unsuited(row) or head or _too_narrow(row, settings)


def _no_weight(row: Row) -> str:
    """Returns why a leaf is not the weight of a linear operation; empty if it is."""
    if row.route:
        return "" if is_float(row) else "not a floating-point array"
    if not row.uses:
        return "not used by the function"
    met = {use.route: use.op for use in reversed(row.uses)}
    if ELEMENTWISE in met:
        return f"elementwise: `{met[ELEMENTWISE]}`" if met[ELEMENTWISE] else ELEMENTWISE
    return f"meets no data before `{met[DERIVED]}`" if DERIVED in met else ""


def _unsuited(row: Row) -> str:
    """Returns why "all-linear" does not mean a weight, or an empty text."""
    if row.op == "embedding":
        return "embedding: name it in targets to adapt it"
    if row.op == "merged":
        return "only merged on the fly: name it in targets to adapt it"
    factored = [use for use in row.uses if use.route == FACTORED]
    if all(use.mixed for use in factored):
        return "added to data before its product: name it in targets to adapt it"
    if row.route != FACTORED:
        return "also merged on the fly: name it in targets to adapt it"
    return ""


def _too_narrow(row: Row, settings: Settings) -> str:
    """Returns why a leaf is too narrow for its rank, or an empty text."""
    axes, rank = settings["axes"] or axes_of(row), settings["rank"]
    known = sorted(axes.order) == list(range(len(row.shape)))
    if settings["parts"] or settings["method"] == "vera" or not known:
        return ""
    own = METHODS[settings["method"]].init
    init = find_init(settings["init"]) if own is None else None
    times = init.rank_factor if init else 1
    _, *sides = axes.sizes(row.shape)
    if rank * times <= min(sides):
        return ""
    needed = f"rank {rank}" if times == 1 else f"{times} times rank {rank}"
    return f"{needed} is above min(in, out) = {min(sides)}: a Rule can lower it"


def _hint(able: Sequence[Row]) -> str:
    names = listed([repr(row.path) for row in able], 3, ", ")
    return f"; to adapt {names}, name it in targets" if able else ""


def _adapted(row: Row, config: LoraConfig, settings: Settings, wrong: list[str]) -> Row:
    """Returns `row` with its spec and init; adds what does not fit to `wrong`."""
    spec = _spec(row, config, settings, wrong)
    init = settings["init"]
    wrong += init_clashes(
        row.path, row.shape, spec, init, METHODS[spec.method], row.route
    )
    found = find_init(init) if method_of(spec).init is None else None
    uses = _in_form(row, spec.form, wrong)
    return dataclasses.replace(row, status="adapted", uses=uses, spec=spec, init=found)


def _in_form(row: Row, form: Form, wrong: list[str]) -> tuple[Use, ...]:
    """Returns the uses of `row`; its products have the form that a rule says."""
    if form == "auto":
        return row.uses
    if form == "merged" and not any(use.forms for use in row.uses):
        wrong.append(
            f"form: {row.path!r} has no product that a temporary weight can serve: it "
            "needs one dtype of activation, weight and result, and neither codes nor "
            "explicit axes nor shard_map. Leave form= out"
        )
    return tuple(
        dataclasses.replace(use, forms=(form,) * len(use.forms)) for use in row.uses
    )


def _settings(config: LoraConfig, every: Sequence[str]) -> dict[str, Settings]:
    """Returns what the config and the rules that match it set for each leaf."""
    names = [f.name for f in dataclasses.fields(Rule) if f.name != "pattern"]
    common = {name: getattr(config, name, None) for name in names}
    settings = {path: dict(common) for path in every}
    for rule in config.rules:
        own = {name: getattr(rule, name) for name in names}
        own = {name: value for name, value in own.items() if value is not None}
        for path in paths.select(rule.pattern, settings):
            settings[path] |= own
    return settings


def _spec(row: Row, config: LoraConfig, settings: Settings, wrong: list[str]) -> Spec:
    """Returns the spec of `row` from its settings and what the trace found."""
    parts: FusedParts | None = settings["parts"]
    rank = parts.rank if parts else settings["rank"]
    alpha = settings["alpha"]
    if alpha is None:
        alpha = max(parts.ranks, default=0) if parts else rank
    axes = settings["axes"] or axes_of(row)
    method, init = settings["method"], settings["init"]
    if sorted(axes.order) != list(range(len(row.shape))):
        wrong.append(
            f"axes: {axes} of {row.path!r} must name each of its {len(row.shape)} axes "
            "once"
        )
    else:
        _, n_in, n_out = axes.sizes(row.shape)
        if parts is not None:
            parts = _checked_parts(parts, row, axes, method, init, wrong)
        elif not min(n_in, n_out):
            wrong.append(f"{row.path!r} has an axis of size 0: exclude it")
        elif rank > min(n_in, n_out) and method != "vera":
            wrong.append(
                f"rank {rank} is above min(in, out) = min({n_in}, {n_out}) of "
                f"{row.path!r}: exclude it or give it Rule({row.path!r}, "
                f"rank={min(n_in, n_out)})"
            )
    highest = max(parts.ranks, default=0) if parts else rank
    fault = scale_fault(alpha, highest, config.rslora)
    if fault:  # a spec in its place, until all that is wrong is raised together
        wrong.append(f"{row.path!r}: {fault}")
        rank, alpha, parts = 1, 1.0, None
    return Spec(
        op=_operation(row),
        axes=axes,
        rank=rank,
        alpha=float(alpha),
        rslora=config.rslora,
        dropout=float(settings["dropout"]),
        method=method,
        init=init_name(init),
        shape=row.shape if method == "vera" else (),
        parts=parts,
        form=settings["form"] or "auto",
        invocation=config.invocation,
    )


def _operation(row: Row) -> str:
    """Returns the operation of a spec; of a merged weight, what meets it."""
    if row.op != "merged":
        return row.op
    known = [OPERATIONS[use.op] for use in row.uses if use.op in OPERATIONS]
    return known[0] if known else "linear"


def _checked_parts(
    parts: FusedParts, row: Row, axes: Axes, method: str, init: object, wrong: list[str]
) -> FusedParts:
    """Returns `parts` with a positive axis; adds what does not fit to `wrong`."""
    name = f"parts of {row.path!r}"
    axis = parts.axis + len(row.shape) if parts.axis < 0 else parts.axis
    if axis not in axes.fan_out:
        wrong.append(
            f"{name}: axis {parts.axis} is not one of its fan-out axes {axes.fan_out}"
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
            f"{name}: method and init must be 'lora' and 'kaiming', got {method!r} and "
            f"{init_name(init)!r}"
        )
    return dataclasses.replace(parts, axis=axis)


def _tables(
    rows: tuple[Row, ...], config: LoraConfig, trained: set[str], wrong: list[str]
) -> dict[str, Spec]:
    """Returns the specs of the embedding tables whose single rows are trained."""
    specs: dict[str, Spec] = {}
    by_path = {row.path: row for row in rows}
    for tokens in config.train_rows:
        for path in sorted(_match("train", (tokens.pattern,), rows, wrong)):
            row = by_path[path]
            name = f"train: TokenRows({tokens.pattern!r}): {path!r}"
            axes = axes_of(row)
            if row.op != "embedding" or len(axes.fan_in) != 1 or not is_float(row):
                wrong.append(f"{name} is not an embedding table")
                continue
            n = row.shape[axes.fan_in[0]]
            if max(tokens.ids) >= n:
                wrong.append(f"{name} has {n} rows, but no row {max(tokens.ids)}")
            if path in trained or path in specs:
                wrong.append(f"{name} is trained twice")
            rank = len(tokens.ids)
            specs[path] = Spec(
                op="embedding",
                axes=axes,
                rank=rank,
                alpha=float(rank),
                method="rows",
                init="zeros",
                shape=row.shape,
                rows=tokens.ids,
            )
    return specs


def axes_of(row: Row) -> Axes:
    """Returns the roles of the leaf's axes, from all its factored uses.

    A lookup sets the direction, unless it picks single numbers. An axis is a batch axis
    only if it is one in every use. Of a weight that is only merged, a convolution says
    the fan-out; else it is the last axis.
    """
    uses = [use for use in row.uses if use.route == FACTORED]
    uses = uses or [use for use in row.uses if use.fan_out][:1]
    if not uses:
        ndim = len(row.shape)
        return Axes((), tuple(range(ndim - 1)), (ndim - 1,))
    uses.sort(key=lambda use: (not use.fan_out, use.op != "gather"))
    batch, fan_in, fan_out = [], [], []
    for i in range(len(row.shape)):
        use = next((use for use in uses if i not in use.batch), None)
        role = batch if use is None else fan_in if i in use.fan_in else fan_out
        role.append(i)
    return Axes(tuple(batch), tuple(fan_in), tuple(fan_out))
