"""Adapter-only Orbax checkpoints that need nothing else to be read again.

A checkpoint holds A, B and the leaves trained in full, how each weight is adapted (as
JSON), and what was given of optimizer state, step and metadata. The base model is not
in it. Steps are written whole or not at all, so a killed save loses nothing.
"""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import CheckpointError
from .factors import Factors, Spec, Trainable

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What `restore` read.

    Attributes:
      trainable: the adapter.
      opt_state: like the template, or None if none was given.
      step: the step it was saved at.
      metadata: the JSON value given to `save`.
    """

    trainable: Trainable
    opt_state: Any
    step: int
    metadata: Any


def save(
    directory: str | os.PathLike,
    trainable: Trainable,
    *,
    opt_state: Any = None,
    step: int = 0,
    metadata: Any = None,
    keep: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the adapter as step `step` of the checkpoints in `directory`.

    Args:
      directory: made if it does not exist; each step is a folder in it.
      trainable: the adapter.
      opt_state: the optimizer's state, any pytree of arrays.
      step: number of the step, at least 0.
      metadata: any JSON value (config, data position, seed).
      keep: how many of the newest steps to keep; None keeps all.
      overwrite: replace a step that is already there; it is gone while the new one is
        written.

    Raises:
      CheckpointError: if the step is already there, or a factor or a full leaf holds
        NaN or infinity, which nobody wants to resume from.

    Examples:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> adapter = jlora.Trainable(full={"head": jnp.arange(3.0)})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder, adapter, step=7, metadata={"seed": 0})
      ...     ck = restore(folder)
      >>> ck.step, ck.trainable.full["head"], ck.metadata
      (7, Array([0., 1., 2.], dtype=float32), {'seed': 0})
    """
    import orbax.checkpoint as ocp

    _check_finite(trainable)
    if not isinstance(step, int | np.integer) or step < 0:
        raise CheckpointError(f"step must be a whole number from 0, got {step!r}.")
    if keep is not None and keep < 1:
        raise CheckpointError(f"keep must be at least 1, or None for all, got {keep}.")
    arrays, state = _arrays(trainable), _numbered(opt_state)
    about = {
        "format": _FORMAT,
        "lora": [[p, f.spec.to_dict()] for p, f in trainable.lora.items()],
        "full": list(trainable.full),
        "arrays": _shapes(arrays),
        "opt_state": _shapes(state),
        "metadata": metadata,
    }
    items: dict[str, Any] = {"about": ocp.args.JsonSave(about)}
    for name, tree in (("adapter", arrays), ("opt_state", state)):
        if tree:  # Orbax refuses an item without arrays
            items[name] = ocp.args.StandardSave(tree)
    with _manager(directory, create=True, keep=keep) as manager:
        if step in manager.all_steps():
            if not overwrite:
                raise CheckpointError(
                    f"Step {step} is already in {str(directory)!r}. Save another step, "
                    "another directory, or pass overwrite=True."
                )
            manager.delete(step)
        manager.save(int(step), args=ocp.args.Composite(**items), force=True)
        manager.wait_until_finished()


