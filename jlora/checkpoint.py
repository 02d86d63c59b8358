"""Adapter-only Orbax checkpoints that need nothing else to be read again.

A checkpoint holds A, B and the leaves trained in full, how each weight is adapted (as
JSON), and what was given of optimizer state, step, random key, data position, config,
plan and metadata. Of the base model it holds a fingerprint at most. Steps are written
whole or not at all, so a killed save loses nothing.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ._describe import (
    arrays,
    describe,
    key_from_dict,
    key_to_dict,
    not_finite,
    plan_from_dict,
    plan_to_dict,
    rebuild,
)
from ._fingerprint import (
    Fingerprint as Fingerprint,
    differences,
    fingerprint as fingerprint,
)
from ._plan import Plan
from ._split import check_trainable
from .config import LoraConfig
from .errors import CheckpointError, JloraError
from .factors import Trainable

_FORMAT = 1
_DELETED = ".deleted"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What `restore` read; None for what was not saved.

    Attributes:
      trainable: the adapter.
      opt_state: like the template, or None if none was given.
      step: the step it was saved at.
      metadata: the JSON value given to `save`.
      key: the random key, of the kind that was saved.
      position: the JSON value given to `save` as position in the data.
      config: the `LoraConfig`.
      plan: the `Plan`.
      metrics: numbers by name.
    """

    trainable: Trainable
    opt_state: Any
    step: int
    metadata: Any
    key: Any = None
    position: Any = None
    config: LoraConfig | None = None
    plan: Plan | None = None
    metrics: Mapping[str, float] | None = None


