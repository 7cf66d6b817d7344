"""Curvature pairs and rotated weight matrices: against mathematics, and the native passes in lockstep with the
reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from backends import Backend
from fastnlcg import _native, minimize
from fastnlcg.full_batch import rotation as rotation_module
from fastnlcg.full_batch.flat import FlatVectors
from fastnlcg.full_batch.iteration import Descent, DescentOptions
from fastnlcg.full_batch.pairs import Pairs, PairSums
from fastnlcg.full_batch.passes import Mark, Sums
from fastnlcg.full_batch.rotation import EVERY, WIDEST, Matrix, Rotation, as_matrix, matrices_of
from fastnlcg.reference import Array
from fastnlcg.reference_pairs import PairPasses, Weight, turned_diagonal, two_loops
from test_descent import Function, rosenbrock, wavy

# ---- against mathematics ---------------------------------------------------------------------------------------------


class Run:
    """A descent by the reference's passes, that keeps its pairs."""

    def __init__(self, fun: Function, x0: Array, **options: Any) -> None:
        self.fun, self.x, self.g = fun, np.array(x0, float), np.zeros(len(x0))
        named = DescentOptions(**options)
        preconditioned = named.preconditioner is not None
        self.passes = PairPasses(self.x, lambda: self.g, history=named.history, preconditioned=preconditioned)
        self.descent = Descent(self.passes, self.full, None, named, x_max=lambda: float(np.abs(self.x).max()))

    def full(self, _: bool) -> float:
        f, self.g = self.fun(self.x)
        return float(f)


@pytest.mark.parametrize("preconditioner", ["bfgs", None])
@pytest.mark.parametrize("history", [1, 2, 5])
def test_the_direction_is_that_of_the_textbook(history: int, preconditioner: str | None) -> None:
    """Two loops over the pairs, and the matrix that BFGS makes of H0 with them."""
    run = Run(rosenbrock, np.full(12, -1.2), history=history, preconditioner=preconditioner)
    run.descent.begin()
    pairs: list[tuple[Array, Array]] = []
    for _ in range(12):
        x, g = run.x.copy(), run.g.copy()
        assert run.descent.iterate() == ""
        pairs = [*pairs, (run.x - x, run.g - g)][-history:]
        at = run.descent.course.pairs
        assert at.count == len(pairs)
        diagonal = np.ones(12) if at.plain or preconditioner is None else 1 / run.passes.h
        h0 = at.gamma * diagonal
        expected = two_loops(run.g, pairs, lambda q: h0 * q)  # noqa: B023
        inverse = np.diag(h0)
        for s, y in pairs:
            v = np.eye(12) - np.outer(y, s) / (y @ s)
            inverse = v.T @ inverse @ v + np.outer(s, s) / (y @ s)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(-inverse @ run.g, expected, rtol=1e-8, atol=1e-8 * scale)
        np.testing.assert_allclose(run.passes.d, expected, rtol=1e-8, atol=1e-8 * scale)


def test_a_search_first_tries_a_length_that_promises_no_more_than_the_last_decrease() -> None:
    run = Run(rosenbrock, np.full(12, -1.2), history=5)
    run.descent.begin()
    lengths: list[float] = []
    trial = run.passes.trial
    run.passes.trial = lambda alpha, **named: (lengths.append(alpha), trial(alpha, **named))[1]  # type: ignore[method-assign]
    at, shorter = run.descent.course, 0
    for _ in range(30):
        before = at.f
        lengths.clear()
        expected = at.next_length
        assert run.descent.iterate() == ""
        if at.iterations > 1:
            assert lengths[0] == expected
        assert at.next_length == min(1.0, 2.0 * (before - at.f) / -at.slope)
        shorter += at.next_length < 1.0
    assert 3 < shorter < 30


