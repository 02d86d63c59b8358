"""What PEFT and transformers load of experts in each layout, beside `peft.validate`.

    python tests/golden/check_layouts.py

Run it where PEFT 0.21.2, torch and transformers 5 are installed, with jlora. For tiny
models of Qwen 3 MoE, Mixtral and gpt-oss, an adapter in every layout is written, as it
is and broken in four ways. PEFT loads and merges each, and `load_adapter` loads it. The
exit code is 1 where `validate` says otherwise: applied, but the update is not the
adapter's to 1e-5; altered or dropped, but it is; refused, but it loads; or the other
way round.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Callable

import numpy as np
import transformers
from check_experts import MODELS, changes, experts_of, names, torch_model, tree
from peft import PeftModel
from safetensors.numpy import load_file, save_file

import jlora
from jlora.peft import ExpertLayout

FORMS = ("peft", "unsloth", "per-expert", "w", "stacked", "shared")
Tensors = dict[str, np.ndarray]
# Changes by name: the layout, and what is left of each tensor.
BROKEN: dict[str, tuple[str, Callable[[str, np.ndarray], np.ndarray | None]]] = {
    "an expert is missing": ("per-expert", lambda k, x: None if ".1." in k else x),
    "no up": ("per-expert", lambda k, x: None if "up_proj" in k or "w3" in k else x),
    "another rank": ("peft", lambda k, x: x[:-1] if "lora_A" in k else x[:, :-1]),
    "two alphas": ("per-expert", lambda k, x: x),
}


def adapter(params: Tensors, *, turned: bool, alpha: float) -> jlora.Trainable:
    """Returns random factors, of which A of gate and up and B of down are shared."""
    rng, lora = np.random.default_rng(0), {}
    for path, w in params.items():
        fan_in, fan_out = (1, 2) if turned else (2, 1)
        a = rng.normal(size=(len(w), w.shape[fan_in], 2)).astype(np.float32)
        b = rng.normal(size=(len(w), 2, w.shape[fan_out])).astype(np.float32)
        if "down" in path:
            b = np.repeat(b[:1], len(w), 0)
        else:
            a = np.repeat(a[:1], len(w), 0)
        axes = jlora.Axes((0,), (fan_in,), (fan_out,))
        own = alpha if "/1/" in path else 4.0
        lora[path] = jlora.Factors(a, b, jlora.Spec(rank=2, alpha=own, axes=axes))
    return jlora.Trainable(lora)


def change(place: pathlib.Path, of: Callable) -> None:
    """Changes the tensors, and leaves those modules in the config that are there."""
    file, config = place / "adapter_model.safetensors", place / "adapter_config.json"
    new = {k: of(k, x) for k, x in load_file(file).items()}
    left = {k: np.ascontiguousarray(x) for k, x in new.items() if x is not None}
    save_file(left, file)
    fields = json.loads(config.read_text())
    named = fields["target_modules"] or []
    kept = [m for m in named if any(f".{m}.lora_A" in k for k in left)]
    config.write_text(json.dumps(fields | {"target_modules": kept or None}))


def loaded(place: pathlib.Path, base: pathlib.Path, server: str, want: Tensors) -> str:
    """Returns what a server does: applied, other, or refused."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = experts_of(model)
    try:
        if server == "transformers":
            model.load_adapter(str(place))
            own = [p for n, p in model.named_parameters() if "lora_B" in n]
            return "loaded" if all(p.any() for p in own) else "other"
        merged = experts_of(PeftModel.from_pretrained(model, place).merge_and_unload())
    except Exception:
        return "refused"
    off = max(np.abs(merged[k] - before[k] - want[k]).max() for k in want)
    return "applied" if off < 1e-5 else "other"


def judged(place: pathlib.Path, base: pathlib.Path, server: str) -> str:
    """Returns the same by `validate`; no names or shapes tell `unsloth` from `peft`."""
    report = jlora.peft.validate(place, base, server=server)
    outcomes = {verdict.outcome for verdict in report.verdicts}
    if "refused" in outcomes:
        return "refused"
    return "applied" if outcomes == {"applied"} else "other"


def cases() -> list[tuple[str, str, Callable | None]]:
    """Returns a name, a layout and a change of tensors for each case."""
    whole = [(form, form, None) for form in FORMS]
    return whole + [(name, form, how) for name, (form, how) in BROKEN.items()]


def main() -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    wrong = count = 0
    for kind in MODELS:
        top = pathlib.Path(tempfile.mkdtemp())
        model = torch_model(kind)
        model.save_pretrained(top / "base")
        params, turned = experts_of(model), kind == "gpt_oss"
        for number, (name, form, how) in enumerate(cases()):
            place, alpha = top / str(number), 8.0 if name == "two alphas" else 4.0
            own = adapter(params, turned=turned, alpha=alpha)
            short = form == "w" or (kind == "mixtral" and how is not None)
            layout = ExpertLayout("per-expert" if form == "w" else form)
            layout = dataclasses.replace(
                layout,
                interleaved=turned,
                projections=("w1", "w3", "w2") if short else (),
            )
            jlora.peft.save(place, own, names=names(kind), layout=layout)
            if how is not None:
                change(place, how)
            want = changes(tree(params), own)
            for server in ("peft", "transformers"):
                does = loaded(place, top / "base", server, want)
                says = judged(place, top / "base", server)
                agree = says == does
                if does == "loaded":  # it does not merge, so alphas are not seen
                    agree = says != "refused"
                if form == "unsloth":  # its config does not say whose it is
                    agree = says == "applied"
                count, wrong = count + 1, wrong + (not agree)
                print(f"{kind:10} {name:20} {server:13} {does:8} {says}", flush=True)
    print(f"{count} cases, {wrong} disagreements")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
