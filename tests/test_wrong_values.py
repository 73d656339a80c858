"""No wrong value gives a traceback: every public entry answers it with one sentence, and leaves no file behind.

For each entry there is a table of what its arguments may be. Everything else is wrong: values of every type out of
``JUNK``, and what hypothesis draws beside them.
"""

import math
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import vitlib
from vitlib.__main__ import main
from vitlib.costs import costs, preset_config
from vitlib.course import commands, runner, sweep
from vitlib.course.grid import Grid, make_plan, read_grid
from vitlib.course.parameters import PARAMETERS, check_parameters
from vitlib.course.sweep import run_sweep
from vitlib.data.augment import Augmentation, normalise
from vitlib.data.images import LabelledImages
from vitlib.export import export_model
from vitlib.model import PRESETS, ViTModel, create_model, interpolate_positions, patchify, unpatchify
from vitlib.training.recipes import FINETUNING, RECIPES, Recipe, named_recipe
from vitlib.training.resume import ResumeFile
from vitlib.training.stages import evaluate, finetune, fit, pretrain, record_test, resolve_device, resolve_precision
from vitlib.weights import checkpoint as checkpoints
from vitlib.weights import convert, data, explain, predict, shapes, train
from vitlib.weights.checkpoint import ModelCard, load_weights

LIBRARY = str(Path(vitlib.__file__).parent)
WAYS_OUT = {"give", "choose", "must", "check", "takes", "leave", "name a"}
LEAST = 300  # wrong values, promised by the project; the last test counts them

# --- what is wrong everywhere, unless a table allows it --------------------------------------------------------------

JUNK = (
    None, True, False, 0, -1, 2**20 + 1, 2**63, 10**400, -0.5, 1.5, 2.0, math.nan, math.inf, -math.inf, "", " ", "3",
    "none of these", "no\nlines", "nul\0byte", b"3", (), (1, "x"), [None], {}, {"a": 1}, {1}, 1j, object(), int, len,
    range(0), torch.zeros(0), torch.zeros(2, 2), torch.ones(1, dtype=torch.bool),
)  # fmt: skip
DRAWN = st.one_of(
    st.integers(), st.integers(-9, 9), st.floats(), st.text(max_size=9), st.binary(max_size=3),
    st.lists(st.integers(), max_size=3), st.tuples(st.floats(), st.floats()), st.dictionaries(st.text(), st.none()),
)  # fmt: skip
TRIED: set[tuple[str, str, str]] = set()  # entry, argument and value

Allowed = Callable[[object], bool]


def whole(least: int = 1, most: float = math.inf) -> Allowed:
    return lambda value: type(value) is int and least <= value <= most


def number(least: float = -math.inf, most: float = math.inf, *, above: bool = False, below: bool = False) -> Allowed:
    def fits(value) -> bool:
        if type(value) not in (int, float) or abs(value) > 1e300 or math.isnan(value):
            return False
        return (value > least or (value == least and not above)) and (value < most or (value == most and not below))

    return fits


def one_of(*choices) -> Allowed:
    return lambda value: isinstance(value, str | type(None)) and value in choices


def instance(*kinds: type) -> Allowed:
    return lambda value: isinstance(value, kinds)


def or_none(allowed: Allowed) -> Allowed:
    return lambda value: value is None or allowed(value)


def tensor(dimensions: int) -> Allowed:
    return lambda value: isinstance(value, Tensor) and value.ndim == dimensions


def path(value) -> bool:
    return isinstance(value, str | Path) and bool(str(value).strip()) and "\0" not in str(value)


def nothing(value) -> bool:
    return False


flag = instance(bool)
probability = number(0, 1, below=True)
share = number(0, 1)
seed = whole(0, 2**32 - 1)
size = whole(1, 2**20)


@dataclass(frozen=True)
class Entry:
    """A public function: called with ``good`` it works, and each of ``arguments`` is allowed to be only so."""

    name: str
    call: Callable
    good: dict
    arguments: dict[str, Allowed]


# --- the good values -------------------------------------------------------------------------------------------------

SIZES = {
    "num_classes": 3, "num_layers": 1, "image_size": 8, "patch_size": 4, "num_channels": 3, "em_dim": 8, "drop": 0.0,
    "num_heads": 2, "ff_dim": 8,
}  # fmt: skip
QUIET = {"progress": False, "device": "cpu"}
PLAIN = Recipe("adamw", 1e-3, 0.0, augmentation=Augmentation(padding=1, cutout=0))


def tiny(**changes) -> ViTModel:
    return ViTModel(**{**SIZES, **changes}).eval()


def pictures(count: int = 12, classes: int = 3, side: int = 8, channels: int = 3) -> LabelledImages:
    images = torch.randint(256, (count, channels, side, side), dtype=torch.uint8)
    return LabelledImages(images, torch.arange(count) % classes, tuple(f"class {n}" for n in range(classes)))


def card_of(classes: int = 3, channels: int = 3) -> ModelCard:
    return ModelCard(tuple(f"class {n}" for n in range(classes)), (0.5,) * channels, (0.25,) * channels)


def attention(images: int = 2) -> Tensor:
    return torch.rand(1, images, 2, 5, 5).softmax(-1)


# --- the table of entries --------------------------------------------------------------------------------------------