@pytest.mark.parametrize("history", [1, 3, 10, 32])
def test_factors_take_each_pair_that_is_kept_once(history: int) -> None:
    """By the numbers that the pairs have as ys; after a drop, those since then."""
    pairs, seen, added = Pairs(), [], 0
    for updates in range(1, 61):
        if updates % EVERY == 0:
            new = pairs.new_to_factors(history, float(updates))
            assert new[-1] == (pairs.next_row, float(updates))
            assert len({row for row, _ in new}) == len(new) == min(history, EVERY, added + 1)
            seen += [ys for _, ys in new]
        pairs.add(history, float(updates))
        added += 1
        if updates == 44:
            pairs.drop()
            added = 0
    ends = [10, 20, 30, 40, 50, 60]
    expected = [n for end in ends for n in range(end - EVERY + 1, end + 1) if n > end - history and not 40 < n <= 44]
    assert seen == [float(n) for n in expected]


def orthogonal(n: int, seed: int) -> Array:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def test_a_turn_keeps_the_diagonal_of_the_matrix() -> None:
    """diag(Q'^T Q diag(h) Q^T Q') with Q = QL x QR, by the dense matrix."""
    a, b = 4, 3
    h = np.random.default_rng(0).uniform(0.1, 3, (a, b))
    left, right = orthogonal(a, 1), orthogonal(b, 2)
    dense = np.kron(left, right) @ np.diag(h.ravel()) @ np.kron(left, right).T
    assert turned_diagonal(h, left, right) == pytest.approx(np.diag(dense).reshape(a, b), rel=1e-12)
    rotation = Rotation([Matrix(0, (a, b))], np.zeros)
    sides = rotation.matrices[0].sides
    for name, basis in (("left", left.T), ("right", right.T)):
        sides[name]["factor"][:] = basis @ np.diag(np.arange(1.0, 1 + len(basis))) @ basis.T
    flat = h.ravel().copy()
    vector = np.arange(12.0)
    assert rotation.turn(flat, [vector])
    signs = np.sign(np.diag(sides["left"]["basis"].T @ left.T)), np.sign(np.diag(sides["right"]["basis"].T @ right.T))
    expected = (left * signs[0][:, None]) @ np.arange(12.0).reshape(a, b) @ (right * signs[1][:, None]).T
    assert vector.reshape(a, b) == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert flat.reshape(a, b) == pytest.approx(turned_diagonal(h, left, right), rel=1e-10)
    assert not (sides["left"]["factor"] - np.diag(np.diag(sides["left"]["factor"]))).round(10).any()


def test_what_is_rotated() -> None:
    assert as_matrix((32, 2)) == (32, 2)
    assert as_matrix((8, 4, 3, 3)) == (8, 36)
    assert as_matrix((6, 5, 4)) == (6, 5, 4)  # a stack
    assert as_matrix((7,)) is None
    assert as_matrix((1, 1)) is None
    assert as_matrix((0, 4)) is None
    assert as_matrix((WIDEST + 1, WIDEST + 1)) is None
    assert Matrix(0, (WIDEST + 1, 4)).rotated_sides() == ["right"]
    assert Matrix(0, (4, WIDEST + 1)).rotated_sides() == ["left"]
    assert Matrix(0, (1, 4)).rotated_sides() == ["right"]
    assert Matrix(0, (4, WIDEST), bias=2048).rotated_sides() == ["left"]
    assert Matrix(0, (4, 1), bias=4).rotated_sides() == ["left", "right"]
    assert as_matrix((8, 16, 64)) == (8, 16, 64)  # experts
    assert as_matrix((256, 256, 3)) == (256, 768)  # a convolution of one dimension: out x (in k)
    (wide,) = matrices_of([(600, WIDEST), (600,)], [0, 307200])  # the bias would make the right side too long
    assert (wide.bias, wide.rotated_sides()) == (None, ["right"])
    found = matrices_of([(4, 3), (4,), (5, 4), (4,), None, (2, 2)], [0, 16, 32, 64, 80, 96])
    assert [(m.begin, m.shape, m.bias) for m in found] == [(0, (4, 3), 16), (32, (5, 4), None), (96, (2, 2), None)]


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (1, 6), (6, 1)])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_rotating_there_and_back(kind: str, shape: tuple[int, ...]) -> None:
    make = np.zeros if kind == "numpy" else lambda s: torch.zeros(s, dtype=torch.float64)
    size = math.prod(shape)
    matrix = Matrix(2, shape, 2 + size if len(shape) == 2 else None)
    rotation = Rotation([matrix], make)
    n = 2 + size + (shape[0] if len(shape) == 2 else 0)
    rng = np.random.default_rng(0)
    as_kind = np.array if kind == "numpy" else torch.tensor
    g, g_prev, h = (as_kind(rng.uniform(0.1, 1.0, n)) for _ in range(3))
    before = as_kind(np.asarray(g))
    rotation.see((g - g_prev)[None], [(0, 0.7)])
    assert rotation.turn(h, [])
    rotation.rotate(g)
    assert np.abs(np.asarray(g - before)).max() > 1e-3
    assert np.asarray(g[:2]) == pytest.approx(np.asarray(before[:2]), abs=0.0)
    assert float((g * g).sum()) == pytest.approx(float((before * before).sum()), rel=1e-12)
    rotation.rotate_back(g)
    assert np.asarray(g) == pytest.approx(np.asarray(before), rel=1e-12)
    assert float(h.min()) > 0.0


