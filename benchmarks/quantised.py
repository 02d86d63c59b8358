r"""What do codes in place of weights save, and what do they cost, beside bf16 and qwix?

    python -m benchmarks.quantised                  # CPU, by the compiler's figures
    python -m benchmarks.quantised --target tpu     # libtpu, ahead of time
    python -m benchmarks.quantised --target gpu     # XLA for an H100, ahead of time
    python -m benchmarks.quantised --rounds 15 --width 512 --layers 4 --batch 4 \
        --length 128 --dtype float32                # CPU, the time of a step

The step is the gradient of A and B, without an optimizer. A and B and the scales have
the dtype of the model. A compiler counts the body of a scan once.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora

from . import common, gpu, models, tpu

MODEL = models.Size(
    width=1024, layers=8, batch=2, length=512, head=128, dtype="bfloat16"
)
KINDS = ("bf16", "int8", "nf4", "nf4 native", "int4")
TARGETS: dict[str, Callable[[], Any]] = {
    "cpu": lambda: None,
    "tpu": tpu.one_chip,
    "gpu": gpu.one_card,
}
OTHERS = ("qwix bf16", "qwix int8", "qwix nf4", "qwix int4")


def model(size: models.Size, *, scanned: bool, remat: bool) -> models.Model:
    """Returns the gated decoder."""
    return models.linen(size, gated=True, scanned=scanned, remat=remat)


def floor_step(own: models.Model) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns the gradient of a bias at the input of the frozen model, and shapes."""
    params, batch = common.example(own, abstract=True)
    shift: Any = {"at_input": own.shift["at_input"]}

    def loss(shift: Any, params: Any, x: Any, targets: Any) -> jax.Array:
        return common.cross_entropy(own.apply(params, x, **shift), targets)

    return jax.value_and_grad(loss), (shift, params, *batch)


def lora_step(
    own: models.Model, rank: int, kind: str, size: models.Size
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns the gradient of A and B over codes of a kind, and shapes."""
    params, batch = common.example(own, abstract=True)
    config = jlora.LoraConfig(rank=rank, dtype=size.dtype)
    plan = jlora.plan(own.apply, params, batch[0], config=config)
    make = functools.partial(jlora.split, plan=plan)
    frozen, trainable = jax.eval_shape(make, jax.random.key(0), params)
    name, *storage = kind.split()
    if name != "bf16":
        frozen = jlora.quantize(
            frozen,
            plan,
            kind=name,
            scale_dtype=size.dtype,
            storage=storage[0] if storage else "packed",
        )
    lora = jlora.apply_lora(own.apply, on_merge="error")

    def loss(trainable: Any, frozen: Any, x: Any, targets: Any) -> jax.Array:
        return common.cross_entropy(lora(frozen, trainable, x), targets)

    return jax.value_and_grad(loss), (trainable, frozen, *batch)


def qwix_step(
    size: models.Size, rank: int, kind: str, **options: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns the same step as qwix makes it, and shapes."""
    import qwix
    from flax.traverse_util import flatten_dict, unflatten_dict

    qtype = {} if kind == "bf16" else {"weight_qtype": kind}
    if kind in ("nf4", "int4"):
        qtype["tile_size"] = 64
    provider = qwix.LoraProvider(
        module_path=r"(layers|layer_\d+)/.*",
        rank=rank,
        alpha=float(rank),
        dropout=0.0,
        **qtype,
    )
    own = qwix.apply_lora_to_model(
        models.Decoder(size, gated=True, **options), provider
    )
    x, targets = jax.eval_shape(
        functools.partial(models.tokens, size), jax.random.key(0)
    )
    variables = jax.eval_shape(own.init, jax.random.key(0), x)
    flat = flatten_dict(variables["params"])
    trained = {k: v for k, v in flat.items() if "lora" in str(k)}
    frozen = {k: v for k, v in flat.items() if k not in trained}
    trained = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, jnp.dtype(size.dtype)), trained
    )

    def loss(trained: Any, frozen: Any, x: Any, targets: Any) -> jax.Array:
        params = unflatten_dict({**frozen, **trained})
        return common.cross_entropy(own.apply({"params": params}, x), targets)

    return jax.value_and_grad(loss), (trained, frozen, x, targets)


