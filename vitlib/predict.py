"""What a trained model says: about image files, and where it is wrong and sure of it."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from vitlib.arguments import check, check_path, check_tensor, check_type, check_whole
from vitlib.data.folders import read_image
from vitlib.training.loop import predict
from vitlib.weights.checkpoint import ModelCard, unwrap


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image file.

    Args:
        path: of the file, as it was given.
        classes: the most probable classes and their probabilities in [0, 1], the most probable first; empty if the
            file could not be read.
        error: why it could not be read, in one sentence; None if it could.
    """

    path: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict_files(
    model: nn.Module, card: ModelCard, paths: Iterable[str | os.PathLike], *, top: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """The ``top`` most probable classes of each image file, in the order of ``paths``, a batch at a time.

    The images are read as those of a folder are in training (:func:`vitlib.data.folders.read_image`) and normalised
    with the card's numbers. A file that cannot be read is reported in its place, and the others are still predicted.
    No more than ``batch_size`` images are in memory, however many ``paths`` there are.

    >>> model, card = load_weights("cifar100-small")
    >>> for prediction in predict_files(model, card, ["cat.jpg"]):
    ...     print(prediction.path, prediction.classes[0])

    Args:
        model, card: from :func:`vitlib.weights.checkpoint.load_weights`; the model computes where its weights are.
        top: classes for each image, at least 1; all of them if there are fewer.
        batch_size: images at a time, at least 1.

    Raises:
        ValueError: if an argument is not what it should be, or the card does not name a class for each logit.
    """
    check_whole("top", top)
    check_whole("batch_size", batch_size)
    check_type("card", card, ModelCard, "a ModelCard, as load_weights gives one")
    # a text is a list of letters, and none of them is an image
    are_many = isinstance(paths, Iterable) and not isinstance(paths, str | bytes | os.PathLike)
    check("paths", paths, are_many, "a list of paths")
    config = unwrap(model).config
    if not len(card.classes) == config["num_classes"] > 0:
        raise ValueError(
            f"The model has {config['num_classes']} classes and its card names {len(card.classes)} of them; "
            "give a model that was trained to classify, with its card."
        )

    def read(path) -> np.ndarray | str:
        try:
            check_path("paths", path)
            return read_image(path, config["image_size"], config["num_channels"])
        except (ValueError, OSError) as error:
            return str(error)

    def predictions() -> Iterator[Prediction]:  # apart, so that bad arguments are refused at the call
        remaining = iter(paths)
        # PIL lets go of Python's lock while it decodes; few threads, since a large photograph takes 0.5 GB meanwhile
        with ThreadPoolExecutor(4) as pool:
            while batch := list(islice(remaining, batch_size)):
                found = list(pool.map(read, batch))
                pictures = [picture for picture in found if not isinstance(picture, str)]
                rows = iter(_top_classes(model, card, pictures, top))
                for path, picture in zip(batch, found, strict=True):
                    if isinstance(picture, str):
                        yield Prediction(str(path), error=picture)
                    else:
                        yield Prediction(str(path), next(rows))

    return predictions()


def _top_classes(
    model: nn.Module, card: ModelCard, pictures: list[np.ndarray], top: int
) -> list[tuple[tuple[str, float], ...]]:
    if not pictures:
        return []
    logits = predict(model, torch.from_numpy(np.stack(pictures)), card, len(pictures))
    best = logits.softmax(dim=1).topk(min(top, len(card.classes)))
    return [
        tuple((card.classes[number], share) for number, share in zip(numbers, shares, strict=True))
        for numbers, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def confident_mistakes(logits: Tensor, labels: Tensor, count: int = 12) -> Tensor:
    """Where a model is wrong and sure of it: indices int64 ``[at most count]`` of the images that it gives another
    class than their own, the one with the most probable wrong class first.

    They are worth a look before anything else is done about the accuracy: wrong labels, images that show two things,
    and backgrounds that the model has learned in place of the object are found here (``plots.confident_mistakes``).

    Args:
        logits: ``[N, num_classes]``.
        labels: int64 ``[N]``, the true classes.

    Raises:
        ValueError: for tensors of other shapes.
    """
    check_tensor("logits", logits, "N num_classes")
    check_tensor("labels", labels, "N")
    check("labels", labels, len(labels) == len(logits), f"{len(logits)} labels, one for each row of logits")
    check_whole("count", count)
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = torch.nonzero(predicted != labels).flatten()
    return wrong[confidence[wrong].argsort(descending=True, stable=True)[:count]]
