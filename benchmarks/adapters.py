"""What do many adapters cost: trained in one program, served in one batch, swapped?"""

import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import jlora
from jlora._tables import nbytes
from jlora.pool._cache import insert_in_place

from . import common, models

TARGETS = ("all-linear", "**/{q,v}/kernel")
PARTS = ("sweep", "slots", "serving", "products", "pool")
# glibc gives large blocks back and zeroes new ones a page at a time, at every step.
KEEP = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}


def stacked_like(trainable: Any, count: int, seed: int = 0) -> jlora.Trainable:
    """Returns `count` random adapters of given shapes, stacked."""
    rng = np.random.default_rng(seed)

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal((count, *x.shape), np.float32)
        return jnp.asarray(0.02 * values, x.dtype)

    return jax.tree.map(fill, trainable)


def one_of(stacked: Any, i: int) -> Any:
    """Returns one adapter of a stack."""
    return jax.tree.map(lambda x: x[i], stacked)


def repeated(batch: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """Returns a batch for each adapter; tokens differ, so nothing is shared."""
    return tuple(jnp.stack([jnp.roll(x, i) for i in range(count)]) for x in batch)


def sweep(size: models.Size, rank: int, count: int, rounds: int) -> common.Figures:
    """Returns time and memory of `count` adapters in one step, beside as many steps.

    And the time of the floor for all their tokens at once, the least a sweep can take.
    """
    model = models.linen(size)
    params, batch = common.example(model)
    like = common.adapter(model, params, batch[0], rank)
    stacked = stacked_like(like, count)
    batches = repeated(batch, count)
    apply = jlora.apply_lora(model.apply, on_merge="error")

    def loss(trainable: Any, frozen: Any, x: Any, targets: Any) -> jax.Array:
        return common.cross_entropy(apply(frozen, trainable, x), targets)

    def losses(stacked: Any, frozen: Any, x: Any, targets: Any) -> jax.Array:
        # Adam works on each number separately: the sum trains each adapter by itself.
        return jax.vmap(loss, (0, None, 0, 0))(stacked, frozen, x, targets).sum()

    one = common.training_step(loss, one_of(stacked, 0), params, *batch)
    all_ = common.training_step(losses, stacked, params, *batches)
    whole = models.linen(dataclasses.replace(size, batch=size.batch * count))
    floor = common.training_steps(whole, rank, names=[common.STRICT])[common.STRICT]
    figures, runs = {}, {}
    for name, step in (("one", one), ("all", all_), ("floor", floor)):
        compiled, figures[name] = common.compile_step(step)
        state = [step[1]]

        def run(compiled=compiled, state=state, rest=step[2], n=1) -> Any:
            for _ in range(n):
                state[0], value = compiled(state[0], *rest)
            return value

        runs[name] = functools.partial(run, n=count if name == "one" else 1)
    seconds = common.interleaved(runs, rounds)
    return {
        "tokens": size.batch * size.length,
        "width": size.width,
        "adapters": count,
        "seconds": seconds,
        "speed_up": seconds["one"] / seconds["all"],
        "peak_bytes": {name: own["peak_bytes"] for name, own in figures.items()},
        "base_bytes": common.nbytes(params),
        "adapter_bytes": common.nbytes(like),
        "temp_bytes": {name: own["temp_bytes"] for name, own in figures.items()},
    }


def slots(size: models.Size, rank: int, count: int, rounds: int) -> common.Figures:
    """Returns the time of a step of `count` slots, beside as many steps of one run.

    Each slot has one batch row. A step is `forward_backward` and `optim_step` in one
    program.
    """
    model = models.linen(dataclasses.replace(size, batch=1))
    params, batch = common.example(model)
    like = common.adapter(model, params, batch[0], rank)
    stacked = stacked_like(like, count)
    apply = jlora.apply_lora(model.apply, on_merge="error")

    def loss(trainable: Any, frozen: Any, x: Any, targets: Any) -> jax.Array:
        return common.cross_entropy(apply(frozen, trainable, x), targets)

    def row_losses(params: Any, x: Any, targets: Any) -> jax.Array:
        return jax.vmap(common.cross_entropy)(model.apply(params, x), targets)

    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)
    trainer = jlora.pool.Trainer(row_losses, tx)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(slots: Any, *rest: Any) -> Any:
        losses, slots = trainer.forward_backward(slots, *rest)
        return losses, trainer.optim_step(slots)[0]

    held = trainer.create(one_of(stacked, 0), count)
    add = jax.jit(trainer.add, donate_argnums=0)
    for i in range(count):
        held = add(held, i, one_of(stacked, i), learning_rate=1e-3)
    rows = jax.tree.map(lambda x: x[:, 0], repeated(batch, count))
    ids = jnp.arange(count)
    single, state, rest = common.training_step(loss, one_of(stacked, 0), params, *batch)
    states = {"one": state, "slots": held}

    def one() -> Any:
        for _ in range(count):
            states["one"], value = single(states["one"], *rest)
        return value

    def all_() -> Any:
        value, states["slots"] = step(states["slots"], params, ids, *rows)
        return value

    seconds = common.interleaved({"one": one, "slots": all_}, rounds)
    return {
        "tokens": size.length,
        "width": size.width,
        "adapters": count,
        "seconds": seconds,
        "speed_up": seconds["one"] / seconds["slots"],
    }


