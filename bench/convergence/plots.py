"""From rows to figures and tables.

    python bench/convergence/plots.py FOLDER      with the files of study.py and cost.py in it

Of NLCG and its rivals (rival_tables.py):

    rivals.png                         training loss per step at best choices

Of the earlier tuned comparison, with products in bfloat16:

    tuned.png                          training loss per step at the full setting and of the transformer, at best peaks

On the paper's schedule:

    loss-steps.png, loss-seconds.png   training loss at batch 4096 (the paper's figures 2 and 3)
    accuracy-batch.png                 test accuracy over batch size (figures 4 and 7)
    accuracy-epochs.png                test accuracy over epochs at the largest batch (figures 5, 6 and 8)

tables.md has the tables of all. Lines are means over seeds, shades and bars one standard deviation. Seconds are steps
times the time per step that cost.py measured for all in one run: those of the runs themselves tell of the machine's
other work.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
import rival_tables
from numpy.typing import ArrayLike
from PIL import Image
from rival_tables import markdown
from study import ALSO, PAPER, PURE, SMALL_STEPS, Rows, best_peak, like, read, settings_of
from train import Run

mpl.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    "nlcg": "NLCG, Adam's diagonal",
    "nlcg_adam": "NLCG, Adam's diagonal",
    "nlcg_adam_08": "NLCG, Adam's diagonal, beta at most 0.8",
    "nlcg_adam_095": "NLCG, Adam's diagonal, beta at most 0.95",
    "nlcg_adam_1": "NLCG, Adam's diagonal, beta at most 1",
    "nlcg_adam_pr": "NLCG, Adam's diagonal, Polak-Ribiere",
    "nlcg_adam_search": "NLCG, Adam's diagonal, line search",
    "nlcg_adam_constant_80": "NLCG, Adam's diagonal, beta constant at 0.8",
    "adamw": "AdamW, beta1 0.9",
    "adamw_08": "AdamW, beta1 0.8",
    "lamb": "LAMB",
    "nadam": "NAdam",
    "nlcg_fr": "NLCG-FR",
    "nlcg_pr": "NLCG-PR",
    "nlcg_fr_search": "NLCG-FR, line search",
    "nlcg_pr_search": "NLCG-PR, line search",
    "nlcg_fr_none": "NLCG-FR, no preconditioner",
    "nlcg_pr_none": "NLCG-PR, no preconditioner",
    "nlcg_fr_descent": "NLCG-FR, descent restarts (gone)",
    "nlcg_pr_descent": "NLCG-PR, descent restarts (gone)",
    "nlcg_fr_powell": "NLCG-FR, Powell restarts (gone)",
    "nlcg_pr_powell": "NLCG-PR, Powell restarts (gone)",
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
    "lars": "LARS",
    **{name: rival_tables.LABELS[name] for name in ("nadamw", "schedule_free", "muon", "soap")},
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


def by_batch(rows: Rows, key: str, digits: int) -> str:
    """Optimizers by batches, on the paper's schedule."""
    shared = [row for row in rows if row["peak"] == 1.0]
    batches = sorted({row["batch"] for row in shared})
    found = grouped(shared, "optimizer", "batch")
    names = [name for name in LABELS if any((name, batch) in found for batch in batches)]
    lines = [[LABELS[name], *(cell(found[name, batch], key, digits) for batch in batches)] for name in names]
    return markdown(["", *(f"batch {batch}" for batch in batches)], lines)


def comparable(rows: Rows) -> Rows:
    """The largest group that differs in nothing but optimizer, batch and seed, on the paper's schedule and peak;
    without what was merely tried."""
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


def safeguards(rows: Rows) -> str:
    """Where many were tried, at one small batch: what they do to h by the last epoch."""
    lines = []
    for name, own in of_optimizers(rows).items():
        h = [row["h_quantiles"][-1] for row in own if row["h_quantiles"][-1]]
        middle, largest = (f"{np.median([q[k] for q in h]):.3g}" if h else "" for k in (2, 4))
        lines.append([LABELS[name], cell(own, "final_accuracy", 1), cell(own, "final_loss", 3), middle, largest])
    return markdown(["", "test accuracy, %", "training loss", "median of h", "largest h"], lines)


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
    small = [row for row in rows if (row["batch"], row["train_images"]) == (128, 4096)]
    return found | ({"Safeguards, batch 128, 4096 images": safeguards(small)} if small else {})


