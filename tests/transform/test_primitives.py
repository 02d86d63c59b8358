"""Every name of a primitive that the transform goes by exists in a supported JAX."""

import jax
import pytest
from jax.extend import core

from jlora.transform import RULES, primitives

# Names of other versions than the one installed, and the first or last that has them.
OTHER_VERSIONS = {}


def known() -> set[str]:
    """Names of all primitives that this JAX has."""
    import gc

    return {p.name for p in gc.get_objects() if isinstance(p, core.Primitive)}


def names() -> set[str]:
    sets = [x for x in vars(primitives).values() if isinstance(x, frozenset)]
    return set().union(RULES, primitives.OPERATIONS, *sets)