def save(
    directory: str | os.PathLike,
    trainable: Trainable,
    *,
    opt_state: Any = None,
    step: int = 0,
    key: Any = None,
    position: Any = None,
    config: LoraConfig | None = None,
    plan: Plan | None = None,
    base: Any = None,
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
      opt_state: the optimizer's state, any pytree of arrays.
      step: number of the step, at least 0.
      key: a random key, or an array of them, new style or old.
      position: where in the data training is, any JSON value.
      config: the config; None takes that of `plan`.
      plan: the plan.
      base: the base's parameters, `frozen`, or their `fingerprint`. The fingerprint
        alone is saved, and checked by `restore`.
      metadata: any other JSON value.
      keep: how many of the newest steps to keep; None keeps all.
      overwrite: replace a step that is already there; it is gone while the new one is
        written.

    Raises:
      TreeError: if `trainable` is no `Trainable`.
      CheckpointError: if the step is already there, it cannot be written, or a factor
        or a full leaf holds NaN or infinity, which nobody wants to resume from.

    Examples:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> adapter = jlora.Trainable(full={"head": jnp.arange(3.0)})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder, adapter, step=7, metadata={"seed": 0})
      ...     ck = restore(folder)
      >>> ck.step, ck.trainable.full["head"], ck.metadata
      (7, Array([0., 1., 2.], dtype=float32), {'seed': 0})
    """
    _check_keep(keep)
    about, items = _contents(
        step,
        trainable,
        opt_state=opt_state,
        key=key,
        position=position,
        metadata=metadata,
        run=_run(config, plan, base),
    )
    with _manager(directory, write=True, keep=keep) as manager:
        if step in manager.all_steps() and overwrite:
            manager.delete(step)
        _write(manager, step, about, items)
        with _told(f"Step {step} is not saved in {str(directory)!r}"):
            manager.wait_until_finished()
    _sweep(directory)


def restore(
    directory: str | os.PathLike,
    *,
    opt_state: Any = None,
    step: int | None = None,
    shardings: Any = None,
    base: Any = None,
) -> Checkpoint:
    """Returns the newest checkpoint in `directory`, or that of `step`.

    A checkpoint is read onto any number of devices, whatever it was saved from.

    Args:
      directory: what `save` was given.
      opt_state: a template, `tx.init(trainable)` or its `jax.eval_shape`; without one
        the saved state is not read. Its leaves are placed as the template's are.
      step: which step; None is the newest.
      shardings: where to place the adapter: one `jax.sharding.Sharding`, or a
        `Trainable` of them; None is the first device.
      base: the base's parameters, `frozen`, or their `fingerprint`: an error if the
        adapter was saved with another base.

    Raises:
      CheckpointError: if there is no such checkpoint, it is not jlora's, it is damaged,
        or it does not fit the template or the base.
    """
    if not pathlib.Path(directory).is_dir():
        raise CheckpointError(f"There is no folder {str(directory)!r} to restore from.")
    with _manager(directory, write=False) as manager:
        return _read(manager, step, opt_state, shardings, base)


class Checkpoints:
    """The checkpoints of a training loop, written in the background.

    A context: its end waits for the last save. Training goes on as soon as the arrays
    are copied to the host; they may be donated to the next step. Each step is written
    whole or not at all, so a run that is killed at any moment goes on from its newest
    checkpoint.

    Args:
      directory: made if it does not exist.
      keep: how many of the newest steps to keep; None keeps all.
      best: name of a metric; the step where it is best is kept as well.
      mode: `"max"` or `"min"`, what is best.
      every: `save` writes steps that are multiples of it, and passes over others.
      config: see `save`.
      plan: see `save`.
      base: see `save`; also checked by `restore`. Hashed once.

    Raises:
      CheckpointError: for a value that cannot work, or a directory that cannot be made.

    Examples:
      >>> import tempfile, jax, jax.numpy as jnp, jlora
      >>> adapter = jlora.Trainable(full={"head": jnp.zeros(3)})
      >>> key = jax.random.key(0)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with Checkpoints(folder, keep=2, best="accuracy", every=10) as ckpts:
      ...         for step in range(0, 50):
      ...             accuracy = 1 / (1 + abs(step - 20))
      ...             _ = ckpts.save(
      ...                 step, adapter, key=key, metrics={"accuracy": accuracy}
      ...             )
      ...         ckpts.wait()
      ...         ckpts.steps, ckpts.newest, ckpts.best, ckpts.restore().metrics
      ((20, 30, 40), 40, 20, {'accuracy': 0.047619047619047616})
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int | None = 3,
        best: str | None = None,
        mode: Literal["max", "min"] = "max",
        every: int = 1,
        config: LoraConfig | None = None,
        plan: Plan | None = None,
        base: Any = None,
    ):
        _check_keep(keep)
        if mode not in ("max", "min"):
            raise CheckpointError(f"mode must be 'max' or 'min', got {mode!r}.")
        if not isinstance(every, int) or every < 1:
            raise CheckpointError(f"every must be a number from 1, got {every!r}.")
        self._base = None if base is None else _as_fingerprint(base)
        self._run = _run(config, plan, self._base)
        self._directory, self._every, self._metric = directory, every, best
        self._manager = _manager(
            directory, write=True, keep=keep, best=best, mode=mode, wait=False
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self.wait()
            else:
                with contextlib.suppress(Exception):  # it would hide the first error
                    self._manager.wait_until_finished()
        finally:
            self._manager.close()
            _sweep(self._directory)

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
        step: int,
        trainable: Trainable,
        *,
        opt_state: Any = None,
        key: Any = None,
        position: Any = None,
        metrics: Mapping[str, Any] | None = None,
        metadata: Any = None,
        force: bool = False,
    ) -> bool:
        """Begins to write a checkpoint, if `step` is a multiple of `every`.

        Args:
          step: number of the step.
          trainable: the adapter.
          opt_state: see `checkpoint.save`.
          key: see `checkpoint.save`.
          position: see `checkpoint.save`.
          metrics: numbers by name, `best`'s among them.
          metadata: see `checkpoint.save`.
          force: whether to write a step that is no multiple of `every`.

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
        about, items = _contents(
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
        _sweep(self._directory)
        _write(self._manager, step, about, items)
        return True

    def restore(
        self, step: int | None = None, *, opt_state: Any = None, shardings: Any = None
    ) -> Checkpoint:
        """Returns the newest checkpoint, or that of `step`; see `checkpoint.restore`.

        Raises:
          CheckpointError: also if there is none; look at `newest` first.
        """
        self.wait()
        return _read(self._manager, step, opt_state, shardings, self._base)

    def wait(self) -> None:
        """Returns when all is on disk.

        Raises:
          CheckpointError: if a save has failed in the background.
        """
        with _told(f"A step is not saved in {str(self._directory)!r}"):
            self._manager.wait_until_finished()


def _manager(
    directory: str | os.PathLike,
    *,
    write: bool,
    keep: int | None = None,
    best: str | None = None,
    mode: str = "max",
    wait: bool = True,
):
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    worst = -math.inf if mode == "max" else math.inf

    def metric(metrics: Mapping[str, float]) -> float:
        value = metrics.get(str(best), worst)
        return worst if math.isnan(value) else value

    preserved: list[Any] = [policies.LatestN(keep)]
    if best:
        preserved.append(
            policies.BestN(
                get_metric_fn=metric,
                reverse=mode == "min",
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    if write:
        _sweep(directory)
    with _told(f"{str(directory)!r} cannot be opened for checkpoints"):
        if pathlib.Path(directory).is_file():
            raise NotADirectoryError("it is a file")
        return ocp.CheckpointManager(
            pathlib.Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(
                create=write,
                # What a killed run left half written.
                cleanup_tmp_directories=write,
                # A step is renamed, and then deleted: no half step keeps its name.
                todelete_subdir=_DELETED if write else None,
                preservation_policy=policies.AnyPreservationPolicy(preserved),
                best_fn=metric if best else None,
                best_mode=mode,
                enable_async_checkpointing=not wait,
            ),
        )


def _sweep(directory: str | os.PathLike) -> None:
    """Deletes for good the steps that were deleted."""
    if jax.process_index() == 0:
        shutil.rmtree(pathlib.Path(directory) / _DELETED, ignore_errors=True)


def _check_keep(keep: int | None) -> None:
    if keep is not None and keep < 1:
        raise CheckpointError(f"keep must be at least 1, or None for all, got {keep}.")


def _run(config: LoraConfig | None, plan: Plan | None, base: Any) -> dict[str, Any]:
    """Returns what is the same for all checkpoints of a run, as JSON values."""
    if config is None and plan is not None:
        config = plan.config
    return {
        "config": None if config is None else config.to_json(),
        "plan": None if plan is None else plan_to_dict(plan),
        "base": None if base is None else dict(_as_fingerprint(base).leaves),
    }


def _as_fingerprint(base: Any) -> Fingerprint:
    return base if isinstance(base, Fingerprint) else fingerprint(base)


def _contents(
    step: int,
    trainable: Trainable,
    *,
    opt_state: Any,
    key: Any,
    position: Any,
    metadata: Any,
    run: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the JSON part and the arrays of a checkpoint, both checked."""
    check_trainable(trainable)
    if not isinstance(step, int | np.integer) or step < 0:
        raise CheckpointError(f"step must be a whole number from 0, got {step!r}.")
    adapter, labels = {}, {}
    for i, path, part, x in arrays(trainable):
        adapter[f"{i:06d}-{part}"] = x
        labels[f"{i:06d}-{part}"] = f"{path!r} ({part})"
    bad = not_finite(adapter)
    if bad:
        raise CheckpointError(
            f"Not saved: NaN or infinity in {', '.join(labels[k] for k in bad[:5])}. "
            "The last good step is still there to restore."
        )
    state = _numbered(opt_state)
    about = {
        "format": _FORMAT,
        **describe(trainable),
        "arrays": _shapes(adapter),
        "opt_state": _shapes(state),
        "metadata": metadata,
        "key": None if key is None else key_to_dict(key),
        "position": position,
        "metrics": None
        if metrics is None
        else {k: float(v) for k, v in metrics.items()},
        **run,
    }
    for name in ("metadata", "position"):
        try:
            json.dumps(about[name])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{name} is no JSON value: {error}.") from error
    return about, {"adapter": adapter, "opt_state": state}


