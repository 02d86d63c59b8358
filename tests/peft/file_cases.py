"""PEFT adapters for models with torch's own names: what they mean, and who reads them.

The adapters are written here by hand, in PEFT's form, and what they make of the base is
computed from their formulas. `tests/golden/check_merge.py` compares such files, written
by PEFT, with PEFT's own merge.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jlora._io import tensors

PREFIX = "base_model.model."
_LAYER = "model.layers.0"
Q, K, UP = (
    f"{_LAYER}.self_attn.q_proj",
    f"{_LAYER}.self_attn.k_proj",
    f"{_LAYER}.mlp.up",
)
TABLE, HEAD = "model.embed_tokens", "lm_head"
Arrays = dict[str, np.ndarray]
RANK, ALPHA = 2, 6.0
SCALE = ALPHA / RANK


@dataclasses.dataclass(frozen=True)
class Case:
    """An adapter, and what it has to do.

    Attributes:
      text: what it is, for the table in docs/peft.md.
      base: the model's tensors.
      adapter: the adapter's tensors, without PEFT's prefix.
      change: what is added to each tensor of the base; a full tensor under "=".
      config: fields of the adapter's config.
      model: fields of the model's config.json; None for a model without one.
      refused: the error with the model, if there is one.
      alone: the error without the model, if there is one.
      options: of the command.
    """

    text: str
    base: Arrays
    adapter: Arrays
    change: Arrays = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] | None = None
    refused: str = ""
    alone: str = ""
    options: tuple[str, ...] = ()


def normal(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    """Returns random numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def llama(**more: np.ndarray) -> Arrays:
    """Returns the tensors of a small decoder."""
    base = {
        f"{TABLE}.weight": normal(0, 7, 4),
        f"{Q}.weight": normal(1, 4, 4),
        f"{K}.weight": normal(2, 2, 4),
        f"{UP}.weight": normal(3, 6, 4),
        "model.norm.weight": normal(4, 4),
        f"{HEAD}.weight": normal(5, 7, 4),
    }
    return base | {name.replace("__", "."): x for name, x in more.items()}


def pair(module: str, n_in: int, n_out: int, seed: int = 9, rank: int = RANK) -> Arrays:
    """Returns A and B of a linear layer."""
    return {
        f"{module}.lora_A.weight": normal(seed, rank, n_in),
        f"{module}.lora_B.weight": normal(seed + 1, n_out, rank),
    }


def delta(adapter: Arrays, module: str, scale: float = SCALE) -> np.ndarray:
    """Returns the update of a linear layer, `[out, in]`."""
    a, b = (adapter[f"{module}.lora_{end}.weight"] for end in "AB")
    return scale * b @ a


def table(module: str, rows: int, width: int, seed: int = 19) -> Arrays:
    """Returns A and B of an embedding."""
    return {
        f"{module}.lora_embedding_A": normal(seed, RANK, rows),
        f"{module}.lora_embedding_B": normal(seed + 1, width, RANK),
    }


def table_delta(adapter: Arrays, module: str) -> np.ndarray:
    """Returns the update of an embedding, `[rows, width]`."""
    a, b = (adapter[f"{module}.lora_embedding_{end}"] for end in "AB")
    return SCALE * (b @ a).T


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
_QK = pair(Q, 4, 4) | pair(K, 4, 2, 11)
_QK_CHANGE = {f"{m}.weight": delta(_QK, m) for m in (Q, K)}


def _plain(text: str, **fields: Any) -> Case:
    """Returns the adapter of q and k, with something else about it."""
    given = {"adapter": _QK, "change": _QK_CHANGE, "base": llama(), "model": LLAMA}
    return Case(text, **(given | fields))


def _linear(text: str, **fields: Any) -> Case:
    """Returns a case of `_plain` that both ways refuse, for the reason in `refused`."""
    return _plain(text, **fields, alone=fields["refused"])


def _gpt2() -> Arrays:
    h = "transformer.h.0"
    return {
        f"{h}.attn.c_attn.weight": normal(0, 4, 12),
        f"{h}.attn.c_attn.bias": normal(1, 12),
        f"{h}.attn.c_proj.weight": normal(2, 4, 4),
        f"{h}.attn.c_proj.bias": normal(3, 4),
        f"{h}.mlp.c_fc.weight": normal(6, 4, 8),
        f"{h}.mlp.c_fc.bias": normal(7, 8),
        "lm_head.weight": normal(4, 4, 4),
        "transformer.wte.weight": normal(5, 4, 4),
    }


