"""What the READMEs show is in the committed rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import demo
import plots
import step_table
import study
from train import Run

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
README = (ROOT / "README.md").read_text()


def test_the_study() -> None:
    folder = RESULTS / "convergence"
    paper, tuned, cost = (study.read(folder / f"{name}.jsonl") for name in ("paper", "tuned", "cost"))
    tables = plots.tuned_tables(tuned)
    text = (folder / "README.md").read_text()
    for name, table in (tables | plots.paper_tables(paper) | {"Cost": plots.costs(cost)}).items():
        assert table in text, name
    for name in ("Full setting, batch 4096", "Test accuracy, %, by batch"):
        assert tables[name] in README, name
    names = {field.name for field in dataclasses.fields(Run)}
    for rows in (paper, tuned):
        assert all(names <= set(row) for row in rows)
        configurations = [tuple(row[name] for name in sorted(names)) for row in rows]
        assert len(set(configurations)) == len(rows)
    assert {row["schedule"] for row in paper} == {"paper"}
    assert {row["schedule"] for row in tuned} == {"cosine"}


def test_the_step_times() -> None:
    rows = json.loads((RESULTS / "step_cpu.json").read_text())["benchmarks"]
    assert step_table.table(rows) in README


def test_the_demonstration() -> None:
    runs = json.loads((RESULTS / "digits.json").read_text())["runs"]
    best = demo.at_best_peaks(runs)
    assert "\n".join("    " + line for line in demo.table(best).splitlines()) in README
    for name, own in best.items():  # bracketed: the best is not at the edge of its grid
        assert own[0]["peak_lr"] in demo.OPTIMIZERS[name][1][1:-1], name
