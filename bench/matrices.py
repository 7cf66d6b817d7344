"""Time and memory of one step with matrices, next to torch.optim.Muon with AdamW, on the CPU.

    OMP_NUM_THREADS=1 python bench/matrices.py build/matrices.json                  the transformer of the study
    OMP_NUM_THREADS=1 python bench/matrices.py build/matrices.json --width 768      one layer of a larger one: minutes
    OMP_NUM_THREADS=1 python bench/matrices.py build/matrices.json --width 768 --blocks 12 --without torch float32

Rows are added to the file. In every round each optimizer takes a step over the same parameters, with a fresh gradient;
a ratio is the median over rounds. "float32" is the same method from torch's own operations in float32: a loop over
matrices with Muon's Newton-Schulz iteration. On a processor without bfloat16 products torch's Muon takes minutes for a
layer of width 768, so that is one round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import fastnlcg
import torch
from fastnlcg import NLCG
from fastnlcg.tensors.polar import COEFFICIENTS, STEPS, product_dtype
from torch import Tensor
from torch.nn import Parameter

LR = 1e-6  # the parameters hardly move


def transformer(width: int, blocks: int, classes: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The shapes of the matrices inside, and of the rest."""
    inside = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * blocks
    vectors = [(width,)] * 6 + [(3 * width,), (4 * width,)]
    return inside, [(classes, width), (64, width), (classes, width), *vectors * blocks]


class Float32Muon(torch.optim.Optimizer):
    """The method of preconditioner="muon" for matrices, from torch's operations."""

    def __init__(self, params: list[Parameter], lr: float, beta_max: float = 0.95) -> None:
        super().__init__(params, {"lr": lr})
        self.beta_max, self.rz = beta_max, 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        group = self.param_groups[0]
        rz = sum(float(p.grad.square().sum()) for p in group["params"])
        beta = min(rz / self.rz, self.beta_max) if self.rz else 0.0
        self.rz = rz
        for p in group["params"]:
            state = self.state[p]
            d = state.setdefault("d", torch.zeros_like(p))
            d.mul_(beta).sub_(p.grad)
            p.add_(newton_schulz(beta * d - p.grad), alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)


def newton_schulz(u: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    x = u.T if len(u) > u.shape[1] else u
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if len(u) > u.shape[1] else x


class Both:
    """Two optimizers, one step."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def state_bytes(*optimizers: torch.optim.Optimizer) -> int:
    entries = [entry for optimizer in optimizers for entry in optimizer.state.values()]
    return sum(t.numel() * t.element_size() for e in entries for t in e.values() if isinstance(t, Tensor) and t.dim())


def measure(width: int, blocks: int, rounds: int, without: list[str]) -> dict[str, object]:
    torch.manual_seed(0)
    shapes = transformer(width, blocks, 128 if width < 500 else 8192)
    inside, rest = ([Parameter(torch.randn(shape) / 10) for shape in part] for part in shapes)
    every = [*inside, *rest]
    nlcg = NLCG([{"params": inside, "preconditioner": "muon"}, {"params": rest}], LR)
    adamw = torch.optim.AdamW(every, LR)
    peers = {
        "nlcg": nlcg,
        "torch": Both(torch.optim.Muon(inside, LR, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(rest, LR)),
        "float32": Both(Float32Muon(inside, LR), torch.optim.AdamW(rest, LR)),
        "adamw": adamw,
    }
    peers = {name: peer for name, peer in peers.items() if name not in without}
    times: dict[str, list[float]] = {name: [] for name in peers}
    for k in range(rounds + 1):
        for name, peer in peers.items():
            if k == 0 and name == "torch" and rounds == 1:
                continue  # minutes
            for p in every:
                p.grad = torch.randn_like(p)
            begin = time.perf_counter()
            peer.step()
            if k > 0:
                times[name].append(time.perf_counter() - begin)
    paired = {
        name: statistics.median(a / b for a, b in zip(times["nlcg"], times[name], strict=True))
        for name in peers
        if name != "nlcg"
    }
    matrices = nlcg._table.matrices
    assert matrices is not None
    by_shape: dict[tuple[int, ...], int] = {}
    for p in inside:
        by_shape[tuple(p.shape)] = by_shape.get(tuple(p.shape), 0) + 4 * p.numel()
    return {
        "width": width,
        "blocks": blocks,
        "parameters": sum(p.numel() for p in every),
        "in_matrices": sum(p.numel() for p in inside),
        "rounds": rounds,
        "milliseconds": {name: round(1e3 * statistics.median(x), 3) for name, x in times.items()},
        **{f"of_{name}": float(f"{ratio:.3g}") for name, ratio in paired.items()},
        "state_of_adamw": round(state_bytes(nlcg) / state_bytes(adamw), 3),
        "workspace_bytes": matrices.buffers.bytes(),
        "largest_shape_bytes": max(by_shape.values()),
        "products": str(product_dtype("cpu", torch.float32)),
        "threads": torch.get_num_threads(),
        "processor": f"{platform.machine()}, {fastnlcg._native.instruction_set()}",
        "versions": {"fastnlcg": fastnlcg.__version__, "torch": torch.__version__},
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')} bench/matrices.py FILE --width {width}",
    }


def table(rows: list[dict[str, object]]) -> str:
    """That of docs/costs.md."""
    header = ["width, blocks, threads", "NLCG, ms", "/ Muon and AdamW", "/ from float32 operations", "/ AdamW"]
    header += ["state / AdamW's", "workspace, MB", "largest shape, MB"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        ratios = [f"{row[key]:.3g}" if key in row else "" for key in ("of_torch", "of_float32", "of_adamw")]
        megabytes = [f"{row[key] / 1e6:.3g}" for key in ("workspace_bytes", "largest_shape_bytes")]
        times = f"{row['milliseconds']['nlcg']:.3g}"
        what = f"{row['width']}, {row['blocks']}, {row['threads']}"
        lines.append([what, times, *ratios, f"{row['state_of_adamw']:.2f}", *megabytes])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--without", nargs="+", default=[], choices=("torch", "float32"), help="peers to leave out")
    arguments = parser.parse_args()
    large = arguments.width >= 500
    blocks = arguments.blocks or (1 if large else 2)
    row = measure(arguments.width, blocks, arguments.rounds or (1 if large else 50), arguments.without)
    rows = json.loads(arguments.file.read_text()) if arguments.file.exists() else []
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    arguments.file.write_text(json.dumps([*rows, row], indent=1) + "\n")
    print(table([*rows, row]))


if __name__ == "__main__":
    main()
