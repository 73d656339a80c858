"""A small Vision Transformer library, and the course that stands on it. Read ``vitlib.model`` first.

The names that everyone types can be imported from here; each loads its module when it is first used.
"""

import importlib

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
