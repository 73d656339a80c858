"""The records that ship are whole, and are those that the lessons speak of."""

import math

from vitlib.records import load_record


def test_the_published_record_has_every_epoch():
    assert len(load_record("published")["accuracy"]) == len(load_record("published")["loss"]) == 100


def test_the_published_recipe_does_here_what_it_did_there():
    theirs, record = load_record("published")["accuracy"], load_record("published_here")["record"]
    ours = [epoch["validation_accuracy"] for epoch in record["epochs_run"]]
    assert (record["recipe"]["optimizer"], record["recipe"]["schedule"]) == ("sgd", "constant")
    # on other images, 1,000 of them: the standard error is 1.6 points
    assert all(abs(one - other) < 0.06 for one, other in zip(ours, theirs, strict=False))


def test_the_shipped_model_has_the_record_of_a_finished_training():
    record = load_record("cifar100-small")["record"]
    assert len(record["epochs_run"]) == record["epochs"], "notebook 03 says its learning rate ended at 0"
    assert record["recipe"]["schedule"] == "cosine"
    assert all(0 < epoch["validation_accuracy"] < 1 for epoch in record["epochs_run"])
    assert all(0 < epoch["validation_loss"] < 1.2 * math.log(100) for epoch in record["epochs_run"])


def test_the_cnn_has_the_vit_s_parameters_and_its_own_best_rate():
    record = load_record("vit_against_cnn")
    vit, cnn = record["models"].values()
    assert abs(cnn["parameters"] / vit["parameters"] - 1) < 0.01 and cnn["forward_flops"] > 2 * vit["forward_flops"]
    chance = 1 / record["settings"]["classes"]
    for name, tried in record["sweep"].items():
        best = min(tried, key=lambda rate: tried[rate]["loss"])
        # at an end of the list a still better one might lie outside
        assert min(map(float, tried)) < float(best) < max(map(float, tried))
        assert float(best) == record["models"][name]["learning_rate"]
        for cells in record["trainings"][name].values():
            assert len(cells) == 3 and all(chance < cell["accuracy"] < 1 for cell in cells)