@pytest.mark.parametrize("at_once", [1, 3])  # of seven vectors
@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 2), (WIDEST + 1, 2), (2, WIDEST + 1)])
def test_products_in_parts(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], at_once: int) -> None:
    """As all at once, up to rounding and the signs of eigenvectors."""

    def run() -> list[Array]:
        size = math.prod(shape)
        rotation = Rotation([Matrix(0, shape, size if len(shape) == 2 else None)], np.zeros)
        rng = np.random.default_rng(0)
        vectors, h = rng.standard_normal((7, size + shape[0])), rng.uniform(0.1, 1.0, size + shape[0])
        for _ in range(2):  # the second time with weights and bases
            rotation.see(vectors, [(k, 1.0 + k) for k in range(7)])
            assert rotation.turn(h, [vectors])
        return [vectors, h, *(one for side in rotation.matrices[0].sides.values() for one in side.values())]

    whole = run()
    monkeypatch.setattr(rotation_module, "AT_ONCE", at_once * math.prod(shape))
    for expected, found in zip(whole, run(), strict=True):
        assert np.abs(found) == pytest.approx(np.abs(expected), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_h_has_a_floor_when_bases_change(kind: str) -> None:
    """1e-18 of the largest of the matrix and its bias; what is outside keeps its value."""
    make = np.zeros if kind == "numpy" else lambda s: torch.zeros(s, dtype=torch.float64)
    as_kind = np.array if kind == "numpy" else torch.tensor
    rotation = Rotation([Matrix(0, (2, 2), 4)], make)
    rotation.see(as_kind([[1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]]), [(0, 1.0)])
    h = as_kind([1e-30, 1e-30, 1e-30, 1e-30, 1e9, 1e9, 1e-40])
    assert rotation.turn(h, [])
    assert sorted(np.asarray(h)) == pytest.approx([1e-40, *[1e-9] * 4, 1e9, 1e9], rel=1e-6)


def test_bases_stay_orthogonal() -> None:
    """Over four hundred changes, in float32."""
    rotation = Rotation([Matrix(0, (16, 15), 240)], torch.zeros)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        rotation.see(torch.randn(10, 256, generator=generator), [(k, 1.0) for k in range(10)])
        assert rotation.turn(torch.ones(256), [])
    for side in rotation.matrices[0].sides.values():
        q = side["basis"].double()
        assert float((q.T @ q - torch.eye(16)).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_get_contiguous_eigenvectors(dtype: torch.dtype) -> None:
    """NCCL refuses others, and those of torch.linalg.eigh are columns."""
    sent: list[torch.Tensor] = []
    rotation = Rotation([Matrix(0, (5, 4), 20)], lambda shape: torch.zeros(shape, dtype=dtype), sent.extend)
    y = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 25))).to(dtype)
    rotation.see(y, [(0, 1.0)])
    assert rotation.turn(torch.ones(25, dtype=dtype), [])
    assert [tuple(each.shape) for each in sent] == [(5, 5), (5, 5)]
    assert all(each.is_contiguous() for each in sent)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("power", [-80, 80])
