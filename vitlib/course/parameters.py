"""Every parameter that a notebook of the course takes: its type, its meaning and what it may be."""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vitlib.arguments import brief, check_path, is_number
from vitlib.data.images import check_source
from vitlib.model import POOLINGS, PRESETS
from vitlib.training.recipes import RECIPES
from vitlib.training.stages import PRECISIONS

ARMS = ("fine-tuning", "linear probe", "random probe", "from scratch")  # of chapter 04's comparison
WORDS_FOR_NONE = ("None", "none", "null", "~")
WORDS_FOR_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOUNS = {int: "a whole number", float: "a number", str: "a text that is not empty"}


def _is_source(name: str, value: str) -> None:
    check_source(value, name)


def _is_device(name: str, value: str) -> None:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        hint = near_match(value, ("auto", "cpu", "cuda", "mps"))
        raise ValueError(f"{name}={value!r} is not allowed; choose one of auto, cpu, cuda, cuda:0, mps{hint}.")
    # asked here without touching the device: a process that only starts kernels should hold no GPU memory
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    kind = value.split(":")[0]
    if kind in available and not available[kind]():
        raise ValueError(f"{name}={value!r} is not to be had on this machine; choose auto or cpu.")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a notebook.

    Args:
        name: the variable that the notebook's parameters cell sets.
        type: int, float, bool or str; ``object`` accepts anything, for parameters outside the table.
        help: one short phrase, repeated as the comment in the parameters cell. papermill's parser wants no "=" in it.
        minimum, maximum: bounds of a number, both included.
        choices: the texts to choose from; empty for any text.
        optional: whether None is a value too.
        rule: a further check of a text, given name and value; it raises ValueError with a sentence of its own.
    """

    name: str
    type: type
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    rule: Callable[[str, str], None] | None = None

    @property
    def annotation(self) -> str:
        """The type as a parameters cell writes it; papermill reads ``Optional[int]`` but not ``int | None``."""
        return f"Optional[{self.type.__name__}]" if self.optional else self.type.__name__

    @property
    def allowed(self) -> str:
        """What the value may be, in words."""
        if self.choices:
            words = f"one of {', '.join(self.choices)}"
        elif self.type is bool:
            words = "True or False"
        else:
            words = NOUNS[self.type]
            if self.minimum is not None:
                words += f" of at least {self.minimum}"
            if self.maximum is not None:
                words += f"{' and' if self.minimum is not None else ' of'} at most {self.maximum}"
        return f"{words}, or None" if self.optional else words

    def check(self, value: object) -> None:
        """Return quietly if ``value`` is allowed.

        Raises:
            ValueError: one sentence with the name, the value, what is allowed and the nearest choice.
        """
        if self.type is object or (value is None and self.optional):
            return
        if not self._has_type(value) or not self._in_range(value):
            hint = near_match(value, self.choices)
            raise ValueError(f"{self.name}={brief(value)} is not allowed; give {self.allowed}{hint}.")
        if self.rule is not None:
            self.rule(self.name, value)

    def _has_type(self, value: object) -> bool:
        if isinstance(value, bool):  # Python counts True as the int 1, and a batch size of True is a mistake
            return self.type is bool
        if self.type is float:
            return is_number(value)
        return isinstance(value, self.type)

    def _in_range(self, value) -> bool:
        if self.choices:
            return value in self.choices
        if self.type is str:
            return bool(value.strip())
        return (self.minimum is None or value >= self.minimum) and (self.maximum is None or value <= self.maximum)

    def parse(self, text: str) -> object:
        """The value that a text from the command line stands for; a text that is no such value comes back as it is,
        for :meth:`check` to refuse.
        """
        if self.optional and text in WORDS_FOR_NONE:
            return None
        if self.type is bool:
            return WORDS_FOR_BOOLS.get(text.lower(), text)
        if self.type is object:
            import yaml  # here, since training from the command line does without it

            return yaml.safe_load(text)
        try:
            return self.type(text)
        except ValueError:
            return text


def near_match(value: object, choices) -> str:
    """The words ``(did you mean 'small'?)`` when one of ``choices`` is close to ``value``, else nothing."""
    close = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


PARAMETERS: dict[str, Parameter] = {
    parameter.name: parameter
    for parameter in (
        # which images
        Parameter("dataset", str, "images to look at: a name such as shapes100, or a folder", rule=_is_source),
        Parameter("upstream", str, "images to pretrain on: a name such as shapes100, or a folder", rule=_is_source),
        Parameter("downstream", str, "images to fine-tune on: a name such as shapes10, or a folder", rule=_is_source),
        Parameter(
            "data_dir", str, "where downloads are kept; None for the usual cache", optional=True, rule=check_path
        ),
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
        Parameter("precision", str, "bfloat16 halves matrix products; auto does on GPUs", choices=PRECISIONS),
        Parameter("compile", bool, "let torch.compile translate the model first"),
        Parameter(
            "weights",
            str,
            "where the encoder comes from: a shipped name or a checkpoint file",
            optional=True,
            rule=check_path,
        ),
        Parameter("official_weights", bool, "download the published ViT-B/16 (about 350 MB) and use it"),
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
        Parameter("device", str, "where to compute: auto, cpu, cuda, cuda:0 or mps", rule=_is_device),
        Parameter("run_dir", str, "folder for what this run saves", rule=check_path),
        Parameter("strict_checks", bool, "stop at an exercise that is not solved"),
    )
}


def check_parameters(values: Mapping[str, object]) -> None:
    """Check the course's parameters among ``values``; other names are left alone, so ``globals()`` will do.

    Raises:
        ValueError: one sentence about the first value that is not allowed.
    """
    for name, parameter in PARAMETERS.items():
        if name in values:
            parameter.check(values[name])
