"""Write licences.md: the licence of every pinned package, as its own metadata state it.

``python docs/licences.py``, in the environment that ``make site`` makes.
"""

from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
LONGEST = 40  # a longer text in the field "License" is the licence itself, not its name
TOP = """\
# Licences of what the course installs

The packages that [requirements.txt](../requirements.txt) and, for the site, [docs/requirements.txt](requirements.txt)
pin, each with the licence that its own metadata state.
`python docs/licences.py` writes this page. What these packages bring along is not in it; `pip-licenses`, run in the
same environment, lists that too. On Linux the default build of torch brings libraries of NVIDIA under NVIDIA's own
terms; the CPU build ([how to get it](install.md#on-linux-without-a-gpu)) does not. The course itself is under
[MIT](../LICENSE), its lessons under [CC BY 4.0](../LICENSE-CC-BY-4.0).

| package | version | licence |
| --- | --- | --- |
"""


def pins() -> dict[str, str]:
    """Package name to version, as requirements.txt and docs/requirements.txt have them."""
    files = (ROOT / "requirements.txt", ROOT / "docs" / "requirements.txt")
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in requirements}


def licence(package: str) -> str:
    """Return the licence of an installed package: its SPDX expression, else its short name, else its classifiers.

    Raises:
        PackageNotFoundError: if it is not installed.
        ValueError: if it states none.
    """
    metadata = distribution(package).metadata
    named = metadata.get("License-Expression") or metadata.get("License") or ""
    if named and len(named) <= LONGEST or metadata.get("License-Expression"):
        return named
    classifiers = [text for text in metadata.get_all("Classifier", []) if text.startswith("License ::")]
    if not classifiers:
        raise ValueError(f"{package} states no licence in its metadata; look it up, and add the case here.")
    return ", ".join(text.split(" :: ")[-1] for text in classifiers)


if __name__ == "__main__":
    pinned = sorted(pins().items(), key=lambda pin: pin[0].lower())
    rows = [f"| {name} | {version} | {licence(name)} |\n" for name, version in pinned]
    PAGE.write_text(TOP + "".join(rows), encoding="utf-8", newline="\n")
