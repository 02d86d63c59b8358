"""Adapters of the decoder in `examples/chat`, as PEFT and transformers read them.

In an environment with jlora, `torch`, `peft` and `transformers` 5 (the extra `golden`),
from the repository's root:

    PYTHONPATH=. python tests/golden/check_chat.py [CASE ...] [--method NAME ...]

For each tiny model of decoder_cases.py: transformers writes it, `hub.load` reads it,
jlora adapts all linear layers with random factors. PEFT then loads what
`jlora.peft.save` wrote, and transformers what `jlora.peft.save_base` wrote of the
merged model. The table has how far the adapter moves the logits, and the largest error
of each way back. The exit code is 1 if an error exceeds 1e-4.
"""

import argparse
import functools
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import decoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, logging

import jlora
from examples.chat import hub, model

TOLERANCE = 1e-4
METHODS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"method": "dora"}}


def written(case: str, folder: pathlib.Path) -> None:
    """Writes the case's model as transformers does."""
    fields = dict(decoder_cases.CASES[case])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in made.named_parameters():
            drawn = decoder_cases.weight(case, name, tuple(p.shape))
            p.copy_(torch.from_numpy(drawn))
    made.save_pretrained(folder)


def logits(folder: pathlib.Path, adapter: pathlib.Path | None = None) -> np.ndarray:
    """Returns what transformers, with PEFT if there is an adapter, computes."""
    found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter:
        found = peft.PeftModel.from_pretrained(found, adapter)
    with torch.no_grad():
        return found.eval()(torch.from_numpy(decoder_cases.tokens())).logits.numpy()


def errors(case: str, method: str, scan: bool, here: pathlib.Path) -> list[float]:
    """Returns how far the adapter moves the logits, and the errors of both ways."""
    config, params = hub.load(here / "base", dtype="float32", scan=scan)
    fn = functools.partial(model.forward, config=config)
    tokens, names = jnp.asarray(decoder_cases.tokens(), jnp.int32), hub.names(config)
    lora = jlora.LoraConfig(rank=3, alpha=5, **METHODS[method])
    plan = jlora.plan(fn, params, tokens, config=lora)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape), trainable)
    trainable = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), trainable)
    adapted = np.asarray(jax.jit(jlora.apply_lora(fn))(frozen, trainable, tokens))

    adapter, merged = here / "adapter", here / "merged"
    jlora.peft.save(adapter, trainable, names=names, base_model=str(here / "base"))
    about = here / "base" / "config.json"
    whole = jlora.merge(frozen, trainable)
    jlora.peft.save_base(merged, whole, names=names, config=about)
    moved = adapted - logits(here / "base")
    back = (logits(here / "base", adapter), logits(merged))
    return [np.abs(x).max() for x in (moved, *(x - adapted for x in back))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", default=[*decoder_cases.CASES])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=[*METHODS])
    flags, wrong = parser.parse_args(), 0
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(
        f"{'model':20} {'method':7} {'layers':9} {'moved':>7} {'PEFT':>8} {'merged':>8}"
    )
    for case in flags.case:
        for method in flags.method:
            for scan in (True, False):
                with tempfile.TemporaryDirectory() as folder:
                    here = pathlib.Path(folder)
                    written(case, here / "base")
                    moved, *off = errors(case, method, scan, here)
                wrong += max(off) > TOLERANCE or moved < 0.1
                form = "scanned" if scan else "unrolled"
                told = " ".join(f"{x:8.1e}" for x in off)
                print(f"{case:20} {method:7} {form:9} {moved:7.2f} {told}", flush=True)
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    main()
