"""What this machine can do, what is missing, and what that means for the chapters: ``python -m vitlib doctor``.

Facts are gathered apart from the words about them. torch is loaded only to be asked, and only if it is the one that the
course needs, so that a machine without it gets a sentence too. Nothing is sent or fetched.
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

from vitlib.utils import cache_dir

GIB = 2**30
PEAK = 0.8 * GIB  # the most memory that a chapter takes: 00 runs this beside its kernel; 03 takes 0.7 (RESULTS.md)
CIFAR_ON_DISK = 0.4 * GIB  # archive and unpacked files of one data set
SHOWN = {name.lower(): name for name in ("torch", "torchvision", "vitlib", "ipywidgets", "JupyterLab")}
PLACES = {  # the start of an environment variable that only this place sets, and how to keep one's work there
    "Kaggle": ("KAGGLE_KERNEL_RUN_TYPE", "save a version to keep your work"),
    "Google Colab": ("COLAB_RELEASE_TAG", "save a copy in Drive to keep your work"),
    "Binder": ("BINDER_", "download your notebooks before the session ends"),
}
# What the chapters compute: out of notebooks/parameters/class.yaml and full.yaml; a test holds them equal.
CLASS = {"preset": "mini", "recipe": "short", "norm_first": True, "batch_size": 32}
CLASS_LENGTH = {"pretrain_epochs": 5, "finetune_epochs": 1, "seeds": 3}
PUBLISHED = {"preset": "small", "recipe": "published", "norm_first": False, "batch_size": 128}
PUBLISHED_LENGTH = {"pretrain_epochs": 100}
CIFAR_COUNTS = {"train": 50_000, "test": 10_000}
VALIDATION = 0.1  # share of the training images
FORWARD = 1 / 3  # what looking at an image costs, in trained images: the way back takes twice as long as the way there
START = 10  # seconds to import and to draw: chapters 01 and 02, which train nothing, take 10 to 13 (RESULTS.md)
SUSTAINED = 1.5  # what a second gives is not kept up for minutes: 700 images/s here, where chapter 03 trains at 430
UNTRAINED = "nothing is trained: less than a minute"


@dataclass(frozen=True)
class Facts:
    """What was found out about a machine; None for what could not be. Sizes are in bytes, speeds in images/s."""

    place: str  # a key of PLACES, or "" for a machine of one's own
    cores: int  # that this process may use
    cores_in_all: int
    memory: int | None  # that this process may use
    free_memory: int | None
    free_disk: int  # where downloads are kept
    load: float  # programs that want a core, on average over a minute
    needs: Mapping[str, str]  # "Python" or package to the lowest version; empty if vitlib is not installed
    versions: Mapping[str, str | None]  # "Python" or package to the version
    # these only if torch could be asked
    failure: str | None = None  # why it could not, or why training does not work
    gpu: str | None = None
    threads: int = 1
    downloads: tuple[str, ...] = ()
    weights: tuple[str, ...] | None = None
    class_speed: float | None = None
    published_speed: float | None = None
    bfloat16_gain: float | None = None  # how many times as fast as float32; not measured on a GPU


def gather() -> Facts:
    """The facts about this machine. Takes some seconds, since it trains for a moment."""
    _, most, left = container_limits()
    needs, folder = lowest_versions(), cache_dir()
    try:
        import psutil

        system = psutil.virtual_memory()
        memory = {"memory": min(system.total, most), "free_memory": max(0, min(system.available, left))}
    except ImportError:
        memory = {"memory": None, "free_memory": None}
    facts = Facts(
        place=place(os.environ),
        cores=granted_cores(),
        cores_in_all=os.cpu_count() or 1,
        **memory,
        free_disk=shutil.disk_usage(next(place for place in (folder, *folder.parents, Path()) if place.exists())).free,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,  # Windows does not count it
        needs=needs,
        versions={"Python": platform.python_version()}
        | {name: version(name) for name in {**SHOWN, **needs} if name != "Python"},
    )
    return replace(facts, **_ask_torch()) if can_run(facts) else facts


def place(environ: Mapping[str, str]) -> str:
    """Whose machine this is, by its environment variables; "" for one's own."""
    for name, (variable, _) in PLACES.items():
        if any(given.startswith(variable) for given in environ):
            return name
    return ""


