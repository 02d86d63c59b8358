"""Which share of a model a plan adapts, and the patterns that miss blocks."""

import jax
import jax.numpy as jnp
import pytest

import jlora

pytestmark = pytest.mark.once
X = jax.ShapeDtypeStruct((2, 8), jnp.float32)


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def planned(
    params, fn, targets: str | tuple[str, ...] = "all-linear", **more
) -> jlora.Coverage:
    config = jlora.LoraConfig(rank=2, targets=targets, **more)
    return jlora.plan(fn, params, X, config=config).coverage


def hybrid():
    """48 blocks, every sixth with attention and the others with something else."""
    mixers = {False: "linear_attn/in_proj", True: "self_attn/q_proj"}
    params = {"embed": shape(8, 8), "layers": {}}
    for i in range(48):
        block, name = mixers[i % 6 == 5].split("/")
        params["layers"][f"{i}"] = {block: {name: shape(8, 8)}, "up": shape(8, 16)}

    def fn(params, x):
        x = x @ params["embed"]
        for layer in params["layers"].values():
            mixer = layer.get("linear_attn") or layer["self_attn"]
            (w,) = mixer.values()
            x = jnp.tanh(x @ w) @ layer["up"] @ layer["up"].T
        return x

    return params, fn


def test_pattern_that_few_blocks_have():
    found = planned(*hybrid(), targets="**/q_proj")
    assert (found.adapted_blocks, found.blocks) == (8, 48)
    assert found.weights == pytest.approx(8 * 64 / (64 + 48 * 192))
    assert found.gaps == (
        "'**/q_proj' is in 8 of 48 blocks: the others have another kind of layer, "
        "such as 'layers/0/linear_attn/in_proj'",
    )
    params, fn = hybrid()
    config = jlora.LoraConfig(rank=2, targets="**/q_proj")
    text = str(jlora.plan(fn, params, X, config=config))
    assert "adapted: 8 of 48 blocks, 5.5 % of the weights, 5.5 % of a" in text
    assert found.gaps[0] in text.splitlines()


@pytest.mark.parametrize(
    "targets",
    ["all-linear", "**/up", "layers/{0..7}/**", "layers/5/self_attn/q_proj", "embed"],
)
def test_pattern_that_misses_nothing_or_on_purpose(targets):
    assert planned(*hybrid(), targets=targets).gaps == ()


def test_patterns_of_all_kinds_of_blocks():
    found = planned(*hybrid(), targets=("**/q_proj", "**/in_proj"))
    assert found.adapted_blocks == found.blocks == 48
    assert [gap.split(" blocks")[0] for gap in found.gaps] == [
        "'**/q_proj' is in 8 of 48",
        "'**/in_proj' is in 40 of 48",
    ]


def test_scanned_stacks_count_their_layers():
    stack = {"q": shape(6, 8, 8), "mlp": {"up": shape(6, 8, 8)}, "norm": shape(6, 8)}
    small = {"up": shape(4, 8, 8)}
    params = {"encoder": stack, "decoder": {"layers": small, "head": shape(8, 3)}}

    def fn(params, x):
        def body(x, layer):
            x = jnp.tanh(x @ layer["q"] * layer["norm"][None])
            return x @ layer["mlp"]["up"], None

        x, _ = jax.lax.scan(body, x, params["encoder"])
        x, _ = jax.lax.scan(
            lambda x, layer: (x @ layer["up"], None), x, params["decoder"]["layers"]
        )
        return x @ params["decoder"]["head"]

    assert planned(params, fn).blocks == planned(params, fn).adapted_blocks == 10
    assert planned(params, fn, "encoder/q").adapted_blocks == 6
    assert planned(params, fn, "decoder/**").adapted_blocks == 4
    found = planned(params, fn, "**/head")
    assert (found.adapted_blocks, found.blocks) == (0, 10)


def test_experts_are_not_layers():
    params = {"layers": {"0": {"experts": shape(5, 8, 8), "router": shape(8, 5)}}}

    def fn(params, x):
        layer = params["layers"]["0"]
        each = jnp.einsum("td,edf->tef", x, layer["experts"])
        return jnp.einsum("tef,te->tf", each, x @ layer["router"])

    found = planned(params, fn, "**/experts")
    assert (found.adapted_blocks, found.blocks) == (1, 1)
    assert found.flops == pytest.approx(320 / 360)


def test_tables_parts_and_convolutions():
    params = {"table": shape(10, 8), "qkv": shape(8, 24)}

    def fn(params, x):
        rows = params["table"][jnp.arange(2)]
        return (x + rows) @ params["qkv"] @ params["qkv"].T @ params["table"].T

    found = planned(params, fn, "qkv")
    assert (found.blocks, found.flops) == (0, pytest.approx(192 / 272))
    assert str(found) == "adapted: 70.6 % of the weights, 70.6 % of a token's FLOPs"
    only_q = jlora.FusedParts(axis=1, sizes=(8, 8, 8), ranks=(2, 0, 0))
    parts = (jlora.Rule("qkv", parts=only_q),)
    third = planned({"qkv": shape(8, 24)}, lambda p, x: x @ p["qkv"], rules=parts)
    assert third.weights == pytest.approx(1 / 3)
    rows = planned(params, fn, "qkv", train=(jlora.TokenRows("table", (1, 2)),))
    assert rows.weights == pytest.approx((192 + 16) / 272)

    def conv(params, x):
        return jax.lax.conv(x[None, :, :, None], params["kernel"], (1, 1), "SAME")

    assert planned({"kernel": shape(8, 2, 3, 3)}, conv).flops is None
