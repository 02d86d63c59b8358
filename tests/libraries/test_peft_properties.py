"""The properties that PEFT's own tests ask of every model and method, by their names.

The names are those of `_test_…` in `tests/testing_common.py` of Hugging Face PEFT. Each
holds here to 1e-5, for LoRA, rsLoRA, DoRA, VeRA and AdaLoRA on two models, or the table
says why it has no meaning in a library of pure functions.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora import Trainable, adapters, pool
from tests.helpers import close, same
from tests.libraries.peft_setups import (
    IDS,
    METHODS,
    MODELS,
    SETUPS,
    WORDS,
    differs,
    moved,
)

pytestmark = pytest.mark.once

FILES = {"adapter_config.json", "adapter_model.safetensors"}
NAMES_OF_OTHERS = ("default2", "other_default", "foodefault_bar", "efaul")


def base_of(setup):
    """What arithmetic needs for updates that are no low-rank factors."""
    return setup.params if setup.method == "dora" else None


def prepare_for_training(setup, tmp_path):
    """Words have no gradient; the factors of every layer do, without any hook."""
    gradient = setup.gradient(setup.frozen, setup.own, IDS)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def load_model_low_cpu_mem_usage(setup, tmp_path):
    """A plan, a split and a load need only shapes; what is loaded holds numbers."""
    shapes = jax.eval_shape(lambda: setup.params)
    plan = jlora.plan(setup.fn, shapes, IDS, config=setup.config())
    assert plan.adapted == setup.plan.adapted
    split = functools.partial(jlora.split, plan=plan)
    made = jax.eval_shape(split, jax.random.key(0), shapes)[1]
    assert jax.tree.structure(made) == jax.tree.structure(setup.own)
    plain = adapters.to_lora(setup.own) if setup.method != "dora" else setup.own
    jlora.peft.save(tmp_path, plain)
    loaded = jlora.peft.load(tmp_path, shapes)
    close(setup.out(loaded), setup.out(setup.own))


def save_pretrained(setup, tmp_path):
    """Own files come back to the bit; PEFT's files compute the same."""
    jlora.save(tmp_path / "own", setup.own)
    same(jlora.load(tmp_path / "own"), setup.own)
    jlora.peft.save(tmp_path / "peft", setup.own)
    assert {p.name for p in (tmp_path / "peft").iterdir()} == FILES
    loaded = jlora.peft.load(tmp_path / "peft", setup.params)
    close(setup.out(loaded), setup.out(setup.own))


def save_pretrained_selected_adapters(setup, tmp_path):
    """Each adapter is saved alone, where it is told to."""
    for name, adapter in {"default": setup.own, "new": setup.other}.items():
        jlora.peft.save(tmp_path / name, adapter)
    for name, adapter in {"default": setup.own, "new": setup.other}.items():
        assert {p.name for p in (tmp_path / name).iterdir()} == FILES
        loaded = jlora.peft.load(tmp_path / name, setup.params)
        close(setup.out(loaded), setup.out(adapter))


def save_pretrained_adapter_name_substring(setup, tmp_path):
    """Directories whose names contain each other do not mix."""
    jlora.peft.save(tmp_path / "default", setup.own)
    for name in NAMES_OF_OTHERS:
        jlora.peft.save(tmp_path / name, setup.other)
    tensors = load_file(tmp_path / "default" / "adapter_model.safetensors")
    each = 3 if setup.method == "dora" else 2
    assert len(tensors) == each * len(setup.own.lora)
    loaded = jlora.peft.load(tmp_path / "default", setup.params)
    close(setup.out(loaded), setup.out(setup.own))


def from_pretrained_config_construction(setup, tmp_path):
    """The settings come with the adapter, and are those it was made with."""
    jlora.save(tmp_path / "own", setup.own)
    loaded = jlora.load(tmp_path / "own")
    assert [f.spec for f in loaded.lora.values()] == [
        f.spec for f in setup.own.lora.values()
    ]
    again = jlora.LoraConfig.from_json(setup.config().to_json())
    assert again == setup.config()


