"""What the user wants: `LoraConfig` and its per-leaf `Rule`s; frozen, kept as JSON."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, Literal, Never

import jax.typing
import numpy as np

from ._numerics import python_numbers
from ._text.json_text import parse_json
from .errors import ConfigError
from .factors import FORMS, Axes, Form, FusedParts, tuples
from .factors._scale import scale_fault
from .methods import INITS, METHODS, find_init, init_name

Init = str | Callable[..., Any]
Predicate = Callable[[Any], bool]  # of a plan's Row
Globs = str | Sequence[str] | Set[str]


@dataclasses.dataclass(frozen=True, init=False)
class Rule:
    """Settings for the leaves that a glob matches; None keeps the config's value.

    Of several rules that match a leaf, the last that sets a field wins.

    Attributes:
      pattern: glob over the whole path, see `LoraConfig.targets`.
      rank: size of the rank axis.
      alpha: the scale's numerator. If only `rank` is set, `alpha` stays as it was.
      method: see `LoraConfig`.
      init: see `LoraConfig`.
      dropout: see `LoraConfig`.
      axes: roles of the weight's axes, in place of what the trace found:
        `Axes(batch=(0,), fan_in=(1,), fan_out=(2,))` for experts.
      parts: LoRA on some slices of a fused weight, each with its rank, see
        `FusedParts`. The scale of a part is `alpha` over its rank. `alpha` is the
        highest rank if it is not given.
      form: how the value of a product is computed, in place of the `form` that
        `apply_lora` is given. The plan's uses show it.

    Examples:
      >>> Rule("**/mlp/**", rank=4).rank
      4
    """

    pattern: str
    rank: int | None
    alpha: float | None
    method: str | None
    init: Init | None
    dropout: float | None
    axes: Axes | None
    parts: FusedParts | None
    form: Form | None

    def __init__(
        self,
        pattern: str,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        method: str | None = None,
        init: Init | None = None,
        dropout: float | None = None,
        axes: Axes | None = None,
        parts: FusedParts | None = None,
        form: Form | None = None,
        **unknown: Never,
    ):
        _refuse(Rule, unknown)
        if not isinstance(pattern, str):
            raise ConfigError(f"Rule.pattern must be a glob, got {pattern!r}.")
        parts = python_numbers(parts)
        if not isinstance(parts, FusedParts | None):
            raise ConfigError(f"Rule.parts must be jlora.FusedParts, got {parts!r}.")
        if parts is not None and rank is not None:
            raise ConfigError(
                f"Rule({pattern!r}): parts have a rank each, so leave rank out."
            )
        if not isinstance(axes, Axes | None):
            raise ConfigError(f"Rule.axes must be jlora.Axes, got {axes!r}.")
        if axes is not None and not all(
            map(_are_numbers, (axes.batch, axes.fan_in, axes.fan_out))
        ):
            raise ConfigError(
                f"Rule({pattern!r}): axes must be tuples of numbers of axes, as in "
                f"Axes(batch=(0,), fan_in=(1,), fan_out=(2,)), got {axes!r}."
            )
        if parts is not None and not (
            type(parts.axis) is int
            and _are_numbers(parts.sizes)
            and _are_numbers(parts.ranks)
        ):
            raise ConfigError(
                f"Rule({pattern!r}): parts must be an axis, and tuples of sizes and "
                f"ranks, got {parts!r}."
            )
        if form is not None and form not in FORMS:
            raise ConfigError(
                f"Rule({pattern!r}): form must be one of {FORMS}, got {form!r}."
            )
        _set(
            self,
            pattern=pattern,
            rank=rank,
            alpha=alpha,
            method=method,
            init=init,
            dropout=dropout,
            axes=axes,
            parts=parts,
            form=form,
        )
        _check(f"Rule({pattern!r})", self)


@dataclasses.dataclass(frozen=True, init=False)
class TokenRows:
    """Rows of an embedding table to train, for `LoraConfig.train`; the others stay.

    `trainable` holds only these rows, as differences from those of the base.

    Attributes:
      pattern: glob over the whole path of the table.
      ids: numbers of the rows, each once; usually token ids.

    Examples:
      >>> TokenRows("**/embedding", ids=(30522, 30523)).ids
      (30522, 30523)
    """

    pattern: str
    ids: tuple[int, ...]

    def __init__(self, pattern: str, ids: Iterable[int]):
        if not isinstance(pattern, str):
            raise ConfigError(f"TokenRows.pattern must be a glob, got {pattern!r}.")
        rows = tuple(ids) if isinstance(ids, Iterable) else ()
        if not rows or not _are_numbers(rows) or len(set(rows)) < len(rows):
            raise ConfigError(
                f"TokenRows({pattern!r}): ids must be row numbers from 0, each once, "
                f"got {ids!r}."
            )
        _set(self, pattern=pattern, ids=rows)


@dataclasses.dataclass(frozen=True, init=False)
class LoraConfig:
    """What to adapt and how; every field is given by its name.

    A field that holds a tuple also takes a single entry or a list; `to_json` writes all
    fields.

    Attributes:
      rank: size of the rank axis, a positive integer.
      alpha: the scale is `alpha / rank`, a positive number that float32 holds; None
        means `alpha = rank`, a scale of 1.
      targets: which weights get factors: `"all-linear"` (every weight that the trace
        found in a linear operation, except embeddings, the output head, weights that
        are also merged on the fly, and those narrower than their rank), a glob or
        a tuple of globs over whole paths, or a predicate on a plan's `Row`. In a glob
        `*` stays inside one component, `**` is any number of components, `{a,b}` is
        either, `{0..5}` a range: `"**/layer_{0..5}/attn/{q,v}/kernel"`. The exact path
        of a leaf names this leaf only, whatever characters it has.
      exclude: globs of leaves that never get factors.
      rules: per-leaf settings; the last match wins.
      train: globs of leaves trained in full (heads, biases, norms); `TokenRows` for
        single rows of an embedding table.
      method: `"lora"`; `"dora"` also trains the lengths of columns; `"vera"` trains two
        vectors and shares random factors; `"adalora"` has singular values that can be
        pruned; `"lora_xs"` trains a rank × rank matrix between singular vectors of the
        weight; `"mica"` trains only A.
      init: how A and B are initialised: `"kaiming"`, `"gaussian"`, `"orthogonal"`,
        `"zero_a"`; `"pissa"`, `"pissa_niter_<n>"`, `"olora"`, which take a part of the
        weight out of the frozen side; `"loftq"`, `"loftq_niter_<n>"`, which quantise
        it; `"eva"`, `"corda"`, `"corda_kpm"`, `"lora_ga"`, which need `statistics`; or
        a function `(key, w, spec, dtype) -> (a, b)`.
      rslora: scale by `alpha / sqrt(rank)`, so that high ranks learn too.
      dropout: drop rate on the input of A, in [0, 1). It is active when the function
        that `apply_lora` returns is given a `lora_key`. An embedding drops the update
        of whole positions, since the input of its A is one-hot.
      dtype: dtype name of A and B; None means float32.
      invocation: token ids of activated LoRA: the adapter acts on them and on what
        follows, and the base before them; see `adapters.invocation_gate`.

    Raises:
      ConfigError: for a value that cannot work.

    Examples:
      >>> config = LoraConfig(rank=8, alpha=16, targets="**/attn/{q,v}/kernel")
      >>> LoraConfig.from_json(config.to_json()) == config
      True

    References:
      Hu et al., 2021, LoRA, https://arxiv.org/abs/2106.09685;
      Kalajdzievski, 2023, rsLoRA, https://arxiv.org/abs/2312.03732;
      Greenewald et al., 2025, activated LoRA, https://arxiv.org/abs/2504.12397
    """

    rank: int
    alpha: float | None
    targets: Literal["all-linear"] | tuple[str, ...] | Predicate
    exclude: tuple[str, ...]
    rules: tuple[Rule, ...]
    train: tuple[str | TokenRows, ...]
    method: str
    init: Init
    rslora: bool
    dropout: float
    dtype: str | None
    invocation: tuple[int, ...]

    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: float | None = None,
        targets: Globs | Predicate = "all-linear",
        exclude: Globs = (),
        rules: Rule | Sequence[Rule] = (),
        train: Globs | TokenRows | Sequence[str | TokenRows] = (),
        method: str = "lora",
        init: Init = "kaiming",
        rslora: bool = False,
        dropout: float = 0.0,
        dtype: jax.typing.DTypeLike | None = None,
        invocation: Iterable[int] = (),
        **unknown: Never,
    ):
        _refuse(LoraConfig, unknown)
        if not (callable(targets) or targets == "all-linear"):
            targets = _globs("targets", targets)
        if not isinstance(python_numbers(rslora), bool):
            raise ConfigError(f"rslora must be True or False, got {rslora!r}.")
        ids = tuple(invocation) if isinstance(invocation, Iterable) else ()
        if not isinstance(invocation, Iterable) or not _are_numbers(ids):
            raise ConfigError(f"invocation must be token ids, got {invocation!r}.")
        _set(
            self,
            rank=rank,
            alpha=alpha,
            targets=targets,
            exclude=_globs("exclude", exclude),
            rules=_rules(rules),
            train=_train(train),
            method=method,
            init=init,
            rslora=rslora,
            dropout=dropout,
            dtype=None if dtype is None else _float_name(dtype),
            invocation=ids,
        )
        for name in ("rank", "dropout", "method", "init"):
            if getattr(self, name) is None:
                raise ConfigError(f"LoraConfig.{name} must not be None.")
        _check("LoraConfig", self)

    @property
    def train_whole(self) -> tuple[str, ...]:
        """The globs in `train`."""
        return tuple(t for t in self.train if isinstance(t, str))

    @property
    def train_rows(self) -> tuple[TokenRows, ...]:
        """The `TokenRows` in `train`."""
        return tuple(t for t in self.train if isinstance(t, TokenRows))

    def to_json(self) -> str:
        """Returns the config as JSON text that `from_json` reads back exactly.

        Raises:
          ConfigError: if `targets` or an `init` is a function: it has no JSON form.
        """
        if callable(self.targets):
            raise ConfigError(
                "A config whose `targets` is a function has no JSON form. Use the "
                "paths it selected: targets=tuple(plan.adapted)."
            )
        functions = [x.init for x in (self, *self.rules) if callable(x.init)]
        if functions:
            raise ConfigError(
                "A config whose `init` is a function "
                f"({', '.join(map(init_name, functions))}) has no JSON form. Name an "
                f"init of {', '.join(INITS)}."
            )
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> "LoraConfig":
        """Returns the config that `to_json` wrote.

        Args:
          text: a JSON object. Fields that it lacks have their defaults.

        Raises:
          ConfigError: for whatever is not a config: text that is not a JSON object,
            unknown fields, a field that is there twice, values that cannot work.
        """
        try:
            fields = parse_json(text)
            if not isinstance(fields, dict):
                what = type(fields).__name__
                raise ConfigError(
                    f"This is not a LoraConfig in JSON: a {what}, not an object."
                )
            rules = [_rule_from(rule) for rule in _list(fields, "rules")]
            train = fields.pop("train", ())
            if isinstance(train, list):
                train = [TokenRows(**t) if isinstance(t, dict) else t for t in train]
            return cls(**fields, rules=rules, train=train)
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"This is not a LoraConfig in JSON: {error}") from error


def _list(fields: dict[str, Any], name: str) -> list[Any]:
    """Takes the list called `name` out of `fields`; an empty one if it is not there."""
    value = fields.pop(name, [])
    if not isinstance(value, list):
        raise TypeError(f"{name} is a {type(value).__name__}, not a list")
    return value


def _rule_from(fields: object) -> Rule:
    """Returns the rule of which `fields` are the JSON values."""
    if not isinstance(fields, dict):
        raise TypeError(f"a rule is a {type(fields).__name__}, not an object")
    given = dict(fields)
    for name, record in {"axes": Axes, "parts": FusedParts}.items():
        value = given.get(name)
        if isinstance(value, dict):
            given[name] = record(**tuples(value))
        elif value is not None:
            raise TypeError(f"{name} is a {type(value).__name__}, not an object")
    return Rule(**given)


def _are_numbers(values: object) -> bool:
    """Returns whether `values` are whole numbers from 0 in a tuple."""
    return isinstance(values, tuple) and all(map(_is_number, values))


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return False
    return 0 <= int(value) < 2**31


def _set(record: LoraConfig | Rule | TokenRows, **fields: Any) -> None:
    """Sets the fields of a frozen record that is being made."""
    for name, value in fields.items():
        object.__setattr__(record, name, python_numbers(value))


def _globs(name: str, value: Any) -> tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else value
    if not isinstance(globs, Sequence | Set) or not all(
        isinstance(g, str) for g in globs
    ):
        also = ", or lambda row: regex.search(row.path)" if name == "targets" else ""
        raise ConfigError(
            f"{name} must be a glob or a tuple of globs, got {value!r}. "
            f"Write e.g. '**/attn/{{q,v}}/kernel'{also}."
        )
    return tuple(sorted(globs) if isinstance(globs, Set) else globs)


def _train(value: Any) -> tuple[str | TokenRows, ...]:
    """Returns the globs and then the rows of `train`."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    entries = value if several else (value,)
    rows = tuple(t for t in entries if isinstance(t, TokenRows))
    if not rows:
        return _globs("train", value)
    rest = [t for t in entries if not isinstance(t, TokenRows)]
    return (*_globs("train", rest), *rows)


