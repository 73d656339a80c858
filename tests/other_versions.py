"""Run tests and notebooks with other versions than the pinned ones, in environments of their own.

    python tests/other_versions.py oldest          the lowest torch, torchvision, ipywidgets that pyproject.toml allows
    python tests/other_versions.py newest          the newest of these that there are
    python tests/other_versions.py ipywidgets-7    the pinned versions, but for ipywidgets
    python tests/other_versions.py colab           what Colab publishes of what vitlib depends on, and not our pins

Installs into ``runs/versions``, and runs pytest there, on the notebooks and on the tests of what depends on these
packages. Needs the network for pip, and gigabytes on Linux unless pip knows where builds of torch without CUDA
are. Another torch may compute another last digit; then a compared output says so.
"""

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import click

from vitlib.course.doctor import lowest_versions

ROOT = Path(__file__).parents[1]
OTHERS = ("torch", "torchvision", "ipywidgets")
TESTED = ["tests/test_model.py", "tests/test_train.py", "tests/test_checkpoint.py", "tests/test_convert.py",
          "tests/test_export.py", "tests/test_distributed.py", "tests/test_explain.py", "tests/test_widgets.py",
          "tests/test_notebooks.py", "notebooks"]  # fmt: skip
COLAB = "https://raw.githubusercontent.com/googlecolab/backend-info/main/pip-freeze.txt"
CHAPTERS = sorted(str(path) for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
NBVAL = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=600"]


def published_versions(freeze: str, names: Iterable[str]) -> list[str]:
    """Return these packages in the versions of Colab's ``pip freeze``."""
    # packages from elsewhere are "torch @ https://.../torch-2.1.0%2Bcu118-"; their CPU builds are on PyPI
    found = dict(re.findall(r"^([\w.-]+)(?:==| @ \S+/[\w.]+-)(\d[\w.]*)", freeze, re.MULTILINE))
    versions = {name.lower().replace("_", "-"): version for name, version in found.items()}
    return [f"{name}=={versions[name.lower()]}" for name in names if name.lower() in versions]


def wanted(which: str) -> list[str]:
    """Return what pip is to install instead of the pinned versions."""
    lowest = lowest_versions()
    if which == "newest":
        return list(OTHERS)
    if which == "colab":
        with urllib.request.urlopen(COLAB, timeout=60) as answer:
            names = [*lowest, "ipython", "jupyter-client", "nbclient", "nbformat"]
            return published_versions(answer.read().decode(), names)
    widgets = f"ipywidgets~={lowest['ipywidgets']}"  # any 7
    if which == "ipywidgets-7":
        return [widgets]
    return [widgets, *(f"{name}~={lowest[name]}.0" for name in ("torch", "torchvision"))]


def install(which: str) -> Path:
    """Make the environment and return its Python."""
    folder = ROOT / "runs" / "versions" / which
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    packages = wanted(which)
    replaced = {re.split(r"[=~]", package)[0] for package in packages}
    kept = [line for line in pinned if re.split(r"[=;#\s]", line)[0] not in {*replaced, ""}]
    if which == "colab":  # none of our pins; pip completes the rest
        kept = ["nbval"]
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # together, so that pip does not put back what another package asks for
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade", *kept, *packages, "--editable", ROOT]
    subprocess.run(install, check=True)
    return python


@click.command()
@click.argument("which", type=click.Choice(["oldest", "newest", "ipywidgets-7", "colab"]))
def main(which: str) -> None:
    """Run tests and notebooks with other versions of torch or ipywidgets."""
    python = install(which)
    shown = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {OTHERS}), sep=', ')"
    subprocess.run([python, "-c", shown], check=True)
    what = CHAPTERS if which == "colab" else TESTED
    sys.exit(subprocess.run([python, "-m", "pytest", *NBVAL, *what], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
