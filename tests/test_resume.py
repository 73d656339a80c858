"""Interrupted trainings: killed at any moment and called again, they end with the same bits as one that was left alone.

Wherever a state is compared, all of it is: weights, averaged weights, optimiser, losses and random generators.
"""

import functools
import itertools
import os
import pickle
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import children
import pytest
import torch

from vitlib.data.augment import Augmentation
from vitlib.data.images import LabelledImages
from vitlib.model import PRESETS
from vitlib.training import loop, stages
from vitlib.training.history import History
from vitlib.training.recipes import RECIPES
from vitlib.training.resume import ResumeFile
from vitlib.training.stages import finetune, pretrain
from vitlib.training.trainer import Trainer
from vitlib.weights.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")

TINY = {"num_layers": 2, "image_size": 8, "patch_size": 4, "em_dim": 16, "num_heads": 2, "ff_dim": 32}
AUGMENTATION = Augmentation(padding=2, flip=0.5, cutout=2, randaugment=1, erase=0.5, mixing=0.5)
ALL_AT_ONCE = replace(
    RECIPES["modern"],
    drop=0.2,
    drop_path=0.4,
    ema_decay=0.9,
    augmentation=AUGMENTATION,
    mix_until=0.7,
    keep_patches=((0.7, 0.5),),
)
RUNS = {  # 54 training images in batches of 16: four steps an epoch, the last of six images
    "everything": {"recipe": ALL_AT_ONCE},
    "sgd": {"recipe": RECIPES["published"]},
    "muon": {"recipe": replace(ALL_AT_ONCE, optimizer="muon", matrix_rate=3.0)},
    "bfloat16": {"recipe": replace(ALL_AT_ONCE, ema_decay=0.0), "precision": "bfloat16", "pooling": "mean"},
}
TIMINGS = ("seconds", "images_per_second")


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def colours(count=60, seed=0) -> LabelledImages:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 100, (count, 3, 8, 8), generator=generator)
    images[torch.arange(count), labels] += 120
    return LabelledImages(images.to(torch.uint8), labels, ("red", "green", "blue"))


def train(run_dir, **changes):
    arguments = {"preset": "tiny", "pretrain_epochs": 3, "batch_size": 16, "device": "cpu", "progress": False}
    return pretrain(colours(), run_dir=run_dir, resume=True, **arguments | changes)


# What happens in the processes that are killed. A moment is a place in the code and how often it is passed.


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(owner, name, count, concerns=lambda *arguments: True, act=lambda *arguments: None):
    """Kill this process when it calls ``owner.name`` for the ``count``-th time with arguments that matter."""
    original, calls = getattr(owner, name), itertools.count(1)

    def deadly(*arguments, **options):
        if concerns(*arguments) and next(calls) == count:
            act(*arguments)
            kill()
        return original(*arguments, **options)

    setattr(owner, name, deadly)


def moves_to(ending):
    return lambda source, target: str(target).endswith(ending)


def write_half(content, path) -> None:
    Path(path).write_bytes(b"half of a file")


