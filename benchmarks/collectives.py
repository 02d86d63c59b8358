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
from collections.abc import Iterable, Iterator

from .hlo import Instruction, Program, arrays, parts

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


class _Program(Program):
    """The computations of a module, and the collectives of each."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._known: dict[str, list[Collective]] = {}
        sizes = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[:100_000])
        self._devices = math.prod(map(int, sizes))

    def of(self, name: str) -> list[Collective]:
        """Returns the collectives of one run of a computation."""
        if name not in self._known:
            body = self.bodies.get(name, {})
            self._known[name] = [
                one for i in body.values() for one in self._sends(name, i) if one.sent
            ]
        return self._known[name]

    def _sends(self, within: str, i: Instruction) -> Iterable[Collective]:
        if i.op == "while":
            return self._loop(within, i)
        if i.op == "conditional":
            return max(map(self.of, i.branches), key=sent)
        if i.op in ("call", "fusion", "custom-call", "async-start"):
            return self.of(i.called) if i.called else ()
        kind = i.op.removesuffix("-start")
        if kind not in KINDS or self._is_continued(within, i):
            return ()
        return self._arrays(within, kind, i)

    def _is_continued(self, within: str, i: Instruction) -> bool:
        """Returns whether a collective of TPUs was begun in another computation.

        A fused one stands in the fusions that start it, carry it on and end it.
        """
        if "async_collective_fusion_config" not in i.attributes:
            return False
        users = (u for u in self.bodies[within].values() if i.name in u.operands)
        return not any('"AsyncCollectiveStart"' in u.attributes for u in users)

    def _arrays(self, within: str, kind: str, i: Instruction) -> Iterator[Collective]:
        result = i.result
        # A start has its operands beside its result; that of a sum only on GPUs.
        alone = kind == "all-reduce" and not result.startswith("((")
        if i.op.endswith("-start") and not alone:
            result = parts(result)[1]
        n = self._group(i.attributes)
        scattered = kind == "all-reduce" and within.startswith("all-reduce-scatter")
        named = re.search(r'op_name="((?:[^"\\]|\\.)*)"', i.attributes)
        place = named[1] if named else ""
        for array in arrays(result):
            nbytes = array.nbytes
            per_device = nbytes * _SENT[kind](n)
            own = "reduce-scatter" if scattered else kind
            if scattered:  # a fusion of TPUs: each device keeps a part of the sum
                per_device /= 2
            elif kind == "reduce-scatter":
                nbytes *= n
            yield Collective(own, array.shape, nbytes, per_device, 1, place)

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

    def _loop(self, within: str, i: Instruction) -> list[Collective]:
        found = [one for name in i.loop for one in self.of(name)]
        if not found:
            return []
        n = self.steps(within, i)
        return [dataclasses.replace(one, times=one.times * n) for one in found]
