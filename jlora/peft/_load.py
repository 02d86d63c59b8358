"""`load` and `from_tensors`: an adapter from PEFT's files, or from its tensors."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import DTypeLike

from .._io import paired
from .._io.disk import Fault, Json, Path, read_json, told
from .._io.handles import settled
from .._io.processes import on_host
from .._io.shards import FileSlot, HeldSlot, Slot, open_tensors, tensor_files
from .._io.torch_models import Facts, is_torch_named, tie_of
from .._plan.plan import Plan
from .._tables import listed
from ..errors import PeftError
from ..factors import Array, PyTree, Trainable
from ..transform.compat import is_staging
from ..transform.stage import is_array
from ._dialects import dialect_of
from ._dialects_in import translated
from ._expert_reading import modules_of, relaid
from ._experts import ExpertLayout, layout_of
from ._leaves import TargetLeaf, leaves_of
from ._own_names import leaves_in, own_names, with_plain_names
from ._reading import Reading
from .config import CONFIG, PREFIX, SIGNED, STEM, parse_config, signature
from .names import GENERIC, NameMap, Names
from .report import LoadReport, check

# Each name is looked up from each of its dots on. This is the sum of these texts.
_MAX_NAMES = 10**9


def load(
    directory: Path,
    params_or_plan: PyTree | Plan,
    *,
    names: NameMap | None = None,
    tied: bool | None = None,
    dtype: DTypeLike | None = None,
    layout: ExpertLayout | str | None = None,
    component: str | None = None,
) -> Trainable:
    """Returns the adapter that Hugging Face PEFT wrote into `directory`.

    Works on whatever PEFT's LoRA writes for layers that the model has, see
    `docs/peft.md`, and on files of MLX, kohya's scripts and diffusers: their names tell
    whose they are. Nothing is unpickled. Only files in `directory` are opened, and what
    links in it lead to. All of them are of one save, also while others overwrite them.
    For an adapter that need not fit as a whole, see `load_partial`.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`, or shards;
        of another tool, also its one file.
      params_or_plan: the model's parameters (arrays or shapes), or a `jlora.Plan`. A
        plan also says what has to be in the file: what it adapts and trains in full, at
        the ranks it gives.
      names: what the leaves are called in torch, see `save`.
      tied: whether the embedding table is the output head too; a plan tells itself.
      dtype: type of A and B; None means float32, as in PEFT, or wider if the file is.
      layout: how the file keeps the experts of a mixture, see `ExpertLayout`. None
        takes what names and shapes tell.
      component: which model's adapter to read, of a file of kohya's scripts or of
        diffusers that has several: `"unet"`, `"te1"`, `"text_encoder_2"`, as its names
        begin. Those of other models are left alone.

    Raises:
      PeftError: if a file is missing, damaged or not a LoRA adapter, or a number is too
        large for the dtype; if the file is for several models, and `component` is none
        of them or is not given; lists all that is missing, extra, misshapen or of a
        wrong type, every field of the config that jlora lacks, and every contradiction
        between config and tensors.

    Examples:
      >>> import tempfile, numpy as np, jlora
      >>> a, b = np.ones((4, 2), np.float32), np.ones((2, 6), np.float32)
      >>> own = jlora.Factors(a, b, jlora.Spec(rank=2, alpha=4))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.peft.save(folder, jlora.Trainable({"up/kernel": own}))
      ...     adapter = load(folder, {"up": {"kernel": np.ones((4, 6))}})
      >>> adapter.lora["up/kernel"].scale
      2.0
    """
    trainable, report = load_partial(
        directory,
        params_or_plan,
        names=names,
        tied=tied,
        dtype=dtype,
        layout=layout,
        component=component,
    )
    check(report, f"The adapter in {str(directory)!r}", "load_partial")
    return trainable


def load_partial(
    directory: Path,
    params_or_plan: PyTree | Plan,
    *,
    names: NameMap | None = None,
    tied: bool | None = None,
    dtype: DTypeLike | None = None,
    layout: ExpertLayout | str | None = None,
    component: str | None = None,
) -> tuple[Trainable, LoadReport]:
    """Returns what fits of an adapter that `load` reads, and a report of the rest.

    Args:
      directory: see `load`.
      params_or_plan: see `load`.
      names: see `load`.
      tied: see `load`.
      dtype: see `load`.
      layout: see `load`.
      component: see `load`.

    Returns:
      `(adapter, report)`; the report is false if everything fits.

    Raises:
      PeftError: if a file is missing, damaged or not a LoRA adapter.

    Examples:
      >>> import tempfile, numpy as np, jlora
      >>> a, b = np.ones((4, 2), np.float32), np.ones((2, 6), np.float32)
      >>> own = jlora.Factors(a, b, jlora.Spec(rank=2, alpha=4))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.peft.save(folder, jlora.Trainable({"up/kernel": own}))
      ...     read, report = load_partial(folder, {"down": {"kernel": np.ones((6, 4))}})
      >>> read, len(report.extra)
      (Trainable(lora={}, full={}), 2)
    """
    return read_adapter(
        directory,
        leaves_of(params_or_plan),
        names=names,
        tied=tied,
        dtype=dtype,
        layout=layout,
        component=component,
    )


def read_adapter(
    directory: Path,
    leaves: Sequence[TargetLeaf] | None,
    *,
    names: NameMap | None = None,
    tied: bool | None = None,
    dtype: DTypeLike | None = None,
    layout: ExpertLayout | str | None = None,
    component: str | None = None,
    facts: Facts | None = None,
) -> tuple[Trainable, LoadReport]:
    """Returns what fits of an adapter, and a report of the rest: the one reader.

    Args:
      directory: see `load`.
      leaves: of the model. None reads the adapter under torch's own names, as far as it
        can be understood without its model.
      names: see `load`.
      tied: see `load`.
      dtype: see `load`.
      layout: see `load`.
      component: see `load`.
      facts: what the model's `config.json` says, where its leaves have torch's names.

    Raises:
      PeftError: if a file is missing, damaged or not a LoRA adapter.
    """
    folder = pathlib.Path(directory)
    with told(f"{str(directory)!r} cannot be read", PeftError):
        found = dialect_of(folder)
    if component is not None and (found is None or not found.dialect.begin):
        whose = "PEFT" if found is None else found.dialect.tool
        raise PeftError(
            f"component={component!r:.50} is for files of kohya's scripts and of "
            f"diffusers. Leave it out: {str(directory)!r} is read as one of {whose}."
        )
    if found is None:
        fields, slots, metadata = open_adapter(folder)
    else:
        fields, slots, metadata = translated(
            found,
            folder,
            _axes_of_modules(leaves, names),
            component,
            tied if tied is not None else _tie(leaves, facts or Facts()),
        )
        facts = dataclasses.replace(facts or Facts(), known=True)  # it has no Conv1D
    what = repr(str(directory))
    layout = layout_of(layout)
    return _adapter_of(
        what, fields, slots, metadata, leaves, names, tied, dtype, facts, layout
    )


def from_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    params_or_plan: PyTree | Plan,
    *,
    names: NameMap | None = None,
    tied: bool | None = None,
    dtype: DTypeLike | None = None,
    layout: ExpertLayout | str | None = None,
) -> Trainable:
    """Returns the adapter that PEFT's config and tensors are, the inverse of `tensors`.

    It reads as `load` does, with every check, and so on the host: arrays of a device
    are fetched. Lay the result out with `jax.device_put` and `jlora.shardings`.

    Args:
      config: the fields of `adapter_config.json`.
      tensors: JAX or NumPy arrays by PEFT's names, of a server or of a trainer.
      params_or_plan: see `load`.
      names: see `load`.
      tied: see `load`.
      dtype: see `load`.
      layout: see `load`.

    Raises:
      PeftError: if a tensor is traced; else see `load`.

    Examples:
      >>> import numpy as np, jlora
      >>> config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4,
      ...           "target_modules": ["up"]}
      >>> up = "base_model.model.up"
      >>> a, b = np.ones((2, 4), np.float32), np.ones((6, 2), np.float32)
      >>> arrays = {f"{up}.lora_A.weight": a, f"{up}.lora_B.weight": b}
      >>> params = {"up": {"kernel": np.ones((4, 6))}}
      >>> from_tensors(config, arrays, params).lora["up/kernel"].scale
      2.0
    """
    wrong = [
        f"{name!r} is {'traced' if is_staging(x) else f'a {type(x).__name__}'}"
        for name, x in tensors.items()
        if not is_array(x) or is_staging(x)
    ]
    if wrong:
        raise PeftError(
            "from_tensors takes arrays with known numbers, outside jit: "
            f"{listed(wrong)}."
        )
    slots = {name: HeldSlot(on_host(x)) for name, x in tensors.items()}
    leaves, what = leaves_of(params_or_plan), "These tensors"
    trainable, report = _adapter_of(
        what,
        dict(config),
        slots,
        {},
        leaves,
        names,
        tied,
        dtype,
        None,
        layout_of(layout),
    )
    check(report, what)
    return trainable


def _adapter_of(
    what: str,
    fields: Json,
    slots: Mapping[str, Slot],
    metadata: Mapping[str, str],
    leaves: Sequence[TargetLeaf] | None,
    names: NameMap | None,
    tied: bool | None,
    dtype: DTypeLike | None,
    facts: Facts | None,
    layout: ExpertLayout | None,
) -> tuple[Trainable, LoadReport]:
    """Returns what `read_adapter` does, from the config and the tensors."""
    config, odd = parse_config(fields)
    if sum(len(name) * name.count(".") for name in slots) > _MAX_NAMES:
        raise PeftError(
            f"{what} cannot be read: the names of its {len(slots)} tensors "
            f"are too long, as {max(slots, key=len)!r:.60}..."
        )
    if SIGNED in metadata and metadata[SIGNED] != signature(fields):
        odd.append(
            "rank, alpha or their patterns are not those that the tensors were written "
            f"with ({metadata[SIGNED]:.200}): the config was changed later"
        )
    slots, twice = with_plain_names(slots)
    inner: dict[str, Slot] = {
        name.removeprefix(PREFIX): slot for name, slot in slots.items()
    }
    if leaves is None:
        leaves, open_questions = leaves_in(inner, config)
        odd += [f"{question}. Give base=, the model" for question in open_questions]
    own: Names = names or GENERIC
    facts = facts or Facts()
    torch_named = is_torch_named(leaf.path for leaf in leaves)
    modules = modules_of(leaves, None if torch_named else own)
    inner, config, open_questions = relaid(
        inner, config, fields, modules, layout, interleaved=facts.interleaved
    )
    odd += open_questions
    foreign = {n: s for n, s in slots.items() if not n.startswith(PREFIX)}
    slots = {**foreign, **{PREFIX + name: slot for name, slot in inner.items()}}
    if torch_named:
        own, open_questions = own_names(leaves, inner, config, facts, names)
        odd += open_questions
        known = _tie(leaves, facts)
        if tied is not None and known is not None and tied != known:
            odd.append(f"tied={tied} is not what the model and its config.json say")
        tied = known if tied is None else tied
    found = Reading(config, slots, own, tied, dtype, twice=twice)
    found.config += odd
    found.read(leaves)
    return found.result()


def _tie(leaves: Sequence[TargetLeaf] | None, facts: Facts) -> bool | None:
    """Returns whether a table is the output head too, where torch's names tell."""
    paths = [leaf.path for leaf in leaves or ()]
    return tie_of(paths, facts) if is_torch_named(paths) else None


def _axes_of_modules(
    leaves: Sequence[TargetLeaf] | None, names: NameMap | None
) -> dict[str, int] | None:
    """Returns torch's modules of a model, and how many axes their weights have."""
    if leaves is None:
        return None
    if is_torch_named(leaf.path for leaf in leaves):
        return {
            leaf.path.removesuffix(".weight"): len(leaf.shape)
            for leaf in leaves
            if leaf.path.endswith(".weight")
        }
    found: dict[str, int] = {}
    for leaf in leaves:
        with contextlib.suppress(PeftError):  # of what has no name: told later
            for place in (names or GENERIC).places(
                leaf.path, leaf.shape, op=leaf.op, axes=leaf.axes
            ):
                found[place.module] = len(place.shape(leaf.shape))
    return found


def open_adapter(
    folder: pathlib.Path, fault: Fault = PeftError
) -> tuple[Json, dict[str, FileSlot], dict[str, str]]:
    """Returns the config of a directory, its tensors and their metadata, of one save.

    Raises:
      fault: if a file is missing or damaged.
    """

    def read() -> tuple[Json, dict[str, FileSlot], dict[str, str]]:
        if not any(file.exists() for file in paired.places(folder, CONFIG)):
            if not os.path.isdir(folder):
                raise fault(f"There is no directory {str(folder)!r} to load from.")
            read_json(folder / CONFIG, fault)  # says what is wrong
        slots, metadata = open_tensors(folder, STEM, fault=fault)
        fields = read_json(paired.find(folder, CONFIG, metadata), fault)
        return fields, slots, metadata

    return settled(
        read,
        lambda: [*paired.places(folder, CONFIG), *tensor_files(folder, STEM)],
        repr(str(folder)),
        fault,
    )
