"""The training commands: what they print and write, what they resume, what they need."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from conftest import image_folder, invoke
from filelock import FileLock
from PIL import Image
from torch.nn.functional import one_hot

import vitlib.training
from vitlib import plots
from vitlib.course import own_images, training_commands
from vitlib.course.cli import main
from vitlib.course.parameters import PARAMETERS
from vitlib.data import LabelledImages, load_images
from vitlib.model import create_model
from vitlib.training import FINETUNING, RECIPES, History, Trained, Trainer, evaluate
from vitlib.utils import versions
from vitlib.weights import ModelCard, load_checkpoint, load_pretrained, save_checkpoint

FOREIGN = ("matplotlib", "ipywidgets", "papermill", "ipykernel", "IPython", "nbformat", "psutil", "yaml")
SMALL = {"image_size": 8, "batch_size": 16, "device": "cpu", "recipe": "short", "precision": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of 8x8 pixels in three classes: 36 for training, 9 for testing."""
    return image_folder(tmp_path_factory.mktemp("colours"), train=36, test=9)


def words_of(**values: object) -> list[str]:
    """The options of a small training; a value of None leaves an option out."""
    options = {name.replace("_", "-"): value for name, value in (SMALL | values).items() if value is not None}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def pretrain(folder: Path, run_dir: Path, exit_code=0, preset="mini", **values: object) -> Result:
    result = invoke("pretrain", *words_of(upstream=folder, run_dir=run_dir, preset=preset, **values))
    assert result.exit_code == exit_code, result.output
    return result


def finetune(folder: Path, run_dir: Path, weights: object, exit_code=0, **values: object) -> Result:
    result = invoke("finetune", *words_of(downstream=folder, run_dir=run_dir, weights=weights, **values))
    assert result.exit_code == exit_code, result.output
    return result


@pytest.fixture(scope="module")
def pretrained(folder, tmp_path_factory) -> tuple[str, Path]:
    """The output and the folder of ``pretrain`` with two epochs of three steps."""
    run_dir = tmp_path_factory.mktemp("pretrain")
    return pretrain(folder, run_dir, pretrain_epochs=2, seed=5).stdout, run_dir


@pytest.fixture
def weights(pretrained) -> Path:
    return pretrained[1] / "pretrained.safetensors"


def test_a_preset_of_the_paper_takes_its_image_size(monkeypatch, folder, tmp_path):
    def seen(source, data_dir, image_size):
        raise ValueError(f"{image_size} pixels")

    monkeypatch.setattr(training_commands, "_load_splits", seen)
    assert "224 pixels" in pretrain(folder, tmp_path, 2, preset="Ti/16", image_size=None).output


def test_pretrain_prints_the_score_that_the_record_has(pretrained, folder):
    said, run_dir = pretrained
    assert {path.name for path in run_dir.iterdir()} - {".lock"} == {
        "pretrained.safetensors", "pretrained-best.safetensors", "pretrained-history.json", "pretrained-resume.pt",
        "pretrained-resume-previous.pt",
    }  # fmt: skip
    model, card = load_checkpoint(run_dir / "pretrained.safetensors")
    record, score = card.record, evaluate(model, load_images(folder, "test"), card)
    assert re.fullmatch(
        rf"{score['accuracy']:.2%} top-1 \(95 % interval [\d.]+% to [\d.]+%, chance 33.3%, loss {score['loss']:.3f}\) "
        rf"on the 9 test images of {re.escape(str(folder))}, after 6 steps in 2 epochs and \d+ s of training; the "
        rf"weights are in {re.escape(str(run_dir / 'pretrained.safetensors'))}\.",
        said.splitlines()[-1],
    )
    assert card.classes == ("blue", "green", "red") and card.preset == "mini"
    assert record["recipe"]["learning_rate"] == RECIPES["short"].learning_rate and "cpu" in record["hardware"]
    assert record.items() >= {
        "stage": "pretraining", "source": str(folder), "processes": 1, "epochs": 2, "batch_size": 16, "seed": 5,
        "precision": "float32", "train_images": 33, "validation_images": 3, "versions": versions(),
        "epochs_run": History.load(run_dir / "pretrained-history.json").epochs,
        "test": {"source": f"{folder}, test split", "images": 9, **score},
    }.items()  # fmt: skip
    _, best = load_checkpoint(run_dir / "pretrained-best.safetensors")
    assert "test" not in best.record, "the test images choose nothing"


