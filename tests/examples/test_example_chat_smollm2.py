"""The default model of `examples/chat`: a tiny GGUF file becomes a Hub directory."""

import dataclasses
import hashlib
import json
import zipfile

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from examples.chat import hub, smollm2

pytestmark = pytest.mark.once
LAYERS, D, FFN, HEADS, KV_HEADS, HEAD = 2, 32, 64, 4, 2, 8
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS += [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abc"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def hub_tensors():
    """Returns random tensors with the names and shapes of the Hub."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (len(TOKENS), D), "model.norm": (D,)}
    rows = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
    for i in range(LAYERS):
        own = {f"self_attn.{name}_proj": (n, D) for name, n in rows.items()}
        own |= {"self_attn.o_proj": (D, HEADS * HEAD), "mlp.down_proj": (D, FFN)}
        own |= {f"mlp.{name}_proj": (FFN, D) for name in ("gate", "up")}
        own |= {f"{n}_layernorm": (D,) for n in ("input", "post_attention")}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in own.items()}
    return {
        f"{name}.weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_gguf(path, tensors):
    """Writes what llama.cpp's converter makes of them: pairs of rows side by side."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for name, x in tensors.items():
        module = name.removesuffix(".weight")
        own = names.get(module)
        if own is None:
            _, _, i, module = module.split(".", 3)
            own = f"blk.{i}.{smollm2.NAMES[module]}"
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(module)
        if heads:  # as in convert_hf_to_gguf.py
            x = x.reshape(heads, 2, HEAD // 2, D).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(f"{own}.weight", x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(autouse=True)
def promotion_as_users_have_it():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Returns a cache with the pinned wheel, which has a tiny file in it."""
    file, folder = tmp_path / "tiny.gguf", tmp_path / "cache"
    folder.mkdir()
    write_gguf(file, hub_tensors())
    wheel = folder / smollm2.SMOLLM2.filename
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, smollm2.SMOLLM2.prefix + smollm2.FILE)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    pinned = dataclasses.replace(smollm2.SMOLLM2, sha256=digest)
    monkeypatch.setattr(smollm2, "SMOLLM2", pinned)
    return folder


def test_a_gguf_file_becomes_a_directory_of_the_hub(cache):
    folder = smollm2.directory(cache)
    assert folder == cache / "SmolLM2-135M-Instruct"
    read, wanted = load_file(folder / "model.safetensors"), hub_tensors()
    assert read.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_array_equal(read[name], x, err_msg=name)
    config, params = hub.load(folder, dtype="float32")
    assert (config.heads, config.kv_heads, config.eps) == (4, 2, 1e-5)
    assert params["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape == (2, D, FFN)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert json.loads((folder / "generation_config.json").read_text()) == ids


def test_its_tokenizer_is_what_transformers_reads(cache):
    tokenizer = AutoTokenizer.from_pretrained(smollm2.directory(cache))
    said = [{"role": "user", "content": "abc 12"}]
    ids = tokenizer.apply_chat_template(said, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|im_start|>",
        "abc",
        "Ġ",
        "1",
        "2",
        "<|im_end|>",
    ]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abc 12"


@pytest.mark.parametrize("damage", ["cut", "gone", "no sums"])
def test_a_damaged_directory_is_made_again(cache, damage):
    folder = smollm2.directory(cache)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    first = folder.stat().st_ino
    assert smollm2.directory(cache).stat().st_ino == first
    match damage:
        case "cut":
            (folder / "model.safetensors").write_bytes(b"cut")
        case "gone":
            (folder / "tokenizer.json").unlink()
        case "no sums":
            (folder / smollm2.SUMS).unlink()
    again = smollm2.directory(cache)
    assert {file.name: file.read_bytes() for file in again.iterdir()} == before
    left = {file.name for file in cache.iterdir()}
    assert left == {smollm2.SMOLLM2.filename, folder.name}