def gpt2_cases() -> dict[str, Case]:
    """Cases of models whose layers keep their weight `[in, out]`."""
    attn = "transformer.h.0.attn"
    both = pair(f"{attn}.c_attn", 4, 12) | pair(f"{attn}.c_proj", 4, 4, 31)
    turned = {
        f"{m}.weight": delta(both, m).T for m in (f"{attn}.c_attn", f"{attn}.c_proj")
    }
    head = both | pair("lm_head", 4, 4, 41)
    mixed = turned | {"lm_head.weight": delta(head, "lm_head")}
    on = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    on_head = {
        "target_modules": ["c_attn", "c_proj", "lm_head"],
        "fan_in_fan_out": False,
    }
    lost = "square, and nothing tells"
    custom = {
        "a.turned.weight": normal(0, 4, 4), "a.turned.bias": normal(1, 4),
        "a.plain.weight": normal(2, 4, 4), "a.plain.bias": normal(3, 4),
    }  # fmt: skip
    two = pair("a.turned", 4, 4) | pair("a.plain", 4, 4, 51)
    names = {"target_modules": ["turned", "plain"], "fan_in_fan_out": False}
    return {
        "gpt2": Case("GPT-2's `Conv1D`", _gpt2(), both, turned, on, GPT2),
        "gpt2_alone": Case(
            "the same, without `config.json`: biases tell", _gpt2(), both, turned, on
        ),
        "gpt2_head": Case(
            "`Conv1D` and `Linear` in one adapter, square ones too",
            _gpt2(),
            head,
            mixed,
            on_head,
            GPT2,
            alone=lost,
        ),
        "gpt2_head_alone": Case(
            "the same, without `config.json`: biases tell",
            _gpt2(),
            head,
            mixed,
            on_head,
            alone=lost,
        ),
        "square": Case(
            "square layers with a bias of which nothing tells the side",
            custom,
            two,
            config=names,
            refused="are square, and nothing tells",
        ),
        "one_kind": Case(
            "the same, one kind of layer: `fan_in_fan_out` tells",
            custom,
            pair("a.turned", 4, 4),
            {"a.turned.weight": delta(two, "a.turned").T},
            {"target_modules": ["turned"], "fan_in_fan_out": True},
        ),
    }  # fmt: skip


