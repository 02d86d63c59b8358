"""Each benchmark runs at a tiny size and writes the figures that the report reads."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest

import jlora
from benchmarks import (
    adapters,
    common,
    earlier,
    floor,
    gpu,
    growth,
    headlines,
    learnt,
    llms,
    models,
    overheads,
    quantised,
    report,
    scale,
    slices,
    tpu,
    tpu_sweep,
)
from examples.earlier_methods.counts import Size

pytestmark = [pytest.mark.usefixtures("standard_dtypes"), pytest.mark.once]
TINY = models.Size(width=16, layers=1, batch=1, length=64, vocab=32, head=8)
SMALL = ("--width", "64", "--layers", "1", "--rounds", "1")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with what each script wrote at a tiny size."""
    folder = tmp_path_factory.mktemp("results")
    small = "--batch 1 --length 16"
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(jax, "clear_caches", lambda: None)  # other tests use them
        for script, own in (
            (floor, small),
            (growth, f"{small} --axis rank"),
            (overheads, "--compiled 1 --most 1"),
        ):
            name = script.__name__.rpartition(".")[2]
            argv = [name, "--json", str(folder / f"{name}.json"), *SMALL, *own.split()]
            patch.setattr(sys, "argv", argv)
            script.main()
    return folder


def read(results, name):
    """Returns what a script wrote, with the fields that all have."""
    found = json.loads((results / f"{name}.json").read_text())
    assert found["environment"].keys() >= {"jax", "processor", "date", "commit"}
    return found


@pytest.mark.parametrize("kind", models.KINDS)
def test_steps_of_each_kind_stage(kind):
    steps = common.training_steps(models.KINDS[kind](TINY), 2, abstract=True)
    assert tuple(steps) == common.STEPS
    for step, state, rest in steps.values():
        step.trace(state, *rest)
    trained = {name: common.nbytes(step[1][0]) for name, step in steps.items()}
    assert trained[common.JLORA] == trained["side path, autodiff"]
    assert trained[common.JLORA] == trained["merge on the fly"]
    assert trained[common.STRICT] < trained[common.JLORA]


@pytest.mark.parametrize("kind", models.KINDS)
def test_merged_parameters_give_the_base_program(kind):
    found = floor.inference(models.KINDS[kind](TINY), rank=2, rounds=1)
    assert found["same_program"]
    assert found["seconds"].keys() == {"base", "unmerged"}


def test_program_text_has_no_names():
    class Program:
        def as_text(self):
            return '%add.7 = f32[] add(%x.1, %x.1), metadata={op_name="a"}'

    assert floor.unnamed(Program()) == "%0 = f32[] add(%1, %1)"


def test_stored_base_takes_fewer_bytes():
    params = {"up": jnp.ones((512, 64)), "head": jnp.ones((64, 4))}
    fn = lambda p, x: x @ p["up"] @ p["head"]  # noqa: E731
    config = jlora.LoraConfig(targets=(), train="head")
    plan = jlora.plan(fn, params, jnp.ones((1, 512)), config=config)
    frozen, _ = jlora.split(jax.random.key(0), params, plan)
    n, blocks = 512 * 64, 8 * 64
    sizes = {
        "float32": 4 * n,
        "bfloat16": 2 * n,
        "int8": n + 4 * 64,
        "nf4": n // 2 + 4 * blocks,
        "nf4, double": n // 2 + blocks + 4 * 8 + 4,
    }
    for base, size in sizes.items():
        assert common.nbytes(common.stored(frozen, plan, base)) == size, base


def test_table_of_headlines_has_means_and_seeds():
    run = {"base": "nf4", "base_bytes": 2_000_000, "before": {"loss": 5.0, "right": 0}}
    runs = [{**run, "after": {"loss": x, "right": x / 10}} for x in (3.0, 4.0)]
    _, (line,) = headlines.columns(runs)
    assert line == ("nf4", "2 MB", "5.000", "3.500", "3.000 / 4.000", "0.0%", "35.0%")


