"""The README's table of step times, from the rows of ``make bench``.

python bench/step_table.py build/step_cpu.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LISTS = {"resnet32": "ResNet-32", "resnet50": "ResNet-50", "flat100M": "100 M flat"}
LABELS = {
    "nlcg_adam": "**NLCG**",
    "nlcg_adam_pr": "**NLCG, Polak-Ribiere**",
    "nlcg_fr": "the paper's form, Fletcher-Reeves",
    "nlcg_pr": "the paper's form, Polak-Ribiere",
    "nlcg_fr_gate_closed": "the paper's form, curvature gate closed",
    "nlcg_fr_none": "NLCG, no preconditioner",
    "adamw_fused": "AdamW, fused",
    "sgd_momentum_fused": "SGD with momentum, fused",
    "sgd_momentum_foreach": "SGD with momentum, foreach",
    "rmsprop_foreach": "RMSProp with momentum, foreach",
    "rmsprop_loop": "RMSProp with momentum, loop",
    "nlcg_plain_torch": "the paper's form from torch's operations",
}
RATIOS = ("ratio_to_adamw_fused", "ratio_to_sgd_fused", "ratio_to_rmsprop")


def three_digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def table(rows: list[dict[str, object]]) -> str:
    """Milliseconds and ratios, optimizers by lists of parameters."""
    found = {(row["list"], row["optimizer"]): row for row in rows}
    lines = [["one step", *(f"{name}: ms | / AdamW | / SGD | / RMSProp" for name in LISTS.values())]]
    lines.append(["---"] * 13)
    for optimizer, label in LABELS.items():
        of_lists = [found[name, optimizer] for name in LISTS]
        lines.append([label, *(three_digits(row[key]) for row in of_lists for key in ("median_ms", *RATIOS))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())["benchmarks"]))
