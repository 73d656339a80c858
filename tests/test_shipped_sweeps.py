"""The two sweeps of the lessons: their notebooks train what they say, and their files make the grids of the records."""

import json
import runpy
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import refusal
from prose import MACHINE_PATH

import vitlib.data
import vitlib.training
import vitlib.weights
from vitlib.course.grid import make_plan
from vitlib.course.parameters import ARMS
from vitlib.data.images import LabelledImages
from vitlib.model import create_model
from vitlib.training.history import History
from vitlib.training.recipes import FINETUNING, RECIPES
from vitlib.weights.checkpoint import PRETRAINED, ModelCard, load_checkpoint

FOLDER = Path(__file__).parents[1] / "notebooks" / "sweeps"
END = {"validation_accuracy": 0.25, "validation_loss": 2.0}

keep_sweep = runpy.run_path(str(FOLDER.parents[1] / "tools" / "keep_sweep.py"))


def small_images(count):
    """Images of noise in two classes, sorted by class as folders are; no two are the same."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return LabelledImages(images, torch.arange(count) * 2 // count, ("a", "b"))


@pytest.fixture
def small(monkeypatch):
    """Small images in place of the course's."""
    counts = {"train": 12, "test": 6}
    monkeypatch.setattr(vitlib.data, "load_images", lambda source, split, **options: small_images(counts[split]))


