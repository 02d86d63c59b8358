"""One fine-tuning run: split, train with checkpoints, resume where it stopped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

import jlora

from .config import Options
from .loop import History, Point, create_state, fit, make_optimizer
from .task import Task


class Result(NamedTuple):
    """What a run leaves; `apply(frozen, trainable, ids, mask)` gives its logits."""

    name: str
    apply: Callable
    frozen: Any
    trainable: jlora.Trainable
    history: History


def run(
    name: str,
    plan: jlora.Plan,
    task: Task,
    options: Options,
    *,
    full_lr: float,
) -> Result:
    """Returns the outcome of fine-tuning as `plan` says.

    Args:
      name: names the run and its directory below `options.out`.
      plan: which weights are adapted and which are trained in full.
      task: the model, its pretrained weights (left as they are) and the data.
      options: the flags.
      full_lr: learning rate of the leaves trained in full.

    Raises:
      SystemExit: if the checkpoint to resume from was written with other settings.
    """
    key = jax.random.key(options.seed)
    frozen, trainable = jlora.split(key, task.variables, plan)
    optimizer = make_optimizer(lr=options.lr, full_lr=full_lr)
    state = create_state(jlora.apply_lora(task.model.apply), trainable, optimizer)
    directory = options.out / name
    settings = {
        "config": json.loads(plan.config.to_json()),
        "lr": options.lr,
        "full_lr": full_lr,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "quantize": options.quantize,
        "seed": options.seed,
    }
    history = History()
    saved = any(path.name.isdigit() for path in directory.glob("*"))
    if options.resume and saved:
        state, history = restore(directory, state, settings)
    else:
        shutil.rmtree(directory, ignore_errors=True)

    def save(state: TrainState, history: History) -> None:
        jlora.checkpoint.save(
            directory,
            state.params,
            opt_state=state.opt_state,
            step=int(state.step),
            metadata={"settings": settings, "history": history._asdict()},
            keep=1,
        )

    epoch = len(task.train.labels) // options.batch_size
    steps = min(options.epochs * epoch, options.steps or options.epochs * epoch)
    state, history = fit(
        state,
        frozen,
        task.train,
        task.test,
        steps=steps,
        size=options.batch_size,
        seed=options.seed,
        save=save,
        history=history,
        name=name,
    )
    return Result(name, state.apply_fn, frozen, state.params, history)


def restore(
    directory: Path, state: TrainState, settings: dict
) -> tuple[TrainState, History]:
    """Returns the last saved state below `directory`, and its history.

    Raises:
      SystemExit: if it was written with other `settings`.
    """
    saved = jlora.checkpoint.restore(directory, opt_state=state.opt_state)
    before = saved.metadata["settings"]
    if changed := [key for key in settings if settings[key] != before.get(key)]:
        lines = [f"  {key}: {before.get(key)} -> {settings[key]}" for key in changed]
        raise SystemExit(
            f"{directory} was written with other settings:\n" + "\n".join(lines) + "\n"
            "Give the same flags to go on, or leave out --resume to start over."
        )
    past = saved.metadata["history"]
    history = History(
        train=tuple(Point(*row) for row in past["train"]),
        test=tuple(Point(*row) for row in past["test"]),
        seconds=past["seconds"],
    )
    step = jnp.asarray(saved.step, jnp.int32)
    state = state.replace(params=saved.trainable, opt_state=saved.opt_state, step=step)
    return state, history
