"""What the study compares, by name: the optimizer of a network, a learning rate, a weight decay and a beta1."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_optimizer
import torch
from fastnlcg import NLCG, OnlineLineSearch, muon_groups
from torch import Tensor, nn
from variants import VariantNLCG

Maker = Callable[[nn.Module, float, float, float], torch.optim.Optimizer]
"""Of a network, a learning rate, a (decoupled) weight decay and beta1: the coefficient of the first moment, momentum's,
or the cap of a conjugate beta. Optimizers without such a coefficient, or with a fixed one, ignore it."""


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon for the matrices inside the network, AdamW for the rest: embeddings, the last layer, biases and
    normalizations. A convolution is the matrix (out, in * height * width). Its steps are scaled to the size of AdamW's
    (Liu et al., arXiv:2502.16982), so one learning rate serves both."""

    OUTSIDE = ("embedding", "position", "head")

    def __init__(self, net: nn.Module, lr: float, weight_decay: float, momentum: float) -> None:
        named = dict(net.named_parameters())
        inside = {name for name, p in named.items() if p.ndim >= 2 and name.split(".")[0] not in self.OUTSIDE}
        super().__init__(list(net.parameters()), {"lr": lr})
        self.inside = [named[name] for name in named if name in inside]
        self.matrices = [as_matrix(p.detach()) for p in self.inside]
        options = {"lr": lr, "weight_decay": weight_decay}
        self.parts = (
            torch.optim.Muon(self.matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw", **options),
            torch.optim.AdamW([named[name] for name in named if name not in inside], **options),
        )
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # what a schedule writes to

    def step(self, closure: None = None) -> None:
        for p, matrix in zip(self.inside, self.matrices, strict=True):
            matrix.grad = as_matrix(p.grad)
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in (*self.inside, *self.parts[1].param_groups[0]["params"]):
            p.grad = None


def as_matrix(x: Tensor) -> Tensor:
    """(out, in), or (out, height * width * in) of a convolution's weights: a view of those in channels_last."""
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(len(x), -1)


def nlcg(**options: object) -> Maker:
    return lambda net, lr, decay, beta1: NLCG(net.parameters(), lr, weight_decay=decay, **options)


def capped(**options: object) -> Maker:
    return lambda net, lr, decay, beta1: NLCG(net.parameters(), lr, weight_decay=decay, beta_max=beta1, **options)


def matrices(**options: object) -> Maker:
    """NLCG with Muon's direction; beta1 is the cap of the matrices' beta, and the rest has its default."""

    def make(net: nn.Module, lr: float, weight_decay: float, beta1: float) -> NLCG:
        groups = muon_groups(net, lr=lr, weight_decay=weight_decay)
        for group in groups:
            if group["preconditioner"] == "muon":
                group["beta_max"] = beta1
        return NLCG(groups, **options)

    return make


def variant(rule: str) -> Maker:
    return lambda net, lr, decay, beta1: VariantNLCG(list(net.parameters()), lr, rule, beta_max=beta1)


def peer(kind: type[torch.optim.Optimizer], beta2: float = 0.999, **options: object) -> Maker:
    """An optimizer with betas."""
    return lambda net, lr, decay, beta1: kind(net.parameters(), lr, betas=(beta1, beta2), weight_decay=decay, **options)


PR = {"update": "polak_ribiere"}
BFGS = {"preconditioner": "bfgs"}
VARIANTS = ("late", "plain", "per_tensor", "dai_yuan", "smoothed")
OPTIMIZERS: dict[str, Maker] = {
    "nlcg": capped(),
    "nlcg_constant": capped(update="heavy_ball"),
    "nlcg_muon": matrices(),
    "nlcg_muon_constant": matrices(update="heavy_ball"),
    **{f"nlcg_{rule}": variant(rule) for rule in VARIANTS},
    "adamw": peer(torch.optim.AdamW),
    # Without torch's schedule of the momentum, which halves beta1 in short trainings: that of Dahl et al. (2306.07179).
    "nadamw": peer(torch.optim.NAdam, momentum_decay=1e6, decoupled_weight_decay=True),
    "lamb": peer(pytorch_optimizer.Lamb),
    "muon": Muon,
    # The published beta2 is its default; eigenvectors every 10 steps.
    "soap": peer(pytorch_optimizer.SOAP, beta2=0.95),
    "schedule_free": peer(pytorch_optimizer.ScheduleFreeAdamW),
    "momentum": lambda net, lr, decay, beta1: torch.optim.SGD(net.parameters(), lr, momentum=beta1, weight_decay=decay),
    # NLCG's options, one at a time
    "nlcg_polak_ribiere": capped(**PR),
    "nlcg_line_search": capped(line_search=OnlineLineSearch()),
    "nlcg_stochastic": capped(stochastic_rounding=True),
    "nlcg_state16": capped(state_dtype=torch.bfloat16),
    "nlcg_muon_state16": matrices(state_dtype=torch.bfloat16),
    "nlcg_all16": capped(state_dtype=torch.bfloat16, stochastic_rounding=True),
    # The paper's form: beta is at most 1.
    "nlcg_fr": nlcg(**BFGS),
    "nlcg_pr": nlcg(**BFGS, **PR),
    "nlcg_pr_search": nlcg(**BFGS, line_search=OnlineLineSearch(), **PR),
    "nlcg_fr_none": nlcg(preconditioner=None),
    # the settings of the authors' CIFAR script
    "rmsprop": lambda net, lr, decay, beta1: torch.optim.RMSprop(
        net.parameters(), lr, alpha=0.9, momentum=0.9, eps=1.0, weight_decay=decay
    ),
    "sgd": lambda net, lr, decay, beta1: torch.optim.SGD(net.parameters(), lr, weight_decay=decay),
}


def with_averages(optimizer: torch.optim.Optimizer, evaluate: Callable[[], object]) -> object:
    """Evaluates Schedule-Free at its averaged weights, as its authors demand, and others at their weights."""
    if not isinstance(optimizer, pytorch_optimizer.ScheduleFreeAdamW):
        return evaluate()
    optimizer.eval()
    try:
        return evaluate()
    finally:
        optimizer.train()
