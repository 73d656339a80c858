"""The figures of the course: what is drawn is what was given, and it can be read from the back of a classroom."""

import json
import math
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
from vitlib.costs import Parts, costs, preset_config
from vitlib.training.history import History
from vitlib.weights.checkpoint import PRETRAINED

IMAGES = torch.randint(256, (5, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
HISTORY = History(
    steps=[{"step": n, "epoch": 1 + n // 5, "loss": 4 - n / 4, "learning_rate": 0.1} for n in range(1, 11)],
    epochs=[
        {"train_loss": 3.0, "train_accuracy": 0.1, "validation_loss": 2.8, "validation_accuracy": 0.2},
        {"train_loss": 2.0, "train_accuracy": 0.3, "validation_loss": 1.9, "validation_accuracy": 0.4},
    ],
)
for step in HISTORY.steps:
    step["epoch"] = 1 if step["step"] <= 5 else 2
for number, epoch in enumerate(HISTORY.epochs, start=1):
    epoch["epoch"], epoch["step"] = number, 5 * number

CURVES = {
    "long": {"accuracy": [0.1, 0.3, 0.5, 0.6], "loss": [4.0, 2.0, 2.5, 3.0], "about": "a made-up training"},
    "short": {"accuracy": [0.2, 0.7], "loss": [3.0, 1.0], "about": "another"},
}
BUDGETS = {
    "arms": {"ours": {20: [0.3, 0.5], 2000: [0.6, 0.7]}, "theirs": {20: [0.1, 0.2], 2000: [0.2, 0.4]}},
    "chance": 0.1,
    "about": "made-up trainings",
}


def grid(patch_sizes, positions, top1=lambda size, position, seed: 0.5, seeds=(0, 1)) -> list[dict]:
    """Runs of a sweep, in the order of the grid."""
    return [
        {
            "parameters": {
                "patch_size": size,
                "position": position,
                "seed": seed,
                "run_dir": f"{size}{position}{seed}",
            },
            "figures": {"top1": top1(size, position, seed), "loss": 1 + seed, "chance": 0.01, "winner": "fine-tuning"},
        }
        for size in patch_sizes
        for position in positions
        for seed in seeds
    ]


RUNS = grid([4, 8], [True, False], lambda size, position, seed: 0.8 - size / 20 - 0.1 * (not position) + seed / 50)
B16 = preset_config("B/16", 1000, drop=0)

# every public function that draws, with arguments that make it draw all it can
FIGURES = {
    "image_grid": lambda: plots.image_grid(IMAGES, ["a", "b", "c", "d", "e"], columns=3, title="images"),
    "heatmap": lambda: plots.heatmap(torch.rand(2, 2), ["a", "b"], ["c", "d"], title="a matrix"),
    "dots": lambda: plots.dots({"ours": [0.5, 0.6], "theirs": [0.3]}, "accuracy", "runs", reference={"chance": 0.1}),
    "cost_bars": lambda: plots.cost_bars({"B/16": costs(B16)}, "costs"),
    "top_classes": lambda: plots.top_classes(
        IMAGES[0], torch.tensor([0.2, 0.7, 0.1]), ["cat", "dog", "ant"], 2, "top 2"
    ),
    "patch_grid": lambda: plots.patch_grid(IMAGES[0], 4),
    "token_matrix": lambda: plots.token_matrix(torch.randn(3, 8), "tokens", ["CLS", "0", "1"]),
    "number_matrix": lambda: plots.number_matrix(torch.rand(2, 3), ["a", "b"], ["x", "y", "z"], "numbers"),
    "position_maps": lambda: plots.position_maps(torch.rand(3, 3, 3, 3), "positions"),
    "position_tile": lambda: plots.position_tile(torch.rand(3, 3, 3, 3), 1, 2, "one patch"),
    "attention_of_query": lambda: plots.attention_of_query(IMAGES[0], torch.rand(3, 3), 0.25, 6, "head 1"),
    "head_maps": lambda: plots.head_maps(torch.rand(2, 3, 4, 4), "heads"),
    "attention_distances": lambda: plots.attention_distances({"ours": torch.rand(2, 3)}, 0.5, "distances"),
    "image_maps": lambda: plots.image_maps(IMAGES, {"rollout": torch.rand(5, 3, 3)}, ["a", "b", "c", "d", "e"]),
    "deletion_curves": lambda: plots.deletion_curves([0, 0.5, 1], {"random": torch.rand(3, 9)}, "deletion"),
    "spreads": lambda: plots.spreads({"a": [0.1, 0.2, 0.4]}, 0.3, "by chance", "share (%)", "shares"),
    "lines": lambda: plots.lines([1, 2, 3], {"a": [1, 4, 9], "b": [3, 2, 1]}, "time", "place", "a walk"),
    "training_curves": lambda: plots.training_curves(HISTORY, 0.01, "a run"),
    "recorded_curves": lambda: plots.recorded_curves(CURVES, 3),
    "confusion": lambda: plots.confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), ["cat", "dog"], "errors"),
    "confident_mistakes": lambda: plots.confident_mistakes(
        IMAGES[:2], torch.tensor([1, 0]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), ["cat", "dog"], "mistakes"
    ),
    "comparison": lambda: plots.comparison({"ours": [0.5, 0.6], "theirs": [0.3, 0.3]}, 0.1, "arms"),
    "label_budget": lambda: plots.label_budget(BUDGETS, 20),
    "sweep": lambda: plots.sweep(RUNS, "top1", "patch_size", "a grid"),
    "cost_breakdown": lambda: plots.cost_breakdown(IMAGES[0], costs(B16), costs(B16), "ViT-B/16", "a model"),
}


def words(figure: Figure) -> list[str]:
    """All texts of a figure that are shown, ticks and legends included."""
    figure.draw_without_rendering()  # canvas.draw() does nothing once pyplot has closed a figure
    return [text.get_text() for text in shown_texts(figure)]


def shown_texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def test_a_figure_is_shown_with_its_alternative_text():
    shown = []
    with mock.patch("IPython.display.display", lambda *given, **named: shown.append((given, named))):
        assert plots.show(FIGURES["lines"](), "Two curves that cross.") is None
    ((picture,), named) = shown.pop()
    assert picture["image/png"].startswith(b"\x89PNG") and picture["text/plain"] == "Two curves that cross."
    assert named["metadata"] == {"image/png": {"alt": "Two curves that cross."}}


def drawn_image(ax, number: int = 0) -> np.ndarray:
    return np.asarray(ax.images[number].get_array())


def test_every_figure_of_the_module_is_tested_here():
    drawing = {name for name, value in vars(plots).items() if hasattr(value, "__wrapped__") and name[0] != "_"}
    assert drawing == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_returned_and_leaves_nothing_behind_in_pyplot(name):
    before = dict(plt.rcParams)
    assert isinstance(FIGURES[name](), Figure)
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


@pytest.mark.parametrize("name", FIGURES)
def test_every_word_has_at_least_10_points_as_it_is_shown(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    assert figure.get_figwidth() <= plots.WIDEST, "the page would make it smaller"
    on_screen = figure.dpi / 96  # a screen counts 96 pixels to the inch
    small = {text.get_text() for text in shown_texts(figure) if text.get_fontsize() * on_screen < 10}
    assert not small


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_a_title(name):
    figure = FIGURES[name]()
    titles = [ax.get_title() for ax in figure.axes] + [figure.get_suptitle()]
    assert any(titles)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("top_classes", {"probability (%)", "cat", "dog", "70%", "20%"}),
        ("token_matrix", {"feature", "token", "value", "CLS", "0", "1"}),
        ("number_matrix", {"a", "b", "x", "y", "z"}),
        ("position_maps", {"cosine similarity", "column of the patch", "row of the patch", "0", "1", "2"}),
        ("position_tile", {"cosine similarity", "column of the other patch", "row of the other patch"}),
        ("attention_of_query", {"attention weight", "query: token 6, patch 5"}),
        ("head_maps", {"layer 1", "layer 2", "head 1", "head 2", "head 3"}),
        ("attention_distances", {"layer", "mean distance (pixels)", "ours", "attention spread evenly"}),
        ("image_maps", {"image", "rollout", "a", "e"}),
        ("deletion_curves", {"patches deleted (%)", "probability of the first prediction", "random"}),
        ("spreads", {"a", "by chance", "share (%)"}),
        ("lines", {"time", "place", "a", "b"}),
        ("training_curves", {"epoch", "cross-entropy (nats)", "top-1 accuracy (%)", "validation", "chance, 1%"}),
        ("recorded_curves", {"epoch", "top-1 accuracy (%)", "cross-entropy (nats)", "long", "short", "epoch 3"}),
        ("confusion", {"predicted class", "true class", "% of the true class", "cat", "dog"}),
        ("confident_mistakes", {"mistakes", "true: dog\n88% cat", "true: cat\n73% dog"}),
        ("comparison", {"top-1 accuracy (%): a dot per seed, a bar at the mean", "ours", "theirs", "chance"}),
        ("cost_breakdown", {"MLP", "197 tokens", "86.6 M parameters, 1.4 GB in training", "35.1 GFLOPs forward"}),
        ("sweep", {"a grid", "top1 (%)", "patch_size", "4", "8", "position", "True", "False", "chance"}),
        ("label_budget", {"labelled images (logarithmic)", "top-1 accuracy (%)", "20", "2,000", "chance"}),
    ],
)
def test_axes_and_parts_are_labelled(name, labels):
    assert labels <= set(words(FIGURES[name]()))


def test_image_grid_draws_each_image_under_its_title():
    figure = plots.image_grid(IMAGES, ["a", "b", "c", "d", "e"], columns=3)
    assert len(figure.axes) == 6  # two rows of three, the last one empty
    for ax, image, title in zip(figure.axes, IMAGES, "abcde", strict=False):
        assert np.array_equal(drawn_image(ax), image.permute(1, 2, 0))
        assert ax.get_title() == title
    assert not figure.axes[5].images


def test_image_grid_draws_grey_images_in_grey_on_the_scale_from_0_to_255():
    figure = plots.image_grid(IMAGES[:, :1])
    assert np.array_equal(drawn_image(figure.axes[0]), IMAGES[0, 0])
    assert figure.axes[0].images[0].get_cmap().name == "gray"
    assert figure.axes[0].images[0].get_clim() == (0, 255)


def test_top_classes_draws_the_image_and_the_most_probable_classes_from_top_to_bottom():
    figure = FIGURES["top_classes"]()
    left, right = figure.axes
    np.testing.assert_array_equal(drawn_image(left), IMAGES[0].permute(1, 2, 0))
    assert [bar.get_width() for bar in right.patches] == pytest.approx([70, 20])
    assert [tick.get_text() for tick in right.get_yticklabels()] == ["dog", "cat"]
    assert right.yaxis_inverted()


def test_top_classes_of_fewer_classes_than_asked_for_draws_them_all():
    assert len(plots.top_classes(IMAGES[0], torch.tensor([0.4, 0.6]), ["cat", "dog"]).axes[1].patches) == 2


def test_patch_grid_numbers_the_patches_row_by_row_inside_their_outlines():
    figure = plots.patch_grid(IMAGES[0], 4)
    (ax,) = figure.axes
    assert np.array_equal(drawn_image(ax), IMAGES[0].permute(1, 2, 0))
    places = {text.get_text(): text.get_position() for text in ax.texts}
    assert len(places) == 9
    # pixel 0 has its centre at 0, so the first patch reaches from -0.5 to 3.5
    assert places["0"] == (1.5, 1.5) and places["2"] == (9.5, 1.5) and places["3"] == (1.5, 5.5)
    assert sorted(line.get_ydata()[0] for line in ax.lines[:4]) == [-0.5, 3.5, 7.5, 11.5]
    assert "3 x 3 = 9 patches" in ax.get_title()
    assert "48 numbers per patch" in ax.get_title() and "81 attention weights" in ax.get_title()


def test_patch_grid_leaves_the_numbers_out_where_there_is_no_room():
    assert not plots.patch_grid(torch.zeros(3, 34, 34, dtype=torch.uint8), 2).axes[0].texts


def test_token_matrix_draws_the_tokens_on_a_scale_symmetric_about_zero():
    tokens = torch.tensor([[1.0, -3.0], [0.5, 2.0]], requires_grad=True)
    ax = plots.token_matrix(tokens).axes[0]
    assert np.array_equal(drawn_image(ax), tokens.detach())
    assert ax.images[0].get_clim() == (-3, 3)


def test_number_matrix_writes_every_number_into_its_cell():
    values = torch.tensor([[0.125, 1.0], [-2.0, 0.5], [0.0, 3.25]])
    ax = plots.number_matrix(values, ["a", "b", "c"], ["x", "y"]).axes[0]
    assert np.array_equal(drawn_image(ax), values)
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert written == {(c, r): f"{values[r, c]:.2f}" for r in range(3) for c in range(2)}


def test_number_matrix_of_equal_numbers_is_drawn_too():
    plots.number_matrix(torch.ones(2, 2), "ab", "xy")


def test_position_maps_puts_the_map_of_each_patch_where_the_patch_is():
    similarity = torch.rand(3, 3, 3, 3)
    ax = plots.position_maps(similarity, limit=0.5).axes[0]
    mosaic = drawn_image(ax)
    assert mosaic.shape == (11, 11)  # three tiles of three, a gap of one between them
    for row in range(3):
        for column in range(3):
            tile = mosaic[4 * row : 4 * row + 3, 4 * column : 4 * column + 3]
            assert np.array_equal(tile, similarity[row, column])
    assert np.isnan(mosaic[3]).all() and np.isnan(mosaic[:, 7]).all()
    assert list(ax.get_xticks()) == list(ax.get_yticks()) == [1, 5, 9]
    assert ax.images[0].get_clim() == (-0.5, 0.5)


def test_position_tile_shows_one_map_and_frames_its_patch():
    similarity = torch.rand(3, 3, 3, 3)
    ax = plots.position_tile(similarity, 0, 2).axes[0]
    assert np.array_equal(drawn_image(ax), similarity[0, 2])
    assert ax.patches[0].get_bbox().bounds == (1.5, -0.5, 1, 1)


def test_attention_of_query_marks_the_query_in_image_and_map():
    shares = torch.rand(3, 3)
    figure = plots.attention_of_query(IMAGES[0], shares, 0.25, 6, "head 1")  # token 6 is patch 5: row 1, column 2
    left, right = figure.axes[:2]
    assert np.array_equal(drawn_image(left), IMAGES[0].permute(1, 2, 0))
    assert np.array_equal(drawn_image(right), shares)
    assert left.patches[0].get_bbox().bounds == (7.5, 3.5, 4, 4)
    assert right.patches[0].get_bbox().bounds == (1.5, 0.5, 1, 1)
    assert right.get_title() == "head 1\n25% to CLS, the rest:"


def test_attention_of_query_marks_no_patch_for_cls():
    figure = plots.attention_of_query(IMAGES[0], torch.rand(3, 3), 0.25, 0)
    assert not figure.axes[0].patches and not figure.axes[1].patches
    assert figure.axes[0].get_title() == "query: CLS"


def test_lines_draws_the_given_numbers_and_passes_the_axis_options_on():
    ax = plots.lines([1, 10, 100], {"a": [1, 4, 9], "b": [3, 2, 1]}, "x", "y", xscale="log", ylim=(0, 12)).axes[0]
    assert [list(line.get_xdata()) for line in ax.lines] == [[1, 10, 100], [1, 10, 100]]
    assert [list(line.get_ydata()) for line in ax.lines] == [[1, 4, 9], [3, 2, 1]]
    assert ax.get_xscale() == "log" and ax.get_ylim() == (0, 12)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_lines_needs_no_legend_for_a_single_curve():
    assert plots.lines([1, 2], {"a": [1, 2]}, "x", "y").axes[0].get_legend() is None


def test_training_curves_draws_losses_as_they_are_and_accuracies_in_percent():
    left, right = plots.training_curves(HISTORY, 0.01).axes
    steps, train, validation = left.lines
    assert list(steps.get_ydata()) == [step["loss"] for step in HISTORY.steps]
    assert list(steps.get_xdata()) == pytest.approx([n / 5 for n in range(1, 11)])  # five steps an epoch
    assert list(train.get_ydata()) == [3.0, 2.0] and list(validation.get_ydata()) == [2.8, 1.9]
    train, validation, chance = right.lines
    assert list(train.get_ydata()) == [10, 30] and list(validation.get_ydata()) == [20, 40]
    assert list(chance.get_ydata()) == [1, 1]
    assert list(validation.get_xdata()) == [1, 2]


def test_recorded_curves_draws_accuracies_in_percent_and_losses_as_they_are_from_epoch_1_on():
    left, right = plots.recorded_curves(CURVES).axes
    for ax, long, short in ((left, [10, 30, 50, 60], [20, 70]), (right, [4, 2, 2.5, 3], [3, 1])):
        assert [list(line.get_xdata()) for line in ax.lines] == [[1, 2, 3, 4], [1, 2]]
        assert list(ax.lines[0].get_ydata()) == pytest.approx(long)
        assert list(ax.lines[1].get_ydata()) == pytest.approx(short)


def test_recorded_curves_names_each_curve_at_its_end_in_its_colour():
    for ax in plots.recorded_curves(CURVES).axes:
        named = {text.get_text(): (text.xy, text.get_color()) for text in ax.texts}
        assert named == {
            name: ((len(line.get_xdata()), line.get_ydata()[-1]), line.get_color())
            for name, line in zip(CURVES, ax.lines, strict=True)
        }


def test_recorded_curves_that_end_together_have_their_names_one_above_the_other():
    figure = plots.recorded_curves({"a": {"accuracy": [0.5], "loss": [2.0]}, "b": {"accuracy": [0.5], "loss": [2.0]}})
    figure.draw_without_rendering()
    for ax in figure.axes:
        lower, upper = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
        assert lower.y1 <= upper.y0 + 1  # pixel


@pytest.mark.parametrize(
    ("stop", "accuracies", "losses"),
    [
        (1, ["long 10.0 %", "short 20.0 %"], ["long 4.00", "short 3.00"]),
        (2, ["long 30.0 %", "short 70.0 %"], ["long 2.00", "short 1.00"]),
        (4, ["long 60.0 %", "short 70.0 % (at 2)"], ["long 3.00", "short 1.00 (at 2)"]),
    ],
)
def test_recorded_curves_reads_every_curve_at_the_stop_or_at_its_last_epoch(stop, accuracies, losses):
    for ax, expected in zip(plots.recorded_curves(CURVES, stop).axes, (accuracies, losses), strict=True):
        assert {f"epoch {stop}", *expected} <= {text.get_text() for text in ax.texts}
        vertical = [line for line in ax.lines if list(line.get_xdata()) == [stop, stop]]
        assert len(vertical) == 1
        dots = [line for line in ax.lines if len(line.get_xdata()) == 1]
        assert [line.get_xdata()[0] for line in dots] == [stop, min(stop, 2)]


@pytest.mark.parametrize(("stop", "epochs"), [(1, 11), (39, 11), (60, 11), (61, 11), (100, 11), (1, 100), (61, 100)])
def test_the_readings_of_recorded_curves_hide_no_curve_and_no_name(stop, epochs):
    published = json.loads((PRETRAINED / "published.json").read_text())
    better = {  # the published curves, faster and a little better
        "accuracy": [1.1 * published["accuracy"][99 * n // epochs] for n in range(epochs)],
        "loss": [0.9 * published["loss"][38 * n // epochs] for n in range(epochs)],
    }
    figure = plots.recorded_curves({"published": published, "ours": better}, stop)
    figure.draw_without_rendering()
    for ax in figure.axes:
        readings = [text for text in ax.texts if text.get_text() not in ("published", "ours")]
        names = [text.get_window_extent() for text in ax.texts if text not in readings]
        assert len(readings) == 3 and len(names) == 2
        points = [point for line in ax.lines[:-1] for point in ax.transData.transform(line.get_xydata())]
        for box in (text.get_window_extent() for text in readings):
            assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1)
            assert not any(box.overlaps(name) for name in names)
            assert not any(box.contains(*point) for point in points)


@pytest.mark.parametrize("stop", [0, 5])
def test_recorded_curves_refuses_a_stop_beyond_the_curves(stop):
    with pytest.raises(ValueError, match=f"stop={stop} is no epoch of these curves; choose one from 1 to 4"):
        plots.recorded_curves(CURVES, stop)


def test_confusion_shows_percent_of_each_true_class():
    labels, predictions = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 1])
    ax = plots.confusion(labels, predictions, ["cat", "dog", "never seen"]).axes[0]
    assert drawn_image(ax).tolist() == [[75, 25, 0], [0, 100, 0], [0, 0, 0]]


def test_confusion_names_no_class_where_there_is_no_room():
    names = [f"class {n}" for n in range(200)]
    assert not set(words(plots.confusion(torch.tensor([0]), torch.tensor([199]), names))) & set(names)


def test_confusion_rates_of_seen_classes_sum_to_one():
    labels = torch.tensor([0, 2, 2, 2])
    rates = plots.confusion_rates(labels, torch.tensor([1, 2, 0, 2]), 3)
    assert rates[0].tolist() == [0, 1, 0]
    assert rates.sum(dim=1).tolist() == pytest.approx([1, 0, 1])


def boxes_of(texts) -> list:
    return [text.get_window_extent() for text in texts]


LONG = [
    ("W" * 40, "a class with a long name, of which there are some", "$\\frac$", "猫")[n % 4] + str(n) for n in range(25)
]


def test_confident_mistakes_draws_each_image_under_its_true_and_its_predicted_class():
    logits = torch.full((5, 25), -9.0)
    logits[range(5), [3, 7, 1, 0, 24]] = torch.tensor([9.0, 1, 0, -3, -6])
    names = [f"c{n}" for n in range(25)]
    axes = plots.confident_mistakes(IMAGES, torch.arange(5), logits, names).axes
    assert len(axes) == 8 and not any(ax.images or ax.get_title() for ax in axes[5:])
    shares = [f"{share:.0%}" for share in logits.softmax(dim=1).max(dim=1).values.tolist()]
    for number, (ax, predicted) in enumerate(zip(axes, ["c3", "c7", "c1", "c0", "c24"], strict=False)):
        assert np.array_equal(drawn_image(ax), IMAGES[number].permute(1, 2, 0))
        assert ax.get_title() == f"true: c{number}\n{shares[number]} {predicted}"


def test_confident_mistakes_draws_a_single_one_and_grey_ones():
    figure = plots.confident_mistakes(IMAGES[:1, :1], torch.tensor([0]), torch.tensor([[0.0, 9.0]]), ["cat", "dog"])
    assert np.array_equal(drawn_image(figure.axes[0]), IMAGES[0, 0])
    assert figure.axes[0].images[0].get_cmap().name == "gray"


@pytest.mark.filterwarnings("ignore:Glyph")
def test_long_names_neither_overlap_nor_leave_the_figure_of_confident_mistakes():
    logits = torch.eye(25)[:12] * 9
    figure = plots.confident_mistakes(IMAGES[:1].repeat(12, 1, 1, 1), torch.arange(24, 12, -1), logits, LONG)
    figure.draw_without_rendering()
    boxes = boxes_of(ax.title for ax in figure.axes)
    assert len(boxes) == 12 and not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    assert all(figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1) for box in boxes)
    assert "true: $\\frac$22" in figure.axes[2].get_title()  # as it is: it is no formula, and would be a wrong one


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("count", [2, 12, 13, 25])
def test_long_names_leave_the_matrix_of_confusion_its_room_and_each_other_theirs(count):
    figure = plots.confusion(torch.arange(count), torch.arange(count), LONG[:count])
    figure.draw_without_rendering()
    ax = figure.axes[0]
    assert ax.get_window_extent().height > 0.6 * figure.bbox.height
    boxes = boxes_of(ax.get_yticklabels())
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    assert all(figure.bbox.containsx(box.x0) for box in boxes)
    apart = ax.get_window_extent().width / count * math.sin(math.radians(60))  # the names below are turned by so much
    assert apart >= boxes[0].height


def test_comparison_draws_a_dot_per_seed_a_bar_at_the_mean_and_chance():
    ax = plots.comparison({"ours": [0.5, 0.7], "theirs": [0.3, 0.3]}, 0.1).axes[0]
    bar, dots, other_bar, other_dots, chance = ax.lines
    assert list(bar.get_xdata()) == pytest.approx([60, 60])
    assert list(dots.get_xdata()) == pytest.approx([50, 70]) and list(dots.get_ydata()) == [0, 0]
    assert list(other_bar.get_xdata()) == pytest.approx([30, 30])
    assert list(other_dots.get_ydata()) == [1, 1]
    assert chance.get_xdata()[0] == 10
    assert "60.0 % (50.0 to 70.0)" in [text.get_text() for text in ax.texts]
    assert ax.get_xticks()[-1] == 100


def test_comparison_of_small_accuracies_fills_its_axis():
    ax = plots.comparison({"ours": [0.12, 0.15], "theirs": [0.3, 0.4]}, 0.01).axes[0]
    assert list(ax.get_xticks()) == [0, 8, 16, 24, 32, 40]


def test_head_maps_has_a_row_for_each_layer():
    maps = torch.rand(2, 3, 4, 4)
    axes = plots.head_maps(maps).axes
    assert len(axes) == 6
    assert np.array_equal(drawn_image(axes[3 + 2]), maps[1, 2]) and axes[5].images[0].get_clim()[0] == 0


def test_attention_distances_draws_a_dot_for_each_head_near_its_layer():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    ax = plots.attention_distances({"a": values, "b": values + 1}, 5.0).axes[0]
    first, second, even = ax.lines
    assert list(first.get_ydata()) == [1, 2, 3, 4] and list(second.get_ydata()) == [2, 3, 4, 5]
    assert [round(x) for x in first.get_xdata()] == [1, 1, 2, 2]
    assert not set(first.get_xdata()) & set(second.get_xdata()) and even.get_ydata()[0] == 5


def test_image_maps_puts_the_maps_of_an_image_below_it():
    maps = {"one": torch.rand(5, 3, 3), "two": torch.rand(5, 3, 3)}
    axes = plots.image_maps(IMAGES, maps).axes
    assert np.array_equal(drawn_image(axes[4]), IMAGES[4].permute(1, 2, 0))
    assert np.array_equal(drawn_image(axes[9]), maps["one"][4]) and np.array_equal(
        drawn_image(axes[14]), maps["two"][4]
    )


def test_deletion_curves_draws_means_and_their_confidence_intervals():
    values = torch.tensor([[1.0, 0.8, 0.6, 0.8], [0.5, 0.5, 0.5, 0.5]])
    ax = plots.deletion_curves([0, 1], {"random": values, "other": values / 2}).axes[0]
    assert list(ax.lines[0].get_ydata()) == pytest.approx([0.8, 0.5])
    assert list(ax.lines[0].get_xdata()) == [0, 100]
    low, high = (f(ax.collections[0].get_paths()[0].vertices[:, 1]) for f in (min, max))
    margin = 1.96 * values[0].std().item() / 2
    assert high == pytest.approx(0.8 + margin) and low == pytest.approx(0.5)


def test_spreads_draws_quartiles_median_and_mean_in_percent():
    ax = plots.spreads({"a": [0, 0.1, 0.2, 0.3, 0.9]}, 0.25, "by chance", "share (%)").axes[0]
    numbers = [sorted({round(x) for x in line.get_xdata()}) for line in ax.lines]
    assert [20] in numbers and [30] in numbers and [25] in numbers  # median, mean, reference
    box = ax.patches[0].get_path().vertices[:, 0]
    assert box.min() == pytest.approx(10) and box.max() == pytest.approx(30)


def test_label_budget_draws_a_dot_per_seed_lines_through_the_means_and_chance():
    ax = plots.label_budget(BUDGETS, 20).axes[0]
    line, dots, other_line, other_dots, _, chance = ax.lines
    assert ax.get_xscale() == "log" and list(line.get_xdata()) == list(other_line.get_xdata()) == [20, 2000]
    assert list(line.get_ydata()) == pytest.approx([40, 65]) and list(other_line.get_ydata()) == pytest.approx([15, 30])
    assert list(dots.get_xdata()) == [20, 20, 2000, 2000]
    assert list(dots.get_ydata()) == pytest.approx([30, 50, 60, 70])
    assert dots.get_color() == line.get_color() != other_dots.get_color() == other_line.get_color()
    assert dots.get_marker() != other_dots.get_marker()
    assert set(chance.get_ydata()) == {10}


@pytest.mark.parametrize(
    ("budget", "readings"),
    [
        (20, ["ours 40.0 % (30.0 to 50.0)", "theirs 15.0 % (10.0 to 20.0)"]),
        (2000, ["ours 65.0 % (60.0 to 70.0)", "theirs 30.0 % (20.0 to 40.0)"]),
    ],
)
def test_label_budget_reads_every_arm_at_the_chosen_budget(budget, readings):
    figure = plots.label_budget(BUDGETS, budget)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == readings
    assert legend.get_title().get_text() == f"with {budget:,} labelled images: mean (lowest to highest)"
    assert [list(line.get_xdata()) for line in figure.axes[0].lines].count([budget, budget]) == 1


def test_label_budget_refuses_a_budget_that_was_not_measured():
    with pytest.raises(ValueError, match="budget=30 was not measured; choose one of 20, 2000"):
        plots.label_budget(BUDGETS, 30)


def test_sweep_draws_lines_through_means_and_dots():
    ax = plots.sweep(RUNS, "top1", "patch_size").axes[0]
    on, on_dots, off, off_dots, chance = ax.lines
    for line, dots, means in ((on, on_dots, [61, 41]), (off, off_dots, [51, 31])):
        assert list(line.get_xdata()) == [4, 8] and list(line.get_ydata()) == pytest.approx(means)
        assert list(dots.get_xdata()) == [4, 4, 8, 8]
        assert list(dots.get_ydata()) == pytest.approx([means[0] - 1, means[0] + 1, means[1] - 1, means[1] + 1])
        assert line.get_color() == dots.get_color()
    assert on.get_color() != off.get_color() and on.get_marker() != off.get_marker()
    assert set(chance.get_ydata()) == {1} and ax.get_ylim()[0] == 0
    assert ax.figure.get_suptitle() == "top1 against patch_size"


def test_sweep_names_its_lines_below_the_figure():
    (legend,) = plots.sweep(RUNS, "top1", "patch_size", words={"position": "position embedding"}).legends
    assert legend.get_title().get_text() == "position embedding"
    assert [text.get_text() for text in legend.get_texts()] == ["True", "False"]
    assert not plots.sweep(grid([4, 8], [True]), "top1", "patch_size").legends
    runs = [{**run, "parameters": {**run["parameters"], "rate": rate}} for run in RUNS for rate in (0.1, 3e-4)]
    (legend,) = plots.sweep(runs, "top1", "patch_size").legends
    assert [text.get_text() for text in legend.get_texts()] == [
        f"position={on}, rate={rate}" for on in (True, False) for rate in ("0.1", "0.0003")
    ]


@pytest.mark.parametrize(
    ("values", "scale", "ticks"),
    [
        ([16, 2, 4], "linear", ["2", "4", "16"]),  # eightfold and no more
        ([0, 1, 100], "linear", ["0", "1", "100"]),
        ([20, 2000, 200], "log", ["20", "200", "2,000"]),
        ([3e-4, 1e-4, 1e-3], "log", ["0.0001", "0.0003", "0.001"]),
    ],
)
def test_sweep_spaces_numbers_as_numbers(values, scale, ticks):
    ax = plots.sweep(grid(values, [True]), "top1", "patch_size").axes[0]
    assert ax.get_xscale() == scale and list(ax.lines[0].get_xdata()) == sorted(values)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ticks
    assert ax.get_xlabel() == ("patch_size (logarithmic)" if scale == "log" else "patch_size")


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("values", [["b", "a"], [True, False], [None, 8], [[1], [0]], [4], ["$\\frac$", "猫 \ud800"]])
def test_sweep_puts_other_values_side_by_side(values):
    figure = plots.sweep(grid(values, [True]), "loss", "patch_size")
    figure.draw_without_rendering()
    assert list(figure.axes[0].lines[0].get_xdata()) == list(range(len(values)))
    names = [str(value).replace("\ud800", "?") for value in values]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == names


def test_sweep_averages_more_lines_than_one_can_read():
    runs = grid([4, 8], list(range(plots.MOST_LINES + 1)), lambda size, position, seed: position / 10)
    figure = plots.sweep(runs, "top1", "patch_size")
    line, dots = figure.axes[0].lines[:2]
    assert list(line.get_ydata()) == pytest.approx([40, 40]) and len(dots.get_ydata()) == len(runs)
    assert not figure.legends


def test_sweep_leaves_out_runs_without_a_number():
    runs = grid([4, 8], [True], lambda size, position, seed: {4: 0.5, 8: 0.9}[size] if seed or size == 4 else None)
    line, dots = plots.sweep(runs, "top1", "patch_size").axes[0].lines[:2]
    assert list(line.get_ydata()) == [50, 90] and list(dots.get_xdata()) == [4, 4, 8]
    for name in ("topl", "winner"):
        with pytest.raises(ValueError, match=f"No run has recorded a number named '{name}'; choose one of .*top1"):
            plots.sweep(runs, name, "patch_size")
    with pytest.raises(ValueError, match="axis='patch' is not a parameter of these runs; choose one of patch_size, "):
        plots.sweep(runs, "top1", "patch")


def test_sweep_over_a_zipped_parameter_has_one_line():
    runs = grid([4, 8], [True])
    runs = [
        {**run, "parameters": {**run["parameters"], "preset": f"p{run['parameters']['patch_size']}"}} for run in runs
    ]
    assert not plots.sweep(runs, "top1", "patch_size").legends


def test_sweep_draws_no_chance_where_runs_disagree():
    runs = grid([4, 8], [True], lambda size, *_: 1 / size)
    runs[0]["figures"]["chance"] = 0.1
    assert len(plots.sweep(runs, "top1", "patch_size").axes[0].lines) == 2


def test_cost_breakdown_cuts_the_image_into_the_patches_that_are_counted():
    figure = plots.cost_breakdown(IMAGES[0], costs({**B16, "patch_size": 56}), costs(B16), "ViT-B/16")
    picture = figure.axes[0]
    assert np.array_equal(drawn_image(picture), IMAGES[0].permute(1, 2, 0))
    down, across = (lines.get_segments() for lines in picture.collections)
    assert [segment[0, 0] for segment in down] == [segment[0, 1] for segment in across] == [0, 1, 2, 3, 4]
    assert picture.images[0].get_extent() == [0, 4, 4, 0] and picture.get_title() == "4 x 4 = 16 patches"


def test_cost_breakdown_draws_every_part_and_its_bars_fill_100_percent():
    counted = costs({**B16, "pre_logits": 768})
    shares = plots.cost_breakdown(IMAGES[0], counted, counted, "itself").axes[1]
    assert sorted(field for fields in plots.COST_PARTS.values() for field in fields) == sorted(vars(Parts(*range(7))))
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in shares.containers}
    assert [sum(column) for column in zip(*widths.values(), strict=True)] == pytest.approx([100, 100, 100])
    parameters, flops, kept = counted.parameters, counted.forward_flops, counted.activation_bytes
    assert widths["MLP"] == pytest.approx([100 * parts.mlp / parts.total for parts in (parameters, flops, kept)])
    heads = [100 * (parts.classifier) / parts.total for parts in (parameters, flops, kept)]
    assert widths["classifier"] == pytest.approx(heads)
    starts = np.array([[bar.get_x() for bar in bars] for bars in shares.containers])
    ends = starts + np.array(list(widths.values()))
    assert np.allclose(starts[1:], ends[:-1]), "each begins where the one before ends"


