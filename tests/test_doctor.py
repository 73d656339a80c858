"""The doctor: facts about real and imagined machines, and what is said about them."""

import getpass
import inspect
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

import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner

import vitlib.data.cifar
from vitlib.__main__ import main
from vitlib.course import doctor
from vitlib.course.doctor import GIB, Facts, can_run, problems, report
from vitlib.training.stages import train_stage

ROOT = Path(__file__).parents[1]
VERSIONS = {
    "Python": "3.12.4", "torch": "2.13.0+cpu", "torchvision": "0.28.0", "vitlib": "0.1.0", "ipywidgets": "8.1.9",
    "jupyterlab": "4.6.6", "papermill": "2.7.0",
}  # fmt: skip
NEEDS = {"Python": "3.11", "torch": "2.11", "torchvision": "0.26", "ipywidgets": "7.7", "papermill": "2.6"}
UNASKED = Facts(
    place="", cores=2, cores_in_all=2, memory=8 * GIB, free_memory=6 * GIB, free_disk=20 * GIB, load=0.5, needs=NEEDS,
    versions=VERSIONS,
)  # fmt: skip
LAPTOP = replace(
    UNASKED, threads=2, weights=("shapes100-mini",), class_speed=700.0, published_speed=65.0, bfloat16_gain=2.1
)
MACHINES = {
    "laptop": LAPTOP,
    "Binder": replace(
        LAPTOP, place="Binder", cores=1, cores_in_all=16, memory=2 * GIB, free_memory=1.6 * GIB, threads=16,
        versions=VERSIONS | {"jupyterlab": None}, class_speed=120.0, published_speed=12.0, bfloat16_gain=0.2,
    ),
    "Colab with a GPU": replace(
        LAPTOP, place="Google Colab", gpu="Tesla T4, 14.6 GiB", versions=VERSIONS | {"jupyterlab": None},
        class_speed=4000.0, published_speed=3500.0, bfloat16_gain=None,
    ),
    "Kaggle": replace(LAPTOP, place="Kaggle"),
    "server": replace(LAPTOP, cores=64, cores_in_all=64, memory=512 * GIB, threads=64, class_speed=9000.0),
    "1 GB": replace(LAPTOP, memory=GIB, free_memory=0.4 * GIB),
    "half a GB": replace(UNASKED, memory=0.5 * GIB, free_memory=0.3 * GIB),
    "no torchvision": replace(UNASKED, versions=VERSIONS | {"torchvision": None}),
    "nothing": replace(
        UNASKED, memory=None, free_memory=None, needs={},
        versions=dict.fromkeys(VERSIONS) | {"Python": "3.10.2"},
    ),
    "everything is tight": replace(
        LAPTOP, free_memory=0.5 * GIB, free_disk=0.1 * GIB, threads=8, load=9.0,
        versions=VERSIONS | {"jupyterlab": None},
    ),
    "a GPU that does not work": replace(
        UNASKED, gpu="Tesla P100", weights=("shapes100-mini",), failure="Training does not work here; do this."
    ),
}  # fmt: skip
SENTENCES = {
    "vitlib is not installed": (replace(UNASKED, needs={}), True, "python -m pip install -e ."),
    "Python 3.10.9 is too old": (replace(UNASKED, versions=VERSIONS | {"Python": "3.10.9"}), True, "3.11 or newer"),
    "Missing or too old: torchvision;": (
        replace(UNASKED, versions=VERSIONS | {"torchvision": None}), True, 'pip install --upgrade "torchvision>=0.26"'
    ),
    "Missing or too old: torch 2.4.0+cu121, ipywidgets;": (
        replace(UNASKED, versions=VERSIONS | {"torch": "2.4.0+cu121", "ipywidgets": None}), True,
        '"torch>=2.11" "ipywidgets>=7.7"',
    ),
    "Missing or too old: papermill 2.5;": (
        replace(UNASKED, versions=VERSIONS | {"papermill": "2.5"}), True, '"papermill>=2.6"'
    ),
    "It is broken": (replace(UNASKED, failure="It is broken; mend it."), True, "mend it"),
    "The weights that ship with vitlib are missing": (replace(LAPTOP, weights=()), True, "install vitlib again"),
    "0.5 GiB of memory are too little": (MACHINES["half a GB"], True, "use a larger machine"),
    "Only 0.4 GiB of memory are free": (MACHINES["1 GB"], False, "close other programs"),
    "Only 0.1 GiB of disk are free": (replace(LAPTOP, free_disk=0.1 * GIB), False, "VITLIB_DATA"),
    "torch uses 16 threads on 1 core,": (MACHINES["Binder"], False, "torch.set_num_threads(1)`, or start Jupyter"),
    "torch uses 8 threads on 2 cores,": (replace(LAPTOP, threads=8), False, "OMP_NUM_THREADS=2 "),
    "Other programs keep the processor busy": (replace(LAPTOP, load=2.5), False, "the estimates are too long"),
    "JupyterLab is missing": (
        replace(LAPTOP, versions=VERSIONS | {"jupyterlab": None}), False, "python -m pip install jupyterlab"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def said():
    """What the command says about the machine of these tests."""
    command = [sys.executable, "-m", "vitlib", "doctor"]
    environment = os.environ | {"VITLIB_DATA": str(Path.home() / ".cache/vitlib")}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_on_this_machine_the_course_can_run_and_nothing_is_said_on_stderr(said):
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.splitlines()[-1] == "The course can run here."


def test_the_report_on_this_machine_has_its_versions_its_data_and_an_estimate_for_each_chapter(said):
    for title in ("This machine", "Software", "Data", "What that means"):
        assert f"\n{title}\n" in f"\n{said.stdout}"
    assert f"Python {platform.python_version()}, torch {torch.__version__}," in said.stdout
    assert re.search(r"weights +cifar100-small, shapes100-mini\n", said.stdout)
    assert re.search(r"speed +[\d,]+ images/s", said.stdout)
    chapters = re.findall(r"^  (\d\d) [\w -]+?  +(.+)$", said.stdout, re.MULTILINE)
    assert [number for number, _ in chapters] == ["00", "01", "02", "03", "04", "05", "06"]
    duration = r"minute|hour"  # of a machine that does much else
    assert all(re.search(duration, text) and "estimate" in text for number, text in chapters if number in ("03", "04"))
    assert re.search(r"as published +about .+ for 100 epochs \(a guess", said.stdout)


def test_the_report_on_this_machine_does_not_say_whose_it_is(said):
    assert str(Path.home()) not in said.stdout and str(ROOT) not in said.stdout
    assert not re.search(r"(?<![~\w])/\w+/", said.stdout), "no absolute path"
    assert not re.search(rf"\b{re.escape(platform.node())}\b", said.stdout)
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", said.stdout)


@pytest.mark.parametrize("name", MACHINES)
def test_every_report_fits_on_a_screen_and_ends_with_what_to_do_or_that_the_course_can_run(name):
    facts = MACHINES[name]
    lines = report(facts).splitlines()
    assert len(lines) <= 31
    assert not any(line.startswith((" " * 3, "\t")) or line != line.rstrip() for line in lines)
    sentences = [sentence for _, sentence in problems(facts)]
    assert len([line for line in lines if line.startswith(("Problem: ", "Note: "))]) == len(sentences)
    assert (lines[-1] == "The course can run here.") == can_run(facts)
    assert can_run(facts) == (facts.class_speed is not None)


def test_columns_are_aligned():
    machine = report(LAPTOP).split("\n\n")[0].splitlines()[1:]
    assert {len(re.match(r"  \w+ +", line).group()) for line in machine} == {13}


@pytest.mark.parametrize("start", SENTENCES)
def test_every_problem_is_a_sentence_with_the_way_out(start):
    facts, essential, way_out = SENTENCES[start]
    ((kind, sentence),) = [problem for problem in problems(facts) if problem[1].startswith(start)]
    assert kind == essential and way_out in sentence
    assert can_run(facts) != essential
    word = "Problem" if essential else "Note"
    assert f"{word}: {sentence}" in report(facts).splitlines()


def test_every_problem_there_is_has_a_test():
    source = inspect.getsource(problems)
    kinds = {re.sub(r"\d+", "N", start)[:20] for start in SENTENCES}
    assert source.count(", True,") + source.count(", False,") == len(kinds)


def test_a_good_machine_has_no_problems():
    assert problems(LAPTOP) == problems(MACHINES["server"]) == problems(MACHINES["Colab with a GPU"]) == []


def test_binder_is_told_apart_from_the_host_it_runs_on():
    text = report(MACHINES["Binder"])
    assert "Binder; download your notebooks before the session ends" in text
    assert "1 core of 16" in text and "2.0 GiB, of which 1.6 GiB are free" in text
    assert "stay with float32" in text and "JupyterLab is missing" not in text


def test_a_gpu_is_named_and_shortens_the_estimates():
    text = report(MACHINES["Colab with a GPU"])
    assert "2 cores; GPU: Tesla T4, 14.6 GiB\n" in text and "bfloat16" not in text
    assert re.search(r"03 pretraining +less than a minute", text)
    assert re.search(r"as published +about 22 minutes", text)


def test_without_torch_no_chapter_is_promised():
    text = report(MACHINES["no torchvision"])
    assert "torchvision missing" in text and "cannot run yet" in text
    assert "images/s" not in text and "03 pretraining" not in text and "Data" not in text


def test_downloads_are_listed(monkeypatch, tmp_path):
    monkeypatch.setenv("VITLIB_DATA", str(Path.home() / "pictures"))
    assert "downloaded to ~/pictures: cifair100, cifair10\n" in report(
        replace(LAPTOP, downloads=("cifair100", "cifair10"))
    )
    monkeypatch.setenv("VITLIB_DATA", str(Path(Path.home().anchor) / "elsewhere"))
    assert "downloaded to the folder in VITLIB_DATA: none, and none is needed\n" in report(LAPTOP)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"HOME": "x", "PATH": "y"}, ""),
        ({"BINDER_REPO_URL": "x"}, "Binder"),
        ({"COLAB_RELEASE_TAG": "x"}, "Google Colab"),
        ({"COLAB_RELEASE_TAG": "x", "KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, "Kaggle"),
    ],
)
def test_where_it_runs_is_read_off_the_environment(variables, place):
    assert doctor.place(variables) == place


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