def table_cases() -> dict[str, Case]:
    """Cases of embeddings and heads."""
    own = table(TABLE, 7, 4)
    copy = {f"{TABLE}.base_layer.weight": llama()[f"{TABLE}.weight"]}
    on_table = {"target_modules": ["embed_tokens"]}
    untied = {f"{TABLE}.weight": table_delta(own, TABLE)}
    tied_base = {n: x for n, x in llama().items() if HEAD not in n}
    tied = LLAMA | {"tie_word_embeddings": True}
    a, b = (own[f"{TABLE}.lora_embedding_{end}"] for end in "AB")
    head = {f"{HEAD}.lora_A.weight": b.T, f"{HEAD}.lora_B.weight": a.T}
    whole = {f"{TABLE}.weight": normal(61, 7, 4)}
    saved = {"target_modules": [], "modules_to_save": ["embed_tokens"]}
    set_whole = {f"={TABLE}.weight": whole[f"{TABLE}.weight"]}
    both = whole | {f"{HEAD}.weight": whole[f"{TABLE}.weight"]}
    rows = {f"{TABLE}.token_adapter.trainable_tokens_delta": normal(71, 2, 4)}
    some = llama()[f"{TABLE}.weight"].copy()
    some[[1, 3]] = rows[f"{TABLE}.token_adapter.trainable_tokens_delta"]
    either = "may be the output head too"
    on_head = pair(HEAD, 4, 7) | {
        f"{HEAD}.base_layer.weight": llama()[f"{HEAD}.weight"]
    }
    tying = {"ensure_weight_tying": True}
    return {
        "table": Case(
            "an embedding, with the base's table beside its factors",
            llama(), own | copy, untied, on_table, LLAMA, alone=either,
        ),
        "head": Case(
            "an output head, with the base's beside its factors",
            llama(), on_head, {f"{HEAD}.weight": delta(on_head, HEAD)},
            {"target_modules": ["lm_head"]}, LLAMA,
        ),
        "tied_table": Case(
            "an embedding that the model ties to its head",
            tied_base, own, config=on_table, model=tied, alone=either,
            refused="is the output head too, but the file has no factors",
        ),
        "tying": Case(
            "the same with `ensure_weight_tying`: table and head",
            tied_base, own | head, untied, on_table | tying, tied,
        ),
        "saved": Case(
            '`modules_to_save=["embed_tokens"]`',
            llama(), whole, set_whole, saved, LLAMA, alone=either,
        ),
        "tied_saved": Case(
            "the same in a tied model: PEFT leaves the head as it was",
            tied_base, whole, config=saved, model=tied, alone=either,
            refused="the file has no numbers for lm_head.weight",
        ),
        "tied_saved_both": Case(
            "the same with `ensure_weight_tying`: table and head",
            tied_base, both, set_whole, saved | tying, tied,
        ),
        "tied_saved_differ": Case(
            "table and head of a tied model, with different numbers",
            tied_base, whole | {f"{HEAD}.weight": normal(62, 7, 4)},
            config=saved | {"modules_to_save": ["embed_tokens", "lm_head"]},
            model=tied, refused="are tied, their numbers are not",
        ),
        "rows": Case(
            "`trainable_token_indices`",
            llama(), rows, {f"={TABLE}.weight": some},
            {"target_modules": [], "trainable_token_indices": {"embed_tokens": [1, 3]}},
            LLAMA, alone="bare parameters or rows of a table",
        ),
        "head_of_a_tied_model": Case(
            "the head of a tied model", tied_base, pair(HEAD, 4, 7),
            config={"target_modules": ["lm_head"]}, model=tied,
            refused="extra: .*lm_head",
        ),
    }  # fmt: skip


def layer_cases() -> dict[str, Case]:
    """Cases of layers that are not a `Linear`."""
    conv = {"c.weight": normal(0, 4, 2, 3, 3), "c.bias": normal(1, 4)}
    a, b = normal(2, RANK, 2, 3, 3), normal(3, 4, RANK, 1, 1)
    kernel = SCALE * np.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    up = {"experts.up": normal(4, 3, 12, 4), "experts.down": normal(5, 3, 4, 6)}
    wide = pair("experts.base_layer", 4, 12, 6, 3 * RANK)
    wide |= pair("experts", 6, 4, 7, 3 * RANK)

    def expert(module: str, n_in: int, n_out: int) -> np.ndarray:
        a = wide[f"{module}.lora_A.weight"].reshape(3, RANK, n_in)
        b = wide[f"{module}.lora_B.weight"].reshape(n_out, RANK, 3)
        return SCALE * np.einsum("ore,eri->eoi", b, a)

    packed = {
        "attn.in_proj_weight": normal(0, 12, 4), "attn.in_proj_bias": normal(1, 12),
        "attn.out_proj.weight": normal(2, 4, 4), "attn.out_proj.bias": normal(3, 4),
    }  # fmt: skip
    mha = pair("attn", 4, 12) | pair("attn.base_layer.out_proj", 4, 4, 81)
    dora = _QK | {f"{m}.lora_magnitude_vector": np.full(n, 2.0, "float32")
                  for m, n in ((Q, 4), (K, 2))}  # fmt: skip
    base = llama()

    def scaled(module: str) -> np.ndarray:
        w = base[f"{module}.weight"] + delta(dora, module)
        return 2 * w / np.linalg.norm(w, axis=1, keepdims=True)

    bare = "bare parameters or rows of a table"
    biased = llama() | {f"{Q}.bias": normal(91, 4), f"{UP}.bias": normal(92, 6)}
    bias = {f"{Q}.base_layer.bias": normal(93, 4)}
    every = bias | {f"{UP}.bias": normal(94, 6)}
    return {
        "conv": Case(
            "a convolution", conv, {"c.lora_A.weight": a, "c.lora_B.weight": b},
            {"c.weight": kernel}, {"target_modules": ["c"]},
        ),
        "experts": Case(
            "experts, by `target_parameters`; shapes tell which is whose", up, wide,
            {"experts.up": expert("experts.base_layer", 4, 12),
             "experts.down": expert("experts", 6, 4)},
            {"target_modules": [],
             "target_parameters": ["experts.up", "experts.down"]}, alone=bare,
        ),
        "square_experts": Case(
            "experts whose shapes leave that open",
            {"experts.up": normal(4, 3, 4, 4)}, pair("experts", 4, 4, 7, 3 * RANK),
            config={"target_modules": [], "target_parameters": ["experts.up"]},
            refused="their shapes do not tell", alone=bare,
        ),
        "packed": Case(
            "the packed projections of `nn.MultiheadAttention`", packed, mha,
            {"attn.in_proj_weight": delta(mha, "attn"),
             # PEFT adds this one twice.
             "attn.out_proj.weight": 2 * delta(mha, "attn.base_layer.out_proj")},
            {"target_modules": ["attn"]},
        ),
        "dora": _plain(
            "DoRA", adapter=dora, config={"use_dora": True},
            change={f"={m}.weight": scaled(m) for m in (Q, K)},
        ),
        "lora_only": _plain(
            '`bias="lora_only"`', base=biased, adapter=_QK | bias,
            change=_QK_CHANGE | {f"={Q}.bias": bias[f"{Q}.base_layer.bias"]},
            config={"bias": "lora_only"},
        ),
        "bias_all": _plain(
            '`bias="all"`', base=biased, adapter=_QK | every,
            change=_QK_CHANGE | {f"={Q}.bias": bias[f"{Q}.base_layer.bias"],
                                 f"={UP}.bias": every[f"{UP}.bias"]},
            config={"bias": "all"},
        ),
        "biases_missing": _plain(
            "the same, and a bias is missing", base=biased, adapter=_QK | bias,
            config={"bias": "all"}, change={}, refused=f"{UP}.bias, though bias is",
        ),
    }  # fmt: skip


