"""Checks of chapter 06: the real ViT."""

import random
from collections.abc import Callable

import torch

from .frame import as_number, compare, exercise, expect, number_answer, tensor_answer


@exercise("parameters by hand")
def parameters(learners: Callable) -> None:
    """Of ``parameters(image_size, patch_size, num_layers, em_dim, ff_dim, num_classes) -> int``, for RGB images and a
    patch embedding with bias."""
    for _ in range(3):
        sizes, right, slips = _sizes()
        given = as_number(number_answer(learners, *sizes.values()))
        named = ", ".join(f"{name} {size}" for name, size in sizes.items())
        expect(given == right, slips.get(given, f"{given:,} where {right:,} are right, for {named}"))


def _sizes() -> tuple[dict[str, int], int, dict[int, str]]:
    """A random configuration, its number of parameters, and by their numbers what is likely to have been left out;
    drawn until no two of these are the same."""
    while True:
        P, L, C = random.randint(2, 5), random.randint(2, 5), random.randint(11, 99)
        S, D, M = P * random.randint(3, 6), 8 * random.randint(3, 9), 8 * random.randint(20, 30)
        N, right = (S // P) ** 2, _parameters(S, P, L, D, M, C)
        block = right - _parameters(S, P, L - 1, D, M, C)
        missing = {
            "D are missing: the CLS token, its row of the positions, or the bias of the patch embedding": D,
            "2 D are missing: the final layer norm, or two of CLS token, its position and the patch bias": 2 * D,
            "3 D are missing: the CLS token, its row of the positions and the bias of the patch embedding": 3 * D,
            "the positions are missing: N + 1 rows of D numbers, all of them trained": (N + 1) * D,
            "the image is cut along both sides: N is the square of S / P": (N - S // P) * D,
            "a block has two layer norms, each with a scale and a shift: 4 D": L * 4 * D,
            "a block has two layer norms, and each has a scale and a shift": L * 2 * D,
            "queries, keys and values have a D x D matrix each": L * 2 * D * D,
            "the output projection of the attention is missing, D x D and a bias": L * (D * D + D),
            "the linear layers of a block have biases: 4 D in the attention, M + D in the MLP": L * (5 * D + M),
            "no linear layer has its bias yet, nor has the patch embedding": L * (5 * D + M) + C + D,
            "the MLP has two layers: from D to M and from M back to D": L * (D * M + D),
            "the classifier has a bias, one number for each class": C,
            "the classifier is missing: C rows of D numbers, and C biases": C * D + C,
            "a patch has three colours: 3 P P numbers go into the patch embedding": 2 * P * P * D,
            "that is one block; there are num_layers of them": (L - 1) * block,
        }
        if len(set(missing.values())) == len(missing):
            sizes = {
                "image_size": S, "patch_size": P, "num_layers": L, "em_dim": D, "ff_dim": M, "num_classes": C,
            }  # fmt: skip
            return sizes, right, {right - number: mistake for mistake, number in missing.items()}


def _parameters(S: int, P: int, L: int, D: int, M: int, C: int) -> int:
    """Written out, part by part: independent of vitlib.costs."""
    embedding = 3 * P * P * D + D + D + ((S // P) ** 2 + 1) * D  # patches, their bias, CLS, positions
    block = 3 * (D * D + D) + (D * D + D) + (D * M + M) + (M * D + D) + 2 * 2 * D
    return embedding + L * block + 2 * D + D * C + C


@exercise("FLOPs of attention")
def attention_flops(learners: Callable) -> None:
    """Of ``attention_flops(tokens, em_dim) -> int``: both products among the tokens, of one layer and one image."""
    for _ in range(3):
        T, D = random.randint(20, 300), 8 * random.randint(50, 99)
        given = as_number(number_answer(learners, T, D))
        right = 4 * T * T * D
        slips = {
            right // 2: "that is half of it: there are two products, and a multiply-add counts as two operations",
            right // 4: "that is a quarter of it: two products, and a multiply-add counts as two operations",
            4 * T * D * D: "that grows with D squared, as projections do; here every token meets every token",
            8 * T * D * D: "those are the four projections; the products among the tokens grow with T squared",
            4 * T * D: "every token meets every token: T squared",
            4 * T * T: "each of the T x T numbers is a sum over the width of a token: D is missing",
            2 * T * T: "each of the T x T numbers is a sum over the width of a token: D is missing",
            2 * right: "that is twice too much: the heads share the width D among them, T x T x D in each product",
            4 * T**3: "both products have a side of D: T x D x T and T x T x D",
        }
        otherwise = f"{given:,} where {right:,} are right, for {T} tokens of width {D}"
        expect(given == right, slips.get(given, otherwise))


@exercise("a kernel of Google's")
def google_kernel(learners: Callable) -> None:
    """Of ``google_kernel(kernel [D, H, K]) -> [D, D]``: the weight of an ``nn.Linear`` that does the same."""
    heads, width = 3, 4
    size = heads * width
    kernel = torch.randn(size, heads, width)
    given = tensor_answer(learners, kernel.clone(), shape=(size, size))
    flat = kernel.reshape(size, size)
    slips = {
        "the matrix is transposed: flax computes x @ kernel, nn.Linear computes x @ weight.T": flat,
        "the numbers of the heads are mixed: head 0 comes first, with all its K numbers": (
            kernel.permute(0, 2, 1).reshape(size, size).T
        ),
        "transposed, and the numbers of the heads are mixed": kernel.permute(0, 2, 1).reshape(size, size),
        "reshape keeps the order of the numbers in memory; turn the axes around (.T) after flattening": (
            kernel.permute(1, 0, 2).reshape(size, size)
        ),
        "the heads stand in each other's place: their order is kept": kernel.flip(1).reshape(size, size).T,
    }
    compare(given, flat.T, slips, "x @ weight.T is not what x and the kernel give, summed over D")


@exercise("confident mistakes")
def confident_mistakes(learners: Callable) -> None:
    """Of ``confident_mistakes(logits [N, C], labels [N], count) -> [count]``: numbers of the images, surest first."""
    count = 4
    logits, labels, right, slips = _opinions(count)
    given = tensor_answer(learners, logits.clone(), labels.clone(), count)
    expect(not given.dtype.is_floating_point, "whole numbers are wanted, those of the images, and no probabilities")
    surest = logits[right[0]].softmax(0).max()
    compare(given, right, slips, f"image {right[0]} is the surest mistake here ({surest:.0%}), and others follow")
    found = int((logits.argmax(1) != labels).sum())
    few = tensor_answer(learners, logits.clone(), labels.clone(), found + 3)
    expect(
        len(few) == found, f"asked for {found + 3} of {found} mistakes, it gave {len(few)}; give those that there are"
    )


def _opinions(count: int, images: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """Logits and labels, the right answer and the typical wrong ones; drawn until no two of these are the same."""
    while True:
        # a number added to a whole row changes no probability, but the largest logit
        logits = torch.randn(images, 4) * (0.5 + 2 * torch.rand(images, 1)) + 4 * torch.randn(images, 1)
        labels = torch.randint(4, (images,))
        answers, surest = logits.argmax(1), logits.softmax(1).max(1).values
        wrong = answers != labels
        true_class = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)

        def order(scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
            numbers = among.nonzero().flatten()
            return numbers[scores[numbers].argsort(descending=True)][:count]  # noqa: B023 (used at once)

        right = order(surest, wrong)
        slips = {
            "right answers are among them; keep the wrong ones only": order(surest, torch.ones_like(wrong)),
            "these are right answers": order(surest, ~wrong),
            "the least sure come first; sort in descending order": order(-surest, wrong),
            "the largest logit is no confidence: take the softmax first": order(logits.max(1).values, wrong),
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
