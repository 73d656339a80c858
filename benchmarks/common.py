"""What the benchmarks share: interleaved timing, ratios with their spread, tables, and facts about the machine."""

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch

from vitlib.course.doctor import usable_cores
from vitlib.data import LabelledImages
from vitlib.model import PRESETS
from vitlib.training import PRECISIONS, hardware, resolve_device
from vitlib.utils import atomic_write, progress_bar, text_table, versions


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of several measurements. Prints as ``2.41 (2.33 to 2.50)``."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the spread of the ratios round by round: what slows down a whole round cancels out of its ratio."""
    return Spread.of([above / below for above, below in zip(numerators, denominators, strict=True)])


def interleave(
    tasks: Mapping[Hashable, Callable[[], Any]], rounds: int, description: str = "measuring"
) -> dict[Hashable, list[Any]]:
    """Run every task once per round, each round in another order, and collect what the tasks return.

    A machine that gets busier during a run then does so for all tasks alike. The orders are the same in every run.
    """
    results = {name: [] for name in tasks}
    with progress_bar(description=description, total=rounds * len(tasks)) as bar:
        for number in range(rounds):
            for name in random.Random(number).sample(list(tasks), len(tasks)):
                results[name].append(tasks[name]())
                bar.update()
    return results


def clock(device: torch.device) -> float:
    """Return seconds from an arbitrary start, read when the device has done everything it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on ``count`` threads, and afterwards on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(device: torch.device) -> dict:
    """Return what the results depend on, for the record, without the machine's name or a path."""
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": usable_cores(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "device": hardware(device),
        "versions": versions(),
    }


def _processor() -> str:
    """Return the name of the CPU; Python knows it on some systems only."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align the columns of a table below a header, the first to the left and the others to the right."""
    rule = ["-" * max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(text_table([header, rule, *rows], right=range(1, len(header))))


def mean_and_range(shares: Sequence[float]) -> str:
    """Return the mean, the lowest and the highest in percent, ``41.3 (40.9 to 41.8)``."""
    percent = [100 * share for share in shares]
    return f"{statistics.mean(percent):.1f} ({min(percent):.1f} to {max(percent):.1f})"


def random_images(count: int, size: int = 32) -> LabelledImages:
    """Return ``count`` images of noise in 100 classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(100, (count,), generator=generator)
    return LabelledImages(images, labels, tuple(str(label) for label in range(100)))


def write_json(path: str | Path | None, content: dict) -> None:
    """Write ``content`` to ``path``, whole or not at all; None writes nothing."""
    if path is None:
        return
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def _device(context, option, name: str) -> torch.device:
    try:
        return resolve_device(name)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def whole_number(flag: str, default: int | None, help: str, least: int = 1):
    """Make a click option for a whole number of at least ``least``."""
    return click.option(flag, default=default, show_default=True, type=click.IntRange(min=least), help=help)


def listed(flag: str, kind: click.ParamType, default: str, help: str):
    """Make a click option for values of one kind, separated by commas; the command gets a list without repeats."""

    def split(context, option, text: str) -> list:
        return list(dict.fromkeys(kind.convert(word.strip(), option, context) for word in text.split(",")))

    return click.option(flag, default=default, show_default=True, callback=split, help=help)


upstream_option = click.option(
    "--upstream", default="cifair100", show_default=True, help="A data set's name, or a folder of images."
)
preset_option = click.option(
    "--preset", default="small", show_default=True, type=click.Choice(list(PRESETS)), help="Size of the model."
)
device_option = click.option(
    "--device", default="auto", show_default=True, callback=_device, help="auto, cpu, cuda and so on."
)
precisions_option = listed(
    "--precisions", click.Choice(["float32", "bfloat16"]), "float32,bfloat16",
    "Widths of matrix products; bfloat16 is autocast, the weights stay float32.",
)  # fmt: skip
precision_option = click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(PRECISIONS),
    help="Width of the matrix products.",
)
out_option = click.option("--out", type=click.Path(dir_okay=False), help="JSON file for all raw measurements.")
