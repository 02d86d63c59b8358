"""Adapter checkpoints: what is saved is what is restored, whatever happens between."""

import dataclasses
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import jlora
from benchmarks.faults import resume
from jlora.factors import Axes, Factors, Spec
from tests.helpers import bits, normal, same
from tests.io.helpers import adapter, orbax_fails

checkpoint = jlora.checkpoint


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "adapter"


# Save, then restore.


def test_save_then_restore_is_identity(folder):
    metadata = {"seed": 0, "config": jlora.LoraConfig().to_json(), "l": [1, None, "é"]}
    checkpoint.save(folder, adapter(), step=7, metadata=metadata)
    read = checkpoint.restore(folder)
    same(read.trainable, adapter())
    assert list(read.trainable.lora) == list(adapter().lora)
    assert list(read.trainable.full) == list(adapter().full)
    assert read.step == 7
    assert read.metadata == metadata
    assert read.opt_state is None


def test_an_adapter_needs_nothing_else_to_be_merged_again(folder):
    def fn(p, x):
        return jnp.einsum("td,dhk->thk", x, p["w"])

    params = {"w": normal((4, 2, 3))}
    plan = jlora.plan(fn, params, normal((3, 4)), config=jlora.LoraConfig(rank=2))
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = jax.tree.map(lambda x: normal(x.shape, 3), trainable)
    checkpoint.save(str(folder), trainable)
    read = checkpoint.restore(str(folder)).trainable
    same(jlora.merge(frozen, read), jlora.merge(frozen, trainable))


def test_an_empty_adapter(folder):
    checkpoint.save(folder, jlora.Trainable())
    same(checkpoint.restore(folder).trainable, jlora.Trainable())


@pytest.mark.usefixtures("standard_dtypes")
@pytest.mark.parametrize("template", ["arrays", "shapes"])
def test_optimizer_state_comes_back_bit_for_bit(folder, template):
    trainable = adapter()
    trainable = dataclasses.replace(trainable, full={"head": trainable.full["head"]})
    tx = optax.MultiSteps(optax.adamw(0.1, mu_dtype="bfloat16"), 2)
    state = tx.init(trainable)
    for _ in range(3):
        grads = jax.tree.map(jnp.ones_like, trainable)
        _, state = tx.update(grads, state, trainable)
    checkpoint.save(folder, trainable, opt_state=state, step=3)
    like = tx.init(trainable)
    if template == "shapes":
        like = jax.eval_shape(tx.init, trainable)
    read = checkpoint.restore(folder, opt_state=like)
    same(read.opt_state, state)
    same(read.trainable, trainable)
    assert checkpoint.restore(folder).opt_state is None


def test_optimizer_state_with_a_random_key(folder):
    tx = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(3)), optax.sgd(0.1))
    trainable = jlora.Trainable(full={"head": jnp.ones(3)})
    state = tx.init(trainable)
    checkpoint.save(folder, trainable, opt_state=state)
    read = checkpoint.restore(folder, opt_state=tx.init(trainable))
    assert jax.tree.structure(read.opt_state) == jax.tree.structure(state)
    for a, b in zip(
        jax.tree.leaves(read.opt_state), jax.tree.leaves(state), strict=True
    ):
        assert a.dtype == b.dtype
        assert bool((a == b).all())


