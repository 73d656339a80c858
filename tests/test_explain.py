"""What vitlib.explain says about positions and attention."""

import math

import pytest
import torch
import torch.nn.functional as F

from vitlib import explain
from vitlib.data.shapes import draw_shapes
from vitlib.explain import position_similarity, query_attention, with_temperature
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


def random_attention(*shape):
    return torch.randn(shape).softmax(dim=-1)


def test_position_similarity_is_the_cosine_of_each_pair_of_patches():
    positions = torch.randn(1, 10, 7)
    similarity = position_similarity(positions)
    assert similarity.shape == (3, 3, 3, 3)
    first, second = positions[0, 1 + 2 * 3 + 1], positions[0, 1 + 0 * 3 + 2]  # rows 2 and 0, columns 1 and 2
    cosine = first @ second / (first.norm() * second.norm())
    assert similarity[2, 1, 0, 2].item() == pytest.approx(cosine.item(), abs=1e-6)
    assert torch.allclose(similarity.flatten(0, 1).flatten(1), similarity.flatten(0, 1).flatten(1).T)


def test_position_similarity_of_a_patch_with_itself_is_one_whatever_its_length():
    similarity = position_similarity(100 * torch.randn(1, 17, 8)).flatten(0, 1).flatten(1)
    assert torch.allclose(similarity.diagonal(), torch.ones(16))


def test_position_similarity_does_not_depend_on_cls():
    positions = torch.randn(1, 10, 7)
    changed = positions.clone()
    changed[:, 0] += 5
    assert torch.equal(position_similarity(positions), position_similarity(changed))


def test_position_similarity_carries_no_gradient():
    assert not position_similarity(torch.randn(1, 5, 3, requires_grad=True)).requires_grad


def test_query_attention_lays_the_row_of_the_query_out_as_the_image_is():
    weights = torch.randn(10, 10).softmax(dim=-1)
    cls_share, shares = query_attention(weights, 4)
    assert cls_share == weights[4, 0].item()
    assert shares.shape == (3, 3)
    for row in range(3):
        for column in range(3):
            assert shares[row, column] == weights[4, 1 + row * 3 + column]


def test_query_attention_keeps_the_whole_of_the_row():
    cls_share, shares = query_attention(torch.randn(17, 17).softmax(dim=-1), 0)
    assert cls_share + shares.sum().item() == pytest.approx(1, abs=1e-6)


def test_query_attention_carries_no_gradient():
    _, shares = query_attention(torch.randn(5, 5, requires_grad=True), 1)
    assert not shares.requires_grad


def test_a_query_that_is_not_a_token_is_refused():
    for query in (-1, 10):
        with pytest.raises(ValueError, match=rf"query={query} is not a token; choose one from 0 \(CLS\) to 9"):
            query_attention(torch.eye(10), query)


@pytest.mark.parametrize("temperature", [0.25, 0.5, 1, 2, 4])
def test_with_temperature_is_the_softmax_of_the_divided_scores(temperature):
    scores = 3 * torch.randn(2, 4, 17, 17)
    given = with_temperature(scores.softmax(dim=-1), temperature)
    assert torch.allclose(given, (scores / temperature).softmax(dim=-1), atol=1e-6)


def test_temperature_1_changes_nothing():
    weights = torch.randn(5, 17).softmax(dim=-1)
    assert torch.allclose(with_temperature(weights, 1), weights, atol=1e-6)


def test_a_small_temperature_leaves_all_to_the_largest_share_and_a_large_one_makes_all_alike():
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    assert torch.allclose(with_temperature(weights, 0.01), torch.tensor([[0.0, 1, 0], [0, 0, 1]]), atol=1e-6)
    assert torch.allclose(with_temperature(weights, 1e6), torch.full((2, 3), 1 / 3), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.25, 1, 4])
def test_a_share_of_zero_stays_zero_at_any_temperature(temperature):
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.4, 0.0, 0.6]])  # as behind a mask
    given = with_temperature(weights, temperature)
    assert torch.equal(given == 0, weights == 0)
    assert torch.allclose(given.sum(dim=-1), torch.ones(2))


@pytest.mark.parametrize("temperature", [0, -1, math.nan])
def test_a_temperature_has_to_be_above_zero(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature} is not above 0"):
        with_temperature(torch.eye(3), temperature)


def test_attention_of_is_the_models_attention_however_it_is_cut_into_batches(model):
    images = torch.randn(7, 3, 8, 8)
    attention = explain.attention_of(model, images, batch=3)
    assert attention.shape == (3, 7, 2, 17, 17) and not attention.requires_grad
    assert torch.allclose(attention, model.intermediates(images)["attention"], atol=1e-5)
    assert torch.allclose(attention.sum(-1), torch.ones(3, 7, 2, 17))


def test_attention_distance_by_hand():
    # four patches of 2 pixels in a 2 x 2 grid; CLS takes half of every row, which must not matter
    attention = torch.zeros(1, 1, 2, 5, 5)
    attention[..., 0] = 0.5
    for query in range(1, 5):
        attention[0, 0, 0, query, query] = 0.5  # head 0 looks at itself
        attention[0, 0, 1, query, 5 - query] = 0.5  # head 1 looks at the opposite corner
    distance = explain.attention_distance(attention, patch_size=2)
    assert distance.shape == (1, 2)
    assert distance[0].tolist() == pytest.approx([0, 2 * math.sqrt(2)])


