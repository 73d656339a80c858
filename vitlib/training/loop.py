"""The training loop on one screen: ``fit``, with ``evaluate`` and ``predict`` beside it.

It is the loop of notebook 03, with its five words: predict, measure, clear, backpropagate, step. Everything around it
(resume, several processes, precision, averaged weights, progress) is in :mod:`vitlib.training.trainer`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.data.augment import mixed_cross_entropy, normalise
from vitlib.data.images import LabelledImages
from vitlib.training.distributed import current_context
from vitlib.training.history import History
from vitlib.training.recipes import Recipe
from vitlib.training.resume import ResumeFile
from vitlib.training.trainer import Trainer, TrainingOptions
from vitlib.weights.checkpoint import ModelCard, without_wrappers


def fit(
    model: nn.Module,
    train: LabelledImages,
    validation: LabelledImages,
    card: ModelCard,
    recipe: Recipe,
    *,
    after_epoch: Callable[[nn.Module, History], None] = lambda model, history: None,
    resume: ResumeFile | None = None,
    **options,
) -> History:
    """Train ``model`` in place and return the history.

    Ctrl-C ends the training: the model keeps the weights it has by then, the history is marked ``interrupted``, and
    the unfinished epoch is not part of it.

    Args:
        model: a ViT, wrapped or not, or any other classifier that maps images ``[B, C, S, S]`` to logits.
        card: gives the normalisation.
        after_epoch: called after every epoch with the model to keep and the history; it may write them to files.
        resume: the file from which an interrupted training resumes, and in which this one saves its state.
        options: the fields of :class:`TrainingOptions`, such as ``epochs`` and ``batch_size``.

    Raises:
        ValueError: if the images do not fit a ViT, the loss is not finite, or the resume file belongs to another
            training.
    """
    options = TrainingOptions(**options)
    _check_can_learn(model, train, validation, card)
    trainer = Trainer(model, train, card, recipe, options, resume)
    try:
        for epoch in trainer.epochs_to_go():
            with trainer.timed_epoch(epoch):
                model.train()
                for batch in trainer.batches(epoch):  # random order; an interrupted epoch resumes where it stopped
                    images, own_share = trainer.augment(batch)  # augmented; own_share: the weight of its own label
                    with trainer.autocast:  # bfloat16 or float32, as options.precision says
                        logits = trainer.forward(images, *batch.kept_patches)  # predict
                    losses = mixed_cross_entropy(logits.float(), batch.labels, own_share, recipe.label_smoothing)
                    loss = losses.sum() / batch.size  # measure; batch.size counts the images of all processes
                    trainer.optimizer.zero_grad()  # clear: gradients would add up otherwise
                    trainer.context.backward(loss)  # backpropagate; the gradients of several processes add up here
                    trainer.optimizer.step(trainer.step)  # step: this step's learning rate, clipping, update
                    trainer.end_step(loss, logits, batch)  # averaged weights, progress bar, resume file
                score = evaluate(trainer.ema_model, validation, card, options.batch_size, options.eval_steps_per_epoch)
                trainer.end_epoch(score)
            after_epoch(trainer.ema_model, trainer.history)
            trainer.save()
    except KeyboardInterrupt:
        trainer.history.interrupted = True
        print(f"Stopped by Ctrl-C in epoch {len(trainer.history.epochs) + 1}; the weights so far are kept.")
    model.load_state_dict(trainer.ema_model.state_dict())
    return trainer.history


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, card: ModelCard, batch_size: int = 256) -> Tensor:
    """Return logits ``[B, num_classes]``, float32 on the CPU, for uint8 images ``[B, C, S, S]``.

    The model is in eval mode meanwhile, and afterwards in the mode it was in before.

    Raises:
        ValueError: for images that do not fit a ViT or the card, or logits that are not finite.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        logits = [
            model(normalise(batch.to(device), card.mean, card.std)).float().cpu() for batch in images.split(batch_size)
        ]
    finally:
        model.train(was_training)
    logits = torch.cat(logits)
    if not logits.isfinite().all():
        raise ValueError(
            "The model's logits are not finite (nan or infinity): its weights are damaged or its training diverged; "
            "take other weights, or train again at a lower learning rate."
        )
    return logits


def evaluate(
    model: nn.Module, data: LabelledImages, card: ModelCard, batch_size: int = 256, steps: int | None = None
) -> dict[str, float]:
    """Return the mean cross-entropy ("loss") and the top-1 accuracy in [0, 1] ("accuracy") over ``data``, in float32.

    If ``data.kept`` says which test images ciFAIR kept, "images_kept" and "accuracy_kept" are about those alone; the
    others have a near-duplicate in CIFAR's training set or test set.

    With ``steps``, only as many batches are evaluated. Their images are spread evenly over the data, since folders come
    sorted by class. Of several processes each evaluates its share; all of them must call this.

    Raises:
        ValueError: for no images, or images or labels that do not fit the model.
    """
    if not len(data):
        raise ValueError("data has no images to evaluate; give at least one.")
    if steps is not None and steps * batch_size < len(data):
        data = data.subset(torch.linspace(0, len(data) - 1, steps * batch_size).long())
    context = current_context()
    data = data.subset(slice(context.rank, None, context.world_size))
    logits = predict(model, data.images, card, batch_size)
    _check_logits(logits, data)
    labels = data.labels.cpu()
    losses = F.cross_entropy(logits, labels, reduction="none")
    hits = logits.argmax(1) == labels
    kept = torch.zeros_like(hits) if data.kept is None else data.kept.cpu()
    sums = torch.stack([losses.double().sum(), hits.sum(), torch.tensor(len(data)), (hits & kept).sum(), kept.sum()])
    sums = context.total(sums.float().to(next(model.parameters()).device))
    loss, right, seen, right_kept, seen_kept = sums.tolist()
    result = {"loss": loss / seen, "accuracy": right / seen}
    if seen_kept:
        result |= {"images_kept": int(seen_kept), "accuracy_kept": right_kept / seen_kept}
    return result


def _check_can_learn(model: nn.Module, train: LabelledImages, validation: LabelledImages, card: ModelCard) -> None:
    """Check before the training, with one image, that images and labels fit the model."""
    if not len(train) or not len(validation):
        raise ValueError(
            f"{len(train)} training and {len(validation)} validation images are too few; give one of each."
        )
    if len(train.labels.unique()) == 1:
        raise ValueError(f"All images of {train} are of one class, so there is nothing to learn; give two classes.")
    _check_logits(predict(without_wrappers(model), train.images[:1], card), train)


def _check_logits(logits: Tensor, data: LabelledImages) -> None:
    classes = int(data.labels.max()) + 1 if len(data) else 0  # of many processes one may have no image
    if logits.ndim != 2 or logits.shape[1] < classes:
        raise ValueError(
            f"The model gives {list(logits.shape)} logits for {len(logits)} images, but their labels need {classes} "
            "classes; give a model with a classifier for as many, or data with fewer."
        )
