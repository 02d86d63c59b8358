"""On a mesh a step sends between devices what its floor sends, and little more."""

import math

import pytest

from benchmarks.collectives import beyond, collectives, sent
from tests.transform.mesh_steps import Case, lowered

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("way", "fsdp", "tp", "scanned", "rows"),
    [
        ("auto", 8, 1, True, 16),
        ("auto", 8, 1, True, 160),  # so many tokens that one device would sum weights
        ("auto", 4, 2, True, 16),
        ("auto", 1, 8, False, 16),
        ("explicit", 4, 2, True, 16),
        ("shard_map", 4, 2, True, 16),
        ("shard_map", 8, 1, False, 16),
    ],
)
def test_a_step_sends_what_its_floor_sends(way, fsdp, tp, scanned, rows):
    case = Case(way, fsdp, tp, scanned, width=512, layers=2, rows=rows)
    floor, lora = (
        collectives(lowered(case, name).compile().as_text())
        for name in ("floor", "jlora")
    )
    assert sent(lora) <= 1.05 * sent(floor)
    more = beyond(lora, floor)  # A, B, their gradients, and `x a`
    assert more
    smallest = 4 * math.prod((case.width, case.width))  # bytes of the projections
    own = [one for one in lora if (one.kind, one.shape) in more]
    assert max(one.nbytes for one in own) < smallest
