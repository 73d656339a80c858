"""The training commands: what they print and write, what they refuse, what they need."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.nn.functional import one_hot

from vitlib import plots
from vitlib.__main__ import main
from vitlib.costs import costs
from vitlib.course import commands
from vitlib.course.commands import finetune_command, pretrain_command
from vitlib.course.parameters import PARAMETERS, check_parameters
from vitlib.data.images import load_images
from vitlib.model import create_model
from vitlib.predict import confident_mistakes
from vitlib.training.history import History
from vitlib.training.loop import evaluate
from vitlib.training.recipes import FINETUNING, RECIPES
from vitlib.training.trainer import Trainer
from vitlib.weights.checkpoint import load_checkpoint, load_pretrained, versions

COMMANDS = {"pretrain": pretrain_command, "finetune": finetune_command}
FOREIGN = ("matplotlib", "ipywidgets", "papermill", "ipykernel", "IPython", "nbformat", "psutil", "yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of 8x8 pixels in three classes: 36 for training, 9 for testing."""
    folder = tmp_path_factory.mktemp("colours")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 3)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                image = torch.randint(0, 100, (8, 8, 3), generator=generator, dtype=torch.uint8)
                image[..., channel] += 120
                Image.fromarray(image.numpy()).save(folder / split / name / f"{index}.png")
    return folder


