"""NLCG as a torch optimizer: trajectories against the reference, closures, groups, gradient scaling and warnings."""

from __future__ import annotations

import math
import warnings

import backends
import numpy as np
import pytest
import torch
from backends import emulated_is_thorough
from fastnlcg import NLCG, OnlineLineSearch, paper_schedule, reference
from fastnlcg.tensors import groups
from torch import Tensor, nn

UPDATES = ("fletcher_reeves", "polak_ribiere")
pytestmark = pytest.mark.usefixtures("cpu_or_emulated")


# ---- trajectories ----------------------------------------------------------------------------------------------------


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * (torch.logspace(-2, 2, 200, dtype=x.dtype) * x * x).sum()


def digits_softmax() -> tuple[object, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(images / 16.0), torch.from_numpy(labels)

    def loss(w: Tensor) -> Tensor:
        logits = images.to(w.dtype) @ w[:640].view(64, 10) + w[640:]
        return nn.functional.cross_entropy(logits, labels)

    return loss, torch.zeros(650)


PROBLEMS = {
    "rosenbrock": lambda: (rosenbrock, torch.linspace(-1.0, 1.0, 64), 2e-4),
    "quadratic": lambda: (quadratic, torch.linspace(0.5, 1.5, 200), 2e-3),
    "digits": lambda: (*digits_softmax(), 0.5),
}


@emulated_is_thorough
@pytest.mark.parametrize("preconditioner", ["adam", "bfgs", None])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_60_steps_follow_the_float64_reference(name: str, update: str, preconditioner: str | None) -> None:
    """Free running, not lockstep: float32 within 1e-3 relative in loss and, in norm, parameters; float64 1e-9."""
    function, start, lr = PROBLEMS[name]()
    if preconditioner == "adam":
        lr = {"quadratic": 0.05}.get(name, 0.01)

    def fun(w: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(w.copy()).requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value, x)
        return value.item(), gradient.numpy()

    expected = reference.minimize(
        fun, start.double().numpy(), steps=60, lr=lr, update=update, preconditioner=preconditioner
    )
    assert expected.losses[-1] < 0.9 * expected.losses[0]
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-9)):
        x = nn.Parameter(start.to(dtype, copy=True))
        optimizer = NLCG([x], lr, update=update, preconditioner=preconditioner)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            value = function(x)
            value.backward()
            losses.append(value.item())
            optimizer.step()
        np.testing.assert_allclose(losses, expected.losses, rtol=tolerance)
        off = np.linalg.norm(x.detach().double().numpy() - expected.p)
        assert off <= tolerance * np.linalg.norm(expected.p)


# ---- equal to AdamW and SGD ------------------------------------------------------------------------------------------


