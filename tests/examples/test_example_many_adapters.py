"""`examples/many_adapters` on a tiny random model: no network, no real weights."""

import dataclasses
import functools
import io
import json
import tarfile
import zipfile

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import pre_tokenizers

import jlora
from examples.many_adapters import codes, data, generate, train, weights
from examples.many_adapters.codes import Blocks
from examples.many_adapters.config import parse
from examples.many_adapters.model import Sizes, forward
from examples.sentiment import assets

SIZES = Sizes(heads=2, kv_heads=1, theta=1e4, eps=1e-5)
D, HEAD, FFN, LAYERS = 16, 8, 24, 2


@pytest.fixture(scope="module")
def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>"]
    return weights.tokenizer(
        {
            "tokenizer.ggml.tokens": [*letters, *special],
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.token_type": [1] * len(letters) + [3] * len(special),
        }
    )


@pytest.fixture(scope="module")
def params(tokenizer):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32) / shape[-1] ** 0.5

    tensors = {
        "token_embd.weight": normal(tokenizer.get_vocab_size(), D),
        "output_norm.weight": np.ones(D, np.float32),
    }
    rows = {"attn_q": 2 * HEAD, "attn_k": HEAD, "attn_v": HEAD, "attn_output": D}
    rows |= {"ffn_gate": FFN, "ffn_up": FFN, "ffn_down": D}
    for i in range(LAYERS):
        for name, out in rows.items():
            into = {"attn_output": 2 * HEAD, "ffn_down": FFN}.get(name, D)
            tensors[f"blk.{i}.{name}.weight"] = normal(out, into)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{name}.weight"] = np.ones(D, np.float32)
    return jax.tree.map(jnp.asarray, weights.from_gguf(tensors, SIZES, LAYERS))


@pytest.fixture(autouse=True)
def promotion_as_users_have_it(standard_dtypes):
    with jax.numpy_rank_promotion("allow"):
        yield


def pairs(count=12):
    texts = [f"story {i} of {'sport' if i % 2 else 'music'}" for i in range(count)]
    return {task: [data.Pair(text, task) for text in texts] for task in data.TASKS}


def test_rows_of_a_head_are_halves_again():
    """GGUF's order is pairs: it is what HF's conversion made of two halves."""
    halves = np.arange(24).reshape(12, 2)  # two heads of six rows
    pairs = halves.reshape(2, 2, 3, 2).swapaxes(1, 2).reshape(12, 2)
    np.testing.assert_array_equal(weights.halves(pairs, 2), halves)


@pytest.mark.parametrize("kind", codes.BYTES)
def test_blocks_of_a_file_are_the_same_numbers_as_codes(kind):
    x = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    own = gguf.GGMLQuantizationType[kind]
    data = gguf.quantize(x, own)
    wide = gguf.dequantize(data, own)
    table = codes.table(Blocks(data, kind), "float32")
    np.testing.assert_array_equal(table.dense(), wide)
    kernel = codes.kernel(Blocks(data, kind), "bfloat16")
    assert kernel.shape == (64, 6)
    np.testing.assert_array_equal(kernel.dense(), wide.T.astype(jnp.bfloat16))


def test_blocks_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"Q4_K is not read .* gguf\.dequantize"):
        codes.table(Blocks(np.zeros((1, 144), np.uint8), "Q4_K"), "float32")


