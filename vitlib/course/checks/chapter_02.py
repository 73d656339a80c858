"""Checks of chapter 02: attention."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.model import EncoderBlock, SelfAttention

from .frame import Mistake, NotAttempted, answer, close, compare, exercise, expect, tensor_answer


@exercise("attention")
def attention(learners: Callable) -> None:
    """Of ``attention(query, key, value)``, each ``[B, H, T, K]``, ``-> [B, H, T, K]``."""
    batch, heads, length, width = shape = 2, 3, 5, 4
    query, key, value = torch.randn(3, *shape)
    given = tensor_answer(learners, query.clone(), key.clone(), value.clone(), shape=shape)
    products = query @ key.mT
    scores = products / width**0.5
    slips = {
        "your weights sum to 1 over the queries, not over the keys; normalise each row, along the last axis": (
            scores.softmax(2) @ value
        ),
        "your weights sum to 1 over the heads, not over the keys; normalise each row, along the last axis": (
            scores.softmax(1) @ value
        ),
        "your weights sum to 1 over the batch, not over the keys; normalise each row, along the last axis": (
            scores.softmax(0) @ value
        ),
        "the scores are not scaled; divide them by the square root of K": products.softmax(-1) @ value,
        "the scores are divided by K; divide them by the square root of K": (products / width).softmax(-1) @ value,
        "the scores are divided by the square root of T, the number of tokens; K is the width of one query": (
            (products / length**0.5).softmax(-1) @ value
        ),
        "queries and keys are swapped; row i of the scores is query i against every key": scores.mT.softmax(-1) @ value,
        "the scores were never normalised; a softmax turns each row into shares that sum to 1": scores @ value,
        "you masked the later tokens, as a language model does; in an image every token may look at every other": (
            F.scaled_dot_product_attention(query, key, value, is_causal=True)
        ),
    }
    right = F.scaled_dot_product_attention(query, key, value)
    if not close(given, right):
        of_ones = tensor_answer(learners, query.clone(), key.clone(), torch.ones(shape), shape=shape)
        compare(
            given, right, slips,
            "the shape is right, but the numbers are not those of F.scaled_dot_product_attention"
            if close(of_ones, torch.ones(shape))
            else "your weights do not sum to 1 over the keys: an average of values that are all 1 has to be 1",
        )  # fmt: skip


@exercise("split heads")
def split_heads(learners: Callable) -> None:
    """Of ``split_heads(x [B, T, D], num_heads) -> [B, H, T, K]``."""
    batch, length, heads, width = 2, 5, 3, 4
    x = torch.randn(batch, length, heads * width)
    given = answer(learners, x.clone(), heads)
    expect(
        getattr(given, "shape", None) != (batch, length, heads, width),
        "the shape is [B, T, H, K]: well cut, now swap the axes of tokens and heads",
    )
    given = tensor_answer(lambda: given, shape=(batch, heads, length, width))
    slips = {
        "tokens and heads are mixed up, since view and reshape never move a number; cut D into H x K, then swap two "
        "axes": x.reshape(batch, heads, length, width),
        "head h took every H-th feature; heads are neighbouring features, so cut D into H x K, not into K x H": (
            x.unflatten(2, (width, heads)).permute(0, 3, 1, 2)
        ),
    }
    right = torch.stack(x.split(width, dim=2), dim=1)
    compare(given, right, slips, "the shape is right, but head h of a token is not its features h * K to (h + 1) * K")


class _Watched(nn.Module):
    """A layer that remembers what it was given."""

    def __init__(self, layer: Callable[[Tensor], Tensor]):
        super().__init__()
        self.layer = layer
        self.inputs: list[Tensor] = []

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        self.inputs.append(tokens.clone())
        return self.layer(tokens)


@exercise("equivariance")
def equivariance(learners: Callable) -> None:
    """Of ``is_equivariant(layer, tokens) -> bool``; ``layer`` turns ``[B, T, D]`` into ``[B, T, D]``."""
    batch, length, width = 3, 65, 32
    tokens, positions = torch.randn(batch, length, width), torch.randn(length, width)
    attention, block = SelfAttention(width, 4), EncoderBlock(width, 4, 2 * width)
    mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
    sign = torch.where(torch.arange(length) < length - 4, 1, -1)[:, None]
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
        "the running sum over the tokens": lambda x: x.cumsum(1),
        "reversing the tokens": lambda x: x.flip(1),
        "moving every token on by one place": lambda x: x.roll(1, 1),
        "changing the sign of the last four tokens": lambda x: x * sign,
        "sorting each feature over the tokens": lambda x: x.sort(1).values,
    }
    refused, accepted, inputs = [], [], []
    for name, layer in 3 * [*equivariant.items(), *ordered.items()]:  # thrice: a poor shuffle must not pass by luck
        watched = _Watched(layer)
        said = _yes_or_no(answer(learners, watched, tokens.clone()))
        inputs += watched.inputs
        if said and name in ordered and name not in accepted:
            accepted.append(name)
        elif not said and name in equivariant and name not in refused:
            refused.append(name)
    if not refused and not accepted:
        return

    shuffled = [given for given in inputs if not torch.equal(given, tokens)]
    expect(inputs, "your tester never calls the layer; compare what it makes of the tokens and of the shuffled tokens")
    expect(shuffled, "the layer only ever saw the tokens in their own order; shuffle them with torch.randperm")
    expect(not _same_numbers(shuffled, tokens, 0), "you shuffled the images of the batch; the tokens are axis 1")
    expect(not _same_numbers(shuffled, tokens, 2), "you shuffled the features of each token; the tokens are axis 1")
    expect(
        _same_numbers(shuffled, tokens, 1),
        "what you gave the layer is not the same tokens in another order; torch.randperm has each number exactly once",
    )
    _expect_no_slip_in_the_comparison(refused, accepted, len(equivariant), len(ordered))


def _yes_or_no(given) -> bool:
    """The learner's verdict, be it a bool of Python, PyTorch or NumPy."""
    if str(getattr(given, "dtype", "")) in ("torch.bool", "bool"):
        given = torch.as_tensor(given)
        expect(given.numel() == 1, "one True or False is wanted, not one for each number; torch.allclose gives one")
        return given.item()
    expect(isinstance(given, bool), f"the answer has to be True or False, but a {type(given).__name__} came back")
    return given