@pytest.mark.usefixtures("standard_dtypes")
def test_resumed_training_is_bit_equal_to_uninterrupted_training(folder):
    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["head"]

    params = {"w": normal((4, 6)), "head": normal((6, 2), 1)}
    config = jlora.LoraConfig(rank=2, dropout=0.2, train="head")
    plan = jlora.plan(fn, params, normal((3, 4)), config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    tx = optax.adamw(optax.linear_schedule(0.1, 0.0, 6))
    lora_fn = jlora.apply_lora(fn)

    @jax.jit
    def step(trainable, opt_state, i):
        key = jax.random.fold_in(jax.random.key(1), i)

        def loss(trainable):
            x = jax.random.normal(key, (3, 4))
            return jnp.sum(lora_fn(frozen, trainable, x, lora_key=key) ** 2)

        grads = jax.grad(loss)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    def run(trainable, opt_state, start, stop):
        for i in range(start, stop):
            trainable, opt_state = step(trainable, opt_state, jnp.int32(i))
        return trainable, opt_state

    straight = run(trainable, tx.init(trainable), 0, 6)
    half = run(trainable, tx.init(trainable), 0, 3)
    checkpoint.save(folder, half[0], opt_state=half[1], step=3)
    read = checkpoint.restore(folder, opt_state=jax.eval_shape(tx.init, trainable))
    resumed = run(read.trainable, read.opt_state, read.step, 6)
    same(resumed, straight)
    assert bits(half) != bits(straight)


def test_arguments_are_left_as_they_were(folder):
    trainable = adapter()
    checkpoint.save(folder, trainable)
    same(trainable, adapter())
    assert not any(x.is_deleted() for x in jax.tree.leaves(trainable))


def test_sharded_adapters_are_saved_whole(folder):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("x",), axis_types=auto)
    spread = jax.NamedSharding(mesh, jax.P("x"))
    trainable = jlora.Trainable(full={"head": normal((16, 3))})
    placed = jax.device_put(trainable, spread)
    checkpoint.save(folder, placed)
    same(checkpoint.restore(folder).trainable, trainable)


# Steps.


def test_the_newest_step_is_restored_or_the_one_asked_for(folder):
    for step in (5, 10, 7):
        checkpoint.save(folder, adapter(step), step=step)
    assert checkpoint.restore(folder).step == 10
    read = checkpoint.restore(folder, step=7)
    assert read.step == 7
    same(read.trainable, adapter(7))


def test_keep_leaves_the_newest_steps(folder):
    for step in (1, 2, 3, 4):
        checkpoint.save(folder, adapter(step), step=step, keep=2)
    assert checkpoint.restore(folder).step == 4
    assert checkpoint.restore(folder, step=3).step == 3
    with pytest.raises(jlora.CheckpointError, match=r"No step 2 in .*steps \[3, 4\]"):
        checkpoint.restore(folder, step=2)


def test_all_steps_are_kept_without_keep(folder):
    for step in range(4):
        checkpoint.save(folder, adapter(step), step=step)
    for step in range(4):
        same(checkpoint.restore(folder, step=step).trainable, adapter(step))


def test_a_step_is_not_overwritten_unless_asked(folder):
    checkpoint.save(folder, adapter(0), step=3)
    with pytest.raises(
        jlora.CheckpointError, match=r"Step 3 is already in .*pass overwrite=True"
    ):
        checkpoint.save(folder, adapter(1), step=3)
    same(checkpoint.restore(folder).trainable, adapter(0))
    checkpoint.save(folder, adapter(1), step=3, overwrite=True)
    same(checkpoint.restore(folder).trainable, adapter(1))


def test_an_older_step_may_be_overwritten(folder):
    for step in (1, 2):
        checkpoint.save(folder, adapter(step), step=step)
    checkpoint.save(folder, adapter(9), step=1, overwrite=True)
    same(checkpoint.restore(folder, step=1).trainable, adapter(9))
    same(checkpoint.restore(folder).trainable, adapter(2))


@pytest.mark.parametrize("step", [-1, 1.5, "3", None])
def test_a_step_is_a_whole_number(folder, step):
    with pytest.raises(
        jlora.CheckpointError,
        match=re.escape(f"step must be a whole number from 0, got {step!r}"),
    ):
        checkpoint.save(folder, adapter(), step=step)
    assert not folder.exists()


def test_a_numpy_step(folder):
    checkpoint.save(folder, adapter(), step=np.int64(3))
    assert checkpoint.restore(folder, step=np.int64(3)).step == 3


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_nothing_is_refused(folder, keep):
    with pytest.raises(jlora.CheckpointError, match="keep"):
        checkpoint.save(folder, adapter(), keep=keep)


# What is not there, or not whole.


def test_a_missing_folder_is_named_and_not_made(folder):
    with pytest.raises(
        jlora.CheckpointError, match=r"There is no folder '.*adapter' to restore from"
    ):
        checkpoint.restore(folder)
    assert not folder.exists()


