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
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

import jlora
from examples.chat import hub, smollm2
from examples.chat.model import DecoderConfig, decode, empty_cache, forward, shapes
from examples.many_adapters import codes, data, generate, train, weights
from examples.many_adapters.codes import Blocks
from examples.many_adapters.config import parse
from examples.sentiment import assets
from tests.helpers import normal, random_like

pytestmark = pytest.mark.once

CONFIG = DecoderConfig(
    vocab=258, width=16, hidden=24, layers=2, heads=2, kv_heads=1, head=8, tied=True
)


@pytest.fixture(scope="module")
def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>"]
    return smollm2.tokenizer(
        {
            "tokenizer.ggml.tokens": [*letters, *special],
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.token_type": [1] * len(letters) + [3] * len(special),
        }
    )


@pytest.fixture(scope="module")
def params():
    def drawn(path, like):
        if path[-1].key == "scale":
            return jnp.ones(like.shape)
        return normal(like.shape, scale=like.shape[-1] ** -0.5)

    with jax.numpy_rank_promotion("allow"):
        return jax.tree_util.tree_map_with_path(drawn, shapes(CONFIG))


@pytest.fixture(autouse=True)
def promotion_as_users_have_it(standard_dtypes):
    with jax.numpy_rank_promotion("allow"):
        yield


def pairs(count=12):
    texts = [f"story {i} of {'sport' if i % 2 else 'music'}" for i in range(count)]
    return {task: [data.Pair(text, task) for text in texts] for task in data.TASKS}


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


def test_model_computes_with_the_codes_of_its_file(tmp_path):
    """Heads are permuted, layers stacked, the table is also the head."""
    sizes = {"width": 32, "hidden": 32, "heads": 2, "kv_heads": 2, "head": 16}
    config = dataclasses.replace(CONFIG, vocab=40, **sizes)
    fields = {
        "llama.block_count": 2,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 2,
    }
    coded, dense = {}, {}
    for i, (name, own) in enumerate(smollm2.names_of(fields).items()):
        if "norm" in name:
            coded[f"{own}.weight"] = dense[f"{name}.weight"] = np.ones(32, np.float32)
            continue
        is_table = own == "token_embd"
        x = np.asarray(normal((40 if is_table else 32, 32), seed=i))
        kind = gguf.GGMLQuantizationType["Q8_0" if is_table else "Q4_1"]
        blocks = gguf.quantize(x, kind)
        coded[f"{own}.weight"] = Blocks(blocks, kind.name)
        wide, heads = gguf.dequantize(blocks, kind), smollm2.heads_of(name, fields)
        dense[f"{name}.weight"] = smollm2.halves(wide, heads) if heads else wide
    save_file(dense, tmp_path / "model.safetensors")
    names = hub.names(config)
    wide = jlora.peft.load_base(tmp_path, shapes(config), names=names)
    params = weights.from_gguf(coded, fields, config)
    leaves, _ = jlora.paths.flatten(params)
    assert sum(isinstance(x, jlora.Quantized) for x in leaves.values()) == 8
    fn = functools.partial(forward, config=config)
    tokens = np.arange(5)[None]
    apply = jlora.apply_lora(fn, on_merge="error")
    got = apply(params, jlora.Trainable(), tokens)
    np.testing.assert_allclose(got, fn(wide, tokens), rtol=1e-5, atol=1e-5)


def test_rows_with_their_own_adapters_are_written_as_if_alone(params, tokenizer):
    """A batch of padded prompts and three adapters, with a cache, a token at a time."""
    fn = functools.partial(forward, config=CONFIG)
    examples = data.encode(tokenizer, "topic", pairs(3)["topic"])
    lora = jlora.LoraConfig(rank=2, targets=train.TARGETS)
    plan = jlora.plan(fn, params, examples.tokens[:1], config=lora)
    frozen, one = jlora.split(jax.random.key(0), params, plan)
    adapters = [random_like(one, seed=i, scale=0.3) for i in range(3)]
    step = generate.make_step(train.mixed(functools.partial(decode, config=CONFIG)))
    cache = functools.partial(empty_cache, CONFIG, 3, data.PROMPT + 4)
    stacked = jlora.adapters.stack(adapters)
    rows = jlora.adapters.select(stacked, jnp.array([2, 0, 1]))
    written = np.array(
        [*generate.generate(step, frozen, rows, data.prompts(examples), 4, cache)]
    )
    apply = jax.jit(jlora.apply_lora(fn))
    for row, i in enumerate([2, 0, 1]):
        prompt = examples.tokens[row, : data.PROMPT][examples.mask[row, : data.PROMPT]]
        whole = np.concatenate([prompt, written[:, row]])[None]
        likeliest = np.argmax(apply(frozen, adapters[i], whole)[0], axis=-1)
        assert likeliest[len(prompt) - 1 : -1].tolist() == written[:, row].tolist()
    assert len({*map(tuple, written.T.tolist())}) == 3


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
    train.run(options, params, CONFIG, tokenizer, pairs())
    figures = json.loads((tmp_path / "results.json").read_text())
    before, after = (np.array(figures[k])[:, 0] for k in ("before", "after"))
    assert (after < before).all()
    assert figures["tokens_per_second"].keys() >= {"merged", "three adapters, mixed"}
    assert "in one program" in capsys.readouterr().out
    back = jlora.checkpoint.restore(tmp_path / "adapters" / "topic").trainable
    assert set(back.lora) == {
        f"model/layers/self_attn/{name}_proj/kernel" for name in "qv"
    }
    assert (tmp_path / "curves.png").exists()


def test_rows_stop_at_the_end_token(capsys):
    steps = iter(
        [np.array([5, 1]), np.array([0, 2]), np.array([7, 0]), np.array([8, 8])]
    )
    texts = generate.stream(["x", "y"], steps, lambda ids: str(ids), end=0)
    assert texts == ["[5]", "[1, 2]"]
    assert next(steps).tolist() == [8, 8]  # nothing is written after all have ended