def _rules(value: Any) -> tuple[Rule, ...]:
    rules = value if isinstance(value, Sequence) else (value,)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ConfigError(f"rules must hold Rule objects, got {rule!r}.")
    return tuple(rules)


def _float_name(dtype: Any) -> str:
    try:
        name = np.dtype(dtype).name
    except Exception:  # NumPy reads lists and dicts as the fields of a record
        name = getattr(dtype, "__name__", str(dtype))
    known = ("float32", "bfloat16", "float16", "float64")
    if name not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)}, got {dtype!r}.")
    return name


def _check(owner: str, fields: LoraConfig | Rule) -> None:
    """Raises one ConfigError that lists every value that cannot work."""
    rank, alpha, dropout = fields.rank, fields.alpha, fields.dropout
    wrong = []
    if rank is not None and (type(rank) is not int or rank < 1):
        wrong.append(f"rank must be a positive integer, got {rank!r}")
        rank = None
    elif rank is not None and rank >= 2**31:
        wrong.append(f"rank must be below 2**31, got {rank!r}")
        rank = None
    if alpha is not None and not isinstance(alpha, int | float):  # as JSON has it
        wrong.append(f"alpha must be a positive number, got {alpha!r}")
    elif alpha is not None:  # a rule's rank may be that of another rule
        own = 1 if rank is None else rank
        fault = scale_fault(alpha, own, rslora=getattr(fields, "rslora", False))
        wrong += [fault] if fault else []
    if dropout is not None and not (
        isinstance(dropout, int | float)
        and not isinstance(dropout, bool)
        and 0 <= dropout < 1
    ):
        wrong.append(f"dropout must be in [0, 1), got {dropout!r}")
    if fields.method is not None and fields.method not in tuple(METHODS):
        wrong.append(f"method must be one of {tuple(METHODS)}, got {fields.method!r}")
    if fields.init is not None and find_init(fields.init) is None:
        wrong.append(
            f"init must be one of {tuple(INITS)}, pissa_niter_<n>, loftq_niter_<n> or "
            f"a function, got {fields.init!r}"
            + (f": write method={fields.init!r}" if fields.init in METHODS else "")
        )
    if callable(fields.init) and find_init(init_name(fields.init)) is not None:
        wrong.append(
            f"init is a function called {init_name(fields.init)!r}, as one of jlora's "
            "own is: rename it, or give the name as a string"
        )
    if wrong:
        raise ConfigError(f"{owner}: {'; '.join(wrong)}.")


