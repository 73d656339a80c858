"""Checks of chapter 02: attention."""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.model import EncoderBlock, SelfAttention

from .frame import (
    Mistake,
    NotAttempted,
    answer,
    close,
    compare,
    exercise,
    expect,
    expect_gradients,
    expect_tensor,
    tensor_answer,
)


@exercise("attention", (2, 3, 5, 6), (7, 10), (3, 5, 13), (2, 1, 3, 4, 9), (1, 2, 30, 18))
def attention(learners: Callable, *shape: int) -> None:
    """Of ``attention(query, key, value)``, each ``[..., T, K]``, ``-> [..., T, K]``."""
    length, width = shape[-2:]
    dtype = torch.float32 if width == 6 else torch.float64
    query, key, value = 1.5 * torch.randn(3, *shape, dtype=dtype)  # larger than usual
    given = tensor_answer(learners, query, key, value, shape=shape)
    right = F.scaled_dot_product_attention(query, key, value)
    if close(given, right):
        return expect_gradients(learners, query, key, value)
    products = query @ key.mT
    scores = products / width**0.5
    slips = {
        f"your weights sum to 1 over the {name}, not over the keys; normalise each row, along the last axis": (
            scores.softmax(axis) @ value
        )
        for name, axis in (("queries", -2), ("heads", -3))
        if -axis <= len(shape)
    }
    slips |= {
        "the scores are not scaled; divide them by the square root of K": products.softmax(-1) @ value,
        "the scores are divided by K; divide them by the square root of K": (products / width).softmax(-1) @ value,
        "the scores are multiplied by the square root of K; divide": (products * width**0.5).softmax(-1) @ value,
        "the scores are divided by the square root of T, the number of tokens, not of K": (
            (products / length**0.5).softmax(-1) @ value
        ),
        "queries and keys are swapped; row i of the scores is query i against every key": scores.mT.softmax(-1) @ value,
        "the scores were never normalised; a softmax turns each row into shares that sum to 1": scores @ value,
        "you masked the later tokens, as a language model does; here every token may look at every other": (
            F.scaled_dot_product_attention(query, key, value, is_causal=True)
        ),
        "the scores are divided by the square root of 2; K is query.shape[-1]": (products / 2**0.5).softmax(-1) @ value,
    }
    otherwise = f"for inputs of shape {list(shape)} the numbers are not those of F.scaled_dot_product_attention"
    of_ones = tensor_answer(learners, query, key, torch.ones_like(value), shape=shape)
    if not close(of_ones, torch.ones_like(value)):
        otherwise = "your weights do not sum to 1 over the keys: an average of values that are all 1 has to be 1"
    compare(given, right, slips, otherwise)


@exercise("split heads", (2, 5, 3, 4, torch.float32), (3, 7, 2, 6, torch.float64))
def split_heads(learners: Callable, batch: int, length: int, heads: int, width: int, dtype: torch.dtype) -> None:
    """Of ``split_heads(x [B, T, D], num_heads) -> [B, H, T, K]``."""
    x = torch.randn(batch, length, heads * width, dtype=dtype)
    given = tensor_answer(learners, x, heads)
    letters = {batch: "B", length: "T", heads: "H", width: "K"}
    axes = ", ".join(letters.get(size, str(size)) for size in given.shape)
    expect(axes != "B, T, H, K", "the shape is [B, T, H, K]: well cut, now swap the axes of tokens and heads")
    shape = (batch, heads, length, width)
    expect_tensor(given, shape, "[B, H, T, K]", {tuple(given.shape): f"yours is [{axes}]"})
    slips = {
        "tokens and heads are mixed up, since view never moves a number; cut D into H x K, then swap two axes": (
            x.reshape(shape)
        ),
        "head h took every H-th feature; heads are neighbouring features, so cut D into H x K, not into K x H": (
            x.unflatten(2, (width, heads)).permute(0, 3, 1, 2)
        ),
    }
    right = torch.stack(x.split(width, dim=2), dim=1)
    otherwise = "the shape is right, but head h of a token is not its features h * K to (h + 1) * K"
    compare(given, right, slips, otherwise)
    expect_gradients(learners, x, heads)


