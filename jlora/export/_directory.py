"""A merged model as a directory that `transformers` and servers open."""

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import numpy as np

from .._io.disk import Json, Path, Progress, read_json, reading, told, write_text
from .._io.folders import replacing_folder
from .._io.models import Model, open_model
from .._io.processes import first_writes, on_host
from .._io.shards import Pending, write_tensors
from .._io.torch_models import CONFIG, TIED, has_config, stored_ties
from .._tables import listed
from ..errors import CheckpointError, MergeError
from ..factors import Trainable
from ..quantised import is_quantized
from ._files import check_out, check_readable, merged_model

_STEM = "model"
_QUANTISED = "quantization_config"
_TEMPLATES = "additional_chat_templates"  # the one folder that a tokenizer has
# Weights in whatever format, and what says of the base only.
_NOT_COPIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf",
    ".onnx", ".onnx_data", ".ot", ".npz", ".pb", ".tflite", ".index.json", "README.md",
)  # fmt: skip


def merge_directory(
    base: Path,
    trainable: Trainable,
    out: Path,
    *,
    max_shard_bytes: int | None = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress = iter,
) -> None:
    """Writes the merged model of a Hugging Face directory as another such directory.

    `transformers`, vLLM and others open it. It holds `config.json`, the shards of the
    merged model with their index, and whatever else `base` has beside its weights:
    generation config, tokenizer, chat template, the model's own code, licence. It
    appears whole or not at all. One leaf at a time goes from file to file, so memory is
    bounded by a few times the largest leaf. The numbers are those of `merge_files`.

    A quantised base (bitsandbytes, float8 with scales) is written dense, and
    `config.json` no longer says that it is quantised. Where the base stores the output
    head beside its table and they no longer are the same, `config.json` says so:
    `tie_word_embeddings` is false.

    Args:
      base: the directory of a model, with `config.json` and safetensors.
      trainable: the adapter, under the names of the base's tensors, as
        `jlora.files.read(adapter, base=base)` returns it.
      out: the directory to write. It must not be, hold or lie in the base.
      max_shard_bytes: size from which the tensors are split into several files; None
        writes one.
      overwrite: whether to replace a directory of a model, with all that is in it. It
        is whole until the new one is.
      progress: wraps the iteration over the names, such as `tqdm.tqdm`.

    Raises:
      TreeError: if the adapter does not fit the base; lists every misfit.
      MergeError: if a sum is too large for the dtype of the base's weight, the adapter
        holds NaN or infinity, or it unties what the model needs to be tied (T5).
      CheckpointError: if `base` has no `config.json` or no safetensors, a file cannot
        be read or written, an adapted leaf is quantised in a format that jlora does not
        read, `out` is the base, or `out` is there already.

    Examples:
      >>> import pathlib, tempfile, numpy as np, jlora
      >>> names = jlora.peft.NameMap((jlora.peft.Entry("up/kernel", "up.weight"),))
      >>> adapter = Trainable(full={"up.weight": np.ones((3, 2), np.float32)})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     base, out = pathlib.Path(folder, "base"), pathlib.Path(folder, "out")
      ...     params = {"up": {"kernel": np.zeros((2, 3), np.float32)}}
      ...     jlora.peft.save_base(base, params, names=names, config={"id": 1})
      ...     merge_directory(base, adapter, out)
      ...     print(sorted(file.name for file in out.iterdir()))
      ...     jlora.peft.load_base(out, params, names=names)["up"]["kernel"].tolist()
      ['config.json', 'model.safetensors']
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]

    References:
      https://huggingface.co/docs/transformers/models, sharded checkpoints
    """
    check_out(out, base)
    folder = pathlib.Path(base)
    if not has_config(base):
        raise CheckpointError(
            f"{str(base)!r} is not the directory of a model: it has no {CONFIG}. "
            "Give one that does, or write one file: merge_files, or `jlora merge` to a "
            "name that ends in .safetensors."
        )
    adapter = on_host(trainable)
    with first_writes() as first:
        if first:
            _check_free(pathlib.Path(out), overwrite)
            _write(folder, adapter, out, max_shard_bytes, overwrite, progress)


