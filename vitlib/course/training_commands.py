"""What the commands ``pretrain`` and ``finetune`` do: load, train, score once, and look at the errors.

This module needs only torch, torchvision, tqdm, click and safetensors, and what these bring along.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

import click
import torch

from vitlib import training
from vitlib.costs import preset_config
from vitlib.course import own_images
from vitlib.data import LabelledImages, channel_statistics, load_images, train_validation_split
from vitlib.data.folders import find_splits
from vitlib.model import PRESETS, ViTModel, create_model
from vitlib.training import FINETUNING, RECIPES, Trained, record_test
from vitlib.training.distributed import current_context, end_distributed, init_distributed
from vitlib.training.resume import OtherTraining
from vitlib.utils import alone_in, first_line, printable
from vitlib.weights import ModelCard, load_weights

FULL = re.compile("out of memory|not enough memory|can't allocate memory")  # words of GPUs, of Windows and of Linux


def pretrain(upstream, preset, run_dir, data_dir, image_size, device, **options) -> None:
    """Train a new model, and score it; the arguments are parameters of the course."""
    _check_apart(upstream, run_dir)
    device = init_distributed(device)
    image_size = image_size or PRESETS[preset]["image_size"]
    preset_config(preset, 1, image_size=image_size)  # a size that does not fit is refused before anything is loaded
    train, test = _load_splits(upstream, data_dir, image_size)
    with _alone_in(run_dir), _in_one_sentence(options["compile"]):
        trained = training.pretrain(
            train, preset, run_dir=run_dir, resume=True, source=upstream, device=device, **options
        )
        _score(trained, test, upstream, Path(run_dir) / "pretrained.safetensors")


def finetune(
    downstream, weights, run_dir, data_dir, image_size, recipe, batch_size, finetune_epochs, device, **options
) -> None:
    """Fine-tune an encoder, and score it; the arguments are parameters of the course.

    Args:
        batch_size, finetune_epochs: None lets the number of images decide.
    """
    if weights is None:
        raise ValueError("weights=None names no encoder; give a shipped name, a checkpoint file, or random.")
    _check_apart(downstream, run_dir)
    device = init_distributed(device)
    if weights == "random":
        image_size = image_size or PRESETS["small"]["image_size"]
        preset_config("small", 1, image_size=image_size)
        train, test = _load_splits(downstream, data_dir, image_size)
        model, card = _random_encoder(train, options["seed"])
        recipe = (FINETUNING if options["freeze_encoder"] else RECIPES)[recipe]
    else:
        model, card = load_weights(weights, image_size)
        train, test = _load_splits(downstream, data_dir, model.config["image_size"], model.config["num_channels"])
    learned_from = len(train_validation_split(train, options["validation_fraction"], options["seed"])[0])
    batch_size = batch_size or own_images.batch_size_for(learned_from)
    if finetune_epochs is None:
        finetune_epochs = 1 if options["train_steps_per_epoch"] else own_images.epochs_for(learned_from, batch_size)
    names = ", ".join(map(printable, train.classes[:5])) + ", ..." * (len(train.classes) > 5)
    _say(
        f"{learned_from:,} images of {len(train.classes)} classes ({names}) to learn from: "
        f"batch_size={batch_size}, finetune_epochs={finetune_epochs}."
    )

    train_model = partial(
        training.finetune, model, card, train, recipe=recipe, batch_size=batch_size, finetune_epochs=finetune_epochs,
        run_dir=run_dir, resume=True, source=downstream, device=device, **options,
    )  # fmt: skip
    is_first, checkpoint = current_context().is_first, Path(run_dir) / "finetuned.safetensors"
    with _alone_in(run_dir), _in_one_sentence(options["compile"]):
        try:
            trained = train_model()
        except OtherTraining as error:
            if is_first:
                difference, place = error.args[1], _set_aside(Path(run_dir))
                _say(f"{run_dir} held a training {difference}: that training is now in {place}, and a new one begins.")
            trained = train_model()
        trained = _score(trained, test, downstream, checkpoint)
        if is_first:
            click.echo(_look_at_errors(trained, test, checkpoint.parent))
    if is_first:
        # as_posix: shlex would put backslashes into quotes, which Windows keeps
        line = shlex.join(["python", "-m", "vitlib", "predict", checkpoint.as_posix()])
        click.echo(f"Use it: {line} image.jpg")


def _say(sentence: str) -> None:
    """Print a sentence, of several processes only in the first."""
    if current_context().is_first:
        click.echo(sentence)


def _check_apart(source: str, run_dir: str) -> None:
    """Refuse a run's folder inside a folder of classes, where it would count as a class next time."""
    folder = Path(source).resolve()
    if folder.is_dir() and Path(run_dir).resolve().is_relative_to(folder) and find_splits(folder)[0] == folder:
        raise ValueError(f"run_dir={run_dir} is among the classes in {folder}; choose one outside of it.")


