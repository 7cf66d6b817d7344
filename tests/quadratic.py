"""``NLCG`` on quadratics, and all of its bits: for tests that change something and compare."""

from __future__ import annotations

import copy

import torch
from fastnlcg import NLCG, _native
from torch import nn

DIAGONAL = {"adam": "exp_avg_sq", "bfgs": "hessian_diag"}
SKIPPED = list(_native.SCALARS).index("skipped_steps")


def parameter(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def stepped(**keywords: object) -> tuple[list[nn.Parameter], NLCG]:
    """An optimizer after three steps on a quadratic."""
    ps = [parameter(20, seed=1), parameter(3, 4, seed=2)]
    optimizer = NLCG(ps, 0.1, **keywords)
    for _ in range(3):
        one_step(ps, optimizer)
    return ps, optimizer


def quadratic_gradients(ps: list[nn.Parameter]) -> None:
    for p in ps:
        p.grad = (torch.arange(1, p.numel() + 1).view(p.shape) / p.numel()).to(p.dtype) * p.detach()


def one_step(ps: list[nn.Parameter], optimizer: NLCG) -> None:
    quadratic_gradients(ps)
    optimizer.step()


def everything(ps: list[nn.Parameter], optimizer: NLCG) -> str:
    """All bits of parameters, state and scalars, without lr and the count of skipped steps."""
    torch.set_printoptions(profile="full", precision=20)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop("lr")
        group["scalars"][SKIPPED] = 0.0
    return repr([p.detach().view(torch.uint8) if p.numel() and p.is_contiguous() else p for p in ps]) + repr(state)
