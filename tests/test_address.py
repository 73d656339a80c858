"""One place for the repository's address: every link follows what pyproject.toml says."""

import re
import shutil
import subprocess
import sys

import pytest

from tools.address import ROOT, project_files, repository, set_repository

LINK = "https://github.com/{}"
# the kinds of links that only the course's own repository has here
OWN_LINK = re.compile(
    r"""(?:mybinder\.org/v2/gh/|colab\.research\.google\.com/github/|git\+https://github\.com/
    |(?:Repository\ =|repository-code:)\ "https://github\.com/)([\w.-]+/[\w.-]+)""",
    re.VERBOSE,
)


def texts_below(folder):
    """Path within the folder to text, for the project's files that are no pictures or weights."""
    texts = {}
    for path in project_files(folder):
        try:
            texts[path.relative_to(folder).as_posix()] = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
    return texts


def own_links(folder):
    """Path to the repositories that its links name, for the files that have such links."""
    links = {name: OWN_LINK.findall(text) for name, text in texts_below(folder).items()}
    return {name: found for name, found in links.items() if found}


@pytest.fixture
def copy(tmp_path):
    """A copy of what may have links, without git."""
    folder = tmp_path / "copy"
    for path in project_files():
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    return folder


def test_every_link_to_the_repository_is_that_of_pyproject():
    links = own_links(ROOT)
    assert {name for found in links.values() for name in found} == {repository()}
    assert {"pyproject.toml", "CITATION.cff", "README.md"} <= set(links)
    notebooks = {path.relative_to(ROOT).as_posix() for path in project_files() if path.suffix == ".ipynb"}
    assert notebooks <= set(links), "a notebook's first code cell installs vitlib on Colab"


def test_setting_it_changes_every_link_and_nothing_else(copy):
    before = texts_below(copy)
    links = own_links(copy)
    assert links == own_links(ROOT), "without git the same files are found"
    changed = set_repository("ada-l/the.vit", copy)
    assert repository(copy) == "ada-l/the.vit"
    assert own_links(copy) == {name: ["ada-l/the.vit"] * len(found) for name, found in links.items()}
    assert {path.relative_to(copy).as_posix() for path in changed} == set(links)
    assert not [name for name, text in texts_below(copy).items() if repository() in text]
    set_repository(repository(), copy)
    assert texts_below(copy) == before
    assert not list(copy.rglob("*.part"))


def small_project(folder, text):
    """A project whose README has the given text."""
    (folder / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{LINK.format("me/vit")}"\n')
    (folder / "README.md").write_bytes(text.encode())
    return folder / "README.md"


@pytest.mark.parametrize(
    "text",
    [
        "https://github.com/{}\r\n",
        "See https://github.com/{}.",
        "git+https://github.com/{}.git@main",
        "git@github.com:{}.git",
        '"vitlib @ git+https://github.com/{}\\""',
        "[b](https://mybinder.org/v2/gh/{}/main?urlpath=lab) [c](https://colab.research.google.com/github/{}/blob)",
        "https://img.shields.io/github/license/{}",
    ],
)
def test_every_form_of_a_link_is_changed(text, tmp_path):
    readme = small_project(tmp_path, text.replace("{}", "me/vit"))
    set_repository("ada/course", tmp_path)
    assert readme.read_bytes().decode() == text.replace("{}", "ada/course")


@pytest.mark.parametrize(
    "text",
    ["https://github.com/me/vit-more", "https://github.com/me/vit.js", "https://github.com/some/vit", "cd me/vit"],
)
def test_what_only_looks_like_it_stays(text, tmp_path):
    readme = small_project(tmp_path, text)
    assert set_repository("ada/course", tmp_path) == [tmp_path / "pyproject.toml"]
    assert readme.read_text() == text


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_with_git_only_tracked_files_are_changed(tmp_path):
    readme = small_project(tmp_path, LINK.format("me/vit"))
    shutil.copy(readme, tmp_path / "mine.md")
    (tmp_path / "run.sh").write_text(f"pip install git+{LINK.format('me/vit')}")
    (tmp_path / "run.sh").chmod(0o755)
    mode = (tmp_path / "run.sh").stat().st_mode
    for command in (["init", "-q"], ["add", "README.md", "pyproject.toml", "run.sh"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert {path.name for path in set_repository("ada/course", tmp_path)} == {"README.md", "run.sh", "pyproject.toml"}
    assert (tmp_path / "mine.md").read_text() == LINK.format("me/vit")
    assert (tmp_path / "run.sh").stat().st_mode == mode


@pytest.mark.parametrize(
    "name",
    ["", "vit", "ada/", "/vit", "ada/vit/more", "https://github.com/ada/vit", "-a/vit", "a/..", "a/v.git", "a b/c"],
)
def test_a_name_that_is_none_is_refused_in_a_sentence_and_changes_nothing(name, tmp_path):
    readme = small_project(tmp_path, LINK.format("me/vit"))
    with pytest.raises(ValueError, match="give name/repository, for example ada/vit-course"):
        set_repository(name, tmp_path)
    assert (readme.read_text(), repository(tmp_path)) == (LINK.format("me/vit"), "me/vit")


def test_the_command_says_what_is_wrong_in_one_line():
    command = [sys.executable, "-m", "tools.address", "vit-course"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 2
    assert (
        said.stderr == "'vit-course' is not a repository of GitHub; give name/repository, for example ada/vit-course.\n"
    )
