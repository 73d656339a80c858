"""Training: one loop, two recipes, and the two stages of the course, pretraining and fine-tuning."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import CIFAR10_MEAN, CIFAR10_STD, PUBLISHED, Augmentation, normalise
from .checkpoint import Card, save_checkpoint, transfer_encoder, unwrap, versions
from .data import LabelledImages, channel_statistics, train_validation_split
from .files import written_whole
from .model import create_model
from .progress import progress_bar


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, apart from how long and on what.

    Args:
        optimizer: "sgd" or "adamw".
        learning_rate: the highest rate of the schedule.
        weight_decay: per step; with AdamW not applied to biases, norms, CLS and positions.
        schedule: "constant", or "cosine" down to zero at the last step.
        warmup: share of all steps in which the rate rises linearly from zero.
        momentum: of SGD.
        clip: largest norm of the gradient, or None.
        label_smoothing: probability mass that the target spreads over all classes.
        drop: dropout probability in the model.
        head_rate: the classifier's learning rate as a multiple of the encoder's.
        position_rate: the same for CLS and positions.
        augmentation: what is done to training images.
        statistics: (mean, std) to normalise with; None measures them on the training images.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    schedule: str = "constant"
    warmup: float = 0.0
    momentum: float = 0.9
    clip: float | None = None
    label_smoothing: float = 0.0
    drop: float = 0.0
    head_rate: float = 1.0
    position_rate: float = 1.0
    augmentation: Augmentation = Augmentation()
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None


# "published" is the small published system to the letter; "modern" is what the field has done since; "short" is for
# runs of minutes: there a crop costs more than it gives, and positions have to leave their small start quickly.
RECIPES = {
    "published": Recipe(
        optimizer="sgd",
        learning_rate=0.01,
        weight_decay=1e-4,
        drop=0.1,
        augmentation=PUBLISHED,
        statistics=(CIFAR10_MEAN, CIFAR10_STD),
    ),
    "modern": Recipe(
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.05,
        schedule="cosine",
        warmup=0.05,
        clip=1.0,
        augmentation=Augmentation(padding=4, flip=0.5, hole=0),
    ),
}
RECIPES["short"] = replace(
    RECIPES["modern"], augmentation=Augmentation(padding=0, flip=0.5, hole=0), position_rate=15.0
)
# The pretrained encoder is to move little, its new head a lot.
FINETUNING = {
    "published": RECIPES["published"],
    "modern": replace(RECIPES["modern"], learning_rate=5e-4, warmup=0.1, head_rate=10.0),
    "short": replace(RECIPES["short"], warmup=0.1, head_rate=10.0, position_rate=1.0),
}


@dataclass
class History:
    """What happened during training.

    Args:
        steps: one dict per optimiser step: step, epoch, loss, learning_rate.
        epochs: one dict per epoch: epoch, step, train_loss, train_accuracy, validation_loss, validation_accuracy,
            seconds, images_per_second. Accuracies are shares from 0 to 1; training figures are those of the augmented
            images, averaged while the model was changing.
        interrupted: True if Ctrl-C ended the training early.
    """

    steps: list[dict] = field(default_factory=list)
    epochs: list[dict] = field(default_factory=list)
    interrupted: bool = False

    @property
    def best(self) -> dict:
        """The epoch of the highest validation accuracy, the earliest if several share it."""
        return max(self.epochs, key=lambda epoch: epoch["validation_accuracy"])

    def save(self, path: str | Path) -> None:
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: str | Path) -> "History":
        return cls(**json.loads(Path(path).read_text()))


@dataclass(frozen=True)
class Trained:
    """What training leaves: the model with its last weights, its card, and the history."""

    model: nn.Module
    card: Card
    history: History


def resolve_device(device: str = "auto") -> torch.device:
    """The device to compute on: ``auto`` is the GPU where there is one, else the CPU; other names mean themselves.

    Raises:
        ValueError: for a device that this machine does not have.
    """
    if device == "auto":
        accelerated = torch.accelerator.is_available()
        return torch.accelerator.current_accelerator() if accelerated else torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={device!r} is not to be had on this machine; choose auto or cpu.") from error


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, card: Card, batch_size: int = 256) -> Tensor:
    """Logits ``[N, num_classes]``, float32 on the CPU, for uint8 images ``[N, C, H, W]``.

    The model is switched to eval mode for this and back to the mode it was in.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = [
        model(normalise(batch.to(device), card.mean, card.std)).float().cpu() for batch in images.split(batch_size)
    ]
    model.train(was_training)
    return torch.cat(logits)


