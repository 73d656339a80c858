"""The formulas against what is built, executed and stored: exact, or they are wrong."""

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitlib.costs import costs, preset_config
from vitlib.model import PRESETS, ViTModel, count_parameters, create_model

exactly = settings(max_examples=60, derandomize=True, deadline=None)


@st.composite
def configurations(draw, **fixed):
    """Small models with every option that there is."""
    number = st.integers
    patch, heads = draw(number(1, 4)), draw(number(1, 3))
    choice = {
        "num_classes": draw(number(0, 5)),
        "num_layers": draw(number(1, 3)),
        "image_size": patch * draw(number(1, 4)),
        "patch_size": patch,
        "num_channels": draw(number(1, 4)),
        "em_dim": heads * draw(number(1, 6)),
        "drop": draw(st.sampled_from([0.0, 0.5])),
        "num_heads": heads,
        "ff_dim": draw(number(1, 20)),
        "norm_first": draw(st.booleans()),
        "patch_bias": draw(st.booleans()),
        "drop_path": draw(st.sampled_from([0.0, 0.5])),
        "pooling": draw(st.sampled_from(["cls", "mean"])),
        "pre_logits": draw(st.none() | number(1, 7)),
    }
    return {**choice, **fixed}


def built(config, device="cpu") -> ViTModel:
    with torch.device(device):
        return ViTModel(**config)


def images_for(model: ViTModel, batch_size: int) -> torch.Tensor:
    shape = batch_size, *model.vit_encoder.embedding.image_shape
    return torch.randn(shape, device=model.vit_encoder.embedding.cls_token.device)