def test_an_empty_folder_has_no_checkpoint(folder):
    folder.mkdir(parents=True)
    with pytest.raises(
        jlora.CheckpointError, match=r"No checkpoint in .*; it has steps \[\]"
    ):
        checkpoint.restore(folder)


def test_a_missing_step_is_named_with_those_that_are_there(folder):
    checkpoint.save(folder, adapter(), step=4)
    with pytest.raises(jlora.CheckpointError, match=r"No step 5 in .*steps \[4\]"):
        checkpoint.restore(folder, step=5)


def files(folder):
    return sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())


@orbax_fails
@pytest.mark.parametrize("damage", ["emptied", "cut", "removed"])
def test_a_damaged_file_is_told_and_never_read_as_other_numbers(folder, damage):
    checkpoint.save(folder, adapter(), step=1)
    told = 0
    for path in files(folder):
        data = path.read_bytes()
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
        try:
            same(checkpoint.restore(folder).trainable, adapter())
        except jlora.CheckpointError as error:
            told += 1
            assert re.search("Step 1 in|No checkpoint in", str(error))  # noqa: PT017
        path.write_bytes(data)
    assert told >= 2
    same(checkpoint.restore(folder).trainable, adapter())


@orbax_fails
def test_the_text_for_a_damaged_checkpoint(folder):
    checkpoint.save(folder, adapter(), step=1)
    for path in files(folder / "1" / "adapter"):
        path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(
        jlora.CheckpointError,
        match=r"(?s)Step 1 in .* cannot be read: .*\. It is damaged, not a jlora",
    ):
        checkpoint.restore(folder)


@orbax_fails
def test_a_checkpoint_of_something_else_is_refused(folder):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder.absolute()) as manager:
        manager.save(0, args=ocp.args.StandardSave({"w": jnp.ones(3)}))
        manager.wait_until_finished()
    with pytest.raises(jlora.CheckpointError, match="not a jlora"):
        checkpoint.restore(folder)


@orbax_fails
def test_a_format_of_the_future_is_refused(folder):
    checkpoint.save(folder, adapter(), step=1)
    changed = 0
    for path in files(folder / "1" / "about"):
        try:
            about = json.loads(path.read_text())
        except (ValueError, UnicodeDecodeError):
            continue
        if "format" in about:
            about["format"] = 999
            path.write_text(json.dumps(about))
            changed += 1
    assert changed == 1
    with pytest.raises(jlora.CheckpointError, match="not a jlora checkpoint of format"):
        checkpoint.restore(folder)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("part", ["a", "full"])
def test_nan_and_infinity_are_not_saved(folder, value, part):
    good = adapter()
    checkpoint.save(folder, good, step=1)
    if part == "full":
        head = good.full["head"].at[0, 0].set(value)
        bad = dataclasses.replace(good, full={**good.full, "head": head})
    else:
        name = "b é.%20 {x}"
        a = good.lora[name].a.at[0, 0].set(value)
        broken = dataclasses.replace(good.lora[name], a=a)
        bad = dataclasses.replace(good, lora={**good.lora, name: broken})
    with pytest.raises(
        jlora.CheckpointError, match=r"Not saved: NaN or infinity in .*"
    ):
        checkpoint.save(folder, bad, step=2)
    with pytest.raises(jlora.TreeError, match=r"a jlora\.Trainable, got dict"):
        checkpoint.save(folder, bad.full, step=2)
    read = checkpoint.restore(folder)
    assert read.step == 1
    same(read.trainable, good)


def test_large_finite_numbers_are_saved(folder):
    with jax.enable_x64(True):
        big = jlora.Trainable(
            full={
                "f8": jnp.array([1e300, -1e-300]),
                "f4": jnp.array([3e38], "float32"),
                "i8": jnp.array([2**53 + 1], "int64"),
            }
        )
        checkpoint.save(folder, big)
        same(checkpoint.restore(folder).trainable, big)


# Templates of the optimizer's state.


@pytest.fixture
def with_state(folder):
    trainable = jlora.Trainable(full={"head": jnp.ones(3), "bias": jnp.ones(2)})
    state = optax.sgd(0.1, momentum=0.9).init(trainable)
    checkpoint.save(folder, trainable, opt_state=state, step=2)
    return folder, trainable


