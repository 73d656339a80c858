"""Weights from and to other libraries: equal outputs and gradients, round trips bit for bit, and what is refused."""

import gc
import subprocess
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
from vitlib.weights import convert

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


many_times = settings(max_examples=25, deadline=None, derandomize=True)
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
    back = convert.from_npz(path)
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


def full_size(library: str) -> nn.Module:
    if library == "torchvision":
        from torchvision.models import vit_b_16

        return vit_b_16()
    if library == "timm":
        return pytest.importorskip("timm", reason=NEEDED.format("timm")).create_model("vit_base_patch16_224")
    transformers = pytest.importorskip("transformers", reason=NEEDED.format("transformers"))
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))


@every_library
def test_logits_of_the_full_vit_b16_are_equal(library):
    with torch.inference_mode(), torch.random.fork_rng():
        module = perturbed(full_size(library))
        x = torch.randn(1, 3, 224, 224)
        logits = run(module, x)
        model = FROM[library](module)
        del module
        gc.collect()
        torch.testing.assert_close(model(x), logits, rtol=0, atol=1e-5)
    assert logits.std() > 0.1
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_567_656


@pytest.mark.parametrize(
    ("name", "layers", "width", "patch"),
    [
        ("vit_b_16", 12, 768, 16),
        ("vit_b_32", 12, 768, 32),
        ("vit_l_16", 24, 1024, 16),
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


@pytest.mark.parametrize(
    "name",
    [
        *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
        "vit_base_patch32_224",
        "vit_base_patch16_384",
        "vit_huge_patch14_224",
        *(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
    ],
)
def test_the_plain_vits_of_timm_convert_without_memory(name):
    timm = pytest.importorskip("timm", reason=NEEDED.format("timm"))
    module = timm.create_model(name, device="meta")
    model = convert.from_timm(module)
    count = sum(parameter.numel() for parameter in module.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_the_tiny_vits_of_timm_give_equal_logits(name):
    timm = pytest.importorskip("timm", reason=NEEDED.format("timm"))
    module = perturbed(timm.create_model(name))
    assert_outputs_are_equal(module, convert.from_timm(module), torch.randn(1, 3, 224, 224))


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


@pytest.mark.parametrize("call", [convert.names, partial(convert.to_state_dict, ours(norm_first=False))])
def test_an_unknown_layout_lists_the_known_ones(call):
    with pytest.raises(ValueError, match="layout='keras' is not known; choose one of torchvision, timm"):
        call("keras")
    with pytest.raises(ValueError, match="layout='keras' is not known"):
        convert.from_state_dict({}, "keras", num_heads=1)


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


def read(state: dict, layout: str) -> ViTModel:
    return convert.from_state_dict(state, layout, num_heads=4)


@every_layout
@many_times
@given(data=st.data())
def test_a_missing_entry_is_listed_by_their_name(layout, data):
    state = convert.to_state_dict(ours(), layout)
    name = data.draw(st.sampled_from([*state]))
    del state[name]
    with pytest.raises(ValueError) as error:
        read(state, layout)
    assert f"(missing: {name})" in str(error.value)


@every_layout
@pytest.mark.parametrize("place", ["{}", "x", "deeper"])
def test_an_unknown_entry_is_listed(layout, place):
    state = convert.to_state_dict(ours(), layout)
    extra = {"x": "x", "{}": f"{[*state][5]}x", "deeper": "head_dist.weight"}[place]
    state[extra] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        read(state, layout)
    assert f"(unknown: {extra})" in str(error.value)


@every_layout
@many_times
@given(data=st.data())
def test_a_misshapen_entry_is_listed_with_both_shapes(layout, data):
    state = convert.to_state_dict(ours(num_layers=3), layout)
    name = data.draw(st.sampled_from([*state]))
    value = state[name]
    change = data.draw(st.sampled_from(["longer", "transposed", "flat", "deeper", "scalar"]))
    wrong = {
        "longer": torch.zeros(*value.shape[:-1], value.shape[-1] + 1),
        "transposed": value.transpose(0, -1),
        "flat": value.flatten(),
        "deeper": value[None],
        "scalar": torch.zeros(()),
    }[change]
    if wrong.shape == value.shape:
        return
    state[name] = wrong
    with pytest.raises(ValueError) as error:
        read(state, layout)
    text = str(error.value)
    ours_of = dict(convert.names(layout, 3))
    if ours_of[name].startswith(convert.HEAD):  # of a weight and a bias that differ, either may be right
        assert f"(misshapen: {name.rpartition('/' if layout == 'npz' else '.')[0]}" in text
    elif ours_of[name] in (convert.PATCH + "weight", convert.POSITIONS):  # nothing else tells their shape
        assert f"(misshapen: {name} {list(wrong.shape)} in place of [" in text
    else:
        assert f"(misshapen: {name} {list(wrong.shape)} in place of {list(value.shape)})" in text


def test_long_lists_of_entries_are_cut_and_counted():
    with pytest.raises(ValueError) as error:
        read({"a": torch.zeros(1)}, "timm")
    assert str(error.value) == (
        "This state dict is not that of a plain ViT of timm (missing: blocks.0.attn.proj.bias, "
        "blocks.0.attn.proj.weight, blocks.0.attn.qkv.bias, blocks.0.attn.qkv.weight, blocks.0.mlp.fc1.bias, "
        "blocks.0.mlp.fc1.weight, blocks.0.mlp.fc2.bias, blocks.0.mlp.fc2.weight, blocks.0.norm1.bias, "
        "blocks.0.norm1.weight and 8 more; unknown: a); give the whole state dict, with nothing added."
    )


def test_a_classifier_of_hugging_face_without_its_head_misses_it():
    """The names begin with ``vit.`` only where there is one."""
    state = convert.to_state_dict(ours(), "huggingface")
    state = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    with pytest.raises(ValueError, match=r"\(missing: classifier.bias, classifier.weight\)"):
        read(state, "huggingface")


def test_a_block_that_is_left_out_is_missed():
    state = convert.to_state_dict(ours(num_layers=3), "timm")
    state = {name: value for name, value in state.items() if not name.startswith("blocks.1.")}
    with pytest.raises(ValueError, match=r"missing: blocks\.1\..*unknown: blocks\.2\."):
        read(state, "timm")


@every_library
def test_a_parameter_that_was_added_to_a_module_is_listed(library):
    module = TO[library](ours())
    module.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match="unknown: scale"):
        FROM[library](module)


def test_positions_of_an_oblong_image_are_listed():
    state = convert.to_state_dict(ours(), "npz")
    state["Transformer/posembed_input/pos_embedding"] = torch.zeros(1, 1 + 2 * 4, 16)
    with pytest.raises(ValueError, match=r"pos_embedding \[1, 9, 16\] in place of \[1, 5, 16\]"):
        read(state, "npz")


# ---- parts that our class does not have


def refusal(convert_it, module) -> str:
    """What it says, which has to be one line."""
    with pytest.raises(ValueError) as error:
        convert_it(module)
    (line,) = str(error.value).splitlines()
    return line


def test_convolutional_stem_of_torchvision_is_refused():
    from torchvision.models.vision_transformer import ConvStemConfig

    stem = [ConvStemConfig(out_channels=8, kernel_size=4, stride=4)]
    module = build_torchvision({**ours(norm_eps=1e-6).config}, conv_stem_configs=stem)
    assert "This model of torchvision has conv_stem_configs, which ViTModel does not have" in refusal(
        convert.from_torchvision, module
    )


def test_other_norms_activations_and_strides_of_torchvision_are_refused():
    config = ours(norm_eps=1e-6).config
    assert "has norm_layer=RMSNorm, which" in refusal(
        convert.from_torchvision, build_torchvision(config, norm_layer=nn.RMSNorm)
    )
    module = build_torchvision(config)
    module.encoder.layers[1].mlp[1] = nn.GELU(approximate="tanh")
    assert "has act_layer=GELU(approximate='tanh'), which" in refusal(convert.from_torchvision, module)
    module = build_torchvision(config)
    module.encoder.ln.eps = 1e-3
    assert "has layer norms with different eps, which" in refusal(convert.from_torchvision, module)
    module = build_torchvision(config)
    module.conv_proj.stride = (2, 2)
    assert "stride=(2, 2)" in refusal(convert.from_torchvision, module)


TIMM_PARTS = [
    ({"class_token": False, "global_pool": "avg"}, "class_token=False"),
    ({"reg_tokens": 4}, "reg_tokens=4"),
    ({"pos_embed": "none"}, "pos_embed='none'"),
    ({"no_embed_class": True}, "no_embed_class=True"),
    ({"pre_norm": True}, "pre_norm=True"),
    ({"init_values": 1e-5}, "init_values (LayerScale)"),
    ({"qk_norm": True}, "qk_norm=True"),
    ({"scale_attn_norm": True}, "scale_attn_norm=True"),
    ({"scale_mlp_norm": True}, "scale_mlp_norm=True"),
    ({"qkv_bias": False}, "qkv_bias=False"),
    ({"proj_bias": False}, "proj_bias=False"),
    ({"global_pool": "avg", "fc_norm": None}, "fc_norm=True (the last norm after the pooling)"),
    ({"global_pool": "map"}, "global_pool='map'"),
    ({"global_pool": "max"}, "global_pool='max'"),
    ({"global_pool": ""}, "global_pool=''"),
    ({"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix=True"),
    ({"final_norm": False}, "final_norm=False"),
    ({"dynamic_img_size": True}, "dynamic_img_size=True"),
    ({"dynamic_img_pad": True}, "dynamic_img_pad=True"),
    ({"embed_norm_layer": nn.LayerNorm}, "embed_norm_layer"),
    ({"act_layer": "quick_gelu"}, "act_layer=QuickGELU"),
    ({"act_layer": nn.ReLU}, "act_layer=ReLU()"),
    ({"norm_layer": nn.RMSNorm}, "norm_layer=RMSNorm"),
    ({"block_fn": "ParallelScalingBlock"}, "block_fn=ParallelScalingBlock"),
    ({"block_fn": "ResPostBlock"}, "block_fn=ResPostBlock"),
    ({"attn_layer": "diff"}, "attn_layer=DiffAttention"),
    ({"mlp_layer": "GluMlp"}, "mlp_layer=GluMlp"),
    ({"img_size": (8, 16)}, "img_size=(8, 16) and patch_size=(4, 4), which are not square"),
    ({"patch_size": (4, 2)}, "which are not square"),
    ({"img_size": 10}, "img_size=10, which is not a multiple of patch_size=4"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "part"), TIMM_PARTS, ids=[part for _, part in TIMM_PARTS])
def test_a_part_of_timm_that_we_do_not_have_is_named(arguments, part):
    pytest.importorskip("timm", reason=NEEDED.format("timm"))
    from timm import layers
    from timm.models import vision_transformer

    for name, owner in (("block_fn", vision_transformer), ("mlp_layer", layers)):
        if name in arguments:
            arguments = {**arguments, name: getattr(owner, arguments[name])}
    module = build_timm(ours(norm_eps=1e-6).config, **arguments)
    text = refusal(convert.from_timm, module)
    assert text.startswith("This model of timm has ")
    assert part in text
    assert text.count("=") + text.count("(") <= 6  # that part, and no others


def test_a_distilled_deit_is_refused_by_its_token():
    timm = pytest.importorskip("timm", reason=NEEDED.format("timm"))
    module = timm.create_model("deit_tiny_distilled_patch16_224", device="meta")
    assert "has dist_token (a distilled DeiT), which" in refusal(convert.from_timm, module)


def test_several_parts_are_named_at_once():
    module = build_timm(ours(norm_eps=1e-6).config, reg_tokens=1, init_values=1e-5, qk_norm=True)
    assert "has reg_tokens=1, init_values (LayerScale), qk_norm=True, which" in refusal(convert.from_timm, module)


def test_what_acts_in_training_only_is_no_hindrance():
    config = ours(norm_eps=1e-6).config
    module = build_timm(
        config, drop_rate=0.1, pos_drop_rate=0.1, patch_drop_rate=0.5, proj_drop_rate=0.1, attn_drop_rate=0.1,
        drop_path_rate=0.1,
    )  # fmt: skip
    assert_outputs_are_equal(perturbed(module), convert.from_timm(module), images(config))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("swin_tiny_patch4_window7_224", "SwinTransformer"), ("resnet18", "ResNet"), ("beit_base_patch16_224", "Beit")],
)
def test_a_model_of_timm_that_is_no_vit_is_refused(name, kind):
    timm = pytest.importorskip("timm", reason=NEEDED.format("timm"))
    text = refusal(convert.from_timm, timm.create_model(name, device="meta"))
    assert f"{kind} cannot be converted; give the class VisionTransformer of timm." in text


@every_library
def test_a_module_of_another_kind_is_refused(library):
    BUILD[library](ours(norm_eps=1e-6).config)  # skips without the library
    assert "torch.nn.modules.linear.Linear cannot be converted; give the class " in refusal(
        FROM[library], nn.Linear(2, 2)
    )
    with pytest.raises(ValueError, match="Linear holds no ViTModel"):
        TO[library](nn.Linear(2, 2))


@every_library
def test_a_subclass_is_refused_since_it_may_compute_anything(library):
    module = TO[library](ours())
    module.__class__ = type("Variant", (type(module),), {})
    assert "Variant cannot be converted" in refusal(FROM[library], module)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ({"qkv_bias": False}, "qkv_bias=False"),
        ({"image_size": (8, 16)}, "image_size=(8, 16) and patch_size=4, which are not square"),
        ({"image_size": 10}, "image_size=10, which is not a multiple of patch_size=4"),
    ],
)
def test_a_part_of_hugging_face_that_we_do_not_have_is_named(arguments, part):
    module = build_huggingface(ours(norm_eps=1e-6).config, **arguments)
    assert f"This model of Hugging Face has {part}, which ViTModel does not have" in refusal(
        convert.from_huggingface, module
    )