def usable_cores() -> int:
    """Those that this process may run on, for each of which torch starts a thread."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def granted_cores() -> int:
    """How many cores this process can keep busy: of those that it may run on, a container may grant a share only."""
    return max(1, math.ceil(min(usable_cores(), container_limits()[0])))


def container_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> tuple[float, float, float]:
    """What a container (cgroups, version 1 or 2) grants: cores, bytes of memory, bytes that are left; infinity for no
    limit. Binder gives 1 core and 2 GB of a machine whose own numbers are far larger."""
    paths = ["", *(line.split(":", 2)[2].strip("/") for line in _text(own).splitlines())]
    tops = {root / controller / path for controller in ("", "cpu", "memory") for path in paths}
    cores = most = left = math.inf
    for folder in {folder for top in tops for folder in (top, *top.parents) if folder.is_relative_to(root)}:
        version_1 = [*_numbers(folder / "cpu.cfs_quota_us"), *_numbers(folder / "cpu.cfs_period_us")]
        quota = _numbers(folder / "cpu.max") or version_1
        if len(quota) == 2 and quota[0] > 0:  # "max 100000" and -1 are no limit
            cores = min(cores, quota[0] / quota[1])
        limit = _numbers(folder / "memory.max") or _numbers(folder / "memory.limit_in_bytes")
        used = _numbers(folder / "memory.current") or _numbers(folder / "memory.usage_in_bytes")
        if limit and used:
            # files that were read count as used, but make room when memory is wanted
            cached = re.search(r"^inactive_file (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
            most, left = min(most, *limit), min(left, limit[0] - used[0] + int(cached.group(1) if cached else 0))
    return cores, most, left


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", _text(path))]


def version(package: str) -> str | None:
    """Of an installed package; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lowest_versions() -> dict[str, str]:
    """What pyproject.toml asks for, out of the metadata of the installed vitlib; without what is optional."""
    if version("vitlib") is None:
        return {}
    needed = [line for line in metadata.requires("vitlib") if "extra ==" not in line]
    lines = [f"Python{metadata.metadata('vitlib')['Requires-Python']}", *needed]
    return dict(re.match(r"([\w-]+) *>= *([\d.]+)", line).groups() for line in lines)


