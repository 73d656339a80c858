"""The training commands, ``python -m vitlib pretrain`` and ``finetune``: the notebooks' parameters as options.

They are also what ``torchrun`` starts, and import only torch, torchvision, tqdm, click and safetensors and what these
bring along, so that they run on machines that have nothing else.
"""

import shlex
import sys
from pathlib import Path

import click
import torch

from vitlib.costs import costs
from vitlib.course.parameters import PARAMETERS, Parameter
from vitlib.data.images import LabelledImages, channel_statistics, load_images
from vitlib.model import PRESETS, ViTModel, create_model
from vitlib.predict import confident_mistakes
from vitlib.training.distributed import current_context, end_distributed, init_distributed
from vitlib.training.loop import predict
from vitlib.training.recipes import FINETUNING, RECIPES
from vitlib.training.stages import Trained, finetune, pretrain, record_test
from vitlib.utils import atomic_write
from vitlib.weights.checkpoint import ModelCard, load_weights, with_image_size

DATA = {"data_dir": None, "image_size": None}
TRAINING = {
    "batch_size": 128,
    "train_steps_per_epoch": None,
    "eval_steps_per_epoch": None,
    "validation_fraction": 0.1,
    "seed": 0,
    "device": "auto",
    "precision": "auto",
    "compile": False,
}


def course_options(**defaults: object):
    """Options for a command: the notebooks' parameters of these names, with these defaults. They are checked as the
    notebooks check them, with the same sentences."""

    def convert(parameter: Parameter):
        def converted(context, option, text):
            return parameter.check(parameter.parse(text) if isinstance(text, str) else text)

        return converted

    def decorate(command):
        for name, default in reversed(defaults.items()):
            parameter = PARAMETERS[name]
            help = f"{parameter.help} [{'|'.join(parameter.choices) or parameter.type.__name__}, default {default}]"
            flag = f"--{name.replace('_', '-')}"
            option = click.option(
                flag, name, metavar="", type=str, default=default, callback=convert(parameter), help=help
            )
            command = option(command)
        return command

    return decorate


@click.command("pretrain")
@course_options(
    upstream="cifair100", preset="small", recipe="modern", norm_first=True, pooling="cls", pretrain_epochs=100,
    **TRAINING, **DATA, run_dir="runs/pretrain",
)  # fmt: skip
def pretrain_command(upstream, preset, run_dir, data_dir, image_size, **options) -> None:
    """Train a new model and score its last weights on the test split, once.

    RUN_DIR gets pretrained.safetensors with the record of the run, pretrained-history.json and the file from which
    the same command, called again, takes an interrupted training up.
    """
    options["device"] = init_distributed(options["device"])
    train, test = _splits(upstream, data_dir, image_size or PRESETS[preset]["image_size"])
    trained = pretrain(train, preset, run_dir=run_dir, resume=True, source=upstream, **options)
    _finish(trained, test, upstream, Path(run_dir) / "pretrained.safetensors")


@click.command("finetune")
@course_options(
    downstream="cifair10", weights="cifar100-small", recipe="modern", freeze_encoder=False, finetune_epochs=1,
    **TRAINING, **DATA, run_dir="runs/finetune",
)  # fmt: skip
def finetune_command(downstream, weights, run_dir, data_dir, image_size, recipe, **options) -> None:
    """Move the encoder of WEIGHTS to other images, train it there and score it on their test split, once.

    With --weights random a new encoder of the small preset takes its place, trained from scratch as in pretraining:
    the control. RUN_DIR gets finetuned.safetensors and what belongs to it, and, where matplotlib is installed,
    confusion.png and mistakes.png, the test images that the model is most sure of and wrong about.
    """
    if weights is None:
        raise ValueError("weights=None names no encoder; give a shipped name, a checkpoint file, or random.")
    options["device"] = init_distributed(options["device"])
    if weights == "random":
        train, test = _splits(downstream, data_dir, image_size or PRESETS["small"]["image_size"])
        model, card = _new_encoder(train, options["seed"])
        recipe = (FINETUNING if options["freeze_encoder"] else RECIPES)[recipe]
    else:
        model, card = load_weights(weights)
        model = _for_images_of(model, image_size or model.config["image_size"], options["batch_size"])
        train, test = _splits(downstream, data_dir, model.config["image_size"])
    trained = finetune(model, card, train, recipe=recipe, run_dir=run_dir, resume=True, source=downstream, **options)
    is_first = current_context().is_first
    checkpoint = Path(run_dir) / "finetuned.safetensors"
    trained = _finish(trained, test, downstream, checkpoint)
    if is_first:
        click.echo(_draw_errors(trained, test, checkpoint.parent))
        click.echo(f"Use it: {shlex.join(['python', '-m', 'vitlib', 'predict', str(checkpoint)])} image.jpg")


