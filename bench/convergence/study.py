"""The study: many runs, a few at a time, one row each; those that have a row already are not run again.

    make study DATA=FOLDER                                            the CPU study, into build/study
    python bench/convergence/study.py --data FOLDER --out build/study --studies grids seeds --jobs 2

Three parts, each with its file of rows: rivals.jsonl, tuned.jsonl, paper.jsonl. In the order in which they are run:

rivals: NLCG beside seven others, tuned alike (rivals.py), in float32

    text, images, rules, batches, full32

tuned: one relative schedule for all (fastnlcg.warmup_cosine), each optimizer at its own best peak, which is that of the
lowest training loss of seed 0 on a grid of factors of 3

    grids        seed 0 over the grids: images of 16 x 16, half of them, at four batches; and the transformer
    seeds        the other seeds at the best peaks of the grids
    full         images of 32 x 32, all of them, batch 4096: seed 0 at the two best peaks of the grid at batch 2048, the
                 other seeds at the better of them
    ablations    the options of NLCG with Adam's diagonal, one at a time
    bfloat16     parameters in bfloat16, with and without stochastic rounding, at the best peaks of the grids

paper: the paper's schedule, absolute, the same for all

    batch4096, batch16384, batch1024    every optimizer, three seeds
    small                               batches 256 and 128
    tried                               safeguards against the noise of small batches: 4096 images, batch 128
    setting                             one seed at batch 4096: plain images, batch normalization over the whole batch,
                                        a network with projections
    more                                two more seeds of those that the claim is about, at batch 4096
    gpu                                 ResNet-32 on all images, 60 epochs: make gpu-study, where there is a GPU
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import rivals
import torch
from train import Run, fast_precision, run

Rows = list[dict[str, object]]
SEEDS = (0, 1, 2)
PAPER = ("nlcg_fr", "nlcg_pr", "momentum", "rmsprop", "nlcg_pr_search", "nlcg_fr_none")
ALSO = ("nlcg_fr_search", "sgd")
CLAIM = ("nlcg_fr", "momentum", "rmsprop", "nlcg_pr")
FEW = (*CLAIM, "nlcg_fr_none")
# Against the noise of small batches: where the numbers are small enough to try many.
TRIED = (
    *("nlcg_fr", "nlcg_fr_none", "momentum", "nlcg_fr_same_batch", "nlcg_fr_mean", "nlcg_fr_damped", "nlcg_fr_cosine"),
    *("nlcg_fr_signal", "nlcg_fr_h_max", "nlcg_fr_rescaled", "nlcg_fr_beta_max"),
    *("nlcg_pr", "nlcg_pr_none"),
)


def shared(batch: int) -> Callable[[Rows], Iterator[Run]]:
    return lambda rows: (
        Run(optimizer, batch, seed) for group in (PAPER, ALSO) for seed in SEEDS for optimizer in group
    )


def small(rows: Rows) -> Iterator[Run]:
    return (Run(optimizer, batch) for batch in (256, 128) for optimizer in FEW)


def tried(rows: Rows) -> Iterator[Run]:
    for seed in SEEDS:
        yield Run("nlcg_fr_same_batch", 4096, seed)
        yield from (Run(name, 128, seed, train_images=4096) for name in TRIED)


def setting(rows: Rows) -> Iterator[Run]:
    plain = {"micro": 4096, "augment": False}
    for change in ({**plain, "model": "resnet8p"}, plain):
        yield from (Run(name, 4096, **change) for name in FEW)
    for change in ({"micro": 4096}, {"augment": False}):
        yield from (Run(name, 4096, **change) for name in ("nlcg_fr", "momentum"))


def more(rows: Rows) -> Iterator[Run]:
    return (Run(name, 4096, seed) for seed in (3, 4) for name in CLAIM)


# ---- tuned -----------------------------------------------------------------------------------------------------------

# Peak learning rates, factors of 3 apart.
GRID = {
    "nlcg_adam": (0.001, 0.003, 0.01, 0.03),
    "adamw": (0.003, 0.01, 0.03, 0.1),
    "adamw_08": (0.003, 0.01, 0.03, 0.1),
    "lamb": (0.01, 0.03, 0.1),
    "nadam": (0.003, 0.01, 0.03),
    "nlcg_fr_none": (0.1, 0.3, 1.0, 3.0),
    "nlcg_fr": (0.3, 1.0, 3.0),
    "momentum": (0.1, 0.3, 1.0, 3.0),
}
# By steps: 24 epochs of half the images at half the side and half the batch are as many steps as at the full setting.
PROXY = {"schedule": "cosine", "side": 16, "train_images": 8192}
BATCHES = (2048, 8192, 512, 128)
ADAPTIVE = ("nlcg_adam", "adamw", "adamw_08", "lamb")
TEXT = {"model": "transformer", "schedule": "cosine", "train_images": 11520, "test_images": 1024, "epochs": 4}
TEXT |= {"batch": 384, "micro": 96}
FULL = ("nlcg_adam", "adamw", "adamw_08", "lamb", "momentum", "nlcg_fr_none")
# Options of NLCG with Adam's diagonal, at its best peak and one lower.
ABLATIONS = (
    "nlcg_adam_08",
    "nlcg_adam_095",
    "nlcg_adam_1",
    "nlcg_adam_pr",
    "nlcg_adam_search",
    "nlcg_adam_constant_80",
)
# Far below the best peak, where most updates are below the resolution of a bfloat16 parameter.
SMALL_STEPS = Run("", 128, peak=0.0003, precision="pure_bfloat16", **PROXY)
# With parameters in bfloat16, and whose best peak each takes.
PURE = {"nlcg_adam": "nlcg_adam", "nlcg_adam_stochastic": "nlcg_adam", "adamw": "adamw"}


def like(rows: Rows, config: Run) -> Rows:
    """Those that differ from ``config`` in optimizer, seed and peak only."""
    free = {"optimizer", "seed", "peak"}
    names = [field.name for field in dataclasses.fields(Run) if field.name not in free]
    return [row for row in rows if all(row[name] == getattr(config, name) for name in names)]


def best_peak(rows: Rows, optimizer: str) -> float | None:
    """By the mean training loss over seeds, so that the test part has no say, of the peaks that were tried with the
    most seeds: the grid has seed 0 alone, and its best gets the others."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        if row["optimizer"] == optimizer and row["final_loss"] == row["final_loss"]:
            losses.setdefault(row["peak"], []).append(row["final_loss"])
    if not losses:
        return None
    most = max(map(len, losses.values()))
    means = {peak: sum(found) / most for peak, found in losses.items() if len(found) == most}
    return min(means, key=lambda peak: means[peak])


