"""Ship the results of a sweep with vitlib, as JSON beside the weights: parameters, figures, time and memory of every
run, the command as it was typed and the versions, but no host and no time of day.

python tools/keep_sweep.py runs/sweep-patches/results.json     writes sweep_patches.json, after the sweep's notebook
"""

import json
import sys
from pathlib import Path

from vitlib.utils import atomic_write
from vitlib.weights.checkpoint import PRETRAINED

VERSIONS = ("python", "torch", "papermill", "vitlib")
FIGURES = ("figures", "seconds", "peak_memory_bytes")
PLACES = ("data_dir", "run_dir")  # say where a run was, not what it did


def keep(results: Path, folder: Path = PRETRAINED) -> Path:
    """Write the record of a sweep into ``folder`` and return its path.

    Raises:
        ValueError: if a run is not finished, or runs differ in their versions.
    """
    content = json.loads(results.read_text(encoding="utf-8"))
    record = record_of(content)
    path = folder / f"sweep_{content['notebook']}.json"
    with atomic_write(path) as temporary:
        # a line for each run: differences between two records can be read
        runs = ",\n".join(f"  {json.dumps(run, ensure_ascii=False)}" for run in record.pop("runs"))
        head = json.dumps(record, indent=1, ensure_ascii=False).removesuffix("\n}")
        temporary.write_text(f'{head},\n "runs": [\n{runs}\n ]\n}}\n', encoding="utf-8")
    return path


def record_of(results: dict) -> dict:
    """Return the part of results.json that is kept; errors are those of :func:`keep`."""
    runs, varied = results["runs"], results["varied"]
    if unfinished := [run["run"] for run in runs if run["status"] != "ok"]:
        raise ValueError(f"The run {unfinished[0]} is not finished; run the same sweep again.")
    versions = [{name: run["versions"][name] for name in VERSIONS} for run in runs]
    if any(other != versions[0] for other in versions):
        raise ValueError("The runs have different versions of the packages; run the sweep again in another folder.")
    common = {name: value for name, value in runs[0]["parameters"].items() if name not in (*varied, *PLACES)}
    return {
        "command": results["command"],
        "notebook": results["notebook"],
        "notebook_sha256": results["notebook_sha256"],
        "date": min(run["started"] for run in runs)[:10],
        "versions": versions[0],
        "varied": varied,
        "parameters": common,
        "runs": [
            {"parameters": {name: run["parameters"][name] for name in varied}} | {name: run[name] for name in FIGURES}
            for run in runs
        ],
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(keep(Path(sys.argv[1])))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
