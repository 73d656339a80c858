"""Write student-copy/: the course without outputs, solutions, guide and tests.

Links to these become plain words; rows of tables that hold one go.
"""

import re
import shutil
import sys
from pathlib import Path

import nbformat

from tools.address import ROOT, project_files

LEFT_OUT = (
    "notebooks/solutions/", "docs/teaching.md", "docs/run-sheet.md", "CONTRIBUTING.md", "tests/", "tools/",
    ".github/", ".ci/",
)  # fmt: skip
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s:#]+)(?:#[^)\s]*)?\)")


def write_student_copy(folder: Path, root: Path = ROOT) -> None:
    """Copy the tracked files that students need into ``folder``."""
    for path in project_files(root):
        name = path.relative_to(root).as_posix()
        if not name.startswith(LEFT_OUT):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / name)
    for path in folder.rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        path.write_text(_without_dead_links(text, path.parent), encoding="utf-8", newline="\n")
    for path in folder.rglob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = _without_dead_links(cell.source, path.parent)
            else:
                cell.outputs, cell.execution_count = [], None  # each answers the question above it
        nbformat.write(notebook, path)


def _without_dead_links(text: str, folder: Path) -> str:
    text = re.sub(r"\n*^Solution: \[[^\n]*", "", text, flags=re.MULTILINE)

    def is_dead(link: re.Match) -> bool:
        return not (folder / link[2]).exists()

    lines = text.splitlines(keepends=True)
    text = "".join(line for line in lines if not (line.startswith("|") and any(map(is_dead, LINK.finditer(line)))))
    return LINK.sub(lambda link: link[1] if is_dead(link) else link[0], text)


if __name__ == "__main__":
    shutil.rmtree(ROOT / "student-copy", ignore_errors=True)
    try:
        write_student_copy(ROOT / "student-copy")
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print("student-copy/ has no outputs, solutions, guide or tests: give that folder to your students.")
