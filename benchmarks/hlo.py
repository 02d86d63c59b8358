"""The instructions of a compiled program, read from its optimised HLO."""

import dataclasses
import math
import re
from collections.abc import Sequence

_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"\b([a-z]+\d\w*|pred)\[([\d,<=]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a result.

    Attributes:
      shape: as `"bf16[64,64]"`.
      nbytes: how many bytes it has, without padding.
      layout: order of its axes, tiles and memory, as `"{1,0:T(8,128)S(1)}"`.
    """

    shape: str
    nbytes: int
    layout: str


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation; `inside` is the text between its parentheses."""

    name: str
    result: str
    op: str
    operands: tuple[str, ...]
    inside: str
    attributes: str

    @property
    def called(self) -> str | None:
        """The computation that it runs once, if there is one."""
        found = _CALLED.search(self.attributes)
        return found[1] if found else None

    @property
    def branches(self) -> list[str]:
        """The computations of which it runs one."""
        named = [a or b for a, b in _BRANCHES.findall(self.attributes)]
        return [n.strip(" %") for text in named for n in text.split(",")]

    @property
    def loop(self) -> tuple[str, str]:
        """The condition and the body of a loop."""
        condition, body = (
            _first(rf"{word}=%?([\w.\-]+)", self.attributes)
            for word in ("condition", "body")
        )
        return condition, body


class Program:
    """The computations of a module.

    Attributes:
      entry: the name of the one that a run starts with.
      bodies: the instructions of each, by name.
      roots: the name of the last instruction of each.

    Raises:
      ValueError: if the text has no entry.
    """

    def __init__(self, text: str) -> None:
        self.entry = ""
        self.bodies: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, str] = {}
        self._read(text)
        if not self.entry:
            raise ValueError("This is not HLO text: it has no ENTRY computation.")

    def _read(self, text: str) -> None:
        name = ""
        for line in text.splitlines():
            head = _HEAD.match(line)
            if head:
                name = head[2]
                self.bodies[name] = {}
                self.entry = name if head[1] else self.entry
            found = _LINE.match(line)
            if not found or not name:
                continue
            root, own, result, op, rest = found.groups()
            end = _closing(rest)
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
            self.bodies[name][own] = Instruction(
                own, result, op, operands, rest[:end], rest[end:]
            )
            if root:
                self.roots[name] = own

    def steps(self, within: str, i: Instruction) -> int:
        """Returns how many steps the loop `i` takes: as XLA says, or by its counter.

        Raises:
          ValueError: if neither tells.
        """
        condition, body = i.loop
        known = re.search(r"known_trip_count[^\d]*(\d+)", i.attributes)
        if known:
            return int(known[1])
        test = self.bodies[condition][self.roots[condition]]
        if test.op == "compare" and "direction=LT" in test.attributes:
            counter, limit = (self._source(condition, x) for x in test.operands)
            if counter.op == "get-tuple-element":
                at = int(_first(r"index=(\d+)", counter.attributes))
                start = self._entry(within, i.operands[0], at)
                after = self._entry(body, self.roots[body], at)
                addends = [self._source(body, x) for x in after.operands]
                ends = (start, limit, *(x for x in addends if x.op == "constant"))
                if after.op == "add" and [x.op for x in ends] == ["constant"] * 3:
                    first, last, step = (int(x.inside) for x in ends)
                    return max(0, math.ceil((last - first) / step))
        raise ValueError(f"How many steps the loop {i.name!r} takes is not known.")

    def _entry(self, within: str, name: str, at: int) -> Instruction:
        """Returns what the entry `at` of a tuple is."""
        i = self._source(within, name)
        return self._source(within, i.operands[at]) if i.op == "tuple" else i

    def _source(self, within: str, name: str) -> Instruction:
        """Returns the instruction that gave a value, before copies of it."""
        i = self.bodies[within][name]
        while i.op in ("copy", "bitcast", "convert"):
            i = self.bodies[within][i.operands[0]]
        return i


def _closing(text: str) -> int:
    """Returns where the parenthesis is closed that was open before `text`."""
    depth = 1
    for at, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if not depth:
            return at
    return len(text)


def parts(result: str) -> Sequence[str]:
    """Returns the entries of a tuple's shape."""
    parts, depth = [""], 0
    for char in result.strip()[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def arrays(result: str) -> list[Array]:
    """Returns the arrays of a result's type, those in tuples too."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(result):
        sizes = [int(d.lstrip("<=")) for d in dims.split(",") if d]
        nbytes = math.ceil(math.prod(sizes) * _bits(dtype) / 8)
        found.append(Array(f"{dtype}[{dims}]", nbytes, layout))
    return found


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(_first(r"(\d+)", dtype))


def _first(pattern: str, text: str) -> str:
    """Returns the first group of `pattern` in `text`, which has it."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(
            f"HLO that is not understood: no {pattern!r} in {text[:200]!r}."
        )
    return found[1]
