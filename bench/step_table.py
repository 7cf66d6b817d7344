"""Step times at a glance, from the rows of ``make bench``: the table and the sentence of docs/costs.md, and a picture.

python bench/step_table.py build/step_cpu.json      prints them; the picture goes next to the rows
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LISTS = {"resnet32": "ResNet-32", "resnet50": "ResNet-50", "flat100M": "100 M flat"}
LABELS = {
    "nlcg_adam": "**NLCG**",
    "nlcg_adam_state16": "NLCG, state in bfloat16",
    "nlcg_adam_pr": "NLCG, Polak-Ribiere",
    "nlcg_fr": "the paper's form, Fletcher-Reeves",
    "nlcg_pr": "the paper's form, Polak-Ribiere",
    "nlcg_fr_gate_closed": "the paper's form, curvature condition never met",
    "nlcg_fr_none": "NLCG, no preconditioner",
    "adamw_fused": "AdamW, fused",
    "sgd_momentum_fused": "SGD with momentum, fused",
    "sgd_momentum_foreach": "SGD with momentum, foreach",
    "rmsprop_foreach": "RMSProp with momentum, foreach",
    "rmsprop_loop": "RMSProp with momentum, loop",
    "nlcg_plain_torch": "the paper's form from torch's operations",
}
CLIPPING = {
    "adamw_fused": "AdamW, fused",
    "adamw_clipped": "AdamW, fused, behind `clip_grad_norm_`",
    "nlcg_adam": "NLCG",
    "nlcg_adam_measured": "NLCG, `max_grad_norm`, a step that is not clipped",
    "nlcg_adam_clipped": "NLCG, `max_grad_norm`, a step that is",
}
PICTURED = ("nlcg_adam", "nlcg_fr_none", "adamw_fused", "sgd_momentum_fused", "rmsprop_foreach", "rmsprop_loop")
RATIOS = ("ratio_to_adamw_fused", "ratio_to_sgd_fused", "ratio_to_rmsprop")


def three_digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def table(rows: list[dict[str, object]]) -> str:
    """Milliseconds and ratios, optimizers by lists of parameters."""
    found = by_list(rows)
    lines = [["one step", *(f"{name}: ms | / AdamW | / SGD | / RMSProp" for name in LISTS.values())]]
    lines.append(["---"] * 13)
    for optimizer, label in LABELS.items():
        of_lists = [found[name, optimizer] for name in LISTS]
        lines.append([label, *(three_digits(row[key]) for row in of_lists for key in ("median_ms", *RATIOS))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def clipping_table(rows: list[dict[str, object]]) -> str:
    """The same with gradient clipping: milliseconds, and relative to AdamW after torch's clipping."""
    found = by_list(rows)
    lines = [["one step", *(f"{name}: ms | / AdamW, clipping" for name in LISTS.values())], ["---"] * 7]
    for optimizer, label in CLIPPING.items():
        of_lists = [found[name, optimizer] for name in LISTS]
        numbers = (three_digits(row[key]) for row in of_lists for key in ("median_ms", "ratio_to_adamw_clipped"))
        lines.append([label, *numbers])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_list(rows: list[dict[str, object]]) -> dict[tuple[str, str], dict[str, object]]:
    return {(row["list"], row["optimizer"]): row for row in rows}


def host_time(rows: list[dict[str, object]]) -> str:
    """Of a step over tensors so small that nothing else counts."""
    found = by_list(rows)
    names = {"nlcg_adam": "NLCG", "nlcg_fr": "the paper's form", "sgd_momentum_fused": "fused SGD with momentum"}
    names |= {"adamw_fused": "fused AdamW", "rmsprop_foreach": "foreach RMSProp"}
    times = (f"{label} {1e3 * found['small100', name]['median_ms']:.0f}" for name, label in names.items())
    return f"100 tensors of 8 elements, microseconds per step: {', '.join(times)}."


def picture(rows: list[dict[str, object]], path: Path) -> None:
    """Bars: time relative to fused AdamW, in the same run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    found, width = by_list(rows), 0.8 / len(PICTURED)
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for k, name in enumerate(PICTURED):
        ratios = [found[of_list, name]["ratio_to_adamw_fused"] for of_list in LISTS]
        places = [x + (k - (len(PICTURED) - 1) / 2) * width for x in range(len(LISTS))]
        color = {"nlcg_adam": "C0", "nlcg_fr_none": "#8fbbd9"}.get(name, f"{0.85 - 0.12 * k:.2f}")
        bars = axis.bar(places, ratios, width, label=LABELS[name].strip("*"), color=color)
        axis.bar_label(bars, fmt="%.1f", fontsize=7)
    axis.axhline(1.0, color="black", lw=0.6)
    sizes = {of_list: found[of_list, "nlcg_adam"] for of_list in LISTS}
    axis.set_xticks(
        range(len(LISTS)),
        [f"{LISTS[x]}\n{row['parameters'] / 1e6:.3g} M in {row['tensors']} tensors" for x, row in sizes.items()],
    )
    axis.set(ylabel="step time / fused AdamW's", title="One optimizer step, one CPU thread (lower is better)")
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(96).save(path, optimize=True)  # a third of the size


if __name__ == "__main__":
    path = Path(sys.argv[1])
    benchmarks = json.loads(path.read_text())["benchmarks"]
    picture(benchmarks, path.with_suffix(".png"))
    print(
        table(benchmarks),
        clipping_table(benchmarks),
        host_time(benchmarks),
        f"Picture: {path.with_suffix('.png')}",
        sep="\n\n",
    )
