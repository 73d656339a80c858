"""The repository as a whole: what no tracked file may hold, how large files are, where links lead, and licences."""

import base64
import html
import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from prose import MACHINE_PATH, outside_blocks, outside_code

from tools.address import ROOT, project_files

FILES = project_files()
MARKDOWN = [path for path in FILES if path.suffix == ".md"]
NOTEBOOKS = [path for path in FILES if path.suffix == ".ipynb"]
PAGES = MARKDOWN + NOTEBOOKS
OPTIONAL = ROOT / "notebooks" / "solutions"  # docs/teaching.md says how to take it out

# what keys look like, by the prefixes that their makers give them so that they can be found
SECRETS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,})",
    "a token of GitLab": r"\bglpat-[\w-]{20}",
    "a token of Hugging Face": r"\bhf_[A-Za-z0-9]{30,}",
    "a token of PyPI": r"\bpypi-AgE[\w-]{20,}",
    "a token of Slack": r"\bxox[abprs]-[\w-]{10,}",
    "a key of Google": r"\bAIza[\w-]{35}\b",
    "a key of a model's API": r"\bsk-(?:[a-z]+-)*[A-Za-z0-9]{20,}",
    "a JSON web token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a password in an address": r"\w://[^\s/:@'\"<>{}]+:[^\s/@'\"<>{}]+@",
    "a password": r"(?i)\b(?:password|passwd|api_?key|secret|token)['\"]?\s*[=:]\s*['\"][^'\"\s{}]{8,}['\"]",
}
# Jupyter writes such a token into what it prints at its start
SECRETS["a token of Jupyter"] = r"[?&]token=[0-9a-f]{16,}"

# the hosts that tracked files may name: all of them can be reached by everybody; one in capitals is the reader's
HOSTS = {
    "127.0.0.1",
    "arxiv.org",
    "colab.research.google.com",
    "creativecommons.org",
    "download.pytorch.org",
    "github.com",
    "img.shields.io",
    "matplotlib.org",  # which it writes into its pictures
    "mybinder.org",
    "pypi.org",
    "192.0.2.1",  # nobody's (RFC 5737), for tests
    "www.w3.org",  # the name of SVG
}
URL = re.compile(r"\b[a-z][a-z0-9+]{2,}://((?:[A-Za-z0-9_-]|\\?\.)+)")  # the dot of a regular expression too
# pip's options for another registry, on a command line, in a file of requirements or in the environment
REGISTRY = re.compile(
    r"(?:--(?:extra-)?index-url|--find-links|--trusted-host|PIP_(?:EXTRA_)?INDEX_URL)[=: ]+(\w+://\S+|/\S+|\S+\.\w+)"
)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

LARGE = 1_000_000  # bytes; git keeps every version of a file for ever
# what may be larger, and how large it may become
LARGE_FILES = {
    "vitlib/weights/pretrained/cifar100-small.safetensors": 7_000_000,  # the shipped encoder
    "notebooks/01_patching.ipynb": 3_000_000,  # its figures
}
ALL_TOGETHER = 20_000_000


def texts_of(data: bytes, suffix: str) -> list[str]:
    """What to search of a file: its text, or every byte as a character; of a notebook the bytes of its pictures too."""
    texts = [data.decode("utf-8", "surrogateescape")]
    if suffix == ".ipynb":
        pictures = re.findall(r'"image/(?:png|jpeg)": "([^"]+)"', texts[0])
        texts += [base64.b64decode(picture.replace("\\n", "")).decode("latin-1") for picture in pictures]
    return texts


def traces_in(data: bytes, suffix: str = "") -> list[str]:
    """What is in a file that should not be there: secrets, paths of one machine, hosts that others cannot reach."""
    found = []
    for text in texts_of(data, suffix):
        found += [f"{name}: {hit[:12]}..." for name, pattern in SECRETS.items() for hit in re.findall(pattern, text)]
        found += [f"a path of one machine: {path}" for path in MACHINE_PATH.findall(text) if not path.endswith("ada")]
        found += [f"a path of one machine: {ROOT}"] * (len(ROOT.parts) > 2 and str(ROOT) in text)
        hosts = {host.replace("\\", "").strip(".") for host in URL.findall(text)}
        found += [f"{host} is not in HOSTS" for host in hosts - HOSTS if not host.isupper()]
        found += [f"a registry: {index}" for index in REGISTRY.findall(text) if CPU_INDEX not in index]
    return found


