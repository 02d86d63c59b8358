"""Adapters broken on purpose, in every format: is a tensor ever left out in silence?

    python -m benchmarks.faults.drops [--times 40] [--seed 0]

A good adapter is written in each format, and one thing in it is changed: a name, a
rank, an axis, a dtype, the number of an expert, a part of a packed weight, an entry of
the config, or a tensor that is added, left out, swapped or there under two names. Then
`peft.load` reads it. It may raise jlora's own error. If it does not, every number in
the file has to count: each tensor is changed by itself, and the adapter that is read
then must be another one. A tensor that makes no difference was dropped in silence, and
the command ends with 1, as it does after any other error (a crash). Of a file for two
models ("part"), one is read, and only its tensors have to count.
"""

import argparse
import collections
import json
import pathlib
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jlora
from jlora._tables import table
from jlora.factors import Axes, Factors, Spec
from jlora.peft import Entry, NameMap

E, H, N, R = 3, 6, 4, 2  # experts, features, hidden, rank
Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors, dict, random.Random], None]
STEM = "model.layers.0."
ALPHAS = "lora_adapter_metadata"  # in the metadata of diffusers' files
DENSE = {"q_proj": (H, H), "k_proj": (H, N), "v_proj": (H, N)}
EXPERTS = {"gate_up_proj": (H, 2 * N), "down_proj": (N, H)}
NAMES = NameMap(
    (
        *(
            Entry(n, f"{STEM}self_attn.{n}.weight", "i o -> o i", "linear")
            for n in DENSE
        ),
        *(
            Entry(n, f"{STEM}mlp.experts.{n}", "e o i -> e o i", "experts")
            for n in EXPERTS
        ),
    )
)
PARTS = {  # the model that is read, how its names begin, and the other model
    "kohya part": ("te1", "lora_te1_", "te2"),
    "diffusers part": ("text_encoder", "text_encoder.", "text_encoder_2"),
}
DIALECTS = ("mlx", "kohya", "kohya dora", "diffusers", "diffusers dora", *PARTS)
LAYOUTS = ("peft", "unsloth", "per-expert", "stacked", "shared")
ENDS = ("refused", "applied", "dropped", "crash")
FORMATS = ("dense", *DIALECTS, *LAYOUTS)


def adapter(form: str) -> jlora.Trainable:
    """Returns an adapter that a format can hold."""
    rng, lora = np.random.default_rng(0), {}

    def numbers(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    for name, (n_in, n_out) in DENSE.items():
        dora = form.endswith("dora")
        spec = Spec(rank=R, alpha=3.0, method="dora" if dora else "lora")
        lengths = numbers(n_out) if dora else None
        lora[name] = Factors(numbers(n_in, R), numbers(R, n_out), spec, lengths)
    for name, (n_in, n_out) in EXPERTS.items() if form in LAYOUTS else ():
        a, b = numbers(E, n_in, R), numbers(E, R, n_out)
        if form == "shared":
            a, b = (a, b[:1] + 0 * b) if name == "down_proj" else (a[:1] + 0 * a, b)
        spec = Spec(rank=R, alpha=3.0, axes=Axes((0,), (2,), (1,)))
        lora[name] = Factors(a, b, spec)
    return jlora.Trainable(lora)


def params(form: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the model."""
    shapes: dict[str, tuple[int, ...]] = dict(DENSE)
    if form in LAYOUTS:
        shapes |= {name: (E, o, i) for name, (i, o) in EXPERTS.items()}
    return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}


def write(form: str, folder: pathlib.Path) -> pathlib.Path:
    """Writes a good adapter and returns the file of its tensors."""
    layout = form if form in LAYOUTS else None
    dialect = form.split()[0] if form in DIALECTS else "peft"
    component, _, other = PARTS.get(form, ("unet", "", ""))
    options = {"names": NAMES, "layout": layout, "dialect": dialect}
    jlora.peft.save(folder, adapter(form), component=component, **options)
    (file,) = folder.glob("*.safetensors")
    if other:
        jlora.peft.save(folder / other, adapter(form), component=other, **options)
        _add(file, folder / other / file.name)
    return file


def _add(file: pathlib.Path, other: pathlib.Path) -> None:
    """Adds the tensors and the metadata of another file."""
    alphas = [json.loads(metadata(x).get(ALPHAS, "{}")) for x in (file, other)]
    about = {ALPHAS: json.dumps(alphas[0] | alphas[1])} if any(alphas) else None
    save_file(load_file(file) | load_file(other), file, about)


def metadata(file: pathlib.Path) -> dict[str, str]:
    """Returns diffusers' metadata of a file; others have a checksum of their config."""
    with safe_open(file, "np") as opened:
        found = opened.metadata() or {}
    return found if ALPHAS in found else {}


def read(form: str, folder: pathlib.Path) -> bytes:
    """Returns all that an adapter computes with, of what is in a folder."""
    layout = "unsloth" if form == "unsloth" else None
    component = PARTS[form][0] if form in PARTS else None
    options = {"names": NAMES, "layout": layout, "component": component}
    got = jlora.peft.load(folder, params(form), **options)
    return b"".join(
        f"{path} {f.scale}".encode() + b"".join(map(bytes, jax.tree.leaves(f)))
        for path, f in sorted(got.lora.items())
    )


def _pick(tensors: Tensors, rng: random.Random) -> str:
    return rng.choice(sorted(tensors))


def renamed(tensors: Tensors, config: dict, rng: random.Random) -> None:
    name = _pick(tensors, rng)
    pattern, new = rng.choice(
        [
            (r"\.0\.", ".7."),
            ("layers", "layer"),
            ("_proj", "_prj"),
            ("lora", "Lora"),
            (r"^", "x."),
            (r"$", "x"),
            (r"model\.", ""),
            (r"weight$", "default.weight"),
            ("q_proj", "o_proj"),
            ("experts", "expert"),
        ]
    )
    tensors[re.sub(pattern, new, name, count=1)] = tensors.pop(name)


def left_out(tensors: Tensors, config: dict, rng: random.Random) -> None:
    tensors.pop(_pick(tensors, rng))


def without_a_module(tensors: Tensors, config: dict, rng: random.Random) -> None:
    module = re.split(r"\.(lora|alpha)", _pick(tensors, rng))[0]
    for name in [n for n in tensors if n.startswith(module)]:
        tensors.pop(name)


def other_rank(tensors: Tensors, config: dict, rng: random.Random) -> None:
    name = _pick(tensors, rng)
    x = tensors[name]
    if x.ndim:
        axis = rng.randrange(x.ndim)
        more = rng.random() < 0.5
        half = np.concatenate([x, x], axis) if more else x.take([0], axis)
        tensors[name] = half


def swapped(tensors: Tensors, config: dict, rng: random.Random) -> None:
    one, other = _pick(tensors, rng), _pick(tensors, rng)
    tensors[one], tensors[other] = tensors[other], tensors[one]


def transposed(tensors: Tensors, config: dict, rng: random.Random) -> None:
    name = _pick(tensors, rng)
    tensors[name] = tensors[name].swapaxes(-1, 0) if tensors[name].ndim else 2
    tensors[name] = np.asarray(tensors[name], np.float32)


def other_dtype(tensors: Tensors, config: dict, rng: random.Random) -> None:
    name = _pick(tensors, rng)
    kind = rng.choice(["float16", "float64", "int32", "bool", "uint8"])
    tensors[name] = tensors[name].astype(kind)


def added(tensors: Tensors, config: dict, rng: random.Random) -> None:
    name = rng.choice(
        [
            "extra",
            "base_model.model.lm_head.weight",
            f"base_model.model.{STEM}mlp.router.lora_A.weight",
            f"{STEM}self_attn.q_proj.lora_A.weight",
            f"{STEM}mlp.up_proj.lora_a",
            "lora_unet_other.alpha",
            "unet.other.alpha",
            f"{_pick(tensors, rng)}_old",
        ]
    )
    tensors.setdefault(name, np.full((R, H), 0.5, np.float32))
    if name.endswith("alpha"):
        tensors[name] = np.asarray(2.0, np.float32)


def twice(tensors: Tensors, config: dict, rng: random.Random) -> None:
    """A module under a second name that some tool has for it."""
    pairs = [
        ("gate_proj", "w1"),
        ("up_proj", "w3"),
        ("w1", "gate_proj"),
        ("w2", "down_proj"),
        (r"base_model\.model\.", ""),
        (r"experts\.", "experts.0."),
        (r"mlp\.", "block_sparse_moe."),
        (r"lora_A\.weight", "lora.down.weight"),
        (r"lora_unet_", "lora_te_"),
        (r"unet\.", ""),
        (r"te1_|text_encoder\.", "unet_"),
        (r"model\.layers", "layers"),
    ]
    pattern, new = rng.choice(pairs)
    for name, x in list(tensors.items()):
        tensors.setdefault(re.sub(pattern, new, name, count=1), x + 0.5)


def renumbered(tensors: Tensors, config: dict, rng: random.Random) -> None:
    one, other = rng.sample(["0", "1", "2", "3", "02"], 2)
    for name in [n for n in tensors if f"experts.{one}." in n]:
        x = tensors.pop(name)
        tensors[name.replace(f"experts.{one}.", f"experts.{other}.")] = x


def other_config(tensors: Tensors, config: dict, rng: random.Random) -> None:
    if not config:
        return
    key = rng.choice(sorted(config))
    value = rng.choice([None, 1, 4, [], {}, ["q_proj"], {"q_proj": 1}, True, "x"])
    if rng.random() < 0.3:
        config.pop(key)
    else:
        config[key] = value
    config.pop("jlora", None)


CHANGES: dict[str, Change] = {
    "renamed": renamed,
    "left out": left_out,
    "a module less": without_a_module,
    "other rank": other_rank,
    "swapped": swapped,
    "axes transposed": transposed,
    "other dtype": other_dtype,
    "added": added,
    "twice": twice,
    "experts renumbered": renumbered,
    "config": other_config,
}


def dropped(form: str, folder: pathlib.Path, file: pathlib.Path) -> list[str] | None:
    """Returns the tensors that make no difference; None if reading is refused."""
    try:
        whole = read(form, folder)
    except jlora.JloraError:
        return None
    tensors, idle, about = load_file(file), [], metadata(file)
    begin = PARTS[form][1] if form in PARTS else ""
    for name, x in tensors.items():
        if not name.startswith(begin):
            continue  # of the other model
        save_file({**tensors, name: np.asarray(x * 2 + 1, x.dtype)}, file, about)
        try:
            if read(form, folder) == whole:
                idle.append(name)
        except jlora.JloraError:
            pass  # it counts
    save_file(tensors, file, about)
    return idle


def once(form: str, change: Change, rng: random.Random) -> tuple[str, list[str]]:
    """Returns how a broken adapter ends, and what was dropped."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        folder = pathlib.Path(place)
        file = write(form, folder)
        tensors, about = load_file(file), folder / "adapter_config.json"
        config = json.loads(about.read_text()) if about.exists() else {}
        change(tensors, config, rng)
        tensors = {n: np.ascontiguousarray(x) for n, x in tensors.items()}
        save_file(tensors, file, metadata(file))
        if config:
            about.write_text(json.dumps(config))
        try:
            found = dropped(form, folder, file)
        except Exception as error:
            return "crash", [repr(error)]
    if found is None:
        return "refused", []
    return ("dropped", found) if found else ("applied", [])


def campaign(
    times: int, seed: int = 0, formats: tuple[str, ...] = FORMATS
) -> dict[tuple[str, str], collections.Counter[str]]:
    """Returns how often each change of each format ended how; prints what dropped."""
    counts: dict[tuple[str, str], collections.Counter[str]] = {}
    for form in formats:
        for name, change in CHANGES.items():
            own = counts[form, name] = collections.Counter()
            for number in range(times):
                end, idle = once(form, change, random.Random(f"{seed}{form}{number}"))
                own[end] += 1
                if idle:
                    print(f"{end} {form}, {name}, {number}: {idle[:3]}", flush=True)
    return counts


def main() -> int:
    """Runs all formats and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=40, help="of each change")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="*", default=FORMATS, choices=FORMATS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counts = campaign(options.times, options.seed, tuple(options.formats))
    total: collections.Counter[str] = collections.Counter()
    lines = []
    for form in options.formats:
        own = sum((c for (f, _), c in counts.items() if f == form), total - total)
        lines.append((form, *(str(own[x]) for x in ENDS)))
        total += own
    print(table(("format", *ENDS), lines))
    print(dict(total))
    return 1 if total["dropped"] or total["crash"] else 0


if __name__ == "__main__":
    sys.exit(main())
