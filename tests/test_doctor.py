"""The doctor: facts about real and imagined machines, and what it says about them."""

import getpass
import math
import os
import platform
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
import torch
from conftest import invoke

import vitlib.training
from vitlib.course import doctor
from vitlib.course.doctor import GIB, Facts, can_run, problems, report
from vitlib.course.runner import read_lesson

ROOT = Path(__file__).parents[1]
VERSIONS = {
    "python": "3.12.4", "torch": "2.13.0+cpu", "torchvision": "0.28.0", "vitlib": "0.1.0", "ipywidgets": "8.1.9",
    "jupyterlab": "4.6.6", "papermill": "2.7.0",
}  # fmt: skip
NEEDS = {"torch": "2.11", "torchvision": "0.26", "ipywidgets": "7.7", "papermill": "2.6"}
UNASKED = Facts(cores=2, cores_in_all=2, memory=8 * GIB, free_memory=6 * GIB, busy=0.1, needs=NEEDS, versions=VERSIONS)
LAPTOP = replace(UNASKED, threads=2, speed=700.0)


def with_versions(**changes) -> Facts:
    return replace(UNASKED, versions={name: found for name, found in (VERSIONS | changes).items() if found})


SENTENCES = {
    "vitlib is not installed": (replace(UNASKED, needs={}), True, "python -m pip install -e ."),
    "Missing or too old: torch 2.4.0+cu121, ipywidgets;": (
        with_versions(torch="2.4.0+cu121", ipywidgets=None), True, '"torch>=2.11" "ipywidgets>=7.7"'
    ),
    "It is broken": (replace(UNASKED, failure="It is broken; mend it."), True, "mend it"),
    "Only 0.3 GiB of 0.5 GiB of memory": (
        replace(UNASKED, memory=0.5 * GIB, free_memory=0.3 * GIB), True, "use a larger machine"
    ),
    "Only 0.4 GiB of 8.0 GiB of memory": (replace(LAPTOP, free_memory=0.4 * GIB), False, "close other programs"),
    "torch uses 16 threads, more": (replace(LAPTOP, threads=16, cores=1), False, "OMP_NUM_THREADS=1 "),
    "Other programs use 60% of the processor": (replace(LAPTOP, busy=0.6), False, "training is faster"),
}  # fmt: skip


