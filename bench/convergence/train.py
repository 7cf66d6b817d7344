"""One run: a model, an optimizer, the paper's schedule; everything that is needed to repeat it goes into its row."""

from __future__ import annotations

import copy
import dataclasses
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fastnlcg
import models
import torch
from data import Images, load
from fastnlcg import NLCG, OnlineLineSearch, paper_schedule
from torch import nn
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Run:
    """``peak`` is a factor on the paper's 0.1 * batch / 256. ``micro`` images pass through the network at once, and
    share the statistics of batch normalization, whatever the batch."""

    optimizer: str
    batch: int
    seed: int = 0
    peak: float = 1.0
    model: str = "resnet8"
    epochs: int = 24
    train_images: int | None = 16384
    test_images: int | None = 4000
    micro: int = 256
    weight_decay: float = 0.0

    @property
    def peak_lr(self) -> float:
        return self.peak * 0.1 * self.batch / 256


def external(name: str) -> type[torch.optim.Optimizer]:
    import pytorch_optimizer

    return getattr(pytorch_optimizer, name)


Maker = Callable[[list[nn.Parameter], float, float], torch.optim.Optimizer]


def nlcg(**options: object) -> Maker:
    return lambda ps, lr, decay: NLCG(ps, lr, weight_decay=decay, **options)


PR = {"update": "polak_ribiere"}
OPTIMIZERS: dict[str, Maker] = {
    "nlcg_fr": nlcg(),
    "nlcg_pr": nlcg(**PR),
    "nlcg_fr_search": nlcg(line_search=OnlineLineSearch()),
    "nlcg_pr_search": nlcg(line_search=OnlineLineSearch(), **PR),
    "nlcg_fr_none": nlcg(preconditioner=None),
    "nlcg_pr_none": nlcg(preconditioner=None, **PR),
    "nlcg_fr_descent": nlcg(restart="descent"),
    "nlcg_pr_descent": nlcg(restart="descent", **PR),
    "nlcg_fr_powell": nlcg(restart="powell"),
    "nlcg_pr_powell": nlcg(restart="powell", **PR),
    "momentum": lambda ps, lr, decay: torch.optim.SGD(ps, lr, momentum=0.9, weight_decay=decay),
    # the settings of the authors' CIFAR script
    "rmsprop": lambda ps, lr, decay: torch.optim.RMSprop(ps, lr, alpha=0.9, momentum=0.9, eps=1.0, weight_decay=decay),
    "sgd": lambda ps, lr, decay: torch.optim.SGD(ps, lr, weight_decay=decay),
    "adamw": lambda ps, lr, decay: torch.optim.AdamW(ps, lr, weight_decay=decay),
    "lars": lambda ps, lr, decay: external("LARS")(ps, lr, momentum=0.9, weight_decay=decay),
    "lamb": lambda ps, lr, decay: external("Lamb")(ps, lr, weight_decay=decay),
}


@torch.no_grad()
def accuracy(net: nn.Module, images: Images) -> float:
    """Percent of the test images."""
    net.eval()
    right = 0
    for x, y in zip(images.test_x.split(1000), images.test_y.split(1000), strict=True):
        right += int((net(images.normalized(x)).argmax(1) == y).sum())
    net.train()
    return 100.0 * right / len(images.test_y)


def run(config: Run, folder: Path, device: str = "cpu", *, compiled: bool = True) -> dict[str, object]:
    """Trains, and returns the row. ``compiled``: the network by torch.compile, a quarter faster on a CPU."""
    images = load(folder, config.train_images, config.test_images).to(device)
    n = len(images.train_y)
    if config.batch > n:
        raise ValueError(f"a batch of {config.batch} of {n} images")
    torch.manual_seed(config.seed)
    net = models.make(config.model, images.classes).to(device, memory_format=torch.channels_last)
    forward = torch.compile(net) if compiled else net
    ps = list(net.parameters())
    optimizer = OPTIMIZERS[config.optimizer](ps, config.peak_lr, config.weight_decay)
    steps = n // config.batch
    schedule = paper_schedule(
        optimizer, batch_size=config.batch, epochs=config.epochs, steps_per_epoch=steps, peak_lr=config.peak_lr
    )
    generator = torch.Generator(device).manual_seed(config.seed)
    micro = min(config.micro, config.batch)
    losses, accuracies, seconds, step_ms, optimizer_ms, diagnostics = [], [], [], [], [], []
    if compiled:  # before the clock starts; the step leaves no trace
        kept = copy.deepcopy(net.state_dict())
        x = images.normalized(images.train_x[:micro]).contiguous(memory_format=torch.channels_last)
        cross_entropy(forward(x), images.train_y[:micro]).backward()
        net.load_state_dict(kept)
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    started = time.perf_counter()
    for _ in range(config.epochs):
        order = torch.randperm(n, generator=generator, device=device)[: steps * config.batch]
        for batch in order.split(config.batch):
            begin = time.perf_counter()
            optimizer.zero_grad()
            loss = torch.zeros((), device=device)
            for part in batch.split(micro):
                x = images.normalized(images.augmented(images.train_x[part], generator))
                value = cross_entropy(forward(x.contiguous(memory_format=torch.channels_last)), images.train_y[part])
                (value * (len(part) / len(batch))).backward()  # the mean over the batch
                loss += value.detach() * (len(part) / len(batch))
            synchronize()
            middle = time.perf_counter()
            if isinstance(optimizer, NLCG):
                optimizer.step(loss=loss)
            else:
                optimizer.step()
            synchronize()
            end = time.perf_counter()
            schedule.step()
            losses.append(float(loss))
            seconds.append(end - started)
            step_ms.append((end - begin) * 1e3)
            optimizer_ms.append((end - middle) * 1e3)
            if isinstance(optimizer, NLCG):
                d = optimizer.diagnostics()
                diagnostics.append([d.beta, float(d.updated), d.ys, d.shs, d.rz, d.cosine, d.ls_scale])
        accuracies.append(accuracy(net, images))
        if not math.isfinite(losses[-1]):
            break
    return {
        **dataclasses.asdict(config),
        "peak_lr": config.peak_lr,
        "data": folder.name,
        "compiled": compiled,
        "parameters": models.count(net),
        "steps": len(losses),
        "loss": [round(x, 5) for x in losses],
        "accuracy": [round(x, 3) for x in accuracies],
        "final_loss": statistics.mean(losses[-steps:]),
        "final_accuracy": accuracies[-1],
        "seconds": [round(x, 2) for x in seconds],
        "step_ms": statistics.median(step_ms),
        "optimizer_ms": statistics.median(optimizer_ms),
        # per step: beta, h updated, ys, shs, rz, cos(g, -d), ls_scale
        "diagnostics": [[float(f"{x:.4g}") for x in row] for row in diagnostics],
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"fastnlcg": fastnlcg.__version__, "torch": torch.__version__},
    }
