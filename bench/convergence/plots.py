"""From rows to the paper's figures and tables.

    python bench/convergence/plots.py FOLDER      with convergence.jsonl (study.py) and cost.jsonl (cost.py) in it

    loss-steps.png, loss-seconds.png   training loss at batch 4096 (the paper's figures 2 and 3)
    accuracy-batch.png                 test accuracy over batch size (figures 4 and 7)
    accuracy-epochs.png                test accuracy over epochs at the largest batch (figures 5, 6 and 8)
    tables.md                          test accuracy and training loss; over peaks and settings

Lines are means over seeds on the paper's schedule, shades and bars one standard deviation. Seconds are steps times the
time per step that cost.py measured for all in one run: those of the runs themselves tell of the machine's other work.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from study import ALSO, GRID, PAPER, Rows, best_peak, read

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
    "nlcg_fr_same_batch": "NLCG-FR, y from one batch",
    "nlcg_fr_mean": "NLCG-FR, running means of y and s",
    "nlcg_fr_damped": "NLCG-FR, damped pairs",
    "nlcg_fr_cosine": "NLCG-FR, cos(y, s) at least 0.2",
    "nlcg_fr_signal": "NLCG-FR, no pair where the slope is gone",
    "nlcg_fr_h_max": "NLCG-FR, h at most 10",
    "nlcg_fr_rescaled": "NLCG-FR, h scaled to a mean of 1 / h of 1",
    "nlcg_fr_beta_max": "NLCG-FR, beta at most 0.9",
    "momentum": "Momentum",
    "rmsprop": "RMSProp",
    "sgd": "SGD",
    "adamw": "AdamW",
    "lars": "LARS",
    "lamb": "LAMB",
}


def spread(values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the first axis, the runs; 0 for one run."""
    runs = np.asarray(values)
    return runs.mean(0), runs.std(0, ddof=1) if len(runs) > 1 else np.zeros(runs.shape[1:])


def grouped(rows: Rows, *names: str) -> dict[tuple, Rows]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def of_optimizers(rows: Rows) -> dict[str, Rows]:
    found = grouped(rows, "optimizer")
    return {name: found[name,] for name in LABELS if (name,) in found}


def seconds_per_step(cost: Rows, row: dict[str, object]) -> float | None:
    """None where cost.py has not measured that network and optimizer."""
    for measured in cost:
        if measured["model"] == row["model"] and row["optimizer"] in measured["step_ms"]:
            gradient_ms = measured["gradient_ms"] * row["batch"] / measured["micro"]
            return (gradient_ms + measured["step_ms"][row["optimizer"]]) / 1e3
    return None


def complete(rows: Rows) -> Rows:
    """Those that did not diverge."""
    return [row for row in rows if len(row["accuracy"]) == row["epochs"]]


def finished(figure: plt.Figure, axes: plt.Axes, path: Path) -> None:
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size


def curves(rows: Rows, cost: Rows, folder: Path, batch: int) -> None:
    at_batch = complete([row for row in rows if row["batch"] == batch])
    per_epoch = at_batch[0]["steps"] // at_batch[0]["epochs"]
    kernel = np.ones(per_epoch) / per_epoch
    for name, axis in (("loss-steps", "optimizer steps"), ("loss-seconds", "seconds")):
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for optimizer, own in of_optimizers(at_batch).items():
            seconds = seconds_per_step(cost, own[0])
            if name == "loss-seconds" and seconds is None:
                continue
            mean, deviation = spread([np.convolve(row["loss"], kernel, "valid") for row in own])
            x = np.arange(per_epoch, per_epoch + len(mean)) * (seconds if name == "loss-seconds" else 1)
            (line,) = axes.plot(x, mean, label=LABELS[optimizer], lw=1.5)
            axes.fill_between(x, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.12, lw=0)
        axes.set(xlabel=axis, ylabel="training loss, mean over an epoch", title=title(rows, f"batch {batch}"))
        finished(figure, axes, folder / f"{name}.png")


def title(rows: Rows, what: str) -> str:
    return f"{rows[0]['model']} on {rows[0]['data']}, the paper's schedule, {what}"


def accuracies(rows: Rows, folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    batches = sorted({row["batch"] for row in rows})
    for optimizer, own in of_optimizers(rows).items():
        by_batch = sorted(grouped(own, "batch").items())
        points = [spread([row["final_accuracy"] for row in group]) for _, group in by_batch]
        x = [batch for (batch,), _ in by_batch]
        axes.errorbar(x, *zip(*points, strict=True), label=LABELS[optimizer], marker="o", ms=4, capsize=3, lw=1.2)
    axes.set(xlabel="batch", ylabel="test accuracy, %", xscale="log", title=title(rows, f"{rows[0]['epochs']} epochs"))
    axes.set_xticks(batches, batches, minor=False)
    axes.minorticks_off()
    finished(figure, axes, folder / "accuracy-batch.png")

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for optimizer, own in of_optimizers(complete([row for row in rows if row["batch"] == batches[-1]])).items():
        mean, deviation = spread([row["accuracy"] for row in own])
        axes.errorbar(np.arange(1, len(mean) + 1), mean, deviation, label=LABELS[optimizer], capsize=2, lw=1.2)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title=title(rows, f"batch {batches[-1]}"))
    finished(figure, axes, folder / "accuracy-epochs.png")


