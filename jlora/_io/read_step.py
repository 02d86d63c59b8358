"""A step of checkpoints, read and checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._plan.plan import Plan
from .._plan.serial import plan_from_dict
from ..config import LoraConfig
from ..errors import CheckpointError
from ..factors import Trainable
from .describe import arrays, key_from_dict, rebuild
from .fingerprint import Fingerprint, differences
from .write_step import FORMAT, as_fingerprint, numbered, shapes_of


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


def read_step(
    manager: Any, step: int | None, opt_state: Any, shardings: Any, base: Any
) -> Checkpoint:
    """Returns the newest step of a manager, or `step`; see `checkpoint.restore`."""
    import orbax.checkpoint as ocp

    where = str(manager.directory)
    steps = sorted(manager.all_steps())
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint" if step is None else f"step {step}"
        raise CheckpointError(f"No {wanted} in {where!r}; it has steps {steps}.")
    step = int(steps[-1] if step is None else step)
    items: dict[str, Any] = {"about": ocp.args.JsonRestore()}
    template = numbered(opt_state)
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
            _check_base(f"Step {step} in {where!r}", about, as_fingerprint(base))
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
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CheckpointError(
            f"This is no jlora checkpoint of format {FORMAT}: it says {about!r:.200}."
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


def _misfits(template: dict[str, Any], saved: dict[str, list[Any]]) -> list[str]:
    """Returns in words where the template of the optimizer's state is another one."""
    wanted = shapes_of(template)
    return [
        f"leaf {int(k)} is {saved.get(k, 'absent')}, wanted {wanted.get(k, 'none')}"
        for k in sorted({*wanted, *saved})
        if wanted and wanted.get(k) != saved.get(k)
    ]
