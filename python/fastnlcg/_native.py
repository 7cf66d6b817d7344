"""The only importer of ``_core``: the native module's names, with Python types, and the checks of the arrays passed to
it. Works without torch.

Rule: check everything, write nothing, then raise. TypeError means the wrong kind, ValueError the wrong value or shape,
RuntimeError the wrong moment.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from numbers import Real
from typing import Any

from fastnlcg import _core
from fastnlcg._core import (
    Buffer,
    DescentPass,
    DeviceScalar,
    FlatStep,
    RanksDisagree,
    SegmentSpec,
    StateKeys,
    Tensors,
    TensorTable,
)

__all__ = [
    "SCALARS",
    "Buffer",
    "DescentPass",
    "DeviceScalar",
    "FlatStep",
    "RanksDisagree",
    "SegmentSpec",
    "StateKeys",
    "TensorTable",
    "Tensors",
    "buffers",
    "capturing",
    "check_loss",
    "chunk_elements",
    "compiler",
    "cuda_status",
    "cuda_unavailable_reason",
    "current_stream",
    "instruction_set",
    "instruction_sets",
    "mark_written",
    "normalize",
    "normalize_doubles",
    "num_threads",
    "on_gpu",
    "openmp",
    "state_dtype",
    "version",
    "workspace_doubles",
]

DTYPES = ("float64", "float32", "bfloat16", "float16")
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

version: str = _core.version
compiler: str = _core.compiler
openmp: bool = _core.openmp
cuda_status = _core.cuda_status
instruction_set = _core.instruction_set
instruction_sets = _core.instruction_sets
workspace_doubles = _core.workspace_doubles
row_doubles: int = _core.row_doubles
row_sums: int = _core.row_sums
row_signature: int = _core.row_signature
rank_row = _core.rank_row
chunk_elements = _core.chunk_elements
same_objects = _core.same_objects
normalize = _core.normalize
normalize_doubles = _core.normalize_doubles
block_elements: int = _core.block_elements
most_pairs: int = _core.most_pairs
tile_elements: int = _core.tile_elements
SCALARS: dict[str, float] = _core.scalars
"""Every scalar that survives a step, with its value before the first step, in the order of the tensor ``"scalars"``."""


@functools.cache
def cuda_unavailable_reason() -> str:
    """Why there are no CUDA kernels; empty if there are."""
    return str(cuda_status()["unavailable_reason"])


def on_gpu(device: Any) -> bool:
    """Whether the CUDA kernels step parameters on this ``torch.device``."""
    return bool(device.type == "cuda")


def current_stream(device: str, *arrays: object) -> int:
    """The stream, a ``cudaStream_t``, on which the caller works with these arrays on ``device``: torch's current one if
    an array is torch's (or none is given), CuPy's if one is CuPy's, else the default stream."""
    makers = {type(array).__module__.partition(".")[0] for array in arrays}
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and (not arrays or any(isinstance(array, torch.Tensor) for array in arrays)):
        return int(torch.cuda.current_stream(device).cuda_stream)
    if cupy is not None and "cupy" in makers:
        with cupy.cuda.Device(int(device.partition(":")[2])):
            return int(cupy.cuda.get_current_stream().ptr)
    return 0


def capturing() -> bool:
    """Whether torch's current stream is being captured into a CUDA graph."""
    return bool(sys.modules["torch"].cuda.is_current_stream_capturing())


# ---- numbers -----------------------------------------------------------------------------------------------------


def check_loss(loss: object) -> float:
    """A loss as a float, NaN for None. Takes numbers and one-element arrays or tensors; NaN and Inf pass, and are
    ignored by the line search."""
    if loss is None:
        return math.nan
    if isinstance(loss, bool | str | bytes | complex):
        raise TypeError(f"loss must be a real number or a one-element tensor, got {loss!r}")
    if not isinstance(loss, Real):
        size = getattr(loss, "size", None)
        elements = loss.numel() if hasattr(loss, "numel") else size if isinstance(size, int) else None
        if elements is None:
            raise TypeError(f"loss must be a real number or a one-element tensor, got {type(loss).__name__}")
        if elements != 1:
            raise ValueError(f"loss must have one element, got shape {tuple(getattr(loss, 'shape', ()))}")
        loss = loss.item()  # type: ignore[attr-defined]
        if isinstance(loss, complex):
            raise TypeError(f"loss must be a real number, got {loss!r} in a complex array or tensor")
    try:
        return float(loss)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"Invalid loss: {loss!r}; expected a number that a double holds") from None


