"""What the user wants: `LoraConfig` and its per-leaf `Rule`s; frozen, JSON."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import ConfigError
from .factors import Axes, FusedParts, tuples
from .methods import INITS, METHODS, find_init, init_name

Init = str | Callable[..., Any]
Targets = str | tuple[str, ...] | Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
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
      axes: roles of the weight's axes, in place of what the trace found, as
        `Axes(batch=(0,), fan_in=(1,), fan_out=(2,))` for experts.
      parts: LoRA on some slices of a fused weight, each with its rank, see
        `FusedParts`. The scale of a part is `alpha / its rank`; without `alpha` the
        highest rank counts.

    Examples:
      >>> Rule("**/mlp/**", rank=4).rank
      4
    """

    pattern: str
    rank: int | None = None
    alpha: float | None = None
    method: str | None = None
    init: Init | None = None
    dropout: float | None = None
    axes: Axes | None = None
    parts: FusedParts | None = None

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise ConfigError(f"Rule.pattern must be a glob, got {self.pattern!r}.")
        if isinstance(self.parts, dict):  # from JSON
            object.__setattr__(self, "parts", FusedParts(**tuples(self.parts)))
        if not isinstance(self.parts, FusedParts | None):
            raise ConfigError(
                f"Rule.parts must be jlora.FusedParts, got {self.parts!r}."
            )
        if self.parts is not None and self.rank is not None:
            raise ConfigError(
                f"Rule({self.pattern!r}): parts have a rank each, so leave rank out."
            )
        if isinstance(self.axes, dict):  # from JSON
            object.__setattr__(self, "axes", Axes(**tuples(self.axes)))
        if not isinstance(self.axes, Axes | None):
            raise ConfigError(f"Rule.axes must be jlora.Axes, got {self.axes!r}.")
        _check(f"Rule({self.pattern!r})", self)


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """TokenRows of an embedding table to train, in `LoraConfig.train`; the others stay.

    Only these rows, as differences to the base's, exist in `trainable`.

    Attributes:
      pattern: glob over the whole path of the table.
      ids: which rows, each once; token ids as a rule.

    Examples:
      >>> TokenRows("**/embedding", ids=(30522, 30523)).ids
      (30522, 30523)
    """

    pattern: str
    ids: tuple[int, ...]

    def __post_init__(self):
        ids = self.ids if isinstance(self.ids, str) else tuple(self.ids)
        if not isinstance(self.pattern, str):
            raise ConfigError(
                f"TokenRows.pattern must be a glob, got {self.pattern!r}."
            )
        whole = all(isinstance(i, int | np.integer) and i >= 0 for i in ids)
        if not ids or not whole or len(set(ids)) < len(ids):
            raise ConfigError(
                f"TokenRows({self.pattern!r}): ids must be row numbers from 0, each "
                f"once, got {self.ids!r}."
            )
        object.__setattr__(self, "ids", tuple(int(i) for i in ids))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how.

    Attributes:
      rank: size of the rank axis, a positive integer.
      alpha: the scale is `alpha / rank`; None means `alpha = rank`, a scale of 1.
      targets: which weights get factors: `"all-linear"` (every weight that the trace
        found in a linear operation, except embeddings and the output head), a glob or
        a tuple of globs over whole paths, or a predicate on a plan's `Row`. In a glob
        `*` stays inside one component, `**` is any number of components, `{a,b}` is
        either, `{0..5}` a range: `"**/layer_{0..5}/attn/{q,v}/kernel"`.
      exclude: globs of leaves that never get factors.
      rules: per-leaf settings; the last match wins.
      train: globs of leaves trained in full (heads, biases, norms); `TokenRows` for
        single rows of an embedding table.
      method: `"lora"`; `"dora"` trains the lengths of columns too; `"vera"` trains two
        vectors beside shared random factors; `"adalora"` has singular values that can
        be pruned.
      init: how A and B start: `"kaiming"`, `"gaussian"`, `"orthogonal"`; `"pissa"`,
        `"pissa_niter_<n>"`, `"olora"`, which take a part of the weight out of the
        frozen side; `"loftq"`, `"loftq_niter_<n>"`, which quantise it; `"eva"`,
        `"corda"`, `"corda_kpm"`, `"lora_ga"`, which want `statistics`; or a function
        `(key, w, spec, dtype) -> (a, b)`.
      rslora: scale by `alpha / sqrt(rank)`, which keeps high ranks learning.
      dropout: drop rate on the input of A, in [0, 1); active when `apply_lora`'s
        function is given a `lora_key`. An embedding drops the update of whole
        positions, since the input of its A is one-hot.
      dtype: dtype name of A and B; None means float32.

    Raises:
      ConfigError: for a value that cannot work.

    Examples:
      >>> config = LoraConfig(rank=8, alpha=16, targets="**/attn/{q,v}/kernel")
      >>> LoraConfig.from_json(config.to_json()) == config
      True

    References:
      Hu et al., 2021, LoRA, https://arxiv.org/abs/2106.09685;
      Kalajdzievski, 2023, rsLoRA, https://arxiv.org/abs/2312.03732
    """

    rank: int = 8
    alpha: float | None = None
    targets: Targets = "all-linear"
    exclude: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    train: tuple[str | TokenRows, ...] = ()
    method: str = "lora"
    init: Init = "kaiming"
    rslora: bool = False
    dropout: float = 0.0
    dtype: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "exclude", _globs("exclude", self.exclude))
        train = (self.train,) if isinstance(self.train, TokenRows) else self.train
        of_rows: tuple[TokenRows, ...] = ()
        if isinstance(train, tuple | list):
            of_rows = tuple(t for t in train if isinstance(t, TokenRows))
            train = tuple(t for t in train if not isinstance(t, TokenRows))
        object.__setattr__(self, "train", (*_globs("train", train), *of_rows))
        if not (callable(self.targets) or self.targets == "all-linear"):
            object.__setattr__(self, "targets", _globs("targets", self.targets))
        rules = (self.rules,) if isinstance(self.rules, Rule) else self.rules
        for rule in rules if isinstance(rules, tuple | list) else (rules,):
            if not isinstance(rule, Rule):
                raise ConfigError(f"rules must hold Rule objects, got {rule!r}.")
        object.__setattr__(self, "rules", tuple(rules))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", _float_name(self.dtype))
        if not isinstance(self.rslora, bool):
            raise ConfigError(f"rslora must be True or False, got {self.rslora!r}.")
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
    def from_json(cls, text: str) -> "LoraConfig":
        """Returns the config that `to_json` wrote.

        Args:
          text: a JSON object; fields that are not in it have their defaults.

        Raises:
          ConfigError: for text that is no JSON object, or has unknown fields.
        """
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict):
                what = type(fields).__name__
                raise ConfigError(
                    f"This is no LoraConfig in JSON: a {what}, not an object."
                )
            rules = tuple(Rule(**rule) for rule in fields.pop("rules", ()))
            train = tuple(
                TokenRows(**t) if isinstance(t, dict) else t
                for t in fields.pop("train", ())
            )
            return cls(**fields, rules=rules, train=train)
        except (json.JSONDecodeError, AttributeError, TypeError) as error:
            raise ConfigError(f"This is no LoraConfig in JSON: {error}") from error


def _globs(name: str, value: Any) -> tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else value
    if not isinstance(globs, tuple | list | set | frozenset) or not all(
        isinstance(g, str) for g in globs
    ):
        raise ConfigError(
            f"{name} must be a glob or a tuple of globs, got {value!r}. "
            "Write e.g. '**/attn/{q,v}/kernel'."
        )
    return tuple(sorted(globs) if isinstance(globs, set | frozenset) else globs)


def _float_name(dtype: Any) -> str:
    try:
        name = np.dtype(dtype).name
    except TypeError:
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
    if alpha is not None and not _positive(alpha):
        wrong.append(f"alpha must be a positive number, got {alpha!r}")
    if dropout is not None and not (
        isinstance(dropout, int | float) and 0 <= dropout < 1
    ):
        wrong.append(f"dropout must be in [0, 1), got {dropout!r}")
    if fields.method is not None and fields.method not in tuple(METHODS):
        wrong.append(f"method must be one of {tuple(METHODS)}, got {fields.method!r}")
    if fields.init is not None and find_init(fields.init) is None:
        wrong.append(
            f"init must be one of {tuple(INITS)}, pissa_niter_<n>, loftq_niter_<n> or "
            f"a function, got {fields.init!r}"
        )
    if callable(fields.init) and find_init(init_name(fields.init)) is not None:
        wrong.append(
            f"init is a function called {init_name(fields.init)!r}, as one of jlora's "
            "own: rename it, or give the name as a string"
        )
    if wrong:
        raise ConfigError(f"{owner}: {'; '.join(wrong)}.")


def _positive(x: Any) -> bool:
    return (
        isinstance(x, int | float)
        and not isinstance(x, bool)
        and math.isfinite(x)
        and x > 0
    )
