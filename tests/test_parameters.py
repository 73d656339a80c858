"""The table of the course's parameters, and what it refuses; ``test_wrong_values.py`` has the command line's part."""

import math

import pytest
from conftest import refusal

from vitlib.course.parameters import PARAMETERS, check_parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", True),
        ("batch_size", 8.0),
        ("batch_size", None),
        ("seed", 2**32),
        ("norm_first", 1),
        ("data_dir", ""),
        ("run_dir", 3),
        ("device", "cuda:x"),
        ("upstream", "absent/folder"),
        ("validation_fraction", 1),
        ("validation_fraction", math.nan),
    ],
)
def test_a_value_that_is_not_allowed_is_named_in_one_sentence(name, value):
    assert repr(value).strip("'") in refusal(check_parameters, {name: value})


def test_names_outside_the_table_are_left_alone():
    check_parameters({"batch_size": 8, "In": [], "__name__": "__main__", "learning_rate": "what"})


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:3"])
@pytest.mark.parametrize("there", [True, False])
def test_a_device_is_accepted_where_there_is_one(device, there, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: there)
    if there or device in ("auto", "cpu"):
        PARAMETERS["device"].check(device)
    else:
        with pytest.raises(ValueError, match="choose one of auto, cpu"):
            PARAMETERS["device"].check(device)


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    for name in ("cat", "dog"):
        for split in ("train", "test"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
    values = dict.fromkeys(("weights", "run_dir", "data_dir", "downstream"), "~/images") | {"seed": 0}
    check_parameters(values)
    assert set(values.values()) == {str(tmp_path / "images"), 0}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("batch_size", "8", 8),
        ("batch_size", "8.0", "8.0"),
        ("batch_size", "None", "None"),
        ("train_steps_per_epoch", "None", None),
        ("data_dir", "null", None),
        ("data_dir", "1e3", "1e3"),
        ("run_dir", "on", "on"),
        ("norm_first", "True", True),
        ("norm_first", "off", False),
        ("norm_first", "1", "1"),
        ("validation_fraction", "2e-1", 0.2),
        ("validation_fraction", "much", "much"),
    ],
)
def test_texts_from_the_command_line_become_the_parameters_own_type(name, text, value):
    parsed = PARAMETERS[name].parse(text)
    assert parsed == value and type(parsed) is type(value)
