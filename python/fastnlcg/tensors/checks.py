"""Checks of one parameter or gradient: whether the native step can take it, and in which memory order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnlcg import _native
from fastnlcg.tensors.dtensor import is_sharded, memory

DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def has_storage(t: Tensor) -> bool:
    """Whether ``t`` is a plain torch tensor, with elements in memory."""
    return type(t).__torch_dispatch__ is Tensor.__torch_dispatch__


def check_parameter(index: int, p: Tensor) -> None:
    """Raises unless the native step can move ``p``, which has a gradient or state. A parameter with neither may be of
    any kind.

    Raises:
        TypeError: for another dtype, or a tensor without storage of its own.
        RuntimeError: for another layout or device, or storage that was resized or freed.
        ValueError: for elements that share memory.
    """
    if p.dtype not in DTYPES:
        raise TypeError(f"parameter {index} has dtype {p.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    what = f"parameter {index} of shape {tuple(p.shape)}, {p.dtype}, on {p.device},"
    local = memory(p)
    if not has_storage(local):
        raise TypeError(
            f"{what} is a {type(p).__name__}, a tensor without storage of its own; expected a plain tensor or a DTensor"
        )
    if local.layout is not torch.strided:
        raise RuntimeError(f"{what} has layout {local.layout}; expected torch.strided")
    if local.device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"{what} cannot be stepped; expected cpu or cuda")
    if _native.on_gpu(local.device) and _native.cuda_unavailable_reason():
        raise RuntimeError(f"{what} cannot be stepped; expected cpu: {_native.cuda_unavailable_reason()}")
    if missing := missing_bytes(local):
        raise RuntimeError(f"{what} has {missing} bytes less of storage than it needs: it was resized or freed")
    if not is_dense(local) and _overlaps(local):
        raise ValueError(
            f"{what} has strides {local.stride()}, so elements share memory; expected separate memory for each element"
        )


def check_mixture(stateful: Sequence[int], params: Sequence[Tensor]) -> None:
    """Raises unless these parameters can share one optimizer: TypeError for float64 mixed with other dtypes,
    RuntimeError for several devices."""
    kinds = {params[i].dtype == torch.float64 for i in stateful}
    if len(kinds) > 1:
        double = next(i for i in stateful if params[i].dtype == torch.float64)
        single = next(i for i in stateful if params[i].dtype != torch.float64)
        raise TypeError(
            f"parameter {double} is torch.float64 and parameter {single} is {params[single].dtype}: float64 cannot be "
            "mixed with other dtypes in one optimizer; use one for each"
        )
    for i in stateful:
        first = params[stateful[0]]
        if params[i].device != first.device:
            raise RuntimeError(
                f"parameter {i} is on {params[i].device}, parameter {stateful[0]} on {first.device}: one optimizer "
                "steps one device; use one for each"
            )


def missing_bytes(t: Tensor) -> int:
    """The number of bytes by which the storage is too small (after ``storage.resize_``); 0 if it is large enough."""
    if not t.numel():
        return 0
    last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return max(0, int(last + 1) * t.element_size() - t.untyped_storage().nbytes())


def _sorted_strides(t: Tensor) -> list[tuple[int, int]]:
    return sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1)


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in _sorted_strides(t):
        if stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def _overlaps(t: Tensor) -> bool:
    """Whether two elements may share memory: the stride of a dimension does not exceed the reach of those inside it."""
    reach = 0
    for stride, size in _sorted_strides(t):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def usable_gradient(index: int, p: Tensor, g: Tensor) -> Tensor:
    """This rank's part of the gradient, in the memory order of its parameter: ``g`` itself if it has that order, else
    a copy.

    Raises:
        TypeError: for a gradient without storage of its own.
        RuntimeError: for another layout, placement, dtype, device or shape than the parameter's.
    """
    what = f"gradient of parameter {index}, shape {tuple(g.shape)}, {g.dtype}, on {g.device},"
    if g.layout is not torch.strided or g.is_nested:
        raise RuntimeError(f"{what} has layout {g.layout}; expected a dense gradient, not a sparse or nested one")
    if is_sharded(p) and not (is_sharded(g) and g.placements == p.placements and g.device_mesh == p.device_mesh):  # type: ignore[attr-defined]
        got = f"placements {g.placements}" if is_sharded(g) else "no placements"  # type: ignore[attr-defined]
        raise RuntimeError(f"{what} has {got}; expected its parameter's, {p.placements}, on the same mesh")  # type: ignore[attr-defined]
    if not has_storage(memory(g)) or is_sharded(g) != is_sharded(p):
        raise TypeError(f"{what} is a {type(g).__name__}, a tensor without storage of its own; expected a plain tensor")
    if g.dtype != p.dtype:
        raise RuntimeError(f"{what} has another dtype than its parameter; expected {p.dtype}")
    if g.device != p.device:
        raise RuntimeError(f"{what} is on another device than its parameter; expected {p.device}")
    if g.shape != p.shape:
        raise RuntimeError(f"{what} has another shape than its parameter; expected {tuple(p.shape)}")
    local, strides = memory(g), dense_strides(memory(p))
    if local.shape != memory(p).shape:
        raise RuntimeError(
            f"{what} has a shard of shape {tuple(local.shape)}; expected {tuple(memory(p).shape)}, as its parameter has"
        )
    order = zip(local.stride(), strides, local.shape, strict=True)
    if local.is_neg() or any(a != b for a, b, size in order if size != 1):
        return copy_in_order(local, strides)
    return local


def dense_strides(t: Tensor) -> tuple[int, ...]:
    """The strides in which ``t`` is stepped: its own, or row-major ones if it has gaps."""
    return t.stride() if is_dense(t) else torch.empty(t.shape, device="meta").stride()


def copy_in_order(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy of ``t`` with these strides."""
    with torch.no_grad():
        return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)