def test_factors_scale_with_the_function(kind: str, power: int) -> None:
    """In float32 the squares of these gradients underflow or overflow."""

    def factors(scale: float) -> list[Array]:
        make = (lambda s: np.zeros(s, np.float32)) if kind == "numpy" else torch.zeros
        rotation = Rotation([Matrix(0, (5, 4), 20)], make)
        rng = np.random.default_rng(0)
        for _ in range(2):  # the second time with weights
            y = (scale * rng.standard_normal((3, 25))).astype(np.float32)
            rotation.see(y if kind == "numpy" else torch.from_numpy(y), [(k, scale * (1.0 + k)) for k in range(3)])
        return [np.asarray(side["factor"]).astype(float) for side in rotation.matrices[0].sides.values()]

    for expected, found in zip(factors(1.0), factors(2.0**power), strict=True):
        np.testing.assert_allclose(found / 2.0**power, expected, rtol=1e-4, atol=1e-6)


# ---- the native passes, compared with the reference ------------------------------------------------------------------


class Both:
    """Native passes over flat arrays and the reference's: everything is compared after each."""

    def __init__(
        self, fun: Function, x0: Array, dtype: str, backend: Backend, options: DescentOptions, shapes: Any
    ) -> None:
        self.dtype, self.rtol = np.dtype(dtype), 3e-11 if dtype == "float64" else 4e-4
        self.fun, self.x = fun, x0.astype(dtype)
        self.g = np.zeros_like(self.x)
        device = "cuda:0" if backend.on_gpu else "cpu"
        self.native = FlatVectors(self.x, lambda shape: np.zeros(shape, dtype), device, options, shapes)
        self.matrices = self.native.vectors.rotation.matrices
        weights = []
        for m in self.matrices:
            a, b = m.shape
            zeros = {name: np.zeros((m.side(name),) * 2) for name in m.rotated_sides()}
            weights.append(Weight(m.begin, a, b, m.bias, np.eye(a), np.eye(b), zeros.get("left"), zeros.get("right")))
        self.reference = PairPasses(self.x.astype(float), lambda: self.g.astype(float), history=options.history,
                                    preconditioned=options.preconditioner is not None, weights=weights)  # fmt: skip
        self.compared = self.turned = 0

    def full(self, _: bool) -> float:
        f, g = self.fun(self.x.astype(float))
        self.g = g.astype(self.dtype)
        self.native.set_gradient(self.g)
        return float(f)

    def _vectors(self) -> dict[str, tuple[Any, Any]]:
        n, v, r = self.x.size, self.native.vectors, self.reference
        found = {"x": (self.x, r.x), "origin": (self.native.origin, r.origin), "d": (v.direction[:n], r.d),
                 "g_prev": (v.grad_prev[:n], r.g_prev)}  # fmt: skip
        if v.out is not v.direction:
            found["out"] = v.out[:n], r.out
        if v.h is not None:
            found["h"] = v.h[:n], r.h
        if v.rows is not None:
            found["s"], found["y"] = (v.rows[: v.history, :n], r.s), (v.rows[v.history :, :n], r.y)
        return found

    def _give(self) -> None:
        """The reference works on what the native side works on."""
        r, v = self.reference, self.native.vectors
        r.x[:] = self.x
        named = {name: pair[0].astype(float) for name, pair in self._vectors().items()}
        r.d, r.g_prev, r.origin = (named[k] for k in ("d", "g_prev", "origin"))
        r.out = named.get("out", r.d)
        r.h = named.get("h", np.ones(self.x.size))
        if v.rows is not None:
            r.s, r.y = named["s"], named["y"]
        for m, w in zip(self.matrices, r.weights, strict=True):
            for name, side in m.sides.items():
                basis, factor = side["basis"].astype(float), side["factor"].astype(float)
                setattr(w, name, basis)
                setattr(w, f"factor_{name}", basis @ factor @ basis.T)

    def _each(self, name: str, *args: Any, **named: Any) -> Any:
        self._give()
        r = self.reference
        found = getattr(self.native, name)(*args, **named)
        if named.get("turn"):
            self.turned += 1
            # A basis is known up to signs and multiple eigenvalues: the reference takes the native one, once that has
            # been checked.
            bases = []
            for m, w in zip(self.matrices, r.weights, strict=True):
                sides = {k: side["basis"].astype(float) for k, side in m.sides.items()}
                bases.append((sides.get("left", w.left), sides.get("right", w.right)))
            r.eigenvectors = lambda w: bases[[x is w for x in r.weights].index(True)]  # type: ignore[method-assign]
        terms = self._terms(name, args)
        expected = getattr(r, name)(*args, **named)
        for key, (a, b) in self._vectors().items():
            if key == "out" and name in ("pair", "curvature"):  # it lends its memory until the next direction
                continue
            size = max(np.abs(b).max(initial=0.0), terms if key in ("d", "out") else 0.0)
            np.testing.assert_allclose(a, b, rtol=self.rtol, atol=self.rtol * size, err_msg=f"{name}: {key}")
        self._compare_factors(turned=bool(named.get("turn")))
        self._compare_sums(name, found, expected, terms)
        self.compared += 1
        return found

    def _terms(self, name: str, args: Any) -> float:
        """The largest sum of the terms of d, which may cancel."""
        r = self.reference
        if name == "residual":
            a, gamma = args
            q = np.abs(r.rotate(self.g.astype(float))) + sum(abs(x) * np.abs(y) for x, y in zip(a, r.y, strict=False))
            return float(np.max(gamma * q / np.minimum(r.h, 1.0)))
        if name == "pair_direction":
            terms = [abs(x) * np.abs(s) for x, s in zip(args[0], r.s, strict=False)]
            return float(np.max(np.abs(r.d) + sum(terms)))
        return 0.0

    def _compare_factors(self, *, turned: bool) -> None:
        for m, w in zip(self.matrices, self.reference.weights, strict=True):
            for name, side in m.sides.items():
                basis, factor = side["basis"].astype(float), getattr(w, f"factor_{name}")
                rotated = basis.T @ factor @ basis
                atol = 30 * self.rtol * max(np.abs(factor).max(), 1e-300)
                np.testing.assert_allclose(side["factor"], rotated, atol=atol)
                np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=self.rtol)
                if turned:
                    np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=atol)

    def _compare_sums(self, name: str, found: Any, expected: Any, terms: float) -> None:
        if found is None:
            return
        flat = lambda x: [v for y in (vars(x).values() if isinstance(x, Sums) else x) for v in np.atleast_1d(y)]  # noqa: E731
        sums, wanted = flat(found), flat(expected)
        r = self.reference
        sizes = {
            "slope": np.abs(self.g.astype(float) * r.out).sum(),
            "gradient_dots": np.abs(r.s).max(initial=0.0) * np.abs(self.g).sum(),
            "residual": np.abs(r.y).max(initial=0.0) * max(np.abs(r.d).sum(), terms),
            "pair_direction": terms * np.abs(self.g).sum() + terms * terms * r.h.max(),
        }
        atol = 4 * self.rtol * max([sizes.get(name, 0.0), *np.abs(wanted)])
        for a, b in zip(sums, wanted, strict=True):
            assert a == pytest.approx(b, rel=4 * self.rtol, abs=atol), name

    @property
    def rotates(self) -> bool:
        return self.native.rotates

    def trial(self, alpha: float, *, first: Mark | None) -> None:
        self._each("trial", alpha, first=first)

    def slope(self, f: float) -> tuple[float, float, float]:
        return self._each("slope", f)

    def curvature(self, update: Any, *, turn: bool = False) -> Sums:
        return self._each("curvature", update, turn=turn)

    def direction(self, beta: float) -> tuple[float, float, Mark]:
        return self._each("direction", beta)

    def pair(self, row: int, update: Any, *, turn: Any = ()) -> PairSums:
        return self._each("pair", row, update, turn=turn)

    def gradient_dots(self, count: int) -> list[float]:
        return self._each("gradient_dots", count)

    def residual(self, a: list[float], gamma: float, *, plain: bool) -> list[float]:
        return self._each("residual", a, gamma, plain=plain)

    def pair_direction(self, c: list[float]) -> tuple[float, float, Mark]:
        return self._each("pair_direction", c)

    def forget(self) -> None:
        self._each("forget")


