"""Weights in and out: checkpoints, the shipped weights, official weights, and other libraries' formats."""

from vitlib.weights.checkpoint import (
    ModelCard,
    load_checkpoint,
    load_pretrained,
    load_weights,
    save_checkpoint,
    transfer_encoder,
    with_image_size,
)
from vitlib.weights.official import OFFICIAL, official_weights
