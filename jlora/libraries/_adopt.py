"""`adopt`: factors of another library as jlora's."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from .. import paths
from .._core.algebra import with_axes
from .._core.tree import check, check_plan, flatten_frozen
from .._plan.plan import Plan
from .._tables import listed
from ..errors import ConfigError, TreeError
from ..factors import Factors, Leaf, PyTree, Spec, Trainable
from ..transform.compat import is_staging
from ._axes import Layout, layouts, read_axes, suits
from ._pairs import Node, Pair, array, base_of, library_of, nodes_of, pairs_of, value
from ._rules import ALPHA, ONE, Library

Alpha = float | Mapping[str, float] | None


def adopt(
    params: PyTree,
    library: Library | str,
    *,
    alpha: Alpha = None,
    rslora: bool = False,
    plan: Plan | None = None,
) -> tuple[Any, Trainable]:
    """Returns `(frozen, trainable)` of a model that another library put LoRA into.

    `frozen` is the base model's own tree: `params` without the factors. Everything in
    jlora takes the two: `apply_lora` around the base model's function, `merge`,
    `adapters`, `peft.save`. `hand_back` is the way back.

    Which axis of a factor is which of its weight follows from the library's rule, or
    from the shapes. Where the shapes leave it open, as for a square kernel of qwix,
    only `plan` tells. Factors may lie over other axes than the operation's own: Keras
    and openpi have an A or B for each head, qwix one B for all experts. They run as
    they are. With `plan`, they are rewritten over the operation's axes, as PEFT files
    need them, with the same update. For heads, that multiplies the rank by their
    number.

    Args:
      params: a tree of mappings with weights and factors: `nnx.state(model,
        nnx.Param)`, Linen's variables, `{v.path: v.value for v in model.variables}` of
        Keras. Quantised by qwix: `jlora.from_qwix` first.
      library: `"qwix"` (also tunix), `"maxtext"`, `"nnx"`, `"easydel"`, `"gemma"`,
        `"keras"`, `"openpi"` or `"skyrl"`, or a `jlora.libraries.Library` of your own.
      alpha: the numerator of the scale, for libraries that multiply by `alpha / rank`
        and do not keep that in the tree. A mapping from globs over weights to numbers
        if it differs.
      rslora: whether the scale is `alpha / sqrt(rank)`.
      plan: from `jlora.plan` of the base model's function. It tells axes, operation,
        drop rate, form and invocation. Its ranks and alphas are not used.

    Raises:
      TreeError: lists factors that are left over, that lack their other half or their
        weight, whose shapes do not fit or leave the axes open, or whose operation
        neither a rule nor a plan tells.
      ConfigError: if `alpha` is missing, is not wanted or does not cover all weights;
        if an argument is of another type, or `plan` leaves an adapted weight frozen.

    Examples:
      >>> import jax, jax.numpy as jnp, jlora
      >>> from flax import nnx
      >>> linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
      >>> theirs = nnx.LoRA(3, 2, 4, base_module=linear, rngs=nnx.Rngs(1))
      >>> frozen, trainable = jlora.adopt(nnx.state(theirs, nnx.Param), "nnx")
      >>> trainable.lora["kernel"]
      Factors(a=float32[3,2], b=float32[2,4], rank=2, alpha=2.0)
      >>> fn = lambda params, x: x @ params["kernel"][...] + params["bias"][...]
      >>> x = jnp.ones((1, 3))
      >>> y = jlora.apply_lora(fn)(frozen, trainable, x)
      >>> bool(jnp.allclose(y, theirs(x)))
      True
    """
    rules = library_of(library)
    nodes = nodes_of(params)
    pairs = pairs_of(nodes, rules)
    scales = scales_of(pairs, nodes, rules, alpha, rslora)
    frozen = base_of(params, pairs)
    leaves, _ = flatten_frozen(frozen)
    specs = {} if plan is None else _planned(plan, leaves, pairs)
    lora: dict[str, Factors] = {}
    faults: list[str] = []
    for pair in pairs:
        a, b, w = (array(p, nodes[p]) for p in (pair.a, pair.b, pair.weight))
        spec = specs.get(pair.path)
        layout = layout_of(pair, w.shape, a.shape, b.shape, spec)
        if isinstance(layout, str):
            faults.append(layout)
            continue
        op = pair.place.operation(pair.path, has_window=layout.has_window)
        op = spec.op if spec else op
        if not op:
            faults.append(
                f"the kernel {pair.path!r} {list(w.shape)} may be of a convolution or "
                "of an einsum, and its layer's name does not tell: give "
                "plan=jlora.plan(fn, base_params, *args, config=config)"
            )
            continue
        a, b = layout.read(a, b, w.shape)
        own = scales[pair.path](a.shape[-1])
        own = dataclasses.replace(own, op=op, axes=layout.axes)
        lora[pair.path] = Factors(a, b, own)
        if spec is not None:
            lora[pair.path] = _as_planned(lora[pair.path], spec)
    if faults:
        raise TreeError(
            f"These factors of {rules.name!r} cannot be taken over: {listed(faults)}."
        )
    trainable = Trainable(lora)
    check(leaves, trainable)
    return frozen, trainable


def layout_of(
    pair: Pair,
    w: tuple[int, ...],
    a: tuple[int, ...],
    b: tuple[int, ...],
    like: Spec | None,
) -> Layout | str:
    """Returns how the axes of factors are those of their weight, or what is wrong.

    `like` tells the operation's axes, where shapes leave them open.
    """
    shapes = f"{pair.a!r} {list(a)} and {pair.b!r} {list(b)}"
    weight = f"the weight {pair.path!r} {list(w)}"
    text = pair.place.axes
    if text:
        layout = read_axes(text).expanded(len(w))
        wanted = f"do not fit {weight}: the rule is {text!r}"
        return layout if layout.fits(w, a, b) else f"{shapes} {wanted}"
    found = layouts(w, a, b, pair.place.stacked)
    if not found:
        return f"{shapes} do not fit {weight}"
    fitting = found if like is None else [x for x in found if suits(x, like.axes)]
    if not fitting:
        return f"{shapes} are not for {like.axes if like else ''}, as {weight} is used"
    if len(fitting) == 1:
        return fitting[0]
    return (
        f"{shapes} fit {weight} in {len(fitting)} ways: give plan=jlora.plan(fn, "
        "base_params, *args, config=config), or a rule with axes="
    )


def scales_of(
    pairs: list[Pair],
    nodes: Mapping[str, Node],
    library: Library,
    alpha: Alpha,
    rslora: bool,
) -> dict[str, Any]:
    """Returns for each pair, by its weight's path, a function from a rank to a `Spec`.

    Raises:
      ConfigError: if `alpha` does not tell, or tells what is not asked for.
      TreeError: if a multiplier in the tree is not one positive number.
    """
    asked = [pair.path for pair in pairs if pair.place.scale == ALPHA]
    alphas = _alphas(asked, library, alpha, rslora)
    found: dict[str, Any] = {}
    for pair in pairs:
        if pair.path in alphas:
            own = functools.partial(Spec, alpha=alphas[pair.path], rslora=rslora)
        else:
            scale = 1.0
            if pair.place.scale != ONE:
                scale = _number(pair.scale, value(pair.scale, nodes[pair.scale]))
            own = functools.partial(_of_scale, scale)
        found[pair.path] = lambda rank, own=own: own(rank=rank)
    return found


def _of_scale(scale: float, rank: int) -> Spec:
    return Spec(rank=rank, alpha=scale * rank)


def _alphas(
    asked: list[str], library: Library, alpha: Alpha, rslora: bool
) -> dict[str, float]:
    over = "sqrt(rank)" if rslora else "rank"
    if not asked:
        if alpha is None and not rslora:
            return {}
        raise ConfigError(
            f"The factors of {library.name!r} are not scaled by alpha / {over}: leave "
            "alpha= and rslora= out."
        )
    if alpha is None:
        raise ConfigError(
            f"{library.name!r} multiplies by alpha / rank, and alpha is not in the "
            f"tree: give alpha=, for {listed(map(repr, asked), 3, ', ')}."
        )
    if not isinstance(alpha, Mapping):
        return dict.fromkeys(asked, alpha)
    chosen = {glob: paths.select(glob, asked) for glob in alpha}
    faults = [
        f"{glob!r} matches no weight (nearest: {paths.nearest(glob, asked, n=1)[0]!r})"
        for glob, own in chosen.items()
        if not own
    ]
    for path in asked:
        values = {alpha[glob] for glob, own in chosen.items() if path in own}
        if len(values) != 1:
            several = f"{len(values)} values" if values else "no value"
            faults.append(f"{path!r} gets {several}")
    if faults:
        raise ConfigError(f"alpha must give each weight one number: {listed(faults)}.")
    return {p: alpha[g] for g, own in chosen.items() for p in own}


def _number(path: str, x: Leaf) -> float:
    if is_staging(x) or np.size(x) != 1:
        raise TreeError(
            f"{path!r} must be one number that is known, since a scale is static, got "
            f"{x!r:.80}."
        )
    found = float(np.asarray(jax.device_get(x)).reshape(()))
    if not found > 0:
        raise TreeError(f"{path!r} must be a positive number, got {found}.")
    return found


def _planned(
    plan: Plan, leaves: Mapping[str, Leaf], pairs: list[Pair]
) -> dict[str, Spec]:
    """Returns how `plan` adapts the weight of each pair."""
    check_plan(leaves, plan)
    specs = {row.path: row.spec for row in plan.rows() if row.spec is not None}
    left = [pair.path for pair in pairs if pair.path not in specs]
    if left:
        raise ConfigError(
            f"The plan leaves {listed(map(repr, left), 5, ', ')} frozen: name them in "
            "targets= of its config."
        )
    odd = [
        f"{pair.path!r}: {specs[pair.path].method}"
        for pair in pairs
        if specs[pair.path].method != "lora"
        or specs[pair.path].parts
        or specs[pair.path].rows
    ]
    if odd:
        raise ConfigError(
            f"The factors are those of plain LoRA, but the plan has {listed(odd)}."
        )
    return {pair.path: specs[pair.path] for pair in pairs}


def _as_planned(factors: Factors, spec: Spec) -> Factors:
    own = with_axes(factors, spec.axes)
    names = ("op", "dropout", "form", "invocation")
    kept = {name: getattr(spec, name) for name in names}
    return dataclasses.replace(own, spec=dataclasses.replace(own.spec, **kept))
