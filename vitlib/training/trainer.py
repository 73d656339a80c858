"""What surrounds the training loop: batches, averaged weights, progress, and the state to resume from exactly."""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vitlib.data.augment import draw_kept_patches
from vitlib.data.images import LabelledImages
from vitlib.training.devices import compiled, random_states, resolve_precision, set_random_states
from vitlib.training.distributed import current_context
from vitlib.training.history import History
from vitlib.training.recipes import Optimizer, Recipe
from vitlib.training.resume import ResumeFile
from vitlib.utils import progress_bar
from vitlib.weights.checkpoint import ModelCard, without_wrappers


@dataclass(frozen=True)
class TrainingOptions:
    """The settings of a training that are not part of its recipe.

    Args:
        epochs: passes over the training images.
        batch_size: images per optimiser step, over all processes; the last batch of an epoch may be smaller.
        train_steps_per_epoch, eval_steps_per_epoch: the largest number of batches per epoch; None for all.
        seed: decides the order of the images, the augmentation and dropout.
        precision: see :func:`vitlib.training.devices.resolve_precision`; with float32 only rounding differs by machine
            (Muon orthogonalises in bfloat16 where that is fast).
        compile: whether to compile the model with ``torch.compile``; it takes a minute, and pays in long trainings.
        description: first word of the progress bar.
        progress: whether to show a progress bar.
    """

    epochs: int
    batch_size: int = 128
    train_steps_per_epoch: int | None = None
    eval_steps_per_epoch: int | None = None
    seed: int = 0
    precision: str = "float32"
    compile: bool = False
    description: str = "training"
    progress: bool = True

    def __post_init__(self):  # a training without steps would look like a finished one
        for name in ("epochs", "batch_size", "train_steps_per_epoch", "eval_steps_per_epoch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} is not allowed; give a whole number of at least 1.")


@dataclass(frozen=True)
class Batch:
    """What one process trains on in one step, on the device.

    Args:
        images: uint8 ``[b, C, H, W]``, not augmented yet.
        labels: int64 ``[b]``.
        drawn: the random numbers of the augmentation, each ``[b, ...]``.
        size: images of all processes in this step.
        kept_patches: ``([b, n],)`` under PatchDropout, else ``()``; it is unpacked when the model is called, since only
            a ViT takes this argument.
    """

    images: Tensor
    labels: Tensor
    drawn: dict[str, Tensor]
    size: int
    kept_patches: tuple[Tensor, ...] = ()


