"""Compare the stored outputs again and again, to see whether the comparison is reliable. Print a line per run.

    python tests/repeat_nbval.py --times 5 --threads 1 --threads 2

Each run is in a fresh clone of the last commit, as in ``make test``: all notebooks in a random order, without network,
with an empty folder for data, on so many threads.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
NBVAL = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=600", "-q", "-p", "no:cacheprovider"]


def run_once(threads: int, order: random.Random) -> tuple[bool, str]:
    """Return whether every cell passed, and pytest's last line or, after a failure, its whole output."""
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch, "clone")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        notebooks = sorted(str(path.relative_to(clone)) for path in (clone / "notebooks").rglob("*.ipynb"))
        places = order.sample(range(len(notebooks)), len(notebooks))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(clone), str(clone / "tests" / "offline")]),
            "VITLIB_DATA": str(Path(scratch, "data")),
            "OMP_NUM_THREADS": str(threads),
        }
        command = [sys.executable, "-m", "pytest", *NBVAL, *(notebooks[place] for place in places)]
        process = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    if process.returncode:
        return False, process.stdout + process.stderr
    closing = process.stdout.strip().splitlines()[-1].strip("= ")
    return True, f"order {' '.join(map(str, places))}: {closing}"


@click.command()
@click.option("--times", type=click.IntRange(1), default=5, help="Runs for each number of threads.")
@click.option("--threads", type=click.IntRange(1), multiple=True, default=(1, 2), help="Threads; may be repeated.")
@click.option("--seed", default=0, help="Start of the random orders.")
def main(times: int, threads: tuple[int, ...], seed: int) -> None:
    """Compare the stored outputs of all notebooks several times."""
    order = random.Random(seed)
    results = []
    for count in threads:
        for number in range(times):
            start = time.monotonic()
            good, said = run_once(count, order)
            results.append(good)
            click.echo(f"{count} threads, run {number + 1}, {time.monotonic() - start:.0f} s: {said}")
    click.echo(f"{sum(results)} of {len(results)} runs passed.")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
