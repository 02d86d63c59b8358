"""`examples/earlier_methods`: its models are the examples', its methods start there."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from benchmarks import learnt
from examples.chat import model as chat
from examples.chat.decoder_config import DecoderConfig, Rope
from examples.earlier_methods import decoder, encoder, methods, run, sweep, task, train
from examples.earlier_methods.counts import DIFFERENT, EQUAL, count
from examples.earlier_methods.hooks import Extra
from examples.earlier_methods.methods.prefix import folded
from examples.earlier_methods.rows import FULL, LORA, ROWS, Row
from examples.earlier_methods.task import DECODER, ENCODER, split_task
from examples.sentiment.model import BertConfig, SentenceClassifier
from tests.helpers import random_like

pytestmark = pytest.mark.once
BERT = BertConfig(11, 8, 3, 2, 12, 10)
LLAMA = DecoderConfig(
    vocab=13,
    width=8,
    hidden=12,
    layers=3,
    heads=4,
    kv_heads=2,
    head=2,
    eps=decoder.EPSILON,
    tied=True,
    ropes=(Rope(decoder.THETA),),
)
IDS = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0], [3, 3, 9, 1, 0]], np.int32)
MASK = IDS > 0


@pytest.fixture(autouse=True)
def promotion_as_users_have_it(standard_dtypes):
    with jax.numpy_rank_promotion("allow"):
        yield


def test_encoder_is_the_sentiment_example():
    model = SentenceClassifier(BERT, 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS, MASK)
    variables = random_like(shapes)
    wanted = jax.jit(model.apply)(variables, IDS, MASK)

    @jax.jit
    def logits(params, ids, mask):
        return encoder.classify(params, encoder.embed(params, ids), mask, heads=2)

    found = logits(encoder.from_linen(variables["params"]), IDS, MASK)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_decoder_is_the_chat_example():
    params = random_like(chat.shapes(LLAMA))
    ids, mask = IDS[:, ::-1], MASK[:, ::-1]  # padded on the left
    whole = functools.partial(chat.forward, config=LLAMA, last=2)
    wanted = jax.jit(whole)(params, ids, None, mask)

    @jax.jit
    def logits(params, ids, mask):
        x = decoder.embed(params, ids)
        return decoder.predict(params, x, mask, heads=4, last=2)

    found = logits(decoder.from_chat(params), ids, mask)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def small(name, upper=2):
    """A task on a tiny random model, and the stream before its first layer."""
    rng = np.random.default_rng(0)

    def part(count):
        ids = rng.integers(1, 11, (count, 5)).astype(np.int32)
        labels = ids[:, -2:] if name == DECODER else ids[:, :1] % 2
        return ids, ids > 0, labels, np.ones(labels.shape)

    parts = [part(count) for count in (48, 12, 70)]
    if name == DECODER:
        params = decoder.from_chat(random_like(chat.shapes(LLAMA), scale=0.3))
        run = functools.partial(decoder.run, heads=4)
        model = functools.partial(decoder.predict, heads=4, last=2)
        return split_task(
            name, decoder.embed, run, model, params, parts, upper=upper, chunk=16
        )
    model = SentenceClassifier(BERT, 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS, MASK)
    params = encoder.from_linen(random_like(shapes, scale=0.3)["params"])
    run = functools.partial(encoder.run, heads=2)
    model = functools.partial(task.classify, heads=2)
    return split_task(
        name, encoder.embed, run, model, params, parts, upper=upper, chunk=16
    )


SAME = {
    "head only": methods.head_only,
    "full": methods.full,
    "BitFit": methods.bitfit,
    "Houlsby": lambda: methods.houlsby(3),
    "Pfeiffer": lambda: methods.pfeiffer(3),
    "Lin": lambda: methods.pfeiffer(3, norm=True),
    "IA3": methods.ia3,
    "LoRA": lambda: methods.lora(2),
    "DoRA": lambda: methods.dora(2),
}
ADDED = {
    "prompt": lambda: methods.prompt(3),
    "prefix": lambda: methods.prefix(3),
    "reparametrised": lambda: methods.through(3, 4),
}
"""Methods whose tokens are seen from the start."""


@pytest.fixture(scope="module")
def encoded():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return small(ENCODER)


@pytest.fixture(scope="module")
def decoded():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return small(DECODER)


def logits_of(found, method, key=0):
    """The model's logits on its first examples, and those of the method's start."""
    some = found.train.first(4)
    inputs = (some.x, some.mask)

    @jax.jit
    def both(params):
        start = method.start(jax.random.key(key), found.model, params, inputs)
        adapted = method.adapted(found.model)
        return found.model(params, *inputs), adapted(*start, *inputs)

    return both(found.params)


def test_lower_layers_run_once(encoded):
    """Their stream through the upper layers is the whole model's result."""
    whole = small(ENCODER, upper=3)
    some, same = (found.test.first(4) for found in (encoded, whole))
    np.testing.assert_allclose(
        jax.jit(encoded.model)(encoded.params, some.x, some.mask),
        jax.jit(whole.model)(whole.params, same.x, same.mask),
        atol=1e-5,
    )


