"""From rows to the paper's figures and a table.

    python bench/convergence/plots.py ROWS.jsonl FOLDER

    loss-steps.png, loss-seconds.png   training loss at the largest batch but one (the paper's figures 2 and 3)
    accuracy-batch.png                 test accuracy over batch size (figures 4 and 7)
    accuracy-epochs.png                test accuracy over epochs at the largest batch (figures 5, 6 and 8)

Lines are means over seeds on the paper's schedule, shades and bars one standard deviation.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
from study import Rows, read

mpl.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    "nlcg_fr": "NLCG-FR",
    "nlcg_pr": "NLCG-PR",
    "nlcg_fr_search": "NLCG-FR, line search",
    "nlcg_pr_search": "NLCG-PR, line search",
    "nlcg_fr_none": "NLCG-FR, no preconditioner",
    "nlcg_pr_none": "NLCG-PR, no preconditioner",
    "nlcg_fr_descent": "NLCG-FR, descent restarts",
    "nlcg_pr_descent": "NLCG-PR, descent restarts",
    "nlcg_fr_powell": "NLCG-FR, Powell restarts",
    "nlcg_pr_powell": "NLCG-PR, Powell restarts",
    "momentum": "Momentum",
    "rmsprop": "RMSProp",
    "sgd": "SGD",
    "adamw": "AdamW",
    "lars": "LARS",
    "lamb": "LAMB",
}


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation; 0 for one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def grouped(rows: Rows, *names: str) -> dict[tuple, Rows]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def of_optimizers(rows: Rows) -> dict[str, Rows]:
    found = grouped(rows, "optimizer")
    return {name: found[name,] for name in LABELS if (name,) in found}


def curves(rows: Rows, folder: Path, batch: int) -> None:
    at_batch = [row for row in rows if row["batch"] == batch]
    for axis, name in (("optimizer steps", "loss-steps"), ("seconds on one core", "loss-seconds")):
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for optimizer, own in of_optimizers(at_batch).items():
            loss = np.array([row["loss"] for row in own if len(row["loss"]) == max(len(r["loss"]) for r in own)])
            width = 4  # steps of one epoch at batch 4096 of 16384
            kernel = np.ones(width) / width
            mean, deviation = (np.convolve(x, kernel, "valid") for x in (loss.mean(0), loss.std(0)))
            x = np.arange(width, len(loss[0]) + 1)
            if name == "loss-seconds":
                x = np.mean([row["seconds"] for row in own], axis=0)[width - 1 :]
            (line,) = axes.plot(x, mean, label=LABELS[optimizer], lw=1.5)
            axes.fill_between(x, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.12, lw=0)
        axes.set(xlabel=axis, ylabel="training loss", title=f"{rows[0]['model']}, batch {batch}, the paper's schedule")
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)


def accuracies(rows: Rows, folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for optimizer, own in of_optimizers(rows).items():
        by_batch = sorted(grouped(own, "batch").items())
        points = [spread([row["final_accuracy"] for row in group]) for _, group in by_batch]
        batches = [batch for (batch,), _ in by_batch]
        axes.errorbar(batches, *zip(*points, strict=True), label=LABELS[optimizer], marker="o", ms=4, capsize=3, lw=1.2)
    axes.set(xlabel="batch", ylabel="test accuracy, %", xscale="log", title=f"{rows[0]['epochs']} epochs")
    axes.set_xticks(sorted({row["batch"] for row in rows}), sorted({row["batch"] for row in rows}), minor=False)
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "accuracy-batch.png", dpi=130)
    plt.close(figure)

    largest = max(row["batch"] for row in rows)
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for optimizer, own in of_optimizers([row for row in rows if row["batch"] == largest]).items():
        values = np.array([row["accuracy"] for row in own if len(row["accuracy"]) == own[0]["epochs"]])
        if len(values):
            x = np.arange(1, values.shape[1] + 1)
            axes.errorbar(x, values.mean(0), values.std(0), label=LABELS[optimizer], capsize=2, lw=1.2)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title=f"batch {largest}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "accuracy-epochs.png", dpi=130)
    plt.close(figure)


def table(rows: Rows) -> str:
    """Markdown: test accuracy and training loss in the last epoch, mean and deviation over seeds."""
    lines = [
        "| batch | optimizer | peak lr | seeds | test accuracy, % | training loss | ms / step | optimizer's share |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for (batch, peak), group in sorted(grouped(rows, "batch", "peak_lr").items()):
        for optimizer, own in of_optimizers(group).items():
            accuracy, loss = (spread([row[key] for row in own]) for key in ("final_accuracy", "final_loss"))
            step, share = (statistics.median(row[key] for row in own) for key in ("step_ms", "optimizer_ms"))
            lines.append(
                f"| {batch} | {LABELS[optimizer]} | {peak:g} | {len(own)} | {accuracy[0]:.1f} ± {accuracy[1]:.1f} "
                f"| {loss[0]:.3f} ± {loss[1]:.3f} | {step:.0f} | {share / step:.2%} |"
            )
    return "\n".join(lines)


def main() -> None:
    rows, folder = read(Path(sys.argv[1])), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    shared = [row for row in rows if row["peak"] == 1.0]
    batches = sorted({row["batch"] for row in shared})
    curves(shared, folder, 4096 if 4096 in batches else batches[-1])
    accuracies(shared, folder)
    print(table(rows))


if __name__ == "__main__":
    main()
