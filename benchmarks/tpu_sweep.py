"""What does a LoRA step cost on other TPU chips, at other sizes and ranks?

    python -m benchmarks.tpu_sweep
    python -m benchmarks.tpu_sweep --cases "rank 8" "rank 64"

The model is that of `benchmarks.tpu`, with one thing changed at a time. Nothing runs:
libtpu compiles ahead of time. It takes half an hour; each row is written when it is
there, and a sweep that was stopped goes on.
"""

import dataclasses
import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax

from . import common, models, tpu
from .page import markdown, source
from .traffic import hbm_bytes

RANK = 16
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A point of the sweep.

    Attributes:
      title: what is changed.
      chip: a key of `CHIPS`.
      rank: of all adapted weights.
      size: changes of `tpu.MODEL`.
    """

    title: str
    chip: str = "v5e"
    rank: int = RANK
    size: tuple[tuple[str, int], ...] = ()


CASES = (
    Case("nothing"),
    Case("TPU v5p", chip="v5p"),
    Case("TPU v6e", chip="v6e"),
    Case("width 1024", size=(("width", 1024),)),
    Case("width 4096", size=(("width", 4096),)),
    Case("1 × 8192 tokens", size=(("batch", 1), ("length", 8192))),
    Case("rank 8", rank=8),
    Case("rank 64", rank=64),
    Case("rank 256", rank=256),
)


def compiled(case: Case, step: str) -> common.Figures:
    """Returns the compiler's figures of one step, and its traffic to HBM."""
    size = dataclasses.replace(tpu.MODEL, **dict(case.size))
    sharding = jax.sharding.SingleDeviceSharding(tpu.chips(CHIPS[case.chip])[0])
    steps = common.training_steps(
        models.KINDS["scan"](size), case.rank, names=[step], abstract=True
    )
    program, figures = common.compile_step(tpu.placed(steps[step], sharding))
    return {**figures, "hbm_bytes": hbm_bytes(program.as_text())}


def columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns the rows for a table."""
    head = ("changed", "FLOPs × floor", "GB moved: floor", "jlora", "× floor")
    head += ("GB of HBM: floor", "jlora", "× floor")
    head += ("peak GiB: floor", "jlora", "× floor")

    def line(row: common.Figures) -> tuple[str, ...]:
        floor, own = row[common.FLOOR], row[common.JLORA]
        cells = [row["case"], common.ratio(own, floor, "flops")]
        units = {"bytes": 1e9, "hbm_bytes": 1e9, "peak_bytes": 2**30}
        for field, unit in units.items():
            cells += [common.fixed(x.get(field), 2, unit) for x in (floor, own)]
            cells.append(common.ratio(own, floor, field))
        return tuple(cells)

    return head, [line(row) for row in rows]


WHAT = """\
*FLOPs*, *GB moved* and *peak* are the compiler's own figures. In FLOPs and GB it counts
a loop's body once. It counts arrays in the chip's own memory as it counts others, and
copies between the two memories. *GB of HBM* is read from the compiled program
(`benchmarks/traffic.py`): what all layers read from HBM and write to it, where an
operation reads each operand once.
"""
WHY = """\
What the bytes above 1.10 times the floor are, by the compiled programs:

- *Passes over activations*, in every row. The gradient of A reads each input again. The
  gradients of B and of the input read each gradient of a result twice more. The term of
  the widest gradient, that of the input of `down`, is added in a pass of its own. With
  8192 tokens in a row, the attention of both programs moves most, and the ratio is near
  one.
- *Copies*, at width 1024. Activations are small enough to be brought into the chip's
  own memory for the products that read them. The compiler's figure counts these copies,
  HBM's counts the read only.
- *A and B themselves*, at ranks 64 and 256. The optimizer reads and writes A, B, their
  gradients and two moments in float32. They are most of what the peak is higher by.
- *Attention's scores*, at width 4096. In the forward pass this compiler writes the
  scores of a layer in float32, and reads and writes them once more. In the frozen
  model's program it does so only once, as it also does when layers are computed again.
  Both forms of the product have the extra pass, with barriers and without them. So it
  follows from the layouts that the compiler chooses for queries and keys, and not from
  what LoRA adds.
"""


def section(found: common.Figures) -> str:
    """Returns the text on other chips, sizes and ranks."""
    model = found["model"]
    return "\n".join(
        (
            "## Other TPU chips, sizes and ranks\n",
            f"{source(found['environment'])}\nThe model is that of the table on a "
            f"TPU v5e: width {model['width']}, {model['batch']} × {model['length']} "
            f"tokens, rank {RANK}. One thing is changed in each row.\n",
            WHAT,
            markdown(columns(found["rows"])),
            WHY,
        )
    )


def place_of(row: common.Figures) -> str:
    """Returns the chip and the size of a row, which its floor depends on."""
    return json.dumps([row["chip"], row["size"]])


def main() -> None:
    """Compiles what the file lacks."""
    titles = [case.title for case in CASES]
    parser = common.parser("tpu_sweep", __doc__)
    parser.add_argument("--cases", nargs="*", choices=titles, default=titles)
    options = parser.parse_args()
    if find_spec(tpu.COMPILER) is None:
        print(tpu.MISSING)
        return
    jax.config.update("jax_platforms", "cpu")
    found: dict[str, Any] = {}
    if options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
        found = {row["case"]: row for row in rows}
    floors = {place_of(row): row[common.FLOOR] for row in found.values()}
    for case in CASES:
        if case.title in found or case.title not in options.cases:
            continue
        about = dataclasses.asdict(case)
        row = {"case": about.pop("title"), **about}
        at = place_of(row)
        if at not in floors:
            floors[at] = compiled(case, common.FLOOR)
        own = compiled(case, common.JLORA)
        found[case.title] = row | {common.FLOOR: floors[at], common.JLORA: own}
        rows = [found[title] for title in titles if title in found]
        env = tpu.environment("TPU, one chip, compiled ahead of time")
        model = dataclasses.asdict(tpu.MODEL)
        common.write(options.json, env, model=model, rows=rows)
        print(common.show(columns([found[case.title]])), flush=True)


if __name__ == "__main__":
    main()
