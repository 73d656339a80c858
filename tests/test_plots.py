"""The figures of the course draw the data that they are given, and can be read by everybody."""

import runpy
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from vitlib import plots
from vitlib.costs import costs, preset_config

IMAGES = torch.randint(256, (5, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
MAPS = torch.rand(5, 3, 3, generator=torch.Generator().manual_seed(0))
B16 = preset_config("B/16", 1000, drop=0)

FIGURES = {  # each kind, with arguments that make it draw all it can
    "image_grid": lambda: plots.image_grid(
        [*IMAGES, *MAPS], list("abcde"), columns=5, title="maps", rows=["image", "map"], frames={0: (0, 4, 4)}
    ),
    "patch_grid": lambda: plots.patch_grid(IMAGES[0], 4),
    "heatmap": lambda: plots.heatmap(torch.rand(9, 9), list("abcdefghi"), ["a long name"] * 9, title="numbers"),
    "heatmap in colours": lambda: plots.heatmap(torch.randn(30, 30), title="colours", label="value", cuts=[10]),
    "heatmap of tiles": lambda: plots.heatmap(torch.rand(3, 3, 3, 3), range(3), range(3), title="tiles"),
    "lines": lambda: plots.lines(
        [1, 2, 3], {"a": [1, 4, 9], "b": [3, 2]}, "epoch", "loss", "a walk", reference={"chance": 0.5}, read_at=2
    ),
    "dots": lambda: plots.dots(
        {"ours": [0.5, 0.6], "theirs": [0.3]}, "accuracy", "arms", reference={"chance": 0.1}, percent=True
    ),
    "cost_bars": lambda: plots.cost_bars({"224": costs(B16), "448": costs({**B16, "image_size": 448})}, "B/16"),
}  # fmt: skip


def shown_texts(figure: Figure) -> list[Text]:
    figure.draw_without_rendering()
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def words(figure: Figure) -> set[str]:
    return {text.get_text() for text in shown_texts(figure)}


def drawn(ax, number: int = 0) -> np.ndarray:
    return np.asarray(ax.images[number].get_array())


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_a_title_fits_the_page_and_is_legible(name):
    before = dict(plt.rcParams)
    figure = FIGURES[name]()
    assert dict(plt.rcParams) == before and plt.get_fignums() == [], "nothing is left behind"
    assert figure.get_suptitle() or any(ax.get_title() for ax in figure.axes)
    assert figure.get_figwidth() <= plots.WIDEST, "the page would make it smaller"
    on_screen = figure.dpi / 96  # a screen has 96 pixels to the inch
    assert not [text.get_text() for text in shown_texts(figure) if text.get_fontsize() * on_screen < 10]
    drawn, page = figure.get_tightbbox(), figure.bbox_inches.padded(0.02)
    assert page.contains(*drawn.p0) and page.contains(*drawn.p1), "a word leaves the figure"


def test_a_figure_is_shown_with_its_alternative_text():
    shown = []
    with mock.patch("IPython.display.display", lambda *given, **named: shown.append((given, named))):
        assert plots.show(FIGURES["lines"](), "Two curves that cross.") is None
    ((picture,), named) = shown.pop()
    assert picture["image/png"].startswith(b"\x89PNG") and picture["text/plain"] == "Two curves that cross."
    assert named["metadata"] == {"image/png": {"alt": "Two curves that cross."}}


def test_pictures_and_maps_stand_under_their_titles():
    frames = {1: (4, 8, 3)}
    figure = plots.image_grid([*IMAGES[:3], *MAPS[:2]], list("abcde"), columns=3, rows=["image", "map"], frames=frames)
    first, second, third, fourth, _, empty = figure.axes
    assert np.array_equal(drawn(second), IMAGES[1].permute(1, 2, 0)) and second.get_title() == "b"
    assert np.array_equal(drawn(fourth), MAPS[0]) and fourth.get_title() == "d"
    assert fourth.images[0].get_clim() == (0, pytest.approx(MAPS[0].max().item()))
    assert (first.get_ylabel(), fourth.get_ylabel()) == ("image", "map") and not empty.images
    assert not third.get_xticks().size
    (frame,) = second.patches
    assert frame.get_xy() == (7.5, 3.5) and (frame.get_width(), frame.get_height()) == (3, 3)


def test_grey_pictures_are_drawn_from_black_to_white():
    (grey,) = plots.image_grid([IMAGES[0, :1]]).axes
    assert np.array_equal(drawn(grey), IMAGES[0, 0]) and grey.images[0].get_cmap().name == "gray"
    assert grey.images[0].get_clim() == (0, 255)


def test_patches_are_numbered_and_their_cost_is_said():
    ax = plots.patch_grid(IMAGES[0], 3).axes[0]
    assert [text.get_text() for text in ax.texts] == [str(number) for number in range(16)]
    assert ax.texts[6].get_position() == (2.5 * 3 - 0.5, 1.5 * 3 - 0.5), "the third patch of the second row"
    assert "16 patches\n27 numbers per patch, N² = 256" in ax.get_title()
    assert not plots.patch_grid(torch.zeros(3, 26, 26, dtype=torch.uint8), 2).axes[0].texts, "no room"


def test_a_small_matrix_has_its_numbers_in_the_cells():
    matrix = torch.tensor([[0.0, 0.25, 1.0], [0.5, 0.75, 0.1]])
    figure = plots.heatmap(matrix, ["a", "b"], ["x", "y", "z"], numbers="{:.0%}")
    (ax,) = figure.axes
    assert np.allclose(drawn(ax), matrix) and ax.images[0].get_clim() == (0, 1)
    assert [text.get_text() for text in ax.texts] == ["0%", "25%", "100%", "50%", "75%", "10%"]
    assert {"a", "b", "x", "y", "z"} <= words(figure)
    colours = {text.get_text(): text.get_color() for text in ax.texts}
    assert (colours["0%"], colours["100%"]) == ("white", "black"), "on dark and on bright"


def test_a_large_matrix_has_a_scale_named_places_and_cuts():
    figure = plots.heatmap(torch.randn(40, 48), columns={8: "red", 24: "green"}, cuts=[16], label="value")
    ax, scale = figure.axes
    assert not ax.texts and scale.get_ylabel() == "value" and {"red", "green"} <= words(figure)
    low, high = ax.images[0].get_clim()
    assert low == -high and ax.images[0].get_cmap().name == "PuOr", "0 is white"
    assert ax.lines[0].get_xdata()[0] == 15.5
    limited = plots.heatmap(torch.randn(4, 4), limits=(-0.6, 0.6)).axes[0].images[0]
    assert limited.get_clim() == (-0.6, 0.6) and limited.get_cmap().name == "viridis"


def test_tiles_stand_where_their_patch_stands():
    similarity = torch.rand(2, 2, 3, 3)
    ax = plots.heatmap(similarity, range(2), range(2)).axes[0]
    mosaic = drawn(ax)
    assert mosaic.shape == (7, 7)
    assert np.allclose(mosaic[4:, :3], similarity[1, 0]) and np.isnan(mosaic[3]).all(), "a gap between tiles"
    assert ax.get_xticks().tolist() == [1, 5]


def test_lines_draw_every_curve_by_name():
    look = {"reference": {"chance": 0.5}, "ylim": (0, 10)}
    ax = plots.lines([1, 2, 3], {"a": [1, 4, 9], "b": [3, 2]}, "time", "place", **look).axes[0]
    first, second, reference = ax.lines
    assert first.get_xydata().tolist() == [[1, 1], [2, 4], [3, 9]]
    assert second.get_xydata().tolist() == [[1, 3], [2, 2]], "a shorter curve ends earlier"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert first.get_linestyle() != second.get_linestyle(), "told apart without colours"
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_ylim()) == ("time", "place", (0, 10))
    assert set(reference.get_ydata()) == {0.5} and "chance" in words(ax.figure)
    ax = plots.lines({"a": [1, 2], "b": [5, 6]}, {"a": [0, 1], "b": [2, 3]}, "x", "y").axes[0]
    assert [line.get_xdata().tolist() for line in ax.lines] == [[1, 2], [5, 6]], "places of their own"


def test_several_runs_are_dots_around_their_mean():
    ax = plots.lines([10, 100], {"a": [[0.1, 0.3], [0.5, 0.6]]}, "images", "top-1", percent=True, xscale="log").axes[0]
    mean, *runs = ax.lines
    assert mean.get_ydata().tolist() == pytest.approx([0.2, 0.55])
    assert [run.get_ydata().tolist() for run in runs] == [[0.1, 0.5], [0.3, 0.6]]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["10", "100"]
    assert "50%" in words(ax.figure)


def test_a_reading_says_where_each_curve_is():
    figure = plots.lines([1, 2, 3], {"a": [1, 4, 9], "b": [3, 2]}, "epoch", "loss", read_at=3)
    (legend,) = (ax.get_legend() for ax in figure.axes)
    assert legend.get_title().get_text() == "epoch 3"
    assert [text.get_text() for text in legend.get_texts()] == ["a: 9", "b: 2 (at 2)"]


def test_dots_show_every_run_the_mean_and_the_range():
    figure = FIGURES["dots"]()
    (ax,) = figure.axes
    runs, mean = ax.lines[:2]
    assert runs.get_xdata().tolist() == [0.5, 0.6] and set(mean.get_xdata()) == {0.55}
    assert {"ours", "theirs", "55.0% (50.0% to 60.0%)", "30.0%", "chance"} <= words(figure)
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first group on top"
    ax = plots.dots({"ViT, 2": [1], "CNN, 2": [2], "ViT, 9": [3]}, "x", kinds=["ViT", "CNN", "ViT"]).axes[0]
    vit, cnn, other = (line.get_color() for line in ax.lines[::2])
    assert vit == other != cnn, "groups of one kind share a colour"


def test_cost_bars_add_up_to_the_totals():
    counted = costs(B16)
    axes = plots.cost_bars({"B/16": counted}).axes
    for ax, parts in zip(axes, (counted.parameters, counted.forward_flops, counted.activation_bytes), strict=True):
        widths = {bars.get_label(): bars[0].get_width() for bars in ax.containers}
        assert sum(widths.values()) == parts.total and widths["MLP"] == parts.mlp
    assert {"86.6 M", "35.1 G"} <= words(axes[0].figure)
    fields = [field for names in plots.COST_PARTS.values() for field in names]
    assert sorted(fields) == sorted(vars(counted.parameters))


def test_drawings_share_a_figure_through_panels():
    left, right = plots.panels(2)
    figure = plots.lines([1, 2], {"a": [1, 2]}, "x", "y", ax=left)
    assert plots.heatmap(torch.eye(2), ax=right) is figure is left.figure
    assert left.lines and right.images and plt.get_fignums() == []


def test_the_diagrams_are_those_that_the_script_draws(tmp_path):
    folder = Path(__file__).parents[1] / "notebooks/figures"
    script = tmp_path / "diagrams.py"
    script.write_text((folder / "diagrams.py").read_text())
    runpy.run_path(str(script), run_name="__main__")
    drawn = sorted(tmp_path.glob("*.svg"))
    assert [file.name for file in drawn] == sorted(file.name for file in folder.glob("*.svg"))
    for file in drawn:
        assert file.read_text() == (folder / file.name).read_text(), file.name
        root = ElementTree.parse(file).getroot()
        assert [child.tag.rpartition("}")[2] for child in root][:2] == ["title", "desc"] and root.get("width") == "700"