def settings_of(precision: str) -> Iterator[tuple[Run, tuple[str, ...]]]:
    """Every setting with a grid, as a run to copy, and the optimizers compared there."""
    for batch in BATCHES:
        names = (
            tuple(GRID) if batch == 2048 else (*ADAPTIVE, "momentum", "nlcg_fr_none") if batch == 8192 else ADAPTIVE[:3]
        )
        yield Run("", batch, precision=precision, **PROXY), names
    yield Run("", precision=precision, **TEXT), ADAPTIVE


def grids(rows: Rows, precision: str) -> Iterator[Run]:
    for config, names in settings_of(precision):
        for name in names:
            yield from (dataclasses.replace(config, optimizer=name, peak=peak) for peak in GRID[name])


def seeds(rows: Rows, precision: str) -> Iterator[Run]:
    for config, names in settings_of(precision):
        for seed in SEEDS[1:]:
            for name in names:
                peak = best_peak(like(rows, config), name)
                if peak is not None:
                    yield dataclasses.replace(config, optimizer=name, peak=peak, seed=seed)


def full(rows: Rows, precision: str) -> Iterator[Run]:
    on_proxy = like(rows, next(settings_of(precision))[0])
    config = Run("", 4096, schedule="cosine", precision=precision)
    for name in FULL:
        tried = [row for row in on_proxy if (row["optimizer"], row["seed"]) == (name, 0)]
        for row in sorted(tried, key=lambda row: row["final_loss"])[:2]:
            yield dataclasses.replace(config, optimizer=name, peak=row["peak"])
    for seed in SEEDS[1:]:
        for name in FULL:
            peak = best_peak(like(rows, config), name)
            if peak is not None:
                yield dataclasses.replace(config, optimizer=name, seed=seed, peak=peak)


def ablations(rows: Rows, precision: str) -> Iterator[Run]:
    config = next(settings_of(precision))[0]
    for name in ABLATIONS:
        yield from (dataclasses.replace(config, optimizer=name, peak=peak) for peak in (0.003, 0.01))


def bfloat16(rows: Rows, precision: str) -> Iterator[Run]:
    for config, _ in settings_of(precision):
        if config.model != "transformer" and config.batch in (2048, 128):
            for seed in SEEDS:
                for name, like_that_of in PURE.items():
                    peak = best_peak(like(rows, config), like_that_of)
                    if peak is not None:
                        changes = {"optimizer": name, "seed": seed, "peak": peak, "precision": "pure_bfloat16"}
                        yield dataclasses.replace(config, **changes)
    for seed in SEEDS:
        yield dataclasses.replace(SMALL_STEPS, optimizer="nlcg_adam", seed=seed, precision=precision)
        for name in ("nlcg_adam", "nlcg_adam_stochastic"):
            yield dataclasses.replace(SMALL_STEPS, optimizer=name, seed=seed)


