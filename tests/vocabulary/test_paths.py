"""Names of leaves in trees of every kind, globs over them, and hints."""

import dataclasses
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import example, given, strategies as st

import jlora
from jlora import paths

WORDS = st.text("abk_0*", min_size=1, max_size=3)
PATHS = st.lists(WORDS, min_size=1, max_size=4).map("/".join)
GLOBS = st.lists(WORDS | st.just("**") | st.just("*"), min_size=1, max_size=4).map(
    "/".join
)
# Characters that mean something to a regular expression, a glob or JSON.
ODD_PATHS = st.lists(
    st.text("aZ~.$^+|()\\- \n\"'é", min_size=1, max_size=4), min_size=1, max_size=3
).map("/".join)


def component_matches(pattern: str, text: str) -> bool:
    """Whether `*` in `pattern` can be filled to give `text`; one step at a time."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return component_matches(pattern[1:], text) or (
            bool(text) and component_matches(pattern, text[1:])
        )
    return (
        bool(text)
        and text[0] == pattern[0]
        and (component_matches(pattern[1:], text[1:]))
    )


def parts_match(pattern: list[str], parts: list[str]) -> bool:
    """What the docstring of `matches` says, written as a recursion."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return parts_match(pattern[1:], parts) or (
            bool(parts) and parts_match(pattern, parts[1:])
        )
    return (
        bool(parts)
        and component_matches(pattern[0], parts[0])
        and parts_match(pattern[1:], parts[1:])
    )


@given(pattern=GLOBS, path=PATHS)
@example(pattern="**", path="a")
@example(pattern="a/**", path="a")
@example(pattern="a/**/**", path="a")
@example(pattern="**/**/a", path="a")
@example(pattern="**/a/**/b", path="a/b")
@example(pattern="*/a", path="b/b/a")
def test_glob_matches_what_its_definition_says(pattern, path):
    assert paths.matches(pattern, path) == parts_match(
        pattern.split("/"), path.split("/")
    )


@given(
    head=st.text("ab/*", max_size=3),
    tail=st.text("ab/*", max_size=3),
    choices=st.lists(st.text("ab*", max_size=2), min_size=1, max_size=3),
    path=PATHS,
)
def test_braces_match_what_one_alternative_matches(head, tail, choices, path):
    pattern = f"{head}{{{','.join(choices)}}}{tail}"
    each = [paths.matches(head + choice + tail, path) for choice in choices]
    assert paths.matches(pattern, path) == any(each)


@pytest.mark.parametrize("path", ["x/q", "x/k", "y/q", "y/k", "z"])
def test_braces_nest_and_multiply(path):
    assert paths.matches("{{x,y}/{q,k},z}", path)
    assert not paths.matches("{{x,y}/{q,k},z}", path + "v")


@given(path=ODD_PATHS)
def test_odd_characters_stand_for_themselves(path):
    assert paths.matches(path, path)
    assert not paths.matches(path, path + "b")
    assert paths.matches("**", path)
    assert paths.matches("/".join("*" for _ in path.split("/")), path)


@given(path=ODD_PATHS, other=ODD_PATHS)
def test_a_path_as_pattern_matches_itself_alone(path, other):
    assert paths.matches(path, other) == (path == other)


# Characters that mean something in a glob, and some that do not.
KEYS = st.text("[]{}*?!,.-\\ab0", min_size=1, max_size=4)
KEY_PATHS = st.lists(KEYS, min_size=1, max_size=3).map("/".join)


@given(path=KEY_PATHS, other=KEY_PATHS)
@example(path="[a]", other="a")
@example(path="a{b,c}", other="ab")
@example(path="{0..2}", other="1")
@example(path="a{", other="a")
@example(path="*/?", other="a/b")
@example(path="**", other="a/b")
def test_an_escaped_path_matches_itself_alone(path, other):
    assert paths.matches(paths.escape(path), path)
    assert paths.matches(paths.escape(path), other) == (path == other)
    assert paths.matches("**/" + paths.escape(path), "a/" + path)


