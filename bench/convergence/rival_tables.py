"""Tables and the picture of rivals.jsonl: what docs/study-rivals.md and the README show. plots.py calls them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path

import matplotlib as mpl
import numpy as np
import rivals
from PIL import Image
from rivals import Choice, Losses, Rows
from train import Run

mpl.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    "nlcg_muon": "NLCG, matrices",
    "nlcg_muon_constant": "NLCG, matrices, beta constant",
    "nlcg": "NLCG",
    "nlcg_constant": "NLCG, beta constant",
    "adamw": "AdamW",
    "nadamw": "NAdamW",
    "muon": "Muon",
    "soap": "SOAP",
    "schedule_free": "Schedule-Free AdamW",
    "lamb": "LAMB",
    "nlcg_late": "beta of the step before",
    "nlcg_plain": "plain gradient norms",
    "nlcg_per_tensor": "a beta for each tensor",
    "nlcg_dai_yuan": "min(Fletcher-Reeves, Dai-Yuan)",
    "nlcg_smoothed": "rz smoothed",
}
SETTINGS = {"Transformer": rivals.TEXT, "Small images": rivals.IMAGES, "Images": rivals.FULL}
MATRICES = ("muon", "soap", "schedule_free", "nlcg", "adamw")
RULES = tuple(f"nlcg_{rule}" for rule in rivals.VARIANTS)
WHAT = ("test accuracy, %", "validation loss")


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def tuned(config: Run) -> bool:
    """Images of full size have the choices of the small ones, and three seeds."""
    return config.batch != rivals.FULL.batch


def usual_seeds(config: Run) -> int:
    return len(rivals.SEEDS if tuned(config) else rivals.SEEDS_OF_FULL)


def rows_at(rows: Rows, config: Run, name: str, choice: Choice) -> Rows:
    """By seed."""
    wanted = dataclasses.asdict(rivals.at(config, name, choice, 0))
    own = [row for row in rows if all(row[key] == value for key, value in wanted.items() if key != "seed")]
    return sorted(own, key=lambda row: row["seed"])


def best_choice(rows: Rows, config: Run, name: str) -> Choice | None:
    """Of those with the most seeds, the lowest mean training loss."""
    losses = Losses(rows, config, name)
    counts = {c: len(seeds) for c, seeds in losses.found.items() if losses.mean(c, len(seeds)) is not None}
    return losses.ranked(max(counts.values()), decay=None)[0] if counts else None


def plus_minus(values: list[float], digits: int, usual: int) -> str:
    """Mean and standard deviation; of how many, if not of the usual number."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" + ("" if len(values) == usual else f" ({len(values)})")


def result(row: dict[str, object]) -> float:
    return row["test_loss"][-1] if row["model"] == "transformer" else row["final_accuracy"]


def results(own: Rows, usual: int) -> list[str]:
    text = own[0]["model"] == "transformer"
    return [plus_minus([result(row) for row in own], 3 if text else 1, usual)]


def ranking(rows: Rows, config: Run) -> str:
    """Every optimizer at its best peak, beta1 and decay, the lowest training loss first. If the choice was made in
    this setting: the training loss of the seeds that had no say in it, and what a peak lower or higher by sqrt(3)
    costs, by means of two seeds."""
    usual = usual_seeds(config)
    lines = []
    for name in rivals.NAMES:
        choice = best_choice(rows, config, name)
        if choice is None:
            continue
        own = rows_at(rows, config, name, choice)
        losses = Losses(rows, config, name)
        pair = (*choice[:2], 0.0)
        near = [losses.mean(c, 2) for c in rivals.neighbours(pair)]
        at_pair = losses.mean(pair, 2)
        wide = [f"{x - at_pair:+.2f}" if x is not None and at_pair is not None else "" for x in near]
        loss = [row["final_loss"] for row in own]
        others = [row["final_loss"] for row in own if row["seed"] > 1]
        last = [f"{statistics.mean(others):.3f}" if others else "", *wide] if tuned(config) else []
        cells = [LABELS[name], *(f"{x:g}" for x in choice), *results(own, usual), plus_minus(loss, 3, usual), *last]
        lines.append((statistics.mean(loss), cells))
    what = WHAT[config.model == "transformer"]
    last = ["of seeds 2 to 4", "a peak lower", "higher"] if tuned(config) else []
    header = ["", "peak", "beta1", "decay", what, "training loss", *last]
    return markdown(header, [cells for _, cells in sorted(lines, key=lambda line: line[0])])


def settings(rows: Rows) -> str:
    """Every optimizer at its best in every setting: the result and the training loss; that of the README."""
    configs = [dataclasses.replace(config, precision=rows[0]["precision"]) for config in SETTINGS.values()]
    header, lines = [""], []
    for title, config in zip(SETTINGS, configs, strict=True):
        header += [f"{title.lower()}: {WHAT[config.model == 'transformer']}", "training loss"]
    for name in rivals.NAMES:
        cells, order = [LABELS[name]], math.inf
        for config in configs:
            choice = best_choice(rows, config, name)
            own = rows_at(rows, config, name, choice) if choice else []
            usual = usual_seeds(config)
            losses = [row["final_loss"] for row in own]
            order = min(order, statistics.mean(losses)) if losses and config is configs[0] else order
            cells += [*results(own, usual), plus_minus(losses, 3, usual)] if own else ["", ""]
        if any(cells[1:]):
            lines.append((order, cells))
    return markdown(header, [cells for _, cells in sorted(lines, key=lambda line: line[0])])


