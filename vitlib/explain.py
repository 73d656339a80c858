"""Looking inside a ViT: what its positions and its attention say."""

import math

import torch.nn.functional as F
from torch import Tensor


def position_similarity(position_embedding: Tensor) -> Tensor:
    """How alike the positions of two patches are, as a cosine: the paper's figure 7 (centre).

    Args:
        position_embedding: ``[1, 1 + g * g, D]``, CLS first.

    Returns:
        ``[g, g, g, g]`` in [-1, 1]; ``result[i, j]`` is the map of similarities between the patch in row i, column j
        and all patches.
    """
    patches = F.normalize(position_embedding[0, 1:].detach(), dim=-1)  # [N, D], CLS has no place in the image
    grid = math.isqrt(len(patches))
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
    if not 0 <= query < len(weights):
        raise ValueError(f"query={query} is not a token; choose 0 (CLS) to {len(weights) - 1} (the last patch).")
    row = weights[query].detach()
    grid = math.isqrt(len(row) - 1)
    return row[0].item(), row[1:].unflatten(0, (grid, grid))
