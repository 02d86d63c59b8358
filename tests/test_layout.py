"""The house: few rooms, short files and functions, nothing private from next door."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

import jlora

pytestmark = pytest.mark.once
PACKAGE = pathlib.Path(jlora.__file__).parent
TESTS = pathlib.Path(__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(PACKAGE))


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Name and length of each function, without its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            told = ast.get_docstring(node) is not None
            doc = (first.end_lineno or 0) - first.lineno + 1 if told else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - doc


def test_top_of_package_has_at_most_13_files():
    assert len(list(PACKAGE.glob("*.py"))) <= 13


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_and_its_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 500, "One job a file: part it."
    long = {name: n for name, n in functions(ast.parse(text)) if n > 60}
    assert not long, "Cut these functions into pieces that each say one thing."


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_imports_no_private_name(path):
    """A name with an underscore belongs to its file; a module may have one."""
    private = [
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.level
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not private


@pytest.mark.parametrize("room", ROOMS, ids=name_of)
def test_room_says_what_belongs_in_it(room):
    doc = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    assert "May import" in " ".join(doc.split()), "Say what it may import."


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda p: p.stem)
def test_file_imports_no_test(path):
    imported = [
        node.module.split(".")[-1]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    ]
    found = [name for name in imported if name.startswith("test_")]
    assert not found, "Shared code lives in tests/helpers.py, or beside the tests."


def test_files_that_contributing_names_exist():
    root = TESTS.parent
    named = re.findall(
        r"`([\w./]+\.(?:py|md|txt))`", (root / "CONTRIBUTING.md").read_text()
    )
    assert len(named) > 20
    missing = [n for n in named if not [*root.glob(n), *PACKAGE.glob(f"**/{n}")]]
    assert not missing