MODEL = {
    "num_classes": whole(0, 2**20), "num_layers": size, "image_size": lambda v: size(v) and v % 4 == 0,
    "patch_size": lambda v: size(v) and 8 % v == 0, "num_channels": size, "em_dim": lambda v: size(v) and v % 2 == 0,
    "drop": probability, "num_heads": lambda v: size(v) and 8 % v == 0, "ff_dim": size, "norm_first": flag,
    "patch_bias": flag, "drop_path": probability, "pooling": one_of("cls", "mean"),
    "norm_eps": or_none(number(0, 1, above=True, below=True)), "pre_logits": or_none(size),
}  # fmt: skip
TRAINING = {
    "batch_size": whole(), "train_steps_per_epoch": or_none(whole()), "eval_steps_per_epoch": or_none(whole()),
    "seed": seed, "precision": one_of("auto", "float32", "bfloat16"), "compile": flag, "progress": flag,
}  # fmt: skip
STAGE = TRAINING | {
    "train": instance(LabelledImages), "recipe": lambda v: isinstance(v, Recipe) or one_of(*RECIPES)(v),
    "validation_fraction": number(0, 1, above=True, below=True), "device": one_of("auto", "cpu"),
    "run_dir": or_none(path), "resume": flag, "source": or_none(instance(str)),
}  # fmt: skip
RECIPE = {
    "optimizer": one_of("sgd", "adamw", "muon"), "learning_rate": number(0), "weight_decay": number(0),
    "schedule": one_of("constant", "cosine"), "warmup": share, "momentum": probability,
    "clip": or_none(number(0, above=True)), "label_smoothing": probability, "drop": probability,
    "drop_path": probability, "head_rate": number(0), "position_rate": number(0), "matrix_rate": number(0),
    "layer_decay": number(0, 1, above=True), "average": probability, "augmentation": instance(Augmentation),
    "mix_until": share, "statistics": or_none(nothing),
}  # fmt: skip
AUGMENTATION = {
    "padding": whole(0), "flip": share, "hole": whole(0), "randaugment": whole(0), "magnitude": whole(0, 30),
    "erase": share, "mixing": share, "mixup": number(0), "cutmix": number(0),
}  # fmt: skip