# PEFT's words: the field of jlora that answers each, and what to write.
_PEFT_WORDS = {
    "r": ("rank", "rank=16"),
    "init_r": ("rank", "rank=12"),
    "target_r": ("", "give it to jlora.optim.adalora, as target_rank="),
    "lora_alpha": ("alpha", "alpha=32 (without it the scale is 1)"),
    "target_modules": ("targets", 'targets="**/{q_proj,v_proj}/kernel"'),
    "target_parameters": ("targets", 'targets="**/experts/*"'),
    "exclude_modules": ("exclude", 'exclude="**/lm_head/kernel"'),
    "layers_to_transform": ("targets", 'targets="**/layers/{0..2}/**/kernel"'),
    "layers_pattern": ("targets", 'targets="**/layers/{0..2}/**/kernel"'),
    "rank_pattern": ("rules", 'rules=Rule("**/q_proj/kernel", rank=4)'),
    "alpha_pattern": ("rules", 'rules=Rule("**/q_proj/kernel", alpha=8)'),
    "modules_to_save": ("train", 'train="**/classifier/*"'),
    "bias": ("train", 'train="**/bias"'),
    "lora_bias": ("train", 'train="**/bias"'),
    "trainable_token_indices": ("train", 'train=TokenRows("**/embedding", ids)'),
    "lora_dropout": ("dropout", "dropout=0.1, and lora_key= at each training call"),
    "vera_dropout": ("dropout", "dropout=0.1, and lora_key= at each training call"),
    "use_rslora": ("rslora", "rslora=True"),
    "use_dora": ("method", 'method="dora"'),
    "peft_type": ("method", 'method="vera"'),
    "alora_invocation_tokens": (
        "invocation",
        "invocation=ids, and lora_gate= at each call",
    ),
    "init_lora_weights": ("init", 'init="pissa"'),
    "loftq_config": ("init", 'init="loftq_niter_4"'),
    "eva_config": ("init", 'init="eva", and split(..., statistics=...)'),
    "corda_config": ("init", 'init="corda", and split(..., statistics=...)'),
    "lora_ga_config": ("init", 'init="lora_ga", and split(..., statistics=...)'),
    "fan_in_fan_out": ("", "leave it out, the trace finds the axes"),
    "ensure_weight_tying": (
        "",
        "leave it out, a shared leaf is one leaf",
    ),
    "task_type": ("", "leave it out, jlora adapts any function"),
    "inference_mode": ("", "leave it out, dropout is off without lora_key="),
}


def _refuse(owner: type, unknown: dict[str, Any]) -> None:
    """Raises for keywords that are not fields; PEFT's words are told jlora's."""
    fields = {"", *(field.name for field in dataclasses.fields(owner))}
    told = [
        f"{name}= is PEFT's word: {'write ' if _PEFT_WORDS[name][0] else ''}"
        f"{_PEFT_WORDS[name][1]}"
        for name in unknown
        if name in _PEFT_WORDS and _PEFT_WORDS[name][0] in fields
    ]
    if told:
        raise ConfigError(f"{owner.__name__}: {'; '.join(told)}.")
    for name in unknown:
        raise TypeError(
            f"{owner.__name__}.__init__() got an unexpected keyword argument {name!r}"
        )
