"""How a library names, shapes and scales the factors in its trees: `Library`."""

import dataclasses
import re

from ..errors import ConfigError
from ._axes import read_axes

ALPHA, ONE = "alpha", "one"  # scales that do not stand in the tree


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a library keeps the two factors of a weight, and what they mean.

    In the three patterns, each `*` stands for any text, the same in all of them.

    Attributes:
      weight: the path of the weight.
      a: the path of the factor beside the input.
      b: the path of the factor beside the output.
      axes: a letter for each axis of the weight and of both factors, as in
        `"d h k -> d r, r (h k)"`. The letter that only the factors share is the rank,
        `(h k)` is one axis for two of the weight, and `...` stands for any further
        axes. A letter that only one factor has is summed over. Empty: the shapes must
        tell, see `jlora.adopt`.
      scale: `"alpha"` if the library multiplies by a number that is not in the tree,
        `"one"` if it does not, or the pattern of the leaf that holds the multiplier.
      op: `"linear"`, `"embedding"` or `"conv"`, unless a plan tells.
      op_of: for libraries whose layers call kernels of several operations the same:
        pairs of a regular expression and of the operation of a weight, if the
        expression is all of the name of its layer. If none is, only a plan tells. They
        are for weights whose A has two or more axes of the weight, as `[*window, in,
        r]`, and whose B has the last one. Others are not kernels of a convolution, and
        have `op`.
      stacked: the axis along which the library stacks the layers of a loop in weight
        and factors, if it is not in front. Shapes must agree, else there is no such
        loop. It is for `axes=""`.
      wrapper: a component of `weight` that the base model does not have.

    Raises:
      ConfigError: if the patterns differ in their stars, or `axes` cannot be read.

    Examples:
      >>> Place("*/kernel", "*/down", "*/up", axes="i o -> i r, r o").scale
      'alpha'
    """

    weight: str
    a: str
    b: str
    axes: str = ""
    scale: str = ALPHA
    op: str = "linear"
    op_of: tuple[tuple[str, str], ...] = ()
    stacked: int | None = None
    wrapper: str = ""

    def __post_init__(self) -> None:
        patterns = [self.weight, self.a, self.b]
        if self.scale not in (ALPHA, ONE):
            patterns.append(self.scale)
        if len({text.count("*") for text in patterns}) != 1:
            raise ConfigError(
                f"Place: {', '.join(map(repr, patterns))} must have one number of "
                "stars: a star stands for the same text in each."
            )
        if self.axes:
            read_axes(self.axes)

    def operation(self, path: str, *, has_window: bool) -> str:
        """Returns the operation of the weight at `path`; "" if only a plan tells.

        Args:
          path: of the weight.
          has_window: whether its factors may be those of a convolution, see `op_of`.

        Examples:
          >>> rule = Place("*/w", "*/a", "*/b", op_of=((".*conv.*", "conv"),))
          >>> [rule.operation(p, has_window=True) for p in ("conv1/w", "x/w")]
          ['conv', '']
        """
        if not (has_window and self.op_of):
            return self.op
        layer = path.split("/")[-2:][0]
        hits = (op for name, op in self.op_of if re.fullmatch(name, layer))
        return next(hits, "")


@dataclasses.dataclass(frozen=True)
class Library:
    """The rules of a library: data that `jlora.adopt` and `jlora.hand_back` read.

    Attributes:
      name: what messages call it.
      places: the first whose factor `a` has the path of a leaf, and whose weight
        exists, is the one for it.

    Examples:
      A model of your own with A and B beside each kernel, and a scale in the tree:

      >>> import numpy as np, jlora
      >>> place = jlora.libraries.Place(
      ...     "*/kernel", "*/down", "*/up", axes="i o -> i r, r o", scale="*/scale"
      ... )
      >>> own = jlora.libraries.Library("own", (place,))
      >>> leaves = {"kernel": np.ones((3, 4)), "down": np.ones((3, 2))}
      >>> leaves |= {"up": np.ones((2, 4)), "scale": np.float32(0.5)}
      >>> frozen, trainable = jlora.adopt({"dense": leaves}, own)
      >>> list(frozen["dense"]), trainable.lora["dense/kernel"].scale
      (['kernel'], 0.5)
    """

    name: str
    places: tuple[Place, ...]


def stars(pattern: str, path: str) -> tuple[str, ...] | None:
    """Returns what the stars of `pattern` stand for in `path`; None if it is not one.

    Examples:
      >>> stars("*/a", "layers/0/a")
      ('/layers/0',)
    """
    text = "(.*)".join(map(re.escape, _rooted(pattern).split("*")))
    found = re.fullmatch(text, f"/{path}")
    return found and found.groups()


def filled(pattern: str, texts: tuple[str, ...]) -> str:
    """Returns the path that `pattern` means for these texts of its stars.

    Examples:
      >>> filled("*/b", ("/layers/0",))
      'layers/0/b'
    """
    pairs = zip(_rooted(pattern).split("*"), (*texts, ""), strict=True)
    return "".join(part + text for part, text in pairs).removeprefix("/")


def _rooted(pattern: str) -> str:
    """Returns `pattern` for paths that start with `/`, which a star may stand for."""
    return pattern if pattern.startswith("*") else f"/{pattern}"
