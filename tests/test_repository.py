"""The repository as a whole: no secrets, no traces of a machine, no broken links, no large files, known licences."""

import base64
import html
import re
import runpy
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import unquote, urlsplit

import nbformat
from prose import MACHINE_PATH, outside_blocks, outside_code

from tools.address import ROOT, project_files
from tools.student_copy import write_student_copy

FILES = project_files()
PAGES = [path for path in FILES if path.suffix in (".md", ".ipynb")]

# what keys look like, by the prefixes that their makers give them so that they can be found
SECRETS = re.compile(
    r"""-----BEGIN\ [A-Z ]*PRIVATE\ KEY | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b | \bgh[pousr]_[A-Za-z0-9]{36}
    | \bglpat-[\w-]{20} | \bgithub_pat_\w{22} | \bhf_[A-Za-z0-9]{30} | \bpypi-AgE[\w-]{20} | \bxox[abprs]-[\w-]{10}
    | \bAIza[\w-]{35}\b | \bsk-(?:[a-z]+-)*[A-Za-z0-9]{20} | \beyJ[\w-]{10,}\.eyJ[\w-]{10,}\. | [?&]token=[0-9a-f]{16}
    | \w://[^\s/:@'"<>{}]+:[^\s/@'"<>{}]+@""",
    re.VERBOSE,
)
# the hosts that files may name, which all can reach; one in capitals is the reader's, 192.0.2.1 nobody's (RFC 5737)
HOSTS = """127.0.0.1 192.0.2.1 arxiv.org colab.research.google.com creativecommons.org dl.fbaipublicfiles.com
    download.pytorch.org github.com img.shields.io matplotlib.org mybinder.org pypi.org raw.githubusercontent.com
    www.w3.org"""
URL = re.compile(r"\b[a-z][a-z0-9+]{2,}://((?:[A-Za-z0-9_-]|\\?\.)+)")  # the dot of a regular expression too
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
REGISTRY = re.compile(r"(?:--(?:extra-)?index-url|--find-links|--trusted-host|PIP_\w*URL)[=: ]+(\w+://\S+|/\S+)")

LARGE = 1_000_000  # bytes; git keeps every version of a file for ever
LARGE_FILES = {"vitlib/weights/pretrained/cifar100-small.safetensors": 7_000_000}
LARGE_FILES |= dict.fromkeys(("notebooks/01_patching.ipynb", "notebooks/03_pretraining.ipynb"), 3_000_000)
ALL_TOGETHER = 20_000_000


def traces_in(data: bytes, suffix: str = "") -> list[str]:
    """Return what should not be in a file: secrets, paths of one machine, hosts that others cannot reach."""
    text = data[: 2**16 if suffix == ".safetensors" else None].decode("utf-8", "surrogateescape")
    if suffix == ".ipynb":
        pictures = re.findall(r'"image/(?:png|jpeg)": "([^"]+)"', text)
        text += " ".join(base64.b64decode(picture.replace("\\n", "")).decode("latin-1") for picture in pictures)
    found = SECRETS.findall(text) + [path for path in MACHINE_PATH.findall(text) if not path.endswith("ada")]
    hosts = {host.replace("\\", "").strip(".") for host in URL.findall(text)}
    found += [host for host in hosts - {"", *HOSTS.split()} if not host.isupper()]
    return found + [index for index in REGISTRY.findall(text) if CPU_INDEX not in index]


def test_no_file_has_a_secret_or_a_trace_of_a_machine():
    files = [path for path in FILES if path.name != "Dockerfile"]  # its paths are a container's
    found = {path.relative_to(ROOT).as_posix(): traces_in(path.read_bytes(), path.suffix) for path in files}
    assert {name: traces for name, traces in found.items() if traces} == {}


def test_large_files_are_known_and_the_whole_stays_small():
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in FILES}
    assert {name: size for name, size in sizes.items() if size > LARGE_FILES.get(name, LARGE)} == {}
    assert sum(sizes.values()) <= ALL_TOGETHER


def prose_of(path) -> str:
    """Return a page's Markdown; of a notebook that of its cells."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")


def anchors_of(path) -> set[str]:
    """Return the anchors of a page's headings: GitHub's, and for a notebook JupyterLab's too; and those of HTML."""
    text = outside_blocks(prose_of(path))
    anchors = set(re.findall(r"\b(?:id|name)=[\"']([^\"']+)", text))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        anchors |= {f"{slug}-1" if slug in anchors else slug, plain.replace(" ", "-")}
    return anchors


def broken_links(path) -> list[str]:
    """Return the links and images of a page that lead to no file or to no heading."""
    text = outside_code(prose_of(path))
    links = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|\b(?:src|srcset|href)=[\"']([^\"']+)", text)
    links += [(link, "") for link in re.findall(r"^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?\s*$", text, re.MULTILINE)]
    broken = []
    for link in (html.unescape(inline or tag) for inline, tag in links):
        parts = urlsplit(link)
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        fragment = parts.fragment if target.suffix in (".md", ".ipynb") else ""
        if not parts.scheme and not (target.exists() and (not fragment or unquote(fragment) in anchors_of(target))):
            broken.append(link)
    return broken


def test_every_link_leads_to_a_file_and_a_heading():
    assert {path.name: links for path in PAGES if (links := broken_links(path))} == {}


def test_the_student_copy_has_no_solutions_and_no_broken_links(tmp_path):
    write_student_copy(tmp_path)
    pages = [*tmp_path.rglob("*.md"), *tmp_path.rglob("*.ipynb")]
    assert len(pages) > 10 and not [path for path in pages if "solutions" in path.parts or path.name == "teaching.md"]
    assert {path.name: links for path in pages if (links := broken_links(path))} == {}
    chapter = (tmp_path / "notebooks" / "03_pretraining.ipynb").read_text(encoding="utf-8")
    assert '"output_type"' not in chapter and "Solution:" not in chapter


# free licences, none of which asks that a course under MIT and CC BY 4.0 be under it too
FREE = re.compile(
    r"(?:Apache(?:-2\.0| 2\.0 License| License 2\.0| Software License)( WITH LLVM-exception)?"
    r"|0?BSD(?:[- ][23]-Clause)?( License)?|MIT(?:-CMU| License)?|MPL-2\.0|BSL-1\.0"
    r"|Zlib|CC0-1\.0|ISC|Python Software Foundation License|PSF-2\.0)"
)


def test_the_licences_are_those_of_all_pinned_packages():
    """``python docs/licences.py`` writes the page anew."""
    licences = runpy.run_path(str(ROOT / "docs" / "licences.py"))
    text = licences["PAGE"].read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w\S*) \| (\d\S*) \| (.+) \|$", text, re.M)
    assert {name: version for name, version, _ in rows} == licences["pins"]()
    for name, version, words in rows:
        assert all(FREE.fullmatch(part) for part in re.split(r" AND |, ", words)), f"{name}: {words}"
        try:
            if distribution(name).version.split("+")[0] == version:
                assert licences["licence"](name) == words
        except PackageNotFoundError:  # of another system, or only for the site
            continue
