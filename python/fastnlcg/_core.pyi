from collections.abc import Callable, Sequence
from typing import Any, TypedDict

version: str
compiler: str

class _CudaStatus(TypedDict):
    built: bool
    architectures: str
    devices: list[str]
    runtime: int
    driver: int
    unavailable_reason: str

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def max_threads() -> int: ...
def cuda_status() -> _CudaStatus: ...

row_doubles: int

def chunk_elements(n: int) -> int: ...
def workspace_doubles(n: int, max_segments: int, groups: int) -> int: ...

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

class Step:
    def __init__(
        self,
        state_dtype: str,
        n: int,
        grad_prev: Buffer | None,
        direction: Buffer | None,
        diagonal: Buffer | None,
        param_steps: Buffer | None,
        beta2_powers: Buffer | None,
        groups: int,
        device: str = "cpu",
        workspace: Buffer | None = None,
        stream: int = 0,
    ) -> None: ...
    def set_options(
        self,
        preconditioner: str,
        update: str,
        restart: str,
        restart_every: int,
        eps: float,
        curvature_eps: float,
        beta2: float,
        beta_max: float,
        skip_nonfinite: bool,
        maximize: bool,
        stochastic_rounding: bool,
        line_search: tuple[float, float, float, float] | None,
    ) -> None: ...
    def set_exchange(
        self,
        mine: Buffer,
        all: Buffer,
        counted: Buffer,
        elements: int,
        every_decision: bool,
        gather: Callable[[], object],
    ) -> None: ...
    def set_segments(self, table: Sequence[tuple[int, int, int, str, Sequence[int], Sequence[int]]]) -> None: ...
    def point(self, p: list[int], g: list[int]) -> None: ...
    def refresh(self, exchange: object, moving: list[Any], resting: list[Any], tensor_type: type) -> bool: ...
    def step(
        self,
        lr: list[float],
        weight_decay: list[float],
        maximize: list[bool],
        set: float,
        loss: float,
        threads: int,
        lr_on_device: Sequence[tuple[int, str] | None] = ...,
        loss_on_device: tuple[int, str] | None = None,
        grad_scale: tuple[int, str] | None = None,
        found_inf: tuple[int, str] | None = None,
    ) -> bool: ...
    def set_launch(self, form: str, blocks: int = 0, resident_tiles: int = -1) -> None: ...
    @property
    def launches(self) -> int: ...
    stream: int
    def last_move(self, threads: int) -> None: ...
    def state_norms(self, threads: int) -> tuple[float, float, float]: ...
    scalars: dict[str, float]
    alpha_prev: list[float]
    beta2_power: float
    def update_curvature(self, g: Buffer, alpha_prev: float, threads: int) -> tuple[float, float, bool]: ...
    def preconditioned_dots(self, g: Buffer, threads: int) -> tuple[float, float]: ...
    def update_direction(
        self, p: Buffer | None, g: Buffer, alpha: float, weight_decay: float, beta: float, threads: int
    ) -> None: ...
