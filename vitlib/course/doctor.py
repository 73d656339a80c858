"""Report what this machine can do, what is missing, and how long the chapters take: ``python -m vitlib doctor``.

torch is loaded only where the installed versions will do, so a machine without it gets a sentence, too. Nothing is sent
or fetched.
"""

import math
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from vitlib.utils import cache_dir, first_line, text_table, versions

GIB = 2**30
PEAK = 0.8 * GIB  # the most memory that a chapter takes (RESULTS.md)
SHOWN = ("torch", "torchvision", "vitlib", "ipywidgets", "jupyterlab")
PLACES = {  # by an environment variable that only this place sets: its name, and how to keep one's work there
    "KAGGLE_KERNEL_RUN_TYPE": "Kaggle; save a version to keep your work",
    "COLAB_RELEASE_TAG": "Google Colab; save a copy in Drive to keep your work",
    "BINDER_REPO_URL": "Binder; download your notebooks before the session ends",
}
# the training whose speed is measured: chapter 03's defaults
CHAPTER_03 = {"preset": "mini", "recipe": "short", "norm_first": True, "batch_size": 32}
CHAPTERS = {  # images that each trains on; one that is only looked at counts as a third
    "00 orientation": 0, "01 patching": 0, "02 attention": 0, "03 pretraining": 48_000, "04 fine-tuning": 55_000,
    "05 looking inside": 11_000, "06 the real ViT": 2_500,
}  # fmt: skip
START = 10  # seconds that a chapter takes to import and draw
SUSTAINED = 1.2  # short measurements overestimate sustained speed


@dataclass(frozen=True)
class Facts:
    """What is known about a machine. Sizes are in bytes, the speed in images/s; None for what is unknown."""

    place: str
    cores: int  # that this process may use
    cores_in_all: int
    memory: int  # that this process may use
    free_memory: int
    free_disk: int  # where downloads are kept
    busy: float  # share of all cores that other programs use
    needs: Mapping[str, str]  # "python" or package to the lowest version; empty if vitlib is not installed
    versions: Mapping[str, str]  # "python" or installed package to the version
    failure: str | None = None  # why torch does not load or train; the rest is known only where it does
    gpu: str | None = None
    threads: int = 1
    precision: str = "float32"  # that "auto" stands for
    downloads: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    speed: float | None = None


def gather() -> Facts:
    """Gather the facts about this machine. Takes some seconds, since it trains for a moment."""
    import psutil

    _, most, left = container_limits()
    folder, needs, system = cache_dir(), lowest_versions(), psutil.virtual_memory()
    facts = Facts(
        place=next((words for name, words in PLACES.items() if name in os.environ), "a machine of your own"),
        cores=granted_cores(),
        cores_in_all=os.cpu_count() or 1,
        memory=min(system.total, most),
        free_memory=max(0, min(system.available, left)),
        free_disk=shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free,
        busy=psutil.cpu_percent(0.5) / 100,
        needs=needs,
        versions=versions(*SHOWN, *needs),
    )
    return replace(facts, **_ask_torch()) if can_run(facts) else facts


