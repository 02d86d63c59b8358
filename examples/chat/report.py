"""What a person reads: what is adapted, the answers before and after, the result."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from .packing import Epoch


class Sample(NamedTuple):
    """What was asked, what the model wrote before and after, what the data says."""

    asked: str
    before: str
    after: str
    data: str


def documents(counts: Mapping[str, int], made: int, epoch: Epoch, length: int) -> str:
    """Returns what became of the conversations to train on, in words."""
    lines = [
        f"{counts['conversations']:,} conversations to train on: {epoch.rows:,} rows "
        f"of {length} tokens, {epoch.real:.1%} of them real"
    ]
    told = {
        "cut": f"longer than {length} tokens and cut",
        "left_out": f"left out: no answer begins within {length} tokens",
        "endless": "end in no special token, so the model does not learn to stop",
    }
    lines += [f"{counts[k]:,} {text}" for k, text in told.items() if counts[k]]
    if (extra := made + counts["left_out"] - counts["conversations"]) > 0:
        lines.append(
            f"{extra:,} more documents, as the template writes earlier answers in "
            "another way than the last one"
        )
    return "\n".join(lines)


def samples(found: Sequence[Sample], width: int = 84) -> str:
    """Returns the answers before and after below each other, cut to `width`."""
    lines = []
    for sample in found:
        for name, text in sample._asdict().items():
            line = f"{name:>6} │ {' '.join(text.split())}"
            lines.append(line if len(line) <= width else f"{line[: width - 1]}…")
        lines.append("")
    return "\n".join(lines[:-1])


def losses(before: float, after: float) -> str:
    """Returns the held-out loss and perplexity before and after."""
    perplexities = [f"{math.exp(loss):.2f}" for loss in (before, after)]
    return (
        f"held-out loss {before:.3f} → {after:.3f}, perplexity "
        f"{' → '.join(perplexities)}"
    )


def write(
    folder: Path, found: Sequence[Sample], before: float, after: float, **more: Any
) -> None:
    """Writes `results.json`, and `results.md` with the answers as a table."""
    if jax.process_index() != 0:
        return
    figures = {
        "test_loss": {"before": before, "after": after},
        "test_perplexity": {"before": math.exp(before), "after": math.exp(after)},
        "samples": [sample._asdict() for sample in found],
        **more,
    }
    (folder / "results.json").write_text(json.dumps(figures, indent=1) + "\n")
    rows = [Sample._fields, ["---"] * 4, *map(_cells, found)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = f"{losses(before, after)}\n\n{table if found else ''}\n"
    (folder / "results.md").write_text(text)


def _cells(sample: Sample) -> list[str]:
    return [" ".join(text.split()).replace("|", "\\|") for text in sample]
