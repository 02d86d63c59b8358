"""Writes merged models for other programs: Orbax, safetensors, StableHLO."""

import contextlib
import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from . import paths
from ._core import extract, merge
from ._core.tree import check, check_plan
from ._io import tensors as tensors
from ._io.disk import Path, Progress, replacing
from ._io.models import Model, of_tree, open_model
from ._plan.plan import Plan
from ._plan.resolve import resolve
from ._plan.row import Row
from ._tables import listed
from .config import LoraConfig
from .errors import CheckpointError, ConfigError, TargetError, TreeError
from .factors import Axes, Leaf, PyTree, Trainable
from .transform.discover import FACTORED, MERGED, Use

_EMBED_LIMIT = 2**31 - 2**24  # bytes in a serialized function


def orbax(directory: Path, params: PyTree, *, overwrite: bool = False) -> None:
    """Writes parameters as a plain Orbax checkpoint, which is read without jlora.

    Read it with `orbax.checkpoint.StandardCheckpointer().restore(directory, like)`.

    Args:
      directory: where to write; it appears once everything is written.
      params: any pytree of arrays, such as `merge`'s result.
      overwrite: whether to replace an existing `directory`.

    Raises:
      CheckpointError: if `directory` exists already, or cannot be written.

    Examples:
      >>> import os, tempfile, jax.numpy as jnp, orbax.checkpoint as ocp
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     place = os.path.join(folder, "model")
      ...     orbax(place, {"w": jnp.arange(3.0)})
      ...     with ocp.StandardCheckpointer() as checkpointer:
      ...         checkpointer.restore(place, {"w": jnp.zeros(3)})
      {'w': Array([0., 1., 2.], dtype=float32)}
    """
    import orbax.checkpoint as ocp

    place = pathlib.Path(directory).absolute()
    if place.exists() and not overwrite:
        raise CheckpointError(
            f"{str(directory)!r} is already there. Give another name, or pass "
            "overwrite=True."
        )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(place, params, force=overwrite)
            checkpointer.wait_until_finished()
    except Exception as error:
        raise CheckpointError(
            f"Not saved in {str(directory)!r} ({type(error).__name__}: {error})."
        ) from error


def safetensors(path: Path, params: PyTree) -> None:
    """Writes parameters to one safetensors file, each leaf under its path.

    Leaves come to the host one by one. The file is written whole or not at all. For
    names and axes as `transformers` wants them, see `jlora.peft.save_base`.

    Args:
      path: the file; an existing one is replaced.
      params: any pytree of arrays, such as `merge`'s result.

    Raises:
      CheckpointError: if a leaf is not an array, the format lacks its dtype, or the
        file cannot be written.

    Examples:
      >>> import os, tempfile, jax.numpy as jnp
      >>> from safetensors.numpy import load_file
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = os.path.join(folder, "model.safetensors")
      ...     safetensors(file, {"dense": {"kernel": jnp.ones((1, 2))}})
      ...     load_file(file)
      {'dense/kernel': array([[1., 1.]], dtype=float32)}

    References:
      https://huggingface.co/docs/safetensors
    """
    _write(path, of_tree(params))


def stablehlo(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: PyTree,
    batch: str | None = "b",
    path: Path | None = None,
    embed: bool = True,
    platforms: Sequence[str] | None = None,
) -> bytes:
    """Returns `fn(params, *args)` as serialized StableHLO, for a batch of any size.

    `jax.export.deserialize(data).call(*args)` runs it, on any JAX within the export's
    guarantee of compatibility, without the model's code.

    Args:
      fn: the plain function, `fn(params, *args)`.
      params: merged parameters, from `jlora.merge`.
      *args: arrays or `jax.ShapeDtypeStruct`s.
      batch: name of the size of each argument's first axis, which stays free. None
        keeps the shapes as they are, including symbolic dimensions of `jax.export`.
      path: a file to write as well, whole or not at all.
      embed: whether the result holds the parameters; otherwise they are the first
        argument of `call`.
      platforms: for instance `("cpu", "cuda", "tpu")`; None means JAX's default.

    Raises:
      TreeError: if the parameters to embed have two gigabytes or more.
      CheckpointError: if the file cannot be written.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"w": jnp.ones((4, 2))}
      >>> data = stablehlo(lambda p, x: x @ p["w"], params, jnp.ones((1, 4)))
      >>> jax.export.deserialize(data).call(jnp.ones((3, 4))).shape
      (3, 2)

    References:
      https://docs.jax.dev/en/latest/export/export.html
    """
    from jax import export

    def shape_of(x: Leaf) -> jax.ShapeDtypeStruct:
        dtype = x.dtype if hasattr(x, "dtype") else jax.dtypes.result_type(x)
        return jax.ShapeDtypeStruct(tuple(np.shape(x)), dtype)

    shapes = jax.tree.map(shape_of, args)
    if batch is not None:
        (size,) = export.symbolic_shape(batch)
        shapes = jax.tree.map(
            lambda x: (
                jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) if x.shape else x
            ),
            shapes,
        )
    if embed:
        arrays = [x for x in jax.tree.leaves(params) if hasattr(x, "nbytes")]
        total = sum(x.nbytes for x in arrays)
        if total > _EMBED_LIMIT:
            raise TreeError(
                f"The parameters take {total:,} bytes; a serialized function holds "
                "less than two gigabytes. Pass embed=False and save them beside it."
            )
        # On the host: a sharded constant would fix the number of devices.
        fixed = jax.device_get(params)
        exported = export.export(
            jax.jit(lambda *args: fn(fixed, *args)), platforms=platforms
        )(*shapes)
    else:
        first = jax.tree.map(shape_of, params)
        exported = export.export(jax.jit(fn), platforms=platforms)(first, *shapes)
    data = bytes(exported.serialize())
    if path is not None:
        with replacing(path) as file:
            file.write(data)
    return data


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
      out: the safetensors file to write, whole or not at all.
      progress: wraps the iteration over the names, such as `tqdm.tqdm`.

    Raises:
      TreeError: if the adapter does not fit the base; lists every misfit.
      CheckpointError: if a file cannot be read or written.

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
    model = open_model(base)
    check(dict(model.shapes), trainable)

    def merged(name: str) -> np.ndarray:
        w = model.read(name)
        own = Trainable({name: trainable.lora[name]})
        with jax.enable_x64(True) if w.dtype.itemsize > 4 else contextlib.nullcontext():
            return np.asarray(merge.merge({name: w}, own)[name])

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
      TreeError: if the models differ from each other or from the plan.
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
    odd = sorted(models[0].shapes.keys() ^ models[1].shapes.keys())
    if odd:
        raise TreeError(
            f"Only one of the models has {listed(map(repr, odd), 5, ', ')}."
        )
    rows = {row.path: row for row in plan.leaves}
    for model in models:
        check_plan(dict(model.shapes), plan)
    lora, full, left = {}, {}, []
    for name in progress(sorted(rows)):
        own = Plan(plan.config, (rows[name],))
        after, before = ({name: model.read(name)} for model in models)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = extract.extract(after, before, own)
        left += [name] * len(caught)
        lora |= found.lora
        full |= found.full
    if left:
        warnings.warn(
            "These leaves changed, but the plan leaves them frozen, so the adapter "
            f"lacks their change: {listed(left, separator=', ')}. Add them to "
            "train= or targets=.",
            stacklevel=2,
        )
    order = [row.path for row in plan.leaves]
    return Trainable(
        {p: lora[p] for p in order if p in lora},
        {p: full[p] for p in order if p in full},
    )


