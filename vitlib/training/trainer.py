"""All that a training carries from step to step, so that it can be saved and resumed exactly."""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace

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
    """How long and where to train; how is the recipe's matter.

    Args:
        epochs: passes over the training images.
        batch_size: images per optimiser step, over all processes; the last batch of an epoch may be smaller.
        train_steps_per_epoch, eval_steps_per_epoch: at most so many batches per epoch; None for all.
        seed: decides the order of the images, the augmentation and dropout.
        precision: see :func:`vitlib.training.devices.resolve_precision`; float32 gives the same numbers everywhere.
        compile: whether ``torch.compile`` translates the model first, which takes a minute and pays in long trainings.
        description: first word of the progress bar.
        progress: whether to show one.
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

    def __post_init__(self):  # a training of no steps would end late, or look finished
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; give a whole number of at least 1.")


@dataclass(frozen=True)
class Batch:
    """What one process trains on in one step, on the device.

    Args:
        images: uint8 ``[b, C, H, W]``, not augmented yet.
        labels: int64 ``[b]``.
        drawn: the random numbers of the augmentation, each ``[b, ...]``.
        size: images in the step over all processes.
        kept_patches: nothing, or one tensor ``[b, n]``: the patches that stay (PatchDropout).
    """

    images: Tensor
    labels: Tensor
    drawn: dict[str, Tensor]
    size: int
    kept_patches: tuple[Tensor, ...] = field(default=())


class Trainer:
    """A training under way.

    Args:
        model: is trained in place.
        train: the training images.
        card: gives the normalisation.
        resume: the file to go on from, if there is one, and to keep up to date.

    Attributes:
        ema_model: the model to evaluate and to keep: the one with averaged weights (EMA) if the recipe asks for it.
        forward: the model as it is called: compiled, or wrapped for several processes.
        history: what has happened up to the last whole epoch.
        losses, hits, seconds: the current epoch's: the loss of each step and the number of right answers, both only of
            this process's images, and the time since its start.
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
        self.model, self.card, self.recipe, self.options = model, card, recipe, options
        self.device = next(model.parameters()).device
        self.context = current_context()
        # one process moves all images once; of several each moves its share of every epoch
        self.train = train.to(self.device) if self.context.world_size == 1 else train
        self.steps_per_epoch = math.ceil(len(train) / options.batch_size)
        if options.train_steps_per_epoch is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, options.train_steps_per_epoch)
        self.total_steps = options.epochs * self.steps_per_epoch
        self.precision = resolve_precision(options.precision, self.device)
        self.optimizer = Optimizer(without_wrappers(model), recipe, self.total_steps)
        self.ema_model = copy.deepcopy(model) if recipe.ema_decay else model
        self.forward = self.context.parallel(compiled(model, self.device) if options.compile else model)
        self.history = History()
        self._begin_epoch()
        torch.manual_seed(options.seed + self.context.rank)  # dropout and drop path
        self.resume = resume
        if resume is not None:
            self._load()

    @property
    def step(self) -> int:
        """The number of the optimiser step under way, from 0."""
        return len(self.history.steps) + len(self.losses)

    def epochs_to_go(self) -> range:
        return range(len(self.history.epochs) + 1, self.options.epochs + 1)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield what is left of an epoch, in a random order that seed and epoch decide.

        All random numbers of an epoch are drawn at once: what happens to an image depends neither on the size of the
        batches nor on the number of processes.
        """
        options, recipe, context = self.options, self.recipe, self.context
        generator = torch.Generator().manual_seed((options.seed << 20) + epoch)
        order = torch.randperm(len(self.train), generator=generator)[: self.steps_per_epoch * options.batch_size]
        progress = epoch * self.steps_per_epoch / self.total_steps
        augmentation = recipe.augmentation if progress <= recipe.mix_until else replace(recipe.augmentation, mixing=0.0)
        drawn = augmentation.draw(len(order), *self.train.images.shape[-2:], generator)
        share = recipe.share_of_patches(progress)
        if share < 1:
            patches = without_wrappers(self.model).vit_encoder.embedding.position_embedding.shape[1] - 1
            drawn["kept_patches"] = draw_kept_patches(len(order), patches, share, generator)

        steps = torch.arange(len(order)).split(options.batch_size)
        mine = [context.shard(step) for step in steps]
        data = self.train.subset(order[torch.cat(mine)].to(self.train.labels.device)).to(self.device)
        drawn = {name: numbers[torch.cat(mine)].to(self.device) for name, numbers in drawn.items()}
        starts = torch.tensor([0, *map(len, mine)]).cumsum(0).tolist()
        for number in range(len(self.losses), len(steps)):
            here = slice(starts[number], starts[number + 1])
            numbers = {name: values[here] for name, values in drawn.items()}
            kept = (numbers.pop("kept_patches"),) if "kept_patches" in numbers else ()
            yield Batch(data.images[here], data.labels[here], numbers, len(steps[number]), kept)
        if len(self.losses) == len(steps):
            self._check_finite(context.total(torch.stack(self.losses)).tolist())  # waits for the device
            self.seconds = time.perf_counter() - self._started

    def augment(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the augmented images, float32 and normalised, and ``[b]`` the share of its own content in each."""
        images = self.recipe.augmentation.apply(batch.images, batch.drawn, self.card.mean, self.card.std)
        return self.recipe.augmentation.mix(images, batch.drawn)

    @contextmanager
    def timed_epoch(self, epoch: int) -> Iterator[None]:
        """Show the progress of an epoch and take its time."""
        options = self.options
        images = min(len(self.train), self.steps_per_epoch * options.batch_size)
        with progress_bar(
            description=f"{options.description}, epoch {epoch}/{options.epochs}",
            total=images,
            unit=" images",
            show=options.progress and self.context.is_first,
        ) as self._bar:
            self._bar.update(min(images, len(self.losses) * options.batch_size))
            self._shown = time.perf_counter()
            self._started = self._shown - self.seconds
            yield

    def end_step(self, loss: Tensor, logits: Tensor, batch: Batch) -> None:
        """Update the averaged weights, count, show progress, write the resume file when it is due."""
        self._update_average()
        self.losses.append(loss.detach())
        self.hits += (logits.detach().argmax(1) == batch.labels).sum()
        self._seen += len(batch.labels)
        self._bar.update(batch.size)
        now = time.perf_counter()
        self.seconds = now - self._started
        if now - self._shown > 1 and not self._bar.disable:  # reading a loss waits for the device: once a second
            self._shown = now
            recent, accuracy = self.losses[-1].item(), self.hits.item() / max(1, self._seen)
            self._check_finite([recent])
            self._bar.set_postfix_str(f"loss {recent:.3f}, accuracy {accuracy:.1%}", refresh=False)
        # processes ask each other seldom: it makes them wait
        asks = self.context.world_size == 1 or len(self.losses) % 20 == 1
        if self.resume is not None and asks and self.context.from_first(self.resume.is_due):
            self.save()

    def end_epoch(self, score: dict[str, float]) -> None:
        """Move the epoch's steps and averages to the history, with the score of the validation images."""
        losses = self.context.total(torch.stack(self.losses)).tolist()
        hits = self.context.total(self.hits).item()
        seconds, batch_size = self.seconds, self.options.batch_size
        images = min(len(self.train), len(losses) * batch_size)
        sizes = [min(batch_size, images - start) for start in range(0, images, batch_size)]
        done, epoch = len(self.history.steps), len(self.history.epochs) + 1
        self.history.steps += [
            {"step": done + i + 1, "epoch": epoch, "loss": loss, "learning_rate": self.optimizer.rate(done + i)}
            for i, loss in enumerate(losses)
        ]
        self._begin_epoch()
        record = {
            "epoch": epoch,
            "step": len(self.history.steps),
            "train_loss": sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / images,
            "train_accuracy": hits / images,
            "seconds": seconds,
            "images_per_second": images / seconds,
            "validation_loss": score["loss"],
            "validation_accuracy": score["accuracy"],
        }
        self.history.epochs.append(record)
        self._bar.set_postfix_str(
            "loss {train_loss:.3f}, validation accuracy {validation_accuracy:.1%}".format(**record)
        )

    def save(self) -> None:
        """Write all that is needed to go on from here exactly, if there is a file; every process must call this."""
        if self.resume is None:
            return
        losses = self.context.total(torch.stack(self.losses)) if self.losses else torch.zeros(0)
        self._check_finite(losses.tolist())
        hits = self.context.total(self.hits)
        states = self.context.gather(random_states(self.device))
        if self.context.is_first:
            self.resume.save(
                {
                    "model": without_wrappers(self.model).state_dict(),
                    "ema_model": without_wrappers(self.ema_model).state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "history": asdict(self.history),
                    "losses": losses,
                    "hits": hits,
                    "seconds": self.seconds,
                    "random_states": states,
                }
            )

    def _load(self) -> None:
        """Load the saved training state, if there is one; every process must call this."""
        state = refusal = None
        if self.context.is_first:
            try:
                state = self.resume.load()
            except ValueError as error:
                refusal = error
        state, refusal = self.context.from_first((state, refusal))
        if refusal is not None:  # every process says so, else the others would wait for the first
            raise refusal
        if state is None:
            return
        without_wrappers(self.model).load_state_dict(state["model"])
        without_wrappers(self.ema_model).load_state_dict(state["ema_model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = History(**state["history"])
        # what was summed over the processes is counted once, by the first
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
            # the first weights are random: they are forgotten quickly, and in short trainings altogether
            decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
            get_ema_multi_avg_fn(decay)(list(self.ema_model.parameters()), list(self.model.parameters()), None)
            # a ViT has no buffers; the running statistics of batch norm are averages already
            for averaged, buffer in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
                averaged.copy_(buffer)

    def _check_finite(self, losses: list[float]) -> None:
        """Stop a training that has diverged: no number that follows would mean anything."""
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is not None:
            step = self.step - len(losses) + bad
            raise ValueError(
                f"The loss is {losses[bad]} in step {step + 1} of {self.total_steps}, at learning rate "
                f"{self.optimizer.rate(step):.3g}: the training has diverged; lower the learning rate, clip the "
                "gradient or compute in float32."
            )
