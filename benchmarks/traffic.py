"""What a compiled TPU program moves to and from its large memory (HBM).

    hbm_bytes(jax.jit(step).lower(...).compile().as_text())

The compiler's own count of bytes has every operand of every operation: also those that
lie in the chip's own memory, and copies into it. It counts the body of a loop once.
Here only arrays outside of the chip count, and a body counts once for each step.
"""

from collections.abc import Iterable

from .hlo import Array, Instruction, Program, arrays, parts

ON_CHIP = "S("  # a layout names the memory, unless it is the large one
FREE = {
    *("tuple", "get-tuple-element", "bitcast", "parameter", "constant", "after-all"),
    *("opt-barrier", "iota", "partition-id"),
}
SLICES = ("dynamic-slice", "slice", "gather")
CALLS = ("call", "call-start", "custom-call-start", "async-start")
UPDATE = "dynamic-update-slice"
NOTHING_MOVES = ('"AllocateBuffer"', '"ConcatBitcast"')  # custom calls


def hbm_bytes(text: str) -> int:
    """Returns the bytes that a run reads from and writes to the large memory.

    An operation reads each operand once and writes its result once. Of an operand of
    which it only takes slices or rows it reads these; of a result that it updates in
    place it writes the update.

    Args:
      text: optimised HLO, as `compiled.as_text()` gives it.

    Raises:
      ValueError: if the text has no entry, or if the steps of a loop are not known.
    """
    program = Program(text)
    return _of(program, program.entry)


def _of(program: Program, name: str) -> int:
    body = program.bodies[name]
    return sum(_moved(program, name, i) for i in body.values())


def _moved(program: Program, within: str, i: Instruction) -> int:
    if i.op == "while":
        return program.steps(within, i) * sum(_of(program, name) for name in i.loop)
    if i.op == "conditional":
        return max(_of(program, name) for name in i.branches)
    if i.op in CALLS:
        return _of(program, i.called) if i.called else 0
    if (
        i.op in FREE
        or i.op.endswith("-done")
        or any(name in i.attributes for name in NOTHING_MOVES)
    ):
        return 0
    body = program.bodies[within]
    if i.op.endswith("-start"):  # the result stands beside the operand
        own = parts(i.result)
        result = arrays(own[0] if i.op == "copy-start" else own[1])
        operand = arrays(body[i.operands[0]].result)[0]
        return _outside(result) + _outside([_part(operand, result)])
    operands = [arrays(body[x].result) for x in i.operands if x in body]
    if i.op in SLICES:
        result = arrays(i.result)
        return _outside(result) + _outside([_part(operands[0][0], result)])
    if i.op == UPDATE:
        (update,) = operands[1]
        return _outside([update]) + _outside([_part(arrays(i.result)[0], [update])])
    if i.op == "fusion" and i.called:
        return _fused(program, i.called, arrays(i.result), operands)
    return _outside(arrays(i.result)) + sum(map(_outside, operands))


def _outside(found: Iterable[Array]) -> int:
    return sum(x.nbytes for x in found if ON_CHIP not in x.layout)


def _part(whole: Array, part: Iterable[Array]) -> Array:
    """Returns what is moved of `whole`, of which only `part` is."""
    nbytes = min(whole.nbytes, sum(x.nbytes for x in part))
    return Array(whole.shape, nbytes, whole.layout)


def _fused(
    program: Program, name: str, results: list[Array], operands: list[list[Array]]
) -> int:
    body = program.bodies[name]
    moved = 0
    for at, operand in enumerate(operands):
        read = _read(program, name, at)
        if read is not None and len(operand) == 1:
            operand = [_part(operand[0], read)]
        moved += _outside(operand)
    root = body[program.roots[name]]
    ends = [body[x] for x in root.operands] if root.op == "tuple" else [root]
    for end, result in zip(ends, results, strict=True):
        end = _before_bitcasts(body, end)
        is_update = end.op == UPDATE
        update = arrays(body[end.operands[1]].result) if is_update else [result]
        moved += _outside([_part(result, update)])
    return moved


def _before_bitcasts(body: dict[str, Instruction], i: Instruction) -> Instruction:
    while i.op == "bitcast":
        i = body[i.operands[0]]
    return i


def _read(program: Program, name: str, at: int) -> list[Array] | None:
    """Returns the slices that a fusion reads of parameter `at`; None for all of it."""
    found: list[Array] = []
    users, is_result = _users(program, name, at)
    for user, place in users:
        if user.op in SLICES and place == 0:
            found += arrays(user.result)
        elif user.op != UPDATE or place != 0:
            return None
    return None if is_result else found


def _users(
    program: Program, name: str, at: int
) -> tuple[list[tuple[Instruction, int]], bool]:
    """Returns what uses a parameter, and as which operand, in fusions inside too.

    Also whether the parameter itself is the result.
    """
    body = program.bodies[name]
    parameter = ("parameter", str(at))
    given = [x.name for x in body.values() if (x.op, x.inside) == parameter]
    users: list[tuple[Instruction, int]] = []
    is_result = False
    while given:
        own = given.pop()
        is_result |= own == program.roots[name]
        for i in body.values():
            for place in (k for k, x in enumerate(i.operands) if x == own):
                if i.op == "fusion" and i.called:
                    more, passes = _users(program, i.called, place)
                    users += more
                    given += [i.name] if passes else []
                elif i.op == "bitcast":
                    given.append(i.name)
                else:
                    users.append((i, place))
    return users, is_result
