"""Models on disk, leaf by leaf: merged, compared, quantised."""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from .._core import extract, merge
from .._core.quantize import encoders
from .._core.tree import check, check_plan
from .._io import tensors as tensors
from .._io.clash import clash
from .._io.disk import Path, Progress, check_name
from .._io.models import Model, open_model, write
from .._io.placing import encoded
from .._io.processes import first_writes, on_host
from .._io.torch_models import is_torch_named
from .._io.torch_quantised import tell_widened
from .._numerics import not_finite
from .._plan.plan import Plan
from .._tables import listed
from ..config import LoraConfig
from ..errors import CheckpointError, MergeError, TreeError
from ..factors import Trainable
from ..quantised import Quantized, encode_like, is_quantized
from ._flat_plan import assumed_rows

_UNCHANGED = (
    "The fine-tuned model has the numbers of its base, so the adapter would be zero. "
    "Give the model before and after training."
)


def merge_files(
    base: Path,
    trainable: Trainable,
    out: Path,
    *,
    requantize: bool = False,
    progress: Progress = iter,
) -> None:
    """Writes the merged model of a base on disk, with neither model in memory.

    One leaf at a time goes from file to file, so memory is bounded by a few times the
    largest adapted leaf (from Orbax, the largest leaf). The result is that of
    `jlora.merge`, bit for bit. To write a merged model in Orbax's format, merge it in
    memory and use `orbax`.

    Args:
      base: safetensors with a leaf under each path, as `safetensors` writes it: a file,
        or a directory with one file or an index and its shards; or an Orbax checkpoint
        of parameters. It may be quantised, see `quantize_files`, by bitsandbytes, or
        in float8 with scales.
      trainable: the adapter.
      out: the safetensors file to write, whole or not at all. It must not be, or lie
        in, the base.
      requantize: of a quantised base: whether its weights are written as codes again.
        The default writes them dense.
      progress: wraps the iteration over the names, such as `tqdm.tqdm`.

    Raises:
      TreeError: if the adapter does not fit the base; lists every misfit.
      MergeError: if a sum is too large for the dtype of the base's weight, or the
        adapter holds NaN or infinity.
      CheckpointError: if a file cannot be read or written, `out` is the base, or an
        adapted leaf is quantised in a format that jlora does not read.

    Warns:
      UserWarning: with `requantize`, names weights with the share of the update that
        their codes lose.

    Examples:
      >>> import os, tempfile, numpy as np, jlora
      >>> from jlora.factors import Factors, Spec
      >>> from safetensors.numpy import load_file
      >>> own = Factors(np.ones((2, 1)), np.ones((1, 3)), Spec(rank=1, alpha=2.0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     base, out = (os.path.join(folder, f"{n}.safetensors") for n in "ab")
      ...     jlora.export.safetensors(base, {"w": np.zeros((2, 3), np.float32)})
      ...     merge_files(base, Trainable({"w": own}), out)
      ...     load_file(out)["w"]
      array([[2., 2., 2.],
             [2., 2., 2.]], dtype=float32)
    """
    check_out(out, base)
    model, rounded = merged_model(base, on_host(trainable), requantize=requantize)
    with first_writes() as first:
        if first:
            write(out, model, progress)
    if rounded:
        warnings.warn(
            "These weights are quantised again, which rounds the sum: "
            f"{listed(rounded, 5, ', ')}. Leave out requantize for dense weights, or "
            "keep the adapter beside the codes.",
            stacklevel=2,
        )


