"""Parameters and gradients of any shape, dtype, device, strides and memory: what is stepped, and what is refused."""

from __future__ import annotations

import copy
import os

import backends
import pytest
import torch
from fastnlcg import NLCG
from quadratic import everything, one_step, parameter, quadratic_gradients
from torch import nn


@pytest.mark.usefixtures("cpu_or_emulated")
@pytest.mark.parametrize("places", [(0,), (2,), (3,), (0, 2, 3)])
def test_zero_length_tensors_change_no_bit(places: tuple[int, ...], preconditioner: str) -> None:
    full = [parameter(5, seed=1), parameter(6, seed=2)]
    sparse = copy.deepcopy(full)
    for place in places:
        sparse.insert(place, parameter(0, 4))
    optimizers = NLCG(full, 0.1, preconditioner=preconditioner), NLCG(sparse, 0.1, preconditioner=preconditioner)
    for ps, optimizer in zip((full, sparse), optimizers, strict=True):
        for _ in range(4):
            quadratic_gradients([p for p in ps if p.numel()])
            for p in ps:
                p.grad = torch.zeros_like(p) if p.numel() == 0 else p.grad
            optimizer.step()
    left = [p for p in sparse if p.numel()]
    assert all(torch.equal(p, q) for p, q in zip(full, left, strict=True))


@pytest.mark.usefixtures("cpu_or_emulated")
def test_an_optimizer_of_one_zero_length_tensor_steps(preconditioner: str) -> None:
    p = parameter(0)
    optimizer = NLCG([p], 0.1, preconditioner=preconditioner)
    p.grad = torch.zeros(0)
    optimizer.step()
    optimizer.step()


@pytest.mark.usefixtures("cpu_or_emulated")
def test_a_parameter_without_dimensions(preconditioner: str) -> None:
    scalar = parameter()
    optimizer = NLCG([scalar], 0.1, preconditioner=preconditioner)
    scalar.grad = torch.tensor(2.0)
    before = scalar.item()
    optimizer.step()
    assert scalar.item() == pytest.approx(before - (0.1 if preconditioner == "adam" else 0.2))


@pytest.mark.usefixtures("cpu_or_emulated")
def test_1600_parameters_have_the_bits_of_one(preconditioner: str) -> None:
    many = [parameter(1 + i % 5, seed=i) for i in range(1600)]
    joined = nn.Parameter(torch.cat([p.detach() for p in many]))
    optimizers = NLCG(many, 0.1, preconditioner=preconditioner), NLCG([joined], 0.1, preconditioner=preconditioner)
    for _ in range(3):
        joined.grad = 2 * joined.detach()
        for p in many:
            p.grad = 2 * p.detach()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.cat([p.detach() for p in many]), joined)


@pytest.mark.usefixtures("cpu_or_emulated")
def test_parameters_may_share_one_gradient(preconditioner: str) -> None:
    three = [parameter(4, seed=i) for i in range(3)]
    shared = torch.randn(4)
    optimizer = NLCG(three, 0.5, preconditioner=preconditioner)
    before = [p.detach().clone() for p in three]
    for p in three:
        p.grad = shared
    optimizer.step()
    for p, b in zip(three, before, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.5 * (shared.sign() if preconditioner == "adam" else shared))


def refused(ps: list, grads: list, error: type[Exception], match: str) -> None:
    """A step raises after three good ones over another parameter, changes nothing, and the next one is as before."""
    good = parameter(10)
    optimizer = NLCG([good, *ps], 0.1)
    for _ in range(3):
        quadratic_gradients([good])
        optimizer.step()
    before = everything([good], optimizer)
    quadratic_gradients([good])
    for p, g in zip(ps, grads, strict=True):
        p.grad = g
    for _ in range(2):
        with pytest.raises(error, match=match):
            optimizer.step()
    assert everything([good], optimizer) == before
    for p in ps:
        p.grad = None
    optimizer.step()
    assert optimizer.diagnostics().step == 4
    assert optimizer.diagnostics().beta > 0