def serving(
    size: models.Size,
    rank: int,
    rows: int,
    distinct: Iterable[int],
    rounds: int,
    targets: str = "all-linear",
) -> common.Figures:
    """Returns times of a batch whose rows use so many different adapters."""
    model = models.linen(dataclasses.replace(size, batch=rows))
    params, (x, _) = common.example(model)
    like = common.adapter(model, params, x, rank, targets)
    stacked = stacked_like(like, max(distinct))
    one = one_of(stacked, 0)
    apply = jax.jit(jlora.apply_lora(model.apply, on_merge="error"))
    base = jax.jit(model.apply)
    row_fn = jax.jit(jlora.adapters.per_row(model.apply, on_merge="error"))
    ready = jax.jit(
        lambda frozen, chosen, x: jlora.adapters.per_row(model.apply)(
            frozen, chosen, None, x
        )
    )
    merged = jax.jit(jlora.merge)(params, one)
    read = jax.jit(lambda tree: [leaf.sum() for leaf in jax.tree.leaves(tree)])
    runs: dict[str, Callable[[], Any]] = {
        "merged": lambda: base(merged, x),
        "one shared": lambda: apply(params, one, x),
        f"{rows} read": functools.partial(read, stacked_like(like, rows)),
    }
    for n in distinct:
        ids = jnp.arange(rows) % n
        runs[f"{n} in rows"] = functools.partial(row_fn, params, stacked, ids, x)
        chosen = jax.jit(jlora.adapters.select)(stacked, ids)
        runs[f"{n}, selected before"] = functools.partial(ready, params, chosen, x)
    return {
        "tokens": size.length,
        "width": size.width,
        "rows": rows,
        "targets": targets,
        "factors_over_base": common.nbytes(like) / common.nbytes(params),
        "seconds": common.interleaved(runs, rounds),
    }