# ---- tuned -----------------------------------------------------------------------------------------------------------


def result_of(rows: Rows) -> tuple[str, str, int]:
    """What a setting is judged by: its name, its key, digits."""
    text = rows[0]["model"].startswith("transformer")
    return ("validation loss", "final_test_loss", 3) if text else ("test accuracy, %", "final_accuracy", 1)


def over_peaks(rows: Rows) -> str:
    """Of one setting: the training loss of seed 0 over peaks; then, at the best, the means over seeds."""
    name_of_result, key, digits = result_of(rows)
    peaks = sorted({row["peak"] for row in rows if row["seed"] == 0})
    lines = []
    for name, own in of_optimizers(rows).items():
        first = {row["peak"]: row for row in own if row["seed"] == 0}
        best = best_peak(own, name)
        if best is None:
            continue
        cells = [f"{first[peak]['final_loss']:.3f}" if peak in first else "" for peak in peaks]
        cells = [f"**{text}**" if peak == best else text for peak, text in zip(peaks, cells, strict=True)]
        at_best = [row for row in own if row["peak"] == best]
        lines.append([LABELS[name], *cells, cell(at_best, "final_loss", 3), cell(at_best, key, digits)])
    return markdown(["", *(f"{peak:g}" for peak in peaks), "training loss at the best", name_of_result], lines)


def over_batches(settings: list[Rows]) -> str:
    """Test accuracy at the best peaks, by batch."""
    lines, batches = [], [rows[0]["batch"] for rows in settings]
    for name in LABELS:
        of_batches = [[row for row in rows if row["optimizer"] == name] for rows in settings]
        if sum(bool(own) for own in of_batches) < len(settings):
            continue
        at_best = [[row for row in own if row["peak"] == best_peak(own, name)] for own in of_batches]
        lines.append([LABELS[name], *(cell(own, "final_accuracy", 1) for own in at_best)])
    return markdown(["", *(f"batch {batch}" for batch in batches)], lines)


def at_full_setting(rows: Rows) -> str:
    """Each at its best peak."""
    lines = []
    for name, own in of_optimizers(rows).items():
        peak = best_peak(own, name)
        at_best = [row for row in own if row["peak"] == peak]
        results = (("final_accuracy", 1), ("final_loss", 3), ("final_test_loss", 3))
        lines.append([LABELS[name], f"{peak:g}", *(cell(at_best, key, digits) for key, digits in results)])
    return markdown(["", "peak", "test accuracy, %", "training loss", "test loss"], lines)


def with_test_loss(rows: Rows) -> Rows:
    return [{**row, "final_test_loss": row["test_loss"][-1]} for row in rows]


# 0: float32 parameters, 1: bfloat16
PURE_LABELS = {
    (0, "nlcg_adam"): "NLCG, float32 parameters",
    (1, "nlcg_adam"): "NLCG, bfloat16 parameters, rounded to nearest",
    (1, "nlcg_adam_stochastic"): "NLCG, bfloat16 parameters, stochastic rounding",
    (0, "adamw"): "AdamW, float32 parameters",
    (1, "adamw"): "AdamW, bfloat16 parameters, rounded to nearest",
}
FULL_SETTING = Run("", 4096, schedule="cosine")


