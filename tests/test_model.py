"""The model: its numbers against PyTorch's own transformer, its algebra, its parameter counts, its errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitlib.model import (
    PRESETS,
    DropPath,
    EncoderBlock,
    SelfAttention,
    ViTEmbeddings,
    ViTModel,
    count_parameters,
    create_model,
    interpolate_positions,
    patchify,
    unpatchify,
)

TINY = {"num_layers": 2, "image_size": 8, "patch_size": 4, "em_dim": 16, "num_heads": 4, "ff_dim": 32}
PUBLISHED = {"image_size": 32, "patch_size": 4, "num_layers": 6, "em_dim": 256, "num_heads": 8, "ff_dim": 512}


def tiny(num_classes=5, **changes) -> ViTModel:
    """A small model whose weights are large enough that a mistake anywhere shows in the logits."""
    model = ViTModel(num_classes, **{**TINY, "drop": 0.0, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def copy_block(block: EncoderBlock, layer: nn.TransformerEncoderLayer) -> None:
    """Weights of PyTorch's encoder layer into ours."""
    pairs = {
        block.attention.qkv.weight: layer.self_attn.in_proj_weight,
        block.attention.qkv.bias: layer.self_attn.in_proj_bias,
        block.attention.output.weight: layer.self_attn.out_proj.weight,
        block.attention.output.bias: layer.self_attn.out_proj.bias,
    }
    for ours, theirs in (
        (block.mlp[0], layer.linear1),
        (block.mlp[3], layer.linear2),
        (block.norm1, layer.norm1),
        (block.norm2, layer.norm2),
    ):
        pairs |= {ours.weight: theirs.weight, ours.bias: theirs.bias}
    with torch.no_grad():
        for ours, theirs in pairs.items():
            ours.copy_(theirs)


class PublishedSystem(nn.Module):
    """The published small system, as it is built: PyTorch's post-norm encoder, sequence first."""

    def __init__(self, model: ViTModel):
        super().__init__()
        config = model.config
        layer = nn.TransformerEncoderLayer(
            config["em_dim"], config["num_heads"], config["ff_dim"], dropout=config["drop"], activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, config["num_layers"], enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config["em_dim"], eps=1e-6)
        self.embedding, self.head = model.vit_encoder.embedding, model.linear_classifier

    def forward(self, images):
        return self.head(self.norm(self.encoder(self.embedding(images).transpose(0, 1))[0]))


def test_post_norm_model_equals_the_published_transformer_encoder():
    model = ViTModel(100, **PUBLISHED, norm_first=False).eval()
    published = PublishedSystem(model).eval()
    with torch.no_grad():
        for parameter in published.parameters():  # away from zero biases and unit norms, so that each one counts
            parameter.add_(0.02 * torch.randn_like(parameter))
    for block, layer in zip(model.vit_encoder.encoder, published.encoder.layers, strict=True):
        copy_block(block, layer)
    model.vit_encoder.layernorm.load_state_dict(published.norm.state_dict())
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), published(images), rtol=0, atol=1e-5)


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
def test_explicit_attention_equals_fused_attention(norm_first):
    model = tiny(norm_first=norm_first)
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(model.intermediates(images)["logits"], model(images), rtol=0, atol=1e-5)


def test_intermediates_have_the_documented_names_and_shapes():
    shapes = {name: tuple(value.shape) for name, value in tiny().intermediates(torch.randn(3, 3, 8, 8)).items()}
    assert shapes == {
        "embeddings": (3, 5, 16),
        "tokens": (2, 3, 5, 16),
        "attention": (2, 3, 4, 5, 5),
        "encoded": (3, 5, 16),
        "logits": (3, 5),
    }


def test_attention_rows_sum_to_one_over_the_keys():
    weights = tiny().intermediates(torch.randn(3, 3, 8, 8))["attention"]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert (weights.sum(-2) - 1).abs().max() > 1e-3, (
        "the columns need not sum to 1; if they do, the test proves nothing"
    )


def test_attention_equals_multihead_attention_of_pytorch():
    ours, theirs = SelfAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    ours.qkv.load_state_dict({"weight": theirs.in_proj_weight, "bias": theirs.in_proj_bias})
    ours.output.load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(2, 7, 16)
    output, weights = ours(x, need_weights=True)
    expected, expected_weights = theirs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-5)


def test_attention_without_positions_is_permutation_equivariant():
    block, x, order = EncoderBlock(16, 4, 32).eval(), torch.randn(2, 7, 16), torch.randperm(7)
    torch.testing.assert_close(block(x[:, order])[0], block(x)[0][:, order], rtol=0, atol=1e-5)


