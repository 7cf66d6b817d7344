"""Time per training step of every optimizer, in one run, and the optimizer's share of it.

    python bench/convergence/cost.py OUT.json [--models resnet32] [--device cuda] [--rounds 30]

In every round each optimizer in turn gets fresh gradients of one micro-batch, is timed alone, and moves parameters of
its own; so all meet the same caches and the same noise of the machine, and a training step of k micro-batches costs k
times the gradients' median and once the optimizer's.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from pathlib import Path

import fastnlcg
import models
import torch
from fastnlcg import NLCG
from optimizers import OPTIMIZERS
from text import LENGTH, Text
from torch import Tensor
from torch.nn.functional import cross_entropy
from train import fast_precision

NAMES = (
    *("nlcg", "nlcg_fr", "nlcg_pr", "nlcg_fr_none"),
    *("sgd", "momentum", "rmsprop", "lamb", "adamw", "nadamw", "schedule_free", "muon", "soap"),
)
BATCHES = (256, 1024, 4096, 16384)


def measure(
    model: str, device: str, rounds: int, micro: int, precision: str, *, compiled: bool = True
) -> dict[str, object]:
    """The row: milliseconds for the gradients of ``micro`` random images or sequences and for each optimizer's step,
    and from them its share of a training step at several batches, in percent."""
    torch.manual_seed(0)
    classes = Text.classes if model.startswith("transformer") else 10
    net = models.make(model, classes).to(device, memory_format=torch.channels_last)
    forward = torch.compile(net) if compiled else net
    own = {name: copy.deepcopy(net) for name in NAMES}
    optimizers = {name: OPTIMIZERS[name](its, 1e-3, 0.0, 0.9) for name, its in own.items()}
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    gradients, steps = [], {name: [] for name in NAMES}
    for k in range(rounds + 2):  # two to warm up: the compiler, and state
        for name, optimizer in optimizers.items():
            x, y = samples(model, micro, classes, device)
            net.zero_grad()
            synchronize()
            times = [time.perf_counter()]
            with torch.autocast(torch.device(device).type, torch.bfloat16, precision == "bfloat16"):
                loss = cross_entropy(forward(x), y)
            loss.backward()
            synchronize()
            times.append(time.perf_counter())
            for p, mine in zip(net.parameters(), own[name].parameters(), strict=True):
                mine.grad = p.grad
            number = loss.detach()
            synchronize()
            times.append(time.perf_counter())
            if isinstance(optimizer, NLCG):
                optimizer.step(loss=number)
            else:
                optimizer.step()
            synchronize()
            times.append(time.perf_counter())
            if k >= 2:
                gradients.append((times[1] - times[0]) * 1e3)
                steps[name].append((times[3] - times[2]) * 1e3)
    gradient = statistics.median(gradients)
    # By the place in ten steps: SOAP finds new eigenvectors in one of them.
    periods = {name: [times[k::10] for k in range(min(10, rounds))] for name, times in steps.items()}
    medians = {name: statistics.mean(map(statistics.median, of_place)) for name, of_place in periods.items()}
    return {
        "model": model,
        "parameters": models.count(net),
        "micro": micro,
        "precision": precision,
        "rounds": rounds,
        "gradient_ms": round(gradient, 3),
        "step_ms": {name: round(ms, 4) for name, ms in medians.items()},
        "share_percent": {
            name: {batch: round(100 * ms / (ms + gradient * batch / micro), 4) for batch in BATCHES}
            for name, ms in medians.items()
        },
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"fastnlcg": fastnlcg.__version__, "torch": torch.__version__},
    }


def samples(model: str, count: int, classes: int, device: str) -> tuple[Tensor, Tensor]:
    if model.startswith("transformer"):
        x, y = torch.randint(classes, (2, count, LENGTH), device=device)
        return x, y
    side = 224 if model == "resnet50" else 32
    x = torch.randn(count, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(classes, (count,), device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["resnet8", "transformer"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=30, help="a multiple of ten")
    parser.add_argument("--micro", type=int, default=256)
    parser.add_argument("--precision", choices=("float32", "bfloat16"))
    a = parser.parse_args()
    precision = a.precision or fast_precision(a.device)
    rows = [measure(model, a.device, a.rounds, a.micro, precision) for model in a.models]
    a.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        print(f"{row['model']}, {row['gradient_ms']:.0f} ms for the gradients of {row['micro']} samples")
        for name, ms in row["step_ms"].items():
            shares = ", ".join(f"{share:.2f} % at {batch}" for batch, share in row["share_percent"][name].items())
            print(f"  {name:<16} {ms:.3f} ms, {shares}")


if __name__ == "__main__":
    main()
