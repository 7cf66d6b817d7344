"""State, parameters and ranks that others touch: what is moved, shared, off-loaded, copied, reordered or wrapped
between two steps is followed, as by torch's own optimizers; and numbers at the ends of their range."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fastnlcg import NLCG, OnlineLineSearch, _native, reference
from fastnlcg.options import Options
from fastnlcg.tensors import groups
from torch import Tensor, nn

SHAPES = [(5,), (3, 4), (70,), (2, 3, 4), (1,)]
KINDS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adam_pr": {"update": "polak_ribiere", "line_search": OnlineLineSearch()},
    "bfgs": {"preconditioner": "bfgs", "line_search": OnlineLineSearch()},
    "none": {"preconditioner": None},
}
pytestmark = pytest.mark.usefixtures("cpu_or_emulated")


def make(kind: str, *, n_groups: int = 2) -> tuple[list[nn.Parameter], NLCG]:
    generator = torch.Generator().manual_seed(3)
    ps = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    cut = [{"params": ps[k::n_groups], "lr": 0.02 * (k + 1)} for k in range(n_groups)]
    return ps, NLCG(cut, **KINDS[kind])


def step(ps: list[nn.Parameter], optimizer: Any, t: int, *, without: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(100 + t)
    for i, p in enumerate(ps):
        noise = 0.3 * torch.randn(p.shape, generator=generator)
        p.grad = None if i in without else (0.5 + i) * p.detach() + noise
    optimizer.step(loss=1.0 + 0.1 * (t % 3))


def bits(ps: list[nn.Parameter]) -> bytes:
    return b"".join(p.detach().contiguous().numpy().tobytes() for p in ps)


def state_tensors(optimizer: NLCG) -> list[tuple[dict[str, Tensor], str]]:
    return [(entry, key) for entry in optimizer.state.values() for key in entry]


# ---- state whose memory moves under the same object, or that is another object ---------------------------------------


def through_a_queue(ps: list[nn.Parameter], optimizer: NLCG) -> None:
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    queue.put(optimizer.state_dict())  # moves every tensor to shared memory, in place
    torch.multiprocessing.reductions.shared_cache.clear()


def share(ps: list[nn.Parameter], optimizer: NLCG) -> None:
    for entry, key in state_tensors(optimizer):
        entry[key].share_memory_()
    for group in optimizer.param_groups:
        group["scalars"].share_memory_()
        group["alpha_prev"].share_memory_()
    ps[1].data.share_memory_()


def set_data(ps: list[nn.Parameter], optimizer: NLCG) -> None:
    for entry, key in state_tensors(optimizer):
        away = entry[key].clone()  # off-loaded, and back
        entry[key].data = torch.empty(0, dtype=away.dtype)
        entry[key].data = away.clone()
    for p in ps:
        p.data = p.data.clone()


def swap(ps: list[nn.Parameter], optimizer: NLCG) -> None:
    for entry, key in state_tensors(optimizer):
        other = entry[key].clone()
        torch.utils.swap_tensors(entry[key], other)
        other.fill_(77.0)


def resize_and_back(ps: list[nn.Parameter], optimizer: NLCG) -> None:
    for entry, key in state_tensors(optimizer):
        kept, storage = entry[key].clone(), entry[key].untyped_storage()
        if storage.is_shared() or not storage.resizable():
            continue  # torch 2.13 crashes by itself, or refuses
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        entry[key].copy_(kept)


def set_(ps: list[nn.Parameter], optimizer: NLCG) -> None:
    for entry, key in state_tensors(optimizer):
        entry[key].set_(entry[key].clone())


def replace_objects(ps: list[nn.Parameter], optimizer: NLCG) -> None:
    for p, entry in list(optimizer.state.items()):
        optimizer.state[p] = {key: value.clone() for key, value in entry.items()}
    for group in optimizer.param_groups:
        group["alpha_prev"] = group["alpha_prev"].clone()
        group["scalars"] = group["scalars"].clone()  # no longer shared by the groups


def other_dtypes(ps: list[nn.Parameter], optimizer: NLCG) -> None:
    for entry, key in state_tensors(optimizer):
        entry[key] = entry[key].double()  # exact, and back at the next step


def another_mapping(ps: list[nn.Parameter], optimizer: NLCG) -> None:
    optimizer.state = OrderedDict(reversed(list(optimizer.state.items())))


def negative_bit(ps: list[nn.Parameter], optimizer: NLCG) -> None:
    for entry, key in state_tensors(optimizer):
        entry[key].data = torch._neg_view(-entry[key])
    ps[0].data = torch._neg_view(-ps[0].data)


MOVES: dict[str, Callable[[list[nn.Parameter], NLCG], None]] = {
    f.__name__: f
    for f in (
        *(through_a_queue, share, set_data, swap, resize_and_back, set_, replace_objects, other_dtypes),
        *(another_mapping, negative_bit),
    )
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", KINDS)
def test_state_that_moves_is_followed_to_the_bit(kind: str, move: str) -> None:
    ps, optimizer = make(kind)
    qs, calm = make(kind)
    for t in range(9):
        if t in (3, 6):
            MOVES[move](ps, optimizer)
        step(ps, optimizer, t)
        step(qs, calm, t)
    assert bits([nn.Parameter(p.detach().resolve_neg()) for p in ps]) == bits(qs)
    assert optimizer.diagnostics().step == calm.diagnostics().step == 9
    for p, q in zip(ps, qs, strict=True):
        for key, value in calm.state[q].items():
            assert torch.equal(optimizer.state[p][key].to(value.dtype), value), key


def test_what_tensors_hold_is_what_counts() -> None:
    """An edit in place is seen at once, wherever the memory lies."""
    ps, optimizer = make("none", n_groups=1)
    step(ps, optimizer, 0)
    share(ps, optimizer)
    for entry in optimizer.state.values():
        entry["direction"].fill_(3.0)
    optimizer.param_groups[0]["scalars"][list(_native.SCALARS).index("rz")] = 1e30  # beta is then 0
    before = [p.detach().clone() for p in ps]
    step(ps, optimizer, 1)
    for p, q in zip(ps, before, strict=True):
        torch.testing.assert_close(p.detach(), q - 0.02 * p.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_one_parameters_state_saves_its_own_bytes(kind: str) -> None:
    ps = [nn.Parameter(torch.zeros(100_000)), nn.Parameter(torch.zeros(128))]
    optimizer = NLCG(ps, 0.1, **KINDS[kind])
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict()["state"][1], file)
    assert file.tell() < 8_000


def test_a_mapping_in_the_place_of_the_state_is_taken() -> None:
    ps, optimizer = make("none", n_groups=1)
    for t in range(3):
        step(ps, optimizer, t)
    assert optimizer.diagnostics().beta > 0.0
    optimizer.state = type(optimizer.state)(dict)  # starts again
    step(ps, optimizer, 3)
    assert optimizer.diagnostics().beta == 0.0
    assert all(optimizer.state[p]["step"] == 1 for p in ps)
    del optimizer.param_groups[0]["alpha_prev"]
    step(ps, optimizer, 4)


def test_storage_that_was_freed_is_refused() -> None:
    ps, optimizer = make("adam")
    step(ps, optimizer, 0)
    kept = optimizer.state[ps[2]]["direction"].clone()
    optimizer.state[ps[2]]["direction"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="state 'direction' of parameter 1 has 280 bytes less"):
        step(ps, optimizer, 1)
    optimizer.state[ps[2]]["direction"].untyped_storage().resize_(280)
    optimizer.state[ps[2]]["direction"].copy_(kept)
    size = ps[2].untyped_storage().nbytes()
    values = ps[2].detach().clone()
    ps[2].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="parameter 1 .* has 280 bytes less of storage"):
        optimizer.step(loss=1.0)
    ps[2].untyped_storage().resize_(size)
    ps[2].data.copy_(values)
    step(ps, optimizer, 1)


def test_state_in_one_place_is_refused() -> None:
    ps, optimizer = make("adam")
    step(ps, optimizer, 0)
    a, b = optimizer.state[ps[0]], optimizer.state[ps[2]]
    a["direction"] = b["direction"][:5]
    with pytest.raises(ValueError, match="state of parameter 0 and state of parameter 1 share memory"):
        step(ps, optimizer, 1)


def test_state_in_one_place_is_refused_though_diagnostics_came_first() -> None:
    ps, optimizer = make("adam")
    step(ps, optimizer, 0)
    a, b = optimizer.state[ps[0]], optimizer.state[ps[2]]
    a["direction"].data = b["direction"].data[:5]
    optimizer.diagnostics()
    before = bits(ps)
    for _ in range(2):  # nor is it taken the second time
        with pytest.raises(ValueError, match="state of parameter 0 and state of parameter 1 share memory"):
            step(ps, optimizer, 1)
    assert bits(ps) == before


# ---- copies and wrappers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_shallow_copy_stepped_in_turns_is_one_optimizer(kind: str) -> None:
    ps, optimizer = make(kind)
    qs, calm = make(kind)
    step(ps, optimizer, 0)
    step(qs, calm, 0)
    twin = copy.copy(optimizer)
    for t in range(1, 8):
        step(ps, (optimizer, twin)[t % 2], t)
        step(qs, calm, t)
    assert bits(ps) == bits(qs)
    assert twin.diagnostics().step == optimizer.diagnostics().step == 8


class Wrapper(torch.optim.Optimizer):
    """Shares ``state`` and ``param_groups``, as SAM's does, and saves them itself."""

    def __init__(self, inner: NLCG) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self.param_groups, self.state = inner.param_groups, inner.state

    def step(self, closure: Any = None, **keywords: Any) -> Any:
        return self.inner.step(closure, **keywords)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.inner.param_groups, self.inner.state = self.param_groups, self.state


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapper_that_saves_shared_state_resumes_to_the_bit(kind: str) -> None:
    ps, inner = make(kind)
    wrapper = Wrapper(inner)
    for t in range(4):
        step(ps, wrapper, t)
    file = io.BytesIO()
    torch.save((wrapper.state_dict(), [p.detach() for p in ps]), file)
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    qs, other = make(kind)
    again = Wrapper(other)
    for q, weight in zip(qs, weights, strict=True):
        q.data.copy_(weight)
    again.load_state_dict(saved)
    for t in range(4, 9):
        step(ps, wrapper, t)
        step(qs, again, t)
    assert bits(ps) == bits(qs)


