"""`LoraConfig` and `Rule`: what they accept, refuse, and write as JSON."""

import copy
import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import jlora

GLOBS = st.lists(
    st.sampled_from(["**", "**/q/kernel", "a/{b,c}/[de]?", 'say "é"\\n', ""]),
    max_size=3,
).map(tuple)
POSITIVE = st.integers(1, 10**6) | st.floats(1e-30, 1e30)
RATES = st.floats(0, 1, exclude_max=True)
AXES = st.permutations(range(4)).flatmap(
    lambda order: st.tuples(st.integers(0, 4), st.integers(0, 4)).map(
        lambda cuts: jlora.Axes(
            tuple(order[: min(cuts)]),
            tuple(order[min(cuts) : max(cuts)]),
            tuple(order[max(cuts) :]),
        )
    )
)
RULES = st.builds(
    jlora.Rule,
    st.text(max_size=5),
    rank=st.none() | st.integers(1, 512),
    alpha=st.none() | POSITIVE,
    method=st.none() | st.just("lora"),
    init=st.none() | st.sampled_from(["kaiming", "gaussian"]),
    dropout=st.none() | RATES,
    axes=st.none() | AXES,
)
CONFIGS = st.builds(
    jlora.LoraConfig,
    rank=st.integers(1, 512),
    alpha=st.none() | POSITIVE,
    targets=st.just("all-linear") | GLOBS,
    exclude=GLOBS,
    rules=st.lists(RULES, max_size=3).map(tuple),
    train=GLOBS,
    init=st.sampled_from(["kaiming", "gaussian"]),
    rslora=st.booleans(),
    dropout=RATES,
    dtype=st.sampled_from([None, "float32", "bfloat16", "float16", "float64"]),
)


@given(config=CONFIGS)
def test_json_round_trip_is_exact(config):
    again = jlora.LoraConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == config.to_json()
    # `==` holds between 16 and 16.0, so look at the types as well.
    assert type(again.alpha) is type(config.alpha)
    assert repr(again) == repr(config)


@given(config=CONFIGS)
def test_json_holds_every_field(config):
    fields = {f.name for f in dataclasses.fields(config)}
    assert set(json.loads(config.to_json())) == fields


@given(config=CONFIGS, other=CONFIGS)
def test_equal_configs_have_equal_hashes(config, other):
    assert (config == other) == (len({config, other}) == 1)
    assert hash(dataclasses.replace(config)) == hash(config)


def test_defaults_are_those_documented():
    config = jlora.LoraConfig()
    assert dataclasses.asdict(config) == {
        "rank": 8,
        "alpha": None,
        "targets": "all-linear",
        "exclude": (),
        "rules": (),
        "train": (),
        "method": "lora",
        "init": "kaiming",
        "rslora": False,
        "dropout": 0.0,
        "dtype": None,
        "invocation": (),
    }


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        jlora.LoraConfig().rank = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        jlora.Rule("**").rank = 4


@pytest.mark.parametrize("field", ["targets", "exclude", "train"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("**/q", ("**/q",)),
        (["**/q", "**/k"], ("**/q", "**/k")),
        ({"b", "a"}, ("a", "b")),
        (frozenset("ba"), ("a", "b")),
        (("b", "a"), ("b", "a")),
    ],
)
def test_globs_become_a_tuple(field, given, kept):
    config = jlora.LoraConfig(**{field: given})
    assert getattr(config, field) == kept
    assert hash(config) == hash(jlora.LoraConfig(**{field: kept}))


def test_all_linear_in_a_tuple_is_a_glob():
    assert jlora.LoraConfig(targets=("all-linear",)).targets == ("all-linear",)
    assert jlora.LoraConfig(targets="all-linear").targets == "all-linear"


def test_numbers_of_numpy_become_pythons():
    one, two = np.int64(1), np.int32(2)
    parts = jlora.FusedParts(axis=one, sizes=(two, two), ranks=(two, np.int8(0)))
    axes = jlora.Axes(batch=(), fan_in=(np.uint8(0),), fan_out=(one,))
    rules = jlora.Rule("q", parts=parts), jlora.Rule("k", rank=two, axes=axes)
    given = {"rank": two, "alpha": np.float32(3), "dropout": np.float32(0.5)}
    config = jlora.LoraConfig(**given, rslora=np.True_, rules=rules)
    assert (config.rank, config.alpha, config.rslora) == (2, 3.0, True)
    assert jlora.LoraConfig.from_json(config.to_json()) == config


