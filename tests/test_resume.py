"""Interrupted trainings: killed at any moment and called again, they end with the same bits as one left alone."""

import functools
import itertools
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import children
import pytest
import torch
from conftest import TINY, coloured

from vitlib.data.augment import Augmentation
from vitlib.model import PRESETS
from vitlib.training import loop, stages
from vitlib.training.history import History
from vitlib.training.recipes import RECIPES
from vitlib.training.resume import ResumeFile
from vitlib.training.stages import finetune, pretrain
from vitlib.training.trainer import Trainer
from vitlib.weights.checkpoint import load_checkpoint

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL"),
    pytest.mark.usefixtures("tiny_preset"),
]

AUGMENTATION = Augmentation(padding=2, flip=0.5, cutout=2, randaugment=1, erase=0.5, mixing=0.5)
ALL_AT_ONCE = replace(
    RECIPES["modern"], drop=0.2, drop_path=0.4, ema_decay=0.9, augmentation=AUGMENTATION, mix_until=0.7,
    keep_patches=((0.7, 0.5),),
)  # fmt: skip
RUNS = {  # 54 training images in batches of 16: four steps an epoch, the last of six images
    "everything": {"recipe": ALL_AT_ONCE},
    "sgd": {"recipe": RECIPES["published"]},
    "muon": {"recipe": replace(ALL_AT_ONCE, optimizer="muon", matrix_rate=3.0)},
    "bfloat16": {"recipe": replace(ALL_AT_ONCE, ema_decay=0.0), "precision": "bfloat16", "pooling": "mean"},
}
TIMINGS = ("seconds", "images_per_second")


def train(run_dir, data=None, **changes):
    arguments = {"preset": "tiny", "pretrain_epochs": 3, "batch_size": 16, "device": "cpu", "progress": False}
    return pretrain(data or coloured(), run_dir=run_dir, resume=True, **arguments | changes)


# What happens in the processes that are killed. A moment is a place in the code and how often it is passed.


def kill_before(count, owner, name, concerns=lambda *arguments: True):
    """Kill this process when it calls ``owner.name`` for the ``count``-th time with arguments that matter."""
    original, calls = getattr(owner, name), itertools.count(1)

    def deadly(*arguments, **options):
        if concerns(*arguments) and next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, deadly)


def write_half(content, path) -> bool:
    Path(path).write_bytes(b"half of a file")
    return True


PLACES = {
    "a step": (Trainer, "augment"),
    "the evaluation": (loop, "evaluate"),
    "writing the weights": (stages, "save_checkpoint"),
    "writing the history": (History, "save"),
    "the next epoch": (Trainer, "batches"),
    "writing the state": (torch, "save", write_half),
    "the first move": (os, "replace", lambda source, target: str(target).endswith("-resume-previous.pt")),
    "the second move": (os, "replace", lambda source, target: str(target).endswith("-resume.pt")),
}


def print_steps() -> None:
    """Every training step prints its number, from 0, before it does anything."""
    original = Trainer.augment

    def augment(self, *arguments):
        print("step", self.step, flush=True)
        return original(self, *arguments)

    Trainer.augment = augment


def train_until(run_dir, run, place, count, minutes):
    PRESETS["tiny"] = TINY
    stages.ResumeFile = functools.partial(ResumeFile, minutes=minutes)
    print_steps()
    if place is not None:
        kill_before(count, *PLACES[place])
    train(run_dir, **RUNS[run])


def until(folder: Path, run: str, place: str | None = None, count=1, minutes=0.0) -> list[int]:
    """Train in a process of its own until it dies in ``place``, or to the end. Returns the steps that it tried."""
    log = folder.parent / f"{folder.name}.log"
    code = children.run(train_until, folder, run, place, count, minutes, log=log)
    assert code == (0 if place is None else -signal.SIGKILL), log.read_text()
    return [int(line.split()[1]) for line in log.read_text().splitlines()]


def left_in(folder: Path) -> list:
    """What a training leaves: weights, averaged weights, optimiser, losses, random states, history, cards."""
    left = [torch.load(folder / "pretrained-resume.pt", weights_only=True)]
    for name in ("pretrained", "pretrained-best"):
        model, card = load_checkpoint(folder / f"{name}.safetensors")
        left += [model.state_dict(), card.record["epochs_run"]]
    return [*left, asdict(History.load(folder / "pretrained-history.json"))]


