"""Shows a plan as a table with a line for each group of leaves."""

from collections.abc import Iterable, Sequence

from .._tables import alike, count, folded, html, nbytes, pattern_of, table
from ..factors import Spec
from ..transform.cost import PLATFORMS
from ..transform.discover import FACTORED, MERGED, WIDENED
from .coverage import Coverage
from .row import Row

_HEAD = ("leaf", "shape", "bytes", "status", "op", "in → out", "rank", "trained")
_HEAD += ("cost", "")


def as_text(leaves: Sequence[Row], coverage: Coverage) -> str:
    """Returns the table of a plan, with the totals below it."""
    head, lines = _table(leaves)
    shown = table(head, lines, right=("bytes", "rank", "trained", "cost"))
    return f"{shown}\n{_summary(leaves, coverage)}"


def as_html(leaves: Sequence[Row], coverage: Coverage) -> str:
    """Returns the table as HTML, for notebooks."""
    return html(*_table(leaves), _summary(leaves, coverage))


def _table(leaves: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the head and the lines; those of a quantised model show bytes."""
    head, lines = _HEAD, _lines(leaves)
    if any(row.storage for row in leaves):
        return head, lines
    at = head.index("bytes")
    return head[:at] + head[at + 1 :], [line[:at] + line[at + 1 :] for line in lines]


def _lines(leaves: Sequence[Row]) -> list[tuple[str, ...]]:
    """Returns the table's lines; leaves that differ only in numbers share one."""
    groups: dict[tuple, list[Row]] = {}
    for row in leaves:
        same = (
            pattern_of(row.path),
            *(row.shape, row.dtype, row.status, row.spec, row.op, row.route, row.note),
            *(row.storage, row.nbytes, bool(row.widenings)),
        )
        groups.setdefault(same, []).append(row)
    return [_line(rows) for rows in groups.values()]


def _summary(leaves: Sequence[Row], coverage: Coverage) -> str:
    """Returns the totals, and below them what is missed and each slow route."""
    trained = sum(row.trained for row in leaves)
    total = sum(row.size for row in leaves)
    share = 100 * trained / max(total, 1)
    in_full = sum(row.trained for row in leaves if row.status == "full")
    counts = (
        f"trained {trained:,} of {total:,} parameters ({share:.2f} %)"
        + (f", {in_full:,} of them in full" if in_full else "")
        + f"; {nbytes(4 * trained)} in float32, {nbytes(12 * trained)} with Adam"
    )
    merges = _places(
        (row.path, use.place)
        for row in leaves
        if row.status == "adapted"
        for use in row.uses
        if use.route not in (FACTORED, WIDENED)
    )
    warning = ["merged on the fly (correct, but slower):", *merges] if merges else []
    shares = [str(coverage)] if any(row.status == "adapted" for row in leaves) else []
    return "\n".join([counts, *shares, *_base(leaves), *_forms(leaves), *warning])


def _base(leaves: Sequence[Row]) -> list[str]:
    """Returns the bytes of a quantised base, and where its leaves are widened."""
    if not any(row.storage for row in leaves):
        return []
    dense = sum(row.dense_nbytes for row in leaves)
    stored = sum(row.nbytes for row in leaves)
    kinds = ", ".join(sorted({row.storage for row in leaves if row.storage}))
    size = (
        f"base {nbytes(dense)} dense, {nbytes(stored)} quantised ({kinds}; "
        f"{100 * stored / max(dense, 1):.0f} %)"
    )
    lines = _places((row.path, use.place) for row in leaves for use in row.widenings)
    told = "widened whole (correct, but takes the memory of the dense weight):"
    return [size, *([told, *lines] if lines else [])]


def _places(found: Iterable[tuple[str, str]]) -> list[str]:
    """Returns lines of paths and places, one for paths that differ only in numbers."""
    return [f"  {folded(names)}: {place}" for names, place in alike(found)]


def _forms(leaves: Sequence[Row]) -> list[str]:
    """Returns a line on the weights whose products use a temporary weight, if any."""
    adapted = [row for row in leaves if row.status == "adapted"]
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
    name = folded([r.path for r in rows])
    shape = f"{row.dtype}[{','.join(map(str, row.shape))}]"
    if row.storage:
        shape = f"{row.storage} of {shape}"
    size = nbytes(sum(r.nbytes for r in rows))
    note = row.note if row.route else ""  # biases and norms need no explanation
    if row.widenings:
        note = "; ".join(filter(None, [note, "widened whole, see below"]))
    if row.spec is None:
        trained = count(sum(r.trained for r in rows)) if row.trained else ""
        return (name, shape, size, row.status, row.op, "", "", trained, "", note)
    n_batch, n_in, n_out = row.spec.axes.sizes(row.shape)
    ends = f"{n_in} → {n_out}" + (f" ×{n_batch}" if row.spec.axes.batch else "")
    cost = row.spec.rank * (n_in + n_out) / (n_in * n_out)
    return (
        name,
        shape,
        size,
        row.status,
        row.op if row.route == FACTORED else f"{row.op} ({row.route})",
        ends,
        _rank(row.spec),
        count(sum(r.trained for r in rows)),
        f"+{100 * cost:.1f} %",
        note,
    )


def _rank(spec: Spec) -> str:
    """Returns the rank as the table shows it, with the method if it is not LoRA."""
    if spec.parts is not None:
        return "+".join(map(str, spec.parts.ranks))
    return f"{spec.rank}" if spec.method == "lora" else f"{spec.rank} {spec.method}"
