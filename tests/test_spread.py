"""Runs of a grid: what repeats what, the means and their spread, and the sentence about them."""

import math

import pytest

from vitlib.spread import (
    are_shares,
    cells,
    combination_in_words,
    in_words,
    number_of,
    parameter_in_words,
    spread_in_words,
    sweep_summary,
    varied,
    varied_beside,
)


def run(figures=None, **parameters) -> dict:
    return {"parameters": parameters, "figures": {} if figures is None else figures}


def runs_of(table: dict) -> list[dict]:
    """Runs of ``{(patch size, position embedding): top-1 of seeds 0, 1, ...}``, each in a folder of its own."""
    return [
        run({"top1": top1}, patch_size=size, position=position, seed=seed, run_dir=f"run-{size}-{position}-{seed}")
        for (size, position), values in table.items()
        for seed, top1 in enumerate(values)
    ]


GRID = runs_of({(4, True): [0.6, 0.62], (4, False): [0.5, 0.52], (8, True): [0.4, 0.42], (8, False): [0.3, None]})


def test_cells_gather_the_runs_that_are_alike_in_the_order_of_their_first():
    found = cells(GRID, "top1", ["position"])
    assert [cell.parameters for cell in found] == [{"position": True}, {"position": False}]
    assert [cell.values for cell in found] == [(0.6, 0.62, 0.4, 0.42), (0.5, 0.52, 0.3)]
    assert found[0].mean == pytest.approx(0.51) and (found[0].lowest, found[0].highest) == (0.4, 0.62)
    assert [cell.repeats for cell in found] == ["runs", "runs"]
    assert {cell.repeats for cell in cells(GRID, "top1", ["patch_size", "position"])} == {"seeds"}


def test_cells_without_a_value_are_there_too():
    (cell,) = cells([run(a=1), run({"top1": None}, a=1)], "top1", ["a"])
    assert cell.values == () and cell.runs == ()


@pytest.mark.parametrize("one", [1, True, None, [1], "1"])
@pytest.mark.parametrize("other", [1, True, None, [1], "1"])
def test_values_of_any_kind_are_told_apart(one, other):
    same = type(one) is type(other)
    assert len(cells([run(a=one), run(a=other)], "top1", ["a"])) == (1 if same else 2)
    assert varied([run(a=one), run(a=other)]) == ([] if same else ["a"])


@pytest.mark.parametrize("value", [None, "much", True, math.nan, math.inf])
def test_what_is_no_finite_number_is_no_value(value):
    assert number_of(run({"top1": value}), "top1") is None
    assert number_of(run({"top1": 0}), "top1") == 0


def test_the_seed_and_the_folder_do_not_count_as_varied():
    assert varied(GRID) == ["patch_size", "position"]
    assert varied(GRID[:2]) == []


def test_a_parameter_that_follows_the_axis_does_not_vary_beside_it():
    zipped = [
        run(preset=preset, batch_size=size, position=on) for preset, size in (("a", 1), ("b", 2)) for on in (0, 1)
    ]
    assert varied_beside(zipped, "preset") == ["position"]
    assert varied_beside(zipped, "position") == ["preset", "batch_size"]
    assert varied_beside(GRID, "patch_size") == ["position"]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("top1", [0, 1], True),
        ("validation_accuracy", [0.3], True),
        ("chance", [0.1, None], True),
        ("top1", [0.3, 1.1], False),
        ("test_loss", [0.5], False),
    ],
)
def test_shares_are_known_by_name_and_range(name, values, expected):
    assert are_shares([run({name: value}) for value in values], name) is expected


@pytest.mark.parametrize(
    ("value", "shares", "words"),
    [(0.6123, True, "61.2 %"), (0.61234, False, "0.6123"), (3218020.4, False, "3,218,020"), (12, False, "12")],
)
def test_numbers_in_words(value, shares, words):
    assert in_words(value, shares) == words


def test_spread_names_the_ends_only_where_they_differ():
    several, equal = cells(
        [*GRID[:2], run({"top1": 0.5}, patch_size=2), run({"top1": 0.5}, patch_size=2)], "top1", ["patch_size"]
    )
    assert spread_in_words(several, True) == "61.0 % (60.0 to 62.0)"
    assert spread_in_words(equal, True) == "50.0 %"


@pytest.mark.parametrize(
    ("value", "words"),
    [(3e-4, "0.0003"), (True, "True"), (None, "None"), ("", "''"), ("two\n lines", "two lines"), ("a\ud800", "a?")],
)
def test_parameters_in_words_are_on_one_line_that_can_be_written(value, words):
    assert parameter_in_words(value) == words
    assert combination_in_words({"a": value, "b": 1}) == f"a={words}, b=1"


@pytest.mark.parametrize(
    ("table", "names", "sentence"),
    [
        (
            {(4, True): [0.61, 0.6, 0.62], (8, True): [0.3, 0.34]},
            None,
            "top1 is highest with patch_size=4: 61.0 % on average over 3 seeds (60.0 to 62.0); it is lowest with "
            "patch_size=8: 32.0 % on average over 2 seeds (30.0 to 34.0).",
        ),
        (
            {(4, True): [0.5, 0.6], (8, True): [0.52, 0.54]},
            None,
            "top1 is highest with patch_size=4: 55.0 % on average over 2 seeds (50.0 to 60.0); it is lowest with "
            "patch_size=8: 53.0 % on average over 2 seeds (52.0 to 54.0); their ranges overlap.",
        ),
        (
            {(4, True): [0.7], (4, False): [0.2], (8, True): [0.5], (8, False): [0.1, None]},
            None,
            "top1 is highest with patch_size=4, position=True: 70.0 % in one run; it is lowest with "
            "patch_size=8, position=False: 10.0 % in one run.",
        ),
        (
            {(4, True): [0.7], (4, False): [0.2], (8, True): [0.5], (8, False): [0.1]},
            ["patch_size"],
            "top1 is highest with patch_size=4: 45.0 % on average over 2 runs (20.0 to 70.0); it is lowest with "
            "patch_size=8: 30.0 % on average over 2 runs (10.0 to 50.0).",
        ),
        ({(4, True): [0.5, 0.6]}, None, "top1 is 55.0 % on average over 2 seeds (50.0 to 60.0)."),
        ({(4, True): [0.5, 0.5]}, None, "top1 is 50.0 % in all 2 runs."),
        ({(4, True): [0.5], (8, True): [0.5]}, None, "top1 is the same everywhere, 50.0 % on average."),
    ],
)
def test_summary_says_where_a_figure_is_highest_and_lowest(table, names, sentence):
    assert sweep_summary(runs_of(table), "top1", names) == sentence


def test_summary_of_a_figure_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match=r"No run has recorded a number named 'topl'; choose one of .*: top1\."):
        sweep_summary(GRID, "topl")
