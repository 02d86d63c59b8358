"""Where jlora is published, and everything in the project that follows from it.

`pyproject.toml` holds the address under `[tool.jlora.address]`, empty until jlora is
published. `python docs/address.py` writes it to the other places.
"""

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
COLAB = "https://colab.research.google.com"
INSTALL = """\
    # The extra keeps the runtime's GPU or TPU plugin in step with JAX.
    plugins = {{
        "jax_cuda12_plugin": ",cuda",
        "jax_cuda13_plugin": ",cuda13",
        "libtpu": ",tpu",
    }}
    found = [plugins[name] for name in plugins if importlib.util.find_spec(name)]
    extras = "notebooks" + "".join(found[:1])
    %pip install -q "{requirement}"

import jax

print(jax.devices())"""
FROM_FILES = """\
    # jlora comes from an archive of a checkout that you uploaded, or else from the
    # checkout that this notebook lies in.
    source = pathlib.Path("..").resolve()
    if pathlib.Path("jlora.zip").exists():
        source = pathlib.Path("jlora-checkout").resolve()
        shutil.unpack_archive("jlora.zip", source)
    if not (source / "jlora").is_dir():
        raise FileNotFoundError(
            "Upload jlora.zip beside this notebook. In a checkout, "
            "`git archive -o jlora.zip HEAD` makes it."
        )"""
PROGRAM = """\
import importlib.util
import pathlib
import sys

# The program is in the checkout, not in the package.
source = pathlib.Path("jlora-checkout").resolve()
{checkout}
sys.path.append(str(source))
if importlib.util.find_spec("grain") is None:
    %pip install -q "{requirement}"
"""


@dataclasses.dataclass(frozen=True)
class Address:
    """Where jlora is published; an empty text where it is not.

    Attributes:
      repository: the address of the repository, on GitHub.
      site: the address of the built documents.
      package: the project's name on PyPI.
    """

    repository: str = ""
    site: str = ""
    package: str = ""

    @property
    def slug(self) -> str:
        """The owner and the name, as in `OWNER/NAME`."""
        return urlsplit(self.repository).path.strip("/")

    def file(self, path: str) -> str:
        """Returns the address of a file or a folder of the repository."""
        return f"{self.repository}/blob/main/{path}"

    def on_colab(self, path: str) -> str:
        """Returns the address that opens a notebook in Colab."""
        return f"{COLAB}/github/{self.slug}/blob/main/{path}"


def read(root: Path = ROOT) -> Address:
    """Returns the address in `pyproject.toml`."""
    found = tomllib.loads((root / "pyproject.toml").read_text())
    return Address(**found["tool"]["jlora"]["address"])


def urls(address: Address) -> str:
    """Returns `[project.urls]` of pyproject.toml."""
    lines = []
    if address.repository:
        lines += [
            f'Repository = "{address.repository}"',
            f'Issues = "{address.repository}/issues"',
            f'Changelog = "{address.file("CHANGELOG.md")}"',
        ]
    if address.site:
        lines.append(f'Documentation = "{address.site}"')
    return "\n".join(["[project.urls]", *lines, ""]) if lines else ""


def badges(address: Address) -> str:
    """Returns the line of badges at the top of the README."""
    found = []
    if address.repository:
        checks = f"{address.repository}/actions/workflows/ci.yml"
        found.append(f"[![CI]({checks}/badge.svg)]({checks})")
    if address.package:
        image = f"https://img.shields.io/pypi/v/{address.package}"
        page = f"https://pypi.org/project/{address.package}/"
        found.append(f"[![PyPI]({image})]({page})")
    if address.site:
        found.append(f"[Documentation]({address.site})")
    return f"\n{' '.join(found)}\n\n" if found else ""


def requirement(address: Address, extras: str = "") -> str:
    """Returns what pip installs, once jlora is published."""
    extras = f"[{extras}]" if extras else ""
    if address.package:
        return f"{address.package}{extras}"
    return f"jlora{extras} @ git+{address.repository}"


