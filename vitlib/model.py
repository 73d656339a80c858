"""The Vision Transformer (ViT), defined once, to be read from top to bottom.

The model is that of "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2021, arXiv:2010.11929; "the paper" below).
Names of classes and constructor arguments are those of the small published system that this course implements.

One letter per dimension, used in every shape comment of this file:

    B  images in a batch        P  side of a patch, in pixels     D  width of a token (em_dim)
    C  colour channels          N  patches per image, (S / P)^2   H  attention heads
    S  side of an image, pixels T  tokens per image, N + 1        K  width of one head, D / H
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.arguments import (
    brief,
    check,
    check_choice,
    check_flag,
    check_multiple,
    check_number,
    check_tensor,
    check_type,
    check_whole,
)

# What a preset leaves out keeps the default of ViTModel, which is ViT-B/16 of the paper's Table 1.
PRESETS: dict[str, dict] = {
    # 318 thousand parameters plus the head: trains in class, in about a minute on two CPU cores
    "mini": {"image_size": 32, "patch_size": 4, "num_layers": 4, "em_dim": 96, "num_heads": 4, "ff_dim": 192},
    # 3.2 million: the published small system
    "small": {
        "image_size": 32,
        "patch_size": 4,
        "num_layers": 6,
        "em_dim": 256,
        "num_heads": 8,
        "ff_dim": 512,
    },
    # The family of the paper's Table 1, with Ti and S as in Steiner et al. 2021 (arXiv:2106.10270); "/16" is the patch
    # size. Parameters with 1,000 classes, in millions: 5.7, 22.1, 88.2, 86.6, 304.3, 632.0.
    "Ti/16": {"num_layers": 12, "em_dim": 192, "num_heads": 3, "ff_dim": 768, "patch_bias": True},
    "S/16": {"num_layers": 12, "em_dim": 384, "num_heads": 6, "ff_dim": 1536, "patch_bias": True},
    "B/32": {"patch_size": 32, "patch_bias": True},
    "B/16": {"patch_bias": True},
    "L/16": {"num_layers": 24, "em_dim": 1024, "num_heads": 16, "ff_dim": 4096, "patch_bias": True},
    "H/14": {
        "patch_size": 14,
        "num_layers": 32,
        "em_dim": 1280,
        "num_heads": 16,
        "ff_dim": 5120,
        "patch_bias": True,
    },
}

LARGEST = 2**20  # of any size of a model: what is beyond can only be a slip
POOLINGS = ("cls", "mean")  # what the classifier sees: the CLS token, or the mean of all patch tokens


def create_model(preset: str, num_classes: int, **overrides) -> "ViTModel":
    """A freshly initialised model of a named size.

    Args:
        preset: a key of ``PRESETS``.
        num_classes: rows of the classifier.
        overrides: any other argument of :class:`ViTModel`, in place of the preset's.

    Raises:
        ValueError: for an unknown preset or a configuration that cannot be built.
    """
    check_choice("preset", preset, PRESETS)
    return ViTModel(num_classes, **{**PRESETS[preset], **overrides})


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into flattened patches: ``[B, C, S, S]`` to ``[B, N, C * P * P]``.

    Patches are numbered row by row, like words on a page. Within a patch the order is channel, row, column, the order
    in which a convolution stores its weights; so ``patchify(x, P) @ W.flatten(1).T`` is ``conv(x)``.
    """
    check_tensor("images", images, "B C S S")
    check_whole("patch_size", patch_size)
    if images.shape[-1] % patch_size or images.shape[-2] % patch_size:
        raise ValueError(
            f"Images of {images.shape[-2]}x{images.shape[-1]} pixels cannot be cut into patches of {patch_size}; "
            "choose a patch size that divides both sides."
        )
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # [B, C, S/P, S/P, P, P]
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [B, N, C*P*P]


