"""Models and adapters, whole and broken, on which servers and `peft.validate` agree.

Everything here is made of names and shapes: `cases` returns the same ones each time.
`check_servers.py` asks vLLM's own code, and `servers.json` keeps what it said.
"""

import copy
import dataclasses
import json
import pathlib
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).parent
P = "base_model.model."
HIDDEN, INNER, TOKENS, RANK = 8, 12, 20, 2


@dataclasses.dataclass
class Case:
    """An adapter for a model.

    Attributes:
      name: what it is, and how it was broken.
      base: the name of a model of `bases`.
      config: the fields of `adapter_config.json`.
      tensors: by name, of which only shapes matter.
      files: into how many files they go.
    """

    name: str
    base: str
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    files: int = 1


def bases() -> dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]]:
    """Models by name: `config.json`, and shapes."""
    golden = {
        name: (_json(HERE / "peft" / name / "config.json"), _shapes(name))
        for name in ("llama", "tied", "gpt2", "bert")
    }
    vit = {
        f"vision_tower.vision_model.encoder.layers.{i}.self_attn.{n}.weight": (8, 8)
        for i in range(2)
        for n in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    wrapped = "language_model.model."
    experts = {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}.weight": shape
        for i in range(2)
        for e in range(3)
        for w, shape in _gated("w1", "w3", "w2").items()
    }
    gates = {
        f"model.layers.{i}.block_sparse_moe.gate.weight": (3, HIDDEN) for i in range(2)
    }
    qwen = {
        f"model.layers.{i}.mlp.experts.{e}.{w}.weight": shape
        for i in range(2)
        for e in range(3)
        for w, shape in _gated().items()
    } | {f"model.layers.{i}.mlp.gate.weight": (3, HIDDEN) for i in range(2)}
    phi = {
        name: shape
        for i in range(2)
        for name, shape in {
            f"model.layers.{i}.self_attn.qkv_proj.weight": (3 * HIDDEN, HIDDEN),
            f"model.layers.{i}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"model.layers.{i}.mlp.gate_up_proj.weight": (2 * INNER, HIDDEN),
            f"model.layers.{i}.mlp.down_proj.weight": (HIDDEN, INNER),
        }.items()
    }
    gpt_oss = {
        name: shape
        for i in range(2)
        for name, shape in {
            f"model.layers.{i}.mlp.experts.gate_up_proj": (3, HIDDEN, 2 * INNER),
            f"model.layers.{i}.mlp.experts.down_proj": (3, INNER, HIDDEN),
            f"model.layers.{i}.mlp.router.weight": (3, HIDDEN),
        }.items()
    }
    ends = _ends("model.") | {"lm_head.weight": (TOKENS, HIDDEN)}
    return golden | {
        "gemma3": _model(
            "Gemma3ForConditionalGeneration", _layers(wrapped) | _ends(wrapped) | vit
        ),
        "qwen25vl": _model(
            "Qwen2_5_VLForConditionalGeneration",
            _layers("model.") | ends
            | {f"visual.blocks.{i}.attn.qkv.weight": (24, 8) for i in range(2)},
        ),
        "mixtral": _model(
            "MixtralForCausalLM", _layers("model.", mlp=False) | experts | gates | ends
        ),
        "qwen3moe": _model(
            "Qwen3MoeForCausalLM", _layers("model.", mlp=False) | qwen | ends
        ),
        "phi3": _model("Phi3ForCausalLM", phi | ends),
        "gpt_oss": _model(
            "GptOssForCausalLM", _layers("model.", mlp=False) | gpt_oss | ends
        ),
        "gemma2": _model("Gemma2ForCausalLM", _layers("model.") | _ends("model.")),
        "classifier": _model(
            "LlamaForSequenceClassification",
            _layers("model.") | _ends("model.") | {"score.weight": (3, HIDDEN)},
        ),
    }  # fmt: skip


def _gated(*names: str) -> dict[str, tuple[int, int]]:
    gate, up, down = names or ("gate_proj", "up_proj", "down_proj")
    return {gate: (INNER, HIDDEN), up: (INNER, HIDDEN), down: (HIDDEN, INNER)}


def _layers(prefix: str, *, mlp: bool = True) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {}
    for i in range(2):
        here = f"{prefix}layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            out[f"{here}self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        for name, shape in _gated().items() if mlp else ():
            out[f"{here}mlp.{name}.weight"] = shape
        out[f"{here}input_layernorm.weight"] = (HIDDEN,)
    return out


