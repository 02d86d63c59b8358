"""The whole story: load, train three adapters at once, serve them in one batch."""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import jlora
from examples.chat.model import DecoderConfig, decode, empty_cache, forward
from examples.sentiment import assets

from . import data, generate, report, sweep, weights
from .config import Options, parse

TARGETS = "**/{q,v}_proj/kernel"
# The rows of the shown batch: the task asked for, and the adapter that answers.
SHOWN = (
    ("headline", None),
    ("headline", "headline"),
    ("topic", None),
    ("topic", "topic"),
    ("mood", None),
    ("mood", "mood"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example with the flags in `argv`."""
    options, began = parse(argv), time.perf_counter()
    print("1. Model and data")
    news, reviews = (
        assets.fetch(asset, options.cache) for asset in (data.NEWS, assets.REVIEWS)
    )
    params, config, tokenizer = weights.pretrained(
        options.cache, options.dtype, coded=options.quantize == "file"
    )
    pairs = data.read_pairs(news, reviews)
    run(options, params, config, tokenizer, pairs)
    print(f"   {time.perf_counter() - began:.0f} s in all")


def run(
    options: Options,
    params: Any,
    config: DecoderConfig,
    tokenizer: Any,
    pairs: dict[str, list[data.Pair]],
) -> None:
    """Trains and serves adapters of the model in `params`; writes what was measured."""
    fn = functools.partial(forward, config=config)
    tests, tasks = (
        [data.encode(tokenizer, task, pairs[task][part]) for task in data.TASKS]
        for part in (slice(options.test), slice(options.test, None))
    )
    print("2. Plan")
    lora = jlora.LoraConfig(rank=options.rank, alpha=options.alpha, targets=TARGETS)
    example = (tests[0].tokens[:1], None, tests[0].mask[:1])
    plan = jlora.plan(fn, params, *example, config=lora)
    if options.quantize in ("nf4", "int8"):
        params = jlora.quantize(params, plan, kind=options.quantize)
        plan = jlora.plan(fn, params, *example, config=lora)
    print(f"   {plan.total_count / 1e6:.1f} million parameters, {options.dtype}")
    print(_indent(str(plan)))

    print(f"3. Train {len(data.TASKS)} adapters in one program, on one base")
    apply = jlora.apply_lora(fn)
    rates = [options.lr] * len(data.TASKS)
    frozen, stacked, state = sweep.start(
        options.seed, len(data.TASKS), params, plan, rates
    )
    before = sweep.evaluate(apply, frozen, jlora.Trainable(), tests)
    stacked, losses, seconds = sweep.train(
        apply,
        frozen,
        stacked,
        state,
        tasks,
        steps=options.steps,
        size=options.batch_size,
        seed=options.seed,
    )
    after = sweep.evaluate(apply, frozen, stacked, tests)
    tables = [report.quality(before, after)]
    print(f"   {seconds:.2f} s a step\n" + _indent(tables[0]))

    print("4. One batch, a row for each: base models and adapters side by side")
    write = functools.partial(decode, config=config)
    step = generate.make_step(mixed(write))
    labels = [adapter or "base" for _, adapter in SHOWN]
    ids = jnp.array([-1 if a is None else data.TASKS.index(a) for _, a in SHOWN])
    rows = jlora.adapters.select(stacked, ids)
    asked = _shown_prompts(tests)
    cache = _cache(options, config, len(ids))
    tokens = generate.generate(step, frozen, rows, asked, options.tokens, cache)
    end = tokenizer.token_to_id("<|im_end|>")
    answers = generate.stream(labels, tokens, tokenizer.decode, end)
    wanted = {task: pairs[task][0].answer for task in data.TASKS}
    print("   wanted: " + "; ".join(f"{k}: {v}" for k, v in wanted.items()))

    print(f"5. Tokens a second, {options.rows} rows")
    speeds = _speeds(options, config, frozen, stacked, asked, params)
    tables.append(report.speed(speeds))
    print(_indent(tables[1]))

    figures = {
        "before": before.tolist(),
        "after": after.tolist(),
        "seconds_per_step": seconds,
        "tokens_per_second": speeds,
        "answers": list(zip(labels, answers, strict=True)),
        "flags": {k: str(v) for k, v in vars(options).items()},
    }
    report.write(options.out, losses, "\n\n".join(tables), figures)
    for task, trained in zip(data.TASKS, jlora.adapters.unstack(stacked), strict=True):
        jlora.checkpoint.save(options.out / "adapters" / task, trained, overwrite=True)
    print(f"   results, curves and adapters are in {options.out}")


def mixed(fn: Any) -> Any:
    """Returns the model for rows with an adapter each, selected beforehand."""
    per_row = jlora.adapters.per_row(fn, **generate.ROWS)
    return lambda frozen, rows, *args: per_row(frozen, rows, None, *args)


def _shown_prompts(tests: Sequence[data.Examples]) -> data.Examples:
    """Returns the prompts of the rows that are shown, the first test of each task."""
    whole = [data.prompts(tests[data.TASKS.index(task)]) for task, _ in SHOWN]
    return data.Examples(*(np.stack([e[i][0] for e in whole]) for i in range(2)))


def _cache(options: Options, config: DecoderConfig, rows: int) -> Any:
    """Returns what makes an empty cache for `rows` prompts and their answers."""
    length = data.PROMPT + data.ANSWER
    return functools.partial(empty_cache, config, rows, length, options.dtype)


def _speeds(
    options: Options,
    config: DecoderConfig,
    frozen: Any,
    stacked: jlora.Trainable,
    asked: data.Examples,
    params: Any,
) -> dict[str, float]:
    """Returns tokens a second for the base, merged, one shared adapter, and mixed."""
    n = options.rows
    asked = data.Examples(*(np.resize(x, (n, *x.shape[1:])) for x in asked))
    ids = jnp.arange(n) % len(data.TASKS)
    one = jlora.adapters.select(stacked, 0)
    write = functools.partial(decode, config=config)
    step = generate.make_step(jlora.apply_lora(write))
    runs = {
        "base": (step, params, jlora.Trainable()),
        "merged": (step, jlora.merge(frozen, one), jlora.Trainable()),
        "one adapter, shared": (step, frozen, one),
        "three adapters, mixed": (
            generate.make_step(mixed(write)),
            frozen,
            jlora.adapters.select(stacked, ids),
        ),
    }
    cache = _cache(options, config, n)
    return generate.tokens_per_second(
        {
            name: functools.partial(
                generate.generate, *run, asked, options.tokens, cache
            )
            for name, run in runs.items()
        },
        n,
    )


def _indent(text: str) -> str:
    return "   " + text.replace("\n", "\n   ")