# ---- the list --------------------------------------------------------------------------------------------------------


def gpu(rows: Rows) -> Iterator[Run]:
    for seed in SEEDS:
        for batch in (4096, 16384, 512):
            for optimizer in PAPER + ALSO:
                yield Run(optimizer, batch, seed, model="resnet32", epochs=60, train_images=None, test_images=None)


TUNED = {"grids": grids, "seeds": seeds, "full": full, "ablations": ablations, "bfloat16": bfloat16}
PAPERS: dict[str, Callable[[Rows], Iterator[Run]]] = {
    "batch4096": shared(4096),
    "batch16384": shared(16384),
    "batch1024": shared(1024),
    "small": small,
    "tried": tried,
    "setting": setting,
    "more": more,
    "gpu": gpu,
}
STUDIES = (*rivals.PARTS, *TUNED, *PAPERS)
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Run) if field.name != "optimizer"}


def key(config: Run) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def read(path: Path) -> Rows:
    """Rows from before there was a choice of something get what was then the only one."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [{**DEFAULTS, **json.loads(line)} for line in lines]


def rows_of(name: str, folder: Path) -> Path:
    part = "rivals" if name in rivals.PARTS else "tuned" if name in TUNED else "paper"
    return folder / f"{part}.jsonl"


def missing(name: str, folder: Path, precision: str) -> list[Run]:
    """The runs of a study that have no row yet, each once."""
    names = [field.name for field in dataclasses.fields(Run)]
    every = read(rows_of(name, folder))
    rows = [row for row in every if row["precision"] == precision]
    done = {json.dumps({k: row[k] for k in names}, sort_keys=True) for row in every}
    tuned = {**TUNED, **rivals.PARTS}
    runs = tuned[name](rows, precision) if name in tuned else PAPERS[name](rows)
    own = ("pure_bfloat16",)  # what no argument chooses
    wanted = dict.fromkeys(
        key(run if run.precision in own else dataclasses.replace(run, precision=precision)) for run in runs
    )
    return [Run(**json.loads(text)) for text in wanted if text not in done]


def one(config: Run, data: Path, device: str) -> dict[str, object]:
    """In a process of the pool, which keeps what the compiler made of the network."""
    if device == "cpu":
        torch.set_num_threads(1)
    return run(config, data, device, compiled=not config.model.startswith("transformer"))


def short(row: dict[str, object]) -> dict[str, object]:
    """Without what only the paper's part shows: rows by the hundred."""
    betas = [epoch["beta"] for epoch in row.pop("diagnostics") if epoch]
    row.pop("h_quantiles")
    return {**row, "beta": betas, "loss": [round(x, 4) for x in row["loss"]]}


def work(name: str, arguments: argparse.Namespace, pool: ProcessPoolExecutor) -> int:
    """Runs what a study wants next until it wants no more; how many failed."""
    failed = 0
    while waiting := missing(name, arguments.out, arguments.precision):
        print(f"{name}: {len(waiting)} runs", flush=True)
        futures = {pool.submit(one, config, arguments.data, arguments.device): config for config in waiting}
        broken = 0
        for future in as_completed(futures):
            c = futures[future]
            what = f"{c.optimizer:<16} batch {c.batch:>6} seed {c.seed} peak {c.peak:g} beta1 {c.beta1:g}"
            try:
                row = future.result()
            except Exception as error:
                broken += 1
                print(f"{what}: {error!r}", flush=True)
                continue
            if name in rivals.PARTS:
                row = short(row)
            with rows_of(name, arguments.out).open("a") as file:
                file.write(json.dumps(row) + "\n")
            result = f"{row['final_accuracy']:.1f} %, loss {row['final_loss']:.3f}, {row['seconds']:.0f} s"
            print(f"{what} decay {c.weight_decay:g}: {result}", flush=True)
        failed += broken
        if broken == len(waiting):
            break
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="an image folder, or CIFAR's python files")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the files of rows, one JSON a line")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of the network's products; by default bfloat16 on a GPU or a processor that has it: half the time",
    )
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=[s for s in STUDIES if s != "gpu"])
    arguments = parser.parse_args()
    arguments.precision = arguments.precision or fast_precision(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        return int(sum([work(name, arguments, pool) for name in arguments.studies]) > 0)


if __name__ == "__main__":
    sys.exit(main())
