"""What a compiled program sends between devices, read from its optimised HLO.

    found = collectives(jax.jit(step).lower(...).compile().as_text())
    sent(found), by_kind(found), beyond(found, collectives(floor))

A collective in a loop counts once for each of the loop's steps. One that is cut into a
start, steps beside other work, and an end counts once. A product that XLA computes
window by window is a loop of `collective-permute`s, which count as they are. So compare
bytes sent, which are the same for both ways, and not numbers of collectives.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

# What a device sends of an array, in a ring of `n` devices. The array is the result on
# one device.
_SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}
KINDS = tuple(_SENT)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that devices exchange.

    Attributes:
      kind: one of `KINDS`.
      shape: the result on one device, as `"bf16[64,64]"`.
      nbytes: bytes of the whole array, the one that is gathered or summed.
      sent: bytes that a device sends of it each time, in a ring.
      times: how often a run of the program sends it.
      place: the name of the operation that it comes from.
    """

    kind: str
    shape: str
    nbytes: int
    sent: float
    times: int
    place: str


def sent(found: Iterable[Collective]) -> float:
    """Returns the bytes that a device sends in a run."""
    return sum(one.sent * one.times for one in found)


def by_kind(found: Iterable[Collective]) -> dict[str, float]:
    """Returns the bytes that a device sends in a run, by kind of collective."""
    found = list(found)
    own = {kind: sent(one for one in found if one.kind == kind) for kind in KINDS}
    return {kind: n for kind, n in own.items() if n}


