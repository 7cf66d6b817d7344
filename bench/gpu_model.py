"""Predicts step times on GPUs from the machine code of the kernels. A model, not a measurement: it can be wrong.

    python bench/gpu_model.py                             predictions: a table for every size
    python bench/gpu_model.py --against build/gpu.json    beside what `make gpu` measured

A pass takes the longest of four times, and a fixed one:

    memory    the bytes it reads and writes, at 90 % of the data sheet's bandwidth
    latency   tile after tile, as a block takes them: its loads, as many quads at once as the machine code has in flight
              (bench/sass.py), its instructions, its sums; one or two blocks a multiprocessor side by side
    double    conversions and arithmetic in double precision, counted in the machine code, at the guide's rates
    issue     all instructions, four warps' a cycle

    fixed     a launch, or in one launch a grid-wide barrier; and the last block's sum over the partial sums

Instructions are those of the shortest way through a pass, which is the default options'.

torch's optimizers are modelled by their bytes and launches alone. Nothing is in a cache: a warm L2 makes small sizes
faster.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sass
from fastnlcg.__main__ import report
from sass import Instruction

BANDWIDTH_REACHED = 0.9
LATENCY_US = 0.8  # of DRAM, under load
TILE_SUMS_CYCLES = 400  # a block's sum over its threads, with its barrier
LAUNCH_US = 2.5  # between dependent kernels in one stream
BARRIER_US = 2.5  # arrive, add, decide, release


@dataclass(frozen=True)
class Gpu:
    """From data sheets and the programming guide's table of throughputs."""

    name: str
    architecture: str
    multiprocessors: int
    ghz: float
    tb_per_s: float
    double_per_clock: float  # fp64 results a cycle and multiprocessor
    converted_per_clock: float  # float to double
    resident_tiles: int  # that fit the shared memory of a block: 32 KB each


GPUS = [
    Gpu("T4", "75", 40, 1.59, 0.320, 2, 2, 1),
    Gpu("A10", "86", 72, 1.695, 0.600, 2, 2, 2),
    Gpu("L4", "89", 58, 2.04, 0.300, 2, 2, 2),
    Gpu("RTX 4090", "89", 128, 2.52, 1.008, 2, 2, 2),
    Gpu("A100 80GB", "80", 108, 1.41, 2.039, 32, 16, 4),
    Gpu("H100", "90", 132, 1.83, 3.35, 64, 16, 6),
    Gpu("H200", "90", 132, 1.83, 4.80, 64, 16, 6),
    Gpu("B200", "100", 148, 1.85, 8.00, 64, 16, 6),
]
SIZES = {"ResNet-32": 466_906, "ResNet-50": 25_557_032, "GPT-2": 124_439_808, "1 B": 1_000_000_000}


@dataclass(frozen=True)
class Pass:
    """Bytes per float32 parameter with the default options (csrc/preconditioners.h)."""

    name: str
    reads: int
    writes: int
    kept: int = 0  # of what it reads, where a tile resides in shared memory


PASSES = {
    "adam": [Pass("AdamDots", 8, 0), Pass("AdamMove", 16, 12, 8)],
    "bfgs": [Pass("CurvatureDot", 8, 0), Pass("CurvatureAndDots", 16, 4, 8), Pass("CurvatureAndMove", 16, 12, 8)],
    "none": [Pass("PlainDots", 4, 0), Pass("PlainMove", 12, 12)],
}
ONE_LAUNCH = {"adam": "Adam", "bfgs": "Bfgs", "none": "Plain"}
PEERS = {"sgd_fused": (20, 1), "adamw_fused": (28, 2), "rmsprop_foreach": (72, 12)}  # bytes, launches


@functools.cache
def kernels(architecture: str) -> dict[str, sass.Kernel]:
    return sass.kernels_of(sass.module(), architecture)


@dataclass(frozen=True)
class Counted:
    """Of one pass of float32 in a kernel's machine code, per element; `quads` of four elements in flight together."""

    quads: int
    instructions: float
    converted: float
    double: float


def converts(i: Instruction) -> int:
    return int(i.opcode == "F2F")


def in_double(i: Instruction) -> int:
    return int(i.opcode in ("DFMA", "DADD", "DMUL", "DSETP"))


@functools.cache
def counted(architecture: str, name: str) -> Counted:
    """Of the widest way through a pass as a kernel of its own."""
    (kernel,) = [k for title, k in kernels(architecture).items() if re.match(rf"step_pass<float, {name}<", title)]
    group = max((g for g in kernel.groups() if set(g.widths) == {16}), key=lambda g: len(g.widths))
    quads = len(group.widths) // sass.LOADS[name]
    elements = 4.0 * quads
    return Counted(
        quads,
        kernel.path(group, lambda i: int(i.opcode != "NOP"), min) / elements,
        kernel.path(group, converts, min) / elements,
        kernel.path(group, in_double, min) / elements,
    )