def _load_splits(
    source: str, data_dir: str | None, image_size: int, num_channels: int = 3
) -> tuple[LabelledImages, LabelledImages]:
    """Load both splits; of several processes the first says what it leaves out."""
    is_first = current_context().is_first
    options = {"data_dir": data_dir, "image_size": image_size, "num_channels": num_channels, "progress": is_first}
    with nullcontext() if is_first else redirect_stdout(None):
        return load_images(source, "train", **options), load_images(source, "test", **options)


def _random_encoder(train: LabelledImages, seed: int) -> tuple[ViTModel, ModelCard]:
    torch.manual_seed(seed)
    model = create_model("small", 1, image_size=train.images.shape[-1], num_channels=train.images.shape[1])
    return model, ModelCard(("none",), *channel_statistics(train.images), "small", {"stage": "random"})


def _alone_in(run_dir: str) -> AbstractContextManager:
    """Keep other trainings out of a run's folder; of several processes the first does that."""
    return alone_in(run_dir, "training", "--run-dir") if current_context().is_first else nullcontext()


@contextmanager
def _in_one_sentence(compile: bool) -> Iterator[None]:
    """Turn the errors of a full memory and of torch.compile, which are pages long, into a sentence."""
    try:
        yield
    except Exception as error:
        if FULL.search(str(error)):
            raise ValueError(
                "The memory of the device is full; give a smaller --batch-size, such as 16, or a smaller --image-size."
            ) from error
        if not (compile and type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))):
            raise
        way_out = "install a C++ compiler such as g++, or leave it out"
        raise ValueError(f"compile=True does not work here ({first_line(error):.80}); {way_out}.") from error


def _set_aside(run_dir: Path) -> Path:
    """Move the files of an earlier fine-tuning into a new folder below ``run_dir``, and return it."""
    folder = next(folder for number in range(1, 10**6) if not (folder := run_dir / f"earlier-{number}").exists())
    folder.mkdir()
    for name in ("finetuned*", "confusion.png", "mistakes.png", "predictions.csv"):
        for path in list(run_dir.glob(name)):
            path.rename(folder / path.name)
    return folder


def _score(trained: Trained, test: LabelledImages, source: str, checkpoint: Path) -> Trained:
    """Score the last weights, write the result into their file, print it, and leave the other processes.

    Returns:
        The weights with the score in their card.
    """
    if trained.history.interrupted:
        end_distributed()
        sys.exit(130)  # Ctrl-C: nothing is scored
    trained.card.record["command"] = shlex.join(["python", "-m", "vitlib", *sys.argv[1:]])
    trained = record_test(trained, test, source, checkpoint)
    score, epochs = trained.card.record["test"], trained.history.epochs
    passes = "1 epoch" if len(epochs) == 1 else f"{len(epochs)} epochs"
    low, high = own_images.wilson_interval(score["accuracy"], score["images"])
    kept = ""
    if "accuracy_kept" in score:
        kept = f", {score['accuracy_kept']:.2%} on the {score['images_kept']:,} of them that ciFAIR kept"
    _say(
        f"{score['accuracy']:.2%} top-1 (95 % interval {low:.1%} to {high:.1%}, chance "
        f"{own_images.chance(test.labels):.1%}, loss {score['loss']:.3f}) on the {score['images']:,} test images of "
        f"{source}{kept}, after {len(trained.history.steps)} steps in {passes} and "
        f"{sum(epoch['seconds'] for epoch in epochs):.0f} s of training; the weights are in {checkpoint}."
    )
    end_distributed()
    return trained


def _look_at_errors(trained: Trained, test: LabelledImages, folder: Path) -> str:
    """Write predictions.csv and draw the figures of errors. Return a sentence about them.

    The training is over and stored by now, so an error in drawing costs no more than the sentence.
    """
    logits = training.predict(trained.model, test.images, trained.card, trained.card.record["batch_size"])
    table = folder / "predictions.csv"
    own_images.write_predictions(table, test, logits)
    try:
        said = own_images.draw_errors(folder, test, logits)
    except Exception as error:
        said = f"The figures of the errors could not be drawn ({error!r:.200})."
    return f"{said} All predictions: {table}."
