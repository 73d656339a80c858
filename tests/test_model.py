"""The model: its numbers against PyTorch's own transformer, its algebra, its parameter counts, its errors."""

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, refusal
from torch import nn

from vitlib.model import (
    PRESETS,
    DropPath,
    EncoderBlock,
    SelfAttention,
    ViTModel,
    count_parameters,
    create_model,
    patchify,
)


def tiny(num_classes=5, **changes) -> ViTModel:
    """A small model whose weights are large enough that a mistake anywhere shows in the logits."""
    model = ViTModel(num_classes, **{**TINY, "drop": 0.0, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def copy_block(block: EncoderBlock, layer: nn.TransformerEncoderLayer) -> None:
    """Copy the weights of PyTorch's encoder layer."""
    attention, theirs = block.attention, layer.self_attn
    attention.qkv.load_state_dict({"weight": theirs.in_proj_weight, "bias": theirs.in_proj_bias})
    attention.output.load_state_dict(theirs.out_proj.state_dict())
    block.mlp[0].load_state_dict(layer.linear1.state_dict())
    block.mlp[3].load_state_dict(layer.linear2.state_dict())
    block.norm1.load_state_dict(layer.norm1.state_dict())
    block.norm2.load_state_dict(layer.norm2.state_dict())


@pytest.mark.parametrize("norm_first", [True, False])
def test_block_equals_pytorch_layer_in_output_and_gradient(norm_first):
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    block = EncoderBlock(16, 4, 32, norm_first=norm_first)
    copy_block(block, layer)
    for norm in (block.norm1, block.norm2):
        norm.eps = layer.norm1.eps
    x = torch.randn(3, 5, 16)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    block(ours)[0].square().sum().backward()
    layer(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block(x)[0], layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_intermediates_are_as_documented_and_explicit_attention_equals_fused_attention(norm_first):
    model, images = tiny(norm_first=norm_first), torch.randn(3, 3, 8, 8)
    found = model.intermediates(images)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "embeddings": (3, 5, 16), "tokens": (2, 3, 5, 16), "attention": (2, 3, 2, 5, 5), "encoded": (3, 5, 16),
        "logits": (3, 5),
    }  # fmt: skip
    torch.testing.assert_close(found["attention"].sum(-1), torch.ones(2, 3, 2, 5))
    torch.testing.assert_close(found["logits"], model(images), rtol=0, atol=1e-5)


PARAMETERS = {
    ("mini", 100): 319_972,
    ("mini", 10): 311_242,
    ("small", 100): 3_218_020,
    ("small", 10): 3_194_890,
    ("Ti/16", 1000): 5_717_416,
    ("S/16", 1000): 22_050_664,
    ("B/32", 1000): 88_224_232,
    ("B/16", 1000): 86_567_656,
    ("L/16", 1000): 304_326_632,
    ("H/14", 1000): 632_045_800,
}


def test_presets_have_exactly_the_documented_parameters():
    with torch.device("meta"):
        assert {key: count_parameters(create_model(*key)) for key in PARAMETERS} == PARAMETERS
    assert {preset for preset, _ in PARAMETERS} == set(PRESETS)


def test_layers_are_initialised_by_xavier_and_lecun():
    model = create_model("small", 100)
    first, second = model.vit_encoder.encoder[:2]
    assert not torch.equal(first.mlp[0].weight, second.mlp[0].weight)
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_token", "position_embedding", "classifier.weight")):
            expected = 0.02
        elif parameter.ndim == 4:
            expected = (1 / parameter[0].numel()) ** 0.5
        elif parameter.ndim == 2:
            expected = (2 / sum(parameter.shape)) ** 0.5
        else:
            assert set(parameter.unique().tolist()) <= {0.0, 1.0}, name
            continue
        assert parameter.std().item() == pytest.approx(expected, rel=0.15), name


def test_drop_path_drops_whole_images():
    drop, x = DropPath(0.25), torch.rand(4000, 3, 2) + 0.5
    out = drop(x)
    kept, dropped = (out != 0).all((1, 2)), (out == 0).all((1, 2))
    assert (kept | dropped).all(), "an image is kept or dropped as a whole"
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(drop.eval()(x), x)


def test_drop_path_rises_evenly_from_zero():
    def probabilities(**changes):
        blocks = tiny(drop_path=0.3, **changes).vit_encoder.encoder
        return [[part.probability for part in block.modules() if isinstance(part, DropPath)] for block in blocks]

    assert probabilities(num_layers=4) == [[pytest.approx(p)] for p in (0, 0.1, 0.2, 0.3)]
    assert probabilities(num_layers=1) == [[0]]


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_dropped_branch_leaves_what_came_in(norm_first):
    """Attention and MLP are dropped independently, so both for about a quarter of the images."""
    block, x = EncoderBlock(16, 4, 32, norm_first=norm_first, drop_path=0.5).train(), torch.randn(400, 5, 16)
    with torch.no_grad():
        untouched = x if norm_first else block.norm2(block.norm1(x))
        same = (block(x)[0] - untouched).abs().amax((1, 2)) < 1e-5
    assert same.float().mean().item() == pytest.approx(0.25, abs=0.07)


def test_attention_in_bfloat16_on_a_cpu_is_written_out(monkeypatch):
    attention, x = SelfAttention(16, 4).eval(), torch.randn(2, 7, 16)
    fused, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a) or fused(*a, **k))
    with torch.no_grad():
        exact, _ = attention(x)
        assert len(calls) == 1
        with torch.autocast("cpu", torch.bfloat16):
            rounded, weights = attention(x)
            shown, shown_weights = attention(x, need_weights=True)
    assert len(calls) == 1 and weights is None and rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.02 * exact.abs().max().item())
    assert torch.equal(shown, rounded) and shown_weights.shape == (2, 4, 7, 7)


