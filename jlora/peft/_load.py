"""`load`: the adapter in a Hugging Face PEFT directory."""

import os
import pathlib
from typing import Any, Literal, overload

from .._io.disk import read_json, told
from .._io.shards import open_tensors
from ..errors import PeftError
from ..factors import Trainable
from ._leaves import leaves_of
from ._reading import Reading
from .config import CONFIG, SIGNED, STEM, parse_config, signature
from .names import GENERIC, NameMap
from .report import LoadReport


@overload
def load(
    directory: str | os.PathLike,
    params_or_plan: Any,
    *,
    names: NameMap | None = None,
    tied: bool | None = None,
    dtype: Any = None,
    strict: Literal[True] = True,
) -> Trainable: ...
@overload
def load(
    directory: str | os.PathLike,
    params_or_plan: Any,
    *,
    names: NameMap | None = None,
    tied: bool | None = None,
    dtype: Any = None,
    strict: Literal[False],
) -> tuple[Trainable, LoadReport]: ...
def load(
    directory: str | os.PathLike,
    params_or_plan: Any,
    *,
    names: NameMap | None = None,
    tied: bool | None = None,
    dtype: Any = None,
    strict: bool = True,
) -> Trainable | tuple[Trainable, LoadReport]:
    """Returns the adapter that Hugging Face PEFT wrote into `directory`.

    Works on whatever PEFT's LoRA writes for layers that the model has, see
    `docs/peft.md`. Nothing is unpickled, and no file outside `directory` is opened.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`, or shards.
      params_or_plan: the model's parameters (arrays or shapes), or a `jlora.Plan`. A
        plan also says what has to be in the file: what it adapts and trains in full, at
        the ranks it gives.
      names: what the leaves are called in torch, see `save`.
      tied: whether the embedding table is the output head too; a plan tells itself.
      dtype: type of A and B; None means float32, as in PEFT, or wider if the file is.
      strict: False returns what does fit, and a report of what does not.

    Returns:
      The adapter, with `strict=False` `(adapter, report)`.

    Raises:
      PeftError: if a file is missing, damaged or no LoRA adapter; with `strict`, lists
        all that is missing, extra, misshapen or of a wrong type, every field of the
        config that jlora lacks, and every contradiction between config and tensors.

    Examples:
      >>> import tempfile, numpy as np, jlora
      >>> a, b = np.ones((4, 2), np.float32), np.ones((2, 6), np.float32)
      >>> own = jlora.Factors(a, b, jlora.factors.Spec(rank=2, alpha=4))
      >>> up, down = {"kernel": np.ones((4, 6))}, {"kernel": np.ones((6, 4))}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.peft.save(folder, jlora.Trainable({"up/kernel": own}))
      ...     adapter = load(folder, {"up": up, "down": down})
      ...     fewer, report = load(folder, {"down": down}, strict=False)
      >>> adapter.lora["up/kernel"].scale, fewer, len(report.extra)
      (2.0, Trainable(lora={}, full={}), 2)
    """
    directory = pathlib.Path(directory)
    names = names or GENERIC
    with told(f"{str(directory)!r} cannot be read", PeftError):
        if not directory.is_dir():
            raise PeftError(f"There is no directory {str(directory)!r} to load from.")
    fields = read_json(directory / CONFIG, PeftError)
    config, odd = parse_config(fields)
    slots, metadata = open_tensors(directory, STEM, fault=PeftError)
    if SIGNED in metadata and metadata[SIGNED] != signature(fields):
        odd.append(
            "rank, alpha or their patterns are not those that the tensors were written "
            f"with ({metadata[SIGNED]:.200}): the config was changed later"
        )
    found = Reading(config, slots, names, tied, dtype)
    found.config += odd
    found.read(leaves_of(params_or_plan))
    trainable, report = found.result()
    if not strict:
        return trainable, report
    if report:
        raise PeftError(
            f"The adapter in {str(directory)!r} does not fit, {len(report)} findings:\n"
            f"{report}\nstrict=False takes what fits."
        )
    return trainable
