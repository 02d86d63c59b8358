"""What a run needs: documents, the model on its devices, A and B."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import jlora
from examples.many_adapters.data import NEWS
from examples.sentiment import assets
from examples.sharded.layout import batch_sharding, layout, parse_mesh
from examples.sharded.report import show

from . import data, hub, model, packing, report, smollm2, template
from .config import Options
from .data import Conversation
from .model import DecoderConfig
from .run import RunError, Task
from .template import Document


def mesh_of(options: Options) -> Mesh:
    """Returns the devices.

    Raises:
      RunError: if there are too few, or they do not divide the rows of a step.
    """
    try:
        mesh = parse_mesh(options.mesh)
    except ValueError as error:
        raise RunError(str(error)) from error
    parts = mesh.size // mesh.shape.get("tensor", 1)
    rows = options.batch_size // options.accumulate
    if rows % parts:
        raise RunError(
            f"{rows} rows (--batch-size {options.batch_size} in {options.accumulate} "
            f"parts) cannot be cut into {parts} equal parts, one for each device along "
            f"data and fsdp. Give a --batch-size of {parts * options.accumulate}, or a "
            "multiple of it."
        )
    return mesh


def base_directory(options: Options) -> Path:
    """Returns the directory of the base model.

    Raises:
      RunError: if it is not there.
    """
    if options.model is None:
        return smollm2.directory(options.cache)
    if not (options.model / "config.json").exists():
        raise RunError(
            f"{options.model} has no config.json. --model takes a directory like those "
            "of the Hub: hf download NAME --local-dir DIR makes one."
        )
    return options.model


def conversations(options: Options) -> tuple[list[Conversation], list[Conversation]]:
    """Returns the conversations to train on and those to measure on."""

    def read(path: Path) -> list[Conversation]:
        found, unknown = data.read_json_lines(path)
        if unknown:
            show(f"in {path} these keys mean nothing: {', '.join(unknown)}")
        return found

    if options.data is None:
        talks = data.headlines(assets.fetch(NEWS, options.cache))
    else:
        talks = read(options.data)
    if options.test_data is not None:
        return talks, read(options.test_data)
    count = options.held_out or min(max(len(talks) // 10, 1), 64)
    return data.held_out(talks, count, options.seed)


def encoded(
    options: Options, tokenizer: Any, talks: Sequence[Conversation]
) -> tuple[list[Document], packing.Epoch]:
    """Returns the documents to train on, and what packing makes of them."""
    length = options.length
    documents, counts = template.encode_all(
        tokenizer, talks, length, **options.template_args
    )
    epoch = packing.epoch(documents, length=length)
    show(report.documents(counts, len(documents), epoch, length))
    return documents, epoch


def load_model(options: Options, base: Path, mesh: Mesh) -> tuple[DecoderConfig, Any]:
    """Returns the config of the base model, and its parameters on the devices.

    Raises:
      RunError: if it is of a kind that is not known.
    """
    platform = mesh.devices.flat[0].platform
    dtype = options.dtype or ("float32" if platform == "cpu" else "bfloat16")
    try:
        config, params = hub.load(
            base,
            dtype=dtype,
            quantize=None if options.quantize == "none" else options.quantize,
            shardings=functools.partial(layout, mesh=mesh),
            remat=options.remat,
        )
    except ValueError as error:
        raise RunError(f"{base}: {error}") from error
    count = sum(x.size for x in jax.tree.leaves(model.shapes(config)))
    show(
        f"{base.name}, {count / 1e6:,.0f} million parameters, {dtype}, {mesh.size} × "
        f"{mesh.devices.flat[0].device_kind}"
    )
    return config, params


def planned(
    options: Options,
    config: DecoderConfig,
    params: Any,
    mesh: Mesh,
    documents: Sequence[Document],
    held_out: Sequence[Document],
) -> tuple[Task, jlora.Trainable]:
    """Returns the task, and A and B before the first step, laid out like the base."""
    fn = functools.partial(model.forward, config=config)
    if mesh.size > 1:
        where = batch_sharding(mesh)
        stream = functools.partial(jax.lax.with_sharding_constraint, shardings=where)
        fn = functools.partial(fn, stream=stream)
    every = options.targets == ("all-linear",)
    lora = jlora.LoraConfig(
        rank=options.rank,
        alpha=options.alpha,
        method=options.method,
        targets="all-linear" if every else globs(options.targets, "{kernel,embedding}"),
        train=globs(options.train, "*"),
    )
    rows = options.batch_size // options.accumulate
    shape = jax.ShapeDtypeStruct((rows, options.length), np.int32)
    plan = jlora.plan(fn, params, shape, shape, shape, config=lora)
    frozen, trainable = jlora.split(jax.random.key(options.seed), params, plan)
    trainable = jax.device_put(
        trainable, jlora.shardings(layout(model.shapes(config), mesh), trainable)
    )
    task = Task(
        apply=jlora.apply_lora(fn),
        frozen=frozen,
        plan=plan,
        train=packing.training(
            documents, rows=options.batch_size, length=options.length, seed=options.seed
        ),
        test=packing.once(held_out, rows=rows, length=options.length),
        mesh=mesh,
    )
    return task, trainable


def globs(names: Sequence[str], leaf: str) -> tuple[str, ...]:
    """Returns globs over paths: `q_proj` is any layer's, a glob with / stays."""
    return tuple(name if "/" in name else f"**/{name}/{leaf}" for name in names)


def digest(documents: Sequence[Document]) -> str:
    """Returns the SHA-256 of all tokens and masks."""
    found = hashlib.sha256()
    for document in documents:
        for field in document:
            found.update(field.tobytes())
    return found.hexdigest()
