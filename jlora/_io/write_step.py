"""Steps of checkpoints, checked and written by Orbax's manager."""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from .._numerics import not_finite
from .._plan.plan import Plan
from .._plan.serial import plan_to_dict
from .._tables import listed
from .._text.json_text import parse_json
from ..config import LoraConfig
from ..errors import CheckpointError
from ..factors import Leaf, PyTree, Trainable
from . import beside
from .beside import put_back, targets
from .describe import arrays, check_whole, describe, key_to_dict
from .disk import Json, Path, check_files, check_name, told
from .fingerprint import Fingerprint, as_fingerprint
from .folders import replacing_folder
from .locks import alone

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

FORMAT = 2
_DELETED = ".deleted"
_WRITER = ".writer"  # a file that says who writes here


def open_manager(
    directory: Path,
    *,
    write: bool,
    keep: int | None = None,
    best: str | None = None,
    mode: str = "max",
    wait: bool = True,
) -> "CheckpointManager":
    """Returns Orbax's manager of a directory, a context; see `checkpoint.Checkpoints`.

    Raises:
      CheckpointError: if the directory cannot be made or opened.
    """
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
    for name in filter(str.isdecimal, targets(pathlib.Path(directory))):
        put_back(pathlib.Path(directory) / name)
    if write:
        sweep(directory)
    with saving(f"{str(directory)!r} cannot be opened for checkpoints"):
        for step in pathlib.Path(directory).glob("[0-9]*"):
            if step.name.isdecimal() and step.is_dir():
                check_files(step)  # Orbax reads something of each
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