def library_entries(folder: Path) -> Iterator[Entry]:
    """Every public function of the library; whatever it might write goes to ``folder``."""
    model, twelve, card = tiny(), pictures(), card_of()
    checkpoint = folder / "model.safetensors"

    # the model
    yield Entry("ViTModel", ViTModel, SIZES, MODEL)
    overrides = {name: value for name, value in SIZES.items() if name != "num_classes"}
    known = MODEL | {"preset": one_of(*PRESETS)}
    yield Entry("create_model", create_model, {"preset": "mini", "num_classes": 3, **overrides}, known)
    yield Entry("preset_config", preset_config, {"preset": "mini", "num_classes": 3, **overrides}, known)
    yield Entry("ViTModel.forward", model, {"images": torch.rand(2, 3, 8, 8)}, {"images": nothing})
    yield Entry(
        "patchify", patchify, {"images": torch.rand(2, 3, 8, 8), "patch_size": 4},
        {"images": tensor(4), "patch_size": lambda v: whole()(v) and 8 % v == 0},
    )  # fmt: skip
    yield Entry(
        "unpatchify", unpatchify, {"patches": torch.rand(2, 4, 48), "patch_size": 4, "num_channels": 3},
        {"patches": tensor(3), "patch_size": whole(), "num_channels": whole()},
    )  # fmt: skip
    yield Entry(
        "interpolate_positions", interpolate_positions, {"position_embedding": torch.rand(1, 5, 8), "grid": 3},
        {"position_embedding": tensor(3), "grid": whole(0), "old_grid": or_none(whole(0))},
    )  # fmt: skip

    # what it costs
    yield Entry("costs", costs, {"config": SIZES}, {"config": instance(dict), "batch_size": whole()})
    yield Entry("costs of a config", lambda **config: costs({**SIZES, **config}), {}, MODEL)

    # images
    yield Entry(
        "load_images", data.load_images, {"source": "shapes10", "split": "test", "data_dir": folder, "progress": False},
        {
            "source": one_of("shapes10"), "split": one_of("train", "test"), "data_dir": or_none(path),
            "image_size": or_none(whole()), "num_channels": lambda v: type(v) is int and v in (1, 3), "progress": flag,
        },
    )  # fmt: skip
    yield Entry("check_source", data.check_source, {"source": "shapes10"}, {"source": nothing})
    yield Entry("download", data.download, {"name": "shapes10", "data_dir": folder}, {"name": nothing})
    yield Entry(
        "LabelledImages", LabelledImages,
        {"images": twelve.images, "labels": twelve.labels, "classes": twelve.classes},
        {"images": nothing, "labels": nothing, "classes": lambda v: v == ()},
    )  # fmt: skip
    yield Entry("channel_statistics", data.channel_statistics, {"images": twelve.images}, {"images": nothing})
    yield Entry(
        "train_validation_split", data.train_validation_split, {"data": twelve},
        {"data": instance(LabelledImages), "fraction": number(0, 1, above=True, below=True), "seed": seed},
    )  # fmt: skip
    yield Entry(
        "draw_shapes", shapes.draw_shapes, {"name": "shapes10", "count": 10},
        {"name": one_of("shapes10", "shapes100"), "split": one_of("train", "test"), "count": or_none(whole(0)),
         "seed": seed},
    )  # fmt: skip

    # recipes
    yield Entry("Recipe", partial(replace, PLAIN), {}, RECIPE)
    yield Entry("named_recipe", partial(named_recipe, known=RECIPES), {"recipe": "modern"}, {"recipe": nothing})
    yield Entry("Augmentation", Augmentation, {}, AUGMENTATION)
    yield Entry(
        "normalise", normalise, {"images": twelve.images, "mean": card.mean, "std": card.std},
        {"images": nothing, "mean": nothing, "std": nothing},
    )  # fmt: skip

    # training
    yield Entry("resolve_device", resolve_device, {"device": "cpu"}, {"device": one_of("auto", "cpu")})
    cpu = torch.device("cpu")
    yield Entry(
        "resolve_precision", partial(resolve_precision, device=cpu), {"precision": "auto"},
        {"precision": TRAINING["precision"]},
    )  # fmt: skip
    yield Entry(
        "predict", train.predict, {"model": model, "images": twelve.images, "card": card},
        {"model": nothing, "images": nothing, "card": nothing, "batch_size": whole()},
    )  # fmt: skip
    scored = {"model": nothing, "data": nothing, "card": nothing, "batch_size": whole(), "steps": or_none(whole())}
    yield Entry("evaluate", evaluate, {"model": model, "data": twelve, "card": card}, scored)
    yield Entry(
        "fit", fit,
        {"model": tiny(), "train": twelve, "validation": twelve, "card": card, "recipe": PLAIN, "epochs": 1,
         "progress": False},
        TRAINING | {
            "model": nothing, "train": nothing, "validation": nothing, "card": nothing, "recipe": instance(Recipe),
            "epochs": whole(), "description": instance(str), "after_epoch": callable,
            "resume": or_none(instance(ResumeFile)),
        },
    )  # fmt: skip
    stage = {"train": twelve, "run_dir": folder, "recipe": PLAIN, **QUIET}
    yield Entry(
        "pretrain", pretrain, {**stage, "preset": "mini", "pretrain_epochs": 1},
        STAGE | {"preset": one_of(*PRESETS), "pooling": one_of("cls", "mean"), "norm_first": flag,
                 "pretrain_epochs": whole()},
    )  # fmt: skip
    yield Entry(
        "finetune", finetune, {**stage, "pretrained": model, "card": card, "finetune_epochs": 1},
        STAGE | {"pretrained": nothing, "card": nothing, "freeze_encoder": flag, "finetune_epochs": whole(),
                 "description": instance(str)},
    )  # fmt: skip
    trained = train.Trained(model, card, train.History())
    yield Entry(
        "record_test", record_test, {"trained": trained, "test": twelve, "source": "x", "checkpoint": checkpoint},
        {"trained": nothing, "test": nothing, "source": instance(str), "checkpoint": or_none(path)},
    )  # fmt: skip

    # weights
    yield Entry(
        "ModelCard", ModelCard, {"classes": ("a",), "mean": (0.5,), "std": (0.5,)},
        {"classes": lambda v: v in ((), []), "mean": nothing, "std": nothing, "preset": or_none(instance(str)),
         "record": instance(dict)},
    )  # fmt: skip
    yield Entry("load_pretrained", checkpoints.load_pretrained, {"name": "shapes100-mini"}, {"name": nothing})
    yield Entry("load_checkpoint", checkpoints.load_checkpoint, {"path": checkpoint}, {"path": nothing})
    yield Entry(
        "load_weights", load_weights, {"weights": "shapes100-mini"},
        {"weights": nothing, "image_size": or_none(lambda v: size(v) and v % 4 == 0)},
    )  # fmt: skip
    yield Entry(
        "save_checkpoint", checkpoints.save_checkpoint, {"path": checkpoint, "model": model, "card": card},
        {"path": path, "model": nothing, "card": nothing, "dtype": nothing},
    )  # fmt: skip
    yield Entry(
        "transfer_encoder", checkpoints.transfer_encoder, {"pretrained": model, "num_classes": 2},
        {"pretrained": nothing, "num_classes": size, "image_size": MODEL["image_size"], "drop": probability,
         "drop_path": probability},
    )  # fmt: skip
    yield Entry(
        "with_image_size",
        checkpoints.with_image_size,
        {"model": model, "image_size": 8},
        {"model": nothing, "image_size": MODEL["image_size"]},
    )
    yield Entry(
        "ResumeFile", ResumeFile, {"path": folder / "resume.pt", "settings": {}},
        {"path": path, "settings": instance(dict), "minutes": number(0)},
    )  # fmt: skip

    # what a model says
    logits, labels = torch.rand(4, 3), torch.tensor([0, 1, 2, 0])
    yield Entry(
        "predict_files", predict.predict_files, {"model": model, "card": card, "paths": []},
        {"model": nothing, "card": nothing, "paths": instance(list, tuple, dict, set, range, Tensor), "top": whole(),
         "batch_size": whole()},
    )  # fmt: skip
    yield Entry(
        "confident_mistakes", predict.confident_mistakes, {"logits": logits, "labels": labels},
        {"logits": tensor(2), "labels": nothing, "count": whole()},
    )  # fmt: skip
    yield Entry(
        "export_model", export_model, {"model": model, "card": card, "path": folder / "model.pt2"},
        {"model": nothing, "card": nothing, "path": nothing},
    )  # fmt: skip

    # conversions
    layouts = {"layout": one_of(*convert.LAYOUTS)}
    yield Entry(
        "names", convert.names, {"layout": "timm"},
        layouts | {"num_layers": whole(), "head": flag, "pre_logits": flag},
    )  # fmt: skip
    state = convert.to_state_dict(model, "timm")
    yield Entry(
        "from_state_dict", convert.from_state_dict, {"state": state, "layout": "timm", "num_heads": 2},
        layouts | {
            "state": instance(dict), "num_heads": lambda v: whole()(v) and 8 % v == 0, "norm_eps": MODEL["norm_eps"],
            "pooling": MODEL["pooling"],
        },
    )  # fmt: skip
    yield Entry(
        "to_state_dict", convert.to_state_dict, {"model": model, "layout": "timm"}, layouts | {"model": nothing}
    )
    yield Entry("from_npz", convert.from_npz, {"path": folder / "vit.npz"}, {"path": nothing})
    yield Entry(
        "to_npz", convert.to_npz, {"model": model, "path": folder / "vit.npz"}, {"model": nothing, "path": path}
    )
    yield Entry("to_torchvision", convert.to_torchvision, {"model": model}, {"model": nothing})
    yield Entry("from_torchvision", convert.from_torchvision, {"module": nn.Identity()}, {"module": nothing})

    # looking inside
    images, relevance = torch.rand(2, 3, 8, 8), torch.rand(2, 4)
    yield Entry(
        "position_similarity", explain.position_similarity, {"position_embedding": torch.rand(1, 5, 8)},
        {"position_embedding": nothing},
    )  # fmt: skip
    yield Entry(
        "query_attention", explain.query_attention, {"weights": torch.rand(5, 5), "query": 0},
        {"weights": tensor(2), "query": whole(0, 4)},
    )  # fmt: skip
    yield Entry(
        "with_temperature", explain.with_temperature, {"weights": torch.rand(5, 5), "temperature": 1},
        {"weights": instance(Tensor), "temperature": number(0, above=True)},
    )  # fmt: skip
    yield Entry(
        "attention_of", explain.attention_of, {"model": model, "images": images},
        {"model": nothing, "images": nothing, "batch": whole()},
    )  # fmt: skip
    yield Entry(
        "attention_distance", explain.attention_distance, {"attention": attention(), "patch_size": 4},
        {"attention": nothing, "patch_size": whole()},
    )  # fmt: skip
    yield Entry("patch_distances", explain.patch_distances, {"grid": 2}, {"grid": whole()})
    yield Entry("rollout", explain.rollout, {"attention": attention()}, {"attention": nothing})
    yield Entry(
        "delete_patches", explain.delete_patches, {"images": images, "relevance": relevance, "count": 1},
        {"images": nothing, "relevance": nothing, "count": whole(0, 4)},
    )  # fmt: skip
    yield Entry(
        "deletion_curve", explain.deletion_curve,
        {"model": model, "images": images, "relevance": relevance, "counts": [0, 1]},
        {"model": nothing, "images": nothing, "relevance": nothing, "counts": nothing, "batch": whole()},
    )  # fmt: skip
    yield Entry(
        "share_on_mask", explain.share_on_mask,
        {"relevance": relevance, "masks": torch.ones(2, 8, 8, dtype=torch.bool)},
        {"relevance": nothing, "masks": nothing},
    )  # fmt: skip
    yield Entry(
        "patch_relevance", explain.patch_relevance, {"matrix": torch.rand(2, 5, 5)},
        {"matrix": nothing, "pooling": MODEL["pooling"]},
    )  # fmt: skip


