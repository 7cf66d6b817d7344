"""State and parameters that users move, share, off-load, copy or wrap between two steps: the next step follows, as with
torch's own optimizers."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import backends
import numpy as np
import pytest
import torch
from fastnlcg import NLCG, OnlineLineSearch, _native
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


# ---- state in other memory, or in other tensors ----------------------------------------------------------------------


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
    qs, undisturbed = make(kind)
    for t in range(9):
        if t in (3, 6):
            MOVES[move](ps, optimizer)
        step(ps, optimizer, t)
        step(qs, undisturbed, t)
    assert bits([nn.Parameter(p.detach().resolve_neg()) for p in ps]) == bits(qs)
    assert optimizer.diagnostics().step == undisturbed.diagnostics().step == 9
    for p, q in zip(ps, qs, strict=True):
        for key, value in undisturbed.state[q].items():
            assert torch.equal(optimizer.state[p][key].to(value.dtype), value), key


def test_edits_of_state_in_place_are_seen() -> None:
    """Also in shared memory."""
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


def test_state_that_shares_memory_is_refused() -> None:
    ps, optimizer = make("adam")
    step(ps, optimizer, 0)
    a, b = optimizer.state[ps[0]], optimizer.state[ps[2]]
    a["direction"] = b["direction"][:5]
    with pytest.raises(ValueError, match="state of parameter 0 and state of parameter 1 share memory"):
        step(ps, optimizer, 1)


def test_state_that_shares_memory_is_refused_after_diagnostics() -> None:
    ps, optimizer = make("adam")
    step(ps, optimizer, 0)
    a, b = optimizer.state[ps[0]], optimizer.state[ps[2]]
    a["direction"].data = b["direction"].data[:5]
    optimizer.diagnostics()
    before = bits(ps)
    for _ in range(2):  # also the second time
        with pytest.raises(ValueError, match="state of parameter 0 and state of parameter 1 share memory"):
            step(ps, optimizer, 1)
    assert bits(ps) == before


# ---- copies and wrappers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_shallow_copy_stepped_in_turns_is_one_optimizer(kind: str) -> None:
    ps, optimizer = make(kind)
    qs, undisturbed = make(kind)
    step(ps, optimizer, 0)
    step(qs, undisturbed, 0)
    twin = copy.copy(optimizer)
    for t in range(1, 8):
        step(ps, (optimizer, twin)[t % 2], t)
        step(qs, undisturbed, t)
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
def test_a_pickled_optimizer_steps_with_the_same_bits(kind: str) -> None:
    ps, optimizer = make(kind)
    for t in range(3):
        step(ps, optimizer, t)
    qs, other = pickle.loads(pickle.dumps((ps, optimizer)))
    file = io.BytesIO()
    torch.save((ps, optimizer), file)  # passing it to a spawned process moves the state to shared memory
    torch.multiprocessing.reductions.reduce_storage(optimizer.state[ps[0]]["direction"].untyped_storage())
    for t in range(3, 6):
        step(ps, optimizer, t)
        step(qs, other, t)
    assert bits(ps) == bits(qs)


def test_keys_of_users_in_the_state_are_kept() -> None:
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


def test_all_groups_share_one_tensor_of_scalars() -> None:
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


# ---- any sequence of these changes -----------------------------------------------------------------------------------


def save_and_load(ps: list[nn.Parameter], optimizer: NLCG) -> NLCG:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = [{"params": list(group["params"]), "lr": group["lr"]} for group in optimizer.param_groups]
    kind = {"preconditioner": optimizer.defaults["preconditioner"], "update": optimizer.defaults["update"]}
    new = NLCG(fresh, line_search=OnlineLineSearch(), **kind)
    new.load_state_dict(torch.load(file, weights_only=True))
    return new


@pytest.mark.parametrize("seed", [*range(4), *backends.thorough(*range(4, 12))])  # the same changes in another order
@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_changes_has_the_bits_of_an_undisturbed_run(kind: str, seed: int) -> None:
    """Moves, shares, copies, users' keys, wrappers' saves and checkpoints between any two steps."""
    rng = np.random.default_rng(seed)
    ps, optimizer = make(kind)
    qs, undisturbed = make(kind)
    changes = [*(name for name in MOVES if name != "negative_bit"), "copy", "keys", "wrap", "save", "load", "pickle"]
    for t in range(20):
        without = tuple(i for i in range(5) if rng.random() < 0.1)
        step(ps, optimizer, t, without=without)
        step(qs, undisturbed, t, without=without)
        for change in rng.choice(changes, size=rng.integers(3), replace=False):
            if change in MOVES:
                MOVES[change](ps, optimizer)
            elif change == "copy":
                optimizer = copy.copy(optimizer)
            elif change == "keys":
                for entry in optimizer.state.values():
                    entry[f"their {t}"] = torch.ones(2)
            elif change == "wrap":
                wrapper = Wrapper(optimizer)
                wrapper.load_state_dict(copy.deepcopy(wrapper.state_dict()))
            elif change == "save":
                optimizer = save_and_load(ps, optimizer)
            elif change == "load":
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            else:
                (ps, optimizer) = pickle.loads(pickle.dumps((ps, optimizer)))
    assert bits(ps) == bits(qs)
    ours, theirs = (groups.named_scalars(o.param_groups[0]) for o in (optimizer, undisturbed))
    assert ours == theirs
