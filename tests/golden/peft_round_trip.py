"""Adapters made by jlora, loaded by PEFT: do both give the same outputs?

The two sides live in different environments, so it runs in two steps:

    python -m tests.golden.peft_round_trip write DIR   # jlora, transformers 4.57
    python tests/golden/peft_round_trip.py check DIR   # torch, peft, transformers 5

The first writes the adapters and what the adapted models give, the second prints the
table architecture × kind × error and exits with 1 if an error is over 1e-4.
"""

import pathlib
import sys

GOLDEN = pathlib.Path(__file__).parent / "peft"
CLASSES = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForSequenceClassification",
    "vit": "ViTForImageClassification",
    "t5": "T5ForConditionalGeneration",
}


def kinds(name: str) -> dict:
    """The configs to try on a model."""
    from jlora import Axes, LoraConfig, Rule, TokenRows

    table = {
        "llama": "**/embed_tokens/embedding",
        "gpt2": "**/wte/embedding",
        "bert": "**/word_embeddings/embedding",
        "t5": "shared/embedding",
    }.get(name)
    some = {"rank": 3, "alpha": 5}
    if name.startswith("moe"):
        axes = Axes(batch=(0,), fan_in=(1,), fan_out=(2,))
        rules = (Rule("experts/*", axes=axes),)
        return {
            "linear": LoraConfig(**some, rules=rules),
            "rslora": LoraConfig(**some, rules=rules, rslora=True),
            "rules": LoraConfig(**some, rules=(*rules, Rule("experts/up", rank=2))),
            "adalora": LoraConfig(**some, rules=rules, method="adalora"),
        }
    # PEFT looks for every target of a linear kind; heads are left out, as by default.
    found = {
        "linear": LoraConfig(**some),
        "rslora": LoraConfig(**some, rslora=True),
        "dora": LoraConfig(**some, method="dora"),
        "adalora": LoraConfig(**some, method="adalora"),
        "vera": LoraConfig(**some, method="vera"),
        "lora_xs": LoraConfig(**some, method="lora_xs"),
        "mica": LoraConfig(**some, method="mica"),
        "rules": LoraConfig(
            **some, rules=(Rule("**/1/**", rank=2), Rule("**/0/**", alpha=7))
        ),
    }
    if name in ("bert", "vit"):
        found["head"] = LoraConfig(**some, train=("classifier/*",))
        found["biases"] = LoraConfig(**some, train=("**/layer/0/**/bias",))
    if table and name != "t5":
        found["rows"] = LoraConfig(**some, train=(TokenRows(table, ids=(2, 5, 21)),))
        found["table"] = LoraConfig(**some, targets=(table, "**/{v_proj,c_attn}/kernel")
                                    if name != "bert" else table)  # fmt: skip
    return found


def write(folder: pathlib.Path) -> None:
    import jax
    import numpy as np

    import jlora
    from jlora._io.shards import pending, write_tensors
    from tests.peft.models import BASE_NAMES, OWN, as_users, call, model

    for name in (*CLASSES, *OWN):
        m = model(name)
        for n, (kind, config) in enumerate(kinds(name).items()):
            if name == "convs" and kind == "rules":
                continue
            with as_users():
                fn = lambda p, inputs, m=m: m.fn(p, **inputs)  # noqa: E731
                plan = jlora.plan(fn, m.params, m.inputs, config=config)
                frozen, adapter = jlora.split(jax.random.key(n), m.params, plan)
                rng = np.random.default_rng(n)
                adapter = jax.tree.map(
                    lambda x, rng=rng: (
                        x + 0.2 * rng.normal(size=x.shape).astype(x.dtype)
                    ),
                    adapter,
                )
                out = call(m, jlora.merge(frozen, adapter))
            here = folder / name / kind
            tied = name == "gpt2"
            jlora.peft.save(here, adapter, names=m.names, tied=tied, params=m.params)
            back = jlora.peft.load(
                here, m.params, names=m.names, **({"tied": tied} if tied else {})
            )
            again = call(m, jlora.merge(m.params, back))
            assert np.abs(again - out).max() < 1e-4, (name, kind)
            if kind == "linear" and name in CLASSES:
                jlora.peft.save_base(
                    here / "merged",
                    jlora.merge(frozen, adapter),
                    names=BASE_NAMES.get(name, m.names),
                    config=m.folder / "config.json",
                    max_shard_bytes=20_000,
                )
            tensors = {"out": pending(out)}
            write_tensors(here, "io", tensors, metadata={}, max_bytes=None)
            print(f"{name:6} {kind:8} {np.abs(out - m.outputs['base']).max():.3f}")


def check(folder: pathlib.Path) -> int:
    import peft
    import torch
    import transformers
    from make_peft_files import Convs, Moe
    from safetensors.torch import load_file

    own = {"moe": lambda: Moe(False), "moe_t": lambda: Moe(True), "convs": Convs}
    worst = 0.0
    for here in sorted(folder.glob("*/*/")):
        name, kind = here.parent.name, here.name
        io = load_file(GOLDEN / name / "io.safetensors")
        if name in own:
            base = own[name]()
            base.load_state_dict(load_file(GOLDEN / name / "model.safetensors"))
        else:
            cls = getattr(transformers, CLASSES[name])
            base = cls.from_pretrained(GOLDEN / name)
        tuned = peft.PeftModel.from_pretrained(base, str(here)).eval()
        inputs = {
            k.removeprefix("input_"): v for k, v in io.items() if k.startswith("input_")
        }
        with torch.no_grad():
            out = tuned(**inputs)
        out = out if isinstance(out, torch.Tensor) else out.logits
        wanted = load_file(here / "io.safetensors")["out"]
        error = (out - wanted).abs().max().item()
        if (here / "merged").exists():
            merged = getattr(transformers, CLASSES[name]).from_pretrained(
                here / "merged"
            )
            with torch.no_grad():
                off = (merged.eval()(**inputs).logits - wanted).abs().max().item()
            worst = max(worst, off)
            print(f"{name:6} merged   {'':15} error {off:.1e}")
        change = (wanted - io["base"]).abs().max().item()
        worst = max(worst, error)
        print(f"{name:6} {kind:8} changes {change:7.3f} error {error:.1e}")
    print(f"worst error {worst:.1e}")
    return int(worst > 1e-4)


if __name__ == "__main__":
    action = {"write": write, "check": check}[sys.argv[1]]
    sys.exit(action(pathlib.Path(sys.argv[2])))
