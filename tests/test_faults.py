"""Bad input to the optimizer, list by list: what each must get, and that nothing changed. The numbers are those of the
project's list of faults; D, the flat-buffer functions, is in test_ops.py."""

from __future__ import annotations

import copy
import errno
import io
import math
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import backends
import numpy as np
import pytest
import torch
from fastnlcg import NLCG, OnlineLineSearch, _native
from torch import nn


def parameter(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def stepped(**keywords: object) -> tuple[list[nn.Parameter], NLCG]:
    """An optimizer after three steps on a quadratic."""
    ps = [parameter(20, seed=1), parameter(3, 4, seed=2)]
    optimizer = NLCG(ps, 0.1, **keywords)
    for _ in range(3):
        one_step(ps, optimizer)
    return ps, optimizer


def quadratic_gradients(ps: list[nn.Parameter]) -> None:
    for p in ps:
        p.grad = (torch.arange(1, p.numel() + 1).view(p.shape) / p.numel()).to(p.dtype) * p.detach()


def one_step(ps: list[nn.Parameter], optimizer: NLCG) -> None:
    quadratic_gradients(ps)
    optimizer.step()


SKIPPED = list(_native.SCALARS).index("skipped_steps")


def everything(ps: list[nn.Parameter], optimizer: NLCG) -> str:
    """All bits of parameters, state and scalars."""
    torch.set_printoptions(profile="full", precision=20)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop("lr")
        group["scalars"][SKIPPED] = 0.0
    return repr([p.detach().view(torch.uint8) if p.numel() and p.is_contiguous() else p for p in ps]) + repr(state)


def quantized() -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):  # torch says that they will go
        return torch.quantize_per_tensor(torch.ones(()), 0.1, 0, torch.qint8)


def scalar(saved: dict, name: str, value: float) -> None:
    saved["param_groups"][0]["scalars"][list(_native.SCALARS).index(name)] = value


DIAGONAL = {"adam": "exp_avg_sq", "bfgs": "hessian_diag"}


