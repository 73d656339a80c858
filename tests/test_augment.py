"""The augmentations against torchvision.transforms.v2 with the same drawn numbers, and the order of the pipeline."""

import pytest
import torch

from vitlib.augment import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    PUBLISHED,
    Augmentation,
    crop_and_flip,
    erase_hole,
    normalise,
)
from vitlib.compat import import_torchvision

BATCH = 16


@pytest.fixture(scope="module")
def v2():
    import_torchvision()
    from torchvision.transforms import v2

    return v2.functional


@pytest.fixture
def images():
    return torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_normalise_equals_torchvision(v2, images):
    expected = v2.normalize(v2.to_dtype(images, torch.float32, scale=True), CIFAR10_MEAN, CIFAR10_STD)
    torch.testing.assert_close(normalise(images, CIFAR10_MEAN, CIFAR10_STD), expected)


def test_crop_and_flip_equals_torchvision_with_the_same_numbers(v2, images):
    top, left = torch.randint(0, 9, (2, BATCH))
    flipped = torch.arange(BATCH) % 2 == 0
    ours = crop_and_flip(images, top, left, flipped, padding=4)
    for image, row, column, flip, result in zip(images, top, left, flipped, ours, strict=True):
        padded = v2.pad(image, [4, 4, 4, 4], padding_mode="reflect")
        expected = v2.crop(padded, row.item(), column.item(), 32, 32)
        assert torch.equal(result, v2.horizontal_flip(expected) if flip else expected)


def test_erase_hole_equals_torchvision_with_the_same_numbers(v2, images):
    x = normalise(images, CIFAR10_MEAN, CIFAR10_STD)
    top, left = torch.randint(0, 25, (2, BATCH))
    ours = erase_hole(x, top, left, size=8)
    for image, row, column, result in zip(x, top, left, ours, strict=True):
        assert torch.equal(result, v2.erase(image, row.item(), column.item(), 8, 8, torch.zeros(3, 8, 8)))


def test_published_pipeline_equals_its_steps_in_the_published_order(v2, images):
    """Normalise, pad to 40 by reflection, crop 32, flip, one 8x8 hole of 0, with the numbers the generator gives."""
    ours = PUBLISHED(images, CIFAR10_MEAN, CIFAR10_STD, seeded())
    generator = seeded()
    flipped = torch.rand(BATCH, generator=generator) < 0.5
    top, left = (torch.randint(9, (BATCH,), generator=generator) for _ in range(2))
    hole_top, hole_left = (torch.randint(25, (BATCH,), generator=generator) for _ in range(2))
    for i in range(BATCH):
        x = v2.normalize(v2.to_dtype(images[i], torch.float32, scale=True), CIFAR10_MEAN, CIFAR10_STD)
        x = v2.crop(v2.pad(x, [4] * 4, padding_mode="reflect"), top[i].item(), left[i].item(), 32, 32)
        x = v2.horizontal_flip(x) if flipped[i] else x
        x = v2.erase(x, hole_top[i].item(), hole_left[i].item(), 8, 8, torch.zeros(3, 8, 8))
        torch.testing.assert_close(ours[i], x)


def test_published_constants_are_the_documented_ones():
    assert (PUBLISHED.padding, PUBLISHED.flip, PUBLISHED.hole) == (4, 0.5, 8)
    assert CIFAR10_MEAN == (0.4914, 0.4822, 0.4465) and CIFAR10_STD == (0.2471, 0.2435, 0.2616)


def test_every_image_gets_its_own_numbers():
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    augmented = PUBLISHED(image.expand(64, -1, -1, -1), CIFAR10_MEAN, CIFAR10_STD, seeded())
    assert len(augmented.flatten(1).unique(dim=0)) > 60


def test_same_seed_same_images_and_another_seed_others(images):
    first, again, other = (PUBLISHED(images, CIFAR10_MEAN, CIFAR10_STD, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_exactly_one_whole_hole_in_every_image():
    white = torch.full((256, 3, 32, 32), 255, dtype=torch.uint8)
    augmented = PUBLISHED(white, CIFAR10_MEAN, CIFAR10_STD, seeded())
    assert torch.equal((augmented == 0).sum((1, 2, 3)), torch.full((256,), 3 * 64))


def test_every_window_corner_is_drawn_and_half_of_the_images_are_flipped():
    """In an image that counts its columns, the middle of a crop says where it was cut and whether it was flipped."""
    columns = torch.arange(32, dtype=torch.uint8).expand(4000, 1, 32, 32)
    cropped = Augmentation(4, 0.5, 0)(columns, (0.0,), (1 / 255,), seeded()).round()
    first, middle = cropped[:, 0, 0, 15], cropped[:, 0, 0, 16]
    assert (first > middle).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert set((first - 15)[first < middle].int().tolist()) == set(range(-4, 5))


def test_no_augmentation_is_normalisation_alone(images):
    plain = Augmentation(padding=0, flip=0.0, hole=0)(images, CIFAR10_MEAN, CIFAR10_STD, seeded())
    assert torch.equal(plain, normalise(images, CIFAR10_MEAN, CIFAR10_STD))


def test_impossible_settings_give_one_sentence(images):
    with pytest.raises(ValueError, match="padding=32.*less than 32"):
        Augmentation(padding=32)(images, CIFAR10_MEAN, CIFAR10_STD, seeded())
    with pytest.raises(ValueError, match="hole=33.*at most 32"):
        Augmentation(hole=33)(images, CIFAR10_MEAN, CIFAR10_STD, seeded())
    with pytest.raises(ValueError, match="1 channels.*3 means"):
        normalise(images[:, :1], CIFAR10_MEAN, CIFAR10_STD)
