"""Weights on disk: one safetensors file holds the tensors and a card that describes them.

safetensors files are read without running any code, unlike pickles. The card travels in the file's metadata as JSON.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vitlib.model import ViTModel, interpolate_positions
from vitlib.utils import atomic_write, printable

PRETRAINED = Path(__file__).parent / "pretrained"


@dataclass(frozen=True)
class ModelCard:
    """Metadata of a checkpoint.

    Args:
        classes: names of the classes, in the order of the logits.
        mean, std: the normalisation the model was trained with, one number per channel, in [0, 1].
        preset: name of the model's size, if it has one.
        record: how the weights were trained: data set, recipe, seed, history, versions; empty if that is unknown.
    """

    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preset: str | None = None
    record: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("classes", "mean", "std"):  # JSON has no tuples
            object.__setattr__(self, name, tuple(getattr(self, name)))


def save_checkpoint(path: str | Path, model: nn.Module, card: ModelCard, dtype: torch.dtype = torch.float32) -> None:
    """Write weights and card to ``path``, atomically. float16 halves the file and loads as float32 again.

    Raises:
        ValueError: for a model that holds no ViT.
    """
    model = unwrap(model)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    description = {"config": model.config, "card": dataclasses.asdict(card)}
    with atomic_write(path) as temporary:
        # written by Python, so that a full disk is an OSError
        temporary.write_bytes(save(tensors, metadata={"vitlib": json.dumps(description, default=str)}))


def load_checkpoint(path: str | Path) -> tuple[ViTModel, ModelCard]:
    """Load a model, float32 and in eval mode on the CPU, and its card.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or holds weights of another library.
    """
    path = Path(path).expanduser()
    if not path.is_file():  # a folder is refused too, even one that holds checkpoints
        raise FileNotFoundError(
            f"There is no checkpoint at {printable(path)}; name a .safetensors file, or train one first (notebook 03)."
        )
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("vitlib", "null"))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
        if description is None:
            raise ValueError("it has no model card")
        model = ViTModel(**description["config"])
        model.load_state_dict(tensors)
        card = ModelCard(**description["card"])
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{printable(path)} is not a whole checkpoint of vitlib ({reason:.150}); copy it again, or, if it holds "
            "weights of another library, convert it with vitlib.weights.official.from_file."
        ) from error
    return model.eval(), card


def shipped_weights() -> dict[str, Path]:
    """Return the files of the models that ship with vitlib, by their names."""
    return {file.stem: file for file in sorted(PRETRAINED.glob("*.safetensors"))}


def load_pretrained(name: str) -> tuple[ViTModel, ModelCard]:
    """Load a model that ships with vitlib, and its card. Raises ValueError for an unknown name."""
    shipped = shipped_weights()
    if name not in shipped:
        raise ValueError(
            f"There are no pretrained weights named {name!r}; choose one of {', '.join(shipped)}, or an official name, "
            "such as vit_b_16, which load_weights downloads."
        )
    return load_checkpoint(shipped[name])


def names_a_file(weights: str | Path) -> bool:
    """Return whether ``weights`` is a path, which need not exist, and not the name of a model: no name has a dot."""
    return bool(os.path.splitext(weights)[1]) or os.path.exists(os.path.expanduser(weights))


def load_weights(weights: str | Path, image_size: int | None = None) -> tuple[ViTModel, ModelCard]:
    """Load a model and its card, for images of ``image_size`` pixels a side if that is given.

    Args:
        weights: a file by :func:`save_checkpoint`, a name for :func:`load_pretrained`, or one for
            :func:`vitlib.weights.official.official_weights`, which downloads.

    Raises:
        FileNotFoundError, ValueError, OSError: as these functions.
    """
    from vitlib.weights.official import OFFICIAL, official_weights  # not above: that module imports this one

    if names_a_file(weights):
        model, card = load_checkpoint(weights)
    else:
        model, card = official_weights(weights) if weights in OFFICIAL else load_pretrained(str(weights))
    return (model if image_size is None else with_image_size(model, image_size)), card


def with_image_size(model: ViTModel, image_size: int) -> ViTModel:
    """Return the same model for images of another size: its positions are interpolated, all other weights copied.

    The patches keep their size, so there are more or fewer of them. At its own size ``model`` itself is returned.

    Raises:
        ValueError: if the patch size does not divide ``image_size``.
    """
    if image_size == model.config["image_size"]:
        return model
    other = ViTModel(**{**model.config, "image_size": image_size})
    weights, name = model.state_dict(), "vit_encoder.embedding.position_embedding"
    weights[name] = interpolate_positions(weights[name], image_size // model.config["patch_size"])
    other.load_state_dict(weights)
    return other.to(weights[name].device).train(model.training)


def transfer_encoder(pretrained: nn.Module, num_classes: int, **overrides) -> ViTModel:
    """Build a new model with the encoder of ``pretrained`` and a new, all-zero head for ``num_classes`` classes.

    A head of zeros gives every class the same probability. So the first loss is exactly ln(num_classes), and the first
    gradients do not pull the encoder towards a random head (the paper's section 3.2 does the same). A pre-logits layer
    belongs to the old head and is left out.

    Args:
        pretrained: a :class:`ViTModel`, possibly wrapped; it is left as it is.
        overrides: arguments of :class:`ViTModel` that change no weight's shape, such as ``drop``, and ``image_size``,
            for which the positions are interpolated.

    Raises:
        ValueError: for a model that holds no ViT.
    """
    source = unwrap(pretrained)
    if "image_size" in overrides:
        source = with_image_size(source, overrides["image_size"])
    model = ViTModel(**{**source.config, "num_classes": num_classes, "pre_logits": None, **overrides})
    model.vit_encoder.load_state_dict(source.vit_encoder.state_dict())
    nn.init.zeros_(model.linear_classifier.weight)
    nn.init.zeros_(model.linear_classifier.bias)
    return model


def without_wrappers(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel or torch.compile, in any order."""
    parallel = nn.DataParallel, nn.parallel.DistributedDataParallel
    while isinstance(model, parallel) or hasattr(model, "_orig_mod"):  # of torch.compile
        model = model.module if isinstance(model, parallel) else model._orig_mod
    return model


def unwrap(model: nn.Module) -> ViTModel:
    """Return the ViT inside its wrappers. Raises ValueError if there is none."""
    inner = without_wrappers(model)
    if not isinstance(inner, ViTModel):
        raise ValueError(f"{type(inner).__name__} holds no ViTModel; give a ViTModel, wrapped or not.")
    return inner


def fingerprint(*tensors: Tensor) -> str:
    """Return a short name for the contents of tensors: 16 hexadecimal digits of the SHA-256 of their bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().numpy().data)
    return sha.hexdigest()[:16]
