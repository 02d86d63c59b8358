"""A leaf with its factors, as the interpreter takes it."""

from ..factors import Factors, Leaf, Spec
from ..methods import low_rank_pair, method_of
from ..transform.atoms import RANK, leaf_dims
from ..transform.values import Term, Weight, leaf


def weight_of(path: str, w: Leaf, factors: Factors) -> Weight:
    """Returns the leaf `path`, the array `w`, with its factors."""
    gain = method_of(factors.spec).gain
    own = None if gain is None else gain(factors, w)
    return adapted_leaf(path, w, factors.spec, *low_rank_pair(factors), own)


def adapted_leaf(
    path: str, w: Leaf, spec: Spec, a: Leaf, b: Leaf, gain: Leaf
) -> Weight:
    """Returns the leaf `path` as `gain * (w + scale * a b)`, None for no gain."""
    axes, dims = spec.axes, leaf_dims(w.shape)
    batch, fan_in, fan_out = (
        tuple(dims[i][0] for i in role)
        for role in (axes.batch, axes.fan_in, axes.fan_out)
    )
    a_labels, b_labels = (*batch, *fan_in, RANK), (*batch, RANK, *fan_out)
    term = Term(a, b, a_labels, b_labels, spec.scale, spec.dropout, spec.form)
    weight = leaf(path, w, (term,))
    if gain is None:
        return weight
    return weight.replace(gain=gain, gain_labels=(*batch, *fan_out))
