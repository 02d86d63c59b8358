"""Every read of JAX's internals, and every switch between its versions.

Equation parameters and the classes of jaxprs change between the JAX releases that are
supported, 0.10 to 0.12. The rest of the transform sees only what this file returns.
"""

import contextlib
import contextvars
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
from jax import ad_checkpoint, core
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core as jex_core, source_info_util
from jax.interpreters import partial_eval
from jax.typing import DTypeLike

T = TypeVar("T")  # what a function returns
Literal = jex_core.Literal
Primitive = jex_core.Primitive
Equation = jex_core.JaxprEqn
Var = jex_core.Var
Jaxpr = jex_core.Jaxpr
Type = core.ShapedArray

# For `jax.jit(inline=...)`: the equations stand in the code of the caller.
_inline: Any = getattr(jax, "Inline", None)
INLINE: Any = True if _inline is None else _inline.JAX_EARLY

# The lines in a traceback that are the user's are not those of this package.
source_info_util.register_exclusion(str(pathlib.Path(__file__).parents[1]) + "/")

# The equations whose code is being interpreted, outermost first.
_around: contextvars.ContextVar[tuple[Equation, ...]] = contextvars.ContextVar(
    "around", default=()
)


class Code(NamedTuple):
    """A jaxpr and the values of its constants."""

    jaxpr: Jaxpr
    consts: Sequence[Any]

    @property
    def invars(self) -> Sequence[Var]:
        """The variables of its arguments."""
        return self.jaxpr.invars

    @property
    def outvars(self) -> Sequence[Var | Literal]:
        """The variables of its results."""
        return self.jaxpr.outvars


def code(closed: Any) -> Code:
    """Returns the code of an open or closed jaxpr; JAX 0.12 has one class for both."""
    consts = list(getattr(closed, "consts", ()))
    return Code(getattr(closed, "jaxpr", closed), consts)


def constvars(jaxpr: Jaxpr) -> Sequence[Var]:
    """Returns the variables that stand for the constants of `jaxpr`."""
    return jaxpr.constvars


def inner_code(eqn: Equation, name: str | None = None) -> Code:
    """Returns the code in an equation; `name` says which one if it has several."""
    names = ("jaxpr", "call_jaxpr", "call") if name is None else (name,)
    return code(next(eqn.params[n] for n in names if n in eqn.params))


def call_name(eqn: Equation) -> str:
    """Returns the name of the function that a `jit` equation calls."""
    return eqn.params.get("name", eqn.primitive.name)


def call_shardings(eqn: Equation) -> tuple[Sequence[Any], Sequence[Any]]:
    """Returns a `jit` equation's input and output shardings, None where unspecified."""

    def known(shardings: Sequence[Any]) -> list[Any]:
        return [s if isinstance(s, jax.sharding.Sharding) else None for s in shardings]

    return known(eqn.params["in_shardings"]), known(eqn.params["out_shardings"])