def test_a_single_rule_and_a_list_of_rules_become_a_tuple():
    rule = jlora.Rule("**", rank=2)
    assert jlora.LoraConfig(rules=rule).rules == (rule,)
    assert jlora.LoraConfig(rules=[rule, rule]).rules == (rule, rule)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (jnp.bfloat16, "bfloat16"),
        (np.float32, "float32"),
        (jnp.dtype("float16"), "float16"),
        ("bfloat16", "bfloat16"),
        (None, None),
    ],
)
def test_dtype_is_kept_by_name(given, name):
    assert jlora.LoraConfig(dtype=given).dtype == name


BAD = [
    ("rank", 0, "LoraConfig: rank must be a positive integer, got 0."),
    ("rank", -2, "rank must be a positive integer, got -2"),
    ("rank", 4.0, "rank must be a positive integer, got 4.0"),
    ("rank", True, "rank must be a positive integer, got True"),
    ("rank", 10**400, "rank must be below 2**31, got 1000"),
    ("dropout", False, "dropout must be in [0, 1), got False"),
    ("train", jlora.TokenRows, "train must be a glob or a tuple of globs"),
    ("init", "pissa_niter_" + "9" * 5000, "init must be one of"),
    ("dtype", {"names": ["a"]}, "dtype must be one of"),
    ("rank", None, "LoraConfig.rank must not be None."),
    ("rank", "8", "rank must be a positive integer, got '8'"),
    ("alpha", 0, "alpha must be a positive number, got 0"),
    ("alpha", -1.5, "alpha must be a positive number, got -1.5"),
    ("alpha", float("nan"), "alpha must be a positive number, got nan"),
    ("alpha", float("inf"), "alpha must be a positive number, got inf"),
    ("alpha", True, "alpha must be a positive number, got True"),
    ("alpha", "16", "alpha must be a positive number, got '16'"),
    ("alpha", np.float32(-1), "alpha must be a positive number, got -1.0"),
    ("alpha", 1e308, "a scale that float32 holds, got 1e+308 at rank 8"),
    ("alpha", 10**400, "alpha must give a scale that float32 holds, got 1000"),
    ("alpha", 1e-40, "a scale that float32 holds, got 1e-40 at rank 8"),
    ("dropout", 1, "dropout must be in [0, 1), got 1"),
    ("dropout", -0.1, "dropout must be in [0, 1), got -0.1"),
    ("dropout", float("nan"), "dropout must be in [0, 1), got nan"),
    ("dropout", "0.1", "dropout must be in [0, 1), got '0.1'"),
    ("dropout", None, "LoraConfig.dropout must not be None."),
    ("method", "lorra", "method must be one of ('lora',"),
    ("method", None, "LoraConfig.method must not be None."),
    ("init", "zeros", "init must be one of ('kaiming', 'gaussian'"),
    ("init", None, "LoraConfig.init must not be None."),
    ("rslora", 1, "rslora must be True or False, got 1."),
    ("rslora", None, "rslora must be True or False, got None."),
    ("dtype", "int8", "dtype must be one of float32, bfloat16, float16, float64"),
    ("dtype", "fp32", "got 'fp32'."),
    ("targets", 3, "targets must be a glob or a tuple of globs, got 3."),
    ("targets", None, "targets must be a glob or a tuple of globs, got None."),
    ("targets", ("a", 1), "'**/attn/{q,v}/kernel', or lambda row: regex.search("),
    ("exclude", ("a", 1), "Write e.g. '**/attn/{q,v}/kernel'."),
    ("exclude", ("a", None), "exclude must be a glob or a tuple of globs"),
    ("exclude", {"a": 1}, "exclude must be a glob or a tuple of globs"),
    ("train", 1.5, "train must be a glob or a tuple of globs, got 1.5."),
    ("rules", ("**/q",), "rules must hold Rule objects, got '**/q'."),
    ("rules", ({"pattern": "a"},), "rules must hold Rule objects"),
    ("rules", 3, "rules must hold Rule objects"),
]


@pytest.mark.parametrize(
    ("field", "value", "message"), BAD, ids=[f"{f}={v!r:.40}" for f, v, _ in BAD]
)
def test_a_value_that_cannot_work_is_refused(field, value, message):
    with pytest.raises(jlora.ConfigError, match=re.escape(message)):
        jlora.LoraConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", 0, "Rule('**/q'): rank must be a positive integer, got 0."),
        ("alpha", -1, "Rule('**/q'): alpha must be a positive number, got -1."),
        ("alpha", 1e308, "Rule('**/q'): alpha must give a scale that float32 holds"),
        ("dropout", 2, "Rule('**/q'): dropout must be in [0, 1), got 2."),
        ("method", "x", "Rule('**/q'): method must be one of"),
        ("init", "x", "Rule('**/q'): init must be one of"),
        ("axes", (0, 1), "axes must be"),
        ("axes", jlora.Axes(batch=5), "axes must be tuples of numbers of axes"),
        ("axes", jlora.Axes(fan_in=("x",)), "axes must be tuples of numbers of axes"),
        ("axes", jlora.Axes(fan_in=(True,)), "axes must be tuples of numbers of axes"),
        ("parts", jlora.FusedParts(0, 3, (1,)), "parts must be an axis, and tuples"),
        ("parts", jlora.FusedParts("0", (3,), (1,)), "parts must be an axis"),
        ("rank", 2**31, "Rule('**/q'): rank must be below 2**31, got 2147483648."),
    ],
)
def test_a_rule_that_cannot_work_is_refused(field, value, message):
    with pytest.raises(jlora.ConfigError, match=re.escape(message)):
        jlora.Rule("**/q", **{field: value})


