"""Right and typically wrong answers to the exercises of chapter 01."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vitlib.model import interpolate_positions, patchify


def cut(images, size):
    """[B, C, H, W] to [B, rows, columns, C, P, P], a pixel block at a time."""
    rows = [torch.stack(row.split(size, 3), 1) for row in images.split(size, 2)]  # each [B, columns, C, P, P]
    return torch.stack(rows, 1)


def in_front(patches, cls_token):
    return torch.cat([cls_token.expand(len(patches), -1, -1), patches], 1)


def at_the_end(patches, cls_token):
    return torch.cat([patches, cls_token.expand(len(patches), -1, -1)], 1)


def layer(weight, bias=None):
    """A linear layer with copies of these numbers."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return linear


def shared(conv):
    linear = own_numbers(conv)
    linear.weight, linear.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias
    return linear


def own_numbers(conv):
    return nn.Linear(conv.weight[0].numel(), conv.out_channels, bias=conv.bias is not None)


def doubled(conv):
    linear = layer(conv.weight.flatten(1), conv.bias)
    linear.register_forward_hook(lambda layer, patches, tokens: 2 * tokens)
    return linear


def stretched(positions, grid, mode="bicubic", **options):
    """Positions resized as a picture; ``options`` go to F.interpolate."""
    old = math.isqrt(positions.shape[1] - 1)
    picture = positions[:, 1:].mT.reshape(1, -1, old, old)
    picture = F.interpolate(picture, size=(grid, grid), mode=mode, **options)
    return torch.cat([positions[:, :1], picture.flatten(2).mT], 1)


def broken_stretch(positions, grid, first=0):
    """As in the notebook; ``first=1`` leaves CLS out."""
    old = math.isqrt(positions.shape[1])
    picture = positions[:, first : first + old * old].reshape(1, -1, old, old)
    picture = F.interpolate(picture, size=(grid, grid), mode="bilinear")
    return torch.cat([positions[:, :1], picture.reshape(1, grid * grid, -1)], dim=1)