def test_methods_start_at_the_model(encoded):
    some = encoded.train.first(4)
    inputs = (some.x, some.mask)

    @jax.jit
    def every(params):
        each = {}
        for name, make in SAME.items():
            method = make()
            start = method.start(jax.random.key(0), encoded.model, params, inputs)
            each[name] = method.adapted(encoded.model)(*start, *inputs)
        return encoded.model(params, *inputs), each

    base, each = every(encoded.params)
    for name, found in each.items():
        np.testing.assert_allclose(found, base, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ADDED)
def test_added_tokens_are_seen(name, encoded, decoded):
    for where in (encoded, decoded):
        base, found = logits_of(where, ADDED[name]())
        assert found.shape == base.shape
        assert np.abs(found - base).max() > 1e-5


def test_prompt_of_a_text_is_that_text_before_the_others():
    whole = small(DECODER, upper=3)
    table = whole.params["embeddings"]
    some = whole.test.first(3)
    before = jnp.array([4, 7])
    prompted = functools.partial(whole.model, extra=Extra(prompt=table[before]))
    found = jax.jit(prompted)(whole.params, some.x, some.mask)
    x = jnp.concatenate([jnp.broadcast_to(table[before], (3, 2, 8)), some.x], axis=1)
    wanted = jax.jit(whole.model)(whole.params, x, jnp.ones(x.shape[:2], bool))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_folded_prefix_is_the_trained_one(encoded):
    some = encoded.train.first(4)
    inputs, made = (some.x, some.mask), methods.through(3, 4)
    frozen, trained = made.start(
        jax.random.key(0), encoded.model, encoded.params, inputs
    )
    kept = {**trained, "added": folded(trained["added"])}
    plain = methods.prefix(3).adapted(encoded.model)
    np.testing.assert_array_equal(
        plain(frozen, kept, *inputs),
        made.adapted(encoded.model)(frozen, trained, *inputs),
    )


def test_merged_lora_is_the_models_program(encoded):
    some = encoded.train.first(4)
    inputs = (some.x, some.mask)
    method = methods.lora(2)
    start = method.start(jax.random.key(0), encoded.model, encoded.params, inputs)
    merged = jlora.merge(*start)
    model = jax.jit(encoded.model)
    base = model.lower(encoded.params, *inputs).as_text()
    assert model.lower(merged, *inputs).as_text() == base
    adapted = jax.jit(method.adapted(encoded.model))
    assert adapted.lower(*start, *inputs).as_text() != base


PLAN = sweep.Plan(examples=48, steps=4, size=4, head_rate=0.05)


