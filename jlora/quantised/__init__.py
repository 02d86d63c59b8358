"""Quantised arrays: codes and scales in place of an array, and the way to and fro.

May import `_state_dicts` and `errors`. Knows nothing of adapters.
"""

from ._axes import (
    has_own_entries as has_own_entries,
    joined as joined,
    looked_up as looked_up,
    rearranged as rearranged,
    split_axis as split_axis,
)
from ._encode import (
    Scheme as Scheme,
    encode as encode,
    encode_like as encode_like,
)
from ._kinds import KINDS as KINDS, NF4 as NF4
from ._node import (
    Quantized as Quantized,
    has_quantized as has_quantized,
    is_quantized as is_quantized,
    like_dense as like_dense,
)
from ._pack import (
    Packing as Packing,
    pack_on_host as pack_on_host,
    packing as packing,
    repacked as repacked,
    unpack as unpack,
    unpack_on_host as unpack_on_host,
    usual_packing as usual_packing,
)
from ._qwix import from_qwix as from_qwix, is_qarray as is_qarray
from ._shards import shard_counts as shard_counts, shard_specs as shard_specs
from ._typed import typed_as as typed_as, whole as whole
