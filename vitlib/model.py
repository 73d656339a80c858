"""The Vision Transformer (ViT), written to be read from top to bottom.

It is the model of "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2021, arXiv:2010.11929; "the paper" below).
Classes and constructor arguments have the names of the small published system that the course follows. Each dimension
has one letter, here and in the lessons::

    B  images in a batch          N  patches of an image, (S / P)^2     D  width of a token (em_dim)
    C  colour channels            T  tokens of an image, N + 1          H  attention heads
    S  side of an image, pixels   L  encoder blocks (num_layers)        K  width of one head, D / H
    P  side of a patch, pixels
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into flattened patches: ``[B, C, S, S]`` to ``[B, N, C * P * P]``.

    Patches are numbered row by row, like words on a page. Within a patch the order is channel, row, column, the order
    in which a convolution stores its weights; so ``patchify(x, P) @ W.flatten(1).T`` is ``conv(x)``.

    Raises:
        ValueError: if ``patch_size`` does not divide both sides.
    """
    if images.shape[-2] % patch_size or images.shape[-1] % patch_size:  # unfold would silently drop the rest
        raise ValueError(
            f"Images of {images.shape[-2]}x{images.shape[-1]} pixels cannot be cut into patches of {patch_size}; "
            "choose a patch_size that divides both sides."
        )
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # [B, C, S/P, S/P, P, P]
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [B, N, C*P*P]