def lockstep(both: Both, options: DescentOptions, iterations: int) -> None:
    run = Descent(both, both.full, None, options, x_max=lambda: 1.0)
    run.begin()
    for _ in range(iterations):
        if run.iterate():
            break
    both.forget()
    run.begin()
    run.iterate()
    assert both.compared > 10


@pytest.mark.parametrize("preconditioner", ["bfgs", None])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("n", "history"), [(1, 3), (17, 1), (511, 6), (4097, 5), (20001, 9)])
def test_passes_in_lockstep(lockstep_on: Backend, n: int, history: int, dtype: str, preconditioner: str | None) -> None:
    options = DescentOptions(preconditioner=preconditioner, history=history)
    x0 = np.random.default_rng(n).standard_normal(n)
    lockstep(Both(wavy(n), x0, dtype, lockstep_on, options, [(n,)]), options, 8)


@pytest.mark.parametrize("history", [0, 1, 6])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_rotations_in_lockstep(lockstep_on: Backend, dtype: str, history: int) -> None:
    """A matrix with its bias, a lone vector, a matrix of one column: the bases change twice."""
    shapes = [(9, 7), (9,), (3,), (12, 1), (4, 130), (4,)]
    n = sum(map(math.prod, shapes))
    a, b = orthogonal(n, 1), np.random.default_rng(2).standard_normal(n)
    a = (a * np.logspace(0, 2, n)) @ a.T
    fun = lambda x: (float(0.5 * x @ a @ x - b @ x), a @ x - b)  # noqa: E731
    options = DescentOptions(preconditioner="kronecker", history=history)
    both = Both(fun, np.ones(n), dtype, lockstep_on, options, shapes)
    lockstep(both, options, 25)
    assert both.turned >= 2


