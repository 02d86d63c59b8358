"""docs/api.md and `jlora.__all__` name the same things; examples in pages run."""

import doctest
import importlib
import importlib.util
import inspect
import pathlib
import re

import jax
import pytest

import jlora

API = pathlib.Path(__file__).parents[1] / "docs" / "api.md"
METHODS = sorted((API.parent / "methods").glob("*.md"))
ENTRIES = re.findall(r"^::: (\S+)$", API.read_text(), flags=re.MULTILINE)


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


@pytest.mark.parametrize("name", jlora.__all__)
def test_public_name_has_entry(name):
    wanted = entry_of(name)
    # A namespace is there when its functions are.
    found = [e for e in ENTRIES if e == wanted or e.startswith(f"{wanted}.")]
    assert found, f"jlora.{name} is public. Add `::: {wanted}` to docs/api.md."


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry_names_something(entry):
    assert resolve(entry).__doc__, f"docs/api.md names {entry}, which has no docstring."


def test_no_entry_twice():
    assert len(ENTRIES) == len(set(ENTRIES))


WITH_EXAMPLES = [page for page in METHODS if ">>>" in page.read_text()]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_examples_of_method_pages_run(page):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried
    assert not failed


def test_every_method_has_a_page():
    pages = {page.stem for page in METHODS}
    assert {*jlora.methods.METHODS, "rslora", "rows", "parts", "optimizers"} <= pages
