"""Damaged adapter directories by the hundred thousand: only jlora's own errors.

    python -m tests.peft.fuzz_peft 100000 SEED

Bytes, header fields and config fields are changed at random; each result is loaded.
Prints how the loads ended and how much memory they took at most.
"""

import collections
import json
import pathlib
import random
import resource
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from jlora.factors import Axes, Factors, Spec

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
VALUES = (
    None, True, False, 0, 1, 2, 3, -1, 1e308, 0.5, 10**30, "", "r", "up", "F16", "BF16",
    "I8", "all", "lora_only", ".*", "(a|b)*c", "[", [], [0], [2, 4], [[1]], ["up"],
    ["up", "e"], [0, 2**63], {}, {"up": 2}, {"up": -1}, {"e": [1]}, {"": [1, 1]},
    {"weight_map": {}}, "\x00", "../x", "é" * 50, float("nan"), [1] * 40,
)  # fmt: skip


def adapter() -> jlora.Trainable:
    table = Axes((), (0,), (1,))
    return jlora.Trainable(
        {
            "up/kernel": Factors(
                jnp.ones((4, 2)), jnp.ones((2, 6)), Spec(rank=2, alpha=3.0)
            ),
            "c/kernel": Factors(
                jnp.ones((3, 3, 2, 3)),
                jnp.ones((3, 4)),
                Spec(op="conv", axes=Axes((), (0, 1, 2), (3,)), rank=3, alpha=3.0),
            ),
            "e/embedding": Factors(
                jnp.ones((5, 2)),
                jnp.ones((2, 4)),
                Spec(op="embedding", axes=table, rank=2, alpha=3.0),
            ),
        },
        {"head/kernel": jnp.ones((4, 2)), "up/bias": jnp.ones(6)},
    )


LIKE = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in {
        "up/kernel": (4, 6),
        "c/kernel": (3, 3, 2, 4),
        "e/embedding": (5, 4),
        "head/kernel": (4, 2),
        "up/bias": (6,),
    }.items()
}


def change(value: Any, rng: random.Random) -> Any:
    """Returns a JSON value with one thing in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        out = dict(value)
        action = rng.random()
        if action < 0.15:
            del out[key]
        elif action < 0.3:
            new = rng.choice([key + "x", key[:-1], "", "__metadata__", "r"])
            out[new] = out.pop(key)
        else:
            out[key] = change(out[key], rng)
        return out
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], change(value[at], rng), *value[at + 1 :]]
    if type(value) is int and rng.random() < 0.6:
        return value + rng.choice([-1, 1, 8, -8, 2**31, 2**63])
    return rng.choice(VALUES)


def flip(data: bytes, rng: random.Random) -> bytes:
    """Returns bytes with a few of them changed, added or lost."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(out) + 1)
        action = rng.random()
        if action < 0.5 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif action < 0.7:
            del out[at : at + rng.choice([1, 2, 8, 1000])]
        elif action < 0.9:
            out[at:at] = rng.choice([b"\0", b'"', b"[", b"{", b"9", b"\xff" * 8])
        else:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + 20]
    return bytes(out)


def mutate(config: bytes, tensors: bytes, rng: random.Random) -> tuple[bytes, bytes]:
    action = rng.random()
    if action < 0.25:
        return flip(config, rng), tensors
    if action < 0.5:
        return config, flip(tensors, rng)
    if action < 0.75:
        fields = json.loads(config)
        for _ in range(rng.randrange(1, 4)):
            fields = change(fields, rng)
        return json.dumps(fields).encode(), tensors
    length = int.from_bytes(tensors[:8], "little")
    header = json.loads(tensors[8 : 8 + length])
    for _ in range(rng.randrange(1, 3)):
        header = change(header, rng)
    text = json.dumps(header).encode()
    return config, len(text).to_bytes(8, "little") + text + tensors[8 + length :]


def fuzz(folder: pathlib.Path, count: int, seed: int) -> dict[str, int]:
    """Loads `count` damaged adapters; returns how often each end came."""
    rng = random.Random(seed)
    ends: collections.Counter[str] = collections.Counter()
    jlora.peft.save(folder, adapter())
    config = (folder / CONFIG).read_bytes()
    tensors = (folder / TENSORS).read_bytes()
    for _ in range(count):
        new_config, new_tensors = mutate(config, tensors, rng)
        (folder / CONFIG).write_bytes(new_config)
        (folder / TENSORS).write_bytes(new_tensors)
        try:
            _, report = jlora.peft.load_partial(folder, LIKE)
            ends["report" if report else "loaded"] += 1
        except jlora.PeftError:
            ends["PeftError"] += 1
    return dict(ends)


def main(count: int, seed: int) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = pathlib.Path(name)
        fuzz(folder, 100, seed)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        ends = fuzz(folder, count, seed)
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(ends, f"memory +{(after - before) / 1024:.0f} MiB, {seconds:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