def by_beta(rows: Rows, config: Run) -> str:
    """Training loss of seed 0 at the best peak of each beta1, on the grid of factors of 3, which all shared."""
    lines = []
    of_names = {name: Losses(rows, config, name) for name in rivals.NAMES}
    betas = [b for b in rivals.BETAS if any(c[1] == b for losses in of_names.values() for c in losses.ranked(1))]
    for name, losses in of_names.items():
        cells = []
        for beta1 in betas:
            tried = [c for c in losses.ranked(1) if c[1] == beta1 and c[0] in rivals.PEAKS]
            cells.append(f"{losses.mean(tried[0], 1):.3f} ({tried[0][0]:g})" if tried else "")
        if any(cells):
            lines.append([LABELS[name], *cells])
    return markdown(["", *(f"{beta1:g}" for beta1 in betas)], lines)


def paired(rows: Rows, config: Run, names: tuple[str, ...] = rivals.NAMES, base: str = "nlcg") -> str:
    """Differences to ``base`` seed by seed (the same data and the same network at the start), mean and standard
    deviation, and on how many seeds its training loss is the lower. Nothing, if none of the names has rows."""
    choice = best_choice(rows, config, base)
    if choice is None:
        return ""
    ours = {row["seed"]: row for row in rows_at(rows, config, base, choice)}
    lines = []
    for name in names:
        theirs = best_choice(rows, config, name) if name != base else None
        if theirs is None:
            continue
        pairs = [(row, ours[row["seed"]]) for row in rows_at(rows, config, name, theirs) if row["seed"] in ours]
        difference = [a["final_loss"] - b["final_loss"] for a, b in pairs]
        of_result = [result(a) - result(b) for a, b in pairs]
        digits = 3 if config.model == "transformer" else 1
        lower = sum(d > 0 for d in difference)
        usual = usual_seeds(config)
        differences = plus_minus(difference, 3, usual), plus_minus(of_result, digits, usual)
        lines.append([LABELS[name], f"{theirs[0]:g}", *differences, f"{lower} of {len(pairs)}"])
    what = "validation loss" if config.model == "transformer" else "test accuracy, points"
    header = [f"minus {LABELS[base]}", "peak", "training loss", what, f"{LABELS[base]} lower on"]
    return markdown(header, lines) if lines else ""


CONSTANTS = {
    "nlcg_muon": "NLCG, matrices, beta at most",
    "nlcg_muon_constant": "NLCG, matrices, beta constant",
    "muon": "Muon, momentum",
}


def without_search(rows: Rows) -> str:
    """With the peak and the decay that were chosen for Muon: training loss and result at every momentum, or cap of
    beta, that has two seeds; transformer, the same in four times as many steps, and small images."""
    text, small = (
        dataclasses.replace(config, precision=rows[0]["precision"]) for config in (rivals.TEXT, rivals.IMAGES)
    )
    longer = dataclasses.replace(text, epochs=4 * text.epochs)
    keys = [(name, beta1) for name in CONSTANTS for beta1 in rivals.BETAS]
    header, cells = [""], {key: [f"{CONSTANTS[key[0]]} {key[1]:g}"] for key in keys}
    for title, config, tuned_in in (
        ("transformer", text, text),
        ("480 steps", longer, text),
        ("small images", small, small),
    ):
        choice = rivals.chosen(rows, tuned_in, "muon")
        own = {key: rows_at(rows, config, key[0], (choice[0], key[1], choice[2])) if choice else [] for key in keys}
        if all(len(found) < 2 for found in own.values()):
            continue
        header += [f"{title}: training loss", WHAT[config.model == "transformer"]]
        usual = 2 if config is longer else len(rivals.SEEDS)
        for key, found in own.items():
            loss = [row["final_loss"] for row in found]
            cells[key] += [plus_minus(loss, 3, usual), *results(found, usual)] if len(found) >= 2 else ["", ""]
    lines = [line for line in cells.values() if any(line[1:])]
    return markdown(header, lines) if lines else ""


