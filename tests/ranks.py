"""Processes that take steps together: gloo on the CPU, started once a session and a size, because importing torch takes
longer than the tests. What uses them is marked as the group "ranks", which pytest-xdist keeps on one worker: two
workers would start them twice, and wait for each other.

    results = ranks(3)(function, *arguments)    # function(*arguments) on every rank; its results, by rank

A function lies at the top of a test module, and its results can be pickled. What raises on a rank is raised here.
"""

from __future__ import annotations

import atexit
import functools
import gc
import multiprocessing
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT = 120.0  # seconds for one function: a rank that waits for another for ever is an error, not a hang


def _serve(rank: int, world: int, rendezvous: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        gc.collect()  # a DDP that is alive when the process group goes sometimes aborts torch 2.13
    dist.destroy_process_group()


class Ranks:
    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        folder = tempfile.mkdtemp()
        rendezvous = os.path.join(folder, "rendezvous")
        atexit.register(self.close, folder)
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, rendezvous, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(1.0 if errors else TIMEOUT):
                errors.append(f"rank {rank}: no answer")
                continue
            good, result = pipe.recv()
            results.append(result)
            if not good:
                errors.append(f"rank {rank}: {result}")
        if errors:
            self.close()  # they may wait for each other: the next test starts afresh
            ranks.cache_clear()
            raise AssertionError("\n".join(errors))
        return results

    def close(self, folder: str | None = None) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def ranks(world: int) -> Ranks:
    return Ranks(world)