def scan_counts(eqn: Equation) -> tuple[int, int]:
    """Returns how many constants and how many carries a `scan` equation has."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = (len(list(part)) for part in eqn.params["ft_in"].unpack())
    return consts, carry


class Bindable(Protocol):
    """An equation, or what it shares with equations that are alike."""

    primitive: Any
    params: Any


def bind(eqn: Bindable, *values: Any) -> list[jax.Array]:
    """Binds `eqn` again on new values and returns its results as a list."""
    params = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = params if isinstance(params, tuple) else ((), params)
    out = eqn.primitive.bind(*subfuns, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


@functools.cache
def derives(kind: type) -> bool:
    """Returns whether arrays of the class `kind` are those of a derivative."""
    return hasattr(kind, "tangent")


def rebind(eqn: Equation, x: Any, **changes: Any) -> jax.Array:
    """Binds `eqn`, of one operand and result, on `x`, with some parameters changed."""
    return bind(eqn.replace(params={**eqn.params, **changes}), x)[0]


def result_types(eqn: Equation) -> list[Type]:
    """Returns the types of the results of `eqn`."""
    return list(map(kind, eqn.outvars))


def types_of(fun: Callable[..., Any], *args: Any) -> Any:
    """Returns the result of `fun` with a type in place of each array, as in `args`."""
    staged, tree = jax.make_jaxpr(fun, return_shape=True)(*args)
    types = [kind(v) for v in code(staged).outvars]
    return jax.tree.unflatten(jax.tree.structure(tree), types)


@contextlib.contextmanager
def at(eqn: Equation) -> Iterator[None]:
    """As `traced_as`, and `where` and `scope` of what is inside look at `eqn` too."""
    with Inside(eqn), traced_as(eqn), eqn.ctx.manager:
        yield


def traced_as(eqn: Equation) -> AbstractContextManager[None]:
    """Makes equations bound inside have the source line and names of `eqn`."""
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    return source_info_util.user_context(info.traceback, name_stack=stack)


class Inside:
    """Makes `where` and `scope` of what is inside look at `eqn` too."""

    __slots__ = ("_eqn", "_token")

    def __init__(self, eqn: Equation):
        self._eqn = eqn

    def __enter__(self) -> None:
        self._token = _around.set((*_around.get(), self._eqn))

    def __exit__(self, *_: object) -> None:
        _around.reset(self._token)


def where(eqn: Equation) -> str:
    """Returns the user's source line of `eqn`, as `model.py:31 (__call__)`.

    JAX's own functions have no line of the user inside. Then it is the line of the call
    around it. The text is empty if there is none, as in code that was read from a file.
    """
    return _line(located(eqn).source_info.traceback).rsplit("/", 1)[-1]


@functools.lru_cache(maxsize=256)
def _line(traceback: Any) -> str:
    """Returns the innermost line of the user; code in a loop has equal tracebacks."""
    info = source_info_util.SourceInfo(traceback, source_info_util.new_name_stack())
    return source_info_util.summarize(info)


def located(eqn: Equation) -> Equation:
    """Returns `eqn` with the source line that `where` finds, to be named later."""
    for one in (eqn, *reversed(_around.get())):
        if _line(one.source_info.traceback):
            return eqn if one is eqn else eqn.replace(source_info=one.source_info)
    return eqn


def scope(eqn: Equation) -> str:
    """Returns the name stacks of `eqn` and of the calls around it: modules, scopes."""
    around = [one for one in _around.get() if one is not eqn]
    stacks = [str(one.source_info.name_stack) for one in (*around, eqn)]
    return "/".join(filter(None, stacks))


def place(eqn: Equation) -> str:
    """Returns where `eqn` stands, as text to put behind its name."""
    return place_text(where(eqn), scope(eqn))


def marked(eqn: Equation) -> tuple[str, str, str]:
    """Returns the name of the operation, its source line and its scope."""
    return eqn.primitive.name, where(eqn), scope(eqn)


def place_text(where: str, scope: str) -> str:
    """Returns ` at <line>`, or ` in <scope>` without a line, or an empty text."""
    if where:
        return f" at {where}"
    return f" in {scope!r}" if scope else ""


def in_this_mesh(x: jax.Array) -> jax.Array:
    """Returns `x`, whole on each device, under the mesh of the code that is traced.

    Axes that are explicit outside may be automatic in a part of a function.
    """
    own, here = jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh()
    if own == here or own.empty or here.empty or here.manual_axes:
        return x
    return jax.sharding.reshard(x, jax.P())


def shaped(shape: Sequence[int], dtype: DTypeLike) -> Type:
    """Returns the type of an array."""
    return Type(tuple(shape), dtype)


def shaped_beside(x: Any, shape: Sequence[int], dtype: DTypeLike) -> Type:
    """Returns the type of an array under the mesh of the type `x`.

    A type without the mesh would give a gradient that stays under the mesh around.
    """
    whole = jax.sharding.NamedSharding(x.sharding.mesh, jax.P(*[None for _ in shape]))
    return Type(tuple(shape), dtype, sharding=whole)


def kind(var: Var | Literal) -> Type:
    """Returns the type of the array that `var` stands for."""
    aval: Any = var.aval
    return aval


def partitions(ctx: Any) -> int:
    """Returns over how many devices XLA divides what is lowered in `ctx`.

    It is 1 where the program already says what each device does, as in `shard_map`.
    """
    return getattr(ctx.module_context.axis_context, "num_devices", 1)


def kept_call(fun: Callable[..., T], *args: Any) -> T:
    """Returns `fun(*args)`, as a call that XLA's CPU compiler does not inline.

    Functions that are equal are traced once.
    """
    with set_xla_metadata(inlineable="false"):
        return _called(fun, *args)


@functools.partial(jax.jit, static_argnums=0)
def _called(fun: Callable[..., T], *args: Any) -> T:
    return fun(*args)


def is_staging(*trees: Any) -> bool:
    """Returns whether any leaf is a tracer: then work is recorded, and not done."""
    leaves = jax.tree.leaves(trees)
    return any(isinstance(leaf, core.Tracer) for leaf in leaves)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Returns the mesh axes along which the type of `x` differs; none if unchecked."""
    manual = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset() if manual is None else frozenset(manual.varying)