@orbax_fails
@pytest.mark.parametrize(
    "change",
    ["another shape", "another dtype", "a leaf more", "a leaf less"],
)
def test_a_template_that_does_not_fit_is_refused(with_state, change):
    folder, trainable = with_state
    full = {
        "another shape": {"head": jnp.ones(4), "bias": jnp.ones(2)},
        "another dtype": {"head": jnp.ones(3, "bfloat16"), "bias": jnp.ones(2)},
        "a leaf more": {"head": jnp.ones(3), "bias": jnp.ones(2), "x": jnp.ones(1)},
        "a leaf less": {"head": jnp.ones(3)},
    }[change]
    template = optax.sgd(0.1, momentum=0.9).init(jlora.Trainable(full=full))
    with pytest.raises(
        jlora.CheckpointError,
        match=r"Step 2 in .*optimizer state does not fit the template: leaf \d is ",
    ):
        checkpoint.restore(folder, opt_state=template)
    same(checkpoint.restore(folder).trainable, trainable)


@orbax_fails
def test_a_template_for_state_that_was_not_saved_is_refused(folder):
    trainable = jlora.Trainable(full={"head": jnp.ones(3)})
    checkpoint.save(folder, trainable, step=2)
    template = optax.sgd(0.1, momentum=0.9).init(trainable)
    with pytest.raises(
        jlora.CheckpointError, match="optimizer state does not fit the template"
    ):
        checkpoint.restore(folder, opt_state=template)


# A save that was killed.


@orbax_fails
def test_a_leftover_of_a_killed_save_is_passed_over(folder):
    checkpoint.save(folder, adapter(1), step=1)
    checkpoint.save(folder, adapter(2), step=2)
    unfinished = folder / "3.orbax-checkpoint-tmp-1700000000000000"
    shutil.copytree(folder / "2", unfinished)
    for path in files(unfinished)[::2]:
        path.unlink()
    read = checkpoint.restore(folder)
    assert read.step == 2
    same(read.trainable, adapter(2))
    checkpoint.save(folder, adapter(3), step=3)
    same(checkpoint.restore(folder).trainable, adapter(3))
    assert checkpoint.restore(folder).step == 3


SAVE_FOREVER = """
import sys, itertools
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp, jlora
for step in itertools.count():
    full = {"head": jnp.full((256, 1024), float(step)), "step": jnp.int32(step)}
    jlora.checkpoint.save(sys.argv[1], jlora.Trainable(full=full), step=step, keep=2)
    print(step, flush=True)
"""


