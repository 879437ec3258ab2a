"""IP-Adapter: one query, text keys and image keys with projections of their own, two softmaxes summed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="", sites=2)


class DecoupledCrossAttention(nn.Module):
    def __init__(self, dim: int = 32, context: int = 24, heads: int = 2, image: int = 4, scale: float = 0.7) -> None:
        super().__init__()
        self.heads, self.image, self.ip_scale, self.scale = heads, image, scale, (dim // heads) ** -0.5
        self.to_q, self.to_out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.to_k, self.to_v, self.to_k_ip, self.to_v_ip = (nn.Linear(context, dim, bias=False) for _ in range(4))

    def to_batch(self, t: Tensor) -> Tensor:
        b, n, c = t.shape
        return t.reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3).reshape(b * self.heads, n, -1)

    def from_batch(self, t: Tensor) -> Tensor:
        folded, n, d = t.shape
        return t.reshape(-1, self.heads, n, d).permute(0, 2, 1, 3).reshape(folded // self.heads, n, -1)

    def probabilities(self, q: Tensor, k: Tensor) -> Tensor:
        empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
        return torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=self.scale).softmax(dim=-1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        end = context.shape[1] - self.image
        text, image = context[:, :end], context[:, end:]
        q, k, v = self.to_batch(self.to_q(x)), self.to_batch(self.to_k(text)), self.to_batch(self.to_v(text))
        hidden = self.from_batch(torch.bmm(self.probabilities(q, k), v))
        k_ip, v_ip = self.to_batch(self.to_k_ip(image)), self.to_batch(self.to_v_ip(image))
        hidden_ip = self.from_batch(torch.bmm(self.probabilities(q, k_ip), v_ip))
        return self.to_out(hidden + self.ip_scale * hidden_ip)


class Fused(DecoupledCrossAttention):
    """The 2.0 processor."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b = x.shape[0]
        text, image = context[:, : -self.image], context[:, -self.image :]
        q = self.to_q(x).view(b, -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)
        outs = []
        for keys, values, part in ((self.to_k, self.to_v, text), (self.to_k_ip, self.to_v_ip, image)):
            k, v = (p(part).view(b, -1, self.heads, q.shape[-1]).transpose(1, 2) for p in (keys, values))
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)
            outs.append(out.transpose(1, 2).reshape(b, -1, x.shape[-1]))
        return self.to_out(outs[0] + self.ip_scale * outs[1])


def _inputs() -> tuple[Tensor, ...]:
    return torch.randn(2, 64, 32), torch.randn(2, 24, 24)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return DecoupledCrossAttention(), _inputs()


VARIANTS = {"fused": Variant(lambda: (Fused(), _inputs()))}


def reference(module: DecoupledCrossAttention, x: Tensor, context: Tensor) -> Tensor:
    total = 0.0
    for keys, values, part, weight in (
        (module.to_k, module.to_v, context[:, : -module.image], 1.0),
        (module.to_k_ip, module.to_v_ip, context[:, -module.image :], module.ip_scale),
    ):
        q, k, v = (t.unflatten(-1, (module.heads, -1)) for t in (module.to_q(x), keys(part), values(part)))
        probs = (torch.einsum("bihd,bjhd->bhij", q, k) * module.scale).softmax(-1)
        total = total + weight * torch.einsum("bhij,bjhd->bihd", probs, v).flatten(2)
    return module.to_out(total)
