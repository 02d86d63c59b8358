"""GRPO: groups of samples, their rewards beside each other, a step of the adapter.

Shao et al., 2024, DeepSeekMath, section 4, https://arxiv.org/abs/2402.03300
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from examples.chat.generate import generate
from examples.chat.model import DecoderConfig, decode, forward

Score = Callable[[int, Sequence[int]], float]  # (number of the prompt, written tokens)


class Batch(NamedTuple):
    """Samples with their prompts, `[rows, length]`; `advantage` is `[rows]`.

    Attributes:
      tokens: prompts and what was written, padded on the right.
      written: 1 where a token was written by the policy, else 0.
      there: 1 where a token is.
      advantage: how much better the sample is than its group.
    """

    tokens: jax.Array
    written: jax.Array
    there: jax.Array
    advantage: jax.Array


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Returns `[prompts, samples]` rewards less the mean of their row, over its spread.

    A row whose rewards are equal teaches nothing: its advantages are zero.
    """
    spread = rewards.std(axis=1, keepdims=True)
    return (rewards - rewards.mean(axis=1, keepdims=True)) / (spread + 1e-4)


def batched(
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sequence[int]],
    advantage: np.ndarray,
    length: int,
) -> Batch:
    """Returns the rows of a step, padded to `length` so that one program compiles."""
    shape = (len(samples), length)
    tokens, written, there = (np.zeros(shape, np.int32) for _ in range(3))
    for row, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        n, m = len(prompt), len(prompt) + len(sample)
        tokens[row, :m], written[row, n:m], there[row, :m] = [*prompt, *sample], 1, 1
    rows = advantage.reshape(-1).astype(np.float32)
    return Batch(*map(jnp.asarray, (tokens, written, there, rows)))


def chosen(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the log-probability of each token but the first, `[rows, length - 1]`."""
    every = jax.nn.log_softmax(logits[:, :-1])
    return jnp.take_along_axis(every, tokens[:, 1:, None], axis=-1)[..., 0]


def make_step(
    config: DecoderConfig, tx: optax.GradientTransformation, beta: float
) -> Callable[..., Any]:
    """Returns a jitted `step(trainable, state, frozen, batch)`.

    It returns the new adapter and state, and the mean distance from the reference. The
    reference policy is the base itself, `forward(frozen, ...)`: it takes no memory.
    """
    reference = functools.partial(forward, config=config)
    policy = jlora.apply_lora(reference)

    def loss(trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        inputs = batch.tokens, None, batch.there
        now = chosen(policy(frozen, trainable, *inputs), batch.tokens)
        then = chosen(reference(frozen, *inputs), batch.tokens)
        mask = batch.written[:, 1:].astype(jnp.float32)
        count = jnp.maximum(mask.sum(), 1.0)
        # One step for each batch of samples: the ratio is 1, and its gradient counts.
        ratio = jnp.exp(now - jax.lax.stop_gradient(now))
        kl = jnp.exp(then - now) - (then - now) - 1.0
        gain = ratio * jnp.broadcast_to(batch.advantage[:, None], ratio.shape)
        distance = (mask * kl).sum() / count
        return beta * distance - (mask * gain).sum() / count, distance

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable: Any, state: Any, frozen: Any, batch: Batch) -> Any:
        gradient, kl = jax.grad(loss, has_aux=True)(trainable, frozen, batch)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, kl

    return step


class Sampler(NamedTuple):
    """Writes samples with the policy, which is the base with an adapter.

    Attributes:
      decode: `jlora.apply_lora` of the model's `decode`.
      config: the model's.
      most: how many tokens to write at most.
      end: tokens that end an answer.
    """

    decode: Callable[..., Any]
    config: DecoderConfig
    most: int
    end: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: DecoderConfig, most: int, end: tuple[int, ...] = ()):
        """Returns a sampler for any adapter of a model."""
        adapted = jlora.apply_lora(functools.partial(decode, config=config))
        return cls(adapted, config, most, end)

    def __call__(
        self,
        weights: tuple[Any, jlora.Trainable],
        prompts: Sequence[Sequence[int]],
        temperature: float,
        key: jax.Array | None = None,
    ) -> list[list[int]]:
        return generate(
            self.decode,
            weights,
            prompts,
            self.config,
            count=self.most,
            end=self.end,
            temperature=temperature,
            key=key,
        )


def rollout(
    sampler: Sampler,
    weights: tuple[Any, jlora.Trainable],
    prompts: Sequence[Sequence[int]],
    score: Score,
    *,
    group: int,
    length: int,
    key: jax.Array,
) -> tuple[Batch, float]:
    """Returns the samples of `group` for each prompt, and their mean reward."""
    repeated = [prompt for prompt in prompts for _ in range(group)]
    samples = sampler(weights, repeated, 1.0, key)
    rewards = np.array([score(i // group, s) for i, s in enumerate(samples)])
    advantage = advantages(rewards.reshape(len(prompts), group))
    return batched(repeated, samples, advantage, length), float(rewards.mean())
