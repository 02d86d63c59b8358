"""Adapters and bases broken by hand, which check_merge.py wants refused."""

import pathlib

import torch
from merge_cases import (
    CASES,
    CAUSAL,
    QV,
    TURNED,
    Case,
    Edit,
    fields,
    on,
    one,
    tensors,
)

# The commands that see the base's tensors.
WITH_BASE = (
    "merge",
    "validate --base",
    "inspect --base",
    "convert to file",
    "diff --base",
)  # fmt: skip
A, B, MAGNITUDE = "q_proj.lora_A", "q_proj.lora_B", "lora_magnitude_vector"


def _nan(x: torch.Tensor) -> torch.Tensor:
    return x.index_fill(0, torch.tensor([0]), float("nan"))


def _without(part: str) -> Edit:
    """Returns an edit that takes away every tensor whose name has `part`."""
    return tensors(lambda held: {k: v for k, v in held.items() if part not in k})


def _quantised(dtype: torch.dtype, sibling: str, shape: tuple[int, ...]) -> Edit:
    """Returns an edit of a base: one weight in a small type, its scale beside it."""
    name = "model.layers.0.self_attn.q_proj.weight"

    def change(held: dict) -> dict:
        scale = held[name].abs().max() / 100
        codes = (held[name] / scale).to(dtype)
        more = {f"{name}{sibling}": scale.expand(shape).clone()} if sibling else {}
        return {**held, name: codes, **more}

    return tensors(change, "model")


def _edited(**changes) -> Edit:
    """Returns an edit of an adapter that jlora itself has written."""

    def edit(folder: pathlib.Path) -> None:
        import jlora

        adapter = jlora.files.read(folder)
        jlora.peft.save(folder, adapter)
        fields(**changes)(folder)

    return edit


def llama(edit: Edit, refuse: str, **more) -> Case:
    return Case("llama", more.pop("fields", CAUSAL), edit=edit, refuse=refuse, **more)


DORA = {**QV, "use_dora": True}
FLOAT8 = torch.float8_e4m3fn

BROKEN: dict[str, Case] = {
    "unknown_on": llama(fields(future_flag=True), "future_flag"),
    "unknown_on_dict": llama(fields(future={"rank": 2}), "future"),
    "enable_lora_on": llama(fields(enable_lora=[True, False]), "enable_lora"),
    "dora_without_magnitudes": llama(fields(use_dora=True), "(?i)magnitude|use_dora"),
    "magnitudes_without_dora": llama(
        fields(use_dora=False), "(?i)magnitude|use_dora", fields=DORA
    ),
    "one_magnitude_missing": llama(
        one(MAGNITUDE, lambda x: None), "(?i)magnitude", fields=DORA
    ),
    "gpt2_magnitudes_without_dora": Case(
        "gpt2",
        on("c_attn", use_dora=True, **TURNED),
        edit=fields(use_dora=False),
        refuse="(?i)magnitude|use_dora",
    ),
    "nan_in_a": llama(one(A, _nan), "(?i)finite|nan"),
    "inf_in_b": llama(one(B, lambda x: x + float("inf")), "(?i)finite|inf"),
    "nan_in_magnitude": llama(one(MAGNITUDE, _nan), "(?i)finite|nan", fields=DORA),
    "nan_in_saved_head": llama(
        one("lm_head", _nan),
        "(?i)finite|nan",
        fields={**QV, "modules_to_save": ["lm_head"]},
    ),
    "alpha_pattern_of_nothing": llama(
        fields(alpha_pattern={"k_proj": 7}), "alpha_pattern|k_proj"
    ),
    "rank_pattern_of_nothing": llama(
        fields(rank_pattern={"k_proj": 3}), "rank_pattern|k_proj"
    ),
    "target_without_tensors": llama(
        fields(target_modules=["q_proj", "v_proj", "o_proj"]), "o_proj"
    ),
    "target_of_no_module": llama(
        fields(target_modules=["q_proj", "v_proj", "zz_proj"]), "zz_proj"
    ),
    "saved_without_tensors": llama(
        fields(modules_to_save=["lm_head"]), "lm_head", ways=WITH_BASE
    ),
    "bias_without_tensors": Case(
        "qwen2", CAUSAL, edit=fields(bias="all"), refuse="bias", ways=WITH_BASE
    ),
    "tensors_without_target": llama(fields(target_modules=["q_proj"]), "v_proj"),
    "rank_of_another": llama(fields(r=2), "rank|r is|shape"),
    "no_alpha": llama(fields(lora_alpha=None), "lora_alpha"),
    "integer_factors": llama(
        one(A, lambda x: (x * 10).to(torch.int32)), "(?i)int32|integer|float"
    ),
    "factors_of_one_axis": llama(one(A, lambda x: x.flatten()), "(?i)shape|axes|axis"),
    "factors_of_no_rows": llama(
        one(A, lambda x: x[:0, 0]), "(?i)shape|axes|axis|rank|is .0.|empty"
    ),
    "rank_zero": llama(one(A, lambda x: x[:0]), "(?i)shape|rank|empty"),
    "resized_table": llama(
        one("embed_tokens", lambda x: torch.cat([x, x[:4]])),
        "embed_tokens",
        fields={**QV, "modules_to_save": ["embed_tokens"]},
        ways=WITH_BASE,
    ),
    "misshapen_a": llama(one(A, lambda x: x[:, :-1]), "(?i)shape|fit", ways=WITH_BASE),
    "a_missing": llama(one(A, lambda x: None), "lora_[AB]"),
    "b_missing": llama(one(B, lambda x: None), "lora_[AB]"),
    "all_of_a_missing": llama(_without("lora_A"), "lora_[AB]"),
    "no_tensors_at_all": llama(_without(""), "(?i)q_proj|tensor|empty|nothing"),
    "stray_tensor": llama(
        tensors(lambda held: {**held, "base_model.model.zz.lora_C": torch.ones(2)}),
        "zz",
    ),
    "of_another_model": Case(
        "gpt2",
        on("c_attn", **TURNED),
        edit=tensors(
            lambda held: {k.replace("transformer", "body"): v for k, v in held.items()}
        ),
        refuse="body",
        ways=WITH_BASE,
    ),
    "edited_alpha": llama(_edited(lora_alpha=50), "(?i)alpha|edited|sign"),
    "float16_overflow": llama(
        fields(lora_alpha=1e6),
        "(?i)float16|overflow|inf",
        dtype=torch.float16,
        ways=("merge",),
    ),
    "float8_e5m2_scale": llama(
        None,
        "weight_scale",
        spoil=_quantised(torch.float8_e5m2, "_scale", (16, 1)),
        ways=("merge",),
    ),
    "float8_alone": llama(
        None, "(?i)float8", spoil=_quantised(FLOAT8, "", ()), ways=("merge warns",)
    ),
}

LACKING = {
    "kasa_config": {"beta": 1.0},
    "layer_replication": [[0, 2], [0, 2]],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"scale": 1.0},
}
BROKEN |= {name: llama(fields(**{name: x}), name) for name, x in LACKING.items()}

ALL = {**CASES, **BROKEN}
