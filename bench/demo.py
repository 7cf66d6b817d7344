"""The demonstration: NLCG beside Momentum, RMSProp and SGD at large batch, on the real images of scikit-learn's digits.

    make demo            or: python bench/demo.py [--out DIR]

A three-layer perceptron (64-128-64-10) learns 1,437 images of handwritten digits, all in one batch, in 200 steps, on
the paper's schedule (section 4.1: warm-up over 5 epochs, exponential decay to 0.001), and is tested on 360 others.
Once with the paper's peak learning rate, 0.1 * batch / 256, the same for all; once with each optimizer's own best
peak from a grid, chosen by the mean final training loss. Five seeds: initial weights and split.

Prints a table, writes DIR/digits.png and DIR/digits.json (every run).
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
from fastnlcg import NLCG, paper_schedule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

mpl.use("Agg")
from matplotlib import pyplot as plt

STEPS = 200
SEEDS = range(5)
FACTORS = (0.3, 0.6, 1.0, 1.7, 3.0)  # of the paper's peak
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "NLCG-FR": lambda params: NLCG(params, 0.1),
    "NLCG-PR": lambda params: NLCG(params, 0.1, update="polak_ribiere"),
    "Momentum": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    "RMSProp": lambda params: torch.optim.RMSprop(params, 0.1, alpha=0.9, momentum=0.9, eps=1.0),  # the authors' script
    "SGD": lambda params: torch.optim.SGD(params, 0.1),
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


def train(name: str, factor: float, seed: int) -> dict[str, Any]:
    """One run: losses before every step and after the last, test accuracy in percent, seconds per training step."""
    x, x_test, y, y_test = split(seed)
    net = perceptron(seed)
    optimizer = OPTIMIZERS[name](net.parameters())
    peak = factor * 0.1 * len(x) / 256
    schedule = paper_schedule(optimizer, batch_size=len(x), epochs=STEPS, steps_per_epoch=1, peak_lr=peak)
    losses, seconds, restarts = [], [], 0
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        schedule.step()
        losses.append(loss.item())
        restarts += isinstance(optimizer, NLCG) and optimizer.diagnostics().beta == 0.0
    with torch.no_grad():
        losses.append(nn.functional.cross_entropy(net(x), y).item())
        accuracy = 100 * (net(x_test).argmax(1) == y_test).double().mean().item()
    return {
        "optimizer": name,
        "factor": factor,
        "peak_lr": peak,
        "seed": seed,
        "losses": losses,
        "accuracy": accuracy,
        "steps_with_beta_0": restarts,
        "ms_per_step": 1e3 * statistics.median(seconds),
    }


def final_loss(runs: list[dict[str, Any]]) -> float:
    """Mean over seeds; infinite where a run has diverged."""
    mean = statistics.fmean(run["losses"][-1] for run in runs)
    return mean if np.isfinite(mean) else float("inf")


def row(name: str, runs: list[dict[str, Any]], momentum: float) -> str:
    accuracies = [run["accuracy"] for run in runs]
    loss, ms = final_loss(runs), statistics.median(run["ms_per_step"] for run in runs)
    middle = statistics.median(run["losses"][-1] for run in runs)
    return (
        f"{name:<10}{runs[0]['peak_lr']:>9.3g}{loss:>12.4f}{loss / momentum:>12.2f}{middle:>10.4f}"
        f"{statistics.fmean(accuracies):>11.2f} ± {statistics.stdev(accuracies):.2f}{ms:>11.2f}"
    )


def plot(shared: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training loss per step and per second at the shared schedule: mean over seeds, and their range."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for name, runs in shared.items():
        losses = np.array([run["losses"] for run in runs])
        seconds = statistics.median(run["ms_per_step"] for run in runs) / 1e3
        for panel, unit in zip(panels, (1.0, seconds), strict=True):
            at = unit * np.arange(losses.shape[1])
            (line,) = panel.plot(at, losses.mean(0), label=name)
            panel.fill_between(at, losses.min(0), losses.max(0), alpha=0.15, color=line.get_color(), linewidth=0)
    for panel, label in zip(panels, ("step", "seconds of training"), strict=True):
        panel.set(yscale="log", xlabel=label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("training loss")
    panels[0].legend()
    figure.suptitle("Digits, one batch of 1,437, the paper's schedule for all: mean and range of five seeds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="where the picture and the rows go (default: demo)"
    )
    out = parser.parse_args().out
    torch.set_num_threads(1)

    # Seeds outermost, optimizers innermost: what disturbs the clock disturbs all of them.
    jobs = [(name, factor, seed) for seed in SEEDS for factor in FACTORS for name in OPTIMIZERS]
    runs = [train(*job) for job in tqdm(jobs, desc="training", unit="run", mininterval=0.5)]

    def of(name: str, factor: float) -> list[dict[str, Any]]:
        return [run for run in runs if run["optimizer"] == name and run["factor"] == factor]

    shared = {name: of(name, 1.0) for name in OPTIMIZERS}
    best = {name: min((of(name, factor) for factor in FACTORS), key=final_loss) for name in OPTIMIZERS}
    for title, table in (
        ("the paper's schedule, the same for all", shared),
        (f"each at its own best peak of {', '.join(map(str, FACTORS))} times the paper's", best),
    ):
        print(f"\nDigits, batch 1437 (all), {STEPS} steps, {len(SEEDS)} seeds: {title}")
        columns = f"{'':<10}{'peak lr':>9}{'final loss':>12}{'/ Momentum':>12}{'median':>10}"
        print(columns + f"{'test accuracy %':>18}{'ms / step':>11}")
        for name, rows in table.items():
            print(row(name, rows, final_loss(table["Momentum"])))

    out.mkdir(parents=True, exist_ok=True)
    plot(shared, out / "digits.png")
    facts = {
        "fastnlcg": fastnlcg.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instruction_set": fastnlcg._native.instruction_set(),
        "threads": 1,
        "command": "make demo",
    }
    for run in runs:
        run["losses"] = [float(f"{loss:.6g}") for loss in run["losses"]]
    (out / "digits.json").write_text(json.dumps({"facts": facts, "runs": runs}) + "\n")
    print(
        f"\nWrote {out / 'digits.png'} (training loss per step and per second) and {out / 'digits.json'} (every run)."
    )


if __name__ == "__main__":
    main()
