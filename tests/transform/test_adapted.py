"""The forms of an adapted product: the same numbers, whatever the platform picks."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jlora
from tests.helpers import close

TOKENS, WIDTH = 40, 6  # many tokens: a temporary weight pays on every platform


def setting(fn, shape=(WIDTH, 5), x_shape=(2, TOKENS // 2, WIDTH), dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": jax.random.normal(keys[0], shape, dtype)}
    x = jax.random.normal(keys[1], x_shape, dtype)
    config = jlora.LoraConfig(rank=2, alpha=3, targets="w")
    plan = jlora.plan(fn, params, x, config=config)
    frozen, trainable = jlora.split(keys[2], params, plan)
    trainable = jax.tree.map(lambda t: jax.random.normal(keys[3], t.shape), trainable)
    return plan, frozen, trainable, x


def product(params, x):
    return jnp.tanh(x @ params["w"])


def on_the_left(params, x):
    return jnp.tanh(jnp.einsum("io,...ti->...ot", params["w"], x))


def heads(params, x):
    return jnp.einsum("...ti,iho->...hto", x, params["w"])


def value_and_grad(run, t, x):
    return jax.value_and_grad(lambda t, x: jnp.sin(run(t, x)).sum(), (0, 1))(t, x)


def jvp(run, t, x):
    return jax.jvp(run, (t, x), (t, x))


def hessian_vector(run, t, x):
    """Mixed second derivatives too: those of `x` along `t`."""
    grad = jax.grad(lambda t, x: jnp.sin(run(t, x)).sum(), (0, 1))
    return jax.jvp(grad, (t, x), (t, x))


def over_inputs(run, t, x):
    return jax.vmap(lambda x: value_and_grad(run, t, x), 1)(x)


def inputs_inside(run, t, x):
    return value_and_grad(jax.vmap(run, (None, 0)), t, jnp.stack([x, 2 * x]))


def over_adapters(run, t, x):
    ts = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), t)
    return jax.vmap(functools.partial(value_and_grad, run), (0, None))(ts, x)


def over_both(run, t, x):
    ts = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), t)
    xs = jnp.stack([x, 2 * x])
    return jax.vmap(functools.partial(value_and_grad, run))(ts, xs)


def rematerialised(run, t, x):
    return value_and_grad(jax.checkpoint(run), t, x)


def jitted(run, t, x):
    return jax.jit(functools.partial(value_and_grad, run))(t, x)


TRANSFORMS = [value_and_grad, jvp, hessian_vector, over_inputs, inputs_inside]
TRANSFORMS += [over_adapters, over_both, rematerialised, jitted]


@pytest.mark.once
@pytest.mark.parametrize("form", ["auto", "factored", "merged"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("fn", "shape"),
    [(product, (WIDTH, 5)), (on_the_left, (WIDTH, 5)), (heads, (WIDTH, 2, 5))],
)
def test_each_form_equals_the_merged_weight_under(transform, fn, shape, form):
    _, frozen, trainable, x = setting(fn, shape)
    lora_fn = jlora.apply_lora(fn, form=form)
    close(
        transform(lambda t, x: lora_fn(frozen, t, x), trainable, x),
        transform(lambda t, x: fn(jlora.merge(frozen, t), x), trainable, x),
        rtol=1e-4,
        atol=1e-5,
        largest=1e-5,
    )


def test_linear_transpose_of_the_activation():
    def linear(params, x):
        return x @ params["w"]

    _, frozen, trainable, x = setting(linear)
    dy = jnp.ones((*x.shape[:-1], 5))

    def transposed(fn):
        return jax.linear_transpose(fn, x)(dy)

    close(
        transposed(lambda x: jlora.apply_lora(linear)(frozen, trainable, x)),
        transposed(lambda x: linear(jlora.merge(frozen, trainable), x)),
        rtol=1e-4,
        atol=1e-5,
        largest=1e-5,
    )


def lowered(fn, *args, platforms=("cpu",)):
    return jax.export.export(jax.jit(fn), platforms=platforms)(*args).mlir_module()


def count_products(fn, *args, platform):
    return lowered(fn, *args, platforms=(platform,)).count("stablehlo.dot_general")


def test_the_platform_picks_when_the_program_is_lowered():
    """bfloat16: on the activations on a CPU, on a temporary weight on a TPU, where
    nothing but the temporary weight and one product is left of the value."""
    _, frozen, trainable, x = setting(product, dtype="bfloat16")
    lora_fn = jlora.apply_lora(product)
    args = (frozen, trainable, x)
    assert "tensor<6x5xf32>" not in lowered(lora_fn, *args, platforms=("cpu",))
    assert "tensor<6x5xf32>" in lowered(lora_fn, *args, platforms=("tpu",))
    both = lowered(lora_fn, *args, platforms=("cpu", "tpu"))
    assert "stablehlo.case" in both


@pytest.mark.parametrize("tokens", [1, 5])
def test_few_tokens_never_make_a_temporary_weight(tokens):
    plan, frozen, trainable, x = setting(product, x_shape=(tokens, WIDTH))
    jaxpr = jax.make_jaxpr(jlora.apply_lora(product))(frozen, trainable, x)
    assert "adapted_dot" not in str(jaxpr)
    assert plan.rows()[0].uses[0].forms == ("factored", "factored")
    assert "many tokens" not in str(plan)


def test_plan_tells_the_form():
    plan, *_ = setting(product)
    assert plan.rows()[0].uses[0].forms == ("merged", "merged")
    assert "many tokens meet them: 1 of 1 on a CPU, 1 of 1 on an accelerator" in str(
        plan
    )


def test_the_gradient_never_has_the_shape_of_the_weight():
    """Of the three weight-shaped values in a step two are the weight, one the sum."""
    _, frozen, trainable, x = setting(product)
    run = jlora.apply_lora(product, form="merged")

    def gradient(t):
        return jax.grad(lambda t: run(frozen, t, x).sum())(t)

    jaxpr = jax.make_jaxpr(gradient)(trainable)
    made = [v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars]
    assert (WIDTH, 5) not in made


def test_forms_are_checked():
    with pytest.raises(ValueError, match="form must be"):
        jlora.apply_lora(product, form="fast")
    with pytest.raises(ValueError, match=r"Rule\('w'\): form must be .* got 'fast'"):
        jlora.Rule("w", form="fast")


def two(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def with_rules(*rules):
    params = {"w": jnp.ones((WIDTH, 5)), "v": jnp.ones((5, WIDTH))}
    x = jnp.ones((TOKENS, WIDTH))
    config = jlora.LoraConfig(rank=2, targets="*", rules=rules)
    assert jlora.LoraConfig.from_json(config.to_json()) == config
    plan = jlora.plan(two, params, x, config=config)
    return plan, *jlora.split(jax.random.key(0), params, plan), x


def test_a_rule_says_the_form(tmp_path):
    plan, frozen, trainable, x = with_rules(jlora.Rule("w", form="factored"))
    forms = {row.path: row.uses[0].forms for row in plan.rows()}
    assert forms == {"w": ("factored",) * 2, "v": ("merged",) * 2}
    assert "1 of 2 on a CPU" in str(plan)
    jlora.save(tmp_path / "own", trainable)
    read = jlora.load(tmp_path / "own")
    assert read.lora["w"].spec == trainable.lora["w"].spec
    assert "form='factored'" in repr(read.lora["w"])
    for form, count in (("auto", 1), ("merged", 1), ("factored", 0)):
        run = jlora.apply_lora(two, form=form)
        jaxpr = str(jax.make_jaxpr(run)(frozen, read, x))
        assert jaxpr.count("adapted_dot") == count
    plan, frozen, trainable, x = with_rules(jlora.Rule("*", form="merged"))
    run = jlora.apply_lora(two, form="factored")
    assert str(jax.make_jaxpr(run)(frozen, trainable, x)).count("adapted_dot") == 2


def test_a_form_that_no_product_has_is_refused():
    def wide(params, x):
        """The result has another dtype than the operands."""
        return jnp.dot(x, params["w"], preferred_element_type="bfloat16")

    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), "float32")
    dense = {"w": jnp.ones((WIDTH, 4))}
    for fn, params in ((wide, dense), (product, jlora.quantize(dense, kind="int8"))):
        rules = [jlora.Rule("w", form=form) for form in ("factored", "merged")]
        fits, not_ = (jlora.LoraConfig(rank=2, targets="w", rules=r) for r in rules)
        assert jlora.plan(fn, params, x, config=fits).adapted == ("w",)
        with pytest.raises(jlora.TargetError, match="form: 'w' has no product that a"):
            jlora.plan(fn, params, x, config=not_)


def test_combined_adapters_keep_a_form_that_all_have():
    (_, _, first, _), (_, _, second, _) = (
        with_rules(jlora.Rule("*", form=form), jlora.Rule("v", form=other))
        for form, other in (("factored", "auto"), ("factored", "merged"))
    )
    for both in (
        jlora.adapters.stack([first, second]),
        jlora.adapters.concat([first, second]),
        jlora.adapters.linear([first, second]),
    ):
        forms = {path: f.spec.form for path, f in both.lora.items()}
        assert forms == {"w": "factored", "v": "auto"}


def shared(params, x):
    q, k = x @ params["q"], x @ params["k"].astype(x.dtype)
    return q * k + jnp.einsum("bti,hi->bth", x, params["v"])


def test_weights_that_meet_one_activation_share_a_product():
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "q": jax.random.normal(keys[0], (WIDTH, 4)),
        "k": jax.random.normal(keys[1], (WIDTH, 4)).astype("bfloat16"),
        "v": jax.random.normal(keys[2], (4, WIDTH)),
    }
    x = jax.random.normal(keys[3], (2, 3, WIDTH))
    rules = jlora.Rule("k", rank=3)
    config = jlora.LoraConfig(rank=2, targets=("q", "k", "v"), rules=rules)
    plan = jlora.plan(shared, params, x, config=config)
    frozen, trainable = jlora.split(keys[4], params, plan)
    trainable = jax.tree.map(lambda t: jax.random.normal(keys[4], t.shape), trainable)
    run = jlora.apply_lora(shared)
    jaxpr = jax.make_jaxpr(run)(frozen, trainable, x)
    thin = [e for e in jaxpr.eqns if e.primitive.name == "thin_dot"]
    wide = [e for e in thin if e.invars[0].aval.shape == x.shape]
    assert [e.outvars[0].aval.shape for e in wide] == [(2, 3, 2 + 3 + 2)]
    one = jax.make_jaxpr(run)(frozen, trainable, x[:1, :1])
    assert "concatenate" not in {e.primitive.name for e in one.eqns}  # a copy
    exact = jax.tree.map(lambda w: w.astype("float32"), frozen)
    close(
        value_and_grad(lambda t, x: run(exact, t, x), trainable, x),
        value_and_grad(lambda t, x: shared(jlora.merge(exact, t), x), trainable, x),
        rtol=1e-4,
        atol=1e-5,
        largest=1e-5,
    )
