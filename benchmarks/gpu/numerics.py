"""Published attentions on generated kernels, forward and backward, each against eager code in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# In the narrow dtypes a few of each family: softmax under every sort of mask and score, and linear forms.
HALF = (
    "bert", "causal", "cswin", "document_window", "gemma2", "gpt_oss", "longlora", "mistral", "natten", "swin", "t5",
    "retention", "gla", "mamba2", "gated_delta_net",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Numbers:
    """One attention in one dtype."""

    name: str
    dtype: str
    tiny: bool = False

    @property
    def key(self) -> str:
        return f"{self.name} {self.dtype}"


def tasks(words: list[str], tiny: bool = False) -> Iterator[Numbers]:
    """Everything in float32, a few of each family in the narrow dtypes."""
    from tests.zoo import ENTRIES, load

    fused = [name for name in ENTRIES if load(name).expect.declined is None and not load(name).expect.open]
    found = [Numbers(name, dtype, tiny) for dtype in DTYPES for name in fused if dtype == "float32" or name in HALF]
    yield from (task for task in found if not words or any(word in task.key for word in words))


def run(task: Numbers) -> str:
    """In a worker: "exact", or "left: ..." with the reason why the engine leaves a site. Raises where it is wrong."""
    import refocus
    from refocus.testing import check
    from tests.zoo import load

    torch._dynamo.reset()
    device = torch.device("cpu" if task.tiny else "cuda")
    if not task.tiny:
        torch.cuda.set_per_process_memory_fraction(0.05)
    module, inputs = load(task.name).build(getattr(torch, task.dtype))
    module, inputs = module.to(device), tuple(x.to(device) for x in inputs)
    report = refocus.explain(module, *inputs, engine="triton")
    left = sorted({site.reason for site in report.sites if not site.fused})
    if left:
        return f"left: {'; '.join(left)}"
    check(module, inputs, engines=("triton",), lower=False, gradients=True)
    return "exact"
