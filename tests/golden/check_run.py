"""What `python -m examples.chat` wrote, as PEFT and transformers read it.

In an environment with jlora, `torch`, `peft` and `transformers` 5 (the extra `golden`),
from the repository's root, after a run with its results in RUN:

    PYTHONPATH=. python tests/golden/check_run.py RUN

PEFT loads `RUN/adapter` by the base model that it names, and transformers loads
`RUN/merged`; both open their tokenizers, and write a conversation alike. Their logits
are compared with those that jlora computes of the base and the newest checkpoint. The
exit code is 1 if an error exceeds 1e-4 of the largest logit.
"""

import functools
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import jlora
from examples.chat import hub, model

TOLERANCE = 1e-4
TALK = [{"role": "user", "content": "What is new in Paris, 1924?"}]


def logits(found: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return found.eval()(torch.from_numpy(tokens)).logits.numpy()


def main() -> None:
    run = pathlib.Path(sys.argv[1])
    adapter, merged = run / "adapter", run / "merged"
    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    texts = {
        name: AutoTokenizer.from_pretrained(place).apply_chat_template(
            TALK, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for name, place in {"base": base, "PEFT": adapter, "merged": merged}.items()
    }
    alike = len({tuple(own) for own in texts.values()}) == 1
    tokens = np.array([texts["base"]])

    config, params = hub.load(base, dtype="float32")
    trained = jlora.checkpoint.restore(run / "checkpoints").trainable
    fn = jlora.apply_lora(functools.partial(model.forward, config=config))
    own = np.asarray(jax.jit(fn)(params, trained, jnp.asarray(tokens, jnp.int32)))

    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    whole = AutoModelForCausalLM.from_pretrained(base, **options)
    moved = np.abs(own - logits(whole, tokens)).max()
    read = {
        "PEFT": AutoPeftModelForCausalLM.from_pretrained(adapter, **options),
        "merged": AutoModelForCausalLM.from_pretrained(merged, **options),
    }
    wrong = not alike or moved < 10 * TOLERANCE
    print(f"tokenizers {'agree' if alike else 'differ'}; logits moved by {moved:.2f}")
    for name, found in read.items():
        error = np.abs(logits(found, tokens) - own).max() / np.abs(own).max()
        wrong |= error > TOLERANCE
        print(f"{name:8} {error:.1e}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
