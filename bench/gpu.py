"""Everything that needs a GPU, in one go: build, suite, sanitizers, step times, a stress test of the barrier, a profile
of each pass, a whole training step; one JSON.

    make gpu                                  on a machine with a GPU, nvcc and torch; downloads nothing
    python bench/gpu.py --only step_times     one part; the parts are the functions of PARTS below

The JSON is written after every part, so an interruption loses only the part that was running.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

from gpu_times import Row, step_times, training_step

ROOT = Path(__file__).parent.parent
INSTALLED = ROOT / "build" / "gpu"


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(INSTALLED), str(ROOT / "bench"), str(ROOT / "tests")])
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True
    )


def tail(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stdout + done.stderr)[-2000:]


# ---- facts, build, tests ---------------------------------------------------------------------------------------------


def facts() -> Row:
    import torch

    properties = torch.cuda.get_device_properties(0)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        "driver": driver,
        "toolkit": (re.findall(r"release ([\d.]+)", nvcc) or ["?"])[0],
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": commit,
        "command": "make gpu",
        "date": time.strftime("%Y-%m-%d"),
    }


def build() -> Row:
    shutil.rmtree(INSTALLED, ignore_errors=True)
    options = [f"-Ccmake.define.{key}=ON" for key in ("FASTNLCG_CUDA", "FASTNLCG_WERROR", "FASTNLCG_EMULATION")]
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    done = run([sys.executable, "-m", "pip", "install", "-q", *offline, "--target", str(INSTALLED), *options, "."])
    if done.returncode:
        raise RuntimeError(tail(done))
    report = run([sys.executable, "-m", "fastnlcg", "--json"])
    if report.returncode:
        raise RuntimeError(tail(report))
    return {"report": json.loads(report.stdout)}


def suite() -> Row:
    results = ROOT / "build" / "gpu-suite.xml"
    done = run([sys.executable, "-m", "pytest", "-q", "-k", "cuda and not emulated", f"--junitxml={results}"])
    counts = ET.parse(results).getroot().find("testsuite")
    assert counts is not None
    failed = [line for line in done.stdout.split("\n") if line.startswith(("FAILED", "ERROR"))]
    return {key: int(counts.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} | {"failed": failed}


SMALL = """
import torch
from fastnlcg import NLCG, ops
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    pr = {"update": "polak_ribiere"}
    for form in ("one", "separate"):
        bfgs = {"preconditioner": "bfgs"}
        for options in ({}, pr, bfgs, {**bfgs, **pr, "eps": 0.0}, {"preconditioner": None}):
            ps = [torch.nn.Parameter(torch.randn(n, device="cuda").to(dtype)[n % 2:]) for n in (1, 7, 4099, 20000)]
            optimizer = NLCG(ps[1:], 0.01, weight_decay=0.01, **options)
            for _ in range(4):
                for p in ps:
                    p.grad = 2 * p.detach()
                optimizer.step()
                optimizer._table.native.set_launch(form)
            assert optimizer.diagnostics().step == 4
