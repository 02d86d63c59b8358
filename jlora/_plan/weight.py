"""A leaf with its factors, as the interpreter takes it."""

from ..factors import Factors, Leaf
from ..methods import low_rank_pair, method_of
from ..transform.values import RANK, Term, Weight, leaf, leaf_dims


def weight_of(path: str, w: Leaf, factors: Factors) -> Weight:
    """Returns the leaf `path`, the array `w`, with its factors."""
    axes, dims = factors.spec.axes, leaf_dims(w.shape)
    batch, fan_in, fan_out = (
        tuple(dims[i][0] for i in role)
        for role in (axes.batch, axes.fan_in, axes.fan_out)
    )
    term = Term(
        *low_rank_pair(factors),
        (*batch, *fan_in, RANK),
        (*batch, RANK, *fan_out),
        factors.scale,
        factors.spec.dropout,
    )
    weight = leaf(path, w, (term,))
    gain = method_of(factors.spec).gain
    if gain is None:
        return weight
    return weight.replace(gain=gain(factors, w), gain_labels=(*batch, *fan_out))
