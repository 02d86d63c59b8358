"""What does a training step cost in jlora, in other LoRA libraries, and at the floor?

Each peer is a script, `peer_<name>.py`, and runs alone in an environment that is made
for it. All train the same model from the same weights, factors and batches, and their
losses are compared. In each round every peer runs once; ratios are taken within a
round, and what is shown are medians over the rounds.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jlora._tables import table

from ..common import STRICT, commit, processor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = Path.home() / ".cache" / "jlora-bench"

# Of the caller's environment; peers see them, and the record says so.
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "XLA_FLAGS")

JAX = ("jax==0.10.2", "jaxlib==0.10.2", "numpy==2.4.6", "optax==0.2.8")
JLORA = (*JAX, "flax==0.12.8", "orbax-checkpoint==0.12.8", "safetensors==0.8.0")
# An index with builds for CPU serves torch 2.13.0+cpu for this; elsewhere comes the
# build for CUDA, which runs on CPU too.
PEFT = ("numpy==2.4.6", "torch==2.13.0", "peft==0.21.2")


@dataclasses.dataclass(frozen=True)
class Peer:
    """One line of the comparison.

    Attributes:
      title: its name in the table.
      packages: what its environment needs.
      alone: packages whose own requirements are left out; `packages` has what the
        script imports.
      adapts: it trains the shared factors, so its losses must be the same.
    """

    title: str
    packages: tuple[str, ...] = JLORA
    alone: tuple[str, ...] = ()
    adapts: bool = True


PEERS = {
    "floor": Peer(STRICT, adapts=False),
    "jlora": Peer("jlora"),
    "manual": Peer("by hand, autodiff"),
    "manual_2d": Peer("by hand, autodiff, tokens flattened"),
    "merged": Peer("merged on the fly"),
    "full": Peer("full fine-tuning", adapts=False),
    "qwix_linen": Peer("qwix, Linen", (*JAX, "flax==0.12.8", "qwix==0.1.8")),
    "qwix_nnx": Peer("qwix, NNX", (*JAX, "flax==0.12.8", "qwix==0.1.8")),
    "flax": Peer("flax nnx.LoRA", (*JAX, "flax==0.12.8")),
    "gemma": Peer(
        "gemma.peft",
        (*JAX, "flax==0.12.8", "etils[epy]==1.15.0", "einops==0.8.2"),
        alone=("gemma==3.3.0",),  # asks for TensorFlow Datasets and a cloud's clients
    ),
    "keras": Peer("keras enable_lora", (*JAX, "keras==3.15.1")),
    "quax": Peer("quax LoraArray", (*JAX, "quax==0.4.6", "equinox==0.13.8")),
    "mlorax": Peer("mlorax", (*JAX, "flax==0.12.8", "mlorax==0.9.5")),
    "penzai": Peer("penzai toolshed.lora", (*JAX, "penzai==0.2.5")),
    "peft": Peer("PEFT, PyTorch", PEFT),
    "peft_compiled": Peer("PEFT, PyTorch, compiled", PEFT),
}


class PeerError(Exception):
    """A peer cannot be installed or fails to run; the message is one line."""


def run(command: Sequence[str | Path], **kwargs: Any) -> str:
    """Returns what `command` prints; raises PeerError with its last line on failure."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, **kwargs
        )
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"took over {error.timeout:.0f} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise PeerError(without_paths(last))
    return done.stdout


def without_paths(text: str) -> str:
    """Returns `text` without the folders that it names.

    Examples:
      >>> without_paths("no file /home/someone/.cache/x/lib.so: error")
      'no file …/lib.so: error'
    """
    return re.sub(r"(?:/[\w.+@~-]+)+/", "…/", text)


