"""Adapters of experts, for models that keep them in three ways."""

import itertools

import numpy as np

import jlora
from jlora.peft import Entry, NameMap

E, H, N, R = 3, 6, 4, 2  # experts, features, hidden, rank
FORMS = ("peft", "unsloth", "per-expert", "stacked", "shared")
MODULE = "model.layers.{i}.mlp.experts"


def fused(kind, axes):
    """Names of a model with one parameter for gate and up of all experts."""
    return NameMap(
        tuple(
            Entry(f"layers/{{i}}/{name}", f"{MODULE}.{name}", axes, kind)
            for name in ("gate_up_proj", "down_proj")
        )
    )


# Where gate and up of an expert lie in the model's own leaf, and what it is called.
MODELS = {
    "mixtral": (fused("experts", "e o i -> e o i"), False, "eoi"),
    "gpt-oss": (fused("experts_t", "e i o -> e i o"), True, "eio"),
    "qwen3-moe": (
        NameMap(
            tuple(
                Entry(
                    f"layers/{{i}}/{name}",
                    f"{MODULE}.{{e}}.{name}.weight",
                    "e i o -> o i",
                    "linear",
                )
                for name in ("gate_proj", "up_proj", "down_proj")
            )
        ),
        None,
        "eio",
    ),
}
SHAPES = {"gate_up_proj": (H, 2 * N), "gate_proj": (H, N), "up_proj": (H, N),
          "down_proj": (N, H)}  # fmt: skip


def rand(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def adapter(model):
    """A random adapter of two layers: A of gate and up, and B of down, shared."""
    names, _, order = MODELS[model]
    leaves = [entry.flax.rpartition("/")[2] for entry in names.entries]
    axes = jlora.Axes((0,), (order.index("i"),), (order.index("o"),))
    lora, params = {}, {}
    for layer, leaf in itertools.product((0, 1), leaves):
        n_in, n_out = SHAPES[leaf]
        a, b = rand(E, n_in, R) + layer, rand(E, R, n_out) - layer
        if leaf == "down_proj":
            b = np.repeat(b[:1], E, 0)
        else:
            a = np.repeat(a[:1], E, 0)
        spec = jlora.Spec(rank=R, alpha=3.0 + layer, axes=axes)
        lora[f"layers/{layer}/{leaf}"] = jlora.Factors(a, b, spec)
        sizes = {"e": E, "i": n_in, "o": n_out}
        node = params.setdefault("layers", {}).setdefault(str(layer), {})
        node[leaf] = np.zeros([sizes[x] for x in order], np.float32)
    return jlora.Trainable(lora), params, names


def updates(model, trainable, params):
    """What is added to gate, up and down `[E, in, out]`, by layer."""
    _, interleaved, order = MODELS[model]
    merged, found = jlora.merge(params, trainable), {}
    for layer, leaves in merged["layers"].items():
        for leaf, x in leaves.items():
            x = np.asarray(x).transpose(0, order.index("i"), order.index("o"))
            if leaf != "gate_up_proj":
                found[layer, leaf] = x
            elif interleaved:
                found[layer, "gate_proj"] = x[..., ::2]
                found[layer, "up_proj"] = x[..., 1::2]
            else:
                found[layer, "gate_proj"], found[layer, "up_proj"] = np.split(x, 2, -1)
    return found
