"""Settings: eight CPU devices everywhere, strict dtypes and ranks in tests/."""

import gc
import os
from collections.abc import Iterator

import hypothesis
import jax
import pytest

# Tests compile much and compute little: optimising the machine code costs more than
# it saves. Read when JAX starts its backend.
XLA_FLAGS = ["--xla_backend_optimization_level=0"]
XLA_FLAGS += ["--xla_llvm_disable_expensive_passes=true"]
XLA_FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]  # workers fill the cores
if jax.__version_info__ < (0, 11):
    XLA_FLAGS += ["--xla_cpu_use_fusion_emitters=false"]  # a third of the time
os.environ.setdefault("XLA_FLAGS", " ".join(XLA_FLAGS))

# Before the first array: afterwards the number of devices is fixed.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# `pytest --hypothesis-profile thorough` looks for new failures; the default
# repeats the same examples, so that a failure repeats too.
hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,  # the first example compiles
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "thorough",
    derandomize=False,
    deadline=None,
    max_examples=1000,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
# For the second interpreter of .ci/run, where the examples of `ci` ran already.
hypothesis.settings.register_profile(
    "quick", hypothesis.settings.get_profile("ci"), max_examples=8
)
hypothesis.settings.load_profile("ci")

# So that an `assert` in these shows its values too.
pytest.register_assert_rewrite(
    "tests.helpers",
    "tests.io.helpers",
    "tests.libraries.library_cases",
    "tests.peft.models",
    "tests.transform.cases",
)

collect_ignore_glob = ["golden/*.py"]  # these make golden files; they need torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuses names with an address: each worker of `-n 2` would have its own tests."""
    found = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if found:
        raise pytest.UsageError(f"Give ids= to parametrize of {found[0]}")


@pytest.fixture(autouse=True, scope="module")
def strict_promotion() -> Iterator[None]:
    """Casts and broadcasts are written; doctests run as a user would run them."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def settled() -> Iterator[None]:
    """What a file leaves in JAX's caches stays: the collector need not look again."""
    yield
    gc.freeze()


@pytest.fixture
def standard_dtypes() -> Iterator[None]:
    """Lets a test run Adam: optax raises a float to the power of an int32 counter."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def key() -> jax.Array:
    """A random key, the same in each test."""
    return jax.random.key(0)


@pytest.fixture
def failed_reads() -> Iterator[None]:
    """Orbax leaves coroutines of a read that failed to the garbage collector."""
    yield
    gc.collect()
