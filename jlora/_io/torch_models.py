"""What tensors under torch's own names are: orientation, tables, ties, quantisation.

A file of tensors does not say which modules they belong to. What is known comes from
shapes, from the model's `config.json` beside them, and from names that mean one thing
in all models of `transformers`.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Literal

from .disk import Json, Path, read_json

Side = Literal["linear", "conv1d"]  # weights `[out, in]`, and GPT-2's `[in, out]`

# Modules of class Conv1D, in these types of models and in no other.
_CONV1D = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
# Experts whose `use_experts_implementation` says `is_concatenated=False`.
_INTERLEAVED_TYPES = {"gpt_oss"}
_CONV1D_TYPES = frozenset(
    {"clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"}
)
# Last names of embedding tables, and the output heads that share their weight.
_TABLE = re.compile(
    r"(\w+_)?(embed|embedding|embeddings|embed_tokens|embed_positions|embed_in)"
    r"|wte|wpe|shared|relative_attention_bias"
)
_HEADS = {
    "embed_tokens": "lm_head",
    "wte": "lm_head",
    "shared": "lm_head",
    "word_embeddings": "lm_head",
    "embed_in": "embed_out",
    "tok_embeddings": "output",
}
_FLAX = (".kernel", ".embedding", ".embeddings", ".w", ".b")  # ends of others' names
_ENCODER_HEADS = ("cls.predictions.", "lm_head.")  # before `decoder`, of BERT's kind
_HEADLESS = (
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
    "ForImageClassification",
)  # fmt: skip
# What models with a head call their body, by their type. Some files of the first models
# lack it.
_PREFIXES = {
    **dict.fromkeys(("gpt2", "openai-gpt", "bloom", "falcon"), "transformer."),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), "roberta."),
    **{
        name: f"{name}."
        for name in ("bert", "distilbert", "electra", "vit", "gpt_neox")
    },
}
# What classes of transformers 5 call otherwise than files: patterns, and what is put in
# place of the first match, one after the other. A pattern ends where a word does.
_IN_CLASSES: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl"),
        (
            ("^visual", "model.visual"),
            (r"^model(?!\.(language_model|visual))", "model.language_model"),
        ),
    ),
    "vit": (
        (r"encoder\.layer", "layers"),
        (r"attention\.query", "q_proj"),
        (r"attention\.key", "k_proj"),
        (r"attention\.value", "v_proj"),
        (r"attention\.output\.dense", "attention.o_proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"output\.dense", "mlp.fc2"),
    ),
}
CONFIG = "config.json"
TIED = "tie_word_embeddings"
_WRAPPED = "language_model.model."  # of LLaVA, Gemma 3 with images, and their like
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# What the tensors are called that say how the codes of a weight become numbers: ends
# after the weight's own name, and names beside one called `weight`.
_SCALES = (
    "_scale_inv", "_scale", "_scale_2", "_scales", "_blocks", "_packed",
    "_zero_point", ".SCB", ".absmax", ".quant_map", ".scale", "_q", "_scb",
)  # fmt: skip
_SCALES_OF_WEIGHT = ("SCB", "qweight", "scales", "scale_weight", "scale", "absmax")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a model's `config.json` says of its tensors.

    Attributes:
      known: whether it names the type of the model.
      conv1d: whether that type has modules of class Conv1D.
      tied: whether the output head is the embedding table, false for a model without
        one; None if it does not say.
      task: PEFT's word for what the model is for; None if it does not say.
      prefix: what the class of the model puts before the names of its body; empty if
        that is not known.
      dtype: its floating-point dtype; empty if it does not say.
      quantised: by what method it is quantised; empty if it does not say.
      block: lengths of the blocks of float8, along fan-out and fan-in.
      interleaved: whether gate and up of its experts alternate in the rows of one
        parameter in transformers; None if the type is not known.
      kind: the type of the model; empty if it does not say.
    """

    known: bool = False
    conv1d: bool = False
    tied: bool | None = None
    task: str | None = None
    prefix: str = ""
    dtype: str = ""
    quantised: str = ""
    block: tuple[int, int] = (128, 128)
    interleaved: bool | None = None
    kind: str = ""


def facts_of(model: Path, *, inside: bool = False) -> Facts:
    """Returns what the `config.json` in or beside `model` says; nothing without one.

    Args:
      model: a file or a directory, which need not be there.
      inside: look only inside of it.

    Raises:
      CheckpointError: if there is one that cannot be read.
    """
    place = pathlib.Path(model)
    file = (place if inside or place.is_dir() else place.parent) / CONFIG
    if not os.path.lexists(file):
        return Facts()
    fields = read_json(file)
    types = {str(found["model_type"]) for found in _objects(fields, "model_type")}
    ties = [found[TIED] for found in _objects(fields, TIED)]
    tied = ties[0] if ties and type(ties[0]) is bool else None
    names = fields.get("architectures")
    names = list(map(str, names)) if isinstance(names, list) else []
    if names and all(map(_has_no_head, names)):
        tied = False
    bare = all(map(_is_bare, names))
    prefix = "" if bare else _PREFIXES.get(str(fields.get("model_type")), "")
    tasks = [t for n in names for end, t in _TASKS.items() if n.endswith(end)]
    task = next(iter(tasks), None)
    return Facts(
        bool(types),
        bool(types & _CONV1D_TYPES),
        tied,
        task,
        prefix,
        *_storage(fields),
        bool(types & _INTERLEAVED_TYPES) if types else None,
        str(fields.get("model_type") or ""),
    )