def is_enough(found: str | None, lowest: str) -> bool:
    """Whether a version is there and not below the lowest: numbers part by part, what follows them left aside."""
    parts = [[int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", text)[0])] for text in (found or "", lowest)]
    return parts[0] + [0] * len(parts[1]) >= parts[1] if found else False


def _ask_torch() -> dict[str, object]:
    """What only torch knows, and how fast it trains."""
    try:
        import torch

        from vitlib.data.cifar import cifar_class
        from vitlib.data.images import SOURCES
        from vitlib.training.devices import resolve_device
        from vitlib.weights.checkpoint import PRETRAINED

        device = resolve_device()
        folders = {name: cache_dir() / cifar_class(name).base_folder for name in SOURCES if name.startswith("ci")}
    except Exception as error:  # broken installations raise anything
        return {"failure": f"torch or torchvision does not load ({_reason(error)}); install both again, together."}
    card = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    on_cpu = device.type == "cpu"
    known = {
        "gpu": f"{card.name}, {gib(card.total_memory)}" if card else None if on_cpu else device.type.upper(),
        "threads": torch.get_num_threads(),
        "downloads": tuple(name for name, folder in folders.items() if folder.is_dir()),
        "weights": tuple(sorted(file.stem for file in PRETRAINED.glob("*.safetensors"))),
    }
    # 128 images at once take a slow CPU longer than all of this may; 8 at once are up to a third faster per image
    published = PUBLISHED | {"batch_size": 8} if on_cpu else PUBLISHED
    try:
        known["class_speed"] = training_speed(0.8, device, **CLASS)
        known["published_speed"] = training_speed(0.6, device, **published)
        if on_cpu:
            known["bfloat16_gain"] = training_speed(0.3, device, "bfloat16", **published) / known["published_speed"]
    except RuntimeError as error:  # a GPU that this torch was not built for, or that others have filled
        way_out = "install torch again" if on_cpu else "set device = 'cpu' in the parameters of chapters 03 and 04"
        known["failure"] = f"Training does not work here ({_reason(error)}); {way_out}."
    return known


def training_speed(
    seconds: float, device, precision: str = "auto", *, preset: str, recipe: str, norm_first: bool, batch_size: int
) -> float:
    """Images per second in training, measured for about ``seconds``, on random images of 32 x 32 pixels."""
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
    first = (str(error).strip().splitlines() or [""])[0].replace(str(Path.home()), "~")
    return f"{type(error).__name__}: {first[:100]}"


def problems(facts: Facts) -> list[tuple[bool, str]]:
    """For each thing that is wrong: whether the course cannot run because of it, and a sentence with the way out."""
    python, needs = facts.versions["Python"], dict(facts.needs)
    lowest_python = needs.pop("Python", "0")
    poor = [name for name in needs if not is_enough(facts.versions[name], needs[name])]
    listed = ", ".join(f"{name} {facts.versions[name] or ''}".strip() for name in poor)
    wanted = " ".join(f'"{name}>={needs[name]}"' for name in poor)
    memory, free = (math.inf if size is None else size for size in (facts.memory, facts.free_memory))
    need = "chapters need up to 0.8 GiB"
    found = (
        (not needs, True, "vitlib is not installed; python -m pip install -e . in the course's folder does that."),
        (not is_enough(python, lowest_python), True, f"Python {python} is too old; make an environment with "
         f"{lowest_python} or newer."),
        (poor, True, f"Missing or too old: {listed}; python -m pip install --upgrade {wanted}"),
        (facts.failure, True, facts.failure),
        (facts.weights == (), True, "The weights that ship with vitlib are missing; install vitlib again."),
        (memory < PEAK, True, f"{gib(memory)} of memory are too little, {need}; use a larger machine, or Colab."),
        (free < PEAK <= memory, False, f"Only {gib(free)} of memory are free, {need}; close other programs and "
         "notebooks."),
        (facts.free_disk < CIFAR_ON_DISK, False, f"Only {gib(facts.free_disk)} of disk are free: enough for the "
         "chapters, but CIFAR needs 0.4 GiB; let VITLIB_DATA name a folder elsewhere."),
        (facts.threads > facts.cores, False, f"torch uses {facts.threads} threads on {cores(facts.cores)}, which makes "
         f"training many times slower; begin a notebook with `import torch; torch.set_num_threads({facts.cores})`, or "
         f"start Jupyter with OMP_NUM_THREADS={facts.cores} in the environment."),
        (facts.load > facts.cores_in_all, False, "Other programs keep the processor busy at the moment, so the "
         "estimates are too long."),
        (not facts.place and facts.versions["jupyterlab"] is None, False, "JupyterLab is missing; python -m pip "
         "install jupyterlab, unless your editor opens notebooks."),
    )  # fmt: skip
    return [(essential, sentence) for holds, essential, sentence in found if holds]


def can_run(facts: Facts) -> bool:
    return not any(essential for essential, _ in problems(facts))


def report(facts: Facts) -> str:
    """The facts, what they mean for each chapter, and what is wrong, in at most 30 lines."""
    where = f"{facts.place}; {PLACES[facts.place][1]}" if facts.place else "a machine of your own"
    of_all = f" of {facts.cores_in_all}" if facts.cores_in_all > facts.cores else ""
    memory = "unknown" if facts.memory is None else f"{gib(facts.memory)}, of which {gib(facts.free_memory)} are free"
    machine = {
        "where": f"{where} ({platform.system()} {platform.machine()})",
        "processor": f"{cores(facts.cores)}{of_all}",
        "memory": memory,
        "disk": f"{gib(facts.free_disk)} free where downloads are kept",
    }
    versions = [f"Python {facts.versions['Python']}"]
    versions += [f"{name} {facts.versions[package] or 'missing'}" for package, name in SHOWN.items()]
    sections = {"This machine": machine, "Software": {"": ", ".join(versions)}}
    if facts.class_speed is not None:
        machine["processor"] += f"; GPU: {facts.gpu}" if facts.gpu else "; no GPU, and none is needed"
        machine["speed"] = f"{facts.class_speed:,.0f} images/s (training of `mini`, measured for a second)"
        if facts.bfloat16_gain is not None:
            gain = f"{facts.bfloat16_gain:.1f} times as fast as float32"
            advice = "for long trainings: --precision bfloat16" if facts.bfloat16_gain > 1.2 else "stay with float32"
            machine["bfloat16"] = f"{gain} (training of `small`); {advice}"
    if facts.weights is not None:
        downloads = ", ".join(facts.downloads) or "none, and none is needed"
        sections["Data"] = {
            "images": f"shapes100, shapes10; downloaded to {in_words(cache_dir())}: {downloads}",
            "weights": ", ".join(facts.weights),
        }
    sections["What that means"] = outlook(facts)
    lines = []
    for title, rows in sections.items():
        width = max(map(len, rows))
        lines += [title, *(f"  {f'{name:<{width}}  ' if name else ''}{text}" for name, text in rows.items()), ""]
    lines += [f"{'Problem' if essential else 'Note'}: {sentence}" for essential, sentence in problems(facts)]
    return "\n".join([*lines, "The course can run here."] if can_run(facts) else lines)


def outlook(facts: Facts) -> dict[str, str]:
    """What each chapter, and the published training, will take."""
    if not can_run(facts):
        return {"00 to 06": "cannot run yet, see below"}
    from vitlib.data.shapes import DEFAULT_COUNTS

    upstream, downstream = (DEFAULT_COUNTS[name] for name in ("shapes100", "shapes10"))
    epochs, seeds = CLASS_LENGTH["finetune_epochs"], CLASS_LENGTH["seeds"]
    pretraining = images_in(upstream, CLASS_LENGTH["pretrain_epochs"]) + FORWARD * upstream["test"]
    # one fine-tuning, then in every seed two arms that train all of the model and two that only use the encoder
    transfer = (1 + 2 * seeds) * images_in(downstream, epochs) + 2 * seeds * images_in(downstream, epochs, FORWARD)
    published = images_in(CIFAR_COUNTS, PUBLISHED_LENGTH["pretrain_epochs"])
    return {
        "00 orientation": UNTRAINED,
        "01 patching": UNTRAINED,
        "02 attention": UNTRAINED,
        "03 pretraining": f"{duration(START + SUSTAINED * pretraining / facts.class_speed)} (an estimate)",
        "04 fine-tuning": f"{duration(START + SUSTAINED * transfer / facts.class_speed)} (an estimate)",
        "05 looking inside": "nothing is trained: about a minute",
        "06 the real ViT": "one short fine-tuning: about a minute",
        "as published": f"{duration(published / facts.published_speed)} for 100 epochs (a guess; 03 has a record)",
    }


def images_in(counts: Mapping[str, int], epochs: int, price: float = 1.0) -> float:
    """What a training, its validation after every epoch and its test cost, in trained images."""
    return epochs * counts["train"] * ((1 - VALIDATION) * price + VALIDATION * FORWARD) + FORWARD * counts["test"]


def duration(seconds: float) -> str:
    """Rounded to what an estimate can promise.

    >>> duration(130)
    'about 2 minutes'
    """
    if seconds < 50:
        return "less than a minute"
    units = (("minute", 60, 90), ("hour", 3600, 48), ("day", 86400, math.inf))
    name, length = next((name, length) for name, length, most in units if seconds < most * length)
    count = max(1, round(seconds / length))
    return f"about {count:,} {name}{'s' if count > 1 else ''}"


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def cores(count: int) -> str:
    return f"{count} core{'s' if count > 1 else ''}"


def in_words(folder: Path) -> str:
    """A folder without the name of its owner."""
    home = Path.home()
    return f"~/{folder.relative_to(home).as_posix()}" if folder.is_relative_to(home) else "the folder in VITLIB_DATA"