class ViTEmbeddings(nn.Module):
    """Turn images into tokens: the paper's equation 1.

    A convolution whose stride equals its kernel maps each patch linearly to D numbers. The trainable CLS token goes in
    front. The trainable position embedding is added to all tokens, CLS included.
    """

    def __init__(self, image_size=224, patch_size=16, num_channels=3, em_dim=768, drop=0.1, patch_bias=False):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size={image_size} is not a multiple of patch_size={patch_size}; "
                f"choose a multiple of {patch_size}, or a patch_size that divides it."
            )
        self.image_shape = (num_channels, image_size, image_size)
        num_patches = (image_size // patch_size) ** 2
        self.patch_embedding = nn.Conv2d(num_channels, em_dim, patch_size, stride=patch_size, bias=patch_bias)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, em_dim))
        self.position_embedding = nn.Parameter(0.02 * torch.randn(1, num_patches + 1, em_dim))
        self.dropout = nn.Dropout(drop)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Map images ``[B, C, S, S]`` to tokens ``[B, T, D]``.

        ``kept``, int64 ``[B, n]``, gives the numbers of the patches to keep, from 0. The result is then CLS and these
        patches, each with its position: ``[B, 1 + n, D]``. Training drops patches this way (PatchDropout, Liu et al.
        2023, arXiv:2208.07220).
        """
        self._check(images)
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # [B, N, D]
        cls = self.cls_token.expand(images.shape[0], -1, -1)  # [B, 1, D]; len() would fix B in an exported model
        tokens = torch.cat([cls, patches], dim=1) + self.position_embedding  # [B, T, D]
        if kept is not None:
            numbers = F.pad(kept + 1, (1, 0))  # patch i is token i + 1; token 0, CLS, always stays
            tokens = tokens.gather(1, numbers[:, :, None].expand(-1, -1, tokens.shape[2]))
        return self.dropout(tokens)

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"The model takes images of shape [B, {', '.join(map(str, self.image_shape))}], not "
                f"{list(images.shape)}; resize them, or build the model with another image_size or num_channels."
            )
        if not images.is_floating_point():
            raise ValueError(
                f"The model takes normalised images, not {images.dtype}; call vitlib.data.augment.normalise first."
            )


class SelfAttention(nn.Module):
    """Multi-head self-attention: the paper's equations 5 to 8.

    Every token asks (query), every token offers (key) and every token has something to say (value). A token's output
    is the average of all values, weighted by how well their keys fit its query.
    """

    def __init__(self, em_dim: int, num_heads: int, drop: float = 0.0):
        super().__init__()
        if em_dim % num_heads:
            raise ValueError(
                f"em_dim={em_dim} is not a multiple of num_heads={num_heads}; choose a num_heads that divides it."
            )
        self.num_heads = num_heads
        self.drop = drop
        self.qkv = nn.Linear(em_dim, 3 * em_dim)  # one matrix product for queries, keys and values of all heads
        self.output = nn.Linear(em_dim, em_dim)

    def forward(self, x: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Map tokens ``[B, T, D]`` to tokens ``[B, T, D]``, and return the attention weights ``[B, H, T, T]`` or None.

        Row i of a weight matrix says how much token i takes from each token; each row sums to 1. Without
        ``need_weights``, PyTorch's fused kernel computes the same output and never stores the weights. In bfloat16 on a
        CPU that kernel is slow and not used.
        """
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [B, T, 3, H, K]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
        drop = self.drop if self.training else 0.0
        fused_is_slow = query.dtype == torch.bfloat16 and query.device.type == "cpu"  # benchmarks/throughput.py
        if need_weights or fused_is_slow:
            scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # [B, H, T, T]
            weights = scores.softmax(dim=-1)  # over the keys: each query's weights sum to 1
            mixed = F.dropout(weights, drop) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=drop)
        output = self.output(mixed.transpose(1, 2).flatten(2))  # heads side by side again: [B, T, D]
        return output, weights if need_weights else None


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): dropout of whole branches, in training only.

    Each image skips the branch with this ``probability``. For the other images the branch is scaled up, so that its
    mean stays the same.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, T, D]`` to the same shape."""
        if not self.training or self.probability == 0:
            return x
        survival = 1 - self.probability
        return x * torch.empty(len(x), 1, 1, dtype=x.dtype, device=x.device).bernoulli_(survival) / survival


class EncoderBlock(nn.Module):
    """One layer of the encoder: attention between tokens, then an MLP on each token, both added to their input.

    ``norm_first=True`` normalises the input of each half, so that the sum itself is never touched (pre-norm, the
    paper's equations 2 and 3). ``norm_first=False`` normalises the sum (post-norm, as in the original Transformer and
    by default in ``nn.TransformerEncoderLayer``), which is what the published small system does.
    """

    def __init__(
        self, em_dim: int, num_heads: int, ff_dim: int, drop: float = 0.0, norm_first: bool = True,
        drop_path: float = 0.0, norm_eps: float | None = None,
    ):  # fmt: skip
        super().__init__()
        # the paper's code uses 1e-6; the published post-norm system uses PyTorch's default
        eps = norm_eps or (1e-6 if norm_first else 1e-5)
        self.norm_first = norm_first
        self.attention = SelfAttention(em_dim, num_heads, drop)
        self.mlp = nn.Sequential(nn.Linear(em_dim, ff_dim), nn.GELU(), nn.Dropout(drop), nn.Linear(ff_dim, em_dim))
        self.norm1 = nn.LayerNorm(em_dim, eps=eps)
        self.norm2 = nn.LayerNorm(em_dim, eps=eps)
        self.dropout = nn.Sequential(nn.Dropout(drop), DropPath(drop_path))

    def forward(self, x: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Map tokens ``[B, T, D]`` to tokens ``[B, T, D]``; weights as in :class:`SelfAttention`."""
        if self.norm_first:
            attended, weights = self.attention(self.norm1(x), need_weights)
            x = x + self.dropout(attended)
            x = x + self.dropout(self.mlp(self.norm2(x)))
        else:
            attended, weights = self.attention(x, need_weights)
            x = self.norm1(x + self.dropout(attended))
            x = self.norm2(x + self.dropout(self.mlp(x)))
        return x, weights