def test_git_says_which_files_there_are():
    names = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert {"README.md", "CONTRIBUTING.md", "notebooks/01_patching.ipynb"} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_secret_no_path_of_one_machine_and_no_host_that_others_cannot_reach(path):
    """A new host that everybody can reach belongs into HOSTS."""
    assert traces_in(path.read_bytes(), path.suffix) == []


def joined(*parts):
    """Written apart, so that the samples are not found in this file."""
    return "".join(parts)


@pytest.mark.parametrize(
    "text",
    [
        joined("-----BEGIN RSA ", "PRIVATE KEY-----"),
        joined("AKIA", "ABCDEFGHIJKLMNOP"),
        joined("token: ghp", "_", "a1" * 18),
        joined("github", "_pat_", "A1b2" * 8),
        joined("glpat", "-", "a1B2" * 5),
        joined("hf", "_", "aB1" * 11),
        joined("pypi", "-AgEIcHlwaS5vcmc", "a" * 20),
        joined("xox", "b-123456789012-abc"),
        joined("AIza", "a1B2c" * 7),
        joined("sk", "-ant-api-", "a1B2" * 6),
        joined("eyJhbGciOiJIUzI1NiJ9.", "eyJzdWIiOiIxMjM0NTY3ODkwIn0.", "abcdefghijkl"),
        joined("https:/", "/ada:lovelace@github.com/a/b"),
        joined("API_KEY = ", "'abcdefgh12345'"),
        joined('"password": ', '"correct-horse"'),
        joined("http://127.0.0.1:8888/lab?", "token=", "0a1b" * 12),
        joined("/home", "/eve/vit"),
        joined("/Users", "/eve/vit"),
        joined("open('/", "work/main/x')"),
        joined("/t", "mp/tmpab12/x.png"),
        joined("/ro", "ot/.cache"),
        joined("C:", "\\Users\\eve"),
        joined("C:", "\\\\Users\\\\eve"),
        joined("https://", "registry.corp/simple"),
        joined("http://", "10.0.0.8:8080/"),
        joined("pip install --index", "-url https://pypi.org/simple"),
        joined("PIP_EXTRA", "_INDEX_URL=file:///wheels"),
        joined("--trusted", "-host pypi.corp"),
        str(ROOT),
    ],
)
def test_a_trace_is_found_in_text_in_bytes_and_in_a_picture_of_a_notebook(text):
    assert traces_in(f"before\n{text}\nafter".encode())
    assert traces_in(b"\x89PNG\xff\x00" + f" {text} ".encode() + b"\xfe\x00")
    picture = base64.b64encode(b"\x89PNG\xff\x00" + f" {text} ".encode()).decode()
    assert traces_in(f'{{"image/png": "{picture}\\n"}}'.encode(), ".ipynb")


@pytest.mark.parametrize(
    "text",
    [
        "/home/ada/runs",  # the tests' own person
        joined("notebooks/work/x and src/home/x and {here}/", "tmp/x"),
        "git@github.com:ada/vit.git",
        "token = tokens[0]",
        "password: str",
        "tokens: 'cls' and more",
        "https://github.com/OWNER/vit-course",
        f"PIP_EXTRA_INDEX_URL={CPU_INDEX}",
        "the trap:\\n",
    ],
)
def test_what_only_looks_like_a_trace_is_none(text):
    assert traces_in(text.encode()) == []


def test_large_files_are_known_and_everything_together_stays_small():
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in FILES}
    for name, size in sizes.items():
        limit = LARGE_FILES.get(name, LARGE)
        assert size <= limit, f"{name} has {size:,} bytes, more than {limit:,}: make it smaller, or list it above"
    assert [name for name in LARGE_FILES if sizes.get(name, 0) <= LARGE] == [], "listed, but not large"
    assert sum(sizes.values()) <= ALL_TOGETHER


