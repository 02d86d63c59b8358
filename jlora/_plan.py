"""`plan`: what will be adapted, how, and at what cost, from one abstract trace."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from . import paths
from ._checks import check_function
from ._tables import count, html, nbytes, table
from .config import LoraConfig, Rule
from .errors import ConfigError, TargetError
from .factors import Axes, Parts, Spec
from .methods import METHODS, init_clashes, init_name, leaf_shapes
from .transform.cost import PLATFORMS
from .transform.discover import FACTORED, MERGED, Use, discover
from .transform.heads import output_heads
from .transform.stage import is_array, stage

Status = Literal["adapted", "full", "frozen", "unused"]
_OPS = {"gather": "embedding", "conv_general_dilated": "conv"}


@dataclasses.dataclass(frozen=True)
class Row:
    """What the plan says of one leaf.

    Attributes:
      path: its name.
      shape: its shape; `()` for a leaf that is no array.
      dtype: its dtype's name.
      uses: where the function uses it.
      status: `"adapted"`, `"full"` (trained whole), `"frozen"` or `"unused"`.
      spec: how it is adapted, if it is.
      head: whether it is an output head: no parameter but a bias acts after it.
      note: why a linear weight was left out.

    Examples:
      `targets` may be a function of it:

      >>> import jax.numpy as jnp, jlora
      >>> params = {"layer_0": jnp.ones((4, 4)), "layer_1": jnp.ones((4, 4))}
      >>> fn = lambda p, x: x @ p["layer_0"] @ p["layer_1"]
      >>> config = jlora.LoraConfig(rank=2, targets=lambda row: row.layer >= 1)
      >>> for row in jlora.plan(fn, params, jnp.ones((1, 4)), config=config).rows():
      ...     print(row.path, row.op, row.status, row.trained)
      layer_0 linear frozen 0
      layer_1 linear adapted 16
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    uses: tuple[Use, ...]
    status: Status = "frozen"
    spec: Spec | None = None
    head: bool = False
    note: str = ""

    @property
    def op(self) -> str:
        """`"linear"`, `"embedding"`, `"conv"`, `"merged"`, or `""` if not a weight."""
        ops = [_OPS.get(use.op, "linear") for use in self.uses if use.route == FACTORED]
        if "embedding" in ops:
            return "embedding"
        if ops:
            return ops[0]
        return "merged" if any(use.route == MERGED for use in self.uses) else ""

    @property
    def route(self) -> str:
        """`"factored"`, `"merged"`, `"factored+merged"`, or `""` if not a weight."""
        routes = {use.route for use in self.uses}
        if FACTORED in routes:
            return FACTORED if routes == {FACTORED} else "factored+merged"
        return MERGED if MERGED in routes else ""

    @property
    def layer(self) -> int:
        """The first number in the path, the layer's index as a rule; -1 without one."""
        number = re.search(r"\d+", self.path)
        return int(number.group()) if number else -1

    @property
    def size(self) -> int:
        """How many entries the leaf has."""
        return math.prod(self.shape)

    @property
    def trained(self) -> int:
        """How many entries are trained for it: of A and B, or its own."""
        if self.spec is not None:
            return sum(map(math.prod, leaf_shapes(self.spec, self.shape).values()))
        return self.size if self.status == "full" else 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is adapted and how; static and hashable. Printing it shows the table.

    Attributes:
      config: the intent it was made from.
      leaves: a `Row` for each leaf of the parameters, in the tree's order.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"w": jnp.ones((4, 8)), "head": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["head"]
      >>> config = jlora.LoraConfig(rank=2, train="head")
      >>> plan = jlora.plan(fn, params, jnp.ones((1, 4)), config=config)
      >>> plan.adapted, plan.full, plan.trained_count
      (('w',), ('head',), 40)
      >>> {row.path: row.shape for row in plan.rows()}
      {'head': (8, 2), 'w': (4, 8)}
    """

    config: LoraConfig
    leaves: tuple[Row, ...]

    def rows(self) -> tuple[Row, ...]:
        """Returns a `Row` for each leaf of the parameters, in the tree's order."""
        return self.leaves

    @property
    def adapted(self) -> tuple[str, ...]:
        """Paths of the leaves that get factors."""
        return tuple(row.path for row in self.leaves if row.status == "adapted")

    @property
    def full(self) -> tuple[str, ...]:
        """Paths of the leaves trained in full."""
        return tuple(row.path for row in self.leaves if row.status == "full")

    @property
    def trained_count(self) -> int:
        """How many numbers are trained."""
        return sum(row.trained for row in self.leaves)

    @property
    def total_count(self) -> int:
        """How many numbers the parameters have."""
        return sum(row.size for row in self.leaves)

    def __str__(self) -> str:
        shown = table(_HEAD, _lines(self), right=("rank", "trained", "cost"))
        return f"{shown}\n{_summary(self)}"

    def _repr_html_(self) -> str:
        return html(_HEAD, _lines(self), _summary(self))