def compare_with_adamw(dtype: torch.dtype, weight_decay: float, beta: float, gradient: object) -> None:
    """30 steps of both on the same gradients, equal up to some roundings a step of parameters up to 1."""
    x, lr = torch.linspace(-1.0, 1.0, 300, dtype=dtype), 0.01
    ours, theirs = nn.Parameter(x.clone()), nn.Parameter(x.clone())
    adamw = torch.optim.AdamW([theirs], lr, betas=(beta, 0.999), weight_decay=weight_decay)
    optimizer = NLCG([ours], update="heavy_ball", beta_max=beta, preconditioner="adam")
    for k in range(1, 31):
        # undoes the scale of d, 1 / (1 - beta), and AdamW's correction of its first moment
        scale = (1 - beta) / (1 - beta**k)
        optimizer.param_groups[0]["lr"] = lr * scale
        optimizer.param_groups[0]["weight_decay"] = weight_decay / scale
        g = gradient(np.random.default_rng(k)).to(dtype)
        ours.grad, theirs.grad = g.clone(), g.clone()
        optimizer.step()
        adamw.step()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=60 * eps, atol=60 * eps)
        v = adamw.state[theirs]["exp_avg_sq"]
        torch.testing.assert_close(optimizer.state[ours]["exp_avg_sq"], v, rtol=30 * eps, atol=0)
    assert (ours - x).abs().max() > 0.01


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_momentum_it_is_adamw(dtype: torch.dtype, weight_decay: float) -> None:
    compare_with_adamw(dtype, weight_decay, 0.0, lambda rng: torch.from_numpy(rng.standard_normal(300)))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_with_constant_beta_and_diagonal_it_is_adamw(dtype: torch.dtype, weight_decay: float) -> None:
    """AdamW divides the mean of the gradients by the h of the step; conjugate directions add up gradients that were
    divided by the h of their own step. They are equal if h does not change: gradients of one size, of any signs."""
    size = torch.linspace(0.1, 3.0, 300, dtype=torch.float64)
    compare_with_adamw(dtype, weight_decay, 0.9, lambda rng: size * torch.from_numpy(rng.choice([-1.0, 1.0], 300)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_heavy_ball_without_preconditioner_is_sgd_with_momentum(dtype: torch.dtype) -> None:
    x = torch.linspace(-1.0, 1.0, 300, dtype=dtype)
    ours, theirs = nn.Parameter(x.clone()), nn.Parameter(x.clone())
    sgd = torch.optim.SGD([theirs], 0.01, momentum=0.9, weight_decay=0.1)
    optimizer = NLCG([ours], 0.01, preconditioner=None, update="heavy_ball", beta_max=0.9, weight_decay=0.1)
    for k in range(30):
        for p, o in ((ours, optimizer), (theirs, sgd)):
            p.grad = torch.linspace(0.1, 3.0, 300, dtype=dtype) * p.detach() + 0.1 * math.sin(k)
            o.step()
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=30 * torch.finfo(dtype).eps, atol=1e-7)


# ---- a small real model ----------------------------------------------------------------------------------------------


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)).to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 1, 8, 8, generator=generator).to(dtype), torch.randint(10, (32,), generator=generator)


def backward(net: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    net.zero_grad()
    x, y = batch(dtype)
    loss = nn.functional.cross_entropy(net(x).float(), y)
    loss.backward()
    return loss.detach()


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, dtype: torch.dtype = torch.float32
) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = backward(net, dtype)
        optimizer.step(loss=loss)
        losses.append(loss.item())
    return losses


def bits(net: nn.Module) -> bytes:
    return b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in net.parameters())


@emulated_is_thorough
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_trains(dtype: torch.dtype, preconditioner: str) -> None:
    net = model(dtype)
    losses = train(net, NLCG(net.parameters(), 0.05, preconditioner=preconditioner), 30, dtype)
    assert losses[-1] < 0.5 * losses[0]


def test_closure_is_called_once_with_gradients_and_its_value_returned(preconditioner: str) -> None:
    net, calls = model(), []
    optimizer = NLCG(net.parameters(), 0.1, line_search=OnlineLineSearch(), preconditioner=preconditioner)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        x, y = batch()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    with torch.no_grad():
        value = optimizer.step(closure)
    assert calls == [True]
    assert isinstance(value, Tensor)
    optimizer.step(closure)
    assert groups.named_scalars(optimizer.param_groups[0])["loss_prev"] < value.item()
    assert NLCG(net.parameters(), 0.1, preconditioner=preconditioner).step(None) is None
    with pytest.raises(ValueError, match="give a closure or loss=, not both"):
        optimizer.step(closure, loss=1.0)


def test_loss_argument_and_closure_drive_the_same_line_search(preconditioner: str) -> None:
    nets, scales = [], []
    for use_closure in (True, False):
        net = model()
        optimizer = NLCG(net.parameters(), 0.1, line_search=OnlineLineSearch(), preconditioner=preconditioner)
        for t in range(13):  # the last one a rise
            loss = backward(net) * (2 if t % 3 == 0 else 1)
            optimizer.step(lambda loss=loss: loss) if use_closure else optimizer.step(loss=loss)
        nets.append(bits(net))
        scales.append(optimizer.diagnostics().ls_scale)
    assert nets[0] == nets[1]
    assert scales[0] == scales[1] < 1.0


