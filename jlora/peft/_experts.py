"""Layouts of experts: the ways in which tools write one adapter of a mixture's experts.

An `Expert` holds the factors of one projection for all experts. Each layout is read
into `Expert`s, and written from them.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from .._tables import listed
from ..errors import PeftError

Tensor = Any  # a NumPy array, or a JAX array that stays on its device
Form = Literal["peft", "unsloth", "per-expert", "stacked", "shared"]
FORMS: tuple[str, ...] = get_args(Form)
ROWS = {"interleaved": True, "concatenated": False}  # how gate and up lie in one
BLOCK = ".block_sparse_moe."  # in files of Mixtral
_HALVES = ("lora_A.weight", "lora_B.weight")
ROLES = {
    "gate": ("gate_proj", "w1", "gate"),
    "up": ("up_proj", "w3", "up"),
    "down": ("down_proj", "w2", "down"),
    "gate_up": ("gate_up_proj", "w13"),
}
_ORDER = {"gate_up": 0, "gate": 0, "up": 1, "down": 2}  # as torch registers them


@dataclasses.dataclass(frozen=True)
class ExpertLayout:
    """How a file keeps the factors of a mixture's experts.

    Attributes:
      form: `"peft"`, the parameters of transformers 5, each adapted by
        `target_parameters`: A `[E r, in]` with the expert slowest, B `[out, r E]` with
        the expert fastest. `"unsloth"`: the same names and shapes, as unsloth-zoo read
        them until September 2026: the expert is the slowest in B too. `"per-expert"`:
        a module for each expert, `experts.3.gate_proj`, as vLLM reads by default.
        `"stacked"`: `experts.w1`, A `[E, r, in]` and B `[E, out, r]`, as SGLang has
        them. `"shared"`: the same, where A of gate and up and B of down are `[1, ...]`,
        one for all experts (SGLang's `experts_shared_outer_loras`, vLLM's
        `enable_moe_shared_loras`).
      projections: what gate, up and down are called in the file. Empty: `w1`, `w3` and
        `w2` where they are stacked or in a module `block_sparse_moe`, else
        `gate_proj`, `up_proj` and `down_proj`.
      interleaved: whether gate and up alternate in the rows of a fused `gate_up_proj`,
        as in gpt-oss, or lie one after the other, as in Mixtral and Qwen. It is needed
        where a fused parameter `[E, in, out]` is taken apart or put together. As text
        it stands after the form, `"peft:interleaved"` or `"peft:concatenated"`.

    Raises:
      PeftError: if there is no such form.

    Examples:
      >>> ExpertLayout("per-expert", projections=("w1", "w3", "w2")).form
      'per-expert'
    """

    form: Form
    projections: tuple[str, ...] = ()
    interleaved: bool | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS or len(self.projections) not in (0, 3):
            raise PeftError(
                f"layout must be one of {', '.join(map(repr, FORMS))}, with three "
                f"projections or none, got {self.form!r:.50} with "
                f"{self.projections!r:.80}."
            )


class Expert(NamedTuple):
    """The factors of one projection of all experts.

    Attributes:
      a: `[E, r, in]`.
      b: `[E, out, r]`.
      scale: the multiplier of their product.
    """

    a: Tensor
    b: Tensor
    scale: float


class Named(NamedTuple):
    """An adapter of experts in the names of a layout.

    Attributes:
      tensors: by name.
      ranks: the rank of each module, or bare parameter.
      scales: the multiplier of each.
      parameters: which of them are bare parameters.
    """

    tensors: dict[str, Tensor]
    ranks: dict[str, int]
    scales: dict[str, float]
    parameters: list[str]


Experts = dict[str, dict[str, Expert]]  # by module, then by projection


def layout_of(given: ExpertLayout | str | None) -> ExpertLayout | None:
    """Returns a layout by its text, or as it is.

    Args:
      given: a form, perhaps followed by `:interleaved` or `:concatenated`.

    Raises:
      PeftError: if it is none.

    Examples:
      >>> layout_of("per-expert:interleaved").interleaved
      True
    """
    if given is None or isinstance(given, ExpertLayout):
        return given
    form, colon, rows = str(given).partition(":")
    if colon and rows not in ROWS:
        raise PeftError(
            f"layout {given!r:.50}: after the colon stands how gate and up lie in one "
            f"parameter, {' or '.join(ROWS)}."
        )
    return ExpertLayout(form, interleaved=ROWS.get(rows))  # type: ignore[arg-type]


def in_transformers(module: str) -> str:
    """Returns a module as transformers 5 calls it, which files of Mixtral do not."""
    return module.replace(BLOCK, ".mlp.")


def in_order(projections: Iterable[str]) -> list[str]:
    """Returns projections in the order in which torch's modules register them.

    Examples:
      >>> in_order(["down_proj", "gate_up_proj"])
      ['gate_up_proj', 'down_proj']
    """
    return sorted(projections, key=lambda name: _ORDER.get(role_of(name), len(_ORDER)))


def role_of(projection: str) -> str:
    """Returns `"gate"`, `"up"`, `"down"`, `"gate_up"`, or the name if it is another.

    Examples:
      >>> role_of("w2"), role_of("mlp1")
      ('down', 'mlp1')
    """
    roles = [role for role, names in ROLES.items() if projection in names]
    return roles[0] if roles else projection


def from_parameter(a: Tensor, b: Tensor, count: int, scale: float, form: str) -> Expert:
    """Returns the expert factors of a bare parameter's `lora_A` and `lora_B`."""
    rank = a.shape[0] // count
    if form == "unsloth":
        own = b.reshape(b.shape[0], count, rank).transpose(1, 0, 2)
    else:
        own = b.reshape(b.shape[0], rank, count).transpose(2, 0, 1)
    return Expert(a.reshape(count, rank, a.shape[1]), own, scale)


