"""The merged model as files: Orbax, and safetensors under Hugging Face names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file, save_file

from .weights import from_hf, to_hf


def export_orbax(directory: Path, params: Mapping) -> None:
    """Writes `params` as an Orbax checkpoint, in place of what is there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), params, force=True)


def export_safetensors(file: Path, params: Mapping) -> None:
    """Writes `params` to one file under Hugging Face names, the head as `classifier`.

    Raises:
      RuntimeError: if the tensors read back differ in any bit.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Readers of the Hugging Face format ask for this tag, whoever wrote the file.
    save_file(to_hf(params), file, metadata={"format": "pt"})
    if not _equal(from_hf(load_file(file)), params):
        raise RuntimeError(f"{file} does not hold the weights that were written.")


def _equal(a: Any, b: Any) -> bool:
    same = jax.tree.map(np.array_equal, a, b)
    return all(jax.tree.leaves(same))
