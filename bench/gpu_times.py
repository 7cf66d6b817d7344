"""Step times on a GPU next to torch's optimizers, and a whole training step: two parts of gpu.py.

Times are medians in microseconds on the GPU. A step is timed between two events, behind a pause that lets the host run
ahead (`gpu_us`), and as the replay of a CUDA graph (`graph_us`: a graph of gradient and step, less one of the gradient
alone). `host_us` is the time `step()` takes to return. "cold": 256 MB were written in between, so L2 holds nothing.
In every step the gradient is new, g = p, a quadratic's: the curvature condition holds. Bandwidth is against a measured
copy.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

Row = dict[str, object]


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
        optimizer._table.native.set_launch(form)
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
