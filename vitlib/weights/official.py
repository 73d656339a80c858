"""Weights of other projects: from a file, or by the name of an official model, which is downloaded."""

import os
from collections.abc import Mapping

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vitlib.model import ViTModel
from vitlib.utils import cache_dir, first_line, import_torchvision, printable
from vitlib.weights.checkpoint import ModelCard
from vitlib.weights.convert import from_state_dict, layout_of

_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of the published ViTs, by width
_META = "https://dl.fbaipublicfiles.com"  # the company's host
# addresses by name; None: torchvision knows its own
OFFICIAL: dict[str, str | None] = {
    **dict.fromkeys(("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")),
    # Touvron et al. 2021 (arXiv:2012.12877), ImageNet-1k, 224 pixels
    "deit_tiny_patch16_224": f"{_META}/deit/deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small_patch16_224": f"{_META}/deit/deit_small_patch16_224-cd65a155.pth",
    # Oquab et al. 2023 (arXiv:2304.07193), without labels, so without a classifier; 518 pixels
    "dinov2_vits14": f"{_META}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for all of them


def official_weights(name: str) -> tuple[ViTModel, ModelCard]:
    """Load an official ViT of torchvision, DeiT or DINOv2, converted; the file is downloaded once.

    Args:
        name: a key of ``OFFICIAL``.

    Returns:
        The model and its card. The classes are those of ImageNet-1k; DINOv2 has none (``num_classes=0``): fine-tune it.

    Raises:
        ValueError: for an unknown name.
        OSError: if the file cannot be downloaded.
    """
    if name not in OFFICIAL:
        raise ValueError(f"There are no official weights named {name!r}; choose one of {', '.join(OFFICIAL)}.")
    import_torchvision()
    from torchvision.models import get_model_weights

    theirs = get_model_weights("vit_b_16" if OFFICIAL[name] else name).DEFAULT  # DeiT has the same classes
    address, folder = OFFICIAL[name] or theirs.url, cache_dir() / "weights"
    try:
        # only to have the file, whole: the ending of its name, such as -a1311bcf, is the start of its SHA-256
        torch.hub.load_state_dict_from_url(address, folder, "cpu", check_hash=True, weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        raise OSError(
            f"{name} could not be downloaded or read ({first_line(error):.100}); put the whole file of {address} into "
            f"{printable(folder)}, in place of what is there, or use shipped weights, such as cifar100-small."
        ) from error
    model = from_file(folder / os.path.basename(address))
    classes = theirs.meta["categories"] if model.config["num_classes"] else ()
    return model, ModelCard(tuple(classes), _MEAN, _STD, record={"source": name})


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors or .npz file, or of one by ``torch.save``. No code of the file is run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, needs code to be run, or holds no tensors by name.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file at {printable(path)}; check the path.")
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                return {name: torch.from_numpy(file[name]) for name in file.files}
        content = torch.load(path, map_location="cpu", weights_only=True)
        parts = [part for part in (content, *content.values()) if isinstance(part, Mapping)]  # beside an optimiser, say
        tensors = [{name: value for name, value in part.items() if isinstance(value, Tensor)} for part in parts]
        return max(tensors, key=len)
    except Exception as error:  # damaged files fail in many ways
        problem = f"is damaged, or not a file of weights ({first_line(error):.100}); copy or download it again"
        if "Unsupported global" in str(error):  # such as a whole model, or options beside the tensors
            problem = (
                "holds Python objects, such as a whole model, and loading them would run code; where you trust it, "
                "write its state_dict alone to another file with torch.save"
            )
        raise ValueError(f"{printable(path)} {problem}.") from error


def from_file(path: str | os.PathLike, *, num_heads: int | None = None) -> ViTModel:
    """Convert a file of another library: .safetensors, .npz, .pth, .pt or .bin. The names tell the library.

    A file tells neither activation nor pooling nor eps; GELU, the CLS token and 1e-6 (Hugging Face: 1e-12) are assumed.
    Compare the outputs.

    Args:
        num_heads: None for that of the published ViT of this width: 3, 6, 12, 16, 16 for 192, 384, 768, 1024, 1280.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, its names are of no library known here, or entries do not fit.
    """
    state = read_weights(path)
    layout = layout_of(state)
    if layout is None:
        raise ValueError(
            f"The names in {printable(path)}, such as {next(iter(state), 'none')}, are not those of torchvision, timm, "
            "Hugging Face or Google; give the weights of a plain ViT."
        )
    width = next(value.shape[-1] for name, value in state.items() if name.endswith(("cls_token", "class_token", "cls")))
    if layout == "npz":
        num_heads = next(value.shape[0] for name, value in state.items() if name.endswith("_1/query/bias"))
    elif num_heads is None and width not in _HEADS:
        raise ValueError(f"No published ViT has the width {width}; give num_heads, which no shape tells.")
    eps = 1e-12 if layout == "huggingface" else 1e-6
    return from_state_dict(state, layout, num_heads=num_heads or _HEADS[width], norm_eps=eps)
