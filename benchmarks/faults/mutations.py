"""Damaged files of every format by the hundred thousand: what becomes of them?

    python -m benchmarks.faults.mutations 100000 SEED

A good file is written, changed at random and read. Checksums and signatures are often
made again, so that the damage reaches what is behind them. Each read ends in one of
four ways: it is refused with jlora's own error; it gives the original; it gives
something else that is valid, as another rank would be; or anything else, which is a
fault: another error, a result that cannot be saved, damage behind a checksum that was
not noticed, more than ten seconds, a message of over 21,000 characters. The command
prints a table and ends with 1 if there was a fault.

Every input has its own seed, so `--only FORMAT --at NUMBER` makes it again.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from benchmarks.faults import change
from jlora._io import coded
from jlora._io.models import open_model
from jlora.factors import Axes, Factors, Spec

ENDS = ("refused", "original", "other", "fault")
SECONDS = 10  # for one input
LONGEST = 21_000  # characters of an error
Files = dict[str, bytes]  # by name below a folder
Mutate = Callable[[Files, random.Random], tuple[Files, bool]]  # whether it is signed


@dataclasses.dataclass(frozen=True)
class Format:
    """A format on disk.

    Attributes:
      write: writes a good one into a folder.
      read: returns what is in a folder.
      mutate: returns changed files, and whether a checksum should notice.
      share: of all inputs.
      save: writes what `read` returned, to see whether it is valid.
    """

    write: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], Any]
    mutate: Mutate
    share: float
    save: Callable[[pathlib.Path, Any], None]


def adapter() -> jlora.Trainable:
    """Returns an adapter with several kinds of layer."""
    table = Axes((), (0,), (1,))
    lora = {
        "up/kernel": Factors(
            jnp.ones((4, 2)), jnp.ones((2, 6)), Spec(rank=2, alpha=3.0)
        ),
        "c/kernel": Factors(
            jnp.ones((3, 3, 2, 3)),
            jnp.ones((3, 4)),
            Spec(op="conv", axes=Axes((), (0, 1, 2), (3,)), rank=3, alpha=3.0),
        ),
        "e/embedding": Factors(
            jnp.ones((5, 2)),
            jnp.ones((2, 4)),
            Spec(op="embedding", axes=table, rank=2, alpha=3.0),
        ),
    }
    return jlora.Trainable(
        lora, {"head/kernel": jnp.ones((4, 2)), "up/bias": jnp.ones(6)}
    )


LIKE = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in {
        "up/kernel": (4, 6),
        "c/kernel": (3, 3, 2, 4),
        "e/embedding": (5, 4),
        "head/kernel": (4, 2),
        "up/bias": (6,),
    }.items()
}
WEIGHTS = {
    "up": {"kernel": np.ones((4, 6), np.float32), "bias": np.ones(6, np.float16)},
    "head": {"kernel": np.arange(8, dtype=np.int32).reshape(4, 2)},
}


def plan() -> jlora.Plan:
    def fn(p: Any, x: Any) -> Any:
        return (x @ p["up"]["kernel"] + p["up"]["bias"][None]) @ p["head"]["kernel"].T

    params = jax.tree.map(lambda x: np.asarray(x, np.float32), WEIGHTS)
    params["head"]["kernel"] = np.ones((4, 6), np.float32)
    return jlora.plan(fn, params, np.ones((2, 4), np.float32), config=config())


def config() -> jlora.LoraConfig:
    return jlora.LoraConfig(
        rank=2,
        alpha=3.5,
        targets="**/up/{kernel,w}",
        rules=jlora.Rule("**/up/*", rank=1, axes=Axes((), (0,), (1,))),
        train=("**/bias",),
        dropout=0.1,
        dtype="bfloat16",
    )


def write_file(folder: pathlib.Path) -> None:
    jlora.save(folder / "a", adapter())


def mutate_file(files: Files, rng: random.Random) -> tuple[Files, bool]:
    data = files["a"]
    action = rng.random()
    if action < 0.3:
        return {"a": change.flipped(data, rng)}, False
    if action < 0.45:
        return {"a": change.tensors(data, rng)}, False
    header, body = change.parted(data)
    about = header["__metadata__"]
    if action < 0.8:
        about["adapter"] = change.text(about["adapter"].encode(), rng).decode()
    if action > 0.65:
        new = change.value(header, rng)
        header = new if isinstance(new, dict) else header
        body = change.numbers(body, rng)
    with contextlib.suppress(Exception):  # a header that has no checksum any more
        header["__metadata__"]["sha256"] = checksum(header, body)
    return {"a": change.joined(header, body)}, True


def checksum(header: dict[str, Any], body: bytes) -> str:
    digest = hashlib.sha256(header["__metadata__"]["adapter"].encode())
    for name, info in sorted(header.items()):
        if name != "__metadata__":
            start, stop = info["data_offsets"]
            shape = tuple(info["shape"])
            digest.update(f"\n{name}\nfloat32 {shape}\n".encode())
            digest.update(body[start:stop])
    return digest.hexdigest()


def mutate_peft(files: Files, rng: random.Random) -> tuple[Files, bool]:
    cfg, data = "adapter_config.json", "adapter_model.safetensors"
    action = rng.random()
    if action < 0.2:
        return files | {cfg: change.flipped(files[cfg], rng)}, True
    if action < 0.5:
        return files | {data: change.tensors(files[data], rng)}, True
    new = change.text(files[cfg], rng)
    out = files | {cfg: new}
    header, body = change.parted(files[data])
    fields = json.loads(new)
    if rng.random() < 0.7 and isinstance(fields, dict):  # signed again
        kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
        kept = (*kept, "use_rslora", "use_dora")
        signed = json.dumps([fields.get(k) or None for k in kept])
        header["__metadata__"]["jlora_config"] = signed
        out[data] = change.joined(header, body)
    if rng.random() < 0.2:
        out[data] = change.tensors(out[data], rng)
    return out, True


def write_model(folder: pathlib.Path) -> None:
    jlora.export.safetensors(folder / "one.safetensors", WEIGHTS["up"])
    jlora.export.safetensors(
        folder / "two.safetensors", WEIGHTS["head"] | {"x": np.ones(3)}
    )
    places = {"kernel": "one", "bias": "one", "x": "two"}
    (folder / "two.safetensors").unlink()
    jlora.export.safetensors(folder / "two.safetensors", {"x": np.ones(3)})
    index = {"weight_map": {k: f"{v}.safetensors" for k, v in places.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_model(folder: pathlib.Path) -> dict[str, np.ndarray]:
    model = open_model(folder)
    return {name: model.read(name) for name in sorted(model.shapes)}


def save_arrays(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    jlora.export.safetensors(folder / "again.safetensors", arrays)


def mutate_model(files: Files, rng: random.Random) -> tuple[Files, bool]:
    name = rng.choice(sorted(files))
    if name.endswith(".json"):
        new = (change.flipped if rng.random() < 0.5 else change.text)(files[name], rng)
    else:
        new = change.tensors(files[name], rng)
    return files | {name: new}, True


def write_codes(folder: pathlib.Path) -> None:
    """Models of jlora's own codes, of bitsandbytes' and in float8, a file each."""
    own = {name: np.ones((128, 2), np.float32) * 0.1 for name in ("a", "b")}
    codes = jlora.quantize(own, double=True)
    jlora.export.safetensors(folder / "own.safetensors", codes)
    golden = pathlib.Path(__file__).parents[2] / "tests" / "golden" / "quantised"
    for name in ("nf4_double", "int8"):
        shutil.copy(golden / f"{name}.safetensors", folder)
    float8 = {
        "up.weight": np.ones((4, 128)).astype(jnp.float8_e4m3fn),
        "up.weight_scale_inv": np.ones((1, 1), np.float32),
    }
    jlora.export.safetensors(folder / "float8.safetensors", float8)


def read_codes(folder: pathlib.Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is widened
        files = sorted(folder.glob("*.safetensors"))
        return {file.stem: jlora.files.read_params(file) for file in files}


def save_codes(folder: pathlib.Path, found: Any) -> None:
    for name, params in found.items():
        file = folder / f"{name}.safetensors"
        jlora.export.safetensors(file, params)
        assert same(jlora.files.read_params(file), params)


def mutate_codes(files: Files, rng: random.Random) -> tuple[Files, bool]:
    name = rng.choice(sorted(files))
    header, body = change.parted(files[name])
    about = header.get("__metadata__", {})
    if coded.KEY in about and rng.random() < 0.7:
        text = about[coded.KEY].encode()
        new = (change.flipped if rng.random() < 0.3 else change.text)(text, rng)
        about[coded.KEY] = new.decode(errors="replace")
        return files | {name: change.joined(header, body)}, True
    if rng.random() < 0.4:  # what bitsandbytes says, in the bytes of a tensor
        states = [k for k in header if ".quant_state." in k]
        if states:
            start, stop = header[rng.choice(states)]["data_offsets"]
            new = change.flipped(body[start:stop], rng)[: stop - start]
            body = body[:start] + new.ljust(stop - start) + body[stop:]
            return files | {name: change.joined(header, body)}, True
    return files | {name: change.tensors(files[name], rng)}, True


def write_orbax(folder: pathlib.Path) -> None:
    run = plan()
    jlora.checkpoint.save(
        folder,
        adapter(),
        step=3,
        key=jax.random.key(0),
        plan=run,
        metadata={"a": [1]},
        opt_state=optax.sgd(0.1, momentum=0.9).init(adapter()),
    )


def read_orbax(folder: pathlib.Path) -> Any:
    found = jlora.checkpoint.restore(folder)
    rest = (found.config, found.plan, found.metadata, found.step, found.position)
    return found.trainable, rest


def save_restored(folder: pathlib.Path, found: Any) -> None:
    jlora.save(folder / "again", found[0])


def mutate_orbax(files: Files, rng: random.Random) -> tuple[Files, bool]:
    about = "3/about/metadata"
    if rng.random() < 0.6:
        new = (change.flipped if rng.random() < 0.3 else change.text)(files[about], rng)
        return files | {about: new}, True
    name = rng.choice(sorted(files))
    return files | {name: change.flipped(files[name], rng)}, True


def mutate_plan(files: Files, rng: random.Random) -> tuple[Files, bool]:
    about = json.loads(files["3/about/metadata"])
    if rng.random() < 0.3:
        inner = json.loads(about["plan"]["config"])
        about["plan"]["config"] = json.dumps(change.value(inner, rng))
    else:
        about["plan"] = change.value(about["plan"], rng)
    return files | {"3/about/metadata": json.dumps(about).encode()}, True


def write_config(folder: pathlib.Path) -> None:
    (folder / "c").write_text(config().to_json())


def read_config(folder: pathlib.Path) -> jlora.LoraConfig:
    return jlora.LoraConfig.from_json((folder / "c").read_bytes())


def save_config(folder: pathlib.Path, found: jlora.LoraConfig) -> None:
    again = jlora.LoraConfig.from_json(found.to_json())
    assert again == found
    assert hash(again) == hash(found)


def mutate_config(files: Files, rng: random.Random) -> tuple[Files, bool]:
    return {
        "c": (change.flipped if rng.random() < 0.4 else change.text)(files["c"], rng)
    }, True


FORMATS = {
    "one-file adapter": Format(
        write_file,
        lambda folder: jlora.load(folder / "a"),
        mutate_file,
        0.25,
        lambda folder, found: jlora.save(folder / "again", found),
    ),
    "PEFT directory": Format(
        lambda folder: jlora.peft.save(folder, adapter()),
        lambda folder: jlora.peft.load_partial(folder, LIKE)[0],
        mutate_peft,
        0.3,
        lambda folder, found: jlora.save(folder / "again", found),
    ),
    "sharded model": Format(write_model, read_model, mutate_model, 0.13, save_arrays),
    "quantised models": Format(write_codes, read_codes, mutate_codes, 0.04, save_codes),
    "config": Format(write_config, read_config, mutate_config, 0.3, save_config),
    "Orbax checkpoint": Format(
        write_orbax, read_orbax, mutate_orbax, 0.012, save_restored
    ),
    "plan": Format(write_orbax, read_orbax, mutate_plan, 0.008, save_restored),
}


def same(a: Any, b: Any) -> bool:
    """Returns whether both are the same, bit for bit."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(map(_same_leaf, *map(jax.tree.leaves, (a, b))))


