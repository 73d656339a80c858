"""CONTRIBUTING.md names what there is, and what it says of chapters and data sets holds for those that are here."""

import re

import pytest
from prose import outside_blocks, words_after
from test_lessons import CHAPTERS

from tools.address import ROOT, repository
from vitlib.data.cifar import CIFAIR_MD5
from vitlib.data.images import SOURCES
from vitlib.data.shapes import DEFAULT_COUNTS

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SPANS = re.findall(r"`([^`\n]+)`", outside_blocks(TEXT))
README = (ROOT / "README.md").read_text(encoding="utf-8")
NEW = re.compile(r"NAME|NN|07")  # in the name of a file that whoever follows a recipe writes


def test_every_file_and_folder_that_is_named_exists():
    tops = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.name[0] != "." and path.name != "runs")
    words = [word.rstrip(":") for span in SPANS for word in span.split()]
    places = [
        word for word in words if re.match(rf"(?:{tops})/|[\w-]+\.(?:md|txt|toml)$", word) and not NEW.search(word)
    ]
    known = [ROOT, ROOT / "vitlib", ROOT / "notebooks" / "parameters"]  # model.py and smoke.yaml, too
    assert len(places) > 40
    assert not [word for word in places if not any(next(folder.glob(word), None) for folder in known)]


def test_every_test_that_is_named_exists():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    names = {span for span in SPANS if re.fullmatch(r"test_\w+", span)}
    assert len(names) > 12
    assert not [name for name in names if f"def {name}(" not in tests]


@pytest.mark.parametrize("words", list(words_after("make", SPANS)), ids=" ".join)
def test_every_make_target_that_is_named_exists(words):
    assert re.search(rf"^{re.escape(words[0])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_what_ci_asks_for_is_what_make_test_does():
    recipe = re.search(r"^test:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    (smoke,) = re.findall(r"-m (vitlib run .*)", recipe)
    (options,) = re.findall(r"-m pytest tests notebooks (.*)", recipe)
    assert f"`python -m {smoke}`" in TEXT
    assert f"`python -m pytest notebooks {options}`" in TEXT


def test_every_chapter_has_its_row_in_readme_with_its_links():
    for path in CHAPTERS:
        number = path.stem[:2]
        (row,) = re.findall(rf"^\| \[{number} .+\]\(notebooks/{path.name}\) \|.*", README, re.MULTILINE)
        assert f"[b{number}]" in row and f"[c{number}]" in row
        for letter, place in (("b", f"gh/{repository()}/main?urlpath=lab/tree/"), ("c", f"{repository()}/blob/main/")):
            assert re.search(
                rf"^\[{letter}{number}\]: https://\S+{re.escape(f'{place}notebooks/{path.name}')}$",
                README,
                re.MULTILINE,
            )
    assert len(re.findall(r"^\| \[\d\d .+\]\(notebooks/", README, re.MULTILINE)) == len(CHAPTERS)


def test_every_named_source_has_somebody_who_loads_it():
    """``load_images`` hands every name that is no drawn one to CIFAR's loader, which takes any name for CIFAR-10. A
    source with a loader of its own is one more set here."""
    assert set(SOURCES) == {*DEFAULT_COUNTS, *CIFAIR_MD5, "cifar100", "cifar10"}
