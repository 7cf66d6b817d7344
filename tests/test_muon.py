"""preconditioner="muon": every step against the reference, torch's Muon, bits, interrupts, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
import signal
from typing import Any

import numpy as np
import pytest
import torch
from backends import Backend
from fastnlcg import NLCG, OnlineLineSearch, muon_groups, reference
from fastnlcg.tensors.matrices import Matrices as Batches
from fastnlcg.tensors.step_table import StepTable
from muon_lockstep import Matrices, MuonLockstep, matrices
from torch import Tensor, nn

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
# Sides around a block of 16 and a tile of 4096 elements, either side longer, wide enough for the Gram form.
SHAPES = [(3, 5), (16, 16), (17, 15), (5, 64), (64, 5), (1, 40), (40, 1), (64, 64), (65, 63), (8, 600)]


def every_shape(dtype: torch.dtype) -> list[Matrices]:
    return [matrices(shape, dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_every_shape_in_lockstep(lockstep_on: Backend, dtype: torch.dtype) -> None:
    lockstep = MuonLockstep(every_shape(dtype), device=lockstep_on.device)
    betas = []
    for k in range(6):
        lockstep.set_gradients(scale=[1.0, 0.8, 2.0, 0.3, 0.9, 0.95][k])
        betas.append(lockstep.checked_step().beta_matrices)
    assert 0.0 < min(betas[1:]) < max(betas[1:]) == 0.95


LAYOUTS = {
    "convolution": matrices((6, 4, 3, 3)),
    "convolution, channels_last": matrices((6, 4, 3, 3), permuted=(0, 2, 3, 1)),
    "convolution, out inside": matrices((6, 4, 3, 3), permuted=(1, 0, 2, 3)),
    "transposed": matrices((6, 40), permuted=(1, 0)),
    "gaps": matrices((6, 40), gaps=True),
    "stack": matrices((3, 6, 20), stacked=True),
    "stack of stacks": matrices((2, 3, 6, 20), stacked=True),
    "stack, permuted": matrices((3, 6, 20), stacked=True, permuted=(1, 0, 2)),
    "stack, each transposed": matrices((3, 6, 20), stacked=True, permuted=(0, 2, 1)),
    "fused": matrices((12, 20), split=3),
    "fused, unequal": matrices((12, 20), split=(8, 2, 2)),
    "fused, transposed": matrices((12, 20), split=3, permuted=(1, 0)),
    "stack of one": matrices((1, 6, 20), stacked=True),
    "stack of one, transposed": matrices((1, 6, 20), stacked=True, permuted=(0, 2, 1)),
    "stack of one, fused": matrices((1, 12, 20), stacked=True, split=(9, 3)),
    "stack, fused": matrices((3, 12, 20), stacked=True, split=(9, 3)),
    "original": matrices((40, 8), adjust_lr_fn="original"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_in_lockstep(cpu_or_emulated: Backend, name: str) -> None:
    """With two more of the same, so that there are batches of several."""
    lockstep = MuonLockstep([LAYOUTS[name], matrices((6, 20)), LAYOUTS[name], LAYOUTS[name]])
    for _ in range(4):
        lockstep.set_gradients()
        lockstep.checked_step()


@pytest.mark.parametrize(
    "options",
    [
        {"update": "heavy_ball"},
        {"max_grad_norm": 1.0},
        {"max_grad_norm": math.inf},
        {"maximize": True, "lr": 1e-3},
        {"weight_decay": 0.0, "beta_max": 0.5},
    ],
    ids=str,
)
def test_options_in_lockstep(cpu_or_emulated: Backend, options: dict[str, Any]) -> None:
    lockstep = MuonLockstep([matrices((6, 20)), matrices((6, 20)), matrices((9, 4))], **options)
    for k in range(5):
        lockstep.set_gradients(scale=0.9**k)
        lockstep.checked_step()


def test_matrices_alone_and_with_changing_sets(cpu_or_emulated: Backend) -> None:
    lockstep = MuonLockstep([matrices((6, 20)), matrices((6, 20)), matrices((9, 4))], rest=())
    for without in ((), (), (0,), (0,), (2,), (), (0, 1), ()):
        lockstep.set_gradients(without=without)
        lockstep.checked_step()


def test_the_first_steps_may_have_no_matrix(cpu_or_emulated: Backend) -> None:
    lockstep = MuonLockstep([matrices((6, 20)), matrices((9, 4))])
    for without in ((0, 1), (0, 1), (1,), ()):
        lockstep.set_gradients(without=without)
        lockstep.checked_step()


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_narrow_parameters_in_lockstep(cpu_or_emulated: Backend, dtype: torch.dtype) -> None:
    lockstep = MuonLockstep([matrices((17, 40), dtype), matrices((3, 6, 20), dtype, stacked=True)], max_grad_norm=2.0)
    for _ in range(4):
        lockstep.set_gradients()
        lockstep.checked_step()


def test_stochastic_rounding_keeps_small_moves_on_average(cpu_or_emulated: Backend) -> None:
    """Each move is a twentieth of a bfloat16's spacing at 1: rounded to the nearest, nothing would ever move."""
    g = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    o = torch.from_numpy(0.2 * 8 * reference.polar(g.numpy().astype(float)))
    lr = 2.0**-8 / 20 / float(o.abs().mean())
    moved = {}
    for stochastic in (True, False):
        p = nn.Parameter(torch.ones(64, 64, dtype=BF16))
        optimizer = NLCG([{"params": [p], "preconditioner": "muon"}], lr=lr, stochastic_rounding=stochastic)
        for _ in range(20):
            p.grad = g.to(BF16)
            optimizer.step()
        moved[stochastic] = float(((p.detach().double() - 1) * -o.sign()).mean())
    assert moved[True] == pytest.approx(20 * lr * float(o.abs().mean()), rel=0.1)
    assert abs(moved[False]) < 0.2 * moved[True]


