"""The models of map_cases.py in transformers, and the adapters for them in PEFT.

Needs torch, PEFT and transformers 5 (extra `golden`). In this order, with one DIR:

    python tests/golden/make_maps.py write DIR     # here
    python tests/golden/check_maps.py LIBRARY DIR  # for each library, where it lives
    python tests/golden/make_maps.py check DIR     # here
    python tests/golden/make_maps.py store DIR     # here: writes maps.json

`write` makes a directory of the Hub for each case, with logits beside it. `check` lets
PEFT load the adapters that jlora saved, and prints the largest differences of logits.
"""

import argparse
import json
import pathlib
import sys

import map_cases
import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
LIMIT = 1e-4


def logits(model: torch.nn.Module) -> np.ndarray:
    """Returns the logits of a model, float32."""
    ids = torch.from_numpy(map_cases.tokens()).long()
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits.float().numpy()


def write(case: str, folder: pathlib.Path) -> None:
    """Writes a model, its tensors drawn by their names on the Hub, and its logits."""
    fields = dict(map_cases.CASES[case])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.save_pretrained(folder / "model")
    file = folder / "model" / "model.safetensors"
    held = load_file(file)
    drawn = {k: map_cases.weight(case, k, x.shape) for k, x in held.items()}
    save_file(drawn, file, metadata={"format": "pt"})
    np.save(folder / "logits.npy", logits(load(folder)))


def load(folder: pathlib.Path) -> torch.nn.Module:
    """Returns the model of a case."""
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", attn_implementation="eager", dtype=torch.float32
    )


def check(folder: pathlib.Path, library: pathlib.Path) -> float:
    """Returns how far PEFT's logits with an adapter are from the library's."""
    model = peft.PeftModel.from_pretrained(load(folder), library / "adapter")
    return float(np.abs(logits(model) - np.load(library / "adapted.npy")).max())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["write", "check", "store"])
    parser.add_argument("folder", type=pathlib.Path)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    worst, models, stored = 0.0, {}, []
    for case in map_cases.CASES:
        folder = given.folder / case
        if given.what == "write":
            folder.mkdir(parents=True, exist_ok=True)
            write(case, folder)
        for file in sorted(folder.glob("*/about.json")):
            about = json.loads(file.read_text())
            if given.what == "check" and (file.parent / "adapted.npy").exists():
                about["peft"] = check(folder, file.parent)
                worst = max(worst, about["peft"])
                file.write_text(json.dumps(about, indent=1))
                print(f"{case:10} {about['class']:34} {about['peft']:.1e}")
            stored.append({"case": case, **about})
        if given.what == "store":
            held = load_file(folder / "model" / "model.safetensors")
            models[case] = {k: list(x.shape) for k, x in sorted(held.items())}
    if given.what == "store":
        versions = {"transformers": transformers.__version__, "peft": peft.__version__}
        about = {"versions": versions, "models": models, "checked": stored}
        text = json.dumps(about, separators=(",", ":"))
        (HERE / "maps.json").write_text(text.replace('{"case"', '\n{"case"') + "\n")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
