"""Refocus: a PyTorch compiler pass for attention.

    model = refocus.optimize(model)                       # one line
    model = torch.compile(model, backend="refocus")       # or as a backend
    print(refocus.explain(model, *inputs))                # what was found, and why anything was left alone

Start reading at `refocus.pipeline`.
"""

from refocus.api import explain, optimize
from refocus.backend import FallbackWarning, refocus_backend
from refocus.errors import (
    CannotExplain,
    EngineUnavailable,
    RefocusError,
    RegionNotFused,
    UnknownOption,
    VerificationFailed,
)
from refocus.report import Report, Site

__version__ = "0.1.0"

__all__ = [
    "CannotExplain",
    "EngineUnavailable",
    "FallbackWarning",
    "RefocusError",
    "RegionNotFused",
    "Report",
    "Site",
    "UnknownOption",
    "VerificationFailed",
    "explain",
    "optimize",
    "refocus_backend",
]
