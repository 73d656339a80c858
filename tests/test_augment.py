"""The augmentations against torchvision.transforms.v2 with the same drawn numbers, and the order of the pipeline."""

import math

import pytest
import torch
from conftest import refusal

from vitlib.data.augment import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    PUBLISHED,
    Augmentation,
    crop_and_flip,
    in_rectangle,
    normalise,
)
from vitlib.data.randaugment import (
    MAGNITUDES,
    Operation,
    draw_operations,
    operation_strengths,
    randaugment,
    source_matrices,
)
from vitlib.utils import import_torchvision

import_torchvision()

from torchvision.transforms.v2 import RandAugment  # noqa: E402
from torchvision.transforms.v2 import functional as v2  # noqa: E402

BATCH = 16
CIFAR10 = CIFAR10_MEAN, CIFAR10_STD
STRONG = Augmentation(padding=4, flip=0.5, cutout=8, randaugment=2, erase=0.5, mixing=0.5)
CUT_OFF = {Operation.BRIGHTNESS, Operation.COLOR, Operation.CONTRAST, Operation.SHARPNESS}  # fractions are cut off


@pytest.fixture
def images():
    return torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_published_pipeline_equals_its_steps_in_the_published_order(images):
    """Normalise, pad to 40 by reflection, crop 32, flip, one 8x8 hole of 0, with the numbers the generator gives."""
    ours = PUBLISHED(images, *CIFAR10, seeded())
    generator = seeded()
    flipped = torch.rand(BATCH, generator=generator) < 0.5
    numbers = [torch.randint(end, (BATCH,), generator=generator).tolist() for end in (9, 9, 25, 25)]
    for i, (top, left, hole_top, hole_left) in enumerate(zip(*numbers, strict=True)):
        x = v2.normalize(v2.to_dtype(images[i], torch.float32, scale=True), *CIFAR10)
        x = v2.crop(v2.pad(x, [4] * 4, padding_mode="reflect"), top, left, 32, 32)
        x = v2.horizontal_flip(x) if flipped[i] else x
        torch.testing.assert_close(ours[i], v2.erase(x, hole_top, hole_left, 8, 8, torch.zeros(3, 8, 8)))


def torchvision_operation(image, operation, strength):
    """One operation as torchvision.transforms.v2.RandAugment calls it."""

    def affine(translate=(0, 0), shear=(0.0, 0.0), center=None):
        degrees = [math.degrees(math.atan(number)) for number in shear]
        return v2.affine(image, angle=0.0, translate=list(translate), scale=1.0, shear=degrees, center=center)

    return {
        Operation.IDENTITY: lambda: image,
        Operation.SHEAR_X: lambda: affine(shear=(strength, 0.0), center=[0, 0]),
        Operation.SHEAR_Y: lambda: affine(shear=(0.0, strength), center=[0, 0]),
        Operation.TRANSLATE_X: lambda: affine(translate=(int(strength), 0)),
        Operation.TRANSLATE_Y: lambda: affine(translate=(0, int(strength))),
        Operation.ROTATE: lambda: v2.rotate(image, strength),
        Operation.BRIGHTNESS: lambda: v2.adjust_brightness(image, 1 + strength),
        Operation.COLOR: lambda: v2.adjust_saturation(image, 1 + strength),
        Operation.CONTRAST: lambda: v2.adjust_contrast(image, 1 + strength),
        Operation.SHARPNESS: lambda: v2.adjust_sharpness(image, 1 + strength),
        Operation.POSTERIZE: lambda: v2.posterize(image, int(strength)),
        Operation.SOLARIZE: lambda: v2.solarize(image, strength),
        Operation.AUTO_CONTRAST: lambda: v2.autocontrast(image),
        Operation.EQUALIZE: lambda: v2.equalize(image),
    }[operation]()


