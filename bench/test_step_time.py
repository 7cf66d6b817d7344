"""Time of one optimizer step, next to torch's optimizers, on the CPU.

    make bench                       one thread, all lists, writes JSON
    pytest bench/test_step_time.py   the same, with pytest's and pytest-benchmark's options

Machines are shared and noisy, so times are ratios to peers: fused AdamW, the same after clip_grad_norm_, fused SGD with
momentum and the faster of torch's two RMSProps with momentum. In every round each peer takes one step over the same
parameters, with a fresh gradient, and a ratio is the median over rounds. Gradients are those of a
random diagonal quadratic, in fresh memory at every step as after zero_grad(): NLCG's curvature update is at work
(asserted), and its table of pointers refreshed every time.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from pathlib import Path

import pytest
import torch
from fastnlcg import NLCG
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_


def resnet32() -> list[tuple[int, ...]]:
    """The CIFAR form: three stages of five blocks, 16-32-64 channels, 10 classes; 0.46 M parameters."""
    shapes: list[tuple[int, ...]] = [(16, 3, 3, 3), (16,), (16,)]
    channels = 16
    for width in (16, 32, 64):
        for _ in range(5):
            shapes += [(width, channels, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            channels = width
    return [*shapes, (10, 64), (10,)]


def resnet50() -> list[tuple[int, ...]]:
    """ImageNet form; 25.6 M parameters in 161 tensors."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