@pytest.mark.parametrize("kind", KINDS)
def test_pickled_and_in_a_spawned_process(kind: str) -> None:
    ps, optimizer = make(kind)
    for t in range(3):
        step(ps, optimizer, t)
    qs, other = pickle.loads(pickle.dumps((ps, optimizer)))
    file = io.BytesIO()
    torch.save((ps, optimizer), file)  # what a spawned process is given moves the state to shared memory on the way
    torch.multiprocessing.reductions.reduce_storage(optimizer.state[ps[0]]["direction"].untyped_storage())
    for t in range(3, 6):
        step(ps, optimizer, t)
        step(qs, other, t)
    assert bits(ps) == bits(qs)


def test_keys_of_others_stay() -> None:
    ps, optimizer = make("adam")
    optimizer.state[ps[0]]["slow"] = torch.ones(5)
    step(ps, optimizer, 0)
    optimizer.state[ps[1]]["z"] = torch.full((3, 4), 2.0)
    optimizer.state["hook"] = 7
    step(ps, optimizer, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(ps, optimizer, 2)
    assert torch.equal(optimizer.state[ps[0]]["slow"], torch.ones(5))
    assert torch.equal(optimizer.state[ps[1]]["z"], torch.full((3, 4), 2.0))
    assert optimizer.state["hook"] == 7
    assert optimizer.diagnostics().step == 3


def test_the_scalars_are_true_whenever_they_are_seen() -> None:
    ps, optimizer = make("bfgs")
    seen = optimizer.param_groups[1]["scalars"]
    for t in range(4):
        step(ps, optimizer, t)
        assert groups.named_scalars({"scalars": seen})["step"] == t + 1
        assert seen is optimizer.param_groups[0]["scalars"] is optimizer.state_dict()["param_groups"][1]["scalars"]


def test_state_without_scalars_is_refused() -> None:
    ps, optimizer = make("adam")
    step(ps, optimizer, 0)
    for remove in (("scalars",), ("alpha_prev",), ("scalars", "alpha_prev")):
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            for key in remove:
                del group[key]
        with pytest.raises(ValueError, match="missing"):
            optimizer.load_state_dict(saved)


def test_loading_under_another_default_device() -> None:
    ps, optimizer = make("adam")
    step(ps, optimizer, 0)
    qs, other = make("adam")
    with torch.device("meta"):
        other.load_state_dict(optimizer.state_dict())
    assert all(t.device.type == "cpu" for entry in other.state.values() for t in entry.values())
    step(qs, other, 1)


def test_loading_while_another_thread_steps() -> None:
    import threading

    ps, optimizer = make("adam", n_groups=1)
    big = nn.Parameter(torch.ones(200_000))
    optimizer.add_param_group({"params": [big]})
    ps.append(big)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    saved, errors = copy.deepcopy(optimizer.state_dict()), []

    def steps() -> None:
        try:
            for _ in range(60):
                optimizer.step(loss=1.0)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=steps)
    thread.start()
    while thread.is_alive():
        optimizer.load_state_dict(saved)
    thread.join()
    assert not errors


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_groups_in_another_order_go_on(kind: str) -> None:
    """Up to the order of the sums."""
    ps, optimizer = make(kind)
    qs, calm = make(kind)
    for t in range(8):
        if t == 4:
            optimizer.param_groups.reverse()
        step(ps, optimizer, t)
        step(qs, calm, t)
        assert optimizer.diagnostics().beta == pytest.approx(calm.diagnostics().beta, rel=1e-5, abs=1e-9)
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_deleted_replaced_and_added_again(kind: str) -> None:
    ps, optimizer = make(kind)
    for t in range(3):
        step(ps, optimizer, t)
    gone = optimizer.param_groups.pop(0)
    left = optimizer.param_groups[0]["params"]
    untouched = bits(gone["params"])
    step(left, optimizer, 3)
    assert optimizer.diagnostics().beta == 0.0
    assert bits(gone["params"]) == untouched
    step(left, optimizer, 4)
    optimizer.param_groups.append(gone)  # with the state that it had
    step(ps, optimizer, 5)
    assert optimizer.diagnostics().beta == 0.0
    step(ps, optimizer, 6)
    new = nn.Parameter(torch.randn(9))
    optimizer.state.pop(gone["params"][0])
    gone["params"][0] = new
    step([new, *ps[1:]], optimizer, 7)
    assert optimizer.diagnostics().beta == 0.0
    assert optimizer.state[new]["step"] == 1
    assert optimizer.diagnostics().step == 8
    del optimizer.param_groups[:]
    with pytest.raises(RuntimeError, match="no parameter groups"):
        optimizer.step()


