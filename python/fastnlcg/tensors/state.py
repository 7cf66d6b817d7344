"""The state next to a parameter: which tensors it takes, made, converted or refused. The only place that allocates it.

State is what it is for torch's own optimizers: a tensor of its own for each parameter and state array, in
``optimizer.state``. It has the parameter's memory order (row-major if the parameter has gaps), and for a DTensor its
placements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnlcg import _native
from fastnlcg.tensors.checks import dense_strides, missing_bytes
from fastnlcg.tensors.dtensor import as_like, is_sharded, memory, shard_like

HUGE = 1 << 22  # bytes of state from which huge pages are requested


def state_dtype(p: Tensor, wanted: str | None = None, what: str = "a parameter") -> torch.dtype:
    """Of the state of ``p``, with the option ``state_dtype``. ValueError for float64 parameters if that is bfloat16."""
    if p.dtype == torch.float64 and wanted is not None:
        raise ValueError(
            f"{what} of shape {tuple(p.shape)} is torch.float64 and state_dtype {wanted!r}; expected None, or "
            "parameters of another dtype"
        )
    return torch.float64 if p.dtype == torch.float64 else torch.float32 if wanted is None else torch.bfloat16


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the formulas of a state of ``dtype`` are evaluated."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def as_arithmetic(value: Tensor) -> Tensor:
    """State in the dtype of its formulas."""
    return value.to(arithmetic_dtype(value.dtype))


def missing_arrays(
    i: int, p: Tensor, entry: Mapping[str, Any], arrays: Mapping[str, float], wanted: str | None = None
) -> dict[str, Tensor]:
    """What the state ``entry`` of parameter ``i`` lacks, or has in a form that the native step cannot use: new tensors,
    with the old values if there are any. Writes nothing.

    Args:
        arrays: the state arrays by name, and the value that each starts with.
        wanted: the option ``state_dtype``.

    Raises:
        RuntimeError: for a state array of another shape than the parameter, or with too little storage.
    """
    local_p = memory(p)
    strides, dtype = dense_strides(local_p), state_dtype(p, wanted, f"parameter {i}")
    new: dict[str, Tensor] = {}
    for key, start in arrays.items():
        value = entry.get(key)
        if value is None:
            new[key] = as_like(_empty(local_p, strides, dtype).fill_(start), p)
            continue
        # A whole tensor next to a DTensor, or one with other placements, gives this rank's part of it.
        local = shard_like(value, p) if isinstance(value, Tensor) and value.shape == p.shape else None
        if local is None or local.shape != local_p.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise RuntimeError(
                f"parameter {i} has shape {tuple(p.shape)}, its state {key!r} {got}: it was resized; add the new "
                "parameter to a new optimizer"
            )
        if missing := missing_bytes(local):
            raise RuntimeError(f"state {key!r} of parameter {i} has {missing} bytes less of storage than it takes")
        fits = (
            type(local) is Tensor
            and local is memory(value)
            and is_sharded(value) == is_sharded(p)
            and local.dtype == dtype
            and local.device == local_p.device
            and not local.is_neg()
            and same_strides(local, strides)
        )
        if not fits:
            new[key] = as_like(_empty(local_p, strides, dtype).copy_(local.detach()), p)
    return new


def _empty(like: Tensor, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    buffer = torch.empty_strided(like.shape, strides, dtype=dtype, device=like.device)
    if buffer.numel() * buffer.element_size() >= HUGE and buffer.device.type == "cpu":
        _native.Buffer(buffer.as_strided((buffer.numel(),), (1,))).advise_huge_pages()
    return buffer


def local_arrays(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """This rank's memory of a parameter's state."""
    return {key: memory(value) for key, value in entry.items() if isinstance(value, Tensor)}


def same_strides(t: Tensor, strides: Sequence[int]) -> bool:
    """Whether ``t`` has these strides, up to dimensions of one element."""
    return all(a == b for a, b, size in zip(t.stride(), strides, t.shape, strict=True) if size != 1)
