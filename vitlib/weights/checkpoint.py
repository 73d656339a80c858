"""Weights on disk: one safetensors file holds the tensors and a card that says what they are.

safetensors files are read without running any code, unlike pickles. The card travels in the file's metadata as JSON.
"""

import dataclasses
import functools
import hashlib
import json
import platform
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from vitlib.arguments import brief, check, check_path, check_text, check_type, check_whole, is_number
from vitlib.model import ViTModel, interpolate_positions
from vitlib.utils import atomic_write, printable

PRETRAINED = Path(__file__).parent / "pretrained"


@dataclass(frozen=True)
class ModelCard:
    """What one has to know to use a set of weights.

    Args:
        classes: names of the classes, in the order of the logits.
        mean, std: the normalisation the model was trained with, one number per channel, in [0, 1].
        preset: name of the model's size, if it has one.
        record: how the weights came about: data set, recipe, seed, history, versions.

    Raises:
        ValueError: one sentence, for a value that is not allowed.
    """

    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preset: str | None = None
    record: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("classes", "mean", "std"):  # JSON has no tuples
            kind, words = (str, "names") if name == "classes" else (int | float, "numbers, one per channel")
            values = getattr(self, name)
            is_list = isinstance(values, tuple | list) and all(isinstance(value, kind) for value in values)
            is_list = is_list and (kind is str or len(values) > 0)
            check(name, values, is_list and (kind is str or all(map(is_number, values))), f"a tuple of {words}")
            object.__setattr__(self, name, tuple(values))
        check("std", self.std, len(self.std) == len(self.mean), f"{len(self.mean)} numbers, as many as mean has")
        check_text("preset", self.preset, optional=True)
        check_type("record", self.record, dict, "a dict")


@functools.cache
def versions() -> dict[str, str]:
    """Versions that a record of a run should name; with the commit where vitlib runs out of a git checkout."""
    named = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "vitlib")}}

    def git(*words: str) -> str:
        command = ["git", "-C", str(PRETRAINED), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "index.json")  # vitlib's own repository, not one that it is installed in
        commit = git("describe", "--always", "--dirty", "--abbrev=10")
    except (OSError, subprocess.SubprocessError):
        return named
    return named | {"commit": commit}


