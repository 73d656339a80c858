"""The rooms of vitlib: who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import vitlib

ROOT = Path(vitlib.__file__).parent
# a room imports only from rooms before it
ORDER = ["utils", "model", "data", "costs", "explain", "weights", "records", "training"]
ORDER += ["classify", "export", "plots", "widgets", "course", "__main__"]


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, those in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges() -> Iterator[tuple[str, str]]:
    """(room, imported room) for every import from one room into another."""
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imports(path):
            if name.startswith("vitlib.") and name.split(".")[1] != room:
                yield room, name.split(".")[1]


def test_the_model_imports_nothing_but_torch():
    foreign = {name.split(".")[0] for name in imports(ROOT / "model.py")} - set(sys.stdlib_module_names)
    assert foreign == {"torch"}


def test_imports_run_one_way():
    assert [edge for edge in edges() if ORDER.index(edge[1]) >= ORDER.index(edge[0])] == []


def test_the_names_that_everyone_types_load_lazily():
    code = """import sys, vitlib
assert "torch" not in sys.modules
assert all(getattr(vitlib, name).__name__ == name for name in vitlib.__all__)
import vitlib.export, vitlib.classify
assert all(getattr(vitlib, name).__name__ == name for name in vitlib.__all__), "no module takes the name of a function"
print(*sys.modules)"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torchvision", "timm", "transformers", "onnx", "onnxruntime", "matplotlib", "vitlib.course"} & {*loaded}
