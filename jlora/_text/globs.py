"""Globs over paths as automata; `paths.matches` says what the signs mean.

The text to match is a path with a `/` after each component, also after the last. So
`a/**` takes `a/` itself, and `**` is no exception at either end.
"""

import functools
import re
from collections.abc import Iterator

from ..errors import TreeError
from .automata import Automaton, members, reached

_MAX_PATTERN, _MAX_DIGITS = 4_000, 18
_TOKEN = re.compile(
    r"(?P<set>\[!?\]?[^\]/]*\])|(?P<range>\{[0-9]+\.\.[0-9]+\})|.", re.DOTALL
)
_ANY = re.compile("[^/]")  # a character inside a component


@functools.lru_cache(maxsize=1024)
def compile_glob(pattern: str) -> Automaton:
    """Returns the automaton of a glob, for paths with a `/` at the end.

    Raises:
      TreeError: if it is too long, has a `{` without its `}`, or a set that begins
        with `^`, which means the others elsewhere.
    """
    if len(pattern) > _MAX_PATTERN:
        raise TreeError(
            f"The pattern {pattern[:60]!r}... has {len(pattern)} characters, more than "
            f"{_MAX_PATTERN}. Give several shorter ones, or the exact path of a leaf."
        )
    out = Automaton()
    node = out.node()
    opened: list[tuple[int, int]] = []  # first and last node of each open brace
    stars: dict[int, int] = {}
    slashes: dict[int, int] = {}
    for token in _TOKEN.finditer(pattern):
        text = token[0]
        if token["set"]:
            if text.startswith("[^") and len(text) > 3:
                raise TreeError(
                    f"The pattern {pattern[:200]!r} has the set {text!r}. Write "
                    f"{'[!' + text[2:]!r} for any other character, or the ^ at the end."
                )
            node = out.read(node, re.compile(_set_regex(text[1:-1])))
        elif token["range"]:
            node = _add_range(out, node, pattern, text)
        elif text == "{":
            opened.append((node, out.node()))
            node = _branch(out, node)
        elif text in ",}" and opened:
            start, end = opened[-1] if text == "," else opened.pop()
            out.join(node, end)
            node = _branch(out, start) if text == "," else end
        elif text == "*":
            stars[node] = node = out.node()
        elif text == "/":
            slashes[node] = node = out.read(node, "/")
        else:
            node = out.read(node, _ANY if text == "?" else text)
    if opened:
        raise TreeError(f"The pattern {pattern[:200]!r} has a '{{' without its '}}'.")
    slashes[node] = last = out.read(node, "/")
    out.ends.append((last, 0))
    _add_stars(out, stars, slashes)
    return out


def _branch(out: Automaton, start: int) -> int:
    """Adds a node that a free step leads to."""
    node = out.node()
    out.join(start, node)
    return node


def _add_stars(out: Automaton, stars: dict[int, int], slashes: dict[int, int]) -> None:
    """Adds what `*` reads, and what the components `**` read."""
    wholes = {}
    for start in (0, *slashes.values()):
        one = _after(stars, reached(out, 1 << start))
        two = _after(stars, reached(out, one))
        wholes[start] = _after(slashes, reached(out, two))
    for start, end in stars.items():
        out.join(start, end)
        out.reads[end].append((_ANY, end))
    for start, ends in wholes.items():
        for end in members(ends):  # no component at all
            out.join(start, end)
        if ends:  # one more component
            inside = _branch(out, start)
            out.reads[inside] += [(_ANY, inside), ("/", start)]


def _after(steps: dict[int, int], nodes: int) -> int:
    """Returns where `steps` lead to from `nodes`."""
    return sum({1 << steps[node] for node in members(nodes) if node in steps})


def _add_range(out: Automaton, start: int, pattern: str, text: str) -> int:
    """Adds the numbers of `{first..last}`; returns the node behind them."""
    first, last = text[1:-1].split("..")
    if max(len(first), len(last)) > _MAX_DIGITS:
        raise TreeError(
            f"The pattern {pattern[:200]!r} has a number of over {_MAX_DIGITS} digits."
        )
    end = out.node()
    for digits in _numbers(int(first), int(last)):
        node = _branch(out, start)
        for low, high in digits:
            node = out.read(node, re.compile(f"[{low}-{high}]"))
        out.join(node, end)
    return end


Digits = tuple[tuple[str, str], ...]  # the lowest and the highest of each digit


def _numbers(first: int, last: int) -> Iterator[Digits]:
    """Yields boxes of digits that together are all numbers from `first` to `last`.

    Examples:
      >>> list(_numbers(8, 12))
      [(('8', '9'),), (('1', '1'), ('0', '2'))]
    """
    while first <= last:
        top = min(last, 10 ** len(str(first)) - 1)
        yield from _boxes(str(first), str(top))
        first = top + 1


def _boxes(low: str, high: str) -> Iterator[Digits]:
    """Yields the boxes of numbers with as many digits in `low` as in `high`."""
    a, b = low[:1], high[:1]
    rest, zeros, nines = len(low) - 1, "0" * len(low[1:]), "9" * len(low[1:])
    if rest < 1:
        yield ((a, b),)
    elif a == b:
        yield from (((a, a), *box) for box in _boxes(low[1:], high[1:]))
    else:
        if low[1:] != zeros:
            yield from (((a, a), *box) for box in _boxes(low[1:], nines))
            a = str(int(a) + 1)
        if high[1:] != nines:
            yield from (((b, b), *box) for box in _boxes(zeros, high[1:]))
            b = str(int(b) - 1)
        if a <= b:
            yield ((a, b), *((("0", "9"),) * rest))


def _set_regex(chars: str) -> str:
    """Returns a regex for one character of a set: `a-cx`, or `!a-cx` for others."""
    negative, chars = chars.startswith("!"), chars.removeprefix("!")
    ranges = re.findall(r"(.)-(.)|(.)", chars, flags=re.DOTALL)
    inside = "".join(
        re.escape(one) if one else f"{re.escape(low)}-{re.escape(high)}"
        for low, high, one in ranges
        if one or low <= high
    )
    if negative:
        return f"[^/{inside}]"
    return f"(?!/)[{inside}]" if inside else "(?!)"
