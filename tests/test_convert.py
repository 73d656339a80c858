"""Weights from and to other libraries: equal outputs, round trips bit for bit, and refusals."""

import pytest
import torch
from conftest import refusal
from torch import nn

from vitlib.model import ViTModel
from vitlib.utils import import_torchvision
from vitlib.weights import convert, official

import_torchvision()
SIZES = {"num_layers": 2, "image_size": 8, "patch_size": 4, "em_dim": 16, "num_heads": 4, "ff_dim": 32}


def perturbed(module: nn.Module) -> nn.Module:
    """In eval mode, every parameter moved so far from where it starts that a mistake shows: no norm is 1, no bias 0.

    Matrices only so far that the variance of what they make stays the same; else softmax sees one token and no more.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim in (2, 4) else 1
            parameter.add_(min(0.2, fan_in**-0.5) * torch.randn_like(parameter))
    return module.eval()


def ours(num_classes=5, **changes) -> ViTModel:
    given = {**SIZES, "drop": 0.0, "patch_bias": True, "norm_eps": 1e-6, **changes}
    return perturbed(ViTModel(num_classes, **given))


def images(config: dict, count=2) -> torch.Tensor:
    return torch.randn(count, config["num_channels"], config["image_size"], config["image_size"])


def same(state: dict, other: dict) -> bool:
    """Bit for bit."""
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output = module(x)
    if isinstance(output, torch.Tensor):
        return output
    if "logits" in output:
        return output.logits
    return output.last_hidden_state[:, 0] if output.pooler_output is None else output.pooler_output


def assert_outputs_are_equal(module: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(run(module, x), model(x), rtol=0, atol=1e-5)


# ---- the libraries


def build_torchvision(**changes) -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(8, 4, 2, 4, 16, 32, num_classes=5, **changes)


def build_timm(**changes) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    return VisionTransformer(**{**sizes, "num_classes": 5, **changes})


def build_huggingface(kind="ViTForImageClassification", **changes) -> nn.Module:
    import transformers

    sizes = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "image_size": 8,
        "patch_size": 4, "num_labels": 5,
    }  # fmt: skip
    return getattr(transformers, kind)(transformers.ViTConfig(**{**sizes, **changes}))


BUILD = {"torchvision": build_torchvision, "timm": build_timm, "huggingface": build_huggingface}
FROM = {name: getattr(convert, f"from_{name}") for name in BUILD}
TO = {name: getattr(convert, f"to_{name}") for name in BUILD}
every_library = pytest.mark.parametrize("library", BUILD)


# ---- equality

ODD = {  # int(22 * (15 / 22)) is 14: timm would round this ff_dim down
    "num_classes": 1, "num_layers": 3, "image_size": 15, "patch_size": 5, "num_channels": 1, "em_dim": 22,
    "num_heads": 2, "ff_dim": 15,
}  # fmt: skip
MODELS = [
    *((library, changes) for library in BUILD for changes in ({}, ODD | {"norm_eps": 1e-2}, {"num_classes": 0})),
    ("torchvision", {"pre_logits": 7}),
    ("timm", {"pooling": "mean"}),
    ("huggingface", {"num_classes": 0, "pre_logits": 7}),
]


@pytest.mark.parametrize(("library", "changes"), MODELS)
def test_both_directions_give_equal_outputs_and_no_bit_is_lost(library, changes):
    model = ours(**changes)
    module, x = TO[library](model), images(model.config)
    assert_outputs_are_equal(module, model, x)
    back = FROM[library](module)
    assert same(model.state_dict(), back.state_dict()) and back.config == model.config

    model = FROM[library](perturbed(module))
    assert_outputs_are_equal(module, model, x)
    again = TO[library](model)
    assert type(again) is type(module) and same(module.state_dict(), again.state_dict())
    with torch.no_grad():
        assert torch.equal(run(again, x), run(module, x))


@pytest.mark.parametrize("changes", [ODD, {"num_classes": 0}, {"pre_logits": 7}], ids=str)
def test_an_npz_file_gives_back_the_same_model(changes, tmp_path):
    model = ours(**changes)
    convert.to_npz(model, tmp_path / "ViT.npz")
    back = official.from_file(tmp_path / "ViT.npz")
    assert same(model.state_dict(), back.state_dict()) and back.config == model.config


def test_timms_own_reader_of_npz_files_reads_ours(tmp_path):
    module, model = perturbed(build_timm()), ours()
    convert.to_npz(model, tmp_path / "ViT.npz")
    module.load_pretrained(str(tmp_path / "ViT.npz"))
    assert_outputs_are_equal(module, model, images(model.config))


# ---- what comes back


@every_library
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_both_directions_give_independent_float32_copies(library, dtype):
    model = ours()
    for convert_it, source in ((TO[library], model), (FROM[library], TO[library](model))):
        source = source.to(dtype).train()
        before = {name: value.clone() for name, value in source.state_dict().items()}
        result = convert_it(source)
        assert not result.training
        assert all(parameter.requires_grad for parameter in result.parameters())
        for value in result.state_dict().values():
            assert (value.dtype, value.device.type, value.is_contiguous()) == (torch.float32, "cpu", True)
        with torch.no_grad():
            for parameter in result.parameters():
                parameter.zero_()
        assert same(before, source.state_dict())


@every_library
def test_wrapped_and_frozen_models_convert_and_a_missing_bias_is_zero(library):
    model = ours(patch_bias=False, drop=0.3, drop_path=0.2).requires_grad_(False)
    module = TO[library](nn.DataParallel(model))
    assert_outputs_are_equal(module, model, images(model.config))
    back = FROM[library](module)
    assert back.config == {**model.config, "drop": 0.0, "drop_path": 0.0, "patch_bias": True}
    state = back.state_dict()
    assert not state.pop(convert.PATCH + "bias").any() and same(model.state_dict(), state)


# ---- names


def test_names_before_transformers_5_are_known():
    state = convert.to_state_dict(model := ours(), "huggingface")
    new = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key"}
    new |= {"attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense"}
    new |= {"layers.": "encoder.layer.", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for since_5, before in new.items():
        state = {name.replace(since_5, before): value for name, value in state.items()}
    assert convert.layout_of(state) == "huggingface"
    assert same(read(state, "huggingface").state_dict(), model.state_dict())


def test_an_unknown_layout_lists_the_known_ones():
    assert refusal(convert.names, "keras").startswith("layout='keras' is not known; choose one of torchvision, timm")


# ---- entries that do not fit


def read(state: dict, layout: str) -> ViTModel:
    return convert.from_state_dict(state, layout, num_heads=4)


def test_missing_and_unknown_entries_are_listed():
    state = convert.to_state_dict(ours(), "timm")
    name = [*state][7]
    value = state.pop(name)
    assert f"(missing: {name})" in refusal(read, state, "timm")
    assert "(unknown: head_dist.weight)" in refusal(read, state | {name: value, "head_dist.weight": value}, "timm")


@pytest.mark.parametrize("layout", ["npz", "timm"])
@pytest.mark.parametrize("change", ["longer", "flat", "deeper", "scalar"])
def test_a_misshapen_entry_is_refused(layout, change):
    state = convert.to_state_dict(ours(num_layers=1), layout)
    for name, value in state.items():
        longer = torch.zeros(*value.shape[:-1], value.shape[-1] + 1)
        wrong = {"longer": longer, "flat": value.flatten(), "deeper": value[None], "scalar": torch.zeros(())}[change]
        if wrong.shape != value.shape:
            assert "do not fit together" in refusal(read, state | {name: wrong}, layout), name


@pytest.mark.parametrize("layout", ["timm", "huggingface"])
@pytest.mark.parametrize(("prefix", "num_classes"), [("module._orig_mod.", 5), ("backbone.", 0)])
def test_a_prefix_before_the_names_is_stripped(layout, prefix, num_classes):
    model = ours(num_classes)
    state = {prefix + name: value for name, value in convert.to_state_dict(model, layout).items()}
    assert same(read(state, layout).state_dict(), model.state_dict())
    assert convert.layout_of(state) == layout


def test_two_models_in_one_state_dict_are_refused():
    state = convert.to_state_dict(ours(), "timm")
    both = {f"{prefix}.{name}": value for prefix in ("model", "backbone") for name, value in state.items()}
    with pytest.raises(ValueError, match="holds several models"):
        read(both, "timm")


# ---- modules that compute something else


def test_a_module_of_torchvision_with_another_part_is_refused():
    module = perturbed(build_torchvision())
    convert.from_torchvision(module)
    module.encoder.layers.encoder_layer_0.mlp[1] = nn.GELU("tanh")
    refusal(convert.from_torchvision, module)


def test_a_head_of_zeros_hides_no_other_part():
    module = build_torchvision()  # its head starts at zero
    assert not module.heads.head.weight.any()
    convert.from_torchvision(module)
    module.encoder.layers.encoder_layer_0.mlp[1] = nn.ReLU()
    refusal(convert.from_torchvision, module)


def test_a_module_of_timm_with_another_part_is_refused():
    refusal(convert.from_timm, perturbed(build_timm(global_pool="max", fc_norm=False)))


@pytest.mark.parametrize("arguments", [{"hidden_act": "relu"}, {"kind": "ViTModel", "pooler_act": "relu"}], ids=str)
def test_a_module_of_hugging_face_with_another_part_is_refused(arguments):
    refusal(convert.from_huggingface, perturbed(build_huggingface(**arguments)))


@every_library
def test_a_module_of_another_kind_is_refused(library):
    assert "Linear cannot be converted; give the class " in refusal(FROM[library], nn.Linear(2, 2))
    assert "Linear holds no ViTModel" in refusal(TO[library], nn.Linear(2, 2))


def test_dropout_and_layer_scale_of_timm_are_no_other_parts():
    rates = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
    module = perturbed(build_timm(**dict.fromkeys(rates, 0.1), init_values=0.1))
    model = convert.from_timm(module.train())
    assert_outputs_are_equal(module.eval(), model, images(model.config))


@pytest.mark.parametrize(
    ("layout", "changes", "part"),
    [
        ("torchvision", {"norm_first": False}, "norm_first=False"),
        ("npz", {"pooling": "mean"}, "pooling='mean'"),
        ("timm", {"pre_logits": 4}, "pre_logits=4"),
        ("huggingface", {"pre_logits": 4}, "pre_logits=4"),
        ("npz", {"norm_eps": 1e-5}, "norm_eps=1e-05"),
    ],
)
def test_an_option_that_the_library_lacks_is_named(layout, changes, part):
    text = refusal(convert.to_state_dict, ours(**changes), layout)
    assert text.startswith(f"The layout {layout} has no {part}") and "; keep such a model with" in text