def test_mask_tokens_other_poolers_and_other_classes_of_hugging_face_are_refused():
    transformers = pytest.importorskip("transformers", reason=NEEDED.format("transformers"))
    config = build_huggingface(ours(norm_eps=1e-6).config).config
    module = transformers.ViTModel(config, use_mask_token=True)
    assert "has use_mask_token=True, which" in refusal(convert.from_huggingface, module)
    config.pooler_act = "relu"
    assert "has pooler_act='relu', which" in refusal(convert.from_huggingface, transformers.ViTModel(config))
    deit = transformers.DeiTForImageClassification(transformers.DeiTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    ))  # fmt: skip
    assert (
        "DeiTForImageClassification cannot be converted; give the class ViTForImageClassification of transformers or"
        in refusal(convert.from_huggingface, deit)
    )


@pytest.mark.parametrize(
    ("layout", "changes", "part"),
    [
        *((layout, {"norm_first": False}, "norm_first=False") for layout in convert.LAYOUTS),
        *((layout, {"pooling": "mean"}, "pooling='mean'") for layout in convert.LAYOUTS if layout != "timm"),
        ("timm", {"pre_logits": 4}, "pre_logits=4"),
        ("huggingface", {"pre_logits": 4}, "pre_logits=4 before a classifier"),
        ("npz", {"norm_eps": 1e-5}, "norm_eps=1e-05"),
    ],
)
def test_an_option_that_the_library_does_not_have_is_named(layout, changes, part):
    text = refusal(partial(convert.to_state_dict, layout=layout), ours(**changes))
    assert f"has no counterpart of {part}" in text
    assert "save_checkpoint" in text