def _ends(prefix: str) -> dict[str, tuple[int, ...]]:
    table = {f"{prefix}embed_tokens.weight": (TOKENS, HIDDEN)}
    return table | {f"{prefix}norm.weight": (HIDDEN,)}


def _model(architecture: str, shapes: dict[str, tuple[int, ...]]):
    config = {"architectures": [architecture], "model_type": "any"}
    return config | {"vocab_size": TOKENS, "hidden_size": HIDDEN}, shapes


def _json(file: pathlib.Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    arrays = load_file(HERE / "peft" / name / "model.safetensors")
    return {key: x.shape for key, x in arrays.items()}


def of_golden() -> Iterator[Case]:
    """The adapters that PEFT wrote."""
    for name in ("llama", "tied", "gpt2", "bert"):
        for here in sorted((HERE / "peft" / name).glob("*/")):
            if here.name == "alora":  # every server refuses the field as such
                continue
            tensors = load_file_any(here / "adapter_model.safetensors")
            config = _json(here / "adapter_config.json")
            yield Case(f"{name}.{here.name}", name, config, tensors)


def load_file_any(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns arrays of the shapes in a file, whatever their dtypes are."""
    with open(file, "rb") as data:
        header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
    return {
        name: np.ones(about["shape"], np.float32)
        for name, about in header.items()
        if name != "__metadata__"
    }


def plain() -> Iterator[Case]:
    """One whole adapter of each model that is made here."""
    memory = {"gemma3": ("language_model.model.", "model.language_model.")}
    for name, (_, shapes) in bases().items():
        if name in ("llama", "tied", "gpt2", "bert"):
            continue
        old, new = memory.get(name, ("", ""))
        linear = {
            new + key.removesuffix(".weight").removeprefix(old): shape
            for key, shape in shapes.items()
            if len(shape) == 2
            and key.startswith(old)
            and "embed_tokens" not in key
            and not key.startswith(("lm_head", "visual", "vision", "score"))
        }
        tensors: dict[str, np.ndarray] = {}
        for module, (n_out, n_in) in linear.items():
            tensors |= factors(module, n_out, n_in)
        for i in range(2 if name == "gpt_oss" else 0):
            here, count = f"model.layers.{i}.mlp.experts", 3
            a, b = "lora_A.weight", "lora_B.weight"
            rank = RANK * count
            tensors |= {
                f"{P}{here}.base_layer.{a}": np.ones((rank, HIDDEN), np.float32),
                f"{P}{here}.base_layer.{b}": np.ones((2 * INNER, rank), np.float32),
                f"{P}{here}.{a}": np.ones((rank, INNER), np.float32),
                f"{P}{here}.{b}": np.ones((HIDDEN, rank), np.float32),
            }
        yield Case(f"{name}.plain", name, fields(linear), tensors)


def fields(modules: Any) -> dict[str, Any]:
    """Returns a config for modules."""
    last = sorted({module.rpartition(".")[2] for module in modules})
    return {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 4,
        "target_modules": last,
        "bias": "none",
    }


def factors(module: str, n_out: int, n_in: int, rank: int = RANK):
    """Returns A and B of a module."""
    return {
        f"{P}{module}.lora_A.weight": np.ones((rank, n_in), np.float32),
        f"{P}{module}.lora_B.weight": np.ones((n_out, rank), np.float32),
    }


Break = Callable[[Case, random.Random], None]


def _rename(old: str, new: str, *, some: bool = False) -> Break:
    def broken(case: Case, rng: random.Random) -> None:
        chosen = [n for n in case.tensors if old in n]
        if some and chosen:
            stem = rng.choice(chosen).rpartition(".lora_")[0]
            chosen = [n for n in chosen if n.startswith(f"{stem}.lora_")]
        case.tensors = {
            n.replace(old, new, 1) if n in chosen else n: x
            for n, x in case.tensors.items()
        }

    return broken


def _field(name: str, value: Any) -> Break:
    def broken(case: Case, rng: random.Random) -> None:
        case.config[name] = value

    return broken


def _without(name: str) -> Break:
    def broken(case: Case, rng: random.Random) -> None:
        case.config.pop(name, None)

    return broken


def _lost(part: str) -> Break:
    def broken(case: Case, rng: random.Random) -> None:
        case.tensors.pop(
            rng.choice([n for n in case.tensors if part in n] or [""]), None
        )

    return broken


def _sized(part: str, axis: int, more: int) -> Break:
    def broken(case: Case, rng: random.Random) -> None:
        names = [n for n in case.tensors if f"lora_{part}.weight" in n]
        if names:
            name = rng.choice(names)
            shape = list(case.tensors[name].shape)
            shape[axis] += more
            case.tensors[name] = np.ones(shape, np.float32)

    return broken


def _added(name: str, *shape: int) -> Break:
    def broken(case: Case, rng: random.Random) -> None:
        case.tensors[P + name] = np.ones(shape, np.float32)

    return broken


def _beside(end: str, *shape: int) -> Break:
    def broken(case: Case, rng: random.Random) -> None:
        name = rng.choice(list(case.tensors))
        stem = name.rpartition(".lora_")[0] or name
        case.tensors[f"{stem}.{end}"] = np.ones(shape, np.float32)

    return broken


def _pair(module: str, n_out: int, n_in: int) -> Break:
    def broken(case: Case, rng: random.Random) -> None:
        case.tensors |= factors(module, n_out, n_in)

    return broken


def _files(case: Case, rng: random.Random) -> None:
    case.files = 2


def _table(module: str, tokens: int) -> Break:
    def broken(case: Case, rng: random.Random) -> None:
        case.tensors |= {
            f"{P}{module}.lora_embedding_A": np.ones((RANK, tokens), np.float32),
            f"{P}{module}.lora_embedding_B": np.ones((HIDDEN, RANK), np.float32),
            f"{P}{module}.base_layer.weight": np.ones((tokens, HIDDEN), np.float32),
        }

    return broken


BREAKS: dict[str, Break] = {
    "no prefix": _rename(P, ""),
    "without model.": _rename(f"{P}model.", P),
    "model. twice": _rename(f"{P}model.", f"{P}model.model."),
    "wrapped": _rename(f"{P}model.", f"{P}language_model.model."),
    "wrapped in memory": _rename(f"{P}model.layers", f"{P}model.language_model.layers"),
    "unwrapped": _rename("language_model.", ""),
    "adapter's name": _rename(".lora_A.weight", ".lora_A.default.weight"),
    "layer 99": _rename("layers.1.", "layers.99.", some=True),
    "h.": _rename("layers.0.", "h.0.", some=True),
    "query": _rename("q_proj", "query"),
    "one query": _rename("q_proj", "query", some=True),
    "packed": _rename("q_proj", "qkv_proj", some=True),
    "gate_up": _rename("gate_proj", "gate_up_proj", some=True),
    "other block": _rename("self_attn", "attn", some=True),
    "block of": _rename("mlp.", "feed_forward.", some=True),
    "expert 9": _rename("experts.0.", "experts.9.", some=True),
    "experts as Qwen": _rename(".w1.", ".gate_proj.", some=True),
    "experts together": _rename("experts.1.gate_proj", "experts", some=True),
    "no gate_up": _rename("experts.base_layer", "experts.gate_up_proj"),
    "one half": _rename(
        "layers.0.mlp.experts.base_layer", "layers.7.mlp.experts.base_layer"
    ),
    "no B": _lost("lora_B"),
    "no A": _lost("lora_A"),
    "wide A": _sized("A", 1, 3),
    "narrow A": _sized("A", 1, -3),
    "long B": _sized("B", 0, 3),
    "short B": _sized("B", 0, -3),
    "rank of A": _sized("A", 0, 1),
    "rank of B": _sized("B", 1, 1),
    "magnitude": _beside("lora_magnitude_vector", HIDDEN),
    "bias of B": _beside("lora_B.bias", HIDDEN),
    "bias": _beside("base_layer.bias", HIDDEN),
    "whole": _beside("weight", HIDDEN, HIDDEN),
    "copy": _beside("base_layer.weight", HIDDEN, HIDDEN),
    "norm": _added("model.norm.weight", HIDDEN),
    "head whole": _added("lm_head.weight", TOKENS, HIDDEN),
    "head": _pair("lm_head", TOKENS, HIDDEN),
    "head copy": _added("lm_head.base_layer.weight", TOKENS, HIDDEN),
    "table": _table("model.embed_tokens", TOKENS),
    "more tokens": _table("model.embed_tokens", TOKENS + 2),
    "tokens": _added(
        "model.embed_tokens.token_adapter.trainable_tokens_delta", 1, HIDDEN
    ),
    "score": _added("score.weight", 3, HIDDEN),
    "score bias": _added("score.bias", 3),
    "tower": _pair("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", 8, 8),
    "visual": _pair("visual.blocks.0.attn.qkv", 24, 8),
    "unknown": _pair("model.layers.0.self_attn.extra", 8, 8),
    "norm's factors": _pair("model.layers.0.input_layernorm", 8, 8),
    "dora": _field("use_dora", True),
    "rslora": _field("use_rslora", True),
    "bias all": _field("bias", "all"),
    "lora_bias": _field("lora_bias", True),
    "pissa": _field("init_lora_weights", "pissa_niter_4"),
    "olora": _field("init_lora_weights", "olora"),
    "gaussian": _field("init_lora_weights", "gaussian"),
    "alora": _field("alora_invocation_tokens", [1, 2]),
    "replication": _field("layer_replication", [[0, 2]]),
    "saved head": _field("modules_to_save", ["lm_head"]),
    "saved score": _field("modules_to_save", ["score"]),
    "regex": _field("target_modules", r".*\.(q|v)_proj"),
    "all-linear": _field("target_modules", "all-linear"),
    "no targets": _without("target_modules"),
    "rank 3": _field("r", 3),
    "rank 513": _field("r", 513),
    "rank pattern": _field("rank_pattern", {"q_proj": 600}),
    "alpha pattern": _field("alpha_pattern", {"q_proj": 7}),
    "two files": _files,
}


def cases() -> list[Case]:
    """The whole ones, then each break on some of them, then breaks two at a time."""
    whole = [*of_golden(), *plain()]
    tried = [c for c in whole if c.name == "llama.linear" or c.name.endswith(".plain")]
    rng = random.Random(0)
    found = []
    for name in BREAKS:
        changed = [c for c in tried if changes(c, name)]
        for case in rng.sample(changed, min(3, len(changed))):
            found.append(broken(case, rng, name))
    while len(found) < 260:
        names = rng.sample(list(BREAKS), 2)
        case = broken(rng.choice(tried), rng, *names)
        if case.tensors:
            found.append(case)
    return whole + found


def of_modules() -> list[Case]:
    """One fault of each kind in each kind of module, of a dense model and a mixture."""
    found = []
    for case in [*plain(), *mixtures()]:
        found += [] if case.name.endswith("plain") else [case]
        if case.name not in ("gemma2.plain", "phi3.plain", "qwen3moe.each"):
            continue
        stems = {
            n.rpartition(".lora_")[0]: None
            for n in case.tensors
            if "layers.1." in n and not re.search(r"experts\.[02]\.", n)
        }
        for stem in stems:
            for name, change in FAULTS.items():
                other = copy.deepcopy(case)
                last = stem.partition("layers.1.")[2]
                other.name = f"{case.name} + {last} {name}"
                change(other, stem)
                found.append(other)
    return found


def mixtures() -> Iterator[Case]:
    """Experts without their router, each by itself and, as SGLang has it, in 3-D."""
    names = {"mixtral": "block_sparse_moe", "qwen3moe": "mlp", "gpt_oss": "mlp"}
    parts = ["gate_proj", "up_proj", "down_proj"]
    for case in plain():
        if case.base not in names:
            continue
        here = f"{names[case.base]}.experts"
        rest = {n: x for n, x in case.tensors.items() if "self_attn" in n}
        each = {n: x for n, x in case.tensors.items() if f"{here}." in n}
        wanted = ["q_proj", "k_proj", "v_proj", "o_proj", *parts]
        config = case.config | {"target_modules": wanted}
        if case.base != "gpt_oss":
            yield Case(f"{case.base}.each", case.base, config, rest | each)
        for count in (3, 1):  # 1 is shared by all experts
            stacked: dict[str, np.ndarray] = {}
            for i in range(2):
                for w, shape in _gated("w1", "w3", "w2").items():
                    module = f"{P}model.layers.{i}.{here}.{w}"
                    a, b = (3, count) if w == "w2" else (count, 3)
                    stacked[f"{module}.lora_A.weight"] = np.ones((a, RANK, shape[1]))
                    stacked[f"{module}.lora_B.weight"] = np.ones((b, shape[0], RANK))
            stacked = {n: x.astype(np.float32) for n, x in stacked.items()}
            kind = "stacked" if count > 1 else "shared"
            yield Case(f"{case.base}.{kind}", case.base, config, rest | stacked)


def _fault(part: str, axis: int, more: int) -> Callable[[Case, str], None]:
    def change(case: Case, stem: str) -> None:
        name = f"{stem}.lora_{part}.weight"
        shape = list(case.tensors[name].shape)
        shape[axis] += more
        case.tensors[name] = np.ones(shape, np.float32)

    return change


def _extra(end: str, *shape: int) -> Callable[[Case, str], None]:
    def change(case: Case, stem: str) -> None:
        case.tensors[f"{stem}.{end}"] = np.ones(shape, np.float32)

    return change


def _left_out(*parts: str) -> Callable[[Case, str], None]:
    def change(case: Case, stem: str) -> None:
        for part in parts:
            case.tensors.pop(f"{stem}.lora_{part}.weight")

    return change


FAULTS: dict[str, Callable[[Case, str], None]] = {
    "wide A": _fault("A", 1, 3),
    "narrow A": _fault("A", 1, -3),
    "long B": _fault("B", 0, 3),
    "short B": _fault("B", 0, -3),
    "rank of A": _fault("A", 0, 1),
    "rank of B": _fault("B", 1, 1),
    "no A": _left_out("A"),
    "no B": _left_out("B"),
    "neither": _left_out("A", "B"),
    "bias of B": _extra("lora_B.bias", HIDDEN),
    "bias": _extra("base_layer.bias", HIDDEN),
    "magnitude": _extra("lora_magnitude_vector", HIDDEN),
    "whole": _extra("weight", HIDDEN, HIDDEN),
    "copy": _extra("base_layer.weight", HIDDEN, HIDDEN),
}


def changes(case: Case, name: str) -> bool:
    """Returns whether a break changes an adapter."""
    other = copy.deepcopy(case)
    BREAKS[name](other, random.Random(0))
    shapes = [{n: x.shape for n, x in c.tensors.items()} for c in (case, other)]
    return (shapes[0], case.config, case.files) != (
        shapes[1],
        other.config,
        other.files,
    )


def broken(case: Case, rng: random.Random, *names: str) -> Case:
    """Returns an adapter that is broken in these ways."""
    other = copy.deepcopy(case)
    other.name = " + ".join([case.name, *names])
    for name in names:
        BREAKS[name](other, rng)
    return other


def write_base(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Writes a model of `bases`, and returns where."""
    return write_model(folder / name, *bases()[name])


def write_model(
    folder: pathlib.Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> pathlib.Path:
    """Writes a model of zeros, and returns where."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    save_file(arrays, folder / "model.safetensors")
    return folder


def write_adapter(folder: pathlib.Path, case: Case) -> None:
    """Writes an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(case.config))
    if case.files == 1:
        save_file(case.tensors, folder / "adapter_model.safetensors")
        return
    names = list(case.tensors)
    shards = {"1": names[::2], "2": names[1::2]}
    where: dict[str, str] = {}
    for number, own in shards.items():
        file = f"adapter_model-0000{number}-of-00002.safetensors"
        save_file({n: case.tensors[n] for n in own}, folder / file)
        where |= dict.fromkeys(own, file)
    index = {"weight_map": where}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))