def _write(
    manager: Any, step: int, about: dict[str, Any], trees: dict[str, Any]
) -> None:
    import orbax.checkpoint as ocp

    if step in manager.all_steps():
        raise CheckpointError(
            f"Step {step} is already in {str(manager.directory)!r}. Save another step, "
            "another directory, or pass overwrite=True to checkpoint.save."
        )
    items: dict[str, Any] = {"about": ocp.args.JsonSave(about)}
    for name, tree in trees.items():
        if tree:  # Orbax refuses an item without arrays
            items[name] = ocp.args.StandardSave(tree)
    with _told(f"Step {step} is not saved in {str(manager.directory)!r}"):
        manager.save(
            int(step),
            args=ocp.args.Composite(**items),
            metrics=about["metrics"],
            force=True,
        )


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns whatever Orbax raises into a `CheckpointError`."""
    try:
        yield
    except JloraError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{what} ({type(error).__name__}: {error}). The steps that were saved "
            "before are as they were."
        ) from error


def _read(
    manager: Any, step: int | None, opt_state: Any, shardings: Any, base: Any
) -> Checkpoint:
    import orbax.checkpoint as ocp

    where = str(manager.directory)
    steps = sorted(manager.all_steps())
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint" if step is None else f"step {step}"
        raise CheckpointError(f"No {wanted} in {where!r}; it has steps {steps}.")
    step = int(steps[-1] if step is None else step)
    items: dict[str, Any] = {"about": ocp.args.JsonRestore()}
    template = _numbered(opt_state)
    try:
        about = manager.restore(step, args=ocp.args.Composite(**items)).about
        _check_about(about)
        misfits = _misfits(template, about["opt_state"])
        if misfits:
            raise CheckpointError(
                f"Step {step} in {where!r}: its optimizer state does not "
                f"fit the template: {'; '.join(misfits[:5])}. Give the state of "
                "the optimizer and adapter that it was saved with."
            )
        if base is not None:
            _check_base(f"Step {step} in {where!r}", about, _as_fingerprint(base))
        wanted = {
            "adapter": _adapter_template(about, shardings),
            "opt_state": {k: _with_place(x) for k, x in template.items()},
        }
        items = {k: ocp.args.StandardRestore(v) for k, v in wanted.items() if v}
        read = manager.restore(step, args=ocp.args.Composite(**items))
        keys, found = _keys(about), read.get("adapter") or {}
        trainable = rebuild(about, {keys[k]: x for k, x in found.items()})
        plan, key = about.get("plan"), about.get("key")
        config = about.get("config")
        if template:
            leaves = [read.opt_state[k] for k in template]
            opt_state = jax.tree.structure(opt_state).unflatten(leaves)
        return Checkpoint(
            trainable,
            opt_state,
            step,
            about["metadata"],
            None if key is None else key_from_dict(key),
            about.get("position"),
            None if config is None else LoraConfig.from_json(config),
            None if plan is None else plan_from_dict(plan),
            about.get("metrics"),
        )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"Step {step} in {where!r} cannot be read "
            f"({type(error).__name__}: {error}). It is damaged, not a jlora "
            "checkpoint, or its optimizer state does not fit the template."
        ) from error


def _check_about(about: Any) -> None:
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise CheckpointError(
            f"This is no jlora checkpoint of format {_FORMAT}: it says {about!r:.200}."
        )


def _check_base(where: str, about: dict[str, Any], base: Fingerprint) -> None:
    saved = about.get("base")
    if saved is None:
        raise CheckpointError(
            f"{where} was saved without base=, so the base cannot be checked. Leave "
            "base= out, or save it anew with base=."
        )
    told = differences(saved, base, about["full"])
    if told:
        more = f"; and {len(told) - 5} more" if len(told) > 5 else ""
        raise CheckpointError(
            f"{where} was trained on another base: {'; '.join(told[:5])}{more}. Load "
            "the weights that it was trained on."
        )


def _keys(about: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Returns path and part of each array by its number."""
    keys = {}
    for name in about["arrays"]:
        number, part = name.split("-")
        full = part == "full"
        path = about["full"][int(number)] if full else about["lora"][int(number)][0]
        keys[name] = path, part
    return keys


