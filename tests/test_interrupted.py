"""The course, stopped at random moments and started again, ends with the same figures.

``VITLIB_SLOW=1 python -m pytest -s tests/test_interrupted.py`` stops it at ten moments, by Ctrl-C, SIGTERM and SIGKILL
in turn. At which places in a training it may be killed is tried one by one in ``test_resume.py``.
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

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "notebooks" / "parameters" / "smoke.yaml"
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL] if hasattr(signal, "SIGKILL") else []
MOMENTS = 10
pytestmark = [
    pytest.mark.skipif("VITLIB_SLOW" not in os.environ, reason="takes minutes: set VITLIB_SLOW to run it"),
    pytest.mark.skipif(not SIGNALS, reason="this system has no SIGKILL"),
]


def start(out: Path) -> subprocess.Popen:
    with open(f"{out}.log", "w") as log:
        return start_command("run", "--parameters", SMOKE, "--out", out, cwd=ROOT, stdout=log)


def figures_at_the_end(out: Path) -> dict:
    """Return all figures but times of a run that nobody stops."""
    assert start(out).wait() == 0, Path(f"{out}.log").read_text()
    notebooks = json.loads((out / "metrics.json").read_text())["notebooks"]
    assert {entry["status"] for entry in notebooks.values()} == {"ok"}
    return {
        (name, key): value
        for name, entry in notebooks.items()
        for key, value in entry["figures"].items()
        if not key.endswith(("seconds", "images_per_second"))
    }


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


def test_stopped_at_ten_moments_and_started_again_it_ends_with_the_same_figures(tmp_path, capsys):
    begin = time.monotonic()
    expected = figures_at_the_end(tmp_path / "alone")
    seconds = time.monotonic() - begin
    moments = random.Random(0)
    for turn in range(MOMENTS):
        out, number = tmp_path / str(turn), SIGNALS[turn % len(SIGNALS)]
        process, wait = start(out), moments.uniform(0, seconds)
        try:
            process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            stop(process, number)
        with capsys.disabled():
            print(f"\n{number.name} after {wait:.1f} of {seconds:.1f} s", flush=True)
        assert figures_at_the_end(out) == expected
