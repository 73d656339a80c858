"""Answers to the exercises of chapter 06, right and typically wrong."""

import torch

from vitlib.model import ViTModel, count_parameters


def built(S, P, L, D, M, C):
    model = ViTModel(C, L, S, P, em_dim=D, num_heads=1, ff_dim=M, patch_bias=True)
    return count_parameters(model)


def counted(
    S, P, L, D, M, C, cls=1, rows=1, patch_bias=1, norms=2, shift=1, final=1, qkv=3, output=1, bias=1, mlp=2, colours=3,
    head=1, head_bias=1, square=True, positions=1,
):  # fmt: skip
    N = (S // P) ** 2 if square else S // P
    embedding = colours * P * P * D + patch_bias * D + cls * D + positions * (N + rows) * D
    attention = (qkv + output) * (D * D + bias * D)
    block = attention + mlp * D * M + bias * ((mlp > 1) * M + D) + norms * (1 + shift) * D
    return embedding + L * block + final * 2 * D + head * (C * D + head_bias * C)


def less(**changes):
    return lambda *sizes: counted(*sizes, **changes)


def kernel_as(*axes, transposed=True):
    def converted(kernel):
        size = len(kernel)
        flat = kernel.permute(*axes).reshape(size, size)
        return flat.T if transposed else flat

    return converted


def mistakes(logits, labels, count, only="wrong", score="probability", descending=True):
    probabilities = logits.softmax(1)
    sure = {
        "probability": probabilities.max(1).values,
        "logit": logits.max(1).values,
        "true class": -probabilities.gather(1, labels[:, None]).squeeze(1),
        "none": -torch.arange(len(logits)).float(),
    }[score]
    wrong = logits.argmax(1) != labels
    kept = {"wrong": wrong, "right": ~wrong, "all": torch.ones_like(wrong)}[only].nonzero().flatten()
    return kept[sure[kept].argsort(descending=descending)][:count]


def always_as_many(logits, labels, count):
    found = mistakes(logits, labels, count)
    return torch.cat([found, found[:1].repeat(count - len(found))])


RIGHT = {
    "parameters": {"by hand": counted, "of the library": built},
    "attention_flops": {
        "by hand": lambda T, D: 2 * T * D * T + 2 * T * T * D,
        "a float": lambda T, D: 4.0 * T**2 * D,
        "head by head": lambda T, D: 12 * (2 * T * (D / 12) * T + 2 * T * T * (D / 12)),
    },
    "google_kernel": {
        "flattened": lambda kernel: kernel.flatten(1).T,
        "einsum": lambda kernel: torch.einsum("dhk->hkd", kernel).reshape(len(kernel), -1),
    },
    "confident_mistakes": {
        "sorted": mistakes,
        "a list": lambda *given: mistakes(*given).tolist(),
        "an array": lambda *given: mistakes(*given).numpy(),
    },
}
WRONG = {
    "parameters": {
        "D are missing": less(cls=0),
        "the final layer norm": less(final=0),
        "3 D are missing": less(cls=0, rows=0, patch_bias=0),
        "the positions are missing": less(positions=0),
        "N is the square of S / P": less(square=False),
        "4 D a block are missing: its two layer norms": less(norms=0),
        "two layer norms, and each has": less(norms=1),
        "and a final one follows": less(norms=1, final=0),
        "a D x D matrix each": lambda S, P, L, D, M, C: counted(S, P, L, D, M, C) - L * 2 * D * D,
        "the output projection": less(output=0),
        "linear layers of a block have biases": less(bias=0),
        "no linear layer has its bias yet": less(bias=0, patch_bias=0, head_bias=0),
        "the MLP has two layers": lambda S, P, L, D, M, C: counted(S, P, L, D, M, C) - L * (D * M + D),
        "the classifier has a bias": less(head_bias=0),
        "all layer norms are missing": less(norms=0, final=0),
        "a D x D matrix and a bias each": less(qkv=1),
        "the biases of the MLP are missing": lambda S, P, L, D, M, C: counted(S, P, L, D, M, C) - L * (M + D),
        "the classifier is missing": less(head=0),
        "a patch has three colours": less(colours=1),
        "that is one block": lambda S, P, L, D, M, C: counted(S, P, 1, D, M, C),
        "86,567,656 where": lambda *sizes: 86_567_656,
    },
    "attention_flops": {
        "that is half of it": lambda T, D: 2 * T * T * D,
        "that is a quarter of it": lambda T, D: T * T * D,
        "grows with D squared": lambda T, D: 4 * T * D * D,
        "those are the four projections": lambda T, D: 8 * T * D * D,
        "every token meets every token: T squared": lambda T, D: 4 * T * D,
        "D is missing": lambda T, D: 4 * T * T,
        "twice too much": lambda T, D: 8 * T * T * D,
        "1,000 where": lambda T, D: 1000,
    },
    "google_kernel": {
        "the matrix is transposed": kernel_as(0, 1, 2, transposed=False),
        "the numbers of the heads are mixed: head 0": kernel_as(0, 2, 1),
        "transposed, and the numbers": kernel_as(0, 2, 1, transposed=False),
        "reshape keeps the order": kernel_as(1, 0, 2, transposed=False),
        "the shape is [": lambda kernel: kernel,
        "is not what x and the kernel give": lambda kernel: torch.randn(len(kernel), len(kernel)),
    },
    "confident_mistakes": {
        "right answers are among them": lambda *given: mistakes(*given, only="all"),
        "these are right answers": lambda *given: mistakes(*given, only="right"),
        "the least sure come first": lambda *given: mistakes(*given, descending=False),
        "take the softmax first": lambda *given: mistakes(*given, score="logit"),
        "probability of the true class": lambda *given: mistakes(*given, score="true class"),
        "the first wrong ones": lambda *given: mistakes(*given, score="none"),
        "but float32 [4] came back": lambda logits, labels, count: logits.softmax(1).max(1).values[:count],
        "their numbers among all images": lambda x, y, n: (
            x.softmax(1).max(1).values[x.argmax(1) != y].argsort(descending=True)[:n]
        ),
        "these are the classes": lambda x, y, n: x.argmax(1)[mistakes(x, y, n)],
        "the shape is [3], but should be [count] = [4]": lambda x, y, n: mistakes(x, y, n - 1),
        "is the surest mistake here": lambda x, y, n: mistakes(x, y, n).flip(0),
        "give those that there are": always_as_many,
    },
}
