"""bench/convergence on images made here: loaders, augmentation, a run, the list of runs, plots."""

from __future__ import annotations

import dataclasses
import json
import pickle
import statistics
from pathlib import Path

import cost
import data
import models
import numpy as np
import plots
import pytest
import study
import torch
from fastnlcg import NLCG
from PIL import Image
from safeguards import SafeguardedNLCG
from train import OPTIMIZERS, Run, run

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
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS[name]([p], 0.1, 0.01)
    p.grad = torch.ones(3)
    optimizer.step()
    assert (p < 1).all()
    if not isinstance(optimizer, SafeguardedNLCG):
        assert optimizer.param_groups[0]["weight_decay"] == 0.01


def test_without_safeguards_it_is_nlcg() -> None:
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(7)]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = NLCG(ours, 0.05, preconditioner="bfgs"), SafeguardedNLCG(theirs, 0.05)
    scales = torch.linspace(0.5, 4.0, 15).view(5, 3), torch.linspace(0.1, 2.0, 7)
    for _ in range(12):
        for ps, optimizer in zip((ours, theirs), optimizers, strict=True):
            for p, scale in zip(ps, scales, strict=True):
                p.grad = scale * p.detach() + 0.1 * torch.sin(3 * p.detach())
            optimizer.step()
        assert optimizers[0].diagnostics().rz == pytest.approx(optimizers[1].rz, rel=1e-4)
        for a, b in zip(ours, theirs, strict=True):  # float32, in another order: 12 steps of a few eps each
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
    assert optimizers[0].diagnostics().updated


GUARDED = {
    "nlcg_fr_damped": lambda h, free: bool((h - 1).abs().sum() < (free - 1).abs().sum()),
    "nlcg_fr_h_max": lambda h, free: h.max() == 10.0 < free.max(),
    "nlcg_fr_rescaled": lambda h, free: abs((1 / h).mean() - 1) < 1e-3 < abs((1 / free).mean() - 1),
    "nlcg_fr_mean": lambda h, free: h.max() < free.max(),
    "nlcg_fr_signal": lambda h, free: h.max() < free.max(),
    "nlcg_fr_cosine": lambda h, free: h.max() < free.max(),
}


@pytest.mark.parametrize("name", GUARDED)
def test_safeguards_hold_h_back_under_noise(name: str) -> None:
    """Gradients of pure noise: the plain update inflates h."""
    found = []
    for optimizer_name in (name, None):
        p = torch.nn.Parameter(torch.zeros(1000))
        optimizer = OPTIMIZERS[optimizer_name]([p], 0.01, 0.0) if optimizer_name else SafeguardedNLCG([p], 0.01)
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            p.grad = torch.randn(1000, generator=generator)
            optimizer.step()
        found.append(optimizer.h)
    assert GUARDED[name](*found), [(float(h.mean()), float(h.max())) for h in found]


def test_y_from_one_batch(folder: Path) -> None:
    """Twice the gradients, another trajectory from the second step on."""
    plain, again = (
        run(Run(name, **SMALL), folder, compiled=False)["loss"] for name in ("nlcg_fr_beta_max", "nlcg_fr_same_batch")
    )
    assert plain[:2] == again[:2]
    assert plain[2] != again[2]


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
    rows = tmp_path / "rows.jsonl"
    everything = study.missing("batch4096", rows, "bfloat16")
    assert len(everything) == len(study.PAPER + study.ALSO) * len(study.SEEDS)
    assert {config.precision for config in everything} == {"bfloat16"}
    rows.write_text(json.dumps({**dataclasses.asdict(everything[0]), "final_loss": 1.0}) + "\n")
    assert study.missing("batch4096", rows, "bfloat16") == everything[1:]
    assert len(study.missing("batch4096", rows, "float32")) == len(everything)
    assert everything[0] not in study.missing("peaks", rows, "bfloat16")
    others = [dataclasses.replace(everything[0], seed=seed) for seed in study.SEEDS[1:]]
    assert study.missing("best", rows, "bfloat16") == others
    better = {"peak": 3.0, "final_loss": 0.1}
    with rows.open("a") as file:  # in another setting: of no account
        for other in ({"augment": False}, {"micro": 4096}, {"model": "resnet8p"}):
            file.write(json.dumps({**dataclasses.asdict(everything[0]), **better, **other}) + "\n")
    assert study.missing("best", rows, "bfloat16") == others


