"""What programs send between devices, read from small pieces of HLO."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from benchmarks.collectives import beyond, by_kind, collectives, sent

pytestmark = pytest.mark.once
HEAD = "HloModule jit_step, replica_count=1, num_partitions=8\n"
ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def entry(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    return f"{HEAD}{ADD}\nENTRY %main (x: f32[16,4]) -> f32[] {{\n{body}\n}}\n"


X = "%x = f32[16,4]{1,0:T(8,128)S(1)} parameter(0)"


@pytest.mark.parametrize(
    ("line", "kind", "nbytes", "to_send"),
    [
        (
            "%g = bf16[64,4]{1,0} all-gather(%x), channel_id=1, "
            "replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}",
            "all-gather",
            512,
            384,
        ),
        (
            "%g = f32[16,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},"
            '{6,7}}, to_apply=%add, metadata={op_name="jit(f)/a"}',
            "all-reduce",
            256,
            256,
        ),
        (
            "%g = f32[2,4]{1,0} reduce-scatter(%x), replica_groups={}, dimensions={0}, "
            "to_apply=%add",
            "reduce-scatter",
            256,
            224,
        ),
        (
            "%g = f32[16,4]{1,0} all-to-all(%x), replica_groups="
            "mesh['data'=4,'model'=2] {'data'}, dimensions={0}",
            "all-to-all",
            256,
            192,
        ),
        (
            "%g = u8[16,4]{1,0} collective-permute(%x), source_target_pairs={{0,1}}",
            "collective-permute",
            64,
            64,
        ),
        (
            "%g = (f32[16,4]{1,0}, f32[128,4]{1,0:T(8,128)}, /*index=2*/u32[]{:S(2)}) "
            "all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}\n"
            "  %d = f32[128,4]{1,0} all-gather-done(%g)",
            "all-gather",
            2048,
            1792,
        ),
        (
            "%g = f32[16,4]{1,0} all-reduce-start(%x), replica_groups=mesh"
            "['a'=8] {'a':(1)2}, to_apply=%add\n"
            "  %d = f32[16,4]{1,0} all-reduce-done(%g)",
            "all-reduce",
            256,
            256,
        ),
        (
            "%g = ((f32[16,4]{1,0}), f32[16,4]{1,0}) all-reduce-start(%x), "
            "replica_groups=[4,2]<=[8], to_apply=%add, "
            "output_to_operand_aliasing={{1}: (0, {})}\n"
            "  %d = f32[16,4]{1,0} all-reduce-done(%g)",
            "all-reduce",
            256,
            256,
        ),
    ],
)
def test_bytes_of_each_kind(line, kind, nbytes, to_send):
    (one,) = collectives(entry(X, line))
    assert (one.kind, one.nbytes, one.sent, one.times) == (kind, nbytes, to_send, 1)
    assert one.place == ("jit(f)/a" if "op_name" in line else "")


def test_arrays_that_are_sent_together_count_apart():
    line = (
        "%g = (f32[16,4]{1,0}, bf16[8]{0}) all-reduce(%x, %y), replica_groups={}, "
        "to_apply=%add"
    )
    found = collectives(entry(X, line, line.replace("%g", "%h")))
    assert {(one.shape, one.sent) for one in found} == {
        ("f32[16,4]", 448),
        ("bf16[8]", 28),
    }
    assert sent(found) == 952
    assert by_kind(found) == {"all-reduce": 952}
    assert beyond(found, found[:1]) == {
        ("all-reduce", "f32[16,4]"): 1,
        ("all-reduce", "bf16[8]"): 2,
    }
    assert collectives(entry(X, line.replace("={}", "={{0},{1}}"))) == []


WINDOWED = f"""{HEAD}
%cond (c: (f32[16,4], u32[])) -> pred[] {{
  %c = (f32[16,4], u32[]) parameter(0)
  %most = u32[]{{:T(128)}} constant(7)
  %i = u32[] get-tuple-element(%c), index=1
  ROOT %more = pred[] compare(%i, %most), direction=LT
}}

%body..sunk (b: (f32[16,4], u32[])) -> (f32[16,4], u32[]) {{
  %b = (f32[16,4], u32[]) parameter(0)
  %w = f32[16,4]{{1,0:T(8,128)S(1)}} get-tuple-element(%b), index=0
  %i = u32[] get-tuple-element(%b), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %p = (f32[16,4], f32[16,4], u32[], u32[]) collective-permute-start(%w), channel_id=3
  %q = f32[16,4]{{1,0}} collective-permute-done(%p)
  ROOT %out = (f32[16,4], u32[]) tuple(%q, %next)
}}

