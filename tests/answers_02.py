"""Right and typically wrong answers to the exercises of chapter 02."""

import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F


def weighted(query, key, value, divisor, dim=-1):
    return (query @ key.mT / divisor).softmax(dim) @ value


def in_loops(query, key, value):
    """Exercise 1 without a matrix product."""
    output = torch.zeros_like(value)
    for place in itertools.product(*map(range, query.shape[:-1])):
        others = place[:-1]
        powers = ((query[place] * key[others]).sum(-1) / math.sqrt(query.shape[-1])).exp()
        output[place] = (powers[:, None] * value[others]).sum(0) / powers.sum()
    return output


def sequence_first(tokens, to_qkv, num_heads):
    """The notebook's buggy function: right for [T, B, D]."""
    length, batch, _ = tokens.shape
    qkv = (tokens @ to_qkv).view(length, batch, 3, num_heads, -1)
    query, key, value = qkv.permute(2, 1, 3, 0, 4)
    return F.scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3).flatten(2)


def one_by_one(tokens, to_qkv, num_heads):
    return torch.cat([sequence_first(image[:, None], to_qkv, num_heads).transpose(0, 1) for image in tokens])


def heads_left_apart(tokens, to_qkv, num_heads):
    batch, length, width = tokens.shape
    qkv = (tokens @ to_qkv).view(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(*qkv).reshape(batch, length, width)


def by_pytorch(tokens, to_qkv, num_heads):
    width = tokens.shape[-1]
    layer = torch.nn.MultiheadAttention(width, num_heads, bias=False, batch_first=True, dtype=tokens.dtype)
    weights = {"in_proj_weight": to_qkv.T, "out_proj.weight": torch.eye(width, dtype=tokens.dtype)}
    return torch.func.functional_call(layer, weights, (tokens,) * 3)[0]


def tester(compare, shuffle=lambda tokens: torch.randperm(tokens.shape[1])):
    """``is_equivariant`` that compares the shuffled tokens' output with the tokens' output and the shuffle."""

    def is_equivariant(layer, tokens):
        order = shuffle(tokens)
        return compare(layer(tokens[:, order]), layer(tokens), order)

    return is_equivariant


def along(shuffled, output, order):
    return torch.allclose(shuffled, output[:, order], atol=1e-5)


def undone(layer, tokens):
    order = torch.randperm(tokens.shape[1])
    return torch.allclose(layer(tokens[:, order])[:, order.argsort()], layer(tokens), atol=1e-5)


def by_numpy(layer, tokens):
    order = torch.randperm(tokens.shape[1])
    output, shuffled = layer(tokens).numpy(), layer(tokens[:, order]).numpy()
    return (abs(shuffled - output[:, order.numpy()]) < 1e-4).all()


def each_image_its_own(layer, tokens):
    order = torch.rand(tokens.shape[:2]).argsort(1)[..., None].expand_as(tokens)
    return ((layer(tokens.gather(1, order)) - layer(tokens).gather(1, order)).abs().max() < 1e-5).item()


def several_shuffles(layer, tokens):
    return all(tester(along)(layer, tokens) for _ in range(5))


def patches_only(layer, tokens):
    """CLS stays in front, as it does in a ViT."""
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(tokens.shape[1] - 1)])
    return along(layer(tokens[:, order]), layer(tokens), order)


def along_axis(axis, layer, tokens):
    order = torch.randperm(tokens.shape[axis])
    return torch.allclose(layer(tokens.index_select(axis, order)), layer(tokens).index_select(axis, order), atol=1e-5)


RIGHT = {
    "attention": {
        "three lines": lambda q, k, v: weighted(q, k, v, math.sqrt(q.shape[-1])),
        "scaled query": lambda q, k, v: F.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1), dim=-1) @ v,
        "PyTorch's": F.scaled_dot_product_attention,
        "loops": in_loops,
    },
    "split_heads": {
        "unflatten": lambda x, h: x.unflatten(2, (h, -1)).transpose(1, 2),
        "view, then transpose": lambda x, h: x.view(x.shape[0], x.shape[1], h, -1).transpose(1, 2),
        "chunks": lambda x, h: torch.stack(x.chunk(h, dim=-1), dim=1),
    },
    "equivariance": {
        "shuffle the output": tester(along),
        "undo the shuffle": undone,
        "NumPy": by_numpy,
        "each image its own shuffle": each_image_its_own,
        "several shuffles": several_shuffles,
        "CLS stays in front": patches_only,
        "a tensor of one bool": tester(lambda s, o, order: ((s - o[:, order]).abs() < 1e-5).all()),
        "a small tolerance": tester(lambda s, o, order: torch.allclose(s, o[:, order], atol=1e-6)),
        "a large tolerance": tester(lambda s, o, order: torch.allclose(s, o[:, order], atol=1e-2)),
    },
    "attend": {
        "one image after the other": one_by_one,
        "swapped in and out": lambda tokens, *rest: sequence_first(tokens.transpose(0, 1), *rest).transpose(0, 1),
        "nn.MultiheadAttention": by_pytorch,
    },
    "block_order": {
        "one way": "CDBFAE",
        "the other way": "CDEFAB",
        "small letters": "cdbfae",
        "a list": list("CDBFAE"),
        "a tuple": tuple("CDEFAB"),
        "blanks between": "C D B F A E",
        "commas between": "C,D, E, F, A, B",
        "lines": "C\nD\nB\nF\nA\nE\n",
    },
}

