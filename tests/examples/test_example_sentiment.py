"""`examples/sentiment` on a tiny random model: no network, no real weights."""

import dataclasses
import hashlib
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file

import jlora
from examples.sentiment import assets, data, loop, report, train, weights
from examples.sentiment.config import Options, parse
from examples.sentiment.model import BertConfig, SentenceClassifier
from examples.sentiment.runs import Result, run
from examples.sentiment.task import LENGTH, Task, planned, pretrained, quantised

pytestmark = pytest.mark.once

SIZES = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=LENGTH,
)
TARGETS = {
    "params/encoder/layer_0/attention/query/kernel",
    "params/encoder/layer_0/attention/value/kernel",
}
HEAD = {"params/head/kernel", "params/head/bias"}


def hf_tensors() -> dict[str, np.ndarray]:
    """Random tensors under the names and in the shapes that PyTorch's BERT has."""
    wide, inner = SIZES.hidden_size, SIZES.intermediate_size
    shapes = {
        "embeddings.word_embeddings.weight": (SIZES.vocab_size, wide),
        "embeddings.position_embeddings.weight": (LENGTH, wide),
        "embeddings.token_type_embeddings.weight": (2, wide),
        "embeddings.LayerNorm.weight": (wide,),
        "embeddings.LayerNorm.bias": (wide,),
        "pooler.dense.weight": (wide, wide),
        "pooler.dense.bias": (wide,),
    }
    for layer in range(SIZES.num_hidden_layers):
        for name, out, into in (
            ("attention.self.query", wide, wide),
            ("attention.self.key", wide, wide),
            ("attention.self.value", wide, wide),
            ("attention.output.dense", wide, wide),
            ("intermediate.dense", inner, wide),
            ("output.dense", wide, inner),
        ):
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (out, into)
            shapes[f"encoder.layer.{layer}.{name}.bias"] = (out,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (wide,)
            shapes[f"encoder.layer.{layer}.{name}.bias"] = (wide,)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(scale=0.3, size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    return tensors | {"embeddings.position_ids": np.arange(LENGTH)[None]}


def examples(count: int, seed: int) -> data.Examples:
    """Random sentences; the words of the positive ones come from the upper half."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=count, dtype=np.int32)
    half = SIZES.vocab_size // 2
    ids = rng.integers(half, size=(count, LENGTH), dtype=np.int32)
    mask = np.arange(LENGTH)[None] < rng.integers(8, LENGTH + 1, size=(count, 1))
    return data.Examples(ids + half * labels[:, None], mask, labels)


@pytest.fixture(scope="module")
def task() -> Task:
    model = SentenceClassifier(SIZES)
    variables = pretrained(model, weights.from_hf(hf_tensors()), jax.random.key(0))
    return Task(model, variables, examples(48, 0), examples(12, 1), {"a.json": b"{}"})


def options(out: Path, *flags: str) -> Options:
    return parse(["--out", str(out), "--batch-size", "8", "--rank", "2", *flags])


def fine_tune(task: Task, out: Path, *flags: str, name: str = "lora") -> Result:
    chosen = options(out, *flags)
    config = train.configs(chosen)[name]
    return run(name, planned(task, config), task, chosen, full_lr=chosen.head_lr)


def assert_same_bits(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Weights and model


def test_from_hf_fills_the_whole_linen_tree(task: Task) -> None:
    tensors = hf_tensors()
    params = weights.from_hf(tensors)
    flat = flatten_dict(params, sep="/")
    wanted = flatten_dict(task.variables["params"], sep="/")
    assert flat.keys() == {path for path in wanted if not path.startswith("head/")}
    assert {path: x.shape for path, x in flat.items()} == {
        path: wanted[path].shape for path in flat
    }
    np.testing.assert_array_equal(
        flat["encoder/layer_0/up/kernel"],
        tensors["encoder.layer.0.intermediate.dense.weight"].T,
    )
    np.testing.assert_array_equal(
        flat["encoder/layer_0/attention_norm/scale"],
        tensors["encoder.layer.0.attention.output.LayerNorm.weight"],
    )


def test_to_hf_is_the_inverse(task: Task) -> None:
    back = weights.to_hf(task.variables["params"])
    tensors = hf_tensors()
    unused = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert back.keys() - tensors.keys() == {"classifier.weight", "classifier.bias"}
    assert tensors.keys() - back.keys() == unused
    for name in back.keys() & tensors.keys():
        np.testing.assert_array_equal(back[name], tensors[name])


def test_from_hf_names_every_unknown_tensor() -> None:
    tensors = hf_tensors()
    tensors["encoder.layer.0.attention.self.query.lora_A"] = np.ones((2, 2))
    tensors["encoder.relative_bias.weight"] = np.ones(3)
    with pytest.raises(ValueError, match=r"2 of 26 .*query\.lora_A.*relative_bias"):
        weights.from_hf(tensors)


def test_pretrained_names_missing_tensors_and_wrong_shapes() -> None:
    tensors = hf_tensors()
    del tensors["encoder.layer.0.output.dense.bias"]
    tensors["embeddings.LayerNorm.bias"] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="do not fit") as caught:
        pretrained(
            SentenceClassifier(SIZES), weights.from_hf(tensors), jax.random.key(0)
        )
    assert "layer_0/down/bias: has None, wants (16,)" in str(caught.value)
    assert "embeddings/norm/bias: has (3,), wants (16,)" in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_ignore_padding(task: Task, dtype: str) -> None:
    model = SentenceClassifier(SIZES, dtype=jnp.dtype(dtype))
    apply = jax.jit(model.apply)
    ids, mask, _ = task.test
    logits = apply(task.variables, ids, mask)
    other = apply(task.variables, np.where(mask, ids, 7), mask)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, other)


# Data


def test_batches_cover_an_epoch_and_depend_on_seed_and_step_alone() -> None:
    some = examples(10, 0)._replace(labels=np.arange(10, dtype=np.int32))
    batches = [data.batch_at(some, step, size=3, seed=0).labels for step in range(6)]
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert len(set(first)) == len(set(second)) == 9
    assert first.tolist() != second.tolist()
    again = data.batch_at(some, 4, size=3, seed=0).labels
    np.testing.assert_array_equal(again, batches[4])
    other = data.batch_at(some, 4, size=3, seed=1).labels
    assert other.tolist() != batches[4].tolist()


def test_split_keeps_reviews_apart() -> None:
    sentences = [data.Sentence(i // 3, i % 2, f"{i}") for i in range(60)]
    train_part, test_part = data.split_by_review(sentences, train=30, test=10)
    assert (len(train_part), len(test_part)) == (30, 12)
    assert not {s.review for s in train_part} & {s.review for s in test_part}


def test_read_sentences_takes_the_clear_ones_from_the_nested_archive(
    tmp_path: Path,
) -> None:
    lines = "1_1\t-0.9\tbad.\n1_2\t0.5\tneither.\n12_1\t2.0\tso \xa0good.\n"
    name = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
    inner = tar_of(name, lines.encode())
    path = tmp_path / "sdist.tar.gz"
    path.write_bytes(tar_of(assets.REVIEWS.inside[0], inner))
    assert data.read_sentences(path) == [
        data.Sentence(1, 0, "bad."),
        data.Sentence(12, 1, "so \xa0good."),
    ]


def tar_of(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


# Assets


def zip_of(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


CONTENT = zip_of("inner.zip", zip_of("dir/a.txt", b"text"))
ASSET = assets.Asset(
    package="some-package",
    version="1.0",
    filename="some_package-1.0.whl",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    megabytes=0.1,
    inside=("inner.zip",),
    prefix="dir/",
)


def bringing(content: bytes) -> Callable[[assets.Asset, Path], None]:
    def download(asset: assets.Asset, directory: Path) -> None:
        (directory / asset.filename).write_bytes(content)

    return download


def offline(asset: assets.Asset, directory: Path) -> None:
    raise assets.AssetError("no network")


def test_fetch_downloads_once_and_read_descends(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    path = assets.fetch(ASSET, cache, download=bringing(CONTENT))
    assert assets.read(ASSET, path, "a.txt") == b"text"
    assert assets.fetch(ASSET, cache, download=offline) == path
    assert list(cache.iterdir()) == [path]


def test_fetch_replaces_a_corrupt_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ASSET.filename).write_bytes(CONTENT[:-5])
    path = assets.fetch(ASSET, tmp_path, download=bringing(CONTENT))
    assert path.read_bytes() == CONTENT
    said = capsys.readouterr().out
    assert "partial or corrupt" in said
    assert "downloading some-package==1.0, 0.1 MB" in said


@pytest.mark.parametrize(
    ("download", "reason"),
    [(bringing(b"other"), "came with SHA-256"), (offline, "no network")],
)
def test_fetch_says_what_to_do_and_leaves_nothing_behind(
    tmp_path: Path, download: assets.Download, reason: str
) -> None:
    with pytest.raises(assets.AssetError, match=reason) as caught:
        assets.fetch(ASSET, tmp_path, download=download)
    message = str(caught.value)
    assert "https://pypi.org/project/some-package/1.0/#files" in message
    assert ASSET.sha256 in message
    assert str(tmp_path) in message
    assert not list(tmp_path.iterdir())


def test_fetch_any_takes_the_next_upload(tmp_path: Path) -> None:
    gone = dataclasses.replace(ASSET, filename="gone.whl", sha256="0")
    found = assets.fetch_any((gone, ASSET), tmp_path, download=bringing(CONTENT))
    assert found == (ASSET, tmp_path / ASSET.filename)
    assert assets.fetch_any((gone, ASSET), tmp_path, download=offline) == found


def test_pip_download_passes_on_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(
        '#!/bin/sh\necho "No module named pip" >&2; exit 1'
    )
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(assets.AssetError, match="No module named pip"):
        assets.pip_download(ASSET, tmp_path)


# Training


@pytest.mark.parametrize(
    ("first", "last", "epoch", "marks"),
    [
        (0, 12, 8, [0, 4, 8, 12]),
        (6, 12, 8, [6, 8, 12]),
        (0, 3, 8, [0, 3]),
        (0, 3, 1, [0, 1, 2, 3]),
        (12, 12, 8, [12]),
        (12, 10, 8, [12]),
    ],
)
def test_milestones_lie_between_first_and_last(
    first: int, last: int, epoch: int, marks: list[int]
) -> None:
    assert loop.milestones(first, last, epoch) == marks


# optax's Adam needs the standard promotion of dtypes

RECIPE = ("--epochs", "6", "--lr", "0.01", "--head-lr", "0.05")


@pytest.fixture(scope="module")
def trained(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run of 36 steps, with its checkpoint below the directory `whole`."""
    out = tmp_path_factory.getbasetemp() / "whole"
    with jax.numpy_dtype_promotion("standard"):
        return fine_tune(task, out, *RECIPE)


def test_training_lowers_the_loss(trained: Result) -> None:
    losses = [point.loss for point in trained.history.train]
    assert len(losses) == 36
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.1
    assert trained.history.test[-1].loss < trained.history.test[0].loss - 0.1


def test_training_moves_only_targets_and_head(task: Task, trained: Result) -> None:
    assert trained.trainable.lora.keys() == TARGETS
    after = flatten_dict(jlora.merge(trained.frozen, trained.trainable), sep="/")
    base = flatten_dict(task.variables, sep="/")
    moved = {path for path in base if not np.array_equal(base[path], after[path])}
    assert moved == TARGETS | HEAD


@pytest.mark.usefixtures("standard_dtypes")
def test_resumed_run_equals_an_uninterrupted_one(
    task: Task,
    trained: Result,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    fine_tune(task, tmp_path, *RECIPE, "--steps", "9")
    resumed = fine_tune(task, tmp_path, *RECIPE, "--resume")
    assert_same_bits(resumed.trainable, trained.trainable)
    assert resumed.history.train == trained.history.train
    assert resumed.history.test[-1] == trained.history.test[-1]
    template = loop.make_optimizer(lr=0.01, full_lr=0.05).init(trained.trainable)
    whole, taken_up = (
        jlora.checkpoint.restore(out / "lora", opt_state=template)
        for out in (tmp_path_factory.getbasetemp() / "whole", tmp_path)
    )
    assert whole.step == taken_up.step == 36
    assert_same_bits(whole.opt_state, taken_up.opt_state)


@pytest.mark.usefixtures("standard_dtypes")
def test_full_fine_tune_moves_all_and_leaves_the_base_model_alone(
    task: Task, tmp_path: Path
) -> None:
    before = jax.tree.map(np.array, task.variables)
    result = fine_tune(task, tmp_path, "--full", "--steps", "2", name="full")
    assert_same_bits(task.variables, before)
    base = flatten_dict(before, sep="/")
    assert result.trainable.full.keys() == base.keys()
    assert not any(
        np.array_equal(x, base[path]) for path, x in result.trainable.full.items()
    )


@pytest.mark.usefixtures("standard_dtypes")
def test_quantised_base_is_shown_trained_and_merged(task: Task, tmp_path: Path) -> None:
    config = train.configs(options(tmp_path))["lora"]
    coded = quantised(task, planned(task, config), "nf4")
    assert "nf4 of float32[16,16]" in str(planned(coded, config))
    result = fine_tune(coded, tmp_path, "--quantize", "nf4", "--steps", "2")
    merged = train.merge_and_check(coded, result, options(tmp_path))
    assert jax.tree.structure(merged) == jax.tree.structure(task.variables)


def test_full_fine_tune_of_codes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        options(tmp_path, "--full", "--quantize", "nf4")
    assert "codes cannot be trained" in capsys.readouterr().err


@pytest.mark.usefixtures("standard_dtypes")
def test_resume_with_other_settings_is_refused(task: Task, tmp_path: Path) -> None:
    fine_tune(task, tmp_path, "--steps", "1")
    with pytest.raises(SystemExit, match=r"other settings:\n  lr: 0\.001 -> 0\.5\n"):
        fine_tune(task, tmp_path, "--steps", "2", "--lr", "0.5", "--resume")


@pytest.mark.usefixtures("standard_dtypes")
def test_one_program_serves_all_steps(task: Task, tmp_path: Path) -> None:
    loop.train_step.clear_cache()
    fine_tune(task, tmp_path, "--epochs", "2")
    assert loop.train_step._cache_size() <= 1  # JAX may have forgotten it


@pytest.fixture
def tiny(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags for `main`, which then finds the tiny task instead of fetching."""
    monkeypatch.setattr(assets, "fetch_any", lambda *_: (ASSET, tmp_path))
    monkeypatch.setattr(assets, "fetch", lambda *_: tmp_path)
    monkeypatch.setattr(train, "load_task", lambda *_, **__: task)
    flags = ["--batch-size", "8", "--rank", "2", "--epochs", "1"]
    return ["--out", str(tmp_path), *flags]


@pytest.mark.usefixtures("standard_dtypes")
def test_main_leaves_adapter_merged_model_table_and_curves(
    task: Task, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(tiny)
    said = capsys.readouterr().out

    base = flatten_dict(task.variables["params"], sep="/")
    file = tmp_path / "merged" / "model.safetensors"
    with safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}
    params = weights.from_hf(load_file(file))
    flat = flatten_dict(params, sep="/")
    moved = {f"params/{k}" for k in flat if not np.array_equal(flat[k], base[k])}
    assert moved == TARGETS | HEAD
    assert (tmp_path / "merged" / "a.json").read_bytes() == b"{}"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "merged-orbax").is_dir()
    adapter = jlora.checkpoint.restore(tmp_path / "adapter").trainable
    trained = jlora.checkpoint.restore(tmp_path / "lora").trainable
    assert_same_bits(adapter, trained)
    summary = json.loads((tmp_path / "results.json").read_text())
    assert summary["accuracy"].keys() == {"head-only", "lora"}
    table = (tmp_path / "results.md").read_text()
    assert table in said
    assert len(table.splitlines()) == 4
    assert "params/encoder/layer_0/attention/query/kernel" in said


def test_main_ends_with_the_hint_of_a_wrong_target(tiny: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"none .*nearest: .*attention/query/kernel"):
        train.main([*tiny, "--targets", "**/attention/qery/kernel"])


def test_main_ends_with_what_to_do_without_a_network(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(asset: assets.Asset, cache: Path) -> Path:
        raise assets.AssetError("no network: do this")

    monkeypatch.setattr(assets, "fetch", fetch)
    with pytest.raises(SystemExit, match="no network: do this"):
        train.main(tiny)


def test_merge_that_changes_logits_is_refused(
    task: Task, trained: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = train.merge_and_check(task, trained, options(tmp_path))
    assert jax.tree.structure(merged) == jax.tree.structure(task.variables)
    monkeypatch.setattr(jlora, "merge", lambda *_: task.variables)
    with pytest.raises(RuntimeError, match="Merging changed a logit"):
        train.merge_and_check(task, trained, options(tmp_path))


# Report


def test_running_mean_of_a_constant_is_that_constant() -> None:
    means = report.running_mean(np.full(5, 3.0))
    np.testing.assert_allclose(means, 3.0, rtol=1e-12)


def test_help_shows_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    said = capsys.readouterr().out
    assert "rank of A and B (default: 8)" in said
