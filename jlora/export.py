"""Writes merged models for other programs: Orbax, safetensors, StableHLO."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import jax
import numpy as np

from . import paths
from ._core import extract, merge
from ._core.tree import check, check_plan
from ._io import tensors as tensors
from ._io.clash import clash
from ._io.disk import Path, Progress, check_name, replacing
from ._io.folders import replacing_folder
from ._io.models import Model, of_tree, open_model
from ._io.torch_models import (
    Facts,
    facts_of,
    is_table,
    is_torch_named,
    scale_beside,
    sides,
    sides_by_bias,
)
from ._numerics import not_finite
from ._plan.plan import Plan
from ._plan.resolve import resolve
from ._plan.row import Row
from ._tables import listed
from .config import LoraConfig
from .errors import CheckpointError, ConfigError, MergeError, TargetError, TreeError
from .factors import Axes, Leaf, PyTree, Trainable
from .transform.discover import FACTORED, MERGED, Use

_KERNEL, _TURNED = Axes((), (0,), (1,)), Axes((), (1,), (0,))
_UNCHANGED = (
    "The fine-tuned model has the numbers of its base, so the adapter would be zero. "
    "Give the model before and after training."
)
_EMBED_LIMIT = 2**31 - 2**24  # bytes in a serialized function


def orbax(directory: Path, params: PyTree, *, overwrite: bool = False) -> None:
    """Writes parameters as a plain Orbax checkpoint, which is read without jlora.

    Read it with `orbax.checkpoint.StandardCheckpointer().restore(directory, like)`.

    Args:
      directory: where to write; it appears once everything is written.
      params: any pytree of arrays, such as `merge`'s result.
      overwrite: whether to replace an existing `directory`, which is whole until the
        new one is.

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

    check_name(directory)
    if os.path.lexists(directory) and not overwrite:
        raise CheckpointError(
            f"{str(directory)!r} is already there. Give another name, or pass "
            "overwrite=True."
        )
    try:
        with (
            replacing_folder(directory, "new", overwrite=overwrite) as folder,
            ocp.StandardCheckpointer() as checkpointer,
        ):
            checkpointer.save(folder / "new", params)
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


def flat_plan(base: Path, config: LoraConfig) -> Plan:
    """Returns a plan for a model on disk, without its function.

    Without a trace, a floating-point leaf of two axes is taken to be a kernel
    `[fan-in, fan-out]`, as in Flax, or a table of embeddings if its name is
    `embedding`. In a model with torch's names, a `weight` is `[fan-out, fan-in]`, that
    of GPT-2's Conv1D `[fan-in, fan-out]` (the bias tells, or `config.json` beside the
    model), and `embed_tokens`, `wte` and the like are tables. A leaf of other axes is a
    kernel only if a `Rule` gives its `axes`; a `Rule` may give those of the others too.
    The rest of `config` means the same as in `jlora.plan`. Prefer `jlora.plan` where
    you have the function.

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
    unknown = "its axes' roles are not known without a trace"
    shapes = open_model(base).shapes
    assumed = _assumed({n: tuple(x.shape) for n, x in shapes.items()}, facts_of(base))
    for rule in config.rules:
        if rule.axes is not None:
            for name in paths.select(rule.pattern, shapes):
                op, _ = assumed.get(name, ("dot_general", _KERNEL))
                assumed[name] = op, rule.axes
    rows = []
    for name, x in shapes.items():
        shape = tuple(x.shape)
        use = _assumed_use(name, shape, assumed.get(name))
        rows.append(Row(name, shape, str(x.dtype), (use,)))
    found = resolve(tuple(rows), config)
    guessed = [row.path for row in found if row.spec and row.op == "merged"]
    if guessed:
        raise TargetError(
            f"Without a trace nothing tells the roles of the axes of these targets: "
            f"{listed(map(repr, guessed), 5, ', ')}. Say with Rule({guessed[0]!r}, "
            "axes=Axes(...)) which axes are summed over."
        )
    return Plan(
        config,
        tuple(
            dataclasses.replace(row, note=unknown) if row.op == "merged" else row
            for row in found
        ),
    )


def _assumed(
    shapes: Mapping[str, tuple[int, ...]], facts: Facts
) -> dict[str, tuple[str, Axes]]:
    """Returns operation and axes of each matrix, as Flax or torch keeps it."""
    flat = [name for name, shape in shapes.items() if len(shape) == 2]
    if not is_torch_named(shapes):
        ops = {name: "gather" for name in flat if name.split("/")[-1] == "embedding"}
        return {name: (ops.get(name, "dot_general"), _KERNEL) for name in flat}
    modules = {n.removesuffix(".weight"): n for n in flat if n.endswith(".weight")}
    tables = {name: module for module, name in modules.items() if is_table(module)}
    proven = sides_by_bias(shapes)
    side = sides(modules.keys() - tables.values(), proven, facts) | proven
    layers = {
        name: _KERNEL if side[module] == "conv1d" else _TURNED
        for module, name in modules.items()
        if name not in tables and side[module] is not None
    }
    layers |= {name: _TURNED for name in flat if name.endswith(".in_proj_weight")}
    found = {name: ("dot_general", axes) for name, axes in layers.items()}
    return found | dict.fromkeys(tables, ("gather", _KERNEL))


def _assumed_use(
    name: str, shape: tuple[int, ...], assumed: tuple[str, Axes] | None
) -> Use:
    """Returns the use that a leaf is assumed to have."""
    if len(shape) < 2:
        return Use(name, "", "elementwise", (), (), (), where="", scope="")
    if assumed is None:
        return Use(name, "", MERGED, (), (), (), where="", scope="")
    op, axes = assumed
    roles = axes.batch, axes.fan_in, axes.fan_out
    return Use(name, op, FACTORED, *roles, where="", scope="")


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


def _write(path: Path, model: Model, progress: Progress = iter) -> None:
    names = iter(())

    def pieces(name: str) -> Iterable[tensors.Buffer]:
        next(names, None)  # advances the progress bar
        return model.pieces(name)

    names = iter(progress(list(model.shapes)))
    tensors.write(os.fspath(path), model.shapes, pieces, model.metadata)
    for _ in names:
        pass