VERSION_2 = {
    "cpu.max": "100000 100000", "memory.max": 2 * GIB, "memory.current": GIB, "memory.stat": "anon 7\ninactive_file 100"
}  # fmt: skip
VERSION_1 = {
    "cpu/cpu.cfs_quota_us": 150000, "cpu/cpu.cfs_period_us": 100000, "memory/memory.limit_in_bytes": 2 * GIB,
    "memory/memory.usage_in_bytes": GIB, "memory/memory.stat": "cache 5\ninactive_file 100\ntotal_inactive_file 9",
}  # fmt: skip
UNLIMITED_1 = {
    "cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000, "memory/memory.limit_in_bytes": 2**63 - 4096,
    "memory/memory.usage_in_bytes": GIB,
}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "own", "limits"),
    [
        (VERSION_2, "0::/", (1, 2 * GIB, GIB + 100)),
        (VERSION_1, "4:memory:/\n3:cpu,cpuacct:/", (1.5, 2 * GIB, GIB + 100)),
        ({f"a/b/{name}": text for name, text in VERSION_2.items()}, "0::/a/b/c", (1, 2 * GIB, GIB + 100)),
        ({**VERSION_2, "job/memory.max": GIB, "job/memory.current": 5}, "0::/job", (1, GIB, GIB - 5)),
        ({"cpu.max": "max 100000", "memory.max": "max", "memory.current": 5}, "0::/", (math.inf,) * 3),
        (UNLIMITED_1, "4:memory:/", (math.inf, 2**63 - 4096, 2**63 - 4096 - GIB)),
        ({f"docker/x/{name}": text for name, text in VERSION_2.items()}, "0::/", (math.inf,) * 3),
    ],
)
def test_limits_of_a_container(files, own, limits, tmp_path):
    write(tmp_path, {f"cgroup/{name}": text for name, text in files.items()} | {"self": own})
    assert doctor.container_limits(tmp_path / "cgroup", tmp_path / "self") == limits


