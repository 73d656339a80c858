"""The site, by ``make site``: README, docs/ and the executed notebooks, shown with their stored outputs.

Sphinx reads the repository's own folder, so nothing is written twice and a link that works on GitHub works here. This
file has what the site adds: contents, launch buttons, the reference of vitlib, and a line in place of live widgets.
"""

import re
import shutil
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from tools.address import PLACEHOLDER, repository  # noqa: E402

project = "The Vision Transformer course"
html_title = "Vision Transformer course"
copyright = "the authors of the course. Lessons: CC BY 4.0, code: MIT"
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas need no foreign host
]
root_doc = "README"
include_patterns = ["README.md", "RESULTS.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/*.md", "notebooks/**"]
exclude_patterns = [".*", "runs", "site", "tests", "vitlib", "**/.ipynb_checkpoints"]

nb_custom_formats = {".ipynb": ["conf.read_notebook", {}]}
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # no live widgets, so nothing to load from elsewhere
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 4

html_theme = "sphinx_book_theme"
html_favicon = "icon.svg"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_sidebars = {"**": ["navbar-logo.html", "icon-links.html", "search-field.html", "sbt-sidebar-nav.html"]}
html_theme_options = {"navbar_persistent": [], "use_download_button": True, "show_toc_level": 2}
ADDRESS = None if repository() == PLACEHOLDER else f"https://github.com/{repository()}"
if ADDRESS:
    html_theme_options |= {
        "repository_url": ADDRESS,
        "repository_branch": "main",
        "use_repository_button": True,
        "launch_buttons": {
            "notebook_interface": "jupyterlab",
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
        },
    }

# The modules of the reference: the model, the rooms in the order of docs/library.md, the rest.
ROOMS = ["model.py", "training/*.py", "data/*.py", "weights/*.py", "*.py"]
FOUND = [path.relative_to(ROOT / "vitlib") for room in ROOMS for path in sorted((ROOT / "vitlib").glob(room))]
MODULES = [".".join(path.with_suffix("").parts) for path in dict.fromkeys(FOUND) if "__" not in path.name]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAPTERS = re.findall(r"^\| \[(\d\d [^\]]+)\]\(notebooks/(\w+)\.ipynb\)", README, re.MULTILINE)  # short title, file
CONTENTS = {
    "Chapters": [f"{title} </notebooks/{name}>" for title, name in CHAPTERS],
    "Solutions": [f"{title} </notebooks/solutions/{name}>" for title, name in CHAPTERS],
    "Teaching": ["/docs/run-sheet", "/docs/teaching", "/docs/glossary"],
    "Doing more": [
        "/docs/install", "/docs/own-images", "/docs/sweeps", "/notebooks/sweeps/patches", "/notebooks/sweeps/labels",
        "/docs/parameters", "/docs/training",
    ],
    "The library": [
        "/docs/library", "/docs/reference", "/RESULTS", "/benchmarks/README", "/CONTRIBUTING", "/docs/licences",
    ],
}  # fmt: skip

WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGET_LINE = "*The sliders of this figure need a kernel: open the notebook on your machine, on Binder or on Colab.*"


def read_notebook(text: str):
    """Return the notebook as the site shows it: without the cell that installs vitlib on Colab, figures with the
    alternative text of their outputs, and a line in place of live widgets."""
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        if "google.colab" in cell.source and cell.cell_type == "code":
            cell.metadata.setdefault("tags", []).append("remove-cell")
        shown = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for kind in [kind for kind in data if kind.startswith("application/vnd.vitlib.")]:
                del data[kind]  # verdicts and figures, for programs
            alt = next((about["alt"] for about in output.get("metadata", {}).values() if "alt" in about), None)
            if alt:
                cell.metadata["mystnb"] = {"image": {"alt": alt}}
            if data.pop(WIDGET, None):
                data.pop("text/plain", None)  # the widget's repr
                shown += [output] if data else []
                output = nbformat.v4.new_output("display_data", {"text/markdown": WIDGET_LINE})
            shown.append(output)
        if "outputs" in cell:
            cell.outputs = shown
    return notebook


def complete_page(app, docname: str, source: list[str]) -> None:
    """Add the contents to README and the modules to the reference; lead links to modules there."""
    if docname == "README":
        source[0] = re.sub(r"\[!\[Open in (\w+)\]\([^)]*\)\]", r"[\1]", source[0])  # badges are pictures from elsewhere
        for caption, pages in CONTENTS.items():
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n" + "\n".join(pages) + "\n```\n"
    if docname == "docs/reference":
        for name in MODULES:
            source[0] += f"\n## vitlib.{name}\n\n```{{eval-rst}}\n.. automodule:: vitlib.{name}\n   :members:\n```\n"
    module = re.compile(r"\[([^\]]+)\]\([./]*(vitlib/[\w/]+)\.py\)")

    def lead(match) -> str:
        name = match[2].replace("/", ".")
        return f"{{py:mod}}`{match[1]} <{name}>`" if name.removeprefix("vitlib.") in MODULES else match[0]

    if not docname.startswith("notebooks"):
        source[0] = module.sub(lead, source[0])


def name_folds(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Let folded cells be called by the words that are seen on them, not by others for screen readers."""
    context["body"] = context.get("body", "").replace('<summary aria-label="Toggle hidden content">', "<summary>")


def finish(app, error) -> None:
    """README is the site's first page, and figures that are named in HTML lie where the notebooks expect them."""
    if not error:
        out = Path(app.outdir)
        shutil.copy(out / "README.html", out / "index.html")
        shutil.rmtree(out.parent / "jupyter_execute", ignore_errors=True)  # myst-nb's copies of the notebooks
        shutil.copytree(ROOT / "notebooks/figures", out / "notebooks/figures", dirs_exist_ok=True)


def setup(app) -> None:
    app.connect("source-read", complete_page)
    app.connect("html-page-context", name_folds)
    app.connect("build-finished", finish)
