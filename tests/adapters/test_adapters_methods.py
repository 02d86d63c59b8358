"""The laws of adapters for every method, by what `merge` makes of the weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import adapters
from jlora.factors import Axes, Factors, FusedParts, Spec, Trainable
from tests.helpers import normal

pytestmark = pytest.mark.once

TOKENS = jnp.array([[0, 3, 4], [2, 1, 0], [4, 4, 1], [1, 2, 3]])


def model(p, ids):
    x = p["embed"][ids]
    x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])
    return jnp.einsum("bld,dhk->blhk", x, p["heads"])


PARAMS = {
    "embed": normal((5, 4), 0),
    "layers": normal((2, 4, 4), 1),
    "heads": normal((4, 2, 3), 2),
}


def adapter(method, seed, rank=2):
    if method == "rows":
        spec = Spec(
            op="embedding", rank=2, alpha=2, rows=(1, 4), shape=(5, 4), axes=Axes()
        )
        return Trainable({"embed": Factors(None, normal((2, 4), seed), spec)})
    rules = ()
    if method == "parts":
        parts = FusedParts(axis=-1, sizes=(1, 2), ranks=(0, 2))
        rules, method = (jlora.Rule("heads", parts=parts),), "lora"
    config = jlora.LoraConfig(
        rank=rank, alpha=3, method=method, targets="*", rules=rules
    )
    plan = jlora.plan(model, PARAMS, TOKENS, config=config)
    trainable = jlora.split(jax.random.key(seed), PARAMS, plan)[1]
    leaves, treedef = jax.tree.flatten(trainable)
    return treedef.unflatten(
        x + 0.5 * normal(x.shape, seed + i) for i, x in enumerate(leaves)
    )


def changes(trainable):
    merged = jlora.merge(PARAMS, trainable)
    return {k: np.asarray(merged[k] - w, np.float64) for k, w in PARAMS.items()}


def assert_changes(trainable, *weighted, tol=2e-4):
    found = changes(trainable)
    parts = [(weight, changes(t)) for weight, t in weighted]
    for name in PARAMS:
        expected = sum(weight * change[name] for weight, change in parts)
        np.testing.assert_allclose(found[name], expected, atol=tol, err_msg=name)


OTHERS = ["dora", "vera", "adalora", "rows", "parts"]
LORA = adapter("lora", 3, rank=1)


@pytest.mark.parametrize("method", OTHERS)
def test_every_method_obeys_the_laws(method):
    x = adapter(method, 8)
    for same in (
        adapters.scale(x, 1),
        adapters.add([x]),
        adapters.linear([x], [1.0]),
        adapters.concat([x]),
        adapters.truncate(x, 10, params=PARAMS),
        adapters.ties([x], density=1.0),
    ):
        assert jax.tree.structure(same) == jax.tree.structure(x)
        assert all(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves(x)))
    params = PARAMS if method == "dora" else None
    assert_changes(adapters.scale(x, -0.5, params=params), (-0.5, x))
    both = adapters.linear([x, LORA], [0.5, -2.0], params=params)
    assert_changes(both, (0.5, x), (-2, LORA))
    assert {f.spec.method for f in both.lora.values()} == {"lora"}
    assert_changes(adapters.to_lora(x, params=params), (1, x))
    for path, norm in adapters.norms(x, params=params).items():
        np.testing.assert_allclose(norm, np.linalg.norm(changes(x)[path]), rtol=1e-4)


@pytest.mark.parametrize("method", OTHERS)
def test_stack_of_every_method_serves_rows(method):
    x = adapter(method, 8)
    several = [x, LORA, adapter(method, 21, rank=1)]
    params = PARAMS if method == "dora" else None
    stacked = adapters.stack(several, params=params)
    ids = jnp.array([0, 1, -1, 2])
    out = jax.jit(jlora.adapters.per_row(model))(PARAMS, stacked, ids, TOKENS)
    for i, tokens, row in zip(ids, TOKENS, out, strict=True):
        own = several[i] if i >= 0 else Trainable()
        expected = model(jlora.merge(PARAMS, own), tokens[None])[0]
        np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-4)
    for back, own in zip(adapters.unstack(stacked), several, strict=True):
        assert_changes(back, (1, own))


def test_dora_needs_its_base_for_anything_but_itself():
    x = adapter("dora", 8)
    for wrong in (
        lambda: adapters.scale(x, 2),
        lambda: adapters.add([x, LORA]),
        lambda: adapters.stack([x, LORA]),
        lambda: adapters.norms(x),
        lambda: adapters.cosine(x, x),
        lambda: adapters.to_lora(x),
        lambda: adapters.truncate(x, 1),
        lambda: adapters.orthogonality(x, LORA),
    ):
        with pytest.raises(jlora.TreeError, match=r"'embed': DoRA's .* Pass params="):
            wrong()
    assert adapters.add([x, Trainable()]).lora == dict(x.lora)
    with pytest.raises(jlora.TreeError, match=r"'embed': DoRA's .* Pass params="):
        adapters.select(adapters.stack([x, x]), -1)
    made = jlora.pool.create(adapters.stack([LORA]), 1)
    with pytest.raises(jlora.PoolError, match="'embed' is DoRA"):
        jlora.pool.fit(made, x)


def test_dora_extracted_at_a_rank_is_the_best_approximation():
    x = Trainable({"heads": adapter("dora", 8).lora["heads"]})
    dense = changes(x)["heads"].reshape(4, 6)
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    for rank, short in (
        (2, adapters.to_lora(x, rank=2, params=PARAMS)),
        (1, adapters.linear([x], rank=1, params=PARAMS)),
        (1, adapters.interpolate(x, LORA, 0, rank=1, params=PARAMS)),
    ):
        np.testing.assert_allclose(
            changes(short)["heads"].reshape(4, 6),
            (u[:, :rank] * s[:rank]) @ vt[:rank],
            atol=1e-4,
        )


def test_rslora_alone_is_itself_and_exact_in_sums():
    spec = dataclasses.replace(LORA.lora["heads"].spec, rslora=True, alpha=5.0)
    x = Trainable({"heads": dataclasses.replace(LORA.lora["heads"], spec=spec)})
    assert adapters.linear([x], [1]).lora["heads"] is x.lora["heads"]
    assert_changes(adapters.add([x, LORA]), (1, x), (1, LORA))
    (back,) = adapters.unstack(adapters.stack([x]))
    assert_changes(back, (1, x))


def test_adapters_of_a_changed_base_are_named():
    spec = dataclasses.replace(LORA.lora["heads"].spec, init="pissa")
    x = Trainable({"heads": dataclasses.replace(LORA.lora["heads"], spec=spec)})
    assert adapters.linear([x], [1]).lora["heads"] is x.lora["heads"]
    assert adapters.stack([x, x]).lora["heads"].spec.init == "pissa"
    match = r"'heads' of adapter 0 began with init 'pissa'.*jlora.rebase"
    for combine in (adapters.linear, adapters.stack):
        with pytest.raises(jlora.TreeError, match=match):
            combine([x, LORA])
    made = jlora.pool.create(LORA, 1)
    with pytest.raises(jlora.PoolError, match="changed by init='pissa'"):
        jlora.pool.fit(made, x)