def test_the_edits_of_gaussian_splatting() -> None:
    """Every entry but ``"step"`` is concatenated or sliced, and a new parameter takes it."""
    p = nn.Parameter(torch.randn(10, 3))
    optimizer = NLCG([{"params": [p], "name": "means"}], 0.01)
    for n in (14, 6):
        for t in range(3):
            step([p], optimizer, t)
        entry = optimizer.state.pop(p)
        rows = torch.arange(n) % len(p)
        new = nn.Parameter(p.detach()[rows])
        for key in entry:
            if key != "step":
                entry[key] = entry[key][rows]
        optimizer.param_groups[0]["params"][0] = new
        optimizer.state[new] = entry
        p = new
    step([p], optimizer, 9)
    assert optimizer.state[p]["direction"].shape == (6, 3)
    assert optimizer.state[p]["step"] == 7


def test_three_thousand_groups_are_added_in_linear_time() -> None:
    """Counted in checks, not in seconds: every group is looked at once, and compared with the first."""
    looked = []

    class Counted(dict):
        def __getitem__(self, key: Any) -> Any:
            if key != "params":  # which torch's own add_param_group looks at again and again
                looked.append(key)
            return super().__getitem__(key)

    def count(n: int) -> int:
        looked.clear()
        optimizer = NLCG([nn.Parameter(torch.ones(1))])
        for _ in range(n):
            optimizer.param_groups[-1] = Counted(optimizer.param_groups[-1])
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        return len(looked)

    assert count(80) <= 2.2 * count(40)
    optimizer = NLCG([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(3000)])
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(1)
    optimizer.step()