class TestAHyperParameters:
    @pytest.mark.parametrize(
        ("keywords", "error", "match"),
        [
            ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
            ({"lr": math.nan}, ValueError, "Invalid learning rate: nan"),
            ({"lr": math.inf}, ValueError, "Invalid learning rate: inf"),
            ({"lr": "0.1"}, TypeError, "lr"),
            ({"lr": None}, TypeError, "lr"),
            ({"lr": 0.1j}, TypeError, "lr"),
            ({"lr": True}, TypeError, "lr"),
            ({"lr": torch.ones(2)}, ValueError, r"Tensor lr must be 1-element, got shape \(2,\)"),
            ({"eps": -1e-8}, ValueError, "Invalid eps"),
            ({"eps": math.nan}, ValueError, "Invalid eps"),
            ({"curvature_eps": -1.0}, ValueError, "Invalid curvature_eps"),
            ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay"),
            ({"weight_decay": math.nan}, ValueError, "Invalid weight_decay"),
            ({"update": "newton"}, ValueError, "'fletcher_reeves', 'polak_ribiere', 'heavy_ball'; got 'newton'"),
            ({"update": "heavy_ball", "preconditioner": "bfgs"}, ValueError, "beta_max < 1"),
            ({"beta2": 1.0}, ValueError, r"Invalid beta2: 1.0; expected a number in \[0, 1\)"),
            ({"beta2": -0.1}, ValueError, "Invalid beta2"),
            ({"beta2": None}, TypeError, "beta2"),
            ({"beta_max": 1.1}, ValueError, "Invalid beta_max: 1.1"),
            ({"beta_max": math.nan}, ValueError, "Invalid beta_max"),
            ({"beta_max": "0.9"}, TypeError, "beta_max"),
            ({"eps": 0.0, "preconditioner": "adam"}, ValueError, "Invalid eps: 0.0; expected at least 1.17549e-38"),
            ({"update": 3}, TypeError, "update"),
            ({"preconditioner": "newton"}, ValueError, "'adam', 'bfgs', None"),
            ({"nonfinite": "ignore"}, ValueError, "'skip', 'propagate'"),
            ({"line_search": (0.02, 0.01, 0.025, 0.025)}, TypeError, "OnlineLineSearch"),
            ({"maximize": 1}, TypeError, "maximize"),
            ({"differentiable": True}, ValueError, "differentiable"),
            ({"momentum": 0.9}, TypeError, "momentum"),
        ],
    )
    def test_1_to_10(self, keywords: dict, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            NLCG([parameter(3)], **{"lr": 0.1, **keywords})

    def test_7_inside_a_group(self) -> None:
        with pytest.raises(ValueError, match="Invalid learning rate"):
            NLCG([{"params": [parameter(3)], "lr": -1.0}], 0.1)
        ps, optimizer = stepped()
        before = everything(ps, optimizer)
        for group, error in (
            ({"weight_decay": -1.0}, ValueError),
            ({"lr": "a"}, TypeError),
            ({"eps": 1.0}, ValueError),
        ):
            with pytest.raises(error):
                optimizer.add_param_group({"params": [parameter(3)], **group})
        assert everything(ps, optimizer) == before
        one_step(ps, optimizer)

    def test_8_between_steps(self) -> None:
        ps, optimizer = stepped()
        before = everything(ps, optimizer)
        quadratic_gradients(ps)
        for key, value in (
            ("lr", math.nan),
            ("lr", torch.ones(2)),
            ("weight_decay", -1.0),
            ("update", "newton"),
            ("preconditioner", None),
        ):
            good = optimizer.param_groups[0][key]
            optimizer.param_groups[0][key] = value
            with pytest.raises(ValueError, match="lr|learning rate|" + key):
                optimizer.step()
            optimizer.param_groups[0][key] = good
        assert everything(ps, optimizer) == before
        optimizer.step()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_9_lr_0_moves_no_bit(self, dtype: torch.dtype) -> None:
        p = nn.Parameter(torch.tensor([-0.0, 0.0, 1.5, -2.0, math.inf] * 9).to(dtype))
        before = p.detach().clone()
        optimizer = NLCG([p], 0.0)
        for _ in range(3):
            p.grad = torch.full_like(p, -1.0)
            optimizer.step()
        assert torch.equal(p.detach().view(torch.uint8), before.view(torch.uint8))
        assert optimizer.diagnostics().step == 3


@pytest.mark.usefixtures("cpu_or_emulated")
class TestBParameterLists:
    def test_11_to_15(self, preconditioner: str) -> None:
        with pytest.raises(ValueError, match="empty"):
            NLCG([], 0.1, preconditioner=preconditioner)
        with pytest.raises(TypeError):
            NLCG(parameter(3), 0.1, preconditioner=preconditioner)
        p = parameter(3)
        with pytest.warns(UserWarning, match="duplicate"):
            NLCG([p, p], 0.1, preconditioner=preconditioner)
        with pytest.raises(ValueError, match="leaf"):
            NLCG([p * 2], 0.1, preconditioner=preconditioner)
        optimizer = NLCG([{"params": []}, {"params": [p]}], 0.1, preconditioner=preconditioner)
        one_step([p], optimizer)

    @pytest.mark.parametrize("places", [(0,), (2,), (3,), (0, 2, 3)])
    def test_16_zero_length_tensors(self, places: tuple[int, ...], preconditioner: str) -> None:
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

    def test_16_only_a_zero_length_tensor(self, preconditioner: str) -> None:
        p = parameter(0)
        optimizer = NLCG([p], 0.1, preconditioner=preconditioner)
        p.grad = torch.zeros(0)
        optimizer.step()
        optimizer.step()

    def test_17_to_19(self, preconditioner: str) -> None:
        scalar = parameter()
        optimizer = NLCG([scalar], 0.1, preconditioner=preconditioner)
        scalar.grad = torch.tensor(2.0)
        before = scalar.item()
        optimizer.step()
        assert scalar.item() == pytest.approx(before - (0.1 if preconditioner == "adam" else 0.2))

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

        three = [parameter(4, seed=i) for i in range(3)]
        shared = torch.randn(4)
        optimizer = NLCG(three, 0.5, preconditioner=preconditioner)
        before = [p.detach().clone() for p in three]
        for p in three:
            p.grad = shared
        optimizer.step()
        for p, b in zip(three, before, strict=True):
            torch.testing.assert_close(p.detach(), b - 0.5 * (shared.sign() if preconditioner == "adam" else shared))


class TestCTypeDeviceLayout:
    def test_20_and_21_dtypes(self) -> None:
        """Of parameters that take gradients; what is frozen may be of any kind, as quantized bases under adapters
        are."""
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

    def refused(self, ps: list, grads: list, error: type[Exception], match: str) -> None:
        """At step, after three good ones over the first parameter."""
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

    def test_23_mixed_dtypes(self) -> None:
        """float32, bfloat16 and float16 mix; float64 is refused beside them."""
        mixed = [parameter(40, dtype=d, seed=i) for i, d in enumerate((torch.float32, torch.bfloat16, torch.float16))]
        optimizer = NLCG(mixed, 0.1)
        before = [p.detach().clone() for p in mixed]
        for _ in range(5):
            one_step(mixed, optimizer)
        assert all(p.square().sum() < b.square().sum() for p, b in zip(mixed, before, strict=True))
        p = parameter(3, dtype=torch.float64)
        self.refused(
            [p], [torch.ones_like(p)], TypeError, "parameter 1 is torch.float64 and parameter 0 is torch.float32"
        )

    def test_24_a_gradient_of_another_dtype(self) -> None:
        p = parameter(3)
        p.grad = torch.ones(3)
        p.data = p.data.double()
        with pytest.raises(RuntimeError, match="gradient of parameter 0.*float32.*float64"):
            NLCG([p], 0.1).step()

    def test_26_meta(self) -> None:
        p = nn.Parameter(torch.empty(3, device="meta"))
        self.refused([p], [torch.empty(3, device="meta")], RuntimeError, "parameter 1 .*on meta.*expected cpu")

    def test_27_sparse(self) -> None:
        p = parameter(3, 2)
        sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (3, 2), check_invariants=False)
        self.refused([p], [sparse], RuntimeError, "gradient of parameter 1.*sparse")

    def test_28_parameters_that_are_not_dense(self) -> None:
        """Gaps are stepped over, as torch's optimizers do, and what lies in them stays; overlaps are refused."""
        for p in (torch.zeros(1).expand(4), torch.zeros(6).as_strided((2, 3), (2, 1))):
            p = nn.Parameter(p)
            self.refused([p], [torch.ones(p.shape)], ValueError, "parameter 1 .*strides")
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

    def test_29_and_30_strides_of_gradients(self) -> None:
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

    def test_34_wrapper_tensors_and_plain_subclasses(self) -> None:
        from torch.testing._internal.two_tensor import TwoTensor

        p = nn.Parameter(TwoTensor(torch.zeros(3), torch.zeros(3)))
        self.refused([p], [TwoTensor(torch.ones(3), torch.ones(3))], TypeError, "parameter 1 .*TwoTensor")

        class Tagged(nn.Parameter):
            pass

        tagged = Tagged(torch.ones(3))
        one_step([tagged], NLCG([tagged], 0.1))
        assert not torch.equal(tagged, torch.ones(3))