def test_groups_have_their_own_lr_and_weight_decay_and_share_the_sums(preconditioner: str) -> None:
    """Against the reference with per-element lr and weight decay."""
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(30, dtype=torch.float64)), nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    optimizer = NLCG(
        [{"params": [a], "lr": 0.02}, {"params": [b], "weight_decay": 0.1}], 0.05, preconditioner=preconditioner
    )
    lr = np.concatenate([np.full(30, 0.02), np.full(20, 0.05)])
    decay = np.concatenate([np.zeros(30), np.full(20, 0.1)])
    options = reference.Options(preconditioner=preconditioner)
    p, state = torch.cat([a.detach(), b.detach().flatten()]).numpy(), reference.initial_state(50, options)
    for _ in range(10):
        optimizer.zero_grad()
        (a.square().sum() * 0.7 + (b**4).sum() * 0.1 + a[0] * b.sum()).backward()
        g = torch.cat([a.grad, b.grad.flatten()]).numpy()
        p, state = reference.nlcg_step(p, g, state, options, lr=lr, weight_decay=decay)
        optimizer.step()
        np.testing.assert_allclose(torch.cat([a.detach(), b.detach().flatten()]).numpy(), p, rtol=1e-12, atol=1e-13)
        d = optimizer.diagnostics()
        assert (d.beta, d.rz, d.ys, d.shs) == tuple(
            pytest.approx(v, rel=1e-11) for v in (state.beta, state.rz, state.ys, state.shs)
        )
        assert d.updated == state.updated
        assert d.grad_norm == pytest.approx(float(np.linalg.norm(state.g_prev)), rel=1e-12)
        assert d.direction_norm == pytest.approx(float(np.linalg.norm(state.d)), rel=1e-12)
        assert d.cosine == pytest.approx(-float(state.g_prev @ state.d) / (d.grad_norm * d.direction_norm), rel=1e-12)


def test_schedulers_own_lr_also_as_a_tensor(preconditioner: str) -> None:
    nets = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        net = model()
        optimizer = NLCG(net.parameters(), lr, preconditioner=preconditioner)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in range(5):
            train(net, optimizer, 1)
            scheduler.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 * 0.9**5)
        nets.append(bits(net))
    assert nets[0] == nets[1]


def test_channels_last_and_other_strides(preconditioner: str) -> None:
    """The same bits whatever the memory format of parameters; gradients with other strides are copied to theirs."""
    plain, last = model(), model().to(memory_format=torch.channels_last)
    optimizers = (
        NLCG(plain.parameters(), 0.1, preconditioner=preconditioner),
        NLCG(last.parameters(), 0.1, preconditioner=preconditioner),
    )
    for step in range(5):
        backward(plain)
        for i, (p, q) in enumerate(zip(plain.parameters(), last.parameters(), strict=True)):
            g = p.grad.clone()
            if step == 2 and g.dim() == 4:
                g = g.contiguous(memory_format=torch.channels_last)
            if step == 3 and g.dim() == 2:
                g = g.t().contiguous().t()
            if step == 4 and i == 0:
                q.grad = torch.ones(1).expand_as(p)  # stride 0
                p.grad = torch.ones_like(p)
            else:
                q.grad = g
        for optimizer in optimizers:
            optimizer.step()
    close = [
        torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(plain.parameters(), last.parameters(), strict=True)
    ]
    assert all(close)
    state = optimizers[1].state[next(iter(last.parameters()))]
    assert state["direction"].shape == (4, 1, 3, 3)


