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
        "no CLS": (less(cls=0), "D are missing"),
        "no final norm": (less(final=0), "the final layer norm"),
        "three times D": (less(cls=0, rows=0, patch_bias=0), "3 D are missing"),
        "no positions": (less(positions=0), "the positions are missing"),
        "not squared": (less(square=False), "N is the square of S / P"),
        "no norms": (less(norms=0), "4 D a block are missing: its two layer norms"),
        "one norm": (less(norms=1), "two layer norms, and each has"),
        "one matrix": (lambda S, P, L, D, M, C: counted(S, P, L, D, M, C) - L * 2 * D * D, "a D x D matrix each"),
        "no output": (less(output=0), "the output projection"),
        "no biases in blocks": (less(bias=0), "linear layers of a block have biases"),
        "no biases": (less(bias=0, patch_bias=0, head_bias=0), "no linear layer has its bias yet"),
        "half an MLP": (lambda S, P, L, D, M, C: counted(S, P, L, D, M, C) - L * (D * M + D), "the MLP has two layers"),
        "no bias of the classifier": (less(head_bias=0), "the classifier has a bias"),
        "no norms at all": (less(norms=0, final=0), "all layer norms are missing"),
        "one layer for q, k and v": (less(qkv=1), "a D x D matrix and a bias each"),
        "MLP without biases": (
            lambda S, P, L, D, M, C: counted(S, P, L, D, M, C) - L * (M + D), "the biases of the MLP are missing"
        ),
        "no classifier": (less(head=0), "the classifier is missing"),
        "grey": (less(colours=1), "a patch has three colours"),
        "one block": (lambda S, P, L, D, M, C: counted(S, P, 1, D, M, C), "that is one block"),
        "ViT-B/16, always": (lambda *sizes: 86_567_656, "86,567,656 where"),
    },
    "attention_flops": {
        "one product": (lambda T, D: 2 * T * T * D, "that is half of it"),
        "multiply-adds of one": (lambda T, D: T * T * D, "that is a quarter of it"),
        "a projection": (lambda T, D: 4 * T * D * D, "grows with D squared"),
        "all projections": (lambda T, D: 8 * T * D * D, "those are the four projections"),
        "linear": (lambda T, D: 4 * T * D, "every token meets every token: T squared"),
        "no width": (lambda T, D: 4 * T * T, "D is missing"),
        "twice": (lambda T, D: 8 * T * T * D, "twice too much"),
        "any": (lambda T, D: 1000, "1,000 where"),
    },
    "google_kernel": {
        "not transposed": (kernel_as(0, 1, 2, transposed=False), "the matrix is transposed"),
        "heads mixed": (kernel_as(0, 2, 1), "the numbers of the heads are mixed: head 0"),
        "both": (kernel_as(0, 2, 1, transposed=False), "transposed, and the numbers"),
        "reshaped": (kernel_as(1, 0, 2, transposed=False), "reshape keeps the order"),
        "three axes": (lambda kernel: kernel, "the shape is ["),
        "noise": (lambda kernel: torch.randn(len(kernel), len(kernel)), "is not what x and the kernel give"),
    },
    "confident_mistakes": {
        "of all": (lambda *given: mistakes(*given, only="all"), "right answers are among them"),
        "the right ones": (lambda *given: mistakes(*given, only="right"), "these are right answers"),
        "least sure": (lambda *given: mistakes(*given, descending=False), "the least sure come first"),
        "by logit": (lambda *given: mistakes(*given, score="logit"), "take the softmax first"),
        "by the true class": (lambda *given: mistakes(*given, score="true class"), "probability of the true class"),
        "unsorted": (lambda *given: mistakes(*given, score="none"), "the first wrong ones"),
        "probabilities": (lambda logits, labels, count: logits.softmax(1).max(1).values[:count], "no probabilities"),
        "numbered among the wrong": (
            lambda x, y, n: x.softmax(1).max(1).values[x.argmax(1) != y].argsort(descending=True)[:n],
            "their numbers among all images",
        ),
        "classes": (lambda x, y, n: x.argmax(1)[mistakes(x, y, n)], "these are the classes"),
        "one too few": (lambda x, y, n: mistakes(x, y, n - 1), "is the surest mistake here"),
        "padded": (always_as_many, "give those that there are"),
    },
}  # fmt: skip