def evaluate(
    model: nn.Module, data: LabelledImages, card: Card, batch_size: int = 256, steps: int | None = None
) -> dict[str, float]:
    """Mean cross-entropy ("loss") and top-1 accuracy as a share ("accuracy") over ``data``.

    With ``steps``, only that many batches are looked at, evenly spread over the data, since folders come sorted by
    class.
    """
    if steps is not None and steps * batch_size < len(data):
        data = data.subset(torch.linspace(0, len(data) - 1, steps * batch_size).long())
    logits = predict(model, data.images, card, batch_size)
    labels = data.labels.cpu()
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": (logits.argmax(1) == labels).float().mean().item(),
    }


def fit(
    model: nn.Module,
    train: LabelledImages,
    validation: LabelledImages,
    card: Card,
    recipe: Recipe,
    *,
    epochs: int,
    batch_size: int = 128,
    train_steps_per_epoch: int | None = None,
    eval_steps_per_epoch: int | None = None,
    seed: int = 0,
    description: str = "training",
    progress: bool = True,
    after_epoch: Callable[[History], None] = lambda history: None,
) -> History:
    """Train ``model`` in place and return what happened. The images are moved to the model's device and stay there.

    Args:
        card: gives the normalisation.
        epochs: passes over the training images.
        batch_size: images per optimiser step; the last batch of an epoch may be smaller.
        train_steps_per_epoch, eval_steps_per_epoch: at most so many batches per epoch; None for all.
        seed: decides the order of the images, the augmentation and dropout.
        after_epoch: called after every epoch with the history so far; this is where files are written.

    Ctrl-C ends the training: the model keeps the weights it has, ``interrupted`` is set in the history, and the epoch
    that was cut short is not part of it.

    Raises:
        ValueError: for arguments out of range.
    """
    _check_lengths(locals(), "epochs", "batch_size", "train_steps_per_epoch", "eval_steps_per_epoch")
    if not len(train) or not len(validation):
        raise ValueError(
            f"{len(train)} training and {len(validation)} validation images are too few; give one of each."
        )
    train = train.to(next(model.parameters()).device)
    steps = math.ceil(len(train) / batch_size)  # per epoch
    if train_steps_per_epoch is not None:
        steps = min(steps, train_steps_per_epoch)
    optimizer = build_optimizer(model, recipe)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_factor, recipe, total=epochs * steps))
    generator = torch.Generator().manual_seed(seed)  # order and augmentation
    torch.manual_seed(seed)  # dropout

    def train_step(batch: Tensor) -> tuple[Tensor, Tensor, float]:
        images = recipe.augmentation(train.images[batch], card.mean, card.std, generator)
        rate = scheduler.get_last_lr()[0]
        loss, correct = _optimise(model, images, train.labels[batch], recipe, optimizer)
        scheduler.step()
        return loss, correct, rate

    history = History()
    try:
        for epoch in range(1, epochs + 1):
            batches = torch.randperm(len(train), generator=generator).split(batch_size)[:steps]
            title = f"{description}, epoch {epoch}/{epochs}"
            model.train()
            with progress_bar(description=title, total=sum(map(len, batches)), unit=" images", show=progress) as bar:
                step_records, record = _train_epoch(train_step, batches, bar)
                score = evaluate(model, validation, card, batch_size, eval_steps_per_epoch)
                record |= {f"validation_{name}": value for name, value in score.items()}
                bar.set_postfix_str(
                    "loss {train_loss:.3f}, validation accuracy {validation_accuracy:.1%}".format(**record)
                )
            history.steps += [
                {"step": step, "epoch": epoch, **values}
                for step, values in enumerate(step_records, start=len(history.steps) + 1)
            ]
            history.epochs.append({"epoch": epoch, "step": len(history.steps), **record})
            after_epoch(history)
    except KeyboardInterrupt:
        history.interrupted = True
        print(f"Stopped by Ctrl-C in epoch {len(history.epochs) + 1}; the weights so far are kept.")
    return history


