"""Along which mesh axes the values inside a `shard_map` differ from device to device.

Dropout needs it: shards of a batch draw masks of their own, and devices that hold the
same values draw the same mask. JAX's types say it only where `check_vma` is on, and
there an `all_gather` still counts as different. So the code is read instead.
"""

from collections.abc import Callable, Sequence

from . import compat
from .compat import Equation, Literal, Var
from .primitives import AGREEING, CALLS, RETYPING

Axes = frozenset[str]
NONE: Axes = frozenset()


def varied_axes(code: compat.Code, inputs: Sequence[Axes]) -> dict[Var, Axes]:
    """Returns the axes along which each variable differs, also in inner code.

    Code that is called from several places gets the axes that all places have: then
    devices that hold the same values agree, in any case.

    Args:
      code: the body of a `shard_map`, or a function that runs inside one.
      inputs: for each argument the axes along which it differs.
    """
    found: dict[Var, Axes] = {}

    def note(var: Var, axes: Axes) -> None:
        found[var] = found.get(var, axes) & axes

    _walk(code, inputs, note)
    return found


def _walk(
    code: compat.Code, inputs: Sequence[Axes], note: Callable[[Var, Axes], None]
) -> list[Axes]:
    """Returns the axes of each result; tells `note` those of each variable."""
    known = map(compat.varying_axes, code.consts)
    env: dict[Var, Axes] = dict(zip(compat.constvars(code.jaxpr), known, strict=True))
    env.update(zip(code.invars, inputs, strict=True))

    def read(atom: Var | Literal) -> Axes:
        return NONE if isinstance(atom, Literal) else env[atom]

    for eqn in code.jaxpr.eqns:
        results = _results(eqn, [read(v) for v in eqn.invars], note)
        env.update(zip(eqn.outvars, results, strict=True))
    for var, axes in env.items():
        note(var, axes)
    return [read(v) for v in code.outvars]


def _results(
    eqn: Equation, operands: list[Axes], note: Callable[[Var, Axes], None]
) -> Sequence[Axes]:
    name = eqn.primitive.name
    if name in CALLS or name == "custom_vmap_call":
        return _walk(compat.inner_code(eqn), operands, note)
    if name == "scan":
        return _scan(eqn, operands, note)
    if name == "while":
        return _while(eqn, operands, note)
    if name == "cond":
        codes = map(compat.code, eqn.params["branches"])
        branches = [_walk(code, operands[1:], note) for code in codes]
        return [operands[0].union(*axes) for axes in zip(*branches, strict=True)]
    if name == "shard_map":
        inside = zip(operands, compat.in_axes(eqn), strict=True)
        results = _walk(compat.inner_code(eqn), [a | b for a, b in inside], note)
        return [axes - eqn.params["newly_manual_axes"] for axes in results]
    every, own = NONE.union(*operands), compat.mesh_axes(eqn)
    if name in AGREEING and eqn.params.get("axis_index_groups") is None:
        every -= own
    elif name not in RETYPING:
        every |= own
    return [every] * len(eqn.outvars)


def _scan(
    eqn: Equation, operands: list[Axes], note: Callable[[Var, Axes], None]
) -> list[Axes]:
    code = compat.inner_code(eqn)
    n_consts, n_carry = compat.scan_counts(eqn)
    consts, xs = operands[:n_consts], operands[n_consts + n_carry :]

    def step(carry: list[Axes], note: Callable[[Var, Axes], None]) -> list[Axes]:
        return _walk(code, [*consts, *carry, *xs], note)

    carry = _settled(operands[n_consts : n_consts + n_carry], step)
    return [*carry, *step(carry, note)[n_carry:]]


def _while(
    eqn: Equation, operands: list[Axes], note: Callable[[Var, Axes], None]
) -> list[Axes]:
    """Devices whose predicates differ take different numbers of steps."""
    cond = compat.inner_code(eqn, "cond_jaxpr")
    body = compat.inner_code(eqn, "body_jaxpr")
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts = operands[n_cond : n_cond + n_body]

    def step(carry: list[Axes], note: Callable[[Var, Axes], None]) -> list[Axes]:
        (steps,) = _walk(cond, [*operands[:n_cond], *carry], note)
        return [axes | steps for axes in _walk(body, [*consts, *carry], note)]

    carry = _settled(operands[n_cond + n_body :], step)
    step(carry, note)
    return carry


def _settled(carry: list[Axes], step: Callable[..., list[Axes]]) -> list[Axes]:
    """Returns `carry` with all axes that any number of steps adds."""
    while True:
        after = step(carry, lambda *_: None)
        grown = [old | new for old, new in zip(carry, after, strict=False)]
        if grown == carry:
            return carry
        carry = grown
