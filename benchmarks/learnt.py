"""The section of the performance page on what is learnt, and its plot."""

from matplotlib.figure import Figure

from . import common, growth, headlines, quality
from .page import COLORS, markdown, picture, source

BASE, FILE = "Rows *base in*", "The last row"  # measured later
CLAIMS = """\
The papers claim the following, on far larger models and tasks. Differences of a point
are below the noise of the test set above.

- LoRA with well under 1 % of the parameters is as good as full fine-tuning
  (RoBERTa-base on GLUE: 87.2 against 86.4 on average), and ranks of 1 to 8 are enough.
- rsLoRA learns more at high ranks than `alpha / r` does.
- DoRA is above LoRA (Llama-7B on commonsense tasks: 78.4 against 76.3).
- PiSSA is above LoRA (Mistral-7B on GSM8K: 72.9 against 67.7).
- LoRA+ gains 1 to 2 points and is up to twice as fast.
- VeRA is as good as LoRA with a tenth of its parameters or fewer.
"""


def section(found: common.Figures) -> str:
    """Returns the text on `quality`."""
    settings = found["settings"]
    seeds = sorted({r["seed"] for r in found["results"]})
    return "\n".join(
        (
            "## What they learn\n",
            f"{source(found['environment'])}{_later(found, BASE)}\n"
            "MiniLM-L6 is trained on 2,000 Amazon review sentences, for "
            f"{settings['epochs']} epoch(s) of batches of {settings['batch']}, "
            f"{settings['dtype']}, AdamW. The test set has 600 "
            "sentences of other reviews, so one standard error is about 1.4 points. "
            f"The seeds are {', '.join(map(str, seeds))}. The learning rate is 1e-2 "
            "for the head, 1e-3 for factors (LoRA+: 2.5e-4 for A and sixteen times "
            "that for B; VeRA: 1e-2), and 5e-5 for full fine-tuning. Alpha is 16 in "
            "every row but VeRA's, whose scale is 1. Nothing was tuned for single "
            "rows. *Base in* says how the frozen linear weights are stored; elsewhere "
            "they are float32. Runs shared the machine with other work: compare costs "
            "above, not these seconds.\n",
            picture("quality", "Test accuracy of each run, and training loss of some"),
            markdown(quality.columns(quality.rows(found["results"]))),
            CLAIMS,
        )
    )


def headlines_section(found: common.Figures) -> str:
    """Returns the text on `headlines`."""
    settings = found["settings"]
    seeds = sorted({r["seed"] for r in found["results"]})
    return "\n".join(
        (
            "### Over a quantised language model\n",
            f"{source(found['environment'])}{_later(found, FILE)}\n"
            "SmolLM2-135M-Instruct learns to write the headlines of BBC news "
            f"stories: rank {settings['rank']} on q and v, "
            f"{settings['steps']} steps of {settings['batch_size']} stories, Adam at "
            f"{settings['lr']:g}, {settings['dtype']}. Loss and share of right tokens "
            f"are those of {settings['test']} held-out headlines. The seeds are "
            f"{', '.join(map(str, seeds))}. *Stored* is the whole base; its tied table "
            "of embeddings stays in bfloat16, but for the last row. The model comes as "
            "a file of four-bit blocks. The last row computes with these blocks as "
            "they are; the others widened them first, so nf4 rounds for a second "
            "time.\n",
            markdown(headlines.columns(found["results"])),
        )
    )


def _later(found: common.Figures, rows: str) -> str:
    """Returns where `rows` were measured, if elsewhere."""
    own = [r["environment"] for r in found["results"] if "environment" in r]
    return "".join(f"{rows}: {text}" for text in dict.fromkeys(map(source, own)))


def plot(found: common.Figures) -> Figure:
    """Returns test accuracy of each run, and the training loss of some."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    table = quality.rows(found["results"])
    for i, row in enumerate(table):
        baseline = row["group"] == "baseline"
        color = COLORS["full fine-tune" if baseline else common.JLORA]
        left.plot([min(row["each"]), max(row["each"])], [i, i], color="#94a3b8")
        left.plot(row["accuracy"], i, "o", color=color, ms=5)
    left.set_yticks(
        range(len(table)), [f"{r['run']} ({r['trained']:,})" for r in table], fontsize=7
    )
    left.invert_yaxis()
    left.set_xlabel("test accuracy, mean and range of seeds")
    for name, color in (
        ("head only", COLORS["merge on the fly"]),
        ("full fine-tune", COLORS["full fine-tune"]),
        ("LoRA, rank 8, q and v", COLORS[common.JLORA]),
        ("DoRA, rank 8, q and v", COLORS["side path, autodiff"]),
        ("PiSSA, rank 8, q and v", COLORS[growth.ADDED]),
    ):
        own = [r["train_loss"] for r in found["results"] if r["run"] == name]
        if own:
            mean = [sum(step) / len(step) for step in zip(*own, strict=True)]
            smooth = [
                sum(mean[max(0, i - 9) : i + 1]) / min(i + 1, 10)
                for i in range(len(mean))
            ]
            right.plot(smooth, color=color, label=name)
    right.set_xlabel("step")
    right.set_ylabel("training loss, mean of ten steps")
    right.legend(frameon=False, fontsize=7)
    for axes in (left, right):
        axes.grid(visible=True)
    return figure
