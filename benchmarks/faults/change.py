"""Random damage: to bytes, to JSON values, to a safetensors header."""

import json
import random
from typing import Any

VALUES = (
    None, True, False, 0, 1, 2, 3, -1, 1e308, 0.5, 10**30, 10**400, "", "r", "up",
    "F16", "BF16", "I8", "all", "lora_only", ".*", "(a|b)*c", "(|.)(|.)(|.)(|.)!",
    "[", "**",
    "{a,b}{a,b}/*", "{0..99999999}", "pissa", "dora", "vera", "rows", [], [0], [2, 4],
    [[1]], ["up"], ["up", "e"], [0, 2**63], {}, {"up": 2}, {"up": -1}, {"e": [1]},
    {"": [1, 1]}, {"(|.)(|.)(a*)*!": 4}, {"weight_map": {}}, "\x00", "../x", "é" * 50,
    "\ud800", float("nan"), float("inf"), [1] * 40,
)  # fmt: skip
# Bytes that JSON's readers stumble over.
PIECES = (
    b"\0", b'"', b"[", b"{", b"}", b"9", b"-", b"e999", b"\xff" * 8, b"[" * 2000,
    b"9" * 5000, b"NaN", b"\\ud800", b'"r":1,', b'{"a":' * 500,
)  # fmt: skip


def value(old: Any, rng: random.Random) -> Any:
    """Returns a JSON value with one thing in it changed."""
    if isinstance(old, dict) and old and rng.random() < 0.9:
        key = rng.choice(list(old))
        out = dict(old)
        action = rng.random()
        if action < 0.15:
            del out[key]
        elif action < 0.3:
            new = rng.choice([key + "x", key[:-1], "", "__metadata__", "r"])
            out[new] = out.pop(key)
        else:
            out[key] = value(out[key], rng)
        return out
    if isinstance(old, list) and old and rng.random() < 0.7:
        at = rng.randrange(len(old))
        if rng.random() < 0.15:
            return [*old[:at], *old[at + 1 :]]
        if rng.random() < 0.15:
            return [*old, old[at]]
        return [*old[:at], value(old[at], rng), *old[at + 1 :]]
    if type(old) is int and rng.random() < 0.6:
        return old + rng.choice([-1, 1, 8, -8, 2**31, 2**63])
    return rng.choice(VALUES)


def text(data: bytes, rng: random.Random, most: int = 3) -> bytes:
    """Returns JSON text with up to `most` things in it changed."""
    new = json.loads(data)
    for _ in range(rng.randrange(1, most + 1)):
        new = value(new, rng)
    return json.dumps(new).encode()


def flipped(data: bytes, rng: random.Random) -> bytes:
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
            out[at:at] = rng.choice(PIECES)
        else:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + 20]
    return bytes(out)


def parted(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns the header of a safetensors file, and the bytes behind it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def joined(header: dict[str, Any], body: bytes) -> bytes:
    """Returns the safetensors file of a header and the bytes behind it."""
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + body


def numbers(body: bytes, rng: random.Random) -> bytes:
    """Returns as many bytes, some of them changed."""
    return flipped(body, rng)[: len(body)].ljust(len(body), b"\0")


def tensors(data: bytes, rng: random.Random) -> bytes:
    """Returns a safetensors file that is damaged somewhere: all, header or numbers."""
    action = rng.random()
    if action < 0.4:
        return flipped(data, rng)
    header, body = parted(data)
    if action < 0.6:
        return joined(header, numbers(body, rng))
    for _ in range(rng.randrange(1, 3)):
        header = value(header, rng)
    return joined(header, body) if isinstance(header, dict) else flipped(data, rng)
