"""Random adapters, most of them broken, that shaped no rule of `peft.validate`.

`check_held_out.py` compares with servers' own code. A seed gives the same adapters each
time; another seed gives new ones. Each adapter takes up to three random changes: of
names, of sizes, of fields of the config, tensors more or fewer. Where a change lands is
random too, so that most combinations have been thought of by nobody.
"""

import copy
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.golden.server_cases import Case, P

Shapes = Mapping[str, tuple[int, ...]]  # of the base's tensors, as the server has them
Change = Callable[[Case, Shapes, random.Random], str]  # says what it did, if it did
WORDS = (
    "model", "language_model", "text_model", "decoder", "transformer", "default",
    "base_layer", "module", "0", "qkv_proj", "gate_up_proj", "query_key_value",
    "c_attn", "dense", "fc1", "experts", "layers", "h", "self_attn", "attn", "mlp",
)  # fmt: skip
ENDS = (
    "lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_A", "lora_B",
    "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_B.bias",
    "lora_magnitude_vector.weight", "base_layer.weight", "base_layer.bias", "weight",
    "bias", "token_adapter.trainable_tokens_delta", "modules_to_save.weight",
)  # fmt: skip
PREFIXES = ("", "base_model.", P + P, "model.", P + "model.", "module." + P)
INITS = (True, False, "gaussian", "eva", "pissa", "olora", "orthogonal", "loftq")
END = re.compile(
    r"\.(lora_\w+(\.\w+)*|base_layer\.\w+|token_adapter\.\w+|weight|bias)$"
)


def parted(name: str) -> tuple[str, str]:
    """Returns the module of a tensor, without PEFT's prefix, and the rest of its name.

    Examples:
      >>> parted("base_model.model.layers.0.q_proj.lora_A.weight")
      ('layers.0.q_proj', 'lora_A.weight')
    """
    inner = name.removeprefix(P)
    found = END.search(inner)
    return (inner[: found.start()], found[1]) if found else (inner, "")


def mutated(case: Case, shapes: Shapes, rng: random.Random) -> Case:
    """Returns an adapter with none to three random changes."""
    other = copy.deepcopy(case)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
        done = rng.choice(CHANGES)(other, shapes, rng)
        if done:
            other.name += f" + {done}"
        if not other.tensors:
            return case
    return other


def some(case: Case, rng: random.Random) -> list[str]:
    """Returns names of tensors that have something in common, or random ones."""
    names = list(case.tensors)
    module, end = parted(rng.choice(names))
    layer = re.search(r"\.\d+\.", module)
    kind = rng.choice(("all", "one", "module", "last", "end", "layer", "half"))
    if kind == "all":
        return names
    if kind == "one":
        return [rng.choice(names)]
    if kind == "module":
        return [n for n in names if parted(n)[0] == module]
    if kind == "last":
        last = module.rpartition(".")[2]
        return [n for n in names if parted(n)[0].rpartition(".")[2] == last]
    if kind == "end":
        return [n for n in names if parted(n)[1] == end]
    if kind == "layer" and layer:
        return [n for n in names if layer[0] in n]
    return [n for n in names if rng.random() < 0.5] or names[:1]


def _rename(case: Case, chosen: list[str], new: Callable[[str], str]) -> None:
    case.tensors = {new(n) if n in chosen else n: x for n, x in case.tensors.items()}


def prefix(case: Case, shapes: Shapes, rng: random.Random) -> str:
    """Puts another prefix before names."""
    chosen, new = some(case, rng), rng.choice(PREFIXES)
    _rename(case, chosen, lambda n: new + n.removeprefix(P))
    return f"{len(chosen)} with prefix {new!r}"


def component(case: Case, shapes: Shapes, rng: random.Random) -> str:
    """Changes, adds or leaves out a part of names between two dots."""
    chosen = some(case, rng)
    module = parted(rng.choice(chosen))[0].split(".")
    at, kind = rng.randrange(len(module)), rng.choice(("swap", "insert", "delete"))
    known = {part for name in shapes for part in name.split(".")}
    new = rng.choice((rng.choice(WORDS), rng.choice(sorted(known))))
    old = module[at]

    def changed(name: str) -> str:
        stem, end = parted(name)
        begin = P if name.startswith(P) else ""
        own = stem.split(".")
        if at < len(own) and own[at] == old:
            own[at : at + (kind != "insert")] = [] if kind == "delete" else [new]
        return begin + ".".join([*filter(None, own), end])

    _rename(case, chosen, changed)
    return f"{kind} {old!r}, {new!r} in {len(chosen)}"


