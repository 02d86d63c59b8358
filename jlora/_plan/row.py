"""What a plan says about one leaf: a `Row`."""

import dataclasses
import math
import re
from typing import Literal

import jax.numpy as jnp

from ..factors import Spec
from ..methods import Init, leaf_shapes, method_of
from ..transform.discover import FACTORED, MERGED, WIDENED, Use
from ..transform.primitives import OPERATIONS

Status = Literal["adapted", "full", "frozen", "unused"]


@dataclasses.dataclass(frozen=True)
class Row:
    """What the plan says about one leaf.

    Attributes:
      path: its name.
      shape: its shape; `()` for a leaf that is not an array.
      dtype: its dtype's name.
      uses: where the function uses it.
      status: `"adapted"`, `"full"` (trained whole), `"frozen"` or `"unused"`.
      spec: how it is adapted; None if it is not.
      head: whether it is an output head: only a bias may act after it.
      note: why it is not adapted: what it is instead of a weight, or why a weight was
        left out. It is empty where the config does not choose the weight.
      storage: the kind of its codes if it is quantised, such as `"nf4"`; else empty.
        `dtype` is that of the array that they stand for.
      nbytes: how many bytes it takes as it is stored.
      init: how A and B are initialised; None where the method decides that.

    Examples:
      `targets` may be a function of it:

      >>> import jax.numpy as jnp, jlora
      >>> params = {"layer_0": jnp.ones((4, 4)), "layer_1": jnp.ones((4, 4))}
      >>> fn = lambda p, x: x @ p["layer_0"] @ p["layer_1"]
      >>> config = jlora.LoraConfig(rank=2, targets=lambda row: row.layer >= 1)
      >>> for row in jlora.plan(fn, params, jnp.ones((1, 4)), config=config).rows():
      ...     print(row.path, row.op, row.status, row.trained)
      layer_0 linear frozen 0
      layer_1 linear adapted 16
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    uses: tuple[Use, ...]
    status: Status = "frozen"
    spec: Spec | None = None
    head: bool = False
    note: str = ""
    storage: str = ""
    nbytes: int = 0
    init: Init | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def op(self) -> str:
        """`"linear"`, `"embedding"`, `"conv"`, `"merged"`, or `""` if not a weight."""
        ops = [
            OPERATIONS.get(use.op, "linear")
            for use in self.uses
            if use.route == FACTORED
        ]
        if "embedding" in ops:
            return "embedding"
        if ops:
            return ops[0]
        return "merged" if any(use.route == MERGED for use in self.uses) else ""

    @property
    def route(self) -> str:
        """`"factored"`, `"merged"`, `"factored+merged"`, or `""` if not a weight.

        That is the route of the low-rank term: `widenings` do not change it.
        """
        routes = {use.route for use in self.uses} - {WIDENED}
        if FACTORED in routes:
            return FACTORED if routes == {FACTORED} else "factored+merged"
        return MERGED if MERGED in routes else ""

    @property
    def widenings(self) -> tuple[Use, ...]:
        """The uses that need a quantised leaf as an array; empty for others."""
        return tuple(use for use in self.uses if use.route == WIDENED)

    @property
    def layer(self) -> int:
        """The first number in the path, usually the layer's index; -1 without one."""
        number = re.search(r"\d+", self.path)
        return int(number.group()) if number else -1

    @property
    def size(self) -> int:
        """How many numbers the leaf has."""
        return math.prod(self.shape)

    @property
    def dense_nbytes(self) -> int:
        """How many bytes it takes as an array; `nbytes` unless it is quantised."""
        return (
            self.size * jnp.dtype(self.dtype).itemsize if self.storage else self.nbytes
        )

    @property
    def trained(self) -> int:
        """How many numbers are trained for it: those of A and B, or its own."""
        if self.spec is not None:
            shapes = leaf_shapes(self.spec, self.shape)
            fixed = method_of(self.spec).fixed
            return sum(math.prod(n) for leaf, n in shapes.items() if leaf not in fixed)
        return self.size if self.status == "full" else 0
