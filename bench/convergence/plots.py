"""From rows to figures and tables.

    python bench/convergence/plots.py FOLDER      with the files of study.py and cost.py in it

Of NLCG and its rivals (rival_tables.py):

    rivals.png                         training loss per step at best choices

On the paper's schedule:

    loss-steps.png, loss-seconds.png   training loss at batch 4096 (the paper's figures 2 and 3)
    accuracy-batch.png                 test accuracy over batch size (figures 4 and 7)
    accuracy-epochs.png                test accuracy over epochs at the largest batch (figures 5, 6 and 8)

tables.md has the tables of all. Lines are means over seeds, shades and bars one standard deviation. Seconds are steps
times the time per step that cost.py measured for all optimizers in one run, because the runs' own seconds include the
machine's other work.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
import rival_tables
from numpy.typing import ArrayLike
from PIL import Image
from rival_tables import markdown
from study import ALSO, OF_OPTIONS, PAPER, PEAKS, SMALL_PEAK, Rows, read

mpl.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    "nlcg": "NLCG, Adam's diagonal",
    "nlcg_fr": "NLCG-FR",
    "nlcg_pr": "NLCG-PR",
    "nlcg_pr_search": "NLCG-PR, line search",
    "nlcg_fr_none": "NLCG-FR, no preconditioner",
    "momentum": "Momentum",
    "rmsprop": "RMSProp",
    "sgd": "SGD",
    **{name: rival_tables.LABELS[name] for name in ("adamw", "nadamw", "lamb", "schedule_free", "muon", "soap")},
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
    """None if cost.py has not measured that network and optimizer."""
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
    """Mean and standard deviation; of how many, if not of three."""
    if not own:
        return ""
    mean, deviation = spread([row[key] for row in own])
    if not np.isfinite(mean):
        return "diverged"
    many = "" if len(own) == 3 else f" ({len(own)})"
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(own) > 1 else "") + many


def by_batch(rows: Rows, key: str, digits: int) -> str:
    """Optimizers by batches, on the paper's schedule."""
    shared = [row for row in rows if row["peak"] == 1.0]
    batches = sorted({row["batch"] for row in shared})
    found = grouped(shared, "optimizer", "batch")
    names = [name for name in LABELS if any((name, batch) in found for batch in batches)]
    lines = [[LABELS[name], *(cell(found[name, batch], key, digits) for batch in batches)] for name in names]
    return markdown(["", *(f"batch {batch}" for batch in batches)], lines)


def comparable(rows: Rows) -> Rows:
    """The largest group that differs in nothing but optimizer, batch and seed, on the paper's schedule and peak."""
    rows = [row for row in rows if row["optimizer"] in {*PAPER, *ALSO} and row["peak"] == 1.0]
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


def paper_tables(rows: Rows) -> dict[str, str]:
    main_rows = comparable(rows)
    found = {
        "Test accuracy, %": by_batch(main_rows, "final_accuracy", 1),
        "Training loss in the last epoch": by_batch(main_rows, "final_loss", 3),
    }
    same = ("train_images", "epochs", "precision")
    alike = [row for row in rows if all(row[name] == main_rows[0][name] for name in same)]
    of_settings = [row for row in alike if (row["batch"], row["peak"]) == (4096, 1.0)]
    if len(grouped(of_settings, "model", "augment", "micro")) > 1:
        found["Test accuracy, %, batch 4096, by setting"] = settings(of_settings)
    return found


# ---- options ---------------------------------------------------------------------------------------------------------

# By optimizer and beta1; the first is the default.
OPTION_LABELS = {
    ("nlcg", 0.9): "NLCG",
    ("nlcg", 0.8): "beta at most 0.8",
    ("nlcg", 0.95): "beta at most 0.95",
    ("nlcg", 1.0): "beta at most 1",
    ("nlcg_polak_ribiere", 0.9): "Polak-Ribiere",
    ("nlcg_line_search", 0.9): "line search",
    ("nlcg_constant", 0.8): "beta constant at 0.8",
}
# By the type of the parameters and optimizer
PURE_LABELS = {
    ("float32", "nlcg"): "NLCG, float32 parameters",
    ("bfloat16", "nlcg"): "NLCG, bfloat16 parameters, rounded to nearest",
    ("bfloat16", "nlcg_stochastic"): "NLCG, bfloat16 parameters, stochastic rounding",
    ("float32", "adamw"): "AdamW, float32 parameters",
    ("bfloat16", "adamw"): "AdamW, bfloat16 parameters, rounded to nearest",
}


