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
        "sum to 1 over the queries, not over the keys": lambda q, k, v: weighted(q, k, v, dim=-2),
        "sum to 1 over the heads": lambda q, k, v: weighted(q, k, v, dim=1),
        "not sum to 1 over": lambda q, k, v: (q @ k.mT).flatten(2).softmax(-1).unflatten(2, (5, 5)) @ v,
        "the scores are not scaled": lambda q, k, v: weighted(q, k, v, 1),
        "divided by K; divide them by the square root": lambda q, k, v: weighted(q, k, v, q.shape[-1]),
        "square root of T": lambda q, k, v: weighted(q, k, v, math.sqrt(q.shape[-2])),
        "queries and keys are swapped": lambda q, k, v: weighted(k, q, v, math.sqrt(q.shape[-1])),
        "never normalised": lambda q, k, v: q @ k.mT / math.sqrt(q.shape[-1]) @ v,
        "masked the later tokens": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "not those of F.scaled_dot_product_attention": lambda q, k, v: weighted(q, k, v, 3.3),
        "square root of 2": lambda q, k, v: weighted(q, k, v, math.sqrt(2)),  # as in section 3
        "multiplied by the square root": lambda q, k, v: weighted(q, k, v, q.shape[-1] ** -0.5),
        "they mix the keys": lambda q, k, v: weighted(q, k, k),
        "they mix the queries": lambda q, k, v: weighted(q, k, q),
        "stopped with RuntimeError": lambda *qkv: weighted(*(x.permute(0, 1, 2, 3) for x in qkv)),
        "comes back to tensor 2": lambda q, k, v: F.scaled_dot_product_attention(q, k.detach(), v),
        "float32, but float64 went in": lambda *qkv: weighted(*(x.float() for x in qkv)),
        "the shape is [2, 3, 5, 5], but should be": lambda q, k, v: (q @ k.mT / 2).softmax(-1),
    },
    "split_heads": {
        "tokens and heads are mixed up": lambda x, h: x.view(x.shape[0], h, x.shape[1], -1),
        "every H-th feature": lambda x, h: x.unflatten(2, (-1, h)).permute(0, 3, 1, 2),
        "now swap the axes of tokens and heads": lambda x, h: x.unflatten(2, (h, -1)),
        "the shape is [2, 3, 4, 5]": lambda x, h: x.unflatten(2, (h, -1)).permute(0, 2, 3, 1),
        "head h of a token is not": lambda x, h: x.unflatten(2, (h, -1)).transpose(1, 2).flip(1),
    },
    "equivariance": {
        "your tester never calls the layer": lambda layer, tokens: True,
        "only ever saw the tokens in their own order": tester(along, torch.arange),
        "you shuffled the images of the batch": partial(along_axis, 0),
        "you shuffled the features of each token": partial(along_axis, 2),
        "has each number exactly once": tester(along, lambda n: torch.randint(n, (n,))),
        "which tests for invariance": tester(lambda s, o, order: torch.allclose(s, o, atol=1e-5)),
        "the layer that changes nothing fails": tester(lambda s, o, order: along(o, s, order)),
        "fail, but only by rounding": tester(lambda s, o, order: torch.allclose(s, o[:, order])),
        "even a running sum": tester(lambda s, o, order: torch.allclose(s, o[:, order], atol=1e3)),
        "small positions to": tester(lambda s, o, order: torch.allclose(s, o[:, order], atol=0.05)),
        "your code stopped with": tester(along, lambda n: torch.randperm(65)),
        "not means, sums": tester(lambda s, o, order: torch.allclose(s.mean(1), o.mean(1), atol=1e-5)),
        "your answers are the wrong way round": tester(lambda *outputs: not along(*outputs)),
        "reversing the tokens passes; draw the shuffle": tester(along, lambda n: torch.arange(n).flip(0)),
        "moving every token on by one place passes": tester(along, lambda n: torch.arange(n).roll(1)),
        "last third of the tokens passes": tester(along, lambda n: torch.tensor([1, 0, *range(2, n)])),
        "positions to two features of the last": tester(lambda s, o, order: along(s[..., 0], o[..., 0], order)),
        "two features of the last image passes": tester(lambda s, o, order: along(s[:1], o[:1], order)),
        "not one for each number": tester(lambda s, o, order: s.isclose(o[:, order])),
        "has to be True or False, but a": tester(lambda s, o, order: (s - o[:, order]).abs().max()),
    },
    "attend": {
        "[T, B, D], sequence first": lambda x, *rest: sequence_first(x.transpose(0, 1), *rest),
        "when the others": lambda x, *rest: sequence_first(x.view(x.shape[1], len(x), -1), *rest).view_as(x),
        "laid end to end": lambda x, *rest: one_by_one(x.flatten(0, 1)[None], *rest).view_as(x),
        "the heads are not put back side by side": heads_left_apart,
        "in the other images": sequence_first,
        "attends to its own heads": over_heads,
    },
    "block_order": {
        "the first line, y = attention(y), uses y": "DCBFAE",
        "x = x + y right after y = norm1(x) adds the normalised tokens themselves": "CBDEFA",
        "y = norm2(x) right after y = attention(y) throws away a y": "CDFABE",
        "y = mlp(y) right after x = x + y works on a y that is not normalised": "CDBAFE",
        "norm1 belongs to the attention": "FDBCAE",
        "the attention comes before the MLP": "FABCDE",
        "each of the letters A to F exactly once": "CDBFA",
        "such as 'ABCDEF'": 123456,
    },
}