def unpatchify(patches: Tensor, patch_size: int, num_channels: int = 3) -> Tensor:
    """Put the patches of square images back together, the exact inverse of :func:`patchify`: ``[B, N, C * P * P]`` to
    ``[B, C, S, S]``."""
    check_tensor("patches", patches, "B N C*P*P")
    check_whole("patch_size", patch_size)
    check_whole("num_channels", num_channels)
    grid = math.isqrt(patches.shape[1])
    if grid**2 != patches.shape[1] or patches.shape[2] != num_channels * patch_size**2:
        raise ValueError(
            f"Patches of shape {tuple(patches.shape)} do not fill a square image; expected "
            f"[B, N, {num_channels * patch_size**2}] with N a square number."
        )
    patches = patches.unflatten(2, (num_channels, patch_size, patch_size)).unflatten(1, (grid, grid))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [B, C, S, S]


def interpolate_positions(
    position_embedding: Tensor,
    grid: int | tuple[int, int],
    old_grid: int | tuple[int, int] | None = None,
    *,
    align_corners: bool = False,
    antialias: bool = False,
) -> Tensor:
    """Stretch position embeddings to another number of patches (the paper, section 3.2: fine-tuning at a higher
    resolution).

    The row of the CLS token has no place in the image and is kept; the others are laid out as the grid they came from
    and resized bicubically. Implementations differ in how: torchvision's ``interpolate_embeddings`` puts the corner
    patches of both grids on each other (``align_corners=True``), timm's ``resample_abs_pos_embed`` widens the kernel
    where the grid shrinks (``antialias=True``). The default does neither.

    Args:
        position_embedding: ``[1, 1 + rows * columns, D]``, CLS first.
        grid: patches along the sides of the new image, ``(rows, columns)``, or one number for a square.
        old_grid: the same of the old image; None for a square.

    Returns:
        ``[1, 1 + rows * columns, D]`` of the new grid; the input itself where the size is already right.

    Raises:
        ValueError: if the positions do not fill ``old_grid``, or a side is less than one patch.
    """
    check_tensor("position_embedding", position_embedding, "1 T D")
    cls, patches = position_embedding[:, :1], position_embedding[:, 1:]
    old = _sides("old_grid", math.isqrt(patches.shape[1]) if old_grid is None else old_grid)
    new = _sides("grid", grid)
    if math.prod(old) != patches.shape[1] or min(new) < 1:
        raise ValueError(
            f"{patches.shape[1]} patch positions cannot go from a {old[0]}x{old[1]} to a {new[0]}x{new[1]} grid; "
            "give old_grid=(rows, columns) where the old image was not square, and sides of at least 1."
        )
    if new == old:
        return position_embedding
    as_image = patches.unflatten(1, old).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    resized = F.interpolate(as_image, new, mode="bicubic", align_corners=align_corners, antialias=antialias)
    return torch.cat([cls, resized.flatten(2).transpose(1, 2)], dim=1)


def _sides(name: str, grid: int | tuple[int, int]) -> tuple[int, int]:
    sides = (grid, grid) if isinstance(grid, int) else grid
    is_pair = isinstance(sides, tuple | list) and [type(side) for side in sides] == [int, int]
    check(name, grid, is_pair, "a whole number, or two: (rows, columns)")
    return tuple(sides)