@given(every=st.lists(KEY_PATHS, min_size=1, max_size=4, unique=True))
@example(every=["w[0]", "w0"])
@example(every=["*", "a"])
@example(every=["**", "a/b"])
def test_the_exact_path_of_a_leaf_selects_it_alone(every):
    for path in every:
        assert paths.select(path, every) == (path,)
        assert paths.select(paths.escape(path), every) == (path,)


def test_braces_in_a_set_stand_for_themselves():
    assert paths.matches("w[{]a}", "w{a}")
    assert paths.matches("{a,b[{]}", "b{")
    assert not paths.matches("w[{a,b}]", "wa]")


def test_star_stays_inside_its_component():
    assert paths.matches("blocks_*/kernel", "blocks_12/kernel")
    assert not paths.matches("*", "a/b")
    assert not paths.matches("a*b", "a/b")


def test_question_mark_is_one_character():
    assert paths.matches("layer_?", "layer_3")
    assert not paths.matches("layer_?", "layer_12")
    assert not paths.matches("layer_?", "layer_")
    assert not paths.matches("a?b", "a/b")


def test_brackets_are_one_character_of_a_set():
    assert paths.matches("w[io]", "wi")
    assert paths.matches("layer_[0-3]", "layer_2")
    assert not paths.matches("layer_[0-3]", "layer_4")
    assert paths.matches("layer_[!0-3]", "layer_4")
    assert not paths.matches("layer_[!0-3]", "layer_0")


def test_a_set_that_excludes_stays_inside_its_component():
    assert paths.matches("a[!x]b", "a-b")
    assert not paths.matches("a[!x]b", "a/b")


@pytest.mark.parametrize("pattern", ["[z-a]", "[a\\]", "[[]", "w[", "w]", "[]"])
def test_a_pattern_never_fails_inside_the_regular_expression(pattern):
    try:
        paths.matches(pattern, "w[")
    except jlora.JloraError as error:
        assert repr(pattern) in str(error)  # noqa: PT017


def test_brace_without_its_end_is_an_error():
    with pytest.raises(
        jlora.JloraError, match=re.escape("'attn/{q,v' has a '{' without its '}'")
    ):
        paths.matches("attn/{q,v", "attn/q")


def test_select_keeps_the_order_of_the_paths():
    assert paths.select("**/{b,a}", ["x/a", "y/c", "x/b"]) == ("x/a", "x/b")


