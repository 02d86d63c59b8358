"""Where a decoder lies on a mesh of devices: axes `data`, `fsdp` and `tensor`."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jlora

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Which axis of a leaf each mesh axis cuts, not counting the axis of stacked layers.
# `tensor` cuts heads and hidden units: the first product of a block then needs no sum
# over devices, and the last one needs one. `fsdp` cuts the other axis of the kernels.
Cuts = Mapping[str, int]
COLUMNS: Cuts = {"fsdp": 0, "tensor": 1}  # [width, heads] or [width, heads, head]
ROWS: Cuts = {"fsdp": -1, "tensor": 0}  # [heads, width] or [heads, head, width]
WHOLE: Cuts = {}
RULES = (
    ("**/{q,k,v,query,key,value,gate,up}{,_proj}{,/kernel,/weight}", COLUMNS),
    ("**/{head,lm_head}{,/kernel,/weight}", COLUMNS),
    ("**/{o,out,down}{,_proj}{,/kernel,/weight}", ROWS),
    ("**/{embed,embedder,embed_tokens}{,/embedding,/weight}", ROWS),
    ("**/{q,k,v,query,key,value,gate,up}{,_proj}/bias", {"tensor": 0}),
    ("**/bias", WHOLE),
    ("**/*norm*{,/scale,/weight}", WHOLE),
)
STACKED = re.compile(r"(^|/)(layers|blocks)/(?!\d+(/|$))")


def fake_devices(count: int) -> None:
    """Makes the CPU count as `count` devices. Call it before the first array.

    A GPU or TPU is not affected: `parse_mesh` takes CPU devices only where the platform
    has too few of its own.
    """
    jax.config.update("jax_num_cpu_devices", count)


def parse_mesh(text: str) -> Mesh:
    """Returns the mesh that `text` describes, as in `"fsdp=4,tensor=2"`.

    The product of the sizes is the number of devices used. One size may be -1: all
    devices that the other axes leave. An empty text means one device.

    Raises:
      ValueError: if an axis or a size is not known, or the devices are too few.
    """
    sizes = _sizes(text)
    free = [name for name, size in sizes.items() if size == -1]
    for name in free:
        others = math.prod(size for size in sizes.values() if size > 0)
        sizes[name] = max(jax.device_count() // others, 1)
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=_devices(math.prod(sizes.values()), text),
    )


def _sizes(text: str) -> dict[str, int]:
    """Returns the size of each axis that is named, in the order of `AXES`."""
    found: dict[str, int] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, size = map(str.strip, part.partition("="))
        if name not in AXES or name in found:
            raise ValueError(
                f"Write a mesh as 'fsdp=4,tensor=2', with each of {', '.join(AXES)} "
                f"at most once. Got {part!r} in {text!r}."
            )
        if not re.fullmatch(r"-1|[1-9]\d*", size):
            raise ValueError(
                f"The size of {name} must be a number from 1, or -1 for all devices "
                f"that are left. Got {size!r} in {text!r}."
            )
        found[name] = int(size)
    if list(found.values()).count(-1) > 1:
        raise ValueError(f"Only one axis of a mesh may be -1. Got {text!r}.")
    return {name: found[name] for name in AXES if name in found} or {"fsdp": 1}


def _devices(count: int, text: str) -> Sequence[Any]:
    """Returns `count` devices of the platform, or of the CPU if it has too few."""
    own = jax.devices()
    if jax.process_count() > 1 and count != len(own):
        raise ValueError(
            f"The mesh {text!r} has {count} devices, but the {jax.process_count()} "
            f"processes have {len(own)}. Each process must take part: use all devices."
        )
    if len(own) >= count:
        return own[:count]
    cpu = jax.devices("cpu")
    if len(cpu) < count:
        raise ValueError(
            f"The mesh {text!r} needs {count} devices, and this machine has {len(own)} "
            f"({own[0].device_kind}). Choose a smaller mesh, or give --fake-devices "
            f"{count} to count the CPU as so many."
        )
    jax.config.update("jax_default_device", cpu[0])
    return cpu[:count]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its rows over the axes `data` and `fsdp`."""
    axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
    return NamedSharding(mesh, PartitionSpec(axes))


def layout(shapes: Any, mesh: Mesh) -> Any:
    """Returns a `NamedSharding` for each leaf of a decoder's parameters.

    The first of `RULES` whose glob matches a path says which axes are cut. A leaf below
    `layers` or `blocks` without a number holds all layers, and is not cut along them.

    Args:
      shapes: the parameters, or their `jax.eval_shape`.
      mesh: from `parse_mesh`.

    Warns:
      UserWarning: names the axes that their mesh axis does not divide, and the matrices
        that no rule knows. They lie whole on each device.
    """
    leaves, treedef = jlora.paths.flatten(shapes)
    told: list[str] = []
    placed = []
    for path, leaf in leaves.items():
        spec, whole = _spec(path, leaf.shape, mesh)
        placed.append(NamedSharding(mesh, spec))
        told += whole
    if told and mesh.size > 1:
        warnings.warn(
            f"Each device holds these whole: {'; '.join(told)}.", stacklevel=2
        )
    return treedef.unflatten(placed)


def _spec(
    path: str, shape: Sequence[int], mesh: Mesh
) -> tuple[PartitionSpec, list[str]]:
    """Returns what cuts a leaf, and in words what does not."""
    first = 1 if STACKED.search(path) else 0
    rule = next((cuts for glob, cuts in RULES if jlora.paths.matches(glob, path)), None)
    if rule is None:
        unknown = [f"{path!r}, which no rule knows"] if len(shape) - first > 1 else []
        return PartitionSpec(), unknown
    entries: list[str | None] = [None] * len(shape)
    whole = []
    for name, axis in rule.items():
        i = axis % (len(shape) - first) + first
        size = mesh.shape.get(name, 1)
        if shape[i] % size:
            whole.append(f"axis {i} of {path!r} ({name}={size} and {shape[i]} entries)")
        elif size > 1:
            entries[i] = name
    return PartitionSpec(*entries), whole
