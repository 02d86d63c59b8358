"""A step of checkpoints, read and checked."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from .._plan.plan import Plan
from .._plan.serial import plan_from_dict
from .._tables import listed
from ..config import LoraConfig
from ..errors import CheckpointError
from ..factors import Leaf, PyTree, Trainable
from .describe import arrays, check_width, key_from_dict, rebuild
from .disk import Json, check_files, read_json, told
from .fingerprint import Fingerprint, as_fingerprint, differences
from .handles import settled
from .write_step import FORMAT, checksum, numbered, shapes_of

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

Place = jax.sharding.Sharding


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
      fingerprint: that of the base, given to `save` as `params`.
    """

    trainable: Trainable
    opt_state: PyTree
    step: int
    metadata: Any
    key: jax.Array | None = None
    position: Any = None
    config: LoraConfig | None = None
    plan: Plan | None = None
    metrics: Mapping[str, float] | None = None
    fingerprint: Fingerprint | None = None


def read_step(
    manager: "CheckpointManager",
    step: int | None,
    opt_state: PyTree,
    shardings: Place | Trainable | None,
    params: PyTree | Fingerprint,
) -> Checkpoint:
    """Returns the newest step of a manager, or `step`; see `checkpoint.restore`.

    All of it is of one save, also if the step is overwritten meanwhile.
    """

    def place() -> list[pathlib.Path]:
        with contextlib.suppress(CheckpointError):
            return [_folder(manager, _chosen(manager, step))]
        return []

    return settled(
        lambda: _read(manager, _chosen(manager, step), opt_state, shardings, params),
        place,
        repr(str(manager.directory)),
        CheckpointError,
    )


def _chosen(manager: "CheckpointManager", step: int | None) -> int:
    manager.reload()  # others may have written
    steps = sorted(manager.all_steps())
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint" if step is None else f"step {step}"
        raise CheckpointError(
            f"No {wanted} in {str(manager.directory)!r}; it has steps {steps}."
        )
    return int(steps[-1] if step is None else step)


def _folder(manager: "CheckpointManager", step: int) -> pathlib.Path:
    return pathlib.Path(manager.directory) / str(step)


def _read(
    manager: "CheckpointManager",
    step: int,
    opt_state: PyTree,
    shardings: Place | Trainable | None,
    params: PyTree | Fingerprint,
) -> Checkpoint:
    import orbax.checkpoint as ocp

    where = f"Step {step} in {str(manager.directory)!r}"
    then = (
        " It is damaged, not a jlora checkpoint, or its optimizer state does not fit "
        "the template."
    )
    check_files(pathlib.Path(manager.directory) / str(step))
    with told(f"{where} cannot be read", catch=Exception, then=then):
        about = _about(manager, step, f"{where} cannot be read", then)
        template = numbered(_laid_out(opt_state, shardings))
        _check(where, about, template, params)
        wanted = {
            "adapter": _adapter_template(about, shardings),
            "opt_state": template,
        }
        items: Json = {k: ocp.args.StandardRestore(v) for k, v in wanted.items() if v}
        read = manager.restore(step, args=ocp.args.Composite(**items))
        if template:
            leaves = [read["opt_state"][k] for k in template]
            opt_state = jax.tree.structure(opt_state).unflatten(leaves)
        return _checkpoint(step, about, read.get("adapter") or {}, opt_state)


def _about(manager: "CheckpointManager", step: int, what: str, then: str) -> Json:
    try:
        return read_json(_folder(manager, step) / "about" / "metadata")
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}{then}") from error


def _checkpoint(
    step: int, about: Json, found: Mapping[str, jax.Array], opt_state: PyTree
) -> Checkpoint:
    keys = _keys(about)
    key, config, plan, base = map(about.get, ("key", "config", "plan", "base"))
    return Checkpoint(
        trainable=rebuild(about, {keys[k]: x for k, x in found.items()}),
        opt_state=opt_state,
        step=step,
        metadata=about["metadata"],
        key=None if key is None else key_from_dict(key),
        position=about.get("position"),
        config=None if config is None else LoraConfig.from_json(config),
        plan=None if plan is None else plan_from_dict(plan),
        metrics=about.get("metrics"),
        fingerprint=None if base is None else Fingerprint(base),
    )