class Trainer:
    """A running training: its model, optimiser, history and random numbers. The arguments are those of ``fit``.

    Attributes:
        ema_model: the model to evaluate and to keep: with averaged weights if the recipe has them, else ``model``.
        forward: the model as it is called: compiled, or wrapped for several processes.
        history: what has happened up to the last whole epoch.
        losses, hits: of the current epoch the loss of each step and the number of right answers, counted on this
            process's images alone.
        seconds: since the start of the current epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        train: LabelledImages,
        card: ModelCard,
        recipe: Recipe,
        options: TrainingOptions,
        resume: ResumeFile | None = None,
    ):
        self.model, self.card, self.recipe, self.options, self.resume = model, card, recipe, options, resume
        self.device = next(model.parameters()).device
        self.context = current_context()
        self.train = train.to(self.device)
        most_steps = options.train_steps_per_epoch or len(train)
        self.images_per_epoch = min(len(train), most_steps * options.batch_size)
        self.steps_per_epoch = math.ceil(self.images_per_epoch / options.batch_size)
        self.total_steps = options.epochs * self.steps_per_epoch
        self.precision = resolve_precision(options.precision, self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")
        self.optimizer = Optimizer(without_wrappers(model), recipe, self.total_steps)
        self.ema_model = copy.deepcopy(model) if recipe.ema_decay else model
        self.forward = self.context.parallel(compiled(model, self.device) if options.compile else model)
        self.history = History()
        self._begin_epoch()
        torch.manual_seed(options.seed + self.context.rank)  # dropout and drop path
        if resume is not None and (state := self.context.from_first(resume.load)):
            self._load(state)

    @property
    def step(self) -> int:
        """The number of the optimiser step under way, from 0."""
        return len(self.history.steps) + len(self.losses)

    def epochs_to_go(self) -> range:
        """Return the numbers of the epochs that are not finished, from 1."""
        return range(len(self.history.epochs) + 1, self.options.epochs + 1)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the remaining batches of an epoch, in a random order that depends on seed and epoch.

        All random numbers of an epoch are drawn at once, so that they depend neither on the size of the batches nor on
        the number of processes.
        """
        options, recipe = self.options, self.recipe
        # a CPU generator uses 32 bits of a seed: 20 for the epoch, 12 for ours; the last term mixes in the rest of ours
        seed = (options.seed << 20) + epoch + (options.seed >> 12) * 2654435761
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=generator)[: self.images_per_epoch]
        progress = epoch / options.epochs
        augmentation = recipe.augmentation if progress <= recipe.mix_until else replace(recipe.augmentation, mixing=0.0)
        drawn = augmentation.draw(len(order), *self.train.images.shape[-2:], generator) | {"order": order}
        share = recipe.share_of_patches(progress)
        if share < 1:
            patches = without_wrappers(self.model).vit_encoder.embedding.position_embedding.shape[1] - 1
            drawn["kept_patches"] = draw_kept_patches(len(order), patches, share, generator)

        drawn = {name: numbers.to(self.device) for name, numbers in drawn.items()}
        for start in range(len(self.losses) * options.batch_size, len(order), options.batch_size):
            batch = slice(start, start + options.batch_size)
            ours = {name: self.context.shard(numbers[batch]) for name, numbers in drawn.items()}
            chosen = ours.pop("order")
            kept = (ours.pop("kept_patches"),) if "kept_patches" in ours else ()
            yield Batch(self.train.images[chosen], self.train.labels[chosen], ours, len(order[batch]), kept)

    def augment(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the augmented images, float32 and normalised, and how much of each is its own content, ``[b]``."""
        images = self.recipe.augmentation.apply(batch.images, batch.drawn, self.card.mean, self.card.std)
        return self.recipe.augmentation.mix(images, batch.drawn)

    @contextmanager
    def timed_epoch(self, epoch: int) -> Iterator[None]:
        """Show the progress of an epoch and measure its time."""
        with progress_bar(
            description=f"{self.options.description}, epoch {epoch}/{self.options.epochs}",
            total=self.images_per_epoch,
            unit=" images",
            show=self.options.progress and self.context.is_first,
        ) as self._bar:
            self._bar.update(min(self.images_per_epoch, len(self.losses) * self.options.batch_size))
            self._started = time.perf_counter() - self.seconds
            yield

    def end_step(self, loss: Tensor, logits: Tensor, batch: Batch) -> None:
        """Update the averaged weights, count, show progress, and save the state when it is due."""
        self._update_average()
        self.losses.append(loss.detach())
        self.hits += (logits.detach().argmax(1) == batch.labels).sum()
        self._seen += len(batch.labels)
        if len(self.losses) == self.steps_per_epoch:
            self._total_losses()  # waits for the device, so that the epoch's time is whole
        self.seconds = time.perf_counter() - self._started
        # reading a loss waits for the device, so only when tqdm has drawn the bar, at most twice a second
        if self._bar.update(batch.size):
            recent = self.losses[-1].item() * self.context.world_size  # each process has only its share of the loss
            self._check_finite([recent])
            accuracy = self.hits.item() / max(1, self._seen)
            self._bar.set_postfix_str(f"loss {recent:.3f}, accuracy {accuracy:.1%}", refresh=False)
        # several processes ask only every 20 steps, since all wait for the first one's answer
        asks = self.context.world_size == 1 or len(self.losses) % 20 == 1
        if self.resume is not None and asks and self.context.from_first(lambda: self.resume.is_due):
            self.save()

    def end_epoch(self, score: dict[str, float]) -> None:
        """Add the finished epoch to the history: its steps, averages, and score on the validation images."""
        epoch, first, images = len(self.history.epochs) + 1, len(self.history.steps), self.images_per_epoch
        losses = self._total_losses().tolist()
        sizes = [min(self.options.batch_size, images - start) for start in range(0, images, self.options.batch_size)]
        train_loss = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / images
        self.history.steps += [
            {"step": step + 1, "epoch": epoch, "loss": loss, "learning_rate": self.optimizer.rate(step)}
            for step, loss in enumerate(losses, first)
        ]
        self.history.epochs.append(
            {
                "epoch": epoch,
                "step": len(self.history.steps),
                "train_loss": train_loss,
                "train_accuracy": self.context.total(self.hits).item() / images,
                "seconds": self.seconds,
                "images_per_second": images / self.seconds,
                "validation_loss": score["loss"],
                "validation_accuracy": score["accuracy"],
            }
        )
        self._begin_epoch()
        self._bar.set_postfix_str(f"loss {train_loss:.3f}, validation accuracy {score['accuracy']:.1%}")

    def save(self) -> None:
        """Write the resume file, if the training has one; every process must call this."""
        if self.resume is None:
            return
        state = {
            "model": without_wrappers(self.model).state_dict(),
            "ema_model": without_wrappers(self.ema_model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": asdict(self.history),
            "losses": self._total_losses(),
            "hits": self.context.total(self.hits),
            "seconds": self.seconds,
            "random_states": self.context.gather(random_states(self.device)),
        }
        if self.context.is_first:
            self.resume.save(state)

    def _load(self, state: dict) -> None:
        without_wrappers(self.model).load_state_dict(state["model"])
        without_wrappers(self.ema_model).load_state_dict(state["ema_model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = History(**state["history"])
        # the saved sums are those of all processes; the first one carries them on
        counted = 1 if self.context.is_first else 0
        self.losses = list((counted * state["losses"]).to(self.device).unbind())
        self.hits = (counted * state["hits"]).to(self.device)
        self._seen = counted * len(self.losses) * self.options.batch_size
        self.seconds = state["seconds"]
        set_random_states(state["random_states"][self.context.rank], self.device)

    def _begin_epoch(self) -> None:
        self.losses: list[Tensor] = []
        self.hits = torch.zeros((), dtype=torch.int64, device=self.device)
        self._seen = 0
        self.seconds = 0.0

    def _update_average(self) -> None:
        if self.recipe.ema_decay:
            # a smaller decay at the start forgets the first, random weights quickly
            decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
            get_ema_multi_avg_fn(decay)(list(self.ema_model.parameters()), list(self.model.parameters()), None)
            # a ViT has no buffers; those of batch norm are averages already
            for averaged, buffer in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
                averaged.copy_(buffer)

    def _total_losses(self) -> Tensor:
        """Return the losses of this epoch's steps, over all processes; raise ValueError if one is not finite."""
        losses = self.context.total(torch.stack(self.losses)) if self.losses else torch.zeros(0)
        self._check_finite(losses.tolist())
        return losses

    def _check_finite(self, losses: list[float]) -> None:
        """Raise ValueError if one of these, the losses of the last steps, is not finite: the training has diverged."""
        for step, loss in enumerate(losses, self.step - len(losses)):
            if not math.isfinite(loss):
                raise ValueError(
                    f"The loss is {loss} in step {step + 1} of {self.total_steps}, at learning rate "
                    f"{self.optimizer.rate(step):.3g}: the training has diverged; lower the learning rate, clip the "
                    "gradient, or compute in float32."
                )
