"""Threads, forks, signals and the end of the interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from fastnlcg import NLCG
from quadratic import one_step, parameter


def test_two_optimizers_in_two_threads_have_the_bits_of_one_after_the_other() -> None:
    """Each is large enough for OpenMP."""

    def run(seed: int, out: dict[int, torch.Tensor]) -> None:
        p = parameter(200_000, seed=seed)
        optimizer = NLCG([p], 0.1)
        for _ in range(20):
            one_step([p], optimizer)
        out[seed] = p.detach()

    serial: dict[int, torch.Tensor] = {}
    parallel: dict[int, torch.Tensor] = {}
    for seed in (1, 2):
        run(seed, serial)
    threads = [threading.Thread(target=run, args=(seed, parallel)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(serial[s], parallel[s]) for s in (1, 2))


def test_one_optimizer_in_two_threads_is_refused() -> None:
    p = parameter(20_000_000)
    p.grad = torch.ones_like(p)
    optimizer = NLCG([p], 0.1)
    optimizer.step()
    errors: list[Exception] = []

    def hammer() -> None:
        for _ in range(5):
            try:
                optimizer.step()
            except RuntimeError as error:
                errors.append(error)

    threads = [threading.Thread(target=hammer) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors
    assert all("another thread" in str(error) for error in errors)
    assert optimizer.diagnostics().step == 11 - len(errors)
    optimizer.step()


def test_diagnostics_wait_for_a_step_in_another_thread() -> None:
    p = parameter(5_000_000)
    p.grad = torch.ones_like(p)
    optimizer = NLCG([p], 0.1)
    optimizer.step()
    thread = threading.Thread(target=lambda: [optimizer.step() for _ in range(10)])
    thread.start()
    seen = []
    while thread.is_alive():
        seen.append(optimizer.diagnostics().step)
    thread.join()
    assert seen == sorted(seen)
    assert optimizer.diagnostics().step == 11


def test_bits_do_not_depend_on_torchs_thread_count() -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            p = parameter(100_003)
            optimizer = NLCG([p], 0.1, update="polak_ribiere")
            for _ in range(10):
                one_step([p], optimizer)
            results.append(p.detach().clone())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_a_child_forked_after_a_step_has_the_same_bits() -> None:
    """The child computes on one thread, because libgomp's pool is gone there."""
    code = """
import os, torch
from fastnlcg import NLCG
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.ones(100_000))
p.grad = torch.linspace(-1, 1, 100_000)
optimizer = NLCG([p], 0.1)
optimizer.step()
r, w = os.pipe()
child = os.fork()
optimizer.step()
if child == 0:
    os.write(w, p.detach().numpy().tobytes()[:64])
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert os.read(r, 64) == p.detach().numpy().tobytes()[:64]
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


def test_a_child_forked_while_another_thread_steps() -> None:
    """The child steps, or raises an error that says why it cannot; it never waits for a thread that it lacks."""
    p = parameter(5_000_000)
    p.grad = torch.ones_like(p)
    optimizer = NLCG([p])
    optimizer.step()
    thread = threading.Thread(target=lambda: [optimizer.step() for _ in range(30)])
    thread.start()
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                optimizer.step()
                os._exit(0)
            except RuntimeError as error:  # a step was running, so the child's copy of the state is inconsistent
                os._exit(0 if "another thread" in str(error) else 1)
            finally:
                os._exit(2)
        children.append(pid)
    thread.join()
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0


def test_the_interpreter_exits_with_an_optimizer_alive() -> None:
    code = """
import torch, fastnlcg
p = torch.nn.Parameter(torch.ones(100_000)); p.grad = torch.ones(100_000)
keep = fastnlcg.NLCG([p], 0.1); keep.step()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_an_interrupt_comes_after_a_whole_step() -> None:
    """Ctrl-C during the native step: the step ends, then KeyboardInterrupt is raised."""
    p, twin = parameter(3_000_000), parameter(3_000_000)
    p.grad, twin.grad = torch.ones_like(p), torch.ones_like(p)
    optimizer, undisturbed = NLCG([p]), NLCG([twin])
    optimizer.step()
    version = p._version

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def train() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0005)
        for _ in range(1000):
            optimizer.step()

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            train()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, old)
    steps = optimizer.diagnostics().step
    assert optimizer.state_dict()["state"][0]["step"] == steps
    assert p._version - version >= steps - 1
    for _ in range(steps):
        undisturbed.step()
    assert torch.equal(p, twin)
    optimizer.step()
    assert optimizer.diagnostics().step == steps + 1


def test_diagnostics_in_a_signal_handler_do_not_deadlock() -> None:
    p = parameter(3_000_000)
    p.grad = torch.ones_like(p)
    optimizer = NLCG([p])
    optimizer.step()
    seen: list[object] = []

    def handler(*_: object) -> None:
        try:
            seen.append(optimizer.diagnostics().step)
        except RuntimeError as error:
            seen.append(str(error))
        finally:  # armed again only now: if reading is slow, handlers would nest without end
            signal.setitimer(signal.ITIMER_REAL, 0.001 if len(seen) < 20 else 0.0)

    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    try:
        while len(seen) < 20:
            optimizer.step()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, old)
    assert all(isinstance(x, int) or "inside a step" in x for x in seen)
