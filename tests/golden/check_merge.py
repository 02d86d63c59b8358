"""`jlora merge` beside PEFT's `merge_and_unload`, on adapters that PEFT writes.

In an environment with jlora, `torch`, `peft` and `transformers` 5 (the extra `golden`):

    python tests/golden/check_merge.py [NAME ...] [--keep DIR] [--long]

Tiny random models and adapters go to a temporary directory, or to DIR, a folder for
each. A NAME is a glob over the names in merge_cases.py and merge_broken.py; PYTHONPATH
chooses the tree of jlora. Each adapter goes through every command that reads PEFT:
`merge` to a file and to a directory in shards, `validate`, `inspect`, `convert` to a
file and back, `diff`.

The table has, for each adapter: how many tensors the merged model has, how far PEFT's
merge moves them, the largest error of a tensor and of the model's outputs, relative to
the largest number, and the verdict. In half precision the error is counted in roundings
of PEFT's merge in float32. Below each row stand the commands that did something else.
The exit code is 1 after a traceback, a wrong number without an error, or an adapter
taken that had to be refused. The last lines list the adapters by what `merge` did;
"broken" are those of merge_broken.py.
"""

import argparse
import contextlib
import fnmatch
import io
import os
import pathlib
import re
import shutil
import sys
import tempfile
import traceback
import warnings
import zlib
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from merge_bases import BASES, inputs
from merge_broken import ALL
from merge_cases import Case
from safetensors.torch import load_file, save_file
from torch import nn

import jlora
import jlora.cli

TOLERANCE, OUTPUTS = 1e-5, 1e-4
HALF = (torch.bfloat16, torch.float16)
BAD = ("WRONG", "TRACEBACK", "TAKEN", "NOT RUN")


class Said(NamedTuple):
    """What a command did, "ok", "refused" or one of `BAD`, and its text."""

    did: str
    text: str = ""


class Wanted(NamedTuple):
    """What PEFT makes of an adapter; `tensors` is None if PEFT does not merge it."""

    tensors: dict[str, torch.Tensor] | None
    outputs: torch.Tensor  # of the merged model, or of the adapted one
    adapted: torch.Tensor  # outputs of the adapted model before merging
    effect: float
    note: str


