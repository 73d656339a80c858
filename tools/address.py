"""Where the repository lives: ``Repository`` in pyproject.toml says it, and every link that repeats it follows.

``python -m tools.address name/repository`` sets them all, which is what whoever hosts the course does first.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from vitlib.utils import atomic_write

ROOT = Path(__file__).parents[1]
# GitHub's own rule; links to a repository may end in .git, so no name does
NAME = re.compile(r"[A-Za-z0-9](?:-?[A-Za-z0-9]){0,38}/(?!\.{1,2}$)(?!.*\.git$)[A-Za-z0-9._-]{1,100}")
WITHOUT_GIT = ("README.md", "CITATION.cff", "pyproject.toml", "notebooks/**/*", "docs/**/*")


def repository(root: Path = ROOT) -> str:
    """The ``name/repository`` that stands in pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].removeprefix("https://github.com/")


def set_repository(name: str, root: Path = ROOT) -> list[Path]:
    """Set pyproject.toml and every link to the repository; gives the files that changed. Nothing else in them does.

    Raises:
        ValueError: if ``name`` is not of the form name/repository; nothing is changed then.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a repository of GitHub; give name/repository, for example ada/vit-course.")
    # as in github.com/X, colab.research.google.com/github/X, mybinder.org/v2/gh/X, but not in github.com/X-more
    link = re.compile(rf"((?:github|/gh)[^\s\"'`<>()\[\]]*?[/:]){re.escape(repository(root))}(?![\w-]|\.(?!git\b)\w)")
    changed = []
    # pyproject.toml last: until then it has the name to look for, so an interrupted change can be made again
    for path in sorted(project_files(root), key=lambda path: path == root / "pyproject.toml"):
        before = path.read_bytes()
        try:
            after = link.sub(rf"\g<1>{name}", before.decode("utf-8")).encode("utf-8")
        except UnicodeDecodeError:  # a picture or weights
            continue
        if after != before:
            mode = path.stat().st_mode
            with atomic_write(path) as temporary:
                temporary.write_bytes(after)
            path.chmod(mode)
            changed.append(path)
    return changed


def project_files(root: Path = ROOT) -> list[Path]:
    """The files that git tracks; without git, those that may have links to the repository."""
    if (root / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
        found = [root / name for name in listed.stdout.split("\0") if name]
    else:
        found = [path for pattern in WITHOUT_GIT for path in root.glob(pattern)]
    return sorted(path for path in found if path.is_file())


if __name__ == "__main__":
    try:
        for path in set_repository(" ".join(sys.argv[1:])):
            print(path.relative_to(ROOT))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