def test_rows_measured_later_say_where():
    env = {"jax": "1", "processor": "x", "cores": 2, "date": "d", "device": "cpu"}
    loss = {"loss": 1.0, "right": 0.5}
    result = {"base": "nf4", "base_bytes": 1, "seed": 0, "before": loss, "after": loss}
    result["environment"] = {**env, "commit": "new"}
    names = ("rank", "steps", "batch_size", "lr", "test", "dtype")
    settings = dict.fromkeys(names, 1)
    found = {"settings": settings, "results": [result]}
    text = learnt.headlines_section({**found, "environment": {**env, "commit": "old"}})
    assert "commit old" in text
    assert "The last row: *JAX 1, x, 2 cores, d, commit new.*" in text


def test_merged_lora_costs_nothing_and_earlier_methods_do(monkeypatch):
    some = {name: earlier.METHODS[name] for name in (earlier.LORA, "prefix")}
    monkeypatch.setattr(earlier, "METHODS", some)
    inputs = earlier.batch(2, 5)
    with jax.numpy_rank_promotion("allow"):
        found = earlier.inference(Size(64, 1))
        programs = {
            name: fn.lower(*trees, *inputs).as_text()
            for name, (fn, trees) in found.items()
        }
    base = programs.pop(earlier.FROZEN)
    assert [name for name, text in programs.items() if text == base] == [earlier.MERGED]


def test_columns_of_earlier_methods_are_multiples():
    row = {"trained": 8, "kept_bytes": 32, "temp_bytes": 2**20}
    rows = [{"row": earlier.LORA, **row}, {"row": "full", **row, "temp_bytes": 2**21}]
    assert earlier.training_columns(rows)[1][1][3:] == ("–", "–", "2.0", "2.00")
    rows = [
        {"row": name, "inputs": at, "flops": flops}
        for name, flops in ((earlier.FROZEN, 10.0), ("prefix", 11.0))
        for at in earlier.INPUTS
    ]
    assert earlier.inference_columns(rows, "flops")[1][1] == ("prefix", *["1.10"] * 4)


def test_a_sweep_that_goes_on_compiles_no_floor_again(tmp_path, monkeypatch):
    seen = []

    def compiled(case, step):
        seen.append((case.title, step))
        return {"flops": 1.0, "bytes": 1.0, "peak_bytes": 1.0}

    monkeypatch.setattr(tpu_sweep, "compiled", compiled)
    monkeypatch.setattr(tpu, "COMPILER", "json")
    monkeypatch.setattr(tpu, "environment", common.environment)
    path = tmp_path / "sweep.json"
    for title in ("rank 8", "width 1024", "rank 64"):
        argv = ["tpu_sweep", "--json", str(path), "--cases", title]
        monkeypatch.setattr(sys, "argv", argv)
        tpu_sweep.main()
    at_8 = [("rank 8", common.FLOOR), ("rank 8", common.JLORA)]
    wider = [("width 1024", common.FLOOR), ("width 1024", common.JLORA)]
    assert seen == [*at_8, *wider, ("rank 64", common.JLORA)]
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == ["width 1024", "rank 8", "rank 64"]


def test_slope():
    assert growth.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert growth.slope([1, 2], [0, 1]) is None


@pytest.mark.slow
def test_floor(results):
    (case,) = read(results, "floor")["cases"]
    assert case["case"]["width"] == 64
    assert [row["step"] for row in case["training"]] == list(common.STEPS)
    for row in case["training"]:
        assert row.keys() == {"step", *common.COMPILER, "optimizer_bytes", "seconds"}
        assert row["peak_bytes"] > row["temp_bytes"] > 0
    assert case["inference"]["same_program"]


@pytest.mark.slow
def test_growth(results):
    slopes = {row["step"]: row for row in read(results, "growth")["slopes"]}
    assert slopes[growth.ADDED]["flops"] == pytest.approx(1, abs=0.2)
    assert slopes[common.FLOOR]["flops"] == pytest.approx(0, abs=1e-6)
    assert slopes[common.JLORA]["seconds"] is not None


@pytest.mark.slow
def test_overheads(results):
    found = read(results, "overheads")
    assert found["staging"].keys() >= {"plan", "gradient, adapted"}
    assert found["bytes"]["adapter"] > 0
    assert {row["axis"] for row in found["growth"]} < overheads.SWEEPS.keys()


