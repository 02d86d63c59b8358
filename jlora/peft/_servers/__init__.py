"""Whether a server applies an adapter, from names and shapes alone.

What a server takes is data: `_rules.py`, and `models.json` with what its classes call
their modules. `_vllm.py` and its neighbours say how each looks an adapter's tensors up.
"""

from ._report import ServerReport as ServerReport, Verdict as Verdict
from ._validate import validate as validate

__all__ = ["ServerReport", "Verdict", "validate"]