@pytest.mark.usefixtures("cpu_or_emulated")
class TestENumbers:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("keywords", [{}, {"preconditioner": None}, {"update": "polak_ribiere"}])
    def test_45_a_nonfinite_gradient(self, keywords: dict, value: float, preconditioner: str) -> None:
        keywords = {"preconditioner": preconditioner, "line_search": OnlineLineSearch(), **keywords}
        ps, optimizer = stepped(**keywords)
        qs, expected = stepped(**keywords)
        before = everything(ps, optimizer)
        quadratic_gradients(ps)
        ps[1].grad[0, 1] = value
        optimizer.step(loss=100.0)
        assert everything(ps, optimizer) == before
        assert optimizer.diagnostics().skipped_steps == 1
        for _ in range(3):
            one_step(ps, optimizer)
            one_step(qs, expected)
        assert everything(ps, optimizer) == everything(qs, expected)

    def test_45_in_the_first_step_and_propagated(self, preconditioner: str) -> None:
        p = parameter(5)
        optimizer = NLCG([p], 0.1, preconditioner=preconditioner)
        p.grad = torch.full((5,), math.nan)
        before = p.detach().clone()
        optimizer.step()
        assert torch.equal(p, before)
        assert optimizer.diagnostics().step == 0
        optimizer = NLCG([p], 0.1, nonfinite="propagate", preconditioner=preconditioner)
        optimizer.step()
        assert torch.isnan(p).all()

    @pytest.mark.parametrize("eps", [1e-8, 0.0])
    def test_45_a_sum_that_overflows_only_in_pass_2(self, eps: float) -> None:
        """Every g is finite and so is sum(g s), but g / (h + eps) is not: h must not have been written by then."""
        ps, optimizer = stepped(eps=eps, preconditioner="bfgs")
        with torch.no_grad():
            optimizer.state[ps[0]]["hessian_diag"].fill_(0.0)
            optimizer.state[ps[0]]["direction"].fill_(0.0)
            optimizer.state[ps[0]]["grad_prev"].fill_(3e38)
        before = everything(ps, optimizer)
        quadratic_gradients(ps)
        ps[0].grad = torch.full_like(ps[0], 3e38)
        optimizer.step()
        assert optimizer.diagnostics().skipped_steps == 1
        assert everything(ps, optimizer) == before

    def test_46_zero_gradients(self, preconditioner: str) -> None:
        p = parameter(5)
        before = p.detach().clone()
        optimizer = NLCG([p], 0.1, preconditioner=preconditioner)
        for _ in range(3):
            p.grad = torch.zeros(5)
            optimizer.step()
        assert torch.equal(p, before)
        assert optimizer.diagnostics().beta == 0.0
        assert math.isnan(optimizer.diagnostics().cosine)

    @pytest.mark.parametrize("slope", [0.0, -1.0])
    def test_47_48_no_positive_curvature(self, slope: float) -> None:
        p = parameter(5)
        optimizer = NLCG([p], 0.1, preconditioner="bfgs")
        for _ in range(4):
            p.grad = 1.0 + slope * p.detach()
            optimizer.step()
            assert not optimizer.diagnostics().updated
            assert torch.equal(optimizer.state[p]["hessian_diag"], torch.ones(5))

    @pytest.mark.parametrize("scale", [1e19, 1e30, 1e-30, 1e-42])
    def test_49_50_extreme_gradients(self, scale: float, preconditioner: str) -> None:
        p = parameter(40)
        optimizer = NLCG([p], 1e-3 / max(scale, 1.0), preconditioner=preconditioner)
        for t in range(6):
            p.grad = scale * (p.detach() + 0.1 * t)
            optimizer.step()
            state = optimizer.state[p]
            assert all(torch.isfinite(state[key]).all() for key in state)
            assert (state[DIAGONAL[preconditioner]] >= 0).all()
            assert torch.isfinite(p).all()
        too_large = preconditioner == "adam" and scale >= 1e19  # g^2 overflows: the step skips, and says so
        assert optimizer.diagnostics().skipped_steps == (6 if too_large else 0)

    def test_49_h_stays_finite_where_its_formula_overflows(self, preconditioner: str) -> None:
        p = nn.Parameter(torch.zeros(3))
        optimizer = NLCG([p], 1e-30, preconditioner=preconditioner)
        for g in ([1.0, 1.0, 1e30], [1.0, 1.0, -3e35], [1.0, 1.0, 3e35]):
            p.grad = torch.tensor(g)
            optimizer.step()
            assert torch.isfinite(optimizer.state[p][DIAGONAL[preconditioner]]).all()
            assert torch.isfinite(p).all()

    @pytest.mark.parametrize(
        "loss", [math.nan, math.inf, 0.0, -3.0, None, torch.tensor(2.0), torch.tensor([1.0]), np.float32(1)]
    )
    def test_52_losses(self, loss: object) -> None:
        ps, optimizer = stepped(line_search=OnlineLineSearch(), preconditioner="bfgs")
        for value in (1.0, loss, 2.0, loss, 1.0):
            quadratic_gradients(ps)
            optimizer.step(loss=value)
            assert 0.0 < optimizer.diagnostics().ls_scale <= 1.0
        for bad, error in (("1", TypeError), (1j, TypeError), (torch.ones(2), ValueError), (object(), TypeError)):
            with pytest.raises(error, match="loss"):
                optimizer.step(loss=bad)


