"""What does an unmerged adapter cost a step of generation, one token with a KV cache?

    python -m benchmarks.decode
    python -m benchmarks.decode --target tpu

With few tokens a step reads weights and does little else, so the adapter should cost
the share of bytes that it adds. `--target tpu` compiles ahead of time.
"""

import functools
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jlora
from examples.chat import model as chat
from examples.chat.decoder_config import DecoderConfig

from . import common, tpu
from .page import markdown, source

RANK, ROOM, USED = 16, 256, 200  # tokens that the cache has room for, and holds
SETTINGS = {"rank": RANK, "room": ROOM, "used": USED}


class Case(NamedTuple):
    """A model without biases, with layers written out, and how many rows generate."""

    width: int
    batch: int
    dtype: str = "float32"
    layers: int = 4


CASES = (Case(512, 1), Case(1024, 1), Case(2048, 1), Case(1024, 8), Case(1024, 32))


def programs(case: Case) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """Returns functions, and the shapes of their arguments."""
    heads = case.width // 64
    config = DecoderConfig(
        vocab=4096,
        width=case.width,
        hidden=4 * case.width,
        layers=case.layers,
        heads=heads,
        kv_heads=heads,
        head=64,
        scan=False,
    )
    fn = functools.partial(chat.decode, config=config)
    params = chat.shapes(config, case.dtype)
    cache = jax.eval_shape(
        lambda: chat.empty_cache(config, case.batch, ROOM, case.dtype)
    )
    token = jax.ShapeDtypeStruct((case.batch, 1), "int32")
    plan = jlora.plan(fn, params, token, cache, config=jlora.LoraConfig(rank=RANK))
    start = functools.partial(jlora.split, jax.random.key(0), plan=plan)
    trainable = jax.eval_shape(lambda p: start(p)[1], params)
    return (
        {"base": fn, "unmerged": jlora.apply_lora(fn, on_merge="error")},
        {"base": (params, token, cache), "unmerged": (params, trainable, token, cache)},
    )


def measured(cases: Sequence[Case], rounds: int, place: Any) -> Iterator[Any]:
    """Yields a row for each case: bytes, FLOPs, and times if there are rounds."""
    for case in cases:
        functions, shapes = programs(case)
        row: common.Figures = case._asdict()
        runs = {}
        for name, args in shapes.items():
            if place is not None:
                args = jax.tree.map(lambda x: x.update(sharding=place), args)
            fn = jax.jit(lambda *args, fn=functions[name]: fn(*args))
            program = fn.lower(*args).compile()
            cost = program.cost_analysis()
            row[name] = {
                "flops": cost["flops"],
                "bytes": cost["bytes accessed"],
                "numbers": sum(x.size for x in jax.tree.leaves(args[:-2])),
            }
            if rounds:
                values = [common.filled(tree) for tree in args[:-2]]
                runs[name] = functools.partial(program, *values, *_state(*args[-2:]))
        for name, seconds in common.interleaved(runs, rounds).items():
            row[name]["seconds"] = seconds
        print(common.show(columns([row])), flush=True)
        yield row


def _state(token: Any, cache: Any) -> tuple[jax.Array, chat.Cache]:
    """Returns a token a row, and a cache that holds `USED` tokens."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
    held = zeros.segments.at[:, :USED].set(1)
    state = zeros._replace(segments=held, start=jnp.int32(USED))
    return jnp.ones(token.shape, token.dtype), state


def columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns the rows for a table, as multiples of the frozen model's."""
    head = (
        "width",
        "rows",
        "ms, base",
        "time ×",
        "bytes moved ×",
        "FLOPs ×",
        "numbers ×",
    )

    def line(row: common.Figures) -> tuple[str, ...]:
        base, own = row["base"], row["unmerged"]
        ratios = ("seconds", "bytes", "flops", "numbers")
        return (
            str(row["width"]),
            str(row["batch"]),
            common.fixed(base.get("seconds"), 1, 1e-3),
            *(common.ratio(own, base, field) for field in ratios),
        )

    return head, [line(row) for row in rows]


def section(found: common.Figures) -> str:
    """Returns the text on a step of generation."""
    settings = found["settings"]
    return "\n".join(
        (
            "## A step of generation, unmerged\n",
            f"{source(found['environment'])}\nA decoder of {CASES[0].layers} layers "
            "that are written out writes one token a row, with a KV cache that holds "
            f"{settings['used']} tokens. The adapter has rank {settings['rank']} on "
            "all linear weights. Figures are multiples of the frozen model's. "
            "*Numbers* are those of weights and adapter over those of weights: what an "
            "adapter costs at least where reading weights is all that takes time.\n",
            markdown(columns(found["rows"])),
        )
    )


def main() -> None:
    """Measures here, or compiles for one TPU v5e chip."""
    parser = common.parser("decode", __doc__)
    parser.add_argument("--target", choices=("cpu", "tpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=20, help="0: do not time")
    options = parser.parse_args()
    if options.target == "cpu":
        rows = list(measured(CASES, options.rounds, None))
        common.write(options.json, common.environment(), settings=SETTINGS, rows=rows)
        return
    if find_spec(tpu.COMPILER) is None:
        print(tpu.MISSING)
        return
    jax.config.update("jax_platforms", "cpu")
    cases = [case._replace(dtype="bfloat16") for case in CASES]
    rows = list(measured(cases, 0, tpu.one_chip()))
    path = options.json.with_suffix(".tpu.json")
    common.write(path, tpu.environment(), settings=SETTINGS, rows=rows)


if __name__ == "__main__":
    main()
