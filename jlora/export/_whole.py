"""Whole parameters for other programs: Orbax, safetensors, StableHLO."""

import os
from collections.abc import Callable, Sequence

import jax
import numpy as np

from .. import paths
from .._checks import check_known
from .._io import coded
from .._io.disk import Path, check_name, replacing, write_text
from .._io.folders import replacing_folder
from .._io.models import QUANTISED, of_tree, write
from .._io.processes import first_writes, on_host, write_in_first
from ..errors import CheckpointError, TreeError
from ..factors import Leaf, PyTree
from ..quantised import has_quantized, is_quantized

_EMBED_LIMIT = 2**31 - 2**24  # bytes in a serialized function


def orbax(directory: Path, params: PyTree, *, overwrite: bool = False) -> None:
    """Writes parameters as a plain Orbax checkpoint, which is read without jlora.

    Read it with `orbax.checkpoint.StandardCheckpointer().restore(directory, like)`, or
    with `jlora.files.read_params`. Quantised arrays are several arrays each, two codes
    of four bits in a byte; what is static stands in a JSON file beside.

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
    check_known("export.orbax", params)
    if os.path.lexists(directory) and not overwrite:
        raise CheckpointError(
            f"{str(directory)!r} is already there. Give another name, or pass "
            "overwrite=True."
        )
    packed = jax.tree.map(coded.for_file, params, is_leaf=is_quantized)
    about = coded.metadata_of(paths.flatten(packed)[0])
    try:
        with (
            replacing_folder(directory, "new", overwrite=overwrite) as folder,
            ocp.StandardCheckpointer() as checkpointer,
        ):
            checkpointer.save(folder / "new", packed)
            checkpointer.wait_until_finished()
            if about and jax.process_index() == 0:
                write_text(folder / "new" / QUANTISED, about[coded.KEY])
    except Exception as error:
        raise CheckpointError(
            f"Not saved in {str(directory)!r} ({type(error).__name__}: {error})."
        ) from error


def safetensors(path: Path, params: PyTree) -> None:
    """Writes parameters to one safetensors file, each leaf under its path.

    Leaves come to the host one by one, also of a model that several processes share:
    all call this, and the first writes. The file is written whole or not at all. A
    quantised leaf `w` is the tensors `w.codes` and `w.scales`, described in the
    metadata; `jlora.files.read_params` reads it. For names and axes as `transformers`
    wants them, see `jlora.peft.save_base`.

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
    check_known("export.safetensors", params)
    leaves, _ = paths.flatten(params)
    write_in_first(lambda read: write(path, of_tree(params, read)), leaves)


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
      TreeError: if the parameters to embed have two gigabytes or more, or those to give
        later are quantised.
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
        fixed = jax.device_get(on_host(params))
        exported = export.export(
            jax.jit(lambda *args: fn(fixed, *args)), platforms=platforms
        )(*shapes)
    else:
        if has_quantized(params):
            raise TreeError(
                "A serialized function takes arrays, not quantised weights: pass "
                "embed=True, or merge them first."
            )
        first = jax.tree.map(shape_of, params)
        exported = export.export(jax.jit(fn), platforms=platforms)(first, *shapes)
    data = bytes(exported.serialize())
    if path is not None:
        with first_writes() as first:
            if first:
                with replacing(path) as file:
                    file.write(data)
    return data