@pytest.mark.once
def test_a_killed_process_leaves_its_last_saved_step(folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        for _ in range(2):
            assert process.stdout.readline(), "it ended by itself"
        time.sleep(0.05)  # somewhere inside the next save
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split()
    last = int(said[-1]) if said else 1
    read = checkpoint.restore(folder)
    assert read.step >= last
    assert int(read.trainable.full["step"]) == read.step
    assert bool((read.trainable.full["head"] == read.step).all())
    checkpoint.save(folder, read.trainable, step=read.step + 1)
    assert checkpoint.restore(folder).step == read.step + 1


# Everything that a run needs to go on.


def small():
    return jlora.Trainable(full={"head": jnp.arange(3.0)})


def model(params, x):
    return jnp.tanh(x @ params["w"]) @ params["head"]


PARAMS = {"w": normal((4, 6)), "head": normal((6, 2), 1)}


def test_key_position_config_and_plan_come_back(folder):
    config = jlora.LoraConfig(
        rank=2, train="head", rules=(jlora.Rule("w", axes=Axes()),)
    )
    plan = jlora.plan(model, PARAMS, normal((3, 4)), config=config)
    frozen, trainable = jlora.split(jax.random.key(0), PARAMS, plan)
    key = jax.random.split(jax.random.key(3, impl="rbg"), 2)
    position = {"epoch": 1, "shards": [[0, 5], [1, 7]], "state": "é"}
    checkpoint.save(
        folder, trainable, key=key, position=position, plan=plan, params=frozen
    )
    read = checkpoint.restore(folder, params=PARAMS)
    assert read.key.dtype == key.dtype
    assert bool((read.key == key).all())
    assert read.position == position
    assert read.config == config
    assert read.plan == plan
    assert hash(read.plan) == hash(plan)
    same(read.trainable, trainable)
    assert read.metrics is None


def test_a_key_of_the_old_kind(folder):
    key = jax.random.PRNGKey(2**31 + 5)
    checkpoint.save(folder, small(), key=key, config=jlora.LoraConfig(rank=3))
    read = checkpoint.restore(folder)
    same(read.key, key)
    assert read.config == jlora.LoraConfig(rank=3)


@pytest.mark.parametrize("field", ["metadata", "position"])
def test_what_is_no_json_is_refused(folder, field):
    with pytest.raises(jlora.CheckpointError, match=f"{field} is not a JSON value"):
        checkpoint.save(folder, small(), **{field: {"x": jnp.ones(2)}})
    assert not folder.exists()


def test_a_predicate_as_targets_is_refused_before_training(folder):
    config = jlora.LoraConfig(targets=lambda row: True)
    with pytest.raises(jlora.ConfigError, match="no JSON form"):
        checkpoint.Checkpoints(folder, config=config)


# The base.


def test_another_base_is_refused_and_named(folder):
    checkpoint.save(folder, small(), params=PARAMS, step=1)
    w = PARAMS["w"]
    for base, text in [
        ({**PARAMS, "w": w.at[3, 5].add(1e-6)}, r"'w' has other numbers\. Load"),
        ({**PARAMS, "w": w.astype("bfloat16")}, r"'w' is bfloat16\[4, 6\], was float"),
        ({**PARAMS, "w": w.T}, r"'w' is float32\[6, 4\], was float32\[4, 6\]"),
        ({**PARAMS, "b": w}, "'b' is new in it"),
        ({"head": PARAMS["head"]}, "'w' is not in the base"),
    ]:
        with pytest.raises(jlora.CheckpointError, match=rf"another base: {text}"):
            checkpoint.restore(folder, params=base)
    # A leaf trained in full is the adapter's, whatever the base has there.
    other = {**PARAMS, "head": normal((9,))}
    print_ = checkpoint.fingerprint(other)
    assert checkpoint.restore(folder, params=print_).step == 1
    assert checkpoint.restore(folder).fingerprint == checkpoint.fingerprint(PARAMS)
    assert checkpoint.restore(folder).step == 1


def test_a_base_that_was_not_saved_cannot_be_checked(folder):
    checkpoint.save(folder, small())
    assert checkpoint.restore(folder).fingerprint is None
    with pytest.raises(jlora.CheckpointError, match=r"saved without params="):
        checkpoint.restore(folder, params=PARAMS)


def test_the_fingerprint_depends_on_the_numbers_alone():
    mesh = jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    w = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    places = [None, jax.NamedSharding(mesh, jax.P("x", "y"))]
    trees = [{"w": w}, *({"w": jax.device_put(w, place)} for place in places)]
    assert len({checkpoint.fingerprint(t).leaves["w"] for t in trees}) == 1


@pytest.mark.parametrize(
    "dtype", ["float64", "bfloat16", "float16", "int8", "bool", "complex64", "int4"]
)
def test_the_fingerprint_tells_every_number(dtype):
    with jax.enable_x64(True):
        x = jnp.zeros((5,), dtype)
        found = [checkpoint.fingerprint({"x": x})]
        for i in range(5):
            found.append(
                checkpoint.fingerprint({"x": x.at[i].set(jnp.ones((), dtype))})
            )
        on_host = [checkpoint.fingerprint({"x": np.asarray(x)})]
    assert len({p.leaves["x"] for p in found}) == 6
    assert on_host[0] == found[0]


def test_the_fingerprint_of_keys_and_of_what_is_no_array():
    tree = {"key": jax.random.key(0), "name": "gelu", "raw": jax.random.key(1)}
    leaves = checkpoint.fingerprint(tree).leaves
    assert leaves["name"] == "'gelu'"
    assert leaves["key"].partition(" ")[2] != leaves["raw"].partition(" ")[2]


# Other devices.


def test_a_checkpoint_is_read_onto_other_devices(folder):
    def over(n, *names):
        devices = np.array(jax.devices()[:n])
        return jax.NamedSharding(jax.sharding.Mesh(devices, ("x",)), jax.P(*names))

    spec = Spec(rank=2, alpha=1)
    trainable = jlora.Trainable(
        {"w": Factors(normal((8, 2)), normal((2, 8)), spec)}, {"head": normal((8,))}
    )
    state = optax.sgd(0.1, momentum=0.9).init(trainable)
    placed, placed_state = jax.device_put((trainable, state), over(8))
    placed = dataclasses.replace(
        placed, full=jax.device_put(dict(placed.full), over(8, "x"))
    )
    checkpoint.save(folder, placed, opt_state=placed_state)
    # All on one device, as nothing is said.
    like = jax.eval_shape(optax.sgd(0.1, momentum=0.9).init, trainable)
    read = checkpoint.restore(folder, opt_state=like)
    same((read.trainable, read.opt_state), (trainable, state))
    assert {x.sharding for x in jax.tree.leaves(read.trainable)} == {
        jax.sharding.SingleDeviceSharding(jax.devices()[0])
    }
    # A mesh of two.
    read = checkpoint.restore(folder, shardings=over(2))
    same(read.trainable, trainable)
    assert {x.sharding for x in jax.tree.leaves(read.trainable)} == {over(2)}
    # Each leaf where it is wanted, the optimizer's as the template's.
    wanted = jlora.Trainable(
        {"w": Factors(over(4, "x"), over(4, None, "x"), spec)}, {"head": over(4)}
    )
    read = checkpoint.restore(folder, opt_state=like, shardings=wanted)
    same((read.trainable, read.opt_state), (trainable, state))
    (moments,) = [x for x in read.opt_state if hasattr(x, "trace")]
    assert moments.trace.lora["w"].b.sharding == over(4, None, "x")
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over(4)), like
    )
    read = checkpoint.restore(folder, opt_state=like, shardings=wanted)
    same((read.trainable, read.opt_state), (trainable, state))
    assert read.trainable.lora["w"].a.sharding == over(4, "x")
    assert read.trainable.lora["w"].b.sharding == over(4, None, "x")
    assert {x.sharding for x in jax.tree.leaves(read.opt_state)} == {over(4)}
    with pytest.raises(jlora.CheckpointError, match="shardings must be one"):
        checkpoint.restore(folder, shardings={"w": over(4)})


