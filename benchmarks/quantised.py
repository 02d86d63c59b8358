"""What do codes in place of weights save, and what do they cost, beside bf16 and qwix?

    python -m benchmarks.quantised                  # CPU, by the compiler's figures
    python -m benchmarks.quantised --target tpu     # libtpu, ahead of time
    python -m benchmarks.quantised --seconds 20     # CPU, and the time of a step

The step is the gradient of A and B, without an optimizer. A and B and the scales have
the dtype of the model. A compiler counts the body of a scan once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

import jlora

from . import common, models, tpu

MODEL = models.Size(width=1024, layers=8, batch=2, length=512, dtype="bfloat16")
KINDS = ("bf16", "int8", "nf4", "nf4 native", "int4")
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
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    return program, {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": common.peak_bytes(program),
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
    fields = ("argument_bytes", "temp_bytes", "peak_bytes")
    lines = [
        (
            row["step"],
            *(common.fixed(row[field], 1, 2**20) for field in fields),
            common.fixed(row["bytes"], 3, 1e9),
            common.fixed(row["flops"], 1, 1e9),
            common.fixed(row.get("seconds"), 3),
        )
        for row in rows
    ]
    return ("step", "arg MiB", "temp MiB", "peak MiB", "GB", "GFLOP", "s"), lines


def main() -> None:
    """Compiles the steps and prints the table."""
    parser = common.parser("quantised", __doc__)
    parser.add_argument("--target", choices=("cpu", "tpu"), default="cpu")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--unrolled", action="store_true")
    parser.add_argument("--no-remat", action="store_true")
    parser.add_argument("--steps", nargs="*", default=("floor", *KINDS, *OTHERS))
    for field in dataclasses.fields(models.Size):
        parser.add_argument(
            f"--{field.name}", type=field.type, default=getattr(MODEL, field.name)
        )
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    sharding = tpu.one_chip() if options.target == "tpu" else None
    size = models.Size(
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(MODEL)}
    )
    shape = {"scanned": not options.unrolled, "remat": not options.no_remat}
    rows = []
    for name, make in steps(size, options.rank, options.steps, **shape).items():
        _, figures = compiled(make(), sharding)
        rows.append({"step": name, **figures})
        print(common.show(columns(rows[-1:])).splitlines()[-1], flush=True)
    print(common.show(columns(rows)))


if __name__ == "__main__":
    main()