# --- the property ----------------------------------------------------------------------------------------------------


def complaint(entry: Entry, argument: str, value: object) -> str | None:
    """What is wrong with how an entry answers a wrong value; None if nothing is."""
    text = repr(value)
    TRIED.add((entry.name, argument, text))
    asked = f"{entry.name} with {argument}={type(value).__name__} {text[:80]}"
    try:
        entry.call(**{**entry.good, argument: value})
    except (ValueError, OSError) as error:
        message, where = str(error), traceback.extract_tb(error.__traceback__)[-1].filename
        faults = {
            f"it is raised in {where}": not where.startswith(LIBRARY),
            "it is no one line": "\n" in message,
            "it ends without a full stop": not message.endswith("."),
            "it does not name the argument": not _names(message, argument),
            "it does not show the value": not _shows(message, value),
            "it does not say what is allowed": not WAYS_OUT & {*_words(message)},
        }
        found = [fault for fault, is_so in faults.items() if is_so]
        return f"{asked}: {', '.join(found)}: {type(error).__name__}: {message}" if found else None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{asked} is a bare {type(error).__name__} from {where.filename}:{where.lineno}: {error}"
    return f"{asked} is accepted"


def _words(message: str) -> list[str]:
    """All words of a message, and all pairs of them."""
    words = re.findall(r"\w+", message.lower())
    return words + [" ".join(pair) for pair in zip(words, words[1:], strict=False)]


def _names(message: str, argument: str) -> bool:
    """Whether a message has the argument's name, as it is written in code or in words."""
    return any(word.startswith((argument, argument.replace("_", " "))) for word in _words(message))