def plan(
    fn: Callable, params: Any, /, *args: Any, config: LoraConfig, **kwargs: Any
) -> Plan:
    """Returns what `config` means for `fn`: what is adapted, how, and at what cost.

    `fn(params, *args, **kwargs)` is traced once, without running it or allocating
    anything. The trace, not names, says which leaves are weights of linear operations,
    over which axes they sum, and which can only be merged on the fly.

    Args:
      fn: the function that `apply_lora` will wrap.
      params: any pytree of arrays or `jax.ShapeDtypeStruct`s.
      *args: `fn`'s other arguments, arrays or shapes.
      config: what to adapt and how.
      **kwargs: `fn`'s keyword arguments.

    Raises:
      ConfigError: if `config` is no `LoraConfig`, or `fn` no function.
      TargetError: lists every pattern that matches nothing (with the nearest path),
        every target that is no weight of a linear operation, every rank above
        `min(fan-in, fan-out)`, every leaf that its init cannot start, and patterns
        that contradict each other.

    Examples:
      >>> import jax, jax.numpy as jnp, jlora
      >>> shape = jax.ShapeDtypeStruct
      >>> params = {
      ...     "embed": shape((100, 16), jnp.float32),
      ...     "up": shape((16, 64), jnp.float32),
      ...     "down": shape((64, 16), jnp.float32),
      ...     "head": shape((16, 2), jnp.float32),
      ... }
      >>> def fn(p, ids):
      ...     x = p["embed"][ids]
      ...     return (x + jnp.tanh(x @ p["up"]) @ p["down"]) @ p["head"]
      >>> ids = shape((4, 8), jnp.int32)
      >>> plan = jlora.plan(fn, params, ids, config=jlora.LoraConfig(rank=4))
      >>> plan.adapted, plan.trained_count
      (('down', 'up'), 640)
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"config must be a jlora.LoraConfig, got {type(config).__name__}. Write "
            "config=jlora.LoraConfig(rank=8)."
        )
    check_function("plan", fn)
    leaves, _ = paths.flatten(params)
    staged = stage(fn, params, args, kwargs)
    names: list[str | None] = [None] * len(staged.inputs)
    for path, slot in zip(leaves, staged.param_slots, strict=True):
        if slot is not None:
            names[slot] = path
    uses: dict[str, list[Use]] = {path: [] for path in leaves}
    for use in discover(staged.code, staged.inputs, names):
        uses[use.path].append(use)
    heads = output_heads(staged.code, names)
    rows = tuple(
        Row(
            path,
            tuple(leaf.shape) if is_array(leaf) else (),
            str(leaf.dtype) if is_array(leaf) else type(leaf).__name__,
            tuple(uses[path]),
            head=path in heads,
        )
        for path, leaf in leaves.items()
    )
    return Plan(config, _resolve(rows, config))


def _resolve(rows: tuple[Row, ...], config: LoraConfig) -> tuple[Row, ...]:
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
                wrong.append(f"train: Rows of {row.path!r}, which has factors")
        elif row.path in tables:
            row = dataclasses.replace(row, status="adapted", spec=tables[row.path])
        elif row.path in trained:
            if not _is_float(row):
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
    able = [row for row in rows if row.op and len(row.shape) > 1 and _is_float(row)]
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
    return row.op in ("linear", "conv") and len(row.shape) > 1 and _is_float(row)


def _is_float(row: Row) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(row.dtype), jnp.floating))
    except TypeError:
        return False


def _what(row: Row) -> str:
    """Returns in words what a leaf is that cannot be adapted."""
    if not _is_float(row):
        return "is no floating-point array"
    if not row.uses:
        return "is not used by the function"
    if not row.op:
        use = row.uses[0]
        return f"is no weight of a linear operation (`{use.op}` at {use.where})"
    return "is a vector"


def _why_left(row: Row, config: LoraConfig, excluded: set[str]) -> str:
    """Returns why "all-linear" left out a leaf that could be adapted."""
    if not row.op or len(row.shape) < 2 or not _is_float(row):
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
    parts: Parts | None = settings.get("parts")
    rank = parts.rank if parts else settings.get("rank", config.rank)
    alpha = settings.get("alpha", config.alpha)
    if alpha is None:
        alpha = max(parts.ranks) if parts else rank
    axes = settings.get("axes") or _axes(row)
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
    parts: Parts, row: Row, axes: Axes, method: str, init: Any, wrong: list[str]
) -> Parts:
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
            name = f"train: Rows({entry.pattern!r}): {path!r}"
            axes = _axes(row)
            if row.op != "embedding" or len(axes.fan_in) != 1 or not _is_float(row):
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


def _axes(row: Row) -> Axes:
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


_HEAD = ("leaf", "shape", "status", "op", "in → out", "rank", "trained", "cost", "")


def _lines(plan: Plan) -> list[tuple[str, ...]]:
    """Returns the table's lines; leaves alike in all but numbers share one."""
    groups: dict[tuple, list[Row]] = {}
    for row in plan.leaves:
        same = (
            re.sub(r"\d+", "*", row.path),
            *(row.shape, row.dtype, row.status, row.spec, row.op, row.route, row.note),
        )
        groups.setdefault(same, []).append(row)
    return [_line(rows) for rows in groups.values()]


