"""Plain-text tables, sizes in words, and names and findings that share a line."""

import re
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from html import escape
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def table(
    head: Sequence[str], lines: Sequence[Sequence[str]], *, right: Sequence[str] = ()
) -> str:
    """Returns `lines` under `head` in aligned columns; `right` names those set right.

    Cells are made `printable`. A column is as wide as a terminal shows its characters.

    Examples:
      >>> print(table(("leaf", "n"), [("w", "12"), ("bias", "3")], right=["n"]))
      leaf   n
      ────  ──
      w     12
      bias   3
    """
    rows = [tuple(map(printable, cells)) for cells in (head, *lines)]
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    to_right = [name in right for name in head]
    rows.insert(1, tuple("─" * width for width in widths))
    return "\n".join(
        "  ".join(
            " " * (width - _width(cell)) + cell
            if flip
            else cell + " " * (width - _width(cell))
            for cell, width, flip in zip(row, widths, to_right, strict=True)
        ).rstrip()
        for row in rows
    )


def printable(text: str) -> str:
    r"""Returns `text` with an escape for each character that is not shown as itself.

    Names come from files of anybody: a line feed would break a table, and an escape
    sequence is a command to a terminal.

    Examples:
      >>> print(printable("layer\n0"))
      layer\n0
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _width(text: str) -> int:
    """Returns how many columns of a terminal `text` takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def html(head: Sequence[str], lines: Sequence[Sequence[str]], caption: str) -> str:
    """Returns `lines` under `head` as an HTML table with `caption`, for notebooks.

    Examples:
      >>> html(("leaf",), [("w<1>",)], "one leaf")[:48]
      '<table><caption>one leaf</caption><tr><th>leaf</'
    """

    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)

    body = "".join(f"<tr>{row(line, 'td')}</tr>" for line in lines)
    return (
        f"<table><caption>{escape(caption)}</caption>"
        f"<tr>{row(head, 'th')}</tr>{body}</table>"
    )


def count(n: int) -> str:
    """Returns `n` with thousands separated.

    Examples:
      >>> count(4718592)
      '4,718,592'
    """
    return f"{n:,}"


def nbytes(n: float) -> str:
    """Returns `n` bytes in words, in units of 1000.

    Examples:
      >>> nbytes(302_000)
      '302 kB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def pattern_of(name: str) -> str:
    """Returns `name` with a `*` for each number, the same for names that fold.

    Examples:
      >>> pattern_of("layer_12/kernel")
      'layer_*/kernel'
    """
    return re.sub(r"\d+", "*", name)


def folded(names: Sequence[str]) -> str:
    """Returns one name for `names` that differ only in numbers, made `printable`.

    Examples:
      >>> folded([f"layer_{i}/kernel" for i in range(12)]), folded(["layer_0/bias"])
      ('layer_{0..11}/kernel (×12)', 'layer_0/bias')
    """
    return printable(_as_one(names))


def _as_one(names: Sequence[str]) -> str:
    """Returns one text for `names` that differ only in numbers, with their count."""
    parts = [re.split(r"(\d+)", name) for name in names]
    out = []
    for column in zip(*parts, strict=True):
        values = sorted(set(column), key=lambda v: (len(v), v))
        out.append(column[0] if len(values) == 1 else f"{{{values[0]}..{values[-1]}}}")
    return "".join(out) + (f" (×{len(names)})" if len(names) > 1 else "")


def alike(named: Iterable[tuple[str, T]]) -> list[tuple[list[str], T]]:
    """Returns the names that differ only in numbers and have the same value, together.

    Examples:
      >>> alike([("layer_0", 8), ("head", 8), ("layer_1", 8), ("layer_2", 4)])
      [(['layer_0', 'layer_1'], 8), (['head'], 8), (['layer_2'], 4)]
    """
    groups: dict[tuple[str, T], list[str]] = {}
    for name, value in named:
        groups.setdefault((pattern_of(name), value), []).append(name)
    return [(names, value) for (_, value), names in groups.items()]


def shortened(text: str, most: int = 1000) -> str:
    """Returns `text`, without its middle if it has over `most` characters.

    Examples:
      >>> shortened("a" * 30, 20)
      'aaaaaaaa...aaaaaaaa'
    """
    half = most // 2 - 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def listed(findings: Iterable[str], n: int = 10, separator: str = "; ") -> str:
    """Returns `findings` as one text, cut after `n` with the count of those left out.

    Findings that differ only in the numbers of quoted names count as one. The middle of
    a very long finding is left out.

    Examples:
      >>> listed(["'a'", "'b'", "'c'"], 2, ", ")
      "'a', 'b', and 1 more"
      >>> listed([f"rank 64 is above 8 of 'layers/{i}/q'" for i in range(32)])
      "rank 64 is above 8 of 'layers/{0..31}/q' (×32)"
    """
    groups: dict[str, list[str]] = {}
    for finding in map(shortened, findings):
        kind = re.sub(r"'[^']*'", lambda quoted: pattern_of(quoted[0]), finding)
        groups.setdefault(kind, []).append(finding)
    shown, hidden = list(groups.values())[:n], list(groups.values())[n:]
    more = [f"and {sum(map(len, hidden))} more"] if hidden else []
    return separator.join([*map(_as_one, shown), *more])
