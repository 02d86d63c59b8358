"""The whole story: mesh, model, adapter, training, merge, export."""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

import jlora

from . import report
from .config import Options, parse
from .data import batch_at
from .layout import batch_sharding, fake_devices, parse_mesh
from .loop import State, create_state, fit, make_loss, make_step
from .model import make_model, split

Batches = Callable[[int], jax.Array]
HELD_OUT = 2**31  # the step whose batch is never trained on
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}  # of the loss, merged and not


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example with the flags in `argv`, by default the command line's."""
    options = parse(argv)
    if options.distributed:
        jax.distributed.initialize()
    if options.fake_devices:
        fake_devices(options.fake_devices)
    try:
        mesh = parse_mesh(options.mesh)
        check_batch(mesh, options.batch)
    except ValueError as error:
        sys.exit(str(error))
    try:
        run(options, mesh)
    except jlora.JloraError as error:
        sys.exit(str(error))


def check_batch(mesh: Mesh, rows: int) -> None:
    """Raises a ValueError if the mesh does not divide the rows of a batch."""
    parts = mesh.size // mesh.shape.get("tensor", 1)
    if rows % parts:
        raise ValueError(
            f"--batch {rows} cannot be cut into {parts} equal parts, one for each "
            f"device along data and fsdp. Give a multiple of {parts}."
        )


def run(options: Options, mesh: Mesh) -> None:
    """Trains, merges and exports on `mesh`, and prints what was measured."""
    report.stage("Devices")
    report.show(report.devices(mesh))

    report.stage("Model")
    model = make_model(options, mesh)
    report.show(str(model.plan))

    report.stage("What lies on each device")
    tx = optax.adamw(options.lr, weight_decay=0.0)
    frozen, trainable, own = split(model, seed=options.seed + 1, spread=options.spread)
    state = create_state(trainable, tx, mesh)
    parts = {"base": frozen, "trained": trainable, "moments": state.moments}
    sizes = {name: report.size(tree) for name, tree in parts.items()}
    report.show(report.layout_table(frozen, trainable))
    report.show("\n" + report.sizes_table(sizes))

    report.stage("Train")
    batch = batches(options, mesh)
    apply = jlora.apply_lora(model.fn, on_merge="error")
    loss, held_out = make_loss(apply), batch(HELD_OUT)
    with checkpoints_of(options, model.plan, frozen) as checkpoints:
        state, first = begin(options, checkpoints, tx, state, own)
        before = float(loss(frozen, state.trainable, held_out))
        state, losses, seconds = fit(
            compiled(make_step(apply, tx, state), state, frozen, batch, options),
            state,
            first=first,
            last=options.steps,
            save=functools.partial(save, checkpoints, options, mesh),
        )
    after = float(loss(frozen, state.trainable, held_out))
    report.show(f"step {options.steps}, state {report.digest(state)}")

    report.stage("Merge and export")
    merged = jlora.merge(frozen, state.trainable)
    check_merged(after, float(make_loss(model.fn)(merged, held_out)), options.dtype)
    folder = Path(options.out)
    jlora.save(folder / "adapter.safetensors", state.trainable)
    jlora.export.orbax(folder / "merged", merged, overwrite=True)
    report.show(f"adapter.safetensors and merged/ are in {folder}")

    report.stage("Result")
    tokens = len(losses) * options.batch * options.length
    figures = {
        "mesh": report.axes(mesh),
        "steps": len(losses),
        "held-out loss before": round(before, 4),
        "held-out loss": round(after, 4),
        "tokens a second": round(tokens / seconds),
    }
    report.finish(folder, figures, sizes)


def batches(options: Options, mesh: Mesh) -> Batches:
    """Returns the function that gives the batch of a step."""
    return functools.partial(
        batch_at,
        rows=options.batch,
        length=options.length,
        vocab=options.vocab,
        seed=options.seed,
        sharding=batch_sharding(mesh),
    )


def checkpoints_of(
    options: Options, plan: jlora.Plan, frozen: Any
) -> jlora.checkpoint.Checkpoints:
    """Returns the checkpoints of a run, with the fingerprint of its base."""
    return jlora.checkpoint.Checkpoints(
        Path(options.out) / "checkpoints",
        keep=2,
        every=options.every,
        plan=plan,
        params=frozen,
    )


def begin(
    options: Options,
    checkpoints: jlora.checkpoint.Checkpoints,
    tx: optax.GradientTransformation,
    state: State,
    shardings: jlora.Trainable,
) -> tuple[State, int]:
    """Returns where to begin: `state`, or what was saved last, laid out like it."""
    newest = checkpoints.newest
    if newest is None:
        if options.resume:
            report.show(f"nothing is saved in {options.out} yet, so this is step 0")
        return state, 0
    if not options.resume:
        sys.exit(
            f"{options.out} holds step {newest} of an earlier run. Give --resume to go "
            "on from it, or another --out."
        )
    if newest >= options.steps:
        sys.exit(f"{options.out} is at step {newest} already. Give more --steps.")
    like = jax.eval_shape(tx.init, state.trainable)
    found = checkpoints.restore(opt_state=like, shardings=shardings)
    state = State(found.trainable, found.opt_state)
    mesh = found.metadata["mesh"]
    report.show(f"step {newest}, saved on {mesh}: state {report.digest(state)}")
    return state, newest


def compiled(
    step: Any, state: State, frozen: Any, batch: Batches, options: Options
) -> Callable[[State, int], tuple[State, jax.Array]]:
    """Returns the step by number, after compiling it."""
    keys = jax.random.key(options.seed + 2)

    def key_at(i: int) -> jax.Array | None:
        return jax.random.fold_in(keys, i) if options.dropout else None

    began = time.perf_counter()
    program = step.lower(state, frozen, batch(0), key_at(0)).compile()
    needed = report.nbytes(program.memory_analysis().temp_size_in_bytes)
    seconds = time.perf_counter() - began
    report.show(f"compiled in {seconds:.1f} s; a step needs {needed} more on a device")
    return lambda state, i: program(state, frozen, batch(i), key_at(i))


def save(
    checkpoints: jlora.checkpoint.Checkpoints,
    options: Options,
    mesh: Mesh,
    state: State,
    done: int,
) -> None:
    """Begins to write a checkpoint, if it is time for one."""
    checkpoints.save(
        state.trainable,
        step=done,
        opt_state=state.moments,
        metadata={"mesh": report.axes(mesh)},
        force=done == options.steps,
    )


def check_merged(adapted: float, merged: float, dtype: str) -> None:
    """Raises a RuntimeError if merging has changed the held-out loss."""
    difference = abs(adapted - merged)
    report.show(f"held-out loss, merged and not, differs by {difference:.1e}")
    if not difference <= TOLERANCE[dtype]:
        raise RuntimeError(f"Merging changed the loss by {difference}.")
