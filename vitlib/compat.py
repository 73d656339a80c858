"""The one door to torchvision.

torchvision from the package index imports only beside the build of torch it was made for. Beside another one, say a
CPU build, its compiled library does not load, and the import stops because two operators that the library would have
brought do not exist. Its Python parts (data sets, transforms, models) need no such operator: it is enough to declare
the two without an implementation. Calling one of them still raises torchvision's own error.
"""

import importlib
import sys
from types import ModuleType

import torch

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"  # torchvision/csrc/ops/nms.cpp
_declared: torch.library.Library | None = None  # torch forgets the operators when this object goes


def import_torchvision() -> ModuleType:
    """Import torchvision, also beside a build of torch that it was not made for.

    Where torchvision is whole this is the plain import and nothing else. Call it before anything else imports
    torchvision; afterwards ``from torchvision.transforms import v2`` and its like work everywhere in the process.

    Raises:
        ModuleNotFoundError: if torchvision is not installed.
        Exception: whatever else torchvision's import raises, unchanged.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        message = "torchvision is not installed; install it with `pip install torchvision`."
        raise ModuleNotFoundError(message, name="torchvision") from error
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    _declare_operators()
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # the failed import has left some of torchvision's modules half built
    return importlib.import_module("torchvision")


def _declare_operators() -> None:
    global _declared
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for operator in _OPERATORS:
        _declared.define(operator + _SCHEMA)