def differences(one, other, name="") -> list[str]:
    """The names of all values that are not the same to the last bit, but for times."""
    if type(one) is not type(other):
        return [name]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [name]
    if isinstance(one, dict) and one.keys() == other.keys():
        return [n for key in one if key not in TIMINGS for n in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, list | tuple) and len(one) == len(other):
        return [n for i, pair in enumerate(zip(one, other, strict=True)) for n in differences(*pair, f"{name}.{i}")]
    return [] if one == other else [name]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """``left_alone(run)`` is what a training that nobody killed leaves."""

    @functools.cache
    def result(run: str) -> list:
        folder = tmp_path_factory.mktemp("alone") / run
        assert until(folder, run) == list(range(12))
        return left_in(folder)

    return result


@pytest.mark.parametrize(
    "place, count, minutes, goes_on_with",
    [
        ("a step", 1, 0, 0),  # before anything is saved
        ("a step", 7, 5, 4),  # where a state is saved at the end of epochs only
        ("writing the weights", 3, 0, 8),
        ("writing the history", 2, 0, 8),
        ("the next epoch", 2, 0, 4),
        # the sixth state is that after step 4: one is written after every step and one at the end of every epoch
        ("writing the state", 6, 0, 4),
        ("the second move", 6, 0, 4),
    ],
)
def test_killed_once_and_called_again(tmp_path, left_alone, place, count, minutes, goes_on_with):
    until(tmp_path / "run", "everything", place, count, minutes)
    again = until(tmp_path / "run", "everything", minutes=minutes)
    assert again == list(range(goes_on_with, 12)), "it does not go on where it was killed"
    assert differences(left_in(tmp_path / "run"), left_alone("everything")) == []


@pytest.mark.parametrize("run", RUNS)
def test_killed_again_and_again(tmp_path, left_alone, run):
    places = [("a step", 3), ("the second move", 2), ("the evaluation", 1), ("the first move", 3), ("a step", 2)]
    starts = [until(tmp_path / "run", run, *place)[:1] for place in places]
    assert starts == [[0], [2], [3], [4], [5]]
    assert until(tmp_path / "run", run) == list(range(6, 12))
    assert differences(left_in(tmp_path / "run"), left_alone(run)) == []


# The rest needs no process of its own: a training that is interrupted leaves the same files as a killed one.


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a training."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(PRESETS, "tiny", TINY)
        train(folder, recipe=ALL_AT_ONCE)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "words, changes",
    [
        ("this one has epochs=4;", {"pretrain_epochs": 4}),
        ("this one has validation_fraction=0.2;", {"validation_fraction": 0.2}),
        ("this one has precision='bfloat16';", {"precision": "bfloat16"}),
        ("this one has recipe.augmentation.padding=1;", {"recipe": replace(ALL_AT_ONCE, augmentation=Augmentation(1))}),
        ("this one has config.pooling='mean';", {"pooling": "mean"}),
        ("because the training images have changed", {"data": coloured(seed=1)}),
        ("because the training images have changed", {"data": replace(coloured(), labels=coloured().labels.roll(1))}),
    ],
    ids=range(7),
)
def test_the_file_of_another_training_is_refused(trained, words, changes):
    before = contents(trained)
    with pytest.raises(ValueError, match=words):
        train(trained, **{"recipe": ALL_AT_ONCE} | changes)
    assert contents(trained) == before


def test_finetuning_goes_on_too_but_not_from_other_weights(tmp_path, monkeypatch):
    first, second = (train(tmp_path / f"upstream-{seed}", pretrain_epochs=1, seed=seed) for seed in (0, 1))

    def tune(upstream=first, run="run", **changes):
        arguments = {"finetune_epochs": 2, "batch_size": 16, "device": "cpu", "progress": False, "resume": True}
        return finetune(upstream.model, upstream.card, coloured(seed=1), run_dir=tmp_path / run, **arguments | changes)

    alone = tune(run="alone")
    tried, augment = [], Trainer.augment

    def stopped_once(self, batch):
        tried.append(self.step)
        if len(tried) == 6:
            raise KeyboardInterrupt
        return augment(self, batch)

    monkeypatch.setattr(Trainer, "augment", stopped_once)
    monkeypatch.setattr(stages, "ResumeFile", functools.partial(ResumeFile, minutes=0))
    assert tune().history.interrupted
    with pytest.raises(ValueError, match="belongs to .* because it started from other weights"):
        tune(replace(second, card=first.card))
    with pytest.raises(ValueError, match="belongs to a training with normalisation="):
        tune(replace(first, card=replace(first.card, std=(0.5,) * 3)))
    with pytest.raises(ValueError, match="with stage='fine-tuning', this one has stage='linear probe'"):
        tune(freeze_encoder=True)
    left = [(one.model.state_dict(), asdict(one.history)) for one in (tune(), alone)]
    assert tried == [0, 1, 2, 3, 4, 5, 5, 6, 7] and differences(*left) == []
