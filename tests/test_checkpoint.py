"""Checkpoints: what goes in comes out, nothing half-written, nothing unpickled, only the encoder is moved."""

import pickle
import re
import runpy
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY, refusal
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed, nn

from vitlib.model import ViTModel, interpolate_positions
from vitlib.weights import checkpoint
from vitlib.weights.checkpoint import (
    ModelCard,
    fingerprint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    transfer_encoder,
    unwrap,
    with_image_size,
    without_wrappers,
)
from vitlib.weights.official import from_file

CARD = ModelCard(("cat", "dog", "Übergröße"), (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), None, {"seed": 3, "source": "pets"})


@pytest.fixture
def model():
    return ViTModel(3, **TINY).eval()


# ---- files


def test_round_trip_keeps_weights_configuration_and_card(model, tmp_path):
    card = replace(CARD, record=CARD.record | {"source": tmp_path / "pets"})  # JSON has no paths
    save_checkpoint(tmp_path / "a.safetensors", model, card)
    loaded, card = load_checkpoint(tmp_path / "a.safetensors")
    assert card == replace(CARD, record=CARD.record | {"source": str(tmp_path / "pets")})
    assert loaded.config == model.config and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_file_that_is_not_a_whole_checkpoint_is_refused(model, tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, model, CARD)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in [*file.keys()][1:]}
    path.write_bytes(path.read_bytes()[:-100])
    words = f"{path} is not a whole checkpoint of vitlib ("
    assert refusal(load_weights, path).startswith(words)
    save_file(tensors, path, metadata=metadata)
    assert refusal(load_weights, path).startswith(words)
    save_file(model.state_dict(), path)
    assert refusal(load_weights, path).startswith(words + "it has no model card); ")


def test_the_home_folder_can_be_written_as_tilde(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save_checkpoint("~/a.safetensors", model, CARD)
    assert (tmp_path / "a.safetensors").exists() and load_weights("~/a.safetensors")[1] == CARD


# ---- files that run code when they are unpickled


TRAPS = {
    "a pickle": lambda path, trap: path.write_bytes(pickle.dumps(trap, protocol=2)),
    "by torch": lambda path, trap: torch.save({"vit_encoder.layernorm.weight": torch.ones(16), "card": trap}, path),
}


@pytest.mark.parametrize("kind", TRAPS)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.npz"])
def test_a_file_that_would_run_code_is_not_run(tmp_path, kind, name, trap):
    TRAPS[kind](tmp_path / name, trap)
    assert "is not a whole checkpoint" in refusal(load_weights, tmp_path / name)
    assert re.search("is damaged, or not a file of weights|holds Python objects", refusal(from_file, tmp_path / name))


# ---- shipped weights


def test_a_shipped_checkpoint_is_found_by_name(model, tmp_path, monkeypatch):
    ship = runpy.run_path(str(ROOT / "tools" / "ship.py"))["ship"]
    save_checkpoint(tmp_path / "trained.safetensors", model, CARD)
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path / "shipped")
    monkeypatch.setitem(ship.__globals__, "PRETRAINED", tmp_path / "shipped")
    ship(tmp_path / "trained.safetensors", "first", note="x")
    with safe_open(tmp_path / "shipped" / "first.safetensors", framework="pt") as file:
        assert file.get_tensor("linear_classifier.bias").dtype == torch.float16
    loaded, card = load_weights("first")
    assert card == replace(CARD, record=CARD.record | {"note": "x"})
    torch.testing.assert_close(loaded.linear_classifier.weight, model.linear_classifier.weight, rtol=0, atol=1e-3)


# ---- models made of models


def test_transfer_leaves_the_pre_logits_out():
    moved = transfer_encoder(ViTModel(3, **TINY, pre_logits=7), 10, drop=0.3)
    assert (moved.config["pre_logits"], moved.config["drop"]) == (None, 0.3)


def test_another_image_size_changes_the_positions_only(model, tmp_path):
    save_checkpoint(tmp_path / "model.safetensors", model, CARD)
    larger, _ = load_weights(tmp_path / "model.safetensors", 16)
    assert larger.config == model.config | {"image_size": 16} and not larger.training
    ours, theirs = model.state_dict(), larger.state_dict()
    name = "vit_encoder.embedding.position_embedding"
    assert torch.equal(theirs.pop(name), interpolate_positions(ours.pop(name), 4))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert with_image_size(model, 8) is model and with_image_size(model.train(), 16).training


@pytest.fixture
def process_group(tmp_path):
    """A group of one process, which DistributedDataParallel needs; it meets over a file, not a network."""
    if not distributed.is_available():
        pytest.skip("this build of torch has no distributed training")
    distributed.init_process_group("gloo", init_method=(tmp_path / "meet").as_uri(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compiled DataParallel": lambda m: torch.compile(nn.DataParallel(m)),
    "DataParallel compiled": lambda m: nn.DataParallel(torch.compile(m)),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrapped_models_are_taken_as_they_are(model, kind, process_group):
    wrapped = WRAPPERS[kind](model)
    assert unwrap(wrapped) is without_wrappers(wrapped) is model
    moved = transfer_encoder(wrapped, 4)
    assert torch.equal(moved.vit_encoder.layernorm.weight, model.vit_encoder.layernorm.weight)


def test_a_part_that_is_called_module_is_no_wrapper():
    model = nn.Sequential()
    model.module = nn.Linear(2, 2)
    assert without_wrappers(nn.DataParallel(model)) is model


def test_a_fingerprint_names_contents():
    zeros = torch.zeros(3, 4)
    changed = zeros.clone()
    changed[2, 3] = -0.0
    assert fingerprint(zeros) == fingerprint(zeros.t().contiguous().t()) and len(fingerprint(zeros)) == 16
    assert fingerprint(zeros) != fingerprint(changed), "even of a sign that == does not see"
    assert fingerprint(zeros, changed) != fingerprint(changed, zeros)
