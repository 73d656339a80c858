"""Benchmarks: their arithmetic on made-up measurements, and every script with tiny settings."""

import json
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import image_folder
from test_model import copy_block
from torch import nn

from vitlib.costs import costs, preset_config
from vitlib.data.augment import CIFAR10_MEAN, CIFAR10_STD, crop_and_flip, normalise
from vitlib.data.images import LabelledImages
from vitlib.model import count_parameters, create_model
from vitlib.training.trainer import Trainer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts find each other in their own folder

import busy_machine  # noqa: E402
import common  # noqa: E402
import input_pipeline  # noqa: E402
import peers  # noqa: E402
import pretraining_speed  # noqa: E402
import recipe_trials  # noqa: E402
import sweep  # noqa: E402
import throughput  # noqa: E402
import time_to_accuracy  # noqa: E402
import transfer_trials  # noqa: E402
import vit_against_cnn  # noqa: E402


def run(script, *arguments: str | Path, exit_code=0) -> str:
    """What a script prints. Of its arguments texts are cut into words, and paths are not."""
    words = [word for one in arguments for word in ([str(one)] if isinstance(one, Path) else one.split())]
    result = CliRunner().invoke(script.main, words)
    assert result.exit_code == exit_code, result.output
    return result.output


def measured(script, *arguments: str | Path, folder: Path) -> tuple[str, dict]:
    """What a script prints, and the record that it writes."""
    output = run(script, *arguments, "--out", folder / "out.json")
    return output, json.loads((folder / "out.json").read_text())


def test_every_round_measures_everything_once_in_another_order():
    seen = []
    tasks = {name: (lambda name=name: seen.append(name) or len(seen)) for name in "abcde"}
    results = common.interleave(tasks, rounds=4)
    rounds = [seen[start : start + 5] for start in range(0, 20, 5)]
    assert [sorted(names) for names in rounds] == [list("abcde")] * 4
    assert len({tuple(names) for names in rounds}) == 4
    assert [seen[position - 1] for position in results["c"]] == ["c"] * 4


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_have_the_size_of_ours(name):
    models, skipped = peers.build_models([name])
    if skipped:
        pytest.skip(skipped[name])
    ours, theirs = map(count_parameters, models.values())
    assert list(models) == ["vitlib", name] and ours == 3_218_020 == pytest.approx(theirs, rel=0.01)
    assert models[name](torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_post_norm_model_equals_the_published_transformer_encoder():
    published = peers.Published(drop=0.0).eval()
    with torch.no_grad():
        for parameter in published.parameters():  # away from zero biases and unit norms, so that each one counts
            parameter.add_(0.02 * torch.randn_like(parameter))
    model = create_model("small", 100, norm_first=False, patch_bias=False).eval()
    encoder, theirs = model.vit_encoder, published.state_dict()
    encoder.embedding.load_state_dict({name: theirs[name] for name in encoder.embedding.state_dict()})
    for block, layer in zip(encoder.encoder, published.encoder.layers, strict=True):
        copy_block(block, layer)
    encoder.layernorm.load_state_dict(published.layernorm.state_dict())
    model.linear_classifier.load_state_dict(published.linear_classifier.state_dict())
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), published(images), rtol=0, atol=1e-5)


def test_throughput_arithmetic():
    """Seconds for 2 steps of 10 images in float32, half of them in bfloat16: vitlib 0.5, 1, 1; published twice that;
    timm as fast by the median of the ratios of the rounds, though not by the ratio of the medians."""
    rounds = {"vitlib": [0.5, 1.0, 1.0], "published": [1.0, 2.0, 2.0], "timm": [0.5, 0.8, 2.0]}
    phases = {
        (name, precision): [{"forward": s / share, "backward": 2 * s / share, "step": s / share} for s in seconds]
        for precision, share in (("float32", 4), ("bfloat16", 8))
        for name, seconds in rounds.items()
        if (name, precision) != ("published", "bfloat16")
    }
    lines = [re.split("  +", line) for line in throughput.report(phases, 20, 2).splitlines()]
    assert lines[2][-3:] == ["2.00 (2.00 to 2.00)", "1.00 (0.80 to 2.00)", "timm"]
    assert lines[3][:6] == ["published", "float32", "10.0", "250.0", "500.0", "250.0"]
    assert lines[3][-3:] == ["1.00 (1.00 to 1.00)", "0.50 (0.40 to 1.00)", "timm"]
    assert lines[5][-3:] == ["-", "1.00 (0.80 to 2.00)", "timm"]
    assert lines[-1] == ["vitlib in bfloat16 is 4.00 (4.00 to 4.00) times as fast as the published model in float32."]