def _optimise(model, images, labels, recipe: Recipe, optimizer) -> tuple[Tensor, Tensor]:
    """One optimiser step. Returns the mean loss and the number of right answers, both still on the device."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    optimizer.zero_grad()
    loss.backward()
    if recipe.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def _train_epoch(train_step: Callable, batches: Sequence[Tensor], bar) -> tuple[list[dict], dict]:
    """One pass over ``batches`` (index tensors): a record of each step, and the averages over the epoch.

    Losses stay on the device until the end: reading one waits for the device, so that is done once a second at most.
    """
    started = shown = time.perf_counter()
    losses, rates, correct, seen = [], [], 0, 0
    for batch in batches:
        loss, hits, rate = train_step(batch)
        losses.append(loss)
        rates.append(rate)
        correct += hits
        seen += len(batch)
        bar.update(len(batch))
        if time.perf_counter() - shown > 1:
            shown = time.perf_counter()
            bar.set_postfix_str(f"loss {loss.item():.3f}, accuracy {correct.item() / seen:.1%}", refresh=False)
    losses = torch.stack(losses).tolist()
    seconds = time.perf_counter() - started
    records = [{"loss": loss, "learning_rate": rate} for loss, rate in zip(losses, rates, strict=True)]
    return records, {
        "train_loss": sum(loss * len(batch) for loss, batch in zip(losses, batches, strict=True)) / seen,
        "train_accuracy": correct.item() / seen,
        "seconds": seconds,
        "images_per_second": seen / seconds,
    }


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over all parameters that are to be trained.

    AdamW decays the weights of linear layers and convolutions only: biases, norms, CLS and positions have no scale
    that decay could keep small without harm. SGD decays everything, as the published system does.
    """
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in unwrap(model).named_parameters():
        if not parameter.requires_grad:
            continue
        is_position = name.endswith(("cls_token", "position_embedding"))
        decays = recipe.optimizer == "sgd" or (parameter.ndim > 1 and not is_position)
        factor = recipe.position_rate if is_position else recipe.head_rate if "classifier" in name else 1.0
        group = recipe.learning_rate * factor, recipe.weight_decay if decays else 0.0
        groups.setdefault(group, []).append(parameter)
    groups = [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum, fused=True)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    raise ValueError(f"optimizer={recipe.optimizer!r} is not known; choose sgd or adamw.")


