"""Checks of the exercises: each takes what the learner wrote, tries it on fresh random input, and names the mistake.

A check prints one line. It never stops the notebook: an exercise that was not attempted yet,
or that crashes, is a line like any other. ``be_strict(True)`` makes everything but a correct answer raise, for grading.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F

from vitlib.augment import normalise
from vitlib.model import EncoderBlock, ViTModel

_strict = False


class Mistake(Exception):
    """What is wrong with an answer, in a sentence that starts in lower case and names the likely cause."""


def be_strict(strict: bool) -> None:
    """With True, a check raises AssertionError unless the answer is correct."""
    global _strict
    _strict = strict


def expect(condition, mistake: str) -> None:
    """Raise :class:`Mistake` unless ``condition`` holds."""
    if not condition:
        raise Mistake(mistake)


def answer(function: Callable, *args, **kwargs):
    """The learner's function called; a stub, which returns None or ``...``, counts as not attempted."""
    result = function(*args, **kwargs)
    if result is None or result is Ellipsis:
        raise NotImplementedError
    return result


def tensor_answer(function: Callable, *args, shape: tuple[int, ...], **kwargs) -> torch.Tensor:
    """As :func:`answer`, for functions that must return a tensor of a known shape."""
    result = answer(function, *args, **kwargs)
    expect(isinstance(result, torch.Tensor), f"a tensor is wanted, but a {type(result).__name__} came back")
    expect(tuple(result.shape) == shape, f"the shape is {list(result.shape)}, but should be {list(shape)}")
    return result


