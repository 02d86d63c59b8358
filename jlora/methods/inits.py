"""The initialisations by name, and what each of them asks of a leaf."""

import functools
import re
from collections.abc import Callable
from typing import Any

from ..factors import Spec
from .corda import corda
from .eva import eva
from .gaussian import gaussian
from .init import Init
from .kaiming import kaiming
from .loftq import loftq
from .lora_ga import lora_ga
from .method import Method
from .olora import olora
from .orthogonal import orthogonal
from .pissa import pissa
from .zero_a import zero_a

_LINEAR = ("linear",)
_PISSA = Init(pissa, "weight", "residual")
_LOFTQ = Init(loftq, "quantize", "own")
_CORDA = Init(corda, "inputs", "residual", ops=_LINEAR)

INITS = {
    "kaiming": Init(kaiming),
    "gaussian": Init(gaussian),
    "orthogonal": Init(orthogonal, even=True),
    "zero_a": Init(zero_a),
    "pissa": _PISSA,
    "olora": Init(olora, "weight", "residual"),
    "eva": Init(eva, "inputs", ops=_LINEAR),
    "lora_ga": Init(lora_ga, "gradients", "residual", rank_factor=2),
    "corda": _CORDA,
    "corda_kpm": Init(
        functools.partial(corda, mode="kpm"), "inputs", "residual", ops=_LINEAR
    ),
    "loftq": _LOFTQ,
}
ITERATED = {"pissa": _PISSA, "loftq": _LOFTQ}  # also `<name>_niter_<n>`


def find_init(init: object) -> Init | None:
    """Returns what the name or function `init` means; None for an unknown name.

    Args:
      init: as in `LoraConfig`.

    Examples:
      >>> find_init("pissa_niter_4").base
      'residual'
    """
    if callable(init):
        return Init(init, "weight")
    if not isinstance(init, str):
        return None
    iterated = re.fullmatch(r"(\w+?)_niter_([1-9][0-9]{0,5})", init)
    if iterated and iterated[1] in ITERATED:
        known = ITERATED[iterated[1]]
        fun = functools.partial(known.fun, n_iter=int(iterated[2]))
        return Init(fun, known.needs, known.base)
    return INITS.get(init)


def init_name(init: object) -> str:
    """Returns the name of an initialisation given by name or as a function.

    Args:
      init: as in `LoraConfig`.

    Examples:
      >>> init_name("pissa"), init_name(kaiming)
      ('pissa', 'kaiming')
    """
    if isinstance(init, str):
        return init
    inner = getattr(init, "func", init)  # of a functools.partial
    return getattr(inner, "__name__", type(inner).__name__)


def init_clashes(
    path: str,
    shape: tuple[int, ...],
    spec: Spec,
    init: str | Callable[..., Any],
    method: Method,
    route: str = "factored",
) -> list[str]:
    """Returns why `init` cannot initialise the leaf `path`, each reason with a remedy.

    Args:
      path: the leaf.
      shape: its shape.
      spec: how it is adapted.
      init: name or function.
      method: what `spec` names.
      route: how the plan found the leaf used.

    Returns:
      A text for each reason; an empty list if there is none.

    Examples:
      >>> spec = Spec(rank=3, alpha=3.0)
      >>> init_clashes("w", (8, 8), spec, "orthogonal", Method())
      ["init 'orthogonal' needs an even rank, 'w' has 3: give it Rule('w', rank=4)"]
    """
    found, name = find_init(init), init_name(init)
    if found is None:
        return [f"init {name!r} of {path!r} is none of {', '.join(INITS)}"]
    wrong = []

    def instead(init: str = "kaiming") -> str:
        return f"give it Rule({path!r}, init={init!r})"

    if method.init is not None:
        if init == "kaiming":
            return []
        return [
            f"init {name!r} of {path!r}: method {spec.method!r} has an "
            f"initialisation of its own, leave init out or {instead()}"
        ]
    if found.even and spec.rank % 2:
        wrong.append(
            f"init {name!r} needs an even rank, {path!r} has {spec.rank}: give it "
            f"Rule({path!r}, rank={spec.rank + 1})"
        )
    if spec.op not in found.ops:
        wrong.append(
            f"init {name!r} is for {' and '.join(found.ops)} weights, {path!r} is of "
            f"op {spec.op!r}: {instead()}"
        )
    elif found.needs == "inputs" and route != "factored":
        wrong.append(
            f"init {name!r} needs the inputs of {path!r}, which is used otherwise than "
            f"in matrix products ({route}): {instead()}"
        )
    if found.rank_factor > 1 and sorted(spec.axes.order) == list(range(len(shape))):
        _, n_in, n_out = spec.axes.sizes(shape)
        if found.rank_factor * spec.rank > min(n_in, n_out):
            wrong.append(
                f"init {name!r} needs {found.rank_factor} times the rank, "
                f"{found.rank_factor * spec.rank}, to fit into min({n_in}, {n_out}) of "
                f"{path!r}: {instead()}"
            )
    return wrong