def load_multiple_adapters(setup, tmp_path):
    """One directory, loaded three times, is complete three times."""
    jlora.peft.save(tmp_path, setup.own)
    first, *more = (jlora.peft.load(tmp_path, setup.params) for _ in range(3))
    assert first.lora.keys() == setup.own.lora.keys()
    for adapter in more:
        same(adapter, first)


def merge_layers_fp16(setup, tmp_path):
    """A float16 base is merged in float16, and rounded once."""
    half = jax.tree.map(lambda x: x.astype(jnp.float16), setup.params)
    merged = jlora.merge(half, setup.own)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    exact = jlora.merge(wide, setup.own)
    for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(exact), strict=True):
        assert x.dtype == jnp.float16
        np.testing.assert_allclose(np.asarray(x, np.float32), y, rtol=1e-3, atol=1e-6)


def merge_layers_nan(setup, tmp_path):
    """A broken adapter is refused, whichever of its leaves is broken."""
    merged = jlora.merge(setup.frozen, setup.own, check=True)
    close(setup.jitted(merged, IDS), setup.out(setup.own))
    leaves, treedef = jax.tree.flatten(setup.own)
    for bad in (jnp.nan, jnp.inf):
        broken = treedef.unflatten([leaves[0].at[0].set(bad), *leaves[1:]])
        with pytest.raises(jlora.MergeError, match="give NaN or infinity"):
            jlora.merge(setup.frozen, broken, check=True)


def merge_layers(setup, tmp_path):
    """Merged, unmerged, and saved and read again, all compute the same."""
    out = setup.out(setup.own)
    merged = jlora.merge(setup.frozen, setup.own)
    close(setup.jitted(merged, IDS), out)
    assert differs(out, setup.base)
    if setup.method == "dora":  # its merged weights do not determine the base
        with pytest.raises(jlora.TreeError, match="Keep frozen"):
            jlora.unmerge(merged, setup.own)
    else:
        close(setup.out(setup.own, jlora.unmerge(merged, setup.own)), out)
    jlora.peft.save_base(tmp_path, merged)
    read = jlora.peft.load_base(tmp_path, setup.params)
    same(read, merged)


def merge_layers_multi(setup, tmp_path):
    """Of two adapters each can be merged alone, and both together."""
    outs = [setup.out(x) for x in (setup.own, setup.other)]
    assert differs(*outs)
    for adapter, out in zip((setup.own, setup.other), outs, strict=True):
        close(setup.jitted(jlora.merge(setup.frozen, adapter), IDS), out)
    both = adapters.add([setup.own, setup.other], params=base_of(setup))
    together = setup.jitted(jlora.merge(setup.frozen, both), IDS)
    close(setup.out(both), together)
    assert all(differs(together, out) for out in outs)


def merge_layers_is_idempotent(setup, tmp_path):
    """Merging leaves the base alone, so a second merge gives the same bits."""
    first = jlora.merge(setup.frozen, setup.own)
    same(jlora.merge(setup.frozen, setup.own), first)
    same(setup.frozen, setup.params)


def safe_merge(setup, tmp_path):
    """`check=True` changes no number."""
    checked = jlora.merge(setup.frozen, setup.own, check=True)
    same(checked, jlora.merge(setup.frozen, setup.own))
    assert differs(setup.jitted(checked, IDS), setup.base)


def mixed_adapter_batches(setup, tmp_path):
    """Each row of a batch is what its own adapter alone computes."""
    out = setup.rows(setup.frozen, setup.stack, jnp.array([-1, 0, 1]), IDS)
    expected = (setup.base, setup.out(setup.own), setup.out(setup.other))
    for row, whole in enumerate(expected):
        close(out[row], whole[row])


def beams(scores):
    """Returns the three best ends of the first sentence by beam search."""
    kept = [(0.0, [int(word) for word in IDS[0]])] * 3
    for step in range(3):
        logs = scores(jnp.array([sentence[-4:] for _, sentence in kept]))
        logs = np.asarray(jax.nn.log_softmax(logs[:, -1]))
        grown = [
            (total + logs[i, word], [*sentence, word])
            for i, (total, sentence) in enumerate(kept[: 1 if step == 0 else 3])
            for word in range(WORDS)
        ]
        kept = sorted(grown, key=lambda beam: -beam[0])[:3]
    return [sentence for _, sentence in kept]


