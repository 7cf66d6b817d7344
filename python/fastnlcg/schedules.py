"""Learning-rate schedules, built from torch's own: warm-up and cosine, and the paper's (section 4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, SequentialLR, StepLR

from fastnlcg.options import check_real

__all__ = ["paper_schedule", "warmup_cosine"]

_START = 0.001
_DECAY_EVERY = 2  # epochs


def warmup_cosine(
    optimizer: Optimizer, total_steps: int, *, warmup_steps: int | None = None, final: float = 0.01
) -> LambdaLR:
    """Linear warm-up to each group's own lr, then a cosine down to a fraction of it: the recommended schedule.

    It is relative: it multiplies the lr that each group has at this call, so it has the same shape for every optimizer
    and peak. If another schedule has lowered lr before the optimizer's first step, the lr before that one counts. The
    first step has ``lr / warmup_steps``, step number ``warmup_steps`` has ``lr``, and the last step and any later ones
    have ``final * lr``. To resume a run, make the schedule as at its start, and then load the state dicts of both.

    Args:
        optimizer: any torch optimizer, with its peak learning rates.
        total_steps: optimizer steps in the whole training.
        warmup_steps: steps of the warm-up; by default 5/24 of the total, as in the study.
        final: the last step's fraction of the peak, in [0, 1].

    Returns:
        A torch scheduler; call its ``step()`` once after every ``optimizer.step()``.

    Raises:
        TypeError, ValueError: for counts that are not whole numbers, ``total_steps`` < 1, ``warmup_steps`` outside
            [0, total_steps], or ``final`` outside [0, 1].
    """
    total = _whole("total_steps", total_steps, 1)
    warmup = max(1, round(total * 5 / 24)) if warmup_steps is None else _whole("warmup_steps", warmup_steps, 0)
    if warmup > total:
        raise ValueError(f"warmup_steps must be at most total_steps = {total}, got {warmup}")
    if check_real("final", final, minimum=0.0) > 1.0:
        raise ValueError(f"Invalid final: {final!r}; expected a number in [0, 1]")
    if optimizer.state or getattr(optimizer, "_opt_called", False):  # set by torch's schedulers
        for group in optimizer.param_groups:
            group.pop("initial_lr", None)  # of an earlier phase: torch would take it for this one's
    return LambdaLR(optimizer, _WarmupCosine(total, warmup, float(final)))


@dataclass
class _WarmupCosine:
    """A callable object rather than a function, so that the scheduler can be pickled and its state dict has the
    numbers."""

    total: int
    warmup: int
    final: float

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        peak_at = max(self.warmup - 1, 0)
        done = min(1.0, (step - peak_at) / max(self.total - 1 - peak_at, 1))
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * done))


def _whole(name: str, value: object, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def paper_schedule(
    optimizer: Optimizer, *, batch_size: int, epochs: int, steps_per_epoch: int, peak_lr: float | None = None
) -> LRScheduler:
    """Linear warm-up, then exponential decay every two epochs: the schedule of every optimizer in the paper.

    The learning rate rises linearly from 0.001 to ``peak_lr`` = 0.1 * batch_size / 256 in 5 epochs (15 if the batch is
    larger than 8192, 30 if it is larger than 32768), and then falls by a constant factor every two epochs, so that the
    last epoch has 0.001 (0.01 for batches of 8192 and more). If ``epochs`` is too small for a decay, the schedule ends
    with the warm-up.

    It is absolute: it starts and ends at fixed rates for any peak, so an optimizer whose rates are large decays by a
    factor of a thousand and one whose rates are small (AdamW, ``preconditioner="adam"``) hardly at all. Use it to
    reproduce the paper. To train, and to compare optimizers, use :func:`warmup_cosine`.

    Args:
        optimizer: any torch optimizer. Its groups' ``lr`` is overwritten: the schedule is absolute.
        batch_size: samples per optimizer step, over all ranks and micro-batches.
        epochs: length of the training.
        steps_per_epoch: optimizer steps per epoch.
        peak_lr: peak learning rate, > 0; default 0.1 * batch_size / 256.

    Returns:
        A torch scheduler; call its ``step()`` once after every ``optimizer.step()``.

    Raises:
        TypeError, ValueError: for counts that are not whole numbers >= 1, or a peak that is not a number > 0.

    Source: Adya et al., arXiv:1812.02886, section 4.1 and figure 1.
    """
    for name, value in (("batch_size", batch_size), ("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
        _whole(name, value, 1)
    peak = 0.1 * batch_size / 256 if peak_lr is None else check_real("peak_lr", peak_lr, minimum=0.0)
    if peak == 0.0:
        raise ValueError("Invalid peak_lr: 0; expected a number > 0")
    warm_up = min(epochs, 5 if batch_size <= 8192 else 15 if batch_size <= 32768 else 30)
    final = min(peak, 0.001 if batch_size < 8192 else 0.01)
    decays = (epochs - 1 - warm_up) // _DECAY_EVERY  # before the last epoch begins

    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = peak
    rise = LinearLR(optimizer, start_factor=min(1.0, _START / peak), total_iters=warm_up * steps_per_epoch)
    if decays < 1:
        return rise
    fall = StepLR(optimizer, step_size=_DECAY_EVERY * steps_per_epoch, gamma=(final / peak) ** (1 / decays))
    return SequentialLR(optimizer, [rise, fall], milestones=[warm_up * steps_per_epoch])
