"""One run: from its checkpoints or the beginning, step by step, to its last step."""

import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

import jlora
from examples.sharded.layout import batch_sharding
from examples.sharded.loop import State

from .config import Options
from .loop import Apply, evaluate, in_parts, make_step, placed
from .metrics import Log
from .packing import Batch


class Task(NamedTuple):
    """What a run works on.

    Attributes:
      apply: the adapted forward function.
      frozen: the frozen side of the model.
      plan: what is adapted.
      train: endless batches.
      test: held-out documents, in batches.
      mesh: the devices.
    """

    apply: Apply
    frozen: Any
    plan: jlora.Plan
    train: grain.IterDataset
    test: list[Batch]
    mesh: Mesh

    def test_loss(self, trainable: jlora.Trainable) -> float:
        """Returns the mean cross-entropy on the held-out documents."""
        where = batch_sharding(self.mesh)
        return evaluate(self.apply, self.frozen, trainable, self.test, where)


class Start(NamedTuple):
    """Where a run begins, or goes on.

    Attributes:
      step: how many steps are done.
      state: A, B and moments.
      data: the batches that follow.
      before: what was measured before the first step; None at the beginning.
    """

    step: int
    state: State
    data: Iterator[Batch]
    before: Any


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


def checkpoints_of(task: Task, options: Options) -> jlora.checkpoint.Checkpoints:
    """Returns the checkpoints of a run, with the fingerprint of its base.

    Raises:
      RunError: if there are some, and the flags do not say what is to become of them.
    """
    folder = options.out / "checkpoints"
    if options.restart and jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    found = [path for path in folder.glob("*") if path.name.isdecimal()]
    if found and not options.resume:
        last = max(int(path.name) for path in found)
        raise RunError(
            f"{options.out} holds a run of {last} steps. Give --resume to go on, "
            "--restart to delete it, or another --out."
        )
    return jlora.checkpoint.Checkpoints(
        folder, keep=2, every=options.save_every, plan=task.plan, params=task.frozen
    )


def start(
    checkpoints: jlora.checkpoint.Checkpoints,
    task: Task,
    state: State,
    tx: optax.GradientTransformation,
    settings: dict[str, Any],
) -> Start:
    """Returns where to go on: at the newest checkpoint, or at `state` without one.

    Raises:
      RunError: if the checkpoint was written with other `settings`.
    """
    data = iter(task.train)
    if checkpoints.newest is None:
        return Start(0, state, data, None)
    found = checkpoints.restore(
        opt_state=jax.eval_shape(tx.init, state.trainable),
        shardings=jax.tree.map(lambda x: x.sharding, state.trainable),
    )
    before = found.metadata["settings"]
    if changed := [k for k in settings if settings[k] != before.get(k)]:
        lines = [f"  {k}: {before.get(k)} -> {settings[k]}" for k in changed]
        dated = (
            "\nThe tokens of the data are others. If the file is the same, the "
            "template writes today's date: fix it with --template-args, as "
            '{"date_string": "26 Jul 2024"}.'
        )
        raise RunError(
            "The checkpoint was written with other settings:\n"
            + "\n".join(lines)
            + "\nGive the same ones to go on, or --restart to delete it."
            + (dated if "data" in changed else "")
        )
    data.set_state(found.position)
    state = State(found.trainable, found.opt_state)
    return Start(found.step, state, data, found.metadata["before"])


def saver(
    checkpoints: jlora.checkpoint.Checkpoints, metadata: Any, *, last: int
) -> Callable[[int, State, Any], Any]:
    """Returns what begins to write a checkpoint, if it is time for one.

    State and position in the data are one checkpoint: both are there, or neither.
    """

    def save(step: int, state: State, position: Any) -> None:
        checkpoints.save(
            state.trainable,
            step=step,
            opt_state=state.moments,
            position=position,
            metadata=metadata,
            force=step == last,
        )

    return save


def fit(
    task: Task,
    options: Options,
    begin: Start,
    tx: optax.GradientTransformation,
    *,
    steps: int,
    rate: optax.Schedule,
    save: Callable[[int, State, Any], Any],
    log: Log,
) -> State:
    """Returns the state after `steps` steps in all.

    Args:
      task: what to train on.
      options: the flags.
      begin: where to begin; its state is consumed.
      tx: the optimizer.
      steps: the step to stop at.
      rate: the learning rate, for the log.
      save: called after each step, with its number, the state, and where in the data
        the next batch is.
      log: takes the metrics.

    Raises:
      RunError: if the loss is not finite.
    """
    step = make_step(task.apply, tx, begin.state)
    state, where = begin.state, batch_sharding(task.mesh)
    told: Callable[[], str] | None = None
    began: float | None = None  # when the step before ended

    def tell(i: int, metrics: Any, real: int) -> str:
        loss, norm, learnt = (float(x) for x in jax.device_get(metrics))
        if not math.isfinite(loss):
            raise RunError(
                f"The loss of step {i} is {loss}. Lower --lr, or give --dtype float32."
            )
        nonlocal began
        now, rates = time.perf_counter(), {}
        if began is not None:
            rates = {"tokens_per_second": real / (now - began)}
        began = now
        numbers = {"loss": loss, "gradient_norm": norm, "learnt": learnt}
        log(i, **numbers, lr=float(rate(i - 1)), tokens=real, **rates)
        shown = [f"loss {loss:.3f}"] + [f"{x:,.0f} tokens/s" for x in rates.values()]
        return ", ".join(shown)

    hidden = jax.process_index() != 0
    with tqdm(
        desc="   train", initial=begin.step, total=steps, unit="step", disable=hidden
    ) as bar:
        for i in range(begin.step + 1, steps + 1):
            batch = next(begin.data)
            state, metrics = step(
                task.frozen, state, placed(in_parts(batch, options.accumulate), where)
            )
            if told is not None:  # one step behind: devices never wait for the host
                bar.set_postfix_str(told(), refresh=False)
                bar.update()
            real = int(np.count_nonzero(batch.segments))
            told = functools.partial(tell, i, metrics, real)
            save(i, state, begin.data.get_state())
            if options.eval_every and i % options.eval_every == 0 and i < steps:
                log_test(log, i, task.test_loss(state.trainable))
                began = None
        if told is not None:
            bar.set_postfix_str(told(), refresh=False)
            bar.update()
    return state


def log_test(log: Log, step: int, loss: float) -> None:
    """Logs a loss on held-out documents, and what perplexity that is."""
    log(step, test_loss=loss, test_perplexity=math.exp(loss))