def diagonal(saved: dict) -> str:
    return DIAGONAL[saved["param_groups"][0]["preconditioner"]]


@pytest.mark.usefixtures("cpu_or_emulated")
class TestFState:
    def bad(self, change: object, match: str, preconditioner: str) -> None:
        ps, optimizer = stepped(preconditioner=preconditioner)
        saved = copy.deepcopy(optimizer.state_dict())
        result = change(saved)  # changes `saved`, or returns another dict
        changed = result if isinstance(result, dict) else saved
        before = everything(ps, optimizer)
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(changed)
        assert everything(ps, optimizer) == before
        one_step(ps, optimizer)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda s: s["state"][1].update(direction=torch.ones(3)), "parameter 1.*'direction'.*shape"),
            (lambda s: s["state"][0].pop("direction"), "parameter 0 has .*expected the keys"),
            (lambda s: s["state"][0].update(direction="abc"), "'direction' is str"),
            (lambda s: s["state"][0].update(direction=torch.ones(20, dtype=torch.int64)), "'direction' is torch.int64"),
            (lambda s: s["state"][0].update(step=torch.tensor(-1.0)), "'step'"),
            (lambda s: s["state"][0].update(step="3"), "'step'"),
            (lambda s: s["state"][0][diagonal(s)].fill_(math.nan), "'(hess|exp).*' has values that are not finite"),
            (lambda s: s["state"][0][diagonal(s)].fill_(-1.0), "'(hess|exp).*' has negative"),
            (lambda s: s["state"].update({7: s["state"][0]}), "parameter 7"),
            (lambda s: s["param_groups"].append(s["param_groups"][0]), "param_groups have"),
            (lambda s: s["param_groups"][0]["params"].append(2), "param_groups have"),
            (lambda s: scalar(s, "rz", math.nan), r"param_groups\[0\]\['scalars'\], 'rz', is nan"),
            (lambda s: scalar(s, "ls_scale", 0.0), "ls_scale"),
            (lambda s: scalar(s, "step", 1.5), "'step'.*whole number"),
            (lambda s: s["param_groups"][0].pop("alpha_prev"), "'alpha_prev'.*missing"),
            (lambda s: s["param_groups"][0].pop("scalars"), "'scalars'.*missing"),
            (lambda s: s["param_groups"][0].update(scalars=None), "'scalars'.*NoneType"),
            (lambda s: s["param_groups"][0].update(scalars=torch.zeros(3)), "'scalars'.*shape"),
            (lambda s: s["param_groups"][0].update(alpha_prev=torch.zeros(1)), "'alpha_prev'.*shape"),
            (lambda s: s["param_groups"][0].update(scalars={"rz": "1"}), "rz"),
            (lambda s: s["state"][0].update(step=quantized()), "'step'"),
            (lambda s: s["param_groups"][0].update(lr=-1.0), r"param_groups\[0\]: Invalid learning rate"),
            (lambda s: s["param_groups"][0].update(update="newton"), "update"),
            (lambda s: {"state": s["state"]}, "param_groups"),
            (lambda s: {"state": [], "param_groups": s["param_groups"]}, "mapping"),
            (lambda s: {"state": {}, "param_groups": "abc"}, "param_groups"),
        ],
    )
    def test_54_bad_state_dicts(self, change: object, match: str, preconditioner: str) -> None:
        self.bad(change, match, preconditioner)

    def test_54_options_follow_the_state_dict(self, preconditioner: str) -> None:
        """As in torch; the preconditioner among them."""
        ps, optimizer = stepped(preconditioner=preconditioner)
        qs, other = stepped(preconditioner=None)
        optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
        with torch.no_grad():
            for p, q in zip(ps, qs, strict=True):
                p.copy_(q)
        for _ in range(2):
            one_step(ps, optimizer)
            one_step(qs, other)
        assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))
        assert optimizer.diagnostics() == other.diagnostics()

    def test_54_other_optimizers_state(self, preconditioner: str) -> None:
        ps, optimizer = stepped(preconditioner=preconditioner)
        adam = torch.optim.Adam(ps, 0.1)
        adam.step()
        with pytest.raises(ValueError, match=r"lacks the key|expected the keys"):
            optimizer.load_state_dict(adam.state_dict())

    def test_54_state_of_another_dtype_is_converted_and_stays_float32(self, preconditioner: str) -> None:
        ps, optimizer = stepped(preconditioner=preconditioner)
        saved = copy.deepcopy(optimizer.state_dict())
        for entry in saved["state"].values():
            entry["direction"] = entry["direction"].double()
        half = [nn.Parameter(p.detach().bfloat16()) for p in ps]
        other = NLCG(half, 0.1, preconditioner=preconditioner)
        other.load_state_dict(saved)
        assert other.state[half[0]]["direction"].dtype == torch.float32
        assert torch.equal(other.state[half[0]]["direction"], optimizer.state[ps[0]]["direction"])
        one_step(half, other)

    def test_55_storage_swapped(self, preconditioner: str) -> None:
        """The new storage is followed; so are a new dtype or layout at, possibly, the same address."""
        ps, optimizer = stepped(preconditioner=preconditioner)
        qs, expected = stepped(preconditioner=preconditioner)
        for p in ps:
            p.data = p.data.clone()
        one_step(ps, optimizer)
        one_step(qs, expected)
        assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))

        ps[1].data = ps[1].data.t().contiguous().t()  # other strides: state follows by index
        one_step(ps, optimizer)
        one_step(qs, expected)
        for p, q in zip(ps, qs, strict=True):
            torch.testing.assert_close(p, q)
            key = DIAGONAL[preconditioner]
            torch.testing.assert_close(optimizer.state[p][key], expected.state[q][key])

    def test_55_resized(self, preconditioner: str) -> None:
        ps, optimizer = stepped(preconditioner=preconditioner)
        ps[0].data = torch.ones(21)
        ps[0].grad = torch.ones(21)
        with pytest.raises(RuntimeError, match="parameter 0 .*shape"):
            optimizer.step()

    def test_55_sets_that_change(self, preconditioner: str) -> None:
        """A late first gradient, freezing and unfreezing, add_param_group: in that step beta = 0, and h is kept."""
        ps = [parameter(20, seed=1), parameter(3, 4, seed=2), parameter(7, seed=3)]
        optimizer = NLCG(ps[:2], 0.1, preconditioner=preconditioner)

        def step(active: list[int]) -> None:
            for i, p in enumerate(ps):
                p.grad = None
                if i in active:
                    quadratic_gradients([p])
            optimizer.step()

        for active in ([0], [0], [0, 1], [0, 1], [1], [1], [0, 1], [0, 1]):
            resting = [i for i in (0, 1) if i not in active and optimizer.state.get(ps[i])]
            kept = {i: copy.deepcopy(optimizer.state[ps[i]]) for i in resting}
            weights = {i: ps[i].detach().clone() for i in resting}
            before = optimizer.diagnostics()
            h = optimizer.state[ps[0]][DIAGONAL[preconditioner]].clone() if before.step else None
            step(active)
            after = optimizer.diagnostics()
            assert all(torch.equal(ps[i], w) for i, w in weights.items())
            assert all(torch.equal(optimizer.state[ps[i]][k], v) for i, s in kept.items() for k, v in s.items())
            if before.step and after.beta == 0.0 and preconditioner == "bfgs":
                assert torch.equal(optimizer.state[ps[0]]["hessian_diag"], h)
        assert after.beta > 0
        optimizer.add_param_group({"params": [ps[2]], "lr": 0.05})
        step([0, 1, 2])
        assert optimizer.diagnostics().beta == 0.0
        if preconditioner == "adam":  # bias-corrected by its own count: h = |g|
            torch.testing.assert_close(optimizer.state[ps[2]]["direction"], -ps[2].grad.sign())
        else:
            assert torch.equal(optimizer.state[ps[2]]["direction"], -ps[2].grad)  # h = 1
        step([0, 1, 2])
        assert optimizer.diagnostics().beta > 0
        assert optimizer.diagnostics().updated

    def test_55_weights_edited_between_steps(self, preconditioner: str) -> None:
        p = parameter(200)
        optimizer = NLCG([p], 0.1, preconditioner=preconditioner)
        largest = p.abs().max()
        for t in range(100):
            if t % 10 == 5:
                with torch.no_grad():
                    p.neg_().add_(0.1)
            one_step([p], optimizer)
            assert p.abs().max() < 2 * largest + 1

    def test_state_cleared_by_hand_starts_again(self, preconditioner: str) -> None:
        ps, optimizer = stepped(preconditioner=preconditioner)
        optimizer.state.clear()
        qs = [nn.Parameter(p.detach().clone()) for p in ps]
        expected = NLCG(qs, 0.1, preconditioner=preconditioner)
        for _ in range(3):
            one_step(ps, optimizer)
            one_step(qs, expected)
        assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))

    def test_groups_that_go_and_come_back(self, preconditioner: str) -> None:
        ps = [parameter(3), parameter(4)]
        optimizer = NLCG([{"params": [ps[0]]}, {"params": [ps[1]]}], 0.1, preconditioner=preconditioner)
        quadratic_gradients(ps)
        groups, optimizer.param_groups = optimizer.param_groups, optimizer.param_groups[:1]
        optimizer.step()  # as after a deletion: nobody can tell
        assert optimizer.diagnostics().direction_norm == pytest.approx(ps[0].grad.norm().item(), rel=1e6)
        assert ps[1] not in optimizer.state
        optimizer.param_groups = groups
        optimizer.step()
        assert optimizer.diagnostics().beta == 0.0  # another set

    def test_a_step_before_any_gradient_does_nothing(self, preconditioner: str) -> None:
        """Once an IndexError; torch's optimizers do nothing. Also by a closure, and after a load."""
        ps, optimizer = stepped(preconditioner=preconditioner)
        qs = [nn.Parameter(p.detach().clone()) for p in ps]
        other = NLCG(qs, 0.1, preconditioner=preconditioner)
        other.step()
        assert other.step(lambda: 3.0) == 3.0
        assert not other.state
        assert other.diagnostics().step == 0
        other.load_state_dict(copy.deepcopy(other.state_dict()))  # without state
        other.step()
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # with state
        other.step()
        assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))
        assert other.diagnostics().step == 3
        for _ in range(2):
            one_step(ps, optimizer)
            one_step(qs, other)
        assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))

    @pytest.mark.parametrize("before", [0, 3])
    def test_a_new_group_without_gradients(self, before: int, preconditioner: str) -> None:
        """Once a ValueError in every step. The old groups go on as if it were not there; so with an empty group."""
        ps, optimizer = [parameter(20, seed=1)], None
        qs = [nn.Parameter(p.detach().clone()) for p in ps]
        optimizer, expected = NLCG(ps, 0.1, preconditioner=preconditioner), NLCG(qs, 0.1, preconditioner=preconditioner)
        for _ in range(before):
            one_step(ps, optimizer)
            one_step(qs, expected)
        late = parameter(7, seed=3)
        optimizer.add_param_group({"params": [late], "lr": 0.05})
        optimizer.add_param_group({"params": []})
        for _ in range(3):
            one_step(ps, optimizer)
            one_step(qs, expected)
        assert torch.equal(ps[0], qs[0])
        assert optimizer.diagnostics() == expected.diagnostics()
        kept = late.detach().clone()
        one_step([*ps, late], optimizer)
        assert optimizer.diagnostics().beta == 0.0
        assert not torch.equal(late, kept)


