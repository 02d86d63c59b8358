"""Patterns matched in one pass over the text, whatever the pattern is.

A pattern is an automaton: nodes, steps that read one character, and free steps that
read none. A search keeps the set of all nodes that the text so far can lead to, as the
bits of one integer, so nothing is ever tried twice.

References:
  Thompson, 1968, Regular expression search algorithm
"""

import dataclasses
import functools
import re
from typing import Literal

Label = str | re.Pattern[str]  # a character, or a regex that takes one character
Where = Literal["", "^", "$"]  # a free step anywhere, at the text's begin, at its end


@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
    """A pattern as nodes and steps; node 0 is the first.

    Attributes:
      reads: by node, the `(label, next node)` that read a character.
      free: by node, the `(where, next node)` that read none.
      ends: `(node, tag)`: a text that leads to the node is matched, as `tag`.
    """

    reads: list[list[tuple[Label, int]]] = dataclasses.field(default_factory=list)
    free: list[list[tuple[Where, int]]] = dataclasses.field(default_factory=list)
    ends: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def node(self) -> int:
        """Adds a node and returns its number."""
        self.reads.append([])
        self.free.append([])
        return len(self.reads) - 1

    def read(self, start: int, label: Label) -> int:
        """Adds a node that a character leads to from `start`, and returns it."""
        end = self.node()
        self.reads[start].append((label, end))
        return end

    def join(self, start: int, end: int, where: Where = "") -> None:
        """Adds a step from `start` to `end` that reads nothing."""
        self.free[start].append((where, end))


def first_match(automaton: Automaton, text: str) -> int | None:
    """Returns the lowest tag that matches all of `text`; None if nothing does.

    Examples:
      >>> machine = Automaton()
      >>> machine.ends.append((machine.read(machine.node(), "a"), 7))
      >>> first_match(machine, "a"), first_match(machine, "aa")
      (7, None)
    """
    nodes = _started(automaton, not text)
    *pieces, last = _PIECE.findall(text) or [""]
    for piece in pieces:
        nodes = _walk(automaton, nodes, piece, False)
    return _lowest(automaton, _walk(automaton, nodes, last, True))


# Paths of one model share most of their components.
_PIECE = re.compile("[^/]+/?|/")


@functools.lru_cache(maxsize=1024)
def _started(automaton: Automaton, at_end: bool) -> int:
    return reached(automaton, 1, at_start=True, at_end=at_end)


@functools.lru_cache(maxsize=1024)
def _lowest(automaton: Automaton, nodes: int) -> int | None:
    return min((tag for node, tag in automaton.ends if nodes >> node & 1), default=None)


@functools.lru_cache(maxsize=2**14)
def _walk(automaton: Automaton, nodes: int, piece: str, at_end: bool) -> int:
    """Returns the nodes that `piece` leads to from any of `nodes`."""
    last = len(piece) - 1
    for i, char in enumerate(piece):
        if not nodes:
            break
        nodes = _step(automaton, nodes, char, at_end and i == last)
    return nodes


@functools.lru_cache(maxsize=2**14)
def _step(automaton: Automaton, nodes: int, char: str, at_end: bool) -> int:
    """Returns the nodes that `char` leads to from any of `nodes`."""
    found = 0
    for node in members(nodes):
        for label, end in automaton.reads[node]:
            if label == char or (not isinstance(label, str) and label.match(char)):
                found |= 1 << end
    return reached(automaton, found, at_end=at_end)


def reached(
    automaton: Automaton, nodes: int, *, at_start: bool = False, at_end: bool = False
) -> int:
    """Returns `nodes` and all that free steps lead to from them."""
    allowed = {"": True, "^": at_start, "$": at_end}
    new = list(members(nodes))
    while new:
        for where, end in automaton.free[new.pop()]:
            if allowed[where] and not nodes >> end & 1:
                nodes |= 1 << end
                new.append(end)
    return nodes


def members(nodes: int) -> list[int]:
    """Returns the numbers of the bits that are set.

    Examples:
      >>> members(0b1101)
      [0, 2, 3]
    """
    return [i for i, bit in enumerate(reversed(bin(nodes)[2:])) if bit == "1"]
