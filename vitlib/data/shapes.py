"""The course's embedded data sets, drawn by code from a seed: nothing to download or store.

``shapes100`` (upstream): 10 shapes x 10 colours on calm backgrounds; the class is shape and colour.
``shapes10`` (downstream): the same 10 shapes in any colour on busy backgrounds; the class is the shape alone.

The same seed gives the same bytes on every machine, so that a class can compare results. Floating point does not
promise that: compilers reorder operations, and maths libraries differ in the last bit, which can move an edge. So:

- everything is drawn in whole numbers (fixed point), in NumPy, which defines each integer operation exactly;
- every shape is rasterised once, into a stencil of 256 x 256 cells, by comparisons of whole numbers. An image
  looks its pixels up in the turned, scaled and shifted stencil;
- random numbers are raw 32-bit outputs of ``numpy.random.RandomState``, whose streams NumPy has frozen (NEP 19);
- every image takes one row of those numbers, so image i is the same picture however many are drawn.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

SIZE = 32  # pixels per side
_CHUNK = 200  # images drawn together: a multiple of 100, small enough for the arrays to stay in the cache
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent", "arrow", "drop")
# Brightness rises along the list, so that colour-blind readers can tell most pairs.
COLOURS = {
    "black": (22, 22, 26),
    "purple": (98, 24, 138),
    "blue": (34, 78, 214),
    "red": (206, 30, 34),
    "green": (30, 150, 60),
    "orange": (244, 128, 14),
    "cyan": (64, 200, 226),
    "pink": (250, 150, 196),
    "yellow": (250, 224, 40),
    "white": (248, 248, 246),
}
DEFAULT_COUNTS = {"shapes100": {"train": 10_000, "test": 2_000}, "shapes10": {"train": 2_000, "test": 2_000}}
CLASSES = {"shapes100": tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS), "shapes10": SHAPES}


class Shapes(NamedTuple):
    """Drawn images with their labels and the outline of the object in each."""

    images: torch.Tensor  # uint8 [N, 3, 32, 32], RGB
    labels: torch.Tensor  # int64 [N], an index into classes
    classes: tuple[str, ...]
    masks: torch.Tensor  # bool [N, 32, 32], True where the object covers most of the pixel


def draw_shapes(name: str, split: str = "train", count: int | None = None, seed: int = 0) -> Shapes:
    """Draw the first ``count`` images of the embedded data set ``name`` ("shapes100" or "shapes10").

    Classes are balanced (in every run of 100 or 10 images each occurs once) and shuffled. The splits "train" and
    "test" come from different random streams. ``count=None`` gives 10,000 and 2,000 images of shapes100, 2,000 and
    2,000 of shapes10. ``seed`` has 32 bits, from 0.

    Raises:
        KeyError, ValueError: for another name or split.
    """
    count = DEFAULT_COUNTS[name][split] if count is None else count
    draw = {"shapes100": _draw_calm, "shapes10": _draw_busy}[name]
    classes = CLASSES[name]
    random = np.random.RandomState([seed, len(classes), list(DEFAULT_COUNTS[name]).index(split)])
    images = np.empty((count, 3, SIZE, SIZE), np.uint8)
    labels = np.empty(count, np.int64)
    masks = np.empty((count, SIZE, SIZE), bool)
    for start in range(0, count, _CHUNK):
        chunk = slice(start, min(start + _CHUNK, count))
        wanted = chunk.stop - chunk.start
        rows = _Rows(random, _CHUNK)  # a whole chunk, or the last labels would depend on count
        chunk_labels = np.argsort(rows.bits(1).reshape(-1, len(classes)), axis=1, kind="stable").reshape(-1)
        chunk_images, coverage = draw(chunk_labels, rows)
        images[chunk], labels[chunk] = chunk_images[:wanted], chunk_labels[:wanted]
        masks[chunk] = coverage[:wanted] * 2 > _SAMPLES**2
    return Shapes(torch.from_numpy(images), torch.from_numpy(labels), classes, torch.from_numpy(masks))


# ---------- Random numbers ----------

_NUMBERS = 384  # random numbers set aside for each image


class _Rows:
    """One row of random 32-bit numbers per image, used up from left to right."""

    def __init__(self, random: np.random.RandomState, count: int):
        # The dtype is named because its default, and with it the stream, differs between operating systems.
        self.numbers = random.randint(0, 2**32, size=(count, _NUMBERS), dtype=np.uint32)
        self.used = 0

    def bits(self, columns: int) -> np.ndarray:
        """Return the next numbers as they are, uint32 [count, columns]."""
        self.used += columns
        assert self.used <= _NUMBERS
        return self.numbers[:, self.used - columns : self.used]

    def draw(self, low: int, high: int, columns: int = 1) -> np.ndarray:
        """Return whole numbers from low to high, both included; int32 [count, columns]."""
        span = np.uint32(high - low + 1)
        return ((self.bits(columns) >> np.uint32(16)) * span >> np.uint32(16)).astype(np.int32) + low


# ---------- Stencils ----------

_CELLS = 256
# Cell centres, in half cells, so that they are whole numbers symmetric about 0: -255, -253, ... 255. y points down.
_X, _Y = np.meshgrid(*[np.arange(1 - _CELLS, _CELLS, 2, dtype=np.int64)] * 2)


def _disc(radius: int, x: int = 0, y: int = 0) -> np.ndarray:
    return (_X - x) ** 2 + (_Y - y) ** 2 <= radius**2


def _polygon(*corners: tuple[int, int]) -> np.ndarray:
    """Return the cells from which a line to the right crosses the outline an odd number of times."""
    inside = np.zeros(_X.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        spans = (y0 <= _Y) != (y1 <= _Y)
        left_of_edge = ((x1 - x0) * (_Y - y0) > (_X - x0) * (y1 - y0)) == (y1 > y0)
        inside ^= spans & left_of_edge
    return inside


def _heart() -> np.ndarray:
    """Return the inside of the curve (x^2 + y^2 - 1)^3 = x^2 y^3 with y upwards, 195 half cells to the unit."""
    unit, up = 195, 20 - _Y
    return (_X**2 + up**2 - unit**2) ** 3 <= unit * _X**2 * up**3


# Each is symmetric left to right, so that a flipped image keeps its class.
_STENCILS = {
    "circle": _disc(215),
    "square": _polygon((-180, -180), (180, -180), (180, 180), (-180, 180)),
    "triangle": _polygon((0, -250), (217, 125), (-217, 125)),
    "star": _polygon(
        *((0, -252), (65, -89), (240, -78), (105, 34), (148, 204)),
        *((0, 110), (-148, 204), (-105, 34), (-240, -78), (-65, -89)),
    ),
    "cross": (np.minimum(abs(_X), abs(_Y)) <= 78) & (np.maximum(abs(_X), abs(_Y)) <= 238),
    "ring": _disc(230) & ~_disc(125),
    "heart": _heart(),
    "crescent": _disc(225, 0, 25) & ~_disc(185, 0, -75),
    "arrow": _polygon((0, -250), (195, -20), (78, -20), (78, 240), (-78, 240), (-78, -20), (-195, -20)),
    "drop": _disc(155, 0, 90) | _polygon((0, -252), (138, 19), (-138, 19)),
    "shard": _polygon((-230, -70), (40, -140), (240, 60), (-60, 130)),
}
_STENCIL = np.stack(list(_STENCILS.values())).astype(np.uint8)
# Neither the first nor the last row and column of a stencil is covered, so positions outside can be clipped to them.
_SHARD = len(SHAPES)

# ---------- Geometry ----------

_SAMPLES = 3  # samples per pixel and axis, against jagged edges
_UNIT = 2 * _SAMPLES  # positions are counted in sixths of a pixel: every sample then sits on a whole number
_TURN = 256  # angle steps in a full turn
_ONE = 1 << 14  # 1.0 in fixed point
# Rounding hides the last bits, in which maths libraries differ: no entry lies near a half.
_COS, _SIN = (
    np.array([round(_ONE * f(2 * math.pi * step / _TURN)) for step in range(_TURN)], np.int32)
    for f in (math.cos, math.sin)
)
_PIXELS = np.arange(SIZE, dtype=np.int32) * _UNIT


def _coverage(stencils, x, y, radius, angle) -> np.ndarray:
    """Count how many of each pixel's 9 samples the placed stencil covers; uint8 [n, 32, 32].

    stencils, x, y, radius, angle: int32 [n, 1]; x, y and radius in sixths of a pixel, angle in steps of 1/256 turn.
    """
    cos, sin = (table[angle % _TURN] * (_CELLS // 2) // radius for table in (_COS, _SIN))
    total = np.zeros((len(x), SIZE, SIZE), np.uint8)
    flat = _STENCIL.reshape(-1)
    offset = (stencils * _CELLS**2)[:, :, None]
    for sample in range(_SAMPLES**2):
        dx = _PIXELS + 2 * (sample % _SAMPLES) + 1 - x  # [n, 32]
        dy = _PIXELS + 2 * (sample // _SAMPLES) + 1 - y
        column = ((cos * dx)[:, None, :] + (sin * dy)[:, :, None]) // _ONE + _CELLS // 2
        row = ((cos * dy)[:, :, None] - (sin * dx)[:, None, :]) // _ONE + _CELLS // 2
        np.clip(column, 0, _CELLS - 1, out=column)
        np.clip(row, 0, _CELLS - 1, out=row)
        total += flat[offset + row * _CELLS + column]
    return total


def _ramp(angle, slope) -> np.ndarray:
    """Return a plane through the centre that rises by ``slope`` per pixel along ``angle``; int32 [n, 32, 32]."""
    centred = 2 * np.arange(SIZE, dtype=np.int32) - (SIZE - 1)
    cos, sin = (table[angle % _TURN] * slope // 2 for table in (_COS, _SIN))
    return ((cos * centred)[:, None, :] + (sin * centred)[:, :, None]) // _ONE


# ---------- The two data sets ----------


def _mix(first, second, weight, top) -> np.ndarray:
    """Blend colours [n, 3] or pictures [n, 3, 32, 32] by weight [n, 32, 32] from 0 (first) to top (second)."""
    first, second = (part if part.ndim == 4 else part[:, :, None, None] for part in (first, second))
    return first + (second - first) * weight[:, None].astype(np.int32) // top


def _place(stencils, rows, radii, turn) -> np.ndarray:
    """Put each stencil at a random place, wholly inside the picture, with a radius from ``radii`` in pixels."""
    radius = rows.draw(radii[0] * _UNIT, radii[1] * _UNIT)
    free = (SIZE - 2) * _UNIT - 2 * radius  # a pixel of background stays on every side
    x, y = (_UNIT + radius + rows.draw(0, 2**12) * free // 2**12 for _ in range(2))
    return _coverage(stencils, x, y, radius, rows.draw(-turn, turn))


def _grain(rows, amount) -> np.ndarray:
    """Draw film grain, the same in the three channels; int32 [n, 1, 32, 32] from -amount to amount."""
    numbers = np.ascontiguousarray(rows.bits(SIZE * SIZE // 4), dtype="<u4").view(np.uint8)
    return (numbers.reshape(-1, 1, SIZE, SIZE).astype(np.int32) - 128) * amount // 128


def _draw_calm(labels, rows):
    """Draw shapes100: a shape in one of ten colours on a soft, greyish slope."""
    palette = np.array(list(COLOURS.values()), np.int32)
    shape, colour = np.divmod(labels.astype(np.int32), len(COLOURS))
    grey = rows.draw(96, 168)
    ends = [grey + rows.draw(-36, 36, 3) for _ in range(2)]
    slope = np.clip(128 + _ramp(rows.draw(0, 255), 8), 0, 256)
    background = _mix(*ends, slope, 256)
    coverage = _place(shape[:, None], rows, (10, 14), 20)
    paint = palette[colour] + rows.draw(-20, 20, 3)
    images = _mix(background, paint, coverage, _SAMPLES**2) + _grain(rows, 12)
    return np.clip(images, 0, 255).astype(np.uint8), coverage


def _draw_busy(labels, rows):
    """Draw shapes10: a shape in any colour on stripes or checks, among splinters."""
    shape = labels.astype(np.int32)[:, None]
    base = rows.draw(32, 224) + rows.draw(-48, 48, 3)
    ends = [base + rows.draw(-44, 44, 3) for _ in range(2)]
    # Two crossed waves: stripes when one of them stands still, checks otherwise.
    angle, slope = rows.draw(0, 255), rows.draw(24, 64)
    waves = [abs(_ramp(angle + turn, slope) % 512 - 256) - 128 for turn in (0, 64)]
    stripes = rows.draw(0, 1)[:, :, None] == 0
    wave = np.where(stripes, waves[0], waves[0] * waves[1] // 64)
    background = _mix(*ends, np.clip(128 + 4 * wave, 0, 256), 256)
    for _ in range(3):
        splinter = _place(np.full_like(shape, _SHARD), rows, (3, 7), 128)
        background = _mix(background, base + rows.draw(-60, 60, 3), splinter, _SAMPLES**2)
    coverage = _place(shape, rows, (10, 14), 20)
    # Half-way round the scale from the background, so at least 128 - 32 away from it in each channel.
    paint = (base + 128) % 256 + rows.draw(-32, 32, 3)
    images = _mix(background, paint, coverage, _SAMPLES**2) + _grain(rows, 12)
    return np.clip(images, 0, 255).astype(np.uint8), coverage
