"""Check of chapter 00: orientation."""

from collections.abc import Callable

import torch

from .frame import compare, exercise, expect, tensor_answer


# a square first, so that fixed sizes get as far as a verdict on the numbers; then a picture wider than high
@exercise("model input", (32, 32, 3), (5, 7, 3), (9, 4, 1))
def model_input(learners: Callable, height: int, width: int, channels: int) -> None:
    """Check ``model_input(image)``: uint8 ``[H, W, C]``, as a file has it, to float32 ``[1, C, H, W]`` from 0 to 1."""
    image = torch.randint(0, 240, (height, width, channels), dtype=torch.uint8)
    given = tensor_answer(learners, image)
    numbers = str(given.dtype).removeprefix("torch.")
    expect(numbers == "float32", f"the numbers are {numbers}, but a model computes with float32; use .float()")
    shares = image.float() / 255
    right = torch.stack(shares.unbind(2))[None]
    slips = {
        "that is still the shape of the file; move the channels to the front, then add a batch dimension": shares,
        "the batch dimension is missing; one image is a batch of 1: [None] adds it": right[0],
        "the channels are last, as in the file; permute moves them to the front": shares[None],
        "the batch dimension is behind the channels; it comes first": right[0][:, None],
        "height and width are swapped, so the picture lies on its side; the order is C, height, width": right.mT,
        "the numbers still run from 0 to 255; divide by 255": 255 * right,
        "255 is the largest uint8, so divide by 255, not by 256": right * 255 / 256,
        "divide by 255 for every image, not by its largest number: a dark image must stay dark": right / right.max(),
        "reshape never moves a number, so the colours are mixed up; permute moves the channels": (
            shares.reshape(right.shape)
        ),
    }
    otherwise = "the shape is right, but a pixel is not where it was, or not what it was"
    compare(given, right, slips, otherwise, letters="[1, C, height, width]")
