"""Ship a checkpoint with vitlib: in float16, with its SHA-256 in index.json and its record, curve included, as JSON.

python tools/ship.py runs/pretrain/pretrained.safetensors cifar100-small [NAME=VALUE ...]     adds NAME to the record
"""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from vitlib.utils import atomic_write
from vitlib.weights.checkpoint import PRETRAINED, load_checkpoint, save_checkpoint


def ship(checkpoint: Path, name: str, **remarks: str) -> None:
    model, card = load_checkpoint(checkpoint)
    card.record.update(remarks)
    file = PRETRAINED / f"{name}.safetensors"
    save_checkpoint(file, model, card, torch.float16)
    _write_json(PRETRAINED / f"{name}.json", asdict(card))
    index_file = PRETRAINED / "index.json"
    index = json.loads(index_file.read_text()) if index_file.exists() else {}
    _write_json(index_file, index | {name: hashlib.sha256(file.read_bytes()).hexdigest()})


def _write_json(path: Path, content: dict) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in remark for remark in sys.argv[3:]):
        sys.exit(__doc__)
    ship(Path(sys.argv[1]), sys.argv[2], **dict(remark.split("=", 1) for remark in sys.argv[3:]))
