"""`examples/sharded`: meshes and layouts; the run, its resume and its export."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import P

from examples.sharded.layout import batch_sharding, layout, parse_mesh

pytestmark = pytest.mark.once


def shapes_of(**leaves):
    return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in leaves.items()}


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("fsdp=4,tensor=2", {"fsdp": 4, "tensor": 2}),
        (" tensor = 2, data=2 ", {"data": 2, "tensor": 2}),
        ("fsdp=-1,tensor=2", {"fsdp": 4, "tensor": 2}),
        ("fsdp=-1", {"fsdp": 8}),
        ("", {"fsdp": 1}),
    ],
)
def test_a_mesh_is_read_from_text(text, shape):
    mesh = parse_mesh(text)
    assert dict(mesh.shape) == shape
    assert {*mesh.axis_types} == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fsdp=4;tensor=2", r"size of fsdp must be a number from 1.*'4;tensor=2'"),
        ("fsdp", "Got ''"),
        ("fsdp=0", "number from 1"),
        ("model=2", r"with each of data, fsdp, tensor at most once. Got 'model=2'"),
        ("fsdp=2,fsdp=2", "at most once"),
        ("fsdp=-1,tensor=-1", "Only one axis"),
        ("fsdp=16", r"needs 16 devices, and this machine has 8 .*--fake-devices 16"),
    ],
)
def test_a_mesh_that_cannot_be_is_told(text, told):
    with pytest.raises(ValueError, match=told):
        parse_mesh(text)


def test_rows_of_a_batch_lie_over_data_and_fsdp():
    assert batch_sharding(parse_mesh("fsdp=4,tensor=2")).spec == P("fsdp")
    assert batch_sharding(parse_mesh("tensor=2,data=2,fsdp=2")).spec == P(
        ("data", "fsdp")
    )


@pytest.mark.filterwarnings("error")
def test_kernels_are_cut_by_their_names():
    mesh = parse_mesh("fsdp=4,tensor=2")
    tree = {
        "embed": shapes_of(embedding=(64, 16)),
        "layers": {
            "attn": {
                "q_proj": shapes_of(kernel=(3, 16, 4, 8), bias=(3, 4, 8)),
                "o_proj": shapes_of(kernel=(3, 4, 8, 16), bias=(3, 16)),
            },
            "mlp": shapes_of(up=(3, 16, 32), down=(3, 32, 16)),
            "input_norm": shapes_of(scale=(3, 16)),
        },
        "blocks": [{"gate": shapes_of(kernel=(16, 32))}],
        "lm_head": shapes_of(kernel=(16, 64)),
    }
    found = jax.tree.map(lambda s: s.spec, layout(tree, mesh))
    assert found == {
        "embed": {"embedding": P("tensor", "fsdp")},
        "layers": {
            "attn": {
                "q_proj": {
                    "kernel": P(None, "fsdp", "tensor", None),
                    "bias": P(None, "tensor", None),
                },
                "o_proj": {
                    "kernel": P(None, "tensor", None, "fsdp"),
                    "bias": P(None, None),
                },
            },
            "mlp": {"up": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")},
            "input_norm": {"scale": P(None, None)},
        },
        "blocks": [{"gate": {"kernel": P("fsdp", "tensor")}}],
        "lm_head": {"kernel": P("fsdp", "tensor")},
    }


def test_what_lies_whole_is_told():
    tree = {"layers": shapes_of(q=(2, 16, 3, 8), router=(2, 16, 4), norm=(2, 16))}
    with pytest.warns(UserWarning, match="Each device holds these whole") as told:
        found = layout(tree, parse_mesh("fsdp=4,tensor=2"))
    text = str(told[0].message)
    assert "axis 2 of 'layers/q' (tensor=2 and 3 entries)" in text
    assert "'layers/router', which no rule knows" in text
    assert "norm" not in text
    assert found["layers"]["q"].spec == P(None, "fsdp", None, None)
    with warnings.catch_warnings(action="error"):
        layout(tree, parse_mesh(""))