def generate_with_mixed_adapter_batches_and_beam_search(setup, tmp_path):
    """The beams of a request share its adapter."""
    for number, adapter in ((0, setup.own), (1, setup.other)):
        ids = jnp.full(3, number)
        mixed = beams(lambda x, n=ids: setup.rows(setup.frozen, setup.stack, n, x))
        assert mixed == beams(lambda x, a=adapter: setup.apply(setup.frozen, a, x))


def generated(fn, ids):
    """Returns four more words, each the most likely one."""

    def step(ids, _):
        word = jnp.argmax(fn(ids)[:, -1:], axis=-1)
        return jnp.concatenate([ids[:, 1:], word], axis=1), word[:, 0]

    return jax.lax.scan(step, ids, None, length=4)[1].T


def generate(setup, tmp_path):
    """A loop over words gives the words that the merged model gives."""

    def loop(params, ids):
        return generated(functools.partial(setup.fn, params), ids)

    adapted = jax.jit(jlora.apply_lora(loop))(setup.frozen, setup.own, IDS)
    merged = jlora.merge(setup.frozen, setup.own)
    ids, words = IDS, []
    for _ in range(4):
        words.append(jnp.argmax(setup.jitted(merged, ids)[:, -1:], axis=-1))
        ids = jnp.concatenate([ids[:, 1:], words[-1]], axis=1)
    np.testing.assert_array_equal(adapted, jnp.concatenate(words, axis=1))


def generate_pos_args(setup, tmp_path):
    """Arguments go to the model as they come, by position or by name."""
    close(setup.apply(setup.frozen, setup.own, ids=IDS), setup.out(setup.own))


def generate_half_prec(setup, tmp_path):
    """A bfloat16 model generates, and its scores are bfloat16."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), setup.params)
    _, frozen, own = setup.split(params=half)
    out = setup.out(own, frozen)
    assert out.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(out).all())
    merged = setup.jitted(jlora.merge(frozen, own), IDS)
    close(out.astype(jnp.float32), merged.astype(jnp.float32), largest=0.05)


def training(setup, tmp_path):
    """All of the adapter has a gradient, the merged model's, and the base has none."""
    gradient = setup.gradient(setup.frozen, setup.own, IDS)
    assert jax.tree.structure(gradient) == jax.tree.structure(setup.own)
    if setup.method != "dora":  # whose norm counts as a constant

        def merged(trainable):
            return (setup.fn(jlora.merge(setup.frozen, trainable), IDS) ** 2).sum()

        close(gradient, jax.jit(jax.grad(merged))(setup.own), largest=1e-5)
    stepped = jax.tree.map(lambda x, g: x - 1e-3 * g, setup.own, gradient)
    assert (setup.out(stepped) ** 2).sum() < (setup.out(setup.own) ** 2).sum()
    same(setup.frozen, setup.params)


def inference_safetensors(setup, tmp_path):
    """After a step and a round trip through a file, the output has the same bits."""
    gradient = setup.gradient(setup.frozen, setup.own, IDS)
    stepped = jax.tree.map(lambda x, g: x - 1e-3 * g, setup.own, gradient)
    jlora.save(tmp_path / "own", stepped)
    same(setup.out(jlora.load(tmp_path / "own")), setup.out(stepped))


def training_layer_indexing(setup, tmp_path):
    """A glob chooses the layer; only that layer has factors, gradients and tensors."""
    target = "**/layers_0/kernel" if setup.model == "linen" else "layers/0/kernel"
    plan, frozen, own = setup.split(targets=target)
    assert list(own.lora) == list(plan.adapted)
    assert len(own.lora) == 1 < len(setup.own.lora)
    gradient = setup.gradient(frozen, own, IDS)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    jlora.peft.save(tmp_path, own)
    close(setup.out(jlora.peft.load(tmp_path, setup.params)), setup.out(own))


def training_gradient_checkpointing(setup, tmp_path):
    """Gradients do not change when activations are computed again."""
    again = jax.checkpoint(setup.loss)
    close(
        jax.jit(jax.grad(again, argnums=1))(setup.frozen, setup.own, IDS),
        setup.gradient(setup.frozen, setup.own, IDS),
        largest=1e-5,
    )