RIGHT = {
    "patch_numbers": {
        "sides first": lambda h, w, c, p: (h // p * (w // p), c * p * p),
        "NumPy's": lambda h, w, c, p: np.array([h // p * (w // p), c * p * p]),
        "tensors": lambda h, w, c, p: (torch.tensor(h // p) * (w // p), torch.tensor(c * p * p)),
        "a list": lambda h, w, c, p: [len(range(0, h, p)) * len(range(0, w, p)), p * p * c],
    },
    "patchify": {
        "vitlib": patchify,
        "blocks": lambda x, p: cut(x, p).flatten(3).flatten(1, 2),
    },
    "patch_embedding": {
        "copies": lambda conv: layer(conv.weight.flatten(1), conv.bias),
        "shared memory": shared,
        "a bias of zeros": lambda conv: layer(
            conv.weight.flatten(1), torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
        ),
    },
    "tokens": {
        "cat, then add": lambda x, cls, p: in_front(x, cls) + p,
        "add, then cat": lambda x, cls, p: in_front(x + p[:, 1:], cls + p[:, :1]),
    },
    "interpolation": {
        "vitlib": interpolate_positions,
        "never a shortcut": stretched,
    },
}

WRONG = {
    "patch_numbers": {
        "divide with //": lambda h, w, c, p: (h / p * (w / p), c * p * p),
        "one column of patches": lambda h, w, c, p: (h // p, c * p * p),
        "one row of patches": lambda h, w, c, p: (w // p, c * p * p),
        "squared the number of rows": lambda h, w, c, p: ((h // p) ** 2, c * p * p),
        "squared the number of columns": lambda h, w, c, p: ((w // p) ** 2, c * p * p),
        "divide twice": lambda h, w, c, p: (h * w // p, c * p * p),
        "CLS token is no patch": lambda h, w, c, p: (h * w // p**2 + 1, c * p * p),
        "not the number of rows times": lambda h, w, c, p: (h * w, c * p * p),
        "forgot the channels": lambda h, w, c, p: (h * w // p**2, p * p),
        "forgot to square": lambda h, w, c, p: (h * w // p**2, c * p),
        "one row of pixels": lambda h, w, c, p: (h * w // p**2, p),
        "wrong order": lambda h, w, c, p: (c * p * p, h * w // p**2),
        "two numbers are wanted": lambda h, w, c, p: h * w // p**2,
    },
    "patchify": {
        "reshape alone never moves": lambda x, p: x.reshape(len(x), -1, x.shape[1] * p * p),
        "channels come last": lambda x, p: cut(x, p).movedim(3, 5).flatten(3).flatten(1, 2),
        "numbered down the columns": lambda x, p: cut(x, p).transpose(1, 2).flatten(3).flatten(1, 2),
        "mirrored": lambda x, p: cut(x, p).mT.flatten(3).flatten(1, 2),
        "not in its place": lambda x, p: patchify(x, p).flip(1),
        "lost or changed": lambda x, p: patchify(x, p) / 255,
        "only up to rounding": lambda x, p: patchify(x / 255, p) * 255,
        "swap the last two dimensions": lambda x, p: F.unfold(x, p, stride=p),
        "keep the images of the batch apart": lambda x, p: patchify(x, p).flatten(0, 1),
        "merge the two grid dimensions": lambda x, p: cut(x, p).flatten(3),
        "flatten each patch": lambda x, p: cut(x, p).flatten(1, 2),
        "side by side": lambda x, p: cut(x, p).flatten(4).flatten(1, 3),
        "no gradient comes back": lambda x, p: patchify(x, p).detach(),
        "stopped with ValueError": lambda x, p: patchify(x, 4),
    },
    "patch_embedding": {
        "has weights of its own": own_numbers,
        "you forgot the bias": lambda conv: layer(conv.weight.flatten(1)),
        "convolution has no bias": lambda c: layer(c.weight.flatten(1), torch.ones(len(c.weight))),
        "not the convolution's": lambda c: layer(c.weight.flatten(1), None if c.bias is None else 2 * c.bias),
        "have the channels last": lambda c: layer(c.weight.movedim(1, 3).flatten(1), c.bias),
        "merged the wrong dimensions": lambda c: layer(c.weight.reshape(-1, c.out_channels).T, c.bias),
        "but not in its place": lambda conv: layer(conv.weight.flatten(1).flip(1), conv.bias),
        ".weight = [10, 48]: in and out are swapped": lambda c: layer(c.weight.flatten(1).T),
        "an nn.Linear is wanted, but a Tensor": lambda conv: conv.weight.flatten(1),
        "what else is computed": doubled,
    },
    "tokens": {
        "CLS stands at the end": lambda x, cls, p: at_the_end(x + p[:, :-1], cls),  # as in the notebook
        "CLS has no position": lambda x, cls, p: in_front(x + p[:, 1:], cls),
        "the token before it": lambda x, cls, p: in_front(x + p[:, :-1], cls),
        "positions are not added": lambda x, cls, p: in_front(x, cls),
        "of its own number": lambda x, cls, p: in_front(x, cls) + p.flip(1),
        "one token is missing": lambda x, cls, p: x + p[:, 1:],
        "a token of its own": lambda x, cls, p: in_front(x + cls, cls) + p,
        "is not CLS as it came": lambda x, cls, p: in_front(x, 0 * cls) + p,
        "expand it": lambda x, cls, p: torch.cat([cls * torch.eye(len(x))[:, :1, None], x], 1) + p,
        "unchanged and in their order": lambda x, cls, p: in_front(x.flip(1), cls) + p,
        "only add": lambda x, cls, p: in_front(x, cls) * (1 + p) + p,
        "the positions are added twice": lambda x, cls, p: in_front(x, cls) + 2 * p,
        "no gradient comes back to tensor 2": lambda x, cls, p: in_front(x, cls.detach()) + p,
        "changes its input number 1": lambda x, cls, p: in_front(x.add_(p[:, 1:]), cls.add_(p[:, :1])),
    },
    "interpolation": {
        "CLS was stretched along with the patches": broken_stretch,
        "not left alone": lambda positions, grid: stretched(positions.roll(1, 1), grid),
        "a picture of g x g, not a line": lambda p, g: in_front(
            F.interpolate(p[:, 1:].mT, size=g**2, mode="linear").mT, p[:, :1]
        ),
        "places and features are mixed": lambda positions, grid: broken_stretch(positions, grid, 1),
        "rows and columns are swapped": lambda p, g: in_front(
            stretched(p, g)[:, 1:].unflatten(1, (g, g)).transpose(1, 2).flatten(1, 2), p[:, :1]
        ),
        "a copy of one old position": lambda positions, grid: stretched(positions, grid, "nearest"),
        "that is bilinear interpolation": lambda positions, grid: stretched(positions, grid, "bilinear"),
        "is align_corners=True": lambda positions, grid: stretched(positions, grid, align_corners=True),
        "not those of bicubic (no": lambda positions, grid: stretched(positions, grid, "area"),
        "not come back": lambda p, g: in_front(stretched(p.bfloat16(), g).float()[:, 1:], p[:, :1]),
        "the row of CLS is lost": lambda positions, grid: stretched(positions, grid)[:, 1:],
        "still the old number of places": lambda positions, grid: positions,
        "swap the last two dimensions": lambda positions, grid: stretched(positions, grid).mT,
    },
}
