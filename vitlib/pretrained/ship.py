"""Makes a checkpoint one that ships with vitlib: float16, beside this script, its SHA-256 in index.json.

python vitlib/pretrained/ship.py runs/class/pretrained.safetensors shapes100-mini
"""

import hashlib
import json
import sys
from pathlib import Path

import torch

from vitlib.checkpoint import PRETRAINED, load_checkpoint, save_checkpoint
from vitlib.files import written_whole


def ship(checkpoint: Path, name: str) -> None:
    model, card = load_checkpoint(checkpoint)
    file = PRETRAINED / f"{name}.safetensors"
    save_checkpoint(file, model, card, torch.float16)
    index_file = PRETRAINED / "index.json"
    index = json.loads(index_file.read_text()) if index_file.exists() else {}
    index[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    with written_whole(index_file) as temporary:
        temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    ship(Path(sys.argv[1]), sys.argv[2])