def _shows(message: str, value: object) -> bool:
    if isinstance(value, Tensor) and str(list(value.shape)) in message:
        return True
    start = " ".join(repr(value).split())[:20].strip("'")
    return start in message or str(value) in message or repr(str(value)) in message


def wrong_values(allowed: Allowed) -> list:
    return [value for value in JUNK if not allowed(value)]


@cache
def _entries() -> dict[str, Entry]:
    return {entry.name: entry for entry in library_entries(FOLDER)}


FOLDER = Path("runs-of-wrong-values")  # relative: each test has an empty current folder of its own
NAMES = list(_entries())


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refuse_drawn(entry: Entry, argument: str, allowed: Allowed) -> None:
    @settings(
        max_examples=10, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )  # fmt: skip
    @given(DRAWN.filter(lambda value: not allowed(value)))
    def refused(value):
        assert (fault := complaint(entry, argument, value)) is None, fault

    refused()


def refuse_all(entry: Entry, arguments: dict[str, Allowed]) -> None:
    """Try every wrong value of ``JUNK`` and some that hypothesis draws; then no file may be there."""
    faults = [
        fault
        for argument, allowed in arguments.items()
        for value in wrong_values(allowed)
        if (fault := complaint(entry, argument, value))
    ]
    assert not faults, f"{len(faults)} wrong values:\n" + "\n".join(faults)
    for argument, allowed in arguments.items():
        refuse_drawn(entry, argument, allowed)
    assert not list(Path().iterdir())


def sweep_entries() -> Iterator[Entry]:
    """The functions behind ``python -m vitlib sweep``; no worker may start."""
    notebook = runner.COURSE_FOLDER / "sweeps" / "patches.ipynb"
    by_name = lambda value: isinstance(value, dict) and "a" not in value  # noqa: E731
    groups = lambda value: isinstance(value, list | tuple) and not value  # noqa: E731
    yield Entry(
        "Grid", Grid, {"notebook": notebook},
        {"notebook": path, "grid": by_name, "zips": groups, "parameters": instance(dict)},
    )  # fmt: skip
    yield Entry(
        "make_plan", make_plan, {"grid": Grid(notebook)}, {"grid": nothing, "given": or_none(instance(dict))}
    )  # fmt: skip
    yield Entry("read_grid", read_grid, {}, {"path": path})
    yield Entry(
        "run_sweep", run_sweep, {"plan": make_plan(Grid(notebook)), "out": FOLDER},
        {
            "plan": nothing, "out": path, "scheduler": or_none(instance(str)), "workers": or_none(whole()),
            "threads": or_none(whole()), "retries": whole(0), "timeout": or_none(number(0, above=True)),
        },
    )  # fmt: skip


def test_the_functions_of_sweeps_answer_a_wrong_value_with_one_sentence_and_write_nothing(monkeypatch):
    monkeypatch.setattr(sweep, "_engine", never)
    for entry in sweep_entries():
        refuse_all(entry, entry.arguments)


@pytest.mark.parametrize("name", NAMES)
def test_every_function_answers_a_wrong_value_with_one_sentence_and_writes_nothing(name):
    entry = _entries()[name]
    refuse_all(entry, entry.arguments)


# --- the parameters of the notebooks ---------------------------------------------------------------------------------


def allowed_parameter(name: str) -> Allowed:
    """What a notebook's parameter may be, read from its row of the table."""
    parameter = PARAMETERS[name]
    least, most = parameter.minimum, parameter.maximum
    if name in ("dataset", "upstream", "downstream"):
        kind = one_of("shapes10", "shapes100", "cifair10", "cifair100", "cifar10", "cifar100")
    elif name == "device":
        kind = one_of("auto", "cpu")
    elif parameter.choices:
        kind = one_of(*parameter.choices)
    elif parameter.type is str:
        kind = lambda value: isinstance(value, str) and path(value)  # noqa: E731
    else:
        limits = (-math.inf if least is None else least, math.inf if most is None else most)
        kind = {bool: flag, int: whole(*limits), float: number(*limits)}[parameter.type]
    return or_none(kind) if parameter.optional else kind


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_of_the_notebooks_refuses_a_wrong_value_with_one_sentence(name):
    entry = Entry("parameter", lambda **values: check_parameters(values), {}, {})
    refuse_all(entry, {name: allowed_parameter(name)})


@cache
def lessons() -> list:
    return runner.read_lessons(runner.COURSE_FOLDER)


def test_a_run_checks_the_values_of_all_notebooks_before_any_kernel_starts():
    def run(**values):
        runner.checked_values(lessons(), lessons(), values, {})

    taken = {name for lesson in lessons() for name in lesson.parameters} - {"run_dir"}
    refuse_all(Entry("run", run, {}, {}), {name: allowed_parameter(name) for name in sorted(taken)})


# --- the command line ------------------------------------------------------------------------------------------------

TEXTS = (
    "", " ", "0", "-1", "1", "1.5", "1e3", "0x10", "many", "nan", "-inf", "None", "maybe", "True", "no such thing",
    "99999999999999999999999", "[1]", "{}",
)  # fmt: skip


def wrong_texts(name: str) -> list[str]:
    """Texts that are not allowed for a parameter on the command line, where a text stands for the value it spells."""
    parameter, allowed = PARAMETERS[name], allowed_parameter(name)

    def meant(text: str) -> object:
        if parameter.optional and text == "None":
            return None
        if parameter.type is bool:
            return {"True": True}.get(text, text)
        try:
            return parameter.type(text)
        except ValueError:
            return text

    return [text for text in TEXTS if not allowed(meant(text))]


