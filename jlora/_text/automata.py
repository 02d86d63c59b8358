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
# A free step anywhere, at the text's begin, at its end, at the edge of a word, inside
# or outside one.
Where = Literal["", "^", "$", "b", "B"]


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
    nodes, before = 1, ""
    for piece in _PIECE.findall(text):
        nodes = _walk(automaton, nodes, before, piece)
        before = _kind(piece[-1])
    return _lowest(automaton, nodes, before)


# Paths of one model share most of their components.
_PIECE = re.compile("[^/]+/?|/")


@functools.lru_cache(maxsize=1024)
def _lowest(automaton: Automaton, nodes: int, before: str) -> int | None:
    nodes = reached(automaton, nodes, before, "")
    return min((tag for node, tag in automaton.ends if nodes >> node & 1), default=None)


@functools.lru_cache(maxsize=2**14)
def _walk(automaton: Automaton, nodes: int, before: str, piece: str) -> int:
    """Returns the nodes that `piece`, after `before`, leads to from any of `nodes`."""
    for char in piece:
        if not nodes:
            break
        nodes = _step(automaton, nodes, before, char)
        before = _kind(char)
    return nodes


@functools.lru_cache(maxsize=2**14)
def _step(automaton: Automaton, nodes: int, before: str, char: str) -> int:
    """Returns the nodes that `char` leads to from `nodes` and where these lead free."""
    found = 0
    for node in members(reached(automaton, nodes, before, char)):
        for label, end in automaton.reads[node]:
            if label == char or (not isinstance(label, str) and label.match(char)):
                found |= 1 << end
    return found


def reached(
    automaton: Automaton, nodes: int, before: str = "/", after: str = "/"
) -> int:
    """Returns `nodes` and all that free steps lead to from them.

    Args:
      automaton: the pattern.
      nodes: as bits.
      before: the character that was read last, or its kind; empty at the text's begin.
      after: the next one, empty at its end.
    """
    edge = "w" in {_kind(before)} ^ {_kind(after)}
    inside = not edge and bool(before + after)  # Python has no \B in an empty text
    allowed = {"": True, "^": not before, "$": not after, "b": edge, "B": inside}
    new = list(members(nodes))
    while new:
        for where, end in automaton.free[new.pop()]:
            if allowed[where] and not nodes >> end & 1:
                nodes |= 1 << end
                new.append(end)
    return nodes


def _kind(char: str) -> str:
    """Returns a character of the same kind: in a word, outside, or none at all."""
    return "w" if char.isalnum() or char == "_" else char and "/"


def members(nodes: int) -> list[int]:
    """Returns the numbers of the bits that are set.

    Examples:
      >>> members(0b1101)
      [0, 2, 3]
    """
    return [i for i, bit in enumerate(reversed(bin(nodes)[2:])) if bit == "1"]