def merged_model(
    base: Path, trainable: Trainable, *, requantize: bool = False
) -> tuple[Model, list[str]]:
    """Returns the merged model, each leaf of which is merged when it is read.

    Args:
      base: see `merge_files`.
      trainable: see `merge_files`.
      requantize: see `merge_files`.

    Returns:
      The model, and a list that gets in words what is lost where a leaf that was read
      is quantised again.

    Raises:
      TreeError: see `merge_files`.
      MergeError: see `merge_files`; where a sum is too large, when it is read.
      CheckpointError: see `merge_files`.
    """
    model = open_model(base)
    changed = [*trainable.lora, *trainable.full]
    check_readable(
        base, [model.refused[name] for name in changed if name in model.refused]
    )
    check(dict(model.dense_shapes()), trainable)
    bad = not_finite(trainable.full)
    if bad:
        raise MergeError(f"Not merged: {listed(bad, 5, ', ')} have NaN or infinity.")
    shapes = dict(model.shapes) if requantize else dict(model.dense_shapes())
    for name, x in trainable.full.items():
        shapes[name] = jax.ShapeDtypeStruct(x.shape, x.dtype)

    rounded: list[str] = []

    def read(name: str) -> Any:
        if name in trainable.full:
            return jax.device_get(trainable.full[name])
        wide = model.shapes[name].dtype.itemsize > 4
        with jax.enable_x64(True) if wide else contextlib.nullcontext():
            w = model.read(name)
            if name in trainable.lora:
                own = Trainable({name: trainable.lora[name]})
                new = merge.merge({name: _dense(w)}, own, check=True)[name]
                if requantize and is_quantized(w):
                    coded = encode_like(new, w)
                    rounded.extend(_rounded(name, _dense(w), new, coded))
                    new = coded
                w = new
            elif not requantize:
                w = _dense(w)
            return jax.device_get(w)

    def pieces(name: str) -> Iterable[tensors.Buffer]:
        plain = not is_quantized(model.shapes[name])
        if plain and name not in trainable.lora and name not in trainable.full:
            return model.pieces(name)
        return [tensors.raw(read(name))]

    made = dataclasses.replace(model, shapes=shapes, read=read, pieces=pieces)
    return made, rounded


def _dense(w: Any) -> Any:
    return w.dense() if is_quantized(w) else w


def _rounded(name: str, w: Any, new: Any, coded: Quantized) -> list[str]:
    """Returns in words what codes lose of the change from `w` to `new`."""
    before, wanted, got = (np.asarray(x, np.float32) for x in (w, new, coded.dense()))
    change, lost = np.linalg.norm(wanted - before), np.linalg.norm(wanted - got)
    if change == 0 or lost == 0:
        return []
    return [f"{name!r} ({coded.kind}, {lost / change:.0%} of the update lost)"]


def quantize_files(
    base: Path,
    out: Path,
    plan: Plan | None = None,
    *,
    kind: str = "nf4",
    targets: str | Iterable[str] | None = None,
    block: int | None = None,
    double: bool = False,
    scale_dtype: DTypeLike = "float32",
    progress: Progress = iter,
) -> None:
    """Writes a model on disk quantised, with neither model in memory.

    The result is that of `jlora.quantize`, bit for bit. One leaf at a time goes from
    file to file. In a model with torch's names the matrices are quantised, along
    fan-in; tables and output heads only if `targets` names them.

    Args:
      base: a model; for the formats see `merge_files`.
      out: the safetensors file to write, whole or not at all. Whatever reads models
        reads it, see `jlora.files.read_params`.
      plan: see `jlora.quantize`.
      kind: see `jlora.quantize`.
      targets: see `jlora.quantize`.
      block: see `jlora.quantize`.
      double: see `jlora.quantize`.
      scale_dtype: see `jlora.quantize`.
      progress: wraps the iteration over the names.

    Raises:
      ConfigError: see `jlora.quantize`.
      TreeError: see `jlora.quantize`.
      CheckpointError: if a file cannot be read or written, or `out` is the base.

    Examples:
      >>> import os, tempfile, numpy as np, jlora
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     base, out = (os.path.join(folder, f"{n}.safetensors") for n in "ab")
      ...     jlora.export.safetensors(base, {"w": np.ones((128, 4), np.float32)})
      ...     quantize_files(base, out, kind="int8")
      ...     jlora.files.read_params(out)["w"]
      Quantized(int8 of float32[128,4], blocks (128, 1), 528 bytes)
    """
    check_out(out, base)
    model = open_model(base)
    check_readable(base, model.unreadable())
    if plan is None and is_torch_named(model.shapes):
        plan = Plan(LoraConfig(), assumed_rows(base))
    chosen = encoders(
        model.shapes,
        plan,
        kind=kind,
        targets=targets,
        block=block,
        double=double,
        scale_dtype=scale_dtype,
        storage="packed",
    )
    tell_widened(model.widened, "They are quantised again")

    def read(name: str) -> Any:
        x = model.read(name)
        return encoded(name, x, chosen[name]) if name in chosen else x

    shapes = {n: chosen[n](x) if n in chosen else x for n, x in model.shapes.items()}
    with first_writes() as first:
        if first:
            write(out, dataclasses.replace(model, shapes=shapes, read=read), progress)


