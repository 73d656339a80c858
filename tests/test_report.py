"""The report of a sweep: it holds every run, compares those that are ok, stands by itself and runs nothing."""

import base64
import itertools
from html.parser import HTMLParser

import pytest

from vitlib import plots
from vitlib.course import report
from vitlib.spread import sweep_summary

HOSTILE = "</td></table><script>alert(1)</script><img src=x onerror='alert(\"2\")'>&amp;$\\frac$"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a browser makes of a report: its elements, and the texts of its tables by row and cell."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.open, self.tables, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)

    def elements(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def table(self, first: str) -> list[dict[str, str]]:
        """The rows of the table whose first heading is ``first``."""
        (found,) = [rows for rows in self.tables if rows and rows[0][0] == first]
        return [dict(zip(found[0], row, strict=True)) for row in found[1:]]


def run(label: str, figures: dict, parameters: dict, **other) -> dict:
    return {
        "run": label, "key": f"key-{label}", "status": "ok", "error": None, "parameters": parameters,
        "figures": figures, "seconds": 12.34, "peak_memory_bytes": 700 * 2**20, "host": "alpha",
        "seed": parameters.get("seed"), "started": "2026-01-02T03:04:05+00:00", "attempts": 1,
        "versions": {"torch": "2.13.0"}, **other,
    }  # fmt: skip


def sweep(figures=lambda **_: {"top1": 0.5}, **grid) -> dict:
    """results.json of a grid; ``figures`` says what a run with these parameters has recorded."""
    runs = [
        run(f"r{number:03d}", figures(**given), {"preset": "mini", **given, "run_dir": f"here/{number}"})
        for number, given in enumerate(
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        )
    ]
    return {
        "command": "python -m vitlib sweep a.ipynb", "notebook": "a.ipynb", "notebook_sha256": "0" * 64,
        "vitlib": "0.1.0", "varied": list(grid), "runs": runs,
    }  # fmt: skip


def recorded(patch_size, position, seed) -> dict:
    top1 = 0.8 - patch_size / 20 - 0.1 * (not position) + seed / 50
    return {
        "chance": 0.01,
        "top1": top1,
        "loss": 2 + patch_size,
        "winner": "ours",
        "steps": 100 * patch_size,
        "more": seed,
    }


GRID = {"patch_size": [4, 8], "position": [True, False], "seed": [0, 1]}


@pytest.fixture
def page(tmp_path):
    """``page(results)`` is what the report of these results says."""

    def write(results: dict) -> Page:
        report.write_report(results, tmp_path / "report.html")
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return write


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, as (figure, axis); the drawing itself, which takes time, is left out."""
    calls = []

    def note(runs, figure, axis, **_):
        calls.append((figure, axis))

    monkeypatch.setattr(plots, "sweep", note)
    monkeypatch.setattr(report, "_as_address", lambda figure: "data:,")
    return calls


def test_a_report_stands_by_itself_and_lets_nothing_run(page):
    said = page(sweep(recorded, **GRID))
    assert not {"script", "link", "a", "iframe", "object", "form"} & {tag for tag, _ in said.tags}
    assert not [name for _, attributes in said.tags for name in attributes if name.startswith("on") or name == "href"]
    for image in said.elements("img"):
        start, data = image["src"].split(",", 1)
        assert start == "data:image/png;base64" and base64.b64decode(data)[1:4] == b"PNG"
    (policy,) = [meta["content"] for meta in said.elements("meta") if meta.get("http-equiv")]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "url(" not in report.STYLE and "@import" not in report.STYLE


def test_a_figure_per_varied_parameter_and_metric_says_in_words_what_it_shows(page, drawn):
    results = sweep(recorded, **GRID)
    said = page(results)
    # chance is the same everywhere, and no more than two metrics stand beside the main one
    metrics = ("top1", "loss", "steps")
    assert drawn == [(metric, axis) for axis in ("patch_size", "position") for metric in metrics]
    words = [image["alt"] for image in said.elements("img")]
    assert words[0] == sweep_summary(results["runs"], "top1", ["patch_size"]) and len(set(words)) == 6
    assert set(words) <= set(said.texts), "the same words stand under the figure"
    assert sweep_summary(results["runs"], "top1") in said.texts
    wide, narrow = (int(said.elements("img")[n]["width"]) for n in (0, 1))
    assert wide > narrow


def test_where_the_seed_alone_varies_every_run_is_drawn(page, drawn):
    page(sweep(lambda seed: {"top1": seed / 10, "loss": 2.0}, seed=[0, 1]))
    assert drawn == [("top1", "seed")]


def test_the_means_are_those_of_the_runs_that_differ_in_the_seed_alone(page, drawn):
    rows = page(sweep(recorded, **GRID)).table("patch_size")
    assert [(row["patch_size"], row["position"], row["runs"]) for row in rows] == [
        ("4", "True", "2"), ("4", "False", "2"), ("8", "True", "2"), ("8", "False", "2"),
    ]  # fmt: skip
    assert rows[0]["top1"] == "61.0 % (60.0 to 62.0)" and rows[3]["loss"] == "10" and rows[1]["chance"] == "1.0 %"
    assert set(rows[0]) == {"patch_size", "position", "runs", "chance", "top1", "loss"}


def test_all_runs_are_listed_with_what_varies_and_what_came_out(page, drawn):
    rows = page(sweep(recorded, **GRID)).table("status")
    assert [row["run"] for row in rows] == [f"r{number:03d}" for number in range(8)]
    assert rows[5] == {
        "status": "ok", "patch_size": "8", "position": "True", "seed": "1", "chance": "1.0 %",
        "top1": "42.0 %", "loss": "10", "winner": "ours", "seconds": "12.3", "peak memory": "700 MiB", "run": "r005",
    }  # fmt: skip


def test_failures_are_listed_and_do_not_count(page, drawn):
    results = sweep(recorded, **GRID)
    results["runs"][0] |= {"status": "failed", "error": 'In [3] "1 / 0": ZeroDivisionError', "attempts": 3}
    results["runs"][1] |= {
        "status": "not run", "error": "interrupted", "figures": {}, "seconds": None, "peak_memory_bytes": None,
        "host": None, "started": None, "versions": {}, "attempts": 0,
    }  # fmt: skip
    results["runs"][2] |= {"host": "beta", "left_out": ["all.bin", "more.bin"]}
    said = page(results)
    failed, missing, other = said.table("status")[:3]
    assert (failed["status"], failed["error"], failed["attempts"]) == (
        "failed",
        'In [3] "1 / 0": ZeroDivisionError',
        "3",
    )
    assert failed["top1"] == "60.0 %", "what it had recorded before"
    assert (missing["status"], missing["seconds"], missing["top1"], missing["host"]) == ("not run", "–", "–", "–")
    assert (other["status"], other["error"], other["host"]) == ("ok", "", "beta")
    assert (other["files too large to send"], failed["files too large to send"]) == ("all.bin, more.bin", "")
    first = said.table("patch_size")[0]
    assert (first["runs"], first["top1"]) == ("0", "–")
    assert "patch_size=4, position=True" not in " ".join(said.texts)
    assert said.texts[2].startswith("8 runs, 1 failed, 1 not run, 6 ok; together they ran for 86 seconds")


def test_how_it_was_made(page, drawn):
    results = sweep(recorded, **GRID)
    results["runs"][0] |= {"host": "beta", "versions": {"torch": "2.12.0"}, "started": "2026-01-01T00:00:00+00:00"}
    said = page(results)
    assert results["command"] in said.texts
    facts = dict(said.tables[-1])
    assert facts["notebook"] == f"a.ipynb, SHA-256 {'0' * 64}" and facts["vitlib"] == "0.1.0"
    assert facts["versions"] == "torch 2.12.0 (1 run); torch 2.13.0 (7 runs)"
    assert facts["hosts"] == "beta (1 run); alpha (7 runs)"
    assert facts["first run begun"] == "2026-01-01T00:00:00+00:00"


def test_where_a_run_ran_is_no_difference_between_runs(page, drawn):
    said = page(sweep(recorded, **GRID))
    assert "run_dir" not in said.table("status")[0] and "here/" not in " ".join(said.texts)


@pytest.mark.filterwarnings("error")
def test_foreign_text_is_shown_as_it_is_and_means_nothing(page):
    plain = page(sweep(lambda source, seed: {"top1": seed / 4}, source=["a", "b"], seed=[0, 1]))
    results = sweep(
        lambda seed, **_: {"top1": seed / 4, HOSTILE: HOSTILE}, **{HOSTILE: [HOSTILE, "猫 \ud800 \x00"], "seed": [0, 1]}
    )
    results |= {"command": HOSTILE, "notebook": HOSTILE, "notebook_sha256": HOSTILE, "vitlib": HOSTILE}
    results["runs"][0] |= {
        "run": HOSTILE, "status": HOSTILE, "error": HOSTILE, "host": HOSTILE, "started": HOSTILE,
        "versions": {HOSTILE: HOSTILE},
    }  # fmt: skip
    results["runs"][1]["error"] = "a file named \ud800"
    said = page(results)
    assert said.table("status")[1]["error"] == "a file named ?"
    assert {tag for tag, _ in said.tags} == {tag for tag, _ in plain.tags}
    assert len(said.elements("img")) == len(plain.elements("img")) == 1
    assert not [name for _, attributes in said.tags for name in attributes if name.startswith("on")]
    row = said.table("status")[0]
    assert row["run"] == row["status"] == row["error"] == row["host"] == row[HOSTILE] == HOSTILE
    assert said.texts.count(HOSTILE) == 1 and f"Sweep of {HOSTILE}" in said.texts  # the command; title and heading


@pytest.mark.parametrize(
    "figures",
    [lambda **_: {}, lambda **_: {"winner": "ours"}, lambda **_: {"top1": None}, lambda **_: {"top1": float("nan")}],
    ids=["none", "text", "null", "nan"],
)
def test_without_a_number_nothing_is_compared(page, drawn, figures):
    said = page(sweep(figures, patch_size=[4, 8], seed=[0, 1]))
    assert drawn == [] and len(said.table("status")) == 4 and len(said.tables) == 2
    assert "No run that is ok has recorded a number, so there is nothing to compare." in said.texts


def test_with_no_run_that_is_ok_the_failures_are_there(page, drawn):
    results = sweep(recorded, **GRID)
    for one in results["runs"]:
        one |= {"status": "failed", "error": "the kernel died"}
    said = page(results)
    assert drawn == [] and {row["error"] for row in said.table("status")} == {"the kernel died"}


def test_an_empty_sweep_has_a_report_too(page):
    said = page({**sweep(recorded, **GRID), "runs": []})
    assert said.table("status") == [] and "0 runs. The same rows are in results.csv and results.json." in said.texts


def test_one_run_is_shown_as_it_is(page):
    said = page(sweep(lambda: {"top1": 0.5}))
    (image,) = said.elements("img")
    assert image["alt"] == "top1 is 50.0 % in one run." and len(said.table("status")) == 1


def test_figures_that_only_some_runs_have_are_compared_among_these(page):
    said = page(
        sweep(
            lambda size, seed: {"top1": 0.1 * size} if seed else {"loss": "nan", "top1": None}, size=[1, 2], seed=[0, 1]
        )
    )
    assert [row["top1"] for row in said.table("size")] == ["10.0 %", "20.0 %"]
    assert [row["runs"] for row in said.table("size")] == ["1", "1"]
    assert [row["top1"] for row in said.table("status")] == ["–", "10.0 %", "–", "20.0 %"]


def test_a_report_of_200_runs_has_them_all(page):
    results = sweep(recorded, patch_size=[2, 4, 8, 16, 32], position=[True, False], seed=list(range(20)))
    said = page(results)
    assert [row["run"] for row in said.table("status")] == [run["run"] for run in results["runs"]]
    assert len(said.table("patch_size")) == 10 and {row["runs"] for row in said.table("patch_size")} == {"20"}


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, drawn):
    path = tmp_path / "report.html"
    path.write_text("the old one")
    with pytest.raises(KeyError):
        report.write_report({**sweep(recorded, **GRID), "runs": [{}]}, path)
    assert path.read_text() == "the old one" and list(tmp_path.iterdir()) == [path]
