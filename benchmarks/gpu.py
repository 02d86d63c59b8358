"""What memory does a LoRA training step take on one H100, by its compiler's figures?

    python -m benchmarks.gpu
    python -m benchmarks.gpu --kind linen --length 1024

Nothing runs: XLA compiles ahead of time for a described card, on a machine without one.
Figures that are not asked for stay in the file.
Needs `pip install --no-deps jax-cuda12-pjrt jax-cuda12-plugin`, of JAX's version.
"""

import dataclasses
import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax

from . import common, models, tpu

COMPILER = "jax_cuda12_plugin"
MISSING = (
    "The CUDA plugin is not installed: pip install --no-deps jax-cuda12-pjrt "
    "jax-cuda12-plugin."
)
# What the compiler asks a real card for, from NVIDIA's data sheet of the H100 SXM.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


STEPS = (common.FLOOR, common.JLORA, "side path, autodiff", "full fine-tune")


def cards(count: int = 1) -> Sequence[Any]:
    """Returns the cards of a described host."""
    from jax.experimental import topologies

    options: dict[str, Any] = {"target_config": H100, "topology": f"1x1x{count}"}
    return topologies.get_topology_desc(
        platform="cuda", topology_name="h100", **options
    ).devices


def one_card() -> jax.sharding.Sharding:
    """Returns the placement on one described H100."""
    return jax.sharding.SingleDeviceSharding(cards()[0])


def columns(cases: Sequence[common.Figures]) -> common.Columns:
    """Returns a line for each model: the floor's memory, and each step's beside it."""
    lines = []
    for case in cases:
        low, *others = case["rows"]
        lines.append(
            (
                f"{case['kind']}, {case['batch']} × {case['length']}",
                common.fixed(low["temp_bytes"], 1, 2**20),
                common.fixed(low["peak_bytes"], 1, 2**20),
                *(common.ratio(row, low, "temp_bytes") for row in others),
                *(common.ratio(row, low, "peak_bytes") for row in others),
            )
        )
    names = STEPS[1:]
    head = ("model, tokens", "floor: temp MiB", "peak MiB")
    return (
        *head,
        *(f"temp: {n}" for n in names),
        *(f"peak: {n}" for n in names),
    ), lines


def main() -> None:
    """Compiles the steps of each model, on short and on long sequences."""
    parser = common.parser("gpu", __doc__)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--kind", nargs="*", choices=models.KINDS, default=models.KINDS)
    parser.add_argument("--length", type=int, nargs="*", default=(128, 1024))
    options = parser.parse_args()
    if find_spec(COMPILER) is None:
        print(MISSING)
        return
    jax.config.update("jax_platforms", "cpu")
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    cases = {(own["kind"], own["length"]): own for own in found.get("cases", ())}
    card, env = one_card(), common.environment("one H100, compiled ahead of time")
    for kind in options.kind:
        for length in options.length:
            size = models.Size(
                options.width, options.layers, length=length, dtype="bfloat16"
            )
            steps = common.training_steps(
                models.KINDS[kind](size), options.rank, names=STEPS, abstract=True
            )
            rows = [
                {"step": name, **common.compile_step(tpu.placed(step, card))[1]}
                for name, step in steps.items()
            ]
            own = {"kind": kind, **dataclasses.asdict(size), "rows": rows}
            cases[kind, length] = own
            kept = [cases[key] for key in sorted(cases)]
            common.write(options.json, env, rank=options.rank, cases=kept)
            print(f"compiled: {kind}, {length}", flush=True)
    print(common.show(columns(list(cases.values()))))


if __name__ == "__main__":
    main()
