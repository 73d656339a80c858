"""The recorded trainings: what is read is what was recorded, in its order and units, and says where it comes from."""

import json
import math
from dataclasses import asdict

import pytest

from vitlib import records
from vitlib.records import load_record, recorded_cnn, recorded_curves, recorded_label_budgets, recorded_patches
from vitlib.training.recipes import RECIPES
from vitlib.weights.checkpoint import ModelCard, load_pretrained


@pytest.fixture
def shipped(monkeypatch):
    """A made-up card in place of that of the shipped model."""
    epochs = [
        {"epoch": n, "validation_accuracy": n / 10, "validation_loss": 4 / n, "train_accuracy": 0.0, "train_loss": 9.0}
        for n in range(1, 4)
    ]
    record = {"source": "somewhere/photographs", "recipe": asdict(RECIPES["muon"]), "epochs_run": epochs, "epochs": 3}
    record |= {"batch_size": 96, "train_images": 49_000, "validation_images": 1_000}
    record["test"] = {"source": "photographs, test split", "images": 10_000, "accuracy": 0.5678, "loss": 1.5}
    cards = {"cifar100-small": (None, ModelCard(("cat",), (0.5,), (0.2,), "small", record))}
    monkeypatch.setattr(records, "load_pretrained", cards.__getitem__)


def test_the_published_curves_are_the_published_record(shipped):
    published = recorded_curves()["published"]
    accuracy, loss = published["accuracy"], published["loss"]
    assert len(accuracy) == len(loss) == 100
    assert (accuracy[0], accuracy[-1], max(accuracy)) == (0.1088, 0.5154, 0.5226)
    assert (loss[0], loss[-1], min(loss)) == (3.8289, 2.384, 1.8995)
    assert loss.index(min(loss)) + 1 == 39 and accuracy.index(max(accuracy)) + 1 == 99


def test_ours_are_the_validation_figures_of_the_shipped_model_in_order(shipped):
    ours = recorded_curves()["ours"]
    assert ours["accuracy"] == [0.1, 0.2, 0.3] and ours["loss"] == [4, 2, 4 / 3]


def test_each_curve_says_what_was_trained_and_on_which_images_it_was_measured(shipped):
    curves = recorded_curves()
    assert "SGD" in curves["published"]["about"] and "ciFAIR-100, its test images" in curves["published"]["about"]
    ours = curves["ours"]["about"]
    assert "Muon and AdamW, cosine schedule" in ours and "49,000 training images of photographs;" in ours
    assert "measured on 1,000 others" in ours and "56.8% of the 10,000 test images" in ours
    assert "somewhere" not in ours


def test_the_shipped_model_has_the_whole_record_of_a_training_that_was_finished():
    _, card = load_pretrained("cifar100-small")
    assert len(card.record["epochs_run"]) == card.record["epochs"], "notebook 03 says its learning rate ended at 0"
    assert card.record["recipe"]["schedule"] == "cosine"
    ours = recorded_curves()["ours"]
    assert len(ours["accuracy"]) == len(ours["loss"]) > 0
    assert all(0 < share < 1 for share in ours["accuracy"])
    assert all(0 < loss < 1.2 * math.log(100) for loss in ours["loss"]), "an untrained model has ln 100"


def write_sweep(folder, name, common, grid, figures):
    """A record of a sweep, and its runs: a mapping of parameters' values to the figure top1."""
    runs = [
        {"parameters": dict(zip(grid, values, strict=True)), "figures": {"top1": top1, "chance": 0.25}}
        for values, top1 in figures.items()
    ]
    (folder / f"sweep_{name}.json").write_text(json.dumps({"command": "do it", "parameters": common, "runs": runs}))
    return runs