def test_lazy_parameters_take_part_once_they_are_materialized() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))
    optimizer = NLCG(net.parameters(), 0.01)
    optimizer.step()  # nothing has a gradient
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    assert len(optimizer.state) == 4


@pytest.mark.parametrize("lr", [np.float32(0.25), np.float64(0.25), np.array(0.25), np.int64(1)])
def test_numbers_of_numpy(lr: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = NLCG([p], lr, eps=np.float64(1e-8), beta2=np.float32(0.5), weight_decay=np.float64(0.5))
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.float64(0.125)  # as a scheduler's
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["lr"] == 0.125


# ---- numbers ---------------------------------------------------------------------------------------------------------

MAGNITUDES = [10.0**e for e in (-44, -38, -30, -23, -20, -12, -5, 0, 5, 12, 17, 19, 20, 25, 30, 34, 37, 38)] + [3e38]


@pytest.mark.parametrize("spike", [False, True])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("kind", ["adam", "bfgs", "none"])
def test_a_finite_gradient_of_any_size(kind: str, magnitude: float, spike: bool) -> None:
    """Moves every parameter as float64 does, to rounding, or the step is skipped and changes nothing. ``spike``: one
    element among ordinary ones, once; else all elements, at every step."""
    options = Options(preconditioner=KINDS[kind].get("preconditioner", "adam"))
    lr = 1e-2 if kind == "adam" or spike else 1e-2 / max(magnitude, 1.0)
    rng = np.random.default_rng(5)
    p = nn.Parameter(torch.from_numpy(rng.standard_normal(40).astype(np.float32)))
    optimizer = NLCG([p], lr, preconditioner=options.preconditioner)
    taken = 0
    for t in range(6):
        g = rng.standard_normal(40) * (1.0 if spike else 0.3) + p.detach().numpy()
        g = (
            np.where(np.arange(40) == 7, magnitude * np.sign(g) if t == 3 else g, g)
            if spike
            else g / np.abs(g).max() * magnitude
        )
        g = np.clip(g, -3.4e38, 3.4e38).astype(np.float32)
        before = reference_state(optimizer, p, options)
        old = p.detach().clone()
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        after = groups.named_scalars(optimizer.param_groups[0])
        if after["skipped_steps"] > before.skipped_steps:
            assert magnitude > 1e15  # none of ordinary size
            assert torch.equal(p.detach(), old)
            continue
        taken += 1
        expected, new = reference.nlcg_step(old.double().numpy(), g.astype(float), before, options, lr=lr)
        assert torch.isfinite(p).all()
        # bfgs divides by differences of sums, which amplify rounding; its h may nearly cancel
        slack = 2e-2 if kind == "bfgs" else 1e-4
        scale = np.abs(expected) + np.abs(expected - old.double().numpy()) + 1e-30
        assert np.all(np.abs(p.detach().double().numpy() - expected) <= slack * scale + 1e-7), t
        assert after["beta"] == pytest.approx(new.beta, rel=slack, abs=slack)
    assert taken or magnitude > 1e15


def reference_state(optimizer: NLCG, p: nn.Parameter, options: Options) -> reference.State:
    state, scalars = optimizer.state.get(p), groups.named_scalars(optimizer.param_groups[0])
    if not state:
        return reference.initial_state(p.numel(), options)
    diagonal = options.kind.diagonal
    array = {key: value.double().numpy() for key, value in state.items()}
    return reference.State(
        g_prev=array.get("grad_prev", np.zeros(p.numel())),
        d=array["direction"],
        diagonal=None if diagonal is None else array[diagonal],
        alpha_prev=np.full(p.numel(), optimizer.param_groups[0]["alpha_prev"].item()),
        active=np.ones(p.numel(), dtype=bool),
        updates=np.full(p.numel(), float(state["step"])),
        step=int(scalars["step"]),
        skipped_steps=int(scalars["skipped_steps"]),
        rz=scalars["rz"],
    )


def test_the_spikes_that_once_exploded() -> None:
    for spikes in ([1e30], [1e25] * 3):
        p = nn.Parameter(torch.zeros(50))
        optimizer = NLCG([p], 1e-2)
        for t in range(12):
            p.grad = torch.ones(50)
            if 5 <= t < 5 + len(spikes):
                p.grad[3] = spikes[t - 5]
            optimizer.step()
        assert p.abs().max() < 2.0
        assert optimizer.diagnostics().skipped_steps == len(spikes)


def test_stochastic_rounding_makes_no_infinity() -> None:
    largest = torch.finfo(torch.bfloat16).max
    p = nn.Parameter(torch.full((4096,), largest, dtype=torch.bfloat16))
    optimizer = NLCG([p], 1e-3, preconditioner=None, stochastic_rounding=True)
    p.grad = torch.full_like(p, -1e36)  # less than half of the last place
    optimizer.step()
    assert torch.isfinite(p).all()


def test_random_bits_go_by_the_parameter_too() -> None:
    ps = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = NLCG(ps, 1e-3, preconditioner=None, stochastic_rounding=True)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    a, b = (p.detach() != 1.0 for p in ps)
    agreement = (a == b).float().mean().item()
    assert 0.5 < a.float().mean() + 0.5 < 1.4
    expected = a.float().mean() * b.float().mean() + (1 - a.float().mean()) * (1 - b.float().mean())
    assert agreement == pytest.approx(expected.item(), abs=0.05)  # independent


# ---- schedulers that cycle momentum ----------------------------------------------------------------------------------


def test_schedulers_that_cycle_momentum() -> None:
    """There is none to cycle: torch says so, and does as it is told (docs/limits.md)."""
    optimizer = NLCG([nn.Parameter(torch.ones(2))], 0.01)
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, cycle_momentum=False)


