"""The recipes of the course, and the optimiser and learning rates that follow from a recipe."""

import math
import re
from dataclasses import dataclass, replace

import torch
from torch import nn

from vitlib.data.augment import CIFAR10_MEAN, CIFAR10_STD, PUBLISHED, Augmentation
from vitlib.model import ViTModel
from vitlib.training.muon import Muon


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, but not for how long or on which images.

    Args:
        optimizer: "sgd", "adamw", or "muon" for the matrices of the blocks and AdamW for everything else.
        learning_rate: the highest rate of the schedule.
        weight_decay: AdamW and Muon shrink weights by this times the rate per step; not biases, norms, CLS, positions.
        schedule: "constant", or "cosine", which is zero one step after the last.
        warmup: share of all steps in which the rate rises linearly from zero.
        momentum: of SGD.
        clip: largest norm of the gradient, or None.
        label_smoothing: probability mass that the target spreads over all classes.
        drop: dropout probability in the model.
        drop_path: probability of leaving out a branch of the last block (stochastic depth).
        head_rate: the classifier's learning rate as a multiple of the encoder's.
        position_rate: the same for CLS and positions.
        matrix_rate: the same for the matrices of the blocks under Muon.
        layer_decay: factor on the learning rate from each block to the one below it; 1 for none.
        ema_decay: decay of the exponential moving average of the weights (EMA), which is evaluated and kept; 0 keeps
            the weights themselves.
        augmentation: what is done to training images.
        mix_until: share of the training after which images are no longer mixed with each other. Here and in
            ``keep_patches`` an epoch counts by its end.
        keep_patches: pairs (until, share), both shares: while at most ``until`` of the training is over, every training
            image keeps ``share`` of its patches, drawn at random; after the last pair all. A step with half of the
            patches takes half the time (PatchDropout, Liu et al. 2023, arXiv:2208.07220; FLIP, Li et al. 2023,
            arXiv:2212.00794).
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
    drop_path: float = 0.0
    head_rate: float = 1.0
    position_rate: float = 1.0
    matrix_rate: float = 1.0
    layer_decay: float = 1.0
    ema_decay: float = 0.0
    augmentation: Augmentation = Augmentation()
    mix_until: float = 1.0
    keep_patches: tuple[tuple[float, float], ...] = ()
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __post_init__(self):  # a misspelt name would silently select another one
        for name, known in (("optimizer", ("sgd", "adamw", "muon")), ("schedule", ("constant", "cosine"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; choose one of {', '.join(known)}.")

    def share_of_patches(self, progress: float) -> float:
        """Return the share of its patches that an image keeps when the share ``progress`` of the training is over."""
        return next((share for until, share in self.keep_patches if progress <= until), 1.0)


# Above a recipe: what it is for and, if measured, its command, time on two CPU cores and result (more in RESULTS.md).

# The recipe of the published small system (FastEstimator's ViT example). Not the same: post-norm is the model's
# norm_first=False; the first weights are vitlib's; some training images are held out (there none were, and the test
# images were scored after every epoch); the head of fine-tuning is 10 rows of zeros (there 100 random ones).
#   python -m vitlib pretrain --recipe published --norm-first false: after 69 of 100 epochs 51.1 % of 1,000 held-out
#   images of CIFAR-100, 31,682 s beside other work (two processes, bfloat16); its own record is 51.54 % on
#   ciFAIR-100, 2,576 s on a GTX 1080 Ti
PUBLISHED_RECIPE = Recipe(
    optimizer="sgd",
    learning_rate=0.01,
    weight_decay=1e-4,
    drop=0.1,
    augmentation=PUBLISHED,
    statistics=(CIFAR10_MEAN, CIFAR10_STD),
)
# The usual recipe of today: AdamW, cosine schedule with warm-up, EMA.
MODERN = Recipe(
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=0.05,
    schedule="cosine",
    warmup=0.05,
    clip=1.0,
    label_smoothing=0.1,
    position_rate=5.0,
    ema_decay=0.999,
    augmentation=Augmentation(padding=4, flip=0.5, cutout=0),
)
# Runs of minutes, as in class. In so short a time a crop costs more than it gives, and positions have to grow fast.
#   python -m vitlib pretrain --upstream shapes100 --preset mini --recipe short --batch-size 32 --pretrain-epochs 5:
#   77 to 81 % on shapes100's test images, two minutes
SHORT = replace(
    MODERN,
    label_smoothing=0.0,
    position_rate=15.0,
    ema_decay=0.0,
    augmentation=Augmentation(padding=0, flip=0.5, cutout=0),
)
# About ten epochs on photographs. Muon (Jordan et al. 2024) makes every update of a matrix nearly orthogonal. In
# language models it needs about half of AdamW's compute; its rate is scaled so that AdamW's fit (Liu et al. 2025,
# arXiv:2502.16982).
#   python -m vitlib pretrain --upstream cifar100 --recipe muon --pretrain-epochs 11 --validation-fraction 0.02:
#   58.95 % on CIFAR-100's test images, 4,725 s
MUON = replace(MODERN, optimizer="muon", matrix_rate=3.0, ema_decay=0.995)
# A hundred epochs on photographs. Muon gains most from strong augmentation there (arXiv:2605.24770); half of the
# patches are dropped in the first 80 %, which halves the time of a step.
#   python -m vitlib pretrain --upstream cifar100 --recipe long --batch-size 256 --validation-fraction 0.02: 69.62 % on
#   CIFAR-100's test images, 35,613 s beside other work (the shipped cifar100-small)
LONG = replace(
    MUON,
    learning_rate=1.4e-3,
    ema_decay=0.999,
    drop_path=0.1,
    augmentation=Augmentation(padding=4, flip=0.5, cutout=0, randaugment=2, magnitude=9, erase=0.25, mixing=0.5),
    mix_until=0.95,
    keep_patches=((0.8, 0.5),),
)
RECIPES = {"published": PUBLISHED_RECIPE, "modern": MODERN, "short": SHORT, "muon": MUON, "long": LONG}

# Fine-tuning: the pretrained encoder should change little, its new head a lot.
#   python -m vitlib finetune --downstream cifar10 --recipe muon --batch-size 64 --finetune-epochs 1
#   --validation-fraction 0.02: 86.3 % on CIFAR-10's test images after one epoch from cifar100-small, 333 s
FINETUNE_MODERN = replace(
    MODERN,
    learning_rate=5e-4,
    warmup=0.1,
    label_smoothing=0.0,
    position_rate=1.0,
    head_rate=10.0,
    layer_decay=0.85,
    ema_decay=0.98,
)
FINETUNE_MUON = replace(
    FINETUNE_MODERN,
    optimizer="muon",
    learning_rate=1e-3,
    matrix_rate=3.0,
    head_rate=5.0,
    layer_decay=0.8,
    augmentation=Augmentation(padding=0, flip=0.5, cutout=0),  # in one epoch no image comes twice
)
FINETUNING = {
    "published": PUBLISHED_RECIPE,
    "modern": FINETUNE_MODERN,
    "short": replace(SHORT, warmup=0.1, position_rate=1.0, head_rate=10.0),
    "muon": FINETUNE_MUON,
    "long": FINETUNE_MUON,
}


def named_recipe(recipe: str | Recipe, known: dict[str, Recipe]) -> Recipe:
    """Return the recipe of this name; a ``Recipe`` is returned as it is.

    Raises:
        ValueError: for a name that is not in ``known``.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in known:
        raise ValueError(f"recipe={recipe!r} is not known; choose one of {', '.join(known)}, or give a Recipe.")
    return known[recipe]


class Optimizer:
    """The recipe's optimiser with its schedule, for all parameters that require a gradient.

    For Muon there are two: Muon for the matrices of the blocks, AdamW for the rest.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, total_steps: int):
        self.model, self.recipe, self.total_steps = model, recipe, total_steps
        self.parts = build_optimizers(model, recipe)
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def rate(self, step: int) -> float:
        """Return the learning rate of optimiser step ``step``, from 0, without the factors of single layers."""
        return self.recipe.learning_rate * rate_factor(self.recipe, step, self.total_steps)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self, step: int) -> None:
        """Clip the gradient and update the parameters at the rate of this step."""
        factor = rate_factor(self.recipe, step, self.total_steps)
        if self.recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for part, peaks in zip(self.parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            part.step()

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return the recipe's optimiser for all parameters that require a gradient; for Muon two, AdamW and Muon.

    AdamW and Muon decay the weights of linear layers and convolutions only: decay would harm biases, norms, CLS and
    positions, whose size matters. SGD decays everything, as the published system does. A model other than a ViT has no
    CLS, positions or blocks, so their factors change nothing there.

    Raises:
        ValueError: for layer decay or dropped patches with a model other than a ViT.
    """
    for name, none in (("layer_decay", 1), ("keep_patches", ())):
        if (value := getattr(recipe, name)) != none and not isinstance(model, ViTModel):
            raise ValueError(f"{name}={value} needs a ViTModel; give a recipe without it.")
    blocks = len(model.vit_encoder.encoder) if isinstance(model, ViTModel) else 0
    matrices: dict[tuple[float, float], list[nn.Parameter]] = {}
    others: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_position = name.endswith(("cls_token", "position_embedding"))
        is_matrix = recipe.optimizer == "muon" and ".encoder." in name and parameter.ndim == 2
        decays = recipe.optimizer == "sgd" or (parameter.ndim > 1 and not is_position)
        factor = recipe.layer_decay ** _layers_above(name, blocks)
        if is_matrix:
            factor *= recipe.matrix_rate
        elif is_position:
            factor *= recipe.position_rate
        elif "classifier" in name:
            factor *= recipe.head_rate
        group = recipe.learning_rate * factor, recipe.weight_decay if decays else 0.0
        (matrices if is_matrix else others).setdefault(group, []).append(parameter)
    if recipe.optimizer == "sgd":
        return [torch.optim.SGD(_as_groups(others), momentum=recipe.momentum, fused=True)]
    optimizers = [torch.optim.AdamW(_as_groups(others), fused=True)]
    if matrices:
        optimizers.append(Muon(_as_groups(matrices)))
    return optimizers


def _as_groups(parameters: dict[tuple[float, float], list[nn.Parameter]]) -> list[dict]:
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in parameters.items()]


def _layers_above(name: str, blocks: int) -> int:
    """Return how many layers lie between a parameter and the logits: 0 for head and final norm, ``blocks`` + 1 for the
    embeddings (Clark et al. 2020, arXiv:2003.10555, appendix B; BEiT's code counts the same way)."""
    if "embedding" in name or "cls_token" in name:
        return blocks + 1
    block = re.search(r"encoder\.encoder\.(\d+)\.", name)
    return blocks - int(block[1]) if block else 0


def rate_factor(recipe: Recipe, step: int, total: int) -> float:
    """Return the learning rate of optimiser step ``step`` (from 0) of ``total``, as a share of the highest."""
    warmup = round(recipe.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if recipe.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
