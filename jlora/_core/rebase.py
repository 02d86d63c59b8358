"""Rewrites an adapter of a changed base as plain LoRA for the original one."""

import dataclasses
import math

import jax.numpy as jnp

from .._tables import listed
from ..errors import TreeError
from ..factors import Factors, Trainable
from ..methods import find_init


def changed_base(factors: Factors) -> bool:
    """Returns whether the initialisation of these factors changed the weight."""
    init = find_init(factors.spec.init)
    return init is not None and init.changes_base


def rebase(trainable: Trainable, initial: Trainable) -> Trainable:
    """Returns `trainable`, an adapter of `frozen`, as one of the original parameters.

    Where an init (`"pissa"`, `"olora"`, `"corda"`, `"lora_ga"`) took `s a0 b0` out of
    the weight, the factors become `a' = [a | a0]` and `b' = [b ; -b0]` of rank `2r`,
    alpha grows so that the scale stays, and
    `merge(params, rebase(trainable, initial))` is `merge(frozen, trainable)` up to
    rounding. Other factors, and leaves trained in full, stay as they are. The
    result can be shared, or used beside other adapters, without the changed base. Where
    `split` quantised the changed base (QPiSSA), rounding is what its codes lost: no
    adapter of the dense parameters holds that.

    Args:
      trainable: trained.
      initial: what `split` returned before training; the same key returns it again.

    Raises:
      TreeError: if the two are not of one plan, or a weight was quantised by
        `init="loftq"`: no adapter holds what its base lost. Lists the leaves.

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
        old = initial.lora.get(path)
        if old is None:
            continue
        init = find_init(factors.spec.init)
        if old.spec != factors.spec:
            wrong.append(f"{path!r} has other settings in initial: {old.spec}")
        elif init is None or not init.changes_base:
            lora[path] = factors
        elif init.base == "own":
            wrong.append(
                f"{path!r} has init {factors.spec.init!r}, whose base is "
                "quantised: keep frozen and trainable together"
            )
        else:
            lora[path] = _doubled(factors, old)
    if wrong:
        raise TreeError(
            f"This adapter cannot be rebased: {listed(wrong)}. Take initial from "
            "the jlora.split that training began with."
        )
    return Trainable(lora, trainable.full)


def _doubled(factors: Factors, initial: Factors) -> Factors:
    """Returns `scale * (a @ b - a0 @ b0)` as factors of twice the rank."""
    spec = factors.spec
    grown = dataclasses.replace(
        spec,
        rank=2 * spec.rank,
        alpha=spec.alpha * (math.sqrt(2) if spec.rslora else 2),
        init="kaiming",
    )
    return dataclasses.replace(
        factors,
        a=jnp.concatenate([factors.a, initial.a.astype(factors.a.dtype)], axis=-1),
        b=jnp.concatenate(
            [factors.b, -initial.b.astype(factors.b.dtype)], axis=len(spec.axes.batch)
        ),
        spec=grown,
    )