def number(case: Case, shapes: Shapes, rng: random.Random) -> str:
    """Moves a layer, or an expert."""
    chosen, more = some(case, rng), rng.choice((1, 2, 7))
    which = rng.choice((0, -1))

    def changed(name: str) -> str:
        found = [*re.finditer(r"(?<=\.)\d+(?=\.)", name)]
        if not found:
            return name
        own = found[which]
        return name[: own.start()] + str(int(own[0]) + more) + name[own.end() :]

    _rename(case, chosen, changed)
    return f"number {which} + {more} in {len(chosen)}"


def end(case: Case, shapes: Shapes, rng: random.Random) -> str:
    """Changes the part of a name that says what a tensor is."""
    chosen, new = some(case, rng), rng.choice(ENDS)
    old = parted(rng.choice(chosen))[1]
    _rename(
        case,
        chosen,
        lambda n: n.removesuffix(old) + new if parted(n)[1] == old else n,
    )
    return f"{old} is {new} in {len(chosen)}"


def size(case: Case, shapes: Shapes, rng: random.Random) -> str:
    """Changes the sizes of tensors."""
    chosen = some(case, rng)
    axis, kind = rng.choice((0, 1)), rng.choice(("+1", "-1", "*2", "T", "flat", "3d"))
    for name in chosen:
        shape = [*case.tensors[name].shape]
        if kind == "T":
            shape = shape[::-1]
        elif kind == "flat":
            shape = [int(np.prod(shape))]
        elif kind == "3d":
            shape = [3, *shape]
        elif axis < len(shape):
            old = shape[axis]
            shape[axis] = max(1, {"+1": old + 1, "-1": old - 1, "*2": old * 2}[kind])
        case.tensors[name] = np.ones(shape, np.float32)
    return f"axis {axis} {kind} in {len(chosen)}"


def rank(case: Case, shapes: Shapes, rng: random.Random) -> str:
    """Changes the rank of modules, sometimes with a field that says so."""
    last = parted(rng.choice([*case.tensors]))[0].rpartition(".")[2]
    new = rng.choice((1, 3, 16, 17, 40))
    for name, x in case.tensors.items():
        module, what = parted(name)
        if module.rpartition(".")[2] == last and x.ndim == 2:
            first = what.startswith(("lora_A", "lora_embedding_A"))
            shape = (new, x.shape[1]) if first else (x.shape[0], new)
            if what.startswith(("lora_A", "lora_B", "lora_embedding")):
                case.tensors[name] = np.ones(shape, np.float32)
    told = rng.random() < 0.7
    if told:
        key = rng.choice((last, rf".*\.{last}", f"{last}$", f"x_{last}"))
        pattern = case.config.get("rank_pattern") or {}
        case.config["rank_pattern"] = {**pattern, key: new}
    return f"rank {new} of {last}, {'told' if told else 'not told'}"


def lost(case: Case, shapes: Shapes, rng: random.Random) -> str:
    """Leaves tensors out."""
    chosen = some(case, rng)
    if len(chosen) == len(case.tensors):
        chosen = chosen[::2]
    for name in chosen:
        del case.tensors[name]
    return f"without {len(chosen)}"


def pair(case: Case, shapes: Shapes, rng: random.Random) -> str:
    """Adds A and B of a random module of the base."""
    matrices = sorted(n for n, s in shapes.items() if len(s) == 2)
    name = rng.choice(matrices)
    rows, columns = shapes[name]
    module, r = name.removesuffix(".weight"), case.config.get("r", 2)
    r = r if isinstance(r, int) else 2
    ends = ("lora_A.weight", (r, columns)), ("lora_B.weight", (rows, r))
    if rng.random() < 0.2:
        ends = ("lora_embedding_A", (r, rows)), ("lora_embedding_B", (columns, r))
    for what, shape in ends:
        case.tensors[f"{P}{module}.{what}"] = np.ones(shape, np.float32)
    named = rng.random() < 0.6
    targets = case.config.get("target_modules")
    if named and isinstance(targets, list):
        own = module if rng.random() < 0.3 else module.rpartition(".")[2]
        case.config["target_modules"] = [*targets, own]
    return f"{module} too, {'named' if named else 'not named'}"


