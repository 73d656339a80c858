"""How fast does vitlib train beside other programs, with and without the setting of ``vitlib/__init__.py``?

    python benchmarks/busy_machine.py --out busy_machine.json

A browser, a video call, or a second notebook: threads of OpenMP that spin while they wait lose their turn to such
programs, and everything waits for them. So vitlib lets them spin for a short time only. Here a new process trains for a
while alone, beside one busy process, and beside as many as there are cores; once with vitlib imported before torch,
which is the setting, and once after it, which is too late. Every round measures everything, in a random order. Run it
on a machine that is quiet otherwise.
"""

import os
import subprocess
import sys
from contextlib import ExitStack

import click
import common
from common import Spread, ratio

from vitlib import WAITING
from vitlib.course.doctor import usable_cores

BUSY = "while True: pass"
IMPORTS = {"vitlib": "import vitlib, torch", "default": "import torch, vitlib"}
TRAIN = """{imports}
from vitlib.course.doctor import training_speed
torch.set_num_threads({threads})
print(training_speed({seconds}, torch.device("cpu"), {precision!r}, preset={preset!r}, recipe="modern", norm_first=True,
                     batch_size={batch_size}))
"""


def speed(busy: int, **settings) -> float:
    """Images/s of a training in a new process, beside ``busy`` processes that never wait."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    with ExitStack() as others:
        for _ in range(busy):
            process = others.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            others.callback(process.kill)
        command = [sys.executable, "-c", TRAIN.format(**settings)]
        return float(subprocess.check_output(command, env=environment, text=True))


@click.command(help=__doc__.split("\n\n")[0])
@common.listed("--presets", click.Choice(["mini", "small"]), "mini,small", "Sizes of the model.")
@common.precisions_option
@common.whole_number("--threads", usable_cores(), "Threads of the training.")
@common.whole_number("--batch-size", 32, "Images a step.")
@common.whole_number("--rounds", 3, "How often everything is measured.")
@common.whole_number("--spins", None, "Another number of rounds to spin than vitlib's.", least=0)
@click.option("--seconds", default=3.0, show_default=True, type=click.FloatRange(0.1), help="Of training, each time.")
@common.out_option
def main(presets, precisions, threads, batch_size, rounds, spins, seconds, out) -> None:
    all_imports = dict(IMPORTS)
    if spins is not None:
        all_imports["vitlib"] = f"import os; os.environ['GOMP_SPINCOUNT'] = '{spins}'; {IMPORTS['vitlib']}"
    loads = sorted({0, 1, usable_cores()})
    cases = [(preset, precision, busy) for preset in presets for precision in precisions for busy in loads]
    tasks = {
        (*case, setting): lambda preset=case[0], precision=case[1], busy=case[2], imports=imports: speed(
            busy, imports=imports, threads=threads, seconds=seconds, precision=precision, preset=preset,
            batch_size=batch_size,
        )
        for case in cases
        for setting, imports in all_imports.items()
    }  # fmt: skip
    found = common.interleave(tasks, rounds)
    rows = []
    for preset, precision, busy in cases:
        ours, default = (found[preset, precision, busy, setting] for setting in IMPORTS)
        quiet = found[preset, precision, 0, "vitlib"]
        rows.append([
            f"{preset}, {precision}", str(busy), f"{Spread.of(default):.0f}", f"{Spread.of(ours):.0f}",
            f"{ratio(ours, default):.2f}", f"{ratio(ours, quiet):.2f}",
        ])  # fmt: skip
    click.echo(f"\nTraining, images/s, {threads} threads on {usable_cores()} cores: median (lowest to highest)\n")
    header = ("model", "busy processes", "default", "vitlib", "vitlib/default", "vitlib/vitlib alone")
    click.echo(common.table(header, rows))
    common.write_json(out, {
        "machine": common.machine(common.resolve_device("cpu")), "threads": threads, "batch_size": batch_size,
        "images_per_second": {", ".join(map(str, name)): values for name, values in found.items()},
    })  # fmt: skip


if __name__ == "__main__":
    main()
