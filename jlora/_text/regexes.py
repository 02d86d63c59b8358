r"""The regular expressions of adapter files, as automata.

A file is a stranger's, and Python's own matching can take for ever. So its patterns
are read here: characters, `.`, sets, `\d` and the like, groups, `|`, repeats, `^`, `$`
and `\b`. That is what PEFT's files hold. All else (looking around, references to
groups) is refused.
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence

from .automata import Automaton, Label, Where

_MAX_PATTERN, _MAX_NODES, _MAX_DEPTH = 1000, 5000, 50
_TOKEN = re.compile(
    r"""(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])
    |(?P<class>\\[dDwWsS])
    |(?P<place>\\[AZbB])
    |\\(?P<escaped>[^0-9A-Za-z])
    |(?P<open>\((?:\?:)?(?!\?))
    |(?P<repeat>(?:[*+?]|\{[0-9]+\}|\{[0-9]*,[0-9]*\})\??)(?!\+)
    |(?P<char>(?!\{(?:[0-9]+|[0-9]*,[0-9]*)\})[^\\\[()*+?])""",
    re.DOTALL | re.VERBOSE,
)
_PLACES: dict[str, Where] = {
    "^": "^", r"\A": "^", "$": "$", r"\Z": "$", r"\b": "b", r"\B": "B"
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Regex:
    """A part of a regular expression.

    Attributes:
      kind: "read" takes a character that `label` is; "at" is a place; "either"
        one of the parts; "all" the parts in order; "repeat" the one part again.
      label: a character, or a regex of one character.
      where: the place.
      parts: the parts.
      least: how often at least.
      most: how often at most; None is any number.
    """

    kind: str
    label: Label = ""
    where: Where = ""
    parts: tuple["Regex", ...] = ()
    least: int = 1
    most: int | None = 1


def parse(pattern: str) -> Regex:
    """Returns a pattern that was read.

    Raises:
      ValueError: if Python would refuse it, it is too large, or not of the kind that
        can be matched in one pass.
    """
    shown = f"the pattern {pattern!r:.60}"
    if len(pattern) > _MAX_PATTERN:
        raise ValueError(f"{shown} is not a plain pattern: it is too long")
    _check_python(pattern, shown)
    stack: list[list[list[Regex]]] = [[[]]]  # by open group, by alternative
    at = 0
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        kind = token and token.lastgroup
        if token is None or kind is None:
            if pattern[at] != ")":
                raise ValueError(f"{shown} is not a plain pattern")
            at += 1
            if len(stack) < 2:
                raise ValueError(f"{shown} is broken, a ')' has no '('")
            stack[-2][-1].append(_either(stack.pop()))
            continue
        at = token.end()
        if kind == "open":
            stack.append([[]])
        elif token["char"] == "|":
            stack[-1].append([])
        elif kind == "repeat":
            last = stack[-1][-1].pop()
            stack[-1][-1].append(_repeat(last, token["repeat"]))
        else:
            stack[-1][-1].append(_single(kind, token[kind]))
        if len(stack) > _MAX_DEPTH:
            raise ValueError(f"{shown} is not a plain pattern: its groups are too deep")
    parsed = _either(stack.pop())
    if size(parsed) > _MAX_NODES:
        raise ValueError(f"{shown} repeats too much")
    return parsed


def _check_python(pattern: str, shown: str) -> None:
    """Raises a ValueError for a pattern that Python refuses or warns of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(f"{shown} is broken, {error}") from error


def _single(kind: str, text: str) -> Regex:
    """Returns the part for one token."""
    if kind == "place" or (kind == "char" and text in "^$"):
        return Regex("at", where=_PLACES[text])
    if kind in ("set", "class") or (kind == "char" and text == "."):
        return Regex("read", re.compile(text))
    return Regex("read", text)


def _either(alternatives: Sequence[Sequence[Regex]]) -> Regex:
    parts = tuple(Regex("all", parts=tuple(parts)) for parts in alternatives)
    return parts[0] if len(parts) == 1 else Regex("either", parts=parts)


def _repeat(part: Regex, sign: str) -> Regex:
    """Returns a part repeated. Whether it takes much or little first is the same."""
    sign = sign[0] if sign[0] in "*+?" else sign.rstrip("?")
    if sign[0] != "{":
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
    else:
        first, comma, last = sign[1:-1].partition(",")
        least = int(first or 0)
        most = int(last) if last else (None if comma else least)
    return Regex("repeat", parts=(part,), least=least, most=most)


def compile_all(keys: Mapping[str, int]) -> Automaton:
    r"""Returns the automaton of patterns, each with its tag.

    It takes a module's name as PEFT does, which matches `(.*\.)?(key)$`.
    """
    out = Automaton()
    start, inner, before = out.node(), out.node(), out.node()
    out.join(start, inner)
    out.join(start, before)
    out.reads[before] += [(re.compile("."), before), (".", inner)]
    for key, tag in keys.items():
        out.ends.append((_add(out, inner, parse(key)), tag))
    return out


def size(regex: Regex) -> int:
    """Returns how many nodes the automaton of a pattern has, about."""
    inside = 1 + sum(map(size, regex.parts))
    if regex.kind != "repeat":
        return inside
    return 1 + inside * max(regex.least, regex.most or 0, 1)


def literal(regex: Regex) -> tuple[bool, str] | None:
    """Returns the only text that is matched, and whether `^` stands before it.

    None is returned for any other pattern.
    """
    parts = list(regex.parts) if regex.kind == "all" else [regex]
    anchored = bool(parts) and parts[0].where == "^"
    ended = bool(parts) and parts[-1].where == "$"
    parts = parts[anchored : len(parts) - ended]
    text = [p.label for p in parts if p.kind == "read" and isinstance(p.label, str)]
    return (anchored, "".join(text)) if len(text) == len(parts) > 0 else None


def _add(out: Automaton, start: int, regex: Regex) -> int:
    """Adds a pattern to an automaton from `start`; returns the node behind it."""
    match regex.kind:
        case "read":
            return out.read(start, regex.label)
        case "all":
            for part in regex.parts:
                start = _add(out, start, part)
            return start
        case "repeat":
            return _add_repeat(out, start, regex)
    end = out.node()
    if regex.kind == "at":
        out.join(start, end, regex.where)
    for part in regex.parts:
        out.join(_add(out, start, part), end)
    return end


def _add_repeat(out: Automaton, start: int, regex: Regex) -> int:
    (part,) = regex.parts
    for _ in range(regex.least):
        start = _add(out, start, part)
    end = out.node()
    if regex.most is None:
        again = out.node()
        out.join(start, again)
        out.join(_add(out, again, part), again)
        out.join(again, end)
        return end
    for _ in range(regex.most - regex.least):
        out.join(start, end)
        start = _add(out, start, part)
    out.join(start, end)
    return end