def refusal(command: list[str], named: str, value: str) -> str | None:
    """What is wrong with how the command line answers a wrong value; None if nothing is."""
    TRIED.add((command[0], named, value))
    result = CliRunner().invoke(main, command)
    lines = result.stderr.strip().splitlines()
    problem = lines[-1] if lines else ""
    faults = {
        f"the exit code is {result.exit_code} ({result.exception!r})": result.exit_code != 2,
        "it prints more than a sentence": len(lines) != 1 and not lines[0].startswith("Usage:"),
        "it says no error": not problem.startswith("Error: ") or not problem.endswith("."),
        "it does not name the option": not _names(problem.replace(named.replace("_", "-"), named), named),
        "it does not show the value": not any(_shows(problem, form) for form in (value, *_as_numbers(value))),
        "it prints a traceback": "Traceback" in result.output,
    }  # fmt: skip
    found = [fault for fault, is_so in faults.items() if is_so]
    return f"{command}: {', '.join(found)}: {result.stderr}" if found else None


def _as_numbers(text: str) -> list:
    try:
        return [float(text)]
    except ValueError:
        return []


def refuse_commands(commands_: list[tuple[list[str], str, str]]) -> None:
    faults = [fault for command in commands_ if (fault := refusal(*command))]
    assert not faults, f"{len(faults)} of {len(commands_)} commands:\n" + "\n".join(faults)
    assert not list(Path().iterdir())


def never(*arguments, **options):
    raise AssertionError("a wrong value was taken for a right one")


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_the_training_commands_refuse_wrong_options_and_write_nothing(name, monkeypatch):
    monkeypatch.setattr(commands, "_splits", never)
    options = [option.name for option in main.get_command(None, name).params]
    assert len(options) > 10
    refuse_commands(
        [
            ([name, f"--{option.replace('_', '-')}={text}"], option, text)
            for option in options
            for text in wrong_texts(option)
        ]
        + ([([name, f"--weights={text}"], "weights", text) for text in ("nowhere",)] if name == "finetune" else [])
    )


def test_the_runs_refuse_wrong_parameters_and_options_and_write_nothing(monkeypatch):
    monkeypatch.setattr(runner, "read_lessons", lambda folder: lessons())
    monkeypatch.setattr(runner, "run_notebook", never)
    taken = {name for lesson in lessons() for name in lesson.parameters} - {"run_dir"}
    refuse_commands(
        [(["run", "-p", name, text], name, text) for name in sorted(taken) for text in wrong_texts(name)]
        + [(["run", f"--timeout={text}"], "timeout", text) for text in ("-1", "soon")]
        + [(["run", f"--only={text}"], "notebook", text) for text in ("99", "none")]
        + [(["run", "--parameters=absent.yaml"], "parameters", "absent.yaml")]
    )


def test_the_other_commands_refuse_wrong_options_and_write_nothing(tmp_path_factory):
    students = tmp_path_factory.mktemp("students")
    picture, notebook = students / "grey.png", runner.COURSE_FOLDER / "sweeps" / "patches.ipynb"
    Image.new("L", (8, 8)).save(picture)
    refuse_commands(
        [(["download", "--", text], "name", text) for text in TEXTS if text.strip()]
        + [(["predict", "shapes100-mini", str(picture), f"--top={t}"], "top", t) for t in ("0", "-1", "1.5", "many")]
        + [
            (["predict", "shapes100-mini", str(picture), f"--batch-size={t}"], "batch_size", t)
            for t in ("0", "-1", "1.5", "many")
        ]
        + [(["predict", text, str(picture)], "weights", text) for text in ("no such thing", "0")]
        + [(["export", "shapes100-mini", text], "path", text) for text in ("model.bin", "no such thing", "0")]
        + [(["export", text, "model.pt2"], "weights", text) for text in ("no such thing", "0")]
        + [(["grade", str(students), f"--timeout={t}"], "timeout", t) for t in ("0", "-1", "soon")]
        + [
            (["sweep", str(notebook), f"--{option}={t}"], option.replace("-", "_"), t)
            for option in ("workers", "threads-per-run", "retries", "timeout")
            for t in ("-1", "1.5x", "many")
        ]
        + [(["sweep", str(notebook), "--grid", f"seed={t}"], "seed", t) for t in wrong_texts("seed") if t.strip()]
        + [(["sweep", str(notebook), "-p", "seed", t], "seed", t) for t in wrong_texts("seed")]
        + [(["grade", str(students), f"--jobs={t}"], "jobs", t) for t in ("0", "-1", "1.5", "many")]
        + [(["grade", str(students), "-p", "seed", text], "seed", text) for text in wrong_texts("seed")]
    )


