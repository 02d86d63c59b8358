"""Public names have whole docstrings and stand in docs/api.md; its examples run."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import pathlib
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import jax
import pytest

import jlora

API = pathlib.Path(__file__).parents[1] / "docs" / "api.md"
METHODS = sorted((API.parent / "methods").glob("*.md"))
PACKAGE = pathlib.Path(jlora.__file__).parent
# Public names without an entry in docs/api.md, whole modules among them, and why.
NO_ENTRY = {
    "jlora.cli": "docs/cli.md",
    "jlora.factors.tuples": "lists of JSON, for jlora's own modules",
    "jlora.citations.entry_of": "a look-up of `cite`",
}
# Packages for jlora's own modules only, and why they have no underscore.
INTERNAL = {"quantised": "a room, as `transform`; `jlora.Quantized` is its public name"}
# Public names without an example of their own, and why.
NO_EXAMPLE = {
    "jlora.inspection.InspectedLeaf": "made by `inspect`, which shows it",
    "jlora.inspection.Difference": "made by `diff`, which shows it",
    "jlora.pool.Batch": "made by `Cache.acquire`; `Cache` shows it",
    "jlora.pool.Cache.close": "called by `with`",
    "jlora.cli.main": "ends the process; `run` shows it",
}
ENTRIES = re.findall(r"^\.\. auto\w+:: (\S+)$", API.read_text(), flags=re.MULTILINE)


def entry_of(name: str) -> str:
    """How docs/api.md names `jlora.name`.

    Where a function and the module that holds it share their name, the short form
    would show the module.
    """
    own_module = importlib.util.find_spec(f"jlora.{name}")
    if own_module and not inspect.ismodule(getattr(jlora, name)):
        return f"jlora.{name}.{name}"
    return f"jlora.{name}"


def resolve(entry: str) -> object:
    """The object that an entry stands for."""
    module, _, name = entry.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", sorted({*jlora.__all__} - {"__version__"}))
def test_public_name_has_entry(name):
    wanted = entry_of(name)
    # A namespace is there when its functions are.
    found = [e for e in ENTRIES if e == wanted or e.startswith(f"{wanted}.")]
    assert found, f"jlora.{name} is public. Add {wanted} to docs/api.md."


def public_names() -> dict[str, Any]:
    """Functions and classes of the modules without underscore, each once, by name."""
    files = [p.stem for p in PACKAGE.glob("[!_]*.py")]
    packages = ["", *(p.parent.name for p in PACKAGE.glob("[!_]*/__init__.py"))]
    found: dict[int, tuple[str, Any]] = {}
    for stem in sorted({*packages, *files} - INTERNAL.keys()):
        module = importlib.import_module(f"jlora.{stem}".rstrip("."))
        for name, x in vars(module).items():
            if name.startswith("_") or not isinstance(x, types.FunctionType | type):
                continue
            if x.__module__ == module.__name__ or (
                stem in packages and x.__module__.startswith("jlora.")
            ):
                found.setdefault(id(x), (f"{module.__name__}.{name}", x))
    return dict(found.values())


def with_methods(name: str, x: Any) -> Iterator[tuple[str, Any, bool]]:
    """`(name, object, whether an example shows it)` of `x` and its public methods.

    The example of a class may show its methods.
    """
    doc = inspect.getdoc(x) or ""
    yield name, x, ">>>" in doc
    if not isinstance(x, type):
        return
    fields = getattr(x, "__dataclass_fields__", ())
    for own, method in vars(x).items():
        method = getattr(method, "__func__", method)
        public = not own.startswith("_") and own not in fields
        if public and isinstance(method, types.FunctionType):
            shown = f".{own}(" in doc or ">>>" in (inspect.getdoc(method) or "")
            yield f"{name}.{own}", method, shown


def unsaid(function: Any) -> Iterator[str]:
    """Arguments and errors of a function that its docstring does not name."""
    doc = inspect.getdoc(function) or ""
    for name in inspect.signature(function).parameters:
        named = rf"`\*{{0,2}}{name}\b|^\s+\*{{0,2}}{name}:"
        if name not in ("self", "cls") and not re.search(named, doc, re.MULTILINE):
            yield f"its argument {name}"
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func)
            if not {f"{name}:", "JloraError:"} & {*doc.split()}:
                yield f"its {name}"


def test_public_names_are_documented():
    told, spared = [], set()
    for name, public in public_names().items():
        module, _, own = name.rpartition(".")
        if not {name, f"{name}.{own}"} & {*ENTRIES}:
            spared |= {name, module} & NO_ENTRY.keys()
            if not {name, module} & NO_ENTRY.keys():
                told.append(f"{name} has no entry in docs/api.md")
        is_error = isinstance(public, type) and issubclass(public, Exception)
        for part, x, shown in with_methods(name, public):
            if not (shown or is_error):
                spared |= {part} & NO_EXAMPLE.keys()
                if part not in NO_EXAMPLE:
                    told.append(f"{part} has no example")
            if isinstance(x, types.FunctionType):
                told += [f"{part} does not name {what}" for what in unsaid(x)]
    unneeded = {*NO_ENTRY, *NO_EXAMPLE} - spared
    told += [f"{name} needs no exception here" for name in unneeded]
    assert not told, "\n".join(told)


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry_names_something(entry):
    assert resolve(entry).__doc__, f"docs/api.md names {entry}, which has no docstring."


def test_no_entry_twice():
    assert len(ENTRIES) == len(set(ENTRIES))


PAGES = sorted(API.parent.glob("*.md")) + METHODS
WITH_EXAMPLES = [page for page in PAGES if ">>>" in page.read_text()]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_examples_of_pages_run(page):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        failed, tried = doctest.testfile(
            str(page), module_relative=False, optionflags=FLAGS
        )
    assert tried
    assert not failed


def test_every_method_has_a_page():
    pages = {page.stem for page in METHODS}
    assert {*jlora.methods.METHODS, "rslora", "rows", "parts", "optimizers"} <= pages


def template(node: ast.AST) -> str:
    """The text of a literal, with … for what is known only when it is made."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "…"


def message_templates() -> set[str]:
    """Every text that jlora's code holds, docstrings left out."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        texts = [n for n in ast.walk(tree) if isinstance(n, ast.Expr)]
        docs = {n.value for n in texts if isinstance(n.value, ast.Constant)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr) and node not in docs:
                found.add(re.sub("…+", "…", template(node)))
    return found


def test_quoted_errors_exist():
    page = (API.parent / "troubleshooting.md").read_text()
    quotes = re.findall(r"^```text\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)
    assert len(quotes) > 30
    templates = message_templates()
    patterns = {q: ".*".join(map(re.escape, q.split("…"))) for q in quotes}
    absent = [
        quote
        for quote, pattern in patterns.items()
        if not any(re.search(pattern, text, re.DOTALL) for text in templates)
    ]
    assert not absent, "No text in jlora/ is like this:\n" + "\n".join(absent)
