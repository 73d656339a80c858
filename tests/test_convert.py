"""Weights from and to other libraries: equal outputs, round trips bit for bit, and refusals."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitlib.model import ViTModel, interpolate_positions
from vitlib.utils import import_torchvision
from vitlib.weights import convert, official

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
def test_outputs_equal_those_of_the_library(library, data):
    config = data.draw(configurations(library))
    torch.manual_seed(0)
    module, x = perturbed(BUILD[library](config)), images(config)
    model = FROM[library](module)
    assert {**model.config, **config} == model.config  # every option as it was drawn
    assert_outputs_are_equal(module, model, x)


@every_library
@many_times
@given(data=st.data())
def test_round_trips_change_no_bit(library, data):
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

    with torch.device("meta"):  # its own random numbers would take seconds, and are replaced
        module = vit_b_16()
    module = perturbed(
        module.to_empty(device="cpu").apply(lambda part: [p.data.fill_(p.ndim == 1) for p in part.parameters()])
    )
    model, x = convert.from_torchvision(module), torch.randn(1, 3, 224, 224)
    assert_outputs_are_equal(module, model, x)
    assert model(x).std() > 0.1
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_567_656


def test_vit_h14_of_torchvision_converts_without_memory():
    from torchvision import models

    with torch.device("meta"):
        module = models.vit_h_14()
    model = convert.from_torchvision(module)
    assert [model.config[key] for key in ("num_layers", "em_dim", "patch_size")] == [32, 1280, 14]
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
def test_frozen_and_wrapped_models_convert_alike(library):
    model = ours(drop=0.3, drop_path=0.2).requires_grad_(False)
    back = FROM[library](TO[library](nn.DataParallel(model)))
    assert same(model.state_dict(), back.state_dict())
    assert back.config == {**model.config, "drop": 0.0, "drop_path": 0.0, "norm_eps": 1e-6}


@every_library
def test_a_missing_patch_bias_goes_out_as_zeros(library):
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


def test_a_headless_classifier_of_hugging_face_has_no_classes():
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
def test_the_table_names_every_entry(layout, head, pre_logits):
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


# ---- positions at another resolution


@pytest.mark.parametrize("grid", [1, 3, 6, 7, 12])
def test_interpolated_positions_equal_those_of_timm(grid):
    pytest.importorskip("timm", reason=NEEDED.format("timm"))
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, 1 + 6 * 6, 8)
    theirs = resample_abs_pos_embed(positions, [grid, grid], [6, 6], antialias=False)
    torch.testing.assert_close(interpolate_positions(positions, grid), theirs, rtol=0, atol=1e-6)