PLACES = {
    "a step": lambda count: before_call(Trainer, "augment", count),
    "the evaluation": lambda count: before_call(loop, "evaluate", count),
    "writing the weights": lambda count: before_call(stages, "save_checkpoint", count),
    "writing the history": lambda count: before_call(History, "save", count),
    "the next epoch": lambda count: before_call(Trainer, "batches", count),
    "writing the state": lambda count: before_call(torch, "save", count, act=write_half),
    "the first move": lambda count: before_call(os, "replace", count, moves_to("-resume-previous.pt")),
    "the second move": lambda count: before_call(os, "replace", count, moves_to("-resume.pt")),
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
        PLACES[place](count)
    train(run_dir, **RUNS[run])


class Runs:
    """Trainings in processes of their own, in one folder."""

    def __init__(self, folder: Path, run: str, minutes: float = 0.0):
        self.folder, self.run, self.minutes = folder, run, minutes

    def until(self, place: str | None = None, count: int = 1) -> list[int]:
        """Train until the process dies in ``place``, or to the end. Returns the numbers of the steps it tried."""
        log = self.folder.parent / f"{self.folder.name}.log"
        code = children.run(train_until, self.folder, self.run, place, count, self.minutes, log=log)
        assert code == (0 if place is None else -signal.SIGKILL), log.read_text()
        return [int(line.split()[1]) for line in log.read_text().splitlines()]

    def result(self) -> dict:
        """All that is left at the end, without the times that it took."""
        resume = torch.load(self.folder / "pretrained-resume.pt", weights_only=True)
        model, card = load_checkpoint(self.folder / "pretrained.safetensors")
        best, best_card = load_checkpoint(self.folder / "pretrained-best.safetensors")
        cards = [card.record["epochs_run"], best_card.record["epochs_run"]]
        history = asdict(History.load(self.folder / "pretrained-history.json"))
        return {"state": resume, "model": model.state_dict(), "best": best.state_dict(), "c": cards, "history": history}


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
    def result(run: str) -> dict:
        runs = Runs(tmp_path_factory.mktemp("alone") / run, run)
        assert runs.until() == list(range(12))
        return runs.result()

    return result


def test_the_comparison_notices_a_single_bit():
    tensor = torch.rand(4)
    flipped = tensor.view(torch.int32).clone()
    flipped[2] ^= 1
    one, other = {"x": [tensor], "seconds": 1}, {"x": [flipped.view(torch.float32)], "seconds": 2}
    assert differences(one, other) == [".x.0"] and differences(one, one | {"seconds": 2}) == []
    assert differences({"x": 1}, {"y": 1}) and differences([1], [1, 2]) and differences(1.0, 1)


@pytest.mark.parametrize(
    "place, count, minutes, goes_on_with",
    [
        ("a step", 1, 0, 0),  # before anything is saved
        ("a step", 7, 0, 6),
        ("a step", 7, 5, 4),  # where a state is saved at the end of epochs only
        ("the evaluation", 1, 0, 4),
        ("writing the weights", 3, 0, 8),
        ("writing the history", 2, 0, 8),
        ("the next epoch", 2, 0, 4),
        # the sixth state is that after step 4: one is written after every step and one at the end of every epoch
        ("writing the state", 1, 0, 0),
        ("writing the state", 6, 0, 4),
        ("the first move", 5, 0, 4),
        ("the second move", 1, 0, 0),
        ("the second move", 6, 0, 4),
    ],
)
def test_killed_once_and_called_again(tmp_path, left_alone, place, count, minutes, goes_on_with):
    runs = Runs(tmp_path / "run", "everything", minutes)
    runs.until(place, count)
    assert runs.until() == list(range(goes_on_with, 12)), "it does not go on where it was killed"
    assert differences(runs.result(), left_alone("everything")) == []


@pytest.mark.parametrize("run", RUNS)
def test_killed_again_and_again(tmp_path, left_alone, run):
    runs = Runs(tmp_path / "run", run)
    places = [("a step", 3), ("the second move", 2), ("the evaluation", 1), ("the first move", 3), ("a step", 2)]
    starts = [runs.until(*place)[:1] for place in places]
    assert starts == [[0], [2], [3], [4], [5]]
    assert runs.until() == list(range(6, 12))
    assert differences(runs.result(), left_alone(run)) == []


def test_a_finished_training_called_again_trains_no_further(tmp_path, left_alone):
    runs = Runs(tmp_path / "run", "everything")
    runs.until()
    before = {path.name: path.read_bytes() for path in runs.folder.iterdir()}
    assert runs.until() == []
    assert {path.name: path.read_bytes() for path in runs.folder.iterdir()} == before
    assert differences(runs.result(), left_alone("everything")) == []


# The rest needs no process of its own: a training that stops with an error leaves the same files as a killed one.


class Stop(Exception):
    pass


class Steps(list):
    """The numbers of the steps that were tried; the training stops in the one named ``stop``."""

    stop = None


def count_steps(monkeypatch) -> Steps:
    steps, original = Steps(), Trainer.augment

    def augment(self, *arguments):
        steps.append(self.step)
        if steps[-1] == steps.stop:
            raise Stop
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "augment", augment)
    monkeypatch.setattr(stages, "ResumeFile", functools.partial(ResumeFile, minutes=0))
    return steps