def prose_of(path: Path) -> str:
    """A page's Markdown; of a notebook that of its cells, without what they attach."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def links_of(text: str) -> list[str]:
    """Every target of a link or an image: Markdown's, Markdown's by reference, and those of HTML."""
    text = outside_code(text)
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    references = re.findall(r"^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?\s*$", text, re.MULTILINE)
    return [html.unescape(link) for link in inline + references + re.findall(r"\b(?:src|href)=[\"']([^\"']+)", text)]


def anchors_of(path: Path) -> set[str]:
    """The anchors of a page's headings: GitHub's, and for a notebook JupyterLab's too; and those that HTML sets."""
    text = outside_blocks(prose_of(path))
    anchors = set(re.findall(r"\b(?:id|name)=[\"']([^\"']+)", text))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        copies = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in anchors)
        anchors.add(f"{slug}-{copies}" if copies else slug)
        if path.suffix == ".ipynb":
            anchors.add(plain.replace(" ", "-"))
    return anchors


def broken_links(path: Path) -> list[str]:
    """The links of a page to files and to headings that are not there."""
    broken = []
    for link in links_of(prose_of(path)):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
        if OPTIONAL in (target, *target.parents) and not OPTIONAL.exists():
            continue
        has_headings = target.suffix in (".md", ".ipynb")
        if not target.exists() or (
            parts.fragment and has_headings and unquote(parts.fragment) not in anchors_of(target)
        ):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_to_a_file_or_a_heading_of_the_repository_leads_there(path):
    assert broken_links(path) == []


def test_there_are_links_to_check_and_broken_ones_are_found(tmp_path):
    assert len([link for path in PAGES for link in links_of(prose_of(path)) if not urlsplit(link).scheme]) > 100
    page = tmp_path / "page.md"
    page.write_text(
        "# A `code` heading\n\n# A `code` heading\n\n[a](#a-code-heading) [b](#a-code-heading-1) "
        "[c](#absent) [d](absent.md) ![e](absent.png) <img src='absent.gif'> [f][g] [h](https://github.com)\n\n"
        "```\n[no](link.md)\n```\n\n`[no](link.md)`\n\n[g]: absent.txt\n"
    )
    assert set(broken_links(page)) == {"#absent", "absent.md", "absent.png", "absent.gif", "absent.txt"}


def test_readme_leads_to_the_pages_for_those_who_change_the_course():
    assert {"CONTRIBUTING.md", "docs/licences.md", "docs/teaching.md"} <= set(links_of(prose_of(ROOT / "README.md")))


LICENCES = runpy.run_path(str(ROOT / "docs" / "licences.py"))
# free licences, none of which asks that a course under MIT and CC BY 4.0 be under it too
FREE = re.compile(
    r"(?:Apache(?:-2\.0| 2\.0 License| Software License)( WITH LLVM-exception)?|0?BSD(?:[- ][23]-Clause)?( License)?"
    r"|MIT(?:-CMU| License)?|MPL-2\.0|BSL-1\.0|Zlib|CC0-1\.0|ISC|Python Software Foundation License|PSF-2\.0)"
)


def test_the_licences_are_those_of_all_pinned_packages():
    """``python docs/licences.py`` writes the page anew."""
    text = LICENCES["PAGE"].read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w\S*) \| (\d\S* \| .+) \|$", text, re.MULTILINE))
    pins = LICENCES["pins"]()
    here = {name for name in pins if name != "jupyter-repo2docker" or sys.platform != "win32"}
    installed = {name for name in here if distribution(name).version.split("+")[0] == pins[name]}
    assert list(rows) == sorted(pins, key=str.lower)
    assert {name: rows[name].split(" | ")[0] for name in pins} == pins
    assert {name: rows[name] for name in installed} == {
        name: f"{pins[name]} | {LICENCES['licence'](name)}" for name in installed
    }
    assert text.startswith(LICENCES["TOP"])
    for name in pins:
        for part in re.split(r" AND |, ", rows[name].split(" | ")[1]):
            assert FREE.fullmatch(part), f"{name}: {part} is not in FREE; read it before the course depends on it"


def test_a_package_that_is_not_installed_is_told_in_one_line(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "requirements.txt").write_text("no-such-package==1.0\n")
    (tmp_path / "docs" / "licences.py").write_text((ROOT / "docs" / "licences.py").read_text())
    said = subprocess.run([sys.executable, tmp_path / "docs" / "licences.py"], capture_output=True, text=True)
    assert said.returncode == 1
    assert said.stderr == "no-such-package is not installed; run make course first, and then this with .venv.\n"
    assert not (tmp_path / "docs" / "licences.md").exists()
