"""The step as a torch operator, so that a compiled graph can contain it: ``torch.compile(..., fullgraph=True)``."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastnlcg.nlcg import NLCG

# Operators take no Python objects, so each optimizer has a number.
_numbers = itertools.count()
_optimizers: weakref.WeakValueDictionary[int, NLCG] = weakref.WeakValueDictionary()


def number_of(optimizer: NLCG) -> int:
    """Gives ``optimizer`` a new number, by which the operator finds it."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    return number


# Everything but parameters, gradients and the loss is read when the operator runs, not when it is traced: a new lr does
# not recompile. State belongs to the optimizer, and no graph sees it. The tag keeps inductor's CUDA graphs away.
@torch.library.custom_op("fastnlcg::step", mutates_args=("params",), tags=(torch.Tag.cudagraph_unsafe,))
def step(optimizer: int, indices: list[int], params: list[Tensor], grads: list[Tensor], loss: Tensor | None) -> None:
    """One step of an optimizer, over the parameters with these indices, with these gradients.

    A compiler may pass copies of parameters, to be written in place of the parameters, and gradients that the graph has
    formed but not assigned yet. The step then works on these.
    """
    nlcg = _optimizers.get(optimizer)
    if nlcg is None:
        raise RuntimeError("the optimizer of this compiled step has been deleted")
    own = [p for group in nlcg.param_groups for p in group["params"]]
    values = dict(zip(indices, zip(params, grads, strict=True), strict=True))
    replaced = []
    with nlcg._lock, torch.no_grad():
        try:
            for i, p in enumerate(own):
                value, grad = values.get(i, (p, None))
                if p.grad is not grad or value.data_ptr() != p.data_ptr():
                    replaced.append((p, p.data, p.grad))
                    p.grad = None
                    p.data = value.detach()
                    p.grad = grad
            nlcg._step(None, loss)
        finally:
            for p, data, grad in replaced:
                p.grad = None
                p.data = data
                p.grad = grad


@step.register_fake
def _(optimizer: int, indices: list[int], params: list[Tensor], grads: list[Tensor], loss: Tensor | None) -> None:
    return None


def traced(optimizer: NLCG, number: int, loss: float | Tensor | None) -> None:
    """The part of ``optimizer.step(loss=loss)`` that torch.compile traces."""
    indices, params, grads = [], [], []
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if p.grad is not None:
            indices.append(i)
            params.append(p)
            grads.append(p.grad)
    if loss is not None:
        loss = loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)
    step(number, indices, params, grads, loss)
