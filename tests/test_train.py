"""Training: it learns, it is repeatable, it counts its steps, it survives Ctrl-C, it moves only what it should."""

import copy
import math
import os
import re
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import COLOURS, coloured, refusal
from torch import nn

from vitlib.data.augment import CIFAR10_MEAN, CIFAR10_STD, PUBLISHED, Augmentation, mixed_cross_entropy
from vitlib.data.images import channel_statistics, train_validation_split
from vitlib.model import create_model
from vitlib.training import loop
from vitlib.training.devices import resolve_precision
from vitlib.training.history import History
from vitlib.training.loop import evaluate, fit, predict
from vitlib.training.recipes import FINETUNING, RECIPES
from vitlib.training.stages import finetune, pretrain
from vitlib.training.trainer import Batch, Trainer, TrainingOptions
from vitlib.weights.checkpoint import ModelCard, load_checkpoint

pytestmark = pytest.mark.usefixtures("tiny_preset")


def quick(**changes):
    arguments = {"preset": "tiny", "pretrain_epochs": 2, "batch_size": 16, "device": "cpu", "progress": False}
    return arguments | changes


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_pretraining_learns_with_weights_in_float32(monkeypatch, precision):
    computed, forward = set(), nn.Linear.forward

    def observed(self, x):
        out = forward(self, x)
        if self.training:
            computed.add(out.dtype)
        return out

    monkeypatch.setattr(nn.Linear, "forward", observed)
    recipe = replace(RECIPES["modern"], learning_rate=1e-2)
    trained = pretrain(coloured(), **quick(pretrain_epochs=12, recipe=recipe, precision=precision))
    first, *_, last = trained.history.epochs
    assert last["validation_accuracy"] == 1.0 and last["train_loss"] < 0.5 * first["train_loss"]
    assert evaluate(trained.model, coloured(seed=1), trained.card)["accuracy"] > 0.95
    assert computed == {getattr(torch, precision)} and trained.card.record["precision"] == precision
    assert {parameter.dtype for parameter in trained.model.parameters()} == {torch.float32}


