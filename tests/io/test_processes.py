"""Two real processes of two devices each: all call a writer, and the first writes."""

import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.once

PROGRAM = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
me, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, me)
import jlora
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
def over(x, *spec):
    where = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(x.shape, where, lambda part: x[part])
host = np.arange(64, dtype="float32").reshape(8, 8)
spec = jlora.Spec(rank=8, alpha=8.0)
own = jlora.Factors(over(host, "d"), over(host.T, None, "d"), spec)
adapter = jlora.Trainable({"up/kernel": own}, {"up/bias": over(host[0])})

def wrong(write):
    try:
        write()
    except jlora.JloraError as error:
        return str(error)

jlora.save(folder / "one", adapter)
jlora.peft.save(folder / "peft", adapter)
for read in (jlora.load(folder / "one"), jlora.peft.load(folder / "peft", {"up": {
    "kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}})):
    assert np.array_equal(read.lora["up/kernel"].a, host), read
    assert np.array_equal(read.lora["up/kernel"].b, host.T)
    assert np.array_equal(read.full["up/bias"], host[0])
params = {"up": {"kernel": over(host, "d")}}
for write in (
    lambda: jlora.export.safetensors(folder / "whole", params),
    lambda: jlora.peft.save_base(folder / "base", params),
):
    told = wrong(write)
    assert "export.orbax" in told and "'up/kernel'" in told, told
assert "cannot be written" in wrong(lambda: jlora.save(folder / "no" / "x", adapter))
jlora.export.orbax(folder / "orbax", params)
print("done", sorted(p.name for p in folder.iterdir() if p.name[0] != "."))
"""


def test_all_processes_save_one_adapter(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-c", PROGRAM]
    both = [
        subprocess.Popen(
            [*words, str(i), port, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in both]
    for process, (out, errors) in zip(both, ends, strict=True):
        assert process.returncode == 0, errors[-3000:]
        assert "done ['one', 'orbax', 'peft']" in out, out