def between_pixels(operation, strengths, height, width):
    """Whether a pixel comes from an edge between two: which of them is the nearest, the processor's rounding decides.
    bool [B, 1, H, W]."""
    matrices = source_matrices(operation, strengths.double(), height, width)
    x, y = torch.arange(width) - (width - 1) / 2, torch.arange(height) - (height - 1) / 2
    places = torch.stack((*torch.meshgrid(x, y, indexing="xy"), torch.ones(height, width)))
    places = torch.einsum("bij,jhw->bihw", matrices, places.double()) + torch.tensor([width, height])[:, None, None] / 2
    return ((places - places.round()).abs() < 1e-4).any(1, keepdim=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_equals_torchvision_with_the_same_numbers(channels):
    """One batch of all operations at every magnitude with both signs, on images of noise, of few levels, and of one."""
    height, width = 20, 24
    operation = torch.arange(len(Operation)).repeat(2 * MAGNITUDES)
    strengths = torch.stack([operation_strengths(magnitude, height, width) for magnitude in range(MAGNITUDES)])
    signs = torch.where(torch.arange(len(Operation)) <= Operation.SHARPNESS, -1, 1)
    strengths = torch.cat([strengths, signs * strengths]).flatten()
    images = torch.randint(0, 256, (len(operation), channels, height, width), dtype=torch.uint8)
    images[::5] = images[::5] // 64 * 37 + 20
    images[::9] = images[::9, :, :1, :1]
    ours = randaugment(images, operation, strengths)
    numbers = zip(images, operation.tolist(), strengths.tolist(), strict=True)
    theirs = torch.stack([torchvision_operation(*each) for each in numbers])
    assert ours.dtype == torch.uint8
    difference = (ours.int() - theirs.int()).abs()
    decided = ~between_pixels(operation, strengths, height, width) * difference
    for one in Operation:
        assert (difference[operation == one] > 0).float().mean() < 0.01, one.name
        assert decided[operation == one].max() <= (1 if one in CUT_OFF else 0), one.name


def test_randaugment_has_the_operations_and_strengths_of_torchvision():
    space = RandAugment._AUGMENTATION_SPACE  # magnitudes and whether they are signed; there is no public list
    assert [name.lower() for name in space] == [operation.name.replace("_", "").lower() for operation in Operation]
    assert [signed for _, signed in space.values()] == [0 < operation <= Operation.SHARPNESS for operation in Operation]
    for magnitude in range(MAGNITUDES):
        ours = operation_strengths(magnitude, 32, 48).tolist()
        for operation, (magnitudes, _) in zip(Operation, space.values(), strict=True):
            levels = magnitudes(MAGNITUDES, 32, 48)
            theirs = 0.0 if levels is None else levels[magnitude].item()
            theirs = int(theirs) if operation in (Operation.TRANSLATE_X, Operation.TRANSLATE_Y) else theirs
            theirs = theirs * 255 if operation == Operation.SOLARIZE else theirs
            assert ours[operation] == pytest.approx(theirs, rel=1e-7)


def test_operations_are_drawn_equally_often_and_half_of_the_signed_ones_are_negative():
    operation, strength = draw_operations(7000, 2, 9, 32, 32, seeded())
    assert operation.shape == strength.shape == (7000, 2)
    assert (operation.flatten().bincount() / 1000).tolist() == pytest.approx([1] * 14, abs=0.15)
    assert torch.equal(strength.abs(), operation_strengths(9, 32, 32)[operation])
    signed = (operation > 0) & (operation <= Operation.SHARPNESS)
    assert (strength[signed] < 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (strength[~signed] >= 0).all()


def test_numbers_come_from_the_generator_alone_and_those_of_older_options_stay_as_they_are():
    before = torch.get_rng_state()
    strong, published = (augmentation.draw(50, 32, 32, seeded()) for augmentation in (STRONG, PUBLISHED))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again = STRONG.draw(50, 32, 32, seeded())
    assert list(strong)[:4] == list(published) == ["flipped", "top", "left", "cutout"]
    for name, numbers in strong.items():
        assert len(numbers) == 50 and torch.equal(again[name], numbers), name
        assert torch.equal(published.get(name, numbers), numbers), name


def test_strong_pipeline_equals_its_steps_in_their_order(images):
    drawn = STRONG.draw(BATCH, 32, 32, seeded())
    x = crop_and_flip(images, drawn["top"], drawn["left"], drawn["flipped"], padding=4)
    for step in range(2):
        x = randaugment(x, drawn["operation"][:, step], drawn["strength"][:, step])
    x = normalise(x, *CIFAR10)
    x = x.masked_fill(in_rectangle(x, drawn["cutout"]) | in_rectangle(x, drawn["erase"]), 0)
    assert torch.equal(STRONG.apply(images, drawn, *CIFAR10), x)
    assert torch.equal(STRONG(images, *CIFAR10, seeded()), x)


def test_apply_and_mix_never_ask_the_device_for_a_value(images):
    """Tensors on the meta device have no values: to read one, or to branch on one, raises."""
    drawn = {name: numbers.to("meta") for name, numbers in STRONG.draw(BATCH, 32, 32, seeded()).items()}
    augmented = STRONG.apply(images.to("meta"), drawn, *CIFAR10)
    mixed, kept = STRONG.mix(augmented, drawn)
    assert mixed.shape == images.shape and kept.shape == (BATCH,)


def test_random_erasing_draws_areas_and_shapes_from_the_whole_range():
    drawn = Augmentation(padding=0, flip=0, cutout=0, erase=0.25).draw(20_000, 300, 300, seeded())
    top, _, height, width = drawn["erase"].double().unbind(1)
    erased = height > 0
    assert torch.equal(erased, width > 0)
    assert erased.double().mean().item() == pytest.approx(0.25, abs=0.01)
    area, ratio = (height * width)[erased] / 300**2, (height / width)[erased]
    assert area.min().item() == pytest.approx(0.02, abs=0.002) and area.max().item() == pytest.approx(0.33, abs=0.005)
    assert area.mean().item() == pytest.approx(0.175, abs=0.005)  # uniform
    assert ratio.min().item() == pytest.approx(0.3, abs=0.01) and ratio.max().item() == pytest.approx(3.3, abs=0.1)
    assert ratio.log().mean().item() == pytest.approx((math.log(0.3) + math.log(3.3)) / 2, abs=0.03)  # log-uniform
    assert (top + height <= 300).all() and (top >= 0).all()
    assert (top == 300 - height)[erased].any() and (top == 0)[erased].any()


def test_mixup_and_cutmix_take_their_share_of_the_neighbour():
    x = torch.arange(1.0, 6.0)[:, None, None, None].expand(5, 3, 8, 10)
    share = torch.tensor([0.25, 1.0, 1.0, 1.0, 0.5])
    cut = torch.zeros(5, 4, dtype=torch.int64)
    cut[2] = torch.tensor([-1, 7, 4, 6])  # 3 rows and 3 columns are inside
    mixed, kept = STRONG.mix(x, {"mix_share": share, "cut": cut})
    assert torch.equal(mixed[0], 0.25 * x[0] + 0.75 * x[1]) and torch.equal(mixed[1], x[1])
    expected = x[2].clone()
    expected[:, :3, 7:] = 4.0
    assert torch.equal(mixed[2:], torch.stack([expected, x[3], x[4]]))  # the last has no partner
    assert kept.tolist() == pytest.approx([0.25, 1.0, 1 - 9 / 80, 1.0, 1.0])


def test_mixing_draws_shares_from_the_beta_distributions():
    count = 20_000
    drawn = Augmentation(mixing=0.5).draw(count, 400, 400, seeded())
    top, _, height, width = drawn["cut"].unbind(1)
    mixup, cutmix = drawn["mix_share"] < 1, height > 0
    assert not (mixup & cutmix).any()
    assert [kind.float().mean().item() for kind in (mixup, cutmix)] == pytest.approx([0.25] * 2, abs=0.015)
    area = (height * width)[cutmix] / 400**2
    for shares, alpha in ((drawn["mix_share"][mixup], 0.8), (area, 1.0)):
        assert shares.mean().item() == pytest.approx(0.5, abs=0.02)
        assert shares.var().item() == pytest.approx(1 / (8 * alpha + 4), abs=0.005)
    centre = (top + height // 2)[cutmix]
    assert 0 <= centre.min() < 5 and 395 < centre.max() < 400


def test_impossible_settings_give_one_sentence(images):
    for name, value, words in (("padding", 32, "less than 32."), ("cutout", 33, "at most 32.")):
        said = refusal(Augmentation(**{name: value}), images, *CIFAR10, seeded())
        assert said.startswith(f"{name}={value} ") and said.endswith(f"; it must be {words}")
    assert "do not go with images of 1 channels" in refusal(normalise, images[:, :1], *CIFAR10)
    assert "images are torch.float32, but must be uint8" in refusal(normalise, images.float(), *CIFAR10)