class Pair(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    value: Any
    note: str = dataclasses.field(default="", metadata={"static": True})


@jax.tree_util.register_pytree_node_class
class Unnamed:
    """A node registered without the keys of its children."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


TREES = {
    "dict": ({"b": {"w": 1}, "a": 2}, ["a", "b/w"]),
    "list and tuple": ({"l": [1, (2, 3)]}, ["l/0", "l/1/0", "l/1/1"]),
    "integer keys": ({"l": {0: 1, 1: 2}}, ["l/0", "l/1"]),
    "slashes in keys": ({"mlp/~/linear_0": {"w": 1}}, ["mlp/~/linear_0/w"]),
    "NamedTuple": ({"l": Pair(1, 2)}, ["l/kernel", "l/bias"]),
    "dataclass": (Attention(1, 2), ["query", "value"]),
    "dataclass of dicts": (
        Attention({"w": 1}, {"w": 2}),
        ["query/w", "value/w"],
    ),
    "a field called value beside a subtree": (
        {"attn": Attention({"w": 1}, 2)},
        ["attn/query/w", "attn/value"],
    ),
    "boxed": ({"l": {"w": Box(1, "spec")}}, ["l/w"]),
    "box that is the whole tree": (Box(1), ["value"]),
    "FrozenDict": (FrozenDict({"params": {"w": 1}}), ["params/w"]),
    "None": ({"a": None, "b": 1}, ["b"]),
    "one leaf": (1, [""]),
    "nothing": ({}, []),
    "nodes without keys": ({"n": Unnamed(1, Unnamed(2))}, ["n/0", "n/1/0"]),
}


@pytest.mark.parametrize("name", TREES)
def test_leaves_are_named_by_their_keys(name):
    tree, names = TREES[name]
    assert list(paths.flatten(tree)[0]) == names


@pytest.mark.parametrize("name", TREES)
def test_flatten_then_unflatten_is_identity(name):
    tree, _ = TREES[name]
    leaves, treedef = paths.flatten(tree)
    again = treedef.unflatten(leaves.values())
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert jax.tree.leaves(again) == jax.tree.leaves(tree)


@given(
    tree=st.recursive(
        st.integers(),
        lambda kids: (
            st.lists(kids, max_size=3)
            | st.dictionaries(st.text("ab~", min_size=1, max_size=2), kids, max_size=3)
            | st.builds(Pair, kids, kids)
            | st.builds(Attention, kids, kids)
        ),
        max_leaves=8,
    )
)
def test_every_leaf_of_any_tree_has_a_path_of_its_own(tree):
    leaves, treedef = paths.flatten(tree)
    assert list(leaves.values()) == jax.tree.leaves(tree)
    assert treedef == jax.tree.structure(tree)


def test_linen_variables_and_their_boxes():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
            x = nn.Dense(3, kernel_init=init, name="up")(x)
            return nn.BatchNorm(use_running_average=True)(x)

    variables = Model().init(jax.random.key(0), jnp.ones((1, 2)))
    assert isinstance(variables["params"]["up"]["kernel"], nn.Partitioned)
    assert sorted(paths.flatten(variables)[0]) == [
        "batch_stats/BatchNorm_0/mean",
        "batch_stats/BatchNorm_0/var",
        "params/BatchNorm_0/bias",
        "params/BatchNorm_0/scale",
        "params/up/bias",
        "params/up/kernel",
    ]


def test_nnx_state_has_no_trailing_value():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.l = nnx.Linear(2, 3, rngs=rngs)
            self.value = nnx.Linear(2, 3, use_bias=False, rngs=rngs)

    _, state = nnx.split(Model(nnx.Rngs(0)))
    assert isinstance(state, nnx.State)
    assert list(paths.flatten(state)[0]) == ["l/bias", "l/kernel", "value/kernel"]


def test_equal_paths_are_an_error_that_names_them():
    with pytest.raises(jlora.TreeError, match=r"same path: 'a/b'\. Rename one"):
        paths.flatten({"a/b": 1, "a": {"b": 2}, "c": 3})


def test_is_leaf_keeps_empty_nodes():
    leaves, treedef = paths.flatten(
        {"a": None, "b": 1}, is_leaf=lambda node: node is None
    )
    assert leaves == {"a": None, "b": 1}
    assert treedef.unflatten([5, 6]) == {"a": 5, "b": 6}


BERT = [
    f"params/layer_{i}/{name}"
    for i in range(2)
    for name in ("attn/q/kernel", "attn/k/kernel", "attn/q/bias", "mlp/up/kernel")
] + ["params/embed/embedding"]


@pytest.mark.parametrize(
    ("pattern", "best"),
    [
        ("**/atn/q/kernel", "params/layer_0/attn/q/kernel"),
        ("params/layer_1/attn/q/kernal", "params/layer_1/attn/q/kernel"),
        ("layer_1/mlp/up/kernel", "params/layer_1/mlp/up/kernel"),
        ("**/embeddings", "params/embed/embedding"),
        ("**/{q,querry}/bias", "params/layer_0/attn/q/bias"),
    ],
)
def test_nearest_finds_what_was_meant(pattern, best):
    assert paths.nearest(pattern, BERT, n=1) == (best,)


@given(pattern=st.text("ab/{}*,", max_size=6), n=st.integers(0, 5))
def test_nearest_is_some_of_the_paths_each_once(pattern, n):
    found = paths.nearest(pattern, BERT, n=n)
    assert len(found) == min(n, len(BERT)) == len(set(found))
    assert set(found) <= set(BERT)


def test_nearest_of_nothing_is_nothing():
    assert paths.nearest("a", []) == ()
