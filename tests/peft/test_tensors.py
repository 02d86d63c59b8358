"""Adapters as tensors without files, on their devices and under `jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jlora
from jlora.peft import Entry, NameMap
from tests.helpers import compilations, normal
from tests.peft.models import tensors as read_file

pytestmark = pytest.mark.once

SHAPES = {
    "embed": (11, 8),
    "layers/qkv": (2, 8, 3, 2, 4),
    "layers/down": (2, 16, 8),
    "fused": (8, 24),
    "conv": (3, 4, 8),
}
NAMES = NameMap(
    (
        Entry("embed", "embed.weight", kind="embedding"),
        Entry(
            "layers/qkv",
            "layers.{i}.{part:q_proj,k_proj,v_proj}.weight",
            "i x part h k -> (h k) x",
            "linear",
        ),
        Entry("layers/down", "layers.{i}.down.weight", "i x y -> y x", "linear"),
        Entry("fused", "{part:q,k,v}.weight", "x (part o) -> o x", "linear"),
        Entry("conv", "conv.weight", "t i o -> o i t", kind="conv", groups=2),
    )
)
PARTS = jlora.FusedParts(axis=1, sizes=(8, 8, 8), ranks=(2, 0, 2))


def model(p, ids):
    def layer(x, w):
        q, k, v = jnp.moveaxis(jnp.einsum("td,dchk->tchk", x, w["qkv"]), 1, 0)
        return x + jnp.concatenate([q * k, v * k], 2).reshape(-1, 16) @ w["down"], None

    x, _ = jax.lax.scan(layer, p["embed"][ids], p["layers"])
    y = jax.lax.conv_general_dilated(
        x[None],
        p["conv"],
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=2,
    )
    return x @ p["fused"], y


def adapted():
    """Returns the plan and an adapter of all kinds, with random factors."""
    params = {"layers": {}}
    for i, (path, shape) in enumerate(SHAPES.items()):
        *outer, last = path.split("/")
        (params["layers"] if outer else params)[last] = normal(shape, i)
    rules = (jlora.Rule("fused", parts=PARTS), jlora.Rule("conv", rank=2))
    config = jlora.LoraConfig(rank=4, alpha=4, targets="**", rules=rules)
    plan = jlora.plan(model, params, jnp.arange(5), config=config)
    _, trainable = jlora.split(jax.random.key(0), params, plan)
    leaves, treedef = jax.tree.flatten(trainable)
    return plan, treedef.unflatten([normal(x.shape, i) for i, x in enumerate(leaves)])


def test_a_jitted_function_gives_what_is_written_and_compiles_once(tmp_path):
    plan, trainable = adapted()
    options = {"names": NAMES}
    arrays = jax.jit(lambda t: jlora.peft.tensors(t, **options)[1])
    for step, adapter in enumerate((trainable, jax.tree.map(lambda x: -x, trainable))):
        with compilations() as compiled:
            got = arrays(adapter)
        assert bool(compiled) == (step == 0)
        jlora.peft.save(tmp_path, adapter, **options)
        written = read_file(tmp_path / "adapter_model.safetensors")
        assert got.keys() == written.keys(), step
        jax.tree.map(np.testing.assert_array_equal, got, written)
    config, _ = jlora.peft.tensors(trainable, **options)
    back = jlora.peft.from_tensors(config, got, plan, **options)
    jax.tree.map(np.testing.assert_allclose, back, adapter)


@pytest.mark.once
def test_tensors_lie_where_the_adapter_does():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jlora.Spec(rank=2, alpha=2)
    own = jlora.Factors(normal((8, 2), 0), normal((2, 12), 1), spec)
    laid = jlora.Trainable(
        {
            "up/kernel": jlora.Factors(
                jax.device_put(own.a, NamedSharding(mesh, P("x"))),
                jax.device_put(own.b, NamedSharding(mesh, P(None, "x"))),
                spec,
            )
        }
    )
    _, got = jlora.peft.tensors(laid, dtype="bfloat16")
    a = got["base_model.model.up.lora_A.weight"]
    b = got["base_model.model.up.lora_B.weight"]
    assert (a.shape, a.dtype, a.sharding.spec) == ((2, 8), jnp.bfloat16, P(None, "x"))
    assert (b.shape, b.sharding.spec) == ((12, 2), P("x"))


@pytest.mark.once
def test_only_shapes_decide_what_is_there(tmp_path):
    """A fresh adapter and one of zeros have the same names."""
    _, trainable = adapted()
    names = jlora.peft.tensors(trainable, names=NAMES)[1].keys()
    other = jax.tree.map(jnp.zeros_like, trainable)
    assert jlora.peft.tensors(other, names=NAMES)[1].keys() == names
    with pytest.raises(jlora.PeftError, match="zero in A"):
        jlora.peft.save(tmp_path, other, names=NAMES)


def pair(number, dtype="float32"):
    """A pair of factors, with one number in B."""
    a, b = jnp.ones((4, 2), dtype), jnp.ones((2, 6), dtype).at[1, 1].set(number)
    spec = jlora.Spec(rank=2, alpha=4)
    return jlora.Trainable({"up/kernel": jlora.Factors(a, b, spec)})


@pytest.mark.parametrize(
    ("number", "own", "dtype"),
    [
        (np.nan, "float32", None),
        (-np.inf, "bfloat16", "float16"),
        (7e4, "float32", "float16"),
        (-7e4, "bfloat16", "float16"),
        (3.4e38, "float32", "bfloat16"),
    ],
)
def test_numbers_that_save_refuses(number, own, dtype, tmp_path):
    """One rule: the same error, from the devices and from the host."""
    adapter = pair(number, own)
    with pytest.raises(jlora.PeftError, match=r"'up/kernel' holds [-\dN]") as saved:
        jlora.peft.save(tmp_path, adapter, dtype=dtype)
    with pytest.raises(jlora.PeftError) as told:
        jlora.peft.tensors(adapter, dtype=dtype)
    assert str(told.value) == str(saved.value)
    under_jit = jax.jit(lambda t: jlora.peft.tensors(t, dtype=dtype)[1])(adapter)
    assert not jnp.isfinite(under_jit["base_model.model.up.lora_B.weight"]).all()


def test_checking_numbers_compiles_nothing_again():
    first, *others = map(pair, (2.0, 3.0, 6e4))
    jlora.peft.tensors(first, dtype="float16")
    with compilations() as compiled:
        for other in others:
            jlora.peft.tensors(other, dtype="float16")
    assert not compiled


@pytest.mark.once
def test_tensors_that_cannot_be_read_are_named():
    _, trainable = adapted()
    config, arrays = jlora.peft.tensors(trainable, names=NAMES)
    params = jax.tree.map(
        jnp.zeros, {"embed": (11, 8)}, is_leaf=lambda x: type(x) is tuple
    )
    with pytest.raises(jlora.PeftError, match="These tensors does not fit"):
        jlora.peft.from_tensors(config, arrays, params, names=NAMES)
    with pytest.raises(jlora.PeftError, match="outside jit: 'a' is traced"):
        jax.jit(lambda x: jlora.peft.from_tensors(config, {"a": x}, params))(
            jnp.ones(2)
        )
    with pytest.raises(jlora.PeftError, match="'a' is a list"):
        jlora.peft.from_tensors(config, {"a": [1.0]}, params)
    with pytest.raises(jlora.PeftError, match=r"must be a jlora\.Trainable, got dict"):
        jlora.peft.tensors({})
