"""Everything that needs a GPU, in one go: build, suite, sanitizers, step times, a stress test of the barrier, a profile
of each pass, a whole training step; one JSON.

    make gpu                                  on a machine with a GPU, nvcc and torch; downloads nothing
    python bench/gpu.py --only step_times     one part; the parts are the functions of PARTS below

Times are medians in microseconds on the GPU. A step is timed between two events, behind a pause that lets the host run
ahead (`gpu_us`), and as the replay of a CUDA graph (`graph_us`: a graph of gradient and step, less one of the gradient
alone). `host_us` is the time `step()` takes to return. "cold": 256 MB were written in between, so L2 holds nothing.
In every step the gradient is new, g = p, a quadratic's: the curvature condition holds. Bandwidth is against a measured
copy. The JSON is written after every part, so that what broke off is not lost.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
INSTALLED = ROOT / "build" / "gpu"
Row = dict[str, object]


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
    return {"report": json.loads(report.stdout), "status": report.returncode}


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
                optimizer._layout.native.set_launch(form)
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
        # Only our kernels: torch's are its own affair.
        only = ["--kernel-name", "kernel_substring=fastnlcg"]
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *only, sys.executable, "-c", SMALL]
        done = run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found[tool] = {"status": done.returncode, "says": tail(done)[-600:]}
    return found


# ---- step times ------------------------------------------------------------------------------------------------------


def shapes_of(name: str) -> list[tuple[int, ...]]:
    from test_step_time import resnet32, resnet50

    if name == "resnet18":
        shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
        channels = 64
        for width in (64, 128, 256, 512):
            for block in range(2):
                shapes += [(width, channels, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
                if block == 0 and width != channels:
                    shapes += [(width, channels, 1, 1), (width,), (width,)]
                channels = width
        return [*shapes, (1000, 512), (1000,)]
    if name == "gpt2":
        shapes = [(50257, 768), (1024, 768)]
        for _ in range(12):
            shapes += [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
            shapes += [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
        return [*shapes, (768,), (768,)]
    return {"resnet32": resnet32, "resnet50": resnet50, "flat1B": lambda: [(1_000_000_000,)]}[name]()


LISTS = ("resnet32", "resnet18", "resnet50", "gpt2", "flat1B")
# Counted traffic in bytes per float32 parameter. One launch: what stays in shared memory is read once, see step_times.
BYTES = {"sgd_fused": 20, "adam_fused": 28, "rmsprop_foreach": 72, "nlcg_adam": 36, "nlcg_fr": 56, "nlcg_pr": 56}


def plain_nlcg(ps: list, gs: list, state: dict, lr: float) -> object:
    """The same step, Fletcher-Reeves, from torch's foreach operations, without waiting: decisions are tensors. Returns
    the new rz for the caller to keep: compiled by torch 2.13, a copy into a 0-dimensional input is lost."""
    import torch

    h, d, g_prev = state["h"], state["d"], state["g_prev"]

    def flat(x: torch.Tensor) -> torch.Tensor:  # dense, in whatever order of dimensions
        return x.as_strided((x.numel(),), (1,))

    def dot(a: list, b: list) -> torch.Tensor:
        return torch.stack([torch.dot(flat(x), flat(y)) for x, y in zip(a, b, strict=True)]).sum()

    y = torch._foreach_sub(gs, g_prev)
    s = torch._foreach_mul(d, lr)
    hs = torch._foreach_mul(h, s)
    ys, shs = dot(y, s), dot(s, hs)
    accepted = (ys > 1e-8) & (shs > 1e-8)
    zero = torch.zeros_like(ys)
    torch._foreach_mul_(y, torch.where(accepted, ys.rsqrt(), zero))
    torch._foreach_mul_(hs, torch.where(accepted, shs.rsqrt(), zero))
    torch._foreach_addcmul_(h, y, y)
    torch._foreach_addcmul_(h, hs, hs, value=-1.0)
    torch._foreach_abs_(h)
    z = torch._foreach_div(gs, torch._foreach_add(h, 1e-8))
    rz = dot(gs, z)
    torch._foreach_mul_(d, (rz / state["rz"]).clamp(0.0, 1.0))
    torch._foreach_sub_(d, z)
    torch._foreach_add_(ps, d, alpha=lr)
    torch._foreach_copy_(g_prev, gs)
    return rz


def steppers(ps: list, lr: float) -> dict[str, Callable[[], Callable[[], object]]]:
    """Name to a maker of the step to be timed; made one after another, for memory's sake."""
    import torch
    from fastnlcg import NLCG

    def nlcg(form: str, **options: object) -> Callable[[], object]:
        optimizer = NLCG(ps, lr, capturable=True, **options)
        optimizer.step()
        optimizer._layout.native.set_launch(form)
        return optimizer.step

    def plain(compiled: bool) -> Callable[[], object]:
        state = {
            "h": [torch.ones_like(p) for p in ps],
            "d": [-p.grad for p in ps],
            "g_prev": [p.grad.clone() for p in ps],
            "rz": torch.ones((), device=ps[0].device),
        }
        function = torch.compile(plain_nlcg) if compiled else plain_nlcg

        @torch.no_grad()
        def step() -> None:
            state["rz"].copy_(function(ps, [p.grad for p in ps], state, lr))

        step()
        return step

    optim = torch.optim
    return {
        "nlcg_adam_one": lambda: nlcg("one"),
        "nlcg_adam_separate": lambda: nlcg("separate"),
        "nlcg_fr_one": lambda: nlcg("one", preconditioner="bfgs"),
        "nlcg_fr_separate": lambda: nlcg("separate", preconditioner="bfgs"),
        "nlcg_pr_one": lambda: nlcg("one", preconditioner="bfgs", update="polak_ribiere"),
        "nlcg_pr_separate": lambda: nlcg("separate", preconditioner="bfgs", update="polak_ribiere"),
        "sgd_fused": lambda: optim.SGD(ps, lr, momentum=0.9, fused=True).step,
        "rmsprop_foreach": lambda: optim.RMSprop(ps, lr, momentum=0.9, foreach=True, capturable=True).step,
        "adam_fused": lambda: optim.Adam(ps, lr, fused=True, capturable=True).step,
        "nlcg_plain_torch": lambda: plain(False),
        "nlcg_plain_compiled": lambda: plain(True),
    }


