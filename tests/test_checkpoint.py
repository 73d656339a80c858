"""Checkpoints: what goes in comes out, nothing half-written, nothing unpickled, only the encoder is moved."""

import ast
import math
import os
import pickle
import re
import runpy
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import ROOT
from safetensors.torch import save_file
from torch import distributed, nn

from vitlib.__main__ import main
from vitlib.model import ViTModel, interpolate_positions
from vitlib.utils import atomic_write
from vitlib.weights import checkpoint
from vitlib.weights.checkpoint import (
    ModelCard,
    fingerprint,
    load_checkpoint,
    load_pretrained,
    load_weights,
    save_checkpoint,
    transfer_encoder,
    unwrap,
    with_image_size,
    without_wrappers,
)

TINY = {"num_layers": 1, "image_size": 8, "patch_size": 4, "em_dim": 16, "num_heads": 2, "ff_dim": 32, "drop": 0.0}
CARD = ModelCard(("cat", "dog", "Übergröße"), (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), None, {"seed": 3, "epochs": [1.5]})


@pytest.fixture
def model():
    return ViTModel(3, **TINY).eval()


def test_round_trip_keeps_weights_configuration_and_card(model, tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", model, CARD)
    loaded, card = load_checkpoint(tmp_path / "a.safetensors")
    assert card == CARD and loaded.config == model.config and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_half_precision_halves_the_file_and_loads_as_float32(model, tmp_path):
    save_checkpoint(tmp_path / "whole.safetensors", model, CARD)
    save_checkpoint(tmp_path / "half.safetensors", model, CARD, torch.float16)
    loaded, _ = load_checkpoint(tmp_path / "half.safetensors")
    assert (tmp_path / "half.safetensors").stat().st_size < 0.75 * (tmp_path / "whole.safetensors").stat().st_size
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=1e-3)


def test_a_failed_write_leaves_the_earlier_file(model, tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, model, CARD)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def damage(path, kind, model):
    save_checkpoint(path, model, CARD)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "no card":
        save_file(model.state_dict(), path)
    elif kind == "weights missing":
        with checkpoint.atomic_write(path) as temporary:
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                metadata, names = file.metadata(), list(file.keys())[1:]
                save_file({name: file.get_tensor(name) for name in names}, temporary, metadata=metadata)
    elif kind == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize("kind", ["truncated", "no card", "weights missing", "empty"])
def test_a_damaged_or_foreign_file_is_refused_in_one_sentence(model, tmp_path, kind):
    path = tmp_path / "a.safetensors"
    damage(path, kind, model)
    with pytest.raises(ValueError, match="a.safetensors is not a whole checkpoint of vitlib") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


# Files that run code when they are unpickled, wherever a file of weights is taken.


