"""Training: it learns, it is repeatable, it counts its steps, it survives Ctrl-C, it moves only what it should."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from vitlib import train as train_module
from vitlib.augment import CIFAR10_MEAN, PUBLISHED, Augmentation
from vitlib.checkpoint import load_checkpoint
from vitlib.data import LabelledImages
from vitlib.model import create_model
from vitlib.train import (
    FINETUNING,
    RECIPES,
    History,
    build_optimizer,
    evaluate,
    finetune,
    fit,
    predict,
    pretrain,
    rate_factor,
    resolve_device,
)

SIZES = {"num_layers": 1, "image_size": 8, "patch_size": 4, "em_dim": 16, "num_heads": 2, "ff_dim": 32}


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch):
    monkeypatch.setitem(train_module.create_model.__globals__["PRESETS"], "tiny", SIZES)


def coloured(count=60, classes=3, seed=0) -> LabelledImages:
    """Images of one plain colour each: the class is the brightest channel, so a few steps are enough to learn it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = torch.randint(0, 100, (count, 3, 8, 8), generator=generator)
    images[torch.arange(count), labels] += 120
    return LabelledImages(images.to(torch.uint8), labels, ("red", "green", "blue")[:classes])


def quick(**changes):
    arguments = {"preset": "tiny", "pretrain_epochs": 2, "batch_size": 16, "device": "cpu", "progress": False}
    return arguments | changes


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_pretraining_learns():
    trained = pretrain(coloured(), **quick(pretrain_epochs=12, recipe=replace(RECIPES["modern"], learning_rate=1e-2)))
    assert trained.history.epochs[-1]["validation_accuracy"] == 1.0
    assert trained.history.epochs[-1]["train_loss"] < 0.5 * trained.history.epochs[0]["train_loss"]
    assert evaluate(trained.model, coloured(seed=1), trained.card)["accuracy"] > 0.95