def test_version_counter_and_grad(preconditioner: str) -> None:
    net = model()
    optimizer = NLCG(net.parameters(), 0.1, preconditioner=preconditioner)
    x, y = batch()
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward(retain_graph=True)
    grads = [p.grad.clone() for p in net.parameters()]
    before = [p._version for p in net.parameters()]
    optimizer.step()
    assert all(p._version > v for p, v in zip(net.parameters(), before, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_grad_scaler_on_the_cpu(preconditioner: str) -> None:
    """GradScaler unscales, and does not call step() where it found an infinity."""
    net, plain = model(), model()
    optimizer, expected = (
        NLCG(net.parameters(), 0.1, line_search=OnlineLineSearch(), preconditioner=preconditioner),
        NLCG(plain.parameters(), 0.1, preconditioner=preconditioner),
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = batch()
    for t in range(4):
        net.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        scaler.scale(loss).backward()
        if t == 2:
            net[3].bias.grad[0] = math.inf
        scaler.step(optimizer, loss=loss.detach())
        scaler.update()
        if t != 2:
            train(plain, expected, 1)
    assert bits(net) == bits(plain)
    assert optimizer.diagnostics().step == 3
    assert optimizer.diagnostics().skipped_steps == 0


# ---- against momentum ------------------------------------------------------------------------------------------------


@pytest.mark.thorough  # 1,200 steps; test_it_trains trains for 30
@pytest.mark.parametrize("cpu_or_emulated", ["cpu"], indirect=True)  # of training, not of kernels
def test_on_digits_at_large_batch_nlcg_reaches_half_of_momentums_loss() -> None:
    """200 full-batch steps of a three-layer perceptron on the paper's schedule, three seeds; see `make demo`."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    final = {}
    for name in ("nlcg", "momentum"):
        losses = []
        for seed in range(3):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
            params = net.parameters()
            optimizer = (
                NLCG(params, 0.1, preconditioner="bfgs")
                if name == "nlcg"
                else torch.optim.SGD(params, 0.1, momentum=0.9)
            )
            schedule = paper_schedule(optimizer, batch_size=len(x), epochs=200, steps_per_epoch=1)
            for _ in range(200):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(x), y)
                loss.backward()
                optimizer.step()
                schedule.step()
            losses.append(nn.functional.cross_entropy(net(x), y).item())
        final[name] = sum(losses)
    assert final["nlcg"] <= 0.5 * final["momentum"]


# ---- warnings --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_first_skipped_step_warns(preconditioner: str) -> None:
    if backends.current.on_gpu:
        pytest.skip("on a GPU the host does not know of the skip")
    net = model()
    optimizer = NLCG(net.parameters(), preconditioner=preconditioner)
    for t in range(3):
        backward(net)
        net[0].bias.grad[0] = math.nan
        if t == 0:
            with pytest.warns(UserWarning, match="a step was skipped.*not finite") as seen:
                optimizer.step()
            assert seen[0].filename == __file__
        else:
            optimizer.step()
    assert optimizer.diagnostics().skipped_steps == 3


def test_a_line_search_that_sees_no_loss_warns_once(preconditioner: str) -> None:
    net = model()
    for search in (None, OnlineLineSearch()):
        optimizer = NLCG(net.parameters(), line_search=search, preconditioner=preconditioner)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(25):
                backward(net)
                optimizer.step()
        assert [str(w.message)[:35] for w in seen] == (["line_search is on, and ten steps ha"] if search else [])
        assert all(w.filename == __file__ for w in seen)


def test_a_loss_given_ahead_is_as_good_as_one_given_with_the_step(preconditioner: str) -> None:
    runs = []
    for ahead in (False, True):
        net = model()
        optimizer = NLCG(
            net.parameters(), 0.01, line_search=OnlineLineSearch(0.0, -0.0, 0.2, 0.1), preconditioner=preconditioner
        )
        for t in range(8):
            loss = backward(net)
            if ahead and t != 3:
                optimizer.set_loss(loss)
                optimizer.step()
            else:
                optimizer.step(loss=None if t == 3 else loss)
        runs.append((bits(net), optimizer.diagnostics()))
    assert runs[0] == runs[1]
    with pytest.raises(TypeError, match="loss"):
        optimizer.set_loss("1")


def test_a_loss_in_the_place_of_the_closure(preconditioner: str) -> None:
    net = model()
    optimizer = NLCG(net.parameters(), preconditioner=preconditioner)
    loss = backward(net)
    with pytest.raises(TypeError, match=r"closure must be callable, got Tensor; did you mean step\(loss=...\)\?"):
        optimizer.step(loss)
    assert not optimizer.state