class Trap:
    """Its pickle makes a folder when it is opened."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def a_pickle(path, sprung):
    path.write_bytes(pickle.dumps(Trap(sprung), protocol=2))


def a_torch_file(path, sprung):
    torch.save({"vit_encoder.layernorm.weight": torch.ones(16), "card": Trap(sprung)}, path)


def an_old_torch_file(path, sprung):
    torch.save({"card": Trap(sprung)}, path, _use_new_zipfile_serialization=False)


TRAPS = pytest.mark.parametrize("trap", [a_pickle, a_torch_file, an_old_torch_file])


@TRAPS
def test_the_traps_work(tmp_path, trap):
    trap(tmp_path / "file", tmp_path / "sprung")
    if trap is a_pickle:
        pickle.loads((tmp_path / "file").read_bytes())
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "sprung").is_dir()


@TRAPS
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pkl", "a"])
@pytest.mark.parametrize("load", [load_checkpoint, load_weights])
def test_a_checkpoint_that_would_run_code_is_refused_and_not_run(tmp_path, trap, name, load):
    trap(tmp_path / name, tmp_path / "sprung")
    with pytest.raises(ValueError) as error:
        load(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name} is not a whole checkpoint of vitlib (")
    assert "\n" not in str(error.value) and not (tmp_path / "sprung").exists()


@TRAPS
@pytest.mark.parametrize("words", [["predict", "FILE", "image.png"], ["export", "FILE", "out.onnx"]])
def test_the_command_line_refuses_it_in_one_sentence(tmp_path, monkeypatch, trap, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    trap(path, tmp_path / "sprung")
    result = CliRunner().invoke(main, [str(path) if word == "FILE" else word for word in words])
    assert result.exit_code == 2 and result.stderr.startswith(f"Error: {path} is not a whole checkpoint of vitlib (")
    assert len(result.stderr.splitlines()) == 1 and {file.name for file in tmp_path.iterdir()} == {"a.pt"}


# What opens a file, or text, and may run code from it: never, or only with the argument that forbids it.
ALWAYS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNLESS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
NEVER = {"torch.jit.load", "torch.export.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load"}
KNOWN = {
    (
        "vitlib/data/cifar.py",
        "pickle",
    ),  # of bytes whose md5 was compared just before (test_download.py)
    ("vitlib/export.py", "torch.export.load"),  # of the file that it has just written itself
}


def loopholes(source):
    """Names in a program's source by which opening a file may run code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.partition(".")[0] in ALWAYS)
        elif isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{name.name}" for name in node.names}
            yield from full & (NEVER | UNLESS.keys() | {"numpy.load"})
            yield from {node.module} if (node.module or "").partition(".")[0] in ALWAYS else ()
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func).replace("numpy.", "np.")
            given = [(word.arg, getattr(word.value, "value", None)) for word in node.keywords]
            if name in NEVER or (name in UNLESS and UNLESS[name] not in given):
                yield name


SOURCES = sorted(path for folder in ("vitlib", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))


@pytest.mark.parametrize("path", [*SOURCES, *NOTEBOOKS], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_of_ours_runs_code_out_of_a_file(path):
    sources = [path.read_text()]
    if path.suffix == ".ipynb":
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        sources = [re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.MULTILINE) for source in cells]
    found = {(path.relative_to(ROOT).as_posix(), name) for source in sources for name in loopholes(source)}
    assert found - KNOWN == set()


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "import os, joblib", "from pickle import load", "from torch import load",
        "from numpy import load", "torch.load(path)", "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=choice)", "np.load(path)", "numpy.load(path, allow_pickle=True)",
        "yaml.load(text)", "torch.jit.load(path)",
    ],
)  # fmt: skip
def test_the_search_for_such_names_finds_them(line):
    assert list(loopholes(f"if True:\n    {line}"))


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*train one first"):
        load_checkpoint(tmp_path / "nothing.safetensors")


def test_transfer_moves_the_encoder_and_nothing_else(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved = transfer_encoder(model, 10, drop=0.3)
    for name, tensor in moved.vit_encoder.state_dict().items():
        assert torch.equal(tensor, before[f"vit_encoder.{name}"])
    assert moved.linear_classifier.weight.shape == (10, 16) and not moved.linear_classifier.weight.any()
    with torch.no_grad():
        moved.vit_encoder.layernorm.weight.zero_()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items()), "weights are shared"


def test_first_loss_after_transfer_is_exactly_that_of_guessing(model):
    loss = F.cross_entropy(transfer_encoder(model, 10)(torch.randn(4, 3, 8, 8)), torch.arange(4))
    assert loss.item() == pytest.approx(math.log(10), abs=1e-6)


@pytest.fixture
def process_group(tmp_path):
    """A group of one process, which DistributedDataParallel needs; it meets over a file, not a network."""
    if not distributed.is_available():
        pytest.skip("this build of torch has no distributed training")
    distributed.init_process_group("gloo", init_method=(tmp_path / "meet").as_uri(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        torch.compile,
        lambda m: torch.compile(nn.DataParallel(m)),
        lambda m: nn.DataParallel(torch.compile(m)),
    ],
    ids=[
        "plain",
        "DataParallel",
        "DistributedDataParallel",
        "compiled",
        "compiled DataParallel",
        "DataParallel compiled",
    ],
)
def test_wrapped_models_are_taken_as_they_are(model, wrap, process_group):
    assert unwrap(wrap(model)) is without_wrappers(wrap(model)) is model
    moved = transfer_encoder(wrap(model), 4)
    assert torch.equal(moved.vit_encoder.layernorm.weight, model.vit_encoder.layernorm.weight)


