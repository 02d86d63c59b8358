"""Only the new head is trained; the model is a fixed function of its input."""

import jlora

from .method import Method, planned

HEAD = ("head/*",)


def head_only() -> Method:
    """Returns the method; the model needs a head."""
    return planned(jlora.LoraConfig(targets=(), train=HEAD))