def _adapter_template(about: dict[str, Any], shardings: Any) -> dict[str, Any]:
    """Returns shapes, dtypes and places of the adapter's arrays by number."""
    one = shardings if isinstance(shardings, jax.sharding.Sharding) else _first_device()
    own = {}
    if isinstance(shardings, Trainable):
        own = {(path, part): place for _, path, part, place in arrays(shardings)}
    elif shardings is not None and one is not shardings:
        raise CheckpointError(
            "shardings must be one jax.sharding.Sharding or a jlora.Trainable of "
            f"them, got {type(shardings).__name__}."
        )
    keys = _keys(about)
    return {
        name: jax.ShapeDtypeStruct(
            tuple(shape), jnp.dtype(dtype), sharding=own.get(keys[name], one)
        )
        for name, (shape, dtype) in about["arrays"].items()
    }


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _with_place(x: Any) -> Any:
    """Returns a template's leaf with a place: the saved one's devices may be gone."""
    if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is None:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_first_device())
    return x


def _shapes(named: dict[str, Any]) -> dict[str, list[Any]]:
    return {k: [list(jnp.shape(x)), str(x.dtype)] for k, x in named.items()}


def _misfits(template: dict[str, Any], saved: dict[str, list[Any]]) -> list[str]:
    """Returns in words where the template of the optimizer's state is another one."""
    wanted = _shapes(template)
    return [
        f"leaf {int(k)} is {saved.get(k, 'absent')}, wanted {wanted.get(k, 'none')}"
        for k in sorted({*wanted, *saved})
        if wanted and wanted.get(k) != saved.get(k)
    ]


def _numbered(tree: Any) -> dict[str, Any]:
    """Returns the leaves of `tree` by number; the structure comes from the template."""
    return {f"{i:06d}": x for i, x in enumerate(jax.tree.leaves(tree))}
