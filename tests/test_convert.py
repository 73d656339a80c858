"""Weights from and to other libraries: equal outputs and gradients, round trips bit for bit, and what is refused."""

import re
import sys
import urllib.error
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from vitlib.model import ViTModel, interpolate_positions
from vitlib.utils import import_torchvision
from vitlib.weights import convert, load_weights, official

import_torchvision()
SIZES = {"num_layers": 2, "image_size": 8, "patch_size": 4, "em_dim": 16, "num_heads": 4, "ff_dim": 32}
NEEDED = "{} is a requirement of the tests only (requirements.txt), and not installed here"


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
    return perturbed(ViTModel(num_classes, **{**SIZES, "drop": 0.0, "patch_bias": True, **changes}))


def images(config: dict, count=2) -> torch.Tensor:
    return torch.randn(count, config["num_channels"], config["image_size"], config["image_size"])


def same(state: dict, other: dict) -> bool:
    """Bit for bit."""
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


# ---- the three libraries, each with its own constructor


def build_torchvision(config: dict, **extra) -> nn.Module:
    from torchvision.models import VisionTransformer

    module = VisionTransformer(
        config["image_size"], config["patch_size"], config["num_layers"], config["num_heads"], config["em_dim"],
        config["ff_dim"], num_classes=config["num_classes"] or 1, representation_size=config["pre_logits"],
        **{"norm_layer": partial(nn.LayerNorm, eps=config["norm_eps"]), **extra},
    )  # fmt: skip
    if config["num_classes"] == 0:
        module.heads.head = nn.Identity()
    if config["num_channels"] != 3:
        patch_size = config["patch_size"]
        module.conv_proj = nn.Conv2d(config["num_channels"], config["em_dim"], patch_size, patch_size)
    return module


def build_timm(config: dict, **extra) -> nn.Module:
    pytest.importorskip("timm", reason=NEEDED.format("timm"))
    from timm.models.vision_transformer import VisionTransformer

    given = {
        "img_size": config["image_size"], "patch_size": config["patch_size"], "in_chans": config["num_channels"],
        "num_classes": config["num_classes"], "embed_dim": config["em_dim"], "depth": config["num_layers"],
        "num_heads": config["num_heads"], "mlp_ratio": (config["ff_dim"] + 0.5) / config["em_dim"],
        "norm_layer": partial(nn.LayerNorm, eps=config["norm_eps"]),
        "global_pool": "token" if config["pooling"] == "cls" else "avg", "fc_norm": False,
    }  # fmt: skip
    return VisionTransformer(**{**given, **extra})


def build_huggingface(config: dict, **extra) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason=NEEDED.format("transformers"))
    theirs = transformers.ViTConfig(
        **{
            "hidden_size": config["em_dim"], "num_hidden_layers": config["num_layers"],
            "num_attention_heads": config["num_heads"], "intermediate_size": config["ff_dim"],
            "layer_norm_eps": config["norm_eps"], "image_size": config["image_size"],
            "patch_size": config["patch_size"], "num_channels": config["num_channels"],
            "num_labels": config["num_classes"], "pooler_output_size": config["pre_logits"],
            **extra,
        }
    )  # fmt: skip
    if config["num_classes"]:
        return transformers.ViTForImageClassification(theirs)
    return transformers.ViTModel(theirs, add_pooling_layer=config["pre_logits"] is not None)


def output_of_huggingface(output) -> torch.Tensor:
    if "logits" in output:
        return output.logits
    return output.last_hidden_state[:, 0] if output.pooler_output is None else output.pooler_output


BUILD = {"torchvision": build_torchvision, "timm": build_timm, "huggingface": build_huggingface}
FROM = {name: getattr(convert, f"from_{name}") for name in BUILD}
TO = {name: getattr(convert, f"to_{name}") for name in BUILD}


def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output = module(x)
    return output if isinstance(output, torch.Tensor) else output_of_huggingface(output)


