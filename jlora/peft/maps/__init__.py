"""What the leaves of common models are called in torch; each map is data.

A file a library. To add or replace rules, put others in front:
`NameMap((Entry(...), *LLAMA.entries), prefix=LLAMA.prefix)`. A leaf that no rule is for
is an error that names it.
"""

from .bonsai import (
    BONSAI_QWEN3 as BONSAI_QWEN3,
)
from .examples import (
    SENTIMENT as SENTIMENT,
)
from .gemma import (
    GEMMA1_EINSUM as GEMMA1_EINSUM,
    GEMMA2_2B_EINSUM as GEMMA2_2B_EINSUM,
    GEMMA2_EINSUM as GEMMA2_EINSUM,
    GEMMA3_EINSUM as GEMMA3_EINSUM,
    GEMMA_EINSUM as GEMMA_EINSUM,
)
from .keras_hub import (
    KERAS_GEMMA as KERAS_GEMMA,
    KERAS_GEMMA2 as KERAS_GEMMA2,
    KERAS_GEMMA3 as KERAS_GEMMA3,
    KERAS_LLAMA as KERAS_LLAMA,
)
from .transformers import (
    BERT as BERT,
    GEMMA as GEMMA,
    GPT2 as GPT2,
    LLAMA as LLAMA,
    LLAMA_STACKED as LLAMA_STACKED,
    MISTRAL as MISTRAL,
    PHI3 as PHI3,
    QWEN2 as QWEN2,
    ROBERTA as ROBERTA,
    T5 as T5,
    VIT as VIT,
    VIT_V5 as VIT_V5,
    phi3 as phi3,
)
from .tunix import (
    TUNIX_GEMMA as TUNIX_GEMMA,
    TUNIX_GEMMA2 as TUNIX_GEMMA2,
    TUNIX_GEMMA3 as TUNIX_GEMMA3,
    TUNIX_LLAMA3 as TUNIX_LLAMA3,
    TUNIX_QWEN2 as TUNIX_QWEN2,
    TUNIX_QWEN3 as TUNIX_QWEN3,
)
