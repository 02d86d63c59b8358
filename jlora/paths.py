"""Names of the leaves of any pytree, globs over them, and the nearest names.

A path is the leaf's keys joined by `/`: `'params/blocks_0/attn/q/kernel'`.
"""

import difflib
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from ._tables import listed
from .errors import TreeError
from .factors import Leaf, PyTree


def flatten(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[dict[str, Leaf], Any]:
    """Returns the leaves of `tree` by path, in the tree's order, and its treedef.

    Boxes that hold a single leaf called `value` (Flax NNX variables, Linen's
    partitioned parameters) do not show in the path.

    Args:
      tree: any pytree.
      is_leaf: as in `jax.tree.flatten`.

    Returns:
      `(leaves, treedef)`; `treedef.unflatten(leaves.values())` is the tree again.

    Raises:
      TreeError: if two leaves get the same path (keys that contain `/`).

    Examples:
      >>> leaves, _ = flatten({"dense": {"kernel": 1, "bias": 2}, "heads": [3]})
      >>> leaves
      {'dense/bias': 2, 'dense/kernel': 1, 'heads/0': 3}
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    below: dict[tuple, int] = {}  # how many leaves are below each node
    for keys, _ in keyed:
        for n in range(len(keys)):
            below[keys[:n]] = below.get(keys[:n], 0) + 1
    names = []
    for keys, _ in keyed:
        boxed = (
            len(keys) > 1
            and isinstance(keys[-1], jax.tree_util.GetAttrKey)
            and keys[-1].name == "value"
            and below[keys[:-1]] == 1
        )
        names.append("/".join(map(_component, keys[:-1] if boxed else keys)))
    leaves = dict(zip(names, (leaf for _, leaf in keyed), strict=True))
    if len(leaves) != len(names):
        twice = sorted(n for n, times in Counter(names).items() if times > 1)
        raise TreeError(
            "Two leaves of the tree have the same path: "
            f"{listed(map(repr, twice), 10, ', ')}. "
            "Rename one of the keys (keys that contain '/' can collide)."
        )
    return leaves, treedef


def _component(key: object) -> str:
    match key:
        case jax.tree_util.DictKey() | jax.tree_util.FlattenedIndexKey():
            return str(key.key)
        case jax.tree_util.SequenceKey():
            return str(key.idx)
        case jax.tree_util.GetAttrKey():
            return key.name
    return str(getattr(key, "key", getattr(key, "name", key)))


def matches(pattern: str, path: str) -> bool:
    """Returns whether the glob `pattern` matches the whole of `path`.

    `*` stands for anything inside one component, `?` for one character, `[ab]` for
    one of a set, `**` for any number of components (also none), `{a,b}` for either,
    `{0..5}` for any of the numbers. In a set every character stands for itself, so
    `[*]` is a star; `escape` writes that.

    Args:
      pattern: the glob.
      path: components joined by `/`.

    Raises:
      TreeError: for a `{` without its `}`.

    Examples:
      >>> matches("**/attn/{q,v}/kernel", "params/blocks_0/attn/q/kernel")
      True
      >>> matches("*/kernel", "params/dense/kernel")
      False
      >>> matches("layers/{8..11}/**", "layers/10/attn/kernel")
      True
    """
    return any(regex.fullmatch(path) for regex in _compile(pattern))


@functools.lru_cache(maxsize=1024)
def _compile(pattern: str) -> tuple[re.Pattern, ...]:
    return tuple(re.compile(_translate(p), re.DOTALL) for p in _expand(pattern))


def _expand(pattern: str) -> Iterator[str]:
    """Yields the alternatives of `{a,b}`, which may be nested."""
    in_sets = {i for m in _SET.finditer(pattern) for i in range(*m.span())}
    start = next(
        (i for i, c in enumerate(pattern) if c == "{" and i not in in_sets), None
    )
    if start is None:
        yield pattern
        return
    depth, parts, begin = 0, [], start + 1
    for i in range(start, len(pattern)):
        char = "" if i in in_sets else pattern[i]
        depth += (char == "{") - (char == "}")
        if (char == "," and depth == 1) or depth == 0:
            parts.append(pattern[begin:i])
            begin = i + 1
        if depth == 0:
            numbers = re.fullmatch(r"(\d+)\.\.(\d+)", parts[0])
            if numbers and len(parts) == 1:
                first, last = map(int, numbers.groups())
                parts = [str(n) for n in range(first, last + 1)]
            for part in parts:
                yield from _expand(pattern[:start] + part + pattern[i + 1 :])
            return
    raise TreeError(f"The pattern {pattern!r} has a '{{' without its '}}'.")


def _translate(glob: str) -> str:
    *parents, last = re.sub(r"\*\*(/\*\*)+(?=/|$)", "**", glob).split("/")
    regex = "".join(
        "(?:[^/]+/)*" if part == "**" else _component_regex(part) + "/"
        for part in parents
    )
    if last != "**":
        return regex + _component_regex(last)
    return regex.removesuffix("/") + ("(?:/.*)?" if regex.endswith("/") else ".*")


_SET = re.compile(r"\[!?\]?[^\]/]*\]", flags=re.DOTALL)
_TOKEN = re.compile(rf"\*+|\?|{_SET.pattern}|.", flags=re.DOTALL)


def _component_regex(part: str) -> str:
    return "".join(_token_regex(token) for token in _TOKEN.findall(part))


def _token_regex(token: str) -> str:
    if token[0] == "*":
        return "[^/]*"
    if token == "?":
        return "[^/]"
    if len(token) > 1:
        return _set_regex(token[1:-1])
    return re.escape(token)


def _set_regex(chars: str) -> str:
    """Returns a regex for one character of a set: `a-cx`, or `!a-cx` for others."""
    negative, chars = chars.startswith("!"), chars.removeprefix("!")
    ranges = re.findall(r"(.)-(.)|(.)", chars, flags=re.DOTALL)
    members = "".join(
        re.escape(one) if one else f"{re.escape(low)}-{re.escape(high)}"
        for low, high, one in ranges
        if one or low <= high
    )
    if negative:
        return f"[^/{members}]"
    return f"[{members}]" if members else "(?!)"


def escape(path: str) -> str:
    """Returns the glob that matches `path` only.

    It is needed only for keys that hold `[`, `{`, `*` or `?`, and within a larger
    pattern: `select` takes the exact path of a leaf as it is.

    Args:
      path: components joined by `/`.

    Examples:
      >>> escape("blocks[0]/w*")
      'blocks[[]0]/w[*]'
      >>> matches("**/" + escape("w*"), "blocks/w*"), matches("w*", "w_2")
      (True, True)
    """
    return re.sub(r"[\[{*?]", r"[\g<0>]", path)


def select(pattern: str, paths: Iterable[str]) -> tuple[str, ...]:
    """Returns those of `paths` that `pattern` matches, in their order.

    A pattern that is one of `paths`, character by character, means this path only. So
    the names that a plan shows are patterns, whatever characters the keys hold.

    Args:
      pattern: a glob, see `matches`, or one of `paths`.
      paths: the paths to look through.

    Raises:
      TreeError: for a `{` without its `}`.

    Examples:
      >>> select("**/bias", ["dense/bias", "dense/kernel", "bias"])
      ('dense/bias', 'bias')
      >>> select("w[0]", ["w0", "w[0]"])
      ('w[0]',)
    """
    paths = tuple(paths)
    if pattern in paths:
        return (pattern,)
    return tuple(p for p in paths if matches(pattern, p))


def nearest(pattern: str, paths: Sequence[str], n: int = 3) -> tuple[str, ...]:
    """Returns up to `n` of `paths` that look most like `pattern`, best first.

    Args:
      pattern: a glob, usually one that matched nothing.
      paths: the paths to choose from.
      n: how many at most.

    Examples:
      >>> nearest("**/atn/q/kernel", ["blocks/0/attn/q/kernel", "embed/embedding"], n=1)
      ('blocks/0/attn/q/kernel',)
    """
    parts = [p for p in re.split(r"[/{},*]+", pattern) if p]

    def score(path: str) -> float:
        components = path.split("/")
        near = [
            max(difflib.SequenceMatcher(None, part, c).ratio() for c in components)
            for part in parts
        ]
        whole = difflib.SequenceMatcher(None, "/".join(parts), path).ratio()
        return sum(near) / max(len(near), 1) + 0.1 * whole

    return tuple(sorted(paths, key=score, reverse=True)[:n])
