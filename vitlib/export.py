"""A trained model as one file for programs that have neither vitlib nor, with ONNX, PyTorch.

The file takes images as any decoder gives them, uint8 ``[B, C, S, S]``, and normalises them itself: numbers that have
to be copied into another program are sooner or later copied wrong, and a model fed with wrongly normalised images does
not fail, it is only worse. It gives logits, as the model does: softmax is one line, and thresholds, temperatures and
averages over models start from logits.

An ONNX file needs onnxruntime, numpy and PIL where it is used, nothing else:

>>> import json, numpy, onnxruntime
>>> from PIL import Image, ImageOps
>>> session = onnxruntime.InferenceSession("model.onnx")
>>> about = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
>>> picture = ImageOps.exif_transpose(Image.open("cat.jpg")).convert("RGB")
>>> picture = ImageOps.fit(picture, [about["image_size"]] * 2, Image.Resampling.BICUBIC)
>>> (logits,) = session.run(None, {"images": numpy.asarray(picture).transpose(2, 0, 1)[None]})
>>> print(about["classes"][logits[0].argmax()])
"""

import copy
import importlib
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vitlib.arguments import check_path, check_type
from vitlib.training.loop import predict
from vitlib.utils import atomic_write, printable
from vitlib.weights.checkpoint import ModelCard, unwrap

TOLERANCE = 1e-4  # the largest difference of a logit; the order of the sums is the runtime's own, so some there is
BATCH_SIZES = (1, 2, 5)  # to be checked; the model is traced with two images


class Deployable(nn.Module):
    """A model together with its normalisation: uint8 ``[B, C, S, S]`` to logits float32 ``[B, num_classes]``.

    It holds a copy of ``model``, on the CPU and in eval mode.
    """

    def __init__(self, model: nn.Module, card: ModelCard):
        super().__init__()
        self.model = copy.deepcopy(unwrap(model)).cpu().requires_grad_(False)
        # as in augment.normalise, whose numbers are kept between calls; tracing would leave its fake tensors there
        self.register_buffer("mean", torch.tensor(card.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor([value or 1.0 for value in card.std]).view(1, -1, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images.float() / 255 - self.mean) / self.std)


def export_model(model: nn.Module, card: ModelCard, path: str | Path) -> float:
    """Write a model for use elsewhere: as ONNX if ``path`` ends in .onnx, for ``torch.export.load`` if in .pt2.

    Either takes batches of any size. The card's classes, mean and std and the model's image_size and num_channels
    travel in the file, each as JSON: in the metadata of an ONNX model, as extra files of the other. What was written is
    loaded again and has to give the logits of ``model`` for random images before it takes the place of ``path``.

    Args:
        model, card: from :func:`vitlib.weights.checkpoint.load_weights`; the model is left as it is.

    Returns:
        the largest difference of a logit, at most ``TOLERANCE``.

    Raises:
        ValueError: for another ending, a model too large for ONNX, a card that does not fit, or different logits; then
            nothing is written and what stood at ``path`` is still there.
        ModuleNotFoundError: for ONNX without the packages that it needs.
    """
    check_path("path", path)
    check_type("card", card, ModelCard, "a ModelCard, as load_weights gives one")
    unwrap(model)  # one without a ViT is refused first
    path = Path(path)
    if path.suffix not in FORMATS or path.is_dir():
        raise ValueError(f"path={printable(path)} cannot be written; name a file that ends in {' or '.join(FORMATS)}.")
    write, load = FORMATS[path.suffix]
    if path.suffix == ".onnx":
        _need_onnx()
    deployable = Deployable(model, card)
    side = deployable.model.config["image_size"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (max(BATCH_SIZES), len(card.mean), side, side), generator=generator, dtype=torch.uint8)
    expected = predict(deployable.model, images, card)
    if path.suffix == ".onnx" and _bytes(deployable) > 2**31 - 2**20:
        raise ValueError(
            f"The weights take {_bytes(deployable) / 2**30:.1f} GiB, and an ONNX file holds at most 2; "
            "name a file that ends in .pt2."
        )
    with atomic_write(path) as temporary:
        with _without_chatter():
            write(deployable, images[:2], temporary, _described(deployable.model, card))
            exported = load(temporary)
        difference = max(_difference(exported(images[:size]), expected[:size]) for size in BATCH_SIZES)
        if not difference <= TOLERANCE:  # nan is no small difference
            raise ValueError(
                f"The exported model's logits differ from the model's by {difference:.2g}, more than {TOLERANCE:g}, "
                f"so {path.name} is not written; export to {' or '.join(FORMATS.keys() - {path.suffix})}, or with "
                "another version of torch."
            )
    return difference


def _described(model: nn.Module, card: ModelCard) -> dict[str, str]:
    """What one has to know to use the file, by name, each as JSON."""
    about = {"classes": card.classes, "mean": card.mean, "std": card.std}
    about |= {name: model.config[name] for name in ("image_size", "num_channels")}
    return {name: json.dumps(value) for name, value in about.items()}


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def _difference(ours: Tensor, expected: Tensor) -> float:
    return (ours - expected).abs().max().item() if ours.shape == expected.shape else math.inf


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
    with path.open("wb") as file:  # as a path it would have to end in .pt2
        torch.export.save(program, file, extra_files=about)


def _load_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:
        return torch.export.load(file).module()


FORMATS = {".onnx": (_write_onnx, _load_onnx), ".pt2": (_write_pt2, _load_pt2)}


def _need_onnx() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            message = f'{name} is not installed; install it with `pip install "vitlib[export]"`, or export to .pt2.'
            raise ModuleNotFoundError(message, name=name) from error


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Exporting, without the remarks of its machinery about itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield
