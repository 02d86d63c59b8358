"""`examples/chat` from end to end on a tiny random model: no network."""

import functools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import jlora
from examples.chat import hub, loop, metrics, model, packing, template, train
from examples.chat.config import parse
from examples.chat.data import read_json_lines
from examples.sharded.layout import batch_sharding, parse_mesh
from examples.sharded.loop import State, create_state
from tests.examples.chat_helpers import conversations, hub_directory
from tests.helpers import close, same

pytestmark = pytest.mark.once

SIZES = ["--length", "64", "--batch-size", "4", "--rank", "2", "--held-out", "8"]
SIZES += ["--tokens", "4", "--samples", "0"]


@pytest.fixture(autouse=True)
def promotion_as_users_have_it(standard_dtypes):
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return hub_directory(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    return conversations(tmp_path_factory.mktemp("data") / "talks.jsonl")


@pytest.fixture
def start(base, talks, tmp_path):
    """Runs the example with flags, on the tiny model."""

    def run(*flags, out="out"):
        files = ["--model", base, "--data", talks, "--out", tmp_path / out]
        train.main([*map(str, files), *SIZES, *flags])
        return tmp_path / out

    return run


def lines(out):
    return [*map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


def state_of(out):
    """A, B, moments and position of the newest checkpoint, as they lie on disk."""
    found = jlora.checkpoint.restore(out / "checkpoints")
    like = jax.eval_shape(optimizer().init, found.trainable)
    full = jlora.checkpoint.restore(out / "checkpoints", opt_state=like)
    return full.trainable, full.opt_state, full.position, full.step


def optimizer():
    return loop.make_optimizer(optax.constant_schedule(1.0), clip=1.0, weight_decay=0.0)


def test_one_command_makes_an_adapter_that_peft_reads(start, base, capsys):
    out = start("--steps", "12", "--lr", "0.02", "--eval-every", "5", "--samples", "2")
    told = capsys.readouterr().out
    assert "32 conversations to train on" in told
    assert "adapted: 2 of 2 blocks" in told
    found = json.loads((out / "results.json").read_text())
    losses = found["test_loss"]
    assert losses["after"] < losses["before"]
    assert f"{losses['before']:.3f} → {losses['after']:.3f}" in told
    assert len(found["samples"]) == 2
    assert "| asked | before | after | data |" in (out / "results.md").read_text()

    own = lines(out)
    steps = [line["step"] for line in own if "loss" in line]
    assert steps == [*range(1, 13)]
    assert [x["step"] for x in own if "test_loss" in x] == [0, 5, 10, 12]
    assert own[-1]["test_perplexity"] == pytest.approx(math.exp(losses["after"]))
    assert all(
        x["tokens_per_second"] > 0
        for x in own
        if x["step"] in (2, 3, 12) and "loss" in x
    )

    about = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert about["task_type"] == "CAUSAL_LM"
    assert about["base_model_name_or_path"] == str(base)
    assert {module.rpartition(".")[2] for module in about["target_modules"]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / "adapter" / name).read_bytes() == (base / name).read_bytes()
    config, params = hub.load(base, dtype="float32")
    _, merged = hub.load(out / "merged", dtype="float32")
    tokens = jnp.arange(24).reshape(2, 12)
    lora = jlora.checkpoint.restore(out / "checkpoints").trainable
    fn = functools.partial(model.forward, config=config)
    adapted = jlora.apply_lora(fn)(params, lora, tokens)
    close(fn(merged, tokens), adapted, 1e-4)
    assert float(jnp.abs(fn(params, tokens) - adapted).max()) > 0.01
    for name in ("generation_config.json", "tokenizer.json"):
        assert (out / "merged" / name).read_bytes() == (base / name).read_bytes()
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    assert tensors[name].shape == (2, 16)


def test_shares_of_blocks_weights_and_flops(base, capsys):
    """Counted by hand: width 16, hidden 24, heads 2 and 1 of 8, 2 layers, no ties."""
    config, params = hub.load(base, dtype="float32")
    fn = functools.partial(model.forward, config=config)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    lora = jlora.LoraConfig(rank=2, targets="**/{q,v}_proj/kernel")
    text = str(jlora.plan(fn, params, tokens, config=lora).coverage)
    q, k, v, o, mlp, vocab = 256, 128, 128, 256, 3 * 16 * 24, config.vocab * 16
    products = 2 * (q + k + v + o + mlp) + vocab
    every = products + vocab + 5 * 16
    weights, flops = (200 * (q + v) / n for n in (every, products))
    shares = f"{weights:.1f} % of the weights, {flops:.1f} % of a token's FLOPs"
    assert f"2 of 2 blocks, {shares}" in text


def test_some_blocks_and_a_tied_head(tmp_path):
    folder = hub_directory(tmp_path / "tied", tie_word_embeddings=True)
    config, params = hub.load(folder, dtype="float32", scan=False)
    fn = functools.partial(model.forward, config=config)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    lora = jlora.LoraConfig(rank=2, targets="**/layers/1/**/q_proj/kernel")
    text = str(jlora.plan(fn, params, tokens, config=lora).coverage)
    flops = 2 * (256 + 128 + 128 + 256 + 3 * 16 * 24) + config.vocab * 16
    assert "adapted: 1 of 2 blocks" in text
    assert f"{25600 / flops:.1f} % of a token's FLOPs" in text


def test_parts_of_a_batch_give_the_gradient_of_the_batch(base, talks):
    config, params = hub.load(base, dtype="float32")
    tok = template.load_tokenizer(base)
    documents, _ = template.encode_all(tok, read_json_lines(talks)[0], 64)
    batch = next(iter(packing.training(documents, rows=4, length=64, seed=0)))
    fn = functools.partial(model.forward, config=config)
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    lora = jlora.LoraConfig(rank=2)
    plan = jlora.plan(fn, params, tokens, tokens, tokens, config=lora)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    mesh, tx, apply = parse_mesh(""), optax.sgd(1.0), jlora.apply_lora(fn)
    found = []
    for parts in (1, 2, 4):
        state = create_state(jax.tree.map(jnp.copy, trainable), tx, mesh)
        step = loop.make_step(apply, tx, state)
        given = loop.placed(loop.in_parts(batch, parts), batch_sharding(mesh))
        found.append(step(frozen, state, given))
    learnt = batch.learnt.sum(1)
    assert len({*learnt.tolist()}) > 1  # a mean of means would be another number
    for state, measured in found[1:]:
        for a, b in zip(
            jax.tree.leaves((state, measured)), jax.tree.leaves(found[0]), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_loss_is_that_of_the_answers_of_each_document(base, talks):
    """Packed rows give the sum of what documents give one by one."""
    config, params = hub.load(base, dtype="float32")
    tok = template.load_tokenizer(base)
    documents, _ = template.encode_all(tok, read_json_lines(talks)[0][:7], 64)
    apply = lambda frozen, _, *args: model.forward(frozen, *args, config=config)  # noqa: E731
    batches = packing.once(documents, rows=2, length=64)
    where = batch_sharding(parse_mesh(""))
    packed = loop.evaluate(apply, params, jlora.Trainable(), batches, where)
    rows = np.zeros((7, 64), np.int32)  # a document a row, with nothing behind it
    for row, (tokens, _) in zip(rows, documents, strict=True):
        row[: len(tokens)] = tokens
    logits = model.forward(params, rows, config=config)
    logs = np.asarray(jax.nn.log_softmax(logits))
    total = count = 0
    for log, (tokens, learnt) in zip(logs, documents, strict=True):
        own = -log[np.arange(len(tokens) - 1), tokens[1:]][learnt[1:]]
        total, count = total + own.sum(), count + own.size
    assert packed == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "dora", "--quantize", "nf4"],
        ["--targets", "q_proj", "--train", "norm", "lm_head"],
        ["--dtype=bfloat16", "--remat", "--mesh=fsdp=2,tensor=2", "--accumulate=2"],
    ],
    ids=" ".join,
)
def test_flags_reach_what_they_name(start, flags, capsys):
    out = start("--steps", "3", *flags)
    told = capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())["test_loss"]
    assert found["after"] < found["before"]
    about = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert about["use_dora"] == ("dora" in flags)
    assert ("vLLM does not take this adapter" in told) == bool(
        {"dora", "norm"} & {*flags}
    )
    if "norm" in flags:
        assert all(name.endswith("q_proj") for name in about["target_modules"])
        assert {"lm_head", "model.norm"} <= {*about["modules_to_save"]}
    if "nf4" in flags:
        assert "nf4 of float32" in told


