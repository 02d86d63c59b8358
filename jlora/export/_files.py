"""Models on disk, leaf by leaf: merged, compared, quantised."""

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterable

import jax
import numpy as np

from .._core import extract, merge
from .._core.tree import check, check_plan
from .._io import tensors as tensors
from .._io.clash import clash
from .._io.disk import Path, Progress, check_name
from .._io.models import open_model, write
from .._numerics import not_finite
from .._plan.plan import Plan
from .._tables import listed
from ..errors import CheckpointError, MergeError, TreeError
from ..factors import Trainable

_UNCHANGED = (
    "The fine-tuned model has the numbers of its base, so the adapter would be zero. "
    "Give the model before and after training."
)


def merge_files(
    base: Path, trainable: Trainable, out: Path, *, progress: Progress = iter
) -> None:
    """Writes the merged model of a base on disk, with neither model in memory.

    One leaf at a time goes from file to file, so memory is bounded by a few times the
    largest adapted leaf (from Orbax, the largest leaf). The result is that of
    `jlora.merge`, bit for bit. To write a merged model in Orbax's format, merge it in
    memory and use `orbax`.

    Args:
      base: safetensors with a leaf under each path, as `safetensors` writes it: a file,
        or a directory with one file or an index and its shards; or an Orbax checkpoint
        of parameters.
      trainable: the adapter.
      out: the safetensors file to write, whole or not at all. It must not be, or lie
        in, the base.
      progress: wraps the iteration over the names, such as `tqdm.tqdm`.

    Raises:
      TreeError: if the adapter does not fit the base; lists every misfit.
      MergeError: if a sum is too large for the dtype of the base's weight, or the
        adapter holds NaN or infinity.
      CheckpointError: if a file cannot be read or written, `out` is the base, or an
        adapted leaf is quantised: its scale stands beside it.

    Examples:
      >>> import os, tempfile, numpy as np
      >>> from jlora.factors import Factors, Spec
      >>> from safetensors.numpy import load_file
      >>> own = Factors(np.ones((2, 1)), np.ones((1, 3)), Spec(rank=1, alpha=2.0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     base, out = (os.path.join(folder, f"{n}.safetensors") for n in "ab")
      ...     safetensors(base, {"w": np.zeros((2, 3), np.float32)})
      ...     merge_files(base, Trainable({"w": own}), out)
      ...     load_file(out)["w"]
      array([[2., 2., 2.],
             [2., 2., 2.]], dtype=float32)
    """
    check_name(out)
    found = clash(out, [base])
    if found:
        raise CheckpointError(f"Not saved: {found}. Give another name.")
    model = open_model(base)
    _check_plain(base, model.shapes, [*trainable.lora, *trainable.full])
    check(dict(model.shapes), trainable)
    bad = not_finite(trainable.full)
    if bad:
        raise MergeError(f"Not merged: {listed(bad, 5, ', ')} have NaN or infinity.")

    def merged(name: str) -> np.ndarray:
        w = model.read(name)
        own = Trainable({name: trainable.lora[name]})
        with jax.enable_x64(True) if w.dtype.itemsize > 4 else contextlib.nullcontext():
            return np.asarray(merge.merge({name: w}, own, check=True)[name])

    def pieces(name: str) -> Iterable[tensors.Buffer]:
        if name in trainable.lora:
            return [tensors.raw(merged(name))]
        if name in trainable.full:
            return [tensors.raw(jax.device_get(trainable.full[name]))]
        return model.pieces(name)

    full = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in trainable.full.items()
    }
    shapes = {**model.shapes, **full}
    _write(out, dataclasses.replace(model, shapes=shapes, pieces=pieces), progress)


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
      ...     safetensors(base, {"w": np.zeros((2, 3), np.float32)})
      ...     safetensors(tuned, {"w": np.ones((2, 3), np.float32)})
      ...     plan = flat_plan(base, LoraConfig(rank=1))
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
        check_plan(dict(model.shapes), plan)
    lora, full, changed = {}, {}, []
    for name in progress(sorted(rows)):
        own = Plan(plan.config, (rows[name],))
        after, before = ({name: model.read(name)} for model in models)
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


def _check_plain(base: Path, names: Collection[str], changed: Iterable[str]) -> None:
    """Raises a CheckpointError for leaves that are codes of a quantised model."""
    scales = {name: scale_beside(name, names) for name in changed}
    odd = [f"{name!r} ({scale!r})" for name, scale in scales.items() if scale]
    if odd:
        raise CheckpointError(
            f"{str(base)!r} is quantised: these leaves are codes, whose scale stands "
            f"beside them: {listed(odd, 3, ', ')}. Merge into the model in full "
            "precision, and quantise the result."
        )
