"""Importing torchvision beside a torch that its C++ operators were not built for.

timm imports torchvision, and transformers does where it finds it; neither uses its operators here. A torchvision wheel
built for CUDA does not load its operators into a CPU build of torch, and then fails to import because it registers
shape functions for operators that do not exist. Declaring their schemas is enough to let the import through.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a library's operators go away when it is collected


def import_torchvision() -> bool:
    """Import torchvision, with its operators where they load; False if it is not installed.

    Call it before the first import of a transformers model or of timm.
    """
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _declared.append(library)
        importlib.import_module("torchvision")
    return True


def has_timm() -> bool:
    """True if timm is installed and can be imported; imports torchvision first, which timm needs."""
    if importlib.util.find_spec("timm") is None:
        return False
    return import_torchvision()