def test_a_killed_run_goes_on_as_if_nothing_had_happened(start, base, talks, tmp_path):
    """Killed in the middle of an epoch, which has 32 rows: four a step."""
    flags = ["--steps", "8", "--save-every", "2", "--no-merged"]
    whole = start(*flags, out="whole")
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "examples.chat", "--model", base, "--data", talks]
    command += ["--out", out, *SIZES, *flags]
    killed = subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    try:
        until(lambda: finished(out) >= 4, killed)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert 4 <= finished(out) < 8, "it was over before it could be killed"
    *_, step = state_of(out)
    with pytest.raises(
        SystemExit, match=rf"holds a run of {step} steps. Give --resume"
    ):
        start(*flags, out="killed")
    start(*flags, "--resume", out="killed")
    same(state_of(out)[:2], state_of(whole)[:2])
    assert state_of(out)[2:] == state_of(whole)[2:]
    keys = ("step", "loss", "gradient_norm", "test_loss")
    tables = [[[x.get(k) for k in keys] for x in lines(o)] for o in (out, whole)]
    assert tables[0] == tables[1]


def finished(out):
    """The newest step whose checkpoint is whole."""
    return max(
        (
            int(path.parent.name)
            for path in (out / "checkpoints").glob("*/commit_success.txt")
            if path.parent.name.isdecimal()
        ),
        default=0,
    )