def products(
    width: int, rank: int, rows: int, count: int, rounds: int
) -> common.Figures:
    """Returns times of ways to compute `x A_i B_i` for rows of one token."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (rows, width))
    w = jax.random.normal(keys[1], (width, width))
    a = jax.random.normal(keys[2], (count, width, rank))
    b = jax.random.normal(keys[3], (count, rank, width))
    ids = jnp.arange(rows) * count // rows  # sorted already, for free
    sizes = jnp.bincount(ids, length=count)

    def gathered(a: Any, b: Any) -> jax.Array:
        t = jnp.einsum("nd,ndr->nr", x, a[ids])
        return jnp.einsum("nr,nro->no", t, b[ids])

    def ragged(a: Any, b: Any) -> jax.Array:
        return jax.lax.ragged_dot(jax.lax.ragged_dot(x, a, sizes), b, sizes)

    def masked(a: Any, b: Any) -> jax.Array:
        t = jnp.einsum("nd,kdr->nkr", x, a)
        t = t * jax.nn.one_hot(ids, count)[:, :, None]
        return jnp.einsum("nkr,kro->no", t, b)

    forms = {"gathered": gathered, "ragged_dot": ragged, "all, masked": masked}
    runs: dict[str, Callable[[], Any]] = {
        "frozen product": functools.partial(jax.jit(jnp.matmul), x, w)
    }
    for name, form in forms.items():
        runs[name] = functools.partial(jax.jit(form), a, b)
    seconds = common.interleaved(runs, rounds)
    return {"rows": rows, "adapters": count, "width": width, "seconds": seconds}


def pool(size: models.Size, rank: int, capacity: int, swaps: int) -> common.Figures:
    """Returns memory of a full pool, and times to swap, to load, and to reload."""
    model = models.linen(size)
    params, (x, _) = common.example(model)
    like = common.adapter(model, params, x, rank)
    adapter = one_of(stacked_like(like, 1), 0)
    rows = jnp.zeros(x.shape[0], jnp.int32)
    row_fn = jax.jit(jlora.adapters.per_row(model.apply))
    with tempfile.TemporaryDirectory() as folder:
        jlora.checkpoint.save(Path(folder) / "adapter", adapter)
        with ocp.StandardCheckpointer() as files:
            files.save(Path(folder) / "model", params)

        def load(name: str) -> jlora.Trainable:
            return jlora.checkpoint.restore(Path(folder) / "adapter").trainable

        def reload() -> Any:
            with ocp.StandardCheckpointer() as files:
                restored = files.restore(Path(folder) / "model", params)
            return jax.jit(jlora.merge)(restored, load("any"))

        with jlora.pool.Cache(load, like, capacity) as cache:
            held = sum(x.nbytes for x in jax.tree.leaves(cache.pool))
            fitted = jlora.pool.fit(cache.pool, adapter)
            for i in range(capacity):  # full
                cache.put(str(i), fitted)
            jax.block_until_ready(row_fn(params, cache.pool.adapters, rows, x))
            before = row_fn._cache_size(), insert_in_place._cache_size()

            def swap(i: int) -> Any:
                cache.put(f"new {i}", adapter)
                return cache.pool

            times = {
                "swap": median_time(swap, swaps),
                "swap, from disk": median_time(
                    lambda i: (cache.acquire([f"disk {i}"]), cache.pool)[1],
                    max(swaps // 10, 2),
                ),
                "reload": median_time(lambda _: reload(), 3),
            }
            jax.block_until_ready(row_fn(params, cache.pool.adapters, rows, x))
            after = row_fn._cache_size(), insert_in_place._cache_size()
        start = time.perf_counter()
        jax.jit(lambda *args: model.apply(*args)).lower(params, x).compile()
        times["compile the model"] = time.perf_counter() - start
    return {
        "capacity": capacity,
        "width": size.width,
        "layers": size.layers,
        "pool_bytes": held,
        "slot_bytes": jlora.pool.bytes_of(like),
        "base_bytes": common.nbytes(params),
        "seconds": times,
        "compiled": after[0] - before[0] + after[1] - before[1],
    }


def median_time(call: Callable[[int], Any], rounds: int) -> float:
    """Returns the median time of `call(i)`; the first is not counted."""
    times = []
    for i in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(call(i))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def sweep_columns(cases: list[common.Figures]) -> common.Columns:
    """Returns the sweeps for a table."""
    head = (
        *("width", "tokens", "one by one", "in one program", "floor of all"),
        *("faster", "at most", "peak memory"),
    )
    return head, [
        (
            str(c["width"]),
            f"{c['adapters']} × {c['tokens']}",
            f"{c['seconds']['one'] * 1e3:.0f} ms",
            f"{c['seconds']['all'] * 1e3:.0f} ms",
            f"{floor * 1e3:.0f} ms" if floor else "–",
            f"{c['speed_up']:.2f}",
            common.fixed(floor and c["seconds"]["one"] / floor, 2),
            f"{nbytes(c['peak_bytes']['one'])} → {nbytes(c['peak_bytes']['all'])}",
        )
        for c in cases
        for floor in (c["seconds"].get("floor"),)  # not in older figures
    ]


def slot_columns(cases: list[common.Figures]) -> common.Columns:
    """Returns the slots that train for a table."""
    head = ("width", "tokens", "one by one", "in slots", "faster")
    return head, [
        (
            str(c["width"]),
            f"{c['adapters']} × {c['tokens']}",
            f"{c['seconds']['one'] * 1e3:.0f} ms",
            f"{c['seconds']['slots'] * 1e3:.0f} ms",
            f"{c['speed_up']:.2f}",
        )
        for c in cases
    ]


def serving_columns(cases: list[common.Figures]) -> common.Columns:
    """Returns the mixed batches for a table, beside one shared adapter."""
    names = [n for n in cases[0]["seconds"] if n != "one shared"]
    head = ("width", "adapted", "rows × tokens", *names)
    return head, [
        (
            str(c["width"]),
            "all linear" if c["targets"] == "all-linear" else "q, v",
            f"{c['rows']} × {c['tokens']}",
            *(f"{c['seconds'][n] / c['seconds']['one shared']:.2f}" for n in names),
        )
        for c in cases
    ]


def product_columns(cases: list[common.Figures]) -> common.Columns:
    """Returns the ways to multiply for a table, beside the frozen product."""
    names = list(cases[0]["seconds"])
    head = ("rows", "adapters", *names[1:])
    return head, [
        (
            str(c["rows"]),
            str(c["adapters"]),
            *(f"{c['seconds'][n] / c['seconds'][names[0]]:.2f}" for n in names[1:]),
        )
        for c in cases
    ]


def pool_columns(found: common.Figures) -> common.Columns:
    """Returns the pool's figures for a table."""
    times = found["seconds"]
    lines = [
        (name, f"{own * 1e3:.2f} ms", f"{own / times['reload']:.2%}")
        for name, own in times.items()
    ]
    return ("what", "time", "of a reload"), lines


