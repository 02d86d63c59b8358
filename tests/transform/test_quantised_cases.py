"""LoRA over codes equals LoRA over the dense weights that they stand for.

By the table of cases.py: in value, in the gradients of A, B and the inputs, and without
an adapter. What a rule cannot do with codes widens them, and is told.
"""

import re
import warnings

import jax
import pytest

import jlora
from tests.helpers import close
from tests.transform.cases import ADAPTABLE, build
from tests.transform.quantised_helpers import KINDS, floats, products, widened

# Steps that act on codes and scales: nothing is widened before the product.
WIDENED = {
    "kernels modulated": "mul",
    "kernels modulated, as groups": "mul",
    "kernels modulated on both sides": "mul",
    "kernels modulated and demodulated": "mul",
    "kernels modulated, then not linear": "mul",
    "inputs modulated for each example": "mul",
}


def quantised(case):
    """Returns the case's function, weights as codes, and adapter; kinds take turns."""
    fn, params, x, plan, _, trainable = build(case)
    i = ADAPTABLE.index(case)
    options = {"kind": KINDS[i % 3], "block": 2 if i % 2 else None}
    if i % 4 < 2:  # blocks along the fan-in
        options["targets"] = [path for path, w in params.items() if w.ndim > 1]
        params = jlora.quantize(params, plan, **options)
    else:  # blocks along the last axis but one
        params = jlora.quantize(params, **options, double=i % 8 < 4)
    return fn, params, x, trainable


@pytest.mark.once
@pytest.mark.parametrize("case", ADAPTABLE, ids=str)
def test_codes_equal_the_widened_model_in_value_and_gradient(case):
    fn, frozen, x, trainable = quantised(case)
    lora_fn = jlora.apply_lora(fn, on_merge="allow")
    dense = widened(frozen)

    def loss(trainable, x, frozen):
        out = lora_fn(frozen, trainable, x)
        return floats(out), out

    @jax.jit
    def both(frozen, dense, trainable, x):
        run = lambda f, t, x: loss(t, x, f)  # noqa: E731
        if case.has_gradient:
            run = lambda f, t, x: jax.grad(loss, (0, 1), has_aux=True)(t, x, f)  # noqa: E731
        bare = jlora.Trainable()
        return (
            (run(frozen, trainable, x), lora_fn(frozen, bare, x)),
            (run(dense, trainable, x), fn(dense, x)),
        )

    actual, expected = both(frozen, dense, trainable, x)
    close(actual, expected, 1e-5, largest=1e-5)


@pytest.mark.parametrize("case", ADAPTABLE, ids=str)
def test_plan_says_what_is_widened(case):
    fn, frozen, x, trainable = quantised(case)
    config = jlora.LoraConfig(rank=case.rank, alpha=3, targets="w")
    plan = jlora.plan(fn, frozen, x, config=config)
    said = {
        (row.path, use.op)
        for row in plan.rows()
        for use in row.uses
        if use.route == "widened"
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        n = products(jlora.apply_lora(fn), frozen, trainable, x)
    told = "\n".join(str(w.message) for w in caught)
    found = re.findall(r"\n  (\w+(?:, \w+)*): `([\w-]+)`.* needs the whole array", told)
    done = {(path, op) for paths, op in found for path in paths.split(", ")}
    assert done <= said
    assert {path for path, _ in done} == {path for path, _ in said}
    assert n or said or case.op == "embedding"
    if said:
        with pytest.raises(jlora.MergeError, match="widened whole"):
            jax.eval_shape(jlora.apply_lora(fn, on_merge="error"), frozen, trainable, x)