# ---- any sequence of these -------------------------------------------------------------------------------------------


def save_and_load(ps: list[nn.Parameter], optimizer: NLCG) -> NLCG:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = [{"params": list(group["params"]), "lr": group["lr"]} for group in optimizer.param_groups]
    kind = {"preconditioner": optimizer.defaults["preconditioner"], "update": optimizer.defaults["update"]}
    new = NLCG(fresh, line_search=OnlineLineSearch(), **kind)
    new.load_state_dict(torch.load(file, weights_only=True))
    return new


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_attacks_has_the_bits_of_a_calm_run(kind: str, seed: int) -> None:
    """Moves, shares, copies, keys of others, wrappers' saves and checkpoints between any two steps."""
    rng = np.random.default_rng(seed)
    ps, optimizer = make(kind)
    qs, calm = make(kind)
    attacks = [*(name for name in MOVES if name != "negative_bit"), "copy", "keys", "wrap", "save", "load", "pickle"]
    for t in range(20):
        without = tuple(i for i in range(5) if rng.random() < 0.1)
        step(ps, optimizer, t, without=without)
        step(qs, calm, t, without=without)
        for attack in rng.choice(attacks, size=rng.integers(3), replace=False):
            if attack in MOVES:
                MOVES[attack](ps, optimizer)
            elif attack == "copy":
                optimizer = copy.copy(optimizer)
            elif attack == "keys":
                for entry in optimizer.state.values():
                    entry[f"their {t}"] = torch.ones(2)
            elif attack == "wrap":
                wrapper = Wrapper(optimizer)
                wrapper.load_state_dict(copy.deepcopy(wrapper.state_dict()))
            elif attack == "save":
                optimizer = save_and_load(ps, optimizer)
            elif attack == "load":
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            else:
                (ps, optimizer) = pickle.loads(pickle.dumps((ps, optimizer)))
    assert bits(ps) == bits(qs)
    ours, theirs = (groups.named_scalars(o.param_groups[0]) for o in (optimizer, calm))
    assert ours == theirs


