"""Adapter-only Orbax checkpoints that need nothing else to be read again.

A checkpoint holds A, B and the leaves trained in full, how each weight is adapted (as
JSON), and what was given of optimizer state, step, random key, data position, config,
plan and metadata. Of the base model it holds a fingerprint or nothing. Steps are
written whole or not at all, so a killed save loses nothing. A directory has one writer
at a time.
"""

import contextlib
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

import jax
from numpy.typing import ArrayLike

from ._checks import check_known
from ._io.disk import Path
from ._io.fingerprint import (
    Fingerprint as Fingerprint,
    as_fingerprint,
    fingerprint as fingerprint,
)
from ._io.read_step import Checkpoint as Checkpoint, read_step
from ._io.write_step import (
    check_keep,
    contents,
    delete_old,
    only_writer,
    open_manager,
    overwrite_step,
    run_of,
    saving,
    sweep,
    write_step,
)
from ._plan.plan import Plan
from .config import LoraConfig
from .errors import CheckpointError
from .factors import PyTree, Trainable


def save(
    directory: Path,
    trainable: Trainable,
    *,
    step: int = 0,
    opt_state: PyTree = None,
    key: jax.Array | None = None,
    position: Any = None,
    config: LoraConfig | None = None,
    plan: Plan | None = None,
    params: PyTree | Fingerprint = None,
    metadata: Any = None,
    keep: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the adapter as step `step` of the checkpoints in `directory`.

    Returns when all is on disk. In a training loop, `Checkpoints` writes in the
    background.

    Args:
      directory: made if it does not exist; each step is a folder in it.
      trainable: the adapter.
      step: number of the step, at least 0.
      opt_state: the optimizer's state, any pytree of arrays.
      key: a random key, or an array of them, new style or old.
      position: where in the data training is, any JSON value, such as the state that a
        grain iterator's `get_state` returns.
      config: the config; None takes that of `plan`.
      plan: the plan.
      params: the base's parameters, whole or `frozen`, or their `fingerprint`. Only the
        fingerprint is saved; `restore` compares it.
      metadata: any other JSON value.
      keep: how many of the newest steps to keep; None keeps all.
      overwrite: replace a step that is already there, which is whole until the new one
        is.

    Raises:
      TreeError: if `trainable` is not a `Trainable`.
      CheckpointError: if the step is already there, it cannot be written, another
        writer has the directory, the adapter is one that `restore` would refuse, or a
        factor or a full leaf holds NaN or infinity, which nobody wants to resume from.

    Examples:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> adapter = jlora.Trainable(full={"head": jnp.arange(3.0)})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder, adapter, step=7, metadata={"seed": 0})
      ...     ck = restore(folder)
      >>> ck.step, ck.trainable.full["head"], ck.metadata
      (7, Array([0., 1., 2.], dtype=float32), {'seed': 0})
    """
    check_keep(keep)
    check_known("checkpoint.save", trainable, opt_state, key, position, params)
    about, items = contents(
        step,
        trainable,
        opt_state=opt_state,
        key=key,
        position=position,
        metadata=metadata,
        run=run_of(config, plan, params),
    )
    with only_writer(directory):
        with open_manager(directory, write=True, keep=keep) as manager:
            if step in manager.all_steps() and overwrite:
                overwrite_step(manager, step, about, items)
            else:
                write_step(manager, step, about, items)
            with saving(f"Step {step} is not saved in {str(directory)!r}"):
                manager.wait_until_finished()
                delete_old(manager, keep)
        sweep(directory)


def restore(
    directory: Path,
    *,
    step: int | None = None,
    opt_state: PyTree = None,
    shardings: jax.sharding.Sharding | Trainable | None = None,
    params: PyTree | Fingerprint = None,
) -> Checkpoint:
    """Returns the newest checkpoint in `directory`, or that of `step`.

    A checkpoint is read onto any number of devices, whatever it was saved from.

    Args:
      directory: what `save` was given.
      step: which step; None is the newest.
      opt_state: a template, `tx.init(trainable)` or its `jax.eval_shape`; without one
        the saved state is not read. Its leaves are placed as the template's are. Shapes
        that do not say where are placed as `shardings` says of the adapter: moments
        beside their leaf, the rest on all its devices.
      shardings: where to place the adapter: one `jax.sharding.Sharding`, or a
        `Trainable` of them; None is the first device.
      params: the base's parameters, whole or `frozen`, or their `fingerprint`, to be
        compared with those that the adapter was saved with.

    Raises:
      CheckpointError: if there is no such checkpoint, it is not jlora's, it is damaged,
        or it does not fit the template or the base.

    Examples:
      >>> import tempfile, jax, jax.numpy as jnp, jlora, optax
      >>> adapter = jlora.Trainable(full={"head": jnp.arange(3.0)})
      >>> tx = optax.sgd(0.1, momentum=0.9)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder, adapter, opt_state=tx.init(adapter), key=jax.random.key(0))
      ...     like = jax.eval_shape(tx.init, adapter)
      ...     ck = restore(folder, opt_state=like)
      >>> ck.opt_state[0].trace.full["head"], jax.random.key_data(ck.key)
      (Array([0., 0., 0.], dtype=float32), Array([0, 0], dtype=uint32))
    """
    if not os.path.isdir(directory):
        raise CheckpointError(f"There is no folder {str(directory)!r} to restore from.")
    with open_manager(directory, write=False) as manager:
        return read_step(manager, step, opt_state, shardings, params)


class Checkpoints:
    """The checkpoints of a training loop, written in the background.

    This is a context, whose end waits for the last save. Training goes on as soon as
    the arrays are copied to the host; they may be donated to the next step. Each step
    is written whole or not at all, so a run that is killed at any moment goes on from
    its newest checkpoint.

    Args:
      directory: made if it does not exist.
      keep: how many of the newest steps to keep; None keeps all.
      best: name of a metric; the step where it is best is kept as well.
      mode: `"max"` or `"min"`: whether the largest or the smallest value is best.
      every: `save` writes only steps that are multiples of it.
      config: see `save`.
      plan: see `save`.
      params: see `save`; also compared by `restore`. They are hashed once.

    Raises:
      CheckpointError: for a value that cannot work, or a directory that cannot be made
        or that another writer has.

    Examples:
      >>> import tempfile, jax, jax.numpy as jnp, jlora
      >>> adapter = jlora.Trainable(full={"head": jnp.zeros(3)})
      >>> key = jax.random.key(0)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with Checkpoints(folder, keep=2, best="accuracy", every=10) as ckpts:
      ...         for step in range(0, 50):
      ...             metrics = {"accuracy": 1 / (1 + abs(step - 20))}
      ...             _ = ckpts.save(adapter, step=step, key=key, metrics=metrics)
      ...         ckpts.wait()
      ...         ckpts.steps, ckpts.newest, ckpts.best, ckpts.restore().metrics
      ((20, 30, 40), 40, 20, {'accuracy': 0.047619047619047616})
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int | None = 3,
        best: str | None = None,
        mode: Literal["max", "min"] = "max",
        every: int = 1,
        config: LoraConfig | None = None,
        plan: Plan | None = None,
        params: PyTree | Fingerprint = None,
    ):
        check_keep(keep)
        if mode not in ("max", "min"):
            raise CheckpointError(f"mode must be 'max' or 'min', got {mode!r}.")
        if not isinstance(every, int) or every < 1:
            raise CheckpointError(f"every must be a number from 1, got {every!r}.")
        self._params = None if params is None else as_fingerprint(params)
        self._run = run_of(config, plan, self._params)
        self._directory, self._every, self._metric = directory, every, best
        with contextlib.ExitStack() as stack:
            stack.enter_context(only_writer(directory))
            self._manager = open_manager(
                directory, write=True, keep=keep, best=best, mode=mode, wait=False
            )
            self._end = stack.pop_all()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ending = contextlib.suppress(Exception)  # it would hide the first error
        try:
            if kind is None:
                self.wait()
                ending = saving(f"{str(self._directory)!r} cannot be closed")
        finally:
            try:
                with ending:
                    self._manager.close()
            finally:
                sweep(self._directory)
                self._end.close()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are there, with one that is being written."""
        return tuple(sorted(self._manager.all_steps()))

    @property
    def newest(self) -> int | None:
        """The last step; None if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step with the best metric; None without metrics."""
        return self._manager.best_step() if self._metric else None

    def save(
        self,
        trainable: Trainable,
        *,
        step: int,
        opt_state: PyTree = None,
        key: jax.Array | None = None,
        position: Any = None,
        metrics: Mapping[str, ArrayLike] | None = None,
        metadata: Any = None,
        force: bool = False,
    ) -> bool:
        """Begins to write a checkpoint, if `step` is a multiple of `every`.

        Args:
          trainable: the adapter.
          step: number of the step.
          opt_state: see `checkpoint.save`.
          key: see `checkpoint.save`.
          position: see `checkpoint.save`.
          metrics: numbers by name, `best`'s among them.
          metadata: see `checkpoint.save`.
          force: whether to write a step that is not a multiple of `every`.

        Returns:
          Whether it is written.

        Raises:
          CheckpointError: see `checkpoint.save`; also if an earlier save has failed in
            the background.
        """
        if not force and step % self._every:
            return False
        if self._metric and self._metric not in (metrics or {}):
            raise CheckpointError(
                f"Step {step} needs metrics={{{self._metric!r}: ...}}, by which the "
                f"best is chosen; got {sorted(metrics or {})}."
            )
        check_known("checkpoint.Checkpoints.save", trainable, opt_state, key, position)
        about, items = contents(
            step,
            trainable,
            opt_state=opt_state,
            key=key,
            position=position,
            metadata=metadata,
            metrics=metrics,
            run=self._run,
        )
        self.wait()  # as Orbax would; a save that runs also moves steps to be swept
        sweep(self._directory)
        write_step(self._manager, step, about, items)
        return True

    def restore(
        self,
        *,
        step: int | None = None,
        opt_state: PyTree = None,
        shardings: jax.sharding.Sharding | Trainable | None = None,
    ) -> Checkpoint:
        """Returns the newest checkpoint, or that of `step`; see `checkpoint.restore`.

        Args:
          step: which step; None is the newest.
          opt_state: see `checkpoint.restore`.
          shardings: see `checkpoint.restore`.

        Raises:
          CheckpointError: also if there is none; look at `newest` first.
        """
        self.wait()
        return read_step(self._manager, step, opt_state, shardings, self._params)

    def wait(self) -> None:
        """Returns when all is on disk.

        Raises:
          CheckpointError: if a save has failed in the background.
        """
        with saving(f"A step is not saved in {str(self._directory)!r}"):
            self._manager.wait_until_finished()