def test_same_seed_same_weights_and_another_seed_others():
    first, again, other = (pretrain(coloured(), **quick(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(weights(first.model), weights(again.model))
    assert not torch.equal(weights(first.model), weights(other.model))


@pytest.mark.parametrize(
    "batch_size, limit, steps", [(16, None, 4), (16, 2, 2), (16, 99, 4), (1000, None, 1), (54, None, 1)]
)
def test_steps_per_epoch_are_whole_epochs_unless_limited(batch_size, limit, steps):
    """60 images, 6 of which are held out for validation."""
    trained = pretrain(coloured(), **quick(batch_size=batch_size, train_steps_per_epoch=limit))
    assert [step["step"] for step in trained.history.steps] == list(range(1, 2 * steps + 1))
    assert [epoch["step"] for epoch in trained.history.epochs] == [steps, 2 * steps]


def test_history_records_every_epoch_and_survives_a_round_trip(tmp_path):
    history = pretrain(coloured(), **quick()).history
    assert set(history.epochs[0]) == {
        "epoch", "step", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "seconds",
        "images_per_second",
    }  # fmt: skip
    mean = sum(step["loss"] * size for step, size in zip(history.steps[:4], (16, 16, 16, 6), strict=True)) / 54
    assert history.epochs[0]["train_loss"] == pytest.approx(mean, rel=1e-5)
    history.save(tmp_path / "h.json")
    assert History.load(tmp_path / "h.json") == history


def test_best_and_last_weights_are_both_kept(tmp_path, monkeypatch):
    scores = iter([0.2, 0.9, 0.5])
    monkeypatch.setattr(train_module, "evaluate", lambda *a: {"loss": 1.0, "accuracy": next(scores)})
    trained = pretrain(coloured(), **quick(pretrain_epochs=3, run_dir=tmp_path))
    last, last_card = load_checkpoint(tmp_path / "pretrained.safetensors")
    best, best_card = load_checkpoint(tmp_path / "pretrained-best.safetensors")
    assert torch.equal(weights(last), weights(trained.model)) and not torch.equal(weights(best), weights(last))
    assert len(last_card.record["epochs_run"]) == 3 and len(best_card.record["epochs_run"]) == 2
    assert trained.history.best["epoch"] == 2
    assert History.load(tmp_path / "pretrained-history.json") == trained.history


def test_ctrl_c_keeps_the_weights_so_far_and_says_so(tmp_path, monkeypatch, capsys):
    calls = []
    augment = Augmentation.apply

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 7:  # in the middle of the second epoch of four steps
            raise KeyboardInterrupt
        return augment(self, *args)

    monkeypatch.setattr(Augmentation, "apply", interrupted)
    trained = pretrain(coloured(), **quick(pretrain_epochs=5, run_dir=tmp_path))
    assert trained.history.interrupted and len(trained.history.epochs) == 1
    assert "Stopped by Ctrl-C in epoch 2" in capsys.readouterr().out
    saved, _ = load_checkpoint(tmp_path / "pretrained.safetensors")
    assert torch.equal(weights(saved), weights(trained.model))


def test_card_describes_what_was_done():
    card = pretrain(coloured(), **quick(source="colours", seed=4)).card
    assert card.classes == ("red", "green", "blue") and card.preset == "tiny"
    assert card.record["source"] == "colours" and card.record["seed"] == 4 and card.record["batch_size"] == 16
    assert card.record["recipe"]["optimizer"] == "adamw" and "torch" in card.record["versions"]


def test_modern_measures_its_normalisation_and_published_uses_cifar10s():
    modern = pretrain(coloured(), **quick()).card
    assert modern.mean != CIFAR10_MEAN and modern.mean[0] == pytest.approx((50 + 120 / 3) / 255, abs=0.02)
    assert pretrain(coloured(), **quick(recipe="published")).card.mean == CIFAR10_MEAN


def test_published_recipe_is_the_published_system():
    recipe = RECIPES["published"]
    assert (recipe.optimizer, recipe.learning_rate, recipe.momentum, recipe.weight_decay) == ("sgd", 0.01, 0.9, 1e-4)
    assert recipe.schedule == "constant" and recipe.augmentation == PUBLISHED and recipe.drop == 0.1
    optimizer = build_optimizer(create_model("small", 100), recipe)
    assert len(optimizer.param_groups) == 1 and isinstance(optimizer, torch.optim.SGD)
    assert FINETUNING["published"] == recipe


def test_adamw_decays_matrices_only_and_the_head_has_its_own_rate():
    model = create_model("small", 10)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, replace(RECIPES["modern"], head_rate=10.0))
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            plain = name.endswith("bias") or "norm" in name or name.endswith(("cls_token", "position_embedding"))
            assert group["weight_decay"] == (0 if plain else RECIPES["modern"].weight_decay), name
            factor = 10 if name.startswith("linear_classifier") else 1
            assert group["lr"] == pytest.approx(factor * RECIPES["modern"].learning_rate), name
    assert seen == set(names.values())


def test_rate_rises_during_warmup_and_falls_to_zero():
    recipe = replace(RECIPES["modern"], warmup=0.2)
    rates = [rate_factor(recipe, step, 100) for step in range(100)]
    assert rates[:20] == sorted(rates[:20]) and rates[20] == 1.0
    assert rates[20:] == sorted(rates[20:], reverse=True) and rates[-1] < 0.001
    assert {rate_factor(RECIPES["published"], step, 100) for step in range(100)} == {1.0}


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile], ids=["plain", "parallel", "compiled"])
def test_finetuning_moves_the_encoder_with_a_new_head_and_leaves_the_upstream_model(wrap):
    upstream = pretrain(coloured(), **quick())
    before = weights(upstream.model).clone()
    downstream = coloured(80, classes=2)
    trained = finetune(wrap(upstream.model), upstream.card, downstream, batch_size=16, device="cpu", progress=False)
    assert trained.model.linear_classifier.weight.shape == (2, 16)
    assert trained.history.steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "the new head starts at zero"
    assert trained.card.mean == upstream.card.mean and trained.card.classes == downstream.classes
    assert torch.equal(weights(upstream.model), before)
    assert not torch.equal(trained.model.vit_encoder.layernorm.weight, upstream.model.vit_encoder.layernorm.weight), (
        "the encoder is trained too"
    )


