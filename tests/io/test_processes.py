"""Real processes on this machine: writers, a run that is killed, other counts of them.

Each process has its own devices, and gloo connects them.
"""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.helpers import bits, same

pytestmark = pytest.mark.once

# Arguments: this process, how many there are, devices of each, the port, a folder.
START = """
import os, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
me, n, devices, port, folder = sys.argv[1:]
me, folder = int(me), pathlib.Path(folder)
jax.config.update("jax_num_cpu_devices", int(devices))
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", int(n), me)
import jlora
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
def over(x, *spec):
    x, where = np.asarray(x), NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(x.shape, where, lambda part: x[part])
"""

WRITERS = """
host = np.arange(64, dtype="float32").reshape(8, 8)
spec = jlora.Spec(rank=8, alpha=8.0)
own = jlora.Factors(over(host, "d"), over(host.T, None, "d"), spec)
adapter = jlora.Trainable({"up/kernel": own}, {"up/bias": over(host[0])})
base = {"up": {"kernel": over(host, "d"), "bias": host[0]}}

def wrong(write):
    try:
        write()
    except jlora.JloraError as error:
        return str(error)

jlora.save(folder / "one", adapter)
jlora.peft.save(folder / "peft", adapter)
for read in (jlora.load(folder / "one"), jlora.peft.load(folder / "peft", {"up": {
    "kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}})):
    assert np.array_equal(read.lora["up/kernel"].a, host), read
    assert np.array_equal(read.lora["up/kernel"].b, host.T)
    assert np.array_equal(read.full["up/bias"], host[0])
merged = jax.jit(jlora.merge)(base, adapter)
assert merged["up"]["kernel"].sharding == base["up"]["kernel"].sharding
coded = jax.jit(lambda w: jlora.quantize({"up": {"kernel": w}}, kind="int8", block=2))(
    base["up"]["kernel"])
jlora.export.safetensors(folder / "whole", merged)
jlora.export.safetensors(folder / "coded", coded)
jlora.export.orbax(folder / "orbax", merged)
jlora.peft.save_base(folder / "torch", merged)
jlora.peft.save_base(folder / "shards", merged, max_shard_bytes=100)
jlora.export.safetensors(folder / "base", base)
jlora.export.merge_files(folder / "base", adapter, folder / "files")
jlora.export.quantize_files(folder / "base", folder / "small", kind="int8", block=2)
fn = lambda p, x: x @ p["up"]["kernel"]
jlora.export.stablehlo(fn, merged, np.ones((1, 8), "f4"), path=folder / "code")
for write in (
    lambda path: jlora.save(path, adapter),
    lambda path: jlora.export.safetensors(path, merged),
    lambda path: jlora.export.merge_files(folder / "base", adapter, path),
):
    told = wrong(lambda: write(folder / "no" / "x"))
    assert "cannot be written" in told, told
    assert ("first process has not written" in told) == (me > 0), told
assert "no form in torch" in wrong(lambda: jlora.peft.save_base(folder / "bad", {
    "x": over(np.ones((8, 2), "int4"), "d")}))
print("done")
"""

TRAIN = """
import optax
steps, out = int(os.environ["STEPS"]), folder / os.environ["OUT"]
params = {"up": over(np.ones((8, 16), "f4") / 8, "d"),
          "down": over(np.ones((16, 8), "f4") / 16, None, "d")}
fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
x = over(np.linspace(-1, 1, 128, dtype="f4").reshape(16, 8), "d")
plan = jlora.plan(fn, params, x, config=jlora.LoraConfig(rank=2, dropout=0.1))
tx, lora = optax.adamw(0.1), jlora.apply_lora(fn, on_merge="error")
make = lambda key, params: jlora.split(key, params, plan)
places = jlora.shardings(params, jax.eval_shape(make, jax.random.key(0), params)[1])
frozen, start = jax.jit(make, out_shardings=(None, places))(jax.random.key(0), params)

@jax.jit
def step(trainable, moments, key, frozen, x):
    key, drop = jax.random.split(key)
    def loss(trainable):
        return jnp.mean((lora(frozen, trainable, x, lora_key=drop) - x) ** 2)
    grads = jax.grad(loss)(trainable)
    updates, moments = tx.update(grads, moments, trainable)
    return optax.apply_updates(trainable, updates), moments, key

def train(out, steps, slow=0.0):
    import time
    with jlora.checkpoint.Checkpoints(out, plan=plan, keep=2) as checkpoints:
        state, done = (start, jax.jit(tx.init)(start), jax.random.key(1)), 0
        if checkpoints.newest is not None:
            like = jax.eval_shape(tx.init, start)
            read = checkpoints.restore(opt_state=like, shardings=places)
            assert read.trainable.lora["up"].a.sharding == places.lora["up"].a
            assert read.opt_state[0].mu.lora["up"].a.sharding == places.lora["up"].a
            state, done = (read.trainable, read.opt_state, read.key), read.step
            print("resumed", done, flush=True)
        while done < steps:
            state, done = step(*state, frozen, x), done + 1
            checkpoints.save(state[0], step=done, opt_state=state[1], key=state[2])
            time.sleep(slow)
            if slow:
                print("step", done, flush=True)
"""

