"""Regular expressions of adapter files: Python's results, in one pass over the name."""

import re

import pytest
from hypothesis import example, given, settings, strategies as st

from jlora.peft import config

pytestmark = pytest.mark.once

LETTERS = st.sampled_from(
    (
        *("a", "b", "_", "1", r"\.", ".", r"\d", r"\w", r"\S", "[ab]", "[^a.]"),
        *(
            "[a-c1]",
            "^",
            "$",
            r"\b",
            r"\B",
            r"[\w.]",
            r"\-",
            "-",
            "[]a]",
            "{",
            "}",
            "{}",
            "]",
        ),
    )
)
REPEATS = st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{,2}", "{2,}"])
REGEXES = st.recursive(
    LETTERS,
    lambda inner: (
        st.lists(inner, max_size=4).map("".join)
        | st.tuples(inner, inner).map("(%s|%s)".__mod__)
        | st.tuples(inner, REPEATS).map(lambda pair: f"(?:{pair[0]}){pair[1]}")
        | st.tuples(LETTERS, REPEATS).map("".join)
    ),
    max_leaves=6,
)
NAMES = st.text("ab.1_-{}", max_size=8)


@settings(max_examples=300)
@given(keys=st.lists(REGEXES, min_size=1, max_size=3), names=st.lists(NAMES))
@example(keys=["^a", "a"], names=["a", "b.a"])
@example(keys=["a$", "^b$", r"b\.a"], names=["a", "b", "b.a", "c.b", "c.b.a"])
@example(keys=["(a|ab)(c|bcd)(d*)", "a{0,}"], names=["abcd", "x.abcd", ""])
@example(keys=["(|a)*", "(a*)*b"], names=["aab", "aa", "x.aab"])
@example(keys=[r"(?:\ba\.b\.[\d]{1,}\.(?:c|d)\b)"], names=["a.b.1.c", "x.a.b.2.d"])
@example(keys=[r"\B", r"\b^a", r"a\b$", r"a.\Ba"], names=["", "a", "b.a", "a_a"])
@example(keys=[r"layers\.\d+\.(q|v)_proj"], names=["m.layers.10.q_proj", "layers.v"])
def test_the_first_key_that_matches_is_pythons(keys, names):
    try:
        parsed = config.parse_config(
            {
                "peft_type": "LORA",
                "r": 1,
                "lora_alpha": 1,
                "rank_pattern": {key: i + 1 for i, key in enumerate(keys)},
            }
        )
        patterns = [re.compile(rf"(.*\.)?({key})$") for key in dict.fromkeys(keys)]
    except re.error:
        return
    pattern, wrong = parsed[0].rank_pattern, parsed[1]
    if wrong:  # Python refuses it, or reads it in two ways
        assert "is broken" in wrong[0]
        return
    find = config.pattern_lookup(pattern)
    plain = [re.fullmatch(r"[\w.]+", key) and "." in key for key, _ in pattern]
    for name in names:
        hits = [
            key for (key, _), r in zip(pattern, patterns, strict=True) if r.match(name)
        ]
        found = find(name)
        if not any(plain):  # where a dot is a dot
            assert (found and found[0]) == (hits[0] if hits else None)


BOMBS = {
    "alternatives of nothing": ("(|.)" * 24 + "!", "a" * 24),
    "nested loops": ("(a*)*(a*)*(a+)+!", "a" * 60),
    "many loops": (".*a" * 20 + "!", "a" * 200),
    "sets": ("([a-z]|[^!])+" * 10 + "!", "a" * 100),
    "counted loops": ("(a{0,40}){0,40}!", "a" * 200),
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_pattern_takes_for_ever(name):
    key, text = BOMBS[name]
    find = config.pattern_lookup([(key, 4)])
    assert find(text) is None
    assert find(text + "!") == (key, 4)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("(?=a)a", "is not a plain pattern"),
        ("(?i)a", "is not a plain pattern"),
        (r"(a)\1", "is not a plain pattern"),
        ("(?P<x>a)", "is not a plain pattern"),
        ("a*+", "is not a plain pattern"),
        ("a{2}+", "is not a plain pattern"),
        ("a" * 1000 + "+", "it is too long"),
        ("(" * 60 + "a" + ")" * 60, "its groups are too deep"),
        ("(a{100}){100}", "repeats too much"),
        ("a{99999999999}", "is broken"),
        ("(" * 400 + ")" * 400, "is not a plain pattern"),
        ("[[a]", "is broken, Possible nested set"),
        ("a)|(b", "is broken"),
    ],
)
def test_other_patterns_are_refused_and_shown(key, why):
    fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "alpha_pattern": {key: 2}}
    _, (wrong,) = config.parse_config(fields)
    assert f"the pattern {key!r:.60}" in wrong
    assert why in wrong


def test_ten_thousand_names_with_odd_signs_are_looked_up():
    values = {f"layer-{i}.w": i + 1 for i in range(10_000)}
    pattern = config.patterns(values, 0)
    assert all(key.startswith("^") for key, _ in pattern)
    find = config.pattern_lookup(pattern)
    assert all(find(name)[1] == value for name, value in values.items())
    assert find("x.layer-3.w") is None
