"""The flat-buffer functions: what they compute, and on whose memory. test_ops_arguments.py has what they refuse."""

from __future__ import annotations

import array
import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from backends import Backend
from fastnlcg import OnlineLineSearch, ops, reference

N = 1000


BFGS = {"preconditioner": "bfgs"}


def step(x: dict[str, object], scalars: ops.Scalars, **options: object) -> bool:
    """A whole step with h as the diagonal."""
    named = {("diagonal" if name == "h" else name): array for name, array in x.items()}
    return ops.nlcg_step(**named, scalars=scalars, **{**BFGS, **options})


def arrays(n: int = N, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    state = ops._native.state_dtype(dtype)
    return {
        "p": rng.standard_normal(n).astype(dtype),
        "g": rng.standard_normal(n).astype(dtype),
        "g_prev": rng.standard_normal(n).astype(state),
        "d": rng.standard_normal(n).astype(state),
        "h": rng.uniform(0.5, 2.0, n).astype(state),
    }


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-12), ("float32", 1e-5)])
def test_the_parts_compute_the_equations(on_host: Backend, dtype: str, rtol: float) -> None:
    x = arrays(dtype=dtype)
    x["g"] = (x["g_prev"] - 0.3 * x["d"]).astype(dtype)  # so that ys > 0 for negative d . y
    e = {key: value.astype(float) for key, value in x.items()}
    y, s = e["g"] - e["g_prev"], -0.5 * e["d"]
    ys, shs = float(y @ s), float(s @ (e["h"] * s))

    dots = ops.preconditioned_dots(x["g"], x["g_prev"], x["h"], eps=0.1)
    assert dots.rz == pytest.approx(np.sum(e["g"] ** 2 / (e["h"] + 0.1)), rel=rtol)
    assert dots.rz_mid == pytest.approx(np.sum(e["g"] * e["g_prev"] / (e["h"] + 0.1)), rel=rtol)
    assert ops.preconditioned_dots(x["g"], None, None) == (pytest.approx(float(e["g"] @ e["g"]), rel=rtol), 0.0)

    curvature = ops.bfgs_diag_update(x["h"], x["g"], x["g_prev"], x["d"], alpha_prev=-0.5)
    assert curvature.ys == pytest.approx(ys, rel=rtol)
    assert curvature.shs == pytest.approx(shs, rel=rtol)
    assert curvature.updated
    h = reference.bfgs_diagonal(e["h"], y, s, ys, shs)
    np.testing.assert_allclose(x["h"], h, rtol=100 * rtol)

    ops.direction_update(x["d"], x["g"], x["h"], beta=0.7, eps=0.1, p=x["p"], alpha=0.2, g_prev=x["g_prev"])
    d = -e["g"] / (x["h"].astype(float) + 0.1) + 0.7 * e["d"]
    np.testing.assert_allclose(x["d"], d, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(x["p"], e["p"] + 0.2 * d, rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(x["g_prev"], x["g"])


def test_h_is_kept_without_positive_curvature(on_host: Backend) -> None:
    x = arrays()
    before = x["h"].copy()
    curvature = ops.bfgs_diag_update(x["h"], x["g"], x["g"].copy(), x["d"], alpha_prev=0.5)
    assert curvature == (0.0, pytest.approx(curvature.shs), False)
    np.testing.assert_array_equal(x["h"], before)
    x["g"][:] = x["g_prev"] - x["d"]  # ys < 0 for a positive step, > 0 for a negative one
    assert not ops.bfgs_diag_update(x["h"], x["g"], x["g_prev"], x["d"], alpha_prev=0.5).updated
    assert not ops.bfgs_diag_update(x["h"], x["g"], x["g_prev"], x["d"], alpha_prev=-0.5, curvature_eps=1e9).updated
    np.testing.assert_array_equal(x["h"], before)
    assert ops.bfgs_diag_update(x["h"], x["g"], x["g_prev"], x["d"], alpha_prev=-0.5).updated


@pytest.mark.parametrize("update", ["fletcher_reeves", "polak_ribiere"])
def test_a_step_from_its_parts_has_the_bits_of_the_fused_step(on_host: Backend, update: str) -> None:
    """The recipe in the module's docstring."""
    x, lr = arrays(), 0.05
    x["h"][:], x["d"][:], x["g_prev"][:] = 1, 0, 0
    own = copy.deepcopy(x)
    a = np.random.default_rng(1).uniform(0.1, 3.0, N).astype("f")
    scalars, rz = ops.Scalars(), 0.0
    for t in range(10):
        for z in (x, own):
            z["g"][:] = a * z["p"]
        step(x, scalars, lr=lr, update=update)
        mid = ops.preconditioned_dots(own["g"], own["g_prev"], own["h"]).rz_mid
        if t:
            ops.bfgs_diag_update(own["h"], own["g"], own["g_prev"], own["d"], alpha_prev=lr)
        rz_new = ops.preconditioned_dots(own["g"], None, own["h"]).rz
        numerator = rz_new - mid if update == "polak_ribiere" else rz_new
        beta = min(max(numerator / rz, 0.0), 1.0) if t else 0.0
        ops.direction_update(own["d"], own["g"], own["h"], beta=beta, p=own["p"], alpha=lr, g_prev=own["g_prev"])
        rz = rz_new
        for name in x:
            np.testing.assert_array_equal(x[name], own[name], err_msg=f"{name} after step {t + 1}")


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-12), ("float32", 1e-5)])
def test_the_parts_of_adam_compute_the_equations(on_host: Backend, dtype: str, rtol: float) -> None:
    x = arrays(dtype=dtype)
    v = x.pop("h")
    e, v_old = {key: value.astype(float) for key, value in x.items()}, v.astype(float)
    v_new = reference.second_moment(v_old, e["g"], 0.99)
    h_old, h = (np.sqrt(value / (1 - 0.99**k)) + 0.1 for value, k in ((v_old, 3), (v_new, 4)))
    options = {"updates": 3, "beta2": 0.99, "eps": 0.1}

    dots = ops.adam_preconditioned_dots(x["g"], v, g_prev=x["g_prev"], **options)
    assert dots.rz == pytest.approx(np.sum(e["g"] ** 2 / h), rel=rtol)
    assert dots.rz_mid == pytest.approx(np.sum(e["g"] * e["g_prev"] / h_old), rel=rtol, abs=rtol * N)
    np.testing.assert_array_equal(v, v_old)  # read only

    move = {"p": x["p"], "alpha": 0.2, "weight_decay": 0.5, "g_prev": x["g_prev"]}
    ops.adam_direction_update(x["d"], x["g"], v, beta=0.7, **options, **move)
    d = -e["g"] / h + 0.7 * e["d"]
    np.testing.assert_allclose(v, v_new, rtol=rtol)
    np.testing.assert_allclose(x["d"], d, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(x["p"], 0.9 * e["p"] + 0.2 * d, rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(x["g_prev"], x["g"])


@pytest.mark.parametrize("hard", [False, True])
def test_a_sum_of_runs_is_within_its_bound(on_host: Backend, hard: bool) -> None:
    """At most 17 roundings of the terms, which are |g| here: beta2 = 0. On the CPU the hard case comes near: the first
    of a lane's sixteen terms swallows the others."""
    n = 5000
    g = np.random.default_rng(0).standard_normal(n).astype("f")
    if hard:
        g = np.where(np.arange(n) % 256 < 16, 1.0, 0.98 * 2.0**-24).astype("f")
    rz = ops.adam_preconditioned_dots(g, np.zeros(n, "f"), updates=0, beta2=0.0, eps=1e-30).rz
    exact = np.sum(np.abs(g.astype(float)))
    error = abs(rz - exact) / exact * 2.0**24
    assert error <= 17.0
    assert error > 7.0 or not hard or on_host.on_gpu


@pytest.mark.parametrize("update", ["fletcher_reeves", "polak_ribiere"])
def test_a_step_of_adam_from_its_parts_follows_the_fused_step(on_host: Backend, update: str) -> None:
    x, lr, pr = arrays(), 0.05, update == "polak_ribiere"
    v, own_v = (np.zeros(N, "f") for _ in range(2))
    x["d"][:], x["g_prev"][:] = 0, 0
    del x["h"]
    own, scalars, rz = copy.deepcopy(x), ops.Scalars(), 0.0
    a = np.random.default_rng(1).uniform(0.1, 3.0, N).astype("f")
    kept = {"g_prev": own["g_prev"]} if pr else {}
    for t in range(10):
        for z in (x, own):
            z["g"][:] = a * z["p"] + np.float32(0.1 * t)
        fused = {**x, "g_prev": x["g_prev"] if pr else None, "diagonal": v}
        options = {"lr": lr, "preconditioner": "adam", "update": update, "weight_decay": 0.1}
        assert ops.nlcg_step(**fused, scalars=scalars, **options)
        dots = ops.adam_preconditioned_dots(own["g"], own_v, updates=t, **kept)
        beta = min(max((dots.rz - dots.rz_mid) / rz, 0.0), 0.9) if t else 0.0
        move = {"p": own["p"], "alpha": lr, "weight_decay": 0.1, **kept}
        ops.adam_direction_update(own["d"], own["g"], own_v, beta=beta, updates=t, **move)
        rz = dots.rz
        np.testing.assert_allclose(v, own_v, rtol=1e-6)
        for name in ("p", "d"):  # beta2^k is a product there and a power here
            np.testing.assert_allclose(x[name], own[name], rtol=1e-4, atol=1e-5, err_msg=f"{name} after step {t + 1}")
    assert scalars.updates == 10
    assert scalars.rz == pytest.approx(rz, rel=1e-6)


@pytest.mark.parametrize("kind", ["numpy", "torch", "parameter", "memoryview", "array", "dlpack_only"])
def test_anything_with_a_buffer_or_dlpack(kind: str) -> None:
    class OnlyDLPack:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __dlpack__(self) -> object:  # DLPack 0: no max_version
            return self.tensor.__dlpack__()

    wrap = {
        "numpy": lambda a: a,
        "torch": torch.from_numpy,
        "parameter": lambda a: torch.nn.Parameter(torch.from_numpy(a)),
        "memoryview": memoryview,
        "array": lambda a: array.array("f", a.tobytes()),
        "dlpack_only": lambda a: OnlyDLPack(torch.from_numpy(a)),
    }[kind]
    plain, x = arrays(), arrays()
    wrapped = {name: wrap(a) for name, a in x.items()}
    assert step(plain, ops.Scalars(), lr=0.1)
    assert step(wrapped, ops.Scalars(), lr=0.1)
    got = {name: np.frombuffer(w, dtype="f") for name, w in wrapped.items()} if kind == "array" else x
    for name in plain:
        np.testing.assert_array_equal(got[name], plain[name])


def test_torch_is_told_of_the_writes() -> None:
    x = {name: torch.from_numpy(a) for name, a in arrays().items()}
    step(x, ops.Scalars(), lr=0.1)
    assert [x[name]._version for name in ("p", "g", "g_prev", "d", "h")] == [1, 0, 1, 1, 1]


def test_scalars_copy_pickle_and_resume() -> None:
    x, scalars = arrays(), ops.Scalars()
    options = {"lr": 0.1, "line_search": OnlineLineSearch(), "update": "polak_ribiere"}
    for t in range(6):
        if t == 3:
            y, other = copy.deepcopy(x), pickle.loads(pickle.dumps(scalars))
        x["g"][:] = 2 * x["p"]
        step(x, scalars, loss=1.0 + t, **options)
    for t in range(3, 6):
        y["g"][:] = 2 * y["p"]
        step(y, other, loss=1.0 + t, **options)
    assert other == scalars
    for name in x:
        np.testing.assert_array_equal(x[name], y[name])


def test_a_skipped_step_writes_only_the_counter() -> None:
    x, scalars = arrays(), ops.Scalars()
    step(x, scalars, lr=0.1)
    before, kept = copy.deepcopy(x), copy.copy(scalars)
    x["g"][7] = np.inf
    assert not step(x, scalars, lr=0.1, loss=3.0, line_search=OnlineLineSearch())
    assert scalars.skipped_steps == 1
    scalars.skipped_steps = 0.0
    assert repr(scalars) == repr(kept)
    for name in ("p", "g_prev", "d", "h"):
        np.testing.assert_array_equal(x[name], before[name])


def test_empty_buffers() -> None:
    x = arrays(0)
    assert step(x, ops.Scalars(), lr=0.1)
    assert ops.preconditioned_dots(x["g"], x["g_prev"], x["h"]) == (0.0, 0.0)
    assert not ops.bfgs_diag_update(x["h"], x["g"], x["g_prev"], x["d"], alpha_prev=0.1).updated
    ops.direction_update(x["d"], x["g"], None, beta=0.0)


def test_the_floating_point_mode_is_left_alone() -> None:
    """Denormals stay denormals, before and after."""
    x = arrays(64)
    x["g"][:] = np.float32(1e-42)
    scalars = ops.Scalars()
    for _ in range(3):
        assert step(x, scalars, lr=1.0)
    assert np.all(x["g_prev"] == np.float32(1e-42))
    assert np.all(np.isfinite(x["p"]))
    assert np.float32(1e-42) * np.float32(0.5) > 0


def test_works_without_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
import numpy as np, fastnlcg
x = [np.ones(5, "f") for _ in range(5)]
fastnlcg.ops.nlcg_step(*x, fastnlcg.ops.Scalars(), lr=0.1, preconditioner="adam")
try:
    fastnlcg.NLCG
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fastnlcg.NLCG needs torch: pip install 'fastnlcg[torch]'" in done.stdout


def test_both_sums_of_the_curvature_condition_are_looked_at() -> None:
    """h this small makes s h s tiny when y s is not, and the other way round."""
    for h, y in ((1e-12, 1.0), (1.0, 1e-12)):
        x = {name: np.full(10, value) for name, value in {"h": h, "g": y, "g_prev": 0.0, "d": 1.0}.items()}
        found = ops.bfgs_diag_update(x["h"], x["g"], x["g_prev"], x["d"], alpha_prev=1.0)
        assert not found.updated
        assert max(found.ys, found.shs) == 10.0
        assert np.all(x["h"] == h)


def test_scalars_are_one_object_that_a_step_writes() -> None:
    """So an interrupt, which Python raises when the native step has returned, finds buffers and scalars of one step."""
    x = arrays()
    scalars = ops.Scalars()
    held = scalars._values
    ops.nlcg_step(x["p"], x["g"], x["g_prev"], x["d"], x["h"], scalars, lr=0.1, preconditioner="bfgs")
    assert scalars._values is held
    assert scalars.step == 1
    assert copy.deepcopy(scalars) == pickle.loads(pickle.dumps(scalars)) == copy.copy(scalars) == scalars
    assert copy.copy(scalars)._values is not held
    assert scalars != ops.Scalars()
    assert repr(scalars).startswith("Scalars(step=1.0, ")
    with pytest.raises(AttributeError, match="nobody"):
        scalars.nobody = 1.0
    with pytest.raises(TypeError, match=r"scalars\.rz"):
        scalars.rz = "1"
    with pytest.raises(ValueError, match="updates"):
        scalars.updates = 0.5
