"""Compute what a ViT costs by formula, without building it: tokens, parameters, FLOPs, memory.

The letters are those of :mod:`vitlib.model`; M is the hidden width of the MLP, R that of the pre-logits (0 without).

- A multiply-add counts as 2 FLOPs, and only matrix products and convolutions count, as in
  ``torch.utils.flop_counter``. Papers and model cards often count multiply-adds under the same name, which are half as
  many: 17.6 G for ViT-B/16 at 224 pixels, 35.1 G here.
- Activations are the tensors that autograd keeps from the forward pass for the backward pass, in float32, without
  dropout and with PyTorch's fused attention, which never stores the T x T weights.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace

import torch

from vitlib.model import create_model

FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Parts:
    """One quantity for each part of a model."""

    patch_embedding: int
    positions: int  # and the CLS token
    projections: int  # attention: tokens to queries, keys and values, and the heads' outputs to tokens
    products: int  # attention: queries with keys, weights with values; the only part that grows with T squared
    mlp: int
    norms: int
    classifier: int  # and the pre-logits before it

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def times(self, factor: int) -> "Parts":
        return Parts(*(factor * number for number in astuple(self)))


@dataclass(frozen=True)
class Costs:
    """The results of :func:`costs`; FLOPs and activations are those of the whole batch."""

    patches: int  # of one image
    tokens: int  # of one image: its patches and CLS
    parameters: Parts
    forward_flops: Parts
    training_flops: Parts  # forward and backward
    activation_bytes: Parts


def preset_config(preset: str, num_classes: int, **overrides) -> dict:
    """Return the ``ViTModel.config`` of a preset; arguments as in :func:`vitlib.model.create_model`."""
    with torch.device("meta"):  # the weights take no memory
        return create_model(preset, num_classes, **overrides).config


def costs(config: Mapping, batch_size: int = 1) -> Costs:
    """Compute the costs of a model; ``{**config, "image_size": 448}`` is the same model at another image size.

    Args:
        config: ``ViTModel.config``, or :func:`preset_config`.
        batch_size: images per batch.

    Raises:
        ValueError: for sizes that do not divide.
    """
    S, P, C, L = (config[name] for name in ("image_size", "patch_size", "num_channels", "num_layers"))
    D, H, M, classes = (config[name] for name in ("em_dim", "num_heads", "ff_dim", "num_classes"))
    if S % P or D % H:  # the formulas would give fractions of a patch or of a head
        raise ValueError(f"image_size={S} is not a multiple of patch_size={P}, or em_dim={D} not of num_heads={H}.")
    R, N = config["pre_logits"] or 0, (S // P) ** 2
    T = N + 1
    parameters = Parts(
        patch_embedding=P * P * C * D + D * bool(config["patch_bias"]),
        positions=D + T * D,  # the CLS token; a row for each token
        projections=L * (3 * (D * D + D) + (D * D + D)),  # the number of heads changes nothing
        products=0,
        mlp=L * ((D * M + M) + (M * D + D)),
        norms=(2 * L + 1) * 2 * D,  # a scale and a shift; two norms in a block, one after the last
        classifier=(D * R + R) + ((R or D) + 1) * classes,
    )
    forward = Parts(  # of one image; an [n, k] by [k, m] product takes 2 * n * k * m
        patch_embedding=2 * N * P * P * C * D,
        positions=0,
        projections=L * (2 * T * D * 3 * D + 2 * T * D * D),
        products=L * (2 * T * D * T + 2 * T * T * D),  # H heads of width D / H: together as much as one of width D
        mlp=L * (2 * T * D * M + 2 * T * M * D),
        norms=0,
        classifier=2 * D * R + 2 * (R or D) * classes,
    ).times(batch_size)
    # The backward pass computes two products for each of the forward pass, one for the gradient of each factor; images
    # need no gradient. (Fused attention multiplies queries with keys once more instead of storing the result.)
    training = replace(forward.times(3), patch_embedding=2 * forward.patch_embedding)
    pooled = T * D if config["pooling"] == "cls" else D  # CLS is a view, which keeps all tokens in memory
    # Of one image. A linear layer keeps its input, a norm its input and two numbers a token, a sum nothing.
    activations = Parts(
        patch_embedding=C * S * S,
        positions=0,
        projections=L * 2 * T * D,
        products=L * (3 * T * D + H * T),  # queries, keys, values; the softmax's denominator of each row
        mlp=L * (T * D + 2 * T * M),  # the MLP's input; before and after GELU
        norms=(2 * L + 1) * (T * D + 2 * T),
        classifier=pooled + R if R else pooled * bool(classes),  # tanh keeps its output, the classifier's input
    )
    return Costs(N, T, parameters, forward, training, activations.times(batch_size * FLOAT))