def test_unsupported_dtypes_are_refused_unless_frozen() -> None:
    """Frozen parameters may have any dtype, as quantized weights below adapters do."""
    for dtype in (torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(TypeError, match=f"parameter 1 has dtype {dtype}"):
            NLCG([parameter(2), nn.Parameter(torch.zeros(3, dtype=dtype))], 0.1)
    for dtype in (torch.int32, torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64):
        frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        ps = [frozen, parameter(2)]
        optimizer = NLCG(ps, 0.1)
        one_step(ps[1:], optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        one_step(ps[1:], optimizer)
        assert optimizer.diagnostics().step == 2
        assert torch.equal(frozen, torch.ones(3, dtype=dtype))


def test_float32_and_16_bit_parameters_mix_and_float64_does_not() -> None:
    mixed = [parameter(40, dtype=d, seed=i) for i, d in enumerate((torch.float32, torch.bfloat16, torch.float16))]
    optimizer = NLCG(mixed, 0.1)
    before = [p.detach().clone() for p in mixed]
    for _ in range(5):
        one_step(mixed, optimizer)
    assert all(p.square().sum() < b.square().sum() for p, b in zip(mixed, before, strict=True))
    p = parameter(3, dtype=torch.float64)
    refused([p], [torch.ones_like(p)], TypeError, "parameter 1 is torch.float64 and parameter 0 is torch.float32")


def test_a_gradient_of_another_dtype_is_refused() -> None:
    p = parameter(3)
    p.grad = torch.ones(3)
    p.data = p.data.double()
    with pytest.raises(RuntimeError, match="gradient of parameter 0.*float32.*float64"):
        NLCG([p], 0.1).step()


def test_a_parameter_on_the_meta_device_is_refused() -> None:
    p = nn.Parameter(torch.empty(3, device="meta"))
    refused([p], [torch.empty(3, device="meta")], RuntimeError, "parameter 1 .*on meta.*expected cpu")


def test_a_sparse_gradient_is_refused() -> None:
    p = parameter(3, 2)
    sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (3, 2), check_invariants=False)
    refused([p], [sparse], RuntimeError, "gradient of parameter 1.*sparse")


def test_gaps_are_stepped_over_and_overlaps_refused() -> None:
    """Memory in the gaps between elements keeps its values, as with torch's optimizers."""
    for p in (torch.zeros(1).expand(4), torch.zeros(6).as_strided((2, 3), (2, 1))):
        p = nn.Parameter(p)
        refused([p], [torch.ones(p.shape)], ValueError, "parameter 1 .*strides")
    whole, alone = parameter(4, 6), nn.Parameter(parameter(4, 6).detach()[:, ::2].clone())
    before = whole.detach().clone()
    gapped = nn.Parameter(whole.detach()[:, ::2])
    for q in (gapped, alone):
        optimizer = NLCG([q], 0.1)
        for _ in range(3):
            one_step([q], optimizer)
    assert torch.equal(gapped, alone)
    assert not torch.equal(gapped, before[:, ::2])
    assert torch.equal(whole[:, 1::2], before[:, 1::2])
    transposed = nn.Parameter(parameter(3, 4).detach().t())
    plain = nn.Parameter(transposed.detach().clone().contiguous())
    for q in (transposed, plain):
        optimizer = NLCG([q], 0.1)
        for _ in range(3):
            one_step([q], optimizer)
    torch.testing.assert_close(transposed, plain)


def test_strides_of_gradients_change_no_bit() -> None:
    p, q = parameter(4, 1, 3), parameter(4, 1, 3)
    optimizers = NLCG([p], 0.1), NLCG([q], 0.1)
    g = torch.randn(4, 1, 3)
    others = (
        torch.randn(3, 4, 1).permute(1, 2, 0),
        torch.randn(4, 1, 6)[..., ::2],
        torch.randn(1, 1, 3).expand(4, 1, 3),
        g.as_strided((4, 1, 3), (3, 100, 1)),  # an odd stride where it does not matter
        torch.randn(4, 1, 3, dtype=torch.complex64).conj().imag,  # negative bit
    )
    for other in others:
        p.grad, q.grad = other, other.resolve_neg().contiguous()
        kept = other.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(p, q)
        assert torch.equal(p.grad, kept)


def test_wrapper_tensors_are_refused_and_plain_subclasses_taken() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    p = nn.Parameter(TwoTensor(torch.zeros(3), torch.zeros(3)))
    refused([p], [TwoTensor(torch.ones(3), torch.ones(3))], TypeError, "parameter 1 .*TwoTensor")

    class Tagged(nn.Parameter):
        pass

    tagged = Tagged(torch.ones(3))
    one_step([tagged], NLCG([tagged], 0.1))
    assert not torch.equal(tagged, torch.ones(3))


def test_parameters_that_share_memory_are_refused(cpu_or_emulated: backends.Backend) -> None:
    base = torch.randn(101)
    ps = [nn.Parameter(base[:60]), parameter(7), nn.Parameter(base[59:100])]
    optimizer = NLCG(ps, 0.1)
    quadratic_gradients(ps)
    before = [p.detach().clone() for p in ps]
    with pytest.raises(ValueError, match="parameter 0 and parameter 2 share memory"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, before, strict=True))
    ps[2].data = base[60:]
    quadratic_gradients(ps)
    optimizer.step()  # adjacent memory is not shared
    ps[1].data = base[3:10]  # moved after a step: the table is refreshed, not built
    quadratic_gradients(ps)
    with pytest.raises(ValueError, match="parameter 0 and parameter 1 share memory"):
        optimizer.step()


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc/self/clear_refs")
def test_a_step_allocates_nothing_of_the_parameters_size() -> None:
    """Resident memory grows by less than 1 MiB during a step on 40 MB of parameters."""

    def status(key: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

    p = parameter(10_000_000)
    optimizer = NLCG([p], 0.1)
    for _ in range(2):
        one_step([p], optimizer)
    quadratic_gradients([p])
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    optimizer.step()
    assert status("VmHWM") - before < 1 << 20
