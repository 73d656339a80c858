"""What vitlib.explain says about attention."""

import math

import pytest
import torch

from vitlib import explain
from vitlib.model import ViTModel


@pytest.fixture
def model():
    """A ViT for images of 8 x 8 pixels, cut into 16 patches, whose weights are large enough for lively attention."""
    small = {"num_layers": 3, "image_size": 8, "patch_size": 2, "em_dim": 16, "num_heads": 2, "ff_dim": 16}
    model = ViTModel(5, **small).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


@pytest.mark.parametrize("count", [-1, 10])
def test_a_count_that_would_silently_delete_others_is_refused(count):
    with pytest.raises(ValueError, match=f"count={count} is not possible with 9 patches"):
        explain.delete_patches(torch.zeros(1, 3, 6, 6), torch.rand(1, 9), count)


def test_attention_of_is_the_models_attention_however_it_is_cut_into_batches(model, monkeypatch):
    monkeypatch.setattr(explain, "BATCH", 3)
    images = torch.randn(7, 3, 8, 8)
    attention = explain.attention_of(model, images)
    assert not attention.requires_grad
    torch.testing.assert_close(attention, model.intermediates(images)["attention"], rtol=0, atol=1e-5)


def test_a_deletion_curve_starts_at_the_models_own_confidence_and_ends_at_the_empty_image(model):
    images = torch.randn(4, 3, 8, 8)
    curve = explain.deletion_curve(model, images, torch.rand(4, 16), [0, 5, 16])
    probabilities = model(images).softmax(1)
    predicted = probabilities.argmax(1)
    assert curve.shape == (3, 4) and not curve.requires_grad
    assert torch.allclose(curve[0], probabilities.max(1).values)
    empty = model(torch.zeros(1, 3, 8, 8)).softmax(1)[0]
    assert torch.allclose(curve[2], empty[predicted], atol=1e-6)


def test_patch_relevance_reads_the_row_that_the_classifier_sees():
    matrix = torch.rand(2, 5, 5)
    assert torch.equal(explain.patch_relevance(matrix), matrix[:, 0, 1:])
    assert torch.allclose(explain.patch_relevance(matrix, "mean"), matrix[:, 1:, 1:].mean(1))


def test_gradient_relevance_is_the_gradient_of_the_predicted_class_times_the_input(model, monkeypatch):
    monkeypatch.setattr(explain, "BATCH", 2)
    images = torch.randn(5, 3, 8, 8)
    relevance = explain.gradient_relevance(model, images)
    one = images[3:4].clone().requires_grad_()
    logits = model(one)[0]
    logits[logits.argmax()].backward()
    by_hand = (one.grad * images[3:4]).abs()[0, :, 2:4, 4:6].sum()  # patch 1 * 4 + 2 = 6
    assert relevance.shape == (5, 16) and relevance[3, 6].item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_contrast_relevance_finds_the_patch_that_differs():
    images = torch.full((2, 3, 6, 6), 0.3)
    images[0, 1, 2:4, 4:6] += 2  # patch 1 * 3 + 2 = 5, in four pixels of one colour
    relevance = explain.contrast_relevance(images, 2)
    assert relevance[0, 5] == 16 and relevance.sum() == 16


def test_middle_relevance_falls_from_the_middle_to_the_corners():
    relevance = explain.middle_relevance(torch.randn(2, 3, 12, 12), 4)
    corner, edge, middle = 0, math.sqrt(2) - 1, math.sqrt(2)
    by_hand = torch.tensor([corner, edge, corner, edge, middle, edge, corner, edge, corner])
    assert torch.allclose(relevance, by_hand.expand(2, -1))