def test_throughput_of_small_models(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vit_pytorch", None)  # as if it were not installed
    words = "--models published,vit-pytorch --batch-size 2 --rounds 2 --steps 1 --device cpu"
    output, record = measured(throughput, words, folder=tmp_path)
    assert "vit-pytorch: skipped: " in output and "pip install -r benchmarks/requirements.txt" in output
    assert re.match(r"vitlib in bfloat16 is \d", output.splitlines()[-1])
    assert list(record["skipped"]) == ["vit-pytorch"] and record["peers"]["torchvision"] == version("torchvision")
    models = ["vitlib", "published"]
    assert set(record["seconds"]) == {f"{name}, {kind}" for name in models for kind in ("float32", "bfloat16")}
    for rounds in record["seconds"].values():
        assert len(rounds) == 2 and all(tuple(s) == throughput.PHASES and min(s.values()) > 0 for s in rounds)


def test_torchvision_takes_the_published_steps():
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    out = input_pipeline.torchvision_transform("published")(image)
    hole = (out == 0).all(0)
    corner, opposite = hole.nonzero().min(0).values, hole.nonzero().max(0).values
    assert hole.sum() == 64 and (opposite - corner).tolist() == [7, 7]
    shifts, flips = torch.arange(9), torch.tensor([False, True])
    top, left, flipped = torch.cartesian_prod(shifts, shifts, flips.long()).unbind(1)
    ours = crop_and_flip(image.expand(len(top), -1, -1, -1), top, left, flipped.bool(), padding=4)
    ours = normalise(ours, CIFAR10_MEAN, CIFAR10_STD).masked_fill(hole, 0)
    assert torch.isclose(ours, out, atol=1e-5).flatten(1).all(1).sum() == 1  # all of vitlib's outcomes: it is one


def test_input_pipeline_arithmetic():
    speeds = {("vitlib", "modern", 2): [1000, 3000, 2000], ("torchvision", "modern", 2): [100, 100, 100]}
    steps = {("modern", "float32"): [0.5, 0.5, 0.5]}  # 10 images at 2000 images/s are 5 ms of 500
    lines = input_pipeline.tables(speeds, steps, cores=2, batch_size=10).splitlines()
    assert " ".join(lines[2].split()) == "modern 2 100 2,000 20.0 (10.0 to 30.0)"
    assert " ".join(lines[-1].split()) == "modern float32 500.0 1.00 (0.67 to 2.00)"


def test_input_pipeline_of_few_images(tmp_path):
    words = "--images 16 --batch-size 4 --rounds 1 --steps 1 --cores 2 --device cpu --precisions float32"
    output, record = measured(input_pipeline, words, folder=tmp_path)
    assert output.splitlines()[-1].startswith("modern ")
    assert len(record["images_per_second"]) == 8  # two libraries, two recipes, one core and two
    assert set(record["seconds_per_step"]) == {"published, float32", "modern, float32"}
    assert all(rounds[0] > 0 for part in ("images_per_second", "seconds_per_step") for rounds in record[part].values())


def made_up_run(folder: Path, accuracies: list[float], seconds: list[float]) -> Path:
    """The history of a pretraining of ten steps an epoch."""
    folder.mkdir()
    epochs = [
        {"epoch": i, "step": 10 * i, "seconds": took, "validation_accuracy": accuracy}
        for i, (accuracy, took) in enumerate(zip(accuracies, seconds, strict=True), start=1)
    ]
    (folder / "pretrained-history.json").write_text(json.dumps({"epochs": epochs}))
    return folder


def test_time_to_accuracy(tmp_path):
    slow = made_up_run(tmp_path / "published", [0.1, 0.35, 0.2, 0.3], [30, 10, 30, 40])
    fast = made_up_run(tmp_path / "long", [0.25, 0.3, 0.4], [8, 8, 8])
    output = run(time_to_accuracy, slow, fast)
    assert re.search(r"published +4 +40 +110 +90 +30\.0", output), "quiet: 10 + 10 + 30 + 40"
    assert output.endswith(
        "the first ends with 30.0% after 4 epochs; the second reaches that after 2: 0.50 of the epochs, 0.50 of the "
        "steps, 0.15 of the seconds and 0.18 of the quiet seconds (goal: at most 0.33).\n"
    )
    never = made_up_run(tmp_path / "never", [0.25, 0.2], [8, 8])
    assert "does not reach that in 2 epochs (best: 25.0%)" in run(time_to_accuracy, slow, never)
    assert re.search(r"cifar100-small +100 +19200 +35613 +17146", run(time_to_accuracy)), "the shipped records"


@pytest.fixture
def two_classes(tmp_path) -> Path:
    return image_folder(tmp_path / "images", train=16, test=6, classes=2, size=32)


def test_trials_hold_images_out_and_write_every_score(tmp_path, two_classes):
    _, record = measured(recipe_trials, two_classes, "full half --seconds 0.1", folder=tmp_path)
    assert [trial["trial"] for trial in record["trials"]] == ["full", "half"]
    words = "muon --weights shapes100-mini --steps 1"
    output, record = measured(transfer_trials, two_classes, words, folder=tmp_path)
    assert [trial["trial"] for trial in record["trials"]] == ["muon"]
    assert re.search(r"muon +[\d.]+% of the held-out images .* after 1 steps", output)


def test_pretraining_speed_arithmetic():
    """A whole pretraining is of 5 million images."""
    assert pretraining_speed.summary([9.0, 1.0, 3.0, 2.0], images=10_000, flops=1e9, peak_tflops=100) == pytest.approx(
        {
            "first_epoch_seconds": 9, "epoch_seconds": 2, "images_per_second": 5_000, "projected_seconds": 1_000,
            "tflops": 5, "floor_seconds": 50, "share_of_floor": 0.05,
        }
    )  # fmt: skip


@pytest.mark.skipif("VITLIB_SLOW" not in os.environ, reason="takes half a minute: set VITLIB_SLOW to run it")
def test_pretraining_speed_of_few_images(tmp_path):
    words = "--images 20 --epochs 2 --batch-size 8 --preset mini --device cpu"
    printed, record = measured(pretraining_speed, words, folder=tmp_path)
    assert "first epoch: " in printed and "of training; the arithmetic floor is " in printed
    assert record["figures"]["images_per_second"] == pytest.approx(20 / record["epoch_seconds"][1])


def test_the_cnn_has_the_parameters_of_the_vit_and_each_knows_what_it_computes():
    vit, cnn = (vit_against_cnn.description(name, 100) for name in vit_against_cnn.NAMES)
    assert vit["parameters"] == 3_218_020 and vit["what"] == "preset small"
    assert vit["forward_flops"] == costs(preset_config("small", 100)).forward_flops.total
    assert abs(cnn["parameters"] / vit["parameters"] - 1) < 0.01 and cnn["what"] == "ResNet-20, width 55"


def test_the_cnn_is_the_residual_network_for_cifar():
    """He et al. 2016, section 4.2: 0.27 million parameters at width 16 and 10 classes; blocks add their input."""
    cnn = vit_against_cnn.create_cnn(16, 10)
    assert round(count_parameters(cnn) / 1e6, 2) == 0.27
    assert cnn(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    nn.init.zeros_(cnn[1].convolutions[-1].weight)
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(cnn[1](x), x.relu())


def test_both_models_see_the_same_images_and_are_scored_on_what_they_say(monkeypatch):
    """Eight images for three steps of four: every one once, half of them twice; and all of one seed alike."""
    pixels = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 32, 32)
    images = LabelledImages(pixels, torch.arange(8) % 2, ("a", "b"))
    seen, augment = {}, Trainer.augment

    def note(self, batch):
        numbers = [value for values in batch.drawn.values() for value in values.tolist()]
        seen.setdefault((name, seed), []).append((batch.images[:, 0, 0, 0].tolist(), numbers, self.recipe))
        return augment(self, batch)

    monkeypatch.setattr(Trainer, "augment", note)
    monkeypatch.setattr(vit_against_cnn, "evaluate", lambda model, data, card: {"loss": 0.5, "accuracy": len(data)})
    how = {"steps": 3, "batch_size": 4, "device": torch.device("cpu"), "precision": "float32"}
    for name, seed in (("ViT", 0), ("CNN", 0), ("CNN", 1)):
        scored = images.subset([0, 1, 2])
        result = vit_against_cnn.train_once(name, images, scored, vit_against_cnn.RECIPE, seed=seed, **how)
        assert result == {"accuracy": 3, "loss": 0.5, "train_accuracy": 12}
    assert seen["ViT", 0] == seen["CNN", 0] != seen["CNN", 1]
    assert sorted(sum((shown for shown, _, _ in seen["ViT", 0]), [])) == sorted([*range(8), *range(4)])


def test_learning_rates_are_chosen_on_images_that_are_not_trained_on():
    labels = torch.arange(200) // 50  # sorted by class, as in a folder
    data = LabelledImages(torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1), labels, tuple("abcd"))
    others, validation = vit_against_cnn.set_aside(data)
    assert validation.labels.tolist() == [0, 1, 2, 3] and len(others) == 196
    assert not set(others.images.flatten().tolist()) & set(validation.images.flatten().tolist())
    assert set(others.labels[:20].tolist()) == {0, 1, 2, 3}


