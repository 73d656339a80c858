"""Checks of chapter 02: attention."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.model import EncoderBlock, SelfAttention

from .frame import NotAttempted, answer, close, compare, exercise, expect, expect_grad, reject, tensor_answer


@exercise("attention", (2, 3, 5, 6), (7, 10), (3, 5, 13), (2, 1, 3, 4, 9), (1, 2, 30, 18))
def attention(learners: Callable, *shape: int) -> None:
    """Check ``attention(query, key, value)``, each ``[..., T, K]``, ``-> [..., T, K]``."""
    length, width = shape[-2:]
    dtype = torch.float32 if width == 6 else torch.float64
    query, key, value = 1.5 * torch.randn(3, *shape, dtype=dtype)  # larger than usual
    products = query @ key.mT
    scores = products / width**0.5
    norm = "not over the keys; normalise each row, along the last axis"

    def mixed(scores: Tensor, axis: int = -1) -> Tensor:
        return scores.softmax(axis) @ value

    def no_average(_) -> bool:
        return not close(tensor_answer(learners, query, key, torch.ones_like(value)), torch.ones_like(value))

    slips = {
        f"your weights sum to 1 over the queries, {norm}": mixed(scores, -2),
        f"your weights sum to 1 over the heads, {norm}": mixed(scores, -min(3, len(shape))),
        "the scores are not scaled; divide them by the square root of K": mixed(products),
        "the scores are divided by K; divide them by the square root of K": mixed(products / width),
        "the scores are multiplied by the square root of K; divide": mixed(products * width**0.5),
        "the scores are divided by the square root of T, the number of tokens, not of K": mixed(products / length**0.5),
        "queries and keys are swapped; row i of the scores is query i against every key": mixed(scores.mT),
        "the scores were never normalised; a softmax turns each row into shares that sum to 1": scores @ value,
        "you masked the later tokens, as a language model does; here every token may look at every other": (
            F.scaled_dot_product_attention(query, key, value, is_causal=True)
        ),
        "the scores are divided by the square root of 2; K is query.shape[-1]": mixed(products / 2**0.5),
        "the weights are right, but they mix the keys; they must mix the values": scores.softmax(-1) @ key,
        "the weights are right, but they mix the queries; they must mix the values": scores.softmax(-1) @ query,
        "your weights do not sum to 1 over the keys: an average of values that are all 1 has to be 1": no_average,
    }
    otherwise = f"for inputs of shape {list(shape)} the numbers are not those of F.scaled_dot_product_attention"
    right = F.scaled_dot_product_attention(query, key, value)
    compare(tensor_answer(learners, query, key, value), right, slips, otherwise)
    expect_grad(learners, query, key, value)


@exercise("split heads", (2, 5, 3, 4, torch.float32), (3, 7, 2, 6, torch.float64))
def split_heads(learners: Callable, batch: int, length: int, heads: int, width: int, dtype: torch.dtype) -> None:
    """Check ``split_heads(x [B, T, D], num_heads) -> [B, H, T, K]``."""
    x = torch.randn(batch, length, heads * width, dtype=dtype)
    right = torch.stack(x.split(width, dim=2), dim=1)
    every_hth = x.unflatten(2, (width, heads)).permute(0, 3, 1, 2)
    slips = {
        "well cut, now swap the axes of tokens and heads": right.transpose(1, 2),
        "the last two axes are swapped; K comes last": right.mT,
        "the batch is not the first axis; only tokens and heads change places": right.transpose(0, 2),
        "tokens and heads are mixed up, since view never moves a number; cut D into H x K, then swap two axes": (
            x.reshape(right.shape)
        ),
        "head h took every H-th feature; heads are neighbouring features, so cut D into H x K, not K x H": every_hth,
    }
    otherwise = "the shape is right, but head h of a token is not its features h * K to (h + 1) * K"
    compare(tensor_answer(learners, x, heads), right, slips, otherwise, letters="[B, H, T, K]")
    expect_grad(learners, x, heads)


@exercise("equivariance")
def equivariance(learners: Callable) -> None:
    """Check ``is_equivariant(layer, tokens) -> bool``; ``layer`` turns ``[B, T, D]`` into ``[B, T, D]``."""
    batch, length, width = 3, 50, 28  # neither the number of tokens nor the width is one of the notebook's
    tokens, positions = torch.randn(batch, length, width), torch.randn(length, width)
    attention, block = SelfAttention(width, 4), EncoderBlock(width, 4, 2 * width)
    mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
    two_features = torch.zeros(batch, length, width)
    two_features[-1, :, -2:] = torch.randn(length, 1) * torch.tensor([1, -1])
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
        "adding positions to two features of the last image": lambda x: x + two_features,
        "the running sum over the tokens": lambda x: x.cumsum(1),
        "reversing the tokens": lambda x: x.flip(1),
        "moving every token on by one place": lambda x: x.roll(1, 1),
        "changing the sign of the last third of the tokens": lambda x: x * sign,
        "sorting each feature": lambda x: x.sort(1).values,
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
    nothing, reversing, sorting = "the layer that changes nothing", "reversing the tokens", "sorting each feature"
    every_accepted, failing = len(accepted) == len(ordered), " and ".join(refused[:2])
    faults = {
        "your tester never calls the layer; compare its outputs for the tokens and the shuffled tokens": not inputs,
        "the layer only ever saw the tokens in their own order; shuffle them with torch.randperm": not shuffled,
        "you shuffled the images of the batch; the tokens are axis 1": _only_reordered(shuffled, tokens, 0),
        "you shuffled the features of each token; the tokens are axis 1": _only_reordered(shuffled, tokens, 2),
        "what you gave the layer is not the same tokens in another order; torch.randperm has each number exactly "
        "once": not _only_reordered(shuffled, tokens, 1),
        "your answers are the wrong way round: True means that the output is shuffled along": (
            every_accepted and len(refused) == len(equivariant)
        ),
        "every layer passes, even a running sum over the tokens; compare all numbers closely": every_accepted,
        "you compare with the output of the unshuffled tokens, which tests for invariance; shuffle that output too": (
            nothing in refused and sorting in accepted
        ),
        f"{nothing} fails; give its output the same shuffle as its input": nothing in refused,
        f"{reversing} passes; compare token by token, not means, sums or sorted numbers": (
            {reversing, sorting} <= set(accepted)
        ),
        f"{failing} fail, but only by rounding; compare with torch.allclose(a, b, atol=1e-5)": refused,
    }
    reject(faults)
    expect(not accepted, f"{accepted[0]} passes; draw the shuffle with torch.randperm, and compare all numbers")


def _yes_or_no(given) -> bool:
    """Return the learner's verdict, a bool of Python, PyTorch or NumPy."""
    if str(getattr(given, "dtype", "")) in ("torch.bool", "bool"):
        given = torch.as_tensor(given)
        expect(given.numel() == 1, "one True or False is wanted, not one for each number; torch.allclose gives one")
        return given.item()
    expect(isinstance(given, bool), f"the answer has to be True or False, but a {type(given).__name__} came back")
    return given


