"""Globs: what they mean, written as a recursion, and patterns that took for ever."""

import itertools
import re

import pytest
from hypothesis import example, given, settings, strategies as st

import jlora
from jlora import paths


def expanded(pattern: str) -> list[str]:
    """The patterns without braces that a pattern with `{a,b}` stands for."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    parts = found[1].split(",")
    each = [pattern[: found.start()] + p + pattern[found.end() :] for p in parts]
    return list(itertools.chain.from_iterable(map(expanded, each)))


def component_matches(pattern: str, text: str) -> bool:
    if not pattern:
        return not text
    if pattern[0] == "*":
        here = component_matches(pattern[1:], text)
        return here or (bool(text) and component_matches(pattern, text[1:]))
    same = bool(text) and pattern[0] in ("?", text[0])
    return same and component_matches(pattern[1:], text[1:])


def parts_match(pattern: list[str], parts: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        here = parts_match(pattern[1:], parts)
        return here or (bool(parts) and parts_match(pattern, parts[1:]))
    return (
        bool(parts)
        and component_matches(pattern[0], parts[0])
        and parts_match(pattern[1:], parts[1:])
    )


TOKENS = ["a", "b", "*", "**", "/", "?", "{a,b}", "{*,a}", "{/,}", "{{a,*}/,*}"]


@settings(max_examples=300)
@given(
    tokens=st.lists(st.sampled_from(TOKENS), max_size=7),
    path=st.lists(st.text("ab", max_size=3), min_size=1, max_size=4).map("/".join),
)
@example(tokens=["{*,a}", "*", "/", "b"], path="a/a/b")
@example(tokens=["a", "/", "**"], path="a/")
def test_globs_match_what_their_expansions_match(tokens, path):
    pattern = "".join(tokens)
    each = [parts_match(p.split("/"), path.split("/")) for p in expanded(pattern)]
    assert paths.matches(pattern, path) == any(each)


@given(first=st.integers(0, 3000), last=st.integers(0, 3000), n=st.integers(0, 3000))
@example(first=0, last=0, n=0)
@example(first=8, last=1200, n=1200)
@example(first=99, last=100, n=99)
@example(first=5, last=4, n=5)
def test_a_range_is_the_numbers_from_first_to_last(first, last, n):
    pattern = f"w{{{first}..{last}}}"
    assert paths.matches(pattern, f"w{n}") == (first <= n <= last)
    assert not paths.matches(pattern, f"w0{n}")


BOMBS = {
    "a range": ("{0..300000000}/w", "123456789/w", "300000001/w"),
    "braces": ("{a,b}" * 28, "ab" * 14, "ab" * 14 + "a"),
    "nested braces": ("{a,{b,c}}" * 28 + "!", "abc" * 9 + "a!", "abc" * 9 + "a"),
    "stars": ("*a" * 12 + "!", "a" * 60 + "!", "a" * 60),
    "deep stars": ("**/x/" * 8 + "!", "x/" * 60 + "!", "/".join("x" * 60)),
    "both": ("{**/,*}x/" * 30 + "!", "x/" * 60 + "!", "/".join("x" * 60)),
    "empty": ("{,}" * 500 + "a", "a", "b"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_glob_takes_for_ever(name):
    pattern, path, other = BOMBS[name]
    assert paths.matches(pattern, path)
    assert not paths.matches(pattern, other)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a" * 5000, "'aaa.* has 5000 characters, more than 4000"),
        ("w{0.." + "9" * 5000 + "}", "has 50.. characters"),
        ("w{0.." + "9" * 19 + "}", r"'w\{0\.\.9+\}' has a number of over 18 digits"),
        ("a[^bc]d", r"has the set '\[\^bc\]'. Write '\[!bc\]' for any other"),
        ("w{3..2}{", r"'w\{3\.\.2\}\{' has a '\{' without its"),
    ],
)
def test_a_glob_out_of_bounds_is_an_error_that_shows_it(pattern, message):
    with pytest.raises(jlora.TreeError, match=message) as caught:
        paths.matches(pattern, "a")
    assert len(str(caught.value)) < 400


def test_a_positive_set_stays_inside_its_component():
    assert paths.matches("a[+-9]b", "a-b")
    assert not paths.matches("a[+-9]b", "a/b")


def test_a_caret_is_a_character_of_a_set():
    assert paths.matches("a[^]", "a^")
    assert paths.matches("a[b^]", "a^")


def test_a_long_path_is_its_own_pattern():
    path = "/".join(f"layer_{i}" for i in range(1000))
    assert paths.select(path, [path, "a"]) == (path,)