class TestGControlFlow:
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
    def test_56_closure_raises(self, error: type[BaseException]) -> None:
        ps, optimizer = stepped()
        qs, expected = stepped()
        before = everything(ps, optimizer)

        def closure() -> float:
            quadratic_gradients(ps)
            raise error

        with pytest.raises(error):
            optimizer.step(closure)
        assert everything(ps, optimizer) == before
        one_step(ps, optimizer)
        one_step(qs, expected)
        assert everything(ps, optimizer) == everything(qs, expected)

    def test_57_two_optimizers_in_two_threads(self) -> None:
        """As serial, bit for bit; each large enough for OpenMP."""

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

    def test_57_one_optimizer_in_two_threads(self) -> None:
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

    def test_57_diagnostics_wait_for_a_step_in_another_thread(self) -> None:
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

    def test_57_fork_after_use(self) -> None:
        """The child computes alone (libgomp's pool is gone there), with the same bits."""
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
total = repr(p.detach().numpy().tobytes().__hash__())
if child == 0:
    os.write(w, p.detach().numpy().tobytes()[:64])
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert os.read(r, 64) == p.detach().numpy().tobytes()[:64]
print("same")
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr

    def test_57_interpreter_exit_with_live_objects(self) -> None:
        code = """
import torch, fastnlcg
p = torch.nn.Parameter(torch.ones(100_000)); p.grad = torch.ones(100_000)
keep = fastnlcg.NLCG([p], 0.1); keep.step()
"""
        assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0

    def test_58_ddp_replicas_stay_bit_equal_skips_included(self, tmp_path: Path) -> None:
        """Two processes, gloo. Rank 1 alone meets an infinity; the all-reduced gradient has it on both."""
        code = f"""
import os, sys, torch
import torch.distributed as dist
from torch import nn
from fastnlcg import NLCG, OnlineLineSearch
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/rendezvous", rank=rank, world_size=2)
torch.set_num_threads(1 + rank)
os.environ["FASTNLCG_ISA"] = ({backends.NARROWEST!r}, "")[rank]
torch.manual_seed(0)
net = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(40, 900), nn.Tanh(), nn.Linear(900, 3)),
                                          gradient_as_bucket_view=True)
optimizer = NLCG(net.parameters(), 0.1, update="polak_ribiere", line_search=OnlineLineSearch(),
                 average_loss=False)
torch.manual_seed(rank + 1)
for t in range(8):
    x = torch.randn(16, 40)
    if t == 4 and rank == 1:
        x[0, 0] = float("inf")
    optimizer.zero_grad()
    loss = net(x).square().mean()
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    optimizer.step(loss=mean / 2)
assert optimizer.diagnostics().skipped_steps == 1 and optimizer.diagnostics().step == 7
both = [torch.empty(0)] * 2
dist.all_gather_object(both, [p.detach().numpy().tobytes() for p in net.parameters()] + [repr(optimizer.diagnostics())])
assert both[0] == both[1]
os._exit(0)  # gloo's threads may want the GIL of an interpreter that ends, and abort (pytorch#190489)
"""
        ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]

    def test_same_bits_for_torchs_thread_counts(self) -> None:
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


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc/self/clear_refs")
def test_a_step_allocates_nothing_of_the_parameters_size() -> None:
    """Resident memory does not grow during a step: measured, on 40 MB of parameters."""

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