def run_cells(name, **parameters):
    """Run the cells of a sweep's notebook, but the one for Colab, with these parameters; return its variables."""
    here = {"__name__": "__main__"}
    cells = [cell for cell in nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        if "%pip" not in cell.source:
            exec(cell.source, here)
        if "parameters" in cell.metadata.get("tags", []):
            assert parameters.keys() <= here.keys()
            here.update(parameters)
    return here


def test_every_arm_trains_what_it_says(small, monkeypatch, capsys):
    """Every arm takes the same steps on full batches of the labelled images; what differs is where it starts."""
    torch.manual_seed(1)
    pretrained = create_model("mini", 3, image_size=8)
    with torch.no_grad():
        pretrained.vit_encoder.embedding.cls_token.fill_(7.0)  # no new encoder starts like this
    card = ModelCard(("x", "y", "z"), (0.5,) * 3, (0.25,) * 3)
    monkeypatch.setattr(vitlib.weights, "load_weights", lambda weights: (pretrained, card))
    seen = {}

    def note(model, train, test, card, recipe, **options):
        moved = [parameter.requires_grad for parameter in model.vit_encoder.parameters()]
        start = model.vit_encoder.embedding.cls_token.mean().item() == 7.0
        seen[arm] = start, all(moved), any(moved), recipe, len(train), options["epochs"], options["batch_size"]
        assert train.labels.bincount().tolist() == [48, 48] and len(train.images.unique(dim=0)) == 4 and len(test) == 6
        return History(epochs=[END])

    monkeypatch.setattr(vitlib.training, "fit", note)
    for arm in ARMS:
        run_cells("labels", arm=arm, labelled_images=4, steps=3, device="cpu")
        shown = capsys.readouterr().out
        assert "top1         0.25\nloss         2\nchance       0.5\n" in shown and f"{arm}: " in shown
    assert seen == {
        "fine-tuning": (True, True, True, FINETUNING["short"], 96, 1, 32),
        "linear probe": (True, False, False, FINETUNING["short"], 96, 1, 32),
        "random probe": (False, False, False, FINETUNING["short"], 96, 1, 32),
        "from scratch": (False, True, True, RECIPES["short"], 96, 1, 32),
    }


@pytest.mark.parametrize("position_embedding", [True, False])
def test_positions_are_trained_or_stay_zero(small, tmp_path, position_embedding, capsys):
    options = {"position_embedding": position_embedding, "image_size": 8, "run_dir": str(tmp_path), "device": "cpu"}
    here = run_cells("patches", patch_size=2, steps=2, batch_size=3, **options)
    model, card = load_checkpoint(tmp_path / "patches.safetensors")
    positions = model.vit_encoder.embedding.position_embedding
    assert positions.shape == (1, 17, 96) and bool(positions.any()) == position_embedding
    assert card.classes == ("a", "b") and len(here["history"].steps) == 2
    assert "patches      16\n" in capsys.readouterr().out


def test_every_patch_size_sees_the_same_images_and_all_classes(small, tmp_path, monkeypatch):
    shown = []

    def fit(model, train, *rest, **options):
        shown.append(train)
        return History(epochs=[END])

    monkeypatch.setattr(vitlib.training, "fit", fit)
    for patch_size, seed in ((2, 0), (8, 0), (8, 1)):
        options = {"image_size": 8, "run_dir": str(tmp_path), "device": "cpu"}
        run_cells("patches", patch_size=patch_size, seed=seed, steps=2, batch_size=3, **options)
    assert torch.equal(shown[0].images, shown[1].images) and not torch.equal(shown[0].images, shown[2].images)
    assert all(len(images) == 6 and set(images.labels.tolist()) == {0, 1} for images in shown)


@pytest.mark.parametrize("name", ("labels", "patches"))
def test_the_record_is_that_of_the_sweeps_file(name):
    """Every run of the file is in the record, once and in its order, with the values that all have in common."""
    plan = make_plan(FOLDER / f"{name}.yaml")
    record = json.loads((PRETRAINED / f"sweep_{name}.json").read_text())
    assert record["command"] == f"python -m vitlib sweep notebooks/sweeps/{name}.yaml"
    assert [run["parameters"] for run in record["runs"]] == [run.varied for run in plan.runs]
    common = {name: value for name, value in plan.runs[0].parameters.items() if name not in plan.varied}
    assert {**record["parameters"], "data_dir": None} == common
    assert record["notebook_sha256"] == plan.sha256, "run the sweep again, and keep its results"
    text = json.dumps(record)
    assert not MACHINE_PATH.findall(text) and '"host"' not in text and "Linux-" not in text, "it names no machine"


def results_of(folder, **changes):
    run = {
        "run": "a", "key": "b", "status": "ok", "error": None, "parameters": {"seed": 0, "steps": 3, "data_dir": "/x"},
        "figures": {"top1": 0.5}, "seconds": 1.5, "peak_memory_bytes": 9, "host": "secret", "seed": 0,
        "started": "2026-11-24T10:00:00+00:00", "attempts": 1,
        "versions": {"python": "3", "torch": "2", "papermill": "1", "vitlib": "0", "platform": "Linux-5"},
    }  # fmt: skip
    runs = [run, run | {"parameters": run["parameters"] | {"seed": 1}} | changes.pop("run", {})]
    results = {"command": "python -m vitlib sweep a.yaml", "notebook": "a", "notebook_sha256": "c", "varied": ["seed"]}
    (folder / "results.json").write_text(json.dumps({**results, "vitlib": "0", "runs": runs, **changes}))
    return folder / "results.json"


def test_a_record_keeps_what_a_run_did_and_not_where(tmp_path):
    kept = keep_sweep["keep"](results_of(tmp_path), tmp_path)
    assert kept == tmp_path / "sweep_a.json"
    measured = {"figures": {"top1": 0.5}, "seconds": 1.5, "peak_memory_bytes": 9}
    assert json.loads(kept.read_text()) == {
        "command": "python -m vitlib sweep a.yaml",
        "notebook": "a",
        "notebook_sha256": "c",
        "date": "2026-11-24",
        "versions": {"python": "3", "torch": "2", "papermill": "1", "vitlib": "0"},
        "varied": ["seed"],
        "parameters": {"steps": 3},
        "runs": [{"parameters": {"seed": 0}, **measured}, {"parameters": {"seed": 1}, **measured}],
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": {"status": "failed", "run": "label"}}, "The run label is not finished"),
        ({"run": {"versions": {"python": "4", "torch": "2", "papermill": "1", "vitlib": "0"}}}, "different versions"),
    ],
)
def test_what_is_not_to_be_kept_is_refused_in_one_sentence(tmp_path, changes, said):
    assert said in refusal(keep_sweep["keep"], results_of(tmp_path, **changes), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