def test_the_seed_decides_the_first_weights():
    still = replace(RECIPES["modern"], learning_rate=0.0)
    first, again, other = (weights(pretrain(coloured(), **quick(recipe=still, seed=seed)).model) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("limit, sizes", [(None, (16, 16, 16, 6)), (2, (16, 16))])
def test_an_epoch_has_its_steps_and_the_mean_loss_of_its_images(limit, sizes):
    """60 images, 6 of which are held out for validation."""
    history, steps = pretrain(coloured(), **quick(train_steps_per_epoch=limit)).history, len(sizes)
    assert [step["step"] for step in history.steps] == list(range(1, 2 * steps + 1))
    assert [epoch["step"] for epoch in history.epochs] == [steps, 2 * steps]
    mean = sum(step["loss"] * size for step, size in zip(history.steps[:steps], sizes, strict=True)) / sum(sizes)
    assert history.epochs[0]["train_loss"] == pytest.approx(mean, rel=1e-5)


def test_best_and_last_weights_are_both_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a folder named ~ would be seen
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("USERPROFILE", str(tmp_path.parent))
    scores = iter([0.2, 0.9, 0.5])
    monkeypatch.setattr(loop, "evaluate", lambda *a, **options: {"loss": 1.0, "accuracy": next(scores)})
    trained = pretrain(coloured(), **quick(pretrain_epochs=3, run_dir=f"~/{tmp_path.name}"))
    last, last_card = load_checkpoint(tmp_path / "pretrained.safetensors")
    best, best_card = load_checkpoint(tmp_path / "pretrained-best.safetensors")
    assert torch.equal(weights(last), weights(trained.model)) and not torch.equal(weights(best), weights(last))
    assert len(last_card.record["epochs_run"]) == 3 and len(best_card.record["epochs_run"]) == 2
    assert trained.history.best["epoch"] == 2
    assert History.load(tmp_path / "pretrained-history.json") == trained.history
    assert len(list(tmp_path.iterdir())) == 3, "no state to resume from unless asked for"


def test_ctrl_c_keeps_the_weights_so_far_and_the_best_ones(tmp_path, monkeypatch, capsys):
    augment, calls, best = Trainer.augment, [], tmp_path / "pretrained-best.safetensors"

    def interrupted(self, *args):
        calls.append(best.read_bytes() if best.exists() else None)
        if len(calls) == 7:  # in the middle of the second epoch of four steps
            raise KeyboardInterrupt
        return augment(self, *args)

    monkeypatch.setattr(Trainer, "augment", interrupted)
    trained = pretrain(coloured(), **quick(pretrain_epochs=5, run_dir=tmp_path))
    assert trained.history.interrupted and len(trained.history.epochs) == 1
    assert "Stopped by Ctrl-C in epoch 2" in capsys.readouterr().out
    saved, _ = load_checkpoint(tmp_path / "pretrained.safetensors")
    assert torch.equal(weights(saved), weights(trained.model))
    assert best.read_bytes() == calls[-1], "the weights of an unfinished epoch were never validated"


def test_published_recipe_is_the_published_system_and_modern_measures_its_normalisation():
    recipe = RECIPES["published"]
    assert (recipe.optimizer, recipe.learning_rate, recipe.momentum, recipe.weight_decay) == ("sgd", 0.01, 0.9, 1e-4)
    assert recipe.schedule == "constant" and recipe.augmentation == PUBLISHED and recipe.drop == 0.1
    assert FINETUNING["published"] == recipe
    published, modern = (pretrain(coloured(), **quick(recipe=name)).card for name in ("published", "modern"))
    assert (published.mean, published.std) == (CIFAR10_MEAN, CIFAR10_STD)
    assert (modern.mean, modern.std) == channel_statistics(coloured().images)


def test_finetuning_moves_the_encoder_with_a_new_head_and_leaves_the_upstream_model():
    upstream = pretrain(coloured(), **quick())
    before = weights(upstream.model).clone()
    downstream = coloured(80, classes=2)
    trained = finetune(upstream.model, upstream.card, downstream, batch_size=16, device="cpu", progress=False)
    assert trained.model.linear_classifier.weight.shape == (2, 16)
    assert trained.history.steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "the new head starts at zero"
    assert trained.card.mean == upstream.card.mean and trained.card.classes == downstream.classes
    assert torch.equal(weights(upstream.model), before)
    assert not torch.equal(trained.model.vit_encoder.layernorm.weight, upstream.model.vit_encoder.layernorm.weight)
    assert "are not square" in refusal(finetune, upstream.model, upstream.card, OBLONG)


def test_evaluation_with_few_steps_sees_all_classes_of_sorted_data(monkeypatch):
    data = coloured(300)
    data = data.subset(data.labels.argsort())
    trained = pretrain(data, **quick())
    seen = []
    monkeypatch.setattr(loop, "predict", lambda model, images, *a: seen.append(images) or predict(model, images, *a))
    evaluate(trained.model, data, trained.card, batch_size=3, steps=2)
    assert len(seen[0]) == 6 and len(set(seen[0].float().mean((2, 3)).argmax(1).tolist())) == 3


def test_prediction_does_not_depend_on_the_batch_size_or_change_the_mode():
    trained = pretrain(coloured(), **quick(recipe="published"))
    model = trained.model.train()
    one, all_at_once = (predict(model, coloured().images, trained.card, size) for size in (1, 60))
    torch.testing.assert_close(one, all_at_once, rtol=0, atol=1e-5)
    assert model.training


OBLONG = replace(coloured(), images=coloured().images[..., :4])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train": OBLONG}, "8x4, 3 classes) are not square; load them with image_size"),
        ({"pretrain_epochs": 0}, "epochs=0 is not allowed; give"),
        ({"batch_size": -1}, "batch_size=-1 is not allowed; give"),
        ({"train_steps_per_epoch": 0}, "train_steps_per_epoch=0 is not allowed; give"),
        ({"device": "tpu"}, "device='tpu' is not available here; choose"),
        ({"precision": "half"}, "precision='half' is not allowed; choose one of auto, float32, bfloat16"),
    ],
    ids=range(6),
)
def test_bad_arguments_give_one_sentence_and_write_nothing(tmp_path, changes, words):
    assert words in refusal(pretrain, **{"train": coloured()} | quick(run_dir=tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_fit_accepts_any_module_that_holds_a_vit():
    trained, data = pretrain(coloured(), **quick()), coloured()
    recipe = FINETUNING["modern"]  # it counts the ViT's blocks
    history = fit(nn.DataParallel(trained.model), data, data, trained.card, recipe, epochs=1, progress=False)
    assert len(history.epochs) == 1


def test_averaged_weights_of_a_cnn_come_with_the_running_statistics_of_batch_norm():
    data, recipe = coloured(), replace(RECIPES["modern"], learning_rate=0.1, ema_decay=0.5)
    cnn = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 3))
    card, states = ModelCard(data.classes, (0.4,) * 3, (0.2,) * 3), []

    def keep(averaged, history):
        states.extend(copy.deepcopy(model[1].state_dict()) for model in (averaged, cnn))

    fit(cnn, data, data, card, recipe, after_epoch=keep, epochs=1, batch_size=16, progress=False)
    averaged, last = states
    assert not torch.equal(averaged["weight"], last["weight"])
    assert torch.equal(averaged["running_mean"], last["running_mean"]) and averaged["running_mean"].abs().min() > 0
    assert torch.equal(averaged["running_var"], last["running_var"]) and averaged["num_batches_tracked"] == 4