def test_pretrain_called_again_does_not_train_and_other_options_are_refused(pretrained, weights, folder, monkeypatch):
    said, run_dir = pretrained
    before = weights.read_bytes()
    monkeypatch.setattr(Trainer, "augment", lambda *arguments: pytest.fail("it trains again"))
    again = pretrain(folder, run_dir, pretrain_epochs=2, seed=5)
    assert again.stdout.splitlines()[-1] == said.splitlines()[-1] and weights.read_bytes() == before
    other = pretrain(folder, run_dir, 2, pretrain_epochs=3, seed=5).stderr
    assert other.count("\n") == 1 and "this one has epochs=3" in other


def test_pretrain_stopped_by_ctrl_c_exits_with_130_and_goes_on(folder, tmp_path, monkeypatch):
    calls, original = [], Trainer.augment

    def step(self, *arguments):
        calls.append(len(self.history.epochs))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "augment", step)
    assert "top-1" not in pretrain(folder, tmp_path, 130, pretrain_epochs=3).output
    assert "in 3 epochs" in pretrain(folder, tmp_path, pretrain_epochs=3).stdout
    assert calls == [0] * 3 + [1] * 2 + [1] * 3 + [2] * 3


def test_finetune_moves_the_encoder_of_a_file(weights, folder, tmp_path):
    finetune(folder, tmp_path, weights, finetune_epochs=1, freeze_encoder="true")
    upstream, card = load_checkpoint(weights)
    model, probe = load_checkpoint(tmp_path / "finetuned.safetensors")
    for name, tensor in upstream.vit_encoder.state_dict().items():
        assert torch.equal(model.vit_encoder.state_dict()[name], tensor), name
    assert model.linear_classifier.weight.any() and probe.mean == card.mean
    assert probe.record["stage"] == "linear probe" and probe.record["upstream"] == card.record
    assert probe.record["test"].items() >= {"source": f"{folder}, test split", "images": 9}.items()
    assert probe.record["recipe"]["head_rate"] == FINETUNING["short"].head_rate


def test_finetune_with_shipped_weights_takes_their_image_size(folder, tmp_path):
    finetune(folder, tmp_path, "shapes100-mini", image_size=None, train_steps_per_epoch=1)
    model, card = load_checkpoint(tmp_path / "finetuned.safetensors")
    assert model.config["image_size"] == 32 and card.record["stage"] == "fine-tuning"
    assert card.record["upstream"] == load_pretrained("shapes100-mini")[1].record


@pytest.mark.parametrize("freeze", [False, True])
def test_finetune_with_random_weights_is_the_control(folder, tmp_path, freeze):
    finetune(folder, tmp_path, "random", freeze_encoder=freeze, train_steps_per_epoch=1, seed=3)
    model, card = load_checkpoint(tmp_path / "finetuned.safetensors")
    recipe = (FINETUNING if freeze else RECIPES)["short"]
    assert card.record["upstream"] == {"stage": "random"} and card.record["recipe"]["warmup"] == recipe.warmup
    torch.manual_seed(3)
    fresh = create_model("small", 1, image_size=8).vit_encoder.state_dict()
    moved = max((tensor - fresh[name]).abs().max().item() for name, tensor in model.vit_encoder.state_dict().items())
    assert moved == 0 if freeze else 0 < moved < 0.1


# --- own images ----------------------------------------------------------------------------------------------------


def test_steps_follow_from_the_number_of_images():
    for images, batch_size, epochs in ((3, 8, 16), (97, 64, 8), (500, 128, 4), (2025, 128, 1), (10**6, 128, 1)):
        assert own_images.batch_size_for(images) == batch_size, images
        assert own_images.epochs_for(images, batch_size) == epochs, images


def test_the_interval_is_that_of_wilson_and_chance_the_largest_class():
    # values of statsmodels.stats.proportion.proportion_confint(method="wilson")
    for share, count, expected in ((0.5, 60, (0.3773, 0.6227)), (1.0, 10, (0.7225, 1.0)), (0.0, 10, (0.0, 0.2775))):
        assert own_images.wilson_interval(share, count) == pytest.approx(expected, abs=1e-4)
    assert own_images.chance(torch.tensor([0, 0, 0, 2])) == 0.75