def sweep(directory: Path) -> None:
    """Deletes for good the steps that were deleted, and what killed writers left."""
    folder = pathlib.Path(directory)
    if jax.process_index() == 0:
        shutil.rmtree(folder / _DELETED, ignore_errors=True)
        for name in filter(str.isdecimal, targets(folder)):
            beside.sweep(folder / name)


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Makes a directory, and is the only writer of checkpoints in it in the block.

    Raises:
      CheckpointError: if there is another one, or the directory cannot be made.
    """
    folder = pathlib.Path(directory)
    with contextlib.ExitStack() as stack:
        with saving(f"{str(directory)!r} cannot be opened for checkpoints"):
            check_name(directory)
            if os.path.lexists(directory) and not os.path.isdir(directory):
                raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a directory")
            folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                try:
                    stack.enter_context(alone(folder / _WRITER))
                except BlockingIOError as error:
                    raise CheckpointError(
                        f"{str(directory)!r} has a writer already: {error}. Two would "
                        "delete each other's unfinished steps. Give each run a "
                        "directory of its own, or end the other one, which may be a "
                        "Checkpoints whose `with` block is not left."
                    ) from error
        yield


def check_keep(keep: int | None) -> None:
    """Raises a CheckpointError if `keep` leaves nothing."""
    if keep is not None and keep < 1:
        raise CheckpointError(f"keep must be at least 1, or None for all, got {keep}.")


def run_of(
    config: LoraConfig | None, plan: Plan | None, params: PyTree | Fingerprint
) -> Json:
    """Returns what is the same for all checkpoints of a run, as JSON values."""
    if config is None and plan is not None:
        config = plan.config
    return {
        "config": None if config is None else config.to_json(),
        "plan": None if plan is None else plan_to_dict(plan),
        "base": None if params is None else dict(as_fingerprint(params).leaves),
    }


def contents(
    step: int,
    trainable: Trainable,
    *,
    opt_state: PyTree,
    key: jax.Array | None,
    position: Any,
    metadata: Any,
    run: Json,
    metrics: Mapping[str, ArrayLike] | None = None,
) -> tuple[Json, dict[str, dict[str, Leaf]]]:
    """Returns the JSON fields and the arrays of a checkpoint, both checked."""
    check_whole(trainable)
    if not isinstance(step, int | np.integer) or step < 0:
        raise CheckpointError(f"step must be a whole number from 0, got {step!r}.")
    adapter, labels = {}, {}
    for i, path, leaf, x in arrays(trainable):
        adapter[f"{i:06d}-{leaf}"] = x
        labels[f"{i:06d}-{leaf}"] = f"{path!r} ({leaf})"
    bad = [labels[k] for k in not_finite(adapter)]
    if bad:
        raise CheckpointError(
            f"Not saved: NaN or infinity in {listed(bad, 5, ', ')}. The last good step "
            "is still there to restore."
        )
    state = numbered(opt_state)
    about = {
        "format": FORMAT,
        **describe(trainable),
        "arrays": shapes_of(adapter),
        "opt_state": shapes_of(state),
        "metadata": metadata,
        "key": None if key is None else key_to_dict(key),
        "position": position,
        "metrics": metrics and {k: float(np.asarray(v)) for k, v in metrics.items()},
        **run,
    }
    for name in ("metadata", "position", "metrics"):
        try:
            parse_json(json.dumps(about[name]))  # what cannot be read is not written
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{name} is not a JSON value: {error}.") from error
    about = json.loads(json.dumps(about))  # as it will be read
    about["sha256"] = checksum(about)
    return about, {"adapter": adapter, "opt_state": state}


def checksum(about: Json) -> str:
    """Returns SHA-256 over the JSON fields of a checkpoint, its own field left out."""
    signed = {name: value for name, value in about.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def overwrite_step(
    manager: "CheckpointManager",
    step: int,
    about: Json,
    trees: dict[str, dict[str, Leaf]],
) -> None:
    """Writes what `contents` returned in place of a step that is there.

    The new step is written beside the former one, they are swapped, and the former one
    is deleted.
    """
    place = pathlib.Path(manager.directory) / str(step)
    with (
        saving(f"Step {step} is not saved in {str(manager.directory)!r}"),
        replacing_folder(place, str(step), overwrite=True) as folder,
        open_manager(folder, write=True) as other,
    ):
        write_step(other, step, about, trees)
        other.wait_until_finished()
    manager.reload()


def delete_old(manager: "CheckpointManager", keep: int | None) -> None:
    """Deletes all but the newest `keep` steps."""
    for step in sorted(manager.all_steps())[: -keep if keep else 0]:
        manager.delete(step)


def write_step(
    manager: "CheckpointManager",
    step: int,
    about: Json,
    trees: dict[str, dict[str, Leaf]],
) -> None:
    """Begins to write what `contents` returned; `manager` knows when it is done."""
    import orbax.checkpoint as ocp

    if step in manager.all_steps():
        raise CheckpointError(
            f"Step {step} is already in {str(manager.directory)!r}. Save another step, "
            "another directory, or pass overwrite=True to checkpoint.save."
        )
    items: Json = {"about": ocp.args.JsonSave(about)}
    for name, tree in trees.items():
        if tree:  # Orbax refuses an item without arrays
            items[name] = ocp.args.StandardSave(tree)
    with saving(f"Step {step} is not saved in {str(manager.directory)!r}"):
        manager.save(
            int(step),
            args=ocp.args.Composite(**items),
            metrics=about["metrics"],
            force=True,
        )


def saving(what: str) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which whatever Orbax raises is a `CheckpointError`."""
    then = " The steps that were saved before are as they were."
    return told(what, catch=Exception, then=then)


def shapes_of(named: Mapping[str, Leaf]) -> Json:
    """Returns shape and dtype of each array, as JSON values."""
    return {k: [list(jnp.shape(x)), str(x.dtype)] for k, x in named.items()}


def numbered(tree: PyTree) -> dict[str, Leaf]:
    """Returns the leaves of `tree` by number; the structure comes from the template."""
    return {f"{i:06d}": x for i, x in enumerate(jax.tree.leaves(tree))}
