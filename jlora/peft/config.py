"""`adapter_config.json`: every field understood, harmless, or refused by name."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeGuard, TypeVar

import jax.numpy as jnp
import numpy as np

from .._io.disk import Json
from .._text.automata import first_match
from .._text.regexes import compile_all, literal, parse as parse_regex, size
from ..errors import PeftError
from ..factors._scale import scale_fault

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)
Pattern = tuple[tuple[str, T], ...]  # by pattern or name

CONFIG = "adapter_config.json"
STEM = "adapter_model"  # the tensors' file without its suffix
PREFIX = "base_model.model."  # before the name of each tensor
SIGNED = "jlora_config"  # key of the signature in the tensors' metadata
FLOATS = tuple(map(np.dtype, (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)))

_LARGEST = float(np.finfo(np.float64).max)
_MAX_SIZE = 20_000  # of all regular expressions in one field

# Fields that say nothing about the adapter's numbers.
_NOTES = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Fields that jlora does not implement, and the values that switch them off.
_LACKING = {
    "arrow_config": (None,),
    "corda_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "loftq_config": (None, {}),
    "lora_bias": (False, None),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
    "velora_config": (None,),
}
_OFF = (None, False, {}, [])  # what an unknown field is where it is not in use
# Names of inits that leave the base weights as they are.
_INITS = ("gaussian", "eva", "orthogonal", "mica")  # the last one fixes B


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The fields of a PEFT `LoraConfig` that decide what an adapter computes.

    Attributes:
      r: the rank of modules without a pattern of their own.
      alpha: the numerator of their scale.
      rank_pattern: `(pattern, rank)`, the first that matches a module's name.
      alpha_pattern: `(pattern, alpha)`, likewise.
      rslora: divide by the rank's square root.
      dora: whether modules have magnitudes.
      dropout: drop rate on the input of A.
      bias: `"none"`, `"all"` or `"lora_only"`.
      targets: names of adapted modules, or a pattern; None leaves it to the model.
      excluded: names or a pattern of those that are not, whatever the targets say.
      layers: the numbers of the layers that are adapted; empty for all.
      layers_in: what may stand before such a number; empty for whatever does.
      parameters: names of adapted bare parameters.
      saved: modules that are in the file whole.
      tokens: `(module, token ids)` of trained rows; the module of a bare list is "".
      tying: whether the output head takes part in the embedding's adapter.
      invocation: the tokens after which an activated adapter acts.
      method: `"lora"`, or `"mica"` where B is fixed.
      conv1d: whether the last module that PEFT adapted keeps its weight `[in, out]`.
    """

    r: int
    alpha: float
    rank_pattern: Pattern[int] = ()
    alpha_pattern: Pattern[float] = ()
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    bias: str = "none"
    targets: tuple[str, ...] | str | None = None
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] = ()
    layers_in: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    tokens: Pattern[tuple[int, ...]] = ()
    tying: bool = False
    invocation: tuple[int, ...] = ()
    method: str = "lora"
    conv1d: bool = False


def pattern_lookup(
    pattern: Iterable[tuple[str, T]],
) -> Callable[[str], tuple[str, T] | None]:
    r"""Returns a function from a module to the first `(key, value)` that matches it.

    PEFT matches `(.*\.)?(key)$` with each key in turn. A key that stands for one text
    is looked up instead, for adapters with thousands of them. In a key without special
    signs a dot is a dot.
    """
    exact: dict[str, tuple[int, str, T]] = {}
    ending: dict[str, tuple[int, str, T]] = {}
    entries = tuple(pattern)
    others = {}
    for order, (key, value) in enumerate(entries):
        text = (False, key) if is_plain(key) else literal(parse_regex(key))
        if text is None:
            others[key] = order
        else:
            (exact if text[0] else ending).setdefault(text[1], (order, key, value))
    automaton = compile_all(others) if others else None

    def find(module: str) -> tuple[str, T] | None:
        found = [ending[end] for end in endings(module) if end in ending]
        found += [exact[module]] if module in exact else []
        order = first_match(automaton, module) if automaton else None
        found += [(order, *entries[order])] if order is not None else []
        return min(found, key=lambda hit: hit[0])[1:] if found else None

    return find


