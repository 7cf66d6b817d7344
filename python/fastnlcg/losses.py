"""The losses that the line search of an optimizer is told, and its voice where it is told none or the wrong ones."""

from __future__ import annotations

import math

from torch import Tensor

from fastnlcg import _native
from fastnlcg.tensors.checks import DTYPES
from fastnlcg.warn import warn

_PATIENCE = 10  # steps without a loss


class Losses:
    def __init__(self) -> None:
        self.next: float | Tensor | None = None
        """set ahead of a step that will be given none"""
        self._missed = 0
        self._seen = self._warned = False

    def take(self, given: object, *, one_of_many: bool) -> float | Tensor:
        """The loss of this step, checked; NaN for none. ``one_of_many``: other ranks have losses of their own."""
        loss = check_loss(self.next if given is None else given)
        if one_of_many and not self._warned:
            self._warned = True
            warn(
                "the line search sees this rank's loss alone, and torch.distributed has more ranks: pass "
                "average_loss=True, which data-parallel replicas need to stay equal, or False where this is meant",
            )
        self._seen |= isinstance(loss, Tensor) or not math.isnan(loss)
        self._missed += not self._seen
        if self._missed == _PATIENCE and not self._seen:
            self._missed += 1
            warn(
                "line_search is on, and ten steps have seen no loss: pass step(loss=...), a closure, or set_loss()",
            )
        return loss


def warn_of_skip(told: set[bool], norm: float, bound: float | None) -> None:
    """Of a step that was skipped, once for each reason; ``told``: whether the earlier ones were spikes. ``norm``: the
    gradient's, if there is a ``bound``."""
    spike = bound is not None and bound < norm < math.inf
    if spike in told:
        return
    told.add(spike)
    reason = (
        f"the gradient's norm, {norm!r}, is above skip_grad_norm={bound!r}"
        if spike
        else "a gradient (or a sum over them) is not finite, or too large for the state's dtype"
    )
    warn(f"a step was skipped, because {reason}; diagnostics().skipped_steps counts further ones")


def check_loss(loss: object) -> float | Tensor:
    """The loss as a number; as it is where it lies on a GPU."""
    if isinstance(loss, Tensor) and _native.on_gpu(loss.device) and loss.dtype in DTYPES:
        if loss.numel() != 1:
            raise ValueError(f"loss must have one element, got shape {tuple(loss.shape)}")
        return loss.detach()
    return _native.check_loss(loss)
