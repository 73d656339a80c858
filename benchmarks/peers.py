"""The models that vitlib's is compared with, all of the size of the preset ``small``: 32 px, patch 4, 6 layers of width
256, 8 heads, MLP 512, 100 classes.

``published`` has exactly vitlib's parameters. The patch embedding of the others has a bias; in vit-pytorch it has two
layer norms as well, and queries, keys and values have no bias.
"""

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vitlib.model import create_model
from vitlib.utils import import_torchvision

SIZE = {"image_size": 32, "patch_size": 4}  # what all the libraries call the same
OURS = "vitlib"


class Published(nn.Module):
    """The model of the published system, laid out as in FastEstimator's apphub/image_classification/vit/vit_torch.py:
    PyTorch's own encoder, post-norm, with the tokens in the first dimension and the images in the second."""

    def __init__(self, drop: float):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, 256, kernel_size=4, stride=4, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(1, 65, 256))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 256))
        self.dropout = nn.Dropout(drop)
        layer = nn.TransformerEncoderLayer(256, nhead=8, dim_feedforward=512, activation="gelu", dropout=drop)
        self.encoder = nn.TransformerEncoder(layer, num_layers=6, enable_nested_tensor=False)
        self.layernorm = nn.LayerNorm(256, eps=1e-6)
        self.linear_classifier = nn.Linear(256, 100)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, 32, 32]`` to logits ``[B, 100]``."""
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        tokens = self.dropout(tokens + self.position_embedding).transpose(0, 1)
        return self.linear_classifier(self.layernorm(self.encoder(tokens)[0]))


class OnlyLogits(nn.Module):
    """A model of Hugging Face, which returns an object, as one that returns logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def _package(name: str):
    import_torchvision()  # the others import it too, and this is the way that always works
    return importlib.import_module(name)


def _torchvision() -> nn.Module:
    vit = _package("torchvision.models.vision_transformer").VisionTransformer
    return vit(**SIZE, num_layers=6, num_heads=8, hidden_dim=256, mlp_dim=512, num_classes=100)


def _timm(fused: bool) -> nn.Module:
    vit = _package("timm.models.vision_transformer").VisionTransformer
    model = vit(img_size=32, patch_size=4, num_classes=100, embed_dim=256, depth=6, num_heads=8, mlp_ratio=2)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def _huggingface(attention: str) -> nn.Module:
    transformers = _package("transformers")
    width = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 512}
    config = transformers.ViTConfig(**SIZE, **width, num_labels=100, attn_implementation=attention)
    return OnlyLogits(transformers.ViTForImageClassification(config))


def _vit_pytorch() -> nn.Module:
    vit = _package("vit_pytorch").ViT
    return vit(**SIZE, num_classes=100, dim=256, depth=6, heads=8, dim_head=32, mlp_dim=512)


PEERS: dict[str, Callable[[], nn.Module]] = {
    "published": lambda: Published(drop=0.1),
    "published-no-dropout": lambda: Published(drop=0.0),
    "torchvision": _torchvision,
    "timm": lambda: _timm(fused=True),
    "timm-written-out": lambda: _timm(fused=False),
    "huggingface": lambda: _huggingface("sdpa"),
    "huggingface-written-out": lambda: _huggingface("eager"),
    "vit-pytorch": _vit_pytorch,
}


def build_models(names: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return vitlib's model and the peers of these names, and the reason for each that is missing."""
    models, skipped = {OURS: create_model("small", 100, drop=0.0)}, {}
    for name in names:
        try:
            models[name] = PEERS[name]()
        except ImportError as error:
            skipped[name] = f"{error}; install it with `pip install -r benchmarks/requirements.txt`"
    return models, skipped
