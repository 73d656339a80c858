"""Weights in and out: checkpoints, the shipped weights, and other libraries' formats."""

from vitlib.weights.checkpoint import (
    Card,
    load_checkpoint,
    load_pretrained,
    load_weights,
    resized,
    save_checkpoint,
    transfer_encoder,
    versions,
)
