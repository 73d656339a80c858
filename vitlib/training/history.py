"""What happened during a training: losses by step, scores by epoch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vitlib.utils import atomic_write


@dataclass
class History:
    """What happened during training.

    Accuracies are in [0, 1]. Training losses and accuracies are those of the augmented images, averaged over the epoch
    while the model was changing. A mixed image counts as right if the answer is its own label.

    Args:
        steps: one dict per optimiser step: step, epoch, loss, learning_rate.
        epochs: one dict per epoch: epoch, step, train_loss, train_accuracy, validation_loss, validation_accuracy,
            seconds, images_per_second.
        interrupted: True if Ctrl-C ended the training early.
    """

    steps: list[dict] = field(default_factory=list)
    epochs: list[dict] = field(default_factory=list)
    interrupted: bool = False

    @property
    def best(self) -> dict:
        """The epoch with the highest validation accuracy; the earliest of several."""
        return max(self.epochs, key=lambda epoch: epoch["validation_accuracy"])

    def save(self, path: str | Path) -> None:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: str | Path) -> "History":
        return cls(**json.loads(Path(path).expanduser().read_text()))
