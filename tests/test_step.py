"""The native step against the reference, and against itself: bits must not depend on how it was run."""

from __future__ import annotations

import hashlib
import math
import os

import backends
import numpy as np
import pytest
from backends import Backend
from fastnlcg import OnlineLineSearch, ops
from fastnlcg.reference import Options
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import Cut, Lockstep

STEPS = 25
W = 16  # a block; the vectors of the instruction sets have 4, 8 and 16 floats, 2, 4 and 8 doubles
SIZES = sorted({1, 2, 3, *(k for w in (4, 8, W) for k in (w - 1, w, w + 1, 4 * w + 1)), 255, 257, 4097})
DTYPES = ("float64", "float32", "bfloat16", "float16")
UPDATES = ("fletcher_reeves", "polak_ribiere")
PRECONDITIONERS = ("adam", "bfgs", None)


def random_cuts(n: int, dtypes: tuple[str, ...], seed: int = 0) -> list[Cut]:
    """n elements in pieces of 0 to 40, some empty, first and last included."""
    rng = np.random.default_rng(seed)
    cuts, left = [Cut(0, dtypes[0])], n
    while left:
        size = min(left, int(rng.integers(0, 41)))
        cuts.append(Cut(size, dtypes[int(rng.integers(len(dtypes)))]))
        left -= size
    return [*cuts, Cut(0, dtypes[0])]


def run(lockstep: Lockstep, steps: int | None = None, losses: list[float] | None = None) -> list:
    states = []
    # the curvature condition of bfgs opens and closes over many; what the others do, they do at once
    steps = steps or (STEPS if lockstep.options.preconditioner == "bfgs" else 8)
    for t in range(steps):
        lockstep.noisy_gradients()
        states.append(lockstep.checked_step(losses[t] if losses else math.nan))
    return states


# Every size on the CPU; in emulation those that end in a block, a quad and a tile.
ON_SIZES = [(backends.NARROWEST, n) for n in SIZES] + [("emulated", n) for n in (1, 3, 17, 255, 4097)]


