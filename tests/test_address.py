"""One place says where jlora is published, and nothing else names an address of it."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import address

pytestmark = pytest.mark.once
ROOT = Path(__file__).parents[1]
HIDDEN = {".github", ".ci"}
MADE = {"build", "dist", "htmlcov", "node_modules", "runs", "site", "venv"}
BINARY = {".bin", ".msgpack", ".npz", ".pyc", ".safetensors"}
# An address of jlora's own, or an install of whatever has its name on PyPI.
NAMED = re.compile(
    r"git(?:hub|lab)(?:\.com)?[/:][\w.-]+/jlora\b"
    r"|[\w-]+\.(?:github|gitlab)\.io/jlora\b"
    r"|\bjlora\.(?:readthedocs|github)\."
    r"|pypi\.org/\S*jlora\b"
    r"""|pip install [^\n`]*?(?<![-/\w.])["']?jlora\b(?![-/]|\.whl)"""
)
PUBLISHED = address.Address(
    repository="https://github.com/somebody/some-jlora",
    site="https://somebody.github.io/some-jlora/",
    package="some-jlora",
)


def text_files() -> Iterator[Path]:
    """The text files of the checkout, but not this one."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            f
            for f in folders
            if (not f.startswith(".") or f in HIDDEN) and f not in MADE
        ]
        for name in names:
            file = Path(folder, name)
            if file.suffix not in BINARY and file != Path(__file__):
                yield file


def addresses(text: str) -> list[str]:
    return [found[0] for found in NAMED.finditer(text)]


@pytest.mark.parametrize(
    "text",
    [
        "https://github.com/jlora/jlora",
        "https://colab.research.google.com/github/any-body/jlora/blob/main/x.ipynb",
        "git@github.com:me/jlora.git",
        "https://me.github.io/jlora/",
        "https://jlora.readthedocs.io",
        "https://pypi.org/project/jlora/",
        "pip install jlora",
        '%pip install -q "jlora{extra}" matplotlib',
        "pip install -U 'jlora[cuda]'",
    ],
)
def test_address_is_seen(text):
    assert addresses(text)


@pytest.mark.parametrize(
    "text",
    [
        "pip install .",
        "pip install -e '.[test]'",
        "pip install jlora-0.1.0-py3-none-any.whl",
        "pip install dist/jlora-0.1.0-py3-none-any.whl",
        "https://github.com/huggingface/peft",
    ],
)
def test_other_text_names_no_address(text):
    assert not addresses(text)


def test_only_one_place_names_an_address():
    where = address.read()
    makers = address.urls, address.badges, address.install, address.setup_cell
    made = [make(where) for make in makers] + [where.on_colab(""), where.file("")]
    allowed = {*addresses("\n".join(made))}
    found = {
        str(file.relative_to(ROOT)): others
        for file in text_files()
        if (
            others := {*addresses(file.read_text(encoding="utf-8", errors="ignore"))}
            - allowed
        )
    }
    assert not found, "Only docs/address.py writes an address of jlora."


def test_every_place_holds_the_address():
    for file, text in address.texts(address.read()).items():
        old = file.read_text(encoding="utf-8")
        assert old == text, f"{file}: run `python docs/address.py`."


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the files that hold an address, without one."""
    for file in address.texts(address.Address()):
        copied = tmp_path / file.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copied)
    for file, text in address.texts(address.Address(), tmp_path).items():
        file.write_text(text, encoding="utf-8")
    return tmp_path


def test_no_address_leaves_no_trace(copy):
    for file in address.texts(address.Address(), copy):
        assert not addresses(file.read_text(encoding="utf-8")), file


def test_address_is_written_everywhere_and_taken_back(copy):
    pyproject = copy / "pyproject.toml"
    before = {file: file.read_text() for file in address.texts(PUBLISHED, copy)}
    text = pyproject.read_text()
    for field in ("repository", "site", "package"):
        new = f'{field} = "{getattr(PUBLISHED, field)}"'
        text = re.sub(rf'^{field} = ".*"$', new, text, flags=re.MULTILINE)
    pyproject.write_text(text)
    assert address.read(copy) == PUBLISHED
    address.write(copy)
    for file in before:
        assert PUBLISHED.slug in file.read_text() or file.name == "install.md"
    assert "pip install 'some-jlora'" in (copy / "docs/install.md").read_text()
    notebook = (copy / "notebooks/01-quickstart.ipynb").read_text()
    assert 'pip install -q \\"some-jlora[{extras}]' in notebook
    address.write(copy)  # once more changes nothing
    after = address.texts(PUBLISHED, copy)
    assert all(file.read_text() == text for file, text in after.items())
    for file, old in before.items():
        if file != pyproject:
            file.write_text(address.texts(address.Address(), copy)[file])
            assert file.read_text() == old


def test_marks_must_be_there():
    with pytest.raises(ValueError, match="'# a' and '# b' stand 0 times, wanted once"):
        address.between("# b\n", "# a", "# b", "")
