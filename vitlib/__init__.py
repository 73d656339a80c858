"""A small Vision Transformer library, and the course that is built on it. Read ``vitlib.model`` first.

The names used most can be imported from here; each loads its module when it is first used.
"""

import importlib
import os

# How long OpenMP's threads spin while they wait. On a busy machine, waiting threads that spin take the core from the
# thread they wait for (benchmarks/busy_machine.py measures it). torch reads this on import; child processes inherit it.
WAITING = {
    "GOMP_SPINCOUNT": "1000",  # rounds; libgomp, in torch's wheels for Linux, has 300,000 by default
    "KMP_BLOCKTIME": "1",  # milliseconds; Intel's and LLVM's OpenMP (macOS, Windows, conda) has 200; not tried
}
if "OMP_WAIT_POLICY" not in os.environ:  # the user's own settings win
    for _name, _value in WAITING.items():
        os.environ.setdefault(_name, _value)

_HOMES = {
    "ViTModel": "model",
    "create_model": "model",
    "load_images": "data",
    "load_pretrained": "weights",
    "load_weights": "weights",
    "pretrain": "training",
    "finetune": "training",
    "evaluate": "training",
    "predict": "training",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'vitlib' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vitlib.{_HOMES[name]}"), name)