@pytest.mark.parametrize(("name", "n"), ON_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_sizes(name: str, preconditioner: str | None, dtype: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Polak-Ribiere, which has every sum."""
    if name == "emulated" and not backends.EMULATION:
        pytest.skip(backends.NO_EMULATION)
    backends.use(name, monkeypatch)
    states = run(Lockstep([Cut(n, dtype)], Options(update="polak_ribiere", preconditioner=preconditioner)))
    assert any(s.updated for s in states) or n < W or preconditioner is None
    assert any(s.beta > 0 for s in states[1:]) or n < W


@pytest.mark.thorough
@pytest.mark.parametrize(("dtype", "update"), [("float64", "polak_ribiere"), ("float32", "fletcher_reeves")])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_a_million_and_three(lockstep_on: Backend, preconditioner: str | None, dtype: str, update: str) -> None:
    n = 100_003 if lockstep_on.name == "emulated" else 1_000_003
    options = Options(update=update, preconditioner=preconditioner)
    states = run(Lockstep([Cut(n, dtype)], options, threads=2), STEPS if preconditioner == "bfgs" else 5)
    assert sum(s.updated for s in states) > STEPS // 2 or preconditioner != "bfgs"


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("dtypes", [(d,) for d in DTYPES] + [("float32", "bfloat16", "float16")], ids="+".join)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_scattered_and_misaligned(
    lockstep_on: Backend, preconditioner: str | None, dtypes: tuple[str, ...], shift: int
) -> None:
    options = Options(update="polak_ribiere", preconditioner=preconditioner)
    run(Lockstep(random_cuts(1000, dtypes), options, shift=shift))


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_1500_segments(lockstep_on: Backend, preconditioner: str | None) -> None:
    cuts = [Cut(1 + i % 9, "float32", group=i % 2) for i in range(1500)]
    run(Lockstep(cuts, Options(preconditioner=preconditioner), lr=(0.05, 0.02), weight_decay=(0.0, 0.1)))


OPTIONS = {
    "none": Options(preconditioner=None),
    "none_pr": Options(preconditioner=None, update="polak_ribiere"),
    "none_capped": Options(preconditioner=None, beta_max=0.5),
    "none_clip": Options(preconditioner=None, max_grad_norm=30.0),
    "none_clip_pr": Options(preconditioner=None, max_grad_norm=30.0, update="polak_ribiere"),
    "none_heavy_ball": Options(preconditioner=None, update="heavy_ball", beta_max=0.9),
    **{
        f"{name}_{preconditioner}": Options(preconditioner=preconditioner, **options)
        for preconditioner in ("adam", "bfgs")
        for name, options in {
            "plain": {},
            "maximize": {"maximize": True},
            "eps": {"eps": 0.1, "curvature_eps": 1e-3},
            "polak_ribiere": {"update": "polak_ribiere"},
            "heavy_ball": {"update": "heavy_ball", "beta_max": 0.8},
            "capped": {"beta_max": 0.3},
            "uncapped": {"beta_max": 1.0},
            "propagate": {"nonfinite": "propagate"},
            "line_search": {"line_search": OnlineLineSearch()},
            "line_search_max": {"line_search": OnlineLineSearch(0.05, 0.0, 0.2, 0.5), "maximize": True},
            "norm": {"max_grad_norm": math.inf},
            "clip": {"max_grad_norm": 30.0, "update": "polak_ribiere"},
            "clip_max": {"max_grad_norm": 45.0, "maximize": True},
        }.items()
    },
    "eps_zero": Options(preconditioner="bfgs", eps=0.0, update="polak_ribiere"),
    "no_curvature": Options(preconditioner="bfgs", curvature_eps=1e9),
    "beta2": Options(preconditioner="adam", beta2=0.9),
    "beta2_zero": Options(preconditioner="adam", beta2=0.0, eps=1e-3),
}


# Options and dtypes meet in no formula: every option in float32, and a few in every dtype.
ON_OPTIONS = [(name, "float32", decay) for name in OPTIONS for decay in (0.0, 0.03)]
ON_OPTIONS += [
    (name, dtype, 0.03)
    for name in (
        "none_pr",
        "polak_ribiere_adam",
        "polak_ribiere_bfgs",
        "propagate_adam",
        "eps_zero",
        "none_clip",
        "clip_adam",
        "clip_bfgs",
    )
    for dtype in ("float64", "bfloat16", "float16")
]


@pytest.mark.parametrize(("name", "dtype", "weight_decay"), ON_OPTIONS)
def test_options(lockstep_on: Backend, name: str, dtype: str, weight_decay: float) -> None:
    losses = list(np.random.default_rng(1).uniform(0.9, 1.1, STEPS) * np.where(np.arange(STEPS) % 7, 1.0, -1.0))
    losses[5], losses[6], losses[9] = math.nan, math.inf, 0.0
    lockstep = Lockstep(random_cuts(300, (dtype,)), OPTIONS[name], weight_decay=(weight_decay,))
    states = run(lockstep, losses=losses)
    if name.startswith("line_search"):
        assert min(s.ls_scale for s in states) < 1.0
    if "clip" in name:
        assert len({s.clip == 1.0 for s in states}) == 2
    beta_max = OPTIONS[name].beta_max
    if beta_max is not None:
        assert max(s.beta for s in states) == beta_max


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_groups(lockstep_on: Backend, preconditioner: str | None, dtype: str) -> None:
    cuts = [Cut(37, dtype, 0), Cut(100, dtype, 1), Cut(5, dtype, 2), Cut(63, dtype, 0)]
    run(Lockstep(cuts, Options(preconditioner=preconditioner), lr=(0.05, 0.01, 0.0), weight_decay=(0.0, 0.1, 0.2)))


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_without_a_gradient(lockstep_on: Backend, dtype: str, preconditioner: str | None) -> None:
    """They keep value and state, and the step after a change of the set has beta = 0 and keeps h."""
    lockstep = Lockstep([Cut(n, dtype) for n in (40, 21, 0, 5, 300, 7)], Options(preconditioner=preconditioner))
    last = [0, 1, 2, 3, 4, 5]
    for active in ([0, 1, 2, 3, 4, 5], [0, 3, 5], [0, 3, 5], [1, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]):
        changed, last = active != last, active
        lockstep.use(active)
        lockstep.noisy_gradients()
        state = lockstep.checked_step()
        if changed:
            assert state.beta == 0.0
            assert not state.updated or preconditioner == "adam"


def trajectory(
    monkeypatch: pytest.MonkeyPatch,
    n: int,
    *,
    isa: str,
    preconditioner: str | None,
    dtype: str = "float32",
    threads: int = 1,
    shift: int = 0,
    cuts: list[Cut] | None = None,
) -> dict[str, bytes]:
    monkeypatch.setenv("FASTNLCG_ISA", isa)
    options = Options(update="polak_ribiere", preconditioner=preconditioner)
    lockstep = Lockstep(cuts or [Cut(n, dtype)], options, threads=threads, shift=shift)
    for _ in range(6):
        lockstep.noisy_gradients()
        assert lockstep.run()
    assert lockstep.scalars["updated"] or preconditioner is None
    parts = lockstep.snapshot()
    for key in ("step",):  # one entry a segment
        parts.pop(key, None)
    return parts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_same_bits_however_it_is_run(monkeypatch: pytest.MonkeyPatch, preconditioner: str | None, dtype: str) -> None:
    """Instruction sets, thread counts, addresses, one segment or many: the sums' order depends on n alone."""
    n, kind = 34_001, {"preconditioner": preconditioner, "dtype": dtype}  # 9 tiles: enough for two threads
    expected = trajectory(monkeypatch, n, isa=backends.NARROWEST, **kind)
    for isa in ops._native.instruction_sets():
        for threads in (1, 2):
            assert trajectory(monkeypatch, n, isa=isa, threads=threads, **kind) == expected, (isa, threads)
        for shift in (1, 2):
            assert trajectory(monkeypatch, n, isa=isa, shift=shift, **kind) == expected, (isa, shift)
        assert trajectory(monkeypatch, n, isa=isa, cuts=random_cuts(n, (dtype,)), **kind) == expected, isa


def flat_or_cut(cuts: list[Cut], shift: int, preconditioner: str | None) -> dict[str, bytes]:
    options = Options(update="polak_ribiere", preconditioner=preconditioner)
    lockstep = Lockstep(cuts, options, shift=shift)
    for _ in range(3):
        lockstep.noisy_gradients()
        lockstep.run()
    parts = lockstep.snapshot()
    for key in ("step",):
        parts.pop(key, None)
    return parts


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 50) | st.sampled_from([4080, 4096, 5000]), min_size=1, max_size=8).filter(any),
    shift=st.integers(0, 17),
    dtype=st.sampled_from(DTYPES),
    preconditioner=st.sampled_from(PRECONDITIONERS),
)
def test_any_cut_has_the_bits_of_the_whole(
    lengths: list[int], shift: int, dtype: str, preconditioner: str | None
) -> None:
    whole = flat_or_cut([Cut(sum(lengths), dtype)], 0, preconditioner)
    assert flat_or_cut([Cut(n, dtype) for n in lengths], shift, preconditioner) == whole