# ---- found by attacks: each was red once -----------------------------------------------------------------------------


class TestHAttacks:
    def test_a_group_without_decay_beside_one_with(self) -> None:
        """0 * inf: an infinite parameter without decay, in the block of one with decay, became NaN."""
        ps = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.full((5,), math.inf))]
        for p in ps:
            p.grad = torch.ones(5)
        groups = [{"params": [ps[0]], "weight_decay": 0.1}, {"params": [ps[1]]}]
        optimizer = NLCG(groups, 0.1, preconditioner=None)
        optimizer.step()
        assert optimizer.diagnostics().skipped_steps == 0
        assert torch.isfinite(ps[0]).all()

    @pytest.mark.parametrize("n", [5, 16, 40])
    def test_the_sign_of_a_zero_where_alpha_underflows(self, cpu_or_emulated: backends.Backend, n: int) -> None:
        p = nn.Parameter(torch.full((n,), -0.0))
        p.grad = torch.full((n,), -1.0)
        NLCG([p], 1e-46, preconditioner=None).step()
        assert bool(torch.signbit(p).all())

    def test_a_tiny_eps_does_not_let_a_skipped_step_write_h(self, cpu_or_emulated: backends.Backend) -> None:
        """In float32 an eps of 1e-50 is 0: where h is 0 pass 2 then divides by it."""
        ps, optimizer = stepped(preconditioner="bfgs", eps=1e-50)
        optimizer.state[ps[0]]["hessian_diag"].view(-1)[0] = 0.0
        before = everything(ps, optimizer)
        quadratic_gradients(ps)
        ps[0].grad.view(-1)[0] = optimizer.state[ps[0]]["grad_prev"].view(-1)[0]  # y = 0 there: h stays 0
        optimizer.state[ps[0]]["direction"].view(-1)[0] = 0.0
        before = everything(ps, optimizer)
        optimizer.step()
        if optimizer.diagnostics().skipped_steps:
            assert everything(ps, optimizer) == before

    def test_many_skipped_sets_do_not_forget_the_last_one(self, cpu_or_emulated: backends.Backend) -> None:
        ps = [parameter(3, seed=k) for k in range(8)]
        optimizer = NLCG(ps, 0.01)
        for _ in range(2):
            one_step(ps, optimizer)
        for k in range(1, 200):  # other sets, all skipped
            for i, p in enumerate(ps):
                p.grad = torch.full((3,), math.nan) if k >> i & 1 else None
            optimizer.step()
        one_step(ps, optimizer)
        assert optimizer.diagnostics().beta > 0

    @pytest.mark.parametrize("backend_name", ["cpu"])
    def test_state_set_by_hand_is_taken(self, backend_name: str) -> None:
        ps, optimizer = stepped()
        qs, other = stepped()
        zero = torch.zeros_like(ps[0])
        optimizer.state[ps[0]]["direction"] = zero  # another tensor
        other.state[qs[0]]["direction"].zero_()  # in place
        one_step(ps, optimizer)
        one_step(qs, other)
        assert torch.equal(ps[0], qs[0])
        assert torch.equal(optimizer.state[ps[0]]["direction"], other.state[qs[0]]["direction"])
        optimizer.state[ps[1]] = {}  # starts again
        one_step(ps, optimizer)
        assert optimizer.state[ps[1]]["step"] == 1
        assert optimizer.diagnostics().beta == 0.0

    def test_a_model_that_becomes_double_between_steps(self) -> None:
        ps, optimizer = stepped()
        for p in ps:
            p.data = p.data.double()
        one_step(ps, optimizer)
        assert all(s["direction"].dtype == torch.float64 for s in optimizer.state.values())
        assert optimizer.diagnostics().step == 4

    @pytest.mark.parametrize(
        ("keywords", "match"),
        [
            ({"lr": 10**400}, "Invalid learning rate"),
            ({"eps": 10**400}, "Invalid eps"),
        ],
    )
    def test_numbers_beyond_a_double(self, keywords: dict, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            NLCG([parameter(3)], **keywords)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda s: s["state"][0].update(step=2**63), r"'step'.*2\*\*53"),
            (lambda s: s["state"][0].update(step=1e308), r"'step'.*2\*\*53"),
            (lambda s: s["state"][0].update(direction=torch.full((20,), 1e300, dtype=torch.float64)), "not finite"),
            (lambda s: s["param_groups"][0].update(params=[0, 0]), "twice"),
        ],
    )
    def test_checkpoints_that_would_fail_later(self, change: object, match: str) -> None:
        ps, optimizer = stepped()
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved)
        before = everything(ps, optimizer)
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(saved)
        assert everything(ps, optimizer) == before

    def test_own_checkpoints_are_taken_after_a_propagated_nan(self) -> None:
        ps, optimizer = stepped(nonfinite="propagate")
        ps[0].grad.fill_(math.nan)
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def test_a_step_count_of_one_element_is_taken(self) -> None:
        ps, optimizer = stepped()
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["step"] = torch.tensor([3.0])
        optimizer.load_state_dict(saved)
        one_step(ps, optimizer)
        assert optimizer.state[ps[0]]["step"] == 4

    def test_an_interrupt_leaves_no_move_that_autograd_has_not_heard_of(self) -> None:
        """Ctrl-C in the middle of the native step: it ends, then KeyboardInterrupt."""
        import signal

        p = parameter(3_000_000)
        p.grad = torch.ones_like(p)
        optimizer = NLCG([p])
        optimizer.step()
        before, version = p.detach().clone(), p._version

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
        assert p._version > version or torch.equal(p, before)
        steps = optimizer.diagnostics().step
        assert optimizer.state_dict()["state"][0]["step"] == steps
        optimizer.step()
        assert optimizer.diagnostics().step == steps + 1

    def test_diagnostics_in_a_signal_handler_do_not_deadlock(self) -> None:
        import signal

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
            finally:  # once more, and never into itself: where reading is slow, handlers would nest without end
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

    def test_a_child_forked_while_another_thread_steps(self) -> None:
        """It steps, or is told why it cannot; it does not wait for a thread that it does not have."""
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
                except RuntimeError as error:  # the step was under way, so its state is torn here: refused for good
                    os._exit(0 if "another thread" in str(error) else 1)
                finally:
                    os._exit(2)
            children.append(pid)
        thread.join()
        for pid in children:
            assert os.waitpid(pid, 0)[1] == 0