def beyond(
    found: Iterable[Collective], floor: Iterable[Collective]
) -> dict[tuple[str, str], int]:
    """Returns how often `found` has more of a kind and shape than `floor` has."""
    more: Counter[tuple[str, str]] = Counter()
    for sign, own in ((1, found), (-1, floor)):
        for one in own:
            more[one.kind, one.shape] += sign * one.times
    return dict(+more)


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program, largest first.

    Args:
      text: optimised HLO, as `compiled.as_text()` gives it.

    Raises:
      ValueError: if the text has no entry, or if the steps of a loop that holds
        collectives are not known.
    """
    program = _Program(text)
    found = program.of(program.entry)
    return sorted(found, key=lambda one: -one.sent * one.times)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str
    op: str
    operands: tuple[str, ...]
    inside: str  # the text between the parentheses of the operands
    attributes: str


_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"\b([a-z]+\d\w*|pred)\[([\d,<=]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)


class _Program:
    """The computations of a module, and the collectives of each."""

    def __init__(self, text: str) -> None:
        self.entry = ""
        self._bodies: dict[str, dict[str, _Instruction]] = {}
        self._roots: dict[str, str] = {}
        self._known: dict[str, list[Collective]] = {}
        sizes = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[:100_000])
        self._devices = math.prod(map(int, sizes))
        self._read(text)
        if not self.entry:
            raise ValueError("This is not HLO text: it has no ENTRY computation.")

    def _read(self, text: str) -> None:
        name = ""
        for line in text.splitlines():
            head = _HEAD.match(line)
            if head:
                name = head[2]
                self._bodies[name] = {}
                self.entry = name if head[1] else self.entry
            found = _LINE.match(line)
            if not found or not name:
                continue
            root, own, result, op, rest = found.groups()
            end = _closing(rest)
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
            self._bodies[name][own] = _Instruction(
                own, result, op, operands, rest[:end], rest[end:]
            )
            if root:
                self._roots[name] = own

    def of(self, name: str) -> list[Collective]:
        """Returns the collectives of one run of a computation."""
        if name not in self._known:
            body = self._bodies.get(name, {})
            self._known[name] = [
                one for i in body.values() for one in self._sends(name, i) if one.sent
            ]
        return self._known[name]

    def _sends(self, within: str, i: _Instruction) -> Iterable[Collective]:
        if i.op == "while":
            return self._loop(within, i)
        if i.op == "conditional":
            named = [a or b for a, b in _BRANCHES.findall(i.attributes)]
            names = [n.strip(" %") for text in named for n in text.split(",")]
            return max(map(self.of, names), key=sent)
        if i.op in ("call", "fusion", "custom-call", "async-start"):
            called = _CALLED.search(i.attributes)
            return self.of(called[1]) if called else ()
        kind = i.op.removesuffix("-start")
        if kind not in KINDS or self._is_continued(within, i):
            return ()
        return self._arrays(within, kind, i)

    def _is_continued(self, within: str, i: _Instruction) -> bool:
        """Returns whether a collective of TPUs was begun in another computation.

        A fused one stands in the fusions that start it, carry it on and end it.
        """
        if "async_collective_fusion_config" not in i.attributes:
            return False
        users = (u for u in self._bodies[within].values() if i.name in u.operands)
        return not any('"AsyncCollectiveStart"' in u.attributes for u in users)

    def _arrays(self, within: str, kind: str, i: _Instruction) -> Iterator[Collective]:
        result = i.result
        # A start has its operands beside its result; that of a sum only on GPUs.
        alone = kind == "all-reduce" and not result.startswith("((")
        if i.op.endswith("-start") and not alone:
            result = _parts(result)[1]
        n = self._group(i.attributes)
        scattered = kind == "all-reduce" and within.startswith("all-reduce-scatter")
        named = re.search(r'op_name="((?:[^"\\]|\\.)*)"', i.attributes)
        place = named[1] if named else ""
        for dtype, dims in _ARRAY.findall(result):
            sizes = [int(d.lstrip("<=")) for d in dims.split(",") if d]
            nbytes = math.ceil(math.prod(sizes) * _bits(dtype) / 8)
            per_device = nbytes * _SENT[kind](n)
            own = "reduce-scatter" if scattered else kind
            if scattered:  # a fusion of TPUs: each device keeps a part of the sum
                per_device /= 2
            elif kind == "reduce-scatter":
                nbytes *= n
            yield Collective(own, f"{dtype}[{dims}]", nbytes, per_device, 1, place)

    def _group(self, attributes: str) -> int:
        """Returns how many devices exchange an array with each other."""
        mesh = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes)
        if mesh:
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
            axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
        if listed:
            return listed[1].count(",") + 1
        strided = re.search(r"replica_groups=\[([\d,]+)\]<=", attributes)
        if strided:
            return math.prod(map(int, strided[1].split(",")[1:]))
        return self._devices

    def _loop(self, within: str, i: _Instruction) -> list[Collective]:
        condition, body = (
            _first(rf"{word}=%?([\w.\-]+)", i.attributes)
            for word in ("condition", "body")
        )
        found = [*self.of(condition), *self.of(body)]
        if not found:
            return []
        n = self._steps(within, i, condition, body)
        return [dataclasses.replace(one, times=one.times * n) for one in found]

    def _steps(self, within: str, i: _Instruction, condition: str, body: str) -> int:
        """Returns how many steps a loop takes: as XLA says, or by its counter."""
        known = re.search(r"known_trip_count[^\d]*(\d+)", i.attributes)
        if known:
            return int(known[1])
        test = self._bodies[condition][self._roots[condition]]
        if test.op == "compare" and "direction=LT" in test.attributes:
            counter, limit = (self._source(condition, x) for x in test.operands)
            if counter.op == "get-tuple-element":
                at = int(_first(r"index=(\d+)", counter.attributes))
                start = self._entry(within, i.operands[0], at)
                after = self._entry(body, self._roots[body], at)
                addends = [self._source(body, x) for x in after.operands]
                ends = (start, limit, *(x for x in addends if x.op == "constant"))
                if after.op == "add" and [x.op for x in ends] == ["constant"] * 3:
                    first, last, step = (int(x.inside) for x in ends)
                    return max(0, math.ceil((last - first) / step))
        raise ValueError(
            f"The loop {i.name!r} holds collectives, and its number of steps is not "
            "known."
        )

    def _entry(self, within: str, name: str, at: int) -> _Instruction:
        """Returns what the entry `at` of a tuple is."""
        i = self._source(within, name)
        return self._source(within, i.operands[at]) if i.op == "tuple" else i

    def _source(self, within: str, name: str) -> _Instruction:
        """Returns the instruction that gave a value, before copies of it."""
        i = self._bodies[within][name]
        while i.op in ("copy", "bitcast", "convert"):
            i = self._bodies[within][i.operands[0]]
        return i


def _closing(text: str) -> int:
    """Returns where the parenthesis is closed that was open before `text`."""
    depth = 1
    for at, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if not depth:
            return at
    return len(text)


def _parts(result: str) -> Sequence[str]:
    """Returns the entries of a tuple's shape."""
    parts, depth = [""], 0
    for char in result.strip()[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return parts


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