def test_same_bits_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2^21 elements on g_prev is stored around the cache if it is aligned."""
    n = (1 << 21) + 5
    expected = None
    for isa in ops._native.instruction_sets():
        monkeypatch.setenv("FASTNLCG_ISA", isa)
        for shift in (0, 1):
            rng = np.random.default_rng(0)
            room = [np.zeros(n + 16 + shift, np.float32) for _ in range(5)]
            # 64-byte alignment, or `shift` elements off it
            p, g, g_prev, d, h = (a[(-a.ctypes.data % 64) // 4 + shift :][:n] for a in room)
            p[:] = rng.standard_normal(n, dtype=np.float32)
            h[:] = 1
            scalars = ops.Scalars()
            for _ in range(3):
                g[:] = p + 0.1 * rng.standard_normal(n, dtype=np.float32)
                assert ops.nlcg_step(p, g, g_prev, d, h, scalars, lr=0.05, preconditioner="bfgs", threads=2)
            np.testing.assert_array_equal(g_prev, g)
            parts = [a.tobytes() for a in (p, g_prev, d, h)] + [repr(scalars)]
            expected = expected or parts
            assert parts == expected, (isa, shift)


def test_an_unchanged_gradient_gives_ys_of_exactly_zero(lockstep_on: Backend) -> None:
    lockstep = Lockstep(random_cuts(500, ("float32",)), Options(preconditioner="bfgs"))
    lockstep.noisy_gradients()
    for _ in range(4):
        lockstep.run()
        assert lockstep.scalars["ys"] == 0.0
        assert np.all(lockstep.diagonal == 1.0)


@pytest.mark.parametrize("bits", ["bfloat16", "float16"])
def test_every_16_bit_value_is_decoded_and_encoded_like_torch(on_host: Backend, bits: str) -> None:
    """Through the gradient (decoding) and through a move onto a parameter of zero (encoding)."""
    import torch

    dtype = getattr(torch, bits)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    kept = np.zeros(1 << 16, np.float32)
    d = np.zeros(1 << 16, np.float32)
    ops.direction_update(d, every, None, beta=0.0, g_prev=kept)
    expected = every.float().numpy()
    np.testing.assert_array_equal(np.isnan(kept), np.isnan(expected))
    np.testing.assert_array_equal(kept[~np.isnan(kept)], expected[~np.isnan(expected)])
    # encoding: floats between, on and next to the representable ones, and beyond the largest
    rng = np.random.default_rng(0)
    finite = expected[np.isfinite(expected) & (np.abs(expected) < 1e38)]
    wanted = np.concatenate(
        [finite, finite * np.float32(1 + 2**-9), finite * rng.uniform(0.9, 1.1, finite.size).astype("f")]
    )
    wanted = torch.from_numpy(np.concatenate([wanted, np.float32([65519, 65520, 65536, 3.4e38, 1e-8, 2**-24, 2**-25])]))
    p = torch.zeros(wanted.numel(), dtype=dtype)
    direction = wanted.clone()
    ops.direction_update(direction, torch.zeros_like(p), None, beta=1.0, p=p, alpha=1.0)
    assert torch.equal(p, (torch.zeros(1) + wanted).to(dtype))


@pytest.mark.thorough
@pytest.mark.skipif(
    os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 16 << 30, reason="needs 16 GiB of free memory"
)
def test_beyond_two_billion_elements() -> None:
    """64-bit indices: both ends and the middle are read and written."""
    import torch

    n = (1 << 31) + 20
    g = torch.zeros(n, dtype=torch.float16)
    marked = [0, 1 << 30, (1 << 31) - 1, 1 << 31, n - 1]
    g[marked] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float16)
    assert ops.preconditioned_dots(g, None, None).rz == 1 + 4 + 9 + 16 + 25
    d = torch.zeros(n)
    ops.direction_update(d, g, None, beta=0.0)
    assert d[marked].tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert int(torch.count_nonzero(d)) == len(marked)


def digest_of_a_trajectory(preconditioner: str | None, update: str, dtype: str) -> str:
    """Ten steps with every option that changes numbers, from integers alone."""
    n = 10_007
    k = np.arange(n, dtype=np.int64)
    p = ((k * 7919 % 2003 - 1001) / 1024).astype(dtype)
    curvature = ((k * 104_729 % 31 + 1) / 16).astype(dtype)
    g_prev, d = np.zeros(n, dtype), np.zeros(n, dtype)
    h = np.ones(n, dtype) if preconditioner else None
    scalars = ops.Scalars()
    options = {"lr": 0.03125, "weight_decay": 0.0078125, "line_search": OnlineLineSearch()}
    for t in range(10):
        noise = ((k * (t + 3) * 31 % 257 - 128) / 512).astype(dtype)
        named = {"preconditioner": preconditioner, "update": update, "loss": 1.0 + (t % 3), **options}
        assert ops.nlcg_step(p, curvature * p + noise, g_prev, d, h, scalars, **named)
    assert 0.0 < scalars.beta <= 1.0
    numbers = (scalars.rz, scalars.gs, scalars.shs, scalars.grad_max, scalars.beta, scalars.ys, scalars.ls_scale)
    parts = [a.tobytes() for a in (p, g_prev, d, h) if a is not None] + [np.array(numbers).tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


# Of version 0.2.0, before there was another preconditioner.
DIGESTS: dict[tuple[str | None, str, str], str] = {
    ("bfgs", "fletcher_reeves", "float32"): "5cd57d0ce086ab64",
    ("bfgs", "fletcher_reeves", "float64"): "d2989cdf4aac1ba3",
    ("bfgs", "polak_ribiere", "float32"): "e0ed92e970878629",
    ("bfgs", "polak_ribiere", "float64"): "e652da9fbd786002",
    (None, "fletcher_reeves", "float32"): "c9855f69a241a7e2",
    (None, "fletcher_reeves", "float64"): "4c09a20d82279c9f",
    (None, "polak_ribiere", "float32"): "2f593eadf2c18d7e",
    (None, "polak_ribiere", "float64"): "d6b72ff50cf025a1",
}


@pytest.mark.parametrize("case", DIGESTS, ids=str)
def test_the_papers_form_keeps_its_bits(isa: str, case: tuple[str | None, str, str]) -> None:
    assert digest_of_a_trajectory(*case) == DIGESTS[case]
