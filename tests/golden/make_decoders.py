"""Makes decoders.json and decoders.npz: logits of transformers' own decoders.

Needs torch and transformers 5 (extra `golden`); run from the repository's root:

    python tests/golden/make_decoders.py
"""

import json
import pathlib

import decoder_cases
import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent


def logits(case: str) -> tuple[dict, np.ndarray]:
    """Returns the config as transformers 5 writes it, and the logits, float32."""
    fields = dict(decoder_cases.CASES[case])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = decoder_cases.weight(case, name, tuple(p.shape))
            p.copy_(torch.from_numpy(drawn))
        out = model(torch.from_numpy(decoder_cases.tokens()), use_cache=False).logits
    return json.loads(model.config.to_json_string()), out.numpy()


def main() -> None:
    made = {case: logits(case) for case in decoder_cases.CASES}
    about = {
        "transformers": transformers.__version__,
        "configs": {case: config for case, (config, _) in made.items()},
    }
    (HERE / "decoders.json").write_text(json.dumps(about, indent=1) + "\n")
    arrays = {case: out for case, (_, out) in made.items()}
    np.savez_compressed(HERE / "decoders.npz", **arrays)
    for case, out in arrays.items():
        print(f"{case:20} {out.std():.3f} {np.abs(out).max():.3f}")


if __name__ == "__main__":
    main()
