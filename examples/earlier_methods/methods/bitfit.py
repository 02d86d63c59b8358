"""BitFit: the biases are trained, those of the norms too, and no weight.

References:
  Ben Zaken et al., 2021, BitFit, https://arxiv.org/abs/2106.10199
"""

import jlora

from .head import HEAD
from .method import Method, planned


def bitfit() -> Method:
    """Returns the method; the model needs biases, which a Llama has not."""
    return planned(jlora.LoraConfig(targets=(), train=("layers/**/bias", *HEAD)))