def test_linear_probe_trains_the_head_alone():
    upstream = pretrain(coloured(), **quick())
    probe = finetune(upstream.model, upstream.card, coloured(), freeze_encoder=True, device="cpu", progress=False)
    for name, tensor in probe.model.vit_encoder.state_dict().items():
        assert torch.equal(tensor, upstream.model.vit_encoder.state_dict()[name]), name
    assert probe.model.linear_classifier.weight.any()


def test_evaluation_with_few_steps_sees_all_classes_of_sorted_data():
    data = coloured(300)
    data = data.subset(data.labels.argsort())
    trained = pretrain(data, **quick())
    seen = []
    train_module_predict, train_module.predict = (
        train_module.predict,
        lambda m, images, *a: seen.append(images) or train_module_predict(m, images, *a),
    )
    try:
        evaluate(trained.model, data, trained.card, batch_size=3, steps=2)
    finally:
        train_module.predict = train_module_predict
    assert len(seen[0]) == 6 and len(set(seen[0].float().mean((2, 3)).argmax(1).tolist())) == 3


def test_prediction_does_not_depend_on_the_batch_size_or_change_the_mode():
    trained = pretrain(coloured(), **quick(recipe="published"))
    model = trained.model.train()
    one, all_at_once = (predict(model, coloured().images, trained.card, size) for size in (1, 60))
    torch.testing.assert_close(one, all_at_once, rtol=0, atol=1e-5)
    assert model.training


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"pretrain_epochs": 0}, "epochs=0 is not allowed"),
        ({"batch_size": -1}, "batch_size=-1 is not allowed"),
        ({"train_steps_per_epoch": 0}, "train_steps_per_epoch=0 is not allowed"),
        ({"eval_steps_per_epoch": 1.5}, "eval_steps_per_epoch=1.5 is not allowed"),
        ({"recipe": "secret"}, "recipe='secret' is not known; choose one of published, modern"),
        ({"preset": "huge"}, "preset='huge' is not known"),
        ({"device": "tpu"}, "device='tpu' is not to be had"),
        ({"validation_fraction": 2}, "fraction"),
    ],
)
def test_bad_arguments_give_one_sentence_and_write_nothing(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        pretrain(coloured(), **quick(run_dir=tmp_path, **changes))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_no_images_at_all_give_one_sentence():
    trained = pretrain(coloured(), **quick())
    data, none = coloured(), coloured().subset([])
    for train, validation in ((none, data), (data, none)):
        with pytest.raises(ValueError, match="too few"):
            fit(trained.model, train, validation, trained.card, RECIPES["modern"], epochs=1, progress=False)


def test_images_of_another_size_than_the_upstream_ones_are_refused():
    upstream = pretrain(coloured(), **quick())
    larger = LabelledImages(torch.zeros(20, 3, 16, 16, dtype=torch.uint8), torch.arange(20) % 2, ("a", "b"))
    with pytest.raises(ValueError, match=r"\[B, 3, 8, 8\]"):
        finetune(upstream.model, upstream.card, larger, device="cpu", progress=False)


def test_auto_device_is_one_that_works():
    torch.zeros(1, device=resolve_device("auto")) + 1


def test_fit_accepts_any_module_that_holds_a_vit(tmp_path):
    trained = pretrain(coloured(), **quick())
    data = coloured()
    history = fit(nn.DataParallel(trained.model), data, data, trained.card, RECIPES["modern"], epochs=1, progress=False)
    assert len(history.epochs) == 1


def test_progress_bar_shows_loss_accuracy_and_speed(capsys):
    pretrain(coloured(), **quick(progress=True))
    shown = capsys.readouterr().out
    assert "epoch 2/2" in shown and "loss" in shown and "validation accuracy" in shown and "images/s" in shown