def test_the_course_can_run_on_this_machine():
    said = subprocess.run([sys.executable, "-m", "vitlib", "doctor"], capture_output=True, text=True, timeout=300)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.splitlines()[-1] == "The course can run here."
    assert f"Python {platform.python_version()}\n" in said.stdout and f"torch {torch.__version__}," in said.stdout
    assert re.search(r"speed +[\d,]+ images/s", said.stdout)
    chapters = re.findall(r"^(\d\d) [\w -]+?  +(?:less than|about) \d+ min$", said.stdout, re.MULTILINE)
    assert chapters == [path.stem[:2] for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    # it is sent to others, so it does not say whose machine it is
    assert str(Path.home()) not in said.stdout and str(ROOT) not in said.stdout
    for name in (platform.node(), getpass.getuser()):
        assert not re.search(rf"\b{re.escape(name)}\b", said.stdout)


@pytest.mark.parametrize("start", SENTENCES)
def test_every_problem_is_a_sentence_with_the_way_out(start):
    facts, essential, way_out = SENTENCES[start]
    ((kind, sentence),) = problems(facts)
    assert sentence.startswith(start) and way_out in sentence
    assert kind == essential and can_run(facts) != essential
    lines = report(facts).splitlines()
    assert f"{'Problem' if essential else 'Note'}: {sentence}" in lines
    assert ("The course can run here." in lines[-1]) == ("03 pretraining" in report(facts)) == can_run(facts)


def test_estimates_are_what_the_class_run_took():
    assert problems(LAPTOP) == []
    assert doctor.CHAPTER_03.items() <= read_lesson(ROOT / "notebooks/03_pretraining.ipynb").defaults.items()
    text = report(LAPTOP)  # README: 83 s and 100 s
    assert re.search(r"03 pretraining +about 2 min\n04 fine-tuning +about 2 min\n", text)
    text = report(replace(LAPTOP, gpu="Tesla T4, 14.6 GiB", speed=4000.0))
    assert re.search(r"GPU +Tesla T4, 14.6 GiB\n", text) and re.search(r"03 pretraining +less than 1 min", text)


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        (
            {"cpu.max": "150000 100000", "memory.max": 2 * GIB, "memory.current": GIB,
             "memory.stat": "anon 7\ninactive_file 100"},
            (1.5, 2 * GIB, GIB + 100),
        ),
        ({"cpu.max": "max 100000", "memory.max": "max", "memory.current": 5}, (math.inf,) * 3),
        ({}, (math.inf,) * 3),
    ],
    ids=["limited", "unlimited", "no container"],
)  # fmt: skip
def test_limits_of_a_container(files, limits, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    assert doctor.container_limits(tmp_path) == limits


@pytest.fixture
def quick(monkeypatch):
    """No speed test, and a machine of 8 cores and 32 GiB in which nothing limits."""
    monkeypatch.setattr(doctor, "training_speed", lambda *args, **kwargs: 100.0)
    monkeypatch.setattr(doctor, "container_limits", lambda: (math.inf,) * 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    memory = SimpleNamespace(total=32 * GIB, available=30 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 50.0)
    for name in doctor.PLACES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_facts_of_a_container_and_a_batch_system_are_the_smaller_ones(quick):
    quick.setattr(doctor, "container_limits", lambda: (0.25, 2 * GIB, -5))
    quick.setenv("BINDER_REPO_URL", "x")
    facts = doctor.gather()
    assert (facts.cores, facts.cores_in_all, facts.memory, facts.free_memory) == (1, 8, 2 * GIB, 0)
    assert facts.busy == 0.5 and facts.place.startswith("Binder; download your notebooks")
    quick.setattr(doctor, "container_limits", lambda: (math.inf,) * 3)
    quick.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert doctor.granted_cores() == 2


@pytest.mark.parametrize(
    ("command", "granted", "before", "after"),
    [
        ("run", 1, None, "1"), ("pretrain", 1.5, None, "2"), ("run", 1, "4", "4"), ("run", math.inf, None, None),
        ("doctor", 1, None, None),
    ],
)  # fmt: skip
def test_commands_compute_on_the_cores_that_a_container_grants(quick, command, granted, before, after):
    quick.setattr(doctor, "container_limits", lambda: (granted, math.inf, math.inf))
    quick.setenv("OMP_NUM_THREADS", before or "")  # so that it is as it was afterwards
    if before is None:
        quick.delenv("OMP_NUM_THREADS")
    assert invoke(command, "--help").exit_code == 0
    assert os.environ.get("OMP_NUM_THREADS") == after


def test_the_lowest_versions_are_those_of_pyproject(monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # the installed metadata may be older than the file
    optional = 'onnx>=1.17; extra == "export"'
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: [*project["dependencies"], optional])
    assert doctor.lowest_versions() == dict(line.split(">=") for line in project["dependencies"])


def test_torch_that_does_not_load_or_train_is_a_sentence_without_the_users_home(quick):
    error = RuntimeError(f"{Path.home()}/lib/x.so: no kernel image is available for execution on the device\nand more")
    quick.setattr(doctor, "training_speed", Mock(side_effect=error))
    assert "(RuntimeError: ~/lib/x.so: no kernel image" in doctor.gather().failure
    assert "; set device to cpu in " in doctor.gather().failure
    quick.setitem(sys.modules, "torch", None)
    failure = doctor.gather().failure
    assert failure.startswith("torch does not work here (ModuleNotFoundError: ")
    assert failure.endswith("; install torch and torchvision again, together.")


@pytest.mark.parametrize(("device", "gpu"), [("cuda", "P100, 16.0 GiB"), ("mps", "MPS"), ("cpu", None)])
def test_the_device_that_training_takes_is_measured_and_named(quick, device, gpu):
    quick.setattr(vitlib.training, "resolve_device", lambda: torch.device(device))
    quick.setattr(vitlib.training, "resolve_precision", lambda word, device: "float32")
    card = SimpleNamespace(name="P100", total_memory=16 * GIB)
    quick.setattr(torch.cuda, "get_device_properties", lambda device: card)
    speed = Mock(return_value=100.0)
    quick.setattr(doctor, "training_speed", speed)
    facts = doctor.gather()
    assert facts.gpu == gpu and can_run(facts) and speed.call_args.args[1].type == device


def test_downloads_are_found(quick, tmp_path):
    quick.setenv("VITLIB_DATA", str(tmp_path / "not" / "yet"))
    assert doctor.gather().downloads == ()
    for folder in ("ciFAIR-100", "cifar-10-batches-py"):
        (tmp_path / "not" / "yet" / folder).mkdir(parents=True)
    assert doctor.gather().downloads == ("cifair100", "cifar10")


def test_the_exit_code_is_1_where_the_course_cannot_run(monkeypatch):
    facts = with_versions(torchvision=None)
    monkeypatch.setattr(doctor, "gather", lambda: facts)
    assert (invoke("doctor").exit_code, invoke("doctor").output) == (1, report(facts) + "\n")
