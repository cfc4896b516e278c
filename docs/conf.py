"""The site: pages of this folder, and the API from docstrings.

    sphinx-build -W --keep-going docs docs/_build/html

Nothing is fetched: types and functions of other projects are not linked.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import nfkernels  # noqa: E402

project, author, release = "nfkernels", "the authors of nfkernels", nfkernels.__version__
copyright = author
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme, html_title = "furo", f"nfkernels {release}"
html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # as GitHub makes them

autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False  # what torch says about every module's forward is not about ours
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

nitpicky = True
nitpick_ignore_regex = [
    # Other projects' names: no inventory of theirs is fetched.
    (r"py:.*", r"(torch|numpy|np|matplotlib|collections|os|argparse|functools|weakref|constraints|nn|pathlib)\..*"),
    (r"py:.*", r"(Any|Callable|Sequence|Iterable|Iterator|Mapping|Literal|Tensor|Distribution|Path|PathLike|Figure)"),
    # Names of types that only signatures have: a union, a type variable, what workers hand over.
    (r"py:class", r"(Data|Unpack|RecipeChanges|Flow\.T|.*\.T|.*\.Listing|.*\.StreamBatches|.*\.Column|.*\.Rows)"),
    # What a constructor sets has no place of its own.
    (r"py:attr", r"(names|context_names)"),
]

# --- pages of the repository that pages here link to ------------------------------------------------------------------

COPIES = HERE / "_repository"
LINK = re.compile(r"(\]\()([^)#\s]+)")


def repository_pages() -> set[Path]:
    """Markdown outside this folder that the site has a copy of."""
    named = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
    found = [*named, *ROOT.glob("benchmarks/results/*/*.md"), *ROOT.glob("examples/README.md")]
    found += ROOT.glob("tests/*/README.md")
    return {path for path in found if path.is_file() and not re.match(r"20\d\d-", path.name)}


def rewritten(text: str, source: Path, place: Path) -> str:
    """``text`` of the page ``source`` for a page at ``place``: relative links lead to the same files, or to copies."""
    pages = repository_pages()

    def moved(link: re.Match) -> str:
        there = Path(os.path.normpath(source.parent / link[2]))
        if ":" in link[2] or not there.exists():
            return link[0]
        there = COPIES / there.relative_to(ROOT) if there in pages else there
        return link[1] + Path(os.path.relpath(there, place.parent)).as_posix()

    return LINK.sub(moved, text)


def copy_pages(app: object) -> None:
    for source in repository_pages():
        place = COPIES / source.relative_to(ROOT)
        text = "---\norphan: true\n---\n\n" + rewritten(source.read_text(encoding="utf-8"), source, place)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_file() or place.read_text(encoding="utf-8") != text:
            place.write_text(text, encoding="utf-8")


def read_page(app: object, name: str, source: list[str]) -> None:
    path = Path(app.env.doc2path(name))
    if COPIES not in path.parents:
        source[0] = rewritten(source[0], path, path)


# --- names ------------------------------------------------------------------------------------------------------------

MODULES = ("ops", "nn", "models", "integrations", "training", "plot", "diagnostics")


def plainly_named(app: object, env: object, node: object, content: object) -> object:
    """Docstrings name what their file imports (``Glow``, ``Flow.check``) and what a parent has (``rsample``)."""
    if node.get("refdomain") != "py":
        return None
    name = node["reftarget"].rpartition("nfkernels.")[2]
    name = name.rpartition(".")[2] if name.partition(".")[0] in MODULES else name
    domain = env.get_domain("py")
    for owner in ("", "Flow.", "Bijection."):
        for module in MODULES:
            target = f"nfkernels.{module}.{owner}{name}"
            if target in domain.objects:
                return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], target, node, content)
    return None


def whole_sentences(app: object, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """A property's first line is a sentence, not ``type: description``, even if a colon is in it."""
    if what in ("property", "attribute", "data"):
        lines[:0] = ["..", ""]


def setup(app: object) -> None:
    app.connect("builder-inited", copy_pages)
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", whole_sentences, priority=100)
    app.connect("missing-reference", plainly_named)