# In a training loop.


def test_the_newest_and_the_best_are_kept(folder):
    accuracy = [0.1, 0.9, float("nan"), 0.3, 0.4, 0.2]
    with checkpoint.Checkpoints(folder, keep=2, best="accuracy") as ckpts:
        assert (ckpts.steps, ckpts.newest, ckpts.best) == ((), None, None)
        for step, value in enumerate(accuracy):
            full = {"head": jnp.full(3, float(step))}
            metrics = {"accuracy": jnp.float32(value), "loss": 1}
            assert ckpts.save(jlora.Trainable(full=full), step=step, metrics=metrics)
    with checkpoint.Checkpoints(folder, keep=2, best="accuracy") as ckpts:
        assert (ckpts.steps, ckpts.newest, ckpts.best) == ((1, 4, 5), 5, 1)
        read = ckpts.restore(step=ckpts.best)
        assert float(read.trainable.full["head"][0]) == 1
        assert read.metrics == {"accuracy": pytest.approx(0.9), "loss": 1}
        with pytest.raises(jlora.CheckpointError, match=r"Step 6 needs metrics=\{'acc"):
            ckpts.save(small(), step=6, metrics={"loss": 1})
    assert {p.name for p in folder.iterdir()} == {"1", "4", "5"}


def test_the_smallest_may_be_best(folder):
    with checkpoint.Checkpoints(folder, keep=1, best="loss", mode="min") as ckpts:
        for step, loss in enumerate([3.0, 1.0, float("nan"), 2.0]):
            ckpts.save(small(), step=step, metrics={"loss": loss})
        ckpts.wait()
        assert (ckpts.steps, ckpts.best) == ((1, 3), 1)


