from __future__ import annotations

import re

import backends
import pytest
from fastnlcg import NLCG, _native

# What make test leaves to make test-all: by file, the tests whose name matches. Each takes long, and each path of
# theirs is taken by another test of make test, which the comment names.
THOROUGH = {
    "test_bits.py": "",  # compiles the kernels for itself; test_step.py compares instruction sets
    "test_build.py": "nvcc|openmp",  # configures CMake; make cuda compiles
    # the study's rows are in test_docs.py
    "test_convergence.py": "plots_and_tables|relative_schedule",
    # the emulated exchange is that of the CPU's but for the kernel that decides: one kind of it is left
    "test_distributed.py": "emulated_gpu.(?!adam.)|test_fsdp1|checkpoints|whatever_its_placement|emulated.*bfgs",
    # the optimizer itself is in test_nlcg.py
    "test_examples.py": "trainers|killed|ranks_follow|notebook|large_batch|tensorboard|minimal",
    # emulated trajectories: test_cuda.py and test_step.py compare every step
    "test_nlcg.py": "(60_steps|resume_at_step_10|it_trains).*emulated|digits_at_large_batch",
    "test_properties.py": r"two_ranks.(?![0-3]\])",
    "test_race.py": "",  # ThreadSanitizer builds
    "test_cuda.py": "(same_bits_for_any_form).*(bfgs_pr|none_pr)|without_cooperative",
}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests whose processes take steps together are one group (pytest-xdist): two would wait for each other."""
    for item in items:
        name = item.path.name
        if "ranks" in item.name or name in ("test_distributed.py", "test_examples.py"):
            item.add_marker(pytest.mark.xdist_group("ranks"))
        if name in THOROUGH and re.search(THOROUGH[name], item.name):
            item.add_marker(pytest.mark.thorough)


def pytest_report_header() -> str:
    cuda = "a GPU" if backends.GPU else f"not a GPU ({backends.NO_GPU})"
    emulation = "the emulation of CUDA" if backends.EMULATION else f"not the emulation ({backends.NO_EMULATION})"
    return f"fastnlcg on: {', '.join(_native.instruction_sets())}; {emulation}; {cuda}"


@pytest.fixture(params=backends.parameters(*backends.all_names()))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> backends.Backend:
    """Every instruction set this processor has, the emulated GPU, a GPU: one after another."""
    return backends.use(request.param, monkeypatch)


@pytest.fixture(params=backends.parameters(backends.NARROWEST, "emulated", "cuda"))
def lockstep_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> backends.Backend:
    """What is compared with the reference. The wider instruction sets are held to the narrowest's bits
    (test_step.py, test_same_bits_however_it_is_run), for every dtype."""
    return backends.use(request.param, monkeypatch)


@pytest.fixture(params=_native.instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set this processor has."""
    return backends.use(request.param, monkeypatch).name


@pytest.fixture(params=backends.parameters(*_native.instruction_sets(), "emulated"))
def on_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> backends.Backend:
    """Those whose memory is the CPU's."""
    return backends.use(request.param, monkeypatch)


@pytest.fixture(params=["adam", "bfgs"])
def preconditioner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What NLCG takes where a test names none."""
    monkeypatch.setitem(NLCG.__init__.__kwdefaults__, "preconditioner", request.param)
    return request.param


@pytest.fixture(params=backends.parameters("cpu", "emulated"))
def cpu_or_emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> backends.Backend:
    return backends.use(request.param, monkeypatch)


@pytest.fixture(params=backends.parameters("emulated", "cuda"))
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> backends.Backend:
    """The CUDA path, emulated or not."""
    return backends.use(request.param, monkeypatch)