def close(first: torch.Tensor, second: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal shapes, and no number differs by more than ``tolerance``."""
    return first.shape == second.shape and torch.allclose(first.float(), second.float(), rtol=0, atol=tolerance)


def exercise(title: str):
    """Turns a function that raises :class:`Mistake` into a check that prints its verdict."""

    def decorate(body: Callable):
        @wraps(body)
        def check(learners) -> None:
            try:
                # fresh numbers every time, and none taken from the notebook's own random state
                with torch.random.fork_rng(devices=[]):
                    torch.seed()
                    body(learners)
                verdict = "correct"
            except NotImplementedError:
                verdict = "not attempted yet"
            except Mistake as mistake:
                verdict = f"not yet: {mistake}"
            except (Exception, SystemExit) as error:
                reason = " ".join(str(error).split()[:30])
                verdict = f"not yet: your code stopped with {type(error).__name__}: {reason}"
            if _strict and verdict != "correct":
                raise AssertionError(f"{title}: {verdict}")
            print(f"{title}: {verdict}")  # nothing is returned: a notebook would show it below the verdict

        return check

    return decorate


# Chapter 01: patching


@exercise("patch numbers")
def patch_numbers(learners: Callable) -> None:
    """Of ``patch_numbers(height, width, channels, patch_size) -> (N, C * P * P)``."""
    for channels in (3, 2, 1):
        patch_size, rows = torch.randint(4, 9, (2,)).tolist()
        columns = rows + 2  # a picture wider than high tells the two sides apart
        height, width = rows * patch_size, columns * patch_size
        call = f"for {height} x {width} pixels, {channels} channel(s) and patches of {patch_size}"
        given = answer(learners, height, width, channels, patch_size)
        expect(isinstance(given, tuple | list) and len(given) == 2, "two numbers are wanted: return N, patch_dim")
        if all(number is Ellipsis for number in given):
            raise NotImplementedError
        expect(Ellipsis not in given, "one of the two numbers is still missing")
        expect(
            all(isinstance(number, int) for number in given),
            "both numbers count things, so both must be of type int: divide with //, not with /",
        )
        patches, patch_dim = rows * columns, channels * patch_size**2
        expect(tuple(given) != (patch_dim, patches), "right numbers, wrong order: return N first, then the dimension")
        hint = {
            rows: "you counted one column of patches; a grid has rows and columns, so multiply",
            columns: "you counted one row of patches; a grid has rows and columns, so multiply",
            rows**2: "you squared the number of rows, but the picture is not square: count columns by the width",
            columns**2: "you squared the number of columns, but the picture is not square: count rows by the height",
            rows * columns * patch_size: "you divided by the patch size once; both sides are cut, so divide twice",
            patches + 1: "the CLS token is no patch: leave the 1 out",
        }.get(given[0], "that is not the number of rows times the number of columns of patches")
        expect(given[0] == patches, f"N is {given[0]} {call}: {hint}")
        hint = {
            patch_size**2: "you forgot the channels; every pixel has one number per channel",
            channels * patch_size: "you forgot to square the patch size; a patch has P rows of P pixels",
            patch_size: "you counted one row of pixels in one channel; a patch has P rows of P pixels, in C channels",
        }.get(given[1], "that is not the number of pixels in a patch times the number of channels")
        expect(given[1] == patch_dim, f"the patch dimension is {given[1]} {call}: {hint}")


@exercise("patchify")
def patchify(learners: Callable) -> None:
    """Of ``patchify(images [B, C, H, W], patch_size) -> [B, N, C * P * P]``."""
    # batch, channels, rows and columns of patches, patch size: all different, so that no mix-up goes unseen
    for batch, channels, rows, columns, size in ((2, 3, 5, 6, 4), (3, 1, 2, 4, 5)):
        images = torch.randn(batch, channels, rows * size, columns * size)
        patches, patch_dim = rows * columns, channels * size**2
        given = answer(learners, images.clone(), size)
        expect(isinstance(given, torch.Tensor), f"a tensor is wanted, but a {type(given).__name__} came back")
        shape = tuple(given.shape)
        hint = {
            (batch, patch_dim, patches): "; a row should be a patch, so swap the last two dimensions",
            (batch * patches, patch_dim): "; keep the images of the batch apart",
            (batch, rows, columns, patch_dim): "; merge the two grid dimensions into one",
            (batch, patches, channels, size, size): "; flatten each patch into one row",
            (batch, patches * channels, size**2): "; put the channels of a patch side by side in one row",
        }.get(shape, "")
        expect(
            shape == (batch, patches, patch_dim),
            f"the shape is {list(shape)}, but should be [B, N, C * P * P] = {[batch, patches, patch_dim]}{hint}",
        )
        # an independent way there: unfold gives [B, C * P * P, N] in the order in which a convolution reads its input
        right = F.unfold(images, size, stride=size).transpose(1, 2)
        parts = right.unflatten(2, (channels, size, size)).unflatten(1, (rows, columns))  # [B, row, column, C, P, P]
        by_column = parts.transpose(1, 2)
        slips = (
            (images.reshape(shape), "reshape alone never moves a number, so your rows are runs of whole image lines; "
             "permute before the last reshape"),
            (by_column.reshape(shape), "your patches are numbered down the columns; number them row by row"),
            (parts.permute(0, 1, 2, 4, 5, 3).reshape(shape), "within a patch your channels come last; the order is "
             "channel, row, column"),
            (parts.transpose(4, 5).reshape(shape), "each of your patches is mirrored: its rows and columns are "
             "swapped"),
            (by_column.transpose(4, 5).reshape(shape), "you cut the transposed image: rows and columns are swapped "
             "everywhere"),
        )  # fmt: skip
        for wrong, mistake in slips:
            expect(close(given, right) or not close(given, wrong), mistake)
        same_numbers = close(given.flatten().sort().values, right.flatten().sort().values)
        expect(
            close(given, right),
            "every number of the images is there, but not in its place; write the meaning of each dimension behind "
            "every line" if same_numbers else "some numbers of the images are lost or changed; only move them",
        )  # fmt: skip


@exercise("tokens")
def tokens(learners: Callable) -> None:
    """Of ``tokens(patches [B, N, D], cls_token [1, 1, D], positions [1, N + 1, D]) -> [B, N + 1, D]``."""
    patches, cls_token, positions = torch.randn(3, 6, 5), torch.randn(1, 1, 5), torch.randn(1, 7, 5)

    def given(*inputs: torch.Tensor) -> torch.Tensor:
        result = answer(learners, *(tensor.clone() for tensor in inputs))
        expect(isinstance(result, torch.Tensor), f"a tensor is wanted, but a {type(result).__name__} came back")
        return result

    shape = tuple(given(patches, cls_token, positions).shape)
    expect(shape != (3, 6, 5), "one token is missing: N patches and CLS make N + 1")
    expect(shape == (3, 7, 5), f"the shape is {list(shape)}, but should be [B, N + 1, D] = [3, 7, 5]")

    # with the other two inputs at zero, each input shows where it goes
    nowhere = torch.zeros(1, 7, 5)
    cls = given(torch.zeros(3, 6, 5), cls_token, nowhere)
    in_front, at_the_end = cls_token.expand(3, 1, 5), cls[:, -1:]
    expect(close(cls[:, :1], in_front) or not close(at_the_end, in_front), "CLS stands at the end; it belongs in front")
    expect(close(cls[:1, :1], cls_token), "the first token is not CLS")
    expect(close(cls[:, :1], in_front), "only the first image has a CLS token; expand it over the batch")
    expect(not cls[:, 1:].any(), "the CLS token was added to the patches; it is a token of its own")
    expect(
        close(given(patches, torch.zeros(1, 1, 5), nowhere)[:, 1:], patches),
        "behind CLS the patches should follow unchanged and in their order",
    )
    added = given(torch.zeros(3, 6, 5), torch.zeros(1, 1, 5), positions)
    right = positions.expand(3, 7, 5)
    expect(added.any(), "the positions are not added")
    expect(
        not close(added[:, 1:], right[:, :-1]),
        "each patch got the position of the token before it, the first patch that of CLS; add positions after CLS",
    )
    expect(
        added[:, 0].any() or not close(added[:, 1:], right[:, 1:]),
        "CLS has no position: the positions were added before CLS was there; put CLS in front first",
    )
    expect(close(added, right), "a token did not get the position of its own number")
    expect(
        close(given(patches, cls_token, positions), torch.cat([cls_token.expand(3, 1, 5), patches], 1) + positions),
        "each part is in its place alone, but together they are not the sum; only add",
    )


# Chapter 02: attention


def _compare(given: torch.Tensor, right: torch.Tensor, slips: dict[str, torch.Tensor], otherwise: str) -> None:
    """Nothing if ``given`` is right; else the sentence of the typical wrong answer that it equals."""
    if close(given, right):
        return
    for mistake, wrong in slips.items():
        expect(not close(given, wrong), mistake)
    raise Mistake(otherwise)


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
    }
    right = F.scaled_dot_product_attention(query, key, value)
    _compare(given, right, slips, "the shape is right, but the numbers are not those of F.scaled_dot_product_attention")


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
    _compare(given, right, slips, "the shape is right, but head h of a token is not its features h * K to (h + 1) * K")


@exercise("attention within each image")
def attend(learners: Callable) -> None:
    """Of ``attend(tokens [B, T, D], to_qkv [D, 3 * D], num_heads) -> [B, T, D]``, every image on its own."""
    batch, length, heads, width = 3, 5, 2, 4
    tokens, to_qkv = torch.randn(batch, length, heads * width), torch.randn(heads * width, 3 * heads * width)
    given = answer(learners, tokens.clone(), to_qkv.clone(), heads)
    expect(
        getattr(given, "shape", None) != (length, batch, heads * width),
        "the result is [T, B, D], sequence first; swap the two axes back before you return it",
    )
    given = tensor_answer(lambda: given, shape=(batch, length, heads * width))

    qkv = (tokens @ to_qkv).unflatten(2, (3, heads, width))
    within, across = (
        F.scaled_dot_product_attention(*qkv.permute(*axes))  # [B, H, T, K] and [T, H, B, K]
        for axes in ((2, 0, 3, 1, 4), (2, 1, 3, 0, 4))
    )
    slips = {
        "each token still attends to the tokens at its own place in the other images; the axis before K must be T, "
        "not B": across.permute(2, 0, 1, 3).flatten(2),
        "the attention is right, but the heads are not put back side by side; swap heads and tokens before the last "
        "reshape": within.reshape(given.shape),
    }
    right = within.transpose(1, 2).flatten(2)
    if not close(given, right):
        other_images = tokens.clone()
        other_images[1:] = torch.randn(batch - 1, length, heads * width)
        alone = close(answer(learners, other_images, to_qkv.clone(), heads)[:1], given[:1])
        _compare(
            given, right, slips,
            "each image is on its own now, but the numbers are not those of scaled dot-product attention" if alone
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
    """Of the letters of ``PRE_NORM_LINES`` in the order of a pre-norm encoder block: a text, list or tuple."""
    if learners is None or learners is Ellipsis or learners == "":
        raise NotImplementedError
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


# Chapter 03: pretraining


@exercise("first loss")
def first_loss(function: Callable) -> None:
    """``function(num_classes)``: the cross-entropy, in nats, of a model that has not learnt anything yet."""
    for num_classes in (2, 10, 100, 1000):
        loss = answer(function, num_classes)
        expect(isinstance(loss, int | float), f"a number is wanted, but a {type(loss).__name__} came back")
        wanted = math.log(num_classes)
        near = {
            math.log2(
                num_classes
            ): "that is the logarithm to base 2 (bits); PyTorch's cross-entropy is in nats, base e",
            math.log10(num_classes): "that is the logarithm to base 10; PyTorch's cross-entropy uses base e",
            1 / num_classes: "that is the probability of each class; the loss is minus its logarithm",
            -wanted: "the sign is wrong; a loss is minus the logarithm of a probability, so it is positive",
        }
        for wrong, mistake in near.items():
            expect(not math.isclose(loss, wrong, rel_tol=1e-3) or math.isclose(wanted, wrong, rel_tol=1e-3), mistake)
        expect(
            math.isclose(loss, wanted, rel_tol=1e-3),
            f"{loss:.3g} for {num_classes} classes; think of what -log(p) is when all classes are equally likely",
        )


@exercise("top-1 accuracy")
def top1(function: Callable) -> None:
    """``function(logits [B, C], labels [B])``: the share of images whose highest logit is that of the right class."""
    logits, labels, right = torch.randn(24, 7), torch.randint(7, (24,)), 15
    winners = torch.where(torch.arange(24) < right, labels, (labels + 1) % 7)
    logits[torch.arange(24), winners] += 100
    share = answer(function, logits, labels)
    if isinstance(share, torch.Tensor):
        expect(
            share.numel() == 1, f"one number is wanted, but {share.numel()} came back; take the mean over the images"
        )
        share = share.item()
    expect(isinstance(share, int | float), f"a number is wanted, but a {type(share).__name__} came back")
    expect(not math.isclose(share, right), "that counts the right answers; divide by the number of images")
    expect(not math.isclose(share, 100 * right / 24, rel_tol=1e-4), "that is in percent; give a share from 0 to 1")
    expect(not math.isclose(share, 1 - right / 24, rel_tol=1e-4), "that is the share of wrong answers")
    expect(
        math.isclose(share, right / 24, rel_tol=1e-4),
        f"{share:.3g} where {right / 24:.3g} is right; is the argmax over the classes, the last axis of the logits?",
    )


@exercise("evaluation")
def evaluation(function: Callable) -> None:
    """``function(model, images)``: logits of a trained model, the same on every call."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)).train()
    images = torch.randn(16, 8)
    first, second = (tensor_answer(function, model, images, shape=(16, 3)) for _ in range(2))
    expect(
        torch.equal(first, second),
        "two calls on the same images give different logits: dropout is still on; call model.eval() first",
    )
    expect(not first.requires_grad, "gradients are recorded, which costs memory and time; use torch.no_grad()")
    expect(model.training, "the model is left in eval mode, so the next epoch would train without dropout; put it back")
    expect(close(first, model.eval()(images).detach()), "these are not the logits of the model in eval mode")


# Chapter 04: fine-tuning


@exercise("transfer")
def transfer(function: Callable) -> None:
    """``function(pretrained, num_classes)``: a new model with the pretrained encoder and a head of the right size."""
    pretrained = _tiny_vit(num_classes=100)
    before = {name: tensor.clone() for name, tensor in pretrained.state_dict().items()}
    model = answer(function, pretrained, 10)
    expect(isinstance(model, ViTModel), f"a ViTModel is wanted, but a {type(model).__name__} came back")
    expect(model is not pretrained, "that is the pretrained model itself; build a new one and copy the encoder into it")
    rows = model.linear_classifier.weight.shape[0]
    expect(rows != 100, "the head still has 100 rows for 10 classes: the first loss is near ln 100, not ln 10")
    expect(rows == 10, f"the head has {rows} rows for 10 classes")
    encoder = model.vit_encoder.state_dict()
    same = [torch.equal(tensor, before[f"vit_encoder.{name}"]) for name, tensor in encoder.items()]
    expect(any(same), "the encoder is a fresh one; load the pretrained encoder's state_dict into it")
    expect(all(same), "only some of the encoder's tensors are those of the checkpoint")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    unchanged = all(torch.equal(tensor, before[name]) for name, tensor in pretrained.state_dict().items())
    expect(unchanged, "the new model shares tensors with the pretrained one, so training it would change both")


@exercise("linear probe")
def linear_probe(function: Callable) -> None:
    """``function(model)``: set the model up so that training changes the head alone."""
    model = _tiny_vit(num_classes=3)
    function(model)
    frozen = [not parameter.requires_grad for parameter in model.vit_encoder.parameters()]
    head = [parameter.requires_grad for parameter in model.linear_classifier.parameters()]
    if not any(frozen) and all(head):
        raise NotImplementedError
    expect(all(head), "the head is frozen as well, so nothing would be trained")
    expect(all(frozen), f"{frozen.count(False)} of the encoder's {len(frozen)} tensors are still trained")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.nn.functional.cross_entropy(model(torch.randn(6, 3, 8, 8)), torch.arange(6) % 3).backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    expect(
        moved == {"linear_classifier.weight", "linear_classifier.bias"}, f"after a step {sorted(moved)} have changed"
    )


@exercise("normalisation")
def normalisation(function: Callable) -> None:
    """``function(images, upstream, downstream)``: downstream images as the upstream encoder expects them.

    ``upstream`` and ``downstream`` are pairs (mean, std) of the two data sets, in [0, 1].
    """
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    upstream, downstream = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), ((0.1, 0.2, 0.3), (0.1, 0.1, 0.1))
    result = tensor_answer(function, images, upstream, downstream, shape=(4, 3, 8, 8))
    expect(
        not close(result, normalise(images, *downstream), 1e-3),
        "those are the downstream statistics; the encoder has only ever seen images normalised with the upstream ones",
    )
    unscaled = (images.float() - torch.tensor(upstream[0]).view(3, 1, 1)) / torch.tensor(upstream[1]).view(3, 1, 1)
    expect(
        not close(result, unscaled, 1e-2),
        "the images are still in 0 to 255, but mean and std are in 0 to 1; divide by 255 first",
    )
    expect(
        not close(result, images.float() / 255, 1e-3), "that only divides by 255; subtract the mean, divide by the std"
    )
    expect(
        close(result, normalise(images, *upstream), 1e-3),
        "these are not (x / 255 - mean) / std with upstream's numbers",
    )


def _tiny_vit(num_classes: int) -> ViTModel:
    model = ViTModel(num_classes, num_layers=1, image_size=8, patch_size=4, em_dim=16, num_heads=2, ff_dim=16, drop=0.0)
    with torch.no_grad():  # no tensor keeps its usual starting value, so that a fresh one can be told apart
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