# ---- torch's Muon ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_heavy_ball_is_torch_muon(adjust_lr_fn: str) -> None:
    """torch's products are in bfloat16: an element of a polar factor differs by up to 0.01, and these differences add
    up, at random, over 20 steps."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((24, 40), (40, 24), (16, 16), (24, 40))]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    groups = {"params": ours, "preconditioner": "muon", "adjust_lr_fn": adjust_lr_fn}
    nlcg = NLCG([groups], lr=0.02, weight_decay=0.1, update="heavy_ball", beta_max=0.9)
    muon = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn=adjust_lr_fn)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            noise = torch.randn(a.shape, generator=generator)
            a.grad, b.grad = a.detach() + noise, b.detach() + noise
        nlcg.step()
        muon.step()
    for a, b, x in zip(ours, theirs, start, strict=True):
        size = (
            0.2 * math.sqrt(max(x.shape))
            if adjust_lr_fn == "match_rms_adamw"
            else math.sqrt(max(1, x.shape[0] / x.shape[1]))
        )
        assert float((a - b).detach().abs().max()) < 20**0.5 * 0.02 * size * 0.02
        assert float((a - x).detach().abs().max()) > 20 * 0.02 * size * 0.02  # the bound does not let everything pass


def test_the_polar_factor_has_singular_values_near_1() -> None:
    u = torch.randn(20, 50, dtype=F64, generator=torch.Generator().manual_seed(0))
    singular = np.linalg.svd(reference.polar(u.numpy()), compute_uv=False)
    assert singular.min() > 0.6
    assert singular.max() < 1.25


# ---- bits, interrupts ------------------------------------------------------------------------------------------------


def network(*, gaps: bool = False) -> nn.Module:
    """``gaps``: a matrix and a bias are slices of larger tensors, which are stepped in copies."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(30, 24), nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 24), nn.Linear(24, 30))
    if gaps:
        for name in ("weight", "bias"):
            value = getattr(net[1], name).detach()
            setattr(net[1], name, nn.Parameter(torch.stack([value, value], -1)[..., 0]))
    return net


