"""Every parameter of the course: its type, its meaning and its allowed values.

Notebooks, the command line and YAML files all check here what people type.
"""

import math
import os
import re
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

import torch

from vitlib.data.images import check_source
from vitlib.model import POOLINGS, PRESETS
from vitlib.training import PRECISIONS, RECIPES
from vitlib.utils import near_match
from vitlib.weights.checkpoint import names_a_file, shipped_weights
from vitlib.weights.official import OFFICIAL

ARMS = ("fine-tuning", "linear probe", "random probe", "from scratch")  # of chapter 04's comparison
WORDS_FOR_NONE = ("None", "none", "null", "~")
WORDS_FOR_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOUNS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text that is not empty"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a notebook or a command.

    Args:
        name: the variable that the notebook's parameters cell sets.
        type: int, float, bool or str; ``object`` accepts anything, for parameters outside the table.
        help: one short phrase, repeated as the comment in the parameters cell; papermill's parser allows no "=" in it.
        minimum, maximum: bounds of a number, both included.
        choices: the allowed texts; empty for any text.
        optional: whether None is allowed too.
        rule: a further check of a text, given name and value; it raises ValueError, or returns the value to use.
    """

    name: str
    type: type
    help: str
    minimum: float = -math.inf
    maximum: float = math.inf
    choices: tuple[str, ...] = ()
    optional: bool = False
    rule: Callable[[str, str], str] | None = None

    @property
    def allowed(self) -> str:
        """The allowed values, in words."""
        noun = f"one of {', '.join(self.choices)}" if self.choices else NOUNS[self.type]
        limits = {"at least": self.minimum, "at most": self.maximum}
        words = " and ".join(f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit))
        allowed = f"{noun} of {words}" if words else noun
        return f"{allowed}, or None" if self.optional else allowed

    def check(self, value: object) -> object:
        """Return the value to use: ``value``, with ``~`` of a path written out.

        Raises:
            ValueError: one sentence with the name, the value, the allowed values and the nearest choice.
        """
        if self.type is object or (value is None and self.optional):
            return value
        if not self._allows(value):
            hint = near_match(value, self.choices)
            raise ValueError(f"{self.name}={value!r:.80} is not allowed; give {self.allowed}{hint}.")
        return value if self.rule is None else self.rule(self.name, value)

    def _allows(self, value: object) -> bool:
        kinds = (int, float) if self.type is float else self.type
        if not isinstance(value, kinds) or isinstance(value, bool) != (self.type is bool):  # True is an int, too
            return False
        if self.type is str:
            return value in self.choices if self.choices else bool(value.strip())
        return self.minimum <= value <= self.maximum and abs(value) < math.inf

    def parse(self, text: str) -> object:
        """Return the value that a text of the command line stands for, or the text, for :meth:`check` to refuse."""
        if self.optional and text in WORDS_FOR_NONE:
            return None
        if self.type is bool:
            return WORDS_FOR_BOOLS.get(text.lower(), text)
        if self.type is object:
            import yaml  # training from the command line needs no yaml

            return yaml.safe_load(text)
        try:
            return self.type(text)
        except ValueError:
            return text


# Rules, see Parameter.rule: they take the name and the text of a parameter.


def path(name: str, value: str) -> str:
    return os.path.expanduser(value)


def source(name: str, value: str) -> str:
    check_source(value, name, tested=True)
    return os.path.expanduser(value)


def model(name: str, value: str) -> str:
    known = *shipped_weights(), *OFFICIAL
    if value not in (*known, "random") and not names_a_file(value):
        hint = near_match(value, known)
        raise ValueError(f"{name}={value!r:.80} is not known; give a file, or one of {', '.join(known)}{hint}.")
    return os.path.expanduser(value)


def device(name: str, value: str) -> str:
    # these do not touch the device: a process that only starts kernels should hold no GPU memory
    there = ["auto", "cpu", *["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available()]
    if re.sub(r"^cuda:\d+$", "cuda", value) not in there:
        hint = near_match(value, there)
        raise ValueError(f"{name}={value!r} is not available here; choose one of {', '.join(there)}{hint}.")
    return value


_TABLE = (
    # which images
    Parameter("dataset", str, "images to look at: a name such as shapes100, or a folder", rule=source),
    Parameter("upstream", str, "images to pretrain on: a name such as shapes100, or a folder", rule=source),
    Parameter("downstream", str, "images to fine-tune on: a name such as shapes10, or a folder", rule=source),
    Parameter("data_dir", str, "where downloads are kept; None for the usual cache", optional=True, rule=path),
    Parameter("image_size", int, "pixels per image side; None for the model's own", 4, 1024, optional=True),
    Parameter("num_images", int, "test images to examine", 1, 100_000),
    Parameter("labelled_images", int, "training images to use, equally many of each class", 1, 10_000_000),
    # which model and training
    Parameter("preset", str, "size of the model", choices=tuple(PRESETS)),
    Parameter("patch_size", int, "pixels per side of a patch", 1, 1024),
    Parameter("position_embedding", bool, "train position embeddings, or keep them all at zero"),
    Parameter("norm_first", bool, "LayerNorm before each sublayer (the ViT paper) or after it"),
    Parameter("pooling", str, "what the classifier sees: the CLS token or the patches' mean", choices=POOLINGS),
    Parameter("recipe", str, "optimiser, schedule and augmentation", choices=tuple(RECIPES)),
    Parameter("precision", str, "width of matrix products; auto is bfloat16 where that is fast", choices=PRECISIONS),
    Parameter("compile", bool, "let torch.compile translate the model first"),
    Parameter("weights", str, "the encoder: a shipped name, vit_b_16 or a checkpoint file", optional=True, rule=model),
    Parameter("official_weights", bool, "download torchvision's ViT-B/16 (about 350 MB) for the photograph"),
    Parameter("freeze_encoder", bool, "train the head alone (a linear probe)"),
    Parameter("arm", str, "where the encoder comes from and what is trained", choices=ARMS),
    # the five of the published system
    Parameter("batch_size", int, "images per training step", 1, 65536),
    Parameter("pretrain_epochs", int, "passes over the upstream images", 1, 10_000),
    Parameter("finetune_epochs", int, "passes over the downstream images", 1, 10_000),
    Parameter("steps", int, "training steps in all", 1, 1_000_000),
    Parameter("train_steps_per_epoch", int, "training steps per epoch; None for all images", 1, optional=True),
    Parameter("eval_steps_per_epoch", int, "batches per evaluation; None for all images", 1, optional=True),
    Parameter("validation_fraction", float, "share of the training images to validate on", 0.001, 0.9),
    # how it is run
    Parameter("seed", int, "start of every random draw", 0, 2**32 - 1),
    Parameter("seeds", int, "repetitions of the comparison, each with its own seed", 1, 100),
    Parameter("device", str, "where to compute: auto, cpu, cuda, cuda:0 or mps", rule=device),
    Parameter("run_dir", str, "folder for what this run saves", rule=path),
)
PARAMETERS = {parameter.name: parameter for parameter in _TABLE}


def check_parameters(values: MutableMapping[str, object]) -> None:
    """Check the course's parameters among ``values``, and write ``~`` in their paths out as the home folder.

    Other names are left alone, so a notebook passes ``globals()``.

    Raises:
        ValueError: one sentence about the first value that is not allowed.
    """
    for name, parameter in PARAMETERS.items():
        if name in values:
            values[name] = parameter.check(values[name])