def test_the_best_peak_is_that_of_the_lowest_training_loss() -> None:
    rows = [
        {"optimizer": "sgd", "batch": 4096, "seed": seed, "peak": peak, "final_loss": loss}
        for seed, peak, loss in ((0, 0.1, 2.0), (0, 1.0, 1.5), (0, 3.0, float("nan")), (1, 0.3, 1.0))
    ]
    assert study.best_peak(rows, "sgd") == 1.0
    assert study.best_peak(rows, "momentum") is None


def test_plots_and_tables(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        run(Run(optimizer, seed=seed, peak=peak, **{**SMALL, "batch": batch, "epochs": 3}), folder, compiled=False)
        for optimizer in ("nlcg_fr", "momentum")
        for batch in (16, 32)
        for seed, peak in ((0, 1.0), (1, 1.0), (0, 2.0))
    ]
    rows.append({**rows[0], "seed": 2, "final_loss": float("nan"), "accuracy": [10.0]})
    (tmp_path / "convergence.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "cost.jsonl").write_text(json.dumps(cost.measure("resnet8", "cpu", 1, 4, "float32", compiled=False)))
    monkeypatch.setattr("sys.argv", ["plots.py", str(tmp_path)])
    plots.main()
    for name in ("loss-steps", "loss-seconds", "accuracy-batch", "accuracy-epochs"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    tables = plots.tables(rows)
    accuracy, loss = (tables[name].splitlines() for name in ("Test accuracy, %", "Training loss in the last epoch"))
    assert accuracy[0] == "|  | batch 16 | batch 32 |"
    assert [line.split(" | ")[0] for line in accuracy[2:]] == ["| NLCG-FR", "| Momentum"]
    mean, deviation = (f([row["final_loss"] for row in rows[6:8]]) for f in (statistics.mean, statistics.stdev))
    assert loss[3].split(" | ")[1] == f"{mean:.3f} ± {deviation:.3f} (2)"
    assert "diverged" in loss[2]
    for batch in (16, 32):
        header, _, fr, momentum = tables[f"Test accuracy, %, batch {batch}, over factors on the peak"].splitlines()
        assert header == "|  | 1 | 2 | at its best peak |"
        assert fr.startswith("| NLCG-FR | ")
        at_2 = next(r for r in rows if (r["optimizer"], r["batch"], r["peak"]) == ("momentum", batch, 2.0))
        assert momentum.split(" | ")[2] == f"{at_2['final_accuracy']:.1f}"


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
    tables = plots.tables(rows)
    assert tables["Test accuracy, %"].splitlines()[2:] == ["| Momentum | 30.0 (1) |", "| SGD | 60.0 (1) |"]
    table = tables["Test accuracy, %, batch 4096, by setting"].splitlines()
    assert table[0].split(" | ")[1:] == [
        "resnet8, crops and flips, 256 normalized together",
        "resnet8, plain images, 256 normalized together",
        "resnet8, plain images, 4096 normalized together",
        "resnet8p, crops and flips, 256 normalized together |",
    ]
    assert table[2:] == ["| Momentum | 30.0 (1) | 35.0 (1) | 40.0 (1) | 50.0 (1) |"]


def test_what_the_readmes_show_is_in_the_committed_rows() -> None:
    root = Path(__file__).parent.parent
    folder = root / "bench" / "results" / "convergence"
    rows = study.read(folder / "convergence.jsonl")
    tables = plots.tables(rows)
    text = (folder / "README.md").read_text()
    for table in (*tables.values(), plots.costs(study.read(folder / "cost.jsonl"))):
        assert table in text
    assert tables["Test accuracy, %"] in (root / "README.md").read_text()
    names = {field.name for field in dataclasses.fields(Run)}
    assert all(names <= set(row) for row in rows)
    configurations = [tuple(row[name] for name in sorted(names)) for row in rows]
    assert len(set(configurations)) == len(rows)