def check_out(out: Path, base: Path) -> None:
    """Raises a CheckpointError if `out` is not a name, or writing it changes `base`."""
    check_name(out)
    found = clash(out, [base])
    if found:
        raise CheckpointError(f"Not saved: {found}. Give another name.")


def extract_files(
    tuned: Path, base: Path, plan: Plan, *, progress: Progress = iter
) -> Trainable:
    """Returns `jlora.extract` of two models on disk, with one leaf of each in memory.

    Args:
      tuned: a fine-tuned model; for the formats see `merge_files`.
      base: the model that the fine-tune began with.
      plan: ranks and axes, from `jlora.plan` or `flat_plan`.
      progress: wraps the iteration over the names.

    Raises:
      TreeError: if the leaves of the models are not those of the plan, or no leaf
        changed from one to the other.
      CheckpointError: if a file cannot be read.

    Warns:
      UserWarning: names the leaves that changed although the plan leaves them frozen.

    Examples:
      >>> import os, tempfile, numpy as np, jlora
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     base, tuned = (os.path.join(folder, f"{n}.safetensors") for n in "ab")
      ...     jlora.export.safetensors(base, {"w": np.zeros((2, 3), np.float32)})
      ...     jlora.export.safetensors(tuned, {"w": np.ones((2, 3), np.float32)})
      ...     plan = jlora.export.flat_plan(base, LoraConfig(rank=1))
      ...     adapter = extract_files(tuned, base, plan)
      >>> f = adapter.lora["w"]
      >>> np.round(f.scale * np.asarray(f.a @ f.b), 5).tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    models = open_model(tuned), open_model(base)
    if os.path.realpath(tuned) == os.path.realpath(base):
        raise TreeError(_UNCHANGED)
    odd = sorted(models[0].shapes.keys() ^ models[1].shapes.keys())
    if odd:
        raise TreeError(
            f"Only one of the models has {listed(map(repr, odd), 5, ', ')}."
        )
    rows = {row.path: row for row in plan.leaves}
    for model in models:
        check_plan(model.dense_shapes(), plan)
    lora, full, changed = {}, {}, []
    for name in progress(sorted(rows)):
        own = Plan(plan.config, (rows[name],))
        after, before = ({name: model.dense(name)} for model in models)
        found, moved = extract.extract_leaves(after, before, own)
        lora |= found.lora
        full |= found.full
        changed += moved
    if not changed:
        raise TreeError(_UNCHANGED)
    extract.warn_of_frozen(changed, plan)
    order = [row.path for row in plan.leaves]
    return Trainable(
        {p: lora[p] for p in order if p in lora},
        {p: full[p] for p in order if p in full},
    )


def check_readable(base: Path, wrong: Sequence[str]) -> None:
    """Raises a CheckpointError for leaves of formats that are not read."""
    if wrong:
        raise CheckpointError(f"{str(base)!r}: {listed(wrong, 3)}.")
