"""A gate for each token, and activated LoRA."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers import normal

WIDTH, HEADS, VOCAB, LENGTH = 8, 2, 11, 6
INVOCATION = (3, 4)
TOKENS = jnp.array([[1, 2, 3, 4, 5, 6], [3, 4, 1, 2, 3, 4], [1, 2, 3, 5, 4, 6]])
GATE = jnp.array([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0] * 6], bool)
SHAPES = {
    "embed": (VOCAB, WIDTH),
    "layers/qkv": (2, WIDTH, 3, HEADS, WIDTH // HEADS),
    "layers/out": (2, HEADS, WIDTH // HEADS, WIDTH),
    "layers/up": (2, WIDTH, 2 * WIDTH),
    "layers/down": (2, 2 * WIDTH, WIDTH),
    "head": (WIDTH, VOCAB),
}


def weights():
    flat = {k: normal(s, i) / 3 for i, (k, s) in enumerate(SHAPES.items())}
    layers = {k.split("/")[1]: v for k, v in flat.items() if "/" in k}
    return {"embed": flat["embed"], "layers": layers, "head": flat["head"]}


def decoder(p, tokens, cache=None):
    """Returns logits, and the keys and values of all positions so far."""
    start = 0 if cache is None else cache.shape[3]
    mask = jnp.tri(start + tokens.shape[1], dtype=bool)[None, None, start:]
    x = p["embed"][tokens]

    def layer(x, given):
        w, old = given
        q, k, v = jnp.moveaxis(jnp.einsum("btd,dchk->btchk", x, w["qkv"]), 2, 0)
        new = jnp.stack([k, v])
        new = new if old is None else jnp.concatenate([old, new], axis=2)
        scores = jnp.einsum("bthk,bshk->bhts", q, new[0])
        scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, -1e9)
        read = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), new[1])
        x = x + jnp.einsum("bthk,hkd->btd", read, w["out"])
        return x + jax.nn.gelu(x @ w["up"]) @ w["down"], new

    x, cache = jax.lax.scan(layer, x, (p["layers"], cache))
    return x @ p["head"], cache


def adapted(targets=("**", "embed", "head"), **config):
    params = weights()
    config = jlora.LoraConfig(
        rank=2, targets=targets, **{"invocation": INVOCATION, **config}
    )
    plan = jlora.plan(decoder, params, TOKENS, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    leaves, treedef = jax.tree.flatten(trainable)
    leaves = [x + normal(x.shape, i) / 3 for i, x in enumerate(leaves)]
    return plan, frozen, treedef.unflatten(leaves)


def test_base_serves_up_to_the_invocation_and_its_cache_stays_valid():
    _, frozen, trainable = adapted()
    gate = jlora.adapters.invocation_gate(trainable, TOKENS)
    np.testing.assert_array_equal(gate, GATE)
    run = jax.jit(jlora.apply_lora(decoder, on_merge="error"))
    logits, cache = run(frozen, trainable, TOKENS, lora_gate=gate)
    base_logits, base_cache = jax.jit(decoder)(frozen, TOKENS)
    before = ~np.asarray(GATE)
    np.testing.assert_array_equal(logits[before], base_logits[before])
    by_token = jnp.moveaxis(cache, (2, 3), (0, 1))
    of_base = jnp.moveaxis(base_cache, (2, 3), (0, 1))
    np.testing.assert_array_equal(by_token[before], of_base[before])  # bit for bit
    assert abs(logits - base_logits)[GATE].max() > 0.1
    # The adapter goes on from the cache that the base filled.
    _, prefix = decoder(frozen, TOKENS[:1, :2])
    rest, _ = run(frozen, trainable, TOKENS[:1, 2:], prefix, lora_gate=True)
    np.testing.assert_allclose(rest, logits[:1, 2:], atol=2e-5)


@pytest.mark.once
def test_gate_of_numbers_is_a_scale_of_the_update_in_value_and_gradient():
    _, frozen, trainable = adapted(targets="layers/{qkv,out}")
    lora_fn = jlora.apply_lora(decoder, on_merge="error")

    def loss(trainable, gate):
        return jnp.sum(jnp.cos(lora_fn(frozen, trainable, TOKENS, lora_gate=gate)[0]))

    half = jnp.full(TOKENS.shape, 0.5)
    value, gradient = jax.value_and_grad(jax.jit(loss))(trainable, half)
    plain = jlora.adapters.scale(trainable, 0.5)
    want, of_scaled = jax.value_and_grad(jax.jit(loss))(plain, True)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
        [f.a for f in gradient.lora.values()],
        [f.a for f in of_scaled.lora.values()],
    )
    at_base = jax.grad(jax.jit(loss))(trainable, jnp.zeros(TOKENS.shape))
    assert not any(x.any() for x in jax.tree.leaves(at_base))


@pytest.mark.once
def test_rows_of_a_batch_have_gates_of_their_own():
    _, frozen, trainable = adapted(targets="layers/up")
    lora_fn = jlora.apply_lora(decoder)
    other = jlora.adapters.scale(trainable, -1.0)
    stacked = jlora.adapters.stack([trainable, other])
    row_fn = jlora.adapters.per_row(lambda p, t: decoder(p, t)[0])
    got = row_fn(frozen, stacked, jnp.array([1, 0, -1]), TOKENS, lora_gate=GATE)
    want, _ = lora_fn(frozen, other, TOKENS, lora_gate=GATE)
    np.testing.assert_allclose(got[0], want[0], atol=2e-5)
    want, _ = lora_fn(frozen, trainable, TOKENS, lora_gate=GATE)
    np.testing.assert_allclose(got[1], want[1], atol=2e-5)
    np.testing.assert_allclose(got[2], decoder(frozen, TOKENS)[0][2], atol=2e-5)


@pytest.mark.once
def test_peft_files_hold_the_invocation(tmp_path):
    plan, _, trainable = adapted(targets="head")
    jlora.peft.save(tmp_path, trainable)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["alora_invocation_tokens"] == list(INVOCATION)
    read = jlora.peft.load(tmp_path, plan)
    assert read.lora["head"].spec.invocation == INVOCATION
    other, _, _ = adapted(targets="head", invocation=(9,))
    with pytest.raises(
        jlora.PeftError, match=r"tokens is \(3, 4\), in the plan \(9,\)"
    ):
        jlora.peft.load(tmp_path, other)


@pytest.mark.once
def test_what_a_gate_cannot_do_is_an_error():
    _, frozen, trainable = adapted()
    lora_fn = jlora.apply_lora(decoder)
    with pytest.raises(jlora.ConfigError, match=r"'embed'.*acts only from its invoc"):
        lora_fn(frozen, trainable, TOKENS)
    with pytest.raises(jlora.MergeError, match="are activated LoRA"):
        jlora.merge(frozen, trainable)
    with pytest.raises(jlora.TreeError, match="which merge never adds"):
        jlora.unmerge(frozen, trainable)
    with pytest.raises(jlora.ConfigError, match=r"lora_gate must hold booleans"):
        lora_fn(frozen, trainable, TOKENS, lora_gate=jnp.ones(TOKENS.shape, int))
    with pytest.raises(jlora.ConfigError, match=r"'embed'.*shape \(3, 6\).*\(6, 3\)"):
        lora_fn(frozen, trainable, TOKENS, lora_gate=GATE.T)
    _, frozen, full = adapted(targets="layers/up", train="head")
    with pytest.raises(jlora.ConfigError, match="'head' is trained in full"):
        lora_fn(frozen, full, TOKENS, lora_gate=GATE)
    _, frozen, dora = adapted(targets="layers/up", method="dora")
    with pytest.raises(jlora.ConfigError, match="'dora', which rescales"):
        lora_fn(frozen, dora, TOKENS, lora_gate=GATE)
    plain = adapted(invocation=())[2]
    with pytest.raises(jlora.TreeError, match=r"acts after the tokens \(\)"):
        jlora.adapters.add([trainable, plain])
    with pytest.raises(jlora.TreeError, match="have the invocations"):
        jlora.adapters.invocation_gate(plain, TOKENS)
    with pytest.raises(jlora.ConfigError, match="invocation must be token ids"):
        jlora.LoraConfig(invocation=(1, -2))


X = normal((2, 3, 4), 1)
USES = {
    "a convolution": (
        lambda p, x: jax.lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (1, 4, 4),
        r"conv_general_dilated`.*mixes positions",
    ),
    "merged": (lambda p, x: x @ jnp.tanh(p["w"]), (4, 4), "needed as a merged array"),
    "flattened": (lambda p, x: x.reshape(-1, 4) @ p["w"], (4, 4), r"shape \(6, 4\)"),
    "ragged": (
        lambda p, x: jax.lax.ragged_dot(x.reshape(-1, 4), p["w"], jnp.array([6])),
        (1, 4, 4),
        "another order",
    ),
    "fan-out": (
        lambda p, x: x @ p["w"] + p["w"].T[jnp.zeros((2, 3), int)],
        (4, 4),
        "looked up along its fan-out",
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("name", USES)
def test_uses_that_a_gate_does_not_reach_are_named(name):
    fn, shape, message = USES[name]
    params = {"w": jnp.ones(shape)}
    rules = jlora.Rule("w", axes=jlora.Axes()) if len(shape) == 2 else ()
    config = jlora.LoraConfig(rank=2, targets="w", rules=rules)
    plan = jlora.plan(fn, params, X, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    lora_fn = jlora.apply_lora(fn, on_merge="allow")
    with pytest.raises(jlora.ConfigError, match=f"does not reach 'w'.*{message}"):
        lora_fn(frozen, trainable, X, lora_gate=jnp.ones((2, 3), bool))
