"""Whatever happens between two steps, each is the reference's; and what must not matter to the bits does not."""

from __future__ import annotations

import copy
import random
import warnings

import backends
import fuzz
import numpy as np
import pytest
import torch
from fastnlcg import NLCG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from ranks import ranks
from stateful_run import DTYPES, StatefulRun, random_options, stateful_run_on_ranks
from torch import nn

OPTIONS = st.builds(
    lambda picks: random_options(lambda choices: choices[next(picks) % len(choices)]),
    st.lists(st.integers(0, 11), min_size=8, max_size=8).map(iter),
)


class Anything(RuleBasedStateMachine):
    """Hypothesis chooses the operations, and shrinks what fails."""

    @initialize(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES), options=OPTIONS)
    def begin(self, seed: int, dtype: torch.dtype, options: dict[str, object]) -> None:
        self.run = StatefulRun(seed, dtype, options)

    @rule(k=st.sampled_from(range(len(StatefulRun.OPERATIONS))))
    def operation(self, k: int) -> None:
        StatefulRun.OPERATIONS[k](self.run)

    @rule()
    def step(self) -> None:
        self.run.step()


@backends.emulated_is_thorough
@pytest.mark.filterwarnings("ignore:a step was skipped")
def test_any_sequence_of_operations(cpu_or_emulated: backends.Backend) -> None:
    run_state_machine_as_test(
        Anything,
        settings=settings(
            max_examples=300 if cpu_or_emulated.name == "cpu" else 60,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.xdist_group("ranks")  # see ranks.py
@pytest.mark.parametrize("seed", [*range(4), *backends.thorough(*range(4, 12))])  # the same operations in another order
def test_any_sequence_of_operations_on_two_ranks(seed: int) -> None:
    assert ranks(2)(stateful_run_on_ranks, seed, 40) == [40, 40]


# ---- what must not matter --------------------------------------------------------------------------------------------


def trajectory(scale: float, lr: float, preconditioner: str | None, update: str, n: int) -> torch.Tensor:
    rng = np.random.default_rng(n)
    p = nn.Parameter(torch.from_numpy(rng.standard_normal(n)).float())
    curvature = torch.from_numpy(rng.uniform(0.1, 3.0, n)).float()
    optimizer = NLCG([p], lr, preconditioner=preconditioner, update=update, eps=2e-38)
    for _ in range(6):
        p.grad = scale * (curvature * p.detach())
        optimizer.step()
    return p.detach()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    power=st.integers(-20, 20),
    n=st.integers(1, 300),
    preconditioner=st.sampled_from(["adam", None]),
    update=st.sampled_from(["fletcher_reeves", "polak_ribiere"]),
)
def test_scaling_the_loss_changes_no_bit(power: int, n: int, preconditioner: str | None, update: str) -> None:
    """By a power of two: without a preconditioner lr takes it back, Adam's divides it away."""
    scale = 2.0**power
    lr = 0.0625
    scaled = trajectory(scale, lr / scale if preconditioner is None else lr, preconditioner, update, n)
    assert torch.equal(scaled, trajectory(1.0, lr, preconditioner, update, n))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES), options=OPTIONS)
def test_the_order_of_parameters_is_only_a_matter_of_rounding(
    seed: int, dtype: torch.dtype, options: dict[str, object]
) -> None:
    rng = np.random.default_rng(seed)
    start = [torch.from_numpy(rng.standard_normal(int(n))).to(dtype) for n in rng.integers(1, 60, 4)]
    gradients = [[torch.from_numpy(rng.standard_normal(p.numel())).to(dtype) for p in start] for _ in range(3)]
    ends = []
    for order in ([0, 1, 2, 3], list(rng.permutation(4))):
        ps = [nn.Parameter(p.clone()) for p in start]
        optimizer = NLCG([ps[i] for i in order], 0.01, **options)
        for gs in gradients:
            for p, g in zip(ps, gs, strict=True):
                p.grad = g
            optimizer.step()
        ends.append(torch.cat([p.detach().double() for p in ps]))
    tolerance = 1e-7 if dtype == torch.float64 else 1e-3
    assert torch.linalg.vector_norm(ends[0] - ends[1]) <= tolerance * torch.linalg.vector_norm(ends[0])


@pytest.mark.filterwarnings("ignore:a step was skipped")
@pytest.mark.parametrize("seed", range(4))
def test_threads_and_instruction_sets_change_no_bit_of_a_run(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = set()
    for isa in backends._native.instruction_sets():
        for threads in (1, 2):
            monkeypatch.setenv("FASTNLCG_ISA", isa)
            torch.set_num_threads(threads)
            rng = np.random.default_rng(seed)
            options = random_options(lambda choices, rng=rng: choices[rng.integers(len(choices))])
            run = StatefulRun(seed, DTYPES[seed % 2], copy.deepcopy(options), check=False)
            for k in rng.integers(len(StatefulRun.OPERATIONS), size=30):
                StatefulRun.OPERATIONS[k](run)
            ends.add(run.bits())
    torch.set_num_threads(2)
    assert len(ends) == 1


def test_random_input_is_refused_or_stays_in_its_arrays() -> None:
    """A short run of the fuzzer; ``make hard`` has long ones, guided by coverage and under sanitizers."""
    source = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in [*fuzz.CORPUS, *(source.randbytes(80) for _ in range(3000))]:
            fuzz.one_input(data)