def _same_numbers(shuffled: list[Tensor], tokens: Tensor, axis: int) -> bool:
    """Whether every one of ``shuffled`` holds the numbers of ``tokens``, in another order along that axis only."""
    right = tokens.sort(axis).values
    return all(given.shape == right.shape and torch.equal(given.sort(axis).values, right) for given in shuffled)


def _expect_no_slip_in_the_comparison(refused: list[str], accepted: list[str], most_refused: int, most_accepted: int):
    """The mistake of a tester that shuffles the tokens, from the layers that it takes for what they are not."""
    sorting, reversing = "sorting each feature over the tokens", "reversing the tokens"
    expect(
        len(refused) < most_refused or len(accepted) < most_accepted,
        "your answers are the wrong way round: True means that the output is shuffled along",
    )
    expect(
        len(accepted) < most_accepted,
        "every layer passes, even a running sum over the tokens; compare all numbers, with a small tolerance",
    )
    expect(
        "the layer that changes nothing" not in refused or sorting not in accepted,
        "you compare with the output of the unshuffled tokens as it is, which tests for invariance; shuffle that "
        "output too",
    )
    expect(
        "the layer that changes nothing" not in refused,
        "the layer that changes nothing fails; give its output the same shuffle as its input (or undo the shuffle, "
        "with argsort)",
    )
    expect(
        sorting not in accepted or reversing not in accepted,
        "reversing the tokens passes; compare token by token, not means, sums or sorted numbers",
    )
    expect(
        not refused,
        f"{' and '.join(refused[:2])} fail, though only by rounding; compare with a tolerance: torch.allclose(a, b, "
        "atol=1e-5)",
    )
    raise Mistake(
        f"{accepted[0]} passes; draw the shuffle with torch.randperm, since a regular one can go unnoticed, and "
        "compare all tokens"
    )