def main() -> None:
    """Measures the parts that are asked for; figures of the others stay in the file."""
    parser = common.parser("adapters", __doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--width", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=8, help="of a sweep")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 64])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--row-tokens", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--capacity", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="start again, and tell glibc to keep the memory of a step for the next",
    )
    options = parser.parse_args()
    if options.keep_memory and not os.environ.items() >= KEEP.items():
        command = [sys.executable, "-m", "benchmarks.adapters", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | KEEP)
    figures: common.Figures = {}
    if options.json.exists():
        figures = json.loads(options.json.read_text())
        del figures["environment"]
    out = figures.setdefault("memory kept", {}) if options.keep_memory else figures
    if "sweep" in options.part:
        out["sweep"] = []
        for width in options.width:
            for tokens in options.tokens:
                length = min(tokens, 128)
                size = models.Size(
                    width, options.layers, batch=tokens // length, length=length
                )
                case = (size, options.rank, options.adapters, options.rounds)
                out["sweep"].append(sweep(*case))
        print(common.show(sweep_columns(out["sweep"]), 0))
    if "slots" in options.part:
        out["slots"] = [
            slots(
                models.Size(width, options.layers, length=64),
                options.rank,
                options.adapters,
                options.rounds,
            )
            for width in options.width
        ]
        print(common.show(slot_columns(out["slots"]), 0))
    if "serving" in options.part:
        distinct = [n for n in (1, 4, 32) if n <= options.rows]
        out["serving"] = [
            serving(
                models.Size(width, options.layers, length=tokens),
                options.rank,
                options.rows,
                distinct,
                options.rounds,
                targets,
            )
            for targets in TARGETS
            for width in options.width
            for tokens in options.row_tokens
        ]
        print(common.show(serving_columns(out["serving"]), 0))
    if "products" in options.part:
        out["products"] = [
            products(options.width[-1], options.rank, rows, count, options.rounds)
            for rows in (options.rows, 8 * options.rows)
            for count in (4, 16)
        ]
        print(common.show(product_columns(out["products"]), 0))
    if "pool" in options.part:
        size = models.Size(options.width[-1], options.layers, batch=1, length=16)
        out["pool"] = pool(size, options.rank, options.capacity, 50)
        found = out["pool"]
        print(
            f"{found['capacity']} adapters of {nbytes(found['slot_bytes'])} take "
            f"{nbytes(found['pool_bytes'])}, the base {nbytes(found['base_bytes'])}; "
            f"swaps compiled {found['compiled']} programs"
        )
        print(common.show(pool_columns(found)))
    common.write(options.json, common.environment(), **figures)


if __name__ == "__main__":
    main()