def cell(own: Rows, key: str, digits: int) -> str:
    """Mean and standard deviation, and of how many where it is not three."""
    if not own:
        return ""
    mean, deviation = spread([row[key] for row in own])
    if not np.isfinite(mean):
        return "diverged"
    many = "" if len(own) == 3 else f" ({len(own)})"
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(own) > 1 else "") + many


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def by_batch(rows: Rows, key: str, digits: int) -> str:
    """Optimizers by batches, on the paper's schedule."""
    shared = [row for row in rows if row["peak"] == 1.0]
    batches = sorted({row["batch"] for row in shared})
    found = grouped(shared, "optimizer", "batch")
    names = [name for name in LABELS if any((name, batch) in found for batch in batches)]
    lines = [[LABELS[name], *(cell(found[name, batch], key, digits) for batch in batches)] for name in names]
    return markdown(["", *(f"batch {batch}" for batch in batches)], lines)


def by_peak(rows: Rows, batch: int) -> str:
    """Test accuracy of seed 0 over factors on the paper's peak; last, the mean over seeds at the best one."""
    at_batch = [row for row in rows if row["batch"] == batch]
    found = grouped([row for row in at_batch if row["seed"] == 0], "optimizer", "peak")
    factors = sorted({peak for _, peak in found})
    lines = []
    for name, own in of_optimizers(at_batch).items():
        if any((name, peak) in found for peak in factors if peak != 1.0):
            peak = best_peak(rows, name, batch)
            all_seeds = cell([row for row in own if row["peak"] == peak], "final_accuracy", 1)
            cells = [cell(found[name, factor], "final_accuracy", 1).removesuffix(" (1)") for factor in factors]
            lines.append([LABELS[name], *cells, f"{all_seeds} at {peak:g}"])
    return markdown(["", *(f"{factor:g}" for factor in factors), "at its best peak"], lines)


def comparable(rows: Rows) -> Rows:
    """The largest group that differs in nothing but optimizer, batch, seed and peak; without what was merely tried."""
    rows = [row for row in rows if row["optimizer"] in {*PAPER, *ALSO, *GRID}]
    return max(grouped(rows, "model", "train_images", "epochs", "micro", "augment", "precision").values(), key=len)


def settings(rows: Rows) -> str:
    """Networks, augmentation and batch normalization, at one batch and on the paper's schedule."""
    found = grouped(rows, "optimizer", "model", "augment", "micro")
    columns = sorted({key[1:] for key in found}, key=lambda key: (key[0], not key[1], key[2]))
    header = [
        f"{model}, {'crops and flips' if augment else 'plain images'}, {micro} normalized together"
        for model, augment, micro in columns
    ]
    several = {
        name: own for name, own in of_optimizers(rows).items() if len(grouped(own, "model", "augment", "micro")) > 1
    }
    lines = [
        [LABELS[name], *(cell(found[(name, *column)], "final_accuracy", 1) for column in columns)] for name in several
    ]
    return markdown(["", *header], lines)


def safeguards(rows: Rows) -> str:
    """Where many were tried, at one small batch: what they do to h by the last epoch."""
    lines = []
    for name, own in of_optimizers(rows).items():
        h = [row["h_quantiles"][-1] for row in own if row["h_quantiles"][-1]]
        middle, largest = (f"{np.median([q[k] for q in h]):.3g}" if h else "" for k in (2, 4))
        lines.append([LABELS[name], cell(own, "final_accuracy", 1), cell(own, "final_loss", 3), middle, largest])
    return markdown(["", "test accuracy, %", "training loss", "median of h", "largest h"], lines)


def tables(rows: Rows) -> dict[str, str]:
    main_rows = comparable(rows)
    found = {
        "Test accuracy, %": by_batch(main_rows, "final_accuracy", 1),
        "Training loss in the last epoch": by_batch(main_rows, "final_loss", 3),
    }
    for (batch,), own in sorted(grouped(main_rows, "batch").items()):
        if len({row["peak"] for row in own}) > 1:
            found[f"Test accuracy, %, batch {batch}, over factors on the peak"] = by_peak(own, batch)
    same = ("train_images", "epochs", "precision")
    alike = [row for row in rows if all(row[name] == main_rows[0][name] for name in same)]
    of_settings = [row for row in alike if (row["batch"], row["peak"]) == (4096, 1.0)]
    if len(grouped(of_settings, "model", "augment", "micro")) > 1:
        found["Test accuracy, %, batch 4096, by setting"] = settings(of_settings)
    small = [row for row in rows if (row["batch"], row["train_images"]) == (128, 4096)]
    return found | ({"Safeguards, batch 128, 4096 images": safeguards(small)} if small else {})


def costs(cost: Rows, batches: tuple[str, ...] = ("256", "4096")) -> str:
    """Milliseconds of a step, and its share of a training step, for each network."""
    header, lines = [""], {name: [LABELS[name]] for name in cost[0]["step_ms"]}
    for row in cost:
        gradients = f"{row['gradient_ms']:.0f} ms for the gradients of {row['micro']} images"
        header += [f"{row['model']} ({gradients}): step, ms", *(f"share at batch {batch}, %" for batch in batches)]
        for name, ms in row["step_ms"].items():
            lines[name] += [f"{ms:.2f}", *(f"{row['share_percent'][name][batch]:.2f}" for batch in batches)]
    return markdown(header, list(lines.values()))


def main() -> None:
    folder = Path(sys.argv[1])
    rows, cost = read(folder / "convergence.jsonl"), read(folder / "cost.jsonl")
    shared = [row for row in comparable(rows) if row["peak"] == 1.0]
    batches = sorted({row["batch"] for row in shared})
    curves(shared, cost, folder, 4096 if 4096 in batches else batches[-1])
    accuracies(shared, folder)
    found = tables(rows) | {"Cost": costs(cost)}
    text = "\n\n".join(f"{name}\n\n{table}" for name, table in found.items())
    (folder / "tables.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
