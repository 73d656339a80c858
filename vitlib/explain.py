"""Looking inside a ViT: what its positions and its attention say, and whether that explains what it predicts."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.arguments import brief, check, check_choice, check_number, check_tensor, check_type, check_whole
from vitlib.model import POOLINGS, ViTModel, patchify


def position_similarity(position_embedding: Tensor) -> Tensor:
    """How alike the positions of two patches are, as a cosine: the paper's figure 7 (centre).

    Args:
        position_embedding: ``[1, 1 + g * g, D]``, CLS first.

    Returns:
        ``[g, g, g, g]`` in [-1, 1]; ``result[i, j]`` is the map of similarities between the patch in row i, column j
        and all patches.
    """
    check_tensor("position_embedding", position_embedding, "1 T D")
    patches = F.normalize(position_embedding[0, 1:].detach(), dim=-1)  # [N, D], CLS has no place in the image
    grid = _grid("position_embedding", position_embedding, len(patches))
    return (patches @ patches.T).unflatten(1, (grid, grid)).unflatten(0, (grid, grid))


def query_attention(weights: Tensor, query: int) -> tuple[float, Tensor]:
    """One row of an attention matrix, laid out as the image is.

    Args:
        weights: ``[T, T]``, the attention of one head (or the mean of several) for one image.
        query: number of the token that asks; 0 is CLS, 1 the first patch.

    Returns:
        The share that goes to CLS, and the shares that go to the patches, ``[g, g]``. Together they sum to 1.

    Raises:
        ValueError: for a query that is not a token.
    """
    check_tensor("weights", weights, "T T")
    grid = _grid("weights", weights, weights.shape[1] - 1)
    last = len(weights) - 1
    check("query", query, _is_among(query, last), f"the number of a token, from 0 (CLS) to {last} (the last patch)")
    row = weights[query].detach()
    return row[0].item(), row[1:].unflatten(0, (grid, grid))


def with_temperature(weights: Tensor, temperature: float) -> Tensor:
    """What attention weights would be with their scores divided by a temperature: 1 changes nothing, a small one leaves
    nearly all to the largest score, a large one makes all shares alike.

    The scores ``s`` themselves are not needed. From ``weights = softmax(s)`` it follows that ``log(weights) = s - c``,
    with one ``c`` for each row. A softmax does not notice what is added to a whole row, so ``softmax(s / t)`` equals
    ``softmax(log(weights) / t)``.

    Args:
        weights: ``[..., T]``, each row sums to 1. A share of 0 has the score minus infinity and stays 0.
        temperature: above 0.

    Returns:
        The same shape; each row sums to 1.

    Raises:
        ValueError: for a temperature that is not above 0.
    """
    check_type("weights", weights, Tensor, "a tensor [..., T]")
    check_number("temperature", temperature, above=0)
    return (weights.log() / temperature).softmax(dim=-1)


def attention_of(model: ViTModel, images: Tensor, batch: int = 32) -> Tensor:
    """The attention weights of every layer and head.

    Args:
        model: in eval mode; with dropout on, the weights would be those of another model each time.
        images: float ``[B, C, S, S]``, normalised as the model wants them.
        batch: images that go through the model at a time.

    Returns:
        ``[L, B, H, T, T]``; row i of a matrix says where token i takes from, and sums to 1.

    Raises:
        ValueError: for images that do not fit the model.
    """
    check_type("model", model, ViTModel, "a ViTModel")
    check_tensor("images", images, "B C S S")
    check_whole("batch", batch)
    found = None
    with torch.no_grad():
        for start in range(0, max(1, len(images)), batch):
            part = model.intermediates(images[start : start + batch])["attention"]
            if found is None:  # filled part by part: to join the parts at the end would take twice the memory
                found = part.new_empty(len(part), len(images), *part.shape[2:])
            found[:, start : start + batch] = part
    return found


def attention_distance(attention: Tensor, patch_size: int) -> Tensor:
    """How far away the patches are that a head looks at: the paper's figure 7 (right) and appendix D.7.

    The distance in pixels between the centres of the asking and the asked patch, weighted by the attention between the
    two, and averaged over queries and images. CLS has no place in the image: it is left out, and the weights among the
    patches are brought to a sum of 1 again.

    Args:
        attention: ``[L, B, H, T, T]``.
        patch_size: side of a patch in pixels.

    Returns:
        ``[L, H]``, in pixels.
    """
    check_tensor("attention", attention, "L B H T T")
    check_whole("patch_size", patch_size)
    grid = _grid("attention", attention, attention.shape[-1] - 1)
    distances = patch_distances(grid).to(attention.device) * patch_size

    def of_heads(layer: Tensor) -> Tensor:
        weights = layer[..., 1:, 1:]  # [B, H, N, N]
        return ((weights * distances).sum(dim=-1) / weights.sum(dim=-1)).mean(dim=(0, 2))

    return torch.stack([of_heads(layer) for layer in attention])  # one after the other takes less memory


def patch_distances(grid: int) -> Tensor:
    """Distances between the centres of all patches of a ``grid x grid`` image, ``[N, N]``, in patches."""
    check_whole("grid", grid)
    along = torch.arange(grid, dtype=torch.float32)
    places = torch.cartesian_prod(along, along)  # [N, 2]: row and column of each patch
    return torch.cdist(places, places)


def rollout(attention: Tensor) -> Tensor:
    """Attention followed through all layers (Abnar and Zuidema 2020, arXiv:2005.00928).

    In each layer a token is taken to be half itself, by the residual connection, and half what the mean of the heads
    mixes into it; the layers' matrices are multiplied, the later one from the left. What the values, the MLPs and
    the norms do is left out, so this says where information *could* have come from.

    Args:
        attention: ``[L, B, H, T, T]``, from :func:`attention_of`.

    Returns:
        ``[B, T, T]``; row i says how much of token i, behind the last layer, stems from each token before the first.
        Rows sum to 1.
    """
    check_tensor("attention", attention, "L B H T T")
    residual = torch.eye(attention.shape[-1], device=attention.device)
    mixed = residual.expand(attention.shape[1], -1, -1)
    for layer in attention:  # [B, H, T, T]
        mixed = (layer.mean(dim=1) + residual) / 2 @ mixed
    return mixed


def delete_patches(images: Tensor, relevance: Tensor, count: int) -> Tensor:
    """The ``count`` most relevant patches of each image set to 0, the mean colour of normalised images.

    Args:
        images: float ``[B, C, S, S]``, normalised.
        relevance: ``[B, N]``, a number per patch (without CLS); the larger, the earlier it goes.
        count: from 0 to N.

    Raises:
        ValueError: for a count beyond N, or a number of patches that does not fit the image.
    """
    check_tensor("images", images, "B C S S")
    check_tensor("relevance", relevance, "B N")
    patches = relevance.shape[1]
    grid = math.isqrt(patches)
    if not patches or grid**2 != patches or images.shape[-1] % grid:
        raise ValueError(
            f"relevance={brief(relevance)}: {patches} patches are no square grid on images of {images.shape[-1]} "
            "pixels; leave CLS out."
        )
    check("count", count, _is_among(count, patches), f"0 to {patches}, the number of patches")
    order = relevance.argsort(dim=1, descending=True)
    kept = torch.ones_like(relevance).scatter(1, order[:, :count], 0)  # [B, N]
    side = images.shape[-1] // grid
    mask = kept.unflatten(1, (1, grid, grid)).repeat_interleave(side, 2).repeat_interleave(side, 3)
    return images * mask


def deletion_curve(
    model: ViTModel, images: Tensor, relevance: Tensor, counts: Sequence[int], batch: int = 32
) -> Tensor:
    """How fast a model loses its opinion when patches are deleted, most relevant first (Petsiuk et al. 2018,
    arXiv:1806.07421). The better ``relevance`` names what the prediction rests on, the steeper the fall.

    Args:
        model: in eval mode.
        images: float ``[B, C, S, S]``, normalised.
        relevance: ``[B, N]``, a number per patch.
        counts: how many patches to delete, one number per point of the curve.
        batch: images that go through the model at a time.

    Returns:
        ``[len(counts), B]``: the probability of the class that the model predicts for the whole image.
    """
    check_type("model", model, nn.Module, "a model that takes images to logits")
    check_tensor("images", images, "B C S S")
    check_tensor("relevance", relevance, "B N")
    last = relevance.shape[1]
    are_counts = isinstance(counts, Sequence) and len(counts) > 0 and all(_is_among(count, last) for count in counts)
    check("counts", counts, are_counts, f"a list of numbers of patches, each from 0 to {last}")
    check_whole("batch", batch)

    def logits_of(images: Tensor) -> Tensor:
        return torch.cat([model(part) for part in images.split(batch)])

    with torch.no_grad():
        predicted = logits_of(images).argmax(dim=1, keepdim=True)  # [B, 1]
        points = [logits_of(delete_patches(images, relevance, count)).softmax(dim=1) for count in counts]
    return torch.stack([point.gather(1, predicted).squeeze(1) for point in points])


def share_on_mask(relevance: Tensor, masks: Tensor) -> Tensor:
    """The share of the relevance that lies on the object.

    Args:
        relevance: ``[B, N]``, not negative; its sum in each image counts as 1.
        masks: bool ``[B, S, S]``, True on the object. A patch that it covers in part counts in part.

    Returns:
        ``[B]`` in [0, 1]. Relevance spread evenly gives the share of the image that the object covers.
    """
    check_tensor("relevance", relevance, "B N")
    check_tensor("masks", masks, "B S S")
    side = masks.shape[-1] // _grid("relevance", relevance, relevance.shape[1])
    covered = patchify(masks[:, None].float(), side).mean(dim=2)  # [B, N]
    return (relevance * covered).sum(dim=1) / relevance.sum(dim=1)


def patch_relevance(matrix: Tensor, pooling: str = "cls") -> Tensor:
    """How much of what the classifier sees comes from each patch.

    Args:
        matrix: ``[B, T, T]``: one layer's attention, averaged over its heads, or a :func:`rollout`.
        pooling: ``ViTModel.pooling``: "cls" reads the row of CLS, "mean" the mean of the patches' rows.

    Returns:
        ``[B, N]``, without the share that goes to CLS.
    """
    check_tensor("matrix", matrix, "B T T")
    check_choice("pooling", pooling, POOLINGS)
    seen = matrix[:, 0] if pooling == "cls" else matrix[:, 1:].mean(dim=1)  # [B, T]
    return seen[:, 1:]


def _grid(name: str, tensor: Tensor, patches: int) -> int:
    """Patches along a side of a square image of so many ``patches``, as ``tensor`` has them."""
    grid = math.isqrt(max(0, patches))
    fits = patches > 0 and grid**2 == patches
    check(name, tensor, fits, "one for the patches of a square image: a square number of them, beside CLS if it counts")
    return grid


def _is_among(number: object, last: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= last
