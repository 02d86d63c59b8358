"""One H100, described: XLA compiles for it ahead of time, on a machine without a GPU.

Needs `pip install --no-deps jax-cuda12-pjrt jax-cuda12-plugin`, of JAX's version.
"""

from typing import Any

import jax

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


def one_card() -> jax.sharding.Sharding:
    """Returns the placement on one described H100."""
    from jax.experimental import topologies

    options: dict[str, Any] = {"target_config": H100, "topology": "1x1x1"}
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", **options
    )
    return jax.sharding.SingleDeviceSharding(topology.devices[0])
