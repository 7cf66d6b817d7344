"""State in bfloat16: the step against the reference and against float32 state, and what users do with such state."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from backends import Backend
from fastnlcg import NLCG, muon_groups, reference
from fastnlcg.reference import Options
from lockstep import Cut, Lockstep
from test_step import random_cuts, run

ARRAYS = {"grad_prev": "g_prev", "direction": "d", "exp_avg_sq": "diagonal"}
OPTIONS = {
    "default": {},
    "polak_ribiere": {"update": "polak_ribiere"},
    "heavy_ball": {"update": "heavy_ball"},
    "clip": {"max_grad_norm": 20.0, "skip_grad_norm": 1e6},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_lockstep(lockstep_on: Backend, name: str, dtype: str) -> None:
    options = Options(state_dtype="bfloat16", **OPTIONS[name])
    for cuts, shift in ((random_cuts(300, (dtype,)), 0), ([Cut(4097, dtype), Cut(255, dtype)], 3)):
        run(Lockstep(cuts, options, weight_decay=(0.03,), shift=shift))


def small_net(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(30, 70), torch.nn.Tanh(), torch.nn.Linear(70, 17)).to(dtype)


def gradients(net: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def optimizer_of(net: torch.nn.Module, kind: str, **options: object) -> NLCG:
    if kind == "muon":
        return NLCG(muon_groups(net, lr=0.02, weight_decay=0.1), **options)
    more = {"update": "polak_ribiere"} if kind == "polak_ribiere" else {}
    return NLCG(net.parameters(), 0.01, weight_decay=0.1, **more, **options)


def as_bits(x: torch.Tensor) -> bytes:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kind", ["adam", "polak_ribiere", "muon"])
def test_a_step_is_that_of_float32_state_and_a_rounding(cpu_or_emulated: Backend, kind: str) -> None:
    """To the bit: of parameters, and of the state after the reference's stochastic rounding."""
    net = small_net()
    optimizer = optimizer_of(net, kind, state_dtype=torch.bfloat16)
    for t in range(6):
        twin = small_net()
        twin.load_state_dict(net.state_dict())
        other = optimizer_of(twin, kind)
        saved = optimizer.state_dict()
        for group in saved["param_groups"]:
            group["state_dtype"] = None
        if t:
            other.load_state_dict(saved)
        for each in (net, twin):
            gradients(each, t)
        optimizer.step()
        other.step()
        index_of = {id(p): k for k, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            # A matrix moves along a direction that is read back.
            assert kind == "muon" or as_bits(p) == as_bits(q)
            assert set(optimizer.state[p]) == set(other.state[q])
            for key, array in ARRAYS.items():
                if key not in other.state[q]:
                    continue
                exact = other.state[q][key].numpy()
                rounded = reference.rounded_to_bfloat16(exact, step=t, parameter=index_of[id(p)], array=array)
                assert optimizer.state[p][key].dtype == torch.bfloat16
                np.testing.assert_array_equal(optimizer.state[p][key].float().numpy(), rounded)


@pytest.mark.parametrize("n", [3, 1500, 4099])
def test_a_shard_of_columns_has_the_random_bits_of_its_places(lockstep_on: Backend, n: int) -> None:
    """Columns 4 to 6 of ten."""
    options = {"update": "heavy_ball", "beta_max": 0.5}
    half = Lockstep([Cut(n, "float32")], Options(state_dtype="bfloat16", **options), shard=(4, 3, 7))
    single = Lockstep([Cut(n, "float32")], Options(**options))
    for each in (half, single):
        each.noisy_gradients()
        each.run()
    places = np.arange(n)
    places += 4 + places // 3 * 7
    for key, exact in (("d", single.d), ("diagonal", single.diagonal)):
        whole = np.zeros(places[-1] + 1, dtype=np.float32)
        whole[places] = exact
        rounded = reference.rounded_to_bfloat16(whole, step=0, parameter=0, array=key)[places]
        np.testing.assert_array_equal(getattr(half, key), rounded)


def test_rounding_is_right_on_average() -> None:
    """v moves by a thousandth of itself a step, which the nearest bfloat16 never would."""
    p = torch.nn.Parameter(torch.zeros(20_000))
    optimizer = NLCG([p], 1e-3, state_dtype=torch.bfloat16)
    for t in range(300):
        p.grad = torch.full_like(p, 1.0)
        optimizer.step()
        v = float(optimizer.state[p]["exp_avg_sq"].double().mean())
        assert v == pytest.approx(1 - 0.999 ** (t + 1), rel=2e-3)


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_bits_do_not_depend_on_threads_or_interruption(kind: str) -> None:
    runs = []
    for threads, resumes in ((1, False), (2, False), (1, True)):
        net, before = small_net(), torch.get_num_threads()
        optimizer = optimizer_of(net, kind, state_dtype=torch.bfloat16)
        torch.set_num_threads(threads)
        try:
            for t in range(8):
                if resumes and t == 4:
                    file = io.BytesIO()
                    torch.save(optimizer.state_dict(), file)
                    file.seek(0)
                    optimizer = optimizer_of(net, kind)  # the file has the option
                    with pytest.warns(UserWarning, match="changes state_dtype"):
                        optimizer.load_state_dict(torch.load(file, weights_only=True))
                gradients(net, t)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        runs.append([as_bits(p) for p in net.parameters()])
        runs[-1] += [as_bits(optimizer.state[p]["direction"]) for p in net.parameters()]
    assert runs[0] == runs[1] == runs[2]


def test_state_takes_half_of_adamws_bytes() -> None:
    net = small_net()
    optimizer, adamw = optimizer_of(net, "adam", state_dtype=torch.bfloat16), torch.optim.AdamW(net.parameters())
    gradients(net, 0)
    optimizer.step()
    adamw.step()

    def size(state: dict) -> int:
        return sum(x.nbytes for entry in state.values() for key, x in entry.items() if key != "step")

    assert size(optimizer.state) * 2 == size(adamw.state)


def test_a_change_of_the_option_converts_the_state() -> None:
    net = small_net()
    optimizer = optimizer_of(net, "adam")
    for t, wanted in enumerate((None, torch.bfloat16, torch.bfloat16, None)):
        for group in optimizer.param_groups:
            group["state_dtype"] = wanted
        before = {p: optimizer.state[p]["exp_avg_sq"].clone() for p in net.parameters() if p in optimizer.state}
        gradients(net, t)
        optimizer.step()
        for p in net.parameters():
            v = optimizer.state[p]["exp_avg_sq"]
            assert v.dtype == (wanted or torch.float32)
            if before:
                expected = 0.999 * before[p].double() + 0.001 * p.grad.double() ** 2
                torch.testing.assert_close(v.double(), expected, rtol=3 * 2.0**-7, atol=0)


def test_adamws_files_both_ways() -> None:
    net, twin = small_net(), small_net()
    adamw = torch.optim.AdamW(net.parameters(), 1e-3)
    for t in range(3):
        gradients(net, t)
        adamw.step()
    twin.load_state_dict(net.state_dict())
    optimizer = NLCG(twin.parameters(), state_dtype=torch.bfloat16)
    optimizer.load_adamw_state_dict(adamw.state_dict())
    back = optimizer.adamw_state_dict(beta1=0.9)
    for k, p in enumerate(net.parameters()):
        assert optimizer.state[list(twin.parameters())[k]]["direction"].dtype == torch.bfloat16
        for key in ("exp_avg", "exp_avg_sq"):
            assert back["state"][k][key].dtype == torch.float32
            torch.testing.assert_close(back["state"][k][key], adamw.state[p][key], rtol=3 * 2.0**-8, atol=1e-9)


def test_a_skipped_step_changes_nothing() -> None:
    net = small_net()
    optimizer = optimizer_of(net, "adam", state_dtype=torch.bfloat16)
    gradients(net, 0)
    optimizer.step()
    kept = [as_bits(x) for p in net.parameters() for x in (p, *optimizer.state[p].values())]
    gradients(net, 1)
    next(net.parameters()).grad[3, 4] = math.inf
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    assert kept == [as_bits(x) for p in net.parameters() for x in (p, *optimizer.state[p].values())]
    assert optimizer.diagnostics().skipped_steps == 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"state_dtype": torch.float16}, ValueError, "torch.float16"),
        ({"state_dtype": "half"}, ValueError, "half"),
        ({"state_dtype": 16}, TypeError, "16"),
        ({"state_dtype": torch.bfloat16, "preconditioner": "bfgs"}, ValueError, "'bfgs'"),
        ({"state_dtype": torch.bfloat16, "preconditioner": None}, ValueError, "None"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"state_dtype .*{words}"):
        NLCG(small_net().parameters(), **options)


def test_float64_parameters_are_refused() -> None:
    net = small_net(torch.float64)
    optimizer = NLCG(net.parameters(), state_dtype=torch.bfloat16)
    gradients(net, 0)
    before = [as_bits(p) for p in net.parameters()]
    with pytest.raises(ValueError, match=r"parameter 0 .*float64"):
        optimizer.step()
    assert before == [as_bits(p) for p in net.parameters()]
    assert not optimizer.state


def test_groups_share_it() -> None:
    net = small_net()
    with pytest.raises(ValueError, match="state_dtype is"):
        NLCG([{"params": [net[0].weight], "state_dtype": torch.bfloat16}, {"params": [net[2].weight]}])
