"""The whole story: read, plan, measure, train, measure again, write."""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

import jlora
from examples.sentiment.assets import AssetError
from examples.sharded.layout import fake_devices
from examples.sharded.loop import create_state
from examples.sharded.report import show, stage

from . import packing, report, run, template
from .config import DEFAULT_STEPS, Options, parse
from .data import DataError
from .loop import learning_rate, make_optimizer
from .metrics import Log
from .model import DecoderConfig
from .out import save_adapter, save_merged
from .prepare import (
    base_directory,
    conversations,
    digest,
    encoded,
    load_model,
    mesh_of,
    planned,
)
from .run import RunError
from .samples import answerer, side_by_side


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example with the flags in `argv`, by default the command line's."""
    options, began = parse(argv), time.perf_counter()
    if options.fake_devices:
        fake_devices(options.fake_devices)
    try:
        train(options)
    except (AssetError, jlora.JloraError, DataError, RunError) as error:
        sys.exit(str(error))
    show(f"\n{time.perf_counter() - began:.0f} s in all; files in {options.out}")


def train(options: Options) -> None:
    """Trains and writes what the flags say.

    Raises:
      RunError: for a mesh, a model or a directory that does not fit; see also `run`.
      DataError: for data that cannot be learnt from.
      AssetError: if the default model or data cannot be had.
      jlora.JloraError: for an adapter that the model has no place for, and the like.
    """
    mesh = mesh_of(options)
    stage("Model and data")
    base = base_directory(options)
    tokenizer = template.load_tokenizer(base, options.template)
    talks, tests = conversations(options)
    documents, epoch = encoded(options, tokenizer, talks)
    held_out, _ = template.encode_all(
        tokenizer, tests, options.length, **options.template_args
    )
    config, params = load_model(options, base, mesh)

    stage("What is adapted")
    task, trainable = planned(options, config, params, mesh, documents, held_out)
    show(str(task.plan))

    stage("Train")
    steps = steps_of(options, epoch)
    rate = learning_rate(
        options.lr, steps, warmup=options.warmup, schedule=options.schedule
    )
    tx = make_optimizer(rate, clip=options.clip, weight_decay=options.weight_decay)
    # Copies: a step donates them, and a leaf trained in full is still the base's own.
    state = create_state(jax.tree.map(jnp.copy, trainable), tx, mesh)
    settings = options.settings() | {"data": digest(documents)}
    answer = answerer(options, config, base, tokenizer, tests)
    with run.checkpoints_of(task, options) as checkpoints:
        begin = run.start(checkpoints, task, state, tx, settings)
        before = begin.before or {
            "loss": task.test_loss(state.trainable),
            "answers": answer(task.frozen, state.trainable),
        }
        about = {"settings": settings, "before": before}
        save = run.saver(checkpoints, about, last=steps)
        show(f"held-out perplexity {math.exp(before['loss']):.2f} before")
        with Log(
            options.out,
            first=begin.step,
            tensorboard=options.tensorboard,
            write=jax.process_index() == 0,
        ) as log:
            if not begin.step:
                run.log_test(log, 0, before["loss"])
            state = run.fit(
                task, options, begin, tx, steps=steps, rate=rate, save=save, log=log
            )
            after = task.test_loss(state.trainable)
            if begin.step < steps:
                run.log_test(log, steps, after)

    stage("Result")
    found = side_by_side(tests, before["answers"], answer(task.frozen, state.trainable))
    show(report.losses(before["loss"], after))
    show("\n" + report.samples(found))
    report.write(
        options.out, found, before["loss"], after, done=steps, settings=settings
    )
    write(options, base, config, state.trainable)


def steps_of(options: Options, epoch: packing.Epoch) -> int:
    """Returns how many steps the run has."""
    if options.steps is not None:
        return options.steps
    if options.data is None:
        return DEFAULT_STEPS
    return max(round(options.epochs * epoch.rows / options.batch_size), 1)


def write(
    options: Options, base: Path, config: DecoderConfig, trainable: jlora.Trainable
) -> None:
    """Writes the PEFT directory and the merged model."""
    folder = options.out / "adapter"
    told = save_adapter(folder, trainable, base, config, options.template)
    show(f"{folder}: for PEFT, vLLM and others")
    if told:
        show(f"vLLM does not take this adapter, only a merged model: {told}")
    if options.merged:
        save_merged(options.out / "merged", folder, base, options.template)
        show(f"{options.out / 'merged'}: for transformers, vLLM and others")
