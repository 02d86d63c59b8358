"""The code of the README and of the docs has no type error in an editor."""

import json
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest

pytestmark = pytest.mark.once
ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
# Snippets go on from each other, and show what they do not keep.
SETTINGS = {
    "typeCheckingMode": "strict",
    "extraPaths": [str(ROOT)],
    "reportDuplicateImport": False,
    "reportMissingTypeStubs": False,
    "reportPossiblyUnboundVariable": False,
    "reportUndefinedVariable": False,
    "reportUnusedExpression": False,
    "reportUnusedImport": False,
    "reportUnusedVariable": False,
}
PRELUDE = "import jax, jax.numpy as jnp, jlora, optax\n"


def is_told(diagnostic: dict[str, Any]) -> bool:
    """Whether an error is jlora's.

    What JAX, Flax and optax leave untyped is theirs. So is the type of optax's
    parameters, which refuses every dataclass, an Equinox module too, and that of
    Linen's `apply`, which may also return variables.
    """
    if diagnostic["severity"] != "error":
        return False
    if re.search(r'"Params"|"hyperparams"|FrozenVariableDict', diagnostic["message"]):
        return False
    if not diagnostic.get("rule", "").startswith(("reportUnknown", "reportMissingP")):
        return True
    named = re.match(r'Type of "(\w+)"', diagnostic["message"])
    line = diagnostic["range"]["start"]["line"]
    text = pathlib.Path(diagnostic["file"]).read_text().splitlines()[line]
    return (
        named is not None and re.search(rf"jlora\.[\w.]*{named[1]}\b", text) is not None
    )


def programs(page: pathlib.Path) -> list[str]:
    """The Python of a page: its doctests in a row, every other block by itself."""
    blocks = re.findall(r"^```python[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S)
    blocks = list(map(textwrap.dedent, blocks))
    tests = "\n".join(inputs(block) for block in blocks if ">>> " in block)
    return [x for x in (tests, *(b for b in blocks if ">>> " not in b)) if x]


def inputs(block: str) -> str:
    lines = [line for line in block.splitlines() if line.startswith((">>> ", "... "))]
    return "\n".join(line[4:] for line in lines)


@pytest.mark.slow
def test_code_of_docs_has_no_type_error(tmp_path):
    codes = {f"{p.stem}_{i}.py": x for p in PAGES for i, x in enumerate(programs(p))}
    for name, code in codes.items():
        (tmp_path / name).write_text(PRELUDE + code)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(SETTINGS))
    command = [sys.executable, "-m", "pyright", "--outputjson", "-p", str(tmp_path)]
    command += ["--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == len(codes) > 20
    told = [
        f"{pathlib.Path(d['file']).name}:{d['range']['start']['line']} "
        f"{d['message']} ({d.get('rule')})"
        for d in found["generalDiagnostics"]
        if is_told(d)
    ]
    assert not told, "\n".join(told)
