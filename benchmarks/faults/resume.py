"""Does a training run that is killed at random moments end with the same bits?

    python -m benchmarks.faults.resume [--kills 30] [--seed 0]

A small model trains with dropout, AdamW, and a checkpoint at each step. Its process is
killed at random moments and started again, until one comes to the end. Then the
adapter, the optimizer's state and the random key are compared with those of a run that
was not killed. The settings are one, two and eight (made-up) devices, 64-bit numbers,
and a clock that goes back an hour at each start.
"""

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "1 device": {"devices": 1},
    "2 devices": {"devices": 2},
    "8 devices": {"devices": 8},
    "64-bit numbers": {"devices": 1, "x64": True},
    "a clock that goes back": {"devices": 1, "back": 3600},
}
STEPS = 60


def train(directory: str, steps: int) -> None:
    """Trains from the newest checkpoint in `directory` to the last step."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import jlora

    params = {"w": jnp.ones((16, 16)) / 16, "head": jnp.ones((16, 4)) / 4}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"]) @ p["head"]

    config = jlora.LoraConfig(rank=2, dropout=0.2, train="head")
    plan = jlora.plan(fn, params, jnp.ones((8, 16)), config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    tx = optax.adamw(optax.linear_schedule(0.1, 0.0, steps))
    lora_fn = jlora.apply_lora(fn)
    mesh = Mesh(jax.devices(), ("batch",))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    whole = NamedSharding(mesh, PartitionSpec())
    frozen, trainable = jax.device_put((frozen, trainable), whole)

    @jax.jit
    def step(trainable: Any, opt_state: Any, key: jax.Array, at: int) -> Any:
        key, drop, data = jax.random.split(key, 3)
        x = jax.random.normal(jax.random.fold_in(data, at), (8, 16))
        x = jax.lax.with_sharding_constraint(x, rows)

        def loss(trainable: Any) -> jax.Array:
            y = lora_fn(frozen, trainable, x, lora_key=drop)
            return jnp.mean((y - x[:, :4]) ** 2)

        grads = jax.grad(loss)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, key

    state = jax.device_put((trainable, tx.init(trainable), jax.random.key(1)), whole)
    done = 0
    with jlora.checkpoint.Checkpoints(
        directory, keep=2, best="m", plan=plan, params=frozen
    ) as checkpoints:
        if checkpoints.newest is not None:
            read = checkpoints.restore(opt_state=jax.eval_shape(tx.init, trainable))
            if read.position != {"at": read.step}:
                raise SystemExit(f"step {read.step} holds position {read.position}")
            state = jax.device_put((read.trainable, read.opt_state, read.key), whole)
            done = read.step
        while done < steps:
            state = step(*state, done)
            done += 1
            checkpoints.save(
                state[0],
                step=done,
                opt_state=state[1],
                key=state[2],
                position={"at": done},
                metrics={"m": -abs(done - 7)},
            )


def worker(directory: str, kills: int, seed: int, steps: int, back: int) -> None:
    """Forks processes that train, and kills them; prints how many were killed."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    import optax as _optax
    import orbax.checkpoint as _orbax

    del _optax, _orbax  # imported once, for all children
    warnings.simplefilter("ignore")
    draw, now = random.Random(seed), time.time
    killed = 0
    while True:
        child = os.fork()
        if not child:
            if back:
                late = back * (killed + 1)
                time.time = lambda late=late: now() - late
            train(directory, steps)
            os._exit(0)
        if killed < kills:
            time.sleep(draw.uniform(0.2, 3.0))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status != signal.SIGKILL:
            print(killed, status, flush=True)
            return
        killed += 1


def run(directory: pathlib.Path, kills: int, seed: int, steps: int, **how: Any) -> int:
    """Trains in processes of their own; returns how many were killed.

    Raises:
      RuntimeError: if a process ended with an error.
    """
    flags = f"--xla_force_host_platform_device_count={how.get('devices', 1)}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": flags}
    env |= {"JAX_ENABLE_X64": "1"} if how.get("x64") else {}
    words = map(str, (directory, kills, seed, steps, how.get("back", 0)))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults.resume", "--worker", *words],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    killed, status = map(int, (done.stdout.split() or ["0", "1"])[-2:])
    if done.returncode or status:
        raise RuntimeError(done.stderr)
    return killed


def bits(directory: pathlib.Path, x64: bool = False) -> list[Any]:
    """Returns all that a finished run saved, as bytes."""
    import jax
    import optax

    import jlora

    with jax.enable_x64(x64):
        trained = jlora.checkpoint.restore(directory).trainable
        like = jax.eval_shape(optax.adamw(lambda step: step).init, trained)
        read = jlora.checkpoint.restore(directory, opt_state=like)
        arrays = jax.tree.leaves((read.trainable, read.opt_state))
        arrays.append(jax.random.key_data(read.key))
        held = [(x.shape, str(x.dtype), jax.device_get(x).tobytes()) for x in arrays]
    return [read.step, read.position, *held]


def main() -> None:
    """Runs all settings and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failed = False
    print(f"{'setting':<24} {'kills':>5}  result")
    for name, how in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            straight, broken = (pathlib.Path(folder, n) for n in ("straight", "broken"))
            run(straight, 0, arguments.seed, STEPS, **how)
            killed = run(broken, arguments.kills, arguments.seed, STEPS, **how)
            x64 = bool(how.get("x64"))
            equal = bits(straight, x64) == bits(broken, x64)
        failed |= not equal
        result = "equal to the bit" if equal else "DIFFERS"
        print(f"{name:<24} {killed:>5}  {result}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], *map(int, sys.argv[3:7]))
    else:
        main()
