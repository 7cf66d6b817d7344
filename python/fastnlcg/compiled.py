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


_RATES = ("lr", "weight_decay")


# Parameters, gradients, the loss and the rates are arguments: a graph may change them before the step, and the compiler
# writes groups after the graph. The rest is read when the operator runs. State belongs to the optimizer, and no graph
# sees it. The tag keeps inductor's CUDA graphs away.
@torch.library.custom_op("fastnlcg::step", mutates_args=("params",), tags=(torch.Tag.cudagraph_unsafe,))
def step(
    optimizer: int,
    indices: list[int],
    params: list[Tensor],
    grads: list[Tensor],
    rates: list[Tensor],
    loss: Tensor | None,
) -> None:
    """One step of an optimizer, over the parameters with these indices, with these gradients. ``rates``: each group's
    lr and weight_decay.

    A compiler may pass copies of parameters, to be written in place of the parameters, and gradients that the graph has
    formed but not assigned yet. The step then works on these.
    """
    nlcg = _optimizers.get(optimizer)
    if nlcg is None:
        raise RuntimeError("the optimizer of this compiled step has been deleted")
    own = [p for group in nlcg.param_groups for p in group["params"]]
    values = dict(zip(indices, zip(params, grads, strict=True), strict=True))
    entries = [(group, name) for group in nlcg.param_groups for name in _RATES]
    replaced, kept = [], [group[name] for group, name in entries]
    with nlcg._lock, torch.no_grad():
        try:
            for (group, name), rate in zip(entries, rates, strict=True):
                group[name] = rate
            for i, p in enumerate(own):
                value, grad = values.get(i, (p, None))
                if p.grad is not grad or value.data_ptr() != p.data_ptr():
                    replaced.append((p, p.data, p.grad))
                    p.grad = None
                    p.data = value.detach()
                    p.grad = grad
            nlcg._step(None, loss)
        finally:
            for (group, name), rate in zip(entries, kept, strict=True):
                group[name] = rate
            for p, data, grad in replaced:
                p.grad = None
                p.data = data
                p.grad = grad


@step.register_fake
def _(*_: object) -> None:
    return None


def traced(optimizer: NLCG, number: int, loss: float | Tensor | None) -> None:
    """The part of ``optimizer.step(loss=loss)`` that torch.compile traces."""
    indices, params, grads = [], [], []
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if p.grad is not None:
            indices.append(i)
            params.append(p)
            grads.append(p.grad)
    rates = [_tensor_of(group[name]) for group in optimizer.param_groups for name in _RATES]
    step(number, indices, params, grads, rates, None if loss is None else _tensor_of(loss))


def _tensor_of(number: float | Tensor) -> Tensor:
    # A product, and not torch.tensor(number): for that one the compiler makes a new graph for every number.
    return number.detach() if isinstance(number, Tensor) else torch.ones((), dtype=torch.float64, device="cpu") * number