def train(net: nn.Module, optimizer: NLCG, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = (torch.randint(0, 30, (64,), generator=generator) for _ in range(2))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


def bits(net: nn.Module, optimizer: NLCG) -> list[bytes]:
    entries = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    tensors = [
        *net.parameters(),
        *(t for entry in entries for t in entry.values()),
        optimizer.param_groups[0]["scalars"],
    ]
    return [t.detach().numpy().tobytes() for t in tensors]


def test_resume_is_bit_exact(cpu_or_emulated: Backend) -> None:
    net = network()
    optimizer = NLCG(muon_groups(net, lr=0.02, weight_decay=0.1), max_grad_norm=1.0)
    train(net, optimizer, 5)
    saved = {"net": {k: v.clone() for k, v in net.state_dict().items()}, "optimizer": optimizer.state_dict()}
    other = network()
    other.load_state_dict(saved["net"])
    resumed = NLCG(muon_groups(other, lr=0.02, weight_decay=0.1), max_grad_norm=1.0)
    resumed.load_state_dict(saved["optimizer"])
    train(net, optimizer, 5, seed=1)
    train(other, resumed, 5, seed=1)
    assert bits(net, optimizer) == bits(other, resumed)


@pytest.mark.parametrize(
    ("owner", "function"),
    [(torch, "bmm"), (Batches, "finish"), (StepTable, "write_back"), (StepTable, "_complete")],
)
def test_an_interrupt_lets_the_step_finish(owner: Any, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal arrives while torch multiplies, or anywhere behind the native step: the exception is raised, and the
    step is complete."""
    nets = [network(gaps=True), network(gaps=True)]
    optimizers = [NLCG(muon_groups(net, lr=0.02, weight_decay=0.1)) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 2)
    original, fired = getattr(owner, function), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if len(fired) == 0:
            fired.append(True)
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, function, interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(nets[0], optimizers[0], 1, seed=1)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert fired
    train(nets[1], optimizers[1], 1, seed=1)
    assert bits(nets[0], optimizers[0]) == bits(nets[1], optimizers[1])


def test_a_compiled_step_has_the_bits_of_an_eager_one() -> None:
    nets = [network(), network()]
    optimizers = [NLCG(muon_groups(net, lr=0.02, weight_decay=0.1)) for net in nets]
    compiled = torch.compile(lambda: optimizers[1].step(), fullgraph=True, backend="eager")
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randint(0, 30, (64,), generator=generator)
        for net, optimizer, step in zip(nets, optimizers, (optimizers[0].step, compiled), strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            step()
    assert bits(nets[0], optimizers[0]) == bits(nets[1], optimizers[1])


def test_a_grad_scaler_and_a_line_search_scale_both_kinds() -> None:
    net, plain = network(), network()
    scaled = NLCG(muon_groups(net, lr=0.02), max_grad_norm=1.0)
    optimizer = NLCG(muon_groups(plain, lr=0.02), max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    x = torch.arange(30)
    for _ in range(3):
        for model, own in ((net, scaled), (plain, optimizer)):
            own.zero_grad()
            loss = model(x).square().mean()
            (scaler.scale(loss) if own is scaled else loss).backward()
        scaler.step(scaled)
        scaler.update()
        optimizer.step()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    before = [p.detach().clone() for p in net.parameters()]
    searching = NLCG(muon_groups(net, lr=0.02), line_search=OnlineLineSearch(decrease=0.5))
    for loss in (1.0, 2.0):
        for p, value in zip(net.parameters(), before, strict=True):
            p.data.copy_(value)
            p.grad = torch.ones_like(p)
        searching.step(loss=loss)
    assert searching.diagnostics().ls_scale == 0.5
    assert all(float(group["alpha_prev"]) == group["lr"] / 2 for group in searching.param_groups)


def test_a_copy_and_a_pickle_take_the_same_steps() -> None:
    net = network()
    optimizer = NLCG(muon_groups(net, lr=0.02))
    train(net, optimizer, 3)
    for twin_net, twin in (copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))):
        train(twin_net, twin, 2, seed=1)
        found = bits(twin_net, twin)
    train(net, optimizer, 2, seed=1)
    assert bits(net, optimizer) == found


def test_a_file_of_0_8_lacks_the_scalars_of_matrices() -> None:
    net = network()
    optimizer = NLCG(net.parameters())
    train(net, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["scalars"] = group["scalars"][:19].clone()
        for key in ("adjust_lr_fn", "stacked", "split"):
            del group[key]
    again = NLCG(net.parameters())
    again.load_state_dict(saved)
    assert torch.equal(again.param_groups[0]["scalars"], optimizer.param_groups[0]["scalars"])


def test_a_workspace_of_inference_mode_serves_training() -> None:
    nets = [network(), network()]
    optimizers = [NLCG(muon_groups(net, lr=0.02, weight_decay=0.1)) for net in nets]
    train(nets[0], optimizers[0], 2)
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    with torch.inference_mode():
        optimizers[1].diagnostics()
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 2, seed=1)
    assert bits(nets[0], optimizers[0]) == bits(nets[1], optimizers[1])


@pytest.mark.parametrize("kind", [MemoryError, RuntimeError])
def test_a_product_that_fails_is_reported(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not tried again; everything but its matrices has moved."""
    net = network(gaps=True)
    optimizer = NLCG(muon_groups(net, lr=0.02))
    train(net, optimizer, 1)
    before, failed = [p.detach().clone() for p in net.parameters()], []

    def out_of_memory(*args: Any, **kwargs: Any) -> Tensor:
        failed.append(True)
        raise kind("no memory for the product")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "bmm", out_of_memory)
        with pytest.raises(kind, match="no memory for the product"):
            train(net, optimizer, 1)
    assert len(failed) == 1
    matrices_of_net = {net[1].weight, net[3].weight}
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old) == (p in matrices_of_net)
    train(net, optimizer, 1)  # and works again


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e-30, 1e30, 1e-36])
def test_tiny_and_huge_gradients(cpu_or_emulated: Backend, value: float) -> None:
    """torch's float32 norm of such a matrix is 0 or infinite."""
    p = nn.Parameter(torch.zeros(20, 30))
    optimizer = NLCG([{"params": [p], "preconditioner": "muon"}], lr=1.0, weight_decay=0.0)
    p.grad = value * torch.ones(20, 30)
    optimizer.step()
    expected = -0.2 * math.sqrt(30) * reference.polar(np.ones((20, 30)))
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=2e-4)