@pytest.mark.parametrize(
    "command", ["doctor", "download", "export", "finetune", "grade", "predict", "pretrain", "run", "sweep"]
)
def test_an_unknown_option_is_no_traceback(command):
    result = CliRunner().invoke(main, [command, "--no-such-option"])
    assert result.exit_code == 2 and "Error: No such option" in result.output and "Traceback" not in result.output
    assert not list(Path().iterdir())


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_sweeps_refuse_wrong_values_before_any_kernel_starts_and_write_nothing(monkeypatch):
    from vitlib.course import grid, sweep

    lesson = next(lesson for lesson in lessons() if lesson.name.startswith("04"))
    monkeypatch.setattr(grid, "read_lesson", lambda file: lesson)
    monkeypatch.setattr(sweep, "run_sweep", never)
    notebook, taken = str(lesson.path), sorted(lesson.parameters.keys() - {"run_dir"})
    refuse_commands(
        [
            (["sweep", notebook, how, f"{name}={text}"], name, text)
            for name in taken
            for how, text in zip(["--grid", "--zip"] * len(TEXTS), wrong_texts(name), strict=False)
            if text.strip()
        ]
        + [(["sweep", notebook, "-p", name, "{}"], name, "{}") for name in taken if "{}" in wrong_texts(name)]
        + [(["sweep", notebook, f"--workers={t}"], "workers", t) for t in ("0", "-1", "1.5", "many")]
        + [(["sweep", notebook, f"--threads-per-run={t}"], "threads_per_run", t) for t in ("0", "-1", "many")]
        + [(["sweep", notebook, f"--retries={t}"], "retries", t) for t in ("-1", "101", "many")]
        + [(["sweep", notebook, f"--timeout={t}"], "timeout", t) for t in ("-1", "soon")]
    )


# --- finished work stays as it was -----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_wrong_value_leaves_a_finished_run_folder_as_it_was(smaller, name, resume):
    entry = _entries()[name]
    run = partial(entry.call, **{**entry.good, "run_dir": "finished"})
    run(resume=True)
    before = contents(Path("finished"))
    assert len(before) >= 4
    for argument, allowed in entry.arguments.items():
        for value in wrong_values(allowed)[:4]:
            with pytest.raises(ValueError):
                run(**{"resume": resume, argument: value})
    odd = pictures(side=10)
    for changes in (
        {"train": odd},
        {"train": odd.subset([])},
        {"recipe": replace(PLAIN, augmentation=Augmentation(cutout=9))},
    ):
        with pytest.raises(ValueError):
            run(**{"resume": resume, **changes})
    assert contents(Path("finished")) == before


def test_a_run_folder_that_cannot_be_one_is_refused_before_the_training(monkeypatch):
    Path("taken").write_text("a file")
    monkeypatch.setattr(train, "fit", never)
    entry = _entries()["pretrain"]
    for run_dir in ("taken", "taken/deeper"):
        with pytest.raises(NotADirectoryError, match=rf"^run_dir='{run_dir}' .* is a file; name another one\.$"):
            entry.call(**{**entry.good, "run_dir": run_dir})
    monkeypatch.setattr("os.access", lambda *arguments: False)
    with pytest.raises(PermissionError, match=r"^run_dir='new' cannot be written to; choose another folder\.$"):
        entry.call(**{**entry.good, "run_dir": "new"})
    assert Path("taken").read_text() == "a file" and [file.name for file in Path().iterdir()] == ["taken"]


# --- what does not go together ---------------------------------------------------------------------------------------


def few_classes() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": tiny(num_classes=2)}, r"gives \[1, 2\] logits .* need 3 classes; give a model"),
        ({"model": few_classes()}, r"gives \[1, 2\] logits .* need 3 classes; give a model"),
        ({"model": nn.Conv2d(3, 4, 3)}, r"gives \[1, 4, 6, 6\] logits .* give a model with a classifier"),
        ({"model": nn.Identity()}, r"^model=Identity\(\) is not allowed; give one with parameters"),
        ({"model": tiny().requires_grad_(False)}, r"^model=ViTModel\(.* is not allowed; give one with parameters"),
        ({"model": tiny(image_size=16)}, r"takes images of shape \[B, 3, 16, 16\], not \[1, 3, 8, 8\]; resize"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(7, 3))}, r"^model=Sequential\(.* cannot take LabelledImages"),
        ({"card": card_of(channels=1)}, r"^mean=\(0.5,\) and std=\(0.25,\) do not go with images of 3 channels; give"),
        ({"train": pictures(channels=1)}, r"do not go with images of 1 channels; give one"),
        ({"validation": pictures(classes=5)}, r"need 5 classes; give a model with a classifier of as many"),
        ({"validation": pictures(0)}, r"12 training and 0 validation images are too few; give one of each"),
        ({"recipe": replace(PLAIN, augmentation=Augmentation(cutout=9))}, r"^cutout=9 is larger .* at most 8"),
        ({"recipe": replace(PLAIN, augmentation=Augmentation(padding=8, cutout=0))}, r"^padding=8 .* less than 8"),
    ],
    ids=lambda case: case[:30] if isinstance(case, str) else next(iter(case)),
)  # fmt: skip
def test_what_does_not_go_together_is_one_sentence_before_anything_is_written(changes, words):
    entry = _entries()["fit"]
    written = []
    with pytest.raises(ValueError, match=words) as error:
        fit(**{**entry.good, "after_epoch": lambda model, history: written.append(1), **changes})
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and not written
    assert traceback.extract_tb(error.value.__traceback__)[-1].filename.startswith(LIBRARY)


def test_weights_that_no_memory_holds_are_named_by_the_sizes_that_ask_for_them():
    with pytest.raises(ValueError, match=r"image_size=1048576, .* does not fit into memory; choose smaller sizes\.$"):
        tiny(image_size=2**20, patch_size=2**20)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.int64])