def mesh_axes(eqn: Equation) -> frozenset[str]:
    """Returns the mesh axes that a collective, or `axis_index`, goes along."""
    names = [eqn.params[k] for k in ("axes", "axis_name") if k in eqn.params]
    listed = [n for own in names for n in (own if isinstance(own, tuple) else (own,))]
    return frozenset(n for n in listed if isinstance(n, str))


def in_axes(eqn: Equation) -> list[frozenset[str]]:
    """Returns the mesh axes over which a `shard_map` cuts each of its operands."""
    cuts = []
    for spec in eqn.params["in_specs"]:
        entries = [n if isinstance(n, tuple) else (n,) for n in spec if n is not None]
        cuts.append(frozenset(n for entry in entries for n in entry))
    return cuts


def has_typed_placement(x: jax.Array) -> bool:
    """Returns whether the type of `x` says over which mesh axes it is laid out.

    It does inside `shard_map` and under meshes with explicit axes.
    """
    kind_of: Any = x if isinstance(x, Type) else jax.typeof(x)
    mesh = kind_of.sharding.mesh
    return not (mesh.empty or mesh.are_all_axes_auto)


def policies_see(
    primitive: Primitive,
    as_: Callable[[Equation], tuple[Primitive, Sequence[Any], dict[str, Any]]],
) -> None:
    """Makes policies of `jax.checkpoint` see an equation of `primitive` as another one.

    `as_` returns that one's primitive, the types of its operands, and its parameters.
    So a policy that saves products saves ours, wherever the user calls
    `jax.checkpoint`.
    """

    def rule(policy: Any, unknown: Sequence[bool], ready: Sequence[bool], eqn: Any):
        inputs = zip(eqn.invars, ready, strict=True)
        missing = [v for v, there in inputs if isinstance(v, Var) and not there]
        if any(unknown):
            return None, eqn, [True], [True], missing
        seen, types, params = as_(eqn)
        case = policy(seen, *types, **params)
        if isinstance(case, ad_checkpoint.Offloadable):
            known, reload, kept = _offloaded(eqn, case)
            return known, reload, [False], [True], [kept]
        if case is True or case is ad_checkpoint.Saveable:
            return eqn, None, [False], [False], []
        return eqn, eqn, [False], [True], missing

    partial_eval.partial_eval_jaxpr_custom_rules[primitive] = rule


def _offloaded(eqn: Any, case: Any) -> tuple[Equation, Equation, Var]:
    """Returns `eqn` with a copy of its result elsewhere, the way back, and the copy."""
    away, here = (_SPACES.get(kind, kind) for kind in (case.dst, case.src))

    def forward(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = eqn.primitive.bind(*operands, **eqn.params)
        return out, jax.device_put(out, away)

    def back(copy: jax.Array) -> jax.Array:
        return jax.device_put(copy, here)

    def traced(fun: Callable[..., Any], *operands: Any) -> Any:
        (call,) = jax.make_jaxpr(jax.jit(fun))(*operands).jaxpr.eqns
        return call.replace(source_info=eqn.source_info)

    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    known = traced(forward, *shapes)
    kept = known.outvars[1]
    reload = traced(back, jax.ShapeDtypeStruct(kept.aval.shape, kept.aval.dtype))
    known = known.replace(invars=eqn.invars, outvars=[*eqn.outvars, kept])
    return known, reload.replace(invars=[kept], outvars=eqn.outvars), kept


_SPACES = {"device": jax.memory.Space.Device, "pinned_host": jax.memory.Space.Host}


def stage(fun: Callable[..., Any], *args: Any) -> Code:
    """Returns the code of `fun` on arrays or shapes `args` without unused equations."""
    jaxpr, consts = code(jax.make_jaxpr(fun)(*args))
    used, _ = partial_eval.dce_jaxpr(
        jaxpr, [True] * len(jaxpr.outvars), instantiate=True
    )
    return Code(used, consts)
