"""Optimizers that keep state for the trained leaves and leave all others alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import jlora
from jlora.factors import Factors, Spec
from tests.helpers import bits

pytestmark = pytest.mark.usefixtures("standard_dtypes")


def model(p, x):
    return jnp.tanh(x @ p["w"] + p["bias"][None]) @ p["head"] * p["gain"]


def weights():
    rng = np.random.default_rng(0)
    w, head = rng.normal(size=(4, 6)), rng.normal(size=(6, 2))
    return {
        "w": jnp.asarray(w, "float32").at[0, 0].set(-0.0).at[0, 1].set(0.0),
        "bias": jnp.array([-0.0, 0.0, 1e-42, -3.0, 1e38, 0.5]),
        "head": jnp.asarray(head, "float32"),
        "gain": jnp.array(2.0),
        "table": jnp.array([jnp.nan, -jnp.inf, -0.0]),  # not used
        "half": jnp.array([-0.0, 1.5], "bfloat16"),  # not used
    }


def parts():
    params = weights()
    config = jlora.LoraConfig(rank=2, targets="w", train="head")
    x = jnp.ones((3, 4))
    plan = jlora.plan(model, params, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    return {"frozen": frozen, "trainable": trainable}


def train(tx, steps=3, tree=None):
    """The `TrainState` after some steps under one `jit`."""
    lora_fn = jlora.apply_lora(model)
    tree = parts() if tree is None else tree
    state = TrainState.create(apply_fn=lora_fn, params=tree, tx=tx)

    @jax.jit
    def step(state, x):
        def loss(params):
            y = state.apply_fn(params["frozen"], params["trainable"], x)
            return jnp.mean((y - 1) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for i in range(steps):
        state = step(state, jnp.full((3, 4), 0.1 * (i + 1)))
    return state


TRAINED = 2 * 4 + 2 * 6 + 12  # A, B and the head


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 10)
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.5),
    "adamw with a schedule": lambda: optax.adamw(SCHEDULE, weight_decay=0.5),
    "lion": lambda: optax.lion(0.01, weight_decay=0.5),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(0.01),
        optax.add_decayed_weights(0.3),
        optax.adam(0.1),
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adamw(0.1, weight_decay=0.5), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=0.1, weight_decay=0.5
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adamw(0.1), 3),
}


@pytest.mark.once
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_leaves_stay_bit_identical_and_trained_ones_move(name):
    before = parts()
    state = train(jlora.optim.masked(OPTIMIZERS[name]()))
    assert bits(state.params["frozen"]) == bits(before["frozen"])
    old, new = before["trainable"], state.params["trainable"]
    assert jax.tree.structure(old) == jax.tree.structure(new)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert bool((a != b).any())
        assert bool(jnp.isfinite(b).all())


@pytest.mark.once
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trained_leaves_move_as_without_the_frozen_side(name):
    """`masked(tx)` on both sides does what `tx` does on the trainable alone."""
    state = train(jlora.optim.masked(OPTIMIZERS[name]()))
    tree = parts()
    tx = OPTIMIZERS[name]()
    opt_state = tx.init(tree["trainable"])
    lora_fn = jlora.apply_lora(model)

    @jax.jit
    def step(trainable, opt_state, x):
        def loss(trainable):
            return jnp.mean((lora_fn(tree["frozen"], trainable, x) - 1) ** 2)

        grads = jax.grad(loss)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    trainable = tree["trainable"]
    for i in range(3):
        x = jnp.full((3, 4), 0.1 * (i + 1))
        trainable, opt_state = step(trainable, opt_state, x)
    actual, expected = state.params["trainable"], trainable
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def sizes(state):
    return sorted(x.size for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("name", "copies", "scalars"),
    [("sgd", 0, 0), ("momentum", 1, 0), ("adamw", 2, 1), ("MultiSteps", 3, 3)],
)
def test_state_exists_for_trained_leaves_alone(name, copies, scalars):
    tx = jlora.optim.masked(OPTIMIZERS[name]())
    leaves = [8, 12, 12] * copies
    found = [n for n in sizes(tx.init(parts())) if n > 1]
    assert found == sorted(leaves)
    assert sum(found) == copies * TRAINED
    assert len(sizes(tx.init(parts()))) - len(found) >= scalars
    shapes = jax.eval_shape(tx.init, parts())
    assert sizes(shapes) == sizes(tx.init(parts()))


def test_the_global_norm_is_that_of_the_trained_gradients():
    tree = parts()
    grads = jax.tree.map(jnp.ones_like, tree)
    tx = jlora.optim.masked(optax.clip_by_global_norm(1.0))
    updates, _ = tx.update(grads, tx.init(tree), tree)
    leaves = jax.tree.leaves(updates["trainable"])
    norm = np.linalg.norm(np.concatenate([np.ravel(x) for x in leaves]))
    assert norm == pytest.approx(1.0)
    assert float(updates["trainable"].full["head"][0, 0]) == pytest.approx(
        TRAINED**-0.5
    )


def test_updates_of_frozen_leaves_are_minus_zero():
    """The one number that leaves the bits of plus and minus zero alone."""
    tree = parts()
    # Outside `jit`, XLA rounds subnormal numbers to zero in any sum.
    tree["frozen"]["bias"] = jnp.array([-0.0, 0.0, 1e-30, -3.0, 1e38, 0.5])
    tx = jlora.optim.masked(optax.adamw(0.1, weight_decay=1.0))
    grads = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), tree)
    grads["trainable"] = jax.tree.map(jnp.ones_like, tree["trainable"])
    updates, _ = tx.update(grads, tx.init(tree), tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    for update in jax.tree.leaves(updates["frozen"]):
        assert not np.asarray(update, "float32").any()
        assert np.signbit(np.asarray(update, "float32")).all()
    new = optax.apply_updates(tree, updates)
    assert bits(new["frozen"]) == bits(tree["frozen"])


def test_integer_leaves_stay_too():
    """Their gradients are `float0`, as `jax.grad(..., allow_int=True)` gives them."""
    tree = parts()
    tree["frozen"]["count"] = jnp.arange(3)
    lora_fn = jlora.apply_lora(model)

    def loss(params):
        y = lora_fn(params["frozen"], params["trainable"], jnp.ones((3, 4)))
        return jnp.sum(y**2)

    tx = jlora.optim.masked(optax.adamw(0.1))

    @jax.jit
    def step(tree):
        grads = jax.grad(loss, allow_int=True)(tree)
        updates, _ = tx.update(grads, tx.init(tree), tree)
        return optax.apply_updates(tree, updates)

    new = step(tree)
    assert bits(new["frozen"]) == bits(tree["frozen"])


def test_gradients_of_frozen_leaves_are_not_computed_under_jit():
    """What nothing needs, XLA removes: no product with a result like `w` is left."""
    tx = jlora.optim.masked(optax.adamw(0.1))
    tree = parts()
    state = tx.init(tree)
    lora_fn = jlora.apply_lora(model)

    def step(tree, state, x):
        def loss(tree):
            return jnp.sum(lora_fn(tree["frozen"], tree["trainable"], x) ** 2)

        updates, state = tx.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    text = jax.jit(step).lower(tree, state, jnp.ones((3, 4))).compile().as_text()
    dots = [line for line in text.splitlines() if " dot(" in line]
    assert dots
    assert not [line for line in dots if "= f32[4,6]" in line or "= f32[6,4]" in line]


def test_masked_works_on_a_bare_trainable():
    trainable = parts()["trainable"]
    tx = jlora.optim.masked(optax.adam(0.1))
    grads = jax.tree.map(jnp.ones_like, trainable)
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    plain = optax.adam(0.1)
    expected, _ = plain.update(grads, plain.init(trainable), trainable)
    assert bits(updates) == bits(expected)


def test_masked_passes_extra_arguments_on():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append((value, extra))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = jlora.optim.masked(inner)
    tree = parts()
    tx.update(tree, tx.init(tree), tree, value=3.0, more=1)
    assert seen == [(3.0, {"more": 1})]


def test_masked_inside_other_transformations():
    """A chain around `masked` works as well as one inside it."""
    tx = optax.chain(jlora.optim.masked(optax.adamw(0.1)), optax.scale(1.0))
    before = parts()
    state = train(tx)
    assert bits(state.params["frozen"]) == bits(before["frozen"])


# Labels and masks.


def test_labels_have_the_trees_structure_and_name_every_leaf():
    tree = parts()
    named = jlora.optim.labels(tree)
    assert jax.tree.structure(named) == jax.tree.structure(tree)
    assert set(jax.tree.leaves(named["frozen"])) == {"frozen"}
    factors = named["trainable"].lora["w"]
    assert (factors.a, factors.b, factors.magnitude) == ("a", "b", None)
    assert named["trainable"].full == {"head": "full"}
    assert jlora.optim.labels(tree["trainable"]) == named["trainable"]


def test_labels_of_a_magnitude():
    factors = dataclasses.replace(
        parts()["trainable"].lora["w"], magnitude=jnp.ones((6,))
    )
    named = jlora.optim.labels(jlora.Trainable(lora={"w": factors}))
    assert named.lora["w"].magnitude == "magnitude"
    assert jax.tree.leaves(named) == ["a", "b", "magnitude"]


def test_mask_is_true_for_trained_leaves_alone():
    tree = parts()
    chosen = jlora.optim.mask(tree)
    assert jax.tree.structure(chosen) == jax.tree.structure(tree)
    assert jax.tree.leaves(chosen["trainable"]) == [True] * 3
    assert jax.tree.leaves(chosen["frozen"]) == [False] * 5
    count = sum(jax.tree.leaves(jax.tree.map(lambda m, x: m * x.size, chosen, tree)))
    assert count == TRAINED


def test_several_trainables_in_one_tree():
    one = parts()["trainable"]
    tree = {"base": jnp.ones(2), "adapters": [one, {"second": one}]}
    assert sum(jax.tree.leaves(jlora.optim.mask(tree))) == 6
    assert jlora.optim.labels(tree)["base"] == "frozen"


def test_trees_without_trainables_are_frozen():
    assert jlora.optim.mask({"w": jnp.ones(2), "n": None}) == {"w": False, "n": None}
    assert jax.tree.leaves(jlora.optim.labels(jlora.Trainable())) == []


def test_multi_transform_gives_each_role_its_own_rate():
    """LoRA+: B learns faster than A, the head on its own, the rest not at all."""
    rates = {"a": 0.01, "b": 0.16, "full": 0.5, "magnitude": 1.0}
    transforms = {name: optax.sgd(rate) for name, rate in rates.items()}
    transforms["frozen"] = optax.set_to_zero()
    tx = optax.multi_transform(transforms, jlora.optim.labels)
    tree = parts()
    grads = jax.tree.map(jnp.ones_like, tree)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    factors = updates["trainable"].lora["w"]
    np.testing.assert_allclose(factors.a, -0.01)
    np.testing.assert_allclose(factors.b, -0.16)
    np.testing.assert_allclose(updates["trainable"].full["head"], -0.5)
    assert not any(
        np.asarray(u, "f4").any() for u in jax.tree.leaves(updates["frozen"])
    )


def test_multi_transform_inside_masked():
    tx = jlora.optim.masked(
        optax.multi_transform(
            {"a": optax.adam(0.1), "b": optax.adam(0.2), "full": optax.adamw(0.3)},
            lambda tree: jlora.optim.labels(tree),
        )
    )
    before = parts()
    state = train(tx)
    assert bits(state.params["frozen"]) == bits(before["frozen"])
    assert bool((state.params["trainable"].full["head"] != 0).any())


def test_lora_plus_is_one_optimizer_for_a_and_a_faster_one_for_b():
    """Embeddings apart; a vector trained in full goes with B, a matrix with A."""

    def fn(p, ids):
        return jnp.tanh(p["table"][ids] @ p["w"] + p["bias"][None]) @ p["head"]

    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "table": jax.random.normal(keys[0], (7, 4)),
        "w": jax.random.normal(keys[1], (4, 5)),
        "bias": jnp.zeros(5),
        "head": jax.random.normal(keys[2], (5, 2)),
    }
    ids = jnp.arange(3)
    train = ("bias", "head")
    config = jlora.LoraConfig(rank=2, targets=("table", "w"), train=train)
    plan = jlora.plan(fn, params, ids, config=config)
    _, trainable = jlora.split(keys[3], params, plan)
    rate, ratio, embedding = 1e-2, 16.0, 0.5

    def adamw(scale):
        return optax.adamw(rate * scale, weight_decay=0.1)

    table = jax.tree.map(lambda _: "embedding", trainable.lora["table"])
    groups = jlora.Trainable(
        {"table": table, "w": jlora.optim.labels(trainable).lora["w"]},
        {"bias": "b", "head": "a"},
    )
    by_group = {"a": adamw(1.0), "b": adamw(ratio), "embedding": adamw(embedding)}
    expected = optax.multi_transform(by_group, groups)
    actual = jlora.optim.lora_plus(adamw(1.0), ratio=ratio, embedding_ratio=embedding)
    ours = theirs = trainable
    state, expected_state = actual.init(ours), expected.init(theirs)
    for i in range(3):
        gradient = jax.tree.map(lambda x, i=i: jnp.cos(x + i), trainable)
        updates, state = actual.update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
        updates, expected_state = expected.update(gradient, expected_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        ours,
        theirs,
    )


def test_lora_plus_composes_with_masked():
    tx = jlora.optim.masked(jlora.optim.lora_plus(optax.adamw(1e-2), ratio=4))
    tree = parts()
    after = train(tx, tree=tree).params
    assert bits(after["frozen"]) == bits(tree["frozen"])
    assert bits(after["trainable"]) != bits(tree["trainable"])


@pytest.mark.parametrize("name", ["ratio", "embedding_ratio"])
def test_lora_plus_checks_its_ratios(name):
    with pytest.raises(ValueError, match=f"{name} must be a positive number"):
        jlora.optim.lora_plus(optax.sgd(1.0), **{name: 0})
    with pytest.raises(ValueError, match=f"{name} must be a positive number, got '4'"):
        jlora.optim.lora_plus(optax.sgd(1.0), **{name: "4"})


@pytest.mark.once
@pytest.mark.parametrize("name", ["masked", "lora_plus", "lora_fa", "riemannian"])
def test_what_is_not_an_optimizer_is_an_error(name):
    for tx in (None, optax.sgd):  # a function that makes one
        with pytest.raises(jlora.ConfigError, match=f"{name} takes an optimizer of op"):
            getattr(jlora.optim, name)(tx)
    with pytest.raises(jlora.ConfigError, match=r"adalora takes an.*got NoneType"):
        jlora.optim.adalora(None, target_rank=2, steps=10)


@pytest.mark.parametrize("name", ["lora_plus", "lora_fa", "riemannian"])
def test_a_tree_without_a_trainable_is_an_error(name):
    own = Factors(jnp.ones((3, 2)), jnp.ones((2, 4)), Spec(rank=2, alpha=2))
    tx = getattr(jlora.optim, name)(optax.sgd(1e-2))
    for tree in ({"w": own}, jnp.ones(14)):
        with pytest.raises(jlora.TreeError, match=rf"{name} found no jlora\.Trainable"):
            tx.update(tree, tx.init(tree), tree)


def test_adalora_passes_extra_arguments_on():
    spec = Spec(rank=2, alpha=2, method="adalora")
    own = Factors(jnp.eye(3, 2), jnp.eye(2, 4), spec, jnp.ones(2))
    tree = jlora.Trainable({"w": own})
    tx = optax.chain(optax.sgd(1e-2), optax.contrib.reduce_on_plateau())
    tx = jlora.optim.adalora(tx, target_rank=1, steps=3)
    _, state = tx.update(tree, tx.init(tree), tree, value=jnp.float32(1.0))
    assert isinstance(state, jlora.optim.RankBudgetState)
    assert int(state.step) == 1


@pytest.mark.parametrize("rank", [math.nan, 0, "2"])
def test_adalora_checks_its_target(rank):
    with pytest.raises(jlora.ConfigError, match="target_rank must be a positive"):
        jlora.optim.adalora(optax.sgd(1.0), target_rank=rank, steps=3)
