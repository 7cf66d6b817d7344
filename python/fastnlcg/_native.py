"""The validation layer between Python and the native module: checks arguments; the only importer of ``_core``.

Rule: check everything, write nothing, then raise. TypeError is the wrong kind, ValueError the wrong value or shape,
RuntimeError the wrong moment. Works without torch.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from fastnlcg import _core
from fastnlcg._core import Buffer, Step
from fastnlcg.line_search import OnlineLineSearch

__all__ = [
    "PRECONDITIONERS",
    "Buffer",
    "Preconditioner",
    "Step",
    "buffers",
    "capturing",
    "check_loss",
    "check_options",
    "check_real",
    "chunk_elements",
    "compiler",
    "cuda_status",
    "cuda_unavailable_reason",
    "current_stream",
    "instruction_set",
    "instruction_sets",
    "mark_written",
    "native_options",
    "needs_rz_mid",
    "num_threads",
    "on_gpu",
    "row_doubles",
    "state_dtype",
    "version",
    "workspace_doubles",
]


@dataclass(frozen=True)
class Preconditioner:
    """What Python has to know of a preconditioner; its formulas are in ``csrc/passes.h``."""

    native: str
    """its name there"""
    diagonal: str | None = None
    """the state key of its own stream"""
    start: float = 0.0
    """what that stream holds before the first step"""
    keeps_gradient: bool = True
    """whether ``grad_prev`` is state even where no option needs it"""
    counts_updates: bool = False
    """whether a parameter has a ``beta2_power``: beta2^k after k updates"""
    beta_max: float = 1.0
    """the default"""
    divides_by_eps: bool = False
    """whether the diagonal can be 0, so that eps must not be"""


PRECONDITIONERS: dict[str | None, Preconditioner] = {
    "adam": Preconditioner(
        "adam", "exp_avg_sq", keeps_gradient=False, counts_updates=True, beta_max=0.9, divides_by_eps=True
    ),
    "bfgs": Preconditioner("bfgs", "hessian_diag", start=1.0),
    None: Preconditioner("none"),
}
UPDATES = ("fletcher_reeves", "polak_ribiere", "heavy_ball")
RESTARTS = ("descent", "powell")
NONFINITE = ("skip", "propagate")
DTYPES = ("float64", "float32", "bfloat16", "float16")
SMALLEST_EPS = 1.1754944e-38  # the least normal float32: anything less may be flushed to 0
LARGEST_COUNT = 2**53  # of steps: whole numbers up to here are exact in a double
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

version: str = _core.version
compiler: str = _core.compiler
cuda_status = _core.cuda_status
instruction_set = _core.instruction_set
instruction_sets = _core.instruction_sets
workspace_doubles = _core.workspace_doubles
row_doubles: int = _core.row_doubles
chunk_elements = _core.chunk_elements


@functools.cache
def cuda_unavailable_reason() -> str:
    """Why there are no CUDA kernels; empty where there are."""
    return str(cuda_status()["unavailable_reason"])


def on_gpu(device: Any) -> bool:
    """Whether this ``torch.device`` is stepped by the CUDA kernels."""
    return bool(device.type == "cuda")


def current_stream(device: str, *arrays: object) -> int:
    """The stream, a ``cudaStream_t``, on which the caller of these arrays works on ``device``: torch's current one
    where an array is torch's (or none is given), CuPy's where one is CuPy's, else the default stream."""
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


# ---- numbers and choices -----------------------------------------------------------------------------------------


def check_real(name: str, value: object, *, minimum: float = -math.inf) -> float:
    """``value`` as a float; TypeError unless it is a real number, ValueError unless finite and >= ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond the largest double
        number = math.inf
    if not (math.isfinite(number) and number >= minimum):
        bound = "" if minimum == -math.inf else f" and >= {minimum:g}"
        what = "Invalid learning rate" if name == "lr" else f"Invalid {name}"
        raise ValueError(f"{what}: {value!r}; expected a finite number{bound}")
    return number


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if isinstance(value, str | None) and value in choices:
        return
    kind = ValueError if isinstance(value, str) else TypeError
    raise kind(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_options(options: Mapping[str, Any]) -> None:
    """Checks the options that hold for a whole optimizer. Raises for the first that is wrong; see NLCG for them."""
    _check_choice("update", options["update"], UPDATES)
    _check_choice("preconditioner", options["preconditioner"], tuple(PRECONDITIONERS))
    _check_choice("nonfinite", options["nonfinite"], NONFINITE)
    preconditioner = PRECONDITIONERS[options["preconditioner"]]
    eps = check_real("eps", options["eps"], minimum=0.0)
    if preconditioner.divides_by_eps and eps < SMALLEST_EPS:
        raise ValueError(
            f"Invalid eps: {options['eps']!r}; expected at least {SMALLEST_EPS:g} with preconditioner="
            f"{options['preconditioner']!r}, whose diagonal is 0 where every gradient was"
        )
    check_real("curvature_eps", options["curvature_eps"], minimum=0.0)
    if check_real("beta2", options["beta2"], minimum=0.0) >= 1.0:
        raise ValueError(f"Invalid beta2: {options['beta2']!r}; expected a number in [0, 1)")
    if options["beta_max"] is not None and check_real("beta_max", options["beta_max"], minimum=0.0) > 1.0:
        raise ValueError(f"Invalid beta_max: {options['beta_max']!r}; expected None or a number in [0, 1]")
    if options["update"] == "heavy_ball" and _beta_max(options) >= 1.0:
        raise ValueError("update='heavy_ball' holds beta at beta_max: expected beta_max < 1, got 1")
    for name in ("maximize", "capturable", "stochastic_rounding"):
        if not isinstance(options.get(name, False), bool):
            raise TypeError(f"{name} must be a bool, got {options[name]!r}")
    restart = options["restart"]
    if isinstance(restart, int) and not isinstance(restart, bool):
        if not 1 <= restart <= LARGEST_COUNT:
            raise ValueError(f"restart must be from 1 to 2**53 steps, got {restart}")
    elif restart is not None:
        kind = ValueError if isinstance(restart, str) else TypeError
        if not isinstance(restart, str) or restart not in RESTARTS:
            raise kind(f"restart must be None, 'descent', 'powell' or a number of steps; got {restart!r}")
    line_search = options["line_search"]
    if not isinstance(line_search, OnlineLineSearch | None):
        raise TypeError(f"line_search must be None or an OnlineLineSearch, got {line_search!r}")


def _beta_max(options: Mapping[str, Any]) -> float:
    """The option, or the preconditioner's default."""
    given = options["beta_max"]
    return PRECONDITIONERS[options["preconditioner"]].beta_max if given is None else float(given)