@pytest.fixture
def steps(monkeypatch):
    return count_steps(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training that stopped in step 6, and the result of the same one left alone."""
    stopped, alone = tmp_path_factory.mktemp("stopped"), tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(PRESETS, "tiny", TINY)
        steps = count_steps(monkeypatch)
        result = train(alone, recipe=ALL_AT_ONCE)
        steps.stop = 6
        with pytest.raises(Stop):
            train(stopped, recipe=ALL_AT_ONCE)
    return stopped, result


@pytest.fixture
def stopped(tmp_path, trained):
    """The folder of a training that stopped in step 6: both its files are there, after steps 5 and 4."""
    return Path(shutil.copytree(trained[0], tmp_path / "stopped"))


@pytest.fixture
def alone(trained):
    """What the same training gives when it does not stop."""
    return trained[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class Trap:
    """Its pickle makes a folder when it is opened."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def a_text(path):
    path.write_text("to be resumed\n")


def a_pickle_that_runs_code(path):
    path.write_bytes(pickle.dumps(Trap(path.with_name("sprung")), protocol=2))


def a_torch_file_that_runs_code(path):
    whole = torch.load(path, weights_only=True)
    torch.save(whole | {"state": Trap(path.with_name("sprung"))}, path)


def a_checkpoint(path):
    model, card = load_checkpoint(path.with_name("pretrained.safetensors"))
    save_checkpoint(path, model, card)


def of_another_version(path):
    torch.save(torch.load(path, weights_only=True) | {"format": "vitlib resume 99"}, path)


def weights_alone(path):
    torch.save(torch.load(path, weights_only=True)["state"]["model"], path)


def a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = [
    truncated, empty, a_text, a_pickle_that_runs_code, a_torch_file_that_runs_code, a_checkpoint, of_another_version,
    weights_alone, a_folder,
]  # fmt: skip


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").is_dir()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_refused_and_deleting_it_goes_on_from_the_one_before(stopped, steps, alone, damage):
    path = stopped / "pretrained-resume.pt"
    damage(path)
    before = contents(stopped)
    with pytest.raises(ValueError) as error:
        train(stopped, recipe=ALL_AT_ONCE)
    message = str(error.value)
    assert message.startswith(f"{path} is not a whole resume file of vitlib (") and "\n" not in message
    assert message.endswith("; delete it to go on from pretrained-resume-previous.pt.")
    assert contents(stopped) == before and not steps and not (stopped / "sprung").exists()
    path.rmdir() if path.is_dir() else path.unlink()
    resumed = train(stopped, recipe=ALL_AT_ONCE)
    assert steps == list(range(5, 12)), "the state before the last is that after step 4"
    assert differences(resumed.model.state_dict(), alone.model.state_dict()) == []
    assert differences(asdict(resumed.history), asdict(alone.history)) == []


def test_with_both_files_damaged_deleting_them_begins_again(stopped, steps):
    path, previous = stopped / "pretrained-resume.pt", stopped / "pretrained-resume-previous.pt"
    truncated(path)
    truncated(previous)
    with pytest.raises(ValueError, match="pretrained-resume.pt is not .* go on from pretrained-resume-previous.pt"):
        train(stopped, recipe=ALL_AT_ONCE)
    path.unlink()
    with pytest.raises(ValueError, match="pretrained-resume-previous.pt is not .*; delete it to begin again"):
        train(stopped, recipe=ALL_AT_ONCE)
    previous.unlink()
    train(stopped, recipe=ALL_AT_ONCE)
    assert steps == list(range(12))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"pretrain_epochs": 4}, "with epochs=3, this one has epochs=4"),
        ({"batch_size": 8}, "with batch_size=16, this one has batch_size=8"),
        ({"train_steps_per_epoch": 2}, "with train_steps_per_epoch=None, this one has train_steps_per_epoch=2"),
        ({"eval_steps_per_epoch": 1}, "with eval_steps_per_epoch=None, this one has eval_steps_per_epoch=1"),
        ({"validation_fraction": 0.2}, "with validation_fraction=0.1, this one has validation_fraction=0.2"),
        ({"seed": 1}, "with seed=0, this one has seed=1"),
        ({"precision": "bfloat16"}, "with precision='float32', this one has precision='bfloat16'"),
        ({"recipe": replace(ALL_AT_ONCE, clip=2.0)}, "with recipe.clip=1.0, this one has recipe.clip=2.0"),
        (
            {"recipe": replace(ALL_AT_ONCE, augmentation=replace(AUGMENTATION, padding=1))},
            r"recipe.augmentation.padding=2, ",
        ),
        ({"pooling": "mean"}, "with config.pooling='cls', this one has config.pooling='mean'"),
        ({"preset": "wide"}, "with config.em_dim=16, this one has config.em_dim=32"),
        ({"norm_first": False}, "with config.norm_first=True, this one has config.norm_first=False"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_the_file_of_a_training_with_other_settings_is_refused(stopped, steps, monkeypatch, changes, words):
    monkeypatch.setitem(PRESETS, "wide", TINY | {"em_dim": 32})
    before = contents(stopped)
    with pytest.raises(ValueError, match=words) as error:
        train(stopped, **{"recipe": ALL_AT_ONCE} | changes)
    message = str(error.value)
    assert message.startswith(f"{stopped / 'pretrained-resume.pt'} belongs to a training with ")
    assert message.endswith("; give the same settings, another run_dir, or delete the resume files.")
    assert "\n" not in message
    assert len(message) < len(str(stopped)) + 250, "it says what differs and nothing else"
    assert contents(stopped) == before and not steps


def test_the_file_of_a_training_on_other_images_is_refused(stopped, steps):
    for data in (colours(seed=1), colours(90)):
        with pytest.raises(ValueError, match="images"):
            pretrain(data, "tiny", recipe=ALL_AT_ONCE, pretrain_epochs=3, batch_size=16, device="cpu", progress=False,
                     run_dir=stopped, resume=True)  # fmt: skip
    relabelled = LabelledImages(colours().images, colours().labels.roll(1), colours().classes)
    with pytest.raises(ValueError, match="images"):
        pretrain(relabelled, "tiny", recipe=ALL_AT_ONCE, pretrain_epochs=3, batch_size=16, device="cpu",
                 progress=False, run_dir=stopped, resume=True)  # fmt: skip
    assert not steps


def test_the_previous_file_of_another_training_is_refused_too(stopped):
    (stopped / "pretrained-resume.pt").unlink()
    with pytest.raises(ValueError, match="pretrained-resume-previous.pt belongs to a training with seed=0"):
        train(stopped, recipe=ALL_AT_ONCE, seed=3)


def test_finetuning_goes_on_too_but_not_from_other_weights(tmp_path, steps):
    first, second = (train(tmp_path / f"upstream-{seed}", pretrain_epochs=1, seed=seed) for seed in (0, 1))
    arguments = {"finetune_epochs": 2, "batch_size": 16, "device": "cpu", "progress": False, "resume": True}
    steps.clear()
    alone = finetune(first.model, first.card, colours(seed=1), run_dir=tmp_path / "alone", **arguments)
    steps.clear()
    steps.stop = 5
    with pytest.raises(Stop):
        finetune(first.model, first.card, colours(seed=1), run_dir=tmp_path / "run", **arguments)
    steps.clear()
    steps.stop = None
    with pytest.raises(ValueError, match="belongs to .* because it started from other weights"):
        finetune(second.model, first.card, colours(seed=1), run_dir=tmp_path / "run", **arguments)
    with pytest.raises(ValueError, match="with stage='fine-tuning', this one has stage='linear probe'"):
        finetune(first.model, first.card, colours(seed=1), freeze_encoder=True, run_dir=tmp_path / "run", **arguments)
    resumed = finetune(first.model, first.card, colours(seed=1), run_dir=tmp_path / "run", **arguments)
    assert steps == [5, 6, 7]
    assert differences(resumed.model.state_dict(), alone.model.state_dict()) == []
    assert differences(asdict(resumed.history), asdict(alone.history)) == []


def test_ctrl_c_can_be_taken_back(tmp_path, steps, alone, monkeypatch):
    steps.stop = 6
    with monkeypatch.context() as patched:
        patched.setattr(f"{__name__}.Stop", KeyboardInterrupt)
        interrupted = train(tmp_path / "run", recipe=ALL_AT_ONCE)
    steps.stop = None
    assert interrupted.history.interrupted and len(interrupted.history.epochs) == 1
    resumed = train(tmp_path / "run", recipe=ALL_AT_ONCE)
    assert not resumed.history.interrupted
    assert differences(resumed.model.state_dict(), alone.model.state_dict()) == []


def test_resuming_needs_a_folder(steps):
    with pytest.raises(ValueError, match=r"resume=True needs a run_dir; [^\n]*\.$"):
        train(None)
    assert not steps


def test_no_state_is_written_unless_asked_for(tmp_path):
    pretrain(colours(), "tiny", pretrain_epochs=1, device="cpu", progress=False, run_dir=tmp_path)
    assert sorted(contents(tmp_path)) == [
        "pretrained-best.safetensors", "pretrained-history.json", "pretrained.safetensors",
    ]  # fmt: skip
