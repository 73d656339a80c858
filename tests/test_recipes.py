"""Recipes: which parameters learn how fast, how the rate rises and falls, what is refused."""

import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import refusal
from torch import nn

from vitlib.model import ViTModel
from vitlib.training.muon import Muon
from vitlib.training.recipes import FINETUNING, RECIPES, Recipe, build_optimizers, named_recipe, rate_factor

TINY = {"num_layers": 3, "image_size": 8, "patch_size": 4, "em_dim": 16, "num_heads": 2, "ff_dim": 32}
PLAIN = Recipe(optimizer="adamw", learning_rate=1.0, weight_decay=0.5)


def groups_of(model: nn.Module, recipe: Recipe) -> dict[str, tuple[torch.optim.Optimizer, dict]]:
    """The optimiser and the group of every parameter by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (optimizer, group)
        for optimizer in build_optimizers(model, recipe)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def rates(recipe: Recipe, **changes) -> dict[str, float]:
    """The learning rate of every parameter by name."""
    return {name: group["lr"] for name, (_, group) in groups_of(ViTModel(5, **{**TINY, **changes}), recipe).items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_layer_decay_lowers_the_rate_from_the_head_to_the_embeddings(optimizer):
    """Twelve blocks: the head and the final norm have the full rate, the last block a half of it, and so on down."""
    expected = {"linear_classifier.": 1.0, "vit_encoder.layernorm.": 1.0, "vit_encoder.embedding.": 2.0**-13}
    expected |= {f"vit_encoder.encoder.{block}.": 2.0 ** (block - 12) for block in range(12)}
    found = rates(replace(PLAIN, optimizer=optimizer, layer_decay=0.5), patch_bias=True, num_layers=12)
    for name, rate in found.items():
        (factor,) = (factor for start, factor in expected.items() if name.startswith(start))
        assert rate == factor, name


def test_rates_of_head_positions_and_layers_multiply():
    found = rates(replace(PLAIN, learning_rate=0.1, layer_decay=0.5, head_rate=10.0, position_rate=5.0))
    assert found["linear_classifier.weight"] == pytest.approx(1.0)
    assert found["vit_encoder.embedding.cls_token"] == pytest.approx(0.1 * 5 / 16)
    assert found["vit_encoder.embedding.position_embedding"] == pytest.approx(0.1 * 5 / 16)
    assert found["vit_encoder.embedding.patch_embedding.weight"] == pytest.approx(0.1 / 16)
    assert set(rates(PLAIN).values()) == {1.0}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_frozen_parameters_have_no_rate(optimizer):
    model = ViTModel(5, **TINY)
    model.vit_encoder.requires_grad_(False)
    found = groups_of(model, replace(PLAIN, optimizer=optimizer, layer_decay=0.5))
    assert set(found) == {"linear_classifier.weight", "linear_classifier.bias"}


@pytest.mark.parametrize("total, warmup, steps", [(100, 0.1, 10), (3, 0.1, 0), (10, 1.0, 10)])
def test_the_rate_rises_evenly_and_then_follows_half_a_cosine(total, warmup, steps):
    recipe = replace(PLAIN, schedule="cosine", warmup=warmup)
    for step in range(total):
        if step < steps:
            expected = (step + 1) / (steps + 1)
        else:
            expected = (1 + math.cos(math.pi * (step - steps) / (total - steps))) / 2
        assert rate_factor(recipe, step, total) == pytest.approx(expected, abs=1e-12)
        constant = replace(recipe, schedule="constant")
        assert rate_factor(constant, step, total) == (expected if step < steps else 1.0)


def test_sgd_and_adamw_are_one_fused_optimiser_with_the_recipes_numbers():
    model = ViTModel(5, **TINY)
    (sgd,) = build_optimizers(model, replace(PLAIN, optimizer="sgd", momentum=0.7))
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["fused"]
    assert [(group["momentum"], group["weight_decay"]) for group in sgd.param_groups] == [(0.7, 0.5)]
    (adamw,) = build_optimizers(model, PLAIN)
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["fused"]
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.0, 0.5}


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = ViTModel(5, **TINY)
    found = groups_of(model, replace(PLAIN, optimizer="muon", matrix_rate=3.0, head_rate=10.0, position_rate=5.0))
    assert set(found) == set(dict(model.named_parameters()))
    for name, (optimizer, group) in found.items():
        is_matrix = re.search(r"(qkv|output|mlp\.\d)\.weight$", name) is not None
        assert isinstance(optimizer, torch.optim.Muon if is_matrix else torch.optim.AdamW), name
        expected = 3 if is_matrix else 10 if "classifier" in name else 5 if "cls" in name or "position" in name else 1
        assert group["lr"] == expected, name
        decays = is_matrix or name.endswith(("patch_embedding.weight", "classifier.weight"))
        assert group["weight_decay"] == (0.5 if decays else 0.0), name
    assert sum(isinstance(optimizer, torch.optim.Muon) for optimizer, _ in found.values()) == 4 * TINY["num_layers"]


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_muon_is_torchs_and_also_computes_in_float32(precision, monkeypatch):
    """In bfloat16 to the last bit. In float32 weights of size 1 differ by less than a thousandth after five steps."""
    monkeypatch.setattr("vitlib.training.muon.resolve_precision", lambda *_: precision)
    start = [torch.randn(shape) for shape in ((48, 16), (16, 16), (16, 48))]
    gradients = [[torch.randn_like(matrix) for matrix in start] for _ in range(5)]

    def trained(optimizer: type, **options) -> list[torch.Tensor]:
        matrices = [nn.Parameter(matrix.clone()) for matrix in start]
        steps = optimizer(matrices, lr=0.01, weight_decay=0.1, **options)
        for step in gradients:
            for matrix, gradient in zip(matrices, step, strict=True):
                matrix.grad = gradient.clone()
            steps.step()
        return matrices

    for ours, theirs in zip(trained(Muon), trained(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"), strict=True):
        assert torch.equal(ours, theirs) == (precision == "bfloat16")
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_models_that_are_no_vit_are_trained_whole_at_one_rate(optimizer):
    """Decay falls on the weights of convolutions and linear layers, not on biases and norms; of SGD on everything."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    found = groups_of(model, replace(PLAIN, optimizer=optimizer, position_rate=5.0, matrix_rate=3.0))
    assert set(found) == set(dict(model.named_parameters()))
    decayed = {name for name, (_, group) in found.items() if group["weight_decay"]}
    assert decayed == (set(found) if optimizer == "sgd" else {"0.weight", "3.weight"})
    assert {group["lr"] for _, group in found.values()} == {1.0}


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: build_optimizers(nn.Linear(2, 2), replace(PLAIN, layer_decay=0.5)), "layer_decay=0.5 needs"),
        (lambda: build_optimizers(nn.Linear(2, 2), replace(PLAIN, keep_patches=((0.8, 0.5),))), "keep_patches.* needs"),
        (lambda: build_optimizers(ViTModel(5, **TINY), replace(PLAIN, optimizer="lion")), "'lion' .*sgd, adamw, muon"),
        (lambda: replace(PLAIN, schedule="linear"), "schedule='linear' .*constant, cosine"),
        (lambda: named_recipe("secret", RECIPES), "recipe='secret' is not .*published, modern, .*give a Recipe"),
    ],
)  # fmt: skip
def test_unknown_names_give_one_sentence(call, words):
    assert re.search(words, refusal(call))


def test_both_stages_know_the_same_recipes():
    assert set(RECIPES) == set(FINETUNING)
