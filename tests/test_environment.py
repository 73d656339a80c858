"""One list of versions: pip, conda, Binder, the containers, make and the workflow agree on it."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
import yaml
from packaging.requirements import Requirement

from tools.address import ROOT
from vitlib.course.doctor import granted_cores

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
not_on_windows = pytest.mark.skipif(sys.platform == "win32", reason="needs bash")


def pins_of(path):
    """Return package name to exact version."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line.strip() and line[0] not in "#-"]
    assert all(str(requirement.specifier).startswith("==") for requirement in requirements), path
    return {requirement.name.lower(): str(requirement.specifier)[2:] for requirement in requirements}


PINS = pins_of("requirements.txt")


def test_dependencies_are_pinned_at_an_allowed_version():
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.specifier.contains(PINS[requirement.name.lower()]), requirement
        # Colab and class machines keep the torch they have
        assert all(specifier.operator == ">=" for specifier in requirement.specifier), requirement


def test_all_that_vitlib_imports_is_a_dependency():
    text = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("vitlib/**/*.py"))
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)(?:[\w.]* import .*| as .*|[.\w]*)$", text, re.M))
    optional = [line for group in PROJECT["optional-dependencies"].values() for line in group]
    provided = {Requirement(line).name.lower() for line in PROJECT["dependencies"] + optional}
    # with papermill and ipykernel
    provided |= {"nbformat", "nbclient", "ipython", "jupyter_client", "jupyter_core", "packaging"}
    known = packages_distributions()
    homes = {name: {home.lower() for home in known.get(name, [name])} for name in imported}
    unknown = {name for name, home in homes.items() if not home & provided}
    assert unknown - set(sys.stdlib_module_names) - {"vitlib"} == set()


def test_conda_reads_the_same_list():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["dependencies"][-1] == {"pip": ["-r requirements.txt", "-e ."]}


def test_binder_and_docker_have_the_same_versions_as_cpu_builds():
    binder = pins_of("binder/requirements.txt")
    assert f"--extra-index-url {CPU_INDEX}" in (ROOT / "binder/requirements.txt").read_text(encoding="utf-8")
    cpu = {name: f"{PINS[name]}+cpu" for name in ("torch", "torchvision")}
    assert binder == {name: PINS.get(name) for name in binder} | cpu
    needed = {Requirement(line).name.lower() for line in PROJECT["dependencies"]}
    assert needed - {"ipykernel"} <= set(binder), "the kernel comes with the image"
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    install, vitlib = docker.index("requirements.txt nbgitpuller"), docker.index("--no-deps --editable")
    assert docker.index("COPY binder/requirements.txt") < install < docker.index("COPY --chown") < vitlib
    assert "--no-deps --editable ." in (ROOT / "binder/postBuild").read_text(encoding="utf-8")


def test_the_dev_container_installs_cpu_wheels_and_asks_the_doctor():
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    assert container["containerEnv"]["PIP_EXTRA_INDEX_URL"] == CPU_INDEX
    assert container["onCreateCommand"].endswith("-r requirements.txt -e .")
    assert container["postCreateCommand"] == "python -m vitlib doctor"
    assert all((ROOT / name).exists() for name in container["customizations"]["codespaces"]["openFiles"])


@not_on_windows
@pytest.mark.parametrize("given", [None, "7"])
def test_binder_grants_torch_as_many_threads_as_cores(given):
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": given or ""}
    command = [ROOT / "binder/start", "python", "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
    assert subprocess.check_output(command, env=environment, text=True) == f"{given or granted_cores()}\n"


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


@not_on_windows
@pytest.mark.parametrize("script", [".ci/run", "binder/postBuild", "binder/start"])
def test_scripts_are_executable_and_stop_at_an_error(script):
    text = (ROOT / script).read_text()
    assert os.access(ROOT / script, os.X_OK) and text.startswith("#!/bin/bash\n") and "set -euo pipefail" in text


def test_the_weekly_job_runs_all_that_is_slow():
    job = WORKFLOW["jobs"]["slow"]
    assert job["if"] == "github.event_name == 'schedule'" and job["env"]["VITLIB_SLOW"] == "1"
    weekly = "\n".join(job["strategy"]["matrix"]["what"])
    assert "-m pytest tests" in weekly and "other_versions.py colab" in weekly and "make test-site" in weekly
    assert not [name for name in re.findall(r"tests/\w+\.py", weekly) if not (ROOT / name).is_file()]


def test_licences_and_citation_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], ["MIT", "CC-BY-4.0"])
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert "CC-BY-4.0" in (ROOT / "LICENSE-CC-BY-4.0").read_text()
