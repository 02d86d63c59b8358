"""Does a pool stay right and steady while threads swap adapters and much goes wrong?

Eight threads ask for random batches, put, drop and prefetch. Some adapters cannot be
had, some loaders sleep, fail or exit, and some insertions run out of memory or are
interrupted. Every row that comes back is compared with what its adapter must give.
Then one thread swaps 10,000 times, and the resident memory of the process is noted.

    python -m benchmarks.faults.soak --seconds 180

The draws of each thread are seeded. How threads take turns is not.
"""

import collections
import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.factors import Factors, Spec, Trainable
from jlora.pool import _cache

from .. import common

WIDTH, RANK, LEAVES, CAPACITY = 64, 4, 4, 6
GOOD = [f"good {i}" for i in range(1, 25)]
BAD = ["missing", "nan", "infinite", "large rank", "other weight", "no adapter", "exit"]
FLAKY = [f"flaky {i}" for i in range(1, 5)]
INSERTIONS = "insert_in_place", "insert_into_copy"


class InjectedError(Exception):
    """A fault that this script made."""


def adapter(number: float, rank: int = RANK, leaf: str = "w") -> Trainable:
    """Returns an adapter that adds `number` times the mean of x to each output."""
    a = np.full((WIDTH, rank), number / rank / WIDTH, np.float32)
    b = np.ones((rank, WIDTH), np.float32)
    spec = Spec(rank=rank, alpha=float(rank))
    return Trainable({f"{leaf}{i}": Factors(a, b, spec) for i in range(LEAVES)})


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.stack([x @ params[f"w{i}"] for i in range(LEAVES)], axis=1)


@dataclasses.dataclass
class World:
    """What all threads share."""

    rng: np.random.Generator
    versions: dict[str, int] = dataclasses.field(default_factory=dict)
    counts: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    notes: list[str] = dataclasses.field(default_factory=list)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    acquired: list[float] = dataclasses.field(default_factory=list)  # seconds, of swaps

    def chance(self, share: float) -> bool:
        with self.lock:
            return bool(self.rng.random() < share)

    def count(self, what: str, n: int = 1) -> None:
        with self.lock:
            self.counts[what] += n

    def wrong(self, what: str, text: str) -> None:
        with self.lock:
            self.counts[what] += 1
            if len(self.notes) < 5:
                self.notes.append(text)

    def number(self, name: str) -> float:
        """Returns what the adapter of this name adds; 0 for the base."""
        if name in self.versions:
            return float(self.versions[name])
        return float(name.rsplit(" ", 1)[1])

    def load(self, name: str) -> Any:
        """Loads like a server's loader on a bad day."""
        if self.chance(0.2):
            time.sleep(0.002 * (1 + len(name) % 5))
        if name == "missing":
            raise FileNotFoundError(name)
        if name == "exit":
            raise SystemExit(1)
        if name.startswith("flaky") and self.chance(0.5):
            raise InjectedError("the loader failed")
        bad = {
            "nan": lambda: adapter(np.nan),
            "infinite": lambda: adapter(np.inf),
            "large rank": lambda: adapter(1.0, rank=RANK + 1),
            "other weight": lambda: adapter(1.0, leaf="v"),
            "no adapter": lambda: {"w0": 1.0},
        }
        return bad[name]() if name in bad else adapter(self.number(name))


@contextlib.contextmanager
def failing_insertions(world: World, share: float) -> Iterator[None]:
    """Lets a share of insertions fail, before or after they used up the pool."""
    real = {name: getattr(_cache, name) for name in INSERTIONS}

    def failing(name: str) -> Callable[..., Any]:
        def insert(pool: Any, slot: Any, trainable: Any) -> Any:
            if not world.chance(share):
                return real[name](pool, slot, trainable)
            if name == "insert_in_place" and world.chance(0.3):
                jax.tree.map(lambda x: x.delete(), pool)
                world.count("pools used up by a failure")
            if world.chance(0.3):
                raise KeyboardInterrupt
            raise InjectedError("RESOURCE_EXHAUSTED: Out of memory")

        return insert

    for name in INSERTIONS:
        setattr(_cache, name, failing(name))
    try:
        yield
    finally:
        for name in INSERTIONS:
            setattr(_cache, name, real[name])