def extra(case: Case, shapes: Shapes, rng: random.Random) -> str:
    """Adds a tensor of a random kind to a random module."""
    own = parted(rng.choice([*case.tensors]))[0]
    base = rng.choice(sorted(shapes)).rpartition(".")[0]
    module, what = rng.choice((own, base)), rng.choice(ENDS)
    shape = shapes.get(f"{module}.weight", (3,))
    if what in ("bias", "base_layer.bias", "lora_B.bias") or "magnitude" in what:
        shape = shape[:1]
    if rng.random() < 0.2:
        shape = (*shape[:-1], shape[-1] + 1)
    case.tensors[f"{P}{module}.{what}"] = np.ones(shape, np.float32)
    return f"{module}.{what} {list(shape)}"


def whole(case: Case, shapes: Shapes, rng: random.Random) -> str:
    """Adds whole tensors of the base, sometimes said in `modules_to_save`."""
    name = rng.choice(sorted(shapes))
    module = name.rpartition(".")[0]
    for other in shapes:
        if other.rpartition(".")[0] == module and rng.random() < 0.9:
            case.tensors[P + other] = np.ones(shapes[other], np.float32)
    named = rng.random() < 0.6
    if named:
        saved = case.config.get("modules_to_save") or []
        entry = rng.choice((module, module.rpartition(".")[2]))
        case.config["modules_to_save"] = [*saved, entry]
    return f"{module} whole, {'named' if named else 'not named'}"


def field(case: Case, shapes: Shapes, rng: random.Random) -> str:
    """Changes a field of the config."""
    lasts = sorted({parted(n)[0].rpartition(".")[2] for n in case.tensors})
    modules = sorted({n.rpartition(".")[0] for n in shapes})
    word, module = rng.choice(lasts) or "x", rng.choice(modules)
    tables = [m for m in modules if m.endswith(("embed_tokens", "wte", "embed_in"))]
    values: dict[str, tuple[Any, ...]] = {
        "r": (1, 3, 17, 64, 600),
        "lora_alpha": (1, 0.5, 32),
        "rank_pattern": ({word: 5}, {f".*{word}": 3}, {"nothing": 4}),
        "alpha_pattern": ({word: 5}, {module: 3}, {f"^{module}$": 7}),
        "use_dora": (True,),
        "use_rslora": (True,),
        "lora_bias": (True,),
        "bias": ("all", "lora_only", "none"),
        "init_lora_weights": INITS,
        "modules_to_save": ([word], [module], ["lm_head"], ["score"], ["embed_tokens"]),
        "target_modules": (
            [word], [module], "all-linear", rf".*\.{word}", rf".*({word}|{lasts[0]})",
            lasts[:2], [m.rpartition(".")[2] for m in modules[:3]], None,
        ),
        "exclude_modules": ([word], [module], rf".*{word}"),
        "trainable_token_indices": ([1, 2], {t: [0, 3] for t in tables} or [1]),
        "ensure_weight_tying": (True, False),
        "layers_to_transform": (0, [1], [0, 1]),
        "fan_in_fan_out": (True, False),
        "target_parameters": ([f"{word}.weight"], ["mlp.experts.gate_up_proj"]),
        "task_type": ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION", None),
        "layer_replication": ([[0, 2]], [[0, 1], [0, 2]]),
        "alora_invocation_tokens": ([1, 2],),
        "use_qalora": (True,),
        "peft_version": ("0.10.0",),
        "unknown_field": (1,),
    }  # fmt: skip
    name = rng.choice([*values])
    value = rng.choice(values[name])
    case.config[name] = value
    return f"{name} = {value}"


def missing(case: Case, shapes: Shapes, rng: random.Random) -> str:
    """Leaves a field of the config out."""
    name = rng.choice(sorted(case.config))
    if name == "peft_type":
        return ""
    del case.config[name]
    return f"no {name}"


def files(case: Case, shapes: Shapes, rng: random.Random) -> str:
    """Writes two files."""
    if len(case.tensors) < 2:
        return ""
    case.files = 2
    return "two files"


CHANGES: tuple[Change, ...] = (
    prefix, component, component, number, end, size, size, rank, lost, lost, pair,
    pair, extra, extra, whole, field, field, field, missing, files,
)  # fmt: skip
