"""Adapters whose outputs are known, for the tests of the pool."""

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.factors import Axes, Factors, Spec, Trainable

LAYERS = Axes(batch=(0,), fan_in=(1,), fan_out=(2,))
PARAMS = {"w": jnp.zeros((4, 3)), "layers": jnp.zeros((2, 3, 3))}


def model(params, x):
    x = x @ params["w"]
    return x + x @ params["layers"][0] + x @ params["layers"][1]


def adapter(number, *, rank=1, alpha=None, layers=False):
    """An adapter that makes ones into `4 * number` in each entry."""
    alpha = rank if alpha is None else alpha
    a = np.full((4, rank), number / alpha, "float32")
    spec = Spec(rank=rank, alpha=float(alpha))
    lora = {"w": Factors(a, np.ones((rank, 3), "float32"), spec)}
    if layers:
        spec = Spec(axes=LAYERS, rank=rank, alpha=1.0)
        zeros = np.zeros((2, 3, rank), "float32"), np.zeros((2, rank, 3), "float32")
        lora["layers"] = Factors(*zeros, spec)
    return Trainable(lora)


LIKE = adapter(0, rank=3, layers=True)


def load(name):
    """Known adapters of all ranks and alphas; some that cannot be had."""
    if name == "missing":
        raise FileNotFoundError("no such adapter")
    if name == "exit":
        raise SystemExit(3)
    if name == "large":
        return adapter(1, rank=4)
    if name == "nan":
        return adapter(np.nan)
    number = int(name)
    return adapter(number, rank=1 + number % 3, alpha=1 + number % 5)


ROW_FN = jax.jit(jlora.adapters.per_row(model))


def served(batch):
    x = jnp.ones((len(batch.ids), 4))
    return np.asarray(ROW_FN(PARAMS, batch.adapters, batch.ids, x))