def peft_model_device_map(setup, tmp_path):
    """An adapter goes to the device that it is put on, and computes there."""
    device = jax.devices()[1]
    jlora.save(tmp_path / "own", setup.own)
    frozen, own, ids = jax.device_put(
        (setup.frozen, jlora.load(tmp_path / "own"), IDS), device
    )
    out = setup.apply(frozen, own, ids)
    assert out.devices() == {device}
    close(np.asarray(out), np.asarray(setup.out(setup.own)))


def delete_adapter(setup, tmp_path):
    """Without the adapter that was in use, another one computes what it did."""
    if setup.method == "dora":  # no pool holds it
        with pytest.raises(jlora.PoolError, match="plain LoRA"):
            pool.create(setup.own, 2)
        return
    plain = [adapters.to_lora(x) for x in (setup.own, setup.other)]
    with pool.Cache(lambda name: plain[int(name)], plain[0], 2) as cache:
        for name in ("0", "1"):
            cache.acquire([name])
        cache.drop("1")
        assert cache.resident == ("0",)
        with cache.acquire(["0"] * 3) as batch:
            out = setup.rows(setup.frozen, batch.adapters, batch.ids, IDS)
    close(out, setup.out(setup.own))


def delete_inactive_adapter(setup, tmp_path):
    """A stack without one of its adapters computes what it did with the rest."""
    kept = adapters.stack(adapters.unstack(setup.stack)[:1])
    close(setup.out(adapters.select(kept, 0)), setup.out(setup.own))
    same(setup.out(Trainable()), setup.base)


def delete_unknown_adapter_raises(setup, tmp_path):
    """An adapter that does not exist is never another one."""
    out = setup.rows(setup.frozen, setup.stack, jnp.array([0, 2, 1]), IDS)
    assert jnp.isnan(out).all(axis=(1, 2)).tolist() == [False, True, False]


def unload_adapter(setup, tmp_path):
    """The frozen side is the base itself: nothing has to be taken out of it."""
    assert differs(setup.out(setup.own), setup.base)
    same(setup.frozen, setup.params)
    same(setup.jitted(setup.frozen, IDS), setup.base)


def updates(setup, trainable):
    """Returns what an adapter adds to each weight."""
    merged = jlora.merge(setup.frozen, trainable)
    return jax.tree.map(lambda x, y: x - y, merged, setup.params)


def check_combination(setup, weights):
    """Sums are exact, also of other ranks; cut ones have the rank asked for."""
    params = base_of(setup)
    both = [setup.own, setup.other]
    alone = adapters.linear([setup.own], [weights[0]], params=params)
    mixed = adapters.linear(both, weights[1:], params=params)
    one, two = (updates(setup, x) for x in both)
    close(updates(setup, alone), jax.tree.map(lambda x: weights[0] * x, one))
    close(
        updates(setup, mixed),
        jax.tree.map(lambda x, y: weights[1] * x + weights[2] * y, one, two),
    )
    plain = [adapters.to_lora(x, rank=2, params=params) for x in both]
    plain[1] = adapters.truncate(plain[1], 1)
    assert {f.rank for f in adapters.concat(plain).lora.values()} == {3}
    key = jax.random.key(0)
    for cut in (
        adapters.ties(plain, weights[1:], density=0.5, rank=3),
        adapters.dare(plain, weights[1:], density=0.5, rank=3, key=key),
        adapters.magnitude_prune(plain, weights[1:], density=0.5, rank=3),
    ):
        assert {f.rank for f in cut.lora.values()} == {3}
        assert bool(jnp.isfinite(setup.out(cut)).all())


def weighted_combination_of_adapters_lora(setup, tmp_path):
    check_combination(setup, (0.5, 1.5, 1.5))


def weighted_combination_of_adapters(setup, tmp_path):
    """The same with negative weights."""
    check_combination(setup, (-0.5, -0.8, -1.2))


def disable_adapter(setup, tmp_path):
    """Without an adapter it is the base to the bit, and with it what it was before."""
    before = setup.out(setup.own)
    assert differs(before, setup.base)
    same(setup.out(Trainable()), setup.base)
    same(setup.out(setup.own), before)