def without_wrappers(model: nn.Module) -> nn.Module:
    """What is inside DataParallel, DistributedDataParallel or torch.compile, whatever their order: any module."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        else:
            return model


def unwrap(model: nn.Module, name: str = "model") -> ViTModel:
    """The ViT inside the wrappers that :func:`without_wrappers` knows; ``name`` is the argument's, for the sentence.

    Raises:
        ValueError: if there is no :class:`ViTModel` inside.
    """
    inner = without_wrappers(model)
    if not isinstance(inner, ViTModel):
        value = type(model).__name__ if isinstance(model, nn.Module) else brief(model)
        raise ValueError(f"{name}={value} holds no ViTModel; give a ViTModel, wrapped or not.")
    return inner


def transfer_encoder(pretrained: nn.Module, num_classes: int, **overrides) -> ViTModel:
    """A new model with the encoder of ``pretrained`` and a new, all-zero head for ``num_classes`` classes.

    A head of zeros gives every class the same probability, so that the first loss is exactly ln(num_classes) and the
    first gradients do not pull the encoder towards a random head (the paper's section 3.2 does the same). A pre-logits
    layer belongs to the old head and stays behind with it. With another ``image_size`` the positions are interpolated.

    Args:
        pretrained: a :class:`ViTModel`, possibly wrapped; it is left as it is.
        overrides: arguments of :class:`ViTModel` that may differ without changing a weight's shape, such as ``drop``,
            and ``image_size``.

    Raises:
        ValueError: for a model that holds no ViT, or a value that it cannot have.
    """
    source = unwrap(pretrained, "pretrained")
    check_whole("num_classes", num_classes)
    if "image_size" in overrides:
        source = with_image_size(source, overrides["image_size"])
    model = ViTModel(**{**source.config, "num_classes": num_classes, "pre_logits": None, **overrides})
    model.vit_encoder.load_state_dict(source.vit_encoder.state_dict())
    nn.init.zeros_(model.linear_classifier.weight)
    nn.init.zeros_(model.linear_classifier.bias)
    return model


def with_image_size(model: ViTModel, image_size: int) -> ViTModel:
    """The same model for images of ``image_size`` pixels a side: its positions are interpolated, all other weights
    copied. The patches keep their size, so there are more or fewer of them. Where the size is already right, this is
    ``model`` itself.

    Raises:
        ValueError: if the patch size does not divide ``image_size``.
    """
    check_type("model", model, ViTModel, "a ViTModel")
    check_whole("image_size", image_size)
    if image_size == model.config["image_size"]:
        return model
    other = ViTModel(**{**model.config, "image_size": image_size})
    weights, name = model.state_dict(), "vit_encoder.embedding.position_embedding"
    weights[name] = interpolate_positions(weights[name], image_size // model.config["patch_size"])
    other.load_state_dict(weights)
    return other.train(model.training)


def save_checkpoint(path: str | Path, model: nn.Module, card: ModelCard, dtype: torch.dtype = torch.float32) -> None:
    """Write weights and card to ``path``, whole or not at all. float16 halves the file and loads as float32 again.

    Raises:
        ValueError: for a model that holds no ViT, or another argument that is not what it should be.
    """
    from safetensors.torch import save_file

    check_path("path", path)
    check_type("card", card, ModelCard, "a ModelCard")
    is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    check("dtype", dtype, is_float, "a floating point dtype, such as torch.float16")
    model = unwrap(model)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    description = {"config": model.config, "card": dataclasses.asdict(card)}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"vitlib": json.dumps(description)})


def load_checkpoint(path: str | Path) -> tuple[ViTModel, ModelCard]:
    """The model, float32 and in eval mode on the CPU, and its card.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a checkpoint of vitlib, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    check_path("path", path)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no checkpoint at {printable(path)}; train one first (notebook 03), or check the path."
        )
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})["vitlib"])
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
        model = ViTModel(**description["config"])
        model.load_state_dict(tensors)
        card = ModelCard(**description["card"])
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} is not a whole checkpoint of vitlib ({type(error).__name__}: {reason}); "
            "write it again with save_checkpoint, or train again."
        ) from error
    return model.eval(), card


def load_pretrained(name: str) -> tuple[ViTModel, ModelCard]:
    """A model that ships with vitlib, and its card; its file is checked against a fixed SHA-256 first.

    Raises:
        ValueError: for an unknown name, or a file that is not the one that shipped.
    """
    index = json.loads((PRETRAINED / "index.json").read_text())
    if not isinstance(name, str) or name not in index:
        raise ValueError(f"There are no pretrained weights named {brief(name)}; choose one of {', '.join(index)}.")
    path = PRETRAINED / f"{name}.safetensors"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != index[name]:
        raise ValueError(f"The weights {path.name} are missing or not the ones that shipped; install vitlib again.")
    return load_checkpoint(path)


def load_weights(weights: str | Path, image_size: int | None = None) -> tuple[ViTModel, ModelCard]:
    """Weights by whatever names them: a file of :func:`save_checkpoint`, or a name of :func:`load_pretrained`; with
    ``image_size``, :func:`with_image_size` to it. Errors are theirs."""
    check_path("weights", weights)
    check_whole("image_size", image_size, optional=True)
    is_file = str(weights).endswith(".safetensors") or Path(weights).exists()
    model, card = load_checkpoint(weights) if is_file else load_pretrained(str(weights))
    return (model if image_size is None else with_image_size(model, image_size)), card


def fingerprint(*tensors: Tensor) -> str:
    """A short name for the contents of tensors: the first 16 hexadecimal digits of the SHA-256 of their bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().numpy().data)
    return sha.hexdigest()[:16]
