"""Which leaves an optimizer treats alike: labels and masks."""

import jax

from ..errors import TreeError
from ..factors import Factors, Leaf, PyTree, Trainable
from ..methods import trained_leaves

Label = str  # "a", "b", "magnitude", "full" or "frozen"


def labels(tree: PyTree) -> PyTree:
    """Returns `tree` with a label at each leaf, for `optax.multi_transform`.

    Args:
      tree: a `Trainable`, or any pytree that contains one or more, such as
        `{"frozen": frozen, "trainable": trainable}`.

    Returns:
      A tree of the same structure. The label of a leaf of a `Trainable` is `"a"`,
      `"b"`, `"magnitude"` or `"full"`. All other leaves are `"frozen"`, and so are the
      singular vectors that `method="mica"` and `"lora_xs"` do not train.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> head = jlora.Trainable(full={"head": jnp.ones(2)})
      >>> labels({"base": {"w": jnp.ones(2)}, "trained": head})
      {'base': {'w': 'frozen'}, 'trained': Trainable(lora={}, full={'head': 'full'})}
    """

    def of_factors(factors: Factors) -> Factors:
        trained = trained_leaves(factors)
        return jax.tree.map_with_path(
            lambda at, _: at[0].name if at[0].name in trained else "frozen", factors
        )

    def of(node: PyTree) -> PyTree:
        if not isinstance(node, Trainable):
            return "frozen"
        return Trainable(
            {path: of_factors(factors) for path, factors in node.lora.items()},
            {path: jax.tree.map(lambda _: "full", x) for path, x in node.full.items()},
        )

    return jax.tree.map(of, tree, is_leaf=is_trainable)


def mask(tree: PyTree) -> PyTree:
    """Returns `tree` with True at the leaves that are trained and False at all others.

    Args:
      tree: a `Trainable`, or any pytree that contains one or more.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> mask({"w": jnp.ones(2), "t": jlora.Trainable(full={"head": jnp.ones(2)})})
      {'t': Trainable(lora={}, full={'head': True}), 'w': False}
    """
    return jax.tree.map(lambda label: label != "frozen", labels(tree))


NO_DECAY = ("b", "beta", "bias", "gain", "gamma", "offset", "scale")


def decay_mask(tree: PyTree) -> PyTree:
    """Returns `tree` with True at the leaves that weight decay may shrink.

    These are the factors that are trained, and matrices trained in full. Decay does not
    apply to magnitudes, to the vectors of VeRA, or to leaves trained in full with fewer
    than two axes.

    Nor does it apply to biases and norms. Stacked layers and attention heads give them
    more axes, so the path tells: its last component ends in `bias`, or is `b`, `beta`,
    `gain`, `gamma`, `offset` or `scale`, or a component contains `norm`. Frozen leaves
    are False too.

    Args:
      tree: a `Trainable`, or any pytree that contains one or more.

    Examples:
      >>> import jax.numpy as jnp, optax, jlora
      >>> heads = {"head/kernel": jnp.ones((2, 2)), "q/bias": jnp.ones((2, 2))}
      >>> decay_mask(jlora.Trainable(full=heads)).full
      {'head/kernel': True, 'q/bias': False}
      >>> tx = optax.adamw(1e-3, weight_decay=0.1, mask=jlora.optim.decay_mask)
    """

    def of_factors(factors: Factors) -> Factors:
        decays = trained_leaves(factors).keys()
        if factors.spec.method == "vera":
            decays = ()
        elif factors.spec.method != "lora_xs":
            decays = decays - {"magnitude"}
        return jax.tree.map_with_path(lambda at, _: at[0].name in decays, factors)

    def of_full(path: str, leaf: Leaf) -> Leaf:
        *outer, last = path.lower().split("/")
        named = last in NO_DECAY or last.endswith("bias")
        named = named or any("norm" in part for part in (*outer, last))
        return jax.tree.map(lambda x: not named and x.ndim >= 2, leaf)

    def of(node: PyTree) -> PyTree:
        if not isinstance(node, Trainable):
            return False
        return Trainable(
            {path: of_factors(factors) for path, factors in node.lora.items()},
            {path: of_full(path, leaf) for path, leaf in node.full.items()},
        )

    return jax.tree.map(of, tree, is_leaf=is_trainable)


def check_trainables(name: str, tree: PyTree) -> None:
    """Raises a TreeError if an optimizer of A and B is given a tree without them."""
    nodes = jax.tree.leaves(tree, is_leaf=is_trainable)
    if nodes and not any(map(is_trainable, nodes)):
        raise TreeError(
            f"{name} found no jlora.Trainable in the tree that it is to update, so it "
            "cannot tell A from B. Give it trainable from jlora.split, or a tree that "
            "holds it; put transformations that flatten the tree inside of it."
        )


def is_trainable(node: object) -> bool:
    """Returns whether a node of a tree is a `Trainable`."""
    return isinstance(node, Trainable)