@st.composite
def configurations(draw, library: str = "npz") -> dict:
    """Small models of every kind that the library has."""
    whole = st.integers
    num_heads, patch_size = draw(whole(1, 4)), draw(whole(1, 6))
    config = {
        "num_classes": draw(whole(0 if library != "npz" else 1, 12)),
        "num_layers": draw(whole(1, 3)),
        "image_size": patch_size * draw(whole(1, 4)),
        "patch_size": patch_size,
        "num_channels": draw(st.sampled_from((1, 3))),
        "em_dim": num_heads * draw(st.sampled_from((4, 6, 8))),
        "num_heads": num_heads,
        "ff_dim": draw(whole(1, 40)),
        "norm_eps": draw(st.sampled_from((1e-6, 1e-12, 1e-5, 1e-2))) if library != "npz" else 1e-6,
        "pooling": draw(st.sampled_from(("cls", "mean"))) if library == "timm" else "cls",
        "pre_logits": None,
    }
    if library in ("torchvision", "npz") or (library == "huggingface" and not config["num_classes"]):
        config["pre_logits"] = draw(st.none() | whole(1, 20))
    return config


many_times = settings(max_examples=8, deadline=None, derandomize=True)
every_library = pytest.mark.parametrize("library", BUILD)
every_layout = pytest.mark.parametrize("layout", convert.LAYOUTS)


# ---- equality