def to_parameter(expert: Expert, form: str) -> tuple[Tensor, Tensor]:
    """Returns the inverse of `from_parameter`: A `[E r, in]`, B `[out, r E]`."""
    order = (1, 0, 2) if form == "unsloth" else (1, 2, 0)
    b = expert.b.transpose(order)
    return expert.a.reshape(-1, expert.a.shape[-1]), b.reshape(b.shape[0], -1)


def apart(expert: Expert, interleaved: bool) -> tuple[Expert, Expert]:
    """Returns gate and up of a fused projection."""
    half = expert.b.shape[1] // 2
    gate = slice(0, None, 2) if interleaved else slice(None, half)
    up = slice(1, None, 2) if interleaved else slice(half, None)
    return expert._replace(b=expert.b[:, gate]), expert._replace(b=expert.b[:, up])


def together(gate: Expert, up: Expert, interleaved: bool) -> Expert:
    """Returns gate and up as one: they share A if it is one, else the ranks add up."""
    xp = np if _is_known(gate.a, up.a) else jnp
    if gate.scale == up.scale and xp is np and np.array_equal(gate.a, up.a):
        a, gate_b, up_b, scale = gate.a, gate.b, up.b, gate.scale
    else:
        a = xp.concatenate([gate.a, up.a], 1)
        scale = gate.scale
        ratio = np.asarray(up.scale / scale, up.b.dtype)
        more, fewer = up.b.shape[-1], gate.b.shape[-1]
        gate_b = xp.pad(gate.b, [(0, 0), (0, 0), (0, more)])
        up_b = xp.pad(up.b * ratio, [(0, 0), (0, 0), (fewer, 0)])
    if interleaved:
        b = xp.stack([gate_b, up_b], 2).reshape(len(a), -1, a.shape[1])
    else:
        b = xp.concatenate([gate_b, up_b], 1)
    return Expert(a, b, scale)


def named(
    experts: Experts,
    layout: ExpertLayout,
    own: Mapping[str, Sequence[str]],
    said: str | None = None,
) -> Named:
    """Returns the adapter in the names and shapes of `layout`.

    Args:
      experts: the factors.
      layout: how to write them.
      own: for each module, what the model calls its parameters, in the order in which
        it registers them; empty for the usual names.
      said: the form that a user gives as `layout=`; None for that of `layout`.

    Raises:
      PeftError: if the layout cannot hold it.
    """
    out = Named({}, {}, {}, [])
    said = said or layout.form
    for module, projections in experts.items():
        if layout.form in ("peft", "unsloth"):
            fused = any(role_of(x) == "gate_up" for x in own.get(module, ("w13",)))
            found = _joined(module, projections, layout, said) if fused else projections
            _parameters(out, module, found, layout.form, own.get(module, ()))
        else:
            found = _parted(module, projections, layout, said)
            for role, expert in found.items():
                name = _called(module, role, layout)
                if layout.form == "per-expert":
                    _modules(out, module, name, expert)
                else:
                    _stack(out, f"{module}.{name}", role, expert, layout.form)
    return out