def has_config(model: Path) -> bool:
    """Returns whether `model` is a directory with a `config.json`."""
    return os.path.isfile(os.path.join(model, CONFIG))


def _storage(fields: Json) -> tuple[str, str, tuple[int, int]]:
    """Returns the model's dtype, how it is quantised, and float8's blocks."""
    named = [found[key] for key in ("torch_dtype", "dtype")
             for found in _objects(fields, key)]  # fmt: skip
    dtype = next((name for name in named if isinstance(name, str)), "")
    about = fields.get("quantization_config")
    about = about if isinstance(about, dict) else {}
    match about.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            block = rows, columns
        case _:
            block = Facts.block
    return dtype, str(about.get("quant_method") or ""), block


def _is_bare(architecture: str) -> bool:
    return architecture.endswith("Model") and "Head" not in architecture


def _has_no_head(architecture: str) -> bool:
    return _is_bare(architecture) or architecture.endswith(_HEADLESS)


def _objects(fields: Json, name: str) -> Iterator[Json]:
    """Yields the objects in a config that have a field `name`, from outside in."""
    level: list[Json] = [fields]
    while level:
        yield from (found for found in level if name in found)
        inner = (value for found in level for value in found.values())
        level = [value for value in inner if isinstance(value, dict)]


def is_torch_named(names: Iterable[str]) -> bool:
    """Returns whether these are names of torch's: with dots, and without slashes.

    Examples:
      >>> is_torch_named(["lm_head.weight"]), is_torch_named(["head/kernel", "w"])
      (True, False)
    """
    names = list(names)
    flax = any("/" in name or name.endswith(_FLAX) for name in names)
    return not flax and any("." in name for name in names)


def is_wrapped(name: str) -> bool:
    """Returns whether a file has this name for the body of a text model in another."""
    return name.startswith(_WRAPPED)


def name_in_memory(name: str) -> str:
    """Returns what `transformers` calls a tensor of a model with a wrapped text model.

    Since version 4.52 its classes have other names than their files.

    Examples:
      >>> name_in_memory("language_model.model.norm.weight")
      'model.language_model.norm.weight'
      >>> name_in_memory("language_model.lm_head.weight")
      'lm_head.weight'
    """
    if is_wrapped(name):
        return f"model.language_model.{name.removeprefix(_WRAPPED)}"
    head = name.removeprefix("language_model.")
    return head if head != name else f"model.{name}"


def names_in_classes(names: Collection[str], facts: Facts) -> Callable[[str], str]:
    """Returns a function that gives names of a model's files those of its class.

    Args:
      names: the tensors of the files.
      facts: see `facts_of`.

    Examples:
      >>> to_class = names_in_classes(["model.norm.weight"], Facts(kind="qwen2_vl"))
      >>> to_class("model.norm"), to_class("visual.blocks.0.attn.qkv")
      ('model.language_model.norm', 'model.visual.blocks.0.attn.qkv')
    """
    if any(map(is_wrapped, names)):
        return name_in_memory
    if facts.kind in _IN_CLASSES:
        return lambda name: name_in_class(name, facts.kind)
    lacking = facts.prefix and not any(n.startswith(facts.prefix) for n in names)
    return facts.prefix.__add__ if lacking else str


def name_in_class(name: str, kind: str) -> str:
    """Returns what the class of a type of model calls a tensor of older files.

    A name that the class has stays as it is, and so do those of types whose classes
    have the names of files.

    Examples:
      >>> name_in_class("vit.encoder.layer.0.intermediate.dense", "vit")
      'vit.layers.0.mlp.fc1'
      >>> name_in_class("model.layers.0.mlp.up_proj", "llama")
      'model.layers.0.mlp.up_proj'
    """
    for pattern, new in _IN_CLASSES.get(kind, ()):
        name = re.sub(rf"{pattern}(?!\w)", new, name, count=1)
    return name


def is_table(module: str) -> bool:
    """Returns whether a module is an embedding table, by its name."""
    return _TABLE.fullmatch(module.rpartition(".")[2]) is not None


def is_token_table(module: str) -> bool:
    """Returns whether a module is the table of a model's tokens, by its name."""
    return module.rpartition(".")[2] in _HEADS


def is_head(module: str) -> bool:
    """Returns whether a module is an output head that may be tied, by its name."""
    return module in _HEADS.values()


