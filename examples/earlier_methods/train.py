"""The command: trains the rows that the result files lack, and prints tables."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from examples.sentiment.assets import AssetError

from . import report, run
from .rows import RATES, ROWS, SEEDS, TABLES
from .task import load_task


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the flags in `argv`, by default those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.earlier_methods",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    names = ", ".join(TABLES)
    add("table", nargs="*", help=f"which of {names}; all if none is named")
    add("--task", choices=list(ROWS), nargs="*", default=list(ROWS))
    add("--rows", nargs="*", help="only these rows of the tables")
    add("--rates", type=float, nargs="+", default=list(RATES))
    add("--seeds", type=int, nargs="+", default=list(SEEDS))
    add("--results", type=Path, default=run.RESULTS, help="JSON lines, one file a task")
    cache = Path(platformdirs.user_cache_dir("jlora"))
    add("--cache", type=Path, default=cache, help="downloads stay here")
    flags = parser.parse_args(argv)
    if unknown := [name for name in flags.table if name not in TABLES]:
        parser.error(f"no table is called {', '.join(unknown)}; there are {names}")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing; each row is written when it ends, so a run can go on."""
    flags = parse(argv)
    try:
        for name in flags.task:
            train(name, flags)
    except AssetError as error:
        sys.exit(str(error))
    print(report.text(flags.results, flags.table or TABLES))


def train(name: str, flags: argparse.Namespace) -> None:
    """Trains the missing rows of one task."""
    path = flags.results / f"{name}.jsonl"
    wanted = {
        row: own
        for row, own in ROWS[name].items()
        if not flags.table or {*flags.table} & {*own.tables}
        if not flags.rows or row in flags.rows
    }
    todo = list(run.missing(wanted, run.read(path), flags.rates, flags.seeds))
    if not todo:
        return
    task = load_task(name, flags.cache)
    for i, (row, own) in enumerate(todo):
        print(f"{name}: row {i + 1} of {len(todo)}, {row}", flush=True)
        figures = run.run(row, own, task, rates=flags.rates, seeds=flags.seeds)
        others = [f for f in run.read(path) if f["row"] != row]
        run.write(path, [*others, figures])
        scores = figures["test"]["score"]
        print(
            f"   rate {figures['rate']:g}, test {scores}, {figures['seconds']:.0f} s",
            flush=True,
        )
