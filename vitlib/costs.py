"""What a ViT costs, by formula: tokens, parameters, FLOPs, memory. No model is built to count it.

The letters are those of model.py (B images, S side of an image, P side of a patch, C channels, N patches, T tokens,
D width of a token, H heads), and

    L  encoder blocks     M  hidden width of the MLP (ff_dim)     R  width of the pre-logits, 0 for none     A  classes

Before such numbers are compared, two conventions have to be known:

- FLOPs count a multiply-add as 2, and of all operations matrix products and convolutions alone, as
  ``torch.utils.flop_counter`` does. Papers and model cards often give multiply-adds under the same name, half as many:
  17.6 G for ViT-B/16 at 224 pixels, which are 35.1 G here.
- Memory is that of float32 on a CPU. The activations are what autograd keeps between the forward and the backward pass
  of the model: with ``drop=0`` through PyTorch's fused attention, which never stores the T x T weights; with dropout
  through the written-out one, because the fused one has no dropout on a CPU. A GPU's fused attention has it, and its
  dropout masks take one byte a number instead of four.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace

import torch

from vitlib.arguments import check_type, check_whole
from vitlib.model import ViTModel, create_model

FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Parts:
    """One quantity, divided among the parts of a model."""

    patch_embedding: int
    positions: int  # and the CLS token
    projections: int  # attention: tokens to queries, keys and values, and the heads' outputs to tokens
    products: int  # attention: queries with keys, weights with values; no parameters, but the one part with T squared
    mlp: int
    norms: int
    pre_logits: int
    classifier: int

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def times(self, factor: int) -> "Parts":
        return Parts(*(factor * number for number in astuple(self)))


@dataclass(frozen=True)
class Costs:
    """What :func:`costs` counts; the FLOPs and the activations are those of the whole batch."""

    patches: int  # of one image
    tokens: int  # of one image: its patches, and CLS
    parameters: Parts
    forward_flops: Parts
    training_flops: Parts  # forward and backward
    activation_bytes: Parts  # kept for the backward pass; what two parts keep is counted once, at the later one
    state_bytes: int  # weights, gradients and AdamW's two running means: 16 bytes a parameter


def preset_config(preset: str, num_classes: int, **overrides) -> dict:
    """``ViTModel.config`` of a named size, for :func:`costs`. Arguments and errors are those of
    :func:`vitlib.model.create_model`; the weights take no memory."""
    with torch.device("meta"):
        return create_model(preset, num_classes, **overrides).config


def costs(config: Mapping, batch_size: int = 1) -> Costs:
    """Everything there is to count about a model. ``{**config, "image_size": 448}`` is the same one at another size.

    Args:
        config: ``ViTModel.config``, :func:`preset_config`, or arguments of :class:`vitlib.model.ViTModel` by name;
            what is left out keeps its default there.
        batch_size: images that are computed at once.

    Raises:
        ValueError: for values that :class:`vitlib.model.ViTModel` refuses, or a batch of no images.
        TypeError: for an argument that the model does not have, or without ``num_classes``, as the model itself.
    """
    check_type("config", config, Mapping, "a mapping of arguments of ViTModel, such as a model's config")
    check_whole("batch_size", batch_size)
    with torch.device("meta"):  # fills in the defaults, and refuses sizes that do not divide
        config = ViTModel(**config).config
    S, P, D, H = (config[name] for name in ("image_size", "patch_size", "em_dim", "num_heads"))
    N = (S // P) ** 2
    letters = {
        "B": batch_size, "S": S, "P": P, "C": config["num_channels"], "N": N, "T": N + 1, "L": config["num_layers"],
        "D": D, "H": H, "M": config["ff_dim"], "R": config["pre_logits"] or 0, "A": config["num_classes"],
    }  # fmt: skip
    parameters = _parameters(**letters, patch_bias=config["patch_bias"])
    forward = _forward_flops(**letters).times(batch_size)
    # The backward pass computes two products for each of the forward pass, one for either factor's gradient; images
    # need no gradient. (A fused attention computes queries with keys once more instead of storing the result.)
    training = replace(forward.times(3), patch_embedding=2 * forward.patch_embedding)
    kept = _activations(**letters, drop=config["drop"], drop_path=config["drop_path"], pooling=config["pooling"])
    return Costs(N, N + 1, parameters, forward, training, kept.times(batch_size * FLOAT), 4 * FLOAT * parameters.total)


def _parameters(P, C, T, L, D, M, R, A, patch_bias, **_) -> Parts:
    """Weights and biases; the number of heads and the place of the norms change nothing."""
    return Parts(
        patch_embedding=P * P * C * D + (D if patch_bias else 0),
        positions=D + T * D,  # the CLS token; a row for each token
        projections=L * (3 * (D * D + D) + (D * D + D)),
        products=0,
        mlp=L * ((D * M + M) + (M * D + D)),
        norms=(2 * L + 1) * 2 * D,  # a scale and a shift; two norms in a block, one after the last
        pre_logits=D * R + R,
        classifier=((R or D) * A + A) if A else 0,
    )


def _forward_flops(P, C, N, T, L, D, M, R, A, **_) -> Parts:
    """Of one image. An ``[n, k]`` by ``[k, m]`` product takes ``2 * n * k * m``."""
    return Parts(
        patch_embedding=2 * N * P * P * C * D,
        positions=0,
        projections=L * (2 * T * D * 3 * D + 2 * T * D * D),
        products=L * (2 * T * D * T + 2 * T * T * D),  # H heads of width D / H: together as much as one of width D
        mlp=L * (2 * T * D * M + 2 * T * M * D),
        norms=0,
        pre_logits=2 * D * R,
        classifier=2 * (R or D) * A,
    )


def _activations(B, S, C, T, L, D, H, M, R, A, drop, drop_path, pooling, **_) -> Parts:
    """Numbers kept of one image. A linear layer keeps its input, a norm its input and two numbers a token, dropout a
    mask; a sum keeps nothing."""
    masks = 1 if drop else 0
    paths = L - 1 if drop_path else 0  # stochastic depth draws one number for each branch; the first block has none
    queries_keys_values = 3 * T * D
    if drop:
        weights = 3 * H * T * T  # after the softmax, their mask, and the masked ones
        if B == 1 or H == 1:  # then the values are not copied, and as a view keep queries and keys with them
            queries_keys_values += 2 * T * D
    else:
        weights = H * T  # each row's logarithm of the softmax's denominator; the rest is computed again
    # the CLS token is a view, which keeps all tokens with it; a mean is a tensor of its own
    pooled = T * D if pooling == "cls" else D
    return Parts(
        patch_embedding=C * S * S,
        positions=masks * T * D,
        projections=L * (T * D + T * D + masks * T * D) + paths,
        products=L * (queries_keys_values + weights),
        mlp=L * (T * D + 2 * T * M + masks * (T * M + T * D)) + paths,  # the MLP's input; before and after GELU
        norms=(2 * L + 1) * (T * D + 2 * T),
        pre_logits=pooled + (0 if A else R) if R else 0,  # tanh keeps its output, which is the classifier's input
        classifier=(R or pooled) if A else 0,
    )