def state_in_bfloat16(rows: Rows) -> str:
    """NLCG's forms at the choices of the search, with state in float32 and in bfloat16, and with everything in
    bfloat16: training loss, and the paired difference of the losses."""
    forms = ("nlcg", "state16"), ("nlcg_muon", "state16"), ("nlcg", "all16")
    header = [""]
    cells = {form: [LABELS[form[0]] + (", parameters too" if form[1] == "all16" else "")] for form in forms}
    for title in ("Transformer", "Small images"):
        config = dataclasses.replace(SETTINGS[title], precision=rows[0]["precision"])
        header += [f"{title.lower()}: in float32", "in bfloat16", "difference, seed by seed"]
        for (name, what), line in cells.items():
            choice = rivals.chosen(rows, config, name)  # that of rivals.state16
            of = dataclasses.replace(config, precision="pure_bfloat16") if what == "all16" else config
            wide = rows_at(rows, config, name, choice) if choice else []
            half = rows_at(rows, of, f"{name}_{what}", choice) if choice else []
            if not half:
                line += ["", "", ""]
                continue
            of_seed = {row["seed"]: row["final_loss"] for row in wide}
            difference = [row["final_loss"] - of_seed[row["seed"]] for row in half if row["seed"] in of_seed]
            usual = len(rivals.SEEDS)
            line += [plus_minus([row["final_loss"] for row in own], 3, usual) for own in (wide, half)]
            line.append(plus_minus(difference, 3, usual))
    lines = [line for line in cells.values() if any(line[1:])]
    return markdown(header, lines) if lines else ""


def three_seeds(rows: Rows, config: Run, name: str) -> Rows:
    choice = best_choice(rows, config, name)
    return rows_at(rows, config, name, choice)[:3] if choice else []


def over_batches(rows: Rows, precision: str) -> dict[str, str]:
    """The transformer at three batches, 120 steps and three seeds each: training loss at the end, and its differences
    to NLCG's seed by seed."""
    middle = dataclasses.replace(rivals.TEXT, precision=precision)
    configs = [rivals.at_batch(middle, batch) for batch in sorted((middle.batch, *rivals.BATCHES))]
    names = tuple(name for name in rivals.OF_BATCHES if best_choice(rows, middle, name))
    ends, differences = ([[LABELS[name]] for name in names] for _ in range(2))
    base = names.index("nlcg")
    for config in configs:
        of_names = [three_seeds(rows, config, name) for name in names]
        for k, own in enumerate(of_names):
            loss = plus_minus([row["final_loss"] for row in own], 3, 3) if own else ""
            ends[k].append(f"{loss} ({own[0]['peak']:g})" if own else "")
            less = [a["final_loss"] - b["final_loss"] for a, b in zip(own, of_names[base], strict=False)]
            differences[k].append(
                f"{plus_minus(less, 3, 3)}, {sum(x > 0 for x in less)} of {len(less)}" if less else ""
            )
    header = [f"{config.batch * 64:,} characters" for config in configs]
    return {
        "Batches": markdown(["", *header], ends),
        "Batches, paired": markdown(
            ["minus NLCG, NLCG lower on", *header], [line for k, line in enumerate(differences) if k != base]
        ),
    }


def tables(rows: Rows) -> dict[str, str]:
    if not rows:
        return {}
    precision = rows[0]["precision"]
    found = {}
    for title, setting in SETTINGS.items():
        config = dataclasses.replace(setting, precision=precision)
        if best_choice(rows, config, "nlcg") is None:
            continue
        found[f"{title}, ranking"] = ranking(rows, config)
        if tuned(config):
            found[f"{title}, beta1"] = by_beta(rows, config)
        found[f"{title}, paired"] = paired(rows, config)
        if matrices := paired(rows, config, MATRICES, "nlcg_muon"):
            found[f"{title}, matrices"] = matrices
        if rules := paired(rows, config, RULES):
            found[f"{title}, rules"] = rules
    if table := without_search(rows):
        found["Matrices"] = table
    if table := state_in_bfloat16(rows):
        found["State in bfloat16"] = table
    if all(f"{title}, ranking" in found for title in SETTINGS):
        found["Settings"] = settings(rows)
    if best_choice(rows, rivals.at_batch(dataclasses.replace(rivals.TEXT, precision=precision), 96), "nlcg"):
        found |= over_batches(rows, precision)
    return found


def picture(rows: Rows, path: Path) -> None:
    """Training loss over steps at the best choices."""
    precision = rows[0]["precision"]
    configs = {title: dataclasses.replace(setting, precision=precision) for title, setting in SETTINGS.items()}
    shown = {title: config for title, config in configs.items() if best_choice(rows, config, "nlcg")}
    figure, axes = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4.2), layout="constrained", squeeze=False)
    kernel = np.ones(4) / 4
    for axis, (title, config) in zip(axes[0], shown.items(), strict=True):
        ends = []
        for name in rivals.NAMES:
            choice = best_choice(rows, config, name)
            if choice is None:
                continue
            own = rows_at(rows, config, name, choice)
            mean = np.mean([np.convolve(row["loss"], kernel, "valid") for row in own], 0)
            width, color = 2.2 if name in ("nlcg", "nlcg_muon") else 1.2, f"C{rivals.NAMES.index(name)}"
            axis.plot(np.arange(4, 4 + len(mean)), mean, label=LABELS[name], lw=width, color=color)
            ends.append(mean[-1])
        axis.set(xlabel="optimizer steps", title=title, ylim=(min(ends) * 0.97, max(ends) * 1.3))
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("training loss, mean over seeds")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
