"""The `sdpa` engine: PyTorch's own attention, for regions that it can express as they are.

Plain dense and causal regions go to its flash kernel. Others can, at small sizes, where a few more bytes cost less than
a kernel of our own: mask and bias are then written out as one additive tensor over the axes they depend on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from refocus import simplify
from refocus.codegen.heads import SCORE, Fitted, fit
from refocus.codegen.plan import Plan
from refocus.errors import EngineUnavailable
from refocus.evaluate import arange_env, evaluate, size_of
from refocus.ir import TRUE, Call, Const, Expr, Region, Sym
