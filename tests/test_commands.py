"""The training commands: what they print and write, what they resume, what they need."""

import csv
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
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

COMMANDS = ("pretrain", "finetune")
FOREIGN = ("matplotlib", "ipywidgets", "papermill", "ipykernel", "IPython", "nbformat", "psutil", "yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of 8x8 pixels in three classes: 36 for training, 9 for testing."""
    return image_folder(tmp_path_factory.mktemp("colours"), train=36, test=9)


def options(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


SMALL = {"image_size": 8, "batch_size": 16, "device": "cpu", "recipe": "short", "precision": "float32"}


def call(command: str, **values: object):
    return invoke(command, *options(**values))


def test_two_trainings_do_not_share_a_folder(folder, tmp_path):
    with FileLock(tmp_path / ".lock"):
        for result in (
            call("pretrain", upstream=folder, preset="mini", run_dir=tmp_path, **SMALL),
            call("finetune", downstream=folder, weights="shapes100-mini", run_dir=tmp_path, **SMALL),
        ):
            assert result.exit_code == 2 and f"Another training is at work in {tmp_path}" in result.output


def test_a_preset_of_the_paper_takes_its_image_size(monkeypatch, folder, tmp_path):
    def seen(source, data_dir, image_size):
        raise ValueError(f"{image_size} pixels")

    monkeypatch.setattr(training_commands, "_load_splits", seen)
    assert "224 pixels" in call("pretrain", upstream=folder, preset="Ti/16", run_dir=tmp_path).output


@pytest.fixture(scope="module")
def pretrained(folder, tmp_path_factory):
    """The output and the folder of ``pretrain`` with two epochs of three steps."""
    run_dir = tmp_path_factory.mktemp("pretrain")
    result = call("pretrain", upstream=folder, preset="mini", pretrain_epochs=2, run_dir=run_dir, seed=5, **SMALL)
    assert result.exit_code == 0, result.output
    return result, run_dir


def test_pretrain_prints_the_score_that_the_record_has(pretrained, folder):
    result, run_dir = pretrained
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
        result.stdout.splitlines()[-1],
    )
    assert record["test"] == {"source": f"{folder}, test split", "images": 9, **score}
    assert card.classes == ("blue", "green", "red") and card.preset == "mini"
    assert (record["stage"], record["source"], record["processes"]) == ("pretraining", str(folder), 1)
    assert (record["epochs"], record["batch_size"], record["seed"], record["precision"]) == (2, 16, 5, "float32")
    assert record["recipe"]["learning_rate"] == RECIPES["short"].learning_rate
    assert (record["train_images"], record["validation_images"]) == (33, 3)
    assert record["epochs_run"] == History.load(run_dir / "pretrained-history.json").epochs
    assert record["versions"] == versions() and "cpu" in record["hardware"]
    _, best = load_checkpoint(run_dir / "pretrained-best.safetensors")
    assert "test" not in best.record, "the test images choose nothing"


def test_pretrain_called_again_does_not_train_and_other_options_are_refused(pretrained, folder, monkeypatch):
    result, run_dir = pretrained
    before = (run_dir / "pretrained.safetensors").read_bytes()
    monkeypatch.setattr(Trainer, "augment", lambda *arguments: pytest.fail("it trains again"))
    arguments = {"upstream": folder, "preset": "mini", "run_dir": run_dir, "seed": 5, **SMALL}
    again = call("pretrain", pretrain_epochs=2, **arguments)
    assert again.exit_code == 0 and again.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]
    assert (run_dir / "pretrained.safetensors").read_bytes() == before
    other = call("pretrain", pretrain_epochs=3, **arguments)
    assert other.exit_code == 2 and other.stderr.count("\n") == 1 and "this one has epochs=3" in other.stderr


def test_pretrain_stopped_by_ctrl_c_exits_with_130_and_goes_on(folder, tmp_path, monkeypatch):
    calls, original = [], Trainer.augment

    def step(self, *arguments):
        calls.append(len(self.history.epochs))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "augment", step)
    arguments = {"upstream": folder, "preset": "mini", "pretrain_epochs": 3, "run_dir": tmp_path, **SMALL}
    first = call("pretrain", **arguments)
    assert first.exit_code == 130 and "top-1" not in first.output
    second = call("pretrain", **arguments)
    assert second.exit_code == 0 and "in 3 epochs" in second.stdout
    assert calls == [0] * 3 + [1] * 2 + [1] * 3 + [2] * 3


