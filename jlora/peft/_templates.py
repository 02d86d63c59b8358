"""Templates: names with placeholders, and axes as text."""

import functools
import re
from collections.abc import Mapping

from ..errors import PeftError

Groups = tuple[tuple[str, ...], ...]  # names of axes, "d (h k)" as (("d",), ("h", "k"))

_PLACEHOLDER = re.compile(r"\{(\w+)(?::([^}]*))?\}")


def words_of(template: str) -> dict[str, tuple[str, ...]]:
    """Returns the words of each placeholder; `()` for one that stands for a number."""
    return {
        name: tuple(words.split(",")) if words else ()
        for name, words in _PLACEHOLDER.findall(template)
    }


@functools.lru_cache(maxsize=4096)
def variants(template: str) -> tuple[str, ...]:
    """Returns the template with its optional texts, and without them."""
    if template.count("[") != template.count("]"):
        raise PeftError(f"{template!r} has a '[' or ']' without its partner.")
    full = template.replace("[", "").replace("]", "")
    bare = re.sub(r"\[[^\]]*\]", "", template)
    return (full,) if full == bare else (full, bare)


@functools.lru_cache(maxsize=4096)
def regex(template: str) -> re.Pattern[str]:
    out, end, seen = "", 0, set()
    for found in _PLACEHOLDER.finditer(template):
        out += re.escape(template[end : found.start()])
        name, words = found.groups()
        if name in seen:
            out += f"(?P={name})"
        else:
            choice = "|".join(map(re.escape, words.split(","))) if words else r"\d+"
            out += f"(?P<{name}>{choice})"
        seen.add(name)
        end = found.end()
    return re.compile(out + re.escape(template[end:]))


def fill(template: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: str(values[found.group(1)]), template)


@functools.lru_cache(maxsize=4096)
def parse_axes(text: str, inside: tuple[str, ...] = ()) -> tuple[Groups, Groups]:
    """Returns both sides of `"d h k -> (h k) d"` as groups of names.

    Names in `inside` may stand on the right only, first in their group: they choose a
    share of the tensor.
    """
    sides = text.split("->")
    if len(sides) != 2:
        raise PeftError(f"axes {text!r} needs one arrow, as in 'd h k -> (h k) d'.")
    left, right = (
        tuple(
            tuple((inner or single).split())
            for inner, single in re.findall(r"\(([^)]*)\)|(\S+)", side)
        )
        for side in sides
    )
    names = [name for group in left for name in group]
    used = [name for group in right for name in group]
    wrong = [n for n in used if n not in names and n not in inside]
    wrong += [n for group in right for n in group[1:] if n in inside]
    if wrong or len(set(names)) != len(names) or len(set(used)) != len(used):
        raise PeftError(
            f"axes {text!r}: each axis needs one name, and a name on the right must "
            "also be on the left, or begin a group and be a placeholder of the path."
        )
    return left, right
