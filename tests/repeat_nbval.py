"""Compare the stored outputs ten times, to see whether the comparison is reliable. Print a line per run.

Each run is in a fresh clone of the last commit, as in ``make test``: all notebooks in a random order, without network,
with an empty folder for data; five runs on one thread, five on two.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
NBVAL = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=600", "-q", "-p", "no:cacheprovider"]


def run_once(threads: int, order: random.Random) -> bool:
    """Return whether every cell passed. Print pytest's last line or, after a failure, its whole output."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch, "clone")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        notebooks = sorted(str(path.relative_to(clone)) for path in (clone / "notebooks").rglob("*.ipynb"))
        order.shuffle(notebooks)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(clone), str(clone / "tests" / "offline")]),
            "VITLIB_DATA": str(Path(scratch, "data")),
            "OMP_NUM_THREADS": str(threads),
        }
        command = [sys.executable, "-m", "pytest", *NBVAL, *notebooks]
        process = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    said = process.stdout + process.stderr if process.returncode else process.stdout.strip().splitlines()[-1]
    print(f"{threads} threads, {time.monotonic() - start:.0f} s: {said}", flush=True)
    return process.returncode == 0


if __name__ == "__main__":
    order = random.Random(0)
    passed = [run_once(threads, order) for threads in (1, 2) for _ in range(5)]
    print(f"{sum(passed)} of {len(passed)} runs passed.")
    sys.exit(not all(passed))