def test_without_cgroups_as_on_windows_there_are_no_limits(tmp_path):
    assert doctor.container_limits(tmp_path / "nothing", tmp_path / "none") == (math.inf,) * 3


@pytest.fixture
def quick(monkeypatch):
    """No speed test, and a machine of 8 cores and 32 GiB in which nothing limits."""
    monkeypatch.setattr(doctor, "training_speed", lambda *args, **kwargs: 100.0)
    monkeypatch.setattr(doctor, "container_limits", lambda: (math.inf,) * 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    memory = SimpleNamespace(total=32 * GIB, available=30 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return monkeypatch


def test_the_facts_of_a_container_are_the_smaller_ones(quick):
    quick.setattr(doctor, "container_limits", lambda: (1.5, 2 * GIB, GIB))
    facts = doctor.gather()
    assert (facts.cores, facts.cores_in_all, facts.memory, facts.free_memory) == (2, 8, 2 * GIB, GIB)


def test_a_fraction_of_a_core_counts_as_one(quick):
    quick.setattr(doctor, "container_limits", lambda: (0.25, math.inf, -5))
    facts = doctor.gather()
    assert (facts.cores, facts.memory, facts.free_memory) == (1, 32 * GIB, 0)


def test_cores_that_a_batch_system_took_away_do_not_count(quick):
    quick.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert doctor.gather().cores == 2


@pytest.mark.parametrize(
    "command, granted, before, after",
    [
        ("run", 1, None, "1"),
        ("pretrain", 1.5, None, "2"),
        ("run", 1, "4", "4"),  # who says how many threads there shall be gets them
        ("run", math.inf, None, None),
        ("doctor", 1, None, None),
    ],
)
def test_commands_compute_on_the_cores_that_a_container_grants(quick, command, granted, before, after):
    quick.setattr(doctor, "container_limits", lambda: (granted, math.inf, math.inf))
    quick.setenv("OMP_NUM_THREADS", before or "")  # so that it is as it was afterwards
    if before is None:
        quick.delenv("OMP_NUM_THREADS")
    assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0
    assert os.environ.get("OMP_NUM_THREADS") == after


def test_a_system_without_cgroups_affinity_and_load_works(quick):
    quick.delattr(os, "sched_getaffinity")
    quick.delattr(os, "getloadavg", raising=False)
    facts = doctor.gather()
    assert (facts.cores, facts.memory, facts.load) == (8, 32 * GIB, 0)
    assert can_run(facts) and facts.class_speed == 100


def test_without_psutil_the_memory_is_unknown_and_psutil_is_asked_for(quick):
    quick.setitem(sys.modules, "psutil", None)
    found = doctor.version
    quick.setattr(doctor, "version", lambda name: None if name == "psutil" else found(name))
    facts = doctor.gather()
    assert facts.memory is None and facts.class_speed is None
    assert re.search(r"memory +unknown\n", report(facts))
    assert "Missing or too old: psutil;" in report(facts)


def test_an_installation_that_lacks_something_is_described_without_loading_torch():
    code = (
        "import sys; from importlib import metadata; from vitlib.course import doctor; found = doctor.version\n"
        "doctor.version = lambda name: None if name == 'torchvision' else found(name)\n"
        "facts = doctor.gather(); assert not doctor.can_run(facts); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_vitlib_that_is_not_installed_is_noticed(quick):
    quick.setattr(doctor, "version", lambda name: None)
    assert doctor.lowest_versions() == {}
    assert "vitlib is not installed" in report(doctor.gather())


def test_the_lowest_versions_are_those_of_pyproject(monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert doctor.lowest_versions().keys() == {"Python", *(line.split(">=")[0] for line in project["dependencies"])}
    # the numbers in the installed metadata may be older than the file
    optional = 'onnx>=1.17; extra == "export"'
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: [*project["dependencies"], optional])
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: {"Requires-Python": project["requires-python"]})
    wanted = dict(line.split(">=") for line in project["dependencies"])
    assert doctor.lowest_versions() == wanted | {"Python": project["requires-python"].removeprefix(">=")}


@pytest.mark.parametrize(
    ("found", "lowest", "enough"),
    [
        ("2.11.0", "2.11", True), ("2.11", "2.11.0", True), ("2.13.0+cpu", "2.11", True), ("3.0", "2.11", True),
        ("2.12.0a0+git1f2", "2.11", True), ("2.9.1", "2.11", False), ("2.4.0+cu121", "2.11", False),
        ("7.6.9", "7.7", False), ("10", "10.1", False), ("6", "6", True), (None, "1", False),
    ],
)  # fmt: skip
def test_versions_are_compared_by_number(found, lowest, enough):
    assert doctor.is_enough(found, lowest) is enough


@pytest.mark.parametrize("module", ["torch", "vitlib.training.devices"])
def test_torch_that_does_not_load_is_a_sentence(quick, module):
    quick.setitem(sys.modules, module, None)
    facts = doctor.gather()
    assert facts.failure.startswith("torch or torchvision does not load (") and "install both again" in facts.failure
    assert not can_run(facts)


def test_torchvision_that_does_not_load_is_a_sentence_without_the_users_home(quick):
    def broken(name):
        raise RuntimeError(f"{Path.home()}/lib/x.so: undefined symbol\nand more")

    quick.setattr(vitlib.data.cifar, "cifar_class", broken)
    failure = doctor.gather().failure
    assert "(RuntimeError: ~/lib/x.so: undefined symbol)" in failure


@pytest.mark.parametrize(("device", "way_out"), [("cuda", "set device = 'cpu'"), ("cpu", "install torch again")])
def test_training_that_does_not_work_is_a_sentence(quick, device, way_out):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available for execution on the device")

    quick.setattr(doctor, "training_speed", broken)
    quick.setattr(vitlib.training.devices, "resolve_device", lambda: torch.device(device))
    quick.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="P100", total_memory=16 * GIB)
    )
    facts = doctor.gather()
    assert "no kernel image" in facts.failure and way_out in facts.failure
    assert not can_run(facts)