def test_finetune_moves_the_encoder_of_a_file(pretrained, folder, tmp_path):
    upstream, card = load_checkpoint(pretrained[1] / "pretrained.safetensors")
    weights = {"weights": pretrained[1] / "pretrained.safetensors"}
    settings = {**SMALL, "finetune_epochs": 1, "freeze_encoder": "true", "run_dir": tmp_path / "probe"}
    probe = call("finetune", downstream=folder, **weights, **settings)
    assert probe.exit_code == 0, probe.output
    model, probe_card = load_checkpoint(tmp_path / "probe" / "finetuned.safetensors")
    for name, tensor in upstream.vit_encoder.state_dict().items():
        assert torch.equal(model.vit_encoder.state_dict()[name], tensor), name
    assert model.linear_classifier.weight.any()
    assert probe_card.mean == card.mean and probe_card.record["stage"] == "linear probe"
    assert probe_card.record["upstream"] == card.record
    assert probe_card.record["test"]["source"] == f"{folder}, test split" and probe_card.record["test"]["images"] == 9
    assert probe_card.record["recipe"]["head_rate"] == FINETUNING["short"].head_rate


def test_finetune_with_shipped_weights_takes_their_image_size(folder, tmp_path):
    settings = {**SMALL, "image_size": "None", "finetune_epochs": 1, "train_steps_per_epoch": 1}
    result = call("finetune", downstream=folder, weights="shapes100-mini", run_dir=tmp_path, **settings)
    assert result.exit_code == 0, result.output
    model, card = load_checkpoint(tmp_path / "finetuned.safetensors")
    assert model.config["image_size"] == 32 and card.record["stage"] == "fine-tuning"
    assert card.record["upstream"] == load_pretrained("shapes100-mini")[1].record


@pytest.mark.parametrize("freeze", [False, True])
def test_finetune_with_random_weights_is_the_control(folder, tmp_path, freeze):
    settings = {**SMALL, "freeze_encoder": freeze, "train_steps_per_epoch": 1, "seed": 3}
    result = call("finetune", downstream=folder, weights="random", run_dir=tmp_path, **settings)
    assert result.exit_code == 0, result.output
    model, card = load_checkpoint(tmp_path / "finetuned.safetensors")
    recipe = (FINETUNING if freeze else RECIPES)["short"]
    assert card.record["upstream"] == {"stage": "random"} and card.record["recipe"]["warmup"] == recipe.warmup
    torch.manual_seed(3)
    fresh = create_model("small", 1, image_size=8).vit_encoder.state_dict()
    moved = max((tensor - fresh[name]).abs().max().item() for name, tensor in model.vit_encoder.state_dict().items())
    assert moved == 0 if freeze else 0 < moved < 0.1


# --- own images ----------------------------------------------------------------------------------------------------


def tune(folder: Path, run_dir: Path, weights: Path, **values: object) -> list[str]:
    """The lines that a quick finetune prints, without its progress bars."""
    settings = {**SMALL, "weights": weights / "pretrained.safetensors", "train_steps_per_epoch": 1, **values}
    result = call("finetune", downstream=folder, run_dir=run_dir, **settings)
    assert result.exit_code == 0, result.output
    return [line for line in result.stdout.splitlines() if line and "%|" not in line]


@pytest.fixture
def confused(folder, monkeypatch):
    """Logits by which four of the nine test images are mistakes, in place of the model's, which makes none."""
    logits = 2.0 * one_hot(load_images(folder, "test").labels)
    for number, confidence in ((1, 3.0), (4, 9.0), (5, 4.0), (8, 5.0)):
        logits[number] = confidence * logits[number].roll(1)
    monkeypatch.setattr(vitlib.training, "predict", lambda model, images, card, batch_size: logits)
    return logits


@pytest.mark.parametrize(
    ("images", "batch_size", "epochs"),
    [(3, 8, 16), (97, 64, 8), (500, 128, 4), (2025, 128, 1), (10**6, 128, 1)],
)
def test_steps_follow_from_the_number_of_images(images, batch_size, epochs):
    assert (own_images.batch_size_for(images), own_images.epochs_for(images, batch_size)) == (batch_size, epochs)


def test_the_interval_is_that_of_wilson_and_chance_the_largest_class():
    # values of statsmodels.stats.proportion.proportion_confint(method="wilson")
    for share, count, expected in ((0.5, 60, (0.3773, 0.6227)), (1.0, 10, (0.7225, 1.0)), (0.0, 10, (0.0, 0.2775))):
        assert own_images.wilson_interval(share, count) == pytest.approx(expected, abs=1e-4)
    assert own_images.chance(torch.tensor([0, 0, 0, 2])) == 0.75