def tuned_tables(rows: Rows) -> dict[str, str]:
    rows = with_test_loss(rows)
    precision = rows[0]["precision"]
    ablated = {name for name in LABELS if name.startswith("nlcg_adam_")}
    found, proxies = {}, []
    for config, _ in settings_of(precision):
        own = [row for row in like(rows, config) if row["optimizer"] not in ablated]
        if not own:
            continue
        text = config.model == "transformer"
        found["Transformer, over peaks" if text else f"Batch {config.batch}, over peaks"] = over_peaks(own)
        proxies += [] if text else [own]
        of_ablations = [row for row in like(rows, config) if row["optimizer"] in {*ablated, "nlcg_adam"}]
        if len({row["optimizer"] for row in of_ablations}) > 1:
            found[f"{'Transformer' if text else f'Batch {config.batch}'}, options"] = over_peaks(of_ablations)
    found["Test accuracy, %, by batch"] = over_batches(sorted(proxies, key=lambda own: own[0]["batch"]))
    at_full = like(rows, dataclasses.replace(FULL_SETTING, precision=precision))
    if at_full:
        found["Full setting, batch 4096"] = at_full_setting(at_full)
        found["Full setting, batch 4096, over peaks"] = over_peaks(at_full)
    if any(row["precision"] == "pure_bfloat16" for row in rows):
        found["Parameters in bfloat16"] = pure_bfloat16(rows, precision)
    return found


def pure_bfloat16(rows: Rows, precision: str) -> str:
    """At the best peaks of float32 parameters: those, and bfloat16 ones rounded to nearest and stochastically."""
    header, lines = [""], {name: [text] for name, text in PURE_LABELS.items()}
    for config, _ in settings_of(precision):
        own = [like(rows, dataclasses.replace(config, precision=p)) for p in (precision, "pure_bfloat16")]
        if not own[1]:
            continue
        header += [f"batch {config.batch}: training loss", "test accuracy, %"]
        for (parameters, name), cells in lines.items():
            of_peak = PURE[name]
            at_best = [r for r in own[parameters] if (r["optimizer"], r["peak"]) == (name, best_peak(own[0], of_peak))]
            cells += [cell(at_best, "final_loss", 3), cell(at_best, "final_accuracy", 1)]
    header += [f"batch {SMALL_STEPS.batch}, peak {SMALL_STEPS.peak:g}: training loss", "test accuracy, %"]
    for (parameters, name), cells in lines.items():
        config = dataclasses.replace(SMALL_STEPS, precision=(precision, "pure_bfloat16")[parameters])
        own = [r for r in like(rows, config) if (r["optimizer"], r["peak"]) == (name, SMALL_STEPS.peak)]
        cells += [cell(own, "final_loss", 3), cell(own, "final_accuracy", 1)] if own else ["", ""]
    return markdown(header, list(lines.values()))


def tuned_picture(rows: Rows, path: Path) -> None:
    precision = rows[0]["precision"]
    *_, (text, _) = settings_of(precision)
    panels = (
        ("ResNet-8, CIFAR-10 (JPEG), batch 4096", dataclasses.replace(FULL_SETTING, precision=precision), (1.1, 2.2)),
        ("transformer, characters, 384 sequences a batch", text, (1.8, 3.4)),
    )
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    kernel = np.ones(4) / 4
    for axis, (title, config, limits) in zip(axes, panels, strict=True):
        for name, own in of_optimizers(like(rows, config)).items():
            peak = best_peak(own, name)
            at_best = complete([row for row in own if row["peak"] == peak])
            if name.startswith("nlcg_adam_") or not at_best:
                continue
            mean, deviation = spread([np.convolve(row["loss"], kernel, "valid") for row in at_best])
            width = 2.2 if name == "nlcg_adam" else 1.2
            (line,) = axis.plot(np.arange(4, 4 + len(mean)), mean, label=f"{LABELS[name]}, lr {peak:g}", lw=width)
            axis.fill_between(
                np.arange(4, 4 + len(mean)),
                mean - deviation,
                mean + deviation,
                color=line.get_color(),
                alpha=0.12,
                lw=0,
            )
        axis.set(xlabel="optimizer steps", title=title, ylim=limits)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("training loss")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


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
    rivals, paper, tuned, cost = (read(folder / f"{name}.jsonl") for name in ("rivals", "paper", "tuned", "cost"))
    found = {}
    if rivals:
        rival_tables.picture(rivals, folder / "rivals.png")
        found |= rival_tables.tables(rivals)
    if tuned:
        tuned_picture(tuned, folder / "tuned.png")
        found |= tuned_tables(tuned)
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