def restore(
    directory: str | os.PathLike, *, opt_state: Any = None, step: int | None = None
) -> Checkpoint:
    """Returns the newest checkpoint in `directory`, or that of `step`.

    Args:
      directory: what `save` was given.
      opt_state: a template, `tx.init(trainable)` or its `jax.eval_shape`; without one
        the saved state is not read.
      step: which step; None is the newest.

    Raises:
      CheckpointError: if there is no such checkpoint, it is not jlora's, it is damaged,
        or it does not fit the template.
    """
    import orbax.checkpoint as ocp

    if not pathlib.Path(directory).is_dir():
        raise CheckpointError(f"There is no folder {str(directory)!r} to restore from.")
    with _manager(directory, create=False) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            wanted = "checkpoint" if step is None else f"step {step}"
            raise CheckpointError(
                f"No {wanted} in {str(directory)!r}; it has steps {steps}."
            )
        step = steps[-1] if step is None else step
        items: dict[str, Any] = {"about": ocp.args.JsonRestore()}
        template = _numbered(opt_state)
        try:
            about = manager.restore(step, args=ocp.args.Composite(**items)).about
            _check_about(about)
            misfits = _misfits(template, about["opt_state"])
            if misfits:
                raise CheckpointError(
                    f"Step {step} in {str(directory)!r}: its optimizer state does not "
                    f"fit the template: {'; '.join(misfits[:5])}. Give the state of "
                    "the optimizer and adapter that it was saved with."
                )
            shapes = {
                name: jax.ShapeDtypeStruct(shape, dtype)
                for name, (shape, dtype) in about["arrays"].items()
            }
            wanted = {"adapter": shapes, "opt_state": template}
            items = {k: ocp.args.StandardRestore(v) for k, v in wanted.items() if v}
            read = manager.restore(step, args=ocp.args.Composite(**items))
            trainable = _trainable(read.get("adapter") or {}, about)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"Step {step} in {str(directory)!r} cannot be read "
                f"({type(error).__name__}: {error}). It is damaged, not a jlora "
                "checkpoint, or its optimizer state does not fit the template."
            ) from error
    if template:
        leaves = [read.opt_state[k] for k in template]
        opt_state = jax.tree.structure(opt_state).unflatten(leaves)
    return Checkpoint(trainable, opt_state, step, about["metadata"])


def _manager(directory: str | os.PathLike, *, create: bool, keep: int | None = None):
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(
        pathlib.Path(directory).absolute(),
        options=ocp.CheckpointManagerOptions(
            create=create, max_to_keep=keep, enable_async_checkpointing=False
        ),
    )


def _check_finite(trainable: Trainable) -> None:
    keyed, _ = jax.tree_util.tree_flatten_with_path(trainable)
    bad = [
        jax.tree_util.keystr(keys)
        for keys, x in keyed
        if jnp.issubdtype(x.dtype, jnp.inexact) and not jnp.isfinite(x).all()
    ]
    if bad:
        raise CheckpointError(
            f"Not saved: NaN or infinity in {', '.join(bad[:5])}. The last good step "
            "is still there to restore."
        )


def _arrays(trainable: Trainable) -> dict[str, Any]:
    """Returns the arrays under numbers: paths may hold any character, names may not."""
    arrays = {}
    for i, f in enumerate(trainable.lora.values()):
        leaves = {"a": f.a, "b": f.b, "magnitude": f.magnitude}
        arrays |= {f"{i:06d}-{k}": x for k, x in leaves.items() if x is not None}
    for i, x in enumerate(trainable.full.values()):
        arrays[f"{i:06d}-full"] = x
    return arrays


def _trainable(arrays: dict[str, Any], about: dict[str, Any]) -> Trainable:
    lora = {}
    for i, (path, spec) in enumerate(about["lora"]):
        spec = Spec.from_dict(spec)
        parts = (arrays.get(f"{i:06d}-{name}") for name in ("a", "b", "magnitude"))
        a, b, magnitude = parts
        lora[path] = Factors(a, b, spec, magnitude)
    full = {path: arrays[f"{i:06d}-full"] for i, path in enumerate(about["full"])}
    return Trainable(lora, full)


def _shapes(arrays: dict[str, Any]) -> dict[str, list[Any]]:
    return {k: [list(jnp.shape(x)), str(x.dtype)] for k, x in arrays.items()}


def _misfits(template: dict[str, Any], saved: dict[str, list[Any]]) -> list[str]:
    """Returns in words where the template of the optimizer's state is another one."""
    wanted = _shapes(template)
    return [
        f"leaf {int(k)} is {saved.get(k, 'absent')}, wanted {wanted.get(k, 'none')}"
        for k in sorted({*wanted, *saved})
        if wanted and wanted.get(k) != saved.get(k)
    ]


def _check_about(about: Any) -> None:
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise CheckpointError(
            f"This is no jlora checkpoint of format {_FORMAT}: it says {about!r:.200}."
        )


def _numbered(tree: Any) -> dict[str, Any]:
    """Returns the leaves of `tree` by number; the structure comes from the template."""
    return {f"{i:06d}": x for i, x in enumerate(jax.tree.leaves(tree))}