class ViTEmbeddings(nn.Module):
    """From images to tokens: the paper's equation 1.

    A convolution whose stride equals its kernel looks at every patch once and maps it linearly to ``D`` numbers. The
    trainable CLS token goes in front; the trainable position embedding is added to all, CLS included.
    """

    def __init__(self, image_size=224, patch_size=16, num_channels=3, em_dim=768, drop=0.1, patch_bias=False):
        super().__init__()
        check_multiple("image_size", image_size, "patch_size", patch_size)
        self.image_shape = (num_channels, image_size, image_size)
        num_patches = (image_size // patch_size) ** 2
        self.patch_embedding = nn.Conv2d(num_channels, em_dim, patch_size, stride=patch_size, bias=patch_bias)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, em_dim))
        self.position_embedding = nn.Parameter(0.02 * torch.randn(1, num_patches + 1, em_dim))
        self.dropout = nn.Dropout(drop)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """``[B, C, S, S]`` to ``[B, T, D]``.

        With ``kept``, int64 ``[B, n]``, only the patches of these numbers (from 0) go on, each with its position: CLS
        and n patches, ``[B, 1 + n, D]``. Training drops patches so (PatchDropout, Liu et al. 2023, arXiv:2208.07220).
        """
        self._check_images(images)
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # [B, N, D]
        cls = self.cls_token.expand(images.shape[0], -1, -1)  # [B, 1, D]; len() would fix B in an exported model
        tokens = torch.cat([cls, patches], dim=1) + self.position_embedding  # [B, T, D]
        if kept is not None:
            numbers = F.pad(kept + 1, (1, 0))  # token 0, CLS, always stays
            tokens = tokens.gather(1, numbers[:, :, None].expand(-1, -1, tokens.shape[2]))
        return self.dropout(tokens)

    def _check_images(self, images: Tensor) -> None:
        check_type("images", images, Tensor, "a tensor [B, C, S, S]")
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"The model takes images of shape [B, {expected}], not {list(images.shape)}; "
                "resize them, or build the model with another image_size or num_channels."
            )
        due = self.position_embedding.dtype
        if images.dtype != due and not (images.is_floating_point() and torch.is_autocast_enabled(images.device.type)):
            raise ValueError(
                f"images={brief(images)} are not of the dtype of the model's weights; normalise uint8 images first "
                f"(vitlib.data.augment.normalise), then convert them with .to({due})."
            )


class SelfAttention(nn.Module):
    """Multi-head self-attention: the paper's equations 5 to 8.

    Every token asks (query), every token offers (key) and every token has something to say (value); a token's output
    is the average of all values, weighted by how well their keys fit its query.
    """

    def __init__(self, em_dim: int, num_heads: int, drop: float = 0.0):
        super().__init__()
        check_multiple("em_dim", em_dim, "num_heads", num_heads)
        self.num_heads = num_heads
        self.drop = drop
        self.qkv = nn.Linear(em_dim, 3 * em_dim)  # one matrix product for queries, keys and values of all heads
        self.output = nn.Linear(em_dim, em_dim)

    def forward(self, x: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """``[B, T, D]`` to ``[B, T, D]`` and, where asked for, the attention weights ``[B, H, T, T]``.

        Row i of a weight matrix says how much token i takes from every token; each row sums to 1. Without
        ``need_weights`` PyTorch's fused kernel computes the same output and never stores the weights; on a CPU in
        bfloat16 that kernel is several times slower than the lines written out (benchmarks/throughput.py), so there
        they are taken.
        """
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [B, T, 3, H, K]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
        drop = self.drop if self.training else 0.0
        slow_kernel = query.dtype == torch.bfloat16 and query.device.type == "cpu"
        if need_weights or slow_kernel:
            scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # [B, H, T, T]
            weights = scores.softmax(dim=-1)  # over the keys: each query's weights sum to 1
            mixed = F.dropout(weights, drop) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=drop)
        output = self.output(mixed.transpose(1, 2).flatten(2))  # heads side by side again: [B, T, D]
        return output, weights if need_weights else None


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training, what a branch adds is left out for a random
    ``probability`` of the images, and scaled up for the others, so that its mean stays the same."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` to the same shape."""
        if not self.training or self.probability == 0:
            return x
        kept = 1 - self.probability
        return x * torch.empty(len(x), 1, 1, dtype=x.dtype, device=x.device).bernoulli_(kept) / kept


