"""Every weight is trained; what all other methods are measured against."""

import jlora

from .method import Method, planned


def full(train: str | tuple[str, ...] = "**") -> Method:
    """Returns the method for the leaves that the globs `train` match."""
    return planned(jlora.LoraConfig(targets=(), train=train))
