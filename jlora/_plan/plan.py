"""`plan`: what will be adapted, how, and at what cost, from one abstract trace."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from .. import paths
from .._checks import check_function
from ..config import LoraConfig
from ..errors import ConfigError
from ..factors import Leaf, PyTree
from ..quantised import is_quantized
from ..transform.discover import Use, discover
from ..transform.heads import output_heads
from ..transform.stage import is_array, stage
from .check import check_routes
from .coverage import Coverage, coverage_of
from .resolve import leave_merged, resolve
from .row import Row
from .show import as_html, as_text


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is adapted and how; static and hashable. Printing it shows the table.

    Attributes:
      config: what the plan was made from.
      leaves: a `Row` for each leaf of the parameters, in the tree's order.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"w": jnp.ones((4, 8)), "head": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["head"]
      >>> config = jlora.LoraConfig(rank=2, train="head")
      >>> plan = jlora.plan(fn, params, jnp.ones((1, 4)), config=config)
      >>> plan.adapted, plan.full, plan.trained_count
      (('w',), ('head',), 40)
      >>> {row.path: row.shape for row in plan.rows()}
      {'head': (8, 2), 'w': (4, 8)}
    """

    config: LoraConfig
    leaves: tuple[Row, ...]

    def rows(self) -> tuple[Row, ...]:
        """Returns a `Row` for each leaf of the parameters, in the tree's order."""
        return self.leaves

    @property
    def adapted(self) -> tuple[str, ...]:
        """Paths of the leaves that get factors."""
        return tuple(row.path for row in self.leaves if row.status == "adapted")

    @property
    def full(self) -> tuple[str, ...]:
        """Paths of the leaves trained in full."""
        return tuple(row.path for row in self.leaves if row.status == "full")

    @property
    def coverage(self) -> Coverage:
        """Which share of blocks, weights and FLOPs is adapted; linear in leaves."""
        targets = self.config.targets
        named = () if callable(targets) or targets == "all-linear" else targets
        return coverage_of(self.leaves, named)

    @property
    def trained_count(self) -> int:
        """How many numbers are trained."""
        return sum(row.trained for row in self.leaves)

    @property
    def total_count(self) -> int:
        """How many numbers the parameters have."""
        return sum(row.size for row in self.leaves)

    def __str__(self) -> str:
        return as_text(self.leaves, self.coverage)

    def _repr_html_(self) -> str:
        return as_html(self.leaves, self.coverage)


def plan(
    fn: Callable[..., PyTree],
    params: PyTree,
    /,
    *args: PyTree,
    config: LoraConfig,
    fn_kwargs: Mapping[str, PyTree] | None = None,
    **kwargs: PyTree,
) -> Plan:
    """Returns what `config` means for `fn`: what is adapted, how, and at what cost.

    `fn(params, *args, **kwargs)` is traced once, without running it or allocating
    anything. The trace shows which leaves are weights of linear operations, over which
    axes they sum, and which can only be merged on the fly; names do not matter. Of
    `params` from `jlora.quantize` it also shows the kind and the bytes of quantised
    leaves, and where one is widened whole.

    Args:
      fn: the function that `apply_lora` will wrap.
      params: any pytree of arrays or `jax.ShapeDtypeStruct`s, some perhaps quantised.
      *args: `fn`'s other arguments, arrays or shapes.
      config: what to adapt and how.
      fn_kwargs: `fn`'s keyword arguments whose names `plan` itself uses, as in
        `fn_kwargs={"config": model_config}`.
      **kwargs: `fn`'s other keyword arguments.

    Raises:
      ConfigError: if `config` is not a `LoraConfig`, or `fn` is not a function.
      TargetError: lists every pattern that matches nothing (with the nearest path),
        every target that is not a weight of a linear operation, every leaf that is
        quantised and would be trained in full, every named leaf whose
        rank is above `min(fan-in, fan-out)`, every leaf that does not suit its init,
        and patterns that contradict each other.

    Examples:
      >>> import jax, jax.numpy as jnp, jlora
      >>> shape = jax.ShapeDtypeStruct
      >>> params = {
      ...     "embed": shape((100, 16), jnp.float32),
      ...     "up": shape((16, 64), jnp.float32),
      ...     "down": shape((64, 16), jnp.float32),
      ...     "head": shape((16, 2), jnp.float32),
      ... }
      >>> def fn(p, ids):
      ...     x = p["embed"][ids]
      ...     return (x + jnp.tanh(x @ p["up"]) @ p["down"]) @ p["head"]
      >>> ids = shape((4, 8), jnp.int32)
      >>> plan = jlora.plan(fn, params, ids, config=jlora.LoraConfig(rank=4))
      >>> plan.adapted, plan.trained_count
      (('down', 'up'), 640)
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"config must be a jlora.LoraConfig, got {type(config).__name__}. Write "
            "config=jlora.LoraConfig(rank=8)."
        )
    check_function("plan", fn)
    leaves, _ = paths.flatten(params)
    staged = stage(fn, params, args, {**kwargs, **(fn_kwargs or {})})
    names: list[str | None] = [None] * len(staged.inputs)
    for path, slot in zip(leaves, staged.param_slots, strict=True):
        if slot is not None:
            names[slot] = path
    uses: dict[str, list[Use]] = {path: [] for path in leaves}
    for use in discover(staged.code, staged.inputs, names):
        uses[use.path].append(use)
    heads = output_heads(staged.code, names)
    rows = tuple(
        Row(
            path,
            tuple(leaf.shape) if is_array(leaf) else (),
            _named(leaf.dtype) if is_array(leaf) else type(leaf).__name__,
            tuple(uses[path]),
            head=path in heads,
            storage=leaf.kind if is_quantized(leaf) else "",
            nbytes=_nbytes(leaf),
        )
        for path, leaf in leaves.items()
    )
    slots = {name: i for i, name in enumerate(names) if name is not None}
    rows = resolve(rows, config)
    rows = check_routes(rows, staged, slots, config.dtype or "float32")
    return Plan(config, leave_merged(rows, config))


@functools.cache
def _named(dtype: Any) -> str:
    return str(dtype)


def _nbytes(leaf: Leaf) -> int:
    if is_quantized(leaf):
        return leaf.nbytes
    return math.prod(leaf.shape) * leaf.dtype.itemsize if is_array(leaf) else 0
