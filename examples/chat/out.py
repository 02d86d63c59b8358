"""The results as files: a PEFT directory, and a merged model like those of the Hub."""

import shutil
from pathlib import Path
from typing import Any

import jax

import jlora

from . import hub
from .model import DecoderConfig
from .smollm2 import SUMS

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def save_adapter(
    folder: Path,
    trainable: jlora.Trainable,
    base: Path,
    config: DecoderConfig,
    template: Path | None = None,
) -> str:
    """Writes the adapter for PEFT and servers; returns why vLLM would reject it.

    Args:
      folder: made if it does not exist; has the base's tokenizer, too.
      trainable: A and B, and what is trained in full.
      base: the directory of the base model, whose path the adapter names.
      config: the model's.
      template: a chat template that was used in place of the base's.

    Returns:
      The reasons in words; empty if vLLM loads it.
    """
    options: dict[str, Any] = {
        "names": hub.names(config),
        "base_model": str(base.resolve()),
        "task_type": "CAUSAL_LM",
        "tied": config.tied,
    }
    told = ""
    try:
        jlora.peft.save(folder, trainable, portable=True, **options)
    except jlora.PeftError as error:
        told = str(error)
        jlora.peft.save(folder, trainable, **options)
    if jax.process_index() == 0:
        copy_tokenizer(base, folder, template)
    return told


def save_merged(
    folder: Path, adapter: Path, base: Path, template: Path | None = None
) -> None:
    """Writes the base with the adapter merged as a directory like those of the Hub.

    The sum is that of the base's own numbers, also if the run quantised them. One leaf
    at a time goes from file to file.

    Args:
      folder: replaced, if it is there.
      adapter: of `save_adapter`.
      base: the directory of the base model.
      template: see `save_adapter`.
    """
    if jax.process_index() != 0:
        return
    trainable = jlora.files.read(adapter, base=base)
    jlora.export.merge_directory(base, trainable, folder, overwrite=True)
    (folder / SUMS).unlink(missing_ok=True)  # those of the base's files
    if template is not None:
        shutil.copyfile(template, folder / "chat_template.jinja")


def copy_tokenizer(base: Path, folder: Path, template: Path | None) -> None:
    """Copies the tokenizer's files, with `template` as the chat template if given."""
    for name in TOKENIZER:
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)
    if template is not None:
        shutil.copyfile(template, folder / "chat_template.jinja")