def test_images_that_nobody_normalised_are_one_sentence(dtype):
    with pytest.raises(
        ValueError, match=r"not of the dtype of the model's weights; normalise .* \.to\(torch.float32\)"
    ):
        tiny()(torch.zeros(2, 3, 8, 8, dtype=dtype))


def test_images_in_another_precision_are_taken_where_autocast_converts_them():
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny()(torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)).shape == (2, 3)
    assert tiny().bfloat16()(torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)).shape == (2, 3)


# --- edges that work -------------------------------------------------------------------------------------------------

MIXED = replace(PLAIN, augmentation=Augmentation(padding=1, cutout=0, randaugment=1, erase=0.5, mixing=1.0))


@pytest.fixture
def smaller(monkeypatch):
    """The preset mini, smaller still: it is the data that is looked at."""
    sizes = {"patch_size": 4, "num_layers": 1, "em_dim": 8, "num_heads": 2, "ff_dim": 8}
    monkeypatch.setitem(PRESETS, "mini", sizes)


def steps_of(data: LabelledImages, **changes) -> int:
    """The steps of a pretraining of two epochs, all of whose losses must be finite numbers."""
    options = {"pretrain_epochs": 2, "recipe": MIXED, "validation_fraction": 0.25, **QUIET, **changes}
    trained = pretrain(data, "mini", **options)
    assert all(math.isfinite(step["loss"]) for step in trained.history.steps)
    assert all(math.isfinite(value) for epoch in trained.history.epochs for value in epoch.values())
    return len(trained.history.steps)


@pytest.mark.parametrize(
    "batch_size, steps", [(1, 9), (8, 2), (9, 1), (10, 1), (10_000, 1)],
    ids=["one image", "one image left over", "all images", "one image too few", "far more than there are"],
)  # fmt: skip
def test_any_batch_size_works_with_nine_training_images(smaller, batch_size, steps):
    assert steps_of(pictures(12), batch_size=batch_size) == 2 * steps


def test_more_steps_than_batches_are_no_more_than_all(smaller):
    more = {"train_steps_per_epoch": 1000, "eval_steps_per_epoch": 1000}
    assert steps_of(pictures(12), batch_size=4, **more) == steps_of(pictures(12), batch_size=4) == 2 * 3


def test_one_step_of_one_epoch_is_a_training(smaller):
    assert steps_of(pictures(12), pretrain_epochs=1, train_steps_per_epoch=1, eval_steps_per_epoch=1) == 1


def test_a_class_of_one_image_one_class_alone_and_two_images_can_be_trained(smaller):
    lonely = LabelledImages(pictures(9).images, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2]), ("a", "b", "c"))
    assert steps_of(lonely) == 2
    assert steps_of(pictures(12, classes=1)) == 2
    assert steps_of(pictures(2, classes=1)) == 2


def test_one_image_of_each_class_cannot_be_split_and_says_so(smaller):
    with pytest.raises(ValueError, match=r"^LabelledImages\(3 images .*\) cannot be split; .* must have two images\.$"):
        steps_of(pictures(3))


def test_grey_images_go_all_the_way(smaller):
    grey = pictures(12, channels=1)
    upstream = pretrain(grey, "mini", pretrain_epochs=1, recipe=MIXED, run_dir="grey", **QUIET)
    model, card = load_weights("grey/pretrained.safetensors")
    assert model.config["num_channels"] == len(card.mean) == 1
    torch.testing.assert_close(
        train.predict(model, grey.images, card), train.predict(upstream.model, grey.images, card)
    )
    tuned = finetune(model, card, pictures(8, classes=2, channels=1), recipe=PLAIN, **QUIET)
    record_test(tuned, pictures(4, classes=2, channels=1), "grey", "grey/finetuned.safetensors")
    Image.new("RGB", (20, 10), "red").save("colour.png")
    (prediction,) = predict.predict_files(*load_weights("grey/finetuned.safetensors"), ["colour.png"], top=9)
    assert prediction.error is None and sum(share for _, share in prediction.classes) == pytest.approx(1, abs=1e-6)


def test_all_recipes_take_the_smallest_training_there_is(smaller):
    for known, stage in ((RECIPES, "pretrain"), (FINETUNING, "finetune")):
        for name in known:
            steps = {"train_steps_per_epoch": 1, "eval_steps_per_epoch": 1, **QUIET, "recipe": name}
            if stage == "pretrain":
                done = pretrain(pictures(4, classes=2, side=16), "mini", pretrain_epochs=1, **steps)
            else:
                done = finetune(done.model, done.card, pictures(4, classes=2, side=16), **steps)
            assert len(done.history.steps) == 1, name


# --- how many there were ---------------------------------------------------------------------------------------------


def test_at_least_300_wrong_values_were_tried(request):
    """The last test of the file: it counts what the others have tried."""
    entries = {entry for entry, _, _ in TRIED}
    arguments = {(entry, argument) for entry, argument, _ in TRIED}
    count = f"{len(TRIED)} different wrong values for {len(arguments)} arguments of {len(entries)} entries"
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{count}")
    missing = {*NAMES, "parameter", "run", "pretrain", "finetune", "predict", "export", "grade", "sweep"} - entries
    if missing:
        pytest.skip(f"only a part of this file has run: {count}, without {', '.join(sorted(missing))}")
    assert len(TRIED) >= LEAST
