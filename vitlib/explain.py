"""Look inside a ViT: its attention, and whether that explains its predictions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitlib.model import ViTModel, patchify

BATCH = 32  # images that go through a model at a time


def attention_of(model: ViTModel, images: Tensor) -> Tensor:
    """Return the attention weights of every layer and head.

    Args:
        model: in eval mode.
        images: float ``[B, C, S, S]``, normalised as the model expects them.

    Returns:
        ``[L, B, H, T, T]``; row i of a matrix says how much token i takes from each token, and sums to 1.
    """
    found = None
    with torch.no_grad():
        for start in range(0, len(images), BATCH):
            part = model.intermediates(images[start : start + BATCH])["attention"]
            if found is None:  # to join all parts at the end would take twice the memory
                found = part.new_empty(len(part), len(images), *part.shape[2:])
            found[:, start : start + BATCH] = part
    return found


def patch_distances(grid: int) -> Tensor:
    """Return the distances between the centres of all patches of a ``grid x grid`` image, ``[N, N]``, in patches."""
    along = torch.arange(grid, dtype=torch.float32)
    places = torch.cartesian_prod(along, along)  # [N, 2]: row and column of each patch
    return torch.cdist(places, places)


def attention_distance(attention: Tensor, patch_size: int) -> Tensor:
    """Return how far each head looks: the paper's figure 7 (right) and appendix D.7.

    This is the distance in pixels between the asking and the asked patch, weighted by the attention between the two,
    and averaged over queries and images. CLS has no place in the image. It is left out, and the weights of the patches
    are rescaled to a sum of 1.

    Args:
        attention: ``[L, B, H, T, T]``.
        patch_size: side of a patch in pixels.

    Returns:
        ``[L, H]``, in pixels.
    """
    distances = patch_distances(math.isqrt(attention.shape[-1] - 1)).to(attention.device) * patch_size

    def of_heads(layer: Tensor) -> Tensor:
        weights = layer[..., 1:, 1:]  # [B, H, N, N]
        return ((weights * distances).sum(dim=-1) / weights.sum(dim=-1)).mean(dim=(0, 2))

    return torch.stack([of_heads(layer) for layer in attention])  # layer by layer, to save memory


def rollout(attention: Tensor) -> Tensor:
    """Follow attention through all layers (Abnar and Zuidema 2020, arXiv:2005.00928).

    In each layer a token counts as half itself, by the residual connection, and half what the mean of the heads mixes
    into it. The layers' matrices are multiplied, the later one from the left. Values, MLPs and norms are left out, so
    this says where information *could* have come from.

    Args:
        attention: ``[L, B, H, T, T]``, from :func:`attention_of`.

    Returns:
        ``[B, T, T]``; row i says how much of token i after the last layer comes from each token before the first, and
        sums to 1.
    """
    residual = torch.eye(attention.shape[-1], device=attention.device)
    mixed = residual.expand(attention.shape[1], -1, -1)
    for layer in attention:  # [B, H, T, T]
        mixed = (layer.mean(dim=1) + residual) / 2 @ mixed
    return mixed


# Relevance is one number per patch, [B, N], without CLS. The first kind comes from attention, the second from a
# gradient. The last two know nothing of the model: they are the controls.


def patch_relevance(matrix: Tensor, pooling: str = "cls") -> Tensor:
    """Return how much of the classifier's input comes from each patch, ``[B, N]``.

    Args:
        matrix: ``[B, T, T]``: one layer's attention, averaged over its heads, or a :func:`rollout`.
        pooling: ``ViTModel.pooling``: "cls" reads the row of CLS, "mean" the mean of the patches' rows.
    """
    seen = matrix[:, 0] if pooling == "cls" else matrix[:, 1:].mean(dim=1)  # [B, T]
    return seen[:, 1:]


def gradient_relevance(model: ViTModel, images: Tensor) -> Tensor:
    """Return gradient times input, its absolute value summed over each patch (Shrikumar et al. 2016, arXiv:1605.01713).

    Attention maps are the same for every class; this is the map of the predicted class, ``[B, N]``.

    Args:
        model: in eval mode.
        images: float ``[B, C, S, S]``, normalised.
    """
    relevance = []
    for part in images.split(BATCH):
        part = part.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(part).max(dim=1).values.sum(), part)
        relevance.append(patchify((gradient * part.detach()).abs(), model.config["patch_size"]).sum(dim=2))
    return torch.cat(relevance)


def contrast_relevance(images: Tensor, patch_size: int) -> Tensor:
    """Return each patch's squared difference from the median patch of its image, summed: ``[B, N]``."""
    patches = patchify(images, patch_size)  # [B, N, C * P * P]
    return (patches - patches.median(dim=1, keepdim=True).values).square().sum(dim=2)