def test_finetune_takes_enough_steps_for_few_images(pretrained, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(own_images, "STEPS", 4)
    values = {name: value for name, value in SMALL.items() if name != "batch_size"}
    weights = pretrained[1] / "pretrained.safetensors"
    result = call("finetune", downstream=folder, weights=weights, run_dir=tmp_path, **values)
    assert "33 images of 3 classes (blue, green, red) to learn from: batch_size=32, finetune_epochs=2." in result.stdout
    assert " steps in 2 epochs" in result.stdout


@pytest.fixture
def scored(folder, confused) -> tuple[Trained, LabelledImages]:
    """A model that the logits are taken to be of, and the test images."""
    card = ModelCard(("a", "b", "c"), 3 * (0.5,), 3 * (0.2,), record={"batch_size": 2})
    return Trained(create_model("mini", 3, image_size=8), card, History()), load_images(folder, "test")


def test_finetune_leaves_figures_and_a_table_of_its_predictions(folder, tmp_path, confused, scored):
    assert training_commands._look_at_errors(*scored, tmp_path) == (
        f"Which classes it confuses: {tmp_path / 'confusion.png'}. Where it is most sure and wrong: "
        f"{tmp_path / 'mistakes.png'}. All predictions: {tmp_path / 'predictions.csv'}."
    )
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and picture.width > 600
    with open(tmp_path / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["file"]) for row in rows] == sorted((folder / "test").glob("*/*.png"))
    assert [row["true"] for row in rows] == [Path(row["file"]).parent.name for row in rows]
    wrong = [number for number, row in enumerate(rows) if row["true"] != row["predicted"]]
    assert wrong == [1, 4, 5, 8]
    assert float(rows[4]["probability"]) == pytest.approx(confused[4].softmax(0).max().item(), abs=1e-4)


def test_figures_of_errors_have_counts_and_file_names(folder, tmp_path, confused, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "png", lambda figure, dpi: drawn.append(figure) or b"")
    own_images.draw_errors(tmp_path, load_images(folder, "test"), confused)
    confusion, mistakes = drawn
    counts = [text.get_text() for text in confusion.axes[0].texts]
    assert counts == ["2", "1", "0", "0", "1", "2", "1", "0", "2"] and "5 of 9" in confusion.axes[0].get_title()
    titles = [re.sub(r"\d+% ", "", ax.get_title()).splitlines() for ax in mistakes.axes]
    assert titles == [
        ["true: green", "red", "1.png"], ["true: red", "blue", "2.png"], ["true: green", "red", "2.png"],
        ["true: blue", "green", "1.png"],
    ]  # fmt: skip


@pytest.mark.parametrize("letters", ["\u732b \u72d7", "\u0915\u0941 $a_{"], ids=["Chinese", "Hindi and a formula"])
def test_names_in_other_scripts_are_drawn_or_named(tmp_path, recwarn, capsys, letters):
    plots._say_what_is_missing.cache_clear()
    warnings.filterwarnings("ignore", plots.BOXES)  # pytest drops what the import has set
    test = LabelledImages(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), tuple(letters.split()))
    own_images.draw_errors(tmp_path, test, 5.0 * one_hot(torch.tensor([1, 0])))
    has_font = len(plots.STYLE["font.family"]) > 1
    assert has_font or capsys.readouterr().out.count("No font here has all letters of these names") == 1
    assert not recwarn.list


def test_long_names_do_not_run_into_those_of_the_next_image(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "png", lambda figure, dpi: drawn.append(figure) or b"")
    test = LabelledImages(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), ("o" * 30, "e" * 16))
    own_images.draw_errors(tmp_path, test, 5.0 * one_hot(torch.tensor([1, 0])))
    drawn[1].draw_without_rendering()
    assert all(ax.title.get_window_extent().width <= ax.get_window_extent().width for ax in drawn[1].axes)


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


def test_other_settings_in_the_same_folder_keep_the_earlier_training(pretrained, folder, tmp_path):
    tune(folder, tmp_path, pretrained[1])
    before = (tmp_path / "finetuned.safetensors").read_bytes()
    _, said, score, *_ = tune(folder, tmp_path, pretrained[1], batch_size=8)
    assert said == (
        f"{tmp_path} held a training with batch_size=16, this one has batch_size=8: that training is now in "
        f"{tmp_path / 'earlier-1'}, and a new one begins."
    )
    assert "top-1" in score and (tmp_path / "earlier-1" / "finetuned.safetensors").read_bytes() == before
    assert not [line for line in tune(folder, tmp_path, pretrained[1], batch_size=8) if "earlier" in line]
    assert training_commands._set_aside(tmp_path) == tmp_path / "earlier-2"