def flat_plan(base: Path, config: LoraConfig) -> Plan:
    """Returns a plan for a model on disk, without its function.

    Without a trace, a floating-point leaf of two axes is taken to be a kernel
    `[fan-in, fan-out]`, as in Flax, or a table of embeddings if its name is
    `embedding`. A leaf of more axes is a kernel only if a `Rule` gives its `axes`; a
    `Rule` may give those of the others too. The rest of `config` means the same as in
    `jlora.plan`. Prefer `jlora.plan` where you have the function.

    Args:
      base: a model; for the formats see `merge_files`.
      config: what to adapt and how.

    Raises:
      ConfigError: if `targets` is a predicate.
      TargetError: for all that `jlora.plan` refuses, and targets of unknown axes.

    Examples:
      >>> import os, tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = os.path.join(folder, "model.safetensors")
      ...     safetensors(file, {"w": np.ones((2, 3)), "bias": np.ones(3)})
      ...     flat_plan(file, LoraConfig(rank=1)).adapted
      ('w',)
    """
    if callable(config.targets):
        raise ConfigError("Without a traced function, targets= takes only globs.")
    unknown = "more than two axes, whose roles are not known without a trace"
    shapes = open_model(base).shapes
    ruled: dict[str, Axes] = {}
    for rule in config.rules:
        if rule.axes:
            ruled |= dict.fromkeys(paths.select(rule.pattern, shapes), rule.axes)
    rows = []
    for name, x in shapes.items():
        shape = tuple(x.shape)
        use = _assumed_use(name, shape, ruled.get(name))
        rows.append(Row(name, shape, str(x.dtype), (use,)))
    found = resolve(tuple(rows), config)
    guessed = [row.path for row in found if row.spec and row.op == "merged"]
    if guessed:
        raise TargetError(
            f"These targets have {unknown}: {listed(map(repr, guessed), 5, ', ')}. Say "
            f"with Rule({guessed[0]!r}, axes=Axes(...)) which axes are summed over."
        )
    return Plan(
        config,
        tuple(
            dataclasses.replace(row, note=unknown) if row.op == "merged" else row
            for row in found
        ),
    )


def _assumed_use(name: str, shape: tuple[int, ...], ruled: Axes | None) -> Use:
    """Returns the use that a leaf is assumed to have; a rule may say its axes."""
    if len(shape) < 2:
        return Use(name, "", "elementwise", (), (), (), where="", scope="")
    if len(shape) > 2 and not ruled:
        return Use(name, "", MERGED, (), (), (), where="", scope="")
    axes = ruled or Axes()
    op = "gather" if name.split("/")[-1] == "embedding" else "dot_general"
    roles = axes.batch, axes.fan_in, axes.fan_out
    return Use(name, op, FACTORED, *roles, where="", scope="")


def _write(path: Path, model: Model, progress: Progress = iter) -> None:
    names = iter(())

    def pieces(name: str) -> Iterable[tensors.Buffer]:
        next(names, None)  # advances the progress bar
        return model.pieces(name)

    names = iter(progress(list(model.shapes)))
    tensors.write(os.fspath(path), model.shapes, pieces, model.metadata)
    for _ in names:
        pass