def middle_relevance(images: Tensor, patch_size: int) -> Tensor:
    """Return how near each patch is to the middle of the image, ``[B, N]`` in patches; 0 in the corners."""
    grid = images.shape[-1] // patch_size
    along = torch.arange(grid, device=images.device) - (grid - 1) / 2
    distance = torch.cartesian_prod(along, along).norm(dim=1)  # [N]
    return (distance.max() - distance).expand(len(images), -1)


def delete_patches(images: Tensor, relevance: Tensor, count: int) -> Tensor:
    """Set the ``count`` most relevant patches of each image to 0, the mean colour of normalised images.

    Args:
        images: float ``[B, C, S, S]``, normalised.
        relevance: ``[B, N]``; patches with the largest numbers are deleted first.
        count: from 0 to N.

    Raises:
        ValueError: for another count.
    """
    if not 0 <= count <= relevance.shape[1]:  # a slice would silently accept it
        raise ValueError(f"count={count} is not possible with {relevance.shape[1]} patches; choose 0 to all of them.")
    grid = math.isqrt(relevance.shape[1])
    side = images.shape[-1] // grid
    order = relevance.argsort(dim=1, descending=True)
    kept = torch.ones_like(relevance).scatter(1, order[:, :count], 0)  # [B, N]
    mask = kept.unflatten(1, (1, grid, grid)).repeat_interleave(side, 2).repeat_interleave(side, 3)
    return images * mask


def deletion_curve(model: nn.Module, images: Tensor, relevance: Tensor, counts: Sequence[int]) -> Tensor:
    """Return how the predicted probability falls as patches are deleted, the most relevant first (Petsiuk et al. 2018,
    arXiv:1806.07421). The better ``relevance`` explains the prediction, the steeper the fall.

    With ``-relevance`` the least relevant go first; read from the end, that is the insertion curve of ``relevance``.

    Args:
        model: in eval mode.
        images: float ``[B, C, S, S]``, normalised.
        relevance: ``[B, N]``.
        counts: how many patches to delete, one number per point of the curve.

    Returns:
        ``[len(counts), B]``: the probability of the class that the model predicts for the whole image.
    """

    def logits_of(images: Tensor) -> Tensor:
        return torch.cat([model(part) for part in images.split(BATCH)])

    with torch.no_grad():
        predicted = logits_of(images).argmax(dim=1, keepdim=True)  # [B, 1]
        points = [logits_of(delete_patches(images, relevance, count)).softmax(dim=1) for count in counts]
    return torch.stack([point.gather(1, predicted).squeeze(1) for point in points])


def share_on_mask(relevance: Tensor, masks: Tensor) -> Tensor:
    """Return the share of the relevance that lies on the object.

    Args:
        relevance: ``[B, N]``, not negative; the sum over an image counts as 1.
        masks: bool ``[B, S, S]``, True on the object; a patch that it covers partly counts partly.

    Returns:
        ``[B]`` in [0, 1]. Evenly spread relevance gives the share of the image that the object covers.
    """
    side = masks.shape[-1] // math.isqrt(relevance.shape[1])
    covered = patchify(masks[:, None].float(), side).mean(dim=2)  # [B, N]
    return (relevance * covered).sum(dim=1) / relevance.sum(dim=1)