def compiled(
    step: tuple[Callable[..., Any], tuple[Any, ...]], sharding: Any = None
) -> tuple[Any, common.Figures]:
    """Returns a step compiled, and what the compiler says of it."""
    fn, args = step

    def place(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    program = jax.jit(fn).lower(*jax.tree.map(place, args)).compile()
    cost = program.cost_analysis() or {}
    return program, {
        **common.memory_of(program),
        "bytes": cost.get("bytes accessed"),
        "flops": cost.get("flops"),
    }


def steps(
    size: models.Size, rank: int, names: Sequence[str], **options: bool
) -> dict[str, Callable[[], Any]]:
    """Returns how to make each step that `names` asks for."""
    own = model(size, **options)
    made: dict[str, Callable[[], Any]] = {"floor": lambda: floor_step(own)}
    for kind in KINDS:
        made[kind] = functools.partial(lora_step, own, rank, kind, size)
    if find_spec("qwix"):
        for kind in OTHERS:
            make = functools.partial(qwix_step, size, rank, kind.split()[1], **options)
            made[kind] = make
    return {name: make for name, make in made.items() if name in names}


def columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns the rows for a table."""
    base = common.row_of(rows, "bf16") if any(r["step"] == "bf16" for r in rows) else {}
    lines = [
        (
            row["step"],
            *common.memory_cells(row, 1, 2**20),
            common.fixed(row["bytes"], 2, 1e9),
            common.ratio(row, base, "peak_bytes") if base else "–",
            common.ratio(row, base, "bytes") if base and row["bytes"] else "–",
        )
        for row in rows
    ]
    sizes = ("argument MiB", "temp MiB", "peak MiB", "GB moved")
    return ("step", *sizes, "peak × bf16", "moved × bf16"), lines


def time_columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns the times for a table."""
    base = common.row_of(rows, "bf16")
    lines = [
        (
            row["step"].replace("bf16", "dense"),
            common.fixed(row["seconds"], 0, 1e-3),
            common.ratio(row, base, "seconds"),
        )
        for row in rows
    ]
    return ("step", "ms", "× dense"), lines


def timed(size: models.Size, rank: int, names: Sequence[str], rounds: int) -> Any:
    """Returns the time of each step, in turn, on layers one after the other."""
    runs = {}
    for name, make in steps(size, rank, names, scanned=False, remat=False).items():
        fn, args = make()
        values = _filled(args)
        program = jax.jit(fn).lower(*values).compile()
        runs[name] = functools.partial(program, *values)
    times = common.interleaved(runs, rounds)
    return [{"step": name, "seconds": seconds} for name, seconds in times.items()]


def _filled(shapes: Any) -> Any:
    """Returns arrays for a tree of shapes: small numbers, and random codes."""
    rng = np.random.default_rng(0)

    def fill(x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            values = 0.02 * rng.standard_normal(x.shape, np.float32)
        else:
            values = rng.integers(0, 8, x.shape)
        return jnp.asarray(values).astype(x.dtype)

    return jax.tree.map(fill, shapes)


def main() -> None:
    """Compiles the steps of one target, prints its tables and keeps them."""
    parser = common.parser("quantised", __doc__)
    parser.add_argument("--target", choices=tuple(TARGETS), default="cpu")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--unrolled", action="store_true")
    parser.add_argument("--rounds", type=int, default=0, help="time steps on this CPU")
    parser.add_argument("--steps", nargs="*", default=("floor", *KINDS, *OTHERS))
    for field in dataclasses.fields(models.Size):
        parser.add_argument(
            f"--{field.name}", type=field.type, default=getattr(MODEL, field.name)
        )
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    size = models.Size(
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(MODEL)}
    )
    if options.rounds:
        rows = timed(size, options.rank, options.steps, options.rounds)
        print(common.show(time_columns(rows)))
        keep(options.json, "time", options.target, size, rows)
        return
    sharding = TARGETS[options.target]()
    for name, remat in (("remat", True), ("kept", False)):
        if not remat and options.target != "cpu":
            continue
        shape = {"scanned": not options.unrolled, "remat": remat}
        rows = []
        for step, make in steps(size, options.rank, options.steps, **shape).items():
            _, figures = compiled(make(), sharding)
            rows.append({"step": step, **figures})
            print(f"compiled: {step}, {name}", flush=True)
        print(common.show(columns(rows)))
        keep(options.json, name, options.target, size, rows)


def keep(
    path: Path,
    name: str,
    target: str,
    size: models.Size,
    rows: Sequence[common.Figures],
) -> None:
    """Writes one table beside the others of the file."""
    tables = json.loads(path.read_text())["tables"] if path.exists() else {}
    env = common.environment({"cpu": "", "tpu": "TPU v5e", "gpu": "H100"}[target])
    own = {"environment": env, "model": dataclasses.asdict(size), "rows": rows}
    tables[f"{target} {name}"] = own
    common.write(path, env, tables=dict(sorted(tables.items())))


if __name__ == "__main__":
    main()
