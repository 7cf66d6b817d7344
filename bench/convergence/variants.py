"""Other betas on Adam's diagonal; for the study, not for use.

NLCG with Adam's diagonal, written in torch's operations (docs/algorithm.md), so that a rule for beta is one line:

    fletcher_reeves    rz / rz_prev, the default of fastnlcg.NLCG (tests/test_convergence.py)
    late               that of the step before: known before the gradient is read, so one pass would do
    plain              sum(g^2) / sum(g_prev^2): without the preconditioner
    per_tensor         rz / rz_prev of each tensor
    dai_yuan           the smaller of Fletcher-Reeves' and Dai-Yuan's rz / sum(d (g - g_prev)), 0 if that is negative
    smoothed           the ratio of exponential means of rz, of factor 0.9

Each at most beta_max and at least 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RULES = ("fletcher_reeves", "late", "plain", "per_tensor", "dai_yuan", "smoothed")


class VariantNLCG(torch.optim.Optimizer):
    def __init__(self, ps: list[nn.Parameter], lr: float, rule: str, beta_max: float = 0.9) -> None:
        super().__init__(ps, {"lr": lr})
        if rule not in RULES:
            raise ValueError(f"rule must be one of {RULES}, got {rule!r}")
        self.ps, self.rule, self.beta_max, self.k = ps, rule, beta_max, 0
        self.v, self.d, self.g_prev = ([torch.zeros_like(p) for p in ps] for _ in range(3))
        self.prev = [0.0] * len(ps)  # what beta's denominators are made of, by tensor
        self.beta = self.mean = 0.0
        self.betas = [0.0] * len(ps)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.k += 1
        g = [p.grad for p in self.ps]
        for v, x in zip(self.v, g, strict=True):
            v.mul_(0.999).addcmul_(x, x, value=0.001)
        z = [-x / ((v / (1 - 0.999**self.k)).sqrt() + 1e-8) for x, v in zip(g, self.v, strict=True)]
        rz = dots(g, g) if self.rule == "plain" else [-x for x in dots(g, z)]
        self.betas = [min(max(beta, 0.0), self.beta_max) for beta in self.rules(rz, g)]
        self.prev, self.g_prev = rz, [x.clone() for x in g]
        for p, d, new, beta in zip(self.ps, self.d, z, self.betas, strict=True):
            d.mul_(beta).add_(new)
            p.add_(d, alpha=self.param_groups[0]["lr"])

    def rules(self, rz: list[float], g: list[Tensor]) -> list[float]:
        """beta of each tensor, before its bounds."""
        if self.rule == "per_tensor":
            return [ratio(x, y) for x, y in zip(rz, self.prev, strict=True)]
        fletcher_reeves = beta = ratio(sum(rz), sum(self.prev))
        if self.rule == "late":
            beta, self.beta = self.beta, fletcher_reeves
        elif self.rule == "dai_yuan":
            beta = min(beta, ratio(sum(rz), sum(dots(self.d, g)) - sum(dots(self.d, self.g_prev))))
        elif self.rule == "smoothed":
            mean = 0.9 * self.mean + 0.1 * sum(rz) if self.mean else sum(rz)
            beta, self.mean = ratio(mean, self.mean), mean
        return [beta] * len(rz)


def dots(a: list[Tensor], b: list[Tensor]) -> list[float]:
    return [float(x.flatten().double() @ y.flatten().double()) for x, y in zip(a, b, strict=True)]


def ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0
