"""Ship a checkpoint with vitlib: in float16, with its record, curve included, as JSON beside it.

python tools/ship.py runs/pretrain/pretrained.safetensors cifar100-small [NAME=VALUE ...]     adds NAME to the record
"""

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
    save_checkpoint(PRETRAINED / f"{name}.safetensors", model, card, torch.float16)
    with atomic_write(PRETRAINED / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(asdict(card), indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in remark for remark in sys.argv[3:]):
        sys.exit(__doc__)
    ship(Path(sys.argv[1]), sys.argv[2], **dict(remark.split("=", 1) for remark in sys.argv[3:]))