def test_vit_against_cnn_of_few_images(tmp_path, two_classes, monkeypatch):
    monkeypatch.setattr(vit_against_cnn, "ROUNDS", 1)
    monkeypatch.setattr(vit_against_cnn, "STEPS_PER_ROUND", 1)
    words = "--sizes 4,2 --steps 2 --batch-size 2 --rates 1e-3 --sweep-steps 2 --device cpu --seeds 1 --upstream"
    output, record = measured(vit_against_cnn, words, two_classes, folder=tmp_path)
    assert output.count("of the validation images") == 2 and output.count("seed 0, ") == 4
    assert record["settings"].items() >= {"upstream": "images", "classes": 2, "test_images": 6, "steps": 2}.items()
    assert set(record["images_per_second"]) == set(record["models"]) == {"ViT", "CNN"}
    assert str(tmp_path) not in json.dumps(record)
    assert "--upstream images --sizes 2,4 --steps 2 --batch-size 2 --seeds 1 --rates 0.001 " in record["command"]


def test_a_comparison_takes_each_models_best_rate(two_classes, monkeypatch):
    trained = []

    def scripted(name, images, scored, recipe, steps, batch_size, seed, device, precision):
        trained.append((name, len(images), len(scored), recipe.learning_rate, steps, batch_size, seed))
        loss = abs(recipe.learning_rate - {"ViT": 1e-3, "CNN": 4e-3}[name])
        return {"loss": loss, "accuracy": 0.25 * (seed + 1), "train_accuracy": 0.5}

    monkeypatch.setattr(vit_against_cnn, "train_once", scripted)
    monkeypatch.setattr(vit_against_cnn, "speeds", lambda *_, **__: {"ViT": [10.0, 20.0], "CNN": [5.0, 5.0]})
    words = "--sizes 4,2 --steps 9 --batch-size 3 --rates 4e-3,1e-3 --sweep-steps 5 --seeds 2 --device cpu --upstream"
    output = run(vit_against_cnn, words, two_classes)
    sweep = [(name, 14, 2, rate, 5, 3, 0) for rate in (1e-3, 4e-3) for name in ("ViT", "CNN")]
    best = (("ViT", 1e-3), ("CNN", 4e-3))
    assert trained == sweep + [
        (name, size, 6, rate, 9, 3, seed) for seed in (0, 1) for size in (2, 4) for name, rate in best
    ]
    assert re.search(r"^2 +ViT +2 +37.5 \(25.0 to 50.0\)", output, re.MULTILINE)
    assert "The CNN has 2.19 times the FLOPs of the ViT and trains 0.38 (0.25 to 0.50) times as fast." in output