@pytest.mark.parametrize(("device", "gpu"), [("cuda", "P100, 16.0 GiB"), ("mps", "MPS"), ("cpu", None)])
def test_the_device_that_training_takes_is_measured_and_named(quick, device, gpu):
    asked = []
    quick.setattr(vitlib.training.devices, "resolve_device", lambda: torch.device(device))
    quick.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="P100", total_memory=16 * GIB)
    )
    quick.setattr(doctor, "training_speed", lambda *args, **kwargs: asked.append((args, kwargs)) or 100.0)
    facts = doctor.gather()
    assert facts.gpu == gpu and can_run(facts)
    assert {arguments[1].type for arguments, _ in asked} == {device}
    assert sum(arguments[0] for arguments, _ in asked) < 2, "the speed test is short"
    assert facts.bfloat16_gain == (1 if gpu is None else None)


def test_downloads_and_weights_are_found_where_they_are(quick, tmp_path):
    quick.setenv("VITLIB_DATA", str(tmp_path / "not" / "yet"))
    facts = doctor.gather()
    assert facts.downloads == () and facts.free_disk > 0
    assert facts.weights == ("cifar100-small", "shapes100-mini")
    for folder in ("ciFAIR-100", "cifar-10-batches-py"):
        (tmp_path / "not" / "yet" / folder).mkdir(parents=True)
    assert doctor.gather().downloads == ("cifair100", "cifar10")


