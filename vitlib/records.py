"""Recorded measurements that ship with vitlib, for figures that would take hours of training."""

import json

from vitlib.weights.checkpoint import PRETRAINED


def load_record(name: str) -> dict:
    """Return a recorded measurement, as its JSON file holds it.

    - ``published``: the published system, epoch by epoch (``accuracy``, ``loss``), as its authors recorded it.
    - ``published_here``: its recipe in vitlib's code (``record``); ``epochs_run`` has the first 69 of 100 epochs.
    - ``cifar100-small``, ``shapes100-mini``: the training of the shipped weights (``record``, ``classes``, ...).
    - ``sweep_labels``, ``sweep_patches``: the sweeps of notebooks/sweeps (``runs``: ``parameters`` and ``figures``).
    - ``vit_against_cnn``: benchmarks/vit_against_cnn.py (``models``, ``trainings``: one per seed).

    Shares are in [0, 1], losses in nats. The command that measures it again is in ``command``, for weights in
    ``record["command"]``; ``published`` has none.
    """
    return json.loads((PRETRAINED / f"{name}.json").read_text(encoding="utf-8"))
