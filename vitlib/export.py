"""Export a trained model to one file for programs that have neither vitlib nor, with ONNX, PyTorch.

The file takes decoded images, uint8 ``[B, C, S, S]``, and returns logits. It normalises the images itself: with a
wrong normalisation a model does not fail, it only gets worse.

To use an ONNX file, install onnxruntime, numpy and PIL. This prepares every image as ``vitlib predict`` does:

>>> import contextlib, json, numpy, onnxruntime
>>> from PIL import Image, ImageOps
>>> session = onnxruntime.InferenceSession("model.onnx")
>>> about = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
>>> def prepare(path):
...     image = Image.open(path)
...     image.load()
...     with contextlib.suppress(Exception):  # damaged EXIF turns nothing
...         ImageOps.exif_transpose(image, in_place=True)
...     if image.mode.startswith("I"):  # 16 bits of grey
...         image = Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
...     image = image.convert("RGB" if about["num_channels"] == 3 else "L")
...     image = ImageOps.fit(image, [about["image_size"]] * 2, Image.Resampling.BICUBIC)
...     return numpy.asarray(image).reshape(*image.size, -1).transpose(2, 0, 1)
>>> (logits,) = session.run(None, {"images": prepare("cat.jpg")[None]})
>>> print(about["classes"][logits[0].argmax()])
"""

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vitlib.training import predict
from vitlib.utils import atomic_write, printable
from vitlib.weights.checkpoint import ModelCard, unwrap

TOLERANCE = 1e-4  # largest difference between logits, since runtimes sum in another order
BATCH_SIZES = (1, 2, 5)  # for the comparison; the model is traced with two images


class Deployable(nn.Module):
    """A copy of a model with its normalisation: uint8 ``[B, C, S, S]`` to logits float32 ``[B, num_classes]``."""

    def __init__(self, model: nn.Module, card: ModelCard):
        super().__init__()
        self.model = copy.deepcopy(unwrap(model)).cpu().requires_grad_(False)
        # not by augment.normalise: it caches tensors, and would cache the fake ones of tracing
        self.register_buffer("mean", torch.tensor(card.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor([value or 1.0 for value in card.std]).view(1, -1, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images.float() / 255 - self.mean) / self.std)


def export_model(model: nn.Module, card: ModelCard, path: str | Path) -> float:
    """Write a model as ONNX if ``path`` ends in .onnx, or for ``torch.export.load`` if it ends in .pt2.

    Both take batches of any size. The card's classes, mean and std and the model's image_size and num_channels are
    stored as JSON: in the metadata of an ONNX model, as extra files of a .pt2. Before it replaces ``path``, the file is
    loaded and must give the logits of ``model`` for random images.

    Args:
        model, card: from :func:`vitlib.weights.load_weights`; the model does not change.

    Returns:
        The largest difference between logits, at most ``TOLERANCE``.

    Raises:
        ValueError: for another ending, weights that are not finite, a card that does not fit, or different logits; then
            nothing is written.
        ModuleNotFoundError: if a package that ONNX needs is missing.
    """
    path = Path(path).expanduser()
    if path.suffix not in FORMATS or path.is_dir():
        raise ValueError(f"path={printable(path)} cannot be written; name a file that ends in {' or '.join(FORMATS)}.")
    write, load = FORMATS[path.suffix]
    needed = ("onnx", "onnxruntime", "onnxscript") if path.suffix == ".onnx" else ()
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        message = f'{missing[0]} is not installed; install it with `pip install "vitlib[export]"`, or export to .pt2.'
        raise ModuleNotFoundError(message, name=missing[0])
    deployable = Deployable(model, card)
    config = deployable.model.config
    shape = max(BATCH_SIZES), len(card.mean), config["image_size"], config["image_size"]
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = predict(deployable.model, images, card)
    about = {"classes": card.classes, "mean": card.mean, "std": card.std}
    about |= {name: config[name] for name in ("image_size", "num_channels")}
    with atomic_write(path) as temporary:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            write(deployable, images[:2], temporary, {name: json.dumps(value) for name, value in about.items()})
            exported = load(temporary)
        gaps = [(exported(images[:size]) - expected[:size]).abs().max() for size in BATCH_SIZES]
        difference = torch.stack(gaps).max().item()
        if not difference <= TOLERANCE:  # true for nan too
            raise ValueError(
                f"The exported model's logits differ from the model's by {difference:.2g}, more than {TOLERANCE:g}, "
                f"so {path.name} is not written; export to {' or '.join(FORMATS.keys() - {path.suffix})}, or use "
                "another version of torch."
            )
    return difference


def _write_onnx(deployable: Deployable, example: Tensor, path: Path, about: dict[str, str]) -> None:
    program = torch.onnx.export(
        deployable, (example,), dynamo=True, dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        input_names=["images"], output_names=["logits"], verbose=False,
    )  # fmt: skip
    program.model.metadata_props.update(about)
    program.save(path, external_data=False)


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_pt2(deployable: Deployable, example: Tensor, path: Path, about: dict[str, str]) -> None:
    program = torch.export.export(deployable, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    with path.open("wb") as file:  # a path would have to end in .pt2
        torch.export.save(program, file, extra_files=about)


def _load_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:
        return torch.export.load(file).module()


FORMATS = {".onnx": (_write_onnx, _load_onnx), ".pt2": (_write_pt2, _load_pt2)}
