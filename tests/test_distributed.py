"""Several processes that train one model: they do what one process does, only one writes, and they resume together."""

import functools
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import children
import pytest
import torch
from conftest import TINY, image_folder
from test_resume import ALL_AT_ONCE, contents, differences, kill_before, print_steps
from test_resume import train as train_three_epochs
from torch import distributed

from vitlib.data.augment import Augmentation
from vitlib.model import PRESETS
from vitlib.training import stages
from vitlib.training.distributed import current_context, end_distributed, init_distributed
from vitlib.training.recipes import RECIPES
from vitlib.training.resume import ResumeFile
from vitlib.training.trainer import Trainer
from vitlib.weights.checkpoint import load_checkpoint

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="torchrun and forkserver need Linux or macOS"),
    pytest.mark.skipif(
        not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch has no gloo"
    ),
    pytest.mark.usefixtures("tiny_preset"),
]

# Without dropout: its random numbers cannot be the same in two processes as in one.
CLIPPED = replace(
    RECIPES["modern"], clip=0.1, ema_decay=0.9, drop=0.0, drop_path=0.0, augmentation=Augmentation(2, 0.5, 2)
)
# AdamW and clipping forgive gradients of the wrong size, SGD alone does not.
PLAIN_SGD = replace(CLIPPED, optimizer="sgd", learning_rate=0.1, clip=None)
train = functools.partial(train_three_epochs, recipe=CLIPPED, pretrain_epochs=2)


def train_together(run_dir, options, killed, step):
    """What one of several processes does; the process ``killed`` dies in its ``step``-th step."""
    PRESETS["tiny"] = TINY
    stages.ResumeFile = functools.partial(ResumeFile, minutes=0)
    print_steps()
    if os.environ["RANK"] == str(killed):
        kill_before(step, Trainer, "augment")
    assert init_distributed("cpu") == "cpu"
    # every process in a folder of its own, if it writes
    trained = train(Path(run_dir) if current_context().is_first else Path(run_dir) / "other", **options)
    result = {"model": trained.model.state_dict(), "history": asdict(trained.history)}
    torch.save(result, f"{run_dir}-of-{os.environ['RANK']}.pt")
    end_distributed()