def _only_reordered(shuffled: list[Tensor], tokens: Tensor, axis: int) -> bool:
    """Return whether each of ``shuffled`` holds the numbers of ``tokens``, reordered along that axis only."""
    right = tokens.sort(axis).values
    return all(given.shape == right.shape and torch.equal(given.sort(axis).values, right) for given in shuffled)


@exercise("attention within each image", (3, 5, 2, 8, torch.float32), (2, 7, 3, 12, torch.float64))
def attend(learners: Callable, batch: int, length: int, heads: int, width: int, dtype: torch.dtype) -> None:
    """Check ``attend(tokens [B, T, D], to_qkv [D, 3 * D], num_heads) -> [B, T, D]``, every image on its own."""
    tokens = torch.randn(batch, length, width, dtype=dtype)
    to_qkv = torch.randn(width, 3 * width, dtype=dtype) / width**0.5  # moderate scores, or rounding errors grow

    def attended(x: Tensor) -> Tensor:
        query, key, value = (x @ to_qkv).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    def changes_with_the_others(given: Tensor) -> bool:
        others = torch.cat([tokens[:1], torch.randn_like(tokens[1:])])
        return not close(tensor_answer(learners, others, to_qkv, heads)[:1], given[:1])

    right = attended(tokens)
    query, key, value = (tokens @ to_qkv).unflatten(2, (3, heads, -1)).unbind(2)  # each [B, T, H, K]
    slips = {
        "that is [T, B, D], sequence first; swap the two axes back": tokens.transpose(0, 1),
        "each token attends to the tokens at its own place in the other images; the axis before K must be T": (
            attended(tokens.transpose(0, 1)).transpose(0, 1)
        ),
        "the images of the batch were laid end to end, so each token attends to all tokens of all images": (
            attended(tokens.reshape(1, batch * length, width)).reshape(right.shape)
        ),
        "the heads are not put back side by side; swap heads and tokens before the last reshape": (
            right.unflatten(2, (heads, -1)).transpose(1, 2).reshape(right.shape)
        ),
        "each token attends to its own heads, not to other tokens; the axis before K must be T": (
            F.scaled_dot_product_attention(query, key, value).flatten(2)
        ),
        "the first image's output changes when the others change; swap axes with transpose, not view": (
            changes_with_the_others
        ),
    }
    otherwise = "each image is on its own, but the numbers are not those of nn.MultiheadAttention"
    compare(tensor_answer(learners, tokens, to_qkv, heads), right, slips, otherwise, letters="[B, T, D]")


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
    """Check the letters of ``PRE_NORM_LINES`` in the order of a pre-norm block: text, list, tuple, or a function."""
    if callable(learners):
        learners = answer(learners)
    if learners is None or learners is Ellipsis or learners == "":
        raise NotAttempted
    expect(isinstance(learners, str | list | tuple), "give the six letters as a text, such as 'ABCDEF'")
    letters = "".join(filter(str.isalpha, str(learners).upper()))
    expect(sorted(letters) == sorted(PRE_NORM_LINES), "give each of the letters A to F exactly once, such as 'ABCDEF'")
    lines = [PRE_NORM_LINES[letter] for letter in letters]
    expect("(x)" in lines[0], f"the first line, {lines[0]}, uses y, but nothing was put into y yet")
    steps = list(zip(lines, lines[1:], strict=False))
    for first, second in steps:
        norm, adds = ["norm" in line for line in (first, second)], ["+" in line for line in (first, second)]
        step = f"{second} right after {first}"
        faults = {
            f"{step} adds the normalised tokens themselves; a sublayer comes between": norm[0] and adds[1],
            f"{step} throws away a y that was not added to x yet": norm[1] and not adds[0],
            f"{step} works on a y that is not normalised; each half starts with a norm": adds[0] and not norm[1],
        }
        reject(faults)
    expect(("y = norm1(x)", "y = attention(y)") in steps, "norm1 belongs to the attention, norm2 to the MLP")
    expect(letters.replace("E", "B") == "CDBFAB", "the attention comes before the MLP")  # B and E are the same line