class Reader(Protocol):
    """A server's own code, with one model."""

    def says(self, folder: pathlib.Path) -> str | list[str]:
        """Returns its error, or what becomes of each tensor of an adapter."""
        ...


def recorded(
    server: str,
    cases: Sequence[Case],
    made: Callable[[pathlib.Path], Reader],
    table: pathlib.Path,
) -> int:
    """Writes what a server says of each adapter to `table`; returns the exit code.

    Args:
      server: its name, for what is printed.
      cases: the adapters.
      made: returns the server with the model of a directory.
      table: a file of JSON, an adapter a line.
    """
    found: dict[str, str | list[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        readers: dict[str, Reader] = {}
        for number, case in enumerate(cases):
            if case.base not in readers:
                readers[case.base] = made(write_base(folder / "bases", case.base))
            here = folder / str(number)
            write_adapter(here, case)
            said = readers[case.base].says(here)
            found[f"{number} {case.name}"] = _repeatable(said, str(here))
    lines = [f"{json.dumps(key)}: {json.dumps(said)}" for key, said in found.items()]
    table.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    refused = sum(isinstance(said, str) for said in found.values())
    broken = sum(" + " in case.name for case in cases)
    print(f"{len(found)} adapters, {broken} of them broken, {server} refuses {refused}")
    return 0


def _repeatable(said: str | list[str], folder: str) -> str | list[str]:
    """Returns an error without what another run has otherwise: folders, sets' order."""
    if not isinstance(said, str):
        return said
    said = re.sub(
        r"\{([^{}]*)\}",
        lambda found: "{" + ", ".join(sorted(found[1].split(", "))) + "}",
        said.replace(folder, "ADAPTER"),
    )
    return said[:120]
