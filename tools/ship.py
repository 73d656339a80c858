"""Ship a checkpoint with vitlib: in float16, with its record, curve included, as JSON beside it.

python tools/ship.py runs/pretrain/pretrained.safetensors cifar100-small [NAME=VALUE ...]     adds NAME to the record
python tools/ship.py --record runs/pretrain/pretrained.safetensors published_here [...]       the record alone
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from vitlib.utils import atomic_write
from vitlib.weights.checkpoint import PRETRAINED, load_checkpoint, save_checkpoint


def ship(checkpoint: Path, name: str, with_weights: bool = True, **remarks: str) -> None:
    model, card = load_checkpoint(checkpoint)
    card.record.update(remarks)
    if with_weights:
        save_checkpoint(PRETRAINED / f"{name}.safetensors", model, card, torch.float16)
    with atomic_write(PRETRAINED / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(asdict(card), indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    with_weights = sys.argv[1:2] != ["--record"]
    words = sys.argv[1 if with_weights else 2 :]
    if len(words) < 2 or not all("=" in remark for remark in words[2:]):
        sys.exit(__doc__)
    ship(Path(words[0]), words[1], with_weights, **dict(remark.split("=", 1) for remark in words[2:]))