def test_a_model_without_a_vit_is_refused():
    with pytest.raises(ValueError, match="Linear holds no ViTModel"):
        unwrap(nn.Linear(2, 2))


def test_a_part_of_a_model_that_is_called_module_is_no_wrapper():
    model = nn.Sequential()
    model.module = nn.Linear(2, 2)
    assert without_wrappers(nn.DataParallel(model)) is model


def test_shipped_weights_load_and_know_their_classes():
    model, card = load_pretrained("shapes100-mini")
    assert len(card.classes) == model.config["num_classes"] == 100 and card.preset == "mini"
    assert len(card.mean) == len(card.std) == 3 and card.record["epochs_run"]


def test_shipped_weights_that_changed_are_refused(tmp_path, monkeypatch):
    for file in checkpoint.PRETRAINED.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "shapes100-mini.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path)
    with pytest.raises(ValueError, match="missing or not the ones that shipped"):
        load_pretrained("shapes100-mini")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'resnet'.*shapes100-mini"):
        load_pretrained("resnet")


def test_a_shipped_checkpoint_is_half_as_large_and_found_by_name(model, tmp_path, monkeypatch):
    ship = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "ship.py"))["ship"]
    save_checkpoint(tmp_path / "trained.safetensors", model, CARD)
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path / "shipped")
    monkeypatch.setitem(ship.__globals__, "PRETRAINED", tmp_path / "shipped")
    for name in ("first", "second"):
        ship(tmp_path / "trained.safetensors", name)
    for name in ("first", "second"):
        loaded, card = load_pretrained(name)
        assert card == CARD
        torch.testing.assert_close(loaded.linear_classifier.weight, model.linear_classifier.weight, rtol=0, atol=1e-3)


def test_a_digest_names_contents():
    zeros = torch.zeros(3, 4)
    changed = zeros.clone()
    changed[2, 3] = -0.0
    assert (
        fingerprint(zeros) == fingerprint(zeros.clone()) == fingerprint(zeros.t().contiguous().t())
        and len(fingerprint(zeros)) == 16
    )
    assert fingerprint(zeros) != fingerprint(changed), "even of a sign that == does not see"
    assert fingerprint(zeros, changed) != fingerprint(changed, zeros)
    assert fingerprint(torch.zeros(0, 3), torch.tensor(3)) and fingerprint(nn.Parameter(zeros)) == fingerprint(zeros)


def test_a_resized_model_has_the_same_weights_but_for_its_positions(model):
    side, patch = model.config["image_size"], model.config["patch_size"]
    larger = with_image_size(model, 2 * side)
    ours, theirs = model.state_dict(), larger.state_dict()
    name = "vit_encoder.embedding.position_embedding"
    assert torch.equal(theirs.pop(name), interpolate_positions(ours.pop(name), 2 * side // patch))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert larger.training == model.training and with_image_size(model, side) is model
    assert larger(torch.randn(1, model.config["num_channels"], 2 * side, 2 * side)).isfinite().all()
    with pytest.raises(ValueError, match=f"image_size={side + 1} is not a multiple"):
        with_image_size(model, side + 1)


def test_weights_can_be_loaded_for_another_image_size(model, tmp_path):
    save_checkpoint(tmp_path / "model.safetensors", model, CARD)
    side = model.config["image_size"]
    loaded, _ = load_weights(tmp_path / "model.safetensors", 2 * side)
    assert loaded.config == model.config | {"image_size": 2 * side} and not loaded.training


def test_transfer_leaves_a_pre_logits_layer_behind(model):
    source = ViTModel(**{**model.config, "pre_logits": 7})
    moved = transfer_encoder(source, 3)
    assert moved.config["pre_logits"] is None
    assert not [name for name in moved.state_dict() if "pre_logits" in name]