@pytest.mark.slow
def test_adapters(monkeypatch, tmp_path):
    small = "--width 32 --layers 1 --tokens 16 --row-tokens 2 --rows 4 --rounds 1"
    argv = ["adapters", "--json", str(tmp_path / "adapters.json"), *small.split()]
    monkeypatch.setattr(sys, "argv", [*argv, "--capacity", "3", "--adapters", "2"])
    adapters.main()
    found = read(tmp_path, "adapters")
    (sweep,) = found["sweep"]
    assert sweep["peak_bytes"]["all"] > sweep["peak_bytes"]["one"]
    assert found["pool"]["compiled"] == 0
    (slots,) = found["slots"]
    assert slots["speed_up"] > 0
    report.write(tmp_path, tmp_path)
    text = (tmp_path / "performance_details.md").read_text()
    assert "A pool of 3 adapters" in text
    assert "| 32 | all linear | 4 × 2 |" in text


@pytest.mark.parametrize("script", [gpu, scale, slices, tpu])
def test_without_the_compiler(script, monkeypatch, tmp_path, capsys):
    for own in (gpu, scale, tpu):
        monkeypatch.setattr(own, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["any", "--json", str(tmp_path / "any.json")])
    script.main()
    assert "not installed: pip install" in capsys.readouterr().out
    assert not (tmp_path / "any.json").exists()


@pytest.mark.slow
def test_report(results, tmp_path):
    report.write(results, tmp_path)
    text = (tmp_path / "performance.md").read_text()
    details = (tmp_path / "performance_details.md").read_text()
    assert "## A training step on CPU\n" in text
    for title in ("Each model on CPU", "How cost grows", "Overheads"):
        assert f"## {title}\n" in details
    assert "TPU v5e" not in text + details  # it did not run
    assert (tmp_path / "performance-floor.svg").exists()
    assert str(results) not in text + details
    first = (tmp_path / "performance-growth.svg").read_bytes()
    report.write(results, tmp_path)
    assert (tmp_path / "performance-growth.svg").read_bytes() == first


def test_the_pages_hold_the_committed_figures(tmp_path):
    filled = {page for page, *_ in report.FILLED}
    for name in filled:
        shutil.copy(report.DOCS / name, tmp_path)
    report.write(common.RESULTS, tmp_path)
    written = ("performance.md", "performance_details.md", "quality.md")
    for name in (*written, *filled):
        assert (tmp_path / name).read_text() == (report.DOCS / name).read_text()


@pytest.mark.parametrize("kind", ["bf16", "int8", "nf4 native"])
def test_steps_over_codes(kind):
    """Its gradient is that of A and B alone."""
    size = dataclasses.replace(TINY, width=64, dtype="bfloat16")
    shape = {"scanned": True, "remat": True}
    fn, args = quantised.steps(size, 2, [kind], **shape)[kind]()
    _, gradient = jax.eval_shape(fn, *args)
    assert jax.tree.structure(gradient) == jax.tree.structure(args[0])
    assert len(jax.tree.leaves(gradient)) == 14


@pytest.mark.parametrize("experts", [0, 4])
def test_large_models_on_shapes(experts):
    shape = llms.Shape(64, 128, 2, 4, 2, 16, 100, experts=experts)
    x, targets = llms.batch(2, 8)
    with jax.numpy_rank_promotion("allow"):
        out = jax.eval_shape(llms.logits, llms.weights(shape), x)
    assert out.shape == (2, 8, 100)
    assert jax.eval_shape(llms.loss, out, targets).shape == ()


def test_experts_give_what_each_would_give_alone():
    shape = llms.Shape(16, 32, 1, 2, 2, 8, 10, experts=4)
    layers = common.filled(llms.weights(shape, jnp.float32))["layers"]
    w = jax.tree.map(lambda x: x[0], layers)
    h = jax.random.normal(jax.random.key(0), (2, 32, 16))
    own = [
        llms.fed(h, {name: w[name][i] for name in ("gate", "up", "down")})
        for i in range(4)
    ]
    gates = jax.nn.softmax(h @ w["router"])
    gates = jnp.where(gates >= jnp.sort(gates)[..., 2:3], gates, 0)
    want = sum(gates[..., i, None] * own[i] for i in range(4))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = llms.routed(h, w)
    kept = jnp.isclose(found, want, atol=1e-4).all(-1).mean()
    assert 0.9 < kept <= 1  # an expert that is full drops a token


