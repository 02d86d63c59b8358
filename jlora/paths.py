"""Names of the leaves of any pytree, globs over them, and the nearest names.

A path is the leaf's keys joined by `/`: `'params/blocks_0/attn/q/kernel'`.
"""

import difflib
import functools
import heapq
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax

from ._tables import listed
from ._text.automata import first_match
from ._text.globs import compile_glob
from .errors import TreeError
from .factors import Leaf, PyTree
from .quantised import is_quantized

_MARGIN = 60  # levels


def flatten(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[dict[str, Leaf], Any]:
    """Returns the leaves of `tree` by path, in the tree's order, and its treedef.

    A quantised array is one leaf. Boxes that hold a single leaf called `value` (Flax
    NNX variables, Linen's partitioned parameters) do not show in the path.

    Args:
      tree: any pytree.
      is_leaf: as in `jax.tree.flatten`.

    Returns:
      `(leaves, treedef)`; `treedef.unflatten(leaves.values())` is the tree again.

    Raises:
      TreeError: if two leaves get the same path (keys that contain `/`), or the tree is
        nested deeper than JAX can walk (Python's limit, by default about 1000 levels).

    Examples:
      >>> leaves, _ = flatten({"dense": {"kernel": 1, "bias": 2}, "heads": [3]})
      >>> leaves
      {'dense/bias': 2, 'dense/kernel': 1, 'heads/0': 3}
    """
    try:
        # Too deep a tree breaks Python's count of calls if that is found in `is_leaf`,
        # or later, in a call further down. So it is looked for here, with a margin.
        nested = tree
        for _ in range(_MARGIN):
            nested = [nested]
        jax.tree.structure(nested)
        keyed, treedef = jax.tree_util.tree_flatten_with_path(
            tree, lambda x: is_quantized(x) or (is_leaf is not None and is_leaf(x))
        )
    except (RecursionError, SystemError) as error:  # nanobind says so of the former
        raise TreeError(
            "The tree is nested deeper than JAX can walk. Make it flatter, or raise "
            "the limit with sys.setrecursionlimit."
        ) from error
    every = [keys for keys, _ in keyed]
    names = []
    for i, keys in enumerate(every):
        boxed = _is_value(keys) and not any(
            near[: len(keys) - 1] == keys[:-1]
            for near in (*every[max(i - 1, 0) : i], *every[i + 1 : i + 2])
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


def _is_value(keys: Sequence[object]) -> bool:
    """Returns whether a leaf is the field `value` of a node that has a name."""
    last = keys[-1] if len(keys) > 1 else None
    is_field = isinstance(last, jax.tree_util.GetAttrKey)
    return is_field and getattr(last, "name", None) == "value"


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
    one of a set, `[!ab]` for any other, `[a-c]` for one of a range, `**` for any number
    of components (also none), `{a,b}` for either, `{0..5}` for any of the numbers. In a
    set `*`, `?`, `[` and `{` stand for themselves, so `[*]` is a star; `escape` writes
    that.

    Args:
      pattern: the glob.
      path: components joined by `/`.

    Matching takes one pass over the path, whatever the pattern is.

    Raises:
      TreeError: for a `{` without its `}`, a set that begins with `^`, a pattern of
        over 4,000 characters, or a number in it of over 18 digits.

    Examples:
      >>> matches("**/attn/{q,v}/kernel", "params/blocks_0/attn/q/kernel")
      True
      >>> matches("*/kernel", "params/dense/kernel")
      False
      >>> matches("layers/{8..11}/**", "layers/10/attn/kernel")
      True
    """
    return first_match(compile_glob(pattern), path + "/") is not None


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
    paths = paths if isinstance(paths, Collection) else tuple(paths)
    if pattern in paths:
        return (pattern,)
    return tuple(p for p in paths if matches(pattern, p))


_LOOKED_AT = 300  # of two names that long, the ends do not tell which one was meant


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
    parts = [p for p in re.split(r"[/{},*]+", pattern[:_LOOKED_AT]) if p][:20]
    whole = "/".join(parts)

    @functools.cache
    def alike(part: str, component: str) -> float:
        return difflib.SequenceMatcher(None, part, component).ratio()

    def near(path: str) -> float:
        components = path[:_LOOKED_AT].split("/")
        best = [max(alike(part, c) for c in components) for part in parts]
        return sum(best) / max(len(best), 1)

    def score(path: str) -> float:
        look = difflib.SequenceMatcher(None, whole, path[:_LOOKED_AT])
        return near(path) + 0.1 * look.ratio()

    few = heapq.nlargest(max(n, 100), paths, near)
    return tuple(sorted(few, key=score, reverse=True)[:n])
