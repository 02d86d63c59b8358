"""Distributes ranks by the variance of the weights' inputs, under one budget."""

import dataclasses
import math

import numpy as np

from .._tables import listed
from ..errors import ConfigError
from ..methods.eva import principal
from ..methods.moments import Statistics
from .plan import Plan
from .row import Row


def redistribute_ranks(plan: Plan, statistics: Statistics, *, rho: float = 2.0) -> Plan:
    """Returns `plan` with ranks moved to the `"eva"` leaves where they explain most.

    Each principal axis of each weight's inputs explains a share of their variance. The
    axes with the largest shares get the ranks. No leaf gets more than `rho` times its
    own rank, and the sum of all ranks does not grow. Alpha moves with the rank, so
    scales stay. A leaf of rank 0 is not adapted. A rank of a stack of weights counts
    once for each layer, with the mean of the layers' shares.

    Args:
      plan: from `jlora.plan`, with `init="eva"`.
      statistics: from `jlora.activation_statistics`.
      rho: the bound, at least 1; with 1 nothing moves.

    Raises:
      ConfigError: if `rho` is below 1, no leaf has `init="eva"`, or `statistics` lacks
        the inputs of such a leaf.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"u": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}
      >>> fn = lambda p, xs: xs[0] @ p["u"] + xs[1] @ p["v"]
      >>> xs = jnp.eye(4), jnp.eye(4)[:, :1] * jnp.ones(4)
      >>> config = jlora.LoraConfig(rank=2, init="eva", targets=("u", "v"))
      >>> plan = jlora.plan(fn, params, xs, config=config)
      >>> statistics = jlora.activation_statistics(fn, params, plan, [(xs,)])
      >>> moved = jlora.redistribute_ranks(plan, statistics)
      >>> [row.spec.rank if row.spec else 0 for row in moved.rows()]
      [3, 1]

    References:
      Paischer et al., 2024, EVA, section 3, https://arxiv.org/abs/2410.07170
    """
    rows = [row for row in plan.rows() if row.spec and row.spec.init == "eva"]
    if not (isinstance(rho, int | float) and math.isfinite(rho) and rho >= 1):
        raise ConfigError(f"rho must be a number of at least 1, got {rho!r}.")
    if not rows:
        raise ConfigError(
            "redistribute_ranks: no adapted leaf has init='eva'. Make the plan with "
            "LoraConfig(init='eva')."
        )
    lacking = [row.path for row in rows if row.path not in statistics.inputs]
    if lacking:
        raise ConfigError(
            f"No input moments of {listed(map(repr, lacking), separator=', ')}: take "
            "statistics from jlora.activation_statistics with this plan."
        )
    ranks = _ranks(rows, statistics, rho)
    return Plan(plan.config, tuple(_with_rank(row, ranks) for row in plan.rows()))


def _ranks(rows: list[Row], statistics: Statistics, rho: float) -> dict[str, int]:
    """Returns the new rank of each leaf: the largest shares first, while they fit."""
    budget = 0
    offers: list[tuple[float, int, str]] = []  # share, cost, leaf
    for row in rows:
        assert row.spec is not None
        n, n_in, n_out = row.spec.axes.sizes(row.shape)
        _, shares = principal(statistics.inputs[row.path])
        mean = np.asarray(shares).reshape(n, -1).mean(axis=0)
        most = min(round(row.spec.rank * rho), n_in, n_out)
        offers += [(float(share), n, row.path) for share in mean[:most]]
        budget += n * row.spec.rank
    ranks = {row.path: 0 for row in rows}
    for _, cost, path in sorted(offers, key=lambda offer: -offer[0]):
        if cost <= budget:
            ranks[path] += 1
            budget -= cost
    return ranks


def _with_rank(row: Row, ranks: dict[str, int]) -> Row:
    rank = ranks.get(row.path)
    if row.spec is None or rank is None:
        return row
    if rank == 0:
        note = "rank 0: the directions of its inputs explain less than those of others"
        return dataclasses.replace(
            row, status="frozen", spec=None, init=None, note=note
        )
    ratio = rank / row.spec.rank
    alpha = row.spec.alpha * (math.sqrt(ratio) if row.spec.rslora else ratio)
    return dataclasses.replace(
        row, spec=dataclasses.replace(row.spec, rank=rank, alpha=alpha)
    )