@exercise("attention within each image")
def attend(learners: Callable) -> None:
    """Of ``attend(tokens [B, T, D], to_qkv [D, 3 * D], num_heads) -> [B, T, D]``, every image on its own."""
    batch, length, heads, width = 3, 5, 2, 8
    tokens = torch.randn(batch, length, width)
    to_qkv = torch.randn(width, 3 * width) / width**0.5  # scores of moderate size, or rounding errors grow
    given = answer(learners, tokens.clone(), to_qkv.clone(), heads)
    expect(
        getattr(given, "shape", None) != (length, batch, width),
        "the result is [T, B, D], sequence first; swap the two axes back before you return it",
    )
    given = tensor_answer(lambda: given, shape=(batch, length, width))

    layer = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
    layer.load_state_dict({"in_proj_weight": to_qkv.T, "out_proj.weight": torch.eye(width)})

    def reference(x: Tensor) -> Tensor:
        return layer(x, x, x)[0]

    right = reference(tokens)
    slips = {
        "each token still attends to the tokens at its own place in the other images; the axis before K must be T, "
        "not B": reference(tokens.transpose(0, 1)).transpose(0, 1),
        "the images of the batch were laid end to end, so each token attends to all tokens of all images": (
            reference(tokens.reshape(1, batch * length, width)).reshape(given.shape)
        ),
        "the attention is right, but the heads are not put back side by side; swap heads and tokens before the last "
        "reshape": right.unflatten(2, (heads, -1)).transpose(1, 2).reshape(given.shape),
    }
    other_images = tokens.clone()
    other_images[1:] = torch.randn(batch - 1, length, width)
    alone = close(answer(learners, other_images, to_qkv.clone(), heads)[:1], given[:1])
    compare(
        given, right, slips,
        "each image is on its own now, but the numbers are not those of nn.MultiheadAttention with these weights"
        if alone
        else "the first image's output changes when the other images change; swap axes with transpose, since view "
        "and reshape only read the same numbers in another shape",
    )  # fmt: skip


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
    """Of the letters of ``PRE_NORM_LINES`` in the order of a pre-norm encoder block: a text, list or tuple, or a
    function that returns one."""
    if callable(learners):
        learners = answer(learners)
    if learners is None or learners is Ellipsis or learners == "":
        raise NotAttempted
    expect(isinstance(learners, str | list | tuple), "give the six letters as a text, such as 'ABCDEF'")
    letters = [str(letter).strip().upper() for letter in learners]
    expect(sorted(letters) == sorted(PRE_NORM_LINES), "use each of the letters A to F exactly once")
    lines = [PRE_NORM_LINES[letter] for letter in letters]
    expect("(x)" in lines[0], f"the first line, {lines[0]}, uses y, but nothing was put into y yet")
    if _computes_a_block(lines):
        return
    steps = list(zip(lines, lines[1:], strict=False))
    for first, second in steps:
        expect(
            "norm" not in first or "+" not in second,
            f"{second} right after {first} adds the normalised tokens themselves; a sublayer comes between",
        )
        expect(
            "+" in first or "norm" not in second,
            f"{second} right after {first} throws away a y that was not added to x yet",
        )
        expect(
            "+" not in first or "norm" in second,
            f"{second} right after {first} works on a y that is not normalised; each half starts with a norm of x",
        )
    expect(("y = norm1(x)", "y = attention(y)") in steps, "norm1 belongs to the attention, norm2 to the MLP")
    raise Mistake("the attention comes before the MLP")


def _computes_a_block(lines: list[str]) -> bool:
    """Whether these lines of ``PRE_NORM_LINES``, executed, give what ``EncoderBlock`` gives."""
    with torch.random.fork_rng(devices=[]):
        block = EncoderBlock(8, 2, 16).eval()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 8)
    names = {"x": x, "norm1": block.norm1, "norm2": block.norm2, "mlp": block.mlp}
    names["attention"] = lambda y: block.attention(y)[0]
    for line in lines:
        exec(line, names)
    return close(names["x"], block(x)[0], 1e-4)
