from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

version: str
compiler: str
openmp: bool
preconditioners: list[str]
updates: list[str]
options: list[str]
scalars: dict[str, float]
row_doubles: int
row_signature: int
diagnostics_moment: float
block_elements: int

class _CudaStatus(TypedDict):
    built: bool
    architectures: str
    devices: list[str]
    runtime: int
    driver: int
    unavailable_reason: str

class RanksDisagree(RuntimeError): ...  # noqa: N818

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def max_threads() -> int: ...
def cuda_status() -> _CudaStatus: ...
def same_objects(a: list[Any], b: list[Any]) -> bool: ...
def chunk_elements(n: int) -> int: ...
def workspace_doubles(n: int, segments: int, groups: int) -> int: ...

class Buffer:
    def __init__(self, owner: object) -> None: ...
    @property
    def pointer(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def readonly(self) -> bool: ...
    @property
    def contiguous(self) -> bool: ...
    def advise_huge_pages(self) -> None: ...

class Tensors:
    def __init__(
        self,
        params: list[Any],
        gradients: list[Any] | None,
        entries: list[Any],
        resting: list[Any],
        state: object,
        held: list[Any],
        scalars: object,
        alpha_prev: list[Any],
    ) -> None: ...

_Row = tuple[int, int, int, str, Sequence[int], Sequence[int], tuple[int, int, int]]

class Step:
    def __init__(self, state_dtype: str, device: str = "cpu", stream: int = 0) -> None: ...
    def set_options(self, options: Mapping[str, Any]) -> None: ...
    def lay_out(
        self,
        n: int,
        table: Sequence[_Row],
        groups: int,
        keys: Sequence[str],
        exchange: object,
        tensor_type: object,
        workspace: Buffer | None = None,
    ) -> None: ...
    def set_exchange(
        self,
        mine: Buffer,
        all: Buffer,
        owned: Buffer,
        elements: int,
        every_decision: bool,
        gather: Callable[[], object],
    ) -> None: ...
    def step(
        self,
        at: Tensors,
        lr: list[float],
        weight_decay: list[float],
        maximize: list[bool],
        active_set: float,
        loss: float,
        threads: int,
        lr_on_device: Sequence[tuple[int, str] | None] = ...,
        loss_on_device: tuple[int, str] | None = None,
        grad_scale: tuple[int, str] | None = None,
        found_inf: tuple[int, str] | None = None,
    ) -> bool | None: ...
    def state_norms(self, at: Tensors, threads: int) -> tuple[float, float, float] | None: ...
    def last_move(self, at: Tensors, threads: int) -> bool: ...
    def descend(
        self,
        at: Tensors | None,
        kind: str,
        threads: int,
        alpha: float = 0.0,
        first: bool = False,
        preconditioned: bool = True,
        update: bool = False,
        scale: float = 1.0,
        ys: float = 0.0,
        shs: float = 0.0,
        beta: float = 0.0,
    ) -> list[float] | None: ...
    def bind(
        self,
        p: Buffer | None,
        g: Buffer | None,
        grad_prev: Buffer | None,
        direction: Buffer | None,
        diagonal: Buffer | None,
        origin: Buffer | None = None,
        steps: float = 0.0,
    ) -> None: ...
    def flat_step(
        self, scalars: Buffer, lr: float, weight_decay: float, maximize: bool, loss: float, threads: int
    ) -> bool: ...
    def update_curvature(self, alpha_prev: float, threads: int) -> tuple[float, float, bool]: ...
    def preconditioned_dots(self, threads: int) -> tuple[float, float]: ...
    def update_direction(self, alpha: float, weight_decay: float, beta: float, threads: int) -> None: ...
    def set_launch(self, form: str, blocks: int = 0, resident_tiles: int = -1) -> None: ...
    @property
    def launches(self) -> int: ...
    @property
    def digest(self) -> float: ...
    stream: int
    def join_stream(self) -> None: ...