def option_tables(rows: Rows) -> dict[str, str]:
    return {"Options": of_options(rows), "Parameters in bfloat16": pure_bfloat16(rows)}


def of_options(rows: Rows) -> str:
    """The training loss of seed 0 over peaks; then, at the best of them, the means over seeds."""
    rows = [row for row in rows if row["batch"] == OF_OPTIONS.batch and row["precision"] != "pure_bfloat16"]
    found = grouped(rows, "optimizer", "beta1")
    peaks = sorted({row["peak"] for row in found["nlcg", 0.9]})
    lines = []
    for name, label in OPTION_LABELS.items():
        first = {row["peak"]: row["final_loss"] for row in found[name] if row["seed"] == 0}
        best = min(first, key=lambda peak: first[peak])
        cells = [f"{first[peak]:.3f}" if peak in first else "" for peak in peaks]
        cells = [f"**{text}**" if peak == best else text for peak, text in zip(peaks, cells, strict=True)]
        own = [row for row in found[name] if row["peak"] == best]
        lines.append([label, *cells, cell(own, "final_loss", 3), cell(own, "final_accuracy", 1)])
    header = [f"{peak:g}" for peak in peaks]
    return markdown(["", *header, "training loss at the best", "test accuracy, %"], lines)


def pure_bfloat16(rows: Rows) -> str:
    """At the best peaks of float32 parameters, and far below: float32 parameters, and bfloat16 ones rounded to nearest
    and stochastically."""
    header, lines = [""], {key: [text] for key, text in PURE_LABELS.items()}
    small = {"nlcg": SMALL_PEAK}
    for batch, peaks, what in (*((b, p, "") for b, p in PEAKS.items()), (128, small, f", peak {SMALL_PEAK:g}")):
        header += [f"batch {batch}{what}: training loss", "test accuracy, %"]
        at = grouped([r for r in rows if (r["batch"], r["beta1"]) == (batch, 0.9)], "optimizer", "peak", "precision")
        for (parameters, name), cells in lines.items():
            peak = peaks.get("adamw" if name == "adamw" else "nlcg")
            precisions = ("pure_bfloat16",) if parameters == "bfloat16" else ("float32", "bfloat16")
            own = [row for precision in precisions for row in at[name, peak, precision]]
            cells += [cell(own, "final_loss", 3), cell(own, "final_accuracy", 1)]
    return markdown(header, list(lines.values()))


def costs(cost: Rows, batches: tuple[str, ...] = ("256", "4096")) -> str:
    """Milliseconds of a step, and its share of a training step, for each network."""
    header, lines = [""], {name: [LABELS[name]] for name in cost[0]["step_ms"]}
    for row in cost:
        what = "sequences" if row["model"] == "transformer" else "images"
        gradients = f"{row['gradient_ms']:.0f} ms for the gradients of {row['micro']} {what}"
        header += [f"{row['model']} ({gradients}): step, ms", *(f"share at batch {batch}, %" for batch in batches)]
        for name, ms in row["step_ms"].items():
            lines[name] += [f"{ms:.2f}", *(f"{row['share_percent'][name][batch]:.2f}" for batch in batches)]
    return markdown(header, list(lines.values()))


def main() -> None:
    folder = Path(sys.argv[1])
    rivals, options, paper, cost = (read(folder / f"{name}.jsonl") for name in ("rivals", "options", "paper", "cost"))
    found = {}
    if rivals:
        rival_tables.picture(rivals, folder / "rivals.png")
        found |= rival_tables.tables(rivals)
    if options:
        found |= option_tables(options)
    if paper:
        shared = comparable(paper)
        batches = sorted({row["batch"] for row in shared})
        curves(shared, cost, folder, 4096 if 4096 in batches else batches[-1])
        accuracies(shared, folder)
        found |= paper_tables(paper)
    if cost:
        found |= {"Cost": costs(cost)}
    text = "\n\n".join(f"{name}\n\n{table}" for name, table in found.items())
    (folder / "tables.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