def together(run_dir: Path, killed: int | None = None, step: int = 0, count: int = 2, **options) -> list[int]:
    """Exit codes of ``count`` processes that train together, in the order of their ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        children.start(
            train_together, run_dir, options, killed, step, log=log_of(run_dir, rank),
            RANK=str(rank), LOCAL_RANK=str(rank), **size, **address,
        )
        for rank in range(count)
    ]  # fmt: skip
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def log_of(run_dir: Path, rank: int) -> Path:
    return run_dir.parent / f"{run_dir.name}-{rank}.log"


def curve(history: dict) -> list[float]:
    """All losses and accuracies of a history in a row."""
    names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
    return [step["loss"] for step in history["steps"]] + [epoch[name] for epoch in history["epochs"] for name in names]


@pytest.fixture
def launched(monkeypatch):
    """As if torchrun had started four processes on this machine with ``gpus`` GPUs, of which this is the third."""
    launched = SimpleNamespace(gpus=0, calls=[])
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(distributed, "init_process_group", launched.calls.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: launched.gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: launched.gpus)
    monkeypatch.setattr(torch.cuda, "set_device", launched.calls.append)
    return launched


@pytest.mark.parametrize(
    "device, gpus, own, calls",
    [("auto", 0, "cpu", ["gloo"]), ("cpu", 8, "cpu", ["gloo"]), ("auto", 4, "cuda:2", [2, "nccl"])],
)
def test_the_processes_of_a_machine_take_its_gpus_in_turn(launched, device, gpus, own, calls):
    launched.gpus = gpus
    assert init_distributed(device) == own and launched.calls == calls


@pytest.mark.parametrize(
    "device, gpus, words",
    [
        ("auto", 3, "nproc-per-node=4 is more than the 3 GPUs of this machine; start one process per GPU"),
        ("cuda:0", 8, "device='cuda:0' is one device for 4 processes; give auto, cuda or cpu"),
    ],
)
def test_processes_without_a_device_of_their_own_are_refused(launched, device, gpus, words):
    launched.gpus = gpus
    with pytest.raises(ValueError, match=words):
        init_distributed(device)
    assert launched.calls == []


@pytest.mark.parametrize(
    "batch_size, recipe", [(17, PLAIN_SGD), (53, CLIPPED)], ids=["last batch of three", "last batch of one"]
)
def test_two_processes_have_the_curve_of_one(tmp_path, batch_size, recipe):
    options = {"batch_size": batch_size, "recipe": recipe}
    assert together(tmp_path / "two", **options) == [0, 0], log_of(tmp_path / "two", 0).read_text()
    one = train(tmp_path / "one", **options)
    first, second = (torch.load(tmp_path / f"two-of-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert curve(first["history"]) == pytest.approx(curve(asdict(one.history)), abs=1e-4)
    assert differences(first, second) == [], "both processes have the same weights and the same history"
    assert sorted(contents(tmp_path / "two")) == sorted(contents(tmp_path / "one"))
    assert not (tmp_path / "two" / "other").exists(), "only the first process writes"
    saved, card = load_checkpoint(tmp_path / "two" / "pretrained.safetensors")
    assert differences(saved.state_dict(), first["model"]) == [] and card.record["processes"] == 2


def test_two_processes_go_on_exactly_and_only_as_two(tmp_path):
    """27 steps an epoch; a state is written after the first, the twenty-first and the last of them. Each process has
    dropout numbers of its own."""
    options = {"recipe": ALL_AT_ONCE, "batch_size": 2}
    assert together(tmp_path / "alone", **options) == [0, 0], log_of(tmp_path / "alone", 1).read_text()
    first, second = together(tmp_path / "run", killed=1, step=24, **options)
    assert second == -signal.SIGKILL and first == 1, "the other process ends with an error, it does not wait for ever"
    with pytest.raises(ValueError, match="resume.pt belongs to a training with processes=2, this one has processes=1;"):
        train(tmp_path / "run", **options)
    before = contents(tmp_path / "run")
    assert all(together(tmp_path / "run", count=3, **options))
    for rank in range(3):
        assert "processes=2, this one has processes=3" in log_of(tmp_path / "run", rank).read_text()
    assert contents(tmp_path / "run") == before
    assert together(tmp_path / "run", **options) == [0, 0], log_of(tmp_path / "run", 1).read_text()
    steps = [line for line in log_of(tmp_path / "run", 1).read_text().splitlines() if line.startswith("step")]
    assert steps == [f"step {number}" for number in range(21, 54)]
    for rank in (0, 1):
        alone, resumed = (torch.load(tmp_path / f"{run}-of-{rank}.pt", weights_only=True) for run in ("alone", "run"))
        assert differences(alone, resumed) == []


# Through torchrun, as a reader starts it.


SAYS_WHICH_THREADS_OUTLIVE_THE_TRAINING = """
import atexit
from pathlib import Path
from vitlib.__main__ import main

names = Path("/proc/self/task").glob("*/comm")  # nothing where there is no Linux
atexit.register(lambda: print("left:", [name.read_text() for name in names if "gloo" in name.read_text()]))
main(prog_name="python -m vitlib")
"""


def test_torchrun_trains_and_one_process_speaks(tmp_path):
    folder = image_folder(tmp_path / "images", train=45, test=9)
    (folder / "train" / "red" / "notes.txt").write_text("no image")
    script = tmp_path / "train.py"
    script.write_text(SAYS_WHICH_THREADS_OUTLIVE_THE_TRAINING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command += ["pretrain", "--upstream", str(folder), "--preset", "mini", "--image-size", "8", "--recipe", "short"]
    command += ["--pretrain-epochs", "2", "--batch-size", "15", "--device", "cpu", "--precision", "float32"]
    command += ["--run-dir", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left: []") == 2, "a thread that exchanges data and outlives Python aborts the process"
    assert done.stdout.count("top-1") == 1 and done.stdout.count("epoch 2/2:   0%") == 1, "one of them speaks"
    assert done.stdout.count("notes.txt") == 1
    _, card = load_checkpoint(tmp_path / "two" / "pretrained.safetensors")
    assert card.record["test"]["images"] == 9 and card.record["processes"] == 2
