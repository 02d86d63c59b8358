"""Whether a server applies an adapter, from names and shapes alone.

What a server takes is data: `_rules.py`, and `models.json` with what its classes call
their modules. `_vllm.py` and its neighbours say how each looks an adapter's tensors up.
"""

from ._portable import refused_by_vllm as refused_by_vllm
from ._report import ServerReport as ServerReport, Verdict as Verdict
from ._validate import validate as validate

__all__ = ["ServerReport", "Verdict", "refused_by_vllm", "validate"]
