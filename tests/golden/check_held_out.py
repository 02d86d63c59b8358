"""What servers' own code does with the random adapters of `held_out.py`.

    python -m tests.golden.check_held_out vllm VLLM [--seed 0] [--count 300]
    python -m tests.golden.check_held_out peft [--seed 0] [--count 300]
    python -m tests.golden.check_held_out transformers [--seed 0] [--count 300]

Run it where jlora, torch, PEFT and transformers are installed, of the versions of the
`golden` extra. VLLM is the folder where a wheel of vLLM is unpacked. Each adapter is
given to the server's own readers, as `check_servers.py` does, and to `peft.validate`;
the adapters on which they differ are printed, and the exit code is 1 if there are any.

For PEFT and transformers each whole adapter is written by PEFT itself, for a random
tiny model. Each number of a tensor is one of its own: a tensor is used if all of them
are found in the model after loading. Where jlora reads no verdict from an adapter (an
error), the server must refuse it too, or use nothing of it.
"""

import argparse
import copy
import functools
import json
import pathlib
import random
import sys
import tempfile
import warnings
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import jlora
from jlora.errors import PeftError
from tests.golden import (
    check_servers,
    check_vllm,
    held_out,
    held_out_bases,
    server_cases,
)
from tests.golden.server_cases import Case

Said = str | dict[str, str]  # an error, or what becomes of each tensor
FIRST = 4096  # the first number of an adapter: no weight of a model is as large
MAX_RANKS = (8, 16, 64, 512)  # what vLLM is started with
WORDS = {"applied": "used", "copy": "left", "dropped": "lost", "altered": "altered"}
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_local_experts": 3,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 12,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CAUSAL = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "opt", "gpt_neox",
    "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "starcoder2", "cohere",
)  # fmt: skip
TIED = ("llama", "qwen2", "qwen3_moe")  # once more, with the head tied
HEADED = ("llama", "bert", "qwen3")  # once more, as classifiers


def verdicts(
    folder: pathlib.Path, base: pathlib.Path, server: str, max_rank: int | None
) -> Said:
    """Returns what `validate` says, in the words of this file."""
    try:
        report = jlora.peft.validate(folder, base, server=server, max_rank=max_rank)
    except PeftError as error:
        return f"PeftError: {error}"
    refused = [v for v in report.verdicts if v.outcome == "refused"]
    if refused:
        first = next((v for v in refused if not v.why.startswith("the whole")), None)
        return f"refused: {first or refused[0]}"
    return {v.name: WORDS[v.outcome] for v in report.verdicts}


def differ(said: Said, own: Said) -> str:
    """Returns in words where a server and `validate` differ, empty if nowhere."""
    if isinstance(said, str) and isinstance(own, str):
        return ""
    if isinstance(own, str):
        assert not isinstance(said, str)
        used = [name for name, what in said.items() if what == "used"]
        if (own.startswith("PeftError") and not used) or any(s in own for s in STRICT):
            return ""
        return f"jlora {own:.300}; loaded, {len(used)} of {len(said)} used"
    if isinstance(said, str):
        return f"server: {said:.300}; jlora refuses nothing"
    wrong = [
        f"{name}: {what}, jlora {own.get(name)}"
        for name, what in said.items()
        if own.get(name) not in (what, "left") and (what, own.get(name)) != ALTERED
    ]
    return "; ".join(wrong[:3]) + (f"; {len(wrong)} tensors" if wrong else "")


STRICT = ("PEFT would silently take",)  # what jlora refuses on purpose
ALTERED = ("used", "altered")  # it is there, and something else is wrong with it


class Vllm:
    """vLLM's readers with the models of `held_out_bases.py`."""

    def __init__(self, root: pathlib.Path, folder: pathlib.Path):
        check_vllm.set_up(root)
        self.root, self.folder = root, folder
        self.bases = held_out_bases.bases()

    @functools.cache  # noqa: B019
    def server(self, name: str) -> tuple[pathlib.Path, check_servers.Vllm]:
        """Returns a model's directory and vLLM with it."""
        base = self.bases[name]
        here = server_cases.write_model(
            self.folder / name.replace(" ", "-"), base.config, base.shapes
        )
        return here, check_servers.Vllm(self.root, here)

    def case(self, rng: random.Random) -> Case:
        """Returns a random adapter of a random model."""
        name = rng.choice([*self.bases])
        whole = held_out_bases.whole(name, self.bases[name], rng)
        return held_out.mutated(whole, self.bases[name].shapes, rng)

    def says(
        self, case: Case, folder: pathlib.Path, max_rank: int | None
    ) -> tuple[Said, pathlib.Path]:
        """Returns what vLLM does with an adapter, and where its base is."""
        base, server = self.server(case.base)
        said = server.says(folder, max_rank or max(MAX_RANKS))
        if isinstance(said, str):
            return said, base
        return dict(zip(sorted(case.tensors), said, strict=True)), base


