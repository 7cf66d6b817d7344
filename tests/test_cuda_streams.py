"""CUDA graphs, streams and launches that fall back, on a GPU, emulated or not."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from backends import Backend
from fastnlcg import NLCG, OnlineLineSearch, _native, ops
from test_cuda import device_arrays, on_cpu, only_emulated, only_gpu
from test_cuda_optimizer import bits, parameters, set_gradients
from torch import Tensor, nn


def test_captures_and_losses_that_are_refused(gpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    ps = parameters(gpu)
    optimizer = NLCG(ps, 0.1)
    set_gradients(ps)
    monkeypatch.setattr(_native, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="state cannot be made while a CUDA graph is captured"):
        optimizer.step()
    monkeypatch.setattr(_native, "capturing", lambda: False)
    optimizer.step()
    before = bits(optimizer)
    monkeypatch.setattr(_native, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="only with capturable=True"):
        optimizer.step()
    monkeypatch.setattr(_native, "capturing", lambda: False)
    assert bits(optimizer) == before
    for value, error in ((torch.ones(2, device=gpu.device), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="loss"):
            NLCG(ps, 0.1, line_search=OnlineLineSearch()).step(loss=value)
    with pytest.raises(TypeError, match="lr"):
        NLCG(ps, torch.ones((), dtype=torch.int32, device=gpu.device), capturable=True)


@only_gpu
@pytest.mark.parametrize("form", ["one", "separate"])
def test_graph_replay_has_the_bits_of_eager_steps(gpu: Backend, preconditioner: str, form: str) -> None:
    runs = []
    for graphed in (False, True):
        ps = parameters(gpu)
        lr = torch.tensor(0.02, device="cuda")
        optimizer = NLCG(ps, lr, line_search=OnlineLineSearch(), capturable=True, preconditioner=preconditioner)
        loss = torch.zeros((), device="cuda")

        def one_step(
            ps: list[nn.Parameter] = ps, optimizer: NLCG = optimizer, loss: Tensor = loss, lr: Tensor = lr
        ) -> None:
            loss.copy_(set_gradients(ps))
            optimizer.step(loss=loss)
            lr.mul_(0.9)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())  # which made the inputs
        with torch.cuda.stream(side):
            for _ in range(3):
                one_step()
                optimizer._table.native.set_launch(form)
        torch.cuda.current_stream().wait_stream(side)
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                one_step()
            for _ in range(7):
                graph.replay()
            one_step()  # eager again, with other addresses
            graph.replay()
        else:
            for _ in range(9):
                one_step()
        assert optimizer.diagnostics().step == 12
        runs.append(bits(optimizer))
    assert runs[0] == runs[1]


@only_emulated
def test_ops_are_not_captured(gpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph would copy from the host's numbers when they are gone."""
    x = device_arrays(gpu, 100, torch.float32)
    before = on_cpu(x)
    monkeypatch.setenv("FASTNLCG_EMULATE_CAPTURE", "1")
    arrays = x
    with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"):
        ops.direction_update(arrays["d"], arrays["g"], arrays["h"], beta=0.5, p=arrays["p"], alpha=0.1)
    assert all(torch.equal(x[name], t) for name, t in before.items())


@only_gpu
def test_a_step_neither_waits_nor_allocates(gpu: Backend, preconditioner: str) -> None:
    ps = parameters(gpu)
    optimizer = NLCG(
        ps,
        torch.tensor(0.02, device="cuda"),
        line_search=OnlineLineSearch(),
        capturable=True,
        preconditioner=preconditioner,
    )
    losses = []
    for _ in range(3):
        losses.append(set_gradients(ps))
        optimizer.step(loss=losses[-1])
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            optimizer.step(loss=losses[-1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@only_gpu
def test_a_step_runs_on_the_current_stream(gpu: Backend, preconditioner: str) -> None:
    """A step follows what the caller's current stream holds."""
    runs = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        ps = parameters(gpu)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer = NLCG(ps, 0.02, preconditioner=preconditioner)
            for _ in range(5):
                torch.cuda._sleep(1_000_000)
                set_gradients(ps)
                optimizer.step()
            runs.append(bits(optimizer))
    assert runs[0] == runs[1]


@only_emulated
def test_work_on_another_stream_waits_for_the_last(
    gpu: Backend, preconditioner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps at once would count on one barrier, and hang."""
    log = tmp_path / "log"
    monkeypatch.setenv("FASTNLCG_EMULATE_LOG", str(log))
    ps = parameters(gpu)
    optimizer = NLCG(ps, 0.1, preconditioner=preconditioner)
    for stream in (0, 0, 7, 7, 0):
        monkeypatch.setattr(_native, "current_stream", lambda device, *arrays, s=stream: s)
        set_gradients(ps)
        optimizer.step()
    monkeypatch.setattr(_native, "current_stream", lambda device, *arrays: 9)
    optimizer.diagnostics()
    events = [tuple(line.split()) for line in log.read_text().splitlines()]
    expected = [("record", "0"), ("record", "0"), ("wait", "7"), ("record", "7"), ("record", "7"), ("wait", "0")]
    assert events[:7] == [*expected, ("record", "0")]
    assert set(events[7:]) == {("wait", "9")}


@only_emulated
def test_a_stream_handle_that_is_used_again_is_another_stream(
    gpu: Backend, preconditioner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("FASTNLCG_EMULATE_LOG", str(log))
    ps = parameters(gpu)
    optimizer = NLCG(ps, 0.1, preconditioner=preconditioner)
    for generation in (0, 0, 1):
        monkeypatch.setenv("FASTNLCG_EMULATE_STREAM_GENERATION", str(generation))
        set_gradients(ps)
        optimizer.step()
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["record", "record", "wait", "record"]


@only_emulated
def test_waiting_for_a_stream_lets_other_threads_run(
    gpu: Backend, preconditioner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ps = parameters(gpu)
    optimizer = NLCG(ps, 0.1, preconditioner=preconditioner)
    set_gradients(ps)
    optimizer.step()
    monkeypatch.setenv("FASTNLCG_EMULATE_SLOW", "1")
    for wait in (optimizer.diagnostics,):  # state_dict() has references, and waits for nothing
        counted, stop = [0], threading.Event()

        def count(counted: list[int] = counted, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                counted[0] += 1
                time.sleep(0.001)

        thread = threading.Thread(target=count)
        thread.start()
        before = counted[0]
        wait()
        after = counted[0]
        stop.set()
        thread.join()
        assert after - before > 20  # of the 200 ms that a wait takes


@only_emulated
def test_a_cooperative_launch_that_is_too_large_falls_back_for_good(
    gpu: Backend, preconditioner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under MPS, or in a green context."""
    runs = []
    for refused in (False, True):
        ps = parameters(gpu)
        optimizer = NLCG(ps, 0.1, preconditioner=preconditioner)
        launches = []
        for t in range(4):
            set_gradients(ps, 1.0 + t)
            with monkeypatch.context() as inside:
                if refused and t == 1:
                    inside.setenv("FASTNLCG_EMULATE_TOO_LARGE", "1")
                optimizer.step()
            launches.append(optimizer.diagnostics().launches)
        passes = {"adam": 2, "bfgs": 3}[preconditioner]
        assert launches == ([1, passes, passes, passes] if refused else [1] * 4)
        runs.append(bits(optimizer))
    assert runs[0] == runs[1]