def test_finetune_takes_enough_steps_for_few_images(weights, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(own_images, "STEPS", 4)
    said = finetune(folder, tmp_path, weights, batch_size=None).stdout
    assert "33 images of 3 classes (blue, green, red) to learn from: batch_size=32, finetune_epochs=2." in said
    assert "after 4 steps in 2 epochs" in said


@pytest.fixture
def scored(folder, monkeypatch) -> tuple[Trained, LabelledImages]:
    """A model and nine test images, of which its logits, made up, get four wrong."""
    test = load_images(folder, "test")
    logits = 2.0 * one_hot(test.labels)
    for number, confidence in ((1, 3.0), (4, 9.0), (5, 4.0), (8, 5.0)):
        logits[number] = confidence * logits[number].roll(1)
    monkeypatch.setattr(vitlib.training, "predict", lambda model, images, card, batch_size: logits)
    card = ModelCard(("a", "b", "c"), 3 * (0.5,), 3 * (0.2,), record={"batch_size": 2})
    return Trained(create_model("mini", 3, image_size=8), card, History()), test


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that are written."""
    drawn, png = [], plots.png
    monkeypatch.setattr(plots, "png", lambda figure, dpi: drawn.append(figure) or png(figure, dpi))
    return drawn


def test_finetune_leaves_figures_and_a_table_of_its_predictions(folder, tmp_path, scored, drawn):
    assert training_commands._look_at_errors(*scored, tmp_path) == (
        f"Which classes it confuses: {tmp_path / 'confusion.png'}. Where it is most sure and wrong: "
        f"{tmp_path / 'mistakes.png'}. All predictions: {tmp_path / 'predictions.csv'}."
    )
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and picture.width > 600
    confusion, mistakes = drawn
    counts = [text.get_text() for text in confusion.axes[0].texts]
    assert counts == ["2", "1", "0", "0", "1", "2", "1", "0", "2"] and "5 of 9" in confusion.axes[0].get_title()
    assert [re.sub(r"\d+% ", "", ax.get_title()).splitlines() for ax in mistakes.axes] == [
        ["true: green", "red", "1.png"], ["true: red", "blue", "2.png"], ["true: green", "red", "2.png"],
        ["true: blue", "green", "1.png"],
    ]  # fmt: skip
    with open(tmp_path / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["file"]) for row in rows] == sorted((folder / "test").glob("*/*.png"))
    assert [row["true"] for row in rows] == [Path(row["file"]).parent.name for row in rows]
    assert [number for number, row in enumerate(rows) if row["true"] != row["predicted"]] == [1, 4, 5, 8]
    # logits of 2 and of 6 beside two of 0
    assert [float(row["probability"]) for row in rows[:2]] == pytest.approx([0.7870, 0.9951], abs=1e-4)


NAMES = {"Chinese": "\u732b \u72d7", "Hindi and a formula": "\u0915\u0941 $a_{", "long": 30 * "o" + " " + 16 * "e"}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_any_names_of_classes_are_drawn_within_their_image_or_named(tmp_path, drawn, recwarn, capsys, names):
    plots._say_what_is_missing.cache_clear()
    test = LabelledImages(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), tuple(names.split()))
    own_images.draw_errors(tmp_path, test, 5.0 * one_hot(torch.tensor([1, 0])))
    has_font = names.isascii() or len(plots.STYLE["font.family"]) > 1
    assert has_font or capsys.readouterr().out.count("No font here has all letters of these names") == 1
    assert all(ax.title.get_window_extent().width <= ax.get_window_extent().width for ax in drawn[1].axes)
    assert not recwarn.list


def test_without_mistakes_the_old_figure_goes(folder, tmp_path):
    (tmp_path / "mistakes.png").write_text("of an earlier training")
    test = load_images(folder, "test")
    assert own_images.draw_errors(tmp_path, test, 9.0 * one_hot(test.labels)) == (
        f"Which classes it confuses: {tmp_path / 'confusion.png'}. It makes no mistake."
    )
    assert (tmp_path / "confusion.png").exists() and not (tmp_path / "mistakes.png").exists()


def test_an_error_in_drawing_costs_a_sentence(scored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = training_commands._look_at_errors(*scored, tmp_path)
    assert said.startswith("The figures of the errors could not be drawn (ModuleNotFoundError('import of matplotlib")
    assert not list(tmp_path.glob("*.png")) and (tmp_path / "predictions.csv").exists()


def test_other_settings_in_the_same_folder_keep_the_earlier_training(weights, folder, tmp_path):
    finetune(folder, tmp_path, weights, train_steps_per_epoch=1)
    before = (tmp_path / "finetuned.safetensors").read_bytes()
    new, again = (finetune(folder, tmp_path, weights, batch_size=8, train_steps_per_epoch=1).stdout for _ in range(2))
    assert (
        f"\n{tmp_path} held a training with batch_size=16, this one has batch_size=8: that training is now in "
        f"{tmp_path / 'earlier-1'}, and a new one begins.\n"
    ) in new and "top-1" in new
    assert (tmp_path / "earlier-1" / "finetuned.safetensors").read_bytes() == before and "earlier" not in again
    assert training_commands._set_aside(tmp_path) == tmp_path / "earlier-2"


def test_finetune_loads_images_with_the_models_channels(folder, tmp_path):
    model = create_model("mini", 3, image_size=8, num_channels=1)
    save_checkpoint(tmp_path / "grey.safetensors", model, ModelCard(("a", "b", "c"), (0.4,), (0.2,)))
    finetune(folder, tmp_path, tmp_path / "grey.safetensors", train_steps_per_epoch=1)
    model, card = load_checkpoint(tmp_path / "finetuned.safetensors")
    assert model.config["num_channels"] == len(card.mean) == 1


def test_compile_without_a_compiler_is_one_line(weights, folder, tmp_path, monkeypatch):
    class InvalidCxxCompiler(RuntimeError):
        __module__ = "torch._inductor.exc"

    def fail(*arguments, **options):
        raise InvalidCxxCompiler("\nNo working C++ compiler found\nmany lines")

    monkeypatch.setattr(vitlib.training, "finetune", fail)
    assert finetune(folder, tmp_path, weights, 2, compile="true").stderr == (
        "Error: compile=True does not work here (No working C++ compiler found); install a C++ compiler such as g++, "
        "or leave it out.\n"
    )


def test_finetune_takes_a_folder_as_people_have_them(weights, tmp_path):
    """Two classes, images of any size and kind, one class missing in test/, and what else lies about in folders."""
    kinds = [("RGB", (30, 20), "jpg"), ("L", (9, 50), "png"), ("RGBA", (8, 8), "png"), ("P", (64, 64), "gif")]
    for name in ("train/my cats", "train/$dogs$", "test/my cats"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for number, (mode, size, suffix) in enumerate(3 * kinds):
            picture = Image.effect_noise(size, 50 + number).convert("RGB").convert(mode)
            picture.save(tmp_path / "mine" / name / f"{number}.{suffix}")
        (tmp_path / "mine" / name / "Thumbs.db").write_bytes(b"")
    checkpoint = tmp_path / "my run" / "finetuned.safetensors"
    said = finetune(tmp_path / "mine", checkpoint.parent, weights, train_steps_per_epoch=1).stdout
    assert all(words in said for words in ("are of one class, my cats.\n", "on the 12 test images", "confusion.png"))
    assert load_checkpoint(checkpoint)[1].classes == ("$dogs$", "my cats")
    words = shlex.split(said.splitlines()[-1].removeprefix("Use it: "))
    assert words == ["python", "-m", "vitlib", "predict", str(checkpoint), "image.jpg"]
    result = invoke(*words[3:-1], tmp_path / "mine" / "test" / "my cats" / "0.jpg")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 3


# --- what is refused before any training, and what is needed ---------------------------------------------------------


def test_two_trainings_do_not_share_a_folder(folder, tmp_path):
    with FileLock(tmp_path / ".lock"):
        for result in (pretrain(folder, tmp_path, 2), finetune(folder, tmp_path, "shapes100-mini", 2)):
            assert f"Another training is at work in {tmp_path}" in result.output


def test_run_dir_among_the_classes_is_refused(folder):
    classes, run_dir = folder / "train", folder / "train" / "runs"
    for result in (pretrain(classes, run_dir, 2), finetune(classes, run_dir, "shapes100-mini", 2)):
        assert "is among the classes in" in result.stderr and not run_dir.exists()


def test_test_images_are_missed_before_training_and_not_after(tmp_path, folder):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train").symlink_to(folder / "train")
    said = pretrain(tmp_path / "images", tmp_path / "run", 2).stderr
    assert re.search(r"test .*does not exist", said) and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_the_commands_have_every_parameter_that_is_not_about_notebooks():
    names = {name for command in ("pretrain", "finetune") for name in main.commands[command].defaults}
    notebooks_alone = {"dataset", "num_images", "official_weights", "seeds"}
    sweeps_alone = {"patch_size", "position_embedding", "arm", "labelled_images", "steps"}
    assert names == set(PARAMETERS) - notebooks_alone - sweeps_alone


def test_training_needs_no_package_of_notebooks_and_reads_words_for_values(folder, tmp_path):
    words = {"norm_first": "off", "train_steps_per_epoch": "1", "eval_steps_per_epoch": "null"}
    command = words_of(upstream=folder, preset="mini", pretrain_epochs=1, run_dir=tmp_path, **words)
    code = f"import sys; sys.modules.update(dict.fromkeys({FOREIGN!r})); from vitlib.__main__ import main; main()"
    command = [sys.executable, "-c", code, "pretrain", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "top-1" in done.stdout, done.stderr
    model, card = load_checkpoint(tmp_path / "pretrained.safetensors")
    assert model.config["norm_first"] is False and card.record["train_steps_per_epoch"] == 1
    assert card.record["eval_steps_per_epoch"] is None


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried", "MPS backend out of memory", "not enough memory: you"])
def test_a_full_memory_is_one_sentence(words):
    with pytest.raises(ValueError, match="memory of the device is full"), training_commands._in_one_sentence(False):
        raise RuntimeError(words)