def test_only_every_so_many_steps_are_written(folder):
    with checkpoint.Checkpoints(folder, keep=None, every=3) as ckpts:
        saved = [step for step in range(8) if ckpts.save(small(), step=step)]
        assert saved == [0, 3, 6]
        assert ckpts.save(small(), step=7, force=True)
        assert ckpts.steps == (0, 3, 6, 7)
        with pytest.raises(jlora.CheckpointError, match="Step 6 is already in"):
            ckpts.save(small(), step=6)
        assert ckpts.restore().step == 7


def test_the_next_save_waits_until_old_steps_are_deleted(folder, monkeypatch):
    replace, deletes = os.replace, threading.Event()

    def slow(source, target):
        if ".deleted" in os.fspath(target):
            deletes.set()
            time.sleep(0.2)
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow)
    with checkpoint.Checkpoints(folder, keep=1) as ckpts:
        ckpts.save(small(), step=0)
        ckpts.save(small(), step=1)
        assert deletes.wait(timeout=60)
        ckpts.save(small(), step=2)
    assert os.listdir(folder) == ["2"]


def test_arrays_may_be_donated_while_they_are_written(folder):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((512, 512))
    with checkpoint.Checkpoints(folder, keep=None) as ckpts:
        for i in range(4):
            ckpts.save(jlora.Trainable(full={"x": x}), step=i)
            for _ in range(3):
                x = step(x)
        for i in range(4):
            read = ckpts.restore(step=i).trainable.full["x"]
            assert bool((read == 3 * i).all())


def test_the_base_is_checked_in_a_loop(folder):
    with checkpoint.Checkpoints(folder, params=PARAMS) as ckpts:
        ckpts.save(small(), step=0, opt_state={"n": jnp.int32(3)})
        same(
            ckpts.restore(opt_state={"n": jnp.int32(0)}).opt_state, {"n": jnp.int32(3)}
        )
    other = {**PARAMS, "w": PARAMS["w"] + 1}
    with (
        checkpoint.Checkpoints(folder, params=other) as ckpts,
        pytest.raises(jlora.CheckpointError, match="another base: 'w' has other"),
    ):
        ckpts.restore()


def test_values_that_cannot_work_are_refused(folder):
    for wrong in ({"keep": 0}, {"mode": "least"}, {"every": 0}, {"every": 1.5}):
        with pytest.raises(jlora.CheckpointError, match=f"{next(iter(wrong))} must be"):
            checkpoint.Checkpoints(folder, **wrong)
    folder.parent.mkdir(parents=True)
    folder.write_text("a file")
    with pytest.raises(jlora.CheckpointError, match="cannot be opened for checkpoints"):
        checkpoint.Checkpoints(folder)


def test_an_error_of_the_loop_is_not_hidden(folder):
    def loop():
        with checkpoint.Checkpoints(folder) as ckpts:
            ckpts.save(small(), step=0)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        loop()
    assert checkpoint.restore(folder).step == 0


@orbax_fails
def test_a_full_disk_leaves_the_steps_that_were_there(folder):
    large = jlora.Trainable(full={"x": normal((300, 300))})
    with checkpoint.Checkpoints(folder) as ckpts:
        ckpts.save(small(), step=1)
        ckpts.wait()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            ckpts.save(large, step=2)
            with pytest.raises(jlora.CheckpointError, match="not saved in"):
                ckpts.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    read = checkpoint.restore(folder)
    assert read.step == 1
    same(read.trainable, small())


@pytest.mark.once
@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bit_equal(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert resume.run(straight, 0, seed=0, steps=60) == 0
    assert resume.run(broken, 2, seed=0, steps=60) >= 1
    found = resume.bits(broken)
    assert found == resume.bits(straight)
    assert found[:2] == [60, {"at": 60}]


def test_dtypes_by_name():
    """The test adapter holds what it says, so that identity means something."""
    dtypes = {x.dtype for x in jax.tree.leaves(adapter())}
    assert {np.dtype(ml_dtypes.bfloat16), np.dtype("float16")} <= dtypes


def test_wide_numbers_need_wide_jax(folder):
    with jax.enable_x64(True):
        big = jlora.Trainable(full={"x": jnp.array([1e300])})
        checkpoint.save(folder, big)
        same(checkpoint.restore(folder).trainable, big)
    with pytest.raises(jlora.CheckpointError, match=r"'x\.full' is float64, which"):
        checkpoint.restore(folder)
