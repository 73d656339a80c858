"""The formulas against what is built, executed and stored: exact, or they are wrong."""

from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitlib.costs import costs, preset_config
from vitlib.model import ViTModel, count_parameters

SMALL = {
    "num_classes": 5, "num_layers": 2, "image_size": 8, "patch_size": 2, "num_channels": 3, "em_dim": 12, "drop": 0.0,
    "num_heads": 3, "ff_dim": 20,
}  # fmt: skip
CHANGES = [  # with the batch size: every option that there is
    ({}, 1),
    ({"norm_first": False, "patch_bias": True, "pooling": "mean"}, 3),
    ({"pre_logits": 7, "num_layers": 3, "num_channels": 1}, 2),
    ({"pre_logits": 7, "pooling": "mean", "patch_size": 8, "num_heads": 1}, 1),
    ({"num_classes": 0, "patch_bias": True}, 2),
    ({"num_classes": 0, "pre_logits": 6, "norm_first": False, "em_dim": 3, "ff_dim": 1}, 3),
]


def images_for(model: ViTModel, batch_size: int) -> torch.Tensor:
    return torch.randn(batch_size, *model.vit_encoder.embedding.image_shape)


def kept_bytes(model: ViTModel, images: torch.Tensor) -> dict[str, int]:
    """Bytes that autograd keeps for the backward pass, without the parameters, by the part that kept them last."""
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
    starts |= {"classifier": [model.pre_logits, model.linear_classifier]}
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


def counted_flops(model: ViTModel, images: torch.Tensor) -> tuple[dict[str, int], int]:
    """Forward by part, and forward and backward in all, as PyTorch counts them. It has no formula for the CPU's fused
    attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(images)
        by_module = Counter({name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()})
        output.sum().backward()
    blocks = [f"ViTModel.vit_encoder.encoder.{number}" for number in range(model.config["num_layers"])]
    projections = sum(by_module[f"{block}.attention.{layer}"] for block in blocks for layer in ("qkv", "output"))
    forward = {
        "patch_embedding": by_module["ViTModel.vit_encoder.embedding"],
        "positions": 0,
        "projections": projections,
        "products": sum(by_module[f"{block}.attention"] for block in blocks) - projections,
        "mlp": sum(by_module[f"{block}.mlp"] for block in blocks),
        "norms": 0,
        "classifier": by_module["ViTModel.pre_logits"] + by_module["ViTModel.linear_classifier"],
    }
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
        "classifier": count_parameters(model.pre_logits) + count_parameters(model.linear_classifier),
    }


@pytest.mark.parametrize(("changes", "batch_size"), CHANGES, ids=str)
def test_any_configuration_is_counted_as_built_run_and_stored(changes, batch_size):
    model = ViTModel(**(SMALL | changes))
    counted = costs(model.config, batch_size)
    images = images_for(model, batch_size)
    assert vars(counted.parameters) == parameters_by_part(model)
    assert (vars(counted.forward_flops), counted.training_flops.total) == counted_flops(model, images)
    with FlopCounterMode(display=False) as counter:
        model.intermediates(images)
    assert counter.get_total_flops() == counted.forward_flops.total, "the written-out attention costs the same"
    assert kept_bytes(model, images) == vars(counted.activation_bytes), "with the fused attention that PyTorch chooses"


def test_the_paper_s_b16_at_224_pixels_has_its_published_numbers():
    counted = costs(preset_config("B/16", 1000))
    assert (counted.patches, counted.tokens, counted.parameters.total) == (196, 197, 86_567_656)
    assert round(counted.forward_flops.total / 2e9, 1) == 17.6, "multiply-adds"


@pytest.mark.parametrize(
    ("change", "words"), [({"image_size": 225}, "image_size=225 .* patch_size=16"), ({"num_heads": 7}, "num_heads=7")]
)
def test_fractions_of_a_patch_or_a_head_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        costs({**preset_config("B/16", 10), **change})