ENTRY %main (x: f32[16,4]) -> f32[] {{
  %x = f32[16,4] parameter(0)
  %zero = u32[] constant(1)
  %copied = u32[] copy(%zero)
  %init = (f32[16,4], u32[]) tuple(%x, %copied)
  %loop = (f32[16,4], u32[]) while(%init), condition=%cond, body=%body..sunk
}}
"""


def test_steps_of_loops_are_counted_or_read():
    (one,) = collectives(WINDOWED)
    assert (one.times, sent([one])) == (3, 3 * 256)
    known = 'body=%body..sunk, backend_config={"known_trip_count":{"n":"5"}}'
    (one,) = collectives(WINDOWED.replace("body=%body..sunk", known))
    assert one.times == 5
    with pytest.raises(ValueError, match="How many steps the loop 'loop' takes"):
        collectives(WINDOWED.replace("direction=LT", "direction=NE"))
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("module @jit_step {}")


def test_the_dearest_branch_counts():
    def branch(name, n):
        return (
            f"\n%{name} (x: f32[{n}]) -> f32[{n}] {{\n  %x = f32[{n}] parameter(0)\n"
            f"  ROOT %s = f32[{n}] all-reduce(%x), to_apply=%add\n}}\n"
        )

    both = branch("few", 8) + branch("many", 16)
    for named in (
        "branch_computations={%few, %many}",
        "true_computation=%many, false_computation=%few",
    ):
        text = entry(X, f"%c = f32[] conditional(%i, %x, %x), {named}")
        (one,) = collectives(text.replace(ADD, ADD + both))
        assert one.shape == "f32[16]"


FUSED = f"""{HEAD}
%start (p: bf16[8,16]) -> (bf16[8,16], bf16[64,16], s32[2]) {{
  %p = bf16[8,16] parameter(0)
  %g.1 = bf16[64,16] all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], CONFIG
  ROOT %c = (bf16[8,16], bf16[64,16], s32[2]) custom-call(%g.1), MARK_START
}}

%async_collective_fusion.2 (p: bf16[8,16], q: bf16[64,16]) -> (bf16[64,16]) {{
  %p = bf16[8,16] parameter(0)
  %g.2 = bf16[64,16] all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], CONFIG
  ROOT %t = (bf16[64,16]) tuple(%g.2)
}}

%done (p: bf16[8,16], q: bf16[64,16]) -> bf16[64,16] {{
  %p = bf16[8,16] parameter(0)
  %q = bf16[64,16] parameter(1)
  %g.3 = bf16[64,16] all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], CONFIG
  ROOT %c = bf16[64,16] custom-call(%p, %q, %g.3), MARK_DONE
}}

%all-reduce-scatter.4 (p: f32[64,16]) -> f32[8,16] {{
  %p = f32[64,16] parameter(0)
  %r = f32[64,16] all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %s = f32[8,16] dynamic-slice(%r, %p), dynamic_slice_sizes={{8,16}}
}}

ENTRY %main (x: bf16[8,16]) -> f32[] {{
  %x = bf16[8,16] parameter(0)
  %a = (bf16[8,16], bf16[64,16], s32[2]) fusion(%x), kind=kCustom, calls=%start
  %b = (bf16[64,16]) fusion(%x), kind=kOutput, calls=%async_collective_fusion.2
  %d = bf16[64,16] fusion(%x, %b), kind=kCustom, calls=%done
  %e = f32[8,16] fusion(%d), kind=kCustom, calls=%all-reduce-scatter.4
}}
""".replace("CONFIG", 'backend_config={"async_collective_fusion_config":{}}')
FUSED = FUSED.replace("MARK_START", 'custom_call_target="AsyncCollectiveStart"')
FUSED = FUSED.replace("MARK_DONE", 'custom_call_target="AsyncCollectiveDone"')


def test_fused_collectives_of_tpus_count_once():
    scatter, gather = sorted(collectives(FUSED), key=lambda one: one.kind)[::-1]
    assert (gather.kind, gather.sent, gather.times) == ("all-gather", 1792, 1)
    assert (scatter.kind, scatter.sent, scatter.times) == ("reduce-scatter", 3584, 1)


def test_a_program_of_this_machine():
    """Three steps sum `x w` over the devices that share the columns of `x`."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def fn(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, 3)[0]

    def over(*spec):
        return NamedSharding(mesh, P(*spec))

    shapes = [jax.ShapeDtypeStruct((64, 64), "float32") for _ in range(2)]
    run = jax.jit(
        fn, in_shardings=(over("a", "b"), over("b")), out_shardings=over("a", "b")
    )
    found = collectives(run.lower(*shapes).compile().as_text())
    sums = [one for one in found if one.kind == "all-reduce"]
    assert sum(one.nbytes * one.times for one in sums) == 3 * 16 * 64 * 4