def test_attention_distance_of_even_attention_is_the_mean_distance_of_patches():
    even = torch.full((2, 3, 4, 17, 17), 1 / 17)
    by_hand = [math.dist((a // 4, a % 4), (b // 4, b % 4)) for a in range(16) for b in range(16)]
    assert torch.allclose(explain.attention_distance(even, 5), torch.tensor(5 * sum(by_hand) / 256))


def test_rollout_multiplies_half_residual_half_attention_layer_by_layer():
    attention = random_attention(2, 1, 3, 4, 4)
    first, second = ((attention[layer, 0].mean(0) + torch.eye(4)) / 2 for layer in (0, 1))
    assert torch.allclose(explain.rollout(attention)[0], second @ first, atol=1e-6)


def test_rows_of_a_rollout_sum_to_one():
    assert torch.allclose(explain.rollout(random_attention(6, 3, 2, 10, 10)).sum(-1), torch.ones(3, 10))


def test_rollout_through_layers_that_look_at_themselves_changes_nothing():
    attention = torch.eye(5).expand(4, 2, 3, 5, 5)
    assert torch.equal(explain.rollout(attention), torch.eye(5).expand(2, 5, 5))


def test_the_most_relevant_patches_are_deleted_and_no_others():
    images = torch.randn(2, 3, 6, 6)
    relevance = torch.tensor([[9.0, 1, 2, 3, 8, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8]])  # 3 x 3 patches
    deleted = explain.delete_patches(images, relevance, 2)
    right = images.clone()
    right[0, :, 0:2, 0:2] = 0  # patch 0
    right[0, :, 2:4, 2:4] = 0  # patch 4
    right[1, :, 4:6, 2:6] = 0  # patches 7 and 8
    assert torch.equal(deleted, right)
    assert torch.equal(explain.delete_patches(images, relevance, 0), images)
    assert not explain.delete_patches(images, relevance, 9).any()


def test_impossible_deletions_are_refused():
    for count in (-1, 10):
        with pytest.raises(ValueError, match=f"count={count} is not possible with 9 patches"):
            explain.delete_patches(torch.zeros(1, 3, 6, 6), torch.rand(1, 9), count)


def test_a_deletion_curve_starts_at_the_models_own_confidence_and_ends_at_the_empty_image(model):
    images = torch.randn(4, 3, 8, 8)
    curve = explain.deletion_curve(model, images, torch.rand(4, 16), [0, 5, 16])
    probabilities = model(images).softmax(1)
    predicted = probabilities.argmax(1)
    assert curve.shape == (3, 4) and not curve.requires_grad
    assert torch.allclose(curve[0], probabilities.max(1).values)
    empty = model(torch.zeros(1, 3, 8, 8)).softmax(1)[0]
    assert torch.allclose(curve[2], empty[predicted], atol=1e-6)


def test_what_a_model_looks_at_alone_is_found_by_deletion():
    """A model that reads one patch only: deleting that patch first takes everything, deleting it last nothing."""

    class OnePatch(torch.nn.Module):
        def forward(self, images):
            seen = images[:, 0, 2:4, 4:6].mean((1, 2))  # patch 1 * 4 + 2 = 6
            return torch.stack([5 * seen, -5 * seen], dim=1)

    images = torch.rand(3, 3, 8, 8) + 0.5
    knows = F.one_hot(torch.tensor([6, 6, 6]), 16).float()
    right, wrong = (explain.deletion_curve(OnePatch(), images, order, [0, 1, 15]) for order in (knows, -knows))
    assert torch.allclose(right[1:], torch.tensor(0.5)) and right[0].min() > 0.99
    assert torch.equal(wrong[0], wrong[1]) and torch.equal(wrong[0], wrong[2])


def test_the_share_on_the_mask_counts_a_half_covered_patch_half():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[:, :, 0] = True  # half of the two patches on the left
    masks[:, 0:2, 2:4] = True  # all of the upper right patch
    relevance = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.0, 3.0, 1.0, 0.0]])  # need not sum to 1
    assert explain.share_on_mask(relevance, masks).tolist() == pytest.approx([0.5, 0.875])


def test_even_relevance_has_the_share_of_the_image_that_the_object_covers():
    masks = draw_shapes("shapes100", count=8).masks
    assert torch.allclose(explain.share_on_mask(torch.ones(8, 64), masks), masks.float().mean((1, 2)))


def test_patch_relevance_reads_the_row_that_the_classifier_sees():
    matrix = random_attention(2, 5, 5)
    assert torch.equal(explain.patch_relevance(matrix), matrix[:, 0, 1:])
    assert torch.allclose(explain.patch_relevance(matrix, "mean"), matrix[:, 1:, 1:].mean(1))


def test_gradient_relevance_is_the_gradient_of_one_class_times_the_input(model):
    images, classes = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4])
    relevance = explain.gradient_relevance(model, images, classes, batch=2)
    one = images[3:4].clone().requires_grad_()
    model(one)[0, 3].backward()
    by_hand = (one.grad * images[3:4]).abs()[0, :, 2:4, 4:6].sum()  # patch 1 * 4 + 2 = 6
    assert relevance.shape == (5, 16) and relevance[3, 6].item() == pytest.approx(by_hand.item(), rel=1e-4)
    predicted = model(images).argmax(1)
    own = explain.gradient_relevance(model, images)
    assert torch.allclose(own, explain.gradient_relevance(model, images, predicted))
    assert not torch.allclose(own, explain.gradient_relevance(model, images, (predicted + 1) % 5)), "of one class"


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


def test_the_drawn_shapes_are_found_without_any_model():
    shapes = draw_shapes("shapes100", count=40)
    relevance = explain.contrast_relevance(shapes.images / 255, 4)
    assert explain.share_on_mask(relevance, shapes.masks).mean() > 2 * shapes.masks.float().mean()