def environment(peer: Peer, cache: Path, timeout: float) -> Path:
    """Returns the Python of an environment for `peer`, made if there is none."""
    alone = [f"{package}  # alone" for package in peer.alone]
    wanted = "\n".join(
        (f"# Python {platform.python_version()}", *peer.packages, *alone)
    )
    folder = cache / hashlib.sha256(wanted.encode()).hexdigest()[:12]
    python = folder / "bin" / "python"
    done = folder / "requirements.txt"  # written last
    if not done.exists():
        run([sys.executable, "-m", "venv", "--clear", folder])
        pip = [python, "-m", "pip", "install", "--quiet", "--no-input"]
        run([*pip, *peer.packages], timeout=timeout)
        if peer.alone:
            run([*pip, "--no-deps", *peer.alone], timeout=timeout)
        done.write_text(wanted)
    return python


def environments(options: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """Returns the Python of each peer, and why others have none."""
    if options.here:
        return dict.fromkeys(options.only, Path(sys.executable)), {}
    pythons: dict[str, Path] = {}
    missing: dict[str, str] = {}
    made: dict[tuple[str, ...], Path | PeerError] = {}
    for name in options.only:
        peer = PEERS[name]
        needed = peer.packages + peer.alone
        if needed not in made:
            say(f"environment of {name}")
            try:
                made[needed] = environment(peer, options.cache, options.timeout)
            except PeerError as error:
                made[needed] = error
        found = made[needed]
        if isinstance(found, PeerError):
            missing[name] = f"not installed: {found}"
        else:
            pythons[name] = found
    return pythons, missing


def measure(name: str, python: Path, options: argparse.Namespace, size: Any) -> Any:
    """Returns the figures that one run of a peer prints."""
    flags = {"width": size[0], "layers": size[1]} | {
        key: getattr(options, key) for key in ("rank", "batch", "length", "steps")
    }
    command = [python, HERE / f"peer_{name}.py"]
    command += [
        text for key, value in flags.items() for text in (f"--{key}", str(value))
    ]
    settings = {
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": str(options.threads),
        "TORCHINDUCTOR_CACHE_DIR": str(options.cache / "inductor"),
    }
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    path = {"PYTHONPATH": str(ROOT)} if name == "jlora" else {}
    with cpus(options.threads):
        out = run(command, env=kept | settings | path, timeout=options.timeout)
    return json.loads(out.splitlines()[-1])


@contextlib.contextmanager
def cpus(threads: int) -> Iterator[None]:
    """Gives the processes started meanwhile `threads` CPUs; XLA has as many threads."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def compare(
    names: Sequence[str], pythons: dict[str, Path], options: Any, size: Any
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Returns the runs of each peer, one a round, and why others have none."""
    runs: dict[str, list[Any]] = {name: [] for name in pythons}
    failed: dict[str, str] = {}
    for i in range(options.rounds):
        order = [name for name in names if name in pythons]
        for name in order if i % 2 == 0 else reversed(order):
            if name in failed:
                continue
            say(f"width {size[0]}, round {i + 1} of {options.rounds}: {name}")
            try:
                runs[name].append(measure(name, pythons[name], options, size))
            except PeerError as error:
                failed[name] = str(error)
    return {name: own for name, own in runs.items() if name not in failed}, failed


def difference(losses: Sequence[float], wanted: Sequence[float]) -> float:
    """Returns the largest relative difference of two series of losses.

    Examples:
      >>> difference([2.0, 3.0], [2.0, 4.0])
      0.25
    """
    relative = [abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True)]
    return math.nan if any(map(math.isnan, relative)) else max(relative)