def _parameters(
    out: Named,
    module: str,
    projections: Mapping[str, Expert],
    form: str,
    own: Sequence[str],
) -> None:
    by_role = {role_of(name): name for name in own}
    order = [role_of(name) for name in own] or sorted(_ORDER, key=_ORDER.__getitem__)
    roles = [role for role in order if role in projections]
    for depth, role in enumerate(reversed(roles)):
        stem = module + ".base_layer" * depth
        a, b = to_parameter(projections[role], form)
        out.tensors[f"{stem}.{_HALVES[0]}"] = _whole(a)
        out.tensors[f"{stem}.{_HALVES[1]}"] = _whole(b)
        name = f"{module}.{by_role.get(role) or _usual(role)}"
        _note(out, name, projections[role])
    out.parameters.extend(
        f"{module}.{by_role.get(role) or _usual(role)}" for role in roles
    )


def _modules(out: Named, module: str, name: str, expert: Expert) -> None:
    for e, (a, b) in enumerate(zip(expert.a, expert.b, strict=True)):
        stem = f"{module}.{e}.{name}"
        out.tensors[f"{stem}.{_HALVES[0]}"] = _whole(a)
        out.tensors[f"{stem}.{_HALVES[1]}"] = _whole(b)
        _note(out, stem, expert)


def _stack(out: Named, stem: str, role: str, expert: Expert, form: str) -> None:
    a, b = expert.a, expert.b
    if form == "shared":
        half, x = ("B", b) if role == "down" else ("A", a)
        if not _is_known(x):
            raise PeftError(
                f"{stem}: layout='shared' needs {half} on the host, to see that it is "
                "one for all experts: write it with jlora.peft.save, or give "
                "layout='stacked'."
            )
        if not (x == x[:1]).all():
            raise PeftError(
                f"{stem}: {half} differs between experts, and layout='shared' has one "
                "for all: write layout='stacked'."
            )
        a, b = (a, b[:1]) if role == "down" else (a[:1], b)
    out.tensors[f"{stem}.{_HALVES[0]}"] = _whole(a)
    out.tensors[f"{stem}.{_HALVES[1]}"] = _whole(b)
    _note(out, stem, expert)


def _note(out: Named, name: str, expert: Expert) -> None:
    out.ranks[name], out.scales[name] = expert.a.shape[1], expert.scale


def _parted(
    module: str, projections: Mapping[str, Expert], layout: ExpertLayout, said: str
) -> dict[str, Expert]:
    found = dict(projections)
    if "gate_up" in found:
        fused = found.pop("gate_up")
        found["gate"], found["up"] = apart(fused, _interleaved(module, layout, said))
    odd = [name for name in found if name not in ROLES]
    if odd:
        raise PeftError(
            f"{module}: {listed(odd, 3, ', ')} is none of gate, up and down, so it has "
            f"no name in layout={layout.form!r}."
        )
    return found


def _joined(
    module: str, projections: Mapping[str, Expert], layout: ExpertLayout, said: str
) -> dict[str, Expert]:
    found = dict(projections)
    if "gate" not in found and "up" not in found:
        return found
    one = found.get("gate") or found["up"]
    gate, up = (
        found.pop(role, None) or one._replace(b=np.zeros_like(one.b))
        for role in ("gate", "up")
    )
    sizes = [(x.a.shape[2], x.b.shape[1]) for x in (gate, up)]
    if sizes[0] != sizes[1]:
        told = " and ".join(f"{n_in} to {n_out}" for n_in, n_out in sizes)
        raise PeftError(f"{module}: gate and up differ in their sizes, {told}.")
    rows = _interleaved(module, layout, said)
    return {"gate_up": together(gate, up, rows), **found}


def _interleaved(module: str, layout: ExpertLayout, said: str) -> bool:
    if layout.interleaved is not None:
        return layout.interleaved
    raise PeftError(
        f"{module}.gate_up_proj holds gate and up in one, and nothing tells how: say "
        f"layout='{said}:interleaved' (--layout) if their rows alternate, as in "
        f"gpt-oss, or '{said}:concatenated' if one follows the other, as in Mixtral "
        "and Qwen."
    )


def _called(module: str, role: str, layout: ExpertLayout) -> str:
    usual = layout.form in ("stacked", "shared") or BLOCK in module
    names = layout.projections or (
        ("w1", "w3", "w2") if usual else ("gate_proj", "up_proj", "down_proj")
    )
    return names[("gate", "up", "down").index(role)]


def _usual(role: str) -> str:
    return ROLES[role][0] if role in ROLES else role


def _is_known(*arrays: Tensor) -> bool:
    """Returns whether arrays are on the host, where numbers decide what is written."""
    return all(isinstance(x, np.ndarray) for x in arrays)


def _whole(x: Tensor) -> Tensor:
    """Returns an array without gaps, on the host."""
    return np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x
