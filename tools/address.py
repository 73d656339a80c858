"""Set where the repository is hosted, in every link: ``python -m tools.address name/repository``.

``Repository`` in pyproject.toml holds the address. Until it is set, the pages leave out what would need it: README's
clone command and its Binder and Colab badges, and the ``repository-code`` of CITATION.cff.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACEHOLDER = "OWNER/vit-course"
# GitHub's own rule; links to a repository may end in .git, so no name does
NAME = re.compile(r"[A-Za-z0-9](?:-?[A-Za-z0-9]){0,38}/(?!\.{1,2}$)(?!.*\.git$)[A-Za-z0-9._-]{1,100}")


def repository(root: Path = ROOT) -> str:
    """Return the ``name/repository`` of pyproject.toml; it is ``PLACEHOLDER`` until somebody sets it."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].removeprefix("https://github.com/")


def project_files(root: Path = ROOT) -> list[Path]:
    """Return the files that git tracks; raise ValueError if there are none."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        raise ValueError(f"git tracks no files in {root}; run `git init && git add .` there first.")
    return sorted(path for name in listed.stdout.split("\0") if name and (path := root / name).is_file())


def set_repository(name: str, root: Path = ROOT) -> list[Path]:
    """Set the address in pyproject.toml and in every link, and add what had been left out. Return the changed files.

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
        try:
            before = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a picture or weights
            continue
        after = link.sub(rf"\g<1>{name}", before)
        after = _ADDITIONS.get(path.relative_to(root).as_posix(), lambda text, name: text)(after, name)
        if after != before:
            path.write_bytes(after.encode("utf-8"))
            changed.append(path)
    return changed


def badges(name: str, notebook: str) -> str:
    """Return the Binder and Colab badges of a notebook, as Markdown."""
    binder = f"https://mybinder.org/v2/gh/{name}/main?urlpath=lab/tree/{notebook}"
    colab = f"https://colab.research.google.com/github/{name}/blob/main/{notebook}"
    return (
        f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder}) "
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})"
    )


def _complete_readme(text: str, name: str) -> str:
    clone = f"git clone https://github.com/{name} && cd {name.split('/')[1]}"
    text = re.sub(r"^(?:cd vit-course$|git clone \S+ && cd \S+)", clone, text, flags=re.M)
    if "badge_logo.svg" in text:
        return text
    text = re.sub(r"^\| chapter \| question .*\|\n.*", r"\g<0> --- |", text, flags=re.M)
    text = re.sub(r"^\| chapter \| question .*\|", r"\g<0> open in |", text, flags=re.M)
    row = re.compile(r"^\| \[\d\d [^\]]+\]\((notebooks/\S+\.ipynb)\) .*\|$", re.M)
    return row.sub(lambda match: f"{match[0]} {badges(name, match[1])} |", text)


def _complete_citation(text: str, name: str) -> str:
    line = f'repository-code: "https://github.com/{name}"\n'
    return text if "repository-code" in text else text.replace("authors:\n", line + "authors:\n", 1)


_ADDITIONS = {"README.md": _complete_readme, "CITATION.cff": _complete_citation}


if __name__ == "__main__":
    try:
        for path in set_repository(" ".join(sys.argv[1:])):
            print(path.relative_to(ROOT))
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
