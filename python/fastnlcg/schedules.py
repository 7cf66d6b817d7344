"""The paper's learning-rate schedule (section 4.1), built from torch's own schedulers."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, SequentialLR, StepLR

from fastnlcg import _native

__all__ = ["paper_schedule"]

_START = 0.001
_DECAY_EVERY = 2  # epochs


def paper_schedule(
    optimizer: Optimizer, *, batch_size: int, epochs: int, steps_per_epoch: int, peak_lr: float | None = None
) -> LRScheduler:
    """Linear warm-up, then exponential decay every two epochs: the schedule of every optimizer in the paper.

    The learning rate rises linearly from 0.001 to ``peak_lr`` = 0.1 * batch_size / 256 in 5 epochs (15 where the batch
    is larger than 8192, 30 where it is larger than 32768), and then falls by a constant factor every two epochs, so
    that the last epoch has 0.001 (0.01 for batches of 8192 and more). Where ``epochs`` leaves no room to decay, it
    ends with the warm-up.

    Args:
        optimizer: any torch optimizer. Its groups' ``lr`` is overwritten: the schedule is absolute.
        batch_size: samples per optimizer step, over all ranks and micro-batches.
        epochs: length of the training.
        steps_per_epoch: optimizer steps per epoch.
        peak_lr: another peak; everything else as above.

    Returns:
        A torch scheduler; call its ``step()`` once after every ``optimizer.step()``.

    Raises:
        TypeError, ValueError: for counts that are not whole numbers >= 1, or a peak that is not a number > 0.

    Source: Adya et al., arXiv:1812.02886, section 4.1 and figure 1.
    """
    for name, value in (("batch_size", batch_size), ("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    peak = 0.1 * batch_size / 256 if peak_lr is None else _native.check_real("peak_lr", peak_lr, minimum=0.0)
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