def test_label_budgets_are_read_as_they_were_measured_in_rising_order(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PRETRAINED", tmp_path)
    common = {"downstream": "letters", "weights": "photographs", "steps": 7, "batch_size": 5}
    figures = {
        ("ours", 1000, 1): 0.6, ("ours", 1000, 0): 0.5, ("ours", 20, 0): 0.1, ("ours", 20, 1): 0.2,
        ("theirs", 20, 0): 0.3, ("theirs", 20, 1): 0.4, ("theirs", 1000, 0): 0.3, ("theirs", 1000, 1): 0.3,
    }  # fmt: skip
    write_sweep(tmp_path, "labels", common, ("arm", "labelled_images", "seed"), figures)
    record = recorded_label_budgets()
    assert record["arms"] == {
        "ours": {20: [0.1, 0.2], 1000: [0.5, 0.6]},
        "theirs": {20: [0.3, 0.4], 1000: [0.3, 0.3]},
    }
    assert list(record["arms"]) == ["ours", "theirs"]
    assert [list(cells) for cells in record["arms"].values()] == [[20, 1000]] * 2
    assert (record["chance"], record["command"]) == (0.25, "do it")
    assert record["about"] == "letters, encoder photographs, 7 steps of 5 images"


def test_patches_are_read_as_they_were_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PRETRAINED", tmp_path)
    common = {"preset": "tiny", "upstream": "letters", "steps": 7, "batch_size": 5}
    figures = {(4, True, 1): 0.6, (4, True, 0): 0.5, (8, False, 0): 0.1, (8, False, 1): 0.2}
    runs = write_sweep(tmp_path, "patches", common, ("patch_size", "position_embedding", "seed"), figures)
    record = recorded_patches()
    assert record["runs"] == runs
    assert record["accuracy"] == {(4, True): [0.5, 0.6], (8, False): [0.1, 0.2]}
    assert (record["chance"], record["command"]) == (0.25, "do it")
    assert record["about"] == "tiny on letters, 7 steps of 5 images"


def test_the_cnn_is_read_as_it_was_measured_the_smaller_training_set_first(tmp_path, monkeypatch):
    cells = {  # of two seeds: accuracy, training accuracy
        "ViT": {"10000": [(0.1, 0.2), (0.2, 0.3)], "200": [(0.01, 0.9), (0.02, 0.8)]},
        "CNN": {"10000": [(0.3, 0.4), (0.4, 0.5)], "200": [(0.03, 0.7), (0.04, 0.6)]},
    }
    record = {
        "command": "python it.py",
        "settings": {"upstream": "photographs", "steps": 7, "batch_size": 5, "classes": 4, "test_images": 1000},
        "models": {
            "ViT": {"what": "one", "parameters": 10, "forward_flops": 4, "learning_rate": 0.1},
            "CNN": {"what": "another", "parameters": 10, "forward_flops": 8, "learning_rate": 0.2},
        },
        "images_per_second": {"ViT": [9.0, 1.0, 8.0], "CNN": [3.0, 4.0, 5.0]},
        "trainings": {
            name: {
                size: [dict(zip(("accuracy", "train_accuracy"), pair, strict=True)) for pair in pairs]
                for size, pairs in sizes.items()
            }
            for name, sizes in cells.items()
        },
    }
    (tmp_path / "vit_against_cnn.json").write_text(json.dumps(record))
    monkeypatch.setattr(records, "PRETRAINED", tmp_path)
    read = recorded_cnn()
    assert list(read["accuracy"].items()) == [
        ("ViT, 200 images", [0.01, 0.02]),
        ("CNN, 200 images", [0.03, 0.04]),
        ("ViT, 10,000 images", [0.1, 0.2]),
        ("CNN, 10,000 images", [0.3, 0.4]),
    ]
    assert read["train_accuracy"]["CNN, 200 images"] == [0.7, 0.6]
    assert read["models"]["ViT"] == record["models"]["ViT"] | {"images_per_second": 8.0}
    assert read["models"]["CNN"]["images_per_second"] == 4.0
    assert (read["chance"], read["command"]) == (0.25, "python it.py")
    assert read["about"] == "photographs, 7 steps of 5 images, 1,000 test images"


def test_the_cnn_that_ships_is_whole_and_as_large_as_the_vit():
    read = recorded_cnn()
    vit, cnn = read["models"].values()
    assert abs(cnn["parameters"] / vit["parameters"] - 1) < 0.01 and cnn["forward_flops"] > 2 * vit["forward_flops"]
    assert len(read["accuracy"]) == len(read["train_accuracy"]) == 4
    for key in ("accuracy", "train_accuracy"):
        assert all(len(shares) == 3 and read["chance"] < min(shares) < 1 for shares in read[key].values())


def test_the_learning_rates_of_the_comparison_lie_inside_of_what_was_tried():
    """At an end of the list a still better one might lie outside, and the model would be at a disadvantage."""
    record = json.loads((records.PRETRAINED / "vit_against_cnn.json").read_text())
    for name, tried in record["sweep"].items():
        best = min(tried, key=lambda rate: tried[rate]["loss"])
        assert (
            float(best)
            == record["models"][name]["learning_rate"]
            not in (min(map(float, tried)), max(map(float, tried)))
        )


def test_a_record_is_the_file_that_ships():
    assert len(load_record("published")["accuracy"]) == 100
    with pytest.raises(ValueError, match="'index'; choose one of cifar100-small, published, .* vit_against_cnn"):
        load_record("index")
