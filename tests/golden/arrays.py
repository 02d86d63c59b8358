"""Reads, writes and compares arrays by name, for the scripts that run other tools."""

import pathlib

import numpy as np


def load(file: pathlib.Path) -> dict:
    """Returns the arrays of a safetensors file."""
    from safetensors.numpy import load_file

    return load_file(file)


def save(arrays: dict, file: pathlib.Path, metadata: dict | None = None) -> None:
    """Writes arrays to a safetensors file; makes its folder."""
    from safetensors.numpy import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {n: np.ascontiguousarray(x) for n, x in arrays.items()}
    save_file(arrays, file, metadata)


def compare(what: str, found: dict, wanted: dict, most: float = 1e-6) -> int:
    """Prints how far two sets of arrays are from each other; returns the exit code.

    Args:
      what: what they are, for the line that is printed.
      found: arrays by name.
      wanted: what they should be.
      most: the difference that is allowed, over the largest entry of each array.
    """
    if found.keys() != wanted.keys():
        print(f"{what}: other names: {sorted(found.keys() ^ wanted.keys())[:4]}")
        return 1
    worst = max(
        np.abs(np.asarray(found[n], np.float64) - wanted[n]).max()
        / np.abs(wanted[n]).max()
        for n in wanted
    )
    print(f"{what}: {len(wanted)} arrays differ by {worst:.1e} at most")
    return int(not worst < most)
