"""The study: many runs, a few at a time, one row each; those that have a row already are not run again.

python bench/convergence/study.py --data FOLDER --rows build/study.jsonl --jobs 2
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from train import Run, run

SHARED = ("nlcg_fr", "momentum", "nlcg_pr", "rmsprop", "nlcg_pr_search", "nlcg_fr_none", "nlcg_fr_search", "sgd")


def shared_schedule() -> Iterator[Run]:
    """The paper's comparison: one schedule for all."""
    for seed in range(3):
        for batch in (4096, 16384, 1024):
            for optimizer in SHARED:
                yield Run(optimizer, batch, seed)


STUDIES = {"shared": shared_schedule}


def key(config: Run) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def finished(rows: Path) -> set[str]:
    if not rows.exists():
        return set()
    names = {field.name for field in dataclasses.fields(Run)}
    lines = (json.loads(line) for line in rows.read_text().splitlines())
    return {json.dumps({k: v for k, v in row.items() if k in names}, sort_keys=True) for row in lines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="an image folder, or CIFAR's python files")
    parser.add_argument("--rows", type=Path, required=True, help="where rows are appended, one JSON a line")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a run, as JSON: what the jobs are
    arguments = parser.parse_args()
    if arguments.one:
        row = run(Run(**json.loads(arguments.one)), arguments.data, arguments.device)
        with arguments.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{row['optimizer']:<16} batch {row['batch']:>6} seed {row['seed']} peak {row['peak']:g}: "
            f"{row['final_accuracy']:.1f} %, loss {row['final_loss']:.3f}, {row['seconds'][-1]:.0f} s",
            flush=True,
        )
        return 0
    done = finished(arguments.rows)
    waiting = [config for name in arguments.studies for config in STUDIES[name]() if key(config) not in done]
    command = [sys.executable, __file__, "--data", str(arguments.data), "--rows", str(arguments.rows)]
    command += ["--device", arguments.device]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if arguments.device == "cpu" else None
    running: list[subprocess.Popen[bytes]] = []
    failed = 0
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