def head_of(module: str, names: Collection[str] = ()) -> str | None:
    """Returns the output head that may share the weight of the table `module`.

    Args:
      module: the name of any module.
      names: the tensors of the model, as far as they are known. A head that is one of
        them is a weight of its own.

    Examples:
      >>> head_of("model.embed_tokens")
      'lm_head'
      >>> head_of("model.embed_tokens", {"lm_head.weight"}) is None
      True
    """
    parent, _, last = module.rpartition(".")
    head = _HEADS.get(last)
    if head == "lm_head" and parent.rpartition(".")[2] == "embeddings":
        begins = (b for b in _ENCODER_HEADS if any(n.startswith(b) for n in names))
        head = next((f"{begin}decoder" for begin in begins), None)
    return None if head is None or f"{head}.weight" in names else head


def stored_ties(names: Collection[str]) -> dict[str, str]:
    """Returns the tables whose output head is stored too, each with that head.

    Examples:
      >>> stored_ties(["model.embed_tokens.weight", "lm_head.weight"])
      {'model.embed_tokens.weight': 'lm_head.weight'}
    """
    last = {n: n.removesuffix(".weight").rpartition(".")[2] for n in names}
    heads = {word: name for name, word in last.items() if is_head(word)}
    found = {name: heads.get(_HEADS.get(word, "")) for name, word in last.items()}
    return {table: head for table, head in found.items() if head is not None}


def tie_of(names: Collection[str], facts: Facts) -> bool | None:
    """Returns whether a model's table is its output head too, None if nothing tells.

    Args:
      names: the model's tensors; a head among them is a weight of its own, whatever
        the config says of a model that stores a tied weight twice.
      facts: see `facts_of`.
    """
    heads = {f"{head}.weight" for head in _HEADS.values()}
    return False if heads & {*names} else facts.tied


def pattern_of(module: str) -> str:
    """Returns a module's name without its numbers: it is the same in every layer."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def sides_by_bias(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Side]:
    """Returns the modules of a model whose bias tells which axis is the output.

    A module without a bias is linear: a Conv1D always has one.

    Examples:
      >>> sides_by_bias({"up.weight": (2, 3), "up.bias": (3,), "q.weight": (4, 4)})
      {'up': 'conv1d', 'q': 'linear'}
    """
    found: dict[str, Side] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or module == name:
            continue
        bias = shapes.get(f"{module}.bias")
        if bias is None or (shape[0] != shape[1] and bias == shape[:1]):
            found[module] = "linear"
        elif shape[0] != shape[1] and bias == shape[1:]:
            found[module] = "conv1d"
    return found


def sides(
    asked: Iterable[str],
    proven: Mapping[str, Side],
    facts: Facts,
    *,
    flag: bool | None = None,
    adapted: Collection[str] = (),
    strict: bool = True,
) -> dict[str, Side | None]:
    """Returns the side of each module that is asked for; None where nothing tells.

    Modules that differ only in their numbers, in `h.0.up` and `h.1.up`, are alike.

    Args:
      asked: names of modules.
      proven: modules whose side is known from shapes.
      facts: see `facts_of`.
      flag: the adapter's `fan_in_fan_out`: PEFT leaves there what the last module that
        it made needed. None if there is no adapter.
      adapted: modules that the adapter has.
      strict: whether a module that nothing tells of has no side; without a model at
        hand it is linear unless it is called as a Conv1D of transformers.
    """
    alike: dict[str, Side] = {pattern_of(m): side for m, side in proven.items()}
    flagged: Side = "conv1d" if flag else "linear"
    gpt2s: Side = "conv1d" if facts.conv1d else "linear"
    family: set[Side] = {side for m, side in proven.items() if is_conv1d(m)}
    seen = bool(flag) or "conv1d" in proven.values()
    one_kind = len({pattern_of(module) for module in adapted}) == 1
    one_family = all(map(is_conv1d, adapted)) and bool(adapted)

    def side(module: str) -> Side | None:
        if (known := alike.get(pattern_of(module))) is not None:
            return known
        own = is_conv1d(module)
        if facts.known:
            return gpt2s if own else "linear"
        if flag is not None and (one_kind or (one_family and not family)):
            return flagged
        if own and len(family) == 1:
            return next(iter(family))
        return None if strict or seen or own else "linear"

    return {module: side(module) for module in asked}


def is_conv1d(module: str) -> bool:
    """Returns whether a module is of class Conv1D in GPT-2's family, by its name."""
    return module.rpartition(".")[2] in _CONV1D


def scale_beside(name: str, names: Collection[str]) -> str | None:
    """Returns the tensor that gives the codes in `name` their scale, if there is one.

    Examples:
      >>> scale_beside("up.weight", {"up.weight", "up.weight_scale_inv"})
      'up.weight_scale_inv'
    """
    module, dot, last = name.rpartition("." if "/" not in name else "/")
    tried = [f"{name}{end}" for end in _SCALES]
    tried += [f"{module}{dot}{end}" for end in _SCALES_OF_WEIGHT if last == "weight"]
    return next((key for key in tried if key in names), None)