def until(done, process, seconds=120):
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, "the run ended"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def test_a_run_goes_on_with_the_same_bits_on_another_mesh(start, monkeypatch):
    flags = ["--steps", "4", "--save-every", "2", "--no-merged"]
    first = start(*flags, "--mesh", "fsdp=4,tensor=2")
    saved = {}
    real = train.run.start

    def spy(*args):
        saved["begin"] = real(*args)
        saved["bits"] = jax.tree.map(np.asarray, saved["begin"].state)
        saved["next"] = next(iter([saved["begin"].data.get_state()]))
        return saved["begin"]

    monkeypatch.setattr(train.run, "start", spy)
    trainable, opt_state, position, step = state_of(first)
    start(*flags, "--mesh", "tensor=2", "--resume")
    assert saved["begin"].step == step == 4
    assert saved["next"] == position
    same(saved["bits"], jax.tree.map(np.asarray, State(trainable, opt_state)))
    leaf = saved["begin"].state.trainable.lora["model/layers/mlp/up_proj/kernel"].b
    assert dict(leaf.sharding.mesh.shape) == {"tensor": 2}


def test_losses_are_the_same_on_any_mesh(start):
    found = [
        [
            x["loss"]
            for x in lines(start("--steps", "3", *mesh, out=name))
            if "loss" in x
        ]
        for name, mesh in {
            "one": [],
            "eight": ["--mesh", "fsdp=4,tensor=2"],
        }.items()
    ]
    np.testing.assert_allclose(*found, rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch-size", "3", "--accumulate", "2"], "--accumulate 2 does not divide"),
        (["--resume", "--restart"], "choose one"),
        (["--rank", "0"], "0 is below 1"),
        (["--template-args", "[]"], r'write {"name": value}'),
        (["--quantize", "nf4", "--train", "norm"], "leave out --quantize"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_flags_that_cannot_be_are_told(flags, told, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    assert told in capsys.readouterr().err


def test_what_does_not_fit_is_told_without_a_traceback(start, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"4 rows .* cannot be cut into 8 equal parts"):
        start("--mesh", "fsdp=8")
    with pytest.raises(SystemExit, match=r"no config\.json\. --model takes"):
        start("--model", str(tmp_path))
    with pytest.raises(SystemExit, match=r"\*\*/query_proj/.* matched no"):
        start("--targets", "query_proj")
    start("--steps", "1")
    with pytest.raises(SystemExit, match=r"other settings:\n  lr: 0.001 -> 0.5"):
        start("--steps", "1", "--lr", "0.5", "--resume")
    other = conversations(tmp_path / "other.jsonl", 30)
    with pytest.raises(SystemExit, match=r"tokens of the data are others. If the file"):
        start("--steps", "1", "--data", str(other), "--resume")
    start("--steps", "1", "--lr", "0.5", "--restart")


def test_a_loss_that_is_not_finite_ends_the_run(start):
    with pytest.raises(SystemExit, match=r"The loss of step \d+ is nan. Lower --lr"):
        start("--steps", "6", "--lr", "1e30", "--clip", "1e30", "--save-every", "50")


def test_metrics_of_steps_that_are_done_again_are_taken_out(tmp_path):
    with metrics.Log(tmp_path, first=0, tensorboard=False) as log:
        for step in range(1, 5):
            log(step, loss=step / 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # half a line: the run was killed
    with metrics.Log(tmp_path, first=3, tensorboard=False) as log:
        log(4, loss=9.0)
    assert [(x["step"], x["loss"]) for x in lines(tmp_path)] == [
        *((1, 0.5), (2, 1.0), (3, 1.5), (4, 9.0))
    ]


def test_tensorboard_gets_the_metrics_or_its_absence_is_told(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with metrics.Log(tmp_path, first=0, tensorboard=True) as log:
        log(1, loss=1.0)
    assert "pip install tensorboardX" in capsys.readouterr().out
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(Path(folder).name)

        def add_scalar(self, *what):
            written.append(what)

        def close(self):
            written.append("closed")

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    with metrics.Log(tmp_path, first=0, tensorboard=True) as log:
        log(1, loss=1.0)
    assert written == ["tensorboard", ("loss", 1.0, 1), "closed"]


def test_the_rate_rises_and_falls():
    rate = loop.learning_rate(1.0, 10, warmup=0.2, schedule="linear")
    assert [round(float(rate(i)), 2) for i in range(11)] == [
        *(0.33, 0.67, 1.0, 0.88, 0.75, 0.62, 0.5, 0.38, 0.25, 0.12, 0.0)
    ]


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "fine_tune_llm.md", ROOT / "examples" / "chat" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page, base, tmp_path, monkeypatch):
    """Its data, its commands with a tiny model, and its Python."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(base)
    text = page.read_text()
    (found,) = re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "talks.jsonl").write_text(found)
    commands = re.findall(r"^python -m examples.chat (--.*)", text, re.MULTILINE)
    assert commands
    small = ["--steps", "1", "--length", "128", "--rank", "2", "--samples", "0"]
    for command in commands:
        flags = re.sub(r"--fake-devices \d+", "", command)  # there are eight
        train.main([*shlex.split(flags), *small])
        about = Path(command.partition("--out ")[2] or "runs/chat") / "adapter"
        assert (about / "adapter_config.json").exists()
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(block, {"jax": jax, "jlora": jlora, "optax": optax})
        position = jlora.checkpoint.restore("run").position
        assert position["parent"]
        assert Path("adapter/adapter_model.safetensors").exists()


def test_readme_names_each_flag():
    named = {*re.findall(r"`--([a-z-]+)", PAGES[1].read_text())}
    assert {name.replace("_", "-") for name in vars(parse([]))} <= named
