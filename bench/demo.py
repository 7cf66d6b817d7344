"""The demonstration, in two parts: NLCG next to AdamW, Momentum, RMSProp and other forms of NLCG at large batch, on
the real images of scikit-learn's digits; and minimize() next to L-BFGS in full batch, on a physics-informed network.

    make demo            or: python bench/demo.py [--out DIR]

A three-layer perceptron (64-128-64-10) learns 1,437 images of handwritten digits, all in one batch, in 100 steps, and
is tested on 360 others. All optimizers have one schedule, relative to the peak (fastnlcg.warmup_cosine), and each takes
its own best peak on a grid of factors of 3, chosen by the mean final training loss. Five seeds decide the initial
weights and the split.

The second: Poisson's equation (full_batch_problems.py), 1,000 evaluations, three seeds, no learning rates.

Prints the tables, writes DIR/digits.png, DIR/full_batch.png and DIR/digits.json (every run).
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastnlcg
import matplotlib as mpl
import numpy as np
import torch
from fastnlcg import NLCG, muon_groups, warmup_cosine
from full_batch import METHODS, Meter, Over
from full_batch_problems import poisson
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

mpl.use("Agg")
import contextlib

from matplotlib import pyplot as plt

STEPS = 100
SEEDS = range(5)
# Each with its peaks: five, factors of 3 apart, around its best.
OPTIMIZERS: dict[str, tuple[Callable[[Any, float], torch.optim.Optimizer], tuple[float, ...]]] = {
    "NLCG": (lambda net, lr: NLCG(net.parameters(), lr), (0.001, 0.003, 0.01, 0.03, 0.1)),
    "NLCG, matrices": (lambda net, lr: NLCG(muon_groups(net, lr=lr)), (0.03, 0.1, 0.3, 1.0, 3.0)),
    "NLCG, paper": (
        lambda net, lr: NLCG(net.parameters(), lr, preconditioner="bfgs"),
        (0.03, 0.1, 0.3, 1.0, 3.0),
    ),
    "AdamW": (
        lambda net, lr: torch.optim.AdamW(net.parameters(), lr, weight_decay=0.0),
        (0.003, 0.01, 0.03, 0.1, 0.3),
    ),
    "Momentum": (
        lambda net, lr: torch.optim.SGD(net.parameters(), lr, momentum=0.9),
        (0.03, 0.1, 0.3, 1.0, 3.0),
    ),
    "RMSProp": (  # the settings of the authors' script
        lambda net, lr: torch.optim.RMSprop(net.parameters(), lr, alpha=0.9, momentum=0.9, eps=1.0),
        (0.03, 0.1, 0.3, 1.0, 3.0),
    ),
}


@functools.cache
def split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, test images, train labels, test labels), pixels in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images.astype(np.float32) / 16, labels, test_size=360, random_state=seed, stratify=labels)
    return tuple(torch.from_numpy(part) for part in parts)


def perceptron(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def train(name: str, peak: float, seed: int) -> dict[str, Any]:
    """One run: losses before every step and after the last, test accuracy in percent, seconds per training step."""
    x, x_test, y, y_test = split(seed)
    net = perceptron(seed)
    optimizer = OPTIMIZERS[name][0](net, peak)
    schedule = warmup_cosine(optimizer, STEPS)
    losses, seconds = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(nn.functional.cross_entropy(net(x), y).item())
        accuracy = 100 * (net(x_test).argmax(1) == y_test).double().mean().item()
    return {
        "optimizer": name,
        "peak_lr": peak,
        "seed": seed,
        "losses": losses,
        "accuracy": accuracy,
        "ms_per_step": 1e3 * statistics.median(seconds),
    }


def final_loss(runs: list[dict[str, Any]]) -> float:
    """Mean over seeds; infinite if a run has diverged."""
    mean = statistics.fmean(run["losses"][-1] for run in runs)
    return mean if np.isfinite(mean) else float("inf")


def at_best_peaks(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each optimizer at the peak of the lowest mean final loss."""
    groups: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for run in runs:
        groups.setdefault(run["optimizer"], {}).setdefault(run["peak_lr"], []).append(run)
    return {name: min(by_peak.values(), key=final_loss) for name, by_peak in groups.items()}


def table(best: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        f"Digits, batch 1437 (all), {STEPS} steps, {len(SEEDS)} seeds; one schedule, each at its best of five peaks",
        f"{'':<15}{'peak lr':>8}{'final loss':>22}{'test accuracy %':>18}{'ms / step':>11}",
    ]
    for name, runs in best.items():
        accuracies = [run["accuracy"] for run in runs]
        losses = [run["losses"][-1] for run in runs]
        ms = statistics.median(run["ms_per_step"] for run in runs)
        lines.append(
            f"{name:<15}{runs[0]['peak_lr']:>8.3g}{statistics.fmean(losses):>13.4f} ± {statistics.stdev(losses):.4f}"
            f"{statistics.fmean(accuracies):>11.2f} ± {statistics.stdev(accuracies):.2f}{ms:>11.2f}"
        )
    return "\n".join(lines)