class ViTEncoder(nn.Module):
    """Embeddings, a stack of blocks and a final layer norm: the part of the model that fine-tuning reuses."""

    def __init__(
        self, num_layers, image_size, patch_size, num_channels, em_dim, drop, num_heads, ff_dim,
        norm_first=True, patch_bias=False, drop_path=0.0, norm_eps=None,
    ):  # fmt: skip
        super().__init__()
        self.embedding = ViTEmbeddings(image_size, patch_size, num_channels, em_dim, drop, patch_bias)
        # each block gets its own initial weights; in nn.TransformerEncoder all blocks start as copies of one
        self.encoder = nn.ModuleList()
        for depth in range(num_layers):
            probability = drop_path * depth / max(1, num_layers - 1)  # 0 in the first block, drop_path in the last
            self.encoder.append(EncoderBlock(em_dim, num_heads, ff_dim, drop, norm_first, probability, norm_eps))
        self.layernorm = nn.LayerNorm(em_dim, eps=norm_eps or 1e-6)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Map images ``[B, C, S, S]`` to normalised tokens ``[B, T, D]``, CLS first; ``kept`` as in the embeddings."""
        tokens = self.embedding(images, kept)
        for block in self.encoder:
            tokens, _ = block(tokens)
        return self.layernorm(tokens)


POOLINGS = ("cls", "mean")  # the classifier sees the CLS token, or the mean of all patch tokens


class ViTModel(nn.Module):
    """A Vision Transformer that classifies images; the defaults are ViT-B/16.

    Args:
        num_classes: number of classes; with 0 there is no classifier, and the model returns its pooled features.
        num_layers: encoder blocks.
        image_size: side of the square images, in pixels; a multiple of ``patch_size``.
        patch_size: side of a patch, in pixels.
        num_channels: 3 for RGB, 1 for grey.
        em_dim: width of a token; a multiple of ``num_heads``.
        drop: dropout probability, the same in all places.
        num_heads: attention heads per block.
        ff_dim: hidden width of the MLP in each block.
        norm_first: True for pre-norm (the paper), False for post-norm (the published small system).
        patch_bias: whether the patch embedding has a bias; the official weights have one.
        drop_path: probability of leaving out a branch of the last block; it rises from 0 at the first.
        pooling: "cls" classifies the CLS token (the paper), "mean" the mean of all patch tokens.
        norm_eps: added to the variance in every layer norm; None for the usual 1e-6 (1e-5 in post-norm blocks). Hugging
            Face's models compute with 1e-12.
        pre_logits: width of a hidden layer with tanh before the classifier, or None. The paper's models have one in
            pretraining (section 3.1) and drop it for fine-tuning.

    Raises:
        ValueError: for sizes that do not divide, an unknown pooling, or images of another shape or dtype.
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
        self.config = {name: value for name, value in dict(locals()).items() if name not in ("self", "__class__")}
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is not known; choose {' or '.join(POOLINGS)}.")
        self.pooling = pooling
        self.vit_encoder = ViTEncoder(
            num_layers=num_layers, image_size=image_size, patch_size=patch_size, num_channels=num_channels,
            em_dim=em_dim, drop=drop, num_heads=num_heads, ff_dim=ff_dim, norm_first=norm_first,
            patch_bias=patch_bias, drop_path=drop_path, norm_eps=norm_eps,
        )  # fmt: skip
        self.pre_logits = nn.Sequential(nn.Linear(em_dim, pre_logits), nn.Tanh()) if pre_logits else nn.Identity()
        self.linear_classifier = nn.Linear(pre_logits or em_dim, num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)
        if num_classes:  # nearly equal logits, so a first loss near the logarithm of the number of classes
            nn.init.trunc_normal_(self.linear_classifier.weight, std=0.02)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Map normalised images ``[B, C, S, S]`` to logits ``[B, num_classes]``; ``kept`` as in the embeddings."""
        return self.classify(self.vit_encoder(images, kept))

    def classify(self, tokens: Tensor) -> Tensor:
        """Map normalised tokens ``[B, T, D]`` to logits ``[B, num_classes]``."""
        # the CLS token speaks for the image (the paper's equation 4), or all patches do
        pooled = tokens[:, 0] if self.pooling == "cls" else tokens[:, 1:].mean(1)  # [B, D]
        return self.linear_classifier(self.pre_logits(pooled))

    def intermediates(self, images: Tensor) -> dict[str, Tensor]:
        """Return everything between the images and the logits, by name.

        ``embeddings [B, T, D]`` are the input of the first block, ``tokens [L, B, T, D]`` the output of each block,
        ``attention [L, B, H, T, T]`` the weights of each block. ``encoded [B, T, D]`` comes after the final norm.
        ``logits [B, num_classes]`` are those of ``forward``, apart from rounding.
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


