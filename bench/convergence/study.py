"""The study: many runs, a few at a time, one row each; a run that has a row is not run again.

    make study DATA=FOLDER                                            the CPU study, into build/study
    python bench/convergence/study.py --data FOLDER --out build/study --studies text rules --jobs 2

Three files of rows. In the order in which they are run:

rivals.jsonl: NLCG and seven others, tuned alike (rivals.py), in float32

    text, images, rules, batches, full32

options.jsonl: NLCG's options, one at a time, and parameters in bfloat16; peaks as an earlier study had found them

    options

paper.jsonl: the paper's schedule, absolute, the same for all

    batch4096, batch16384, batch1024    every optimizer, three seeds
    small                               one seed at batch 256
    setting                             one seed at batch 4096: plain images, batch normalization over the whole batch,
                                        a network with projections
    gpu                                 ResNet-32 on all images, 60 epochs: make gpu-study, on a machine with a GPU
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
ALSO = ("sgd",)
FEW = ("nlcg_fr", "momentum", "rmsprop", "nlcg_pr", "nlcg_fr_none")


def shared(batch: int) -> Callable[[Rows], Iterator[Run]]:
    return lambda rows: (
        Run(optimizer, batch, seed) for group in (PAPER, ALSO) for seed in SEEDS for optimizer in group
    )


def small(rows: Rows) -> Iterator[Run]:
    return (Run(optimizer, 256) for optimizer in FEW)


def setting(rows: Rows) -> Iterator[Run]:
    plain = {"micro": 4096, "augment": False}
    for change in ({**plain, "model": "resnet8p"}, plain):
        yield from (Run(name, 4096, **change) for name in FEW)
    for change in ({"micro": 4096}, {"augment": False}):
        yield from (Run(name, 4096, **change) for name in ("nlcg_fr", "momentum"))


def gpu(rows: Rows) -> Iterator[Run]:
    for seed in SEEDS:
        for batch in (4096, 16384, 512):
            for optimizer in PAPER + ALSO:
                yield Run(optimizer, batch, seed, model="resnet32", epochs=60, train_images=None, test_images=None)


# ---- options ---------------------------------------------------------------------------------------------------------

OF_OPTIONS = Run("", 2048, schedule="cosine", side=16, train_images=8192)  # 96 steps
# The best peaks of seed 0 on a grid of factors of 3.
PEAKS = {2048: {"nlcg": 0.01, "adamw": 0.03}, 128: {"nlcg": 0.003, "adamw": 0.03}}
# One option other than the default: the optimizer, beta1 and the peaks that were run.
ABLATIONS = (
    ("nlcg", 0.8, (0.003, 0.01)),
    ("nlcg", 0.95, (0.003, 0.01)),
    ("nlcg", 1.0, (0.003,)),
    ("nlcg_polak_ribiere", 0.9, (0.01,)),
    ("nlcg_line_search", 0.9, (0.01,)),
    ("nlcg_constant", 0.8, (0.003,)),
)
SMALL_PEAK = 0.0003  # at batch 128: most updates are below the resolution of a bfloat16 parameter


def options(rows: Rows, precision: str) -> Iterator[Run]:
    base = dataclasses.replace(OF_OPTIONS, precision=precision)
    yield from (dataclasses.replace(base, optimizer="nlcg", peak=peak) for peak in (0.001, 0.003, 0.01, 0.03))
    for name, beta1, peaks in ABLATIONS:
        yield from (dataclasses.replace(base, optimizer=name, beta1=beta1, peak=peak) for peak in peaks)
    for seed in SEEDS:
        for batch, peaks in PEAKS.items():
            for name, peak in peaks.items():
                at_best = dataclasses.replace(base, optimizer=name, batch=batch, peak=peak, seed=seed)
                yield from in_both(at_best)
        yield from in_both(dataclasses.replace(base, optimizer="nlcg", batch=128, peak=SMALL_PEAK, seed=seed))


def in_both(config: Run) -> Iterator[Run]:
    """With parameters in float32 and in bfloat16; NLCG also with stochastic rounding."""
    pure = dataclasses.replace(config, precision="pure_bfloat16")
    yield from (config, pure)
    if config.optimizer == "nlcg":
        yield dataclasses.replace(pure, optimizer="nlcg_stochastic")


# ---- the list --------------------------------------------------------------------------------------------------------

RELATIVE = {**rivals.PARTS, "options": options}
PAPERS: dict[str, Callable[[Rows], Iterator[Run]]] = {
    "batch4096": shared(4096),
    "batch16384": shared(16384),
    "batch1024": shared(1024),
    "small": small,
    "setting": setting,
    "gpu": gpu,
}
STUDIES = (*RELATIVE, *PAPERS)
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Run) if field.name != "optimizer"}


def key(config: Run) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def read(path: Path) -> Rows:
    """Rows from before there was a choice of something get what was then the only one."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [{**DEFAULTS, **json.loads(line)} for line in lines]


def rows_of(name: str, folder: Path) -> Path:
    part = "rivals" if name in rivals.PARTS else "options" if name == "options" else "paper"
    return folder / f"{part}.jsonl"


def missing(name: str, folder: Path, precision: str) -> list[Run]:
    """The runs of a study that have no row yet, each once."""
    names = [field.name for field in dataclasses.fields(Run)]
    every = read(rows_of(name, folder))
    rows = [row for row in every if row["precision"] == precision]
    done = {json.dumps({k: row[k] for k in names}, sort_keys=True) for row in every}
    runs = PAPERS[name](rows) if name in PAPERS else RELATIVE[name](rows, precision)
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
            if name in RELATIVE:
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
