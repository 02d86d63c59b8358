"""The decoder of `examples/chat`: transformers' logits, caches, packing, files."""

import dataclasses
import functools
import json
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora
from examples.chat import hub
from examples.chat.decoder_config import DecoderConfig, Rope
from examples.chat.generate import generate
from examples.chat.model import decode, empty_cache, forward, init, shapes
from tests.golden import decoder_cases as golden

pytestmark = pytest.mark.once

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LOGITS = np.load(GOLDEN / "decoders.npz")
CONFIGS = json.loads((GOLDEN / "decoders.json").read_text())["configs"]
TOKENS = jnp.asarray(golden.tokens(), jnp.int32)
# Windows, two kinds of rotary positions and none: what a cache can get wrong.
VARIED = ("llama_llama3", "mistral", "smollm3_sliding", "gemma2")
SCAN = pytest.mark.parametrize("scan", [True, False])


@pytest.fixture(autouse=True)
def promotion_as_users_have_it(standard_dtypes):
    with jax.numpy_rank_promotion("allow"):
        yield


def near(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Writes a case's model as a directory of the Hub, once."""

    @functools.cache
    def write(case):
        folder = tmp_path_factory.mktemp(case)
        (folder / "config.json").write_text(json.dumps(CONFIGS[case]))
        config = DecoderConfig.from_hub(folder)
        leaves, _ = jlora.paths.flatten(shapes(config))
        places = {
            place.name: place.shape(x.shape)
            for path, x in leaves.items()
            for place in hub.names(config).places(path, x.shape)
        }
        tensors = {n: golden.weight(case, n, shape) for n, shape in places.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


@pytest.fixture(scope="module")
def model(directory):
    """Loads a case's model, once in each form."""

    @functools.cache
    def load(case, scan=True):
        return hub.load(directory(case), dtype="float32", scan=scan)

    return load


@functools.partial(jax.jit, static_argnames=("config", "last"))
def run(params, tokens, positions=None, segments=None, *, config, last=None):
    return forward(params, tokens, positions, segments, config=config, last=last)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("case", golden.CASES)
def test_logits_are_those_of_transformers(model, case, scan):
    config, params = model(case, scan)
    near(run(params, TOKENS, config=config), LOGITS[case])


@pytest.mark.parametrize("case", golden.CASES)
def test_old_and_new_forms_of_a_config_say_the_same(case):
    assert DecoderConfig.from_hub(golden.CASES[case]) == DecoderConfig.from_hub(
        CONFIGS[case]
    )


@pytest.mark.parametrize(
    ("case", "scan"),
    [
        ("gemma3", True),
        ("gemma3", False),
        *((case, True) for case in VARIED),
    ],
)
def test_tokens_with_a_cache_have_the_logits_of_the_whole(model, case, scan):
    """Prompts of two lengths, padded on the left, then a token at a time."""
    config, params = model(case, scan)
    step = jax.jit(functools.partial(decode, config=config), static_argnames="last")
    whole, short, asked = LOGITS[case][0], 9, 15
    tokens = np.zeros((2, asked), np.int32)
    tokens[0], tokens[1, -short:] = TOKENS[0, :asked], TOKENS[0, :short]
    segments = (np.arange(asked) >= [[0], [asked - short]]).astype(np.int32)
    cache = empty_cache(config, 2, golden.LENGTH)
    logits, cache = step(params, tokens, cache, segments, last=4)
    near(logits[0], whole[asked - 4 : asked])
    near(logits[1], whole[short - 4 : short])
    for i in range(4):
        new = TOKENS[0, jnp.array([asked + i, short + i])][:, None]
        logits, cache = step(params, new, cache)
        near(logits[:, 0], whole[[asked + i, short + i]])


@pytest.mark.parametrize("case", ["gemma3", "smollm3_sliding"])
def test_a_document_does_not_see_the_one_before_it(model, case):
    config, params = model(case)
    first, second = jnp.split(TOKENS, [11], axis=1)
    segments = jnp.array([[1] * 11 + [2] * 10 + [0] * 3])
    packed = run(params, TOKENS, None, segments, config=config)
    other = jnp.concatenate([(first + 1) % 40, second], axis=1)
    changed = run(params, other, None, segments, config=config)
    assert jnp.abs(changed - packed)[:, :11].max() > 0.1
    np.testing.assert_array_equal(changed[:, 11:21], packed[:, 11:21])
    alone = run(params, second[:, :10], config=config)
    near(packed[:, 11:21], alone)
    positions = jnp.array([[*range(11), *range(10), 0, 0, 0]])
    said = run(params, TOKENS, positions, segments, config=config)
    np.testing.assert_array_equal(said[:, :21], packed[:, :21])


@SCAN
def test_remat_changes_no_gradient(model, scan):
    config, params = model("gemma3", scan)

    def loss(params, config):
        return jnp.square(run(params, TOKENS, config=config)).mean()

    remat = dataclasses.replace(config, remat=True)
    assert "remat" in str(jax.make_jaxpr(lambda p: loss(p, remat))(params))
    assert "remat" not in str(jax.make_jaxpr(lambda p: loss(p, config))(params))
    got, wanted = (
        jax.jit(jax.grad(loss), static_argnums=1)(params, c) for c in (remat, config)
    )
    jax.tree.map(near, got, wanted)


def test_prompts_of_any_lengths_go_on_as_if_alone(model):
    """Greedy tokens are those that the whole sequence gives; an end token ends."""
    config, params = model("gemma3")
    step = functools.partial(decode, config=config)
    prompts = [TOKENS[0, :5].tolist(), TOKENS[0, 5:14].tolist()]
    got = generate(step, (params,), prompts, config, count=6)
    for prompt, answer in zip(prompts, got, strict=True):
        whole = jnp.array([prompt + answer])
        likeliest = run(params, whole, config=config)[0].argmax(-1)
        assert answer == likeliest[len(prompt) - 1 : -1].tolist()
    end = got[0][2]
    cut = generate(step, (params,), prompts, config, count=6, end=[end])
    assert cut[0] == got[0][: got[0].index(end)]


def test_what_can_not_be_written_is_told(model):
    config, params = model("gemma3")
    with pytest.raises(ValueError, match=r"needs a token; the lengths are \[1, 0\]"):
        generate(decode, (params,), [[1], []], config, count=1)
    step = jax.jit(functools.partial(decode, config=config))
    _, cache = step(params, TOKENS[:, :3], empty_cache(config, 1, 4))
    logits, cache = step(params, TOKENS[:, 3:4], cache)
    assert jnp.isfinite(logits).all()
    logits, _ = step(params, TOKENS[:, 4:5], cache)
    assert jnp.isnan(logits).all()


def test_drawn_tokens_follow_the_key_and_the_logits(model):
    config, params = model("gemma3")
    step = functools.partial(decode, config=config)
    prompts = [TOKENS[0, :5].tolist()] * 512

    def drawn(seed):
        return generate(
            step,
            (params,),
            prompts,
            config,
            count=1,
            temperature=2.0,
            key=jax.random.key(seed),
        )

    assert drawn(0) == drawn(0) != drawn(1)
    found = np.bincount(np.ravel(drawn(0)), minlength=40) / 512
    wanted = jax.nn.softmax(run(params, TOKENS[:, :5], config=config)[0, -1] / 2)
    assert np.abs(found - wanted).max() < 0.06


@SCAN
def test_an_adapter_has_the_names_of_the_hub(model, tmp_path, scan):
    """It comes back, and its plan has no leaf that is merged or has no name."""
    config, params = model("qwen3_sliding", scan)
    fn = functools.partial(forward, config=config)
    plan = jlora.plan(fn, params, TOKENS, config=jlora.LoraConfig(rank=2))
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    drawn = jax.tree.map(lambda x: x + 0.1, trainable)
    jlora.peft.save(tmp_path, drawn, names=hub.names(config))
    names = {*jlora.files.read(tmp_path).lora}
    kinds = ("self_attn.q_proj", "mlp.down_proj")
    assert {f"model.layers.{i}.{k}.weight" for i in range(3) for k in kinds} < names
    assert len(names) == 3 * 7
    back = jlora.peft.load(tmp_path, plan, names=hub.names(config))
    apply = jax.jit(jlora.apply_lora(fn, on_merge="error"))
    wanted = apply(frozen, drawn, TOKENS)
    assert jnp.abs(wanted - LOGITS["qwen3_sliding"]).max() > 0.1
    np.testing.assert_array_equal(apply(frozen, back, TOKENS), wanted)


def test_a_model_is_loaded_onto_a_mesh_and_into_codes(directory):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=auto)
    with_two = jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor"))
    whole = jax.NamedSharding(mesh, jax.P())

    def shardings(like):
        return jax.tree.map(lambda x: with_two if x.ndim == 3 else whole, like)

    load = functools.partial(hub.load, directory("qwen3"), shardings=shardings)
    config, params = load(dtype="bfloat16")
    q = params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert (q.sharding, q.dtype) == (with_two, jnp.bfloat16)
    _, coded = load(
        dtype="float32", quantize={"kind": "int8", "block": 4, "targets": hub.LINEAR}
    )
    leaves, _ = jlora.paths.flatten(coded)
    codes = {name for name, x in leaves.items() if isinstance(x, jlora.Quantized)}
    assert codes == {name for name in leaves if "layers" in name and "kernel" in name}
    apply = jlora.apply_lora(functools.partial(forward, config=config))
    got = jax.jit(apply)(coded, jlora.Trainable(), TOKENS)
    assert np.abs(got - LOGITS["qwen3"]).max() < 0.1


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_loading_holds_one_leaf_and_its_tensors(tmp_path, quantize):
    """Beside the model, which on a CPU may take over what numpy allocated."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    about = {**SMALL, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(about))
    config = DecoderConfig.from_hub(about)
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes(config))
    jlora.peft.save_base(tmp_path, params, names=hub.names(config), config=about)
    leaves = [x.nbytes for x in jax.tree.leaves(params)]
    load = functools.partial(hub.load, tmp_path, dtype="float32", quantize=quantize)
    load()  # what is traced and compiled stays
    tracemalloc.start()
    try:
        model = load()
        taken_over, peak = tracemalloc.get_traced_memory()
        del model
    finally:
        tracemalloc.stop()
    assert peak - taken_over < 3.5 * max(leaves) < sum(leaves)


SMALL = {**golden.SIZES, "model_type": "llama"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not known here, only llama, "),
        ({"hidden_size": None}, "of a llama model lacks hidden_size"),
        ({"residual_multiplier": 0.5}, r"known for llama: residual_multiplier = 0\.5"),
        ({"is_causal": False}, "is_causal = False. If they do not change"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh' is not one of silu"),
        ({"num_key_value_heads": 3}, "4 query heads of 6 features and 3 key heads"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' is not known here"),
        (
            {"rope_scaling": {"type": "linear", "attention_factor": 2}},
            "'linear' with attention_factor = 2; factor is missing",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3},
            "3 layers need 'sliding_attention' or 'full_attention'",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3},
            "a sliding_window that is in use",
        ),
        (
            {"model_type": "smollm3", "no_rope_layers": [1]},
            r"no_rope_layers \[1\]: there are 3 layers",
        ),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            r"gemma3_text with attn_logit_softcapping = 50\.0",
        ),
    ],
)
def test_what_a_config_says_and_the_decoder_does_not_do_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hub({**SMALL, **change})


def test_keys_that_change_nothing_are_taken():
    more = {"residual_multiplier": 1.0, "rope_interleaved": False, "_name": "x"}
    config = DecoderConfig.from_hub({**SMALL, **more}, ignore=["residual_multiplier"])
    assert config == DecoderConfig.from_hub(SMALL)


def test_leaves_of_another_dtype_do_not_change_that_of_the_model(model):
    """Adapters and norms trained in float32 on a base in bfloat16, in a scan."""
    config, params = model("gemma3")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    fn = functools.partial(forward, config=config)
    lora = jlora.LoraConfig(rank=2, train="**/scale", dtype="float32")
    plan = jlora.plan(fn, params, TOKENS, config=lora)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    got = jax.jit(jlora.apply_lora(fn))(frozen, wide, TOKENS)
    wanted = LOGITS["gemma3"]
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()


def test_random_models_can_be_made_without_a_file():
    config = DecoderConfig(
        vocab=16,
        width=8,
        hidden=8,
        layers=2,
        heads=2,
        kv_heads=1,
        head=4,
        ropes=(Rope(), None),
        windows=(2, None),
    )
    params = init(jax.random.key(0), config, jnp.bfloat16)
    logits = run(params, TOKENS % 16, config=config, last=3)
    assert (logits.shape, logits.dtype) == ((1, 3, 16), jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
