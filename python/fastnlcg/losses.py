"""Checks the loss given to the line search; warns if it is missing or local to one rank, and warns of skipped steps."""

from __future__ import annotations

import math

from torch import Tensor

from fastnlcg import _native
from fastnlcg.tensors.checks import DTYPES
from fastnlcg.tensors.ranks import world_size
from fastnlcg.warn import warn

_PATIENCE = 10  # steps without a loss before the warning


class Losses:
    """The losses of one optimizer's steps, and which warnings about them have been given."""

    def __init__(self) -> None:
        self.next: float | Tensor | None = None
        """the loss of the next step, if :meth:`NLCG.set_loss` has set one; used if the step itself is given none"""
        self._missed = 0
        self._seen = self._warned = False

    def take(self, given: object, *, one_of_many: bool) -> float | Tensor:
        """The loss of this step, checked; NaN if there is none. ``one_of_many``: the other ranks have losses of their
        own, and the user has not chosen ``average_loss``."""
        loss = check_loss(self.next if given is None else given)
        if one_of_many and not self._warned:
            self._warned = True
            warn(unaveraged_loss())
        self._seen |= isinstance(loss, Tensor) or not math.isnan(loss)
        self._missed += not self._seen
        if self._missed == _PATIENCE and not self._seen:
            self._missed += 1
            warn("line_search is on, and ten steps have had no loss: pass step(loss=...), a closure, or set_loss()")
        return loss


def unaveraged_loss() -> str:
    """The warning for an optimizer with ``average_loss=None`` whose line search sees the loss of one rank only."""
    return (
        f"the line search sees this rank's loss alone, but torch.distributed has {world_size()} ranks: pass "
        "average_loss=True if the ranks are data-parallel replicas, which must stay equal, or average_loss=False if "
        "they are independent or the loss is already their mean"
    )


def warn_of_skip(reasons: set[bool], norm: float, bound: float | None) -> None:
    """Warns of a skipped step, once for each reason. ``reasons``: those already warned of (True: the norm was above
    ``bound``, False: it was not finite); this one is added. ``norm``: the gradient's, used if there is a ``bound``."""
    spike = bound is not None and bound < norm < math.inf
    if spike in reasons:
        return
    reasons.add(spike)
    reason = (
        f"the gradient's norm, {norm!r}, is above skip_grad_norm={bound!r}"
        if spike
        else "a gradient, or a sum over gradients, is not finite or too large for the state's dtype"
    )
    warn(f"a step was skipped, because {reason}; diagnostics().skipped_steps counts further ones")


def check_loss(loss: object) -> float | Tensor:
    """The loss as a float, or as the detached tensor if it is on a GPU, where the step reads it."""
    if isinstance(loss, Tensor) and _native.on_gpu(loss.device) and loss.dtype in DTYPES:
        if loss.numel() != 1:
            raise ValueError(f"loss must have one element, got shape {tuple(loss.shape)}")
        return loss.detach()
    return _native.check_loss(loss)