def test_a_parameter_that_comes_back_beside_a_gradient_of_other_strides() -> None:
    """Once, its gradient was overlooked until the next change."""
    ps, optimizer = make("none", n_groups=1)
    qs, calm = make("none", n_groups=1)
    for t in range(6):
        for each, o in ((ps, optimizer), (qs, calm)):
            generator = torch.Generator().manual_seed(t)
            for i, p in enumerate(each):
                p.grad = None if i == 0 and t in (2, 3) else torch.randn(p.shape, generator=generator)
            if o is optimizer and each[1].grad is not None:
                each[1].grad = each[1].grad.t().contiguous().t()
            o.step()
        assert bits(ps) == bits(qs), t


def test_sets_that_older_steps_have_left_keep_their_names() -> None:
    """Steps without a gradient that moves anything, and new parameters, between two steps of the whole set."""
    ps = [nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(0))]
    optimizer = NLCG(ps[:1], 0.01)
    step(ps[:1], optimizer, 0)
    optimizer.add_param_group({"params": ps[2:]})
    ps[0].grad = None
    ps[2].grad = torch.ones(0)
    optimizer.step(loss=1.0)  # moves nothing
    optimizer.add_param_group({"params": ps[1:2]})
    step([ps[0], ps[2], ps[1]], optimizer, 1)  # another set than that of step 0
    assert optimizer.diagnostics().beta == 0.0
    assert optimizer.diagnostics().step == 2
