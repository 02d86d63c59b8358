"""Rules that several maps share."""

from ..names import Entry

# Tensors of old files that are computed, not learned.
ROTARY = ("[model.]layers.{i}.self_attn.rotary_emb.inv_freq",)

# What torch calls the linear layers of a decoder's layer.
ATTENTION = "model.layers.{i}.self_attn"
MLP = "model.layers.{i}.mlp"


def norm(flax: str, torch: str) -> tuple[Entry, ...]:
    """Returns the rules of a layer norm."""
    return (
        Entry(f"{flax}/scale", f"{torch}.weight"),
        Entry(f"{flax}/bias", f"{torch}.bias"),
    )


def dense(flax: str, torch: str) -> tuple[Entry, ...]:
    """Returns the rules of a dense layer."""
    return (
        Entry(f"{flax}/kernel", f"{torch}.weight"),
        Entry(f"{flax}/bias", f"{torch}.bias"),
    )


def same(*modules: str) -> tuple[Entry, ...]:
    """Returns the rules of dense layers with the same path on both sides."""
    return tuple(
        entry for flax in modules for entry in dense(flax, flax.replace("/", "."))
    )


def table(flax: str) -> Entry:
    """Returns the rule of a table `[vocabulary, features]` that may be the head too."""
    torch = "model.embed_tokens.weight"
    return Entry(flax, torch, "v d -> v d", "embedding", tied="lm_head.weight")


def vectors(pairs: dict[str, str]) -> tuple[Entry, ...]:
    """Returns the rules of vectors, as norms and biases have; torch's names by path."""
    return tuple(Entry(flax, torch, kind="other") for flax, torch in pairs.items())


def matrices(axes: str, pairs: dict[str, str]) -> tuple[Entry, ...]:
    """Returns the rules of linear layers with these axes; torch's names by path."""
    return tuple(Entry(flax, torch, axes, "linear") for flax, torch in pairs.items())
