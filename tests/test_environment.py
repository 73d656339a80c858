"""One list of versions, many readers: pip, conda, Binder, make and the workflow must agree on it."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from vitlib.course.doctor import granted_cores

ROOT = Path(__file__).parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def lines_of(path):
    lines = (ROOT / path).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def pins_of(path):
    """Package name to exact version; a line that is no exact pin is an error."""
    requirements = [Requirement(line) for line in lines_of(path) if not line.startswith("-")]
    pins = {}
    for requirement in requirements:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{path}: {requirement} is not pinned"
        assert requirement.name.lower() not in pins, f"{path}: {requirement.name} is there twice"
        pins[requirement.name.lower()] = specifier.version
    return pins


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_requirements_are_exact_pins_without_options_or_local_builds():
    assert not [line for line in lines_of("requirements.txt") if line.startswith("-")]
    assert not [version for version in pins_of("requirements.txt").values() if "+" in version]


def test_every_dependency_of_vitlib_is_pinned_at_a_version_it_allows(project):
    pins = pins_of("requirements.txt")
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_vitlib_does_not_cap_torch_since_colab_keeps_its_own(project):
    for requirement in map(Requirement, project["dependencies"]):
        assert all(specifier.operator == ">=" for specifier in requirement.specifier), requirement


def imported_packages(folder):
    """Top-level modules that the Python files below a folder import, the project's and Python's own left out."""
    modules = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.split(".")[0])
    local = {path.stem for place in ("tests", "benchmarks") for path in (ROOT / place).glob("*.py")}
    return modules - set(sys.stdlib_module_names) - local - {"vitlib", "tools"}


def not_provided(folder, provided):
    """The modules imported below a folder that come from no package in ``provided``."""
    # these come with papermill and ipykernel, and their versions follow from those
    provided = {*provided, "nbformat", "nbclient", "ipython", "jupyter_client", "packaging"}
    distributions = packages_distributions()
    return {
        module
        for module in imported_packages(folder)
        if not {name.lower() for name in distributions.get(module, [module])} & provided
    }


def test_everything_that_vitlib_imports_is_a_dependency_of_it_perhaps_an_optional_one(project):
    optional = [line for group in project["optional-dependencies"].values() for line in group]
    provided = {Requirement(line).name.lower() for line in [*project["dependencies"], *optional]}
    assert not_provided("vitlib", provided) == set()


def test_everything_that_the_tests_import_is_in_the_list():
    assert not_provided("tests", set(pins_of("requirements.txt"))) == set()


def test_conda_reads_the_same_list_and_installs_vitlib(project):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (python,) = [entry for entry in environment["dependencies"] if str(entry).startswith("python=")]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements.txt", "-e ."]
    assert "pip" in environment["dependencies"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python.removeprefix("python="))


def test_binder_has_the_same_versions_as_cpu_builds(project):
    ours, binder = pins_of("requirements.txt"), pins_of("binder/requirements.txt")
    assert [line for line in lines_of("binder/requirements.txt") if line.startswith("-")] == [
        f"--extra-index-url {CPU_INDEX}"
    ]
    assert binder.pop("torch") == f"{ours['torch']}+cpu"
    assert binder.pop("torchvision") == f"{ours['torchvision']}+cpu"
    assert {name: ours.get(name) for name in binder} == binder
    needed = {Requirement(line).name.lower() for line in project["dependencies"]}
    assert needed <= {"torch", "torchvision", "ipykernel", *binder}  # the kernel comes with Binder's image


def test_binders_python_is_one_that_vitlib_allows(project):
    version = (ROOT / "binder/runtime.txt").read_text().strip().removeprefix("python-")
    assert Requirement(f"python{project['requires-python']}").specifier.contains(version)


@pytest.mark.skipif(sys.platform == "win32", reason="repo2docker does not run on Windows")
def test_the_image_that_repo2docker_describes_has_the_cpu_wheels_and_vitlib():
    options = ["--no-build", "--debug", "--user-id", "1000", "--user-name", "u"]
    dockerfile = subprocess.run(
        [sys.executable, "-m", "repo2docker", *options, "--Repo2Docker.default_buildpack=None", "."],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert "python-3.12" in (ROOT / "binder/runtime.txt").read_text()
    assert "environment-2epy-2d3-2e12" in dockerfile  # the lock file of conda's Python 3.12, its name escaped
    install = dockerfile.index('pip install --no-cache-dir -r "binder/requirements.txt"')
    copy = dockerfile.index("COPY --chown=1000:1000 src/ ${REPO_DIR}/")
    assert install < copy < dockerfile.index("RUN ./binder/postBuild")  # a changed lesson does not reinstall torch
    assert 'ENV R2D_ENTRYPOINT="${REPO_DIR}/binder/start"' in dockerfile
    assert re.search(
        r"^pip install .*--no-deps.* --editable \.$", (ROOT / "binder/postBuild").read_text(), re.MULTILINE
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Binder runs on Linux")
@pytest.mark.parametrize("given", [None, "7"])
def test_on_binder_torch_has_as_many_threads_as_the_container_grants_cores(given):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])}
    environment |= {"OMP_NUM_THREADS": given} if given else {}
    command = ["python", "-c", "import os; print(os.environ['OMP_NUM_THREADS'])", "an argument"]
    printed = subprocess.check_output([ROOT / "binder/start", *command], env=environment, text=True)
    assert printed == f"{given or granted_cores()}\n"


@pytest.mark.parametrize(("variable", "given", "expected"), [
    ("GOMP_SPINCOUNT", {}, "1000"),
    ("GOMP_SPINCOUNT", {"GOMP_SPINCOUNT": "7"}, "7"),
    ("GOMP_SPINCOUNT", {"OMP_WAIT_POLICY": "active"}, None),
    ("KMP_BLOCKTIME", {}, "1"),
])  # fmt: skip
def test_importing_vitlib_says_how_threads_wait(variable, given, expected):
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
    code = f"import os, sys, vitlib; print(os.environ.get({variable!r}), 'torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], env=kept | given, text=True) == f"{expected} False\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no executable bit")
@pytest.mark.parametrize("script", [".ci/run", "binder/postBuild", "binder/start"])
def test_scripts_can_be_executed_and_stop_at_the_first_error(script):
    assert os.access(ROOT / script, os.X_OK)
    text = (ROOT / script).read_text()
    assert text.startswith("#!/bin/bash\n")
    assert "set -euo pipefail" in text


def test_the_workflow_calls_ci_run_on_three_systems_and_ci_run_calls_make_test():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    systems = {name.split("-")[0] for name in job["strategy"]["matrix"]["os"]}
    assert systems == {"ubuntu", "macos", "windows"}
    assert {"3.11", "3.13"} <= set(job["strategy"]["matrix"]["python"])
    assert job["env"]["PIP_EXTRA_INDEX_URL"] == CPU_INDEX
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "exec make test"


def test_once_a_week_the_workflow_runs_what_takes_long():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["slow"]
    assert job["if"] == "github.event_name == 'schedule'" and job["env"]["PIP_EXTRA_INDEX_URL"] == CPU_INDEX
    words = [word for line in job["strategy"]["matrix"]["what"] for word in line.split()]
    scripts = {word for word in words if word.endswith(".py")}
    assert scripts and all((ROOT / "tests" / name).is_file() for name in scripts)
    slow = {path.name for path in (ROOT / "tests").glob("test_*.py") if "VITLIB_SLOW" in path.read_text()}
    assert slow - {Path(__file__).name} <= scripts


def make_says(*arguments):
    """What make would do, without doing it, also when make runs these tests."""
    line = ["make", "--always-make", "--dry-run", "--no-print-directory", *arguments]
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(line, cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout.splitlines()


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
@pytest.mark.parametrize("target", ["course", "test", "lab", "lint", "notebooks", "format", "test-browser", "address"])
def test_every_target_sets_the_environment_up_first(target):
    lines = make_says(target)
    (install,) = [number for number, line in enumerate(lines) if "-m pip install -r requirements.txt -e ." in line]
    assert any("-m venv .venv" in line for line in lines[:install])
    assert ".ready" in lines[install + 1]  # written last: an interrupted installation is done again
    assert lines[install + 2 :]


@needs_make
def test_make_course_runs_every_notebook_with_its_defaults():
    assert make_says("course")[-1].endswith("-m vitlib run --out runs/class")


@needs_make
def test_make_test_checks_everything_and_ends_with_one_pytest_call():
    lines = [line.split(" -m ", 1)[1] for line in make_says("test") if " -m " in line and "venv" not in line.split()[2]]
    assert lines[1:4] == [
        "ruff check .",
        "ruff format --check .",
        "vitlib run --parameters notebooks/parameters/smoke.yaml --out runs/smoke --timeout 600",
    ]
    assert lines[4:] == ["pytest tests notebooks --nbval --nbval-current-env --nbval-cell-timeout=600"]


@needs_make
def test_make_knows_where_windows_keeps_an_environments_programs():
    assert any(line.startswith(".venv/Scripts/python -m vitlib run") for line in make_says("course", "OS=Windows_NT"))


def test_licences_name_mit_for_code_and_cc_by_for_lessons(project):
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License")
    assert "CC BY 4.0" in text
    assert "CC-BY-4.0" in (ROOT / "LICENSE-CC-BY-4.0").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["license"] == ["MIT", "CC-BY-4.0"]