class TestMemoryAndModes:
    """What a round of attacks found, and is neither of the lists above."""

    def test_parameters_that_share_memory_are_refused(self, cpu_or_emulated: backends.Backend) -> None:
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
        optimizer.step()  # side by side is apart
        ps[1].data = base[3:10]  # and where somebody moves one later, through the table that is only refreshed
        quadratic_gradients(ps)
        with pytest.raises(ValueError, match="parameter 0 and parameter 1 share memory"):
            optimizer.step()

    def test_bits_do_not_depend_on_the_callers_floating_point_mode(self, preconditioner: str) -> None:
        """torch.set_flush_denormal() holds for one thread, so one and two threads differed."""
        runs = []
        start, gradient = torch.linspace(1e-39, 3e-38, 40_000), torch.linspace(1e-42, 1e-37, 40_000)
        for flush, threads in ((False, 1), (True, 1), (True, 2), (False, 2)):
            torch.set_num_threads(threads)
            torch.set_flush_denormal(flush)
            try:
                p = nn.Parameter(start.clone())
                optimizer = NLCG([p], 0.1, preconditioner=preconditioner)
                for _ in range(3):
                    p.grad = gradient
                    optimizer.step()
                assert (torch.tensor(1e-39) * 1.0 == 0.0) == flush  # the caller's mode is his again
            finally:
                torch.set_flush_denormal(False)
                torch.set_num_threads(2)
            runs.append([x.numpy().tobytes() for x in (p.detach(), optimizer.state[p]["direction"])])
        assert all(run == runs[0] for run in runs)

    @pytest.mark.parametrize("own", ["adam", "bfgs", None])
    def test_a_state_after_enormous_gradients_loads(self, own: str | None) -> None:
        p = parameter(5)
        optimizer = NLCG([p], 1e-30, preconditioner=own)
        for _ in range(4):
            p.grad = torch.full((5,), 2e38)
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        again = NLCG([p], 0.1, preconditioner=own)
        again.load_state_dict(saved)
        assert torch.equal(again.state[p]["direction"], optimizer.state[p]["direction"])
        saved["state"][0]["direction"][1] = math.nan
        with pytest.raises(ValueError, match="'direction' has values that are not finite"):
            again.load_state_dict(saved)

    @pytest.mark.parametrize("late", [False, True], ids=["first step", "a new group"])
    def test_out_of_memory_when_state_is_made(
        self, preconditioner: str, late: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Wherever it runs out: nothing has changed, and the next step is that of a run in which it did not."""
        for room in range(3):
            ps, qs = ([parameter(20, seed=1), parameter(3, 4, seed=2)] for _ in range(2))
            optimizer, expected = (
                NLCG(ps if not late else ps[:1], 0.1, preconditioner=preconditioner),
                NLCG(qs if not late else qs[:1], 0.1, preconditioner=preconditioner),
            )
            if late:
                for _ in range(2):
                    one_step(ps[:1], optimizer)
                    one_step(qs[:1], expected)
                optimizer.add_param_group({"params": ps[1:]})
                expected.add_param_group({"params": qs[1:]})
            real, made = torch.empty_strided, []

            def empty(
                *args: object, real: object = real, made: list[int] = made, room: int = room, **kwargs: object
            ) -> torch.Tensor:
                made.append(1)
                if len(made) > room:
                    raise torch.OutOfMemoryError("no room")
                return real(*args, **kwargs)

            before = [p.detach().clone() for p in ps]
            quadratic_gradients(ps)
            with monkeypatch.context() as inside:
                inside.setattr(torch, "empty_strided", empty)
                try:
                    optimizer.step()
                except torch.OutOfMemoryError:
                    assert all(torch.equal(p, q) for p, q in zip(ps, before, strict=True))
                    inside.undo()
                    one_step(ps, optimizer)
            one_step(qs, expected)
            assert everything(ps, optimizer) == everything(qs, expected)
            assert len(made) >= 1

    def test_a_disk_that_is_full_while_saving(self, tmp_path: Path) -> None:
        """The file of before is whole, where the new one is renamed onto it; and training goes on."""
        ps, optimizer = stepped()
        qs, expected = stepped()
        file = tmp_path / "checkpoint.pt"
        torch.save(optimizer.state_dict(), file)
        saved = file.read_bytes()

        class Full(io.RawIOBase):
            def writable(self) -> bool:
                return True

            def write(self, data: object) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises((OSError, RuntimeError)):
            torch.save(optimizer.state_dict(), Full())
        assert file.read_bytes() == saved
        one_step(ps, optimizer)
        one_step(qs, expected)
        assert everything(ps, optimizer) == everything(qs, expected)
