"""bench/convergence on images made here: loaders, augmentation, a run, the list of runs, plots."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import statistics
from pathlib import Path

import cost
import data
import models
import numpy as np
import plots
import pytest
import rival_tables
import rivals
import study
import text
import torch
from fastnlcg import NLCG
from optimizers import OPTIMIZERS, with_averages
from PIL import Image
from train import Run, run
from variants import RULES, VariantNLCG

RNG = np.random.default_rng(0)
SMALL = {"batch": 32, "micro": 16, "epochs": 2, "train_images": 64, "test_images": 20}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes, bright and dark, as an image folder."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    for part, count in (("train", 40), ("test", 10)):
        for name, low in (("bright", 128), ("dark", 0)):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for k in range(count):
                pixels = RNG.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{k:03}.png")
    return tmp_path / "images"


def test_image_folder(folder: Path) -> None:
    for _ in range(2):  # read, and from the cache
        images = data.load(folder)
        assert images.train_x.shape == (80, 3, 32, 32)
        assert images.train_x.dtype == torch.uint8
        assert images.classes == 2
        bright = images.train_x.float().mean((1, 2, 3)) > 128
        assert torch.equal(bright, images.train_y == 0)
    z = images.normalized(images.train_x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    part = data.load(folder, 30, 8)
    assert (len(part.train_y), len(part.test_y)) == (30, 8)
    assert torch.equal(part.train_x, data.load(folder, 30, 8).train_x)
    with pytest.raises(ValueError, match="81 images of 80"):
        data.load(folder, 81)


@pytest.mark.parametrize("classes", [10, 100])
def test_the_published_python_files(classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    root, label = tmp_path / "cifar", b"fine_labels" if classes == 100 else b"labels"
    root.mkdir()
    files = ["train", "test"] if classes == 100 else [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    pixels = {file: RNG.integers(0, 256, (20, 3072), dtype=np.uint8) for file in files}
    for file in files:
        content = {
            b"data": pixels[file],
            label: list(range(classes - 20, classes)) if classes == 100 else [*range(10)] * 2,
        }
        (root / file).write_bytes(pickle.dumps(content))
    images = data.load(root)
    assert images.classes == classes
    assert len(images.train_y) == 20 * (len(files) - 1)
    assert torch.equal(images.test_x[3], torch.from_numpy(pixels[files[-1]][3].reshape(3, 32, 32)))


def test_augmentation_is_a_crop_of_the_padded_image_flipped_or_not(folder: Path) -> None:
    images = data.load(folder)
    x = images.train_x[:40]
    y = images.augmented(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    seen = set()
    for before, after in zip(padded, y, strict=True):
        crops = {
            (top, left, flip): (
                before[:, top : top + 32, left : left + 32].flip(2)
                if flip
                else before[:, top : top + 32, left : left + 32]
            )
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
        }
        (found,) = [key for key, crop in crops.items() if torch.equal(crop, after)]
        seen.add(found)
    assert len(seen) > 20
    assert {flip for *_, flip in seen} == {False, True}


def test_models() -> None:
    assert models.count(models.make("resnet32", 10)) == 464_154  # 0.46 M, table 6 of He et al.
    for name, parameters in (("resnet8", 75_290), ("resnet8p", 75_290 + 16 * 32 + 32 * 64 + 2 * (32 + 64))):
        assert models.count(models.make(name, 10)) == parameters
        assert models.make(name, 10)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="depth"):
        models.make("resnet9", 10)


@pytest.mark.parametrize("optimizer", ["nlcg_fr", "nlcg_pr_search", "momentum", "rmsprop"])
def test_a_run_learns_and_its_row_repeats_it(optimizer: str, folder: Path) -> None:
    config = Run(optimizer, seed=1, peak=3.0, **SMALL)
    row = json.loads(json.dumps(run(config, folder, compiled=False)))
    assert row["steps"] == 4
    assert row["final_loss"] < row["loss"][0]
    assert len(row["accuracy"]) == 2
    for of_epoch, h in zip(row["diagnostics"], row["h_quantiles"], strict=True):
        assert (set(of_epoch) >= {"beta", "updated", "ys"} and len(h) == 5) or not optimizer.startswith("nlcg")
    again = Run(**{field.name: row[field.name] for field in dataclasses.fields(Run)})
    assert again == config
    assert run(again, folder, compiled=False)["loss"] == row["loss"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_can_be_made(name: str) -> None:
    """And moves every element."""
    net = torch.nn.ModuleDict({"inside": torch.nn.Conv2d(3, 4, 3), "head": torch.nn.Linear(4, 2)})
    net.to(memory_format=torch.channels_last)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = OPTIMIZERS[name](net, 0.1, 0.0, 0.9)
    for _ in range(2):  # SOAP's first step is its preconditioner's
        optimizer.zero_grad()
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all((p != x).all() for p, x in zip(net.parameters(), before, strict=True))
    if not isinstance(optimizer, VariantNLCG):
        groups = OPTIMIZERS[name](net, 0.1, 0.01, 0.9).param_groups
        decays = {
            group["weight_decay"] for group in groups if group.get("preconditioner") != "adam" or "muon" not in name
        }
        assert decays == {0.01}  # muon_groups gives the rest ten times the decay at a tenth of the rate
        assert sum(len(group["params"]) for group in groups) == 4


@pytest.mark.parametrize("beta1", [0.8, 0.95])
def test_beta1_is_what_it_says(beta1: float) -> None:
    net = torch.nn.Linear(3, 2)
    for name, key in {"nlcg": "beta_max", "nlcg_constant": "beta_max", "momentum": "momentum"}.items():
        assert OPTIMIZERS[name](net, 0.1, 0.0, beta1).param_groups[0][key] == beta1
    for name in ("adamw", "nadamw", "lamb", "soap", "schedule_free"):
        assert OPTIMIZERS[name](net, 0.1, 0.0, beta1).param_groups[0]["betas"][0] == beta1
    assert OPTIMIZERS["muon"](net, 0.1, 0.0, beta1).param_groups[0]["momentum"] == beta1


def test_nadamw_looks_ahead_by_beta1() -> None:
    """m_hat of the second step: beta1 m + (1 - beta1) g, bias corrected a step ahead (Dahl et al., algorithm 9)."""
    net = torch.nn.Linear(1, 1, bias=False)
    optimizer = OPTIMIZERS["nadamw"](net, 0.1, 0.0, 0.9)
    p, m, v = net.weight.item(), 0.0, 0.0
    for k, g in enumerate((1.0, -0.5), 1):
        net.weight.grad = torch.full((1, 1), g)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        ahead = 0.9 * m / (1 - 0.9 ** (k + 1)) + 0.1 * g / (1 - 0.9**k)
        p -= 0.1 * ahead / ((v / (1 - 0.999**k)) ** 0.5 + 1e-8)
    assert net.weight.item() == pytest.approx(p, rel=1e-5)


def test_schedule_free_is_evaluated_at_its_averages(folder: Path) -> None:
    row = run(Run("schedule_free", peak=0.01, schedule="cosine", **SMALL), folder, compiled=False)
    assert row["final_loss"] < row["loss"][0]
    net = torch.nn.Linear(2, 1)
    optimizer = OPTIMIZERS["schedule_free"](net, 0.1, 0.0, 0.9)
    for _ in range(2):
        net.weight.grad = torch.ones(1, 2)
        optimizer.step()
    seen = []
    training = net.weight.detach().clone()
    with_averages(optimizer, lambda: seen.append(net.weight.detach().clone()))
    assert not torch.equal(seen[0], training)
    torch.testing.assert_close(net.weight.detach(), training)


@pytest.mark.parametrize("rule", RULES)
def test_rules_for_beta(rule: str) -> None:
    """Fletcher-Reeves' is fastnlcg's step; the others leave its preconditioner and bounds, and differ in beta."""
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(7)]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = NLCG(ours, 0.05), VariantNLCG(theirs, 0.05, rule)
    differs = False
    for _ in range(12):
        for ps, optimizer in zip((ours, theirs), optimizers, strict=True):
            for p in ps:
                p.grad = p.detach() + 0.5 * torch.sin(3 * p.detach())
            optimizer.step()
        assert all(0.0 <= beta <= 0.9 for beta in optimizers[1].betas)
        differs |= optimizers[0].diagnostics().beta != pytest.approx(optimizers[1].betas[0], rel=1e-4)
    assert differs == (rule != "fletcher_reeves")
    if not differs:
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
    with pytest.raises(ValueError, match="rule must be one of"):
        VariantNLCG(theirs, 0.05, "best")


def test_micro_batches_are_averaged(folder: Path) -> None:
    """One step: where batch normalization sees all of both batches, the loss before it is the same."""
    losses = [run(Run("sgd", **{**SMALL, "micro": micro}), folder, compiled=False)["loss"][0] for micro in (32, 64)]
    assert losses[0] == losses[1]
    halves = run(Run("sgd", **SMALL), folder, compiled=False)["loss"][0]
    assert halves == pytest.approx(losses[0], rel=0.2)


def test_without_augmentation_images_come_as_they_are(folder: Path) -> None:
    images = data.load(folder)
    generator = torch.Generator().manual_seed(0)
    (batch,) = images.epoch(80, 80, generator, augment=False)
    ((x, y),) = batch
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, images.normalized(images.train_x[order]))
    assert torch.equal(y, images.train_y[order])
    plain, drawn = (
        run(Run("sgd", **SMALL, augment=augment), folder, compiled=False)["loss"][0] for augment in (False, True)
    )
    assert plain != drawn
    with pytest.raises(ValueError, match="augment=False"):
        next(data.ImageNet.epoch(None, 4, 4, generator, augment=False))


def test_a_run_that_diverges_ends(folder: Path) -> None:
    row = run(Run("sgd", peak=1e30, **{**SMALL, "epochs": 5}), folder, compiled=False)
    assert len(row["accuracy"]) < 5


def test_only_missing_runs_are_run(tmp_path: Path) -> None:
    rows = tmp_path / "paper.jsonl"
    everything = study.missing("batch4096", tmp_path, "bfloat16")
    assert len(everything) == len(study.PAPER + study.ALSO) * len(study.SEEDS)
    assert {config.precision for config in everything} == {"bfloat16"}
    rows.write_text(json.dumps({**dataclasses.asdict(everything[0]), "final_loss": 1.0}) + "\n")
    assert study.missing("batch4096", tmp_path, "bfloat16") == everything[1:]
    assert len(study.missing("batch4096", tmp_path, "float32")) == len(everything)


def test_rivals_are_tuned_alike(tmp_path: Path) -> None:
    """Run what is asked for until nothing is: each ends with five seeds at the best choice, bracketed by two."""
    best = {"nlcg": (0.003, 0.7, 0.0), "adamw": (0.1, 0.95, 0.1), "muon": (0.0003, 0.9, 0.0)}

    def loss(config: Run) -> float:
        peak, beta1, decay = best.get(config.optimizer, (0.03, 0.9, 0.0))
        return abs(math.log(config.peak / peak)) + abs(config.beta1 - beta1) + abs(config.weight_decay - decay) / 10

    rounds = 0
    while asked := study.missing("text", tmp_path, "float32"):
        rounds += 1
        assert rounds < 16
        assert len({study.key(config) for config in asked}) == len(asked)
        with (tmp_path / "rivals.jsonl").open("a") as file:
            for config in asked:
                end = loss(config) + 0.01 * config.seed
                row = {**dataclasses.asdict(config), "final_loss": end, "final_accuracy": 50.0}
                row |= {"loss": [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, end], "test_loss": [9.0, end + 1]}
                file.write(json.dumps(row) + "\n")
    rows = study.read(tmp_path / "rivals.jsonl")
    for name in rivals.NAMES:
        choice = best.get(name, (0.03, 0.9, 0.0))
        assert rivals.chosen(rows, rivals.TEXT, name) == choice
        losses = rivals.Losses(rows, rivals.TEXT, name)
        assert set(losses.found[choice]) == set(rivals.SEEDS)
        assert all(losses.mean(c, 2) is not None for c in rivals.neighbours((*choice[:2], 0.0)))
        k = rivals.BETAS.index(choice[1])
        assert {c[1] for c in losses.found} >= set(rivals.BETAS[k - 1 : k + 2])
    assert rivals.chosen(rows[:50], rivals.TEXT, "nlcg") is None
    tables = rival_tables.tables(rows)
    ranked = [line.strip("| ").split(" | ") for line in tables["Transformer, ranking"].splitlines()[2:]]
    assert len(ranked) == len(rivals.NAMES)
    (nlcg,) = [line for line in ranked if line[0] == "NLCG"]
    assert nlcg == [
        "NLCG",
        "0.003",
        "0.7",
        "0",
        "1.020 ± 0.016",
        "0.020 ± 0.016",
        "0.030",
        f"{math.log(3 / 1.7):+.2f}",
        f"{math.log(5.5 / 3):+.2f}",
    ]
    of_adamw = [line for line in tables["Transformer, paired"].splitlines() if line.startswith("| AdamW")]
    assert of_adamw == ["| AdamW | 0.1 | 0.000 ± 0.000 | 0.000 ± 0.000 | 0 of 5 |"]
    rival_tables.picture(rows, tmp_path / "rivals.png")
    with Image.open(tmp_path / "rivals.png") as image:
        assert image.size[0] > 400
    assert study.missing("images", tmp_path, "float32")
    assert not study.missing("full32", tmp_path, "float32")  # not before the images
    for part in ("rules", "batches"):
        asked = study.missing(part, tmp_path, "float32")
        assert {(config.peak, config.beta1) for config in asked if config.optimizer.startswith("nlcg")} <= {
            (0.003, 0.7),
            (0.03, 0.9),
        }
        assert {config.epochs * config.train_images // config.batch for config in asked} == {120}


@pytest.mark.thorough  # trains; test_a_run_learns_and_its_row_repeats_it trains on the other schedule
@pytest.mark.parametrize("model", ["resnet8", "transformer"])
def test_a_run_on_the_relative_schedule(model: str, folder: Path) -> None:
    config = Run("nlcg", peak=0.01, schedule="cosine", model=model, side=16, **SMALL)
    row = json.loads(json.dumps(run(config, folder, compiled=False)))
    assert row["peak_lr"] == 0.01
    assert len(row["test_loss"]) == 2
    assert row["final_loss"] < row["loss"][0]
    again = Run(**{field.name: row[field.name] for field in dataclasses.fields(Run)})
    assert run(again, folder, compiled=False)["loss"] == row["loss"]


def test_images_are_averaged_down(folder: Path) -> None:
    whole, half = data.load(folder), data.load(folder, side=16)
    assert half.train_x.shape == (80, 3, 16, 16)
    mean = whole.train_x.float().reshape(80, 3, 16, 2, 16, 2).mean((3, 5))
    assert (half.train_x.float() - mean).abs().max() <= 0.5
    assert half.augmented(half.train_x, torch.Generator().manual_seed(0)).shape == half.train_x.shape


def test_text() -> None:
    corpus = text.Text(96, 20)
    assert len(corpus) == 96
    batches = list(corpus.epoch(32, 16, torch.Generator().manual_seed(0)))
    assert len(batches) == 3
    for x, y in batches[0]:
        assert x.shape == y.shape == (16, text.LENGTH)
        assert torch.equal(x[:, 1:], y[:, :-1])  # y is one on
        assert int(x.max()) < corpus.classes
    xs = torch.cat([x for x, _ in corpus.test()])
    assert xs.shape == (20, text.LENGTH)
    assert len(corpus.validation) > 10_000
    assert len(corpus.train) > 5 * len(corpus.validation)
    logits = models.make("transformer", corpus.classes)(xs)
    assert logits.shape == (20, corpus.classes, text.LENGTH)
    # causal: what comes later changes nothing
    changed = xs.clone()
    changed[:, 40:] = 1
    net = models.make("transformer", corpus.classes).eval()
    torch.testing.assert_close(net(xs)[:, :, :40], net(changed)[:, :, :40])


@pytest.mark.thorough  # draws every plot; test_docs.py reads the study's rows
def test_plots_and_tables(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        run(Run(optimizer, seed=seed, **{**SMALL, "batch": batch, "epochs": 3}), folder, compiled=False)
        for optimizer in ("nlcg_fr", "momentum")
        for batch in (16, 32)
        for seed in (0, 1)
    ]
    rows.append({**rows[0], "seed": 2, "final_loss": float("nan"), "accuracy": [10.0]})
    (tmp_path / "paper.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "cost.jsonl").write_text(json.dumps(cost.measure("resnet8", "cpu", 1, 4, "float32", compiled=False)))
    monkeypatch.setattr("sys.argv", ["plots.py", str(tmp_path)])
    plots.main()
    for name in ("loss-steps", "loss-seconds", "accuracy-batch", "accuracy-epochs"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    tables = plots.paper_tables(rows)
    accuracy, loss = (tables[name].splitlines() for name in ("Test accuracy, %", "Training loss in the last epoch"))
    assert accuracy[0] == "|  | batch 16 | batch 32 |"
    assert [line.split(" | ")[0] for line in accuracy[2:]] == ["| NLCG-FR", "| Momentum"]
    mean, deviation = (f([row["final_loss"] for row in rows[4:6]]) for f in (statistics.mean, statistics.stdev))
    assert loss[3].split(" | ")[1] == f"{mean:.3f} ± {deviation:.3f} (2)"
    assert "diverged" in loss[2]


def test_the_options_of_one_optimizer_at_a_time(tmp_path: Path) -> None:
    """Every run that the tables show, made up: a table has the mean of all seeds at the peak that is best by seed 0."""
    rows = [
        {**dataclasses.asdict(config), "final_loss": 1 + config.peak + config.seed / 10, "final_accuracy": 50.0}
        for config in study.missing("options", tmp_path, "float32")
    ]
    tables = plots.option_tables(rows)
    _, _, first, second, *_ = tables["Options"].splitlines()
    assert first == "| NLCG | **1.001** | 1.003 | 1.010 | 1.030 | 1.001 (1) | 50.0 (1) |"
    assert second.startswith("| beta at most 0.8 |  | **1.003** | 1.010 |  |")
    lines = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1:]
        for line in tables["Parameters in bfloat16"].splitlines()
    }
    at_best = ["1.110 ± 0.100", "50.0 ± 0.0", "1.103 ± 0.100", "50.0 ± 0.0", "1.100 ± 0.100", "50.0 ± 0.0 |"]
    assert lines["NLCG, float32 parameters"] == lines["NLCG, bfloat16 parameters, stochastic rounding"] == at_best
    assert lines["AdamW, float32 parameters"] == ["1.130 ± 0.100", "50.0 ± 0.0"] * 2 + ["", " |"]


def test_settings_are_compared_at_equal_schedule() -> None:
    usual = {
        **dataclasses.asdict(Run("momentum", 4096)),
        "final_accuracy": 30.0,
        "final_loss": 2.0,
        "h_quantiles": [[]],
    }
    rows = [
        usual,
        {**usual, "final_accuracy": 90.0, "peak": 0.1},
        {**usual, "final_accuracy": 91.0, "epochs": 60},
        {**usual, "final_accuracy": 35.0, "augment": False},
        {**usual, "final_accuracy": 40.0, "micro": 4096, "augment": False},
        {**usual, "final_accuracy": 50.0, "model": "resnet8p"},
        {**usual, "final_accuracy": 60.0, "optimizer": "sgd"},
    ]
    tables = plots.paper_tables([{"schedule": "paper", **row} for row in rows])
    assert tables["Test accuracy, %"].splitlines()[2:] == ["| Momentum | 30.0 (1) |", "| SGD | 60.0 (1) |"]
    table = tables["Test accuracy, %, batch 4096, by setting"].splitlines()
    assert table[0].split(" | ")[1:] == [
        "resnet8, crops and flips, 256 normalized together",
        "resnet8, plain images, 256 normalized together",
        "resnet8, plain images, 4096 normalized together",
        "resnet8p, crops and flips, 256 normalized together |",
    ]
    assert table[2:] == ["| Momentum | 30.0 (1) | 35.0 (1) | 40.0 (1) | 50.0 (1) |"]