def _initialise(module: nn.Module) -> None:
    """Initialise nearly as the paper's code: Xavier for linear layers, LeCun for the patch embedding, zero for biases.

    Queries, keys and values are one matrix here, as in PyTorch's own layer, so their weights start smaller by sqrt(2).
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")  # LeCun: variance 1 / inputs
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def count_parameters(module: nn.Module) -> int:
    """Count the trainable numbers in a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Invert :func:`patchify` for square images, exactly: ``[B, N, C * P * P]`` to ``[B, C, S, S]``."""
    grid = math.isqrt(patches.shape[1])
    patches = patches.unflatten(2, (-1, patch_size, patch_size)).unflatten(1, (grid, grid))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [B, C, S, S]


def interpolate_positions(position_embedding: Tensor, grid: int) -> Tensor:
    """Interpolate position embeddings to another number of patches (the paper, section 3.2), bicubically.

    The CLS token has no place in the image; its row is kept.

    Args:
        position_embedding: ``[1, T, D]`` of square images, CLS first.
        grid: patches along a side of the new images.

    Returns:
        ``[1, 1 + grid * grid, D]``; the input itself if it already has this size.
    """
    cls, patches = position_embedding[:, :1], position_embedding[:, 1:]
    old_grid = math.isqrt(patches.shape[1])
    if grid == old_grid:
        return position_embedding
    as_image = patches.unflatten(1, (old_grid, old_grid)).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    resized = F.interpolate(as_image, (grid, grid), mode="bicubic")
    return torch.cat([cls, resized.flatten(2).transpose(1, 2)], dim=1)


# What a preset leaves out is ViTModel's default: ViT-B/16 of the paper's Table 1. Ti and S are from Touvron et al. 2021
# (arXiv:2012.12877). The number after the slash is the patch size.
_OFFICIAL = {"image_size": 224, "patch_bias": True}  # all sizes with published weights
PRESETS: dict[str, dict] = {
    # 310 thousand parameters without the classifier: trains in class, in about a minute on two CPU cores
    "mini": {"image_size": 32, "patch_size": 4, "num_layers": 4, "em_dim": 96, "num_heads": 4, "ff_dim": 192},
    # 3.2 million with 100 classes: the published small system
    "small": {"image_size": 32, "patch_size": 4, "num_layers": 6, "em_dim": 256, "num_heads": 8, "ff_dim": 512},
    # 5.7, 22.1, 88.2, 86.6, 304.3 and 632.0 million with 1,000 classes
    "Ti/16": _OFFICIAL | {"em_dim": 192, "num_heads": 3, "ff_dim": 768},
    "S/16": _OFFICIAL | {"em_dim": 384, "num_heads": 6, "ff_dim": 1536},
    "B/32": _OFFICIAL | {"patch_size": 32},
    "B/16": _OFFICIAL,
    "L/16": _OFFICIAL | {"num_layers": 24, "em_dim": 1024, "num_heads": 16, "ff_dim": 4096},
    "H/14": _OFFICIAL | {"patch_size": 14, "num_layers": 32, "em_dim": 1280, "num_heads": 16, "ff_dim": 5120},
}


def create_model(preset: str, num_classes: int, **overrides) -> ViTModel:
    """Build a new model of a named size, with random weights.

    Args:
        preset: a key of ``PRESETS``.
        overrides: arguments of :class:`ViTModel` that replace the preset's.

    Raises:
        ValueError: for an unknown preset, and as :class:`ViTModel`.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is not known; choose one of {', '.join(PRESETS)}.")
    return ViTModel(num_classes, **{**PRESETS[preset], **overrides})