def test_patch_embedding_equals_a_linear_layer_on_patches():
    embedding = ViTEmbeddings(image_size=8, patch_size=4, em_dim=16, patch_bias=True)
    images = torch.randn(2, 3, 8, 8)
    convolution = embedding.patch_embedding
    linear = F.linear(patchify(images, 4), convolution.weight.flatten(1), convolution.bias)
    torch.testing.assert_close(convolution(images).flatten(2).transpose(1, 2), linear, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels, size, patch", [(3, 8, 4), (1, 6, 2), (4, 9, 3), (2, 5, 5), (3, 4, 1)])
def test_patchify_and_unpatchify_are_exact_inverses(channels, size, patch):
    images = torch.randn(2, channels, size, size)
    patches = patchify(images, patch)
    assert patches.shape == (2, (size // patch) ** 2, channels * patch**2)
    assert torch.equal(patches[:, 0], images[:, :, :patch, :patch].flatten(1))
    assert torch.equal(unpatchify(patches, patch, channels), images)


def test_patches_are_numbered_row_by_row():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert patchify(image, 2)[0, :, 0].tolist() == [0, 2, 8, 10]


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


def test_the_published_call_works_as_written():
    model = ViTModel(
        num_classes=100, image_size=32, patch_size=4, num_layers=6, num_channels=3, em_dim=256, num_heads=8, ff_dim=512
    )
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    with torch.device("meta"):
        default = ViTModel(1000)
    assert count_parameters(default) == 86_567_656 - 768, "ViT-B/16 without the bias of the patch embedding"


def test_submodules_keep_the_published_names():
    names = set(dict(tiny().named_parameters()))
    for name in ("patch_embedding.weight", "position_embedding", "cls_token"):
        assert f"vit_encoder.embedding.{name}" in names
    assert "linear_classifier.weight" in names


def test_layers_are_initialised_as_in_the_papers_code():
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


def test_first_loss_is_near_that_of_guessing():
    model = create_model("small", 100, drop=0.0)
    loss = F.cross_entropy(model(torch.randn(64, 3, 32, 32)), torch.randint(100, (64,)))
    assert loss.item() == pytest.approx(math.log(100), abs=0.2)


# A model that is broken in a way learners' models often are fails one of these by name.


def depends_on_its_input(model) -> bool:
    with torch.no_grad():
        logits = model(torch.randn(4, 3, 8, 8))
    return (logits.std(0) > 1e-4).all().item()


def treats_each_image_on_its_own(model) -> bool:
    images = torch.randn(4, 3, 8, 8)
    changed = images.clone()
    changed[0] = torch.randn(3, 8, 8)
    with torch.no_grad():
        return torch.allclose(model(images)[1:], model(changed)[1:], rtol=0, atol=1e-6)


def notices_where_a_patch_stands(model) -> bool:
    image = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        return not torch.allclose(model(image), model(image.roll(4, -1)), rtol=0, atol=1e-5)


def gives_every_parameter_a_gradient(model) -> bool:
    model.zero_grad()
    F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
    return all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def repeats_itself_in_eval_mode(model) -> bool:
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        return torch.equal(model.eval()(images), model(images))


PROPERTIES = [
    depends_on_its_input,
    treats_each_image_on_its_own,
    notices_where_a_patch_stands,
    gives_every_parameter_a_gradient,
    repeats_itself_in_eval_mode,
]


@pytest.mark.parametrize("has", PROPERTIES, ids=lambda has: has.__name__)
@pytest.mark.parametrize("norm_first", [True, False])
def test_model(has, norm_first):
    assert has(tiny(norm_first=norm_first, drop=0.1))


def broken_ignores_input(model):
    model.vit_encoder.embedding.patch_embedding.weight.data.zero_()


def broken_attends_over_the_batch(model):
    attention = model.vit_encoder.encoder[0].attention
    forward = attention.forward
    attention.forward = lambda x, need_weights=False: (forward(x.transpose(0, 1))[0].transpose(0, 1), None)


def broken_has_no_positions(model):
    model.vit_encoder.embedding.position_embedding.data.zero_()


def broken_cuts_the_gradient(model):
    block = model.vit_encoder.encoder[1]
    forward = block.forward
    block.forward = lambda x, need_weights=False: forward(x.detach())


def broken_drops_out_always(model):
    model.vit_encoder.embedding.dropout.forward = lambda x: F.dropout(x, 0.5, training=True)


@pytest.mark.parametrize(
    "break_it, has",
    [
        (broken_ignores_input, depends_on_its_input),
        (broken_attends_over_the_batch, treats_each_image_on_its_own),
        (broken_has_no_positions, notices_where_a_patch_stands),
        (broken_cuts_the_gradient, gives_every_parameter_a_gradient),
        (broken_drops_out_always, repeats_itself_in_eval_mode),
    ],
)
def test_a_broken_model_is_noticed(break_it, has):
    model = tiny()
    assert has(model)
    break_it(model)
    assert not has(model)


def test_drop_path_drops_whole_images():
    drop, x = DropPath(0.25), torch.rand(4000, 3, 2) + 0.5
    out = drop(x)
    kept, dropped = (out != 0).all((1, 2)), (out == 0).all((1, 2))
    assert (kept | dropped).all(), "an image is kept or dropped as a whole"
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert out.mean().item() == pytest.approx(x.mean().item(), rel=0.05)


def test_drop_path_does_nothing_in_eval_mode():
    x = torch.randn(4, 3, 2)
    assert torch.equal(DropPath(0.9).eval()(x), x) and torch.equal(DropPath(0.0)(x), x)


def test_drop_path_rises_evenly_from_zero():
    def probabilities(**changes):
        blocks = tiny(drop_path=0.3, **changes).vit_encoder.encoder
        return [[part.probability for part in block.modules() if isinstance(part, DropPath)] for block in blocks]

    assert probabilities(num_layers=4) == [[pytest.approx(p)] for p in (0, 0.1, 0.2, 0.3)]
    assert probabilities(num_layers=1) == [[0]]


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_dropped_branch_leaves_what_came_in(norm_first):
    """Pre-norm the block is then the identity, post-norm its two norms alone; about half of all branches are dropped
    here, attention and MLP each on their own."""
    block, x = EncoderBlock(16, 4, 32, norm_first=norm_first, drop_path=0.5).train(), torch.randn(400, 5, 16)
    with torch.no_grad():
        untouched = x if norm_first else block.norm2(block.norm1(x))
        same = (block(x)[0] - untouched).abs().amax((1, 2)) < 1e-5
    assert same.float().mean().item() == pytest.approx(0.25, abs=0.07)


def test_mean_pooling_leaves_cls_out():
    by_cls, by_mean = tiny(), tiny(pooling="mean")
    assert by_cls.config["pooling"] == "cls" and count_parameters(by_mean) == count_parameters(by_cls)
    by_mean.load_state_dict(by_cls.state_dict())
    images = torch.randn(3, 3, 8, 8)
    tokens = by_cls.vit_encoder(images)
    assert torch.equal(by_cls(images), by_cls.linear_classifier(tokens[:, 0]))
    torch.testing.assert_close(by_mean(images), by_mean.linear_classifier(sum(tokens[:, i] for i in range(1, 5)) / 4))
    assert not torch.allclose(by_mean(images), by_cls(images), atol=1e-2)
    torch.testing.assert_close(by_mean.intermediates(images)["logits"], by_mean(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{"drop_path": 0.2}, {"pooling": "mean"}], ids=str)
def test_options_of_training_have_no_parameters(changes):
    with torch.device("meta"):
        assert count_parameters(create_model("small", 100, **changes)) == 3_218_020


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


def test_interpolation_keeps_cls_and_the_same_size():
    positions = torch.randn(1, 1 + 16, 8)
    assert torch.equal(interpolate_positions(positions, 4), positions)
    larger = interpolate_positions(positions, 6)
    assert larger.shape == (1, 1 + 36, 8)
    assert torch.equal(larger[:, 0], positions[:, 0])


def test_interpolation_of_a_ramp_stays_a_ramp():
    ramp = torch.arange(4.0).repeat(4)[None, :, None]  # the column number, at every patch of a 4x4 grid
    grid = interpolate_positions(torch.cat([torch.zeros(1, 1, 1), ramp], 1), 8)[0, 1:, 0].view(8, 8)
    torch.testing.assert_close(grid, grid[:1].expand(8, 8))
    assert (grid[0].diff() > 0).all()


def test_without_classes_the_model_returns_features():
    model = tiny(pooling="mean", pre_logits=24)
    headless = ViTModel(**{**model.config, "num_classes": 0}).eval()
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("linear_classifier")})
    x = torch.randn(2, 3, 8, 8)
    features = headless(x)
    assert features.shape == (2, 24)
    torch.testing.assert_close(model.linear_classifier(features), model(x))
    pooled = model.vit_encoder(x)[:, 1:].mean(1)
    torch.testing.assert_close(features, torch.tanh(F.linear(pooled, *model.pre_logits[0].parameters())))


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


def test_the_largest_model_costs_no_memory_on_the_meta_device():
    with torch.device("meta"):
        model = create_model("H/14", 1000)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"image_size": 30}, "image_size=30 is not a multiple of patch_size=4"),
        ({"em_dim": 18}, "em_dim=18 is not a multiple of num_heads=4"),
        ({"pooling": "max"}, "pooling='max' is not known; choose cls or mean"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        ViTModel(**{"num_classes": 5, **TINY, **changes})


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 8, 8), (3, 8, 8), (2, 3, 8, 4)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[B, 3, 8, 8\], not \["):
        tiny()(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.bfloat16])
def test_images_of_another_dtype_are_refused(dtype):
    with pytest.raises(ValueError, match=f"torch.float32, not {dtype}; normalise"):
        tiny()(torch.zeros(1, 3, 8, 8, dtype=dtype))


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="preset='huge'.*mini, small, Ti/16.*H/14"):
        create_model("huge", 10)


def test_images_that_patches_do_not_fill_are_refused():
    with pytest.raises(ValueError, match="8x8 pixels cannot be cut into patches of 3"):
        patchify(torch.randn(1, 3, 8, 8), 3)