def rate_factor(recipe: Recipe, step: int, total: int) -> float:
    """The share of the highest learning rate to use in optimiser step ``step`` (from 0) of ``total``."""
    warmup = round(recipe.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    raise ValueError(f"schedule={recipe.schedule!r} is not known; choose constant or cosine.")


def pretrain(
    train: LabelledImages,
    preset: str = "small",
    *,
    recipe: str | Recipe = "modern",
    norm_first: bool = True,
    pretrain_epochs: int = 100,
    batch_size: int = 128,
    train_steps_per_epoch: int | None = None,
    eval_steps_per_epoch: int | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    device: str = "auto",
    run_dir: str | Path | None = None,
    source: str | None = None,
    progress: bool = True,
) -> Trained:
    """Train a new model on ``train``, part of which is set aside to measure progress.

    Args:
        train: the upstream training images; their size and channels decide those of the model.
        preset: a key of ``vitlib.model.PRESETS``.
        recipe: a key of ``RECIPES``, or a recipe of your own.
        norm_first: False for post-norm blocks, as in the published system.
        pretrain_epochs, batch_size, train_steps_per_epoch, eval_steps_per_epoch, seed: see :func:`fit`.
        validation_fraction: share of ``train`` that is never trained on.
        device: see :func:`resolve_device`.
        run_dir: where to write ``pretrained.safetensors`` (last weights), ``pretrained-best.safetensors`` (best by
            validation accuracy) and ``pretrained-history.json`` after every epoch; None to write nothing.
        source: name of the data set, for the record.

    Raises:
        ValueError: for arguments out of range.
    """
    recipe = _named_recipe(recipe, RECIPES)
    mean, std = recipe.statistics or channel_statistics(train.images)
    torch.manual_seed(seed)  # initialisation
    model = create_model(
        preset,
        len(train.classes),
        image_size=train.images.shape[-1],
        num_channels=train.images.shape[1],
        norm_first=norm_first,
        drop=recipe.drop,
    )
    card = Card(train.classes, mean, std, preset, {"stage": "pretraining", "source": source})
    lengths = {"train_steps_per_epoch": train_steps_per_epoch, "eval_steps_per_epoch": eval_steps_per_epoch}
    return _train_stage(
        "pretrained", model, train, card, recipe, validation_fraction, device, run_dir,
        epochs=pretrain_epochs, batch_size=batch_size, **lengths, seed=seed, progress=progress,
    )  # fmt: skip


def finetune(
    pretrained: nn.Module,
    card: Card,
    train: LabelledImages,
    *,
    recipe: str | Recipe = "modern",
    freeze_encoder: bool = False,
    finetune_epochs: int = 1,
    batch_size: int = 128,
    train_steps_per_epoch: int | None = None,
    eval_steps_per_epoch: int | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    device: str = "auto",
    run_dir: str | Path | None = None,
    source: str | None = None,
    description: str = "fine-tuning",
    progress: bool = True,
) -> Trained:
    """Move the encoder of ``pretrained``, and only that, to a new task and train it there with a new head.

    Args:
        pretrained: the upstream model, plain or wrapped by DataParallel, DistributedDataParallel or torch.compile; it
            is left as it is.
        card: the upstream model's card; its normalisation is kept, since the encoder knows no other.
        train: the downstream training images, of the upstream images' size.
        recipe: a key of ``FINETUNING``, or a recipe of your own.
        freeze_encoder: True trains the head alone (a linear probe).
        finetune_epochs, batch_size, train_steps_per_epoch, eval_steps_per_epoch, seed: see :func:`fit`.
        run_dir: as in :func:`pretrain`, with ``finetuned`` in the names.

    Raises:
        ValueError: for arguments out of range, images of another size, or a model that holds no ViT.
    """
    recipe = _named_recipe(recipe, FINETUNING)
    model = transfer_encoder(pretrained, len(train.classes), drop=recipe.drop)
    model.vit_encoder.requires_grad_(not freeze_encoder)
    record = {"stage": "linear probe" if freeze_encoder else "fine-tuning", "source": source, "upstream": card.record}
    card = Card(train.classes, card.mean, card.std, card.preset, record)
    lengths = {"train_steps_per_epoch": train_steps_per_epoch, "eval_steps_per_epoch": eval_steps_per_epoch}
    return _train_stage(
        "finetuned", model, train, card, recipe, validation_fraction, device, run_dir,
        epochs=finetune_epochs, batch_size=batch_size, **lengths, seed=seed, description=description, progress=progress,
    )  # fmt: skip


def _train_stage(name, model, train, card, recipe, validation_fraction, device, run_dir, **fit_arguments) -> Trained:
    """What both stages share: split, train, keep the files in step with the training."""
    train, validation = train_validation_split(train, validation_fraction, fit_arguments["seed"])
    model = model.to(resolve_device(device))
    settings = {key: value for key, value in fit_arguments.items() if key not in ("description", "progress")}

    def described(history: History) -> Card:
        record = {"recipe": asdict(recipe), **settings, "epochs_run": history.epochs, "versions": versions()}
        return replace(card, record=card.record | record)

    def save(history: History) -> None:
        if run_dir is None:
            return
        save_checkpoint(Path(run_dir) / f"{name}.safetensors", model, described(history))
        history.save(Path(run_dir) / f"{name}-history.json")
        if history.epochs and history.best is history.epochs[-1]:
            save_checkpoint(Path(run_dir) / f"{name}-best.safetensors", model, described(history))

    history = fit(model, train, validation, card, recipe, after_epoch=save, **fit_arguments)
    if history.interrupted:
        save(history)
    return Trained(model.eval(), described(history), history)


def _named_recipe(recipe: str | Recipe, known: dict[str, Recipe]) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in known:
        raise ValueError(f"recipe={recipe!r} is not known; choose one of {', '.join(known)}, or give a Recipe.")
    return known[recipe]


def _check_lengths(values: dict, *names: str) -> None:
    for name in names:
        value = values[name]
        if name.endswith("_steps_per_epoch") and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not allowed; give a whole number of at least 1.")