@pytest.fixture
def tiny_slice(monkeypatch):
    """The large models become one of 4 experts, on the CPU's devices."""
    shape = llms.Shape(64, 128, 2, 4, 2, 16, 128, experts=4)
    monkeypatch.setitem(llms.SHAPES, "tiny", shape)
    monkeypatch.setattr(slices, "MODEL", "tiny")
    monkeypatch.setattr(slices, "LENGTH", 16)
    monkeypatch.setattr(slices, "TOPOLOGIES", dict.fromkeys(range(65), "cpu:8"))
    case = scale.Case("tiny", "cpu:8", data=4, model_axis=2, rows=8, length=16)
    monkeypatch.setattr(scale, "CASES", [case])
    with jax.numpy_rank_promotion("allow"):
        yield case


def run(monkeypatch, script, path, *args):
    """Runs a script, and returns what it wrote."""
    name = script.__name__.rpartition(".")[2]
    monkeypatch.setattr(
        sys, "argv", [name, "--json", str(path / f"{name}.json"), *args]
    )
    script.main()
    return read(path, name)


def test_scale(tiny_slice, monkeypatch, tmp_path):
    ranks = ("--rank", "2")
    run(monkeypatch, scale, tmp_path, *ranks, "--steps", scale.SPREAD)
    found = run(monkeypatch, scale, tmp_path, *ranks, "--steps", common.FLOOR)
    low, own = found["rows"]  # the second run kept the row of the first
    assert (low["step"], own["step"]) == (common.FLOOR, scale.SPREAD)
    assert 0 < scale.sent(low) < scale.sent(own)
    _, (line, _) = scale.memory_columns(found["rows"])
    assert line[4] == "1.00"


def test_layouts_of_what_is_trained(tiny_slice):
    names = (common.FLOOR, scale.SPREAD, common.JLORA, scale.COPIED, scale.FULL)
    steps = [scale.make_step(tiny_slice, name, rank=2)[0] for name in names]
    taken = [scale.chip_bytes(step[1]) for step in steps]
    assert taken == sorted({*taken})


def test_full_fine_tuning_trains_every_parameter(tiny_slice):
    step, extra = scale.make_step(tiny_slice, scale.FULL, rank=2)
    weights = common.nbytes(llms.weights(llms.SHAPES["tiny"]))
    assert common.nbytes(step[1]) == pytest.approx(3 * weights, abs=8)
    assert not extra


def test_slices(tiny_slice, monkeypatch, tmp_path):
    argv = ("--rank", "2", "--parts", "adapters", "--at", "8")
    found = run(monkeypatch, slices, tmp_path, *argv)
    (row,) = found["parts"]["adapters"]
    assert (row["data"], row["adapters"], row["rows"]) == (8, 8, 64)
    _, (line,) = slices.columns([row])
    assert line[:3] == ("8", "64 × 16", "8")
    shutil.copy(report.DOCS / "scale.md", tmp_path)
    report.write(tmp_path, tmp_path)
    assert "| 8 | 64 × 16 | 8 |" in (tmp_path / "scale.md").read_text()


def test_gpu(monkeypatch, tmp_path):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    monkeypatch.setattr(gpu, "one_card", lambda: device)
    monkeypatch.setattr(gpu, "find_spec", lambda name: True)
    monkeypatch.setattr(gpu, "STEPS", (common.FLOOR, common.JLORA))
    monkeypatch.setattr(models, "KINDS", {"scan": models.scanned})
    argv = ("--width", "64", "--layers", "1", "--length", "16")
    found = run(monkeypatch, gpu, tmp_path, *argv)
    assert [row["step"] for row in found["cases"][0]["rows"]] == list(gpu.STEPS)
    report.write(tmp_path, tmp_path)
    assert "| scan, 4 × 16 |" in (tmp_path / "performance_details.md").read_text()
