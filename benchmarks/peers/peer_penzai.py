"""google-deepmind/penzai `toolshed.lora`, on named axes; it has no alpha."""

import dataclasses
from typing import Any

import common
import in_jax
import jax
import jax.numpy as jnp
import numpy as np
from penzai import pz
from penzai.toolshed import lora


def linear_layer(path: str, weight: jax.Array) -> pz.nn.Linear:
    """Returns a Linear whose weight is frozen; its axes are named `in` and `out`."""
    fan_in, fan_out = weight.shape
    layer = pz.nn.Linear.from_config(
        name=path,
        init_base_rng=jax.random.key(0),
        input_axes={"in": fan_in},
        output_axes={"out": fan_out},
    )
    value = pz.nx.wrap(weight).tag("in", "out")
    return (
        pz.select(layer)
        .at_instances_of(pz.Parameter)
        .apply(lambda own: pz.ParameterValue(value=value, label=own.label))
    )


def named(factor: np.ndarray, own: Any) -> Any:
    """Returns a factor with the names of the axes of penzai's own value."""
    first, second = (
        ("in", "lowrank") if "lora_a" in own.label.lower() else ("lowrank", "out")
    )
    value = pz.nx.wrap(jnp.asarray(factor)).tag(first, second)
    if value.named_shape != own.value.named_shape:
        raise ValueError(f"{own.label}: {own.value.named_shape}, not {factor.shape}")
    return value


def make(problem: common.Problem) -> tuple[in_jax.Loss, Any, Any]:
    """Returns the loss, the factors, and the frozen weights."""
    weights = jax.tree.map(jnp.asarray, problem.weights())
    layers = {
        layer: {
            name: linear_layer(f"{layer}.{name}", own[name]) for name in common.MATRICES
        }
        for layer, own in weights.items()
        if layer.startswith("layer")
    }
    layers = lora.loraify_linears_in_selection(
        pz.select(layers), rank=problem.rank, init_base_rng=jax.random.key(0)
    )
    unbound, parameters = pz.unbind_params(layers, freeze=True)
    shared = problem.factors()
    if len(parameters) != len(jax.tree.leaves(shared)):
        raise ValueError("what was adapted differs")
    factors = [
        dataclasses.replace(
            own, value=named(common.find_factor(shared, own.label), own)
        )
        for own in parameters
    ]

    def loss(factors: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        unbound, rest = frozen
        layers = pz.bind_variables(unbound, factors)

        def linear(x: jax.Array, layer: str, name: str) -> jax.Array:
            x = pz.nx.wrap(x).tag("batch", "token", "in")
            return layers[layer][name](x).untag("batch", "token", "out").unwrap()

        logits = in_jax.forward(rest, tokens[:, :-1], linear)
        return in_jax.next_token_loss(logits, tokens)

    return loss, factors, (unbound, in_jax.without_matrices(weights))


if __name__ == "__main__":
    in_jax.run(make, ("penzai",))
