"""What vitlib.explain says about positions and attention."""

import pytest
import torch

from vitlib.explain import position_similarity, query_attention


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


@pytest.mark.parametrize("query", [-1, 10])
def test_query_attention_refuses_what_is_not_a_token_and_says_what_is(query):
    with pytest.raises(ValueError, match=rf"query={query} is not a token; choose 0 \(CLS\) to 9"):
        query_attention(torch.eye(10), query)


@pytest.mark.parametrize("query", [0, 9])
def test_query_attention_takes_the_first_and_the_last_token(query):
    query_attention(torch.eye(10), query)