def test_members_train_as_if_alone(encoded):
    def train(rates, seeds):
        return sweep.train(
            encoded, methods.lora(2), encoded.params, PLAN, rates, seeds, name="lora"
        )

    _, together, losses = train([0.01, 0.1], [0, 1])
    _, alone, own = train([0.1], [1])
    np.testing.assert_allclose(losses[:, 1:], own, rtol=1e-4)
    both = zip(
        jax.tree.leaves(sweep.select(together, 1)), jax.tree.leaves(alone), strict=True
    )
    for one, other in both:
        np.testing.assert_allclose(one, other, atol=1e-3)  # steps have 0.1


def test_command_tunes_reads_the_test_part_last_and_goes_on(
    encoded, monkeypatch, tmp_path, capsys
):
    done, fit, judge = [], sweep.train, sweep.evaluate

    def trained(*args, **kwargs):
        done.append("train")
        return fit(*args, **kwargs)

    def evaluated(*args):
        done.append("test" if args[-1] is encoded.test else "validation")
        return judge(*args)

    def row(**base):
        make = functools.partial(methods.pfeiffer, 2)
        return Row(make, ("base",), steps=2, size=4, examples=48, **base)

    monkeypatch.setattr(sweep, "train", trained)
    monkeypatch.setattr(sweep, "evaluate", evaluated)
    monkeypatch.setattr(train, "load_task", lambda name, cache: encoded)
    rows = {"dense": row(), "in nf4": row(base="nf4")}
    monkeypatch.setitem(ROWS, ENCODER, rows)
    argv = ["--task", ENCODER, "--rates", "1e-9", "0.1", "--seeds", "0", "1"]
    argv += ["--results", str(tmp_path)]
    train.main([*argv, "--rows", "dense"])
    # The grid, rates beyond it, and the other seeds; the test part is read last.
    further = ["train", "validation"] * (len(done) // 2 - 2)
    assert done == ["train", "validation", *further, "train", "validation", "test"]
    path = tmp_path / "encoder.jsonl"
    (found,) = run.read(path)
    losses = found["validation"]["loss"]
    assert len(losses) == len(found["rates"]) > 2
    assert found["rate"] == found["rates"][losses.index(min(losses))]
    assert len(found["test"]["score"]) == 2

    path.write_text(path.read_text() + '{"row": "cut')  # killed while it wrote
    monkeypatch.setattr(run, "run", lambda name, *_, **__: {**found, "row": name})
    train.main(["base", *argv])
    assert [f["row"] for f in run.read(path)] == ["dense", "in nf4"]
    shown = capsys.readouterr().out
    assert "row 1 of 1, in nf4" in shown
    assert "Quantised base, encoder" in shown


@pytest.mark.parametrize(
    ("losses", "further"),
    [
        ([3.0, 2.0, 1.0], 0.8),
        ([1.0, 2.0, 3.0], 0.05),
        ([2.0, 1.0, np.nan], None),
        ([5.0, 4.0, 3.0, 2.0, 1.0, 0.5], None),  # three were tried beyond
        ([1.0], None),
    ],
)
def test_a_grid_goes_on_while_its_best_rate_is_at_an_end(losses, further):
    rates = [0.05, 0.2, 0.4, 0.8, 1.6, 3.2] if len(losses) > 3 else [0.1, 0.2, 0.4]
    tried = [
        run.Tried(rate, loss, 0.0, np.zeros(1), None)
        for rate, loss in zip(rates, losses, strict=False)
    ]
    found = run.next_rate(tried, min(len(losses), 3))
    assert found == (None if further is None else pytest.approx(further))


def test_base_is_quantised_where_a_row_says_so(encoded):
    stored = run.stored(encoded, "int8")["layers"]
    assert all(isinstance(stored[name]["kernel"], jlora.Quantized) for name in LINEAR)
    assert run.stored(encoded, "float32") is encoded.params


LINEAR = ("query", "key", "value", "output", "up", "down")


@pytest.mark.parametrize("reported", EQUAL + DIFFERENT, ids=lambda r: r.row)
def test_parameters_of_the_papers_tables(reported):
    found = count(reported.method, reported.size)
    assert found == reported.trained
    digits = len(reported.millions.split(".")[1])
    equal = f"{found / 1e6:.{digits}f}" == reported.millions
    assert equal == (reported in EQUAL)


def test_readme_says_how_many_of_the_papers_figures_follow():
    counted = f"{len(EQUAL)} of {len(EQUAL + DIFFERENT)} are what the paper prints"
    assert counted in (learnt.ROOT / "examples/earlier_methods/README.md").read_text()


def test_rates_rise_and_fall():
    rates = [sweep.schedule(step, 40) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[4:]))


