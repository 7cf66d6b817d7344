"""One run: a model, an optimizer, a schedule; everything that is needed to repeat it goes into its row."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import fastnlcg
import models
import torch
from data import ImageNet, Images, Pairs, load
from fastnlcg import NLCG, Diagnostics, paper_schedule, warmup_cosine
from optimizers import OPTIMIZERS, with_averages
from text import Text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Run:
    """``schedule`` is ``"paper"``, absolute, with ``peak`` a factor on the paper's 0.1 * batch / 256; or ``"cosine"``
    (fastnlcg.warmup_cosine), relative, with ``peak`` the learning rate itself. ``micro`` samples pass
    through the network at once, and images among them share the statistics of batch normalization, whatever the batch.
    ``precision`` is that of the network's products (torch.autocast); parameters, gradients and the optimizer's state
    are float32; with ``"pure_bfloat16"`` parameters and gradients are bfloat16 too. ``augment``: crops and
    flips. ``side``: images are averaged down to that many pixels a side. A sample of the ``"transformer"`` is a
    sequence; an epoch draws ``train_images`` of them. Schedule-Free has ``"cosine"``'s warm-up and no decay: that
    is its method. ``beta1``: see optimizers.Maker. ``clip``: the largest norm of the gradient,
    None for any."""

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
    precision: str = "float32"
    augment: bool = True
    schedule: str = "paper"
    side: int = 32
    beta1: float = 0.9
    clip: float | None = None

    @property
    def peak_lr(self) -> float:
        return self.peak * 0.1 * self.batch / 256 if self.schedule == "paper" else self.peak


def fast_precision(device: str) -> str:
    """bfloat16 on a GPU, or a processor that multiplies in it: half the time."""
    has_it = device != "cpu" or getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")
    return "bfloat16" if has_it else "float32"


Data = Images | ImageNet | Text


def dataset(config: Run, folder: Path, device: str) -> Data:
    part = (config.train_images, config.test_images)
    if config.model.startswith("transformer"):
        return Text(*part, device)
    return (
        ImageNet(folder, device, *part) if config.model == "resnet50" else load(folder, *part, config.side).to(device)
    )


@torch.no_grad()
def evaluate(net: nn.Module, data: Data) -> tuple[float, float]:
    """Of the test part: percent classified right, and the mean loss."""
    net.eval()
    dtype = next(net.parameters()).dtype
    right = count = 0
    total = 0.0
    for x, y in data.test():
        logits = net(x.to(dtype) if x.is_floating_point() else x).float()
        right += int((logits.argmax(1) == y).sum())
        total += float(cross_entropy(logits, y, reduction="sum"))
        count += y.numel()
    net.train()
    return 100.0 * right / count, total / count


def schedule_of(config: Run, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """``steps``: of an epoch."""
    if config.schedule == "paper":
        lengths = {"epochs": config.epochs, "steps_per_epoch": steps}
        return paper_schedule(optimizer, batch_size=config.batch, peak_lr=config.peak_lr, **lengths)
    if config.optimizer == "schedule_free":
        warmup = max(round(config.epochs * steps * 5 / 24), 1)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / warmup, 1.0))
    return warmup_cosine(optimizer, config.epochs * steps)


def quantiles_of_h(optimizer: torch.optim.Optimizer) -> list[float]:
    """Least, 1 %, half, 99 %, largest; nothing without a preconditioner."""
    h = [state["hessian_diag"].flatten() for state in optimizer.state.values() if "hessian_diag" in state]
    if not h:
        return []
    sorted_h = torch.cat(h).sort().values
    return [rounded(float(sorted_h[int(q * (len(sorted_h) - 1))])) for q in (0.0, 0.01, 0.5, 0.99, 1.0)]


def rounded(x: float) -> float:
    return float(f"{x:.4g}")


def summary(steps: list[Diagnostics]) -> dict[str, float]:
    """Of the steps of an epoch."""
    if not steps:
        return {}
    medians = {name: statistics.median(getattr(d, name) for d in steps) for name in ("ys", "shs", "rz", "cosine")}
    return {
        "beta": rounded(statistics.mean(d.beta for d in steps)),
        "beta_is_1": rounded(statistics.mean(d.beta == 1.0 for d in steps)),
        "updated": rounded(statistics.mean(d.updated for d in steps)),
        **{name: rounded(x) for name, x in medians.items()},
        "ls_scale": rounded(steps[-1].ls_scale),
    }


def run(config: Run, folder: Path, device: str = "cpu", *, compiled: bool = True) -> dict[str, object]:
    """Trains, and returns the row. ``compiled``: the network by torch.compile, a quarter faster on a CPU."""
    data = dataset(config, folder, device)
    n = len(data)
    if config.batch > n:
        raise ValueError(f"a batch of {config.batch} of {n} samples")
    torch.manual_seed(config.seed)
    net = models.make(config.model, data.classes).to(device, memory_format=torch.channels_last)
    pure = config.precision == "pure_bfloat16"
    if pure:
        net = net.to(torch.bfloat16)
    forward = torch.compile(net) if compiled else net
    ps = list(net.parameters())
    optimizer = OPTIMIZERS[config.optimizer](net, config.peak_lr, config.weight_decay, config.beta1)
    steps = n // config.batch
    schedule = schedule_of(config, optimizer, steps)
    generator = torch.Generator(device).manual_seed(config.seed)
    micro = min(config.micro, config.batch)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, config.precision == "bfloat16")
    losses, accuracies, test_losses, diagnostics, h = [], [], [], [], []

    def gradients(pairs: Pairs) -> Tensor:
        """Of the mean over the batch, into p.grad; the mean itself."""
        optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        for x, y in pairs:
            with autocast:
                logits = forward(x.bfloat16() if pure and x.is_floating_point() else x)
                value = cross_entropy(logits.float() if pure else logits, y)
            (value * (len(x) / config.batch)).backward()
            loss += value.detach() * (len(x) / config.batch)
        return loss

    if compiled:  # before the clock starts; the step leaves no trace
        kept = copy.deepcopy(net.state_dict())
        gradients(itertools.islice(next(data.epoch(config.batch, micro, torch.Generator(device))), 1))
        net.load_state_dict(kept)
    started = time.perf_counter()
    for _ in range(config.epochs):
        of_epoch = []
        for batch in data.epoch(config.batch, micro, generator, config.augment):
            loss = gradients(batch)
            if config.clip is not None:
                nn.utils.clip_grad_norm_(ps, config.clip)
            if isinstance(optimizer, NLCG):
                optimizer.step(loss=loss)
            else:
                optimizer.step()
            schedule.step()
            losses.append(float(loss))
            if isinstance(optimizer, NLCG):
                of_epoch.append(optimizer.diagnostics())
        with autocast:
            right, test_loss = with_averages(optimizer, lambda: evaluate(net, data))
        accuracies.append(right)
        test_losses.append(test_loss)
        diagnostics.append(summary(of_epoch))
        h.append(quantiles_of_h(optimizer))
        if not math.isfinite(losses[-1]):
            break
    return {
        **dataclasses.asdict(config),
        "peak_lr": config.peak_lr,
        "data": data.name if isinstance(data, Text) else folder.name,
        "compiled": compiled,
        "parameters": models.count(net),
        "steps": len(losses),
        "loss": [round(x, 5) for x in losses],
        "accuracy": [round(x, 3) for x in accuracies],
        "test_loss": [round(x, 5) for x in test_losses],
        "final_loss": statistics.mean(losses[-steps:]),
        "final_accuracy": accuracies[-1],
        "seconds": round(time.perf_counter() - started, 1),  # with whatever else the machine did; see cost.py
        "diagnostics": diagnostics,  # per epoch, and the next too
        "h_quantiles": h,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"fastnlcg": fastnlcg.__version__, "torch": torch.__version__},
    }