def _same_leaf(x: Any, y: Any) -> bool:
    if not isinstance(x, jax.Array | np.ndarray):
        return type(x) is type(y) and x == y
    form = x.shape == y.shape and x.dtype == y.dtype
    return form and np.asarray(x).tobytes() == np.asarray(y).tobytes()


class TooSlow(BaseException):
    """An input took too long. It is not an Exception, so nobody catches it."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raises TooSlow in a block that takes more than `SECONDS`."""

    def stop(*_: object) -> None:
        raise TooSlow

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def end_of(form: Format, folder: pathlib.Path, good: Any, signed: bool) -> str:
    """Returns how reading a folder ends; raises what is a fault."""
    with limited():
        try:
            found = form.read(folder)
        except jlora.JloraError as error:
            message = str(error)
        else:
            message = None
        if message is not None:
            assert len(message) <= LONGEST, f"{len(message)} characters"
            return "refused"
        if same(found, good):
            return "original"
        assert signed, "damage behind a checksum was not noticed"
        with tempfile.TemporaryDirectory(dir=folder.parent) as again:
            form.save(pathlib.Path(again), found)
        return "other"


def inputs(
    form: Format, files: Files, name: str, seed: int, count: int, at: int | None
) -> Iterator[tuple[int, Files, bool]]:
    """Yields number, files and signature of each input."""
    for number in range(count) if at is None else [at]:
        rng = random.Random(f"{seed}/{name}/{number}")
        yield number, *form.mutate(files, rng)


