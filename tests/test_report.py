"""The report of a sweep has every run, compares those that are ok, stands by itself and runs nothing."""

import itertools
import re
from html.parser import HTMLParser

import pytest

from vitlib.course import report

HOSTILE = "</td></table><script>alert(1)</script><img src=x onerror='alert(\"2\")'>&amp;$\\frac$"


def sweep(figures=lambda **_: {"top1": 0.5}, **grid) -> dict:
    """results.json of a grid; ``figures`` says what a run with these parameters has recorded."""
    about = {"status": "ok", "error": None, "seconds": 12.34, "peak_memory_bytes": 7, "host": "alpha", "attempts": 1}
    about |= {"started": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.13.0"}}
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    runs = [
        {"run": f"r{number}", "key": f"k{number}", "parameters": {"preset": "mini", **given}}
        | {"figures": figures(**given), **about}
        for number, given in enumerate(combinations)
    ]
    head = {"command": "python -m vitlib sweep a.ipynb", "notebook": "a", "notebook_sha256": "0" * 64}
    return {**head, "vitlib": "0.1.0", "varied": list(grid), "runs": runs}


def recorded(patch_size, position, seed) -> dict:
    top1 = 0.8 - patch_size / 20 - 0.1 * (not position) + seed / 50
    return {"top1": top1, "chance": 0.01, "loss": 2 + patch_size, "winner": "ours", "seed": seed}


GRID = {"patch_size": [4, 8], "position": [True, False], "seed": [0, 1]}


def written(results, tmp_path) -> str:
    report.write_report(results, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def tags(page: str) -> list[tuple[str, dict]]:
    found, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(page)
    return found


def test_a_report_compares_means_and_lists_all_runs(tmp_path):
    results = sweep(recorded, **GRID)
    results["runs"][7] |= {"status": "failed", "error": "no luck"}
    page = written(results, tmp_path)
    assert "top1 is highest with patch_size=4, position=True: 61.0 % (60.0 to 62.0); it is lowest with" in page
    assert page.count("data:image/png;base64,") == 2 * 3, "a figure for each parameter and metric"
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)]
    means, runs, same = rows[1:5], rows[5:14], rows[14:]
    assert [row[1] for row in means] == [
        "61.0 % (60.0 to 62.0)", "51.0 % (50.0 to 52.0)", "41.0 % (40.0 to 42.0)", "30.0 %"
    ]  # fmt: skip
    assert runs[0] == ["run", "status", "patch_size", "position", "seed", "top1", "loss", "figure_seed", "error"]
    assert runs[1] == ["r0", "ok", "4", "True", "0", "0.6", "6", "0", "–"]
    assert [row[0] for row in runs[1:]] == [f"r{number}" for number in range(8)] and runs[-1][-1] == "no luck"
    assert ["preset", "mini"] in same and "8 runs: 7 ok, 1 failed; together they ran for 99 seconds." in page


@pytest.mark.filterwarnings("error", "ignore:Glyph")
def test_foreign_text_in_a_report_means_nothing(tmp_path):
    plain = sweep(lambda source, seed: {"top1": seed / 4}, source=["a", "b"], seed=[0, 1])
    results = sweep(
        lambda seed, **_: {"top1": seed / 4, HOSTILE: HOSTILE}, **{HOSTILE: [HOSTILE, "猫 \x00"], "seed": [0, 1]}
    )
    results |= {"command": f"{HOSTILE} \ud800", "notebook": HOSTILE, "vitlib": HOSTILE}
    results["runs"][0] |= {"run": HOSTILE, "error": HOSTILE, "host": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    found = tags(written(results, tmp_path))
    assert {tag for tag, _ in found} == {tag for tag, _ in tags(written(plain, tmp_path))}
    assert not {"script", "link", "a", "iframe", "form"} & {tag for tag, _ in found}
    assert not [name for _, attributes in found for name in attributes if name.startswith("on") or name == "href"]


@pytest.mark.parametrize("figures", [{}, {"winner": "ours"}, {"top1": None}, {"top1": "nan"}], ids=str)
def test_without_a_number_nothing_is_compared(tmp_path, figures):
    page = written(sweep(lambda **_: figures, patch_size=[4, 8]), tmp_path)
    assert "No run that is ok has recorded a number, so there is nothing to compare." in page and "<img" not in page


def test_reports_of_one_run_or_none_are_written(tmp_path):
    for grid in ({"seed": [0]}, {}):  # a notebook may have no seed
        assert "top1: 50.0 % with all runs." in written(sweep(**grid), tmp_path)
    assert "0 runs: " in written({**sweep(seed=[0]), "runs": []}, tmp_path)
    failed = sweep(seed=[0, 1])
    for run in failed["runs"]:
        run |= {"status": "failed", "figures": {}, "error": "the kernel died", "seconds": None}
    assert written(failed, tmp_path).count("the kernel died") >= 1


def test_a_figure_has_lines_of_means_with_bands():
    ax = report.draw_metric(sweep(recorded, **GRID), "top1", "patch_size").axes[0]
    on, off, chance = ax.lines
    for line, means in ((on, [0.61, 0.41]), (off, [0.51, 0.31])):
        assert list(line.get_xdata()) == [4, 8] and list(line.get_ydata()) == pytest.approx(means)
    assert [line.get_label() for line in (on, off)] == ["position=True", "position=False"]
    assert ax.collections[0].get_datalim(ax.transData).intervaly == pytest.approx([0.4, 0.62])
    assert set(chance.get_ydata()) == {0.01} and ax.get_ylim()[0] == 0


@pytest.mark.parametrize(
    ("values", "scale", "ticks"),
    [
        ([16, 2, 4], "linear", ["2", "4", "16"]),  # eightfold and no more
        ([0, 1, 100], "linear", ["0", "1", "100"]),
        ([20, 2000, 200], "log", ["20", "200", "2,000"]),
        ([None, 8], "linear", ["None", "8"]),
        ([True, False], "linear", ["True", "False"]),
        ([[1], [0]], "linear", ["[1]", "[0]"]),
        ([4], "linear", ["4"]),
    ],
)
def test_a_figure_spaces_numbers_as_numbers(values, scale, ticks):
    ax = report.draw_metric(sweep(lambda **_: {"loss": 1.0}, size=values), "loss", "size").axes[0]
    assert ax.get_xscale() == scale and [tick.get_text() for tick in ax.get_xticklabels()] == ticks


def test_a_figure_averages_more_lines_than_one_can_read():
    results = sweep(lambda size, shift: {"top1": shift / 10}, size=[4, 8], shift=list(range(report.MOST_LINES + 1)))
    (line,) = report.draw_metric(results, "top1", "size").axes[0].lines
    assert list(line.get_ydata()) == pytest.approx([0.4, 0.4])


def test_a_figure_has_one_line_for_zipped_parameters():
    results = sweep(lambda size, **_: {"top1": 0.5 if size == 4 else None}, size=[4, 8], preset=["a", "b"])
    results["runs"] = [results["runs"][0], results["runs"][3]]
    (line,) = report.draw_metric(results, "top1", "size").axes[0].lines
    assert list(line.get_xdata()) == [4], "a run without a number is left out"
