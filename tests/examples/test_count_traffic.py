"""What programs move to and from HBM, read from small pieces of HLO."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.traffic import hbm_bytes

pytestmark = pytest.mark.once
STACK = "%stack = bf16[8,16,4]{2,1,0:T(8,128)(2,1)} parameter(0)"  # 1,024 bytes
LAYER = "%layer = bf16[1,16,4]{2,1,0:T(8,128)(2,1)} parameter(1)"  # 128 bytes
AT = "%at = s32[]{:S(6)} parameter(2)"
HERE, ON_CHIP = "{2,1,0:T(8,128)(2,1)}", "{2,1,0:T(8,128)(2,1)S(1)}"
SLICED = """
%sliced (p: bf16[8,16,4], at: s32[]) -> bf16[1,16,4] {
  %p = bf16[8,16,4]{2,1,0} parameter(0)
  %at = s32[]{:S(6)} parameter(1)
  ROOT %slice = bf16[1,16,4]{2,1,0} dynamic-slice(%p, %at), dynamic_slice_sizes={1,16,4}
}

%within (p: bf16[8,16,4], at: s32[]) -> bf16[1,16,4] {
  %p = bf16[8,16,4]{2,1,0} parameter(0)
  %at = s32[]{:S(6)} parameter(1)
  %again = bf16[8,16,4]{2,1,0} bitcast(%p)
  %inner = bf16[1,16,4]{2,1,0} fusion(%again, %at), kind=kLoop, calls=%sliced
  ROOT %twice = bf16[1,16,4]{2,1,0} add(%inner, %inner)
}

%flat (p: bf16[8,16,4]) -> bf16[512] {
  %p = bf16[8,16,4]{2,1,0} parameter(0)
  ROOT %same = bf16[512]{0} bitcast(%p)
}

%passed (p: bf16[8,16,4]) -> bf16[512] {
  %p = bf16[8,16,4]{2,1,0} parameter(0)
  %inner = bf16[512]{0} fusion(%p), kind=kLoop, calls=%flat
  ROOT %less = bf16[512]{0} negate(%inner)
}

%updated (p: bf16[8,16,4], q: bf16[1,16,4], at: s32[]) -> (bf16[8,16,4], bf16[1,16,4]) {
  %p = bf16[8,16,4]{2,1,0} parameter(0)
  %q = bf16[1,16,4]{2,1,0} parameter(1)
  %at = s32[]{:S(6)} parameter(2)
  %double = bf16[1,16,4]{2,1,0} add(%q, %q)
  %new = bf16[8,16,4]{2,1,0} dynamic-update-slice(%p, %double, %at)
  %flat = bf16[8,16,4]{2,1,0} bitcast(%new)
  ROOT %both = (bf16[8,16,4]{2,1,0}, bf16[1,16,4]{2,1,0}) tuple(%flat, %double)
}
"""


def program(*lines):
    body = "\n".join(f"  {line}" for line in (STACK, LAYER, AT, *lines))
    return (
        f"HloModule jit_step\n{SLICED}\nENTRY %main (x: f32[]) -> f32[] {{\n{body}\n}}"
    )


@pytest.mark.parametrize(
    ("line", "nbytes"),
    [
        (f"%y = bf16[1,16,4]{HERE} add(%layer, %layer)", 3 * 128),
        (f"%y = bf16[1,16,4]{ON_CHIP} negate(%layer)", 128),
        (f"%y = bf16[16,4]{HERE} bitcast(%layer)", 0),
        (f"%y = bf16[1,16,4]{HERE} dynamic-slice(%stack, %at)", 2 * 128),
        (f"%y = bf16[1,16,4]{HERE} fusion(%stack, %at), calls=%sliced", 2 * 128),
        (f"%y = bf16[1,16,4]{ON_CHIP} fusion(%stack, %at), calls=%within", 128),
        ("%y = bf16[512]{0:S(1)} fusion(%stack), calls=%passed", 1024),
        (f"%y = bf16[8,16,4]{HERE} dynamic-update-slice(%stack, %layer, %at)", 2 * 128),
        (
            f"%y = (bf16[8,16,4]{HERE}, bf16[1,16,4]{ON_CHIP}) "
            "fusion(%stack, %layer, %at), calls=%updated",
            2 * 128,
        ),
        (
            f"%y = (bf16[1,16,4]{ON_CHIP}, bf16[1,16,4]{HERE}, u32[]{{:S(2)}}) "
            "copy-start(%layer)",
            128,
        ),
        (
            f"%y = ((bf16[8,16,4]{HERE}), bf16[2,16,4]{ON_CHIP}, s32[]{{:S(2)}}) "
            "slice-start(%stack), slice={[0:2], [0:16], [0:4]}",
            2 * 128,
        ),
        (
            f"%y = bf16[8,16,4]{HERE} custom-call(), "
            'custom_call_target="AllocateBuffer"',
            0,
        ),
    ],
)
def test_arrays_on_the_chip_and_parts_that_stay_do_not_count(line, nbytes):
    assert hbm_bytes(program(f"ROOT {line}")) == nbytes


def test_a_body_counts_once_for_each_step():
    def loop(x):
        return jax.lax.fori_loop(0, 7, lambda i, x: jnp.sin(x @ x), x)

    def once(x):
        return jnp.sin(x @ x)

    x = jnp.ones((64, 64))
    many, one = (
        hbm_bytes(jax.jit(fn).lower(x).compile().as_text()) for fn in (loop, once)
    )
    assert one >= 3 * x.nbytes
    assert 7 * one <= many <= 7 * one + 4 * x.nbytes


def test_text_that_is_not_understood_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        hbm_bytes("HloModule empty")