class Torch:
    """PEFT, or transformers by itself, with tiny models of many classes."""

    def __init__(self, server: str, folder: pathlib.Path):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.server, self.folder, self.torch = server, folder, torch
        self.names = [*CAUSAL, *(f"{n} tied" for n in TIED), "gemma3", "llava", "t5"]
        self.names += [f"{n} classifier" for n in HEADED]

    @functools.cache  # noqa: B019
    def model(self, name: str) -> tuple[Any, pathlib.Path]:
        """Returns a model and the directory that it was saved to."""
        self.torch.manual_seed(0)
        model = _model(name)
        here = self.folder / name.replace(" ", "-")
        model.save_pretrained(here)
        return model, here

    def case(self, rng: random.Random) -> Case:
        """Returns a random adapter, written by PEFT and changed."""
        import peft

        while True:
            name = rng.choice(self.names)
            model, _ = self.model(name)
            shapes = {n: tuple(x.shape) for n, x in model.state_dict().items()}
            config = _config(model, rng)
            try:
                adapted = peft.get_peft_model(
                    copy.deepcopy(model), peft.LoraConfig(**config)
                )
            except Exception:  # some choices are none that PEFT takes
                continue
            with tempfile.TemporaryDirectory() as folder:
                adapted.save_pretrained(folder)
                at = pathlib.Path(folder)
                fields = json.loads((at / "adapter_config.json").read_text())
                tensors = load_file(at / "adapter_model.safetensors")
            told = {k: v for k, v in config.items() if v}
            whole = Case(f"{name}, {told}", name, fields, tensors)
            return held_out.mutated(whole, shapes, rng)

    def says(
        self, case: Case, folder: pathlib.Path, max_rank: int | None
    ) -> tuple[Said, pathlib.Path]:
        """Returns what becomes of each tensor of an adapter, and where its base is."""
        del max_rank
        import peft

        model, base = self.model(case.base)
        model = copy.deepcopy(model)
        numbered(case)
        server_cases.write_adapter(folder, case)
        try:
            if self.server == "peft":
                model = peft.PeftModel.from_pretrained(model, str(folder))
            else:
                model.load_adapter(str(folder))
        except Exception as error:  # whatever they raise
            return f"{type(error).__name__}: {error}", base
        held = [x.detach().numpy().reshape(-1) for x in model.state_dict().values()]
        every = np.concatenate(held)
        return {
            name: "used" if np.isin(x, every).all() else "lost"
            for name, x in case.tensors.items()
        }, base


def numbered(case: Case) -> None:
    """Gives each element of an adapter a number of its own; copies of a tie, the same.

    PEFT writes the factors of a tied head once more, transposed.
    """
    start, tensors = FIRST, {}
    for name, x in sorted(case.tensors.items()):
        end = start + x.size
        tensors[name] = np.arange(start, end, dtype=np.float32).reshape(x.shape)
        start = end
    if case.config.get("ensure_weight_tying"):
        for name in tensors:
            for of_head, of_tables in TIES.items():
                if name.endswith(of_head):
                    twins = [n for end in of_tables for n in tensors if n.endswith(end)]
                    x = tensors[twins[0]] if twins else tensors[name]
                    x = x.T if "lora" in of_head else x
                    if x.shape == tensors[name].shape:
                        tensors[name] = np.ascontiguousarray(x)
    case.tensors = tensors


_INNER = "token_adapter.base_layer.weight"  # of a table whose rows are trained too
TIES = {
    "lm_head.lora_A.weight": ("embed_tokens.lora_embedding_B",),
    "lm_head.lora_B.weight": ("embed_tokens.lora_embedding_A",),
    "lm_head.weight": (f"embed_tokens.{_INNER}", "embed_tokens.weight"),
    f"lm_head.{_INNER}": (f"embed_tokens.{_INNER}", "embed_tokens.weight"),
}