def summarise(runs: dict[str, list[Any]], tolerance: float) -> dict[str, Any]:
    """Returns the medians of each peer, its ratios, and how far its losses are off.

    The losses are compared with those written by hand, or else with those of the first
    peer that adapts; one that is further off than `tolerance` has `"differs": true`.
    """
    adapting = [name for name in runs if PEERS[name].adapts]
    reference = "manual" if "manual" in adapting else next(iter(adapting), None)

    def ratio(name: str, base: str, key: str) -> float | None:
        if base not in runs:
            return None
        pairs = zip(runs[name], runs[base], strict=True)
        return statistics.median(a[key] / b[key] for a, b in pairs)

    summary = {}
    for name, own in runs.items():
        off = None
        if name in adapting:
            wanted = runs[reference][0]["losses"]
            off = max(difference(one["losses"], wanted) for one in own)
        summary[name] = {
            "versions": own[0]["versions"],
            "step_ms": statistics.median(one["step_ms"] for one in own),
            "cpu_ms": statistics.median(one["cpu_ms"] for one in own),
            "step_ms_of_rounds": [one["step_ms"] for one in own],
            "times_floor": ratio(name, "floor", "step_ms"),
            "times_jlora": ratio(name, "jlora", "step_ms"),
            "cpu_times_floor": ratio(name, "floor", "cpu_ms"),
            "gflop": own[0].get("gflop"),
            "temp_mib": own[0].get("temp_mib"),
            "losses": own[0]["losses"],
            "loss_difference": off,
            "differs": off is not None and not off <= tolerance,
        }
    return summary


def show(summary: dict[str, Any], failed: dict[str, str]) -> str:
    """Returns the table of one size, and a line for each peer without figures."""
    head, lines = columns(summary)
    reasons = [f"{PEERS[name].title}: {reason}" for name, reason in failed.items()]
    return "\n".join((table(head, lines, right=head[1:]), *reasons))


def columns(summary: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the head and the lines of the table of one size."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    head = ("peer", "ms", "× floor", "× jlora", "CPU ms", "GFLOP", "temp MiB")
    head += ("last loss", "off by")
    lines = [
        (
            PEERS[name].title,
            number(own["step_ms"], ".1f"),
            number(own["times_floor"], ".2f"),
            number(own["times_jlora"], ".2f"),
            number(own["cpu_ms"], ".0f"),
            number(own["gflop"], ".2f"),
            number(own["temp_mib"], ".1f"),
            number(own["losses"][-1], ".5f"),
            number(own["loss_difference"], ".0e") + (" !" if own["differs"] else ""),
        )
        for name, own in summary.items()
    ]
    return head, lines


def say(text: str) -> None:
    """Tells on standard error what is being done."""
    print(text, file=sys.stderr, flush=True)


def sizes(text: str) -> tuple[int, int]:
    """Returns the width and the number of layers of, say, `512x4`."""
    width, layers = text.split("x")
    return int(width), int(layers)


def read_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add: Callable[..., Any] = parser.add_argument
    add("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    add("--sizes", nargs="+", type=sizes, default=[(512, 4)], metavar="WIDTHxLAYERS")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=15, help="timed steps a run, after three others")
    add("--rank", type=int, default=8)
    add("--batch", type=int, default=4)
    add("--length", type=int, default=128, help="tokens in a sequence")
    add("--threads", type=int, default=os.cpu_count(), help="and CPUs, of a peer")
    add("--tolerance", type=float, default=1e-4, help="relative, of the losses")
    add("--timeout", type=float, default=1800, help="seconds for an install or a run")
    add("--cache", type=Path, default=CACHE, help=f"for environments, {CACHE}")
    add("--here", action="store_true", help="use this Python for all; install nothing")
    add("--install", action="store_true", help="make the environments and stop")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the flags ask for; returns 1 if the losses of a peer differ."""
    options = read_flags(arguments)
    pythons, missing = environments(options)
    if options.install:
        for name, reason in missing.items():
            say(f"{name}: {reason}")
        return 0
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "cpu": processor(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "settings": {key: os.environ[key] for key in SETTINGS if key in os.environ},
        **{
            key: getattr(options, key)
            for key in ("threads", "rounds", "steps", "rank", "batch", "length")
        },
        "results": [],
    }
    wrong = False
    for size in options.sizes:
        runs, failed = compare(options.only, pythons, options, size)
        summary = summarise(runs, options.tolerance)
        failed = missing | failed
        wrong = wrong or any(own["differs"] for own in summary.values())
        record["results"].append(
            {
                "width": size[0],
                "layers": size[1],
                "peers": summary,
                "failed": failed,
            }
        )
        print(f"\nwidth {size[0]}, {size[1]} layers\n\n{show(summary, failed)}")
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(wrong)