def test_a_rule_wants_a_glob():
    with pytest.raises(jlora.ConfigError, match=r"Rule\.pattern must be a glob, got 3"):
        jlora.Rule(3)


def test_all_bad_values_are_told_at_once():
    with pytest.raises(jlora.ConfigError) as caught:
        jlora.LoraConfig(rank=0, alpha=-1, dropout=2, method="a", init="b")
    for name in ("rank", "alpha", "dropout", "method", "init"):
        assert f"{name} must be" in str(caught.value)
    with pytest.raises(jlora.ConfigError, match=r"method must be one of .*\['lora'\]"):
        jlora.LoraConfig(method=["lora"])


def test_config_errors_are_value_errors():
    assert issubclass(jlora.ConfigError, jlora.JloraError)
    assert issubclass(jlora.JloraError, ValueError)


def test_a_predicate_has_no_json():
    config = jlora.LoraConfig(targets=lambda row: row.op == "linear")
    with pytest.raises(
        jlora.ConfigError, match=r"no JSON form.*targets=tuple\(plan\.adapted\)"
    ):
        config.to_json()
    assert isinstance(hash(config), int)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rank: 8",
        "[]",
        "8",
        "null",
        '{"rannk": 8}',
        '{"rules": [{"pattern": "a", "rnk": 3}]}',
        '{"rules": [{"rank": 3}]}',
        '{"rules": ["a"]}',
        '{"rules": null}',
        '{"rules": [{"pattern": "a", "axes": {"fanin": [0]}}]}',
    ],
)
def test_json_that_is_no_config_is_refused(text):
    with pytest.raises(jlora.ConfigError, match="This is not a LoraConfig in JSON"):
        jlora.LoraConfig.from_json(text)


HOSTILE = {
    "deep": b'{"rules":' + b"[" * 200_000,
    "deep and whole": b'{"a":' * 900 + b"1" + b"}" * 900,
    "many digits": '{"rank": ' + "9" * 5000 + "}",
    "a large number": '{"alpha": ' + str(10**400) + ', "rank": 8}',
    "a large rank": '{"rank": ' + str(10**400) + "}",
    "not text": b'{"rank": \xff}',
    "half a surrogate": '{"targets": "\\ud800"}',
    "not a dtype": '{"dtype": {"names": ["a"], "formats": [{}]}}',
    "a dtype of many": '{"dtype": ["f4", "f4"]}',
    "a key twice": '{"rank": 4, "rank": 8}',
    "a key of a rule twice": '{"rules": [{"pattern": "a", "rank": 4, "rank": 8}]}',
    "an axis": '{"rules": [{"pattern": "a", "axes": {"batch": 5}}]}',
    "names of axes": '{"rules": [{"pattern": "a", "axes": {"fan_in": ["x"]}}]}',
    "no axes": '{"rules": [{"pattern": "a", "axes": 0}]}',
    "parts": '{"rules": [{"pattern": "a", "parts": {"axis": 0, "sizes": 1}}]}',
    "rules": '{"rules": {}}',
    "a rule": '{"rules": ""}',
    "rows": '{"train": [{"pattern": "a", "ids": 5}]}',
    "rows of words": '{"train": [{"pattern": "a", "ids": ["x"]}]}',
    "rows of truth": '{"train": [{"pattern": "a", "ids": [true]}]}',
    "rows twice": '{"train": [{"pattern": "a", "ids": [1], "ids": [2]}]}',
    "itself": '{"self": 1}',
    "itself in a rule": '{"rules": [{"pattern": "a", "self": 1}]}',
    "an iteration": '{"init": "pissa_niter_' + "9" * 5000 + '"}',
    "megabytes": '{"init": "' + "x" * 3_000_000 + '"}',
    "a megabyte of name": '{"' + "x" * 1_000_000 + '": 1}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_a_short_config_error(name):
    with pytest.raises(jlora.ConfigError) as caught:
        jlora.LoraConfig.from_json(HOSTILE[name])
    assert len(str(caught.value)) < 21_000


FIELDS = [f.name for f in dataclasses.fields(jlora.LoraConfig)]
FIELDS += [f.name for f in dataclasses.fields(jlora.Rule)]
FIELDS += ["ids", "batch", "fan_in", "fan_out", "axis", "sizes", "ranks", "self"]
WORDS = st.sampled_from(["all-linear", "lora", "kaiming", "float32", "**", "a"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(), inner, max_size=5)
    ),
    max_leaves=20,
)


