# make course   run every notebook with its own parameters, and print a table of what came out
# make test     ruff, two notebooks with tiny parameters, the tests, and every stored output against a fresh run
# make lab      open JupyterLab in notebooks/
# make lint     ruff check and format check           make format     let ruff repair what it can
# make test-browser  open, run and use every lesson in JupyterLab and Chromium, by playwright; screenshots in runs/browser
# make site     the course as a web site, in site/          make test-site  build it, and look at every page in Chromium
# make student-copy  the course without solutions and guide, in student-copy/
# make address REPOSITORY=name/repository  say where this repository is hosted, in every link
# make notebooks  run the notebooks and store their outputs            make clean  remove runs, caches and .venv
#
# Each makes .venv when it is missing, and again when requirements.txt or pyproject.toml changed.
# Another Python: make course PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
RUN := $(BIN)/python
# written last, so that an interrupted installation is done again
READY := $(VENV)/.ready

# 04 first: its page starts from the shipped encoder, not from the one that 03 leaves in notebooks/runs
NOTEBOOKS := notebooks/04_finetuning.ipynb $(filter-out notebooks/04%,$(sort $(wildcard notebooks/[0-9]*.ipynb))) $(sort $(wildcard notebooks/solutions/*.ipynb)) $(sort $(wildcard notebooks/sweeps/*.ipynb))

# kernels come from .venv, not from kernelspecs that the user has installed elsewhere
unexport JUPYTER_PATH
export JUPYTER_PREFER_ENV_PATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# as vitlib/__init__.py does, for kernels that import torch first
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 1000
export KMP_BLOCKTIME ?= 1
endif

.DEFAULT_GOAL := help
READY_SITE := $(VENV)/.ready-site

.PHONY: help venv course test test-browser site test-site student-copy lab lint format notebooks address clean

help:
	@$(PYTHON) -c "import itertools as i; print(*(l[2:-1] for l in i.takewhile(str.strip, open('Makefile'))), sep='\n')"

venv: $(READY)

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14) and 'Python 3.11 to 3.14 is needed, this is ' + sys.version.split()[0] + ': make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -r requirements.txt -e .
	@$(RUN) -c "import pathlib; pathlib.Path('$(READY)').touch()"

course: $(READY)
	$(RUN) -m vitlib run --out runs/class

# one pytest call, so that its closing line, the last one printed, is about everything
test: lint
	$(RUN) -m vitlib run --only 03,04 --parameters notebooks/parameters/smoke.yaml --out runs/smoke --timeout 600
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests notebooks --nbval --nbval-current-env --nbval-cell-timeout=600 -n 2 --dist loadfile

test-browser: export VITLIB_BROWSER := 1
test-browser: $(READY)
	$(RUN) -m pip install --quiet playwright
	$(RUN) -m pytest tests/browser/test_lab.py -v -s

$(READY_SITE): docs/requirements.txt $(READY)
	$(RUN) -m pip install -r docs/requirements.txt
	@$(RUN) -c "import pathlib; pathlib.Path('$(READY_SITE)').touch()"

site: $(READY_SITE)
	@$(RUN) -c "import shutil; shutil.rmtree('site', ignore_errors=True)"
	$(RUN) -m sphinx -E -W --keep-going -q -c docs -d runs/doctrees . site
	@$(RUN) -m tools.site

test-site: export VITLIB_BROWSER := 1
test-site: site
	$(RUN) -m pip install --quiet playwright
	npm install --silent --no-save --prefix runs/axe axe-core@4.14.1
	$(RUN) -m pytest tests/browser/test_site.py -q

student-copy: $(READY)
	@$(RUN) -m tools.student_copy

lab: $(READY)
	$(RUN) -m jupyterlab --FileContentsManager.preferred_dir=notebooks

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# no timings and no widget state: they differ each time, and saved widget state keeps GitHub from showing a notebook;
# the second line keeps of a progress bar what one sees at the end
notebooks: $(READY)
	@$(PYTHON) -c "import shutil; shutil.rmtree('notebooks/runs', ignore_errors=True)"
	$(RUN) -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=1200 --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False $(NOTEBOOKS)
	$(RUN) -m nbconvert --to notebook --inplace --coalesce-streams $(NOTEBOOKS)

address: $(READY)
	@$(RUN) -m tools.address $(REPOSITORY)

clean:
	$(PYTHON) -c "import pathlib, shutil; [shutil.rmtree(p, ignore_errors=True) for n in ('$(VENV)', 'runs', 'notebooks/**/runs', 'site', 'student-copy', 'build', '*.egg-info', '.pytest_cache', '.ruff_cache', '**/__pycache__', '**/.ipynb_checkpoints') for p in pathlib.Path('.').glob(n)]"