def test_model_computes_with_the_codes_of_its_file():
    """Heads are permuted, layers stacked, the table is also the head."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (40, 32)}
    shapes |= {
        f"blk.0.{n}": (32, 32) for n in weights.LAYER.values() if "norm" not in n
    }
    norms = ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"]
    coded = {f"{name}.weight": np.ones(32, np.float32) for name in norms}
    dense = dict(coded)
    for name, shape in shapes.items():
        own = "Q8_0" if name == "token_embd" else "Q4_1"
        kind = gguf.GGMLQuantizationType[own]
        data_ = gguf.quantize(rng.normal(size=shape).astype(np.float32), kind)
        coded[f"{name}.weight"] = Blocks(data_, own)
        dense[f"{name}.weight"] = gguf.dequantize(data_, kind)
    sizes = Sizes(heads=2, kv_heads=2, theta=1e4, eps=1e-5)
    fn = functools.partial(forward, sizes=sizes)
    args = (np.arange(5)[None], np.ones((1, 5), bool))
    apply = jlora.apply_lora(fn, on_merge="error")
    got = apply(weights.from_gguf(coded, sizes, 1), jlora.Trainable(), *args)
    wanted = fn(weights.from_gguf(dense, sizes, 1), *args)
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5, atol=1e-5)


def test_token_by_token_with_a_cache_is_the_whole_at_once(params, tokenizer):
    examples = data.encode(tokenizer, "topic", pairs(3)["topic"])
    fn = jax.jit(functools.partial(forward, sizes=SIZES), static_argnames="last")
    tokens, mask = map(jnp.asarray, examples)
    whole, _ = fn(params, tokens, mask, last=data.ANSWER + 1)
    shape = (LAYERS, 3, data.PROMPT + data.ANSWER, 1, HEAD)
    cache = (jnp.zeros(shape), jnp.zeros(shape))
    logits, cache = fn(params, tokens[:, : data.PROMPT], mask, cache, 0)
    np.testing.assert_allclose(logits[:, 0], whole[:, 0], rtol=1e-4, atol=1e-4)
    for i in range(2):
        place = data.PROMPT + i
        logits, cache = fn(params, tokens[:, place, None], mask, cache, place)
        np.testing.assert_allclose(logits[:, 0], whole[:, i + 1], rtol=1e-3, atol=1e-4)


def test_data_are_prompts_and_answers(tmp_path, tokenizer):
    news = io.BytesIO()
    with zipfile.ZipFile(news, "w") as archive:
        for i in range(4):
            name = f"{data.NEWS.prefix}{'sport' if i % 2 else 'tech'}/{i}.txt"
            archive.writestr(name, f"Headline {i % 3}\n\nStory {i % 3}.\n")
    (tmp_path / "news").write_bytes(news.getvalue())
    text = b"1_1\t2.5\tfine\n1_2\t-3\tpoor\n"
    inner, outer = io.BytesIO(), io.BytesIO()
    files = ((inner, "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt", text),)
    for file, name, content in files:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with tarfile.open(fileobj=outer, mode="w:gz") as archive:
        info = tarfile.TarInfo(assets.REVIEWS.inside[0])
        info.size = len(inner.getvalue())
        archive.addfile(info, io.BytesIO(inner.getvalue()))
    (tmp_path / "reviews").write_bytes(outer.getvalue())
    found = data.read_pairs(tmp_path / "news", tmp_path / "reviews")
    assert len(found["headline"]) + len(found["topic"]) == 3  # one is there twice
    assert {p.answer for p in found["mood"]} == {"good", "bad"}
    examples = data.encode(tokenizer, "mood", found["mood"])
    answer = examples.tokens[0, data.PROMPT :][examples.mask[0, data.PROMPT :]]
    assert tokenizer.decode(answer.tolist()) == found["mood"][0].answer
    assert not data.prompts(examples).mask[:, data.PROMPT :].any()


@pytest.mark.slow
def test_the_whole_example(params, tokenizer, tmp_path, capsys):
    flags = "--steps 30 --batch-size 2 --test 2 --rows 4 --tokens 3 --lr 0.02"
    flags += " --quantize int8"
    options = dataclasses.replace(parse(flags.split()), out=tmp_path)
    train.run(options, params, SIZES, tokenizer, pairs())
    figures = json.loads((tmp_path / "results.json").read_text())
    before, after = (np.array(figures[k])[:, 0] for k in ("before", "after"))
    assert (after < before).all()
    assert figures["tokens_per_second"].keys() >= {"merged", "three adapters, mixed"}
    assert "in one program" in capsys.readouterr().out
    back = jlora.checkpoint.restore(tmp_path / "adapters" / "topic").trainable
    assert set(back.lora) == {"layers/q", "layers/v"}
    assert (tmp_path / "curves.png").exists()


def test_rows_stop_at_the_end_token(capsys):
    steps = iter(
        [np.array([5, 1]), np.array([0, 2]), np.array([7, 0]), np.array([8, 8])]
    )
    texts = generate.stream(["x", "y"], steps, lambda ids: str(ids), end=0)
    assert texts == ["[5]", "[1, 2]"]
    assert next(steps).tolist() == [8, 8]  # nothing is written after all have ended