@every_library
def test_the_same_is_said_by_the_converter(library):
    assert "has no counterpart of norm_first=False" in refusal(TO[library], ours(norm_first=False))


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_missing_library_gives_one_sentence_with_the_way_out(library, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    name = {"transformers": "huggingface"}.get(library, library)
    with pytest.raises(
        ModuleNotFoundError, match=f"{library} is not installed; install it with `pip install {library}`"
    ):
        TO[name](ours())


def test_importing_the_module_imports_none_of_the_libraries():
    code = (
        "import sys, vitlib.weights.convert; print({'torchvision', 'timm', 'transformers', 'PIL'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


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
    back = convert.from_npz(tmp_path / "ViT.npz")
    assert back.config["num_classes"] == 0
    assert same(model.state_dict(), back.state_dict())


@pytest.mark.parametrize("content", [b"", b"no zip file", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_npz_file_gives_one_sentence(content, tmp_path):
    path = tmp_path / "ViT.npz"
    path.write_bytes(content)
    assert f"{path} is not a whole .npz file of arrays (" in refusal(convert.from_npz, path)


def test_pickled_objects_and_single_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "pickled.npz", cls=np.array([{}], dtype=object))
    assert "allow_pickle=False" in refusal(convert.from_npz, tmp_path / "pickled.npz")
    np.save(tmp_path / "single.npy", np.zeros(3))
    assert "is not a whole .npz file" in refusal(convert.from_npz, tmp_path / "single.npy")
    with pytest.raises(FileNotFoundError):
        convert.from_npz(tmp_path / "none.npz")


def test_files_of_another_naming_list_their_entries(tmp_path):
    """big_vision's: other numbers on the same kinds of layers."""
    state = convert.to_state_dict(ours(num_layers=1), "npz")
    renamed = {name.replace("MlpBlock_3", "MlpBlock_0"): value.numpy() for name, value in state.items()}
    np.savez(tmp_path / "big_vision.npz", **renamed)
    text = refusal(convert.from_npz, tmp_path / "big_vision.npz")
    assert "missing: Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias" in text
    assert "unknown: Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias" in text


def test_a_model_without_numbers_is_not_written(tmp_path):
    with torch.device("meta"):
        model = ViTModel(5, **SIZES)
    assert "has no weights to write" in refusal(partial(convert.to_npz, path=tmp_path / "ViT.npz"), model)
    assert not [*tmp_path.iterdir()]


# ---- positions at another resolution


@pytest.mark.parametrize("grid", [1, 3, 6, 7, 12])
def test_interpolated_positions_equal_those_of_timm(grid):
    pytest.importorskip("timm", reason=NEEDED.format("timm"))
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, 1 + 6 * 6, 8)
    theirs = resample_abs_pos_embed(positions, [grid, grid], [6, 6], antialias=False)
    torch.testing.assert_close(interpolate_positions(positions, grid), theirs, rtol=0, atol=1e-6)