def adding_multiple_adapters_with_bias_raises(setup, tmp_path):
    """Two adapters may both train biases: each keeps its own. Sums need the base."""
    _, frozen, own = setup.split(train="**/bias")
    other = moved(own, 7)
    assert own.full.keys() == other.full.keys() != set()
    first = setup.apply(frozen, own, IDS)
    for adapter, out in ((other, setup.apply(frozen, other, IDS)), (own, first)):
        close(setup.jitted(jlora.merge(frozen, adapter), IDS), out)
    with pytest.raises(jlora.TreeError, match="params"):
        adapters.add([own, other])


def passing_input_embeds_works(setup, tmp_path):
    """The model's other arguments, such as embeddings, reach it."""
    inner = setup.params.get("params", setup.params)
    embeds = inner["embed"]["embedding"][IDS]
    close(setup.apply(setup.frozen, setup.own, embeds=embeds), setup.out(setup.own))


def lora_conversion(setup, tmp_path):
    """As plain LoRA an adapter computes the same; PEFT allows half of the variance."""
    plain = adapters.to_lora(setup.own, params=base_of(setup))
    assert {f.spec.method for f in plain.lora.values()} == {"lora"}
    close(setup.out(plain), setup.out(setup.own))


def get_base_model_state_dict(setup, tmp_path):
    """The base is a tree with its own paths, and another one may take its place."""
    same(setup.frozen, setup.params)
    double = jax.tree.map(lambda x: 2 * x, setup.params)
    close(
        setup.out(setup.own, double),
        setup.jitted(jlora.merge(double, setup.own), IDS),
        largest=1e-5,
    )


def check_config_json(setup, tmp_path):
    """The file says which model the adapter is for."""
    jlora.peft.save(tmp_path, setup.own, base_model="me/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"


HOLDS = (
    prepare_for_training,
    load_model_low_cpu_mem_usage,
    save_pretrained,
    save_pretrained_selected_adapters,
    save_pretrained_adapter_name_substring,
    from_pretrained_config_construction,
    load_multiple_adapters,
    merge_layers_fp16,
    merge_layers_nan,
    merge_layers,
    merge_layers_multi,
    merge_layers_is_idempotent,
    safe_merge,
    mixed_adapter_batches,
    generate_with_mixed_adapter_batches_and_beam_search,
    generate,
    generate_pos_args,
    generate_half_prec,
    training,
    inference_safetensors,
    training_layer_indexing,
    training_gradient_checkpointing,
    peft_model_device_map,
    delete_adapter,
    delete_inactive_adapter,
    delete_unknown_adapter_raises,
    unload_adapter,
    weighted_combination_of_adapters_lora,
    weighted_combination_of_adapters,
    disable_adapter,
    adding_multiple_adapters_with_bias_raises,
    passing_input_embeds_works,
    lora_conversion,
    get_base_model_state_dict,
    check_config_json,
)
HAS_NO_MEANING = {
    "model_attr": "there is no model object to have attributes; `save` is a function",
    "adapter_name": "an adapter is a value without a name, and no key holds one",
    "training_prompt_learning_tasks": "prompt learning adapts inputs, not weights",
    "weighted_combination_of_adapters_ia3": "IA3 is not a method of jlora",
    "check_modelcard": "`peft.save` writes no README.md, knowing no data or licence",
}


# Each property with each method. The two models take turns: each meets all of both.
TURNS = [
    pytest.param(holds, SETUPS[model, method], id=f"{holds.__name__}-{model}-{method}")
    for i, holds in enumerate(HOLDS)
    for j, method in enumerate(METHODS)
    for model in [list(MODELS)[(i + j) % 2]]
]


@pytest.mark.parametrize(("holds", "setup"), TURNS)
def test_peft_property(holds, setup, tmp_path):
    holds(setup, tmp_path)


def test_every_property_of_peft_is_in_the_table():
    named = [check.__name__ for check in HOLDS]
    assert len(named) == len(set(named))
    assert not set(named) & set(HAS_NO_MEANING)
    assert len(named) + len(HAS_NO_MEANING) == 40
    assert all(len(reason.split()) > 3 for reason in HAS_NO_MEANING.values())
