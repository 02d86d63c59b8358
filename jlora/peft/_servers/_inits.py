"""What PEFT's `init_lora_weights` makes of factors, before it puts a file's in place.

Read from PEFT 0.21.2: `tuners/lora/layer.py: LoraLayer.update_layer`, the inits that it
calls, and `update_layer` of `Embedding` and `_ConvNd`. PEFT runs the init of the config
again when it loads, and some inits give A and B other sizes than the config's rank.
"""

from ._base import Shape

_ANY = ("eva", "orthogonal", "loftq", "lora_ga", "olora", "mica")
_NITER = "_niter_"


def fault_of(init: object, rank: int, shape: Shape | None, *, table: bool) -> str:
    """Returns why PEFT cannot run an init on a module, empty if it can.

    Args:
      init: the value of `init_lora_weights`.
      rank: of the module.
      shape: of its weight; None if it is not known.
      table: whether it is an embedding table.

    Examples:
      >>> fault_of("orthogonal", 3, (8, 8), table=False)
      'PEFT needs an even rank for it'
      >>> fault_of("olora", 3, (8, 8), table=False)
      ''
    """
    if not isinstance(init, str) or not init:
        return ""
    word = init.lower()
    most = min(shape) if shape is not None and len(shape) == 2 else rank
    if word == "mica" and rank > most:
        return f"PEFT needs a rank of at most {most} for it"
    if table or word == "gaussian":
        return ""
    if shape is not None and len(shape) > 2:
        return "" if init in ("loftq", "lora_ga") else "PEFT has no such init of it"
    if init == "orthogonal" and rank % 2:
        return "PEFT needs an even rank for it"
    if init.startswith("corda"):
        return "PEFT needs the matrices of `preprocess_corda` for it"
    if init.startswith(f"pissa{_NITER}") and init.count(_NITER) == 1:
        if not init.partition(_NITER)[2].isdecimal():
            return "PEFT needs the number of steps at its end"
        return f"PEFT needs a rank of at most {most} for it" if rank > most else ""
    known = init in ("pissa", *_ANY) or word in ("olora", "mica")
    return "" if known else "PEFT has no such init"


def cut_rank(init: object, rank: int, shape: Shape) -> int:
    """Returns the rank that A and B of a matrix have after an init.

    PiSSA and OLoRA take as many rows and columns as the decomposed weight has.
    """
    word = init if isinstance(init, str) else ""
    return min(rank, *shape) if word == "pissa" or transposes(init) else rank


def transposes(init: object) -> bool:
    """Returns whether an init takes the weight `[in, out]` of a Conv1D for `[out, in]`.

    Then A is `[r, out]` and B `[in, r]`. PEFT refuses A and B of the right sizes where
    they have other ones, and runs no model with those that it takes.
    """
    return isinstance(init, str) and init.lower() == "olora"