def usable_cores() -> int:
    """Return the number of cores that this process may run on, for each of which torch starts a thread."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def granted_cores() -> int:
    """Return how many cores this process can keep busy; of the usable ones, a container may grant only a share."""
    return max(1, math.ceil(min(usable_cores(), container_limits()[0])))


def container_limits(root: Path = Path("/sys/fs/cgroup")) -> tuple[float, float, float]:
    """Return cores, bytes of memory and free bytes that a container (cgroups, version 2) grants; infinity for no limit.

    Binder grants 1 core and 2 GB of a machine whose own numbers are far larger.
    """

    def words(file: str) -> list[str]:
        return (root / file).read_text().split() if (root / file).exists() else ["max"]

    quota, limit, used = words("cpu.max"), words("memory.max")[0], words("memory.current")[0]
    cores = math.inf if quota[0] == "max" else int(quota[0]) / int(quota[1])
    if "max" in (limit, used):
        return cores, math.inf, math.inf
    statistics = words("memory.stat")
    cached = dict(zip(statistics[::2], statistics[1::2], strict=False)).get("inactive_file", 0)
    # files that were read count as used, but make room when memory is wanted
    return cores, int(limit), int(limit) - int(used) + int(cached)


def lowest_versions() -> dict[str, str]:
    """Return the lowest versions that pyproject.toml allows, from the metadata of the installed vitlib."""
    if "vitlib" not in versions():
        return {}
    needed = [line for line in metadata.requires("vitlib") if "extra ==" not in line]
    lines = [f"python{metadata.metadata('vitlib')['Requires-Python']}", *needed]
    return dict(line.split(">=") for line in lines)


def _ask_torch() -> dict[str, object]:
    try:
        import torch

        from vitlib.data.cifar import cifar_class
        from vitlib.training import resolve_device, resolve_precision
        from vitlib.weights.checkpoint import PRETRAINED

        device = resolve_device()
        folders = {name: cifar_class(name).base_folder for name in ("cifair100", "cifair10", "cifar100", "cifar10")}
    except Exception as error:  # broken installations raise anything
        return {"failure": f"torch or torchvision does not load ({_reason(error)}); install both again, together."}
    gpu = None if device.type == "cpu" else device.type.upper()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        gpu = f"{card.name}, {gib(card.total_memory)}"
    known = {
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "precision": resolve_precision("auto", device),
        "downloads": tuple(name for name, folder in folders.items() if (cache_dir() / folder).is_dir()),
        "weights": tuple(sorted(file.stem for file in PRETRAINED.glob("*.safetensors"))),
    }
    try:
        known["speed"] = training_speed(0.8, device, **CHAPTER_03)
    except RuntimeError as error:  # a GPU that this torch was not built for, or that others have filled
        way_out = "set device to cpu in the parameters of chapters 03 and 04, or install torch again"
        known["failure"] = f"Training does not work here ({_reason(error)}); {way_out}."
    return known


def training_speed(
    seconds: float, device, precision: str = "float32", *, preset: str, recipe: str, norm_first: bool, batch_size: int
) -> float:
    """Return images per second in training, measured for about ``seconds`` on random images of 32 x 32 pixels."""
    import torch

    from vitlib.data import LabelledImages
    from vitlib.model import create_model
    from vitlib.training import RECIPES, fit
    from vitlib.weights import ModelCard

    classes = tuple(map(str, range(100)))
    model = create_model(preset, 100, norm_first=norm_first, drop=RECIPES[recipe].drop).to(device)
    card = ModelCard(classes, 3 * (0.5,), 3 * (0.25,))

    def time_of(steps: int) -> float:
        images = torch.randint(256, (steps * batch_size, 3, 32, 32), dtype=torch.uint8)
        data = LabelledImages(images, torch.randint(100, (len(images),)), classes)
        options = {"epochs": 1, "batch_size": batch_size, "precision": precision, "progress": False}
        history = fit(model, data, data.subset(slice(0, 1)), card, RECIPES[recipe], **options)
        return history.epochs[0]["seconds"]

    time_of(1)  # the first step takes longer
    steps = max(1, round(seconds / time_of(1)))
    return steps * batch_size / time_of(steps)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error).replace(str(Path.home()), '~'):.100}"


def _numbers(version: str) -> list[int]:
    """Return the numbers in a version, to be compared; those of "" are below all others."""
    return [int(number) for number in re.findall(r"\d+", version)]


def problems(facts: Facts) -> list[tuple[bool, str]]:
    """Return a sentence for each problem, and before it whether the course cannot run because of it."""
    found, there = [], facts.versions
    if not facts.needs:
        found.append((True, "vitlib is not installed; python -m pip install -e . in the course's folder does that."))
    poor = {name: least for name, least in facts.needs.items() if _numbers(there.get(name, "")) < _numbers(least)}
    if lowest := poor.pop("python", None):
        found.append((True, f"Python {there['python']} is too old; make an environment with {lowest} or newer."))
    if poor:
        listed = ", ".join(f"{name} {there.get(name, '')}".strip() for name in poor)
        wanted = " ".join(f'"{name}>={lowest}"' for name, lowest in poor.items())
        found.append((True, f"Missing or too old: {listed}; python -m pip install --upgrade {wanted}"))
    if facts.failure:
        found.append((True, facts.failure))
    if facts.free_memory < PEAK:
        words = f"Only {gib(facts.free_memory)} of {gib(facts.memory)} of memory are free, chapters need up to 0.8 GiB"
        found.append((facts.memory < PEAK, f"{words}; close other programs and notebooks, or use a larger machine."))
    if facts.threads > facts.cores:
        words = f"torch uses {facts.threads} threads on {cores(facts.cores)}, and training takes many times as long"
        found.append((False, f"{words}; start Jupyter with OMP_NUM_THREADS={facts.cores} in the environment."))
    if facts.busy > 0.25:
        found.append((False, f"Other programs use {facts.busy:.0%} of the processor; without them training is faster."))
    return found


def can_run(facts: Facts) -> bool:
    return not any(essential for essential, _ in problems(facts))


def report(facts: Facts) -> str:
    """Return the facts, how long each chapter takes, and what is wrong, in at most 30 lines."""
    names = ", ".join(f"{name} {facts.versions.get(name, 'missing')}" for name in SHOWN)
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++") or shutil.which("cl")
    machine = {
        "where": f"{facts.place} ({platform.system()} {platform.machine()})",
        "processor": cores(facts.cores) + (f" of {facts.cores_in_all}" if facts.cores_in_all > facts.cores else ""),
        "memory": f"{gib(facts.memory)}, of which {gib(facts.free_memory)} are free",
        "disk": f"{gib(facts.free_disk)} free where downloads are kept",
        "compiler": "there" if compiler else "none: compile=True (torch.compile) needs one, such as g++",
    }
    data, chapters = {}, {"00 to 06": "cannot run yet, see below"}
    if facts.speed is not None:
        machine["processor"] += f"; GPU: {facts.gpu}" if facts.gpu else "; no GPU, and none is needed"
        machine["speed"] = f"{facts.speed:,.0f} images/s (training of `mini` in float32, measured for a second)"
        machine["precision"] = f"auto is {facts.precision} here"
        downloads = ", ".join(facts.downloads) or "none, and none is needed"
        data = {"images": f"shapes100, shapes10; downloaded: {downloads}", "weights": ", ".join(facts.weights)}
        chapters = {
            name: f"{duration(START + SUSTAINED * images / facts.speed)}{' (an estimate)' if images else ''}"
            for name, images in CHAPTERS.items()
        }
    software = {"with": f"Python {facts.versions['python']}, {names}"}
    sections = {"This machine": machine, "Software": software, "Data": data, "What that means": chapters}
    lines = []
    for title, rows in sections.items():
        if rows:
            lines += [title, *(f"  {line}" for line in text_table(list(rows.items()))), ""]
    lines += [f"{'Problem' if essential else 'Note'}: {sentence}" for essential, sentence in problems(facts)]
    return "\n".join([*lines, "The course can run here."] if can_run(facts) else lines)


def duration(seconds: float) -> str:
    """Return a time in words, as roughly as it is known, such as ``about 2 minutes``."""
    minutes = round(seconds / 60)
    return "less than a minute" if seconds < 50 else f"about {minutes:,} minute{'s' if minutes > 1 else ''}"


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def cores(count: int) -> str:
    return f"{count} core{'s' if count > 1 else ''}"