def pass_us(gpu: Gpu, n: int, item: Pass, one_launch: bool) -> dict[str, float]:
    """Its four times in microseconds, and what bounds it."""
    code = counted(gpu.architecture, item.name)
    # In one launch a multiprocessor has one block, and each thread two quads but in one pass (tile.cuh).
    blocks = 1 if one_launch else 2
    quads = (1 if item.name == "CurvatureAndDots" else 2) if one_launch else code.quads
    cycles_per_us = gpu.ghz * 1e3 * gpu.multiprocessors
    tile_us = 2 / quads * LATENCY_US + (4096 * code.instructions / 128 + TILE_SUMS_CYCLES) / (gpu.ghz * 1e3)
    # The reduction of a tile: five and four additions of one sum, in 512 threads, for 4096 elements.
    reduced = 5 * 512 / 4096
    # In one launch what the first pass read of the first tiles stays in shared memory.
    kept = min(n, gpu.resident_tiles * gpu.multiprocessors * 4096) if one_launch and item.kept else 0
    return {
        "memory": (n * (item.reads + item.writes) - kept * item.kept) / (gpu.tb_per_s * 1e6 * BANDWIDTH_REACHED),
        "latency": -(-n // (4096 * gpu.multiprocessors * blocks)) * tile_us,
        "double": n
        * (code.converted / gpu.converted_per_clock + (code.double + reduced) / gpu.double_per_clock)
        / cycles_per_us,
        "issue": n * code.instructions / (128 * cycles_per_us),
    }


def sums_us(gpu: Gpu, n: int) -> float:
    """One block adds the partial sums: 16 bytes a chunk from L2, at 64 bytes a cycle."""
    tiles = -(-n // 4096)
    per_chunk = 1
    while per_chunk * 32768 < tiles:
        per_chunk *= 2
    return tiles / per_chunk * 16 / 64 / (gpu.ghz * 1e3)


def step_us(gpu: Gpu, n: int, preconditioner: str, one_launch: bool) -> float:
    total = LAUNCH_US
    for number, item in enumerate(PASSES[preconditioner]):
        total += max(pass_us(gpu, n, item, one_launch).values()) + sums_us(gpu, n)
        if number:
            total += BARRIER_US if one_launch else LAUNCH_US
    return total


def peer_us(gpu: Gpu, n: int, peer: str) -> float:
    per_parameter, launches = PEERS[peer]
    return n * per_parameter / (gpu.tb_per_s * 1e6 * BANDWIDTH_REACHED) + launches * LAUNCH_US


def best_us(gpu: Gpu, n: int, preconditioner: str) -> tuple[float, str]:
    forms = {"one": step_us(gpu, n, preconditioner, True), "separate": step_us(gpu, n, preconditioner, False)}
    form = min(forms, key=lambda f: forms[f])
    return forms[form], form


def table() -> Iterator[str]:
    cuda = report()["cuda"]["runtime"]
    version = f"{cuda // 1000}.{cuda % 1000 // 10}"
    yield f"Predicted by `python bench/gpu_model.py` from kernels of CUDA {version}, not measured."
    yield "Microseconds a step of float32; in brackets the form predicted to be faster.\n"
    titles = ["size", "GPU", "NLCG adam", "NLCG bfgs", "fused SGD", "fused AdamW", "foreach RMSProp"]
    yield f"| {' | '.join(titles)} | adam : AdamW | adam : RMSProp |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for size, n in SIZES.items():
        for gpu in GPUS:
            own = {kind: best_us(gpu, n, kind) for kind in ("adam", "bfgs")}
            peers = {peer: peer_us(gpu, n, peer) for peer in PEERS}
            cells = [f"{us:,.0f} ({form})" for us, form in own.values()] + [f"{us:,.0f}" for us in peers.values()]
            ratios = [own["adam"][0] / peers[peer] for peer in ("adamw_fused", "rmsprop_foreach")]
            yield f"| {size} | {gpu.name} | {' | '.join(cells)} | {' | '.join(f'{r:.2f}' for r in ratios)} |"
    yield "\nWhat bounds each pass in separate launches at GPT-2's size, and how long each bound alone would take:\n"
    yield "| GPU | pass | memory | latency | double | issue | bound |"
    yield "|---|---|---|---|---|---|---|"
    for gpu in GPUS:
        for item in [*PASSES["adam"], *PASSES["bfgs"]]:
            times = pass_us(gpu, SIZES["GPT-2"], item, False)
            bound = max(times, key=lambda key: times[key])
            cells = [f"{times[key]:,.0f}" for key in ("memory", "latency", "double", "issue")]
            yield f"| {gpu.name} | {item.name} | {' | '.join(cells)} | {bound} |"


def against(measured: Path) -> Iterator[str]:
    """The model beside the rows of `make gpu`, cold: measured over predicted."""
    result = json.loads(measured.read_text())
    device = str(result["facts"]["device"])
    gpu = next((g for g in sorted(GPUS, key=lambda g: -len(g.name)) if g.name.split()[0] in device), None)
    if gpu is None:
        yield f"{device}: not in the model's table"
        return
    yield f"| {device} | optimizer | measured us | predicted us | measured : predicted |"
    yield "|---|---|---|---|---|"
    for row in result["step_times"]["rows"]:
        name, n = row["optimizer"], row["parameters"]
        if "gpu_us_cold" not in row or "," in row["list"]:  # 16-bit types, gradients of 0
            continue
        if name in PEERS or name == "adam_fused":
            predicted = peer_us(gpu, n, name if name in PEERS else "adamw_fused")
        elif match := re.fullmatch(r"nlcg_(adam|fr|none)(?:_(one|separate))?", name):
            kind = {"fr": "bfgs"}.get(match[1], match[1])
            predicted = step_us(gpu, n, kind, match[2] == "one") if match[2] else best_us(gpu, n, kind)[0]
        else:
            continue
        ratio = row["gpu_us_cold"] / predicted
        yield f"| {row['list']} | {name} | {row['gpu_us_cold']:,.0f} | {predicted:,.0f} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", type=Path, help="the JSON of make gpu")
    arguments = parser.parse_args()
    for line in against(arguments.against) if arguments.against else table():
        print(line)


if __name__ == "__main__":
    main()
