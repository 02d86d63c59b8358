"""What a person sees: what lies on each device, and the result of a run."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

import jlora
from jlora._tables import nbytes, table

from .loop import State


def stage(title: str) -> None:
    """Prints a title, in the first process only."""
    if jax.process_index() == 0:
        print(f"\n── {title}", flush=True)


def show(text: str) -> None:
    """Prints `text` below the title of its stage, in the first process only."""
    if jax.process_index() == 0:
        print("   " + text.replace("\n", "\n   "), flush=True)


def devices(mesh: Mesh) -> str:
    """Returns the devices of a mesh in words."""
    kind, count = mesh.devices.flat[0].device_kind, jax.process_count()
    return f"JAX {jax.__version__}, {mesh.size} × {kind}, {axes(mesh)}, {count} host(s)"


def axes(mesh: Mesh) -> str:
    """Returns the axes of a mesh, as `--mesh` takes them."""
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items())


class Size(NamedTuple):
    """The bytes of a tree, and how many of them lie on one device."""

    total: int
    a_device: int


def size(tree: Any) -> Size:
    """Returns the bytes of the arrays of `tree`."""
    leaves = jax.tree.leaves(tree)
    own = [math.prod(x.sharding.shard_shape(x.shape)) for x in leaves]
    return Size(
        sum(_nbytes(x.size, x) for x in leaves),
        sum(_nbytes(n, x) for n, x in zip(own, leaves, strict=True)),
    )


def _nbytes(count: int, x: jax.Array) -> int:
    return count * jax.dtypes.itemsize_bits(x.dtype) // 8


def layout_table(frozen: Any, trainable: jlora.Trainable) -> str:
    """Returns a table of the model's leaves: what cuts them, and A and B beside them.

    A hyphen stands for an axis that no mesh axis cuts.
    """
    head = ("leaf", "shape", "a device", "cut over", "A over", "B over")
    lines = []
    for path, leaf in {**jlora.paths.flatten(frozen)[0], **trainable.full}.items():
        own = trainable.lora.get(path)
        lines.append(
            (
                path,
                "×".join(map(str, leaf.shape)),
                nbytes(size(leaf).a_device),
                _cuts(jax.tree.leaves(leaf)[0]),
                *(("", "") if own is None else map(_cuts, (own.a, own.b))),
            )
        )
    return table(head, lines, right=head[1:3])


def _cuts(x: Any) -> str:
    spec = x.sharding.spec
    entries = [*spec, *(None for _ in range(x.ndim - len(spec)))]
    named = ["+".join(e) if isinstance(e, tuple) else e or "-" for e in entries]
    return " ".join(named)


def sizes_table(sizes: Mapping[str, Size]) -> str:
    """Returns a table of what each part takes in all and on a device."""
    lines = [(name, *map(nbytes, own)) for name, own in sizes.items()]
    head = ("", "in all", "a device")
    return table(head, lines, right=head[1:])


def digest(state: State) -> str:
    """Returns twelve letters that stand for all bits of a state, on any mesh."""
    found = jlora.checkpoint.fingerprint(state).leaves
    text = "\n".join(f"{path} {found[path]}" for path in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def finish(folder: Path, figures: Mapping[str, Any], sizes: Mapping[str, Size]) -> None:
    """Prints the figures of a run as a table, and writes them to results.json."""
    taken = {f"{name}, a device": own.a_device for name, own in sizes.items()}
    lines = [(name, str(value)) for name, value in figures.items()]
    lines += [(name, nbytes(count)) for name, count in taken.items()]
    show(table(("", "this run"), lines))
    if jax.process_index() == 0:
        text = json.dumps({**figures, **taken}, indent=2)
        (folder / "results.json").write_text(text + "\n")
