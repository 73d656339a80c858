"""Checks of chapter 06: the real ViT."""

from collections.abc import Callable

import torch
from torch import Tensor

from .frame import answer, as_indices, compare, exercise, expect, number_answer, tensor_answer


@exercise("parameters by hand")
def parameters(learners: Callable) -> None:
    """Check ``parameters(image_size, patch_size, num_layers, em_dim, ff_dim, num_classes) -> int``, for RGB images."""
    sizes, right, slips = _sizes()
    given = number_answer(learners, *sizes.values())
    named = ", ".join(f"{name} {size}" for name, size in sizes.items())
    expect(given == right, slips.get(given, f"{given:,} where {right:,} are right, for {named}"))


def _sizes() -> tuple[dict[str, int], int, dict[int, str]]:
    """Return a random configuration, its number of parameters, and the mistakes by their numbers, no two the same."""
    while True:
        P, L, rows = torch.randint(2, 6, (3,)).tolist()
        S, classes = P * (rows + 1), torch.randint(11, 100, ()).item()
        D, M = 8 * torch.randint(3, 10, ()).item(), 8 * torch.randint(20, 31, ()).item()
        N, right = (S // P) ** 2, _parameters(S, P, L, D, M, classes)
        block = right - _parameters(S, P, L - 1, D, M, classes)
        missing = {
            "D are missing: the CLS token, its row of the positions, or the bias of the patch embedding": D,
            "2 D are missing: the final layer norm, or two of CLS token, its position and the patch bias": 2 * D,
            "3 D are missing: the CLS token, its row of the positions and the bias of the patch embedding": 3 * D,
            "the positions are missing: N + 1 rows of D numbers, all of them trained": (N + 1) * D,
            "the image is cut along both sides: N is the square of S / P": (N - S // P) * D,
            "4 D a block are missing: its two layer norms, or the four biases of its attention": L * 4 * D,
            "all layer norms are missing: two in each block and a final one": L * 4 * D + 2 * D,
            "a block has two layer norms, and a final one follows, each with scale and shift": L * 2 * D + 2 * D,
            "all layer norms lack their shift, D numbers each": L * 2 * D + D,
            "a block has two layer norms, and each has a scale and a shift": L * 2 * D,
            "queries, keys and values have a D x D matrix each": L * 2 * D * D,
            "queries, keys and values have a D x D matrix and a bias each": L * 2 * (D * D + D),
            "the biases of queries, keys and values are missing: 3 D a block": L * 3 * D,
            "the biases of the MLP are missing: M and D in each block": L * (M + D),
            "the attention is missing: four layers from D to D": L * 4 * (D * D + D),
            "the MLP is missing: from D to M and from M back to D": L * (2 * D * M + M + D),
            "the patch embedding is missing: from 3 P P numbers to D": 3 * P * P * D + D,
            "the output projection of the attention is missing, D x D and a bias": L * (D * D + D),
            "the linear layers of a block have biases: 4 D in the attention, M + D in the MLP": L * (5 * D + M),
            "no linear layer has its bias yet, nor has the patch embedding": L * (5 * D + M) + classes + D,
            "the MLP has two layers: from D to M and from M back to D": L * (D * M + D),
            "the classifier has a bias, one number for each class": classes,
            "the classifier is missing: D weights and a bias for each class": classes * D + classes,
            "a patch has three colours: 3 P P numbers go into the patch embedding": 2 * P * P * D,
            "that is one block; there are num_layers of them": (L - 1) * block,
        }
        if len(set(missing.values())) == len(missing):
            names = ("image_size", "patch_size", "num_layers", "em_dim", "ff_dim", "num_classes")
            sizes = dict(zip(names, (S, P, L, D, M, classes), strict=True))
            return sizes, right, {right - number: mistake for mistake, number in missing.items()}


def _parameters(S: int, P: int, L: int, D: int, M: int, classes: int) -> int:
    """Return the number of parameters, part by part: independent of vitlib.costs."""
    embedding = 3 * P * P * D + D + D + ((S // P) ** 2 + 1) * D  # patches, their bias, CLS, positions
    block = 3 * (D * D + D) + (D * D + D) + (D * M + M) + (M * D + D) + 2 * 2 * D
    return embedding + L * block + 2 * D + D * classes + classes


@exercise("FLOPs of attention")
def attention_flops(learners: Callable) -> None:
    """Check ``attention_flops(tokens, em_dim) -> int``: both products among the tokens, of one layer and one image."""
    half, eighth = torch.randint(50, 100, (2,)).tolist()
    T, D = 2 * half + 1, 8 * eighth  # T is odd: no two mistakes give one number
    given, right = number_answer(learners, T, D), 4 * T * T * D
    slips = {
        "that is half of it: there are two products, and a multiply-add counts as two operations": right // 2,
        "that is a quarter of it: two products, and a multiply-add counts as two operations": right // 4,
        "that grows with D squared, as projections do; here every token meets every token": 4 * T * D * D,
        "those are the four projections; the products among the tokens grow with T squared": 8 * T * D * D,
        "the four projections are counted too; leave them out": right + 8 * T * D * D,
        "every token meets every token: T squared": 4 * T * D,
        "each of the T x T numbers is a sum over the width of a token: D is missing": 4 * T * T,
        "D is missing, since each of the T x T numbers is a sum; so is a factor of 2": 2 * T * T,
        "that is twice too much: the heads share the width D among them, T x T x D in each product": 2 * right,
    }
    otherwise = f"{given:,} where {right:,} are right, for {T} tokens of width {D}"
    compare(given, right, slips, otherwise, tolerance=1e-6)  # D / H is a fraction for some H


@exercise("a kernel of Google's", (3, 4), (2, 5), (5, 3), (4, 2))
def google_kernel(learners: Callable, heads: int, width: int) -> None:
    """Check ``google_kernel(kernel [D, H, K]) -> [D, D]``: the weight of an ``nn.Linear`` that does the same."""
    size = heads * width
    kernel = torch.randn(size, heads, width)
    given = tensor_answer(learners, kernel)
    flat, mixed = kernel.reshape(size, size), kernel.mT.reshape(size, size)
    slips = {
        "the matrix is transposed: flax computes x @ kernel, nn.Linear computes x @ weight.T": flat,
        "the numbers of the heads are mixed: head 0 comes first, with all its K numbers": mixed.T,
        "transposed, and the numbers of the heads are mixed": mixed,
        "reshape keeps the order of the numbers in memory; turn the axes around (.T) after flattening": (
            kernel.transpose(0, 1).reshape(size, size)
        ),
    }
    compare(given, flat.T, slips, "x @ weight.T is not what x and the kernel give, summed over D")


@exercise("confident mistakes", (4, 4), (7, 10), (5, 7))
def confident_mistakes(learners: Callable, count: int, classes: int) -> None:
    """Check ``confident_mistakes(logits [B, classes], labels [B], count) -> [count]``: image numbers, surest first."""
    logits, labels, right, slips = _opinions(count, classes)

    def numbers(labels: Tensor, count: int) -> Tensor:
        return as_indices(answer(learners, logits, labels, count))

    surest = logits[right[0]].softmax(0).max()
    otherwise = f"image {right[0]} is the surest mistake here ({surest:.0%}), and others follow"
    compare(numbers(labels, count), right, slips, otherwise, letters="[count]")
    found = int((logits.argmax(1) != labels).sum())
    few, none = numbers(labels, found + 3), numbers(logits.argmax(1), 3)
    asked = f"asked for {found + 3} of {found} mistakes"
    expect(len(few) == found, f"{asked}, it gave {len(few)}; give those that there are")
    expect(len(none) == 0, f"where every answer is right, it gave {len(none)} images; give none")


def _opinions(count: int, classes: int, images: int = 40) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return logits and labels, the right answer and the typical wrong ones, no two of which are the same."""
    while True:
        # a number added to a whole row changes no probability, but the largest logit
        logits = torch.randn(images, classes) * (0.5 + 2 * torch.rand(images, 1)) + 4 * torch.randn(images, 1)
        labels = torch.where(torch.rand(images) < 0.4, logits.argmax(1), torch.randint(classes, (images,)))
        shares, answers = logits.softmax(1), logits.argmax(1)
        surest = shares.amax(1)
        wrong = answers != labels
        true_class = shares.gather(1, labels[:, None]).squeeze(1)

        def order(scores: Tensor, among: Tensor) -> Tensor:
            numbers = among.nonzero().flatten()
            return numbers[scores[numbers].argsort(descending=True)][:count]  # noqa: B023 (used at once)

        right = order(surest, wrong)
        slips = {
            "right answers are among them; keep the wrong ones only": order(surest, torch.ones_like(wrong)),
            "these are right answers": order(surest, ~wrong),
            "the least sure come first; sort in descending order": order(-surest, wrong),
            "the largest logit is no confidence: take the softmax first": order(logits.amax(1), wrong),
            "these are sorted by the probability of the true class, not of the answer": order(-true_class, wrong),
            "these are the first wrong ones, not the surest": wrong.nonzero().flatten()[:count],
            "these number the wrong images only; give their numbers among all images": (
                surest[wrong].argsort(descending=True)[:count]
            ),
            "these are the classes, not the numbers of the images": answers[right],
        }
        enough = count <= wrong.sum() <= images - count and surest.sort().values.diff().min() > 1e-4
        if enough and len({tuple(given.tolist()) for given in (right, *slips.values())}) == 1 + len(slips):
            return logits, labels, right, slips