class PlainNLCG(torch.optim.Optimizer):
    """The same step (Fletcher-Reeves) from torch's foreach operations, its sums in float32 by torch.dot: the cost
    without a fused kernel."""

    def __init__(self, params: list[Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        lr = self.param_groups[0]["lr"]
        ps = self.param_groups[0]["params"]
        gs = [p.grad for p in ps]

        def dot(a: list[Tensor], b: list[Tensor]) -> float:
            return float(torch.stack([torch.dot(x.view(-1), y.view(-1)) for x, y in zip(a, b, strict=True)]).sum())

        if "h" not in self.state[ps[0]]:
            for p, g in zip(ps, gs, strict=True):
                self.state[p].update(h=torch.ones_like(p), d=-g, g_prev=g.clone())
            self.rz = dot(gs, gs)
            torch._foreach_add_(ps, gs, alpha=-lr)
            return
        h, d, g_prev = ([self.state[p][key] for p in ps] for key in ("h", "d", "g_prev"))
        y = torch._foreach_sub(gs, g_prev)
        s = torch._foreach_mul(d, lr)
        hs = torch._foreach_mul(h, s)
        ys, shs = dot(y, s), dot(s, hs)
        if ys > 1e-8 and shs > 1e-8:
            torch._foreach_addcmul_(h, y, y, value=1 / ys)
            torch._foreach_addcmul_(h, hs, hs, value=-1 / shs)
            torch._foreach_abs_(h)
        z = torch._foreach_div(gs, torch._foreach_add(h, 1e-8))
        rz = dot(gs, z)
        torch._foreach_mul_(d, min(max(rz / self.rz, 0.0), 1.0))
        torch._foreach_sub_(d, z)
        torch._foreach_add_(ps, d, alpha=lr)
        torch._foreach_copy_(g_prev, gs)
        self.rz = rz


class ClippedAdamW:
    """Fused AdamW after torch's clipping, which multiplies whether the norm is above the bound or not."""

    def __init__(self, params: list[Parameter], lr: float) -> None:
        self.params, self.optimizer = params, torch.optim.AdamW(params, lr, fused=True)

    def step(self) -> None:
        clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()


LR = 1e-6  # the parameters hardly move, however many steps are timed
LISTS = {
    "small100": lambda: [(8,)] * 100,  # the host's time
    "resnet32": resnet32,
    "resnet50": resnet50,
    "flat100M": lambda: [(100_000_000,)],
}
ROUNDS = {"small100": 300, "resnet32": 200, "resnet50": 15, "flat100M": 5}
OPTIMIZERS = {
    "nlcg_adam": lambda ps: NLCG(ps, LR),
    "nlcg_adam_state16": lambda ps: NLCG(ps, LR, state_dtype=torch.bfloat16),
    "nlcg_adam_pr": lambda ps: NLCG(ps, LR, update="polak_ribiere"),
    "nlcg_adam_measured": lambda ps: NLCG(ps, LR, max_grad_norm=1e30),
    "nlcg_adam_clipped": lambda ps: NLCG(ps, LR, max_grad_norm=1e-3),
    "nlcg_fr": lambda ps: NLCG(ps, 100 * LR, preconditioner="bfgs"),
    "nlcg_pr": lambda ps: NLCG(ps, 100 * LR, preconditioner="bfgs", update="polak_ribiere"),
    "nlcg_fr_gate_closed": lambda ps: NLCG(ps, 100 * LR, preconditioner="bfgs", curvature_eps=1e30),  # h stays
    "nlcg_fr_none": lambda ps: NLCG(ps, 100 * LR, preconditioner=None),
    "sgd_momentum_fused": lambda ps: torch.optim.SGD(ps, LR, momentum=0.9, fused=True),
    "sgd_momentum_foreach": lambda ps: torch.optim.SGD(ps, LR, momentum=0.9, foreach=True),
    "rmsprop_foreach": lambda ps: torch.optim.RMSprop(ps, LR, momentum=0.9, foreach=True),
    "rmsprop_loop": lambda ps: torch.optim.RMSprop(ps, LR, momentum=0.9, foreach=False),
    "adamw_fused": lambda ps: torch.optim.AdamW(ps, LR, fused=True),
    "adamw_clipped": lambda ps: ClippedAdamW(ps, LR),
    "nlcg_plain_torch": lambda ps: PlainNLCG(ps, LR),
}
# Counted traffic in bytes per float32 parameter, for the optimizers whose passes over memory we know.
BYTES = {
    "nlcg_adam": 36,
    "nlcg_adam_state16": 26,
    "nlcg_adam_pr": 44,
    "nlcg_adam_measured": 36,
    "nlcg_adam_clipped": 40,
    "nlcg_fr": 56,
    "nlcg_pr": 56,
    "nlcg_fr_gate_closed": 44,
    "nlcg_fr_none": 28,
    "sgd_momentum_fused": 20,
    "adamw_fused": 28,
}


def peak_growth(work: object) -> int:
    """Bytes by which resident memory grew at its highest during ``work()``."""
    status = Path("/proc/self/status")

    def read(key: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory kept from the step before would hide this one's
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read("VmRSS")
    work()
    return max(0, read("VmHWM") - before)


def next_gradients(params: list[Parameter], curvatures: list[Tensor]) -> None:
    with torch.no_grad():
        for p, curvature in zip(params, curvatures, strict=True):
            p.grad = None  # freed before the next one is allocated, as zero_grad() does
            p.grad = curvature * p


def timed(step: object) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@pytest.fixture(scope="module", params=LISTS)
def problem(request: pytest.FixtureRequest) -> tuple[str, list[Parameter], list[Tensor], dict[str, object]]:
    """The parameters, the curvatures of the quadratic, and the peers, warmed up."""
    torch.manual_seed(0)
    name = request.param
    params = [Parameter(torch.randn(shape)) for shape in LISTS[name]()]
    curvatures = [torch.rand_like(p) + 0.1 for p in params]
    next_gradients(params, curvatures)
    keys = ("adamw_fused", "adamw_clipped", "sgd_momentum_fused", "rmsprop_foreach", "rmsprop_loop")
    peers = {key: OPTIMIZERS[key](params) for key in keys}
    medians = {}
    for key, peer in peers.items():
        medians[key] = statistics.median(timed(peer.step) for _ in range(5))
    faster = min("rmsprop_foreach", "rmsprop_loop", key=medians.__getitem__)
    chosen = {key: key for key in ("adamw_fused", "adamw_clipped")}
    chosen |= {"sgd_fused": "sgd_momentum_fused", "rmsprop": faster}
    return name, params, curvatures, {peer: peers[key] for peer, key in chosen.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_time(benchmark: pytest.FixtureRequest, problem: tuple, name: str) -> None:
    list_name, params, curvatures, peers = problem
    n = sum(p.numel() for p in params)
    optimizer = OPTIMIZERS[name](params)
    source, target = torch.randn(n), torch.empty(n)
    rounds: dict[str, list[float]] = {"own": [], "copy": [], **{peer: [] for peer in peers}}

    def setup() -> None:
        rounds["copy"].append(timed(lambda: target.copy_(source)))
        for peer, other in peers.items():
            next_gradients(params, curvatures)
            rounds[peer].append(timed(other.step))
        next_gradients(params, curvatures)

    def step() -> None:
        rounds["own"].append(timed(optimizer.step))

    for _ in range(3):
        next_gradients(params, curvatures)
        optimizer.step()
    if name in ("nlcg_adam", "nlcg_adam_pr", "nlcg_fr", "nlcg_pr"):
        assert optimizer.diagnostics().updated
    benchmark.group = list_name
    benchmark.pedantic(step, setup=setup, rounds=ROUNDS[list_name])
    own = rounds["own"]
    ratios = {p: statistics.median(a / b for a, b in zip(own, rounds[p], strict=True)) for p in (*peers, "copy")}
    next_gradients(params, curvatures)
    benchmark.extra_info.update(
        list=list_name,
        optimizer=name,
        parameters=n,
        tensors=len(params),
        median_ms=statistics.median(own) * 1e3,
        ratio_to_adamw_fused=ratios["adamw_fused"],
        ratio_to_adamw_clipped=ratios["adamw_clipped"],
        ratio_to_sgd_fused=ratios["sgd_fused"],
        ratio_to_rmsprop=ratios["rmsprop"],
        copy_gb_per_s=8 * n / statistics.median(rounds["copy"]) / 1e9,
        # A copy moves 8 bytes per parameter: its time scaled to our bytes, over our time.
        of_copy=BYTES[name] / 8 / ratios["copy"] if name in BYTES else None,
        temporary_bytes_per_param=peak_growth(optimizer.step) / n,
    )