def test_a_matrix_of_zeros_only_decays(cpu_or_emulated: Backend) -> None:
    p = nn.Parameter(torch.ones(20, 30))
    optimizer = NLCG([{"params": [p], "preconditioner": "muon"}], lr=0.5, weight_decay=0.5)
    p.grad = torch.zeros(20, 30)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((20, 30), 0.75))


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("of_matrix", [True, False])
def test_a_bad_number_anywhere_skips_the_step(cpu_or_emulated: Backend, value: float, of_matrix: bool) -> None:
    if value == 3e38 and of_matrix:
        value = 3.3e38  # sum(g g) is finite, but u = g + beta d may not be
    net = network()
    optimizer = NLCG(muon_groups(net, lr=0.02, weight_decay=0.1))
    train(net, optimizer, 2)
    before = bits(net, optimizer)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 30, (64,), generator=generator)
    optimizer.zero_grad()
    net(x).square().mean().backward()
    (net[1].weight if of_matrix else net[1].bias).grad.view(-1)[-1] = value
    optimizer.step()
    assert optimizer.diagnostics().skipped_steps == 1
    assert bits(net, optimizer)[:-1] == before[:-1]


def muon(*params: Tensor, **options: Any) -> NLCG:
    return NLCG([{"params": list(params), "preconditioner": "muon", **options}])


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((7,), {}, r"parameter 0 of shape \(7,\) has no matrices"),
        ((), {}, r"parameter 0 of shape \(\) has no matrices"),
        ((0, 4), {}, r"parameter 0 of shape \(0, 4\) is empty"),
        ((7, 4), {"split": 2}, r"parameter 0 of shape \(7, 4\) cannot be split into 2 parts"),
        ((7, 4), {"split": (4, 4)}, r"parameter 0 of shape \(7, 4\) cannot be split into parts of \(4, 4\) rows"),
        ((7, 4), {"split": 0}, "Invalid split: 0"),
        ((7, 4), {"adjust_lr_fn": "muon"}, "adjust_lr_fn must be one of"),
        ((7, 4), {"update": "polak_ribiere"}, "update is 'polak_ribiere' with preconditioner='muon'"),
    ],
)
def test_what_is_refused(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        muon(nn.Parameter(torch.zeros(shape)), **options)


def test_a_wrong_dtype_is_named() -> None:
    with pytest.raises(TypeError, match="parameter 0 has dtype torch.complex64"):
        muon(nn.Parameter(torch.zeros(3, 4, dtype=torch.complex64)))


def test_options_of_muon_need_it() -> None:
    with pytest.raises(ValueError, match="stacked is True with preconditioner='adam'; it is an option of"):
        NLCG([{"params": [nn.Parameter(torch.zeros(2, 3, 4))], "stacked": True}])


def test_only_adam_goes_with_muon() -> None:
    p, q = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(4))
    for other in ("bfgs", None):
        for first in (0, 1):
            groups = [{"params": [p], "preconditioner": "muon"}, {"params": [q], "preconditioner": other}]
            with pytest.raises(ValueError, match="if some groups have 'muon', the others must have 'adam'"):
                NLCG(groups[first:] + groups[:first])
    with pytest.raises(ValueError, match="beta_max is 0.9 in parameter group 1 and 0.5 in group 0"):
        NLCG(
            [
                {"params": [x], "preconditioner": "muon", "beta_max": b}
                for x, b in ((p, 0.5), (nn.Parameter(p + 1), 0.9))
            ]
        )
