"""`import jlora` is light, and each public name resolves and is documented."""

import os
import subprocess
import sys

import pytest

import jlora


def run(program: str) -> str:
    """What `program` prints in a new interpreter, which may keep its bytecode."""
    env = {k: x for k, x in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_jax_and_numpy_alone():
    program = """
import sys
import jax, numpy
before = {name.partition(".")[0] for name in sys.modules}
import jlora
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before - sys.stdlib_module_names))
"""
    assert run(program).split() == ["jlora"]


def test_import_takes_less_than_300_ms_beyond_jax():
    program = """
import time
import jax, numpy
start = time.process_time()  # other programs may hold the processor
import jlora
print(time.process_time() - start)
"""
    assert min(float(run(program)) for _ in range(3)) < 0.3


def test_import_starts_no_backend():
    program = """
import jax, jlora
jax.config.update("jax_num_cpu_devices", 3)  # an error once a backend has started
print(jax.device_count("cpu"))
"""
    assert run(program).split() == ["3"]


def test_all_has_no_name_twice():
    assert len(jlora.__all__) == len(set(jlora.__all__))


@pytest.mark.parametrize("name", jlora.__all__)
def test_public_name_resolves_and_has_docstring(name):
    value = getattr(jlora, name)
    if callable(value) or hasattr(value, "__path__"):
        assert value.__doc__, f"jlora.{name} has no docstring"