def test_a_diverged_training_ends_with_one_sentence(tmp_path):
    recipe = replace(RECIPES["modern"], learning_rate=1e30, clip=None, schedule="constant", warmup=0.0)
    said = refusal(pretrain, coloured(), **quick(recipe=recipe, run_dir=tmp_path))
    assert re.search(r"The loss is \S+ in step \d+ of 8, at learning rate 1e\+30", said)
    assert not list(tmp_path.glob("*.safetensors"))


def test_accuracy_on_images_that_cifair_kept_is_apart():
    trained, data = pretrain(coloured(), **quick()), coloured()
    hits = predict(trained.model, data.images, trained.card).argmax(1) == data.labels
    kept = torch.arange(60) % 2 == 0
    score = evaluate(trained.model, replace(data, kept=kept), trained.card)
    assert score["images_kept"] == 30 and score["accuracy_kept"] == pytest.approx(hits[kept].float().mean().item())
    assert "accuracy_kept" not in evaluate(trained.model, data, trained.card)


def test_progress_bar_shows_loss_accuracy_and_speed(capsys):
    pretrain(coloured(), **quick(progress=True))
    shown = capsys.readouterr().out
    assert "epoch 2/2" in shown and "loss" in shown and "validation accuracy" in shown and "images/s" in shown


def test_averaged_weights_follow_the_formula_are_kept_and_do_not_change_the_training(tmp_path, monkeypatch):
    taken, augment = [], Trainer.augment  # before every step the weights, and their average

    def record(self, batch):
        taken.append((weights(self.model).clone(), weights(self.ema_model).clone()))
        return augment(self, batch)

    monkeypatch.setattr(Trainer, "augment", record)
    plain = quick(recipe=replace(RECIPES["modern"], ema_decay=0.0, learning_rate=1e-2))
    pretrain(coloured(), **plain)
    trained = pretrain(coloured(), **plain | {"recipe": replace(plain["recipe"], ema_decay=0.2), "run_dir": tmp_path})
    for (one, kept), (other, _) in zip(taken[:8], taken[8:], strict=True):
        assert torch.equal(one, kept), "without averaging the weights themselves are kept"
        assert torch.equal(one, other), "of one seed, with averaging or without"
    for step, ((_, before), (now, after)) in enumerate(pairwise(taken[8:])):
        warm = min(0.2, (1 + step) / (10 + step))
        torch.testing.assert_close(after, warm * before + (1 - warm) * now, rtol=0, atol=1e-6)
    assert (now - after).abs().max() > 1e-4, "they differ from the last weights"
    saved, card = load_checkpoint(tmp_path / "pretrained.safetensors")
    assert torch.equal(weights(saved), weights(trained.model))
    _, validation = train_validation_split(coloured(), 0.1, 0)
    score = evaluate(saved, validation, card)
    assert trained.history.epochs[-1]["validation_loss"] == score["loss"], "validation is of the averaged weights"


# Order and augmentation of the images


def batches_of(recipe, epoch=1, **options) -> list[Batch]:
    """The batches of one epoch of a training."""
    card = ModelCard(COLOURS, (0.5,) * 3, (0.25,) * 3)
    trainer = Trainer(create_model("tiny", 3), coloured(), card, recipe, TrainingOptions(epochs=4, **options))
    return list(trainer.batches(epoch))


