"""Weights of other projects: from files of every kind, and official ones by name."""

import re
import urllib.error

import numpy as np
import pytest
import torch
from conftest import refusal
from safetensors.torch import save_file
from test_convert import assert_outputs_are_equal, ours, perturbed, same

from vitlib.weights import convert, load_weights, official


def write(path, state: dict) -> None:
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in state.items()})
    else:  # also under names that no list would have
        torch.save({"params": state, "optimizer": {"state": {0: {}}}, "epoch": 3}, path)


FILES = {
    "torchvision": "weights.pth", "timm": "model.safetensors", "huggingface": "model.safetensors", "npz": "ViT.npz",
}  # fmt: skip


@pytest.mark.parametrize(("layout", "name"), FILES.items())
def test_foreign_files_are_refused_with_the_function_that_converts_them(tmp_path, layout, name):
    """Of the width of Ti/16, so that the number of heads is known."""
    norm_eps = 1e-12 if layout == "huggingface" else 1e-6
    model = ours(em_dim=192, num_heads=3, num_layers=1, norm_eps=norm_eps)
    write(tmp_path / name, convert.to_state_dict(model, layout))
    assert "convert it with vitlib.weights.official.from_file." in refusal(load_weights, tmp_path / name)
    converted = official.from_file(tmp_path / name)
    assert same(converted.state_dict(), model.state_dict()) and converted.config == model.config


def test_files_of_other_models_are_called_that(tmp_path):
    path = tmp_path / "resnet.pth"
    write(path, {"conv1.weight": torch.zeros(1)})
    assert "such as conv1.weight, are not those of" in refusal(official.from_file, path)
    torch.save(ours(), path)
    assert "holds Python objects, such as a whole model" in refusal(official.from_file, path)


def test_heads_of_an_unusual_width_have_to_be_given(tmp_path):
    write(tmp_path / "a.pth", convert.to_state_dict(model := ours(), "timm"))
    assert "No published ViT has the width 16; give num_heads" in refusal(official.from_file, tmp_path / "a.pth")
    assert same(official.from_file(tmp_path / "a.pth", num_heads=4).state_dict(), model.state_dict())


def test_dinov2_without_registers_gives_equal_features(tmp_path):
    import timm

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
    from torchvision.models import ViT_B_16_Weights, list_models

    assert {name for name, address in official.OFFICIAL.items() if not address} <= {*list_models()}
    small = {"num_layers": 1, "em_dim": 192, "num_heads": 3}
    official_b16, deit, dino = ours(1000, **small), ours(1000, **small), ours(0, **small)
    older = {".mlp.0.": ".mlp.linear_1.", ".mlp.3.": ".mlp.linear_2."}  # names in the published files
    downloads[ViT_B_16_Weights.DEFAULT.url] = {
        re.sub(r"\.mlp\.[03]\.", lambda match: older[match[0]], name): value
        for name, value in convert.to_state_dict(official_b16, "torchvision").items()
    }
    downloads[official.OFFICIAL["deit_tiny_patch16_224"]] = convert.to_state_dict(deit, "timm")
    downloads[official.OFFICIAL["dinov2_vits14"]] = convert.to_state_dict(dino, "timm")
    names = {"vit_b_16": official_b16, "deit_tiny_patch16_224": deit, "dinov2_vits14": dino}
    for name, expected in names.items():
        model, card = load_weights(name)
        assert same(model.state_dict(), expected.state_dict()) and card.record == {"source": name}
        assert len(card.classes) == model.config["num_classes"] and card.mean == (0.485, 0.456, 0.406)
    assert load_weights("vit_b_16")[1].classes[0] == "tench"
    assert load_weights("vit_b_16", image_size=16)[0].config["image_size"] == 16


def test_without_a_network_official_weights_give_one_sentence(downloads, monkeypatch):
    def offline(*arguments, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(OSError, match=r"^deit_tiny_patch16_224 could not be downloaded or read \(.*no route.*\); put "):
        load_weights("deit_tiny_patch16_224")