@pytest.mark.parametrize("setting", [doctor.CLASS, doctor.PUBLISHED], ids=["class", "published"])
def test_speed_is_measured_with_model_recipe_and_precision(monkeypatch, setting):
    runs, fit = [], vitlib.training.fit
    monkeypatch.setattr(vitlib.training, "fit", lambda *a, **options: runs.append((a, options)) or fit(*a, **options))
    assert doctor.training_speed(0.0, torch.device("cpu"), "bfloat16", **setting | {"batch_size": 2}) > 0
    (model, _, _, _, recipe), options = runs[0]
    assert options["precision"] == "bfloat16" and recipe is vitlib.training.RECIPES[setting["recipe"]]
    assert model.config["drop"] == recipe.drop and model.config["norm_first"] == setting["norm_first"]
    assert model.config["em_dim"] == {"mini": 96, "small": 256}[setting["preset"]]


def test_the_settings_are_those_of_the_parameters_files():
    def parameters(name):
        return yaml.safe_load((ROOT / f"notebooks/parameters/{name}.yaml").read_text()).items()

    assert (doctor.CLASS | doctor.CLASS_LENGTH).items() <= parameters("class")
    assert (doctor.PUBLISHED | doctor.PUBLISHED_LENGTH).items() <= parameters("full")
    assert inspect.signature(train_stage).parameters["validation_fraction"].default == doctor.VALIDATION


def test_what_a_training_costs_is_counted_in_trained_images():
    counts = {"train": 1000, "test": 300}
    assert doctor.images_in(counts, 0) == pytest.approx(300 / 3)
    assert doctor.images_in(counts, 2) == pytest.approx(2 * (900 + 100 / 3) + 300 / 3)
    assert doctor.images_in(counts, 2, 1 / 3) == pytest.approx(2 * 1000 / 3 + 300 / 3)


def test_the_estimates_at_the_speed_of_the_class_run_are_what_it_took():
    """RESULTS.md: 108 s and 59 s, on the machine for which the doctor in notebook 00 says about 700 images/s."""
    outlook = doctor.outlook(LAPTOP)
    assert outlook["03 pretraining"].startswith("about 2 minutes")
    assert outlook["04 fine-tuning"].startswith("about 1 minute ")
    assert outlook["as published"].startswith("about 20 hours")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.1, "less than a minute"), (49, "less than a minute"), (55, "about 1 minute"), (89, "about 1 minute"),
        (91, "about 2 minutes"), (5000, "about 83 minutes"), (5500, "about 2 hours"), (100_000, "about 28 hours"),
        (200_000, "about 2 days"), (10**9, "about 11,574 days"),
    ],
)  # fmt: skip
def test_durations_are_said_as_roughly_as_they_are_known(seconds, words):
    assert doctor.duration(seconds) == words


@pytest.mark.parametrize("name", ["laptop", "no torchvision"])
def test_the_exit_code_says_whether_the_course_can_run(monkeypatch, name):
    monkeypatch.setattr(doctor, "gather", lambda: MACHINES[name])
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == (0 if name == "laptop" else 1)
    assert result.output == report(MACHINES[name]) + "\n"
