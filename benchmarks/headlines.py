"""What does a language model learn over a base in bfloat16, int8 and nf4?"""

import functools
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jlora
from examples.chat.model import forward
from examples.many_adapters import config, data, sweep, weights
from examples.many_adapters.train import TARGETS
from examples.sentiment import assets
from jlora._tables import nbytes

from . import common

TASK = "headline"
FILE = "the file's blocks"  # Q4_1 and, for the table, Q8_0
BASES = (*common.STORED, FILE)


def train(base: str, loaded: Any, options: config.Options) -> common.Figures:
    """Returns loss and share of right tokens on held-out headlines, before and after.

    Args:
      base: how the frozen weights are stored, one of `BASES`.
      loaded: parameters, config, tokenizer, and the pairs of story and headline.
      options: the flags of the example.
    """
    params, model, tokenizer, pairs = loaded
    fn = functools.partial(forward, config=model)
    test, task = (
        data.encode(tokenizer, TASK, pairs[part])
        for part in (slice(options.test), slice(options.test, None))
    )
    lora = jlora.LoraConfig(rank=options.rank, alpha=options.alpha, targets=TARGETS)
    example = (test.tokens[:1], None, test.mask[:1])
    plan = jlora.plan(fn, params, *example, config=lora)
    frozen, adapter, state = sweep.start(options.seed, 1, params, plan, [options.lr])
    frozen = common.stored(frozen, plan, "float32" if base == FILE else base)
    apply = jlora.apply_lora(fn)
    before = sweep.evaluate(apply, frozen, jlora.Trainable(), [test])
    adapter, losses, seconds = sweep.train(
        apply,
        frozen,
        adapter,
        state,
        [task],
        steps=options.steps,
        size=options.batch_size,
        seed=options.seed,
    )
    after = sweep.evaluate(apply, frozen, adapter, [test])
    return {
        "base": base,
        "seed": options.seed,
        "base_bytes": common.nbytes(frozen),
        "environment": common.environment(),
        "before": dict(zip(("loss", "right"), before[0].tolist(), strict=True)),
        "after": dict(zip(("loss", "right"), after[0].tolist(), strict=True)),
        "seconds_per_step": seconds,
        "train_loss": [round(float(x), 4) for x in losses[:, 0]],
    }


def earlier(path: Path, settings: common.Figures) -> common.Figures:
    """Returns what a file of the same settings holds, so that a run goes on.

    Each later result has its own environment.
    """
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("settings") == settings:
        return found
    return {"environment": common.environment(), "settings": settings, "results": []}


def columns(results: Sequence[common.Figures]) -> common.Columns:
    """Returns a row for each base: means over seeds, and the loss of each."""
    head = ("base", "stored", "loss before", "loss", "seeds", "right before", "right")
    lines = []
    for base in BASES:
        own = [r for r in results if r["base"] == base]
        if not own:
            continue

        def mean(when: str, what: str, own: Any = own) -> float:
            return statistics.mean(r[when][what] for r in own)

        lines.append(
            (
                base,
                nbytes(own[0]["base_bytes"]),
                common.fixed(mean("before", "loss"), 3),
                common.fixed(mean("after", "loss"), 3),
                " / ".join(common.fixed(r["after"]["loss"], 3) for r in own),
                f"{mean('before', 'right'):.1%}",
                f"{mean('after', 'right'):.1%}",
            )
        )
    return head, lines


def main() -> None:
    """Trains over each base with each seed that the file lacks; writes after each."""
    parser = common.parser("headlines", __doc__)
    parser.add_argument("--base", nargs="*", choices=BASES)
    parser.add_argument("--seed", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--test", type=int, default=128)
    flags = parser.parse_args()
    own = ["--dtype", "bfloat16", "--steps", flags.steps, "--test", flags.test]
    base = config.parse(list(map(str, own)))
    news, reviews = (
        assets.fetch(asset, base.cache) for asset in (data.NEWS, assets.REVIEWS)
    )
    pairs = data.read_pairs(news, reviews)[TASK]
    pretrained = functools.partial(weights.pretrained, base.cache, base.dtype)
    load = functools.cache(pretrained)
    names = ("steps", "test", "dtype", "rank", "alpha", "lr", "batch_size")
    shown = {name: getattr(base, name) for name in names}
    file = earlier(flags.json, shown)
    results = file["results"]
    done = {(r["seed"], r["base"]) for r in results}
    for seed, name in itertools.product(flags.seed, flags.base or BASES):
        if (seed, name) in done:
            continue
        argv = [*own, "--seed", seed]
        loaded = (*load(coded=name == FILE), pairs)
        results.append(train(name, loaded, config.parse(list(map(str, argv)))))
        common.write(flags.json, file["environment"], settings=shown, results=results)
    print(common.show(columns(results)))


if __name__ == "__main__":
    main()
