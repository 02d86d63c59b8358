"""Plain-text tables, sizes in words, and lists of findings cut to a length."""

from collections.abc import Sequence
from html import escape


def table(
    head: Sequence[str], lines: Sequence[Sequence[str]], *, right: Sequence[str] = ()
) -> str:
    """Returns `lines` under `head` in aligned columns; `right` names those set right.

    Examples:
      >>> print(table(("leaf", "n"), [("w", "12"), ("bias", "3")], right=["n"]))
      leaf   n
      ────  ──
      w     12
      bias   3
    """
    rows = [tuple(head), *map(tuple, lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_right = [name in right for name in head]
    rows.insert(1, tuple("─" * width for width in widths))
    return "\n".join(
        "  ".join(
            cell.rjust(width) if flip else cell.ljust(width)
            for cell, width, flip in zip(row, widths, to_right, strict=True)
        ).rstrip()
        for row in rows
    )


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


def listed(findings: Sequence[str], n: int = 10, separator: str = "; ") -> str:
    """Returns the first `n` findings as one text, with the count of those left out.

    Examples:
      >>> listed(["'a'", "'b'", "'c'"], 2, ", ")
      "'a', 'b', and 1 more"
    """
    more = [f"and {len(findings) - n} more"] if len(findings) > n else []
    return separator.join([*findings[:n], *more])
