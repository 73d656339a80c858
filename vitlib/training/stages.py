"""Training: one loop, and the two stages of the course, pretraining and fine-tuning."""

import copy
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vitlib.arguments import (
    brief,
    check,
    check_choice,
    check_flag,
    check_folder,
    check_number,
    check_path,
    check_seed,
    check_text,
    check_type,
    check_whole,
)
from vitlib.data.augment import draw_kept_patches, neighbours, normalise
from vitlib.data.images import LabelledImages, channel_statistics, train_validation_split
from vitlib.model import create_model
from vitlib.training.distributed import current_processes
from vitlib.training.recipes import FINETUNING, RECIPES, Recipe, build_optimizers, named_recipe, rate_factor
from vitlib.training.resume import ResumeFile
from vitlib.utils import atomic_write, progress_bar
from vitlib.weights.checkpoint import (
    ModelCard,
    fingerprint,
    save_checkpoint,
    transfer_encoder,
    versions,
    without_wrappers,
)

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass
class History:
    """What happened during training.

    Args:
        steps: one dict per optimiser step: step, epoch, loss, learning_rate.
        epochs: one dict per epoch: epoch, step, train_loss, train_accuracy, validation_loss, validation_accuracy,
            seconds, images_per_second. Accuracies are shares from 0 to 1; training figures are those of the augmented
            images, averaged while the model was changing; a mixed image counts as right if the answer is its own label.
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
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: str | Path) -> "History":
        return cls(**json.loads(Path(path).read_text()))


@dataclass(frozen=True)
class Trained:
    """What training leaves: the model with its last weights, its card, and the history."""

    model: nn.Module
    card: ModelCard
    history: History


def resolve_device(device: str = "auto") -> torch.device:
    """The device to compute on: ``auto`` is the GPU where there is one, else the CPU; other names mean themselves.

    Raises:
        ValueError: for a device that this machine does not have.
    """
    check_type("device", device, str | torch.device, "a name such as auto, cpu or cuda:0")
    if device == "auto":
        accelerated = torch.accelerator.is_available()
        return torch.accelerator.current_accelerator() if accelerated else torch.device("cpu")
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":  # has shapes and no numbers
            raise NotImplementedError
        return found
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={device!r} is not to be had on this machine; choose auto or cpu.") from error


def resolve_precision(precision: str, device: torch.device) -> str:
    """How wide the matrix products of a training are: ``float32``, or ``bfloat16`` at half the width (autocast; the
    weights stay float32); ``auto`` is bfloat16 on CUDA GPUs and CPUs that compute in it, and float32 elsewhere.

    On a CPU with AVX512-BF16 or AMX bfloat16 is two to three times as fast, on others slower than float32
    (benchmarks/throughput.py).

    Raises:
        ValueError: for any other word.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # AVX512-BF16 or AMX: elsewhere bfloat16 is slower than float32
            has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
            native = any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
        return "bfloat16" if native else "float32"
    return precision


