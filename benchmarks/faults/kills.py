"""What do writers leave when they are killed: the old state, the new one, or neither?

    python -m benchmarks.faults.kills --kills 60 --seconds 600

Each writer replaces state 1 by state 2 in a process of its own, which is killed at one
of its file operations (drawn, none twice before all had their turn), or at a random
time. Then another process reads what is there: it must be all of state 1 or all of
state 2. After that, a save of state 3 must succeed, be read, and leave nothing of the
killed one.

*Lost* is what cannot be read, although state 1 was there. *Stuck* is a place to which
nothing can be saved any more.
"""

import argparse
import collections
import contextlib
import functools
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np

import jlora
from jlora._tables import table
from jlora.factors import Axes, Factors, Spec

Place = pathlib.Path
OUTCOMES = ("old", "new", "mixture", "lost", "left over", "stuck")
SIDE = 48
# Operations on files, as Python tells them to its audit hooks.
EVENTS = {
    "open",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "os.scandir",
    "os.listdir",
    "shutil.rmtree",
    "fcntl.flock",
    "ctypes.dlsym",
}


def adapter(n: int, rank: int | None = None) -> jlora.Trainable:
    """Returns an adapter all of whose numbers are n, of rank n if not said."""
    rank = rank or n
    spec = Spec(rank=rank, alpha=float(n), axes=Axes((), (0,), (1,)))
    a, b = np.full((SIDE, rank), n, "f4"), np.full((rank, SIDE), n, "f4")
    return jlora.Trainable({f"m{i}/kernel": Factors(a, b, spec) for i in range(4)})


def params(n: int, shape: tuple[int, ...] = (SIDE, SIDE)) -> dict[str, object]:
    """Returns a model all of whose numbers are n."""
    return {f"m{i}": {"kernel": np.full(shape, n, "f4")} for i in range(4)}


def state(tree: object) -> int:
    """Returns the one number that all leaves hold, 0 if they hold several."""
    import jax

    found = {float(x) for leaf in jax.tree.leaves(tree) for x in np.unique(leaf)}
    return int(found.pop()) if len(found) == 1 else 0


def _base(place: Place) -> Place:
    """Returns the base of `merge_files`: zeros, and a factor of 1 makes n."""
    return place.parent.parent / "base.safetensors"


def _merge(place: Place, n: int) -> None:
    one = Spec(rank=1, alpha=1.0, axes=Axes((), (0,), (1,)))
    a, b = np.full((SIDE, 1), n, "f4"), np.ones((1, SIDE), "f4")
    own = {f"m{i}/kernel": Factors(a, b, one) for i in range(4)}
    jlora.export.merge_files(_base(place), jlora.Trainable(own), place)


def _flat(place: Place) -> int:
    from jlora._io.models import open_model

    model = open_model(place)
    return state({name: model.read(name) for name in model.shapes})


def _peft(place: Place) -> int:
    adapter = jlora.peft.load(place, params(0))
    alphas = {f.spec.alpha / f.spec.rank for f in adapter.lora.values()}
    assert alphas == {1.0} or state(adapter) == 0, alphas
    return state(adapter)


def _base_of(place: Place) -> int:
    return state(jlora.peft.load_base(place, params(0)))


def _peft_same(place: Place) -> int:
    return state(jlora.peft.load(place, params(0)))


def _steps(place: Place) -> int:
    read = jlora.checkpoint.restore(place)
    return state(read.trainable) if state(read.trainable) == read.metadata else 0


def _next_step(place: Place, n: int) -> None:
    with jlora.checkpoint.Checkpoints(place, keep=2) as ckpts:
        ckpts.save(adapter(n), step=n, metadata=n)


def _sharded(n: int) -> int | None:
    """Returns how large shards are: state 2 changes between one file and several."""
    return None if n == 2 else 12_000


Write = Callable[[Place, int], object]
WRITERS: dict[str, tuple[Write, Callable[[Place], int]]] = {
    "jlora.save": (
        lambda p, n: jlora.save(p, adapter(n)),
        lambda p: state(jlora.load(p)),
    ),
    "peft.save": (lambda p, n: jlora.peft.save(p, adapter(n, 4)), _peft_same),
    "peft.save, other ranks": (lambda p, n: jlora.peft.save(p, adapter(n)), _peft),
    "peft.save, shards": (
        lambda p, n: jlora.peft.save(p, adapter(n), max_shard_bytes=500),
        _peft,
    ),
    "peft.save, one file to shards": (
        lambda p, n: jlora.peft.save(p, adapter(n), max_shard_bytes=500 * (n - 1)),
        _peft,
    ),
    "save_base": (lambda p, n: jlora.peft.save_base(p, params(n)), _base_of),
    "save_base, shards": (
        lambda p, n: jlora.peft.save_base(p, params(n), max_shard_bytes=12_000),
        _base_of,
    ),
    "save_base, shards to one file": (
        lambda p, n: jlora.peft.save_base(p, params(n), max_shard_bytes=_sharded(n)),
        _base_of,
    ),
    "export.safetensors": (
        lambda p, n: jlora.export.safetensors(p, params(n)),
        _flat,
    ),
    "merge_files": (_merge, _flat),
    "export.orbax": (
        lambda p, n: jlora.export.orbax(p, params(n), overwrite=True),
        _flat,
    ),
    "checkpoint.save, overwrite": (
        lambda p, n: jlora.checkpoint.save(p, adapter(n), metadata=n, overwrite=True),
        _steps,
    ),
    "Checkpoints.save": (_next_step, _steps),
}


