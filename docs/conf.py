"""The site: `sphinx-build -W docs site`; `-t online` links to other projects' pages."""

import importlib.metadata
import pathlib
import re
import sys
from typing import Any

from sphinx.application import Sphinx

sys.path.append(str(pathlib.Path(__file__).parent))

import address

DOCS = pathlib.Path(__file__).resolve().parent
ADDRESS = address.read()

project = "jlora"
html_title = "jlora"
author = "the jlora authors"
release = importlib.metadata.version("jlora")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_book_theme",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

# Pages are Markdown, for GitHub too: a link to `#jlora.plan` names a public object.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks keep their outputs; tests run them

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the constructor's signature has the types
python_maximum_signature_line_length = 72
# One backtick in a docstring names an object, where there is one of that name.
default_role = "py:obj"

# A build reads no network unless it is asked to.
intersphinx_mapping: dict[str, tuple[str, None]] = {}
if tags.has("online"):  # noqa: F821  # pyright: ignore[reportUndefinedVariable]
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3/", None),
        "jax": ("https://docs.jax.dev/en/latest/", None),
        "flax": ("https://flax.readthedocs.io/en/latest/", None),
        "optax": ("https://optax.readthedocs.io/en/latest/", None),
        "orbax": ("https://orbax.readthedocs.io/en/latest/", None),
    }

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["jlora.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options: dict[str, Any] = {"show_toc_level": 2, "navbar_persistent": []}
html_baseurl = ADDRESS.site
if ADDRESS.repository:
    html_theme_options |= {
        "repository_url": ADDRESS.repository,
        "use_repository_button": True,
    }
# Not the prompts and the outputs of doctests.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def is_plain_field(
    app: Sphinx, what: str, name: str, x: object, *_: object
) -> bool | None:
    """Whether autodoc leaves out a field, which the docstring of its class names."""
    return True if what == "class" and type(x).__name__ == "_tuplegetter" else None


def separate_plurals(app: Sphinx, *about: Any) -> None:
    """Lets a docstring write "`PartitionSpec`s": reST wants a mark before the s."""
    lines = about[-1]
    text = "\n".join(lines)
    lines[:] = re.sub(r"(`[^`]+`)(s\b)?", plural, text).split("\n")


def plural(found: re.Match[str]) -> str:
    """Returns a name in backticks with what follows it set apart."""
    return f"{found[1]}\\ s" if found[2] else found[1]


def shorten(
    app: Sphinx, what: str, name: str, x: object, options: object, *shown: str | None
) -> tuple[str | None, ...]:
    """Takes modules off the types of a signature that Sphinx does not parse."""
    return tuple(text and re.sub(r"~(?:\w+\.)*", "", text) for text in shown)


def relink(app: Sphinx, name: str, source: list[str]) -> None:
    """Makes links out of `docs/` lead to the repository, if it has an address."""
    folder = (DOCS / name).parent.resolve()  # notebooks/ lies beside docs/

    def replaced(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target.is_relative_to(DOCS):
            return link[0]
        path = target.relative_to(DOCS.parent)
        if ADDRESS.repository:
            return f"[{link[1]}]({ADDRESS.file(str(path))}{link[3] or ''})"
        return f"{link[1]} (`{path}`)"

    link = r"\[([^\[\]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)"
    source[0] = re.sub(link, replaced, source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", relink)
    app.connect("autodoc-skip-member", is_plain_field)
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-process-docstring", separate_plurals)
