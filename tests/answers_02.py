"""Right and typically wrong answers to the exercises of chapter 02."""

import math
from functools import partial

import torch
import torch.nn.functional as F


def weighted(query, key, value, divisor=None, dim=-1):
    return (query @ key.mT / (divisor or math.sqrt(query.shape[-1]))).softmax(dim) @ value


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


def over_heads(tokens, to_qkv, num_heads):
    query, key, value = (tokens @ to_qkv).unflatten(2, (3, num_heads, -1)).unbind(2)
    return F.scaled_dot_product_attention(query, key, value).flatten(2)


def torchs_layer(tokens, to_qkv, num_heads):
    layer = torch.nn.MultiheadAttention(len(to_qkv), num_heads, bias=False, batch_first=True, dtype=tokens.dtype)
    layer.load_state_dict({"in_proj_weight": to_qkv.T, "out_proj.weight": torch.eye(len(to_qkv))})
    return layer(tokens, tokens, tokens)[0]


def tester(compare, shuffle=torch.randperm):
    """``is_equivariant`` that compares the shuffled tokens' output with the tokens' output and the shuffle."""

    def is_equivariant(layer, tokens):
        order = shuffle(tokens.shape[1])
        return compare(layer(tokens[:, order]), layer(tokens), order)

    return is_equivariant


def along(shuffled, output, order):
    return torch.allclose(shuffled, output[:, order], atol=1e-5)


def by_numpy(layer, tokens):
    order = torch.randperm(tokens.shape[1])
    output, shuffled = layer(tokens).numpy(), layer(tokens[:, order]).numpy()
    return (abs(shuffled - output[:, order.numpy()]) < 1e-4).all()


def along_axis(axis, layer, tokens):
    order = torch.randperm(tokens.shape[axis])
    return torch.allclose(layer(tokens.index_select(axis, order)), layer(tokens).index_select(axis, order), atol=1e-5)


RIGHT = {
    "attention": {
        "three lines": weighted,
        "PyTorch's": F.scaled_dot_product_attention,
    },
    "split_heads": {
        "unflatten": lambda x, h: x.unflatten(2, (h, -1)).transpose(1, 2),
        "view, then transpose": lambda x, h: x.view(x.shape[0], x.shape[1], h, -1).transpose(1, 2),
        "chunks": lambda x, h: torch.stack(x.chunk(h, dim=-1), dim=1),
    },
    "equivariance": {
        "shuffle the output": tester(along),
        "NumPy": by_numpy,
        "CLS stays in front": tester(along, lambda n: F.pad(1 + torch.randperm(n - 1), (1, 0))),
        "a tensor of one bool": tester(lambda s, o, order: ((s - o[:, order]).abs() < 1e-5).all()),
        "a small tolerance": tester(lambda s, o, order: torch.allclose(s, o[:, order], atol=1e-6)),
        "a large tolerance": tester(lambda s, o, order: torch.allclose(s, o[:, order], atol=1e-2)),
    },
    "attend": {
        "one image after the other": one_by_one,
        "PyTorch's layer": torchs_layer,
        "swapped in and out": lambda tokens, *rest: sequence_first(tokens.transpose(0, 1), *rest).transpose(0, 1),
    },
    "block_order": {
        "one way": "CDBFAE",
        "the other way": "CDEFAB",
        "small letters": "cdbfae",
        "a list": list("CDBFAE"),
        "a tuple": tuple("CDEFAB"),
        "commas between": "C,D, E, F, A, B",
    },
}