def test_dropout_of_attention_keeps_the_mean():
    attention, x = SelfAttention(16, 4, drop=0.5), torch.randn(1, 7, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = attention.eval()(x)[0]
        attention.train()
        mean = torch.stack([attention(x)[0].float() for _ in range(500)])
    assert (mean[0] - mean[1]).abs().max() > 0.01
    torch.testing.assert_close(mean.mean(0), expected.float(), rtol=0, atol=0.06)


def test_kept_patches_go_on_with_their_positions():
    model, images = tiny(), torch.randn(2, 3, 8, 8)
    kept = torch.tensor([[3, 0], [1, 2]])
    embedding = model.vit_encoder.embedding
    tokens = embedding(images)
    expected = torch.stack([tokens[0, [0, 4, 1]], tokens[1, [0, 2, 3]]])
    assert torch.equal(embedding(images, kept), expected)
    torch.testing.assert_close(model(images, torch.arange(4).expand(2, 4)), model(images))


def test_norm_eps_reaches_every_layer_norm():
    for eps, expected in ((1e-12, {1e-12}), (None, {1e-6})):
        assert {m.eps for m in tiny(norm_eps=eps).modules() if isinstance(m, nn.LayerNorm)} == expected
    post = tiny(norm_first=False)
    assert {post.vit_encoder.encoder[0].norm1.eps, post.vit_encoder.layernorm.eps} == {1e-5, 1e-6}


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: tiny(image_size=30), "image_size=30 is not a multiple of patch_size=4; choose"),
        (lambda: tiny(em_dim=17), "em_dim=17 is not a multiple of num_heads=2; choose"),
        (lambda: tiny(pooling="max"), "pooling='max' is not known; choose cls or mean"),
        (lambda: create_model("huge", 10), "preset='huge' is not known; choose one of mini, small, Ti/16.*H/14"),
        (lambda: patchify(torch.randn(1, 3, 8, 8), 3), "8x8 pixels cannot be cut into patches of 3; choose"),
        (lambda: tiny()(torch.randn(2, 3, 8, 4)), r"\[B, 3, 8, 8\], not \[2, 3, 8, 4\]; resize"),
        (lambda: tiny()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), "normalised images, not torch.uint8; call"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(call, words):
    assert re.search(words, refusal(call))