def needs_rz_mid(options: Mapping[str, Any]) -> bool:
    """Whether these options look at sum(g g_prev / (h + eps)), so that the state must have ``grad_prev``."""
    return bool(options["update"] == "polak_ribiere" or options["restart"] == "powell")


def native_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``Step.set_options`` for checked options."""
    restart, line_search = options["restart"], options["line_search"]
    return {
        "preconditioner": PRECONDITIONERS[options["preconditioner"]].native,
        "update": options["update"],
        "restart": "never" if restart is None else restart if isinstance(restart, str) else "every",
        "restart_every": restart if isinstance(restart, int) else 0,
        "eps": float(options["eps"]),
        "curvature_eps": float(options["curvature_eps"]),
        "beta2": float(options["beta2"]),
        "beta_max": _beta_max(options),
        "skip_nonfinite": options["nonfinite"] == "skip",
        "maximize": options["maximize"],
        "stochastic_rounding": options.get("stochastic_rounding", False),
        "line_search": None if line_search is None else line_search.as_tuple(),
    }


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
            raise TypeError("loss must be real, got a complex tensor")
    try:
        return float(loss)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"Invalid loss: {loss!r}; expected a number that a double holds") from None


def num_threads(threads: int | None = None) -> int:
    """``threads``, or torch's thread count where torch is loaded, or OpenMP's."""
    if threads is not None:
        if isinstance(threads, bool) or not isinstance(threads, int):
            raise TypeError(f"threads must be an int, got {threads!r}")
        if not 1 <= threads < 2**31:
            raise ValueError(f"threads must be from 1 to 2**31 - 1, got {threads}")
        return threads
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else _core.max_threads()


# ---- memory ------------------------------------------------------------------------------------------------------


def state_dtype(dtype: str) -> str:
    """The dtype of the state beside parameters of ``dtype``."""
    return "float64" if dtype == "float64" else "float32"


def _view(name: str, array: object) -> Buffer:
    # A torch tensor that requires grad refuses DLPack; its detached alias is the same memory.
    detach = getattr(array, "detach", None)
    try:
        return Buffer(detach() if callable(detach) else array)
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        kind = ValueError if isinstance(error, BufferError) else type(error)  # what has no memory, or not dense memory
        raise kind(f"{name}: {error}") from error


class Views(dict[str, Buffer]):
    """The arrays of one call, checked: name to view, with what they have in common."""

    n: int
    """elements of each"""
    dtype: str
    """of the parameters and gradients"""
    state_dtype: str
    device: str
    """``"cpu"`` or ``"cuda:0"``, ..."""


def buffers(
    parameters: Mapping[str, object],
    state: Mapping[str, object],
    written: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> Views:
    """Views of the arrays of one call, all checked: kind, dtype, device, layout, writability, lengths, overlap.

    ``parameters`` share one dtype (and ``g`` is among them); ``state`` has the state's dtype for it. What is
    ``optional`` may be None, and is then left out.
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
                f"{name} has dtype {view.dtype}, expected {expected} beside g of {views.dtype}; nothing is cast"
            )
        if view.device != views.device:
            raise ValueError(f"{name} is on {view.device} and g on {views.device}; expected one device")
        if view.device != "cpu" and not view.device.startswith("cuda"):
            raise ValueError(f"{name} is on {view.device}, expected cpu or cuda")
        if view.device != "cpu" and cuda_unavailable_reason():
            raise ValueError(f"{name} is on {view.device}, expected cpu: {cuda_unavailable_reason()}")
        if not view.contiguous:
            raise ValueError(f"{name} is not contiguous (row-major); a flat-buffer function needs that")
        if name in written and view.readonly:
            raise ValueError(f"{name} is read-only, and would be written")
        if view.pointer == 0 and view.size > 0:
            raise ValueError(f"{name} has {view.size} elements but no memory")
        if view.pointer % ITEMSIZE[view.dtype]:
            raise ValueError(f"{name} is not aligned to its {ITEMSIZE[view.dtype]}-byte elements")
    sizes = {name: view.size for name, view in views.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError("different lengths: " + ", ".join(f"{name} {size}" for name, size in sizes.items()))
    spans = [(v.pointer, v.pointer + v.size * ITEMSIZE[v.dtype], name) for name, v in views.items() if v.size]
    for i, (begin, end, name) in enumerate(spans):
        for other_begin, other_end, other in spans[i + 1 :]:
            if begin < other_end and other_begin < end and (name in written or other in written):
                raise ValueError(f"{name} and {other} overlap in memory")
    return views


def mark_written(*arrays: object) -> None:
    """Tells autograd about native writes into torch tensors; other arrays are passed over."""
    torch = sys.modules.get("torch")
    if torch is not None:
        for array in arrays:
            if isinstance(array, torch.Tensor):
                torch.autograd.graph.increment_version(array)