def _summary(plan: Plan) -> str:
    """Returns what is trained in all, and below it each weight merged on the fly."""
    trained, total = plan.trained_count, plan.total_count
    share = 100 * trained / max(total, 1)
    in_full = sum(row.trained for row in plan.leaves if row.status == "full")
    counts = (
        f"trained {trained:,} of {total:,} parameters ({share:.2f} %)"
        + (f", {in_full:,} of them in full" if in_full else "")
        + f"; {nbytes(4 * trained)} in float32, {nbytes(12 * trained)} with Adam"
    )
    merges = [
        f"  {row.path}: `{use.op}` at {use.where}"
        for row in plan.leaves
        if row.status == "adapted"
        for use in row.uses
        if use.route != FACTORED
    ]
    warning = ["merged on the fly (right, but slower):", *merges] if merges else []
    return "\n".join([counts, *_forms(plan), *warning])


def _forms(plan: Plan) -> list[str]:
    """Returns a line on the products that are computed with a temporary weight."""
    adapted = [row for row in plan.leaves if row.status == "adapted"]
    uses = [[use.forms for use in row.uses if use.forms] for row in adapted]
    counts = [
        sum(any(forms[i] == MERGED for forms in own) for own in uses)
        for i in range(len(PLATFORMS))
    ]
    if not any(counts):
        return []
    shown = ", ".join(
        f"{n} of {len(adapted)} on {name}"
        for n, name in zip(counts, ("a CPU", "an accelerator"), strict=True)
    )
    return [f"computed as x (w + s a b), since many tokens meet them: {shown}"]


def _line(rows: list[Row]) -> tuple[str, ...]:
    row = rows[0]
    name = _shared_name([r.path for r in rows])
    shape = f"{row.dtype}[{','.join(map(str, row.shape))}]"
    if row.spec is None:
        trained = count(sum(r.trained for r in rows)) if row.trained else ""
        return (name, shape, row.status, row.op, "", "", trained, "", row.note)
    n_batch, n_in, n_out = row.spec.axes.sizes(row.shape)
    ends = f"{n_in} → {n_out}" + (f" ×{n_batch}" if row.spec.axes.batch else "")
    cost = row.spec.rank * (n_in + n_out) / (n_in * n_out)
    return (
        name,
        shape,
        row.status,
        row.op if row.route == FACTORED else f"{row.op} ({row.route})",
        ends,
        _rank(row.spec),
        count(sum(r.trained for r in rows)),
        f"+{100 * cost:.1f} %",
        row.note,
    )


def _rank(spec: Spec) -> str:
    """Returns the rank as the table shows it, with the method if it is not LoRA."""
    if spec.parts is not None:
        return "+".join(map(str, spec.parts.ranks))
    return f"{spec.rank}" if spec.method == "lora" else f"{spec.rank} {spec.method}"


def _shared_name(names: list[str]) -> str:
    """Returns one name for paths that differ in numbers: `layer_{0..5}/kernel`."""
    parts = [re.split(r"(\d+)", name) for name in names]
    out = []
    for column in zip(*parts, strict=True):
        values = sorted(set(column), key=lambda v: (len(v), v))
        out.append(column[0] if len(values) == 1 else f"{{{values[0]}..{values[-1]}}}")
    return "".join(out) + (f" (×{len(names)})" if len(names) > 1 else "")
