"""What the tests of files share: an adapter with one of everything, and readers."""

import jax.numpy as jnp
import pytest

import jlora
from jlora._io.models import open_model
from jlora.factors import Axes, Factors, Spec
from tests.helpers import normal


def adapter(seed=0):
    """One of everything: dtypes, axes, odd paths, a magnitude, full leaves."""
    spec = Spec(
        op="conv",
        rank=2,
        alpha=1 / 3,
        rslora=True,
        dropout=0.1,
        init="gaussian",
        axes=Axes((0,), (2, 1), (3,)),
    )
    return jlora.Trainable(
        lora={
            "params/mlp/~/l_0/w": Factors(
                normal((3, 5, 4, 2), seed), normal((3, 2, 6), seed + 1), spec
            ),
            "b é.%20 {x}": Factors(
                normal((4, 1), seed, "bfloat16").at[0, 0].set(-0.0),
                normal((1, 3), seed, "float16"),
                Spec(rank=1, alpha=2.0, method="dora"),
                normal((3,), seed),
            ),
        },
        full={
            "head": normal((2, 3), seed, "bfloat16"),
            "scalar": jnp.float32(seed + 0.5),
            "": jnp.arange(3) + seed,
        },
    )


def orbax_fails(test):
    """Marks a test in which Orbax fails to read what is damaged or does not fit."""
    test = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")(test)
    unraisable = "ignore::pytest.PytestUnraisableExceptionWarning"
    test = pytest.mark.filterwarnings(unraisable)(test)
    return pytest.mark.usefixtures("failed_reads")(test)


def read_flat(file):
    """Returns the tensors of a model on disk, by name."""
    model = open_model(file)
    return {name: model.read(name) for name in sorted(model.shapes)}
