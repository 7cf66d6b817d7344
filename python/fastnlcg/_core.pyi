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
row_sums: int
row_signature: int
block_elements: int
most_pairs: int
tile_elements: int

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
def rank_row(values: Sequence[float], step: float, exchange: str, digest: float) -> list[float]: ...
def same_objects(a: list[Any], b: list[Any]) -> bool: ...
def normalize(x: Buffer, count: int, n: int, threads: int, stream: int = 0, sums: Buffer | None = None) -> None: ...
def normalize_doubles(count: int, n: int) -> int: ...
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

class DeviceScalar:
    def __init__(self, *, address: int, dtype: str) -> None: ...

class SegmentSpec:
    def __init__(
        self,
        *,
        offset: int,
        group: int,
        index: int,
        dtype: str,
        shape: Sequence[int],
        strides: Sequence[int],
        begin: int = 0,
        run: int = 0,
        skip: int = 0,
    ) -> None: ...

class StateKeys:
    def __init__(
        self,
        *,
        grad_prev: str | None = None,
        direction: str | None = None,
        diagonal: str | None = None,
        origin: str | None = None,
        steps: str | None = None,
    ) -> None: ...

class Tensors:
    def __init__(
        self,
        *,
        params: list[Any] = ...,
        gradients: list[Any] | None = None,
        entries: list[Any] = ...,
        inactive_params: list[Any] = ...,
        state: object = None,
        expected_state: list[Any] = ...,
        scalars: object = None,
        alpha_prev: list[Any] = ...,
    ) -> None: ...

class DescentPass:
    def __init__(
        self,
        kind: str,
        *,
        alpha: float = 0.0,
        first: bool = False,
        preconditioned: bool = True,
        update: bool = False,
        scale: float = 1.0,
        ys: float = 0.0,
        shs: float = 0.0,
        beta: float = 0.0,
        maximize: bool = False,
        row: int = 0,
        count: int = 0,
        y_row: int = 0,
        gamma: float = 1.0,
        coefficients: Sequence[float] = ...,
    ) -> None: ...

class NativeStep:
    def set_options(self, options: Mapping[str, Any]) -> None: ...
    def set_launch(self, form: str, blocks: int = 0, resident_tiles: int = -1) -> None: ...
    @property
    def launches(self) -> int: ...
    stream: int

class TensorTable(NativeStep):
    def __init__(self, state_dtype: str, device: str = "cpu", stream: int = 0) -> None: ...
    def lay_out(
        self,
        n: int,
        segments: Sequence[SegmentSpec],
        groups: int,
        keys: StateKeys,
        dlpack_api: object,
        tensor_type: object,
        workspace: Buffer | None = None,
        matrix_groups: Sequence[int] = ...,
    ) -> None: ...
    def set_exchange(
        self,
        mine: Buffer,
        all: Buffer,
        owned: Buffer,
        elements: int,
        every_decision: bool,
        replicas: bool,
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
        lr_on_device: Sequence[DeviceScalar | None] = ...,
        loss_on_device: DeviceScalar | None = None,
        grad_scale: DeviceScalar | None = None,
        found_inf: DeviceScalar | None = None,
        complete: Callable[[], object] | None = None,
    ) -> bool | None: ...
    def state_norms(self, at: Tensors, threads: int) -> tuple[float, float, float] | None: ...
    def set_origins(self, workspace: Buffer, parts: Sequence[tuple[int, int]]) -> None: ...
    def matrix_pass(self, kind: str, first_tile: int, last_tile: int, threads: int) -> None: ...
    @property
    def matrices_pending(self) -> bool: ...
    @property
    def matrix_moves(self) -> int: ...
    def end_matrices(self) -> None: ...
    def last_move(self, at: Tensors, threads: int) -> bool: ...
    def descend(self, at: Tensors, pass_: DescentPass, threads: int) -> list[float] | None: ...
    agreed: float
    def join_stream(self) -> None: ...

class FlatStep(NativeStep):
    def __init__(self, state_dtype: str, device: str = "cpu", stream: int = 0) -> None: ...
    def bind(
        self,
        *,
        p: Buffer | None = None,
        g: Buffer | None = None,
        grad_prev: Buffer | None = None,
        direction: Buffer | None = None,
        diagonal: Buffer | None = None,
        origin: Buffer | None = None,
        rows: Buffer | None = None,
        steps: float = 0.0,
        owned: int = -1,
    ) -> None: ...
    def step(
        self, scalars: Buffer, lr: float, weight_decay: float, maximize: bool, loss: float, threads: int
    ) -> bool: ...
    def update_curvature(self, alpha_prev: float, threads: int) -> tuple[float, float, bool]: ...
    def preconditioned_dots(self, threads: int) -> tuple[float, float]: ...
    def update_direction(self, alpha: float, weight_decay: float, beta: float, threads: int) -> None: ...
    def descend(self, pass_: DescentPass, threads: int) -> list[float]: ...
