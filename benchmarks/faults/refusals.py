"""What do writers do on a full disk, without permission, and beside another writer?

    python -m benchmarks.faults.refusals [--times 20] [--seed 0]

Each writer replaces state 1 by state 2 in a process of its own. *Full*: no file may
grow over a size that is drawn anew each time. *Read-only*: the process runs as a user
who may not write there (only where this script runs as root). *Beside*: another process
writes state 3 at the same time. Each must write its state, or raise an error of jlora's
and leave what was there. It ends with 1 after anything else.
"""

import argparse
import collections
import functools
import importlib
import os
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable

import jlora
from jlora._tables import table

from .kills import WRITERS, Write, child, prepare, saved

Place = pathlib.Path
NOBODY = 65534
FAULTS = ("full", "read-only", "beside")
OUTCOMES = ("written", "refused, old state", "fault")


def tried(write: Write, place: Place, n: int, before: Callable[[], object]) -> int:
    """Writes state n; returns 0 if it is written, 1 after an error of jlora's."""
    before()
    try:
        return saved(write, place, n)
    except jlora.errors.JloraError:
        return 1


def limit(size: int) -> None:
    """Lets no file of this process grow over `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def demote(write: Write, scratch: Place) -> None:
    """Becomes a user who may write nowhere, and may not read Python's files either.

    So it first saves at `scratch`, which imports all that the writer needs.
    """
    scratch.parent.mkdir(parents=True, exist_ok=True)
    write(scratch, 1)
    os.setuid(NOBODY)


def state_of(name: str, place: Place) -> int:
    """Returns which state is at `place`, 9 if none can be read."""
    _, read = WRITERS[name]
    return child(functools.partial(read, place))


def once(name: str, fault: str, place: Place, draw: random.Random) -> str:
    """Returns what became of one save, in a word of `OUTCOMES`."""
    write, _ = WRITERS[name]
    if fault == "beside":
        pid = os.fork()
        if not pid:
            os._exit(tried(write, place, 3, lambda: None))
        code = child(functools.partial(tried, write, place, 2, lambda: None))
        other = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        wanted = [n for n, done in ((2, code), (3, other)) if done == 0] or [1]
        good = {code, other} <= {0, 1} and state_of(name, place) in wanted
        return "fault" if not good else "written" if code == 0 else OUTCOMES[1]
    size = draw.choice([0, 1, 100, draw.randrange(1, 40_000)])
    before = functools.partial(limit, size)
    if fault == "read-only":
        before = functools.partial(demote, write, place.parents[1] / "scratch" / "x")
    code = child(functools.partial(tried, write, place, 2, before))
    found = state_of(name, place)
    if (code, found) in ((0, 2), (1, 1)):
        return OUTCOMES[code]
    return "fault"


def campaign(
    names: list[str], times: int, seed: int = 0
) -> dict[tuple[str, str], collections.Counter[str]]:
    """Returns how often each writer did what under each fault."""
    found = {}
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        prepare(Place(top))
        for i, name in enumerate(names):
            whole, place = (
                Place(top, str(i), "whole", "x"),
                Place(top, str(i), "x", "x"),
            )
            whole.parent.mkdir(parents=True)
            assert child(functools.partial(saved, WRITERS[name][0], whole, 1)) == 0, (
                name
            )
            for fault in FAULTS:
                if fault == "read-only" and os.getuid():
                    continue
                counts = found[name, fault] = collections.Counter[str]()
                draw = random.Random(f"{name} {fault} {seed}")
                for _ in range(times):
                    shutil.rmtree(place.parent, ignore_errors=True)
                    shutil.copytree(whole.parent, place.parent)
                    counts[once(name, fault, place, draw)] += 1
                print(name, fault, dict(counts), file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Runs all writers and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--times", type=int, default=20, help="of each writer and fault"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writer", nargs="*", default=list(WRITERS))
    options = parser.parse_args()
    # What an error imports: the user who may not write may not read Python's files.
    importlib.import_module("timeit")
    importlib.import_module("orbax.checkpoint")
    warnings.simplefilter("ignore")
    found = campaign(options.writer, options.times, options.seed)
    lines = [
        (*key, *(str(counts[outcome]) for outcome in OUTCOMES))
        for key, counts in found.items()
    ]
    print(table(("writer", "what is wrong", *OUTCOMES), lines))
    sys.exit(any(counts["fault"] for counts in found.values()))


if __name__ == "__main__":
    main()
