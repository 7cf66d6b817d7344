"""What the pages show is in the committed rows; their links, commands and code work."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import demo
import full_batch
import full_batch_plots
import hard
import matrices
import numpy as np
import plots
import pytest
import rival_tables
import step_table
import study
import torch
from full_batch_problems import Problem
from train import Run

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
README = (ROOT / "README.md").read_text()
DEMONSTRATION = (ROOT / "docs" / "study-paper.md").read_text()
COSTS = (ROOT / "docs" / "costs.md").read_text()


def test_the_study() -> None:
    folder = RESULTS / "convergence"
    names = ("rivals", "options", "paper", "cost")
    of_rivals, options, paper, cost = (study.read(folder / f"{name}.jsonl") for name in names)
    pages = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("study-rivals", "study-paper")}
    tables = rival_tables.tables(of_rivals)
    assert tables.pop("Settings") in README
    for name, table in tables.items():
        assert table in pages["study-rivals"], name
    for name, table in plots.paper_tables(paper).items():
        assert table in pages["study-paper"], name
    assert plots.costs(cost) in COSTS
    of_options = plots.option_tables(options)
    assert of_options["Options"] in (ROOT / "docs" / "algorithm.md").read_text()
    assert of_options["Parameters in bfloat16"] in (ROOT / "docs" / "distributed.md").read_text()
    fields = {field.name for field in dataclasses.fields(Run)}
    for rows in (of_rivals, options, paper):
        assert all(fields <= set(row) for row in rows)
        configurations = [tuple(row[name] for name in sorted(fields)) for row in rows]
        assert len(set(configurations)) == len(rows)
    assert {row["schedule"] for row in paper} == {"paper"}
    assert {row["schedule"] for row in of_rivals + options} == {"cosine"}
    assert {row["precision"] for row in of_rivals if row["optimizer"] != "nlcg_all16"} == {"float32"}
    assert not study.missing("options", folder, "bfloat16")


def test_the_step_times() -> None:
    rows = json.loads((RESULTS / "step_cpu.json").read_text())["benchmarks"]
    assert step_table.table(rows) in COSTS
    assert step_table.clipping_table(rows) in COSTS
    assert step_table.host_time(rows) in " ".join(COSTS.split())


def test_the_steps_of_matrices() -> None:
    assert matrices.table(json.loads((RESULTS / "matrices.json").read_text())) in COSTS


def test_the_demonstration() -> None:
    runs = json.loads((RESULTS / "digits.json").read_text())["runs"]
    best = demo.at_best_peaks(runs)
    assert "\n".join("    " + line for line in demo.table(best).splitlines()) in DEMONSTRATION
    for name, own in best.items():  # bracketed: the best is not at the edge of its grid
        assert own[0]["peak_lr"] in demo.OPTIMIZERS[name][1][1:-1], name


def test_full_batch() -> None:
    text = (ROOT / "docs" / "full-batch.md").read_text()
    rows = full_batch.rows(RESULTS / "full_batch")
    for name, table in full_batch_plots.TABLES.items():
        assert table(rows) in text, name
    hessians = full_batch.rows(RESULTS / "full_batch", "hessians.jsonl")
    assert full_batch_plots.scale_table(rows, hessians) in text
    timed = json.loads((RESULTS / "full_batch" / "time.json").read_text())["rows"]
    assert full_batch_plots.time_table(timed) in text
    runs = json.loads((RESULTS / "digits.json").read_text())["full_batch"]
    assert "\n".join("    " + line for line in demo.full_batch_table(runs).splitlines()) in DEMONSTRATION
    keys = [(row["suite"], row["problem"], row["seed"], row["method"]) for row in rows]
    assert len(set(keys)) == len(keys)


def test_hessian_by_differences_and_its_condition() -> None:
    diagonal, x = np.array([1.0, 100.0, 1e6]), np.array([0.3, -0.2, 2.0])
    problem = Problem("", "", x, lambda x: 0.0, lambda x: (0.0, diagonal * np.sin(x)))
    np.testing.assert_allclose(full_batch.hessian(problem, x), np.diag(diagonal * np.cos(x)), rtol=1e-8, atol=1e-12)
    assert full_batch.condition(np.diag([1.0, 100.0, 1e6])) == pytest.approx(1e6)
    assert full_batch.condition(np.diag([-1.0, 1.0])) is None
    assert full_batch.condition(np.ones((2, 2))) is None


def test_what_was_tried_to_break_it() -> None:
    results = json.loads((RESULTS / "hard.json").read_text())
    assert hard.table(results) in (ROOT / "docs" / "reliability.md").read_text()
    assert not [name for name, row in results.items() if "LOST" in row]
    assert set(results) == set(hard.PARTS)
    assert results["mutants"]["caught"] == results["mutants"]["mutants"] == len(hard.MUTANTS)


# ---- pages -----------------------------------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
MAKEFILE = (ROOT / "Makefile").read_text()


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            assert re.match(r"https://(arxiv\.org/abs/\d{4}\.\d{5}|github\.com/[\w./-]+)$", link), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"(?:^    |`)make (\w[\w-]*)", text, flags=re.M):
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.M), target
    for script in re.findall(r"(?:python|torchrun --nproc-per-node=2) ((?:bench|examples|tests)/[\w/]+\.py)", text):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m (fastnlcg[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    for name in re.findall(r"`(?:(?:csrc|cuda|tests|bench|examples|python|docs)/[\w./-]+)`", text):
        assert (ROOT / name.strip("`")).exists(), name


def test_the_code_on_the_front_page_runs() -> None:
    code, full_batch_code = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.arange(32) % 2)
    before = model.weight.detach().clone()
    scope = {
        "model": model,
        "epochs": 2,
        "loader": torch.utils.data.DataLoader(data, batch_size=8),
        "loss_function": torch.nn.functional.cross_entropy,
    }
    exec(code, scope)
    assert scope["optimizer"].diagnostics().step == 8
    assert not torch.equal(model.weight, before)

    def closure() -> torch.Tensor:
        scope["optimizer"].zero_grad()
        loss = ((model.weight - 1) ** 4).sum()
        loss.backward()
        return loss

    bowl = {"fun": lambda x: ((x - 1) ** 2).sum(), "x0": torch.zeros(3)}
    scope |= bowl | {"closure": closure}
    exec(full_batch_code, scope)
    assert scope["result"].success
    assert torch.allclose(model.weight, torch.ones(2, 3), atol=0.05)


def test_the_map_names_every_file() -> None:
    """docs/design.md, and nothing that is not there."""
    design = (ROOT / "docs" / "design.md").read_text()
    for folder in ("csrc", "cuda"):
        for path in (ROOT / folder).iterdir():
            assert path.stem in design, path
    for path in (ROOT / "python" / "fastnlcg").glob("*.py"):
        if path.stem not in ("__init__", "__main__", "line_search", "schedules"):
            assert path.name in design, path
