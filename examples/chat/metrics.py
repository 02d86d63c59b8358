"""Metrics of a run: JSON lines, and files for TensorBoard if they are wanted."""

import json
from pathlib import Path
from typing import Any


class Log:
    """Where the metrics of a run go, a context; in the first process only.

    Args:
      folder: `metrics.jsonl` is in it.
      first: the step that the run goes on from. Lines of later steps, which are done
        again, are taken out.
      tensorboard: whether to write files for TensorBoard beside it.
      write: False writes nothing.
    """

    def __init__(
        self, folder: Path, *, first: int, tensorboard: bool, write: bool = True
    ):
        self._file = self._board = None
        if not write:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if first and path.exists() else []
        kept = [line for line in lines if _step(line) <= first]
        self._file = path.open("w")
        self._file.writelines(f"{line}\n" for line in kept)
        if tensorboard:
            self._board = _tensorboard(folder)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._file, self._board):
            if file is not None:
                file.close()

    def __call__(self, step: int, **numbers: float) -> None:
        """Writes numbers by name; those that TensorBoard groups by what is before /."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)


def _step(line: str) -> float:
    """Returns the step of a line; a line that a killed run left half is of no step."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def _tensorboard(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("   nothing for TensorBoard: pip install tensorboardX writes it")
        return None
    return SummaryWriter(str(folder / "tensorboard"))
