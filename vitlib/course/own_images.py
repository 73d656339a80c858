"""Fine-tuning on your own images: how many steps they need, and what the model says about the test images."""

import math
from pathlib import Path

from torch import Tensor

from vitlib.classify import confident_mistakes
from vitlib.data import LabelledImages
from vitlib.utils import write_csv

STEPS = 16  # the fewest optimiser steps of a fine-tuning


def batch_size_for(images: int) -> int:
    """Return the largest power of two that is at most the number of training images, between 8 and 128.

    The recipes' learning rates are made for 128.
    """
    return 2 ** min(7, max(3, int(math.log2(max(1, images)))))


def epochs_for(images: int, batch_size: int) -> int:
    """Return how many passes over the training images take at least ``STEPS`` steps."""
    return math.ceil(STEPS / math.ceil(images / batch_size))


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy measured on ``count`` images (Wilson 1927).

    >>> wilson_interval(0.5, 60)
    (0.37733..., 0.62266...)
    """
    z = 1.96
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, (centre - half) / (1 + z**2 / count)), min(1.0, (centre + half) / (1 + z**2 / count))


def chance(labels: Tensor) -> float:
    """Return the accuracy of always naming the most frequent class."""
    return labels.bincount().max().item() / len(labels)


def write_predictions(path: Path, test: LabelledImages, logits: Tensor) -> None:
    """Write a line for each test image: file, true class, predicted class and its probability."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    true, guessed = ([test.classes[label] for label in labels.tolist()] for labels in (test.labels, predicted))
    shares = [f"{share:.4f}" for share in confidence.tolist()]
    rows = zip(test.names or range(len(test)), true, guessed, shares, strict=True)
    write_csv(path, ("file", "true", "predicted", "probability"), rows)


def draw_errors(folder: Path, test: LabelledImages, logits: Tensor) -> str:
    """Draw confusion.png and mistakes.png into ``folder``. Return a sentence that says what they show."""
    import matplotlib

    matplotlib.use("agg")  # files need no window, which a remote machine might not have
    from vitlib import plots

    names, predicted = list(map(_shortened, test.classes)), logits.argmax(dim=1)
    count, right = len(names), (predicted == test.labels).sum().item()
    confused = (test.labels * count + predicted).bincount(minlength=count**2).view(count, count)
    shown = names if count <= 25 else ()
    figure = plots.heatmap(
        confused, shown, shown, numbers="{:.0f}", xlabel="predicted class", ylabel="true class",
        label="test images", title=f"{right} of {len(test)} test images are right",
    )  # fmt: skip
    (folder / "confusion.png").write_bytes(plots.png(figure, dpi=150))
    said = f"Which classes it confuses: {folder / 'confusion.png'}."
    (folder / "mistakes.png").unlink(missing_ok=True)  # of an earlier training
    if right == len(test):
        return f"{said} It makes no mistake."
    worst, titles = confident_mistakes(logits, test.labels), []
    for index in worst.tolist():
        share, guess = logits[index].softmax(dim=0).max(dim=0)
        title = f"true: {names[test.labels[index]]}\n{share:.0%} {names[guess]}"
        titles.append(f"{title}\n{_shortened(Path(test.names[index]).name, 22)}" if test.names else title)
    title = f"the {len(worst)} most confident of {len(test) - right} mistakes"
    figure = plots.image_grid(test.images[worst], titles, columns=4, side=2.0, title=title)
    (folder / "mistakes.png").write_bytes(plots.png(figure, dpi=150))
    return f"{said} Where it is most sure and wrong: {folder / 'mistakes.png'}."


def _shortened(text: str, most: int = 16) -> str:
    """Return a text that fits above an image, behind ``true:`` or a percentage."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-most // 2 :]}"
