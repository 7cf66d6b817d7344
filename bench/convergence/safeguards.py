"""What was tried against noisy curvature pairs at small batches; for the study, not for use.

NLCG-FR once more, from torch's operations in plain sight, so that a safeguard is a line or two. Without any of them it
is fastnlcg's step (tests/test_convergence.py). Diagonal BFGS, y = g - g_prev, s = alpha_prev d:

    h_new = | h + y^2 / ys - (h s)^2 / shs |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Safeguards:
    same_batch: bool = False
    """y from two gradients of one batch, before and after the step: a second evaluation (Byrd et al., 2016)"""
    mean: float = 0.0
    """pairs are running means of y and of s, with this factor"""
    damped: tuple[float, float] | None = None
    """(low, high): y drawn toward h s until low <= ys / shs <= 1 + high (Powell, 1978; Al-Baali, 2014)"""
    cosine: float = 0.0
    """the least cosine of y and s"""
    signal: float = 0.0
    """the least |sum(g s)| / |sum(g_prev s)|: what is left of the slope if the difference is more than noise"""
    h_max: float = math.inf
    """an upper bound on h"""
    rescaled: bool = False
    """h scaled after each update so that the mean of 1 / h is 1: it turns the step, and leaves its length to lr"""
    beta_max: float = 1.0
    """an upper bound on beta"""


class SafeguardedNLCG(torch.optim.Optimizer):
    def __init__(self, ps: list[nn.Parameter], lr: float, safeguards: Safeguards | None = None) -> None:
        super().__init__(ps, {"lr": lr})
        self.safeguards = safeguards or Safeguards()
        n = sum(p.numel() for p in ps)
        self.d, self.g_prev, self.h = torch.zeros(n), torch.zeros(n), torch.ones(n)
        self.rz = self.alpha = 0.0
        self.pair: tuple[Tensor, Tensor] | None = None
        self.gradient_after: Tensor | None = None

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]])

    def observe(self) -> None:
        """After a step, with new gradients of the batch of that step in p.grad: for ``same_batch``."""
        self.gradient_after = self.gradient()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        g, first = self.gradient(), self.rz == 0.0
        if first:
            z, beta = -g, 0.0
        else:
            self.update_h(g)
            z = -g / (self.h + 1e-8)
            beta = min(dot(-g, z) / self.rz, self.safeguards.beta_max)
        self.rz = dot(-g, z)
        self.d = z + beta * self.d
        self.g_prev, self.alpha = g, self.param_groups[0]["lr"]
        ps = self.param_groups[0]["params"]
        for p, d in zip(ps, self.d.split([p.numel() for p in ps]), strict=True):
            p += self.alpha * d.view_as(p)

    def update_h(self, g: Tensor) -> None:
        o, h, s = self.safeguards, self.h, self.alpha * self.d
        y = (g if self.gradient_after is None else self.gradient_after) - self.g_prev
        if o.mean:
            old = self.pair or (y, s)
            y, s = self.pair = tuple(o.mean * a + (1 - o.mean) * b for a, b in zip(old, (y, s), strict=True))
        ys, shs = dot(y, s), dot(s, h * s)
        if o.damped and shs > 1e-8:
            low, high = o.damped
            bounded = min(max(ys, low * shs), (1 + high) * shs)
            if bounded != ys:
                theta = (shs - bounded) / (shs - ys)
                y, ys = theta * y + (1 - theta) * h * s, bounded
        slope = dot(self.g_prev, s)
        accepted = ys > 1e-8 and shs > 1e-8
        accepted &= ys >= o.cosine * math.sqrt(dot(y, y) * dot(s, s))
        accepted &= abs(slope + ys) >= o.signal * abs(slope)
        if accepted:
            self.h = (h + y**2 / ys - (h * s) ** 2 / shs).abs().clamp(max=o.h_max)
            if o.rescaled:
                self.h *= (1 / self.h).mean()


def dot(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double())
