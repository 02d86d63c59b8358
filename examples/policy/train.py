"""Teaches SmolLM2 to answer sums with a number only, from rewards."""

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import optax
import platformdirs
from transformers import AutoTokenizer

import jlora
from examples.chat import hub, smollm2
from examples.chat.model import forward

from .grpo import Sampler, Score, make_step, rollout

Problem = tuple[int, int]
FORMAT = 0.2  # the reward of a number that is not the sum
LARGEST = 20  # of the numbers to add


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options in `argv`, by default those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.policy",
        description="Train an adapter of SmolLM2 by GRPO: sums, answered by a number.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=30, help="training steps")
    add("--prompts", type=int, default=4, help="problems a step")
    add("--group", type=int, default=8, help="samples of each problem")
    add("--tokens", type=int, default=10, help="tokens to write at most")
    add("--test", type=int, default=32, help="held-out problems")
    add("--rank", type=int, default=8, help="rank of A and B")
    add("--lr", type=float, default=1e-3, help="learning rate")
    add("--beta", type=float, default=0.02, help="weight of the distance from the base")
    add("--seed", type=int, default=0, help="of problems, samples and factors")
    add("--out", type=Path, default=Path("runs/policy"), help="where results go")
    cache = Path(platformdirs.user_cache_dir("jlora"))
    add("--cache", type=Path, default=cache, help="where the model is kept")
    return parser.parse_args(argv)


def problems(count: int, rng: np.random.Generator) -> list[Problem]:
    """Returns pairs of numbers to add."""
    return [(int(a), int(b)) for a, b in rng.integers(1, LARGEST + 1, (count, 2))]


def reward(problem: Problem, answer: str) -> float:
    """Returns 1 for the sum and nothing else, 0.2 for another number.

    Of an answer with more in it, the last number counts, and the reward is as much less
    as digits are fewer. A model that never writes a number alone learns to do so: its
    samples differ in reward from the first step.
    """
    text = answer.strip().removesuffix(".")
    numbers = re.findall(r"[0-9]+", text)
    if not numbers:
        return 0.0
    share = sum(map(len, numbers)) / len(text)
    return share * (1.0 if numbers[-1] == str(sum(problem)) else FORMAT)


def prompt_of(tokenizer: Any, problem: Problem) -> list[int]:
    """Returns the tokens of a problem, in the model's chat template."""
    a, b = problem
    message = {"role": "user", "content": f"What is {a} + {b}?"}
    text = tokenizer.apply_chat_template(
        [message], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text, add_special_tokens=False)


def scored(tokenizer: Any, asked: Sequence[Problem]) -> Score:
    """Returns the reward of what was written for the problems."""
    return lambda i, written: reward(asked[i], tokenizer.decode(written))


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Trains, prints a table, and writes the adapter as a PEFT directory."""
    options = parse(argv)
    directory = smollm2.directory(options.cache)
    config, params = hub.load(directory, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rng = np.random.default_rng(options.seed)
    held_out = problems(options.test, rng)
    plan = jlora.plan(
        lambda p, tokens: forward(p, tokens, config=config),
        params,
        np.zeros((1, 8), np.int32),
        config=jlora.LoraConfig(rank=options.rank, alpha=2 * options.rank),
    )
    frozen, trainable = jlora.split(jax.random.key(options.seed), params, plan)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(options.lr))
    step = make_step(config, tx, options.beta)
    state: Any = cast(Any, tx.init)(trainable)
    sampler = Sampler.of(config, options.tokens, (tokenizer.eos_token_id,))

    length = len(prompt_of(tokenizer, (LARGEST, LARGEST))) + options.tokens

    def tested(trainable: jlora.Trainable) -> float:
        prompts = [prompt_of(tokenizer, problem) for problem in held_out]
        answers = sampler((frozen, trainable), prompts, 0.0)
        score = scored(tokenizer, held_out)
        return float(np.mean([score(i, answer) for i, answer in enumerate(answers)]))

    found: dict[str, list[float]] = {
        "test": [tested(trainable)],
        "reward": [],
        "kl": [],
    }
    print(f"held-out reward before: {found['test'][0]:.2f}")
    print("step  reward  distance  seconds")
    for i in range(options.steps):
        start = time.perf_counter()
        asked = problems(options.prompts, rng)
        batch, mean = rollout(
            sampler,
            (frozen, trainable),
            [prompt_of(tokenizer, problem) for problem in asked],
            scored(tokenizer, asked),
            group=options.group,
            length=length,
            key=jax.random.fold_in(jax.random.key(options.seed + 1), i),
        )
        trainable, state, kl = step(trainable, state, frozen, batch)
        found["reward"].append(mean)
        found["kl"].append(float(kl))
        took = time.perf_counter() - start
        print(f"{i:4}  {mean:6.2f}  {float(kl):8.3f}  {took:7.1f}", flush=True)
    found["test"].append(tested(trainable))
    print(f"held-out reward after: {found['test'][1]:.2f}")
    out = options.out / "adapter"
    jlora.peft.save(out, trainable, names=hub.names(config), base_model=str(directory))
    print(f"The adapter is in {out}")
    return found
