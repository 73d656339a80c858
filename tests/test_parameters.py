"""The table of the course's parameters, and what it refuses."""

import math
from pathlib import Path

import nbformat.v4
import papermill
import pytest

from vitlib.course.parameters import PARAMETERS, check_parameters
from vitlib.model import PRESETS, ViTModel
from vitlib.training.devices import PRECISIONS
from vitlib.training.recipes import FINETUNING, RECIPES

GOOD = {
    "dataset": "shapes100",
    "upstream": "cifair100",
    "downstream": "shapes10",
    "data_dir": None,
    "image_size": 32,
    "num_images": 300,
    "labelled_images": 100,
    "preset": "mini",
    "patch_size": 4,
    "position_embedding": False,
    "norm_first": True,
    "pooling": "cls",
    "recipe": "modern",
    "precision": "auto",
    "compile": False,
    "weights": "shapes100-mini",
    "official_weights": False,
    "freeze_encoder": False,
    "arm": "linear probe",
    "batch_size": 128,
    "pretrain_epochs": 3,
    "finetune_epochs": 1,
    "steps": 63,
    "train_steps_per_epoch": None,
    "eval_steps_per_epoch": 2,
    "validation_fraction": 0.1,
    "seed": 0,
    "seeds": 3,
    "device": "auto",
    "run_dir": "runs/class",
    "strict_checks": False,
}


def test_a_full_set_of_good_values_passes():
    assert set(GOOD) == set(PARAMETERS)
    check_parameters(GOOD)


def test_names_outside_the_table_are_left_alone():
    check_parameters({"batch_size": 8, "In": [], "__name__": "__main__", "learning_rate": "what"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", True),
        ("batch_size", 8.0),
        ("batch_size", "8"),
        ("batch_size", None),
        ("pretrain_epochs", -1),
        ("train_steps_per_epoch", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("seeds", 0),
        ("norm_first", 1),
        ("norm_first", "False"),
        ("data_dir", ""),
        ("run_dir", 3),
        ("preset", "smal"),
        ("recipe", "Modern"),
        ("device", "gpu"),
        ("device", "cuda:x"),
        ("upstream", "shapes1000"),
        ("image_size", 0),
        ("labelled_images", 0),
        ("patch_size", 0),
        ("position_embedding", "off"),
        ("arm", "finetuning"),
        ("steps", 0),
        ("pooling", "max"),
        ("precision", "float16"),
        ("compile", "yes"),
        ("weights", ""),
        ("official_weights", "yes"),
        ("freeze_encoder", None),
        ("validation_fraction", 0),
        ("validation_fraction", 1),
        ("validation_fraction", "0.1"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_in_one_sentence(name, value):
    with pytest.raises(ValueError) as error:
        check_parameters({**GOOD, name: value})
    message = str(error.value)
    assert repr(value).strip("'") in message
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("preset", "smal", "small"),
        ("recipe", "publish", "published"),
        ("device", "cud", "cuda"),
        ("precision", "bf16", "bfloat16"),
        ("arm", "fine tuning", "fine-tuning"),
    ],
)
def test_a_slip_of_the_pen_is_answered_with_the_nearest_choice(name, value, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        PARAMETERS[name].check(value)


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:3"])
def test_every_kind_of_device_is_accepted_where_there_is_one(device, monkeypatch):
    for there in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda there=there: there)
        if there or device in ("auto", "cpu"):
            PARAMETERS["device"].check(device)
        else:
            with pytest.raises(ValueError, match="choose auto or cpu"):
                PARAMETERS["device"].check(device)


def test_a_folder_of_images_is_a_source(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
    PARAMETERS["upstream"].check(str(tmp_path))
    with pytest.raises(ValueError, match="absent"):
        PARAMETERS["upstream"].check(str(tmp_path / "absent"))


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "train" / "dog").mkdir(parents=True)
    values = {"weights": "~/x.safetensors", "run_dir": "~/r", "data_dir": "~/d", "downstream": "~/images", "seed": 0}
    check_parameters(values)
    assert {name: str(Path(value)) for name, value in values.items() if name != "seed"} == {
        "weights": str(tmp_path / "x.safetensors"), "run_dir": str(tmp_path / "r"), "data_dir": str(tmp_path / "d"),
        "downstream": str(tmp_path / "images"),
    }  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", True, None])
def test_a_float_must_be_a_finite_number(value):
    rate = type(PARAMETERS["seed"])("learning_rate", float, "size of a step", 0)
    rate.check(1)
    rate.check(0.5)
    with pytest.raises(ValueError, match="learning_rate"):
        rate.check(value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("batch_size", "8", 8),
        ("batch_size", "8.0", "8.0"),
        ("batch_size", "None", "None"),
        ("train_steps_per_epoch", "None", None),
        ("train_steps_per_epoch", "null", None),
        ("data_dir", "null", None),
        ("data_dir", "1e3", "1e3"),
        ("run_dir", "on", "on"),
        ("norm_first", "false", False),
        ("norm_first", "True", True),
        ("norm_first", "1", "1"),
        ("validation_fraction", "0.2", 0.2),
        ("validation_fraction", "much", "much"),
        ("compile", "on", True),
        ("weights", "random", "random"),
    ],
)
def test_texts_from_the_command_line_become_the_parameters_own_type(name, text, value):
    parsed = PARAMETERS[name].parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_choices_are_those_of_the_library():
    for name, known in (("preset", PRESETS), ("recipe", RECIPES), ("recipe", FINETUNING), ("precision", PRECISIONS)):
        assert set(PARAMETERS[name].choices) == set(known), name
    for name in PARAMETERS["pooling"].choices:
        ViTModel(2, 1, 8, 4, em_dim=8, num_heads=2, ff_dim=8, pooling=name)


def test_papermill_reads_back_every_type_and_help():
    lines = [f"{p.name}: {p.annotation} = {GOOD[p.name]!r}  # {p.help}" for p in PARAMETERS.values()]
    cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(
        cells=[cell], metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    )
    read = papermill.inspect_notebook(notebook)
    assert {name: (entry["inferred_type_name"], entry["help"]) for name, entry in read.items()} == {
        name: (parameter.annotation, parameter.help) for name, parameter in PARAMETERS.items()
    }
    assert max(map(len, lines)) <= 120
