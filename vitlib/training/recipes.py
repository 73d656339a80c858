"""How models are trained: the recipes of the course, and the optimiser and learning rates that follow from one."""

import math
import re
from dataclasses import dataclass, replace

import torch
from torch import nn

from vitlib.arguments import check, check_choice, check_number, check_type, is_number
from vitlib.data.augment import CIFAR10_MEAN, CIFAR10_STD, PUBLISHED, Augmentation
from vitlib.model import ViTModel

OPTIMIZERS = ("sgd", "adamw", "muon")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, apart from how long and on what.

    Args:
        optimizer: "sgd", "adamw", or "muon" for the matrices of the blocks and AdamW for everything else.
        learning_rate: the highest rate of the schedule.
        weight_decay: per step; with AdamW not applied to biases, norms, CLS and positions.
        schedule: "constant", or "cosine" down to zero at the last step.
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
        average: decay of the moving average of the weights (EMA) that is evaluated and kept; 0 keeps the weights
            themselves.
        augmentation: what is done to training images.
        mix_until: share of the training after which images are no longer mixed with each other.
        keep_patches: pairs (until, share): up to this share of the training, every training image keeps this share of
            its patches, drawn at random; after the last pair all. A step with half of the patches takes half the time
            (PatchDropout, Liu et al. 2023, arXiv:2208.07220; FLIP, Li et al. 2023, arXiv:2212.00794).
        statistics: (mean, std) to normalise with; None measures them on the training images.

    Raises:
        ValueError: one sentence, for a value that is not allowed.
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
    average: float = 0.0
    augmentation: Augmentation = Augmentation()
    mix_until: float = 1.0
    keep_patches: tuple[tuple[float, float], ...] = ()
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __post_init__(self):
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        for name in ("learning_rate", "weight_decay", "head_rate", "position_rate", "matrix_rate"):
            check_number(name, getattr(self, name), least=0)
        for name in ("warmup", "mix_until"):
            check_number(name, getattr(self, name), least=0, most=1, noun="a share")
        for name in ("momentum", "average", "label_smoothing"):
            check_number(name, getattr(self, name), least=0, below=1)
        for name in ("drop", "drop_path"):
            check_number(name, getattr(self, name), least=0, below=1, noun="a probability")
        check_number("layer_decay", self.layer_decay, above=0, most=1)
        check_number("clip", self.clip, above=0, optional=True)
        check_type("augmentation", self.augmentation, Augmentation, "an Augmentation")
        for until, share in self.keep_patches:
            check_number("keep_patches", until, above=0, most=1, noun="a share of the training")
            check_number("keep_patches", share, above=0, most=1, noun="a share of the patches")
        is_pair = self.statistics is None or _is_statistics(self.statistics)
        check("statistics", self.statistics, is_pair, "(mean, std), each with one number per channel, or None")

    def patches_kept(self, progress: float) -> float:
        """The share of its patches that a training image keeps when this share of the training is over."""
        return next((share for until, share in self.keep_patches if progress <= until), 1.0)


def _is_statistics(value: object) -> bool:
    """Whether a value is a mean and a standard deviation for each of some channels."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    if not all(isinstance(numbers, tuple | list) and all(map(is_number, numbers)) for numbers in value):
        return False
    mean, std = value
    return 0 < len(mean) == len(std) and min(std) >= 0


# "published" is the small published system to the letter; "modern" is what the field has done since, and "long" the
# same with the strong augmentation that a hundred epochs need. "short" is for runs of minutes: there a crop costs more
# than it gives, and positions have to leave their small start quickly.
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
        label_smoothing=0.1,
        position_rate=5.0,
        average=0.999,
        augmentation=Augmentation(padding=4, flip=0.5, hole=0),
    ),
}
# Muon (Jordan et al. 2024) makes every update of a matrix orthogonal. Per image it learns much faster than AdamW in
# short trainings on photographs; its rate is scaled so that AdamW's rates fit (Liu et al. 2025, arXiv:2502.16982).
RECIPES["muon"] = replace(RECIPES["modern"], optimizer="muon", matrix_rate=3.0, average=0.995)
RECIPES["long"] = replace(
    RECIPES["muon"],
    learning_rate=1.4e-3,
    average=0.999,
    drop_path=0.1,
    augmentation=Augmentation(padding=4, flip=0.5, hole=0, randaugment=2, magnitude=9, erase=0.25, mixing=0.5),
    mix_until=0.95,
    keep_patches=((0.8, 0.5),),
)
RECIPES["short"] = replace(
    RECIPES["modern"],
    augmentation=Augmentation(padding=0, flip=0.5, hole=0),
    label_smoothing=0.0,
    position_rate=15.0,
    average=0.0,
)
# The pretrained encoder is to move little, its new head a lot.
FINETUNING = {
    "published": RECIPES["published"],
    "modern": replace(
        RECIPES["modern"],
        learning_rate=5e-4,
        warmup=0.1,
        label_smoothing=0.0,
        head_rate=10.0,
        position_rate=1.0,
        layer_decay=0.85,
        average=0.98,
    ),
    "short": replace(RECIPES["short"], warmup=0.1, head_rate=10.0, position_rate=1.0),
}
FINETUNING["muon"] = replace(
    FINETUNING["modern"], optimizer="muon", learning_rate=1e-3, head_rate=5.0, matrix_rate=3.0, layer_decay=0.9
)
FINETUNING["long"] = FINETUNING["muon"]  # what "long" has trained is fine-tuned as usual


def named_recipe(recipe: str | Recipe, known: dict[str, Recipe]) -> Recipe:
    """A recipe by its name in ``known``; a recipe of one's own is given back. Raises ValueError for other names."""
    if isinstance(recipe, Recipe):
        return recipe
    check_choice("recipe", recipe, known, otherwise=", or give a Recipe")
    return known[recipe]


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The recipe's optimiser over all parameters that are to be trained; for Muon two, that and AdamW.

    AdamW and Muon decay the weights of linear layers and convolutions only: biases, norms, CLS and positions have no
    scale that decay could keep small without harm. SGD decays everything, as the published system does.

    A model other than a ViT is trained, too: what the recipe says about CLS, positions and the matrices of the blocks
    finds nothing there.

    Raises:
        ValueError: for a layer decay for a model without the blocks of a ViT.
    """
    if recipe.layer_decay != 1 and not isinstance(model, ViTModel):
        raise ValueError(f"layer_decay={recipe.layer_decay} needs the blocks of a ViTModel; give a recipe without it.")
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
        optimizers.append(torch.optim.Muon(_as_groups(matrices), adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _as_groups(parameters: dict[tuple[float, float], list[nn.Parameter]]) -> list[dict]:
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in parameters.items()]


def _layers_above(name: str, blocks: int) -> int:
    """How many layers lie between a parameter and the logits: 0 for head and final norm, ``blocks`` + 1 for the
    embeddings (Clark et al. 2020, arXiv:2003.10555, appendix B; BEiT's code counts the same way)."""
    if "embedding" in name or "cls_token" in name:
        return blocks + 1
    block = re.search(r"encoder\.encoder\.(\d+)\.", name)
    return blocks - int(block[1]) if block else 0


def rate_factor(recipe: Recipe, step: int, total: int) -> float:
    """The share of the highest learning rate to use in optimiser step ``step`` (from 0) of ``total``."""
    warmup = round(recipe.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if recipe.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
