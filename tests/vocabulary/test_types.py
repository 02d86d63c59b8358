# pyright: strict, reportUnknownMemberType=false
"""What is documented has no complaint in an editor: pyright reads this file too.

Only `reportUnknownMemberType` is off: JAX's own functions do not pass it.
"""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import FusedParts, LoraConfig, Rule, TokenRows


def init(
    key: jax.Array, w: jax.Array, spec: jlora.Spec, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    return (
        jnp.zeros(spec.axes.a_shape(w.shape, spec.rank), dtype),
        jnp.zeros(spec.axes.b_shape(w.shape, spec.rank), dtype),
    )


def test_config_takes_what_is_documented_and_keeps_tuples():
    rows = TokenRows("**/embedding", ids=(1, 2))
    rule = Rule("**/mlp/**", rank=4, alpha=8, init="pissa")
    config = LoraConfig(train="**/head/*", exclude="x", rules=rule, targets=["a", "b"])
    assert_type(config.train, tuple[str | TokenRows, ...])
    assert_type(config.rules, tuple[Rule, ...])
    assert_type(config.exclude, tuple[str, ...])
    assert_type(config.dtype, str | None)
    assert config.train == ("**/head/*",)
    assert config.rules == (rule,)
    assert (
        TokenRows("**/embedding", [1, 2])
        == rows
        == TokenRows("**/embedding", range(1, 3))
    )
    LoraConfig(train=rows, rules=[rule, rule], exclude={"a", "b"})
    LoraConfig(train=["**/head/*", rows], rules=(rule,), exclude=["a"])
    LoraConfig(train=("**/head/*", rows), targets=("a", "b"), init=init)
    LoraConfig(targets=lambda row: row.layer >= 1, init="pissa", alpha=16)
    for dtype in (jnp.bfloat16, "bfloat16", np.float32, jnp.dtype("float32"), None):
        LoraConfig(dtype=dtype)
    Rule("**/qkv", parts=FusedParts(-1, (4, 4, 4), (2, 0, 2)), alpha=4)
    assert LoraConfig.from_json(config.to_json()) == config


def fn(params: dict[str, jax.Array], x: jax.Array, *, double: bool = False):
    return {"y": (x @ params["w"]) * (2.0 if double else 1.0)}


def test_apply_lora_keeps_the_result_and_checks_the_arguments(key: jax.Array):
    params = {"w": jnp.ones((4, 4))}
    x = jnp.ones((3, 4))
    plan = jlora.plan(fn, params, x, config=LoraConfig(rank=2))
    frozen, trainable = jlora.split(key, params, plan)
    lora_fn = jlora.apply_lora(fn)
    assert_type(lora_fn(frozen, trainable, x), dict[str, jax.Array])
    assert_type(lora_fn(frozen, trainable, x, double=True), dict[str, jax.Array])
    assert_type(lora_fn(frozen, trainable, x, lora_key=key), dict[str, jax.Array])
    with pytest.raises(TypeError, match="bool"):
        lora_fn(frozen, trainable, x, bool=True)  # pyright: ignore[reportCallIssue]

    def loss(frozen: Any, trainable: jlora.Trainable) -> jax.Array:
        return lora_fn(frozen, trainable, x)["y"].sum()

    jax.grad(loss, argnums=1)(frozen, trainable)
    stacked = jlora.adapters.stack([trainable, trainable])
    row_fn = jlora.adapters.per_row(fn)
    ids = jnp.array([0, 1, -1])
    assert_type(row_fn(frozen, stacked, ids, x), dict[str, jax.Array])
    assert_type(row_fn(frozen, stacked, ids, x, lora_key=key), dict[str, jax.Array])
    with pytest.raises(TypeError, match="multiple values"):
        row_fn(frozen, stacked, ids, x, x=x)  # pyright: ignore[reportCallIssue]
