"""The repository's address: pyproject.toml says it, every link follows, and a reader never sees the placeholder."""

import re
import shutil
import subprocess

import pytest
import yaml

from tools import address
from tools.address import PLACEHOLDER, ROOT, repository, set_repository


@pytest.fixture
def copy(tmp_path):
    """A repository of git with our files that have an address or get one."""
    for name in ("README.md", "CITATION.cff", "pyproject.toml", "docs/install.md", "notebooks/01_patching.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    return tmp_path


def test_readers_never_see_the_placeholder():
    pages = [ROOT / "CITATION.cff", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*/*.md")]
    assert not [path.name for path in pages if "OWNER" in path.read_text(encoding="utf-8")]


def test_every_notebook_installs_vitlib_from_the_address():
    for path in ROOT.glob("notebooks/**/*.ipynb"):
        assert f"git+https://github.com/{repository()}" in path.read_text(encoding="utf-8"), path.name


def test_setting_it_adds_badges_clone_and_citation(copy):
    set_repository("ada-l/the.vit", copy)
    readme = (copy / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\d\d) .+$", readme, re.M)
    assert len(rows) == readme.count("mybinder.org/v2/gh/ada-l/the.vit/") == readme.count("colab-badge.svg")
    assert "git clone https://github.com/ada-l/the.vit && cd the.vit\n" in readme and "| open in |\n" in readme
    assert yaml.safe_load((copy / "CITATION.cff").read_text())["repository-code"] == "https://github.com/ada-l/the.vit"
    assert repository(copy) == "ada-l/the.vit"
    assert PLACEHOLDER not in "".join(path.read_text() for path in copy.rglob("*") if path.suffix in (".md", ".ipynb"))


def test_setting_it_again_only_changes_the_name(copy):
    set_repository("ada/vit", copy)
    before = (copy / "README.md").read_text(encoding="utf-8")
    set_repository("eve/vit", copy)
    assert (copy / "README.md").read_text(encoding="utf-8") == before.replace("ada/vit", "eve/vit")
    assert set_repository("eve/vit", copy) == []


def test_links_change_and_lookalikes_stay(copy):
    links = "https://github.com/{}\r\ngit+https://github.com/{}.git@main\ngit@github.com:{}.git\n"
    links += "[b](https://mybinder.org/v2/gh/{}/main?urlpath=lab)\n"
    others = "https://github.com/{}-more and https://github.com/{}.js and cd {}".replace("{}", repository())
    (copy / "docs" / "install.md").write_bytes((links.replace("{}", repository()) + others).encode())
    set_repository("ada/course", copy)
    assert (copy / "docs" / "install.md").read_bytes().decode() == links.replace("{}", "ada/course") + others


@pytest.mark.parametrize("name", ["", "vit", "ada/", "ada/vit/more", "https://github.com/ada/vit", "a/..", "a/v.git"])
def test_a_wrong_name_is_refused_and_changes_nothing(name, copy):
    with pytest.raises(ValueError, match="give name/repository, for example ada/vit-course"):
        set_repository(name, copy)
    assert repository(copy) == repository(address.ROOT)
