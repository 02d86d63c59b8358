"""`quantize`: parameters with codes and scales in place of their large weights."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .. import paths
from .._numerics import not_finite
from .._plan.plan import Plan
from .._plan.resolve import axes_of
from .._plan.row import Row
from .._tables import listed
from ..errors import ConfigError, TreeError
from ..factors import Leaf
from ..quantised import (
    KINDS,
    Quantized,
    Scheme,
    encode,
    is_quantized,
    shard_counts,
    shard_specs,
)
from ..transform.compat import has_typed_placement, is_staging
from .tree import Missing, Tree, check_plan, flatten_frozen

Storage = Literal["auto", "packed", "native"]


def quantize(
    params: Tree,
    plan: Plan | None = None,
    *,
    kind: str = "nf4",
    targets: str | Iterable[str] | None = None,
    block: int | None = None,
    double: bool = False,
    scale_dtype: DTypeLike = "float32",
    storage: Storage = "auto",
) -> Tree:
    """Returns `params` with `Quantized` nodes in place of weights.

    With a plan, these are all weights of linear operations in it, adapted or not, with
    blocks along the axes that they sum over; a table that is looked up has blocks along
    its rows. Without a plan, they are all float leaves of two or more axes, with blocks
    along the last axis but one. `targets` chooses the leaves instead. All functions of
    jlora that take `params` or `frozen` take the result, and `apply_lora` computes with
    it, also without an adapter. Works under `jax.jit` and on shapes.

    Args:
      params: the parameters, or `frozen` from `split`; arrays or shapes.
      plan: from `jlora.plan`, for the same parameters.
      kind: `"nf4"` (4 bits: a code is a quantile of a normal distribution), `"int8"`,
        or `"int4"`.
      targets: globs over paths, see `jlora.paths.matches`: the leaves to quantise.
        Embeddings and output heads are named here; a plan means a head only where
        there is no other weight.
      block: how many numbers share a scale; None for 64 (`"int8"`: 512), or the most
        below that divides a shard. A shorter row is one block.
      double: whether the scales are quantised too, to 8 bits around their mean: 4.13
        bits a weight instead of 4.5.
      scale_dtype: dtype of the scales.
      storage: of four bits. `"packed"`: two codes in a byte, for files and CPUs.
        `"native"`: the dtype `uint4`, for TPUs. `"auto"`: native where the array lies
        on a TPU.

    Returns:
      The same tree; what is not chosen is the same array.

    Raises:
      ConfigError: for an unknown kind, storage or dtype of scales, or a block below 2.
      TreeError: if `params` is not the tree of `plan`; for a pattern that matches
        nothing; for a leaf that is quantised already, has fewer than two axes, is no
        floating-point array, holds NaN or infinity, or numbers that are too large for
        `scale_dtype` (not checked under `jit`).

    Examples:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"w": jnp.ones((128, 64)), "b": jnp.zeros(64)}
      >>> fn = lambda p, x: x @ p["w"] + p["b"]
      >>> codes = jlora.quantize(params, kind="int8")
      >>> codes["w"]
      Quantized(int8 of float32[128,64], blocks (128, 1), 8448 bytes)
      >>> lora_fn = jlora.apply_lora(fn)
      >>> float(lora_fn(codes, jlora.Trainable(), jnp.ones((1, 128)))[0, 0])
      128.0

    References:
      Dettmers et al., 2023, QLoRA, https://arxiv.org/abs/2305.14314
    """
    leaves, treedef = flatten_frozen(params)
    options = {"targets": targets, "block": block, "double": double}
    options |= {"scale_dtype": scale_dtype, "storage": storage}
    chosen = encoders(leaves, plan, kind=kind, **options)
    for path, encoder in chosen.items():
        leaves[path] = encoder(leaves[path])
    return treedef.unflatten(leaves.values())


Encoder = Callable[[Leaf], Quantized]


def encoders(
    leaves: Mapping[str, Leaf],
    plan: Plan | None = None,
    *,
    kind: str = "nf4",
    targets: str | Iterable[str] | None = None,
    block: int | None = None,
    double: bool = False,
    scale_dtype: DTypeLike = "float32",
    storage: Storage = "auto",
) -> dict[str, Encoder]:
    """Returns for each leaf that `quantize` would change the function that does it.

    Arguments and errors are those of `quantize`, but for `leaves`, the parameters by
    path.
    """
    scheme = _scheme(kind, block, double, scale_dtype)
    if storage not in ("auto", "packed", "native"):
        raise ConfigError(
            f"storage must be 'auto', 'packed' or 'native', got {storage!r}."
        )
    rows: Mapping[str, Row] = {}
    if plan is not None:
        check_plan(leaves, plan)
        rows = {row.path: row for row in plan.rows()}
    chosen = _chosen(leaves, rows, plan is not None, targets)
    _check(leaves, chosen)
    found: dict[str, Encoder] = {}
    for path in chosen:
        packed = storage == "packed" or (
            storage == "auto" and not _on_tpu(leaves[path])
        )
        own = dataclasses.replace(scheme, packed=packed)
        axes = _block_axes(leaves[path], rows.get(path))
        found[path] = functools.partial(quantize_leaf, path, axes=axes, scheme=own)
    return found


def _scheme(kind: str, block: Any, double: bool, scale_dtype: Any) -> Scheme:
    kinds = [name for name in KINDS if not name.startswith("float")]
    if kind not in kinds:
        raise ConfigError(f"kind must be one of {listed(kinds)}, got {kind!r}.")
    if block is not None and (not isinstance(block, int) or block < 2):
        raise ConfigError(f"block must be an integer of at least 2, got {block!r}.")
    try:
        dtype = jnp.dtype(scale_dtype)
    except TypeError:
        dtype = jnp.dtype("int32")
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise ConfigError(
            f"scale_dtype must be a floating dtype of 16 bits or more, got "
            f"{scale_dtype!r}."
        )
    return Scheme(kind, block, bool(double), dtype.name)


def quantize_leaf(
    path: str, w: Leaf, axes: tuple[int, ...], scheme: Scheme
) -> Quantized:
    """Returns one array, or its shape, quantised with blocks along `axes`.

    Codes and scales lie over devices as the array does. Codes that share bytes stay on
    one device.
    """
    is_shape, where = isinstance(w, jax.ShapeDtypeStruct), _layout(w)
    if where is None:
        run = functools.partial(encode, axes=axes, scheme=scheme)
        if is_shape:
            return jax.eval_shape(run, w)
        return _checked(path, run(jnp.asarray(w)), scheme)
    entries = [*where.spec, *(None for _ in range(w.ndim - len(where.spec)))]
    sizes = dict(where.mesh.shape)
    run = functools.partial(
        encode, axes=axes, scheme=scheme, shards=shard_counts(entries, sizes)
    )
    shapes = jax.eval_shape(run, jax.ShapeDtypeStruct(w.shape, w.dtype))
    specs = shard_specs(shapes, entries, sizes)
    if isinstance(specs, str):
        raise TreeError(
            f"{path!r} cannot be quantised as it lies: {specs}. Give a block= that "
            "divides a shard, or lay it out over another axis first."
        )
    if is_shape:
        return jax.tree.map(
            lambda x, spec: x.update(sharding=jax.NamedSharding(where.mesh, spec)),
            shapes,
            specs,
        )
    if has_typed_placement(w):
        typed: Any = jax.sharding.auto_axes(run, out_sharding=specs)
        return _checked(path, typed(w), scheme)
    found = jax.tree.map(
        lambda x, spec: jax.device_put(x, jax.NamedSharding(where.mesh, spec)),
        run(w),
        specs,
    )
    return _checked(path, found, scheme)


def _checked(path: str, q: Quantized, scheme: Scheme) -> Quantized:
    """Returns `q`; raises a TreeError if a scale is infinite, where that is known."""
    arrays = [x for x in jax.tree.leaves((q.scales, q.offset)) if _is_float(x)]
    if not is_staging(arrays) and not_finite(dict(enumerate(arrays))):
        remedy = "Leave out double=, or leave it dense with targets="
        if scheme.scale_dtype == "float16":
            remedy = "Write scale_dtype='bfloat16' or 'float32'"
        raise TreeError(
            f"{path!r} holds numbers too large for scales in {scheme.scale_dtype}. "
            f"{remedy}."
        )
    return q


def _layout(w: Leaf) -> jax.NamedSharding | None:
    """Returns how `w` lies over a mesh; None if it does not, or that is unknown."""
    if isinstance(w, jax.ShapeDtypeStruct):
        where = w.sharding
        return where if isinstance(where, jax.NamedSharding) else None
    if not isinstance(w, jax.Array):
        return None
    where: Any = jax.typeof(w).sharding
    if has_typed_placement(w):
        return None if where.mesh.are_all_axes_manual else where
    where = None if is_staging(w) else w.sharding
    return where if isinstance(where, jax.sharding.NamedSharding) else None


def _on_tpu(w: Leaf) -> bool:
    where = None
    if isinstance(w, jax.Array | jax.ShapeDtypeStruct) and not is_staging(w):
        where = w.sharding
    if isinstance(where, jax.sharding.Sharding):
        return any(device.platform == "tpu" for device in where.device_set)
    return jax.default_backend() == "tpu" and not isinstance(w, jax.ShapeDtypeStruct)


def _is_missing(x: Leaf) -> bool:
    return isinstance(x, Missing)


def _chosen(
    leaves: Mapping[str, Leaf],
    rows: Mapping[str, Row],
    has_plan: bool,
    targets: str | Iterable[str] | None,
) -> list[str]:
    """Returns the leaves to quantise."""
    if targets is not None:
        patterns = [targets] if isinstance(targets, str) else list(targets)
        found: dict[str, None] = {}
        for pattern in patterns:
            hits = paths.select(pattern, leaves)
            if not hits:
                near = paths.nearest(pattern, tuple(leaves), n=1)
                raise TreeError(
                    f"targets: {pattern!r} matched none of {len(leaves)} leaves"
                    + (f" (nearest: {near[0]!r})." if near else ".")
                )
            found |= dict.fromkeys(hits)
        return list(found)
    every = [p for p, w in leaves.items() if _is_float(w) and len(w.shape) >= 2]
    every = [p for p in every if 0 not in leaves[p].shape]
    if has_plan:
        every = [path for path in every if _is_linear(rows[path])]
        every = [path for path in every if not rows[path].head] or every
    if not every:
        what = "weight of a linear operation" if has_plan else "float leaf of two axes"
        raise TreeError(
            f"None of {len(leaves)} leaves is a {what}, so nothing was quantised. Name "
            "leaves in targets=."
        )
    return every


def _is_linear(row: Row) -> bool:
    """Returns whether a leaf is only used as the weight of products."""
    return row.op in ("linear", "conv") and row.status != "full"


def _is_float(w: Leaf) -> bool:
    dtype = getattr(w, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating))


def _block_axes(w: Leaf, row: Row | None) -> tuple[int, ...]:
    """Returns the axes that blocks lie along: what a product sums over, or rows."""
    if row is not None and row.uses:
        axes = axes_of(row)
        if row.op == "embedding":
            return axes.fan_out
        if axes.fan_in:
            return axes.fan_in
    return (len(w.shape) - 2,)


def _check(leaves: Mapping[str, Leaf], chosen: Iterable[str]) -> None:
    wrong = []
    for path in chosen:
        w = leaves[path]
        if is_quantized(w):
            wrong.append(
                f"{path!r} is quantised already ({w.kind}): name others in targets=, "
                "or take the dense weights (jlora.merge(params, jlora.Trainable()) "
                "makes them dense)"
            )
        elif _is_missing(w):
            wrong.append(f"{path!r} is trained in full, so it is not in frozen")
        elif not _is_float(w):
            kind = getattr(w, "dtype", type(w).__name__)
            wrong.append(f"{path!r} is {kind}, not a floating-point array")
        elif len(w.shape) < 2:
            wrong.append(f"{path!r} has {len(w.shape)} axes: a weight has two or more")
        elif 0 in w.shape:
            wrong.append(f"{path!r} is empty")
    if not wrong:
        own = {p: leaves[p] for p in chosen}
        known = {
            p: w
            for p, w in own.items()
            if not isinstance(w, jax.ShapeDtypeStruct) and not is_staging(w)
        }
        wrong = [f"{path!r} holds NaN or infinity" for path in not_finite(known)]
    if wrong:
        raise TreeError(f"Not quantised: {listed(wrong)}.")