READ = """
import hashlib
from jlora._io.processes import on_host
shapes = jax.eval_shape(make, jax.random.key(0), params)[1]
read = jlora.checkpoint.restore(out, opt_state=jax.eval_shape(tx.init, shapes),
    shardings=places)
found = on_host((read.trainable, read.opt_state))
leaves = sorted(np.asarray(x).tobytes() for x in jax.tree.leaves(found))
print(hashlib.sha256(b"".join(leaves)).hexdigest())
"""


def start(program, n, devices, folder, **env):
    """Returns `n` processes that run a program together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-c", START + program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [*words, str(i), str(n), str(devices), port, str(folder)],
            env={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": os.environ["XLA_FLAGS"], **env},
            **pipes,
        )
        for i in range(n)
    ]


def finished(processes):
    """Returns what processes printed, once all have ended well."""
    try:
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, ends, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [_own_lines(out) for out, _ in ends]


def _own_lines(out):
    """Returns what the program printed; Gloo's threads may cut each other's lines."""
    return [
        line
        for line in out.splitlines()
        if "[Gloo]" not in line and "peer ranks" not in line
    ]


def test_all_processes_write_together(tmp_path):
    outs = finished(start(WRITERS, 2, 2, tmp_path))
    assert outs == [["done"]] * 2
    made = {p.name for p in tmp_path.iterdir() if p.name[0] != "."}
    whole, others = {"whole", "orbax", "files"}, {"torch", "shards"}
    assert made == whole | others | {"one", "peft", "coded", "base", "small", "code"}
    host = np.arange(64, dtype="float32").reshape(8, 8)
    base = {"up": {"kernel": jnp.asarray(host), "bias": jnp.asarray(host[0])}}
    merged = jlora.merge(base, jlora.load(tmp_path / "one"))
    for name in whole:
        same(jlora.files.read_params(tmp_path / name), merged)
    for name in others:
        same(jlora.peft.load_base(tmp_path / name, base), merged)
    coded = jlora.quantize(
        {"up": {"kernel": base["up"]["kernel"]}}, kind="int8", block=2
    )
    same(jlora.files.read_params(tmp_path / "coded"), coded)
    assert jlora.quantised.is_quantized(
        jlora.files.read_params(tmp_path / "small")["up"]["kernel"]
    )
    run = jax.export.deserialize((tmp_path / "code").read_bytes()).call
    np.testing.assert_allclose(run(jnp.eye(8)), merged["up"]["kernel"])


@pytest.mark.slow
def test_a_run_whose_process_is_killed_resumes(tmp_path):
    """It ends with the bits of a run that was not killed, and can be read anywhere."""
    env = {"STEPS": "6", "OUT": "killed"}
    program = TRAIN + "train(folder / 'whole', steps)\ntrain(out, steps, slow=0.2)\n"
    both = start(program, 2, 2, tmp_path, **env)
    try:
        for line in both[1].stdout:
            if line.startswith("step 3"):
                break
        else:
            pytest.fail(both[1].stderr.read()[-3000:])
        both[1].send_signal(signal.SIGKILL)
        time.sleep(0.5)
    finally:
        for process in both:  # the other one waits for it
            process.kill()
            process.communicate()
    outs = finished(start(TRAIN + "train(out, steps)\n", 2, 2, tmp_path, **env))
    assert outs[0] == outs[1]
    assert outs[0][0] in {f"resumed {i}" for i in range(1, 6)}
    adapter = jlora.checkpoint.restore(tmp_path / "whole").trainable
    moments = jax.eval_shape(optax.adamw(0.1).init, adapter)
    whole, killed = (
        jlora.checkpoint.restore(tmp_path / name, opt_state=moments)
        for name in ("whole", "killed")
    )
    assert whole.step == killed.step == 6
    same(killed.trainable, whole.trainable)
    assert len(jax.tree.leaves(whole.opt_state)) == 5
    same(killed.opt_state, whole.opt_state)
    assert bits(jax.random.key_data(killed.key)) == bits(jax.random.key_data(whole.key))
    leaves = jax.tree.leaves((whole.trainable, whole.opt_state))
    digest = hashlib.sha256(b"".join(sorted(np.asarray(x).tobytes() for x in leaves)))
    outs = finished(start(TRAIN + READ, 1, 4, tmp_path, **{**env, "OUT": "whole"}))
    assert outs == [[digest.hexdigest()]]