@dataclasses.dataclass
class Server:
    """One thread: its random requests, and what they must give."""

    number: int
    world: World
    cache: jlora.pool.Cache
    row_fn: Callable[..., jax.Array]
    params: Any
    rng: np.random.Generator

    def run(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            try:
                self.step()
            except KeyboardInterrupt:  # injected
                self.world.count("calls interrupted")
            except InjectedError:  # of `put`
                self.world.count("puts that failed")
            except BaseException as error:
                self.world.wrong("errors of other kinds", repr(error)[:300])

    def step(self) -> None:
        draw = self.rng.random()
        if draw < 0.8:
            self.serve()
        elif draw < 0.88:
            self.put()
        elif draw < 0.93:
            self.cache.drop(self.name())
        else:
            self.cache.prefetch([self.name() for _ in range(self.rng.integers(1, 20))])

    def name(self) -> str:
        group = self.rng.choice(4, p=[0.7, 0.1, 0.1, 0.1])
        names = (GOOD, FLAKY, BAD, [f"own {self.number}"])[group]
        return str(self.rng.choice(names))

    def put(self) -> None:
        """Puts the next version of the adapter that only this thread uses."""
        own = f"own {self.number}"
        self.world.versions[own] += 1
        # Until it is in, the version before it may still be served.
        self.cache.drop(own)
        self.cache.put(own, adapter(self.world.number(own)))

    def serve(self) -> None:
        size = 4
        asked = [self.name() if self.rng.random() < 0.9 else None for _ in range(size)]
        x = self.rng.normal(size=(size, WIDTH)).astype(np.float32)
        missing = not all(map(self.cache.ready, asked))
        start = time.perf_counter()
        batch = self.cache.acquire(asked)
        if missing:
            self.world.acquired.append(time.perf_counter() - start)
        held = batch if self.rng.random() < 0.5 else contextlib.nullcontext()
        with held:
            out = np.asarray(self.row_fn(self.params, batch.adapters, batch.ids, x))
        for row, name in enumerate(asked):
            self.check(name, out[row], x[row], batch.errors.get(row))

    def check(self, name: str | None, out: Any, x: Any, error: Any) -> None:
        if error is not None:
            kind = type(error).__name__
            allowed = isinstance(error, InjectedError) or name in BAD
            if not allowed or not np.isnan(out).all():
                self.world.wrong("wrong rows", f"{name}: {error!r}"[:300])
            self.world.count(f"rows with an error, {kind}")
            return
        expected = 0.0 if name is None else self.world.number(name) * x.mean()
        if name in BAD or not np.allclose(out, expected, rtol=1e-4, atol=1e-4):
            self.world.wrong("wrong rows", f"{name}: {out.ravel()[0]}, not {expected}")
        self.world.count("rows served")


def under_load(
    seconds: float, threads: int, seed: int, progress: TextIO | None
) -> common.Figures:
    """Returns what happened while threads served, swapped and failed."""
    world = World(np.random.default_rng(seed))
    world.versions = {f"own {i}": 1 for i in range(threads)}
    params = {f"w{i}": jnp.zeros((WIDTH, WIDTH)) for i in range(LEAVES)}
    row_fn = jax.jit(jlora.adapters.per_row(model))
    with jlora.pool.Cache(world.load, adapter(0.0), CAPACITY) as cache:
        batch = cache.acquire([GOOD[0]] * 4)
        jax.block_until_ready(  # compile
            row_fn(params, batch.adapters, batch.ids, np.zeros((4, WIDTH), np.float32))
        )
        before, begin = resident(), time.monotonic()
        servers = [
            Server(i, world, cache, row_fn, params, np.random.default_rng([seed, i]))
            for i in range(threads)
        ]
        running = [
            threading.Thread(target=s.run, args=(begin + seconds,), daemon=True)
            for s in servers
        ]
        with failing_insertions(world, 0.02):
            for thread in running:
                thread.start()
            while time.monotonic() < begin + seconds:
                time.sleep(min(5.0, max(0.0, begin + seconds - time.monotonic())))
                show_progress(progress, time.monotonic() - begin, world)
            for thread in running:
                thread.join(60)
        stuck = sum(thread.is_alive() for thread in running)
        whole = not stuck and not cache.acquire(GOOD[:CAPACITY]).errors
        return {
            "threads": threads,
            "counts": dict(world.counts),
            "wrong_rows": world.counts["wrong rows"],
            "other_errors": world.counts["errors of other kinds"],
            "notes": world.notes,
            "stuck_threads": stuck,
            "lost_slots": 0 if whole else CAPACITY - len(cache.resident),
            "waiting": len(cache._loading),
            "copies": cache.copies,
            "swaps": len(world.acquired),
            "seconds": quantiles(world.acquired),
            "resident": [before, resident()],
        }


def show_progress(progress: TextIO | None, elapsed: float, world: World) -> None:
    if progress is not None:
        with world.lock:
            rows, wrong = world.counts["rows served"], world.counts["wrong rows"]
        line = f"{elapsed:6.0f} s  {rows:9,} rows, {wrong} wrong, {resident():,} bytes"
        print(line, file=progress, flush=True)


def swaps(
    count: int, seconds: float, capacity: int, progress: TextIO | None
) -> common.Figures:
    """Returns times and resident memory of swaps by one thread; nothing fails."""
    adapters = [adapter(float(i)) for i in range(8)]
    taken, memory = [], []
    deadline = time.monotonic() + seconds
    with jlora.pool.Cache(adapters.__getitem__, adapters[0], capacity) as cache:
        for i in range(count):
            if i % max(1, count // 20) == 0:
                memory.append(resident())
                if progress is not None:
                    print(f"{i:9,} swaps, {memory[-1]:,} bytes", file=progress)
            start = time.perf_counter()
            cache.put(f"{i}", adapters[i % 8])
            jax.block_until_ready(cache.pool.adapters)
            taken.append(time.perf_counter() - start)
            if time.monotonic() > deadline:
                break
        memory.append(resident())
        return {
            "swaps": len(taken),
            "capacity": capacity,
            "slot_bytes": jlora.pool.bytes_of(adapters[0]),
            "copies": cache.copies,
            "seconds": quantiles(taken[len(taken) // 20 :]),
            "resident": memory,
        }


def resident() -> int:
    """Returns the bytes of this process that are in memory; 0 where that is unknown."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("VmRSS")]
    return 1024 * int(found[0]) if found else 0


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Returns the median, the 99th percentile and the largest."""
    if not seconds:
        return {}
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    return {"p50": float(p50), "p99": float(p99), "max": max(seconds)}


def columns(load: common.Figures, alone: common.Figures) -> common.Columns:
    """Returns all figures for a table."""

    def ms(times: dict[str, float]) -> str:
        return " / ".join(f"{1e3 * t:.2f}" for t in times.values())

    def mib(memory: list[int]) -> str:
        return f"{memory[0] / 2**20:.0f} → {memory[-1] / 2**20:.0f}"

    lines = [
        *((what, f"{n:,}") for what, n in sorted(load["counts"].items())),
        ("wrong rows, of all", f"{load['wrong_rows']:,}"),
        ("errors of other kinds, of all", f"{load['other_errors']:,}"),
        ("threads that hang", str(load["stuck_threads"])),
        ("slots lost", str(load["lost_slots"])),
        ("prefetched adapters left", str(load["waiting"])),
        ("swaps that copied the pool", f"{load['copies']:,}"),
        ("batches with a swap", f"{load['swaps']:,}"),
        ("… p50 / p99 / longest, ms", ms(load["seconds"])),
        ("resident memory, MiB", mib(load["resident"])),
        ("swaps by one thread", f"{alone['swaps']:,}"),
        ("… p50 / p99 / longest, ms", ms(alone["seconds"])),
        ("… resident memory, MiB", mib(alone["resident"])),
    ]
    return ("what", "figure"), lines


def failed(load: common.Figures) -> bool:
    """Returns whether something was not as promised."""
    wrong = ("wrong_rows", "other_errors", "stuck_threads", "lost_slots")
    return any(load[name] for name in wrong)


def main() -> None:
    parser = common.parser("faults.soak", __doc__)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--swaps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    env = common.environment()
    load = under_load(args.seconds * 0.75, args.threads, args.seed, sys.stderr)
    alone = swaps(args.swaps, args.seconds * 0.25, 32, sys.stderr)
    print(common.show(columns(load, alone)))
    for note in load["notes"]:
        print(note)
    common.write(args.json, env, under_load=load, alone=alone)
    sys.exit(1 if failed(load) else 0)


if __name__ == "__main__":
    main()
