"""The code of the README and of the docs has no type error in an editor."""

import json
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest

import jlora

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
# Snippets go on from each other, and show what they do not keep.
SETTINGS = {
    "typeCheckingMode": "strict",
    "extraPaths": [str(ROOT)],
    "reportDuplicateImport": False,
    "reportMissingTypeStubs": False,
    "reportPossiblyUnbound": False,
    "reportUndefinedVariable": False,
    "reportUnusedExpression": False,
    "reportUnusedImport": False,
    "reportUnusedVariable": False,
}
PRELUDE = "import jax, jax.numpy as jnp, jlora, optax\n"
OWN = {*jlora.__all__, *jlora.adapters.__all__, *jlora.optim.__all__}


def is_told(diagnostic: dict[str, Any]) -> bool:
    """Whether an error is jlora's.

    What JAX, Flax and optax leave untyped is not; nor that optax's `Params` and state
    are no dataclasses, which an Equinox module meets as well.
    """
    if diagnostic["severity"] != "error":
        return False
    if re.search(r'"Params"|"hyperparams"', diagnostic["message"]):
        return False
    if not diagnostic.get("rule", "").startswith(("reportUnknown", "reportMissingP")):
        return True
    named = re.match(r'Type of "(\w+)"', diagnostic["message"])
    return named is not None and named[1] in OWN


def code_of(page: pathlib.Path) -> str:
    """The Python of a page, its blocks in a row; of a doctest the input."""
    blocks = re.findall(r"^```python[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S)
    return "\n".join(map(inputs, map(textwrap.dedent, blocks)))


def inputs(block: str) -> str:
    if ">>> " not in block:
        return block
    lines = [line for line in block.splitlines() if line.startswith((">>> ", "... "))]
    return "\n".join(line[4:] for line in lines) + "\n"


@pytest.mark.slow
def test_code_of_docs_has_no_type_error(tmp_path):
    pages = {page: code for page in PAGES if (code := code_of(page))}
    for page, code in pages.items():
        (tmp_path / f"{page.stem}_page.py").write_text(PRELUDE + code)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(SETTINGS))
    command = [sys.executable, "-m", "pyright", "--outputjson", "-p", str(tmp_path)]
    command += ["--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == len(pages) > 10
    told = [
        f"{pathlib.Path(d['file']).name}:{d['range']['start']['line']} "
        f"{d['message']} ({d.get('rule')})"
        for d in found["generalDiagnostics"]
        if is_told(d)
    ]
    assert not told, "\n".join(told)