WRONG = {
    "attention": {
        "over the queries": (
            lambda q, k, v: weighted(q, k, v, math.sqrt(q.shape[-1]), -2),
            "sum to 1 over the queries, not over the keys",
        ),
        "over the heads": (lambda q, k, v: weighted(q, k, v, math.sqrt(q.shape[-1]), 1), "sum to 1 over the heads"),
        "over the batch": (lambda q, k, v: weighted(q, k, v, math.sqrt(q.shape[-1]), 0), "sum to 1 over the batch"),
        "over all scores of a head": (
            lambda q, k, v: (q @ k.mT / 2).flatten(2).softmax(-1).unflatten(2, (5, 5)) @ v,
            "your weights do not sum to 1 over the keys",
        ),
        "not scaled": (lambda q, k, v: weighted(q, k, v, 1), "the scores are not scaled"),
        "scaled by K": (lambda q, k, v: weighted(q, k, v, q.shape[-1]), "divided by K; divide them by the square root"),
        "scaled by T": (lambda q, k, v: weighted(q, k, v, math.sqrt(q.shape[-2])), "square root of T"),
        "swapped": (lambda q, k, v: weighted(k, q, v, math.sqrt(q.shape[-1])), "queries and keys are swapped"),
        "no softmax": (lambda q, k, v: q @ k.mT / math.sqrt(q.shape[-1]) @ v, "never normalised"),
        "masked": (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "you masked the later tokens",
        ),
        "another temperature": (lambda q, k, v: weighted(q, k, v, 3.3), "not those of F.scaled_dot_product_attention"),
        "half of K": (lambda q, k, v: weighted(q, k, v, 2), "another number"),
        "times the root of K": (
            lambda q, k, v: weighted(q, k, v, q.shape[-1] ** -0.5),
            "multiplied by the square root",
        ),
        "four axes only": (
            lambda q, k, v: F.scaled_dot_product_attention(*(x.permute(0, 1, 2, 3) for x in (q, k, v))),
            "your code stopped with RuntimeError",
        ),
        "keys detached": (
            lambda q, k, v: F.scaled_dot_product_attention(q, k.detach(), v),
            "no gradient comes back to tensor 2",
        ),
        "single precision": (
            lambda q, k, v: F.scaled_dot_product_attention(q.float(), k.float(), v.float()),
            "float32, but float64 went in",
        ),
        "in place": (
            lambda q, k, v: weighted(q.div_(math.sqrt(q.shape[-1])), k, v, 1),
            "your function changes its input number 1",
        ),
        "weights alone": (lambda q, k, v: (q @ k.mT / 2).softmax(-1), "the shape is [2, 3, 5, 5], but should be"),
        "weights too": (lambda q, k, v: (v, q), "a tuple came back"),
        "wrong transpose": (lambda q, k, v: q @ k.transpose(0, 1), "your code stopped with RuntimeError"),
    },
    "split_heads": {
        "view alone": (lambda x, h: x.view(x.shape[0], h, x.shape[1], -1), "tokens and heads are mixed up"),
        "interleaved": (lambda x, h: x.unflatten(2, (-1, h)).permute(0, 3, 1, 2), "every H-th feature"),
        "not swapped": (lambda x, h: x.unflatten(2, (h, -1)), "now swap the axes of tokens and heads"),
        "swapped twice": (lambda x, h: x.unflatten(2, (h, -1)).permute(0, 2, 3, 1), "the shape is [2, 3, 4, 5]"),
        "heads reversed": (lambda x, h: x.unflatten(2, (h, -1)).transpose(1, 2).flip(1), "head h of a token is not"),
    },
    "equivariance": {
        "always True": (lambda layer, tokens: True, "your tester never calls the layer"),
        "does not shuffle": (
            tester(along, lambda tokens: torch.arange(tokens.shape[1])),
            "only ever saw the tokens in their own order",
        ),
        "the batch": (partial(along_axis, 0), "you shuffled the images of the batch"),
        "the features": (partial(along_axis, 2), "you shuffled the features of each token"),
        "draws with repetition": (
            tester(along, lambda tokens: torch.randint(tokens.shape[1], (tokens.shape[1],))),
            "torch.randperm has each number exactly once",
        ),
        "invariance": (
            tester(lambda s, o, order: torch.allclose(s, o, atol=1e-5)),
            "which tests for invariance; shuffle that output too",
        ),
        "shuffled again": (
            tester(lambda s, o, order: torch.allclose(s[:, order], o, atol=1e-5)),
            "the layer that changes nothing fails",
        ),
        "nearly exactly": (
            tester(lambda s, o, order: torch.allclose(s, o[:, order])),
            "by rounding; compare with torch.allclose",
        ),
        "generous": (
            tester(lambda s, o, order: torch.allclose(s, o[:, order], atol=1e3)),
            "every layer passes, even a running sum",
        ),
        "a tolerance of a twentieth": (
            tester(lambda s, o, order: torch.allclose(s, o[:, order], atol=0.05)),
            "adding small positions to the tokens passes",
        ),
        "as many tokens as the notebook": (
            tester(along, lambda tokens: torch.randperm(65)),
            "your code stopped with",
        ),
        "means": (
            tester(lambda s, o, order: torch.allclose(s.mean(1), o.mean(1), atol=1e-5)),
            "compare token by token",
        ),
        "the wrong way round": (tester(lambda *outputs: not along(*outputs)), "your answers are the wrong way round"),
        "reversed": (
            tester(along, lambda tokens: torch.arange(tokens.shape[1]).flip(0)),
            "reversing the tokens passes; draw the shuffle with torch.randperm",
        ),
        "moved on": (
            tester(along, lambda tokens: torch.arange(tokens.shape[1]).roll(1)),
            "moving every token on by one place passes; draw the shuffle",
        ),
        "two of them swapped": (
            tester(along, lambda tokens: torch.tensor([1, 0, *range(2, tokens.shape[1])])),
            "changing the sign of the last third of the tokens passes; draw the shuffle",
        ),
        "a bool for each number": (
            tester(lambda s, o, order: torch.isclose(s, o[:, order], atol=1e-5)),
            "one True or False is wanted, not one for each number",
        ),
        "the difference": (tester(lambda s, o, order: (s - o[:, order]).abs().max()), "has to be True or False, but a"),
    },
    "attend": {
        "not repaired": (sequence_first, "to the tokens at its own place in the other images"),
        "not swapped back": (
            lambda tokens, *rest: sequence_first(tokens.transpose(0, 1), *rest),
            "that is [T, B, D], sequence first",
        ),
        "view for transpose": (
            lambda tokens, *rest: sequence_first(tokens.view(tokens.shape[1], len(tokens), -1), *rest).reshape(
                tokens.shape
            ),
            "output changes when the others change",
        ),
        "end to end": (
            lambda tokens, *rest: one_by_one(tokens.flatten(0, 1)[None], *rest).reshape(tokens.shape),
            "laid end to end",
        ),
        "heads left apart": (heads_left_apart, "the heads are not put back side by side"),
        "one head": (lambda tokens, to_qkv, heads: one_by_one(tokens, to_qkv, 1), "one single head"),
        "last image lost": (lambda tokens, *rest: one_by_one(tokens[:2], *rest), "the shape is [2, 5, 8]"),
    },
    "block_order": {
        "a sublayer first": ("DCBFAE", "the first line, y = attention(y), uses y"),
        "the sum first": ("BCDFAE", "the first line, x = x + y, uses y"),
        "sum before sublayer": ("CBDEFA", "x = x + y right after y = norm1(x) adds the normalised tokens themselves"),
        "first sum too late": ("CDFABE", "y = norm2(x) right after y = attention(y) throws away a y"),
        "sublayers in a row": ("CDBAFE", "y = mlp(y) right after x = x + y works on a y that is not normalised"),
        "norms swapped": ("FDBCAE", "norm1 belongs to the attention"),
        "MLP first": ("FABCDE", "the attention comes before the MLP"),
        "a line lost": ("CDBFA", "each of the letters A to F exactly once"),
        "a number": (123456, "give the six letters as a text"),
    },
}