def _new_encoder(train: LabelledImages, seed: int) -> tuple[ViTModel, ModelCard]:
    torch.manual_seed(seed)
    model = create_model("small", 1, image_size=train.images.shape[-1], num_channels=train.images.shape[1])
    return model, ModelCard(("none",), *channel_statistics(train.images), "small", {"stage": "random"})


def _for_images_of(model: ViTModel, image_size: int, batch_size: int) -> ViTModel:
    """The model for images of that size; where this is not its own, a line says what the change means."""
    other = with_image_size(model, image_size)
    if other is not model and current_context().is_first:
        old, before, after = model.config["image_size"], costs(model.config), costs(other.config, batch_size)
        ratio = after.training_flops.total / batch_size / before.training_flops.total
        click.echo(
            f"The encoder knows images of {old}x{old} pixels ({before.patches} patches) and gets "
            f"{image_size}x{image_size} ({after.patches} patches): its positions are interpolated, a step takes "
            f"{ratio:.2g} times the FLOPs and keeps {after.activation_bytes.total / 2**20:,.1f} MiB of activations for "
            f"{batch_size} images."
        )
    return other


def _splits(source: str, data_dir, image_size: int) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images, and only the first process shows how they are loaded."""
    options = {"data_dir": data_dir, "image_size": image_size, "progress": current_context().is_first}
    return load_images(source, "train", **options), load_images(source, "test", **options)


def _finish(trained: Trained, test: LabelledImages, source: str, checkpoint: Path) -> Trained:
    """Score the last weights, write the result into their file and say it. Returns them with the score."""
    if trained.history.interrupted:
        end_distributed()
        sys.exit(130)
    trained.card.record["command"] = shlex.join(["python", "-m", "vitlib", *sys.argv[1:]])
    trained = record_test(trained, test, source, checkpoint)
    if current_context().is_first:
        score, seconds = trained.card.record["test"], sum(epoch["seconds"] for epoch in trained.history.epochs)
        click.echo(
            f"{score['accuracy']:.2%} top-1 (loss {score['loss']:.3f}) on the {score['images']} test images of "
            f"{source}, after {len(trained.history.epochs)} epochs and {seconds:.0f} s of training; "
            f"the weights are in {checkpoint}."
        )
    end_distributed()
    return trained


def _draw_errors(trained: Trained, test: LabelledImages, folder: Path) -> str:
    """Draw confusion.png and mistakes.png into ``folder``. Returns what is to be said about them: the training is over
    and stored by now, so whatever goes wrong here is worth a sentence and no more."""
    confusion, mistakes = folder / "confusion.png", folder / "mistakes.png"
    try:
        import matplotlib

        matplotlib.use("agg")  # files need no window, which a remote machine might not be able to open
        from vitlib import plots

        logits = predict(trained.model, test.images, trained.card)
        about = f"{len(test)} test images, {trained.card.record['test']['accuracy']:.1%} top-1"
        _save(plots.confusion(test.labels, logits.argmax(1), test.classes, about), confusion)
        worst = confident_mistakes(logits, test.labels)
        mistakes.unlink(missing_ok=True)  # of an earlier training
        if not len(worst):
            return f"Which classes it confuses: {confusion}. On the test images it makes no mistake."
        shown = test.subset(worst)
        count = int((logits.argmax(1) != test.labels).sum())
        about = f"most confident mistakes, {len(worst)} of {count}: the true class and the predicted one"
        _save(plots.confident_mistakes(shown.images, shown.labels, logits[worst], test.classes, about), mistakes)
    except ModuleNotFoundError as error:
        return (
            f"The figures confusion.png and mistakes.png need {error.name}; install it with `pip install {error.name}`."
        )
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        return f"The figures confusion.png and mistakes.png could not be drawn ({type(error).__name__}: {reason:.200})."
    return f"Which classes it confuses: {confusion}. Where it is most sure and wrong: {mistakes}."


def _save(figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