def plain_cases() -> dict[str, Case]:
    """Cases of adapters of linear layers, most of them damaged."""
    kept = {n: x for n, x in _QK.items() if n != f"{Q}.lora_A.weight"}
    bad = _QK[f"{Q}.lora_A.weight"].copy()
    bad[0, 0] = np.nan
    lengths = {f"{Q}.lora_magnitude_vector": np.ones(4, "float32")}
    codes = llama() | {f"{Q}.weight_scale_inv": np.ones((1, 1), "float32")}
    no_prefix = {n.removeprefix("model."): x for n, x in llama().items()}
    no_change = {n.removeprefix("model."): x for n, x in _QK_CHANGE.items()}

    def a(x: np.ndarray) -> Arrays:
        return _QK | {f"{Q}.lora_A.weight": x}

    return {
        "linear": _plain("linear layers"),
        "no_config": _plain("the same, a model without `config.json`", model=None),
        "bare": _plain(
            "the same, a file of the model without its prefix",
            base=no_prefix, change=no_change,
        ),
        "patterns": _plain(
            "`rank_pattern`, `alpha_pattern`, rsLoRA",
            adapter=pair(Q, 4, 4, 9, 4) | pair(K, 4, 2, 11),
            change={
                f"{Q}.weight": delta(pair(Q, 4, 4, 9, 4), Q, ALPHA / 2),
                f"{K}.weight": delta(_QK, K, 5 / np.sqrt(2)),
            },
            config={"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"k_proj": 5},
                    "use_rslora": True},
        ),
        "excluded": _plain(
            "a target that `exclude_modules` takes back",
            config={"target_modules": ["q_proj", "k_proj", "up"],
                    "exclude_modules": ["up"]},
        ),
        "excluded_by_pattern": _plain(
            "a target that a pattern in `exclude_modules` takes back",
            config={"target_modules": ["q_proj", "k_proj", "up"],
                    "exclude_modules": r".*\.up"},
        ),
        "off": _plain(
            "an unknown field that is null, false, {} or []",
            config={"enable_lora": None, "f": False, "g": {}, "h": []},
        ),
        "on": _linear("an unknown field that is on", config={"f": 1}, change={},
                      refused="unknown field 'f', which is 1"),
        "no_magnitudes": _linear("`use_dora` without magnitudes", change={},
                                 config={"use_dora": True}, refused="lora_magnitude"),
        "magnitudes": _linear("magnitudes without `use_dora`", change={},
                              adapter=_QK | lengths, refused="use_dora is false"),
        "nan": _linear("NaN or infinity", adapter=a(bad), change={},
                       refused="holds NaN or infinity"),
        "pattern": _linear("a pattern that matches nothing", change={},
                           config={"alpha_pattern": {"v_proj": 5}},
                           refused="alpha_pattern has 'v_proj'"),
        "target": _linear("a target without tensors", change={},
                          config={"target_modules": ["q_proj", "k_proj", "up"]},
                          refused="target_modules names 'up'"),
        "no_target": _linear("tensors without a target", change={},
                             config={"target_modules": ["q_proj"]},
                             refused="target_modules does not name it"),
        "saved_nothing": _linear("`modules_to_save` without tensors", change={},
                                 config={"modules_to_save": ["norm"]},
                                 refused="modules_to_save names 'norm'"),
        "integers": _linear("integer factors", change={},
                            adapter=a(np.ones((2, 4), "int32")),
                            refused="is int32, not a floating-point type"),
        "one_axis": _plain("factors of one axis", change={}, adapter=a(normal(1, 8)),
                           refused=r"A is \[8\]", alone="extra: .*q_proj.lora_A"),
        "empty": _plain("factors without numbers", change={},
                        adapter=a(np.zeros((0,), "float32")),
                        refused=r"A is \[0\]", alone="extra: .*q_proj.lora_A"),
        "rank": _linear("another rank than the config says", change={},
                        config={"r": 3}, refused=r"rank 3 \(from the config\) needs"),
        "half": _plain("A without B", adapter=kept, change={},
                       refused="missing: .*q_proj.lora_A",
                       alone="extra: .*q_proj.lora_B"),
        "stray": _plain("tensors of modules that the model lacks", change={},
                        adapter=_QK | pair("model.other", 4, 4, 3),
                        config={"target_modules": ["q_proj", "k_proj", "other"]},
                        refused="extra: .*model.other"),
        "quantised": _plain("a quantised base (the file is not the reason)", base=codes,
                            change={}, refused="weight_scale_inv"),
        "pissa": _linear("an initialisation that changed the base", change={},
                         config={"init_lora_weights": "pissa"},
                         refused="such an init changes the base"),
        "lora_bias": _linear("`lora_bias` and other variants that jlora lacks",
                             change={}, config={"lora_bias": True},
                             refused="lora_bias is True, which jlora does not have"),
    }  # fmt: skip