def test_vit_against_cnn_refuses_more_images_than_its_steps_see():
    said = run(vit_against_cnn, "--sizes 5 --steps 2 --batch-size 2 --device cpu", exit_code=1)
    assert "5 images has more than the 4 that 2 steps of 2 see" in " ".join(said.split())


@pytest.mark.skipif("VITLIB_SLOW" not in os.environ, reason="runs nine kernels: set VITLIB_SLOW to run it")
def test_the_sweep_s_benchmark_prints_both_ratios(tmp_path):
    printed, record = measured(sweep, "--runs 2 --steps 1 --rounds 1", folder=tmp_path)
    alone, one, two = (record["seconds"][name][0] for name in ("papermill", "one worker", "two workers"))
    assert f"2 runs take {one / alone:.3f} " in printed and f"end {one / two:.2f} " in printed


def test_busy_machine_compares_rounds_with_and_without_the_setting(monkeypatch, tmp_path):
    found = {0: {"import vitlib, torch": 600.0, "import torch, vitlib": 620.0}}
    found |= {busy: {"import vitlib, torch": 390.0, "import torch, vitlib": 30.0} for busy in (1, 2)}
    monkeypatch.setattr(busy_machine, "speed", lambda busy, *, imports, **settings: found[busy][imports])
    monkeypatch.setattr(busy_machine, "usable_cores", lambda: 2)
    words = "--presets mini --precisions bfloat16 --rounds 2"
    output, record = measured(busy_machine, words, folder=tmp_path)
    assert re.search(r"^mini, bfloat16 +2 +30 .* 390 .* 13.00 .* 0.65 ", output.splitlines()[-1])
    assert record["images_per_second"]["mini, bfloat16, 0, default"] == [620.0, 620.0]


@pytest.mark.skipif("VITLIB_SLOW" not in os.environ, reason="starts Python anew: set VITLIB_SLOW to run it")
def test_a_busy_machine_is_one_with_other_processes():
    settings = {"imports": busy_machine.IMPORTS["vitlib"], "threads": 1, "seconds": 0.01, "precision": "float32"}
    assert busy_machine.speed(1, preset="mini", batch_size=2, **settings) > 0