def kept_bytes(model: ViTModel, images: torch.Tensor) -> dict[str, int]:
    """Bytes of all memory that the graph behind the model's output holds on to, but for the parameters, by the part
    that was at work when it was kept last."""
    part, kept = "", {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def begins(name):
        def hook(*_):
            nonlocal part
            part = name

        return hook

    def keep(tensor):
        storage = tensor.untyped_storage()  # held by the dict, so that its place is not given to another
        kept[storage.data_ptr()] = part, storage
        return tensor

    encoder = model.vit_encoder
    starts = {"patch_embedding": [encoder.embedding.patch_embedding], "positions": [encoder.embedding.dropout]}
    starts |= {"pre_logits": [model.pre_logits], "classifier": [model.linear_classifier]}
    starts |= {"mlp": [block.mlp for block in encoder.encoder], "norms": norms_of(model), "products": []}
    starts["projections"] = [layer for b in encoder.encoder for layer in (b.attention.qkv, b.attention.output)]
    for name, modules in starts.items():
        for module in modules:
            module.register_forward_pre_hook(begins(name))
    for block in encoder.encoder:
        block.attention.qkv.register_forward_hook(begins("products"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(images)
    assert output.requires_grad
    return {
        name: sum(storage.nbytes() for place, (at, storage) in kept.items() if at == name and place not in own)
        for name in starts
    }


def norms_of(model: ViTModel) -> list:
    blocks = model.vit_encoder.encoder
    return [model.vit_encoder.layernorm, *(norm for block in blocks for norm in (block.norm1, block.norm2))]


def counted_flops(model: ViTModel, images: torch.Tensor) -> tuple[int, int]:
    """Forward, and forward and backward, as PyTorch counts them. It knows no formula for the CPU's fused attention and
    would leave it out, so the attention is computed as products one by one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(images)
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward, counter.get_total_flops()


def parameters_by_part(model: ViTModel) -> dict[str, int]:
    encoder = model.vit_encoder
    embedding, blocks = encoder.embedding, encoder.encoder
    return {
        "patch_embedding": count_parameters(embedding.patch_embedding),
        "positions": embedding.cls_token.numel() + embedding.position_embedding.numel(),
        "projections": sum(count_parameters(block.attention) for block in blocks),
        "products": 0,
        "mlp": sum(count_parameters(block.mlp) for block in blocks),
        "norms": sum(count_parameters(norm) for norm in norms_of(model)),
        "pre_logits": count_parameters(model.pre_logits),
        "classifier": count_parameters(model.linear_classifier),
    }


@given(configurations())
@exactly
def test_parameters_are_those_of_the_built_model_part_by_part(config):
    model, counted = built(config, "meta"), costs(config).parameters
    assert vars(counted) == parameters_by_part(model)
    assert counted.total == count_parameters(model)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_and_flops_of_a_preset_are_counted_without_a_number_in_memory(preset):
    config = preset_config(preset, 1000, pre_logits=64)
    model, counted = built(config, "meta"), costs(config, batch_size=2)
    assert vars(counted.parameters) == parameters_by_part(model)
    flops = counted_flops(model, images_for(model, 2))
    assert (counted.forward_flops.total, counted.training_flops.total) == flops


@given(configurations(), st.integers(1, 3))
@exactly
def test_flops_are_those_that_pytorch_counts_on_the_cpu(config, batch_size):
    model, counted = built(config), costs(config, batch_size)
    flops = counted_flops(model, images_for(model, batch_size))
    assert (counted.forward_flops.total, counted.training_flops.total) == flops


@given(configurations(), st.integers(1, 3))
@exactly
def test_the_written_out_attention_costs_the_same_flops(config, batch_size):
    model = built(config)
    with FlopCounterMode(display=False) as counter:
        model.intermediates(images_for(model, batch_size))
    assert counter.get_total_flops() == costs(config, batch_size).forward_flops.total


def test_flops_go_to_the_parts_that_compute_them():
    config = preset_config("mini", 10, pre_logits=48)
    model, counted = built(config), costs(config).forward_flops
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images_for(model, 1))
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    attention = [f"ViTModel.vit_encoder.encoder.{block}.attention" for block in range(4)]
    assert vars(counted) == {
        "patch_embedding": by_module["ViTModel.vit_encoder.embedding"],
        "positions": 0,
        "projections": sum(by_module[f"{name}.{layer}"] for name in attention for layer in ("qkv", "output")),
        "products": sum(by_module[name] - by_module[f"{name}.qkv"] - by_module[f"{name}.output"] for name in attention),
        "mlp": sum(by_module[f"ViTModel.vit_encoder.encoder.{block}.mlp"] for block in range(4)),
        "norms": 0,
        "pre_logits": by_module["ViTModel.pre_logits"],
        "classifier": by_module["ViTModel.linear_classifier"],
    }


def assert_activations_are_exact(config, batch_size):
    model = built(config)
    # the CPU's fused attention has no dropout: with it PyTorch takes the written-out one by itself
    with sdpa_kernel(SDPBackend.MATH if config["drop"] else SDPBackend.FLASH_ATTENTION):
        assert kept_bytes(model, images_for(model, batch_size)) == vars(costs(config, batch_size).activation_bytes)


@given(configurations(), st.integers(1, 3))
@settings(exactly, max_examples=200)
def test_activations_are_what_autograd_keeps_part_by_part(config, batch_size):
    assert_activations_are_exact(config, batch_size)


@pytest.mark.parametrize("drop", [0.0, 0.1])
@pytest.mark.parametrize(("preset", "batch_size"), [("mini", 8), ("small", 2), ("Ti/16", 1)])
def test_activations_of_a_preset_are_what_autograd_keeps(preset, batch_size, drop):
    assert_activations_are_exact(preset_config(preset, 100, drop=drop), batch_size)


@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_the_attention_that_the_formula_is_for_is_the_one_that_pytorch_chooses(drop):
    config = preset_config("mini", 100, drop=drop)
    model = built(config)
    assert kept_bytes(model, images_for(model, 2)) == vars(costs(config, 2).activation_bytes)


def test_weights_gradients_and_optimizer_state_take_16_bytes_a_parameter():
    model = built(preset_config("mini", 10))
    optimizer = torch.optim.AdamW(model.parameters())
    model(images_for(model, 1)).sum().backward()
    optimizer.step()
    tensors = [tensor for p in model.parameters() for tensor in (p, p.grad, *optimizer.state[p].values())]
    held = sum(tensor.nbytes for tensor in tensors if tensor.ndim)  # but for the count of steps, a number a tensor
    assert held == costs(model.config).state_bytes


@pytest.mark.parametrize("side", [112, 448])
def test_the_same_encoder_at_another_image_size(side):
    config = preset_config("Ti/16", 1000)
    with torch.device("meta"):
        model = create_model("Ti/16", 1000, image_size=side)
    counted = costs({**config, "image_size": side})
    assert (counted.patches, counted.tokens) == ((side // 16) ** 2, (side // 16) ** 2 + 1)
    assert counted.parameters.total == count_parameters(model)
    assert counted.forward_flops.total == counted_flops(model, images_for(model, 1))[0]


def test_only_the_products_among_the_tokens_grow_faster_than_the_tokens():
    config = preset_config("B/16", 1000, drop=0)
    small, large = costs(config), costs({**config, "image_size": 448})
    growth = large.tokens / small.tokens
    assert large.forward_flops.mlp / small.forward_flops.mlp == growth
    assert large.forward_flops.products / small.forward_flops.products == growth**2
    assert large.activation_bytes.products / small.activation_bytes.products == growth, "fused: no T x T weights"


def test_everything_but_the_parameters_grows_with_the_batch():
    config = preset_config("small", 100, drop=0)
    one, seven = costs(config), costs(config, batch_size=7)
    assert seven.forward_flops == one.forward_flops.times(7)
    assert seven.training_flops == one.training_flops.times(7)
    assert seven.activation_bytes == one.activation_bytes.times(7)
    assert (seven.parameters, seven.state_bytes, seven.tokens) == (one.parameters, one.state_bytes, one.tokens)


def test_the_paper_s_b16_at_224_pixels_has_its_published_numbers():
    counted = costs(preset_config("B/16", 1000))
    assert (counted.patches, counted.tokens, counted.parameters.total) == (196, 197, 86_567_656)
    assert round(counted.forward_flops.total / 2e9, 1) == 17.6, "multiply-adds"


def test_what_a_configuration_leaves_out_keeps_the_model_s_default():
    left_out = {"num_classes": 1000, **PRESETS["L/16"]}
    assert costs(left_out) == costs(preset_config("L/16", 1000))


def test_a_model_s_own_configuration_is_taken_as_it_is_and_left_as_it_was():
    model = built(preset_config("mini", 10))
    before = dict(model.config)
    assert costs(model.config).parameters.total == count_parameters(model)
    assert model.config == before


def test_h14_takes_no_memory_on_the_meta_device():
    process = psutil.Process()
    built(preset_config("mini", 10), "meta")  # what PyTorch loads for the first meta tensor is not the model's
    before = process.memory_info().rss
    model = built(preset_config("H/14", 1000), "meta")
    assert costs(model.config).parameters.total == 632_045_800
    assert process.memory_info().rss - before < 64e6, "its weights would be 2.5 GB"


@pytest.mark.parametrize(
    ("change", "batch_size", "message"),
    [
        ({"image_size": 225}, 1, "image_size=225 is not a multiple of patch_size=16"),
        ({"num_heads": 7}, 1, "em_dim=768 is not a multiple of num_heads=7"),
        ({}, 0, "batch_size=0"),
    ],
)
def test_what_cannot_be_counted_is_refused(change, batch_size, message):
    with pytest.raises(ValueError, match=message):
        costs({**preset_config("B/16", 10), **change}, batch_size)


def test_unknown_presets_and_arguments_are_refused():
    with pytest.raises(ValueError, match="preset='B/15' is not known; choose one of mini"):
        preset_config("B/15", 10)
    with pytest.raises(TypeError, match="size"):
        costs({"num_classes": 10, "size": 4})
    with pytest.raises(TypeError, match="num_classes"):
        costs(PRESETS["B/16"])
