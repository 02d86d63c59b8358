"""What `targets="all-linear"` means: what it takes, and why it leaves others."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import example, given, strategies as st
from jax import lax

import jlora

D, VOCAB = 8, 12
PARAMS = {
    "embed": jnp.ones((VOCAB, D)),
    "up": jnp.eye(D),
    "head": jnp.ones((D, VOCAB)),
    "bias": jnp.ones(VOCAB),
}
ROW_OF_TOKENS = jnp.zeros((2,), jnp.int32)


def plan(fn, params, *args, **config):
    config = {"rank": 2, **config}
    return jlora.plan(fn, params, *args, config=jlora.LoraConfig(**config))


def notes(made):
    return {row.path: row.note for row in made.rows() if row.status == "frozen"}


def holds_without_merging(fn, params, made, *args):
    parts = jlora.split(jax.random.key(0), params, made)
    jax.eval_shape(jlora.apply_lora(fn, on_merge="error"), *parts, *args)


# The output head.


def logits(p, token):
    return jnp.tanh(p["embed"][token] @ p["up"]) @ p["head"] + p["bias"][None]


def greedy(p, token):
    def step(token, _):
        token = jnp.argmax(logits(p, token), -1)
        return token, token

    return lax.scan(step, token, None, length=3)[1]


def sampled(p, token):
    def step(carry, _):
        token, key = carry
        key, now = jax.random.split(key)
        token = jax.random.categorical(now, logits(p, token) / 0.7)
        return (token, key), token

    return lax.scan(step, (token, jax.random.key(0)), None, length=3)[1]


def until_end(p, token):
    def step(state):
        i, token, tokens = state
        token = jnp.argmax(jax.nn.log_softmax(logits(p, token)), -1)
        return i + 1, token, tokens.at[:, i].set(token)

    tokens = jnp.zeros((2, 4), jnp.int32)
    return lax.while_loop(lambda s: s[0] < 4, step, (0, token, tokens))[2]


def cached(p, token):
    """The loop also carries activations, and the embedding of the next token."""

    def step(_, state):
        h, cache, _ = state
        cache = cache + h @ p["up"]
        out = jnp.tanh(cache) @ p["head"] + p["bias"][None]
        token = jnp.argmax(out, -1)
        return p["embed"][token], cache, token

    state = p["embed"][token], jnp.zeros((2, D)), token
    return lax.fori_loop(0, 3, step, state)[2]


def scored(p, token):
    """As beam search: the scores of the tokens so far are carried."""

    def step(carry, _):
        token, total = carry
        best, token = lax.top_k(total[:, None] + logits(p, token), 1)
        return (token[:, 0], best[:, 0]), token

    return lax.scan(step, (token, jnp.zeros(2)), None, length=3)


def one_more_in_cond(p, token):
    return lax.cond(
        token[0] > 0, lambda t: jnp.argmax(logits(p, t), -1), lambda t: t, token
    )


def in_chunks(p, token):
    losses = lax.map(lambda t: -jax.nn.log_softmax(logits(p, t[None]))[0, 0], token)
    return losses.mean()


DECODERS = [greedy, sampled, until_end, cached, scored, one_more_in_cond, in_chunks]


@pytest.mark.parametrize("fn", DECODERS, ids=lambda fn: fn.__name__)
def test_the_output_head_is_found_inside_loops(fn):
    made = plan(fn, PARAMS, ROW_OF_TOKENS)
    assert made.adapted == ("up",)
    assert [row.path for row in made.rows() if row.head] == ["head"]
    holds_without_merging(fn, PARAMS, made, ROW_OF_TOKENS)


def test_a_weight_that_the_next_step_meets_again_is_no_head():
    def recurrent(p, xs):
        def step(h, x):
            h = jnp.tanh(h @ p["u"] + x @ p["w"])
            return h, h @ p["v"]

        return lax.scan(step, jnp.zeros(xs.shape[1:]), xs)

    params = {name: jnp.eye(D) for name in "uvw"}
    made = plan(recurrent, params, jnp.ones((3, 2, D)))
    assert [row.path for row in made.rows() if row.head] == ["v"]
    assert made.adapted == ("u", "w")


def test_a_stack_of_layers_is_no_head():
    def layers(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["first"], p["w"])[0]

    params = {"first": jnp.eye(D), "w": jnp.ones((3, D, D))}
    made = plan(layers, params, jnp.ones((2, D)))
    assert made.adapted == ("first", "w")
    assert not any(row.head for row in made.rows())


def test_a_router_that_only_picks_experts_is_no_head():
    def experts(p, x):
        pick = jnp.argmax(x @ p["router"], -1)
        return jnp.einsum("td,tdf->tf", x, p["experts"][pick]) @ p["last"]

    params = {"router": jnp.ones((D, 3)), "experts": jnp.ones((3, D, D))}
    made = plan(experts, params | {"last": jnp.eye(D)}, jnp.ones((2, D)))
    assert [row.path for row in made.rows() if row.head] == ["last"]


# Weights that are merged too.


def weight_norm(p, x):
    w = p["w"]
    w = p["g"][None] * w / jnp.sqrt(jnp.sum(w * w, axis=0, keepdims=True))
    return jnp.tanh(x @ w) @ p["v"] @ p["last"]


def spectral_norm(p, x):
    return jnp.tanh(x @ (p["w"] / jnp.linalg.norm(p["w"]))) @ p["v"] @ p["last"]


def decayed(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"] @ p["last"], jnp.sum(p["w"] ** 2)


def returned(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"] @ p["last"], p["w"]


def also_added(p, x):
    return (jnp.tanh(x @ p["w"]) + p["w"]) @ p["v"] @ p["last"]


ALSO_MERGED = [weight_norm, spectral_norm, decayed, returned, also_added]


@pytest.mark.parametrize("fn", ALSO_MERGED, ids=lambda fn: fn.__name__)
def test_all_linear_leaves_out_weights_that_are_also_merged(fn):
    params = {"w": jnp.eye(D), "v": jnp.eye(D), "last": jnp.eye(D), "g": jnp.ones(D)}
    x = jnp.ones((D, D))
    made = plan(fn, params, x)
    assert made.adapted == ("v",)
    assert notes(made)["w"] == (
        "also merged on the fly: name it in targets to adapt it"
    )
    holds_without_merging(fn, params, made, x)
    assert plan(fn, params, x, targets="w").adapted == ("w",)


# Leaves that are narrower than their rank.


def gated(p, x):
    h = x * jax.nn.sigmoid(x @ p["gate"])
    gates = jax.nn.softmax(x @ p["router"])
    h = h + jnp.einsum("te,td,edf->tf", gates, x, p["experts"])
    h = h + lax.scan(lambda h, w: (h + x @ w, None), x * 0, p["layers"])[0]
    return h @ p["w"] @ p["last"], h @ p["value"]


WIDTHS = {
    "gate": (D, 1),
    "router": (D, 3),
    "experts": (3, D, D),
    "layers": (2, D, D),
    "value": (D, 1),
    "w": (D, D),
    "last": (D, D),
}
GATED = {name: jnp.ones(shape) for name, shape in WIDTHS.items()}
X = jnp.ones((2, D))


def test_all_linear_leaves_out_leaves_that_are_too_narrow():
    made = plan(gated, GATED, X, rank=4)
    assert made.adapted == ("experts", "layers", "w")
    assert notes(made)["gate"] == (
        "rank 4 is above min(in, out) = 1: a Rule can lower it"
    )
    assert notes(made)["router"].startswith("rank 4 is above min(in, out) = 3")
    holds_without_merging(gated, GATED, made, X)


def test_a_rank_equal_to_the_narrow_side_is_taken():
    assert "router" in plan(gated, GATED, X, rank=3).adapted


def test_narrow_stacks_are_left_out_too():
    params = GATED | {"experts": jnp.ones((3, D, 1)), "layers": jnp.ones((2, 1, D))}

    def fn(p, x):
        p = p | {"experts": jnp.broadcast_to(p["experts"], (3, D, D))}
        p = p | {"layers": jnp.broadcast_to(p["layers"], (2, D, D))}
        return gated(p, x)

    made = plan(fn, params, X, rank=4)
    assert made.adapted == ("w",)


def test_the_rank_of_a_rule_decides():
    rules = jlora.Rule("gate", rank=1), jlora.Rule("w", rank=D)
    made = plan(gated, GATED, X, rank=4, rules=rules)
    assert made.adapted == ("experts", "gate", "layers", "w")
    made = plan(gated, GATED, X, rank=1, rules=jlora.Rule("**", rank=4))
    assert made.adapted == ("experts", "layers", "w")


def test_a_rule_for_a_leaf_that_is_too_narrow_says_so():
    why = r"rules: 'gate' matched .* no effect \(rank 2 is above min\(in, out\) = 1"
    with pytest.raises(jlora.TargetError, match=why):
        plan(gated, GATED, X, rank=4, rules=jlora.Rule("gate", rank=2))


def test_a_narrow_leaf_that_is_named_is_an_error():
    for targets in ("gate", "*", lambda row: row.op == "linear"):
        with pytest.raises(jlora.TargetError, match=r"rank 4 is above min.* 'gate'"):
            plan(gated, GATED, X, rank=4, targets=targets)


def test_methods_without_that_limit_take_narrow_leaves():
    assert "gate" in plan(gated, GATED, X, rank=4, method="vera").adapted


def test_an_init_that_needs_more_than_the_rank_leaves_more_out():
    params = {"w": jnp.eye(D), "v": jnp.ones((D, 6)), "last": jnp.ones((6, 2))}

    def fn(p, x):
        return x @ p["w"] @ p["v"] @ p["last"]

    made = plan(fn, params, X, rank=4, init="lora_ga")
    assert made.adapted == ("w",)
    assert notes(made)["v"].startswith("2 times rank 4 is above min(in, out) = 6")


def test_the_head_does_not_stand_in_for_narrow_leaves():
    with pytest.raises(jlora.TargetError, match=r"rank 4 is above min.* of 'gate'"):
        plan(
            lambda p, x: (x * jnp.sum(x @ p["gate"])) @ p["last"],
            {"gate": jnp.ones((D, 2)), "last": jnp.ones((D, D))},
            X,
            rank=4,
        )


def test_ranks_are_not_moved_to_leaves_that_were_left_out():
    made = plan(gated, GATED, X, rank=4, init="eva", exclude=("experts", "layers"))
    statistics = jlora.activation_statistics(gated, GATED, made, [(X,)])
    moved = jlora.redistribute_ranks(made, statistics)
    assert [row.path for row in moved.rows() if row.spec] == ["w"]
    assert notes(moved) == notes(made)


# Any keys.


@given(
    keys=st.lists(
        st.text("[]{}*?!,/.\\ab0", min_size=1, max_size=4),
        min_size=2,
        max_size=4,
        unique=True,
    )
)
@example(keys=["w[0]", "w0", "last"])
@example(keys=["*", "**", "{", "all-linear"])
@example(keys=["a/b", "a*b", "last"])
def test_names_that_a_plan_shows_can_be_written_into_a_config(keys):
    def fn(p, x):
        return jax.tree.reduce(lambda x, w: jnp.tanh(x @ w), p["layers"], x) @ p["last"]

    params = {"layers": {key: jnp.eye(2) for key in keys}, "last": jnp.eye(2)}
    x = jnp.ones((1, 2))
    every = plan(fn, params, x, rank=1).adapted
    assert len(every) == len(keys)
    for names in (every, tuple(map(jlora.paths.escape, every))):
        assert plan(fn, params, x, rank=1, targets=names).adapted == every
        made = plan(fn, params, x, rank=1, exclude=names[0])
        assert made.adapted == every[1:]
        made = plan(fn, params, x, rank=1, targets=names[1:], train=names[0])
        assert (made.adapted, made.full) == (every[1:], every[:1])
        made = plan(fn, params, x, rank=1, rules=jlora.Rule(names[-1], rank=2))
        ranks = [row.spec.rank for row in made.rows() if row.spec]
        assert ranks == [1] * (len(keys) - 1) + [2]