def install(address: Address) -> str:
    """Returns the block of docs/install.md."""
    if address.package or address.repository:
        return f"\n```bash\npip install '{requirement(address)}'\n```\n\n"
    return (
        "\njlora is not on PyPI: `pip install` of its bare name would run the code of\n"
        "somebody else. Install it from a clone, in the folder of `pyproject.toml`:\n\n"
        "```bash\npip install .\n```\n\n"
    )


def citation(address: Address) -> str:
    """Returns the addresses of CITATION.cff."""
    lines = []
    if address.repository:
        lines.append(f'repository-code: "{address.repository}"\n')
    if address.site:
        lines.append(f'url: "{address.site}"\n')
    return "".join(lines)


def setup_cell(address: Address) -> str:
    """Returns the first code cell of every notebook."""
    condition = '\nif importlib.util.find_spec("jlora") is None:'
    if address.package or address.repository:
        parts = ["import importlib.util", condition]
        wanted = requirement(address, "{extras}")
    else:
        modules = ("importlib.util", "pathlib", "shutil")
        parts = [*(f"import {name}" for name in modules), condition, FROM_FILES]
        wanted = "{source}[{extras}]"
    return "\n".join([*parts, INSTALL.format(requirement=wanted)])


def program_cell(address: Address) -> str:
    """Returns the cell that makes `examples` ready in a notebook that runs one."""
    published = address.package or address.repository
    if address.repository:
        clone = f"!git clone -q --depth 1 {address.repository} jlora-checkout"
        checkout = f"if not source.exists():\n    {clone}"
    else:
        checkout = 'if not source.exists():\n    source = pathlib.Path("..").resolve()'
    wanted = requirement(address, "examples") if published else "{source}[examples]"
    return PROGRAM.format(checkout=checkout, requirement=wanted).rstrip()


def badge(address: Address, name: str) -> str:
    """Returns the badge of a notebook, or an empty text."""
    if not address.repository:
        return ""
    image = f"{COLAB}/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})]({address.on_colab(f'notebooks/{name}')})"


def with_address(text: str, address: Address, name: str) -> str:
    """Returns the text of a notebook with its badge and the cells that install."""
    notebook = json.loads(text)
    title, setup, *others = notebook["cells"]
    paragraphs = "".join(title["source"]).split("\n\n")
    kept = [p for p in paragraphs if not p.startswith("[![Open in Colab]")]
    kept[1:1] = filter(None, [badge(address, name)])
    title["source"] = "\n\n".join(kept).splitlines(keepends=True)
    setup["source"] = setup_cell(address).splitlines(keepends=True)
    for cell in others:
        if cell["id"] == "program":
            cell["source"] = program_cell(address).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def between(text: str, start: str, end: str, new: str) -> str:
    """Returns `text` with `new` between the lines `start` and `end`."""
    found = re.compile(rf"(?<={re.escape(start)}\n).*?(?={re.escape(end)}\n)", re.S)
    changed, count = found.subn(lambda _: new, text)
    if count != 1:
        raise ValueError(f"{start!r} and {end!r} stand {count} times, wanted once")
    return changed


MARKS = {
    "pyproject.toml": ("# address", "# end of address", urls),
    "README.md": ("<!-- address -->", "<!-- end of address -->", badges),
    "docs/install.md": ("<!-- address -->", "<!-- end of address -->", install),
    "CITATION.cff": ("# address", "# end of address", citation),
}


def texts(address: Address, root: Path = ROOT) -> dict[Path, str]:
    """Returns what the files that hold an address should hold."""
    found = {}
    for name, (start, end, new) in MARKS.items():
        text = (root / name).read_text(encoding="utf-8")
        found[root / name] = between(text, start, end, new(address))
    for file in sorted((root / "notebooks").glob("*.ipynb")):
        text = file.read_text(encoding="utf-8")
        found[file] = with_address(text, address, file.name)
    return found


def write(root: Path = ROOT) -> None:
    """Writes the address in pyproject.toml to every place that follows from it."""
    for file, text in texts(read(root), root).items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