def launches_of(step: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        import torch

        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if event.device_type.name == "CUDA")


class Clock:
    """Times work on the GPU between two events."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")

    def median_us(self, before: Callable[[], object], timed: Callable[[], object], rounds: int, ahead: bool) -> float:
        cuda, pairs = self.torch.cuda, []
        for _ in range(rounds):
            before()
            if ahead:  # some 20 ms in which the host enqueues what follows, hundreds of launches too
                cuda._sleep(40_000_000)
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            timed()
            end.record()
            cuda.synchronize()
            pairs.append(start.elapsed_time(end) * 1e3)
        return statistics.median(pairs)

    def copy_tb_per_s(self) -> float:
        """Of a gigabyte, read and written."""
        source = self.torch.randn(1 << 28, device="cuda")
        target = self.torch.empty_like(source)
        return 8 * source.numel() / self.median_us(lambda: None, lambda: target.copy_(source), 20, True) * 1e-6

    def graph(self, work: Callable[[], object]) -> Callable[[], object]:
        side = self.torch.cuda.Stream()
        side.wait_stream(self.torch.cuda.current_stream())
        with self.torch.cuda.stream(side):
            work()
        self.torch.cuda.current_stream().wait_stream(side)
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            work()
        return graph.replay


def step_times(names: tuple[str, ...] = LISTS, rounds: int = 50) -> Row:
    """Every list in float32; one in 16-bit types, and with gradients of 0, for which a division takes its slow way."""
    import torch

    clock, rows = Clock(), []
    copy = clock.copy_tb_per_s()
    cases = [(name, "float32", 1.0) for name in names]
    if "resnet50" in names:
        cases += [("resnet50", "bfloat16", 1.0), ("resnet50", "float16", 1.0), ("resnet50", "float32", 0.0)]
    for model, dtype, slope in cases:
        name = model + (f", {dtype}" if dtype != "float32" else "") + ("" if slope else ", zero gradients")
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        ps = [
            torch.nn.Parameter(torch.randn(shape, device="cuda").to(getattr(torch, dtype)))
            for shape in shapes_of(model)
        ]
        n = sum(p.numel() for p in ps)
        for p in ps:
            p.grad = p.detach() * slope
        grads = [p.grad for p in ps]
        values = [p.detach() if slope else torch.zeros_like(p) for p in ps]

        def new_gradient(grads: list = grads, values: list = values) -> None:
            torch._foreach_copy_(grads, values)

        def cold(new_gradient: Callable[[], None] = new_gradient) -> None:
            new_gradient()
            clock.flush.zero_()
            clock.flush.sum()  # read: lines that are only written would be written back at the expense of what is timed

        for optimizer, make in steppers(ps, 1e-3).items():
            if name not in LISTS and optimizer.startswith("nlcg_plain"):
                continue
            row: Row = {"list": name, "parameters": n, "tensors": len(ps), "optimizer": optimizer}
            try:
                step = make()
                for _ in range(3):
                    new_gradient()
                    step()
                count = rounds if n < 10**8 else 15
                row["launches"] = launches_of(step)
                for state, before in (("warm", new_gradient), ("cold", cold)):
                    row[f"gpu_us_{state}"] = clock.median_us(before, step, count, True)
                host = []
                for _ in range(count):
                    new_gradient()
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    step()
                    host.append((time.perf_counter() - start) * 1e6)
                row["host_us"] = statistics.median(host)
                torch.cuda.synchronize()
                for state, before in (("warm", new_gradient), ("cold", cold)):
                    alone = clock.graph(before)
                    both = clock.graph(lambda before=before, step=step: (before(), step()))
                    times = [clock.median_us(lambda: None, replay, count, False) for replay in (alone, both)]
                    row[f"graph_us_{state}"] = times[1] - times[0]
                    del alone, both
                kind = optimizer.removesuffix("_one").removesuffix("_separate")
                if kind in BYTES and dtype == "float32":
                    row["bytes_per_parameter"] = BYTES[kind]
                    row["of_copy"] = BYTES[kind] * n / row["gpu_us_cold"] * 1e-6 / copy
                del step
            except Exception as error:  # one that cannot be timed does not cost the others
                row["error"] = f"{type(error).__name__}: {error}"[:500]
            rows.append(row)
            print(json.dumps(row), flush=True)
        times = {row["optimizer"]: row for row in rows if row["list"] == name}
        for row in times.values():
            for peer in ("adam_fused", "sgd_fused", "rmsprop_foreach"):
                for key in ("gpu_us_cold", "graph_us_cold", "host_us"):
                    if key in row and key in times[peer]:
                        row[f"{key}_to_{peer}"] = row[key] / times[peer][key]
        del ps, grads, values
    return {"copy_tb_per_s": copy, "rows": rows}


# ---- a whole training step -------------------------------------------------------------------------------------------


def training_step(batch: int = 64, size: int = 224, rounds: int = 40) -> Row:
    """ResNet-50 with autocast to bfloat16 and channels_last; the optimizers take turns, so all see the same machine."""
    import torch
    import torchvision
    from fastnlcg import NLCG

    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    net = torchvision.models.resnet50().cuda().to(memory_format=torch.channels_last)
    ps = list(net.parameters())
    x = torch.randn(batch, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
    y = torch.randint(1000, (batch,), device="cuda")

    def gradient() -> None:
        for p in ps:
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()

    gradient()
    makers = steppers(ps, 1e-5)
    steps: dict[str, Callable[[], object]] = {"none": lambda: None, "nlcg_adam": NLCG(ps, 1e-5).step}
    for name in ("adam_fused", "sgd_fused", "rmsprop_foreach", "nlcg_plain_torch"):
        steps[name] = makers[name]()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for t in range(rounds + 5):
        for name, step in steps.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(3):
                gradient()
                step()
            torch.cuda.synchronize()
            if t >= 5:
                times[name].append((time.perf_counter() - start) / 3 * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    over = {name: medians[name] / medians["sgd_fused"] - 1.0 for name in medians}
    return {"model": "ResNet-50", "batch": batch, "size": size, "ms": medians, "over_momentum": over}


# ---- the grid-wide barrier, and where the time of a pass goes --------------------------------------------------------


def stress(replays: int = 100_000) -> Row:
    """One launch, from graphs, on grids of one block to all that fit, while another stream takes multiprocessors away:
    always the bits of separate launches, which know no barrier between blocks."""
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
                optimizer._layout.native.set_launch(form, blocks=blocks)
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
        optimizer._layout.native.set_launch("separate")
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
    """Per pass, where ncu is: time, bandwidth, double precision, and warps that wait for memory."""
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