def command(*words: object) -> tuple[Said, list[str]]:
    """Returns what `jlora` did with these words, and its warnings."""
    out, err, code = io.StringIO(), io.StringIO(), None
    before, sys.argv = sys.argv, ["jlora", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            jlora.cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{pathlib.Path(where.filename).name}:{where.lineno}"
        return Said("TRACEBACK", f"{type(error).__name__}: {error} ({place})"), []
    finally:
        sys.argv = before
    lines = [x for x in err.getvalue().splitlines() if x.strip()]
    warned = [x for x in lines if x.startswith("jlora: warning")]
    if code == 0:
        return Said("ok"), warned
    said = " ".join(x for x in lines if x not in warned) or out.getvalue().strip()
    return Said("refused", re.sub(r"\s+", " ", said) or f"exit {code}, no text"), warned


def spread(model: nn.Module) -> None:
    """Makes weights so large that each layer shows in the output."""
    for name, p in sorted(model.named_parameters()):
        if p.ndim > 1:
            nn.init.normal_(p, std=0.3)
        elif name.endswith("bias"):
            nn.init.normal_(p, std=0.1)


def randomise(model: nn.Module) -> None:
    """Draws what is trained."""
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if not p.requires_grad:
                continue
            if "magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand_like(p))
            elif any(part in name for part in ("lora_", "vera_lambda")):
                p.copy_(0.3 * torch.randn_like(p))
            else:
                p.add_(0.1 * torch.randn_like(p))


def write(case: Case, name: str, base: pathlib.Path, adapter: pathlib.Path) -> None:
    """Writes the base and the adapter, as PEFT and transformers do."""
    torch.manual_seed(zlib.crc32(name.encode()))
    model = BASES[case.model or case.base]()
    spread(model)
    model.eval().to(case.dtype)
    store = case.store or (lambda model, folder: model.save_pretrained(folder))
    if not hasattr(model, "save_pretrained"):
        base.mkdir()
        held = {k: v.clone() for k, v in model.state_dict().items()}
        save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    elif case.model and not case.store:
        model.base_model.save_pretrained(base)
    else:
        store(model, base)
    tuned = peft.get_peft_model(fresh(case, base), case.make(**case.fields))
    how, config = {}, tuned.peft_config["default"]
    if case.plain:
        said, config.init_lora_weights = config.init_lora_weights, True
        tuned.save_pretrained(base.parent / "init")
        config.init_lora_weights = said
        how = {"path_initial_model_for_weight_conversion": str(base.parent / "init")}
    randomise(tuned)
    tuned.save_pretrained(adapter, **how, **case.save)


def fresh(case: Case, folder: pathlib.Path, dtype: torch.dtype | None = None):
    """Returns the model that is adapted, with the weights in `folder`."""
    dtype = dtype or case.dtype
    torch.manual_seed(0)
    model = BASES[case.model or case.base]()
    if not hasattr(model, "save_pretrained"):
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval().to(dtype)
    config = model.config if case.model else None
    model = type(model).from_pretrained(folder, config=config, dtype=dtype)
    return model.eval()


def run(case: Case, model: nn.Module) -> torch.Tensor:
    """Returns the outputs of a model."""
    with torch.no_grad():
        out = model(**inputs(case.model or case.base))
    if isinstance(out, torch.Tensor):
        return out
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def by_peft(case: Case, base: pathlib.Path, adapter: pathlib.Path) -> Wanted:
    """Returns what PEFT makes of the files, in float32."""
    before = fresh(case, base, torch.float32)
    start = {k: x for k, x in tensors_of(before).items() if k in read_base(base)}
    tuned = peft.PeftModel.from_pretrained(fresh(case, base, torch.float32), adapter)
    adapted = run(case, tuned.eval())
    try:
        merged = tuned.merge_and_unload()
    except Exception as error:  # whatever PEFT raises
        note = f"PEFT: {type(error).__name__}: {error}"
        return Wanted(None, adapted, adapted, off(adapted, run(case, before)), note)
    held, outputs = tensors_of(merged), run(case, merged)
    effect = max(off(held[k], x) for k, x in start.items() if k in held)
    apart = off(outputs, adapted)
    note = f"PEFT's merge is off from what it trained by {apart:.1e}"
    note = note if apart > OUTPUTS else ""
    return Wanted(held, outputs, adapted, effect, note)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns a model's tensors under the names that files and memory have for them."""
    held = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if hasattr(model, "save_pretrained"):
        with tempfile.TemporaryDirectory() as folder:
            # PEFT can leave a model that transformers does not save.
            with contextlib.suppress(RuntimeError):
                model.save_pretrained(folder)
            held = {**read_base(pathlib.Path(folder)), **held}
        prefix = f"{model.base_model_prefix}."
        own = {k: v for k, v in held.items() if k.startswith(prefix)}
        held |= {k.removeprefix(prefix): v for k, v in own.items()}
    return held


def read_base(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a model on disk."""
    files = sorted(folder.glob("*.safetensors"))
    return {k: v for file in files for k, v in load_file(file).items()}


def read_out(out: pathlib.Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a merged model, a directory or a file."""
    return read_base(out) if out.is_dir() else load_file(out)


def off(x: torch.Tensor, wanted: torch.Tensor) -> float:
    """Returns the largest difference, relative to the largest number."""
    if x.shape != wanted.shape:
        return float("inf")
    x, wanted = x.double(), wanted.double()
    error = ((x - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def beyond_rounding(x: torch.Tensor, wanted: torch.Tensor) -> float:
    """Returns the largest difference in half steps of the dtype of `x`, at `wanted`."""
    if x.shape != wanted.shape or not x.isfinite().all():
        return float("inf")
    step = torch.finfo(x.dtype).eps * 2.0 ** (torch.frexp(wanted).exponent - 1)
    slack = 1e-6 * wanted.abs().max()  # float32's own
    return ((x.float() - wanted).abs() / (step / 2 + slack)).max().item()


def compare(out: pathlib.Path, base: pathlib.Path, wanted: Wanted) -> tuple:
    """Returns how many tensors there are, the largest error, and what differs."""
    found, stored = read_out(out), read_base(base)
    wrong = [f"{name} is missing" for name in stored if name not in found]
    worst, at, limit = 0.0, "", TOLERANCE
    for name, x in found.items():
        if name not in wanted.tensors:
            wrong.append(f"{name} is not of the model")
            continue
        if name in stored and x.dtype != stored[name].dtype:
            wrong.append(f"{name} is {x.dtype}, the base {stored[name].dtype}")
        small = x.dtype in HALF
        measure = beyond_rounding if small else off
        limit = 1.0 if small else TOLERANCE
        error = measure(x, wanted.tensors[name])
        if error >= worst:
            worst, at = error, name
    if worst > limit:
        wrong.insert(0, f"{at} is off by {worst:.1e}")
    return len(found), worst, wrong


def outputs_of(case: Case, out: pathlib.Path, base: pathlib.Path) -> torch.Tensor:
    """Returns the outputs of the model that jlora wrote."""
    if out.is_dir():
        return run(case, fresh(case, out, torch.float32))
    with tempfile.TemporaryDirectory() as folder:
        here = pathlib.Path(folder)
        shutil.copy(out, here / "model.safetensors")
        for file in base.glob("config.json"):
            shutil.copy(file, here)
        return run(case, fresh(case, here, torch.float32))


def judge(case: Case, out: pathlib.Path, base: pathlib.Path, wanted: Wanted) -> tuple:
    """Returns the columns of the table for a merged model, and what is to be said."""
    count, worst, wrong = len(read_out(out)), float("nan"), []
    if wanted.tensors is not None:
        count, worst, wrong = compare(out, base, wanted)
    try:
        outputs = outputs_of(case, out, base)
    except Exception as error:
        text = f"the model does not load: {type(error).__name__}: {error}"
        return count, worst, float("inf"), Said("WRONG", "; ".join([text, *wrong]))
    limit = OUTPUTS if case.dtype == torch.float32 else 0.05
    error = off(outputs, wanted.outputs)
    if wrong or error > limit:
        as_adapted = off(outputs, wanted.adapted)
        if as_adapted <= limit and wanted.note:
            said = Said("ok", "as PEFT's adapted model, not as its merge")
            return count, worst, as_adapted, said
        wrong = wrong[:3] or ["every tensor is right"]
        text = f"{'; '.join(wrong)}; outputs are off by {error:.1e}"
        return count, worst, error, Said("WRONG", text)
    told = "as PEFT's merge, not as its adapted model" if wanted.note else ""
    return count, worst, error, Said("ok", told if wanted.tensors else "")


def ways(case: Case, here: pathlib.Path) -> dict[str, Said]:
    """Returns what each command but `merge` does with the adapter."""
    base, adapter = here / "base", here / "adapter"
    file, back = here / "file.safetensors", here / "back"
    of = ("--base", base)
    calls = {
        "validate": ("validate", adapter),
        "validate --base": ("validate", adapter, *of),
        "inspect": ("inspect", adapter),
        "inspect --base": ("inspect", adapter, *of),
        "diff": ("diff", adapter, adapter),
        "diff --base": ("diff", adapter, adapter, *of),
        "convert to file": ("convert", adapter, file, *of),
        "convert back": ("convert", file, back, "--to", "peft", *of),
        "merge of the file": ("merge", base, file, here / "of_file.safetensors"),
        "diff with what came back": ("diff", adapter, back, *of),
    }
    needs = {"convert back": file, "merge of the file": file, [*calls][-1]: back}
    said = {}
    for name, words in calls.items():
        if needs.get(name, adapter).exists():
            said[name], _ = command(*words)
    said["files"] = through_files(adapter, here / "through_files")
    if case.extract and (here / "merged.safetensors").exists():
        said["extract"] = extracted(case, here)
    return said


def through_files(adapter: pathlib.Path, out: pathlib.Path) -> Said:
    """Returns what reading without a base and writing again does."""
    try:
        jlora.files.write(out, jlora.files.read(adapter), "peft")
    except (jlora.errors.JloraError, OSError) as error:
        return Said("refused", re.sub(r"\s+", " ", f"jlora: {error}"))
    except Exception as error:
        return Said("TRACEBACK", f"{type(error).__name__}: {error}")
    return Said("ok")


def extracted(case: Case, here: pathlib.Path) -> Said:
    """Returns what extracting the merged model's change and converting it does."""
    tuned, file = here / "merged.safetensors", here / "extracted.safetensors"
    globs = (word for glob in case.extract for word in ("--targets", glob))
    said, _ = command("extract", tuned, here / "base", file, "--rank", 3, *globs)
    if file.exists():
        said, _ = command("convert", file, here / "extracted", "--to", "peft")
    return said


def round_trip(case: Case, here: pathlib.Path, wanted: Wanted, said: dict) -> None:
    """Judges what `ways` wrote: adapters for PEFT, and a merged model."""
    base = here / "base"
    if (here / "of_file.safetensors").exists():
        *_, verdict = judge(case, here / "of_file.safetensors", base, wanted)
        said["merge of the file"] = verdict
    written = {"convert back": "back", "files": "through_files", "extract": "extracted"}
    for name, folder in written.items():
        if not (here / folder).exists():
            continue
        try:
            again = by_peft(case, base, here / folder)
            apart = off(again.adapted, wanted.adapted)
            text = f"PEFT's outputs with it are off by {apart:.1e}"
        except Exception as error:
            apart = float("inf")
            told = " ".join(str(error).split())
            text = f"PEFT cannot read it: {type(error).__name__}: {told}"
        if apart > 10 * OUTPUTS:
            said[name] = Said("WRONG", text)


def check(name: str, here: pathlib.Path) -> tuple[list[str], dict[str, Said]]:
    """Returns the row of an adapter, and what each command did."""
    case, base, adapter = ALL[name], here / "base", here / "adapter"
    write(case, name, base, adapter)
    wanted = None
    if case.refuse is None:
        wanted = by_peft(case, base, adapter)
    for folder, change in ((adapter, case.edit), (base, case.spoil)):
        if change:
            change(folder)
    if wanted and case.edit:
        wanted = by_peft(case, base, adapter)
    out = here / "merged.safetensors"
    merged, warned = command("merge", base, adapter, out)
    said = {"merge": merged, **ways(case, here)}
    served = here / "served"
    if (base / "config.json").exists():
        words = ("merge", base, adapter, served, "--shard-size", "8KB")
        said["merge to a directory"], _ = command(*words)
    if case.refuse:
        return [name, "", "", "", ""], refused(case, said, warned)
    row = [name, str(len(read_base(base))), f"{wanted.effect:.2f}", "", ""]
    if out.exists():
        count, worst, error, said["merge"] = judge(case, out, base, wanted)
        row = [name, str(count), row[2], f"{worst:.1e}", f"{error:.1e}"]
        if served.exists():
            *_, said["merge to a directory"] = judge(case, served, base, wanted)
    elif "tied" in merged.text:
        for flag in ("--tied", "--untied"):
            out = here / f"merged{flag}.safetensors"
            said[f"merge {flag}"], _ = command("merge", base, adapter, out, flag)
            if out.exists():
                *_, said[f"merge {flag}"] = judge(case, out, base, wanted)
    round_trip(case, here, wanted, said)
    if warned:
        said["merge warns"] = Said("warns", " ".join(warned))
    if wanted.note:
        said["note"] = Said("", wanted.note)
    return row, said


def refused(case: Case, said: dict[str, Said], warned: list[str]) -> dict[str, Said]:
    """Returns what each command did with an adapter that has to be refused."""
    if case.ways == ("merge warns",) and warned:
        said["merge"] = Said("refused", " ".join(warned))
    needed = case.ways or (*said,)
    judged = {}
    for name, (did, text) in said.items():
        if name in needed or (name == "merge" and "merge warns" in needed):
            if did == "refused" and not re.search(case.refuse, text):
                text = f"without {case.refuse!r}: {text}"
                judged[name] = Said("TAKEN" if did == "ok" else "refused", text)
            elif did == "ok":
                judged[name] = Said("TAKEN", "should refuse")
            else:
                judged[name] = Said(did, text)
        elif did == "TRACEBACK":
            judged[name] = Said(did, text)
    return judged


def lines(row: list[str], said: dict[str, Said], long: bool) -> list[str]:
    """Returns the lines of the table for one adapter."""
    verdict = said.get("merge", Said("TRACEBACK"))
    bad = any(s.did in BAD for s in said.values())
    cells = [f"{row[0]:26}", *(f"{cell:>8}" for cell in row[1:])]
    out = [f"{'!!' if bad else '  '} {' '.join(cells)}  {verdict.did}"]
    grouped: dict[Said, list[str]] = {}
    for name, s in said.items():
        if s.did != "ok" or s.text:
            grouped.setdefault(s, []).append(name)
    for s, names in grouped.items():
        text = s.text if long else s.text[:220]
        out.append(f"       {', '.join(names)}: {s.did} {text}".rstrip())
    return out


def summary(case: Case, said: dict[str, Said]) -> list[str]:
    """Returns under which of the last lines the adapter is counted."""
    did = {name: s.did for name, s in said.items()}
    own = "" if case.refuse is None else "broken, "
    found = [f"{own}merge {did['merge']}"]
    if any(x in BAD for x in did.values()):
        found.append("failed")
    if case.refuse is None and {"ok", "refused"} <= set(did.values()):
        found.append("read by some commands only")
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=["*"])
    parser.add_argument("--keep", type=pathlib.Path, help="where files stay")
    parser.add_argument("--long", action="store_true", help="whole texts of errors")
    given = parser.parse_args()
    names = [n for n in ALL if any(fnmatch.fnmatch(n, g) for g in given.names)]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"jlora in {pathlib.Path(jlora.__file__).parent}")
    print(f"   {'adapter':26}  tensors   effect    error  outputs  merge")
    told: dict[str, list[str]] = {}
    with contextlib.ExitStack() as stack:
        root = given.keep or stack.enter_context(tempfile.TemporaryDirectory())
        root = pathlib.Path(root)
        for name in names:
            here = root / name
            shutil.rmtree(here, ignore_errors=True)
            here.mkdir(parents=True)
            try:
                row, said = check(name, here)
            except Exception as error:  # of PEFT, or of this script
                traceback.print_exc()
                row, said = [name], {"merge": Said("NOT RUN", repr(error))}
            print("\n".join(lines(row, said, given.long)).replace(f"{here}/", ""))
            for what in summary(ALL[name], said):
                told.setdefault(what, []).append(name)
    print(f"\n{len(names)} adapters")
    for what, held in told.items():
        print(f"{what}, {len(held)}: {', '.join(held)}")
    return int("failed" in told)


if __name__ == "__main__":
    sys.exit(main())
