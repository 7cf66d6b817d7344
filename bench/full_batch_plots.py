"""Tables and pictures of the full-batch comparison, from its rows."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
# In the pictures; methods without a color are only in the tables.
COLORS = {
    "CGDescent": "C3",
    "CGDescent, 5 pairs": "#d98880",
    "CGDescent, no rotation": "#f5b041",
    "CGDescent, no pairs": "C1",
    "CGDescent, no pairs, no preconditioner": "C8",
    "dense SSBroyden": "k",
    "dense SSBFGS": "",
    "dense BFGS": "C6",
    "SciPy BFGS": "",
    "optimistix BFGS": "",
    "L-BFGS 10": "C0",
    "L-BFGS 100": "C9",
    "SciPy L-BFGS-B": "C2",
    "SciPy CG": "C7",
    "pytorch-minimize L-BFGS 100": "",
    "pytorch-minimize CG": "C4",
    "ncg-optimizer": "C5",
}
METHODS = tuple(COLORS)


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _grouped(rows: list[Row], suites: tuple[str, ...]) -> dict[str, dict[str, list[Row]]]:
    """By problem, then by method."""
    found: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["suite"] in suites:
            found[row["problem"]][row["method"]].append(row)
    return found


def _methods(grouped: dict[str, dict[str, list[Row]]]) -> list[str]:
    """Those that ran on any of the problems."""
    return [method for method in METHODS if any(by_method[method] for by_method in grouped.values())]


def _markdown(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


def _spread(values: list[float], most: int) -> str:
    """Geometric mean, least and largest; of how many seeds, if not all have run."""
    if len(values) == 1:
        return f"{values[0]:.1e}" + ("" if most == 1 else " (1 seed)")
    seeds = "" if len(values) == most else f"; {len(values)} seeds"
    return f"{geometric_mean(values):.1e} ({min(values):.1e} to {max(values):.1e}{seeds})"


def pinn_table(rows: list[Row], suite: str = "pinn") -> str:
    """Geometric mean over the seeds of the loss at the end of the budget; least and largest; the number of seeds, if
    not all have run, and then no mean over the problems."""
    body = []
    grouped = _grouped(rows, (suite,))
    most = max(len(some) for by_method in grouped.values() for some in by_method.values())
    for method in _methods(grouped):
        line = [method]
        everything = []
        for problem in grouped:
            losses = [row["loss"] for row in grouped[problem][method]]
            everything += losses
            line.append(_spread(losses, most) if losses else "")
        line.append(f"{geometric_mean(everything):.1e}" if len(everything) == most * len(grouped) else "")
        body.append(line)
    return _markdown(["", *grouped, "all"], body)


def cost_table(rows: list[Row]) -> str:
    """Geometric mean over the seeds of the cost of solving a problem; if not every seed was solved, how many, and the
    loss that was reached."""
    body = []
    grouped = _grouped(rows, ("learn", "inverse"))
    methods = _methods(grouped)
    for problem, by_method in grouped.items():
        line = [problem, str(next(iter(by_method.values()))[0]["n"])]
        for method in methods:
            some = by_method[method]
            solved = [row for row in some if row["ended"] == "solved"]
            if not some:
                line.append("")
            elif len(solved) == len(some):
                line.append(f"{geometric_mean([row['cost'] for row in some]):.0f}")
            else:
                line.append(f"{len(solved)}/{len(some)}, {geometric_mean([row['loss'] for row in some]):.1e}")
        body.append(line)
    return _markdown(["", "n", *methods], body)


def network_table(rows: list[Row]) -> str:
    """Another equation and larger networks: the loss and the error of the solution over the seeds, and how many were
    solved within the budget."""
    body = []
    grouped = _grouped(rows, ("networks",))
    most = max(len(some) for by_method in grouped.values() for some in by_method.values())
    for problem, by_method in grouped.items():
        for method in _methods(grouped):
            if some := by_method[method]:
                cells = [_spread([row[key] for row in some], most) for key in ("loss", "error")]
                solved = sum(row["ended"] == "solved" for row in some)
                body.append([problem, method, *cells, f"{solved} of {len(some)}"])
    return _markdown(["", "method", "loss", "error", "solved"], body)


def _profile(rows: list[Row], methods: list[str], suite: str) -> dict[str, list[float]]:
    """By method: each problem's evaluations over the best method's; infinite if it was not solved."""
    grouped = _grouped(rows, (suite,))
    ratios: dict[str, list[float]] = {method: [] for method in methods}
    for by_method in grouped.values():
        took = {
            method: by_method[method][0]["cost"] if by_method[method] and by_method[method][0]["ended"] == "solved"
            else math.inf
            for method in methods
        }  # fmt: skip
        best = min(took.values())
        for method in methods:
            ratios[method].append(took[method] / best if best < math.inf else math.inf)
    return ratios


def cutest_methods(rows: list[Row], suite: str = "cutest") -> list[str]:
    """Those that ran on every problem."""
    grouped = _grouped(rows, (suite,))
    return [m for m in METHODS if grouped and all(by_method[m] for by_method in grouped.values())]


def cutest_table(rows: list[Row], suite: str = "cutest") -> str:
    methods = cutest_methods(rows, suite)
    ratios = _profile(rows, methods, suite)
    problems = len(ratios[methods[0]])
    body = []
    for method in methods:
        r = ratios[method]
        body.append(
            [
                method,
                f"{sum(x < math.inf for x in r)} of {problems}",
                str(sum(x <= 1.0 for x in r)),
                str(sum(x <= 2.0 for x in r)),
            ]
        )
    return _markdown(["", "solved", "fewest evaluations", "at most twice the fewest"], body)


def scale_table(rows: list[Row], hessians: list[Row]) -> str:
    """Evaluations over CGDescent's, by what scaling the diagonal of the Hessian to 1 does to its condition number:
    geometric means over the problems that both solved, and how many CGDescent solved and the other did not."""
    base, *methods = cutest_methods(rows)
    grouped = _grouped(rows, ("cutest",))
    gains = {
        row["problem"]: row["condition"] / row["scaled"] if row["condition"] and row["scaled"] else math.nan
        for row in hessians
    }
    kinds = {
        "lower by more than 1,000": [p for p, gain in gains.items() if gain > 1000],
        "lower by 10 to 1,000": [p for p, gain in gains.items() if 10 < gain <= 1000],
        "lower by less than 10, or higher": [p for p, gain in gains.items() if gain <= 10],
        "unknown: singular or not convex there": [p for p, gain in gains.items() if math.isnan(gain)],
    }
    body = []
    for what, problems in kinds.items():
        line = [what, str(len(problems))]
        for method in methods:
            ratios, alone = [], 0
            for problem in problems:
                ours, theirs = (grouped[problem][m][0] for m in (base, method))
                if ours["ended"] == theirs["ended"] == "solved":
                    ratios.append(theirs["cost"] / ours["cost"])
                alone += ours["ended"] == "solved" != theirs["ended"]
            line.append((f"{geometric_mean(ratios):.2f}" if ratios else "") + (f" (alone: {alone})" if alone else ""))
        body.append(line)
    return _markdown(["condition number, once scaled", "problems", *(f"{m} / {base}" for m in methods)], body)


def time_table(timed: list[Row]) -> str:
    """Median milliseconds of an iteration outside the closure, and the ratio to L-BFGS."""
    by = {(row["n"], row["optimizer"]): row for row in timed}
    names = list(dict.fromkeys(row["optimizer"] for row in timed))
    body = []
    kinds = (
        (10_000, "10,000 in 6 tensors"), (8_577, "8,577 of a network"), (5_000_000, "5 million in 50"),
    )  # fmt: skip
    for n, what in kinds:
        if (n, names[0]) in by:
            ms = [by[n, name]["ms"] for name in names]
            body.append([what, *(f"{x:.3g}" for x in ms), *(f"{ms[0] / x:.3f}" for x in ms[1:])])
    body.append(
        ["vectors of state", *(f"{by[5_000_000, name]['vectors']:.0f}" for name in names), *[""] * (len(names) - 1)]
    )
    return _markdown(["float32, one thread", *(f"{n}, ms" for n in names), *(f"/ {n}" for n in names[1:])], body)


TABLES = {
    "pinn": pinn_table,
    "single": functools.partial(pinn_table, suite="single"),
    "networks": network_table,
    "cost": cost_table,
    "cutest": cutest_table,
    "large": functools.partial(cutest_table, suite="large"),
}


def _save(figure: Any, path: Path) -> None:
    from PIL import Image

    figure.savefig(path, dpi=130)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the size, and less


def plot(rows: list[Row], hessians: list[Row], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grouped = _grouped(rows, ("pinn",))
    figure, axes = plt.subplots(1, len(grouped), figsize=(4 * len(grouped) + 1.6, 3.4), constrained_layout=True)
    for axis, (problem, by_method) in zip(axes, grouped.items(), strict=True):
        for method in METHODS:
            some = by_method[method]
            if not some or not COLORS[method]:
                continue
            marks = sorted({int(k) for row in some for k in row["marks"]} | {int(row["cost"]) for row in some[:1]})
            x, y = [], []
            for mark in marks:
                values = [row["marks"].get(str(mark), row["loss"]) for row in some]
                x.append(mark)
                y.append(geometric_mean(values))
            axis.loglog(x, y, color=COLORS[method], label=method, marker="o", markersize=3)
        axis.set_title(problem)
        axis.set_xlabel("evaluations (the loss alone: 1/2)")
    axes[0].set_ylabel("loss, geometric mean of the seeds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    _save(figure, out / "pinn.png")

    sizes = {"cutest": "about 50 variables", "large": "500 to 123,200 variables"}
    figure, axes = plt.subplots(1, len(sizes), figsize=(9, 3.4), sharey=True, constrained_layout=True)
    for axis, (suite, size) in zip(axes, sizes.items(), strict=True):
        for method, ratios in _profile(rows, cutest_methods(rows, suite), suite).items():
            r = np.sort(ratios)
            share = np.arange(1, r.size + 1) / r.size
            finite = r < math.inf
            axis.step([*r[finite], 64], [*share[finite], share[finite][-1]], where="post", color=COLORS[method],
                      label=method)  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xlim(1, 64)
        axis.set_xlabel("evaluations, over the best method's")
        axis.set_title(size)
    axes[0].set_ylabel("share of problems solved")
    axes[0].legend(fontsize=7, loc="lower right")
    _save(figure, out / "cutest.png")
    for name, table in TABLES.items():
        print(f"\n{name}\n\n{table(rows)}")
    if hessians:
        print(f"\nscale\n\n{scale_table(rows, hessians)}")