def is_plain(key: str) -> bool:
    """Returns whether a key is a name: a dot in it is a dot."""
    return re.fullmatch(r"[\w.]+", key) is not None


def endings(module: str) -> Iterator[str]:
    """Yields the name, and the part of it after each of its dots.

    Examples:
      >>> list(endings("a.b.c"))
      ['a.b.c', 'b.c', 'c']
    """
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def beginnings(name: str) -> Iterator[str]:
    """Yields the part of the name before each of its dots.

    Examples:
      >>> list(beginnings("a.b.c"))
      ['a.b', 'a']
    """
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def names_module(entry: str, module: str) -> bool:
    """Returns whether an entry of a list of targets names `module`."""
    return module == entry or module.endswith("." + entry)


def parse_config(fields: Json) -> tuple[PeftConfig, list[str]]:
    """Returns the config in `fields`, and in words what is wrong with it.

    Raises:
      PeftError: if it is not of a LoRA adapter, or lacks rank or alpha.
    """
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise PeftError(
            f"peft_type is {kind!r:.50}. jlora reads only 'LORA': convert the adapter "
            "with PEFT's `save_as_lora` first."
        )
    wrong: list[str] = []
    known = _FIELDS.keys() | _NOTES | _LACKING.keys() | {"peft_type"}
    wrong += [
        f"unknown field {name!r:.100}, which is {value!r:.100}"
        for name, value in fields.items()
        if name not in known and not any(_equal(value, off) for off in _OFF)
    ]
    wrong += [
        f"{name} is {fields[name]!r:.100}, which jlora does not have"
        for name, off in _LACKING.items()
        if name in fields and not any(_equal(fields[name], value) for value in off)
    ]
    values = {}
    for name, (field, read) in _FIELDS.items():
        value = fields.get(name)
        if value is None:
            if name in _REQUIRED:
                raise PeftError(
                    f"The config has no {name}. PEFT would silently take 8. Write the "
                    f"{name} that the adapter was trained with into it."
                )
            continue
        try:
            values[field] = read(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            if name in _REQUIRED:
                raise PeftError(f"{name} is {value!r:.100}: {error}.") from error
            wrong.append(f"{name} is {value!r:.100}: {error}")
    return PeftConfig(**values), wrong


def _equal(a: object, b: object) -> bool:
    return type(a) is type(b) and a == b


def _rank(value: object) -> int:
    if type(value) is not int or not 0 < value <= 1_000_000:
        raise ValueError("a rank is a positive whole number")
    return value


def _number(value: object) -> float:
    if not is_number(value):
        raise ValueError("it must be a positive number")
    fault = scale_fault(value, 1, rslora=False)
    if fault:
        raise ValueError(fault)
    return float(value)


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError("it must be true or false")
    return value


def _rate(value: object) -> float:
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError("a drop rate is in [0, 1)")
    return float(value)


def is_number(value: object) -> TypeGuard[int | float]:
    """Returns whether a JSON value is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -_LARGEST < value < _LARGEST


def _bias(value: object) -> str:
    if not isinstance(value, str) or value not in ("none", "all", "lora_only"):
        raise ValueError("it must be none, all or lora_only")
    return value


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError("it must be a list of names")
    return tuple(value)


def _targets(value: object) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else _names(value)


def _layers(value: object) -> tuple[int, ...]:
    layers: list[Any] = value if isinstance(value, list) else [value]
    if not all(type(layer) is int for layer in layers):
        raise ValueError("it must be a number or a list of numbers")
    return tuple(layers)


def _parents(value: object) -> tuple[str, ...]:
    return (value,) if value and isinstance(value, str) else _names(value or [])


def _pattern(read: Callable[[object], T]) -> Callable[[object], Pattern[T]]:
    def parse(value: object) -> Pattern[T]:
        if not isinstance(value, dict):
            raise ValueError("it must be an object")
        regexes = [parse_regex(key) for key in value if not is_plain(key)]
        sizes = [size(regex) for regex in regexes if literal(regex) is None]
        if sum(sizes) > _MAX_SIZE:
            raise ValueError(f"its {len(sizes)} patterns repeat too much together")
        return tuple((key, read(number)) for key, number in value.items())

    return parse


def _tokens(value: object) -> Pattern[tuple[int, ...]]:
    entries = {"": value} if isinstance(value, list) else value
    if not isinstance(entries, dict):
        raise ValueError("it must be a list or an object of lists")
    for ids in entries.values():
        whole = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
        if not whole or not ids or len(set(ids)) != len(ids):
            raise ValueError("token ids are different whole numbers")
    return tuple((name, tuple(ids)) for name, ids in entries.items())


def _ids(value: object) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, list) else ()
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError("it must be a list of token ids")
    return ids


def _init(value: object) -> str:
    if type(value) is not bool and value not in _INITS:
        raise ValueError(
            "such an init changes the base weights, which are not in the file. Save it "
            "in PEFT with path_initial_model_for_weight_conversion"
        )
    return "mica" if value == "mica" else "lora"


# PEFT's name: our name, and how it is read.
_FIELDS: dict[str, tuple[str, Callable[[object], object]]] = {
    "r": ("r", _rank),
    "lora_alpha": ("alpha", _number),
    "rank_pattern": ("rank_pattern", _pattern(_rank)),
    "alpha_pattern": ("alpha_pattern", _pattern(_number)),
    "use_rslora": ("rslora", _flag),
    "use_dora": ("dora", _flag),
    "lora_dropout": ("dropout", _rate),
    "bias": ("bias", _bias),
    "target_modules": ("targets", _targets),
    "target_parameters": ("parameters", _names),
    "modules_to_save": ("saved", _names),
    "trainable_token_indices": ("tokens", _tokens),
    "ensure_weight_tying": ("tying", _flag),
    "exclude_modules": ("excluded", _targets),
    "layers_to_transform": ("layers", _layers),
    "layers_pattern": ("layers_in", _parents),
    "fan_in_fan_out": ("conv1d", _flag),
    "alora_invocation_tokens": ("invocation", _ids),
    "init_lora_weights": ("method", _init),
}
_REQUIRED = ("r", "lora_alpha")


def config_fields(
    config: PeftConfig, *, base_model: str | None, task_type: str | None
) -> Json:
    """Returns the JSON object that PEFT reads as `config`, its fields sorted."""
    fields = {
        "alpha_pattern": {k: _plain(v) for k, v in config.alpha_pattern},
        "base_model_name_or_path": base_model,
        "bias": config.bias,
        "fan_in_fan_out": config.conv1d,
        "inference_mode": True,
        "init_lora_weights": True if config.method == "lora" else config.method,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "modules_to_save": list(config.saved) or None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "target_modules": list(config.targets or ()),
        "task_type": task_type,
        "use_dora": config.dora,
        "use_rslora": config.rslora,
    }
    # Older readers do not know these fields, so they are written only where needed.
    if config.invocation:
        fields["alora_invocation_tokens"] = list(config.invocation)
    if config.parameters:
        fields["target_parameters"] = list(config.parameters)
    if config.tokens:
        fields["trainable_token_indices"] = {k: list(v) for k, v in config.tokens}
    if config.tying:
        fields["ensure_weight_tying"] = True
    return dict(sorted(fields.items()))


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else float(number)


def patterns(values: Mapping[str, T], default: T) -> Pattern[T]:
    """Returns the pattern that gives each module its value, unless it is `default`.

    A name is written as it is, as PEFT writes it, unless it would match another module
    too; then it is anchored and escaped.
    """
    inner = {end for name in values for end in list(endings(name))[1:]}
    return tuple(
        (
            name if is_plain(name) and name not in inner else "^" + re.escape(name),
            value,
        )
        for name, value in values.items()
        if value != default
    )


def signature(fields: Json) -> str:
    """Returns the fields that decide what the tensors mean, as text."""
    kept = (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
    )
    return json.dumps([fields.get(k) or None for k in kept])


def most_common(values: Iterable[H]) -> H:
    """Returns the most frequent value, the first of several."""
    return Counter(values).most_common(1)[0][0]