def test_the_passes_have_the_same_bits_however_they_run(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    """Threads and instruction sets: one result (the emulated GPU has its own)."""
    n, results = 70001, []
    options = DescentOptions(history=5)
    for threads in (1, 3):
        monkeypatch.setattr(_native, "num_threads", lambda given=threads: given)
        x = np.random.default_rng(0).standard_normal(n).astype(np.float32)
        passes, fun = (
            FlatVectors(x, lambda s: np.zeros(s, np.float32), "cuda:0" if backend.on_gpu else "cpu", options, [(n,)]),
            wavy(n),
        )

        def full(_: bool, x: Any = x, passes: Any = passes, fun: Any = fun) -> float:
            f, g = fun(x)
            passes.set_gradient(g.astype(np.float32))
            return f

        run = Descent(passes, full, None, options, x_max=lambda: 1.0)
        run.begin()
        for _ in range(7):
            run.iterate()
        v = passes.vectors
        results.append((x.tobytes(), v.h.tobytes(), v.rows.tobytes(), run.course.slope, run.course.f))
    assert results[0] == results[1]
    if not backend.on_gpu:
        assert results[0] == _SEEN.setdefault("bits", results[0])


_SEEN: dict[str, Any] = {}


def test_a_pass_refuses_what_would_write_elsewhere() -> None:
    step, named = _native.FlatStep("float64"), _native.DescentPass
    buffers = {name: _native.Buffer(np.zeros(32)) for name in ("g", "grad_prev", "direction", "diagonal")}
    step.bind(**buffers, rows=_native.Buffer(np.zeros((4, 32))))
    with pytest.raises(ValueError, match="'pair' needs rows up to 5, and there are 4"):
        step.descend(named("pair", row=0, y_row=4), 1)
    with pytest.raises(ValueError, match="needs rows up to 5"):
        step.descend(named("gradient_dots", row=2, count=3), 1)
    with pytest.raises(ValueError, match="needs rows"):
        step.descend(named("residual", row=-1, count=1), 1)
    with pytest.raises(ValueError, match=f"needs rows up to {2**31}"):
        step.descend(named("pair", row=2**31 - 1), 1)
    with pytest.raises(ValueError, match=f"needs rows up to {2**31 + 2}"):
        step.descend(named("pair_direction", row=2**31 - 1, count=3), 1)
    step.bind(**buffers, rows=_native.Buffer(np.zeros((8, 32))))
    with pytest.raises(ValueError, match="'direction_dots' takes at most 4 rows, got 5"):
        step.descend(named("direction_dots", count=5), 1)
    with pytest.raises(ValueError, match="33 coefficients"):
        named("residual", coefficients=[0.0] * 33)
    with pytest.raises(ValueError, match="rows has 31 elements"):
        step.bind(**buffers, rows=_native.Buffer(np.zeros(31)))
    with pytest.raises(ValueError, match="a multiple of 16"):
        step.bind(g=_native.Buffer(np.zeros(8)), rows=_native.Buffer(np.zeros(8)))
    half = _native.FlatStep("float32")
    state = {name: _native.Buffer(np.zeros(32, np.float32)) for name in ("direction", "origin")}
    half.bind(p=_native.Buffer(np.zeros(32, np.float16)), **state)
    with pytest.raises(ValueError, match="takes parameters of the dtype of the state, float32, got float16"):
        half.descend(named("trial", preconditioned=False), 1)
    fixed = np.zeros(32)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="rows is read-only"):
        step.bind(**buffers, rows=_native.Buffer(fixed))
    with pytest.raises(ValueError, match="owned is 33"):
        step.bind(**buffers, owned=33)


