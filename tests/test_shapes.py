"""The embedded data sets: the same bytes everywhere, balanced, varied, and true to their labels and masks."""

import hashlib
import itertools

import pytest
import torch

from vitlib.data import shapes
from vitlib.data.shapes import COLOURS, DEFAULT_COUNTS, SHAPES, draw_shapes

# SHA-256 over the bytes of images, labels and masks of the first 1,000 training images at seed 0. These hashes may
# change only when the pictures are meant to change: then every number printed in the notebooks changes too.
GOLDEN = {
    "shapes100": "90ea01476e80bfb061d33b628cc186094ca35f66f9a60c72d0c6122d0a97e1d7",
    "shapes10": "7e95e63e0f8ab9f4c7339a8ed74898f3039bafa927f4cf74ae91b8424e6ceeb7",
}


@pytest.fixture(scope="module", params=DEFAULT_COUNTS)
def drawn(request) -> shapes.Shapes:
    return draw_shapes(request.param, count=1000)


def test_same_seed_gives_the_published_bytes(drawn):
    digest = hashlib.sha256(drawn.images.numpy().tobytes())
    digest.update(drawn.labels.numpy().astype("<i8").tobytes())
    digest.update(drawn.masks.numpy().tobytes())
    assert digest.hexdigest() == GOLDEN["shapes100" if len(drawn.classes) == 100 else "shapes10"]


def test_image_does_not_depend_on_the_count():
    few, many = draw_shapes("shapes10", count=7), draw_shapes("shapes10", count=430)
    for part in ("images", "labels", "masks"):
        assert torch.equal(getattr(few, part), getattr(many, part)[:7])


def test_train_and_test_of_both_sets_at_two_seeds_share_no_picture():
    streams = itertools.product(DEFAULT_COUNTS, ("train", "test"), (250,), (0, 1))
    everything = [draw_shapes(*stream).masks for stream in streams]
    assert len(torch.unique(torch.cat(everything).flatten(1), dim=0)) == 2000


@pytest.mark.parametrize("name", DEFAULT_COUNTS)
def test_shapes_dtypes_and_counts_are_as_documented(name):
    drawn = draw_shapes(name, "test")
    assert drawn.images.shape == (2000, 3, 32, 32) and drawn.images.dtype == torch.uint8
    assert drawn.labels.shape == (2000,) and drawn.labels.dtype == torch.int64
    assert drawn.masks.shape == (2000, 32, 32) and drawn.masks.dtype == torch.bool
    assert torch.bincount(drawn.labels).tolist() == [2000 // len(drawn.classes)] * len(drawn.classes)


def test_the_object_has_the_colour_that_its_label_names():
    drawn = draw_shapes("shapes100", count=300)
    colours = torch.tensor(list(COLOURS.values())).float()
    for image, label, mask in zip(drawn.images.float(), drawn.labels, drawn.masks, strict=True):
        nearest = (colours - image[:, mask].mean(1)).norm(dim=1).argmin()
        assert drawn.classes[label].startswith(list(COLOURS)[nearest])


def test_the_mask_outlines_the_object(drawn):
    """Inside the mask the picture is one colour, and another one than just outside."""
    images, masks = drawn.images.float(), drawn.masks[:, None]
    assert masks.flatten(1).sum(1).min() >= 30 and masks.flatten(1).sum(1).max() <= 600
    inside = (images * masks).sum((2, 3)) / masks.sum((2, 3))
    spread = ((images - inside[:, :, None, None]).abs() * masks).sum((2, 3)) / masks.sum((2, 3))
    outside = (images * ~masks).sum((2, 3)) / (~masks).sum((2, 3))
    assert spread.max() < 30
    assert (inside - outside).abs().max(1).values.min() > 30


def test_shapes_have_their_own_outline():
    """Each stencil, unturned, differs from every other in at least a tenth of the cells that either covers."""
    stencils = torch.from_numpy(shapes._STENCIL[: len(SHAPES)]).bool()
    assert not (stencils[:, [0, -1]].any() or stencils[:, :, [0, -1]].any()), "a stencil touches its border"
    assert torch.equal(stencils, stencils.flip(2)), "a mirrored shape must stay in its class"
    for i in range(len(SHAPES)):
        for j in range(i):
            differs = (stencils[i] ^ stencils[j]).sum() / (stencils[i] | stencils[j]).sum()
            assert differs > 0.1, (SHAPES[i], SHAPES[j])


def test_objects_are_whole_and_vary_in_place_and_size(drawn):
    masks = drawn.masks.float()
    assert not (drawn.masks[:, [0, -1]].any() or drawn.masks[:, :, [0, -1]].any()), "cut off by the border"
    steps = torch.arange(32.0)
    centres = torch.stack([(masks.sum(d) * steps).sum(1) / masks.sum((1, 2)) for d in (1, 2)])
    assert (centres.std(1) > 1.5).all() and ((centres.mean(1) - 15.5).abs() < 1).all()
    assert drawn.masks.sum((1, 2)).float().std() > 30