def test_each_epoch_has_each_example_once():
    plan = PLAN._replace(examples=12, steps=6)
    rows = sweep.order(plan, 0)
    for epoch in (rows[:3], rows[3:]):
        assert sorted(epoch.ravel()) == list(range(12))
    assert (rows != sweep.order(plan, 1)).any()


def test_documents_hold_the_committed_figures():
    """README and the examples quote one table; the page is tested with its command."""
    quoting = learnt.quoting()
    assert {path.parent.name for path in quoting} >= {"sentiment", "earlier_methods"}
    assert learnt.ROOT / "README.md" in quoting
    for path in quoting:
        assert learnt.summary() in path.read_text(), path


def test_advice_follows_from_the_figures():
    """What `docs/choose.md` says of rates, ranks and weights."""
    found = {
        name: {f["row"]: f for f in run.read(run.RESULTS / f"{name}.jsonl")}
        for name in (ENCODER, DECODER)
    }

    def score_of(row, name=ENCODER):
        scores = np.array(found[name][row]["test"]["score"])
        return scores.mean(), scores.std(ddof=1) / len(scores) ** 0.5

    def level(one, other, name=ENCODER):
        (a, da), (b, db) = score_of(one, name), score_of(other, name)
        return abs(a - b) <= da + db

    for rows in found.values():
        assert rows[LORA]["rate"] == pytest.approx(5 * rows[FULL]["rate"])
    others = ["DoRA, rank 8", "adapters, Houlsby", "adapters, Pfeiffer", "BitFit"]
    assert all(level(LORA, row) for row in [*others, "prompt", "prefix", FULL])
    for behind in ("head only", "IA3"):
        assert not level(LORA, behind)
    assert level("LoRA, rank 1", "LoRA, rank 64")
    assert level(LORA, "all linear, rank 2")
    assert found[ENCODER]["LoRA, rank 64"]["rate"] == 0.005
    for row in ("rsLoRA, rank 64", "alpha 64, rank 64"):
        assert found[ENCODER][row]["rate"] == 0.001
        assert level(row, "LoRA, rank 64")
    assert level("LoRA, all linear, rank 8", FULL, DECODER)
    rows = found[DECODER]
    behind = [LORA, "DoRA, rank 8", "IA3", "prompt", "prefix"]
    assert not any(level(row, FULL, DECODER) for row in behind)
    for row in behind:
        assert min(rows[row]["test"]["loss"]) > np.mean(rows[FULL]["test"]["loss"])
    for row in ("adapters, Houlsby", "adapters, Pfeiffer"):
        losses = [rows[name]["test"]["loss"] for name in (row, FULL)]
        assert abs(np.subtract(*map(np.mean, losses))) < max(map(np.std, losses))
    for row in ("prompt", "prefix"):
        assert all(found[task][row]["rate"] >= 0.1 for task in found)
    for row, more in (("adapters, Houlsby", 1), ("LoRA, all linear, rank 2", 4 / 3)):
        assert max(rows[row]["test"]["loss"]) < min(rows[LORA]["test"]["loss"])
        assert rows[row]["trained"] <= more * rows[LORA]["trained"]
