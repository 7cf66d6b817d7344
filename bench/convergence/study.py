"""The study: many runs, a few at a time, one row each; those that have a row already are not run again.

    make study DATA=FOLDER                                         the CPU study, into build/study
    python bench/convergence/study.py --data FOLDER --rows FILE --studies batch4096 peaks --jobs 2

The studies, in the order in which they are run (so that what is cut off is the least needed):

    batch4096, batch16384, batch1024    every optimizer on the paper's schedule, three seeds
    peaks                               one seed at other peaks, at batch 4096
    best                                the other seeds at each optimizer's best peak: that of the lowest training loss
    peaks16384                          one seed at lower peaks, at batch 16384; AdamW beside those of the claim
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
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from train import Run, fast_precision, run

Rows = list[dict[str, object]]
SEEDS = (0, 1, 2)
PAPER = ("nlcg_fr", "nlcg_pr", "momentum", "rmsprop", "nlcg_pr_search", "nlcg_fr_none")
ALSO = ("nlcg_fr_search", "sgd")
# Factors on the paper's peak. Those that scale their own steps live three decades lower.
GRID = {
    **dict.fromkeys(("nlcg_fr", "nlcg_pr", "nlcg_fr_none", "momentum", "rmsprop", "sgd"), (0.1, 0.3, 1.0, 3.0)),
    "lars": (1.0, 3.0, 10.0, 30.0),
    **dict.fromkeys(("lamb", "adamw"), (0.001, 0.003, 0.01, 0.03)),
}
CLAIM = ("nlcg_fr", "momentum", "rmsprop", "nlcg_pr")
FEW = (*CLAIM, "nlcg_fr_none")
# Against the noise of small batches: where the numbers are small enough to try many.
TRIED = (
    *("nlcg_fr", "nlcg_fr_none", "momentum", "nlcg_fr_same_batch", "nlcg_fr_mean", "nlcg_fr_damped", "nlcg_fr_cosine"),
    *("nlcg_fr_signal", "nlcg_fr_h_max", "nlcg_fr_rescaled", "nlcg_fr_beta_max", "nlcg_fr_descent", "nlcg_fr_powell"),
    *("nlcg_pr", "nlcg_pr_powell", "nlcg_pr_none"),
)


def shared(batch: int) -> Callable[[Rows], Iterator[Run]]:
    return lambda rows: (
        Run(optimizer, batch, seed) for group in (PAPER, ALSO) for seed in SEEDS for optimizer in group
    )


def peaks(rows: Rows) -> Iterator[Run]:
    for k in range(4):
        for optimizer, factors in GRID.items():
            yield Run(optimizer, 4096, peak=factors[k])


def best_peak(rows: Rows, optimizer: str, batch: int = 4096) -> float | None:
    """Of the seed 0 rows; by training loss, so that the test images have no say."""
    found = [r for r in rows if (r["optimizer"], r["batch"], r["seed"]) == (optimizer, batch, 0)]
    finite = [r for r in found if r["final_loss"] == r["final_loss"]]
    return min(finite, key=lambda r: r["final_loss"])["peak"] if finite else None


def best(rows: Rows) -> Iterator[Run]:
    usual = [row for row in rows if all(row[name] == getattr(Run, name) for name in ("model", "micro", "augment"))]
    for seed in SEEDS[1:]:
        for optimizer in GRID:
            peak = best_peak(usual, optimizer)
            if peak is not None:
                yield Run(optimizer, 4096, seed, peak)


def peaks16384(rows: Rows) -> Iterator[Run]:
    yield from (Run(name, 16384, peak=peak) for peak in (0.3, 0.1, 0.03) for name in FEW)
    yield from (Run("adamw", 16384, peak=peak) for peak in (0.001, 0.0003))


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


def gpu(rows: Rows) -> Iterator[Run]:
    for seed in SEEDS:
        for batch in (4096, 16384, 512):
            for optimizer in PAPER + ALSO:
                yield Run(optimizer, batch, seed, model="resnet32", epochs=60, train_images=None, test_images=None)


STUDIES: dict[str, Callable[[Rows], Iterator[Run]]] = {
    "batch4096": shared(4096),
    "batch16384": shared(16384),
    "batch1024": shared(1024),
    "peaks": peaks,
    "best": best,
    "peaks16384": peaks16384,
    "small": small,
    "tried": tried,
    "setting": setting,
    "more": more,
    "gpu": gpu,
}


def key(config: Run) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def missing(name: str, path: Path, precision: str) -> list[Run]:
    """The runs of a study that have no row yet, each once."""
    names = [field.name for field in dataclasses.fields(Run)]
    rows = [row for row in read(path) if row["precision"] == precision]
    done = {json.dumps({k: row[k] for k in names}, sort_keys=True) for row in rows}
    wanted = dict.fromkeys(key(dataclasses.replace(run, precision=precision)) for run in STUDIES[name](rows))
    return [Run(**json.loads(text)) for text in wanted if text not in done]


def one(config: Run, arguments: argparse.Namespace) -> None:
    row = run(config, arguments.data, arguments.device)
    with arguments.rows.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(
        f"{config.optimizer:<16} batch {config.batch:>6} seed {config.seed} peak {config.peak:g}: "
        f"{row['final_accuracy']:.1f} %, loss {row['final_loss']:.3f}, {row['seconds']:.0f} s",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="an image folder, or CIFAR's python files")
    parser.add_argument("--rows", type=Path, required=True, help="where rows are appended, one JSON a line")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of the network's products; by default bfloat16 on a GPU or a processor that has it: half the time",
    )
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=[s for s in STUDIES if s != "gpu"])
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a run, as JSON: what the jobs are
    arguments = parser.parse_args()
    arguments.precision = arguments.precision or fast_precision(arguments.device)
    if arguments.one:
        one(Run(**json.loads(arguments.one)), arguments)
        return 0
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--data", str(arguments.data), "--rows", str(arguments.rows)]
    command += ["--device", arguments.device]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if arguments.device == "cpu" else None
    failed = 0
    for name in arguments.studies:
        waiting, running = missing(name, arguments.rows, arguments.precision), []
        print(f"{name}: {len(waiting)} runs", flush=True)
        while waiting or running:
            while waiting and len(running) < arguments.jobs:
                running.append(subprocess.Popen([*command, "--one", key(waiting.pop(0))], env=environment))
            os.wait()
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                failed += process.returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