def read_or_config_error(text):
    """Reads a text; a config that is read is one that can be written and read again."""
    try:
        config = jlora.LoraConfig.from_json(text)
    except jlora.ConfigError:
        return
    assert jlora.LoraConfig.from_json(config.to_json()) == config
    assert isinstance(hash(config), int)


@given(value=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3) | JSON)
def test_any_json_is_a_config_or_a_config_error(value):
    read_or_config_error(json.dumps(value))


@given(data=st.binary() | st.text())
def test_any_bytes_are_a_config_or_a_config_error(data):
    read_or_config_error(data)


@given(config=CONFIGS, at=st.integers(0), new=st.binary(max_size=3))
def test_a_changed_config_is_a_config_or_a_config_error(config, at, new):
    data = config.to_json().encode()
    at %= len(data)
    read_or_config_error(data[:at] + new + data[at + 1 :])


def test_an_unknown_field_in_json_is_named():
    with pytest.raises(jlora.ConfigError, match="'rannk'"):
        jlora.LoraConfig.from_json('{"rannk": 8}')


def test_bad_values_in_json_are_refused_as_in_code():
    with pytest.raises(jlora.ConfigError, match="rank must be a positive integer"):
        jlora.LoraConfig.from_json('{"rank": 0}')


def test_json_of_an_older_version_may_lack_fields():
    config = jlora.LoraConfig.from_json('{"rank": 4}')
    assert config == jlora.LoraConfig(rank=4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"r": 8}, "LoraConfig: r= is PEFT's word: write rank=16."),
        ({"lora_alpha": 32}, "write alpha=32"),
        ({"target_modules": ["q_proj"]}, 'write targets="**/{q_proj,v_proj}/kernel"'),
        ({"modules_to_save": ["head"]}, 'write train="**/classifier/*"'),
        ({"lora_dropout": 0.1}, "write dropout=0.1, and lora_key= at each"),
        ({"use_dora": True}, 'write method="dora"'),
        ({"rank_pattern": {}}, 'write rules=Rule("**/q_proj/kernel", rank=4)'),
        ({"task_type": "CAUSAL_LM"}, "task_type= is PEFT's word: leave it out"),
        (
            {"r": 8, "x": 1, "bias": "none"},
            "rank=16; bias= is PEFT's word: write train",
        ),
    ],
)
def test_pefts_words_are_answered_with_jloras(given, message):
    with pytest.raises(jlora.ConfigError, match=re.escape(message)):
        jlora.LoraConfig(**given)
    with pytest.raises(jlora.ConfigError, match=re.escape(message)):
        jlora.LoraConfig.from_json(json.dumps(given))


def test_a_rule_answers_the_words_that_it_has():
    with pytest.raises(jlora.ConfigError, match=r"Rule: r= is PEFT's word: write rank"):
        jlora.Rule("**", r=8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'use_rslora'"):
        jlora.Rule("**", use_rslora=True)


@pytest.mark.parametrize("record", [jlora.LoraConfig, jlora.Rule])
def test_an_unknown_keyword_is_a_type_error(record):
    wanted = rf"{record.__name__}.__init__\(\) got an unexpected keyword argument 'rnk'"
    with pytest.raises(TypeError, match=wanted):
        record("**", rnk=8) if record is jlora.Rule else record(rnk=8)


def test_fields_are_given_by_name():
    with pytest.raises(TypeError, match="positional argument"):
        jlora.LoraConfig(8)
    with pytest.raises(TypeError, match="positional argument"):
        jlora.Rule("**", 8)


def test_configs_copy_and_replace():
    rule = jlora.Rule("**", axes=jlora.Axes(), init="pissa")
    config = jlora.LoraConfig(rules=rule, train=jlora.TokenRows("**", (1,)))
    assert copy.deepcopy(config) == copy.copy(config) == config
    assert dataclasses.replace(config, rank=4).rules == (rule,)
    assert repr(jlora.LoraConfig(rank=4)).startswith("LoraConfig(rank=4, alpha=None")


def test_json_may_name_one_glob():
    config = jlora.LoraConfig.from_json('{"train": "**/head/*", "targets": "**/q"}')
    assert config == jlora.LoraConfig(train="**/head/*", targets="**/q")