def test_finetune_loads_images_with_the_models_channels(folder, tmp_path):
    model = create_model("mini", 3, image_size=8, num_channels=1)
    save_checkpoint(tmp_path / "pretrained.safetensors", model, ModelCard(("a", "b", "c"), (0.4,), (0.2,)))
    tune(folder, tmp_path / "run", tmp_path)
    model, card = load_checkpoint(tmp_path / "run" / "finetuned.safetensors")
    assert model.config["num_channels"] == len(card.mean) == 1


def test_compile_without_a_compiler_is_one_line(pretrained, folder, tmp_path, monkeypatch):
    class InvalidCxxCompiler(RuntimeError):
        __module__ = "torch._inductor.exc"

    def fail(*arguments, **options):
        raise InvalidCxxCompiler("\nNo working C++ compiler found\nmany lines")

    monkeypatch.setattr(vitlib.training, "finetune", fail)
    weights = pretrained[1] / "pretrained.safetensors"
    result = call("finetune", downstream=folder, weights=weights, run_dir=tmp_path, compile="true", **SMALL)
    assert result.exit_code == 2 and result.stderr == (
        "Error: compile=True does not work here (No working C++ compiler found); install a C++ compiler such as g++, "
        "or leave it out.\n"
    )


def test_finetune_takes_a_folder_as_people_have_them(pretrained, tmp_path):
    """Two classes, images of any size and kind, one class missing in test/, and what else lies about in folders."""
    kinds = [("RGB", (30, 20), "jpg"), ("L", (9, 50), "png"), ("RGBA", (8, 8), "png"), ("P", (64, 64), "gif")]
    for split, names in (("train", ("my cats", "$dogs$")), ("test", ("my cats",))):
        for name in names:
            (tmp_path / "mine" / split / name).mkdir(parents=True)
            for number, (mode, size, suffix) in enumerate(3 * kinds):
                picture = Image.effect_noise(size, 50 + number).convert("RGB").convert(mode)
                picture.save(tmp_path / "mine" / split / name / f"{number}.{suffix}")
            (tmp_path / "mine" / split / name / "Thumbs.db").write_bytes(b"")
    run_dir = tmp_path / "my run"
    *said, score, figures, last = tune(tmp_path / "mine", run_dir, pretrained[1])
    assert any(line.endswith("are of one class, my cats.") for line in said)
    assert "on the 12 test images" in score and "confusion.png" in figures
    _, card = load_checkpoint(run_dir / "finetuned.safetensors")
    assert card.classes == ("$dogs$", "my cats")
    words = shlex.split(last.removeprefix("Use it: "))
    assert words == ["python", "-m", "vitlib", "predict", str(run_dir / "finetuned.safetensors"), "image.jpg"]
    result = invoke(*words[3:-1], tmp_path / "mine" / "test" / "my cats" / "0.jpg")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_run_dir_among_the_classes_is_refused(folder, command):
    source = {"pretrain": "upstream", "finetune": "downstream"}[command]
    result = call(command, **{source: folder / "train", "run_dir": folder / "train" / "runs"}, **SMALL)
    assert result.exit_code == 2 and "is among the classes in" in result.stderr
    assert not (folder / "train" / "runs").exists()


def test_test_images_are_missed_before_training_and_not_after(tmp_path, folder):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train").symlink_to(folder / "train")
    result = call("pretrain", upstream=tmp_path / "images", preset="mini", run_dir=tmp_path / "run", **SMALL)
    assert result.exit_code == 2 and re.search(r"test .*does not exist", result.stderr)
    assert result.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_the_commands_have_every_parameter_that_is_not_about_notebooks():
    names = {name for command in ("pretrain", "finetune") for name in main.commands[command].defaults}
    notebooks_alone = {"dataset", "num_images", "official_weights", "seeds"}
    sweeps_alone = {"patch_size", "position_embedding", "arm", "labelled_images", "steps"}
    assert names == set(PARAMETERS) - notebooks_alone - sweeps_alone


def test_training_needs_no_package_of_notebooks_and_reads_words_for_values(folder, tmp_path):
    words = {"norm_first": "off", "train_steps_per_epoch": "1", "eval_steps_per_epoch": "null"}
    command = options(upstream=folder, preset="mini", pretrain_epochs=1, run_dir=tmp_path, **SMALL, **words)
    code = f"import sys; sys.modules.update(dict.fromkeys({FOREIGN!r})); from vitlib.__main__ import main; main()"
    command = [sys.executable, "-c", code, "pretrain", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "top-1" in done.stdout, done.stderr
    model, card = load_checkpoint(tmp_path / "pretrained.safetensors")
    assert model.config["norm_first"] is False and card.record["train_steps_per_epoch"] == 1
    assert card.record["eval_steps_per_epoch"] is None
