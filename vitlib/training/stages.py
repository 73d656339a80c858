"""The two stages of the course: pretraining and fine-tuning."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from vitlib.data.images import LabelledImages, channel_statistics, train_validation_split
from vitlib.model import create_model
from vitlib.training.devices import hardware, resolve_device, resolve_precision
from vitlib.training.distributed import current_context
from vitlib.training.history import History
from vitlib.training.loop import evaluate, fit
from vitlib.training.recipes import FINETUNING, RECIPES, Recipe, named_recipe
from vitlib.training.resume import ResumeFile
from vitlib.training.trainer import TrainingOptions
from vitlib.utils import versions
from vitlib.weights.checkpoint import ModelCard, fingerprint, save_checkpoint, transfer_encoder


@dataclass(frozen=True)
class Trained:
    """The result of a training: the model with its last weights, its card, and the history."""

    model: nn.Module
    card: ModelCard
    history: History


def pretrain(
    train: LabelledImages,
    preset: str = "small",
    *,
    recipe: str | Recipe = "modern",
    norm_first: bool = True,
    pooling: str = "cls",
    pretrain_epochs: int = 100,
    source: str | None = None,
    **options,
) -> Trained:
    """Train a new model on ``train``, and measure its progress on a part that is held out.

    Args:
        train: the upstream training images; the model takes their size and channels.
        preset: a key of ``vitlib.model.PRESETS``.
        recipe: a key of ``RECIPES``, or a recipe of your own.
        norm_first, pooling: see :class:`vitlib.model.ViTModel`.
        pretrain_epochs: passes over the training images.
        source: name of the data set, for the record.
        options: see :func:`train_stage`, and the fields of :class:`vitlib.training.trainer.TrainingOptions`.

    Raises:
        ValueError: for settings or images that do not fit, or a resume file of another training.
    """
    recipe = named_recipe(recipe, RECIPES)
    mean, std = recipe.statistics or channel_statistics(train.images)
    torch.manual_seed(options.get("seed", 0))  # initialisation
    model = create_model(
        preset,
        len(train.classes),
        image_size=_side(train),
        num_channels=train.images.shape[1],
        norm_first=norm_first,
        drop=recipe.drop,
        drop_path=recipe.drop_path,
        pooling=pooling,
    )
    card = ModelCard(train.classes, mean, std, preset, {"stage": "pretraining", "source": source})
    return train_stage("pretrained", model, train, card, recipe, epochs=pretrain_epochs, **options)


def finetune(
    pretrained: nn.Module,
    card: ModelCard,
    train: LabelledImages,
    *,
    recipe: str | Recipe = "modern",
    freeze_encoder: bool = False,
    finetune_epochs: int = 1,
    source: str | None = None,
    **options,
) -> Trained:
    """Copy the encoder of ``pretrained``, and only that, and train it on a new task with a new head.

    Args:
        pretrained: the upstream model, plain or wrapped; it does not change.
        card: the upstream model's card; its normalisation is kept, since the encoder knows no other.
        train: the downstream training images. If they are larger or smaller than the upstream ones, the encoder's
            positions are interpolated (:func:`vitlib.model.interpolate_positions`).
        recipe: a key of ``FINETUNING``, or a recipe of your own.
        freeze_encoder: True trains the head alone (a linear probe).
        finetune_epochs: passes over the training images.
        source: name of the data set, for the record.
        options: see :func:`train_stage`, and the fields of :class:`vitlib.training.trainer.TrainingOptions`.

    Raises:
        ValueError: for images that are not square or cannot be cut into the encoder's patches, a model that holds no
            ViT, or a resume file of another training.
    """
    recipe = named_recipe(recipe, FINETUNING)
    model = transfer_encoder(
        pretrained, len(train.classes), image_size=_side(train), drop=recipe.drop, drop_path=recipe.drop_path
    )
    model.vit_encoder.requires_grad_(not freeze_encoder)
    record = {"stage": "linear probe" if freeze_encoder else "fine-tuning", "source": source, "upstream": card.record}
    card = ModelCard(train.classes, card.mean, card.std, card.preset, record)
    options = {"description": "fine-tuning"} | options
    return train_stage("finetuned", model, train, card, recipe, epochs=finetune_epochs, **options)


def record_test(trained: Trained, test: LabelledImages, source: str, checkpoint: str | Path | None = None) -> Trained:
    """Score the final weights on the test split, once, with the training's batch size, and store that in their card.

    Args:
        source: name of the test set, for the record; CIFAR and ciFAIR differ by some points.
        checkpoint: the file to write card and weights to, if any.

    Returns:
        ``trained`` with ``test`` in its card's record: source, images, and what
        :func:`vitlib.training.loop.evaluate` returns.
    """
    score = evaluate(trained.model, test, trained.card, trained.card.record["batch_size"])
    result = {"source": f"{source}, test split", "images": len(test), **score}
    card = replace(trained.card, record=trained.card.record | {"test": result})
    if checkpoint is not None and current_context().is_first:
        save_checkpoint(checkpoint, trained.model, card)
    return replace(trained, card=card)


def train_stage(
    name: str,
    model: nn.Module,
    train: LabelledImages,
    card: ModelCard,
    recipe: Recipe,
    *,
    validation_fraction: float = 0.1,
    device: str = "auto",
    run_dir: str | Path | None = None,
    resume: bool = False,
    **options,
) -> Trained:
    """Split the data, train, and write files after every epoch: what both stages share.

    Args:
        name: of the files, such as ``pretrained``.
        validation_fraction: share of ``train`` that is never trained on.
        device: see :func:`vitlib.training.devices.resolve_device`.
        run_dir: folder for ``<name>.safetensors`` (last weights), ``<name>-best.safetensors`` (best by validation
            accuracy) and ``<name>-history.json``; None to write nothing.
        resume: True, with a run_dir, also keeps ``<name>-resume.pt`` there, and resumes an interrupted call with the
            same settings; on a CPU the weights end up the same to the last bit.
    """
    run_dir = None if run_dir is None else Path(run_dir).expanduser()
    device = resolve_device(device)
    model = model.to(device)
    settings = asdict(TrainingOptions(**options))
    settings |= {"precision": resolve_precision(settings["precision"], device), "recipe": asdict(recipe)}
    settings |= {"validation_fraction": validation_fraction, "processes": current_context().world_size}
    del settings["description"], settings["progress"]
    resume_file = None
    if resume and run_dir is not None:
        identity = {  # a refusal names the first that differs, so causes stand before what they change
            "stage": card.record["stage"],
            "config": model.config,
            "images": fingerprint(train.images, train.labels),
            "normalisation": [card.mean, card.std],
            "device": device.type,
            **settings,
            "start": fingerprint(*model.state_dict().values()),
        }
        resume_file = ResumeFile(run_dir / f"{name}-resume.pt", identity)
    train, validation = train_validation_split(train, validation_fraction, settings["seed"])
    if run_dir is not None and current_context().is_first:  # now, so that it does not fail after the first epoch
        run_dir.mkdir(parents=True, exist_ok=True)

    def described(history: History) -> ModelCard:
        sizes = {"train_images": len(train), "validation_images": len(validation)}
        record = {**settings, **sizes, "epochs_run": history.epochs, "hardware": hardware(device)}
        return replace(card, record=card.record | record | {"versions": versions()})

    def save(model: nn.Module, history: History) -> None:
        if run_dir is None or not current_context().is_first:
            return
        save_checkpoint(run_dir / f"{name}.safetensors", model, described(history))
        history.save(run_dir / f"{name}-history.json")
        # after Ctrl-C in the middle of an epoch the weights have not been validated
        if not history.interrupted and history.best is history.epochs[-1]:
            save_checkpoint(run_dir / f"{name}-best.safetensors", model, described(history))

    history = fit(model, train, validation, card, recipe, after_epoch=save, resume=resume_file, **options)
    if history.interrupted:
        save(model, history)
    return Trained(model.eval(), described(history), history)


def _side(data: LabelledImages) -> int:
    """Return the side of the images in pixels; they must be square."""
    height, width = data.images.shape[-2:]
    if height != width:
        raise ValueError(
            f"{data} are not square; load them with image_size, for instance image_size={min(height, width)}."
        )
    return width
