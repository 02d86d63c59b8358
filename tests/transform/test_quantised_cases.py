"""LoRA over codes equals LoRA over the dense weights that they stand for.

By the table of cases.py: in value, in the gradients of A, B and the inputs, and without
an adapter. What a rule cannot do with codes widens them. That is told, and the plan
says the same.
"""

import re
import warnings

import jax
import pytest

import jlora
from tests.helpers import close
from tests.transform.cases import ADAPTABLE, build
from tests.transform.quantised_helpers import KINDS, gradients, products, widened


def coded(case):
    """Returns the case's function, codes, inputs and adapter; kinds take turns."""
    fn, params, x, plan, _, trainable = build(case)
    i = ADAPTABLE.index(case)
    options = {"kind": KINDS[i % 3], "block": 2 if i % 2 else None}
    if i % 4 < 2:  # blocks along the fan-in
        options["targets"] = [path for path, w in params.items() if w.ndim > 1]
        return fn, jlora.quantize(params, plan, **options), x, trainable
    # Blocks along the last axis but one.
    return fn, jlora.quantize(params, **options, double=i % 8 < 4), x, trainable


@pytest.mark.once
@pytest.mark.parametrize("case", ADAPTABLE, ids=str)
def test_codes_equal_the_widened_model_and_what_is_widened_is_told(case):
    fn, frozen, x, trainable = coded(case)
    lora_fn, bare = jlora.apply_lora(fn), jlora.Trainable()
    run = gradients(lora_fn) if case.has_gradient else lora_fn

    @jax.jit
    def both(frozen, dense, trainable, x):
        return (
            (run(frozen, trainable, x), lora_fn(frozen, bare, x)),
            (run(dense, trainable, x), fn(dense, x)),
        )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = both.trace(frozen, widened(frozen), trainable, x)
    found = traced.lower().compile()(frozen, widened(frozen), trainable, x)
    close(*found, 1e-5, largest=1e-5)

    config = jlora.LoraConfig(rank=case.rank, alpha=3, targets="w")
    said = {
        (row.path, use.op)
        for row in jlora.plan(fn, frozen, x, config=config).rows()
        for use in row.uses
        if use.route == "widened"
    }
    told = "\n".join(str(w.message) for w in caught)
    line = r"\n  (\w+(?:, \w+)*): `([\w-]+)` at \w+\.py.* needs the whole array"
    found = re.findall(line, told)
    done = {(path, op) for paths, op in found for path in paths.split(", ")}
    assert done <= said  # only the first place of a leaf is told
    assert {path for path, _ in done} == {path for path, _ in said}
    assert said or products(traced.jaxpr) or case.op == "embedding"


def test_a_widened_weight_is_an_error_where_asked():
    case = next(case for case in ADAPTABLE if case.name == "custom_vjp")
    fn, frozen, x, trainable = coded(case)
    for adapter in (trainable, jlora.Trainable()):
        with pytest.raises(
            jlora.MergeError, match=r"widened whole.*\n  w: .*cases\.py"
        ):
            jlora.apply_lora(fn, on_merge="error")(frozen, adapter, x)
