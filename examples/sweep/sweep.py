"""Learning rates × ranks of the sentiment example, all trained in one program."""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import platformdirs

import jlora
from examples.sentiment import assets
from examples.sentiment.config import QUANTIZE
from examples.sentiment.data import Examples, batch_at
from examples.sentiment.loop import loss_and_accuracy, make_optimizer, predict
from examples.sentiment.task import Task, load_task, planned, quantised
from jlora._tables import table

HEAD = "**/head/*"
HEAD_LR = 1e-2


class Options(NamedTuple):
    """What a sweep is made of; the fields are the flags."""

    ranks: Sequence[int]
    lrs: Sequence[float]
    steps: int
    batch_size: int
    quantize: str
    seed: int
    out: Path
    cache: Path


def parse(argv: Sequence[str] | None = None) -> Options:
    """Returns the options in `argv`, by default those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.sweep",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[2, 16])
    add("--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2])
    add("--steps", type=int, default=60)
    add("--batch-size", type=int, default=16, help="sentences a step, the same for all")
    text = "how the frozen linear weights are stored"
    add("--quantize", choices=QUANTIZE, default="none", help=text)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/sweep"))
    cache = Path(platformdirs.user_cache_dir("jlora"))
    add("--cache", type=Path, default=cache, help="downloads stay here")
    return Options(**vars(parser.parse_args(argv)))


def grid(options: Options) -> list[tuple[int, float]]:
    """Returns `(rank, learning rate)` of each adapter."""
    return [(rank, lr) for rank in options.ranks for lr in options.lrs]


def config_of(rank: int) -> jlora.LoraConfig:
    """Returns what an adapter of this rank trains; the scale is 2."""
    return jlora.LoraConfig(
        rank=rank,
        alpha=2 * rank,
        targets="**/attention/{query,value}/kernel",
        exclude=HEAD,
        train=HEAD,
    )


def start(task: Task, options: Options, tx: Any) -> tuple[Any, jlora.Trainable, Any]:
    """Returns the frozen side, the stacked adapters and their optimizer states.

    Ranks are padded with zeros to the highest. The gradient of such a pair of zeros is
    zero, so each adapter trains at its own rank.
    """
    key = jax.random.key(options.seed)
    adapters: list[jlora.Trainable] = []
    frozen = None
    for rank, _ in grid(options):
        plan = planned(task, config_of(rank))
        frozen, trainable = jlora.split(key, task.variables, plan)
        adapters.append(trainable)
    stacked = jlora.adapters.stack(adapters)
    states = jax.vmap(tx.init)(stacked)
    states.hyperparams["lr"] = jnp.array([lr for _, lr in grid(options)], jnp.float32)
    return frozen, stacked, states


def make_step(apply: Any, tx: Any) -> Any:
    """Returns the jitted step of all adapters; adapters and states are donated."""

    def one(trainable: Any, state: Any, frozen: Any, batch: Examples) -> Any:
        def loss(trainable: Any) -> tuple[jax.Array, jax.Array]:
            logits = apply(frozen, trainable, batch.ids, batch.mask)
            return loss_and_accuracy(logits, batch.labels)

        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    every = jax.vmap(one, (0, 0, None, None))
    return functools.partial(jax.jit, donate_argnums=(0, 1))(every)


def run(task: Task, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Returns losses `[steps, adapters]` and test accuracies `[adapters]`."""
    tx = optax.inject_hyperparams(make_optimizer, static_args="full_lr")(
        lr=0.0, full_lr=HEAD_LR
    )
    frozen, stacked, states = start(task, options, tx)
    apply = jlora.apply_lora(task.model.apply)
    step = make_step(apply, tx)
    losses = []
    for i in range(options.steps):
        batch = batch_at(task.train, i, size=options.batch_size, seed=options.seed)
        stacked, states, loss = step(stacked, states, frozen, batch)
        losses.append(np.asarray(loss))
        show(options, i + 1, np.array(losses[-10:]).mean(0))
    every = jax.jit(jax.vmap(apply, (None, 0, None, None)))

    def forward(ids: Any, mask: Any) -> jax.Array:
        return jnp.moveaxis(every(frozen, stacked, ids, mask), 0, 1)

    logits = predict(forward, task.test, size=64)  # [sentences, adapters, classes]
    right = logits.argmax(-1) == task.test.labels[:, None]
    return np.array(losses), right.mean(0)


def show(options: Options, step: int, values: np.ndarray) -> None:
    """Writes the table of mean losses, over the last one where there is a terminal."""
    lines = cells(options, values).splitlines()
    if sys.stdout.isatty():
        if step > 1:
            print(f"\x1b[{len(lines) + 1}A", end="")
    elif step % 20 and step != options.steps:
        return
    print(f"   step {step} of {options.steps}, mean loss of the last ten")
    print(_indent("\n".join(lines)), flush=True)


def _indent(text: str) -> str:
    return "   " + text.replace("\n", "\n   ")


def cells(options: Options, values: np.ndarray) -> str:
    """Returns a table of one value for each adapter, ranks down and rates across."""
    head = ("rank", *(f"lr {lr:g}" for lr in options.lrs))
    rows = np.reshape(values, (len(options.ranks), -1))
    lines = [
        (str(rank), *(f"{value:.3f}" for value in row))
        for rank, row in zip(options.ranks, rows, strict=True)
    ]
    return table(head, lines, right=head)


def plot(path: Path, options: Options, losses: np.ndarray) -> None:
    """Draws the training losses, smoothed over ten steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = min(10, len(losses))
    for (rank, lr), own in zip(grid(options), losses.T, strict=True):
        smooth = np.convolve(own, np.ones(width) / width, "valid")
        style = "-" if rank == max(options.ranks) else "--"
        axes.plot(smooth, style, label=f"rank {rank}, lr {lr:g}")
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the sweep with the flags in `argv`."""
    options = parse(argv)
    minilm = assets.fetch_any(assets.MINILM, options.cache)
    reviews = assets.fetch(assets.REVIEWS, options.cache)
    task = load_task(*minilm, reviews, dtype="float32", seed=options.seed)
    if options.quantize != "none":
        config = config_of(options.ranks[0])
        task = quantised(task, planned(task, config), options.quantize)
        print(planned(task, config))
    print(f"{len(grid(options))} adapters in one program")
    losses, accuracies = run(task, options)
    print(f"   test accuracy\n{_indent(cells(options, accuracies))}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.md").write_text(cells(options, accuracies) + "\n")
    plot(options.out / "curves.png", options, losses)
    print(f"   table and curves are in {options.out}")
