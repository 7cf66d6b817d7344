"""fastnlcg: preconditioned nonlinear conjugate gradients for deep networks, as a fused native optimizer step.

    NLCG                the torch optimizer
    CGDescent           the torch optimizer for full-batch problems: a closure, no learning rate
    minimize            the same for functions of one NumPy array or torch tensor, as scipy.optimize.minimize
    HagerZhang          the constants of their line search
    OnlineLineSearch    the paper's line search on the mini-batch loss, an option of NLCG
    Diagnostics         what a step did: NLCG.diagnostics()
    warmup_cosine       linear warm-up and cosine decay relative to the peak, as a torch scheduler
    paper_schedule      the paper's learning-rate schedule, likewise
    decay_groups        the two usual parameter groups: matrices decay, biases and norms do not
    muon_groups         the groups of preconditioner="muon": matrices, and the rest
    ops                 the step and its parts over flat buffers; no torch needed
    reference           the definition, in NumPy float64

``NLCG``, ``CGDescent``, ``Diagnostics``, the functions that make groups and the schedules need torch, and import it on
first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastnlcg import _native, ops, reference
from fastnlcg.full_batch.hager_zhang import HagerZhang
from fastnlcg.full_batch.minimize import OptimizeResult, minimize
from fastnlcg.line_search import OnlineLineSearch

if TYPE_CHECKING:
    from fastnlcg.full_batch.cg_descent import CGDescent
    from fastnlcg.nlcg import NLCG, Diagnostics
    from fastnlcg.schedules import paper_schedule, warmup_cosine
    from fastnlcg.tensors.adamw_state import decay_groups
    from fastnlcg.tensors.muon_groups import muon_groups

__all__ = [
    "NLCG",
    "CGDescent",
    "Diagnostics",
    "HagerZhang",
    "OnlineLineSearch",
    "OptimizeResult",
    "__version__",
    "decay_groups",
    "minimize",
    "muon_groups",
    "ops",
    "paper_schedule",
    "reference",
    "warmup_cosine",
]

__version__ = _native.version

_NEED_TORCH = {
    "NLCG": "nlcg",
    "CGDescent": "full_batch.cg_descent",
    "Diagnostics": "nlcg",
    "decay_groups": "tensors.adamw_state",
    "muon_groups": "tensors.muon_groups",
    "paper_schedule": "schedules",
    "warmup_cosine": "schedules",
}


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> object:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module 'fastnlcg' has no attribute {name!r}")
    import importlib

    try:
        module = importlib.import_module(f"fastnlcg.{_NEED_TORCH[name]}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"fastnlcg.{name} needs torch: pip install 'fastnlcg[torch]'", name="torch"
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value
