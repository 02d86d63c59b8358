"""An adapter of a changed base as ordinary LoRA for the original one."""

import dataclasses
import math

import jax.numpy as jnp

from .._tables import listed
from ..errors import TreeError
from ..factors import Factors, Trainable
from ..methods import find_init


def rebase(trainable: Trainable, initial: Trainable) -> Trainable:
    """Returns an adapter for the original parameters: what `trainable` is for `frozen`.

    Where an init (`"pissa"`, `"olora"`, `"corda"`, `"lora_ga"`) took `s a0 b0` out of
    the weight, the factors become `a' = [a | a0]` and `b' = [b ; -b0]` of rank `2r`,
    alpha grows so that the scale stays, and
    `merge(params, rebase(trainable, initial))` is `merge(frozen, trainable)` up to
    rounding. Other factors, and leaves trained in full, stay as they are. Share it,
    or use it beside other adapters, without a changed base.

    Args:
      trainable: trained.
      initial: as it came from `split`; the same key gives it again.

    Raises:
      TreeError: if the two are not of one plan, or a weight was quantised by
        `init="loftq"`: what its base lost is in no adapter. Lists the leaves.

    Examples:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"w": jnp.eye(4)}
      >>> fn = lambda p, x: x @ p["w"]
      >>> config = jlora.LoraConfig(rank=2, init="pissa")
      >>> plan = jlora.plan(fn, params, jnp.ones((1, 4)), config=config)
      >>> frozen, initial = jlora.split(jax.random.key(0), params, plan)
      >>> plain = jlora.rebase(initial, initial)
      >>> plain.lora["w"].rank, plain.lora["w"].scale
      (4, 1.0)
      >>> bool(jnp.allclose(jlora.merge(params, plain)["w"], params["w"], atol=1e-6))
      True

    References:
      Meng et al., 2024, PiSSA, appendix C, https://arxiv.org/abs/2404.02948
    """
    wrong = [
        f"{path!r} is in only one of the two"
        for path in sorted(set(trainable.lora) ^ set(initial.lora))
    ]
    lora = {}
    for path, factors in trainable.lora.items():
        start = initial.lora.get(path)
        if start is None:
            continue
        init = find_init(factors.spec.init)
        if start.spec != factors.spec:
            wrong.append(f"{path!r} has other settings in initial: {start.spec}")
        elif init is None or not init.changes_base:
            lora[path] = factors
        elif init.base == "own":
            wrong.append(
                f"{path!r} began with init {factors.spec.init!r}, whose base is "
                "quantised: keep frozen and trainable together"
            )
        else:
            lora[path] = _doubled(factors, start)
    if wrong:
        raise TreeError(
            f"This adapter cannot be rebased: {listed(wrong)}. Take initial from "
            "the jlora.split that training began with."
        )
    return Trainable(lora, trainable.full)


def _doubled(factors: Factors, start: Factors) -> Factors:
    spec = factors.spec
    grown = dataclasses.replace(
        spec,
        rank=2 * spec.rank,
        alpha=spec.alpha * (math.sqrt(2) if spec.rslora else 2),
        init="kaiming",
    )
    rows = len(spec.axes.batch)
    return dataclasses.replace(
        factors,
        a=jnp.concatenate([factors.a, start.a.astype(factors.a.dtype)], axis=-1),
        b=jnp.concatenate([factors.b, -start.b.astype(factors.b.dtype)], axis=rows),
        spec=grown,
    )
