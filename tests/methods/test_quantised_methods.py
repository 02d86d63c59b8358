"""Every method over a quantised base equals itself over the widened model."""

import jax
import jax.numpy as jnp
import pytest

import jlora
from tests.helpers import close, normal, random_like

pytestmark = pytest.mark.once

SHAPES = {"embed": (12, 32), "layers": (3, 32, 32), "experts": (4, 32, 16)}
IDS = jnp.array([1, 5, 3, 11])


def model(p, ids):
    x = p["embed"][ids]
    x, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, p["layers"])
    return jnp.tanh(jnp.einsum("bd,edf->bef", x, p["experts"]))


PARTS = jlora.FusedParts(axis=-1, sizes=(8, 24), ranks=(2, 1))
CASES = {
    "dora": {"method": "dora"},
    "vera": {"method": "vera"},
    "adalora": {"method": "adalora"},
    "rslora": {"rslora": True},
    "rows": {"train": jlora.TokenRows("embed", (1, 11))},
    "parts": {"rules": [jlora.Rule("layers", parts=PARTS)]},
    "orthogonal": {"init": "orthogonal"},
}


def setup(case, kind):
    params = normal(SHAPES, scale=0.2)
    config = jlora.LoraConfig(**{"rank": 2, "alpha": 4, **CASES[case]})
    plan = jlora.plan(model, params, IDS, config=config)
    double = kind == "nf4"
    coded = jlora.quantize(params, plan, kind=kind, double=double, targets="*")
    frozen, trainable = jlora.split(jax.random.key(0), coded, plan)
    return coded, frozen, trainable, plan


def loss(frozen, trainable):
    return jnp.square(jlora.apply_lora(model, on_merge="error")(frozen, trainable, IDS))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_a_method_over_codes_equals_the_widened_model(case, kind):
    coded, frozen, fresh, plan = setup(case, kind)
    wide = jlora.merge(coded, jlora.Trainable())
    close(jlora.merge(frozen, fresh), wide, 1e-5)  # a fresh adapter changes nothing
    _, expected = jlora.split(jax.random.key(0), wide, plan)
    close(fresh, expected, 1e-5)
    trainable = random_like(fresh, scale=0.3)

    @jax.jit
    def both(frozen, trainable):
        fun = jax.value_and_grad(lambda f, t: loss(f, t).sum(), argnums=1)
        return fun(frozen, trainable)

    close(both(frozen, trainable), both(wide, trainable), 1e-5, largest=1e-5)
    value = jnp.square(model(jlora.merge(frozen, trainable), IDS)).sum()
    close(both(frozen, trainable)[0], value, 1e-4)


def test_lengths_of_columns_widen_one_matrix_at_a_time():
    _, frozen, trainable, _ = setup("dora", "nf4")
    step = jax.grad(lambda t: loss(frozen, t).sum())
    whole = [
        eqn.primitive.name
        for eqn in equations(jax.make_jaxpr(step)(trainable).jaxpr)
        for v in eqn.outvars
        if v.aval.shape in (SHAPES["layers"], SHAPES["experts"])
        and jnp.issubdtype(v.aval.dtype, jnp.floating)
        and eqn.primitive.name not in ("dot_general", "quantised_linear")
    ]
    assert not whole
    assert list(equations(jax.make_jaxpr(step)(trainable).jaxpr))


def equations(jaxpr):
    """Yields the equations of a jaxpr outside products, which widen inside."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_code):
            if _is_code(inner):
                yield from equations(getattr(inner, "jaxpr", inner))


def _is_code(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")