def _model(name: str) -> Any:
    import transformers as hf

    kind, _, more = name.partition(" ")
    sizes = SIZES | ({"tie_word_embeddings": True} if more == "tied" else {})
    if kind == "gpt2":
        sizes |= {"n_embd": 16, "n_layer": 2, "n_head": 4}
    if kind == "opt":
        sizes |= {"ffn_dim": 24, "word_embed_proj_dim": 16}
    if kind == "t5":
        sizes = {"vocab_size": 40, "d_model": 16, "d_ff": 24, "num_layers": 2}
        config = hf.T5Config(**sizes, d_kv=4, num_heads=4, num_decoder_layers=2)
        return hf.T5ForConditionalGeneration(config).float().eval()
    if kind in ("gemma3", "llava"):
        tower = {k: v for k, v in SIZES.items() if k[-1] == "s" or k[-4:] == "size"}
        tower |= {"image_size": 16, "patch_size": 8, "projection_dim": 16}
        text = "gemma3_text" if kind == "gemma3" else "llama"
        towers = {"gemma3": hf.SiglipVisionConfig, "llava": hf.CLIPVisionConfig}
        config = hf.AutoConfig.for_model(
            kind,
            text_config=hf.AutoConfig.for_model(text, **SIZES),
            vision_config=towers[kind](**tower),
        )
        made = hf.AutoModelForImageTextToText.from_config(config)
        return made.float().eval()
    if more == "classifier":
        config = hf.AutoConfig.for_model(kind, **sizes, num_labels=3)
        made = hf.AutoModelForSequenceClassification.from_config(config)
        return made.float().eval()
    config = hf.AutoConfig.for_model(kind, **sizes)
    return hf.AutoModelForCausalLM.from_config(config).float().eval()


def _config(model: Any, rng: random.Random) -> dict[str, Any]:
    """Returns the fields of a random LoRA config for a model."""
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D, torch.nn.Embedding)
    found = [n for n, m in model.named_modules() if isinstance(m, kinds)]
    lasts = sorted({n.rpartition(".")[2] for n in found})
    targets: Any = rng.sample(lasts, rng.randint(1, min(4, len(lasts))))
    kind = rng.random()
    if kind < 0.15:
        targets = rng.sample(found, min(3, len(found)))
    elif kind < 0.25:
        targets = rf".*\.({'|'.join(targets)})"
    elif kind < 0.35:
        targets = "all-linear"
    config: dict[str, Any] = {
        "r": rng.choice((1, 2, 4)),
        "lora_alpha": rng.choice((2, 8)),
        "target_modules": targets,
        "use_dora": rng.random() < 0.15,
        "use_rslora": rng.random() < 0.2,
        "ensure_weight_tying": rng.random() < 0.2,
    }
    if rng.random() < 0.2:
        config["rank_pattern"] = {rng.choice(lasts): 3}
    if rng.random() < 0.2:
        config["alpha_pattern"] = {rng.choice(lasts): 5}
    if rng.random() < 0.15:
        config["modules_to_save"] = [rng.choice(lasts)]
    if rng.random() < 0.1:
        config["exclude_modules"] = [rng.choice(lasts)]
    stacks = sorted(
        n for n, x in model.named_parameters() if x.ndim == 3 and "experts" in n
    )
    if stacks and rng.random() < 0.5:
        last = stacks[0].split(".")[-2:]
        config["target_parameters"] = [".".join(["mlp", *last]), "down_proj"][:1]
    if rng.random() < 0.1:
        config["trainable_token_indices"] = [1, 2]
    if "classifier" in type(model).__name__.lower() or rng.random() < 0.1:
        config["task_type"] = rng.choice(("SEQ_CLS", "CAUSAL_LM"))
    return config


def main() -> int:
    """Compares, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", choices=("vllm", "peft", "transformers"))
    parser.add_argument("root", nargs="?", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--count", type=int, default=300)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    bad = broken = refused = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        bases = folder / "bases"
        if options.server == "vllm":
            server: Any = Vllm(options.root, bases)
        else:
            server = Torch(options.server, bases)
        for number in range(options.first, options.first + options.count):
            rng = random.Random(f"{options.seed} {number}")
            case = server.case(rng)
            here = folder / str(number)
            server_cases.write_adapter(here, case)
            limit = rng.choice(MAX_RANKS) if options.server == "vllm" else None
            said, base = server.says(case, here, limit)
            own = verdicts(here, base, options.server, limit)
            broken += " + " in case.name
            refused += isinstance(said, str)
            wrong = differ(said, own)
            if wrong:
                bad += 1
                print(f"!! {number} {case.name}\n   {wrong}", flush=True)
    print(
        f"{options.server}, seed {options.seed}: {bad} of {options.count} adapters are "
        f"judged otherwise; {broken} were changed, {refused} are refused"
    )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
