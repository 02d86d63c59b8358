"""Every name of a primitive that the transform goes by exists in a supported JAX."""

import gc

import jax
import pytest

from jlora.transform import RULES, compat, primitives

# Names that not every supported JAX has: the versions that have them.
SOME_VERSIONS = {
    "closed_call": jax.__version_info__ < (0, 11),
    "stack": jax.__version_info__ >= (0, 10, 1),
    "unstack": jax.__version_info__ >= (0, 10, 1),
}
SETS = [x for x in vars(primitives).values() if isinstance(x, frozenset)]
NAMES = sorted(set().union(RULES, primitives.OPERATIONS, *SETS))


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Names of all primitives of this JAX."""
    gc.unfreeze()  # conftest.py freezes what files before this one left
    return {x.name for x in gc.get_objects() if isinstance(x, compat.Primitive)}


@pytest.mark.parametrize("name", NAMES)
def test_name_is_that_of_a_primitive(name, known):
    assert (name in known) == SOME_VERSIONS.get(name, True)