WRONG = {
    "attention": {
        "over the queries": (lambda q, k, v: weighted(q, k, v, dim=-2), "sum to 1 over the queries, not over the keys"),
        "over the heads": (lambda q, k, v: weighted(q, k, v, dim=1), "sum to 1 over the heads"),
        "of a head": (lambda q, k, v: (q @ k.mT).flatten(2).softmax(-1).unflatten(2, (5, 5)) @ v, "not sum to 1 over"),
        "not scaled": (lambda q, k, v: weighted(q, k, v, 1), "the scores are not scaled"),
        "scaled by K": (lambda q, k, v: weighted(q, k, v, q.shape[-1]), "divided by K; divide them by the square root"),
        "scaled by T": (lambda q, k, v: weighted(q, k, v, math.sqrt(q.shape[-2])), "square root of T"),
        "swapped": (lambda q, k, v: weighted(k, q, v, math.sqrt(q.shape[-1])), "queries and keys are swapped"),
        "no softmax": (lambda q, k, v: q @ k.mT / math.sqrt(q.shape[-1]) @ v, "never normalised"),
        "masked": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "masked the later tokens"),
        "another temperature": (lambda q, k, v: weighted(q, k, v, 3.3), "not those of F.scaled_dot_product_attention"),
        "as in section 3": (lambda q, k, v: weighted(q, k, v, math.sqrt(2)), "square root of 2"),
        "times the root": (lambda q, k, v: weighted(q, k, v, q.shape[-1] ** -0.5), "multiplied by the square root"),
        "four axes only": (lambda *qkv: weighted(*(x.permute(0, 1, 2, 3) for x in qkv)), "stopped with RuntimeError"),
        "keys detached": (lambda q, k, v: F.scaled_dot_product_attention(q, k.detach(), v), "comes back to tensor 2"),
        "single precision": (lambda *qkv: weighted(*(x.float() for x in qkv)), "float32, but float64 went in"),
        "weights alone": (lambda q, k, v: (q @ k.mT / 2).softmax(-1), "the shape is [2, 3, 5, 5], but should be"),
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
        "does not shuffle": (tester(along, torch.arange), "only ever saw the tokens in their own order"),
        "the batch": (partial(along_axis, 0), "you shuffled the images of the batch"),
        "the features": (partial(along_axis, 2), "you shuffled the features of each token"),
        "draws with repetition": (tester(along, lambda n: torch.randint(n, (n,))), "has each number exactly once"),
        "invariance": (tester(lambda s, o, order: torch.allclose(s, o, atol=1e-5)), "which tests for invariance"),
        "shuffled again": (tester(lambda s, o, order: along(o, s, order)), "the layer that changes nothing fails"),
        "nearly exactly": (tester(lambda s, o, order: torch.allclose(s, o[:, order])), "fail, but only by rounding"),
        "generous": (tester(lambda s, o, order: torch.allclose(s, o[:, order], atol=1e3)), "even a running sum"),
        "a twentieth": (tester(lambda s, o, order: torch.allclose(s, o[:, order], atol=0.05)), "small positions to"),
        "as many tokens as the notebook": (tester(along, lambda n: torch.randperm(65)), "your code stopped with"),
        "means": (tester(lambda s, o, order: torch.allclose(s.mean(1), o.mean(1), atol=1e-5)), "not means, sums"),
        "the wrong way round": (tester(lambda *outputs: not along(*outputs)), "your answers are the wrong way round"),
        "reversed": (tester(along, lambda n: torch.arange(n).flip(0)), "reversing the tokens passes; draw the shuffle"),
        "moved on": (tester(along, lambda n: torch.arange(n).roll(1)), "moving every token on by one place passes"),
        "two swapped": (tester(along, lambda n: torch.tensor([1, 0, *range(2, n)])), "last third of the tokens passes"),
        "a bool for each number": (tester(lambda s, o, order: s.isclose(o[:, order])), "not one for each number"),
        "the difference": (tester(lambda s, o, order: (s - o[:, order]).abs().max()), "has to be True or False, but a"),
    },
    "attend": {
        "not swapped back": (lambda x, *rest: sequence_first(x.transpose(0, 1), *rest), "[T, B, D], sequence first"),
        "view": (lambda x, *rest: sequence_first(x.view(x.shape[1], len(x), -1), *rest).view_as(x), "when the others"),
        "end to end": (lambda x, *rest: one_by_one(x.flatten(0, 1)[None], *rest).view_as(x), "laid end to end"),
        "heads left apart": (heads_left_apart, "the heads are not put back side by side"),
        "the colleague's": (sequence_first, "in the other images"),
        "over the heads": (over_heads, "attends to its own heads"),
    },
    "block_order": {
        "a sublayer first": ("DCBFAE", "the first line, y = attention(y), uses y"),
        "sum before sublayer": ("CBDEFA", "x = x + y right after y = norm1(x) adds the normalised tokens themselves"),
        "first sum too late": ("CDFABE", "y = norm2(x) right after y = attention(y) throws away a y"),
        "sublayers in a row": ("CDBAFE", "y = mlp(y) right after x = x + y works on a y that is not normalised"),
        "norms swapped": ("FDBCAE", "norm1 belongs to the attention"),
        "MLP first": ("FABCDE", "the attention comes before the MLP"),
        "a line lost": ("CDBFA", "each of the letters A to F exactly once"),
        "a number": (123456, "give the six letters as a text"),
    },
}
