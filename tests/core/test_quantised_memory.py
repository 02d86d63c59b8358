"""What a step over codes holds, by the compiler's own figures."""

import jax
import jax.numpy as jnp
import pytest

import jlora
from tests.helpers import normal

pytestmark = pytest.mark.once

D, LAYERS = 128, 6
X = jnp.ones((8, D))


def model(p, x):
    for i in range(LAYERS):
        x = x + jnp.tanh(x @ p[str(i)])
    return x


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers_that_are_not_stacked_are_widened_one_at_a_time(kind, method):
    params = normal({str(i): (D, D) for i in range(LAYERS)})
    config = jlora.LoraConfig(rank=2, targets="*", method=method)
    plan = jlora.plan(model, params, X, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    coded = jlora.quantize(frozen, plan, kind=kind, targets="*")

    @jax.jit
    def step(frozen, trainable, x):
        lora_fn = jlora.apply_lora(model)
        return jax.grad(lambda t: jnp.square(lora_fn(frozen, t, x)).sum())(trainable)

    def held(base):
        compiled = step.lower(base, trainable, X).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one = 4 * D * D
    assert held(coded) < held(frozen) + 2.5 * one  # of six
