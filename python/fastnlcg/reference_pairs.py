"""The definition of full-batch descent with curvature pairs and rotated weight matrices, as NumPy float64; what
:mod:`fastnlcg.reference` is for the rest. Equations and symbols as in ``full_batch/pairs.py`` and
``full_batch/rotation.py``; factors are kept here in the original basis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastnlcg.full_batch.pairs import PairSums
from fastnlcg.full_batch.passes import Sums
from fastnlcg.reference import Array, DescentPasses, scaled_bfgs_diagonal

__all__ = ["PairPasses", "Weight", "turned_diagonal", "two_loops"]


@dataclass
class Weight:
    """A weight matrix of shape (a, b) in the flat vector, with its bias as one column more if it has one, its bases,
    and its factors. A side that is not rotated has the identity, and no factor."""

    begin: int
    a: int
    b: int
    bias: int | None
    left: Array
    right: Array
    factor_left: Array | None
    factor_right: Array | None

    def matrix(self, vector: Array) -> Array:
        """The matrix in ``vector``, and the bias as its last column."""
        found = vector[self.begin : self.begin + self.a * self.b].reshape(self.a, self.b)
        return found if self.bias is None else np.column_stack((found, vector[self.bias : self.bias + self.a]))

    def multiplied(self, vector: Array, left: Array, right: Array) -> Array:
        """``vector`` with ``left V right`` in place of the matrix."""
        found, product = vector.copy(), left @ self.matrix(vector) @ right
        found[self.begin : self.begin + self.a * self.b] = product[:, : self.b].ravel()
        if self.bias is not None:
            found[self.bias : self.bias + self.a] = product[:, -1]
        return found

    def with_floor(self, h: Array) -> Array:
        """``h``, at least 1e-18 of its largest element in this matrix."""
        found, matrix = h.copy(), self.matrix(h)
        matrix = np.maximum(matrix, 1e-18 * matrix.max())
        found[self.begin : self.begin + self.a * self.b] = matrix[:, : self.b].ravel()
        if self.bias is not None:
            found[self.bias : self.bias + self.a] = matrix[:, -1]
        return found

    def see(self, pairs: Sequence[tuple[Array, float]]) -> None:
        """The factors of pairs: y in the original basis, and ys."""
        by_left, by_right = (
            _whitening(basis, factor)
            for basis, factor in ((self.left, self.factor_left), (self.right, self.factor_right))
        )
        for y, ys in pairs:
            v = self.matrix(y)
            if self.factor_left is not None:
                self.factor_left = 0.95 * self.factor_left + v @ by_right @ v.T / ys
            if self.factor_right is not None:
                self.factor_right = 0.95 * self.factor_right + v.T @ by_left @ v / ys


def _whitening(basis: Array, factor: Array | None) -> Array:
    """The matrix by which the other side is weighted: ``Q D Q^T``."""
    if factor is None or not factor.any():
        return np.eye(len(basis))
    eigenvalues = np.diag(basis.T @ factor @ basis)
    eigenvalues = np.maximum(eigenvalues, 1e-5 * eigenvalues.max())
    found: Array = basis * (eigenvalues.mean() / eigenvalues) @ basis.T
    return found


def turned_diagonal(h: Array, left: Array, right: Array) -> Array:
    """The diagonal of a diagonal matrix h (a x b) after a turn by ``left`` and ``right``: ``left^2 H (right^2)^T``."""
    return left**2 @ h @ (right**2).T


def two_loops(g: Array, pairs: Sequence[tuple[Array, Array]], p: Callable[[Array], Array]) -> Array:
    """``-H g`` of L-BFGS with the pairs (s, y) from the oldest to the newest and the initial matrix ``p``."""
    q, a = g.copy(), []
    for s, y in reversed(pairs):
        a.append(float(s @ q) / float(s @ y))
        q = q - a[-1] * y
    r = p(q)
    for (s, y), each in zip(pairs, reversed(a), strict=True):
        r = r + (each - float(y @ r) / float(s @ y)) * s
    return -r


class PairPasses(DescentPasses):
    """The vectors of a run with pairs.

    Args:
        x, gradient, preconditioned: see :class:`fastnlcg.reference.DescentPasses`.
        history: the number of pairs.
        weights: the matrices that are rotated. ``d``, ``g_prev``, ``h`` and the pairs are in their bases; ``out`` is d
            as x moves along it.
    """

    def __init__(
        self,
        x: Array,
        gradient: Callable[[], Array],
        *,
        history: int,
        preconditioned: bool = True,
        weights: Sequence[Weight] = (),
    ) -> None:
        super().__init__(x, gradient, preconditioned=preconditioned)
        self.history, self.weights = history, list(weights)
        self.s, self.y = np.zeros((history, x.size)), np.zeros((history, x.size))
        self.out = np.zeros_like(x)

    @property
    def rotates(self) -> bool:
        """Whether there are rotated matrices."""
        return bool(self.weights)

    def rotate(self, vector: Array) -> Array:
        """``QL^T V QR`` of every matrix."""
        for w in self.weights:
            vector = w.multiplied(vector, w.left.T, w.right)
        return vector

    def rotate_back(self, vector: Array) -> Array:
        """``QL V QR^T`` of every matrix."""
        for w in self.weights:
            vector = w.multiplied(vector, w.left, w.right.T)
        return vector

    def trial(self, alpha: float, *, first: tuple[float, float] | None) -> None:
        """``x = origin + alpha out``"""
        kept, self.d = self.d, self.out
        super().trial(alpha, first=first)
        self.d = kept

    def slope(self, f: float) -> tuple[float, float, float]:
        """``f``, ``sum(g out)``, ``max |g|``"""
        g = self.gradient()
        return f, float(np.sum(g * self.out)), float(np.max(np.abs(g)))

    def pair(
        self, row: int, update: tuple[float, float, float, float], *, turn: Sequence[tuple[int, float]] = ()
    ) -> PairSums:
        """s and y into ``row``, and h; with ``turn`` the factors of those rows, given with ys, and their eigenvectors
        as bases."""
        y = self.rotate(self.gradient()) - self.g_prev
        s = update[0] * self.d
        self.s[row], self.y[row] = s, y
        before = np.sum(y * y / (update[1] * self.h)) if self.preconditioned else np.sum(y * y)
        self._update_diagonal(y, update)
        if turn:
            self.see([(self.y[i], ys) for i, ys in turn])
            self.turn([self.eigenvectors(w) for w in self.weights])
            y = self.y[row]
        return PairSums(float(before), float(np.sum(y * y / self.h)), float(np.sum(y * y)), float(np.sum(s * s)))

    def _update_diagonal(self, y: Array, update: tuple[float, float, float, float]) -> None:
        alpha, scale, ys, scaled_shs = update
        if self.preconditioned:
            self.h = scaled_bfgs_diagonal(self.h, y, alpha * self.d, ys, scaled_shs / scale, scale)

    def see(self, pairs: Sequence[tuple[Array, float]]) -> None:
        """The factors of pairs: rotated y, and ys."""
        for w in self.weights:
            w.see([(self.rotate_back(y), ys) for y, ys in pairs])

    def eigenvectors(self, w: Weight) -> tuple[Array, Array]:
        """Of both factors; the present basis for a factor that is not there, or zero."""
        left = w.left if w.factor_left is None or not w.factor_left.any() else np.linalg.eigh(w.factor_left)[1]
        right = w.right if w.factor_right is None or not w.factor_right.any() else np.linalg.eigh(w.factor_right)[1]
        return left, right

    def turn(self, bases: Sequence[tuple[Array, Array]]) -> None:
        """Brings h and the rotated vectors to new bases."""
        for w, (left, right) in zip(self.weights, bases, strict=True):
            to_left, to_right = left.T @ w.left, right.T @ w.right
            for k in range(self.history):
                self.s[k] = w.multiplied(self.s[k], to_left, to_right.T)
                self.y[k] = w.multiplied(self.y[k], to_left, to_right.T)
            self.g_prev = w.multiplied(self.g_prev, to_left, to_right.T)
            self.d = w.multiplied(self.d, to_left, to_right.T)
            self.h = w.with_floor(w.multiplied(self.h, to_left**2, (to_right**2).T))
            w.left, w.right = left, right

    def gradient_dots(self, count: int) -> list[float]:
        """``sum(s_i g)``"""
        g = self.rotate(self.gradient())
        return [float(np.sum(s * g)) for s in self.s[:count]]

    def residual(self, a: Sequence[float], gamma: float, *, plain: bool) -> list[float]:
        """``d = gamma P (g - sum a_i y_i)``, ``g_prev = g``; ``sum(y_i d)``"""
        self.g_prev = self.rotate(self.gradient())
        q = self.g_prev - sum((x * y for x, y in zip(a, self.y, strict=False)), np.zeros_like(self.x))
        self.d = gamma * (q if plain or not self.preconditioned else q / self.h)
        return [float(np.sum(y * self.d)) for y in self.y[: len(a)]]

    def pair_direction(self, c: Sequence[float]) -> tuple[float, float, tuple[float, float]]:
        """``d = -(d + sum c_i s_i)``; ``sum(g out)``, ``sum(d h d)``, and the mark of x"""
        self.d = -(self.d + sum((x * s for x, s in zip(c, self.s, strict=False)), np.zeros_like(self.x)))
        return self._done()

    def curvature(self, update: tuple[float, float, float, float] | None, *, turn: bool = False) -> Sums:
        """Without pairs: h and the factors, and the sums of beta, rotated."""
        g = self.rotate(self.gradient())
        if update is not None:
            self.see([(g - self.g_prev, update[2])])
            self._update_diagonal(g - self.g_prev, update)
            if turn:
                self.turn([self.eigenvectors(w) for w in self.weights])
                g = self.rotate(self.gradient())
        y = g - self.g_prev
        return Sums(float(np.sum(g * g / self.h)), float(np.sum(y * g / self.h)), float(np.sum(y * y / self.h)))

    def direction(self, beta: float) -> tuple[float, float, tuple[float, float]]:
        """Without pairs: ``d = beta d - P g``."""
        self.g_prev = self.rotate(self.gradient())
        self.d = beta * self.d - self.g_prev / self.h if beta != 0.0 else -self.g_prev / self.h
        return self._done()

    def _done(self) -> tuple[float, float, tuple[float, float]]:
        self.out = self.rotate_back(self.d)
        slope = float(np.sum(self.gradient() * self.out))
        mark = float(np.sum(self.x * self.out)), float(np.sum(self.x * self.x))
        return slope, float(np.sum(self.d * self.h * self.d)), mark

    def forget(self) -> None:
        """``h = 1``, and factors of zero"""
        super().forget()
        for w in self.weights:
            w.factor_left = None if w.factor_left is None else 0.0 * w.factor_left
            w.factor_right = None if w.factor_right is None else 0.0 * w.factor_right