@exercise("equivariance")
def equivariance(learners: Callable) -> None:
    """Of ``is_equivariant(layer, tokens) -> bool``; ``layer`` turns ``[B, T, D]`` into ``[B, T, D]``."""
    # neither the number of tokens nor the width is one of the notebook's
    batch, width, length = 3, 28, (34, 50, 83)[torch.randint(3, ()).item()]
    tokens, positions = torch.randn(batch, length, width), torch.randn(length, width)
    attention, block = SelfAttention(width, 4), EncoderBlock(width, 4, 2 * width)
    mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
    sign = torch.where(torch.arange(length) < 2 * length // 3, 1, -1)[:, None]
    equivariant = {
        "the layer that changes nothing": lambda x: x,
        "an MLP on each token": mlp,
        "vitlib's SelfAttention": lambda x: attention(x)[0],
        "vitlib's EncoderBlock": lambda x: block(x)[0],
        "the mean of all tokens, at every place": lambda x: x.mean(1, keepdim=True).expand_as(x),
    }
    ordered = {
        "attention to earlier tokens only": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        "attention after positions were added": lambda x: attention(x + positions)[0],
        "adding small positions to the tokens": lambda x: x + 0.004 * positions,
        "the running sum over the tokens": lambda x: x.cumsum(1),
        "reversing the tokens": lambda x: x.flip(1),
        "moving every token on by one place": lambda x: x.roll(1, 1),
        "changing the sign of the last third of the tokens": lambda x: x * sign,
        "sorting each feature over the tokens": lambda x: x.sort(1).values,
    }
    refused, accepted, inputs = [], [], []
    for name, layer in [*equivariant.items(), *ordered.items()]:

        @torch.no_grad()
        def watched(given: Tensor, layer: Callable = layer) -> Tensor:
            inputs.append(given.clone())
            return layer(given)

        said = _yes_or_no(answer(learners, watched, tokens))
        if said != (name in equivariant):
            (accepted if said else refused).append(name)
    if not refused and not accepted:
        return

    shuffled = [given for given in inputs if not torch.equal(given, tokens)]
    expect(inputs, "your tester never calls the layer; compare its outputs for the tokens and the shuffled tokens")
    expect(shuffled, "the layer only ever saw the tokens in their own order; shuffle them with torch.randperm")
    expect(not _same_numbers(shuffled, tokens, 0), "you shuffled the images of the batch; the tokens are axis 1")
    expect(not _same_numbers(shuffled, tokens, 2), "you shuffled the features of each token; the tokens are axis 1")
    expect(
        _same_numbers(shuffled, tokens, 1),
        "what you gave the layer is not the same tokens in another order; torch.randperm has each number exactly once",
    )
    nothing, sorting = "the layer that changes nothing", "sorting each feature over the tokens"
    every_refused, every_accepted = len(refused) == len(equivariant), len(accepted) == len(ordered)
    swapped = every_refused and every_accepted
    expect(not swapped, "your answers are the wrong way round: True means that the output is shuffled along")
    expect(not every_accepted, "every layer passes, even a running sum over the tokens; compare all numbers closely")
    expect(
        nothing not in refused or sorting not in accepted,
        "you compare with the output of the unshuffled tokens, which tests for invariance; shuffle that output too",
    )
    expect(nothing not in refused, f"{nothing} fails; give its output the same shuffle as its input")
    expect(
        sorting not in accepted or "reversing the tokens" not in accepted,
        "reversing the tokens passes; compare token by token, not means, sums or sorted numbers",
    )
    failed = " and ".join(refused[:2])
    expect(not refused, f"{failed} fail, but only by rounding; compare with torch.allclose(a, b, atol=1e-5)")
    raise Mistake(f"{accepted[0]} passes; draw the shuffle with torch.randperm, and compare all tokens")


def _yes_or_no(given) -> bool:
    """Return the learner's verdict, a bool of Python, PyTorch or NumPy."""
    if str(getattr(given, "dtype", "")) in ("torch.bool", "bool"):
        given = torch.as_tensor(given)
        expect(given.numel() == 1, "one True or False is wanted, not one for each number; torch.allclose gives one")
        return given.item()
    expect(isinstance(given, bool), f"the answer has to be True or False, but a {type(given).__name__} came back")
    return given


def _same_numbers(shuffled: list[Tensor], tokens: Tensor, axis: int) -> bool:
    """Return whether each of ``shuffled`` holds the numbers of ``tokens``, reordered along that axis only."""
    right = tokens.sort(axis).values
    return all(given.shape == right.shape and torch.equal(given.sort(axis).values, right) for given in shuffled)


@exercise("attention within each image", (3, 5, 2, 8, torch.float32), (2, 7, 3, 12, torch.float64))
def attend(learners: Callable, batch: int, length: int, heads: int, width: int, dtype: torch.dtype) -> None:
    """Of ``attend(tokens [B, T, D], to_qkv [D, 3 * D], num_heads) -> [B, T, D]``, every image on its own."""
    tokens = torch.randn(batch, length, width, dtype=dtype)
    to_qkv = torch.randn(width, 3 * width, dtype=dtype) / width**0.5  # moderate scores, or rounding errors grow
    shape = (batch, length, width)
    hints = {(length, batch, width): "that is [T, B, D], sequence first; swap the two axes back"}
    given = tensor_answer(learners, tokens, to_qkv, heads, shape=shape, letters="[B, T, D]", hints=hints)
    layer = nn.MultiheadAttention(width, heads, bias=False, batch_first=True, dtype=dtype)
    layer.load_state_dict({"in_proj_weight": to_qkv.T, "out_proj.weight": torch.eye(width)})
    right = layer(tokens, tokens, tokens)[0].detach()
    if close(given, right):
        return

    def attended(x: Tensor) -> Tensor:
        query, key, value = (x @ to_qkv).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    query, key, value = (tokens @ to_qkv).unflatten(2, (3, heads, -1)).unbind(2)  # each [B, T, H, K]
    slips = {
        "each token attends to the tokens at its own place in the other images; the axis before K must be T": (
            attended(tokens.transpose(0, 1)).transpose(0, 1)
        ),
        "the images of the batch were laid end to end, so each token attends to all tokens of all images": (
            attended(tokens.reshape(1, batch * length, width)).reshape(shape)
        ),
        "the heads are not put back side by side; swap heads and tokens before the last reshape": (
            right.unflatten(2, (heads, -1)).transpose(1, 2).reshape(shape)
        ),
        "each token attends to its own heads, not to other tokens; the axis before K must be T": (
            F.scaled_dot_product_attention(query, key, value).flatten(2)
        ),
    }
    other_images = tokens.clone()
    other_images[1:] = torch.randn_like(other_images[1:])
    otherwise = "each image is on its own, but the numbers are not those of nn.MultiheadAttention"
    if not close(tensor_answer(learners, other_images, to_qkv, heads)[:1], given[:1]):
        otherwise = "the first image's output changes when the others change; swap axes with transpose, not view"
    compare(given, right, slips, otherwise)


PRE_NORM_LINES = {
    "A": "y = mlp(y)",
    "B": "x = x + y",
    "C": "y = norm1(x)",
    "D": "y = attention(y)",
    "E": "x = x + y",
    "F": "y = norm2(x)",
}


@exercise("the lines of the block")
def block_order(learners: str) -> None:
    """Of the letters of ``PRE_NORM_LINES`` in the order of a pre-norm block: text, list, tuple, or a function."""
    if callable(learners):
        learners = answer(learners)
    if learners is None or learners is Ellipsis or learners == "":
        raise NotAttempted
    expect(isinstance(learners, str | list | tuple), "give the six letters as a text, such as 'ABCDEF'")
    text = learners if isinstance(learners, str) else " ".join(map(str, learners))
    letters = re.sub(r"[\s,;.>-]+", "", text).upper()
    expect(sorted(letters) == sorted(PRE_NORM_LINES), "use each of the letters A to F exactly once")
    lines = [PRE_NORM_LINES[letter] for letter in letters]
    expect("(x)" in lines[0], f"the first line, {lines[0]}, uses y, but nothing was put into y yet")
    if letters.replace("E", "B") == "CDBFAB":  # B and E are the same line
        return
    steps = list(zip(lines, lines[1:], strict=False))
    for first, second in steps:
        faults = {
            "adds the normalised tokens themselves; a sublayer comes between": "norm" in first and "+" in second,
            "throws away a y that was not added to x yet": "+" not in first and "norm" in second,
            "works on a y that is not normalised; each half starts with a norm": "+" in first and "norm" not in second,
        }
        for fault, found in faults.items():
            expect(not found, f"{second} right after {first} {fault}")
    expect(("y = norm1(x)", "y = attention(y)") in steps, "norm1 belongs to the attention, norm2 to the MLP")
    raise Mistake("the attention comes before the MLP")