def plot(best: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training loss per step and per second at the best peaks: mean over seeds, and their range."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for name, runs in best.items():
        losses = np.array([run["losses"] for run in runs])
        seconds = statistics.median(run["ms_per_step"] for run in runs) / 1e3
        for panel, unit in zip(panels, (1.0, seconds), strict=True):
            at = unit * np.arange(losses.shape[1])
            (line,) = panel.plot(at, losses.mean(0), label=f"{name}, lr {runs[0]['peak_lr']:g}")
            panel.fill_between(at, losses.min(0), losses.max(0), alpha=0.15, color=line.get_color(), linewidth=0)
    for panel, label in zip(panels, ("step", "seconds of training"), strict=True):
        panel.set(yscale="log", xlabel=label, ylim=(1e-5, 10))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("training loss")
    panels[0].legend()
    figure.suptitle("Digits, one batch of 1,437, one schedule, each at its best peak: mean and range of five seeds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- full batch ------------------------------------------------------------------------------------------------------

EVALUATIONS = 1000
FULL_BATCH = ("CGDescent", "L-BFGS 10", "L-BFGS 100")


class Recorder(Meter):
    """Keeps the lowest loss after every evaluation."""

    curve: list[tuple[float, float]]

    def both(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        found = super().both(x)
        self.curve.append((self.cost, self.loss))
        return found


def descend(name: str, seed: int) -> dict[str, Any]:
    """One run: the lowest loss over the cost so far, seconds, and those outside the function."""
    meter = Recorder(poisson(seed), EVALUATIONS, float("inf"))
    meter.curve = []
    with contextlib.suppress(Over):
        METHODS[name](meter)
    seconds = time.perf_counter() - meter.begin
    return {"method": name, "seed": seed, "curve": meter.curve, "seconds": seconds, "outside": seconds - meter.inside}


def full_batch_table(runs: list[dict[str, Any]]) -> str:
    lines = [
        f"Full batch: Poisson's equation by a network, {EVALUATIONS} evaluations, 3 seeds, no learning rate",
        f"{'':<13}{'final loss':>12}{'least':>12}{'largest':>12}{'vectors of memory':>20}{'us / evaluation, own':>23}",
    ]
    for name, memory in zip(FULL_BATCH, (33, 22, 202), strict=True):
        losses = [run["curve"][-1][1] for run in runs if run["method"] == name]
        own = statistics.median(run["outside"] / len(run["curve"]) for run in runs if run["method"] == name)
        lines.append(
            f"{name:<13}{statistics.geometric_mean(losses):>12.1e}{min(losses):>12.1e}{max(losses):>12.1e}{memory:>20}"
            f"{1e6 * own:>23.0f}"
        )
    return "\n".join(lines)


def full_batch_plot(runs: list[dict[str, Any]], path: Path) -> None:
    """The lowest loss over evaluations, every run."""
    figure, panel = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for run in runs:
        cost, loss = np.array(run["curve"]).T
        color = f"C{FULL_BATCH.index(run['method'])}"
        panel.loglog(cost, loss, color=color, alpha=0.8, label=run["method"] if run["seed"] == 0 else None)
    panel.set(xlabel="evaluations (the loss alone: 1/2)", ylabel="lowest loss so far")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.suptitle("Poisson's equation by a network, full batch")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="where the picture and the rows go (default: demo)"
    )
    out = parser.parse_args().out
    torch.set_num_threads(1)

    # Seeds outermost, optimizers innermost, so that a disturbance of the clock affects all of them.
    jobs = [(name, peaks[k], seed) for seed in SEEDS for k in range(5) for name, (_, peaks) in OPTIMIZERS.items()]
    runs = [train(*job) for job in tqdm(jobs, desc="training", unit="run", mininterval=0.5)]

    for run in runs:
        run["losses"] = [float(f"{loss:.6g}") for loss in run["losses"]]
    best = at_best_peaks(runs)
    print("\n" + table(best) + "\n")
    jobs = [(name, seed) for seed in range(3) for name in FULL_BATCH]
    descents = [descend(*job) for job in tqdm(jobs, desc="full batch", unit="run", mininterval=0.5)]
    for run in descents:
        run["curve"] = [(cost, float(f"{loss:.6g}")) for cost, loss in run["curve"]]
    print("\n" + full_batch_table(descents))

    out.mkdir(parents=True, exist_ok=True)
    plot(best, out / "digits.png")
    full_batch_plot(descents, out / "full_batch.png")
    facts = {
        "fastnlcg": fastnlcg.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instruction_set": fastnlcg._native.instruction_set(),
        "threads": 1,
        "command": "make demo",
    }
    (out / "digits.json").write_text(json.dumps({"facts": facts, "runs": runs, "full_batch": descents}) + "\n")
    print(f"\nWrote {out / 'digits.png'}, {out / 'full_batch.png'} and {out / 'digits.json'} (every run).")


if __name__ == "__main__":
    main()
