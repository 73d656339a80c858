"""What a sweep costs, and what a second worker gains.

    python benchmarks/sweep.py

Three ways to run one notebook several times with other seeds, in turn, several rounds: a script that calls papermill's
function in a row; `python -m vitlib sweep` with one worker; with two workers. Each run trains a small model on one
thread. Times are those of whole commands: Python and workers started and ended, notebooks, tables and report written.
Two ratios come of it: the sweep's time with one worker to papermill's, and that with one worker to that with two. They
are those of all rounds together: each lasts minutes, in which a machine changes more than what is asked for here.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import common
import nbformat
import torch
from nbformat.v4 import new_code_cell, new_notebook

PARAMETERS = "seed: int = 0  # start of every random draw\nsteps: int = 10  # training steps of 32 images"
TRAINING = """\
import torch
from vitlib.course.figures import record_figures
from vitlib.model import create_model

torch.manual_seed(seed)
model = create_model("mini", 10)
optimizer = torch.optim.SGD(model.parameters(), 0.01)
images, labels = torch.rand(32, 3, 32, 32), torch.randint(10, (32,))
for _ in range(steps):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
record_figures(loss=loss.item())"""
PAPERMILL = """\
import sys
import papermill

notebook, runs, steps, folder = sys.argv[1:]
for seed in range(int(runs)):
    values = {"seed": seed, "steps": int(steps)}
    papermill.execute_notebook(notebook, f"{folder}/{seed}.ipynb", values, progress_bar=False)"""


def by_papermill(notebook: Path, runs: int, steps: int, folder: Path) -> list[str]:
    return ["-c", PAPERMILL, str(notebook), str(runs), str(steps), str(folder)]


def by_sweep(workers: int, notebook: Path, runs: int, steps: int, folder: Path) -> list[str]:
    seeds = ",".join(map(str, range(runs)))
    options = ["--grid", f"seed={seeds}", "-p", "steps", str(steps), "--out", str(folder)]
    return ["-m", "vitlib", "sweep", str(notebook), *options, "--workers", str(workers), "--threads-per-run", "1"]


def seconds_of(command: Callable[..., list[str]], *what) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.run([sys.executable, *command(*what, Path(folder))], capture_output=True, text=True)
        if process.returncode:
            raise click.ClickException(f"A run failed, so its time says nothing: {process.stdout}{process.stderr}")
        return time.perf_counter() - start


def together(numerators: list[float], denominators: list[float], spec: str) -> str:
    """Return the ratio over all rounds, and the lowest and the highest of the rounds."""
    rounds = common.ratio(numerators, denominators)
    return f"{sum(numerators) / sum(denominators):{spec}} (by round {rounds.low:{spec}} to {rounds.high:{spec}})"


@click.command()
@common.whole_number("--runs", 20, "Runs of the notebook each time.", least=2)
@common.whole_number("--steps", 10, "Training steps in each run.")
@common.whole_number("--rounds", 2, "How often everything is measured.")
@common.out_option
def main(runs, steps, rounds, out) -> None:
    """Time of a sweep with one worker and with two, beside papermill in a row."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of papermill's kernels; those of a sweep get it from the sweep
    with tempfile.TemporaryDirectory() as scratch:
        notebook = Path(scratch, "training.ipynb")
        cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(TRAINING)]
        kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), notebook)
        ways = {"papermill": by_papermill, "one worker": partial(by_sweep, 1), "two workers": partial(by_sweep, 2)}
        seconds_of(by_papermill, notebook, 1, 1)  # files are in memory from here on
        tasks = {name: partial(seconds_of, way, notebook, runs, steps) for name, way in ways.items()}
        seconds = common.interleave(tasks, rounds)
    spreads = {name: common.Spread.of(values) for name, values in seconds.items()}
    click.echo(common.table(["", "seconds"], [[name, f"{spread:.1f}"] for name, spread in spreads.items()]))
    overhead = together(seconds["one worker"], seconds["papermill"], ".3f")
    gain = together(seconds["one worker"], seconds["two workers"], ".2f")
    click.echo(
        f"\n{runs} runs take {overhead} times as long in a sweep with one worker as with papermill in a row, and end "
        f"{gain} times sooner with two workers than with one."
    )
    settings = {"runs": runs, "steps": steps, "rounds": rounds}
    record = {"machine": common.machine(torch.device("cpu")), "settings": settings, "seconds": seconds}
    common.write_json(out, record)


if __name__ == "__main__":
    main()
