"""Report what this machine can do, what is missing, and how long the chapters take: ``python -m vitlib doctor``.

torch is loaded only where the installed versions will do, so a machine without it gets a sentence, too. Nothing is sent
or fetched.
"""

import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from vitlib.utils import cache_dir, first_line, text_table, versions

GIB = 2**30
PEAK = 0.8 * GIB  # the most memory that a chapter takes (RESULTS.md)
PLACES = {  # by an environment variable that only this place sets: its name, and how to keep one's work there
    "KAGGLE_KERNEL_RUN_TYPE": "Kaggle; save a version to keep your work",
    "COLAB_RELEASE_TAG": "Google Colab; save a copy in Drive to keep your work",
    "BINDER_REPO_URL": "Binder; download your notebooks before the session ends",
}
SHOWN = ("torch", "torchvision", "vitlib", "ipywidgets", "jupyterlab")
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

    cores: int  # that this process may use
    cores_in_all: int
    memory: float  # that this process may use
    free_memory: float
    busy: float  # share of all cores that other programs use
    needs: Mapping[str, str]  # package to the lowest version; empty if vitlib is not installed
    versions: Mapping[str, str]  # "python" or installed package to the version
    place: str = "a machine of your own"
    failure: str | None = None  # why torch does not load or train; the rest is known only where it does
    gpu: str | None = None
    threads: int = 1
    precision: str = "float32"  # that "auto" stands for
    downloads: tuple[str, ...] = ()  # data sets
    speed: float | None = None


def gather() -> Facts:
    """Gather the facts about this machine. Takes some seconds, since it trains for a moment."""
    import psutil

    _, most, left = container_limits()
    needs, system = lowest_versions(), psutil.virtual_memory()
    facts = Facts(
        cores=granted_cores(),
        cores_in_all=os.cpu_count() or 1,
        memory=min(system.total, most),
        free_memory=max(0, min(system.available, left)),
        busy=psutil.cpu_percent(0.5) / 100,
        needs=needs,
        versions=versions(*SHOWN, *needs),
        place=next((words for name, words in PLACES.items() if name in os.environ), Facts.place),
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

    def read(file: str, missing: str) -> str:
        return (root / file).read_text().replace("max", "inf") if (root / file).exists() else missing

    quota, period = map(float, read("cpu.max", "inf 1").split())
    limit, used = float(read("memory.max", "inf")), float(read("memory.current", "0"))
    # files that were read count as used, but make room when memory is wanted
    cached = dict(line.split() for line in read("memory.stat", "").splitlines()).get("inactive_file", "0")
    return quota / period, limit, limit - used + float(cached)


def lowest_versions() -> dict[str, str]:
    """Return the lowest versions that pyproject.toml allows, from the metadata of the installed vitlib."""
    lines = metadata.requires("vitlib") if "vitlib" in versions() else []
    return dict(line.split(">=") for line in lines if "extra ==" not in line)


def _ask_torch() -> dict[str, object]:
    """Return what only torch knows, or why it does not load or train."""
    way_out = "install torch and torchvision again, together"
    try:
        import torch

        from vitlib.data.cifar import cifar_class
        from vitlib.data.images import SOURCES
        from vitlib.training import resolve_device, resolve_precision

        folders = {name: cache_dir() / cifar_class(name).base_folder for name in SOURCES[2:]}
        device = resolve_device()
        gpu = None if device.type == "cpu" else device.type.upper()
        if device.type == "cuda":
            card = torch.cuda.get_device_properties(device)
            gpu = f"{card.name}, {gib(card.total_memory)}"
        way_out = "set device to cpu in the parameters of chapters 03 and 04, or install torch again"
        # fails on a GPU that this torch was not built for, or that others have filled
        speed = training_speed(0.8, device, **CHAPTER_03)
    except Exception as error:  # broken installations raise anything
        reason = f"{type(error).__name__}: {first_line(error).replace(str(Path.home()), '~'):.100}"
        return {"failure": f"torch does not work here ({reason}); {way_out}."}
    downloads = tuple(name for name, folder in folders.items() if folder.is_dir())
    precision, threads = resolve_precision("auto", device), torch.get_num_threads()
    return {"gpu": gpu, "threads": threads, "precision": precision, "downloads": downloads, "speed": speed}


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


def problems(facts: Facts) -> list[tuple[bool, str]]:
    """Return a sentence for each problem, and before it whether the course cannot run because of it."""
    found = []
    if not facts.needs:
        found.append((True, "vitlib is not installed; python -m pip install -e . in the course's folder does that."))
    there = {name: facts.versions.get(name, "") for name in facts.needs}
    if poor := [name for name, lowest in facts.needs.items() if _numbers(there[name]) < _numbers(lowest)]:
        listed = ", ".join(f"{name} {there[name]}".strip() for name in poor)
        wanted = " ".join(f'"{name}>={facts.needs[name]}"' for name in poor)
        found.append((True, f"Missing or too old: {listed}; python -m pip install --upgrade {wanted}"))
    if facts.failure:
        found.append((True, facts.failure))
    if facts.free_memory < PEAK:
        words = f"Only {gib(facts.free_memory)} of {gib(facts.memory)} of memory are free, chapters need up to 0.8 GiB"
        found.append((facts.memory < PEAK, f"{words}; close other programs and notebooks, or use a larger machine."))
    if facts.threads > facts.cores:
        words = f"torch uses {facts.threads} threads, more than it may use cores, and training takes many times as long"
        found.append((False, f"{words}; start Jupyter with OMP_NUM_THREADS={facts.cores} in the environment."))
    if facts.busy > 0.25:
        found.append((False, f"Other programs use {facts.busy:.0%} of the processor; without them training is faster."))
    return found


def _numbers(version: str) -> list[int]:
    """Return the numbers in a version, to be compared; those of "" are below all others."""
    return [int(number) for number in re.findall(r"\d+", version)]


def can_run(facts: Facts) -> bool:
    """Return whether the course can run: no problem is essential."""
    return not any(essential for essential, _ in problems(facts))


def report(facts: Facts) -> str:
    """Return the facts, how long each chapter takes, and what is wrong."""
    rows = {
        "place": facts.place,
        "system": f"{platform.system()} {platform.machine()}, Python {facts.versions['python']}",
        "packages": ", ".join(f"{name} {facts.versions.get(name, 'missing')}" for name in SHOWN),
        "cores": f"{facts.cores} of {facts.cores_in_all} may be used",
        "memory": f"{gib(facts.memory)}, of which {gib(facts.free_memory)} are free",
    }
    chapters = {"00 to 06": "cannot run yet, see below"}
    if facts.speed is not None:
        rows["GPU"] = facts.gpu or "none, and none is needed"
        rows["speed"] = f"{facts.speed:,.0f} images/s (training of `mini` in float32, measured for a second)"
        rows["precision"] = f"auto is {facts.precision} here"
        rows["images"] = f"drawn; downloaded: {', '.join(facts.downloads) or 'none, and none is needed'}"
        minutes = {name: (START + SUSTAINED * images / facts.speed) / 60 for name, images in CHAPTERS.items()}
        chapters = {name: f"about {t:,.0f} min" if t >= 0.9 else "less than 1 min" for name, t in minutes.items()}
    lines = text_table([*rows.items(), ("", ""), *chapters.items(), ("", "")])
    lines += [f"{'Problem' if essential else 'Note'}: {sentence}" for essential, sentence in problems(facts)]
    return "\n".join([*lines, "The course can run here."] if can_run(facts) else lines)


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