def one_epoch(batch_size=16, epoch=1, seed=0) -> dict[str, torch.Tensor]:
    """The images of one epoch in their order, the labels, and the numbers of their augmentation."""
    recipe = replace(RECIPES["modern"], augmentation=Augmentation(2, 0.5, 3), keep_patches=((1.0, 0.5),))
    batches = batches_of(recipe, epoch, batch_size=batch_size, seed=seed)
    assert [len(batch.labels) for batch in batches] == [batch.size for batch in batches]
    parts = [
        {"images": batch.images, "labels": batch.labels, "patches": batch.kept_patches[0], **batch.drawn}
        for batch in batches
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_order_and_augmentation_depend_on_seed_and_epoch_but_not_on_the_batch_size():
    whole, parts, later, other = one_epoch(60), one_epoch(7), one_epoch(epoch=2), one_epoch(seed=1)
    assert whole.keys() == {"images", "labels", "patches", "flipped", "top", "left", "cutout"}
    for name, values in whole.items():
        assert torch.equal(parts[name], values), name
        assert not torch.equal(later[name], values) and not torch.equal(other[name], values), name


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_epoch_has_every_image_once_with_its_label(epoch):
    data, shown = coloured(), one_epoch(epoch=epoch)
    found = {image.numpy().tobytes(): label.item() for image, label in zip(data.images, data.labels, strict=True)}
    seen = [image.numpy().tobytes() for image in shown["images"]]
    assert sorted(seen) == sorted(found) and not torch.equal(shown["images"], data.images)
    assert [found[image] for image in seen] == shown["labels"].tolist()


def test_images_are_mixed_until_their_share_of_the_training_is_over():
    recipe = replace(RECIPES["modern"], augmentation=Augmentation(mixing=0.5, cutout=0), mix_until=0.5)
    mixed = ["mix_share" in batches_of(recipe, epoch, batch_size=16)[0].drawn for epoch in (1, 2, 3, 4)]
    assert mixed == [True, True, False, False]


def test_patches_are_dropped_by_the_recipes_schedule():
    recipe = replace(RECIPES["modern"], keep_patches=((0.25, 0.25), (0.75, 0.5)))
    kept = [batches_of(recipe, epoch)[0].kept_patches for epoch in (1, 2, 3, 4)]
    assert [patches[0].shape[1] if patches else 4 for patches in kept] == [1, 2, 2, 4]
    for patches in kept[1][0]:
        assert patches.unique().tolist() == patches.tolist() and set(patches.tolist()) <= {0, 1, 2, 3}
    assert not torch.equal(kept[1][0], kept[2][0]), "each epoch draws anew"


def test_the_loss_of_a_mixed_image_is_that_of_a_target_with_two_labels():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 2])
    kept = torch.tensor([0.7, 0.4, 0.9, 1.0, 1.0])
    targets = kept[:, None] * F.one_hot(labels, 3) + (1 - kept)[:, None] * F.one_hot(labels[[1, 0, 3, 2, 4]], 3)
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(mixed_cross_entropy(logits, labels, kept, 0.1), expected)


# Precision and compilation


@pytest.mark.parametrize(
    "precision, device, has, resolved",
    [
        ("auto", "mps", None, "float32"),
        ("auto", "cuda", "native", "bfloat16"),
        ("auto", "cuda", "emulated", "float32"),
        ("auto", "cpu", "avx512_bf16", "bfloat16"),
        ("auto", "cpu", "amx_bf16", "bfloat16"),
        ("auto", "cpu", "avx2", "float32"),
        ("bfloat16", "cpu", "avx2", "bfloat16"),
    ],
)
def test_precision_is_what_the_device_computes_in_natively(monkeypatch, precision, device, has, resolved):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: has == "native" or including_emulation
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, has: True})
    assert resolve_precision(precision, torch.device(device)) == resolved


@pytest.mark.skipif("VITLIB_SLOW" not in os.environ, reason="takes half a minute: set VITLIB_SLOW to run it")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
def test_a_compiled_model_trains_to_the_same_losses():
    recipe = replace(RECIPES["modern"], ema_decay=0.9)
    plain, compiled = (pretrain(coloured(), **quick(recipe=recipe, compile=compile)) for compile in (False, True))
    for name, rows in (("loss", "steps"), ("validation_loss", "epochs")):
        one, other = ([row[name] for row in getattr(trained.history, rows)] for trained in (plain, compiled))
        assert other == pytest.approx(one, abs=1e-3)
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())