def hardware(device: torch.device) -> str:
    """The processor that a training ran on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, card: ModelCard, batch_size: int = 256) -> Tensor:
    """Logits ``[N, num_classes]``, float32 on the CPU, for uint8 images ``[N, C, H, W]``.

    The model is switched to eval mode for this and back to the mode it was in.

    Raises:
        ValueError: for images that do not fit the model or the card, or another wrong argument.
    """
    _check_arguments(locals())
    check_type("images", images, Tensor, "uint8 [N, C, H, W]")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        logits = [
            model(normalise(batch.to(device), card.mean, card.std)).float().cpu() for batch in images.split(batch_size)
        ]
    finally:
        model.train(was_training)
    return torch.cat(logits)


def evaluate(
    model: nn.Module, data: LabelledImages, card: ModelCard, batch_size: int = 256, steps: int | None = None
) -> dict[str, float]:
    """Mean cross-entropy ("loss") and top-1 accuracy as a share ("accuracy") over ``data``, computed in float32.

    With ``steps``, only that many batches are looked at, evenly spread over the data, since folders come sorted by
    class. Where several processes train together, each looks at its share, and all of them must call this.

    Raises:
        ValueError: for no images, images or labels that do not fit the model, or another wrong argument.
    """
    _check_arguments(locals())
    check("data", data, len(data) > 0, "at least one image")
    if steps is not None and steps * batch_size < len(data):
        data = data.subset(torch.linspace(0, len(data) - 1, steps * batch_size).long())
    processes = current_processes()
    data = data.subset(slice(processes.rank, None, processes.count))
    logits = predict(model, data.images, card, batch_size)
    _check_logits(logits, data)
    labels = data.labels.cpu()
    losses = F.cross_entropy(logits, labels, reduction="none")
    sums = [losses.double().sum(), (logits.argmax(1) == labels).sum(), torch.tensor(len(data))]
    sums = torch.stack([value.float() for value in sums]).to(next(model.parameters()).device)
    loss, hits, seen = processes.total(sums).tolist()
    return {"loss": loss / seen, "accuracy": hits / seen}


def fit(
    model: nn.Module,
    train: LabelledImages,
    validation: LabelledImages,
    card: ModelCard,
    recipe: Recipe,
    *,
    epochs: int,
    batch_size: int = 128,
    train_steps_per_epoch: int | None = None,
    eval_steps_per_epoch: int | None = None,
    seed: int = 0,
    precision: str = "auto",
    compile: bool = False,
    description: str = "training",
    progress: bool = True,
    after_epoch: Callable[[nn.Module, History], None] = lambda model, history: None,
    resume: ResumeFile | None = None,
) -> History:
    """Train ``model`` in place and return what happened.

    Args:
        model: a ViT, wrapped or not, or any other classifier that takes images ``[B, C, H, W]`` to logits.
        card: gives the normalisation.
        epochs: passes over the training images.
        batch_size: images per optimiser step, over all processes; the last batch of an epoch may be smaller.
        train_steps_per_epoch, eval_steps_per_epoch: at most so many batches per epoch; None for all.
        seed: decides the order of the images, the augmentation and dropout.
        precision: see :func:`resolve_precision`.
        compile: whether ``torch.compile`` translates the model first, which takes a minute and pays in long trainings.
        after_epoch: called after every epoch with the model to keep and the history; files are written there.
        resume: where to take up an interrupted training, if there was one, and what to keep up to date.

    Ctrl-C ends the training: the model keeps the weights it has, ``interrupted`` is set in the history, and the epoch
    that was cut short is not part of it.

    Raises:
        ValueError: for arguments out of range, a model that cannot classify the images, or a resume file that belongs
            to something else.
    """
    _check_arguments(locals())
    check_type("recipe", recipe, Recipe, "a Recipe, such as RECIPES['modern']")
    _check_resume_file("resume", resume)
    check("after_epoch", after_epoch, callable(after_epoch), "a function of the model and the history")
    if not len(train) or not len(validation):
        raise ValueError(
            f"{len(train)} training and {len(validation)} validation images are too few; give one of each."
        )
    _check_can_learn(model, train, card)
    steps = math.ceil(len(train) / batch_size)  # per epoch
    if train_steps_per_epoch is not None:
        steps = min(steps, train_steps_per_epoch)
    training = Training(model, card, recipe, epochs * steps, seed=seed, precision=precision, compile=compile)
    if resume is not None:
        training.take_up(resume)
    if training.processes.count == 1:
        train = train.to(training.device)  # all of it, once; of several processes each moves its share of every epoch
    history = training.history
    try:
        for epoch in range(len(history.epochs) + 1, epochs + 1):
            sizes, batches = training.epoch_batches(train, epoch, batch_size, steps)
            with progress_bar(
                description=f"{description}, epoch {epoch}/{epochs}",
                total=sum(sizes),
                unit=" images",
                show=progress and training.processes.is_first,
            ) as bar:
                record = training.run_epoch(sizes, batches, bar, resume)
                score = evaluate(training.kept, validation, card, batch_size, eval_steps_per_epoch)
                record |= {f"validation_{name}": value for name, value in score.items()}
                bar.set_postfix_str(
                    "loss {train_loss:.3f}, validation accuracy {validation_accuracy:.1%}".format(**record)
                )
            history.epochs.append({"epoch": epoch, "step": len(history.steps), **record})
            after_epoch(training.kept, history)
            if resume is not None:
                training.save(resume)
    except KeyboardInterrupt:
        history.interrupted = True
        print(f"Stopped by Ctrl-C in epoch {len(history.epochs) + 1}; the weights so far are kept.")
    model.load_state_dict(training.kept.state_dict())
    return history


class Training:
    """A training under way: everything that changes from step to step, so that it can be saved and taken up again.

    Args:
        model: is trained in place.
        total_steps: length of the learning rate schedule.
        card, recipe, seed, precision, compile: see :func:`fit`.

    Attributes:
        kept: the model to evaluate and to keep: the one with averaged weights if the recipe asks for it.
        history: what has happened up to the last whole epoch.
        losses, hits, seconds: what has happened in the current epoch: the loss of each step and the number of right
            answers, both only of this process's images, and the time since its start.
    """

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard,
        recipe: Recipe,
        total_steps: int,
        *,
        seed: int = 0,
        precision: str = "auto",
        compile: bool = False,
    ):
        self.model, self.card, self.recipe, self.total_steps, self.seed = model, card, recipe, total_steps, seed
        self.device = next(model.parameters()).device
        self.processes = current_processes()
        self.autocast = resolve_precision(precision, self.device) == "bfloat16"
        self.optimizers = build_optimizers(without_wrappers(model), recipe)
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.rates = [group["lr"] for group in self.groups]  # the highest of the schedule
        self.kept = copy.deepcopy(model) if recipe.average else model
        self.forward = self.processes.parallel(_compiled(model, self.device) if compile else model)
        self.history = History()
        self._begin_epoch()
        torch.manual_seed(seed + self.processes.rank)  # dropout and drop path

    def _begin_epoch(self) -> None:
        self.losses: list[Tensor] = []
        self.hits = torch.zeros((), dtype=torch.int64, device=self.device)
        self.seconds = 0.0

    def epoch_batches(
        self, train: LabelledImages, epoch: int, batch_size: int, steps: int
    ) -> tuple[list[int], list[tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        """The images of one epoch in a random order that seed and epoch decide.

        Returns:
            the number of images in each step, over all processes; and per step what this process trains on, on the
            device: uint8 images ``[B, C, H, W]``, labels ``[B]`` and the numbers drawn for their augmentation.
        """
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        order = torch.randperm(len(train), generator=generator)[: steps * batch_size]
        augmentation = self.recipe.augmentation
        if epoch * steps > self.recipe.mix_until * self.total_steps:
            augmentation = replace(augmentation, mixing=0.0)
        drawn = augmentation.draw(len(order), *train.images.shape[-2:], generator)
        share = self.recipe.patches_kept(epoch * steps / self.total_steps)
        if share < 1:
            patches = without_wrappers(self.model).vit_encoder.embedding.position_embedding.shape[1] - 1
            drawn["patches"] = draw_kept_patches(len(order), patches, share, generator)
        batches = torch.arange(len(order)).split(batch_size)
        shares = [self.processes.share(batch) for batch in batches]
        mine = torch.cat(shares)
        data = train.subset(order[mine].to(train.labels.device)).to(self.device)
        lengths = [len(share) for share in shares]
        numbers = {name: values[mine].to(self.device).split(lengths) for name, values in drawn.items()}
        per_step = [{name: values[step] for name, values in numbers.items()} for step in range(len(lengths))]
        images, labels = data.images.split(lengths), data.labels.split(lengths)
        return [len(batch) for batch in batches], list(zip(images, labels, per_step, strict=True))

    def run_epoch(self, sizes: list[int], batches: list, bar, resume: ResumeFile | None = None) -> dict:
        """Train on what is left of an epoch, and move its steps to the history. Returns the averages over the epoch.

        Losses stay on the device until the end: reading one waits for the device, so that is done once a second at
        most.
        """
        self.model.train()
        first = len(self.losses)
        bar.update(sum(sizes[:first]))
        seen = sum(len(labels) for _, labels, _ in batches[:first])  # by this process
        resume_steps = 1 if self.processes.count == 1 else 20
        shown = time.perf_counter()
        started = shown - self.seconds
        for step in range(first, len(sizes)):
            self.step(*batches[step], sizes[step])
            seen += len(batches[step][1])
            bar.update(sizes[step])
            now = time.perf_counter()
            self.seconds = now - started
            if now - shown > 1 and not bar.disable:
                shown = now
                accuracy = self.hits.item() / max(1, seen)
                bar.set_postfix_str(f"loss {self.losses[-1].item():.3f}, accuracy {accuracy:.1%}", refresh=False)
            # processes ask each other seldom: it makes them wait
            if resume is not None and step % resume_steps == 0 and self.processes.from_first(resume.is_due):
                self.save(resume)
        losses = self.processes.total(torch.stack(self.losses)).tolist()
        hits = self.processes.total(self.hits).item()
        seconds = time.perf_counter() - started
        done, epoch = len(self.history.steps), len(self.history.epochs) + 1
        self.history.steps += [
            {"step": done + i + 1, "epoch": epoch, "loss": loss, "learning_rate": self.rate(done + i)}
            for i, loss in enumerate(losses)
        ]
        self._begin_epoch()
        return {
            "train_loss": sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes),
            "train_accuracy": hits / sum(sizes),
            "seconds": seconds,
            "images_per_second": sum(sizes) / seconds,
        }

    def step(self, images: Tensor, labels: Tensor, drawn: dict[str, Tensor], batch_size: int) -> None:
        """One optimiser step on this process's part of a batch of ``batch_size`` images."""
        step = len(self.history.steps) + len(self.losses)
        factor = rate_factor(self.recipe, step, self.total_steps)
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate * factor
        images = self.recipe.augmentation.apply(images, drawn, self.card.mean, self.card.std)
        images, kept = self.recipe.augmentation.mix(images, drawn)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.forward(images, drawn["patches"]) if "patches" in drawn else self.forward(images)
        logits = logits.float()
        loss = self._losses(logits, labels, kept).sum() / batch_size
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (loss * self.processes.count).backward()  # the processes' gradients are averaged, the loss is a sum
        if self.recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self._update_average(step)
        self.losses.append(loss.detach())
        self.hits += (logits.detach().argmax(1) == labels).sum()

    def _losses(self, logits: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        """The cross-entropy of each image ``[B]``; of a mixed one, the mixture of those of its two labels."""
        own = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing, reduction="none")
        if not self.recipe.augmentation.mixing:
            return own
        partners = labels[neighbours(len(labels), labels.device)]
        others = F.cross_entropy(logits, partners, label_smoothing=self.recipe.label_smoothing, reduction="none")
        return kept * own + (1 - kept) * others

    def rate(self, step: int) -> float:
        """The learning rate of optimiser step ``step``, from 0, without the factors for some layers."""
        return self.recipe.learning_rate * rate_factor(self.recipe, step, self.total_steps)

    def _update_average(self, step: int) -> None:
        if self.recipe.average:
            # the first weights are random: they are forgotten quickly, and in short trainings altogether
            decay = min(self.recipe.average, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(list(self.kept.parameters()), list(self.model.parameters()), None)
            # a ViT has no buffers; the running statistics of batch norm are averages already
            for kept, buffer in zip(self.kept.buffers(), self.model.buffers(), strict=True):
                kept.copy_(buffer)

    def save(self, resume: ResumeFile) -> None:
        """Write all that is needed to go on from here exactly; every process must call this."""
        losses = self.processes.total(torch.stack(self.losses)) if self.losses else torch.zeros(0)
        hits = self.processes.total(self.hits)
        random_states = self.processes.gather(_random_states(self.device))
        if self.processes.is_first:
            resume.save(
                {
                    "model": without_wrappers(self.model).state_dict(),
                    "kept": without_wrappers(self.kept).state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                    "history": asdict(self.history),
                    "losses": losses,
                    "hits": hits,
                    "seconds": self.seconds,
                    "random_states": random_states,
                }
            )

    def take_up(self, resume: ResumeFile) -> None:
        """Go on where ``resume`` says, if it says anything; every process must call this."""
        state = refusal = None
        if self.processes.is_first:
            try:
                state = resume.load()
            except ValueError as error:
                refusal = error
        state, refusal = self.processes.from_first((state, refusal))
        if refusal is not None:  # every process says so, else the others would wait for the first
            raise refusal
        if state is None:
            return
        without_wrappers(self.model).load_state_dict(state["model"])
        without_wrappers(self.kept).load_state_dict(state["kept"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]  # new objects
        self.history = History(**state["history"])
        # what was summed over the processes is counted once, by the first
        counted = 1 if self.processes.is_first else 0
        self.losses = list((counted * state["losses"]).to(self.device).unbind())
        self.hits = (counted * state["hits"]).to(self.device)
        self.seconds = state["seconds"]
        _set_random_states(state["random_states"][self.processes.rank], self.device)


def _compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """Translated for batches of fixed size; on a GPU as CUDA graphs, since at this model's size starting hundreds of
    kernels one by one takes longer than what they compute."""
    return torch.compile(model, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else "default")


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def pretrain(
    train: LabelledImages,
    preset: str = "small",
    *,
    recipe: str | Recipe = "modern",
    norm_first: bool = True,
    pooling: str = "cls",
    pretrain_epochs: int = 100,
    batch_size: int = 128,
    train_steps_per_epoch: int | None = None,
    eval_steps_per_epoch: int | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    compile: bool = False,
    run_dir: str | Path | None = None,
    resume: bool = False,
    source: str | None = None,
    progress: bool = True,
) -> Trained:
    """Train a new model on ``train``, part of which is set aside to measure progress.

    Args:
        train: the upstream training images; their size and channels decide those of the model.
        preset: a key of ``vitlib.model.PRESETS``.
        recipe: a key of ``RECIPES``, or a recipe of your own.
        norm_first: False for post-norm blocks, as in the published system.
        pooling: what the classifier sees, "cls" or "mean"; see :class:`vitlib.model.ViTModel`.
        pretrain_epochs, batch_size, train_steps_per_epoch, eval_steps_per_epoch, seed, precision, compile: see
            :func:`fit`.
        validation_fraction: share of ``train`` that is never trained on.
        device: see :func:`resolve_device`.
        run_dir: where to write ``pretrained.safetensors`` (last weights), ``pretrained-best.safetensors`` (best by
            validation accuracy) and ``pretrained-history.json`` after every epoch; None to write nothing.
        resume: True keeps ``pretrained-resume.pt`` in ``run_dir`` too, and takes up what an interrupted call with the
            same arguments left there; the weights end up the same to the last bit.
        source: name of the data set, for the record.

    Raises:
        ValueError: for arguments out of range, or a resume file of another training.
    """
    _check_arguments(locals())
    check_flag("resume", resume)
    recipe = named_recipe(recipe, RECIPES)
    mean, std = recipe.statistics or channel_statistics(train.images)
    torch.manual_seed(seed)  # initialisation
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
    lengths = {"train_steps_per_epoch": train_steps_per_epoch, "eval_steps_per_epoch": eval_steps_per_epoch}
    return _train_stage(
        "pretrained", model, train, card, recipe, validation_fraction, device, run_dir, resume,
        epochs=pretrain_epochs, batch_size=batch_size, **lengths, seed=seed, precision=precision, compile=compile,
        progress=progress,
    )  # fmt: skip


def finetune(
    pretrained: nn.Module,
    card: ModelCard,
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
    precision: str = "auto",
    compile: bool = False,
    run_dir: str | Path | None = None,
    resume: bool = False,
    source: str | None = None,
    description: str = "fine-tuning",
    progress: bool = True,
) -> Trained:
    """Move the encoder of ``pretrained``, and only that, to a new task and train it there with a new head.

    Args:
        pretrained: the upstream model, plain or wrapped by DataParallel, DistributedDataParallel or torch.compile; it
            is left as it is.
        card: the upstream model's card; its normalisation is kept, since the encoder knows no other.
        train: the downstream training images; where they are larger or smaller than the upstream ones, the positions
            of the encoder are interpolated (:func:`vitlib.model.interpolate_positions`).
        recipe: a key of ``FINETUNING``, or a recipe of your own.
        freeze_encoder: True trains the head alone (a linear probe).
        finetune_epochs, batch_size, train_steps_per_epoch, eval_steps_per_epoch, seed, precision, compile: see
            :func:`fit`.
        run_dir, resume: as in :func:`pretrain`, with ``finetuned`` in the names.

    Raises:
        ValueError: for arguments out of range, images that are not square or cannot be cut into the encoder's patches,
            or a model that holds no ViT.
    """
    _check_arguments(locals())
    check_flag("resume", resume)
    recipe = named_recipe(recipe, FINETUNING)
    model = transfer_encoder(
        pretrained, len(train.classes), image_size=_side(train), drop=recipe.drop, drop_path=recipe.drop_path
    )
    model.vit_encoder.requires_grad_(not freeze_encoder)
    record = {"stage": "linear probe" if freeze_encoder else "fine-tuning", "source": source, "upstream": card.record}
    card = ModelCard(train.classes, card.mean, card.std, card.preset, record)
    lengths = {"train_steps_per_epoch": train_steps_per_epoch, "eval_steps_per_epoch": eval_steps_per_epoch}
    return _train_stage(
        "finetuned", model, train, card, recipe, validation_fraction, device, run_dir, resume,
        epochs=finetune_epochs, batch_size=batch_size, **lengths, seed=seed, precision=precision, compile=compile,
        description=description, progress=progress,
    )  # fmt: skip


def record_test(trained: Trained, test: LabelledImages, source: str, checkpoint: str | Path | None = None) -> Trained:
    """Score the final weights on the test split, once, and write the result into their card.

    Args:
        source: name of the test set, for the record: CIFAR and ciFAIR differ by some points.
        checkpoint: the file to write the card to as well, together with the weights.

    Returns:
        ``trained`` with ``test`` in its card's record: source, images, loss, accuracy.

    Raises:
        ValueError: for an argument that is not what it should be, or images that do not fit the model.
    """
    check_type("trained", trained, Trained, "what pretrain or finetune returns")
    check_type("test", test, LabelledImages, IMAGES)
    check_text("source", source)
    check_path("checkpoint", checkpoint, optional=True)
    score = evaluate(trained.model, test, trained.card)
    result = {"source": f"{source}, test split", "images": len(test), **score}
    card = replace(trained.card, record=trained.card.record | {"test": result})
    if checkpoint is not None and current_processes().is_first:
        save_checkpoint(checkpoint, trained.model, card)
    return replace(trained, card=card)


def _side(data: LabelledImages) -> int:
    """Pixels along a side of the images, which must be square."""
    height, width = data.images.shape[-2:]
    if height != width:
        raise ValueError(
            f"{data} are not square; load them with image_size, for instance image_size={min(height, width)}."
        )
    return width


def _train_stage(
    name, model, train, card, recipe, validation_fraction, device, run_dir, resume, **fit_arguments
) -> Trained:
    """What both stages share: split, train, keep the files in step with the training."""
    if resume and run_dir is None:
        raise ValueError("resume=True needs a run_dir; name the folder that the training is kept in.")
    if run_dir is not None:
        check_folder("run_dir", run_dir)  # better than after the first epoch
    device = resolve_device(device)
    settings = {key: value for key, value in fit_arguments.items() if key not in ("description", "progress")}
    settings |= {"precision": resolve_precision(fit_arguments["precision"], device), "recipe": asdict(recipe)}
    settings |= {"validation_fraction": validation_fraction, "processes": current_processes().count}
    resume_file = None
    if resume:
        identity = {
            "stage": card.record["stage"],
            "config": model.config,
            "images": fingerprint(train.images, train.labels),
            "device": device.type,
        }
        start = fingerprint(*model.state_dict().values())
        resume_file = ResumeFile(Path(run_dir) / f"{name}-resume.pt", settings | identity | {"start": start})
    train, validation = train_validation_split(train, validation_fraction, fit_arguments["seed"])
    model = model.to(device)

    def described(history: History) -> ModelCard:
        sizes = {"train_images": len(train), "validation_images": len(validation)}
        record = {**settings, **sizes, "epochs_run": history.epochs, "hardware": hardware(device)}
        return replace(card, record=card.record | record | {"versions": versions()})

    def save(model: nn.Module, history: History) -> None:
        if run_dir is None or not current_processes().is_first:
            return
        save_checkpoint(Path(run_dir) / f"{name}.safetensors", model, described(history))
        history.save(Path(run_dir) / f"{name}-history.json")
        # what Ctrl-C leaves in the middle of an epoch has not been validated
        if not history.interrupted and history.best is history.epochs[-1]:
            save_checkpoint(Path(run_dir) / f"{name}-best.safetensors", model, described(history))

    history = fit(model, train, validation, card, recipe, after_epoch=save, resume=resume_file, **fit_arguments)
    if history.interrupted:
        save(model, history)
    return Trained(model.eval(), described(history), history)


IMAGES = "LabelledImages, as load_images returns them"
_CHECKS: dict[str, Callable[[str, object], None]] = {  # of the arguments that several functions of this file take
    "model": partial(check_type, kind=nn.Module, allowed="a model that takes images to logits"),
    "train": partial(check_type, kind=LabelledImages, allowed=IMAGES),
    "validation": partial(check_type, kind=LabelledImages, allowed=IMAGES),
    "data": partial(check_type, kind=LabelledImages, allowed=IMAGES),
    "card": partial(check_type, kind=ModelCard, allowed="a ModelCard, as load_weights returns one"),
    "epochs": check_whole,
    "pretrain_epochs": check_whole,
    "finetune_epochs": check_whole,
    "batch_size": check_whole,
    "train_steps_per_epoch": partial(check_whole, optional=True),
    "eval_steps_per_epoch": partial(check_whole, optional=True),
    "steps": partial(check_whole, optional=True),
    "validation_fraction": partial(check_number, above=0, below=1, noun="a share"),
    "seed": check_seed,
    "precision": partial(check_choice, choices=PRECISIONS),
    "compile": check_flag,
    "freeze_encoder": check_flag,
    "progress": check_flag,
    "run_dir": partial(check_path, optional=True),
    "source": partial(check_text, optional=True),
    "description": check_text,
}

_check_resume_file = partial(check_type, kind=ResumeFile | None, allowed="a ResumeFile, or None")


def _check_arguments(values: dict) -> None:
    """Check what ``_CHECKS`` knows among a function's arguments."""
    for name, value in values.items():
        if name in _CHECKS:
            _CHECKS[name](name, value)


def _check_can_learn(model: nn.Module, train: LabelledImages, card: ModelCard) -> None:
    """Whether there is something to learn and the images and labels fit: asked with one image, before the training."""
    learns = any(parameter.requires_grad for parameter in model.parameters())
    check("model", model, learns, "one with parameters that require a gradient")
    try:
        logits = predict(without_wrappers(model), train.images[:1], card)
    except RuntimeError as error:  # a model other than a ViT has no sentence of its own
        reason = str(error).splitlines()[0]
        raise ValueError(f"model={brief(model)} cannot take {train} ({reason:.200}); give images that fit.") from error
    _check_logits(logits, train)


def _check_logits(logits: Tensor, data: LabelledImages) -> None:
    classes = int(data.labels.max()) + 1 if len(data) else 0
    if logits.ndim != 2 or logits.shape[1] < classes:
        raise ValueError(
            f"The model gives {list(logits.shape)} logits for {len(logits)} images, but their labels need {classes} "
            "classes; give a model with a classifier of as many, or data with fewer."
        )