GROUPS: dict[str, Callable[[], dict[str, Case]]] = {
    "Linear layers": plain_cases,
    "`Conv1D` and square weights": gpt2_cases,
    "Embeddings and heads": table_cases,
    "Other layers, DoRA, biases": layer_cases,
}
CASES = {name: case for cases in GROUPS.values() for name, case in cases().items()}


def write(case: Case, folder: pathlib.Path) -> None:
    """Writes base and adapter into `folder`, as transformers and PEFT do."""
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    write_arrays(folder / "base" / "model.safetensors", case.base)
    named = {PREFIX + name: x for name, x in case.adapter.items()}
    write_arrays(folder / "adapter" / "adapter_model.safetensors", named)
    if case.model is not None:
        (folder / "base" / "config.json").write_text(json.dumps(case.model))
    fields = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "fan_in_fan_out": False,
        "target_modules": ["q_proj", "k_proj"], **case.config,
    }  # fmt: skip
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(fields))


def write_arrays(file: pathlib.Path, arrays: Arrays) -> None:
    """Writes a safetensors file."""
    tensors.write(
        file, arrays, lambda name: [tensors.raw(arrays[name])], {"format": "pt"}
    )


def merged(case: Case) -> Arrays:
    """Returns the base with the changes of the adapter."""
    out = dict(case.base)
    for name, x in case.change.items():
        if name.startswith("="):
            out[name[1:]] = x
        else:
            out[name] = out[name] + x
    return out


def docs_table() -> str:
    """Returns the table of docs/peft.md."""
    lines = [
        "| adapter | with its model | without |",
        "|---|---|---|",
    ]
    for title, cases in GROUPS.items():
        lines.append(f"| **{title}** | | |")
        for case in cases().values():
            ways = (
                "read" if not text else "refused" for text in (case.refused, case.alone)
            )
            lines.append(f"| {case.text} | {' | '.join(ways)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(docs_table())
