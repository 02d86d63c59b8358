"""The rules of libraries: names, axes and scales as their code has them."""

import dataclasses

from ._rules import ONE, Library, Place

_DENSE = "i o -> i r, r o"
_LAYERS = "... i o -> ... i r, ... r o"  # of one, or of all in a loop

# qwix keeps the axes of A apart for a convolution and for an einsum. Flax's own layers
# of either kind call the weight `kernel`; elsewhere only a convolution's layer says so.
_CONV = (r"(?i).*conv.*", "conv")
_KERNEL = Place(
    "*/kernel",
    "*/kernel_lora_a",
    "*/kernel_lora_b",
    op_of=(_CONV, (r"(?i).*(einsum|expert).*", "linear")),
)
_OTHER = Place("*", "*_lora_a", "*_lora_b", op_of=(_CONV, (".*", "linear")))

#: qwix, and tunix, which trains with it: Linen and NNX. Scale `alpha / rank`.
#: https://github.com/google/qwix/blob/main/qwix/_src/providers/lora.py
QWIX = Library("qwix", (_KERNEL, _OTHER))

#: MaxText, which makes them with qwix. Scanned layers lie along the second axis.
#: https://github.com/AI-Hypercomputer/maxtext
MAXTEXT = Library(
    "maxtext", tuple(dataclasses.replace(x, stacked=1) for x in QWIX.places)
)

#: Flax: `nnx.LoRA` around a layer, and `nnx.LoRALinear`. No scale.
#: https://github.com/google/flax/blob/main/flax/nnx/nn/lora.py
NNX = Library(
    "nnx",
    (
        Place(
            "*/base_module/kernel",
            "*/lora_a",
            "*/lora_b",
            _LAYERS,
            ONE,
            wrapper="base_module",
        ),
        Place("*/kernel", "*/lora/lora_a", "*/lora/lora_b", _LAYERS, ONE),
    ),
)

#: EasyDeL, whose `eLoRA` is an `nnx.LoRA` around its own linear layers. No scale.
#: https://github.com/erfanzar/EasyDeL
EASYDEL = Library("easydel", NNX.places)

#: DeepMind's gemma: `gm.nn.LoRA`, and `gemma.peft` in other Linen models. No scale.
#: https://github.com/google-deepmind/gemma/blob/main/gemma/peft/_lora.py
GEMMA = Library(
    "gemma",
    (
        Place("*/w", "*/_LoRAEinsum_0/lora/a", "*/_LoRAEinsum_0/lora/b", scale=ONE),
        Place("*/*", "*/_LoRAEinsum_*/lora/a", "*/_LoRAEinsum_*/lora/b", scale=ONE),
        Place("*/kernel", "*/lora/a", "*/lora/b", scale=ONE),
    ),
)

# Keras calls the kernels of an EinsumDense and of a convolution the same. The names are
# those that Keras gives if none is given, and those in the attention of KerasHub.
_EINSUMS = (
    r"einsum_dense.*|(.*_)?(query|key|value)(_dense)?|(attention_)?output(_dense)?"
)

#: Keras: `layer.enable_lora` of Dense, EinsumDense, Embedding and convolutions. The
#: tree is `{v.path: v.value for v in model.variables}`. Scale `lora_alpha / rank`.
#: https://github.com/keras-team/keras/blob/master/keras/src/layers/core/dense.py
KERAS = Library(
    "keras",
    (
        Place(
            "*/kernel",
            "*/lora_kernel_a",
            "*/lora_kernel_b",
            "... o -> ... r, r o",
            op_of=(_CONV, (_EINSUMS, "linear")),
        ),
        Place(
            "*/embeddings",
            "*/lora_embeddings_a",
            "*/lora_embeddings_b",
            _DENSE,
            op="embedding",
        ),
    ),
)

#: openpi. Only the attention has a scale, `alpha / rank` or `alpha / sqrt(rank)`. The
#: B of its output projection is summed over the heads, as its einsum does.
#: https://github.com/Physical-Intelligence/openpi/blob/main/src/openpi/models/lora.py
OPENPI = Library(
    "openpi",
    (
        Place(
            "*/attn_vec_einsum*/w",
            "*/attn_vec_einsum*/lora_a",
            "*/attn_vec_einsum*/lora_b",
            "... n h d -> ... n h r, ... m r d",
        ),
        Place("*/w", "*/lora_a", "*/lora_b", _LAYERS),
        Place(
            "*/gating_einsum",
            "*/gating_einsum_lora_a",
            "*/gating_einsum_lora_b",
            _LAYERS,
            ONE,
        ),
        Place(
            "*/linear",
            "*/linear_lora_a",
            "*/linear_lora_b",
            _LAYERS,
            ONE,
        ),
    ),
)

#: One slot of SkyRL-tx, whose factors have an axis of adapters: take its index of each
#: A and B first. Scale `alpha` over the rank that its model was built with.
#: https://github.com/NovaSky-AI/SkyRL/blob/main/skyrl/tx/layers/lora.py
SKYRL = Library(
    "skyrl",
    (
        Place("*/kernel", "*/lora_A", "*/lora_B", _LAYERS),
        Place("*/weight", "*/lora_A", "*/lora_B", _LAYERS),
        Place(
            "*/embedding",
            "*/lora_A",
            "*/lora_B",
            _LAYERS,
            op="embedding",
        ),
    ),
)

SHIPPED = {
    library.name: library
    for library in (QWIX, MAXTEXT, NNX, EASYDEL, GEMMA, KERAS, OPENPI, SKYRL)
}