def fuzz(
    name: str,
    place: pathlib.Path,
    count: int,
    seed: int,
    *,
    seconds: float = 1e9,
    at: int | None = None,
) -> collections.Counter[str]:
    """Returns how many of `count` inputs of a format ended how; prints the faults."""
    form = FORMATS[name]
    folder = place / "x"
    folder.mkdir()
    form.write(folder)
    good = form.read(folder)
    files = {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }
    ends: collections.Counter[str] = collections.Counter()
    stop = time.monotonic() + seconds
    for number, new, signed in inputs(form, files, name, seed, count, at):
        if time.monotonic() > stop:
            break
        changed = [k for k, data in new.items() if files[k] != data]
        for key in changed:
            (folder / key).write_bytes(new[key])
        try:
            ends[end_of(form, folder, good, signed)] += 1
        except (Exception, TooSlow) as error:
            ends["fault"] += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{pathlib.Path(last.filename).name}:{last.lineno}"
            print(f"FAULT {name} {number}: {error!r:.200} at {where}", flush=True)
        for key in changed:
            (folder / key).write_bytes(files[key])
    shutil.rmtree(folder)
    return ends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("count", type=int, help="of all inputs together")
    parser.add_argument("seed", type=int)
    parser.add_argument("--only", choices=FORMATS)
    parser.add_argument("--at", type=int, help="one input, by its number")
    parser.add_argument("--seconds", type=float, default=600, help="for each format")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    total: collections.Counter[str] = collections.Counter()
    print("| format | inputs |", *(f"{end} |" for end in ENDS), "seconds | memory |")
    print("|---" * (len(ENDS) + 4) + "|")
    for name in [args.only] if args.only else FORMATS:
        count = args.count if args.only else round(args.count * FORMATS[name].share)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
            ends = fuzz(
                name,
                pathlib.Path(place),
                count,
                args.seed,
                seconds=args.seconds,
                at=args.at,
            )
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        took = time.monotonic() - start
        row = [ends.total(), *(ends[end] for end in ENDS)]
        print(
            "|",
            name,
            "|",
            *(f"{n:,} |" for n in row),
            f"{took:.0f} | +{more:.0f} MiB |",
        )
        total += ends
    return 1 if total["fault"] else 0


if __name__ == "__main__":
    sys.exit(main())