def num_threads(threads: int | None = None) -> int:
    """``threads``, or torch's thread count if torch is loaded, or OpenMP's; 1 without OpenMP."""
    if threads is not None:
        if isinstance(threads, bool) or not isinstance(threads, int):
            raise TypeError(f"threads must be an int, got {threads!r}")
        if not 1 <= threads < 2**31:
            raise ValueError(f"threads must be from 1 to 2**31 - 1, got {threads}")
        return threads
    torch = sys.modules.get("torch") if _core.openmp else None
    return torch.get_num_threads() if torch is not None else _core.max_threads()


# ---- memory ------------------------------------------------------------------------------------------------------


def state_dtype(dtype: str) -> str:
    """The dtype of the state for parameters of ``dtype``."""
    return "float64" if dtype == "float64" else "float32"


def _view(name: str, array: object) -> Buffer:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(array, numpy.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; expected an array without one")
    # torch 2.13's DLPack refuses the conjugate bit and ignores the negative one: the sign would be lost.
    negated = getattr(array, "is_neg", None)
    if callable(negated) and negated():
        raise ValueError(f"{name} has torch's negative bit, as x.conj().imag has; pass {name}.resolve_neg()")
    # A torch tensor that requires grad refuses DLPack; its detached alias is the same memory.
    detach = getattr(array, "detach", None)
    try:
        return Buffer(detach() if callable(detach) else array)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    except RuntimeError as error:
        raise RuntimeError(f"{name}: {error}") from error
    except (ValueError, BufferError) as error:  # the array has no memory, or its memory is not dense
        raise ValueError(f"{name}: {error}") from error


class Views(dict[str, Buffer]):
    """The arrays of one call, checked: a view for each name, and the properties that all of them share."""

    n: int
    """number of elements of each array"""
    dtype: str
    """dtype of the parameters and gradients"""
    state_dtype: str
    device: str
    """``"cpu"``, or ``"cuda:0"`` and so on"""


def buffers(
    parameters: Mapping[str, object],
    state: Mapping[str, object],
    written: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> Views:
    """Views of the arrays of one call, all checked: kind, dtype, device, layout, writability, lengths, overlap.

    ``parameters`` share one dtype (and ``g`` is among them); ``state`` has the state's dtype for it. Arrays named in
    ``written`` are written by the call. Those named in ``optional`` may be None, and are then left out.
    """
    arrays = {**parameters, **state}
    for name, array in arrays.items():
        if array is None and name not in optional:
            raise TypeError(f"{name} must be an array, got None")
    given = {name: array for name, array in arrays.items() if array is not None}
    views = Views({name: _view(name, array) for name, array in given.items()})
    views.dtype, views.device, views.n = views["g"].dtype, views["g"].device, views["g"].size
    views.state_dtype = state_dtype(views.dtype)
    for name, view in views.items():
        if view.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {view.dtype}; expected one of {', '.join(DTYPES)}")
        expected = views.dtype if name in parameters else views.state_dtype
        if view.dtype != expected:
            raise TypeError(
                f"{name} has dtype {view.dtype}, expected {expected} because g has {views.dtype}; nothing is cast"
            )
        if view.device != views.device:
            raise ValueError(f"{name} is on {view.device} and g on {views.device}; expected one device")
        if view.device != "cpu" and not view.device.startswith("cuda"):
            raise ValueError(f"{name} is on {view.device}, expected cpu or cuda")
        if view.device != "cpu" and cuda_unavailable_reason():
            raise ValueError(f"{name} is on {view.device}, expected cpu: {cuda_unavailable_reason()}")
        if not view.contiguous:
            raise ValueError(f"{name} is not contiguous; expected a contiguous, row-major array")
        if name in written and view.readonly:
            raise ValueError(f"{name} is read-only; expected a writable array, because the call writes it")
        if view.pointer == 0 and view.size > 0:
            raise ValueError(f"{name} has {view.size} elements but no memory")
        if view.pointer % ITEMSIZE[view.dtype]:
            raise ValueError(f"{name} is not aligned to its {ITEMSIZE[view.dtype]}-byte elements")
    sizes = {name: view.size for name, view in views.items()}
    if len(set(sizes.values())) != 1:
        lengths = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"the arrays have different lengths: {lengths}; expected one length")
    spans = [(v.pointer, v.pointer + v.size * ITEMSIZE[v.dtype], name) for name, v in views.items() if v.size]
    for i, (begin, end, name) in enumerate(spans):
        for other_begin, other_end, other in spans[i + 1 :]:
            if begin < other_end and other_begin < end and (name in written or other in written):
                raise ValueError(f"{name} and {other} overlap in memory; expected separate arrays")
    return views


def mark_written(*arrays: object) -> None:
    """Tells autograd about native writes into torch tensors; other arrays are ignored."""
    torch = sys.modules.get("torch")
    if torch is not None:
        for array in arrays:
            if isinstance(array, torch.Tensor):
                torch.autograd.graph.increment_version(array)