class EncoderBlock(nn.Module):
    """One layer of the encoder: attention between tokens, then an MLP on each token, both added to what came in.

    ``norm_first=True`` normalises the input of each half, so that the sum itself is never touched (pre-norm, the
    paper's equations 2 and 3). ``norm_first=False`` normalises the sum (post-norm, as in the original Transformer and
    by default in ``nn.TransformerEncoderLayer``), which is what the published small system does.
    """

    def __init__(
        self, em_dim: int, num_heads: int, ff_dim: int, drop: float = 0.0, norm_first: bool = True,
        drop_path: float = 0.0, norm_eps: float | None = None,
    ):  # fmt: skip
        super().__init__()
        # the ViT paper's code uses 1e-6; the published post-norm system PyTorch's default
        eps = norm_eps or (1e-6 if norm_first else 1e-5)
        self.norm_first = norm_first
        self.attention = SelfAttention(em_dim, num_heads, drop)
        self.mlp = nn.Sequential(nn.Linear(em_dim, ff_dim), nn.GELU(), nn.Dropout(drop), nn.Linear(ff_dim, em_dim))
        self.norm1 = nn.LayerNorm(em_dim, eps=eps)
        self.norm2 = nn.LayerNorm(em_dim, eps=eps)
        self.dropout = nn.Sequential(nn.Dropout(drop), DropPath(drop_path))

    def forward(self, x: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """``[B, T, D]`` to ``[B, T, D]`` and the attention weights ``[B, H, T, T]`` (None unless asked for)."""
        attended, weights = self.attention(self.norm1(x) if self.norm_first else x, need_weights)
        x = x + self.dropout(attended)
        if self.norm_first:
            return x + self.dropout(self.mlp(self.norm2(x))), weights
        x = self.norm1(x)
        return self.norm2(x + self.dropout(self.mlp(x))), weights


class ViTEncoder(nn.Module):
    """Embeddings, a stack of blocks and a final layer norm: all of the model that is worth moving to another task."""

    def __init__(
        self, num_layers, image_size, patch_size, num_channels, em_dim, drop, num_heads, ff_dim,
        norm_first=True, patch_bias=False, drop_path=0.0, norm_eps=None,
    ):  # fmt: skip
        super().__init__()
        self.embedding = ViTEmbeddings(image_size, patch_size, num_channels, em_dim, drop, patch_bias)
        # each block is built and initialised on its own: nn.TransformerEncoder copies one, so that all start equal
        self.encoder = nn.ModuleList(
            # the deeper, the more often left out: from 0 to drop_path
            EncoderBlock(
                em_dim, num_heads, ff_dim, drop, norm_first, drop_path * depth / max(1, num_layers - 1), norm_eps
            )
            for depth in range(num_layers)
        )
        self.layernorm = nn.LayerNorm(em_dim, eps=norm_eps or 1e-6)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """``[B, C, S, S]`` to normalised tokens ``[B, T, D]``, CLS first; ``kept`` as in :class:`ViTEmbeddings`."""
        tokens = self.embedding(images, kept)
        for block in self.encoder:
            tokens, _ = block(tokens)
        return self.layernorm(tokens)


class ViTModel(nn.Module):
    """A Vision Transformer that classifies images; the defaults are ViT-B/16.

    Args:
        num_classes: rows of the classifier; 0 for none, then the model gives what the classifier would see.
        num_layers: encoder blocks.
        image_size: side of the square images, in pixels; a multiple of ``patch_size``.
        patch_size: side of a patch, in pixels.
        num_channels: 3 for RGB, 1 for grey.
        em_dim: width of a token; a multiple of ``num_heads``.
        drop: dropout probability, everywhere it is applied.
        num_heads: attention heads per block.
        ff_dim: hidden width of the MLP in each block.
        norm_first: True for pre-norm (the paper), False for post-norm (the published small system).
        patch_bias: whether the patch embedding has a bias; the official weights have one.
        drop_path: probability of leaving out a branch of the last block; it rises from 0 at the first.
        pooling: what the classifier sees: "cls", the CLS token (the paper), or "mean", the mean of all patch tokens.
        norm_eps: added to the variance in every layer norm; None for the usual 1e-6 (in post-norm blocks 1e-5). Weights
            from Hugging Face were trained with 1e-12.
        pre_logits: width of a hidden layer with tanh before the classifier, or None; the paper's models have one in
            pretraining (section 3.1), and drop it for fine-tuning.

    Raises:
        ValueError: one sentence, for a configuration that cannot be built or images that do not fit it.
    """

    def __init__(
        self,
        num_classes: int,
        num_layers: int = 12,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        em_dim: int = 768,
        drop: float = 0.1,
        num_heads: int = 12,
        ff_dim: int = 3072,
        norm_first: bool = True,
        patch_bias: bool = False,
        drop_path: float = 0.0,
        pooling: str = "cls",
        norm_eps: float | None = None,
        pre_logits: int | None = None,
    ):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_configuration(self.config)
        self.pooling = pooling
        with _named_if_too_large(self.config):
            self.vit_encoder = ViTEncoder(
                num_layers, image_size, patch_size, num_channels, em_dim, drop, num_heads, ff_dim,
                norm_first, patch_bias, drop_path, norm_eps,
            )  # fmt: skip
            self.pre_logits = nn.Sequential(nn.Linear(em_dim, pre_logits), nn.Tanh()) if pre_logits else nn.Identity()
            self.linear_classifier = nn.Linear(pre_logits or em_dim, num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)
        if num_classes:  # nearly equal logits, so a first loss near ln C
            nn.init.trunc_normal_(self.linear_classifier.weight, std=0.02)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """``[B, C, S, S]`` normalised images to logits ``[B, num_classes]``; ``kept`` as in :class:`ViTEmbeddings`."""
        return self.classify(self.vit_encoder(images, kept))

    def classify(self, tokens: Tensor) -> Tensor:
        """Normalised tokens ``[B, T, D]`` to logits ``[B, num_classes]``."""
        # the CLS token speaks for the image (the paper's equation 4), or all patches do
        pooled = tokens[:, 0] if self.pooling == "cls" else tokens[:, 1:].mean(1)  # [B, D]
        return self.linear_classifier(self.pre_logits(pooled))

    def intermediates(self, images: Tensor) -> dict[str, Tensor]:
        """Everything between the images and the logits, by name, with L for the number of blocks.

        Returns:
            ``embeddings [B, T, D]`` (what enters the first block), ``tokens [L, B, T, D]`` (what leaves each block),
            ``attention [L, B, H, T, T]``, ``encoded [B, T, D]`` (after the final norm) and ``logits [B, num_classes]``,
            equal to what ``forward`` returns but for rounding.
        """
        embeddings = x = self.vit_encoder.embedding(images)
        tokens, attention = [], []
        for block in self.vit_encoder.encoder:
            x, weights = block(x, need_weights=True)
            tokens.append(x)
            attention.append(weights)
        encoded = self.vit_encoder.layernorm(x)
        return {
            "embeddings": embeddings,
            "tokens": torch.stack(tokens),
            "attention": torch.stack(attention),
            "encoded": encoded,
            "logits": self.classify(encoded),
        }


def count_parameters(module: nn.Module) -> int:
    """Number of trainable numbers in a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _initialise(module: nn.Module) -> None:
    """As in the paper's code: Xavier for linear layers, LeCun for the patch embedding, zero for biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")  # LeCun: variance 1 / inputs
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


@contextmanager
def _named_if_too_large(config: dict) -> Iterator[None]:
    """Weights that memory cannot hold are named by the sizes that ask for them, not by bytes."""
    try:
        yield
    except RuntimeError as error:
        sizes = ", ".join(f"{name}={value}" for name, value in config.items() if type(value) is int)
        raise ValueError(f"A model of {sizes} does not fit into memory; choose smaller sizes.") from error


def check_configuration(config: dict) -> None:
    """Raise ValueError, one sentence, for values that :class:`ViTModel` cannot be built with."""
    for name, value in config.items():
        if name in ("norm_first", "patch_bias"):
            check_flag(name, value)
        elif name == "pooling":
            check_choice(name, value, POOLINGS)
        elif name in ("drop", "drop_path"):
            check_number(name, value, least=0, below=1, noun="a probability")
        elif name == "norm_eps":
            check_number(name, value, above=0, below=1, optional=True)
        else:
            check_whole(name, value, 0 if name == "num_classes" else 1, LARGEST, optional=name == "pre_logits")
    check_multiple("image_size", config["image_size"], "patch_size", config["patch_size"])
    check_multiple("em_dim", config["em_dim"], "num_heads", config["num_heads"])