# ---- minimize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", ["kronecker", "bfgs", None])
@pytest.mark.parametrize("history", [0, 1, 10, 32])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_known_minimizers(kind: str, history: int, preconditioner: str | None) -> None:
    def fun(x: Any) -> Any:
        f, g = rosenbrock(np.asarray(x.detach() if kind == "torch" else x))
        return (torch.tensor(f), torch.from_numpy(g)) if kind == "torch" else (f, g)

    x0 = np.zeros(12) if kind == "numpy" else torch.zeros(12, dtype=torch.float64)
    shapes = [(3, 2), (3,), (3,)]
    result = minimize(fun, x0, history=history, preconditioner=preconditioner, shapes=shapes, gtol=1e-8)
    assert result.success
    assert np.abs(np.asarray(result.x) - 1.0).max() < 1e-6


def test_without_shapes_the_kronecker_preconditioner_is_that_of_bfgs() -> None:
    results = [minimize(rosenbrock, np.zeros(10), preconditioner=p, history=3) for p in ("kronecker", "bfgs")]
    assert np.array_equal(results[0].x, results[1].x)


def test_arguments() -> None:
    for wrong, error, words in (
        ({"history": -1}, ValueError, "Invalid history: -1"),
        ({"history": 33}, ValueError, "Invalid history: 33; expected at most 32"),
        ({"history": 2.0}, TypeError, "history must be an int"),
        ({"preconditioner": "newton"}, ValueError, "preconditioner must be one of 'kronecker', 'bfgs', None"),
        ({"shapes": [(2, 2)]}, ValueError, "shapes have 4 elements together, expected those of x0, 10"),
        ({"shapes": 10}, TypeError, "shapes must be a list of shapes, got 10"),
        ({"shapes": [(2, -5)]}, ValueError, r"shapes\[0\]"),
    ):
        with pytest.raises(error, match=words):
            minimize(rosenbrock, np.zeros(10), **wrong)  # type: ignore[arg-type]