def child(run: Callable[[], int], kill_after: float | None = None) -> int:
    """Returns what `run` returns in a process of its own; -1 if that does not end well.

    It is killed after some seconds, if they are given, and in any case after a minute.
    """
    pid = os.fork()
    if not pid:
        code = 255
        with contextlib.suppress(BaseException):
            code = run()
        os._exit(code)
    end = time.monotonic() + (60 if kill_after is None else kill_after)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if 0 <= code < 255 else -1
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -1
        time.sleep(0.001)


def saved(write: Callable[..., object], *args: object) -> int:
    """Writes, and returns 0."""
    write(*args)
    return 0


def killed_at(at: int, write: Write, place: Place) -> int:
    """Writes state 2, and kills this process at its file operation number `at`."""

    def count(seen: int) -> None:
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    _count(count)
    return saved(write, place, 2)


def _count(tell: Callable[[int], object]) -> None:
    """Calls `tell` before each operation on files, with its number."""
    seen = 0

    def hook(event: str, args: object) -> None:
        nonlocal seen
        if event in EVENTS:
            seen += 1
            tell(seen)

    sys.addaudithook(hook)


def operations(write: Write, place: Place) -> tuple[int, float]:
    """Returns how many operations on files a save of state 2 has, and its seconds."""
    one, other = os.pipe()

    def run() -> int:
        _count(lambda seen: os.write(other, b"."))
        return saved(write, place, 2)

    start = time.monotonic()
    assert child(run) == 0
    seconds = time.monotonic() - start
    os.close(other)
    with open(one, "rb") as pipe:
        return len(pipe.read()), seconds


def outcome(place: Place, name: str) -> str:
    """Returns what a kill has left at a place, in a word."""
    write, read = WRITERS[name]

    def look() -> int:
        found = 9
        with contextlib.suppress(jlora.errors.JloraError):
            found = read(place)
        with contextlib.suppress(jlora.errors.JloraError):
            write(place, 3)
            return 2 * found + (read(place) == 3)
        return 2 * found

    found, saves = divmod(child(look), 2)
    if found not in (1, 2):
        return "mixture" if found == 0 else "lost"
    if not saves:
        return "stuck"
    return "left over" if left_over(place) else ("old", "new")[found - 1]


def left_over(place: Place) -> list[str]:
    """Returns what is there besides one save."""
    names = [p.name for p in place.parent.iterdir() if p != place]
    if place.is_dir():
        names += [p.name for p in place.iterdir() if p.name.startswith(".")]
        names += [p.name for p in place.iterdir() if "tmp" in p.name]
        index = "".join(file.read_text() for file in place.glob("*.index.json"))
        shards = [file.name for file in place.glob("*-of-*.safetensors")]
        names += [name for name in shards if name not in index]
    return names


def kills(name: str, folder: Place, count: int, seed: int) -> Iterator[str]:
    """Yields the outcome of each of so many kills of a writer."""
    write, _ = WRITERS[name]
    whole, place = folder / "whole" / "x", folder / "killed" / "x"
    whole.parent.mkdir(parents=True)
    assert child(functools.partial(saved, write, whole, 1)) == 0, name
    shutil.copytree(whole.parent, place.parent)
    total, took = operations(write, place)
    draw = random.Random(f"{name} {seed}")
    # All of them, where the kills reach.
    at = draw.sample(range(1, total + 1), total)
    for i in range(count):
        shutil.rmtree(place.parent)
        shutil.copytree(whole.parent, place.parent)
        if i % 3 == 2:
            child(functools.partial(saved, write, place, 2), draw.uniform(0, took))
        else:
            number = at[(i - i // 3) % total]
            child(functools.partial(killed_at, number, write, place))
        yield outcome(place, name)


def campaign(
    names: list[str], count: int, seconds: float, seed: int = 0
) -> dict[str, collections.Counter[str]]:
    """Returns how often each writer left what."""
    found = {}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as top:
        prepare(Place(top))
        for i, name in enumerate(names):
            found[name] = collections.Counter[str]()
            share = time.monotonic() + (end - time.monotonic()) / (len(names) - i)
            for what in kills(name, Place(top) / str(i), count, seed):
                found[name][what] += 1
                if time.monotonic() > share:
                    break
            print(name, dict(found[name]), file=sys.stderr, flush=True)
    return found


def prepare(folder: Place) -> None:
    for i in range(len(WRITERS)):
        base = folder / str(i) / "base.safetensors"
        base.parent.mkdir()
        child(functools.partial(saved, jlora.export.safetensors, base, params(0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="of each writer")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writer", nargs="*", default=list(WRITERS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = campaign(options.writer, options.kills, options.seconds, options.seed)
    lines = [
        (name, str(sum(n.values())), *(str(n[key]) for key in OUTCOMES))
        for name, n in found.items()
    ]
    columns = range(1, len(OUTCOMES) + 2)
    sums = [str(sum(int(line[i]) for line in lines)) for i in columns]
    print(table(("writer", "kills", *OUTCOMES), [*lines, ("all", *sums)]))


if __name__ == "__main__":
    main()
