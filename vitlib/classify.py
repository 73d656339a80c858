"""Predict the classes of image files, and find confident mistakes."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from vitlib.data.folders import read_image
from vitlib.training import predict
from vitlib.weights.checkpoint import ModelCard, unwrap


@dataclass(frozen=True)
class Prediction:
    """The classes of one image file.

    Args:
        path: of the file, as given.
        classes: the most probable classes with their probabilities in [0, 1], the most probable first; empty if the
            file could not be read.
        error: why it could not be read, in one sentence; None if it could.
    """

    path: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict_files(
    model: nn.Module, card: ModelCard, paths: Iterable[str | os.PathLike], *, top: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """Yield the ``top`` most probable classes of each image file, in the order of ``paths``.

    Images are read as in training (:func:`vitlib.data.folders.read_image`). A file that cannot be read is reported in
    its place. At most ``batch_size`` images are in memory.

    >>> model, card = load_weights("cifar100-small")
    >>> for prediction in predict_files(model, card, ["cat.jpg"]):
    ...     print(prediction.path, prediction.classes[0])

    Args:
        model, card: from :func:`vitlib.weights.load_weights`; the model computes on the device of its weights.
        top: classes for each image; all of them if there are fewer.

    Raises:
        ValueError: if the card does not name a class for each logit, or logits are not finite.
    """
    config, remaining = unwrap(model).config, iter(paths)
    if not len(card.classes) == config["num_classes"] > 0:
        raise ValueError(
            f"The model has {config['num_classes']} classes and its card names {len(card.classes)} of them; "
            "give a model that was trained to classify, with its card."
        )

    def read(path: str | os.PathLike) -> np.ndarray | str:
        try:
            return read_image(path, config["image_size"], config["num_channels"])
        except (ValueError, OSError) as error:
            return str(error)

    # PIL releases Python's lock while it decodes; only four threads, since a large photograph takes 0.5 GB
    with ThreadPoolExecutor(4) as pool:
        while batch := list(islice(remaining, batch_size)):
            found = list(pool.map(read, batch))
            images = [image for image in found if not isinstance(image, str)]
            logits = iter(predict(model, torch.from_numpy(np.stack(images)), card) if images else ())
            for path, image in zip(batch, found, strict=True):
                if isinstance(image, str):
                    yield Prediction(str(path), error=image)
                else:
                    best = next(logits).softmax(0).topk(min(top, len(card.classes)))
                    names = [card.classes[number] for number in best.indices]
                    yield Prediction(str(path), tuple(zip(names, best.values.tolist(), strict=True)))


def confident_mistakes(logits: Tensor, labels: Tensor, count: int = 12) -> Tensor:
    """Return the indices of the most confident mistakes, int64 ``[at most count]``, the most confident first.

    Look at these images before anything else. They show wrong labels, images of two things, and backgrounds that the
    model has learned in place of the object.

    Args:
        logits: ``[B, num_classes]``.
        labels: int64 ``[B]``, the true classes.
    """
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = torch.nonzero(predicted != labels).flatten()
    return wrong[confidence[wrong].argsort(descending=True, stable=True)[:count]]