def _check(
    where: str, about: Any, template: dict[str, Leaf], params: PyTree | Fingerprint
) -> None:
    """Raises a CheckpointError if a step is not jlora's, or of something else."""
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CheckpointError(
            f"{where} is not a jlora checkpoint of format {FORMAT}: it says "
            f"{about!r:.200}."
        )
    if about.get("sha256") != checksum(about):
        raise CheckpointError(
            f"{where} is damaged, or its settings were edited: their checksum does not "
            "match. Take another step."
        )
    misfits = _misfits(template, about["opt_state"])
    if misfits:
        raise CheckpointError(
            f"{where}: its optimizer state does not fit the template: "
            f"{listed(misfits, 5)}. Give the state of the optimizer and adapter that "
            "it was saved with."
        )
    saved = about.get("base")
    if params is None:
        return
    if saved is None:
        raise CheckpointError(
            f"{where} was saved without params=, so the base cannot be checked. Leave "
            "params= out, or save it again with params=."
        )
    others = differences(saved, as_fingerprint(params), about["full"])
    if others:
        raise CheckpointError(
            f"{where} was trained on another base: {listed(others, 5)}. Load the "
            "weights that it was trained on."
        )


def _keys(about: Json) -> dict[str, tuple[str, str]]:
    """Returns path and leaf of each array by its number."""
    keys = {}
    for name in about["arrays"]:
        number, leaf = name.split("-")
        full = leaf == "full"
        path = about["full"][int(number)] if full else about["lora"][int(number)][0]
        keys[name] = path, leaf
    return keys


def _adapter_template(
    about: Json, shardings: Place | Trainable | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and places of the adapter's arrays by number."""
    one = shardings if isinstance(shardings, Place) else _first_device()
    own = {}
    if isinstance(shardings, Trainable):
        own = {(path, leaf): place for _, path, leaf, place in arrays(shardings)}
    elif shardings is not None and one is not shardings:
        raise CheckpointError(
            "shardings must be one jax.sharding.Sharding or a jlora.Trainable of "
            f"them, got {type(shardings).__name__}."
        )
    keys = _keys(about)
    check_width(
        {".".join(keys[k]): jnp.dtype(t) for k, (_, t) in about["arrays"].items()}
    )
    return {
        name: jax.ShapeDtypeStruct(
            tuple(shape), jnp.dtype(dtype), sharding=own.get(keys[name], one)
        )
        for name, (shape, dtype) in about["arrays"].items()
    }


def _first_device() -> Place:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _laid_out(opt_state: PyTree, shardings: Place | Trainable | None) -> PyTree:
    """Returns a template with a place for each leaf: those of the save may be gone.

    What an optimizer keeps for each leaf of the adapter lies as that leaf does, and the
    rest on all its devices.
    """
    rest = shardings if isinstance(shardings, Place) else _first_device()
    if isinstance(shardings, Trainable):
        meshes = [x.mesh for x in jax.tree.leaves(shardings) if hasattr(x, "mesh")]
        rest = jax.NamedSharding(meshes[0], jax.P()) if meshes else rest

    def put(x: Leaf, place: Place) -> Leaf:
        if not isinstance(x, jax.ShapeDtypeStruct) or x.sharding is not None:
            return x
        try:
            place.shard_shape(x.shape)
        except ValueError:  # another shape than the leaf's
            place = rest
        return x.update(sharding=place)

    def lay_out(x: PyTree) -> PyTree:
        if jax.tree.structure(x) == jax.tree.structure(shardings):
            return jax.tree.map(put, x, shardings)
        return jax.tree.map(lambda leaf: put(leaf, rest), x)

    is_adapter = lambda x: isinstance(x, Trainable)  # noqa: E731
    return jax.tree.map(lay_out, opt_state, is_leaf=is_adapter)


def _misfits(template: dict[str, Leaf], saved: Json) -> list[str]:
    """Returns in words where the saved optimizer state differs from the template."""
    wanted = shapes_of(template)
    return [
        f"leaf {int(k)} is {saved.get(k, 'absent')}, wanted {wanted.get(k, 'none')}"
        for k in sorted({*wanted, *saved})
        if wanted and wanted.get(k) != saved.get(k)
    ]