def assert_outputs_are_equal(module: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(run(module, x), model(x), rtol=0, atol=1e-5)


@every_library
@many_times
@given(data=st.data())
def test_outputs_and_gradients_equal_those_of_the_library(library, data):
    config = data.draw(configurations(library))
    torch.manual_seed(0)
    module, x = perturbed(BUILD[library](config)), images(config)
    model = FROM[library](module)
    assert {**model.config, **config} == model.config  # every option as it was drawn
    assert_outputs_are_equal(module, model, x)

    x_theirs, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    target = torch.randn_like(run(module, x))
    (run(module, x_theirs) * target).sum().backward()
    (model(x_ours) * target).sum().backward()
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(x_ours.grad, x_theirs.grad)
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    head, pre_logits = config["num_classes"] > 0, config["pre_logits"] is not None
    layout = convert._spelling(gradients) if library == "huggingface" else library
    grouped = {}
    for theirs, name in convert.names(layout, config["num_layers"], head=head, pre_logits=pre_logits):
        grouped.setdefault(name, []).append(gradients.pop(theirs))
    assert not gradients
    for name, parameter in model.named_parameters():
        close(parameter.grad, torch.cat(grouped[name]), msg=lambda text, name=name: f"{name}: {text}")


@every_library
@many_times
@given(data=st.data())
def test_round_trips_give_the_same_state_dict_bit_for_bit(library, data):
    config = data.draw(configurations(library))
    torch.manual_seed(0)
    model = ours(**config)
    module = TO[library](model)
    back = FROM[library](module)
    assert same(model.state_dict(), back.state_dict())
    assert back.config == model.config
    assert_outputs_are_equal(module, model, images(config))

    module = perturbed(BUILD[library](config))
    again = TO[library](FROM[library](module))
    assert type(again) is type(module)
    assert same(module.state_dict(), again.state_dict())
    with torch.no_grad():
        assert torch.equal(run(again, x := images(config)), run(module, x))


@many_times
@given(config=configurations())
def test_an_npz_file_gives_back_the_same_model(config, tmp_path_factory):
    torch.manual_seed(0)
    model, path = ours(**config), tmp_path_factory.mktemp("npz") / "ViT.npz"
    convert.to_npz(model, path)
    back = official.from_file(path)
    assert same(model.state_dict(), back.state_dict())
    assert back.config == model.config
    with np.load(path) as file:
        assert {
            name for name, _ in convert.names("npz", config["num_layers"], pre_logits=bool(config["pre_logits"]))
        } == {*file.files}


@many_times
@given(config=configurations())
def test_timms_own_reader_of_npz_files_reads_ours(config, tmp_path_factory):
    config |= {"pre_logits": None, "num_channels": 3}  # timm reads neither
    torch.manual_seed(0)
    model, path = ours(**config), tmp_path_factory.mktemp("npz") / "ViT.npz"
    convert.to_npz(model, path)
    module = perturbed(build_timm(config))
    module.load_pretrained(str(path))
    assert_outputs_are_equal(module, model, images(config))


def test_logits_of_the_full_vit_b16_are_equal():
    from torchvision.models import vit_b_16

    with torch.inference_mode(), torch.random.fork_rng():
        module = perturbed(vit_b_16())
        model, x = convert.from_torchvision(module), torch.randn(1, 3, 224, 224)
        logits = module(x)
        torch.testing.assert_close(model(x), logits, rtol=0, atol=1e-5)
    assert logits.std() > 0.1
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_567_656


@pytest.mark.parametrize(
    ("name", "layers", "width", "patch"),
    [
        ("vit_l_32", 24, 1024, 32),
        ("vit_h_14", 32, 1280, 14),
    ],
)
def test_the_family_of_torchvision_converts_without_memory(name, layers, width, patch):
    from torchvision import models

    with torch.device("meta"):
        module = getattr(models, name)()
    model = convert.from_torchvision(module)
    assert [model.config[key] for key in ("num_layers", "em_dim", "patch_size")] == [layers, width, patch]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    again = convert.to_torchvision(model).state_dict()
    assert {key: value.shape for key, value in again.items()} == {k: v.shape for k, v in module.state_dict().items()}


@pytest.mark.parametrize("name", ["vit_base_patch16_384", "vit_huge_patch14_224", "deit_tiny_patch16_224"])
def test_the_plain_vits_of_timm_convert_without_memory(name):
    timm = pytest.importorskip("timm", reason=NEEDED.format("timm"))
    module = timm.create_model(name, device="meta")
    model = convert.from_timm(module)
    count = sum(parameter.numel() for parameter in module.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == count


# ---- what comes back


@every_library
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_both_directions_give_independent_float32_copies_in_eval_mode(library, dtype):
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
def test_a_frozen_or_wrapped_model_and_dropout_make_no_difference(library):
    model = ours(drop=0.3, drop_path=0.2).requires_grad_(False)
    back = FROM[library](TO[library](nn.DataParallel(model)))
    assert same(model.state_dict(), back.state_dict())
    assert back.config == {**model.config, "drop": 0.0, "drop_path": 0.0, "norm_eps": 1e-6}


@every_library
def test_a_model_without_patch_bias_goes_out_with_one_of_zeros(library):
    model = ours(patch_bias=False)
    module = TO[library](model)
    assert_outputs_are_equal(module, model, images(model.config))
    back = FROM[library](module).state_dict()
    assert not back.pop(convert.PATCH + "bias").any()
    assert same(model.state_dict(), back)


def test_a_width_that_timms_ratio_would_round_down_goes_out_whole():
    model = ours(em_dim=22, num_heads=2, ff_dim=15)
    assert int(22 * (15 / 22)) == 14
    assert_outputs_are_equal(convert.to_timm(model), model, images(model.config))


def test_a_headless_image_classifier_of_hugging_face_is_a_model_without_classes():
    transformers = pytest.importorskip("transformers", reason=NEEDED.format("transformers"))
    config = ours(0, norm_eps=1e-6).config
    theirs = build_huggingface(config).config
    module = perturbed(transformers.ViTForImageClassification(theirs))
    assert isinstance(module.classifier, nn.Identity)
    assert_outputs_are_equal(module, convert.from_huggingface(module), images(config))


# ---- names


@every_layout
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("pre_logits", [True, False])
def test_the_table_names_every_entry_of_the_model_and_no_other(layout, head, pre_logits):
    if pre_logits and (layout == "timm" or (layout.startswith("huggingface") and head)):
        with pytest.raises(ValueError, match="has no pre_logits"):
            convert.names(layout, head=head, pre_logits=pre_logits)
        return
    pairs = convert.names(layout, 3, head=head, pre_logits=pre_logits)
    model = ours(5 if head else 0, num_layers=3, pre_logits=7 if pre_logits else None)
    assert {name for _, name in pairs} == model.state_dict().keys()
    assert len({theirs for theirs, _ in pairs}) == len(pairs)


def test_the_names_are_those_of_the_libraries():
    query = "encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"
    for layout, theirs, name in (
        ("torchvision", "encoder.layers.encoder_layer_1.self_attention.in_proj_weight", "1.attention.qkv.weight"),
        ("timm", "blocks.0.mlp.fc2.bias", "0.mlp.3.bias"),
        ("huggingface", "vit.layers.0.attention.o_proj.weight", "0.attention.output.weight"),
        ("huggingface4", "vit.encoder.layer.0.attention.attention.key.bias", "0.attention.qkv.bias"),
        ("npz", f"Transformer/{query}", "1.attention.qkv.weight"),
        ("npz", "Transformer/encoderblock_0/LayerNorm_2/scale", "0.norm2.weight"),
    ):
        assert (theirs, f"vit_encoder.encoder.{name}") in convert.names(layout, num_layers=2)


@pytest.mark.parametrize(
    "call", [convert.names, partial(convert.to_state_dict, ours()), partial(convert.from_state_dict, {}, num_heads=1)]
)
def test_an_unknown_layout_lists_the_known_ones(call):
    with pytest.raises(ValueError, match="layout='keras' is not known; choose one of torchvision, timm"):
        call("keras")


SINCE_TRANSFORMERS_5 = {
    "layers.": "encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


@many_times
@given(config=configurations("huggingface"))
def test_the_spelling_of_transformers_4_is_read_and_written(config):
    torch.manual_seed(0)
    model = ours(**config)
    state = {}
    for name, value in convert.to_state_dict(model, "huggingface").items():
        for new, old in SINCE_TRANSFORMERS_5.items():
            name = name.replace(new, old)
        state[name] = value
    assert convert._spelling(state) == "huggingface4"
    assert same(state, convert.to_state_dict(model, "huggingface4"))
    back = convert.from_state_dict(state, "huggingface4", num_heads=config["num_heads"], norm_eps=config["norm_eps"])
    assert same(model.state_dict(), back.state_dict())


# ---- entries that do not fit


def refusal(convert_it, *arguments, **options) -> str:
    """The one line that it says."""
    with pytest.raises(ValueError) as error:
        convert_it(*arguments, **options)
    (line,) = str(error.value).splitlines()
    return line


def read(state: dict, layout: str) -> ViTModel:
    return convert.from_state_dict(state, layout, num_heads=4)


@every_layout
def test_missing_and_unknown_entries_are_listed(layout):
    state = convert.to_state_dict(ours(), layout)
    name = [*state][7]
    value = state.pop(name)
    assert f"(missing: {name})" in refusal(read, state, layout)
    assert "(unknown: head_dist.weight)" in refusal(read, state | {name: value, "head_dist.weight": value}, layout)


@every_layout
@pytest.mark.parametrize("change", ["longer", "flat", "deeper", "scalar"])
def test_a_misshapen_entry_is_refused(layout, change):
    state = convert.to_state_dict(ours(num_layers=3), layout)
    for name, value in state.items():
        longer = torch.zeros(*value.shape[:-1], value.shape[-1] + 1)
        wrong = {"longer": longer, "flat": value.flatten(), "deeper": value[None], "scalar": torch.zeros(())}[change]
        if wrong.shape != value.shape:
            assert "do not fit together" in refusal(read, state | {name: wrong}, layout), name


def test_positions_of_an_oblong_image_are_refused():
    state = convert.to_state_dict(ours(), "npz")
    state["Transformer/posembed_input/pos_embedding"] = torch.zeros(1, 1 + 2 * 4, 16)
    text = refusal(read, state, "npz")
    assert "position_embedding" in text and "[1, 9, 16]" in text and "[1, 5, 16]" in text


def test_a_block_that_is_left_out_is_missed():
    state = convert.to_state_dict(ours(num_layers=3), "timm")
    state = {name: value for name, value in state.items() if not name.startswith("blocks.1.")}
    assert "missing: blocks.1.attn.proj.bias, " in refusal(read, state, "timm")


@every_layout
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone.", "module._orig_mod."])
@pytest.mark.parametrize("num_classes", [5, 0])
def test_a_prefix_before_the_names_is_stripped(layout, prefix, num_classes):
    model = ours(num_classes)
    state = {prefix + name: value for name, value in convert.to_state_dict(model, layout).items()}
    assert same(read(state, layout).state_dict(), model.state_dict())
    assert convert.layout_of(state) == layout


def test_a_prefix_before_the_encoder_alone_is_stripped():
    state = convert.to_state_dict(model := ours(), "timm")
    state = {name if name.startswith("head.") else f"backbone.{name}": value for name, value in state.items()}
    assert same(read(state, "timm").state_dict(), model.state_dict())


# ---- modules that compute something else


PLAIN = ours(norm_eps=1e-6).config


def replaced(module: nn.Module, path: str, part) -> nn.Module:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, part)
    return module


OTHERS_OF_TORCHVISION = {
    "norm": lambda: build_torchvision(PLAIN, norm_layer=lambda width: nn.LayerNorm(width, bias=False)),
    "activation": lambda: replaced(build_torchvision(PLAIN), "encoder.layers.encoder_layer_1.mlp.1", nn.ReLU()),
    "tanh": lambda: replaced(build_torchvision(PLAIN), "encoder.layers.encoder_layer_0.mlp.1", nn.GELU("tanh")),
    "eps": lambda: replaced(build_torchvision(PLAIN), "encoder.ln.eps", 1e-2),
    "stride": lambda: replaced(build_torchvision(PLAIN), "conv_proj.stride", (2, 2)),
    "another parameter": lambda: replaced(build_torchvision(PLAIN), "scale", nn.Parameter(torch.ones(1))),
}


@pytest.mark.parametrize("part", OTHERS_OF_TORCHVISION)
def test_a_module_of_torchvision_with_another_part_is_refused(part):
    refusal(convert.from_torchvision, perturbed(OTHERS_OF_TORCHVISION[part]()))


@pytest.mark.parametrize(
    "arguments",
    [
        {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}, {"pos_embed": "none"}, {"pre_norm": True},
        {"no_embed_class": True}, {"qk_norm": True}, {"qkv_bias": False}, {"scale_mlp_norm": True},
        {"global_pool": "avg", "fc_norm": None}, {"global_pool": "map"}, {"global_pool": "max"}, {"global_pool": ""},
        {"global_pool": "avg", "pool_include_prefix": True}, {"final_norm": False}, {"embed_norm_layer": nn.LayerNorm},
        {"act_layer": "quick_gelu"}, {"act_layer": nn.ReLU}, {"norm_layer": nn.RMSNorm}, {"img_size": (8, 16)},
        {"img_size": 10}, {"patch_size": (4, 2)}, {"attn_layer": "diff"},
    ],
    ids=str,
)  # fmt: skip
def test_a_module_of_timm_with_another_part_is_refused(arguments):
    refusal(convert.from_timm, perturbed(build_timm(PLAIN, **arguments)))


@pytest.mark.parametrize("block", ["ParallelScalingBlock", "ResPostBlock"])
def test_other_blocks_of_timm_are_refused(block):
    module = build_timm(PLAIN)  # skips without timm
    from timm.models import vision_transformer

    refusal(convert.from_timm, perturbed(build_timm(PLAIN, block_fn=getattr(vision_transformer, block))))
    assert isinstance(module, vision_transformer.VisionTransformer)


@pytest.mark.parametrize(
    "arguments", [{"hidden_act": "relu"}, {"qkv_bias": False}, {"image_size": (8, 16)}, {"image_size": 10}], ids=str
)
def test_a_module_of_hugging_face_with_another_part_is_refused(arguments):
    refusal(convert.from_huggingface, perturbed(build_huggingface(PLAIN, **arguments)))


def test_mask_tokens_and_other_poolers_of_hugging_face_are_refused():
    transformers = pytest.importorskip("transformers", reason=NEEDED.format("transformers"))
    config = build_huggingface(PLAIN).config
    refusal(convert.from_huggingface, transformers.ViTModel(config, use_mask_token=True))
    config.pooler_act = "relu"
    refusal(convert.from_huggingface, perturbed(transformers.ViTModel(config)))


def test_a_distilled_deit_is_refused_by_its_token():
    timm = pytest.importorskip("timm", reason=NEEDED.format("timm"))
    module = timm.create_model("deit_tiny_distilled_patch16_224", device="meta")
    assert "unknown: dist_token, head_dist.bias" in refusal(convert.from_timm, module)


@every_library
def test_a_module_of_another_kind_is_refused(library):
    BUILD[library](PLAIN)  # skips without the library
    assert "Linear cannot be converted; give the class " in refusal(FROM[library], nn.Linear(2, 2))
    assert "Linear holds no ViTModel" in refusal(TO[library], nn.Linear(2, 2))


def test_dropout_of_any_kind_is_no_other_part():
    rates = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
    module = perturbed(build_timm(PLAIN, **dict.fromkeys(rates, 0.1)))
    model = convert.from_timm(module.train())
    assert_outputs_are_equal(module.eval(), model, images(PLAIN))


@pytest.mark.parametrize("size", [{}, {"global_pool": "avg", "fc_norm": False}])
def test_layer_scale_of_timm_is_multiplied_in(size):
    module = perturbed(build_timm(PLAIN, init_values=1e-1, **size))
    assert_outputs_are_equal(module, convert.from_timm(module), images(PLAIN))


@pytest.mark.parametrize(
    ("layout", "changes", "part"),
    [
        *((layout, {"norm_first": False}, "norm_first=False") for layout in convert.LAYOUTS),
        *((layout, {"pooling": "mean"}, "pooling='mean'") for layout in convert.LAYOUTS if layout != "timm"),
        ("timm", {"pre_logits": 4}, "pre_logits=4"),
        ("huggingface", {"pre_logits": 4}, "pre_logits=4"),
        ("npz", {"norm_eps": 1e-5}, "norm_eps=1e-05"),
    ],
)
def test_an_option_that_the_library_lacks_is_named(layout, changes, part):
    text = refusal(convert.to_state_dict, ours(**changes), layout)
    assert text.startswith(f"The layout {layout} has no {part}") and "; keep such a model with" in text


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_missing_library_is_named_with_its_command(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    to = {"timm": convert.to_timm, "transformers": convert.to_huggingface}[library]
    with pytest.raises(ModuleNotFoundError, match=f"{library} is not installed; install it with `pip install"):
        to(ours())


# ---- .npz files


def test_the_axes_of_an_npz_file_are_those_of_flax(tmp_path):
    model = ours(num_layers=1, pre_logits=6)
    convert.to_npz(model, path := tmp_path / "ViT.npz")
    file, block = np.load(path), "Transformer/encoderblock_0/"
    shapes = {
        "embedding/kernel": (4, 4, 3, 16),
        "cls": (1, 1, 16),
        "Transformer/posembed_input/pos_embedding": (1, 5, 16),
        f"{block}MultiHeadDotProductAttention_1/value/kernel": (16, 4, 4),
        f"{block}MultiHeadDotProductAttention_1/value/bias": (4, 4),
        f"{block}MultiHeadDotProductAttention_1/out/kernel": (4, 4, 16),
        f"{block}MlpBlock_3/Dense_0/kernel": (16, 32),
        "pre_logits/kernel": (16, 6),
        "head/kernel": (6, 5),
    }
    assert {name: file[name].shape for name in shapes} == shapes
    # by the formulas of flax: a patch of pixels with channels last, then keys by einsum over inputs, heads and widths
    x = images(model.config, 1)
    patch = x[0, :, :4, 4:].permute(1, 2, 0).numpy()
    token = np.einsum("pqc,pqcd->d", patch, file["embedding/kernel"]) + file["embedding/bias"]
    positions = file["Transformer/posembed_input/pos_embedding"]
    with torch.no_grad():
        embedded = model.vit_encoder.embedding(x)
        np.testing.assert_allclose(embedded[0, 2], token + positions[0, 2], atol=1e-5)
        attention = model.vit_encoder.encoder[0].attention
        key = attention.qkv(embedded)[..., 16:32]
    kernel, bias = (file[f"{block}MultiHeadDotProductAttention_1/key/{leaf}"] for leaf in ("kernel", "bias"))
    expected = np.einsum("btd,dhk->bthk", embedded, kernel) + bias
    np.testing.assert_allclose(key.unflatten(-1, (4, 4)), expected, atol=1e-5)


def test_a_headless_npz_file_is_a_model_without_classes(tmp_path):
    model = ours(0)
    convert.to_npz(model, tmp_path / "ViT.npz")
    back = official.from_file(tmp_path / "ViT.npz")
    assert back.config["num_classes"] == 0
    assert same(model.state_dict(), back.state_dict())


@pytest.mark.parametrize("content", [b"", b"no zip file", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_npz_file_is_refused(content, tmp_path):
    path = tmp_path / "ViT.npz"
    path.write_bytes(content)
    assert f"{path} is not a whole file of weights (" in refusal(official.from_file, path)


def test_pickled_objects_in_an_npz_file_are_refused(tmp_path):
    np.savez(tmp_path / "pickled.npz", cls=np.array([{}], dtype=object))
    assert "allow_pickle=False" in refusal(official.from_file, tmp_path / "pickled.npz")


def test_big_visions_names_are_not_mistaken_for_ours(tmp_path):
    """They have other numbers on the same kinds of layers."""
    state = convert.to_state_dict(ours(num_layers=1), "npz")
    renamed = {name.replace("MlpBlock_3", "MlpBlock_0"): value.numpy() for name, value in state.items()}
    np.savez(tmp_path / "big_vision.npz", **renamed)
    assert "are not those of torchvision, timm" in refusal(official.from_file, tmp_path / "big_vision.npz")


# ---- files of other projects, and official weights


def write(path, state: dict) -> None:
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in state.items()})
    else:
        torch.save({"model": state, "epoch": 3}, path)


FILES = {
    "torchvision": ("weights.pth", "torchvision"),
    "timm": ("model.safetensors", "timm"),
    "huggingface": ("model.safetensors", "Hugging Face"),
    "huggingface4": ("pytorch_model.bin", "Hugging Face"),
    "npz": ("ViT.npz", "Google"),
}


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_foreign_files_are_refused_with_the_line_that_converts_them(tmp_path, layout, prefix):
    """Of the width of Ti/16, so that the number of heads is known."""
    name, library = FILES[layout]
    model = ours(em_dim=192, num_heads=3, num_layers=1, norm_eps=1e-12 if "hugging" in layout else 1e-6)
    write(tmp_path / name, {prefix + key: value for key, value in convert.to_state_dict(model, layout).items()})
    text = refusal(load_weights, tmp_path / name)
    assert f"{name} is not a checkpoint of vitlib: it holds weights of {library}; convert them with " in text
    (line,) = re.findall(r"vitlib\.weights\.official\.(from_file\('.*'\)), then save_checkpoint", text)
    converted = eval(line, {"from_file": official.from_file})  # noqa: S307 (a line of ours)
    assert same(converted.state_dict(), model.state_dict()) and converted.config == model.config


def test_files_of_other_models_are_called_that(tmp_path):
    write(tmp_path / "resnet.pth", {"conv1.weight": torch.zeros(1)})
    assert "it holds weights of another model; give those of a plain ViT." in refusal(
        load_weights, tmp_path / "resnet.pth"
    )
    assert "such as conv1.weight, are not those of" in refusal(official.from_file, tmp_path / "resnet.pth")


def test_heads_of_an_unusual_width_have_to_be_given(tmp_path):
    write(tmp_path / "a.pth", convert.to_state_dict(model := ours(), "timm"))
    assert "No published ViT has the width 16; give num_heads" in refusal(official.from_file, tmp_path / "a.pth")
    assert same(official.from_file(tmp_path / "a.pth", num_heads=4).state_dict(), model.state_dict())


def test_dinov2_without_registers_gives_equal_features(tmp_path):
    timm = pytest.importorskip("timm", reason=NEEDED.format("timm"))
    module = perturbed(timm.create_model("vit_small_patch14_dinov2", img_size=56, depth=2))
    write(tmp_path / "dinov2.pth", module.state_dict() | {"mask_token": torch.zeros(1, 384)})
    assert_outputs_are_equal(module, official.from_file(tmp_path / "dinov2.pth"), torch.randn(1, 3, 56, 56))


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """What would be downloaded, by address: small models stand for the official ones."""
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path))
    states = {}

    def download(address, folder, *arguments, **options):
        assert options["weights_only"] and options["check_hash"]
        folder.mkdir(exist_ok=True)
        write(folder / address.rpartition("/")[2], states[address])

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    return states


def test_official_weights_are_loaded_by_name(downloads):
    from torchvision.models import ViT_B_16_Weights

    small = {"num_layers": 1, "em_dim": 192, "num_heads": 3}
    official_b16, deit, dino = ours(1000, **small), ours(1000, **small), ours(0, **small)
    downloads[ViT_B_16_Weights.DEFAULT.url] = convert.to_state_dict(official_b16, "torchvision")
    downloads[official.OFFICIAL["deit_tiny_patch16_224"]] = convert.to_state_dict(deit, "timm")
    downloads[official.OFFICIAL["dinov2_vits14"]] = convert.to_state_dict(dino, "timm")
    names = {"vit_b_16": official_b16, "deit_tiny_patch16_224": deit, "dinov2_vits14": dino}
    for name, expected in names.items():
        model, card = load_weights(name)
        assert same(model.state_dict(), expected.state_dict()) and card.origin == f"trained on {name}"
        assert len(card.classes) == model.config["num_classes"] and card.mean == (0.485, 0.456, 0.406)
    assert load_weights("vit_b_16")[1].classes[0] == "tench"
    assert load_weights("vit_b_16", image_size=16)[0].config["image_size"] == 16


def test_the_addresses_of_torchvision_are_known():
    from torchvision.models import get_model_weights

    for name, address in official.OFFICIAL.items():
        assert (address or get_model_weights(name).DEFAULT.url).startswith("https://")


def test_without_a_network_official_weights_give_one_sentence(downloads, monkeypatch):
    def offline(*arguments, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(OSError, match=r"^deit_tiny_patch16_224 could not be downloaded \(.*no route to host.*\); put "):
        load_weights("deit_tiny_patch16_224")


# ---- positions at another resolution


@pytest.mark.parametrize("grid", [1, 3, 6, 7, 12])
def test_interpolated_positions_equal_those_of_timm(grid):
    pytest.importorskip("timm", reason=NEEDED.format("timm"))
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, 1 + 6 * 6, 8)
    theirs = resample_abs_pos_embed(positions, [grid, grid], [6, 6], antialias=False)
    torch.testing.assert_close(interpolate_positions(positions, grid), theirs, rtol=0, atol=1e-6)