def _write(
    base: pathlib.Path,
    trainable: Trainable,
    out: Path,
    max_shard_bytes: int | None,
    overwrite: bool,
    progress: Progress,
) -> None:
    before = open_model(base)
    model, _ = merged_model(base, trainable)
    changed = {*trainable.lora, *trainable.full}
    config = _config_text(base, before, model, changed)
    turns = iter(progress(list(model.shapes)))
    tensors = {
        name: Pending(np.dtype(x.dtype), tuple(x.shape), _read(model, name, turns))
        for name, x in model.shapes.items()
    }
    with (
        told(f"Not saved: {str(out)!r} cannot be written"),
        replacing_folder(out, "new", overwrite=overwrite) as made,
    ):
        new = made / "new"
        new.mkdir()
        for file in _companions(base):
            _copy(file, new / file.relative_to(base))
        write_text(new / CONFIG, config)
        about = {"format": "pt", **model.metadata}
        write_tensors(new, _STEM, tensors, metadata=about, max_bytes=max_shard_bytes)
        for _ in turns:  # lets the progress bar end
            pass


def _read(model: Model, name: str, turns: Iterator[str]) -> Callable[[], np.ndarray]:
    """Returns what reads a leaf and advances the progress bar."""

    def read() -> np.ndarray:
        next(turns, None)
        return model.read(name)

    return read


def _check_free(out: pathlib.Path, overwrite: bool) -> None:
    """Raises a CheckpointError unless `out` is free, or a model that is replaced."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise CheckpointError(
            f"{str(out)!r} is already there. Give another name, or pass overwrite=True."
        )
    with told(f"{str(out)!r} cannot be read"):
        if not out.is_dir() or out.is_symlink():
            raise CheckpointError(
                f"{str(out)!r} is not a directory, and is not replaced by one. Give "
                "another name, or delete it."
            )
        folders = [x.name for x in out.iterdir() if x.is_dir() and x.name != _TEMPLATES]
        is_model = (out / CONFIG).exists() or not any(out.iterdir())
    if folders or not is_model:
        what = f"the folders {listed(folders, 5, ', ')}" if folders else f"no {CONFIG}"
        raise CheckpointError(
            f"{str(out)!r} has {what}, so it is not only a model and is not replaced. "
            "Give another name, or delete it."
        )


def _companions(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields what a model's directory holds beside its weights and config."""
    templates = folder / _TEMPLATES
    for place in (folder, templates) if templates.is_dir() else (folder,):
        for file in sorted(place.iterdir()):
            hidden, weights = file.name.startswith("."), file.name.endswith(_NOT_COPIED)
            if not hidden and not weights and file.name != CONFIG and file.is_file():
                yield file


def _copy(file: pathlib.Path, new: pathlib.Path) -> None:
    new.parent.mkdir(exist_ok=True)
    with reading(file) as source, open(new, "wb") as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        os.fsync(copy.fileno())


def _config_text(
    folder: pathlib.Path, base: Model, merged: Model, changed: set[str]
) -> str:
    """Returns the merged model's `config.json`, which is the base's where it can be."""
    fields = read_json(folder / CONFIG)
    own = _without(fields, _QUANTISED) if _is_widened(folder, base) else fields
    if _is_untied(own, merged, changed):
        own = {**_untied(own), TIED: False}
    if own is fields:
        with reading(folder / CONFIG) as file:
            return file.read().decode()
    return json.dumps(own, indent=2, ensure_ascii=False) + "\n"


def _without(fields: Json, name: str) -> Json:
    """Returns a config without the fields of a name, in objects inside of it too."""
    return {
        key: _without(value, name) if isinstance(value, dict) else value
        for key, value in fields.items()
        if key != name
    }


def _untied(fields: Json) -> Json:
    """Returns a config whose objects do not tie the head, where they say either."""
    return {
        key: False
        if key == TIED
        else _untied(value)
        if isinstance(value, dict)
        else value
        for key, value in fields.items()
    }


def _is_widened(folder: pathlib.Path, base: Model) -> bool:
    """Returns whether the base is quantised and becomes dense."""
    if not any(map(is_quantized, base.shapes.values())):
        return False
    check_readable(folder, base.unreadable())  # it would be dense only in part
    return True


def _is_untied(fields: Json, merged: Model, changed: set[str]) -> bool:
    """Returns whether a config ties a stored head that is no longer the table."""
    apart = [
        table
        for table, head in stored_ties(merged.shapes).items()
        if changed & {table, head}
        and fields.get(TIED) is not False
        and not np.array_equal(merged.read(table), merged.read(head))
    ]
    if any("shared" in table for table in apart):
        raise MergeError(
            f"The adapter changes {apart[0]!r} or its output head, which T5 scales "
            "otherwise where they are not tied. Train both as one, with PEFT's "
            "ensure_weight_tying."
        )
    return bool(apart)
