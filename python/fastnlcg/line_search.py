"""The four constants of the online stochastic line search (section 3.2.2). Its formula is part of the native step
(``csrc/decisions.h``) and of the reference (:func:`fastnlcg.reference.line_search_scale`)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from numbers import Real


@dataclass(frozen=True)
class OnlineLineSearch:
    """Scales the learning rate by the change of the mini-batch loss. It never evaluates the loss a second time.

    With the ``loss`` of this step and ``loss_prev``, that of the last step that had one::

        loss > loss_prev + increase_threshold * |loss_prev|   ->   ls_scale *= 1 - decrease
        loss < loss_prev + flat_threshold * |loss_prev|       ->   ls_scale = min(1, ls_scale * (1 + increase))
        otherwise                                             ->   unchanged

    The scale starts at 1, stays in (0, 1], and multiplies ``lr`` without overwriting it, so schedulers may set ``lr``.
    A loss that is None or not finite changes nothing. The paper turns the search off below 2048 samples per batch.
    Data-parallel ranks must pass the loss averaged over ranks, or their scales, and then their weights, drift apart.

    Args:
        increase_threshold: relative growth of the loss that counts as an increase, >= 0.
        flat_threshold: relative growth up to which the loss counts as flat, >= 0 and at most ``increase_threshold``.
        decrease: fraction by which an increase of the loss lowers the scale, in [0, 1).
        increase: fraction by which a flat or falling loss raises the scale, >= 0.

    Raises:
        TypeError: for a value that is not a real number.
        ValueError: for a value out of range.

    Source: Adya et al., arXiv:1812.02886, section 3.2.2; the defaults are the paper's examples.
    """

    increase_threshold: float = 0.02
    flat_threshold: float = 0.01
    decrease: float = 0.025
    increase: float = 0.025

    def __post_init__(self) -> None:
        names = ("increase_threshold", "flat_threshold", "decrease", "increase")
        for name, value in zip(names, self.as_tuple(), strict=True):
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a real number, got {value!r} of type {type(value).__name__}")
            if not (abs(value) <= sys.float_info.max and value >= 0.0):  # an int may be beyond every double
                raise ValueError(f"Invalid {name}: {value!r}; expected a finite number >= 0")
        if self.decrease >= 1.0:
            raise ValueError(f"Invalid decrease: {self.decrease!r}; expected a number in [0, 1)")
        if self.flat_threshold > self.increase_threshold:
            raise ValueError(
                f"Invalid flat_threshold: {self.flat_threshold!r}; expected at most increase_threshold, "
                f"{self.increase_threshold!r}"
            )

    def as_tuple(self) -> tuple[float, float, float, float]:
        """(increase_threshold, flat_threshold, decrease, increase): how checkpoints store it."""
        return self.increase_threshold, self.flat_threshold, self.decrease, self.increase