def options(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


SMALL = {"image_size": 8, "batch_size": 16, "device": "cpu", "recipe": "short", "precision": "float32"}


def call(command: str, **values: object):
    """The result of a command in this process; an error that is not meant for its user fails the test."""
    result = CliRunner().invoke(main, [command, *options(**values)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def pretrained(folder, tmp_path_factory):
    """The output and the folder of ``pretrain`` with two epochs of three steps."""
    run_dir = tmp_path_factory.mktemp("pretrain")
    result = call("pretrain", upstream=folder, preset="mini", pretrain_epochs=2, run_dir=run_dir, seed=5, **SMALL)
    assert result.exit_code == 0, result.output
    return result, run_dir


def test_pretrain_says_how_good_the_weights_are_and_where(pretrained, folder):
    result, run_dir = pretrained
    assert "pretraining" in result.stdout.lower() or "epoch 2/2: 100%" in result.stdout
    last = result.stdout.splitlines()[-1]
    pattern = (
        r"(\d+\.\d\d)% top-1 \(loss (\d+\.\d{3})\) on the 9 test images of (.*), after 2 epochs and \d+ s of "
        r"training; the weights are in (.*)\."
    )
    accuracy, loss, source, weights = re.fullmatch(pattern, last).groups()
    assert source == str(folder) and weights == str(run_dir / "pretrained.safetensors")
    model, card = load_checkpoint(weights)
    score = evaluate(model, load_images(folder, "test"), card)
    assert float(accuracy) == pytest.approx(100 * score["accuracy"], abs=0.006)
    assert float(loss) == pytest.approx(score["loss"], abs=0.0006)


def test_pretrain_writes_these_files_and_a_record_of_the_run(pretrained, folder):
    _, run_dir = pretrained
    assert {path.name for path in run_dir.iterdir()} == {
        "pretrained.safetensors", "pretrained-best.safetensors", "pretrained-history.json", "pretrained-resume.pt",
        "pretrained-resume-previous.pt",
    }  # fmt: skip
    model, card = load_checkpoint(run_dir / "pretrained.safetensors")
    record = card.record
    score = evaluate(model, load_images(folder, "test"), card)
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


def test_pretrain_called_again_says_the_same_without_training(pretrained, folder, monkeypatch):
    result, run_dir = pretrained
    before = (run_dir / "pretrained.safetensors").read_bytes()
    monkeypatch.setattr(Trainer, "augment", lambda *arguments: pytest.fail("it trains again"))
    again = call("pretrain", upstream=folder, preset="mini", pretrain_epochs=2, run_dir=run_dir, seed=5, **SMALL)
    assert again.exit_code == 0 and again.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]
    assert (run_dir / "pretrained.safetensors").read_bytes() == before


def test_pretrain_called_again_with_other_options_is_refused(pretrained, folder):
    _, run_dir = pretrained
    result = call("pretrain", upstream=folder, preset="mini", pretrain_epochs=3, run_dir=run_dir, seed=5, **SMALL)
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert "epochs=2, this one has epochs=3" in result.stderr


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
    assert second.exit_code == 0 and "after 3 epochs" in second.stdout
    assert calls == [0] * 3 + [1] * 2 + [1] * 3 + [2] * 3


def test_finetune_moves_the_encoder_of_a_file(pretrained, folder, tmp_path):
    upstream, card = load_checkpoint(pretrained[1] / "pretrained.safetensors")
    weights = {"weights": pretrained[1] / "pretrained.safetensors"}
    probe = call("finetune", downstream=folder, **weights, freeze_encoder="true", run_dir=tmp_path / "probe", **SMALL)
    assert probe.exit_code == 0, probe.output
    place = re.escape(str(tmp_path / "probe" / "finetuned.safetensors"))
    score = rf"after 1 epochs and \d+ s of training; the weights are in {place}\.$"
    assert re.search(score, probe.stdout.splitlines()[-3])
    model, probe_card = load_checkpoint(tmp_path / "probe" / "finetuned.safetensors")
    for name, tensor in upstream.vit_encoder.state_dict().items():
        assert torch.equal(model.vit_encoder.state_dict()[name], tensor), name
    assert probe_card.mean == card.mean and probe_card.record["stage"] == "linear probe"
    assert probe_card.record["upstream"] == card.record
    assert probe_card.record["test"]["source"] == f"{folder}, test split" and probe_card.record["test"]["images"] == 9
    assert probe_card.record["recipe"]["head_rate"] == FINETUNING["short"].head_rate


def test_finetune_with_shipped_weights_takes_their_image_size(folder, tmp_path):
    settings = {**SMALL, "image_size": "None", "finetune_epochs": 1, "train_steps_per_epoch": 1}
    result = call("finetune", downstream=folder, weights="shapes100-mini", run_dir=tmp_path, **settings)
    assert result.exit_code == 0, result.output
    model, card = load_checkpoint(tmp_path / "finetuned.safetensors")
    shipped, shipped_card = load_pretrained("shapes100-mini")
    assert model.config["image_size"] == 32 and card.mean == shipped_card.mean and card.preset == "mini"
    assert card.record["upstream"] == shipped_card.record and card.record["stage"] == "fine-tuning"
    first = model.vit_encoder.encoder[0].mlp[0].weight
    torch.testing.assert_close(first, shipped.vit_encoder.encoder[0].mlp[0].weight, rtol=0, atol=0.01)


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


# --- what finetune says about its errors ---------------------------------------------------------------------------


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

    def predict(model, images, card):
        assert torch.equal(images, load_images(folder, "test").images) and model.config["num_classes"] == 3
        return logits

    monkeypatch.setattr(commands, "predict", predict)
    return logits


def test_finetune_leaves_figures_of_its_errors_and_names_them(pretrained, folder, tmp_path, monkeypatch, confused):
    drawn = {}
    for name in ("confusion", "confident_mistakes"):
        draw = getattr(plots, name)
        monkeypatch.setattr(plots, name, lambda *a, name=name, draw=draw: drawn.update({name: a}) or draw(*a))
    _, figures, _ = tune(folder, tmp_path, pretrained[1])
    assert figures == (
        f"Which classes it confuses: {tmp_path / 'confusion.png'}. "
        f"Where it is most sure and wrong: {tmp_path / 'mistakes.png'}."
    )
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert picture.format == "PNG" and picture.width > 800
    _, card = load_checkpoint(tmp_path / "finetuned.safetensors")
    test = load_images(folder, "test")
    labels, predictions, classes, about = drawn["confusion"]
    assert torch.equal(labels, test.labels) and torch.equal(predictions, confused.argmax(1)) and classes == card.classes
    assert about == f"9 test images, {card.record['test']['accuracy']:.1%} top-1"
    worst = confident_mistakes(confused, test.labels)
    images, labels, shown, classes, about = drawn["confident_mistakes"]
    assert torch.equal(images, test.images[worst]) and torch.equal(labels, test.labels[worst])
    assert torch.equal(shown, confused[worst]) and classes == card.classes
    assert about == "most confident mistakes, 4 of 4: the true class and the predicted one"


def test_the_command_that_finetune_ends_with_works(pretrained, folder, tmp_path):
    run_dir = tmp_path / "my run"
    words = shlex.split(tune(folder, run_dir, pretrained[1])[-1].removeprefix("Use it: "))
    assert words == ["python", "-m", "vitlib", "predict", str(run_dir / "finetuned.safetensors"), "image.jpg"]
    result = CliRunner().invoke(main, [*words[3:-1], str(folder / "test" / "red" / "0.png")])
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 4


def test_without_mistakes_finetune_says_so_and_removes_the_old_figure(pretrained, folder, tmp_path, monkeypatch):
    test = load_images(folder, "test")
    monkeypatch.setattr(commands, "predict", lambda *arguments: 9.0 * one_hot(test.labels))
    (tmp_path / "mistakes.png").write_text("of an earlier training")
    _, figures, _ = tune(folder, tmp_path, pretrained[1])
    assert figures == (
        f"Which classes it confuses: {tmp_path / 'confusion.png'}. On the test images it makes no mistake."
    )
    assert (tmp_path / "confusion.png").exists() and not (tmp_path / "mistakes.png").exists()


def test_finetune_without_matplotlib_says_what_the_figures_need(pretrained, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    score, figures, last = tune(folder, tmp_path, pretrained[1])
    assert figures == (
        "The figures confusion.png and mistakes.png need matplotlib; install it with `pip install matplotlib`."
    )
    assert "top-1" in score and last.startswith("Use it: ") and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("broken", ["confusion", "confident_mistakes"])
def test_an_error_in_drawing_costs_one_line_and_not_the_training(
    pretrained, folder, tmp_path, monkeypatch, confused, broken
):
    def fail(*arguments):
        assert load_checkpoint(tmp_path / "finetuned.safetensors")[1].record["test"]["images"] == 9
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(plots, broken, fail)
    score, figures, _ = tune(folder, tmp_path, pretrained[1])
    assert "top-1" in score
    assert figures == "The figures confusion.png and mistakes.png could not be drawn (RuntimeError: no font)."


def test_finetune_says_what_another_image_size_means(pretrained, folder, tmp_path):
    first, *_ = tune(folder, tmp_path, pretrained[1], image_size=12)
    model, _ = load_checkpoint(tmp_path / "finetuned.safetensors")
    assert model.config["image_size"] == 12
    before, after = costs({**model.config, "image_size": 8}), costs(model.config)
    ratio = after.training_flops.total / before.training_flops.total
    kept = SMALL["batch_size"] * after.activation_bytes.total / 2**20
    assert first == (
        "The encoder knows images of 8x8 pixels (4 patches) and gets 12x12 (9 patches): its positions are "
        f"interpolated, a step takes {ratio:.2g} times the FLOPs and keeps {kept:.1f} MiB of activations for 16 images."
    )


def test_finetune_says_nothing_of_the_image_size_that_the_encoder_knows(pretrained, folder, tmp_path):
    assert len(tune(folder, tmp_path, pretrained[1])) == 3


def test_finetune_refuses_an_image_size_that_the_patches_do_not_divide(pretrained, folder, tmp_path):
    weights = pretrained[1] / "pretrained.safetensors"
    result = call("finetune", downstream=folder, weights=weights, run_dir=tmp_path, **{**SMALL, "image_size": 10})
    assert result.exit_code == 2 and result.stderr.startswith("Error: image_size=10 is not a multiple of patch_size=4")
    assert result.stdout == ""


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
    said, score, figures, _ = tune(tmp_path / "mine", tmp_path / "run", pretrained[1])
    assert said.endswith("are of one class, my cats.")
    assert "on the 12 test images" in score and "confusion.png" in figures
    _, card = load_checkpoint(tmp_path / "run" / "finetuned.safetensors")
    assert card.classes == ("$dogs$", "my cats")


BAD = [
    ("pretrain", {"batch_size": 0}, "batch_size=0 is not allowed; give a whole number of at least 1"),
    ("pretrain", {"batch_size": "many"}, "batch_size='many' is not allowed; give a whole number"),
    ("pretrain", {"batch_size": "1.5"}, "batch_size='1.5' is not allowed"),
    ("pretrain", {"batch_size": "None"}, "batch_size='None' is not allowed"),
    ("pretrain", {"pretrain_epochs": "0"}, "pretrain_epochs=0 is not allowed"),
    ("pretrain", {"train_steps_per_epoch": "some"}, "train_steps_per_epoch='some' is not allowed; .*, or None"),
    ("pretrain", {"validation_fraction": "0.95"}, "validation_fraction=0.95 is not allowed"),
    ("pretrain", {"validation_fraction": "nan"}, "validation_fraction=nan is not allowed"),
    ("pretrain", {"seed": "-1"}, "seed=-1 is not allowed"),
    ("pretrain", {"preset": "smal"}, "preset='smal' is not allowed; .*did you mean 'small'"),
    ("pretrain", {"recipe": "Modern"}, "recipe='Modern' is not allowed"),
    ("pretrain", {"norm_first": "maybe"}, "norm_first='maybe' is not allowed; give True or False"),
    ("pretrain", {"norm_first": "1"}, "norm_first='1' is not allowed; give True or False"),
    ("pretrain", {"compile": "2"}, "compile='2' is not allowed; give True or False"),
    ("pretrain", {"pooling": "max"}, "pooling='max' is not allowed; give one of cls, mean"),
    ("pretrain", {"precision": "float16"}, "precision='float16' is not allowed; give one of auto, float32, bfloat16"),
    ("pretrain", {"device": "gpu"}, "device='gpu' is not allowed"),
    ("pretrain", {"upstream": "shapes1000"}, "'shapes1000' is neither .*did you mean"),
    ("pretrain", {"image_size": "30"}, "image_size=30 is not a multiple of patch_size=4"),
    ("pretrain", {"run_dir": " "}, "run_dir=' ' is not allowed"),
    ("finetune", {"finetune_epochs": "0"}, "finetune_epochs=0 is not allowed"),
    ("finetune", {"freeze_encoder": "perhaps"}, "freeze_encoder='perhaps' is not allowed; give True or False"),
    ("finetune", {"weights": "imagenet"}, "no pretrained weights named 'imagenet'; choose one of .*shapes100-mini"),
    ("finetune", {"weights": "None"}, "weights=None"),
    ("finetune", {"weights": "absent.safetensors"}, "There is no checkpoint at absent.safetensors"),
    ("finetune", {"downstream": "nowhere"}, "'nowhere' is neither a data set nor a folder"),
]


@pytest.mark.parametrize("command, values, words", BAD, ids=[f"{c} {v}" for c, v, _ in BAD])
def test_a_bad_value_gives_one_sentence_and_exit_code_2(folder, tmp_path, command, values, words):
    source = {"upstream": folder, "preset": "mini", "pretrain_epochs": 1}
    if command == "finetune":
        source = {"downstream": folder, "weights": "random"}
    result = call(command, **{**SMALL, "run_dir": tmp_path / "run", **source, **values})
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1 and result.stderr.endswith(".\n")
    assert re.search(words, result.stderr), result.stderr
    assert not (tmp_path / "run").exists()


def test_texts_mean_what_they_mean_in_a_notebook(folder, tmp_path):
    """Words for booleans and for nothing, as papermill's command line has them."""
    values = SMALL | {"norm_first": "off", "train_steps_per_epoch": "1", "eval_steps_per_epoch": "null"}
    result = call("pretrain", upstream=folder, preset="mini", pretrain_epochs=1, run_dir=tmp_path, **values)
    assert result.exit_code == 0, result.output
    model, card = load_checkpoint(tmp_path / "pretrained.safetensors")
    assert model.config["norm_first"] is False and card.record["train_steps_per_epoch"] == 1
    assert card.record["eval_steps_per_epoch"] is None


def test_test_images_are_missed_before_training_and_not_after(tmp_path, folder):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train").symlink_to(folder / "train")
    result = call("pretrain", upstream=tmp_path / "images", preset="mini", run_dir=tmp_path / "run", **SMALL)
    assert result.exit_code == 2 and re.search(r"test .*does not exist", result.stderr)
    assert result.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_parameters_of_the_course_with_defaults_that_are_allowed(name):
    parameters = [option for option in COMMANDS[name].params if isinstance(option, click.Option)]
    context = click.Context(COMMANDS[name])
    for option in parameters:
        assert option.opts == [f"--{option.name.replace('_', '-')}"]
        assert PARAMETERS[option.name].help in option.help
    defaults = {option.name: option.get_default(context) for option in parameters}
    parsed = {
        name: PARAMETERS[name].parse(value) if isinstance(value, str) else value for name, value in defaults.items()
    }
    check_parameters(parsed)
    shown = CliRunner().invoke(main, [name, "--help"]).output
    assert set(re.findall(r"--([a-z-]+)\b", shown.split("Options:")[1])) == {
        option.name.replace("_", "-") for option in parameters
    } | {"help"}


def test_together_the_commands_have_every_parameter_that_is_not_about_notebooks():
    names = {option.name for command in COMMANDS.values() for option in command.params}
    notebooks_alone = {"dataset", "num_images", "official_weights", "seeds", "strict_checks"}
    sweeps_alone = {"patch_size", "position_embedding", "arm", "labelled_images", "steps"}
    assert names == set(PARAMETERS) - notebooks_alone - sweeps_alone


def test_help_names_the_commands():
    shown = CliRunner().invoke(main, ["--help"]).output
    for name in ("download", "export", "predict", "run", *COMMANDS):
        assert re.search(rf"^  {name} +\w", shown, re.MULTILINE), shown


def test_training_needs_no_package_that_only_notebooks_need(folder, tmp_path):
    """In a process in which those packages are not to be had."""
    command = ["pretrain", *options(upstream=folder, preset="mini", pretrain_epochs=1, run_dir=tmp_path, **SMALL)]
    code = f"import sys; sys.modules.update(dict.fromkeys({FOREIGN!r})); from vitlib.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout and (tmp_path / "pretrained.safetensors").exists()
