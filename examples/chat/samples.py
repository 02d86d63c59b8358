"""What the model answers to held-out prompts."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import jlora

from . import model, template
from .config import Options
from .data import Conversation
from .generate import generate
from .model import DecoderConfig
from .report import Sample


def answerer(
    options: Options,
    config: DecoderConfig,
    base: Path,
    tokenizer: Any,
    tests: Sequence[Conversation],
) -> Callable[[Any, jlora.Trainable], list[str]]:
    """Returns the function of both sides that answers the first held-out prompts."""
    decode = jlora.apply_lora(functools.partial(model.decode, config=config))
    prompts = [
        template.prompt(tokenizer, talk, **options.template_args)
        for talk in tests[: options.samples]
    ]
    end = end_tokens(base, tokenizer)

    def answer(frozen: Any, trainable: jlora.Trainable) -> list[str]:
        if not prompts:
            return []
        dtype = jax.tree.leaves(model.shapes(config))[0].dtype
        tokens = generate(
            decode,
            (frozen, trainable),
            prompts,
            config,
            count=options.tokens,
            end=end,
            dtype=dtype,
        )
        return [tokenizer.decode(own) for own in tokens]

    return answer


def end_tokens(base: Path, tokenizer: Any) -> list[int]:
    """Returns the tokens that end an answer."""
    file = base / "generation_config.json"
    found = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    own = found if isinstance(found, list) else [found]
    return sorted({*own, tokenizer.eos_token_id} - {None})


def side_by_side(
    tests: Sequence[Conversation], before: Sequence[str], after: Sequence[str]
) -> list[Sample]:
    """Returns the answers before and after, with what was asked and what is right."""
    found = []
    for talk, *answers in zip(tests, before, after, strict=False):
        i = template.first_answer(talk)
        asked, right = (str(talk.messages[j]["content"]) for j in (i - 1, i))
        found.append(Sample(asked, *answers, right))
    return found
