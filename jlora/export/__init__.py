"""Models for other programs, and models on disk that need not fit into memory.

May import `_io`, `_core`, `_plan` and what is below them.
"""

from ._directory import merge_directory as merge_directory
from ._files import (
    extract_files as extract_files,
    merge_files as merge_files,
    quantize_files as quantize_files,
)
from ._flat_plan import flat_plan as flat_plan
from ._whole import (
    orbax as orbax,
    safetensors as safetensors,
    stablehlo as stablehlo,
)
