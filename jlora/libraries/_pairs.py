"""The factors in a library's tree, each pair beside its weight, and the tree's rest."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from .. import paths
from .._tables import listed
from ..errors import ConfigError, TreeError
from ..factors import Leaf
from ..quantised import is_quantized
from ..transform.stage import is_array
from ._rules import ALPHA, ONE, Library, Place, filled, stars
from ._shipped import SHIPPED

Node = Any  # an array, or a box around one: an NNX variable, a partitioned parameter


class Pair(NamedTuple):
    """The leaves of one adapted weight.

    Attributes:
      place: the rule that they are named by.
      weight: path of the weight.
      a: path of the factor beside the input.
      b: path of the factor beside the output.
      scale: path of the multiplier; empty if it is not in the tree.
      wrapper: path of the node that only wraps the base; empty if there is none.
      path: path of the weight in the base model.
    """

    place: Place
    weight: str
    a: str
    b: str
    scale: str
    wrapper: str
    path: str


def library_of(given: Library | str) -> Library:
    """Returns the rules of a library, by name or as they are.

    Raises:
      ConfigError: for anything else.
    """
    if isinstance(given, Library):
        return given
    if isinstance(given, str) and given in SHIPPED:
        return SHIPPED[given]
    raise ConfigError(
        f"library must be one of {', '.join(map(repr, SHIPPED))}, or a "
        f"jlora.libraries.Library, got {given!r:.100}."
    )


def nodes_of(params: Any) -> dict[str, Node]:
    """Returns what a nested mapping or sequence holds, by path.

    Raises:
      ConfigError: if it is neither.
    """
    if not isinstance(params, Mapping | list | tuple):
        raise ConfigError(
            "params must be a tree of mappings, as nnx.state(model, nnx.Param), the "
            "variables of Linen, or {v.path: v.value for v in model.variables} of "
            f"Keras, got {type(params).__name__}."
        )
    return dict(_walk(params, ""))


def value(path: str, node: Node) -> Leaf:
    """Returns the array in a node.

    Raises:
      TreeError: if there is not exactly one.
    """
    leaves = jax.tree.leaves(node, is_leaf=is_quantized)
    if len(leaves) != 1:
        raise TreeError(
            f"{path!r} is a {type(node).__name__} of {len(leaves)} arrays. If qwix "
            "quantised it, give jlora.from_qwix(params)."
        )
    return leaves[0]


def array(path: str, node: Node) -> Leaf:
    """Returns the weight or the factor in a node.

    Raises:
      TreeError: if there is not exactly one, or it is not an array.
    """
    x = value(path, node)
    if isinstance(x, jax.ShapeDtypeStruct):
        raise TreeError(
            f"{path!r} is a shape. Write jax.eval_shape(lambda params: "
            "jlora.adopt(params, ...), params)."
        )
    if not is_array(x):
        raise TreeError(f"{path!r} must be an array, got {x!r:.80}.")
    return x


def pairs_of(nodes: Mapping[str, Node], library: Library) -> list[Pair]:
    """Returns the pairs of factors among `nodes`.

    Raises:
      TreeError: lists factors without their other half or their weight, and those that
        no rule of `library` is for; or if there are no factors.
    """
    pairs: list[Pair] = []
    faults: list[str] = []
    for path in nodes:
        options = list(_options(path, library))
        known = [pair for pair in options if pair.weight in nodes]
        if not known:
            faults += [_alone(path, pair.weight, nodes) for pair in options[:1]]
            continue
        missing = [p for p in (known[0].b, known[0].scale) if p and p not in nodes]
        faults += [f"{path!r} is there without {other!r}" for other in missing]
        pairs.append(known[0])
    used = {p for pair in pairs for p in (pair.a, pair.b, pair.scale)}
    told = {path for path in nodes for _ in _options(path, library)}
    for path in nodes.keys() - used - told:
        options = list(_options(path, library, "b"))
        halves = [pair for pair in options if pair.weight in nodes]
        if any(pair.a in nodes for pair in options):
            continue  # that A was told
        if halves:
            faults.append(f"{path!r} is there without {halves[0].a!r}")
        elif "lora" in path.casefold():
            faults.append(f"no rule is for {path!r}")
    if faults or not pairs:
        raise TreeError(_told(sorted(faults), nodes, library))
    return pairs


def base_of(params: Any, pairs: Sequence[Pair]) -> Any:
    """Returns `params` without the factors, in the structure of the base model."""
    gone = {p for pair in pairs for p in (pair.a, pair.b, pair.scale)}
    return _without(params, "", gone, {pair.wrapper for pair in pairs} - {""})


def replaced(params: Any, values: Mapping[str, Leaf], path: str = "") -> Any:
    """Returns `params` with `values`, by path, in their boxes."""
    if isinstance(params, Mapping):
        return _like(
            params,
            {k: replaced(x, values, _joined(path, k)) for k, x in _items(params)},
        )
    if isinstance(params, list | tuple):
        return type(params)(
            replaced(x, values, _joined(path, i)) for i, x in enumerate(params)
        )
    if path not in values:
        return params
    return jax.tree.structure(params).unflatten([values[path]])


def _options(path: str, library: Library, half: str = "a") -> Iterable[Pair]:
    """Yields the pairs that `path` may be a half of."""
    for place in library.places:
        texts = stars(getattr(place, half), path)
        if texts is None:
            continue
        scale = "" if place.scale in (ALPHA, ONE) else filled(place.scale, texts)
        a, b = filled(place.a, texts), filled(place.b, texts)
        weight = filled(place.weight, texts)
        bare, wrapper = weight, ""
        if place.wrapper:
            front, inside, rest = weight.rpartition(f"{place.wrapper}/")
            bare, wrapper = front + rest, front + inside.removesuffix("/")
        yield Pair(place, weight, a, b, scale, wrapper, bare)


def _alone(path: str, weight: str, nodes: Mapping[str, Node]) -> str:
    inside = [other for other in nodes if other.startswith(f"{weight}/")]
    if inside:
        return (
            f"{path!r}: its weight {weight!r} is not an array, but holds "
            f"{listed(map(repr, inside), 2, ', ')} (of a quantised NNX model, give the "
            "dense weights)"
        )
    near = paths.nearest(weight, tuple(nodes), n=1)
    return f"{path!r} is there without its weight {weight!r} (nearest: {near[0]!r})"


def _told(faults: list[str], nodes: Mapping[str, Node], library: Library) -> str:
    others = [
        repr(other.name)
        for other in SHIPPED.values()
        if other != library and any(True for p in nodes for _ in _options(p, other))
    ]
    hint = f" Names like these are those of {' or '.join(others)}." if others else ""
    if not faults:
        wanted = ", ".join(repr(place.a) for place in library.places)
        return (
            f"The tree has no factors of {library.name!r}: none of its {len(nodes)} "
            f"leaves is named like {wanted}.{hint}"
        )
    return (
        f"These are not pairs of factors beside their weights, as {library.name!r} has "
        f"them: {listed(faults)}. Give the whole parameters, the base with its "
        f"factors.{hint}"
    )


def _walk(node: Any, path: str) -> Iterable[tuple[str, Node]]:
    if isinstance(node, Mapping):
        for key, x in _items(node):
            yield from _walk(x, _joined(path, key))
    elif isinstance(node, list | tuple):
        for i, x in enumerate(node):
            yield from _walk(x, _joined(path, i))
    else:
        yield path, node


def _without(node: Any, path: str, gone: set[str], wrappers: set[str]) -> Any:
    if isinstance(node, list | tuple):
        return type(node)(
            _without(x, _joined(path, i), gone, wrappers) for i, x in enumerate(node)
        )
    if not isinstance(node, Mapping):
        return node
    kept: dict[Any, Any] = {}
    for key, x in _items(node):
        own = _joined(path, key)
        if own in gone:
            continue
        left = _without(x, own, gone, wrappers)
        if own in wrappers:
            kept |= left
        elif not (isinstance(x, Mapping) and x and not left):  # it held only factors
            kept[key] = left
    return _like(node, kept)


def _items(node: Mapping[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """Returns the children of a mapping. An NNX state wraps those that are read."""
    return getattr(node, "raw_mapping", node).items()


def _like(node: Mapping[Any, Any], children: dict[Any, Any]) -> Any:
    """Returns a mapping of the class of `node`."""
    return type(node)(children)  # type: ignore[call-arg]


def _joined(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)
