"""The course and a training, stopped at random moments: started again, they end with the same figures.

``VITLIB_SLOW=1 python -m pytest -s tests/test_interrupted.py`` stops each at ten moments, by Ctrl-C, SIGTERM and
SIGKILL in turn; ``VITLIB_SEED=1`` chooses other moments, and ``VITLIB_COURSE=class`` takes ``make course`` itself. At
which places in a training it may be killed is tried one by one in ``test_resume.py``.
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from children import start_command
from safetensors.torch import load_file
from torch import equal

ROOT = Path(__file__).parents[1]
SIZE = os.environ.get("VITLIB_COURSE", "smoke")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL] if hasattr(signal, "SIGKILL") else []
MOMENTS = 10
pytestmark = [
    pytest.mark.skipif("VITLIB_SLOW" not in os.environ, reason="takes minutes: set VITLIB_SLOW to run it"),
    pytest.mark.skipif(not SIGNALS, reason="this system has no SIGKILL"),
]
TIMINGS = ("seconds", "images_per_second")
TRAINING = {
    "upstream": "shapes10", "preset": "mini", "recipe": "short", "pretrain-epochs": 6, "batch-size": 32,
    "train-steps-per-epoch": 8, "eval-steps-per-epoch": 2,
}  # fmt: skip
COMMANDS = {
    "run": ["run", "--parameters", f"notebooks/parameters/{SIZE}.yaml", "--out"],
    "pretrain": ["pretrain", *(f"--{name}={value}" for name, value in TRAINING.items()), "--run-dir"],
}


def log_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def start(name: str, out: Path) -> subprocess.Popen:
    with log_of(out).open("w") as log:
        return start_command(*COMMANDS[name], out, cwd=ROOT, stdout=log)


def to_the_end(name: str, out: Path) -> tuple[object, float]:
    """Return the results of the command when nobody stops it, and the seconds it took."""
    begin = time.monotonic()
    process = start(name, out)
    assert process.wait() == 0, log_of(out).read_text()
    return RESULTS[name](out), time.monotonic() - begin


def without_times(figures: dict) -> dict:
    return {name: value for name, value in figures.items() if not name.endswith(TIMINGS)}


def figures_of_the_course(out: Path) -> dict:
    notebooks = json.loads((out / "metrics.json").read_text())["notebooks"]
    assert {entry["status"] for entry in notebooks.values()} == {"ok"}
    return {name: without_times(entry["figures"]) for name, entry in notebooks.items()}


def figures_of_the_training(out: Path) -> dict:
    history = json.loads((out / "pretrained-history.json").read_text())
    epochs = [without_times(epoch) for epoch in history["epochs"]]
    return {"weights": load_file(out / "pretrained.safetensors"), "steps": history["steps"], "epochs": epochs}


RESULTS = {"run": figures_of_the_course, "pretrain": figures_of_the_training}


def same(one: object, other: object) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return equal(one, other) if hasattr(one, "dtype") else one == other


def stop(process: subprocess.Popen, number: signal.Signals) -> None:
    """Stop a command as a terminal, a batch system or the kernel does; nothing it has started may go on for long."""
    started = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive, f"still there after {number.name}: {alive}"


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    return {name: to_the_end(name, tmp_path_factory.mktemp("alone") / name) for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_stopped_at_ten_moments_and_started_again_it_ends_with_the_same_figures(name, left_alone, tmp_path, capsys):
    expected, seconds = left_alone[name]
    moments = random.Random(os.environ.get("VITLIB_SEED", "0"))
    for turn in range(MOMENTS):
        out, number = tmp_path / str(turn), SIGNALS[turn % len(SIGNALS)]
        process = start(name, out)
        wait = moments.uniform(0, seconds)
        try:
            process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            stop(process, number)
        left = sorted(path.name for path in out.rglob("*") if path.is_file()) if out.exists() else []
        with capsys.disabled():
            print(f"\n{name}: {number.name} after {wait:.1f} of {seconds:.1f} s left {len(left)} files", flush=True)
        assert same(to_the_end(name, out)[0], expected)