x = [torch.rand(5001, device="cuda")[1:] for _ in range(5)]
ops.nlcg_step(*x, ops.Scalars(), lr=0.1, preconditioner="bfgs")
ops.bfgs_diag_update(x[4], x[1], x[2], x[3], alpha_prev=-0.5)
ops.preconditioned_dots(x[1], x[2], x[4])
ops.direction_update(x[3], x[1], x[4], beta=0.5, p=x[0], alpha=0.1, g_prev=x[2])
ops.adam_preconditioned_dots(x[1], x[4], updates=3, g_prev=x[2])
ops.adam_direction_update(x[3], x[1], x[4], beta=0.5, updates=3, p=x[0], alpha=0.1, g_prev=x[2])
torch.cuda.synchronize()
"""


def sanitizers() -> Row:
    found: Row = {}
    for tool in ("memcheck", "racecheck", "synccheck"):
        # Only our kernels, not torch's.
        only = ["--kernel-name", "kernel_substring=fastnlcg"]
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *only, sys.executable, "-c", SMALL]
        done = run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found[tool] = {"status": done.returncode, "says": tail(done)[-600:]}
    if failed := [tool for tool, row in found.items() if row["status"]]:
        found["error"] = f"{', '.join(failed)} failed"
    return found


# ---- the grid-wide barrier, and the time of each pass ----------------------------------------------------------------


def stress(replays: int = 100_000) -> Row:
    """One launch, from graphs, on grids of one block to all that fit, while another stream takes multiprocessors away:
    always the bits of separate launches, which have no barrier between blocks."""
    import torch
    from fastnlcg import NLCG

    most = 2 * torch.cuda.get_device_properties(0).multi_processor_count
    grids = sorted({1, 2, 3, 5, 8, 16, 33, 64, 100, most // 2 - 1, most // 2, most})
    other, noise = torch.cuda.Stream(), torch.randn(1024, 1024, device="cuda")
    each = max(1, replays // (len(grids) * 3))
    compared, different = 0, []
    for preconditioner in ("adam", "bfgs", None):
        for blocks in grids:
            ends = []
            for form in ("separate", "one"):
                torch.manual_seed(blocks)
                p = torch.nn.Parameter(torch.randn(4096 * blocks - 5, device="cuda"))
                p.grad = p.detach().clone()
                optimizer = NLCG([p], 1e-3, preconditioner=preconditioner, capturable=True)
                optimizer.step()
                optimizer._table.native.set_launch(form, blocks=blocks)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    p.grad.copy_(p.detach())
                    optimizer.step()
                for k in range(each):
                    if k % 64 == 0:
                        with torch.cuda.stream(other):
                            noise = (noise @ noise).clamp(-1, 1)
                    graph.replay()
                torch.cuda.synchronize()
                ends.append((p.detach().cpu(), optimizer.diagnostics()))
            compared += each
            same = torch.equal(ends[0][0], ends[1][0]) and ends[0][1].beta == ends[1][1].beta
            if not same:
                different.append({"preconditioner": preconditioner, "blocks": blocks})
    return {"replays": compared, "different": different} | ({"error": "other bits"} if different else {})


PROFILED = """
import sys, torch
from fastnlcg import NLCG
p = torch.nn.Parameter(torch.randn(int(sys.argv[1]), device="cuda"))
for kind in ("adam", "bfgs"):
    optimizer = NLCG([p], 1e-3, preconditioner=kind, capturable=True)
    for _ in range(4):
        p.grad = p.detach().clone()
        optimizer.step()
        optimizer._table.native.set_launch("separate")
torch.cuda.synchronize()
"""
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__inst_executed_pipe_fp64.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
)


def profile() -> Row:
    """Per pass, if ncu is installed: time, bandwidth, double precision, and warps that wait for memory."""
    if shutil.which("ncu") is None:
        return {"not_run": "no ncu"}
    rows: Row = {}
    for n in (25_557_032, 124_439_808):
        options = ["--csv", "--kernel-name", "regex:step_", "--metrics", ",".join(METRICS)]
        done = run(["ncu", *options, sys.executable, "-c", PROFILED, str(n)])
        rows[str(n)] = [line for line in done.stdout.split("\n") if "step_" in line] or tail(done)
    return rows


PARTS: dict[str, Callable[[], Row]] = {
    "facts": facts,
    "build": build,
    "suite": suite,
    "sanitizers": sanitizers,
    "step_times": step_times,
    "stress": stress,
    "profile": profile,
    "training_step": training_step,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu.json", help="default: build/gpu.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sys.path[:0] = [str(INSTALLED), str(ROOT / "bench")]
    result: Row = {}
    failed = False
    for name in arguments.only:
        start = time.perf_counter()
        try:
            part = PARTS[name]()
        except Exception as error:
            part = {"error": f"{type(error).__name__}: {error}"[:2000]}
        failed |= "error" in part or bool(part.get("failures")) or bool(part.get("errors"))
        result[name] = {**part, "seconds": round(time.perf_counter() - start, 1)}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {json.dumps(result[name])[:1500]}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