def test_cost_breakdown_gives_the_totals_as_multiples_of_the_reference():
    large, small = costs({**B16, "image_size": 448, "em_dim": 384, "num_heads": 6, "ff_dim": 1536}), costs(B16)
    totals = plots.cost_breakdown(IMAGES[0], large, small, "ViT-B/16 at 224").axes[2]
    multiples = [
        large.tokens / small.tokens,
        large.parameters.total / small.parameters.total,
        large.forward_flops.total / small.forward_flops.total,
        large.activation_bytes.total / small.activation_bytes.total,
    ]
    assert [bar.get_x() + bar.get_width() for bar in totals.patches] == pytest.approx(multiples)
    assert [text.get_text() for text in totals.texts] == ["3.98", "1/3.89", "1.29", "2"]
    assert totals.get_xlabel() == "times ViT-B/16 at 224 (logarithmic)" and totals.get_xscale() == "log"


@pytest.mark.parametrize(("side", "patch", "width"), [(224, 56, 192), (896, 8, 1280), (896, 8, 192), (224, 16, 768)])
def test_words_of_cost_breakdown_neither_overlap_nor_leave_the_figure(side, patch, width):
    sizes = {"image_size": side, "patch_size": patch, "em_dim": width, "num_heads": width // 64, "ff_dim": 4 * width}
    title = f"{side} x {side} pixels in patches of {patch}, tokens of width {width}, 12 blocks"
    figure = plots.cost_breakdown(IMAGES[0], costs({**B16, **sizes}), costs(B16), "ViT-B/16 at 224 pixels", title)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in shown_texts(figure)]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


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
