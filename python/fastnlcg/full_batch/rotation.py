"""Weight matrices in the eigenbasis of Kronecker factors, which curvature pairs form: of NumPy's arrays or torch's
tensors, by their libraries' matrix products and eigendecompositions.

The bias of a matrix is its last column, so W below is a x b with it. The bases QL (a x a) and QR (b x b) begin as the
identity::

    rotated(V) = QL^T V QR
    SL = rho SL + Y DR Y^T / ys,  SR = rho SR + Y^T DL Y / ys          for each of the ten pairs since the last change
    DL = mean(l) / l,  l = max(diag(SL), 1e-5 max(diag(SL))), before these pairs; DR likewise from SR
    QL' = eigenvectors of SL,  QR' = eigenvectors of SR                                          with every tenth pair
    H'  = (QL'^T QL)^2 H ((QR'^T QR)^2)^T, squares by element: the diagonal of the old matrix in the new basis; at
          least 1e-18 of its largest element

The factors are kept in the present basis (QL^T SL QL), so they are formed from vectors that are rotated already, their
diagonals are their eigenvalues, and QL' is QL times their eigenvectors. A side longer than 512 is not rotated, and a
side of 1 need not be; D is the identity for it.

Source: the basis is that of Gupta et al., arXiv:1802.09568 (Shampoo), and Vyas et al., arXiv:2409.11321 (SOAP), there
from gradients; each side weighted by the inverse of the other, as here, by Lin et al., arXiv:2509.03378 (KL-Shampoo).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RHO = 0.95
"""how much of the factors a pair keeps"""
LEAST = 1e-5
"""the least eigenvalue by which the other side is weighted, relative to the largest"""
EVERY = 10
"""the bases change with every tenth pair"""
AT_ONCE = 2**18
"""elements: a product of several vectors takes as many at once as have no more"""
FLOOR = 1e-18
"""the least h of a matrix when its bases change, relative to its largest: along directions in which the loss is flat to
its last digits h would fall without end, and weights would grow"""
WIDEST = 512
"""the longest side that is rotated: an eigendecomposition of 512 x 512 in float64 takes some 0.06 s on one core"""

Side = dict[str, Any]
"""``factor`` and ``basis``"""


@dataclass
class Matrix:
    """The place of a matrix in a flat vector, or of a stack of them: ``shape`` is (a, b) or (stack, a, b)."""

    begin: int
    shape: tuple[int, ...]
    bias: int | None = None
    """where its bias begins"""
    sides: dict[str, Side] = field(default_factory=dict)
    """``left`` and ``right``, as far as they are rotated"""
    workspaces: Sequence[tuple[Any, Any, Any]] = ((None, None, None), (None, None, None))
    """memory for two products, each whole, without its last column, and that column; None: to be allocated"""
    _views: dict[int, tuple[Any, Any, Any]] = field(default_factory=dict)
    """by the id of a vector: the vector, its part here, and its bias"""

    @property
    def end(self) -> int:
        return self.begin + math.prod(self.shape)

    def side(self, name: str) -> int:
        """The length of a side: the bias is one column more."""
        return self.shape[-2] if name == "left" else self.shape[-1] + (self.bias is not None)

    def rotated_sides(self) -> list[str]:
        """The sides that are rotated."""
        return [name for name in ("left", "right") if 1 < self.side(name) <= WIDEST]

    def of(self, vector: Any) -> tuple[Any, Any]:
        """This matrix in a flat vector, or in each row of a matrix of vectors; and its bias as a matrix of one column,
        or None."""
        kept = self._views.get(id(vector))
        if kept is None or kept[0] is not vector:
            rows = vector.shape[:-1]
            here = vector[..., self.begin : self.end].reshape((*rows, *self.shape))
            bias = None
            if self.bias is not None:
                bias = vector[..., self.bias : self.bias + self.shape[-2]].reshape((*rows, -1, 1))
            kept = self._views[id(vector)] = vector, here, bias
        return kept[1:]

    def joined(self, vectors: Any, rows: Sequence[int]) -> Any:
        """This matrix with its bias, in these rows of ``vectors``: a copy."""
        here, bias = self.of(vectors)
        return here[rows] if bias is None else _library(here).concatenate((here[rows], bias[rows]), -1)

    def use_workspace(self, one: Any, other: Any) -> None:
        """Takes memory for products: two flat arrays, which matrices share."""
        shape = (*self.shape[:-1], self.side("right"))
        both = [flat[: math.prod(shape)].reshape(shape) for flat in (one, other)]
        self.workspaces = [(x, x[..., :-1], x[..., -1:]) for x in both]

    def in_parts(self, count: int) -> list[slice]:
        """Of ``count`` vectors those that are multiplied at once, for the memory of a product."""
        some = max(1, AT_ONCE // (self.end - self.begin))
        return [slice(k, k + some) for k in range(0, count, some)]

    def multiply(self, vector: Any, left: Any, right: Any) -> None:
        """``left V right`` in place of V, or of that in each row; None: the identity."""
        here, bias = self.of(vector)
        if here.ndim == len(self.shape):
            _multiply(here, bias, left, right, self.workspaces)
        else:
            for rows in self.in_parts(len(here)):
                _multiply(here[rows], None if bias is None else bias[rows], left, right, Matrix.workspaces)

    def see(self, vectors: Any, pairs: Sequence[tuple[int, float]], weights: Mapping[str, Any]) -> None:
        """The factors of these pairs, in one product for each side, given the :func:`_weights` of both."""
        y = self.joined(vectors, [row for row, _ in pairs])
        # Each pair is scaled before it is squared: its square could leave float32.
        scales = [math.sqrt(RHO**later / ys) for later, (_, ys) in enumerate(reversed(pairs))][::-1]
        for each, scale in zip(y, scales, strict=True):
            each *= scale
        for name, side in self.sides.items():
            one, other = (transposed(y), "right") if name == "left" else (y, "left")
            weight = weights.get(other)
            weighted = one if weight is None else transposed(weight) * one
            _add_squares(side["factor"], weighted, RHO ** len(pairs))


def _multiply(here: Any, bias: Any, left: Any, right: Any, workspaces: Sequence[tuple[Any, Any, Any]]) -> None:
    if right is None:
        for part in (here, bias):
            if part is not None and left is not None:
                part[...] = _product(left, part)
        return
    library = _library(here)
    work, other = workspaces
    product = here if bias is None else library.concatenate((here, bias), -1, out=work[0])
    if left is not None:
        product = _product(left, product, other[0])
        work, other = other, work
    product = _product(product, right, other[0])
    if bias is None:
        here[...] = product
    else:
        here[...], bias[...] = (product[..., :-1], product[..., -1:]) if other[0] is None else other[1:]


def _product(a: Any, b: Any, out: Any = None) -> Any:
    """``a b`` in their own type, also inside torch.autocast."""
    library = _library(a)
    if library.__name__ == "torch" and library.is_autocast_enabled(a.device.type):
        with library.autocast(a.device.type, enabled=False):
            return library.matmul(a, b, out=out)
    return library.matmul(a, b, out=out)


def transposed(x: Any) -> Any:
    """The matrices of ``x``, transposed."""
    return x.swapaxes(-1, -2)


def as_matrix(shape: Sequence[int]) -> tuple[int, ...] | None:
    """The matrix, or the stack of matrices, as which a parameter of this shape is rotated; None: it is not. A
    convolution is out x (in k k). Three dimensions are a stack if the sides of its matrices are within a factor of 4 of
    each other, else a convolution: a stack of others would have bases much larger than itself."""
    if len(shape) < 2 or math.prod(shape) == 0:
        return None
    is_stack = len(shape) == 3 and max(shape[1:]) <= 4 * min(shape[1:])
    matrix = tuple(shape) if len(shape) == 2 or is_stack else (shape[0], math.prod(shape[1:]))
    return matrix if Matrix(0, matrix).rotated_sides() else None


def matrices_of(shapes: Sequence[Sequence[int] | None], places: Sequence[int]) -> list[Matrix]:
    """The matrices among parameters of these shapes, each with the vector behind it if that has the length of its left
    side and leaves its right side short enough. None: a parameter that is not to be rotated."""
    found: list[Matrix] = []
    for i, shape in enumerate(shapes):
        matrix = None if shape is None else as_matrix(shape)
        if matrix is None:
            continue
        behind = shapes[i + 1] if i + 1 < len(shapes) else None
        has_bias = len(matrix) == 2 and matrix[1] != WIDEST and behind is not None and tuple(behind) == (matrix[0],)
        one = Matrix(places[i], matrix, places[i + 1] if has_bias else None)
        found.append(one)
    return found


def flat_matrices(shapes: Sequence[Sequence[int]]) -> list[Matrix]:
    """The matrices in a flat vector that consists of parts of these shapes."""
    places = list(itertools.accumulate(map(math.prod, shapes), initial=0))
    return matrices_of(shapes, places)


class Rotation:
    """The bases and factors of some matrices.

    Args:
        matrices: where they are.
        make: ``make(shape)`` returns zeros, where and as the vectors are.
        agree: given eigenvectors, makes them those of the first rank; None: there are no other ranks.
    """

    def __init__(
        self,
        matrices: list[Matrix],
        make: Callable[[tuple[int, ...]], Any],
        agree: Callable[[list[Any]], None] | None = None,
    ) -> None:
        self.matrices, self.agree = matrices, agree
        for matrix in matrices:
            for name in matrix.rotated_sides():
                size = matrix.side(name)
                shape = (*matrix.shape[:-2], size, size)
                basis = make(shape)
                basis[..., range(size), range(size)] = 1.0
                matrix.sides[name] = {"factor": make(shape), "basis": basis}
        both = [matrix for matrix in matrices if "right" in matrix.sides]  # the others are multiplied part by part
        largest = max((math.prod(matrix.shape[:-1]) * matrix.side("right") for matrix in both), default=0)
        flat = make((largest,)), make((largest,))
        for matrix in both:
            matrix.use_workspace(*flat)
        self._bases = [_bases(matrix) for matrix in matrices]
        """of each matrix: left, right, and both transposed; views of what is written in place"""

    def rotate(self, vector: Any) -> None:
        """In place, into the bases."""
        for matrix, (_, right, left_t, _) in zip(self.matrices, self._bases, strict=True):
            matrix.multiply(vector, left_t, right)

    def rotate_back(self, vector: Any) -> None:
        """In place, out of the bases."""
        for matrix, (left, _, _, right_t) in zip(self.matrices, self._bases, strict=True):
            matrix.multiply(vector, left, right_t)

    def see(self, vectors: Any, pairs: Sequence[tuple[int, float]]) -> None:
        """The factors of new pairs, from the oldest to the newest: the row of a rotated y in ``vectors``, and ys."""
        for matrix in self.matrices:
            weights = {name: _weights(side["factor"]) for name, side in matrix.sides.items()}
            for some in matrix.in_parts(len(pairs)):
                matrix.see(vectors, pairs[some], weights)

    def forget(self) -> None:
        """Factors of zero; the bases stay."""
        for matrix in self.matrices:
            for side in matrix.sides.values():
                side["factor"][...] = 0.0

    def turn(self, h: Any, vectors: Sequence[Any]) -> bool:
        """Takes the eigenvectors of the factors for bases, and brings h and these rotated vectors to them. Returns
        whether a basis has changed. A factor that is not finite is dropped, and its basis stays, as it does if an
        eigendecomposition fails."""
        new: list[tuple[Matrix, dict[str, Any]]] = []
        for matrix in self.matrices:
            found = {name: _eigenvectors(side["factor"]) for name, side in matrix.sides.items()}
            new.append((matrix, {name: vectors for name, vectors in found.items() if vectors is not None}))
        if self.agree is not None:
            # Every rank has the same factors, so the same eigenvectors are there.
            self.agree([one for _, found in new for one in found.values()])
        try:
            for matrix, found in new:
                _change_bases(matrix, found, h, vectors)
        except BaseException:  # an interrupt: h would be that of other bases
            h[...] = 1.0
            self.forget()
            raise
        return any(found for _, found in new)


def _bases(matrix: Matrix) -> tuple[Any, Any, Any, Any]:
    left, right = (matrix.sides[name]["basis"] if name in matrix.sides else None for name in ("left", "right"))
    return left, right, None if left is None else transposed(left), None if right is None else transposed(right)


def _weights(factor: Any) -> Any:
    """The square roots of the weights that the eigenvalues of a factor give to the columns of the other side, as one
    row; 1 if the eigenvalues are all 0."""
    library = _library(factor)
    eigenvalues = factor.diagonal(0, -2, -1)[..., None, :]
    least = LEAST * library.amax(eigenvalues, axis=-1, keepdims=True) + library.finfo(factor.dtype).tiny
    eigenvalues = library.maximum(eigenvalues, least)
    return library.sqrt(library.mean(eigenvalues, axis=-1, keepdims=True) / eigenvalues)


def _add_squares(factor: Any, x: Any, keep: float) -> None:
    """``factor = keep factor + sum x_i^T x_i``"""
    of_stack = x if factor.ndim == 2 else x.swapaxes(0, 1)
    rows = of_stack.reshape(*factor.shape[:-2], -1, factor.shape[-1])
    factor *= keep
    factor += _product(transposed(rows), rows)


def _library(array: Any) -> Any:
    """The module of an array: numpy or torch."""
    return sys.modules[type(array).__module__.partition(".")[0]]


def _change_bases(matrix: Matrix, eigenvectors: dict[str, Any], h: Any, vectors: Sequence[Any]) -> None:
    for name, v in eigenvectors.items():
        side = matrix.sides[name]
        basis = _product(side["basis"], v)
        # One step of Newton and Schulz: rounding would add up from change to change.
        side["basis"][...] = 1.5 * basis - 0.5 * _product(basis, _product(transposed(basis), basis))
        side["factor"][...] = _product(_product(transposed(v), side["factor"]), v)
    left, right = (eigenvectors.get(name) for name in ("left", "right"))
    left = None if left is None else transposed(left)
    for vector in vectors:
        matrix.multiply(vector, left, right)
    matrix.multiply(h, None if left is None else left * left, None if right is None else right * right)
    parts = [part for part in matrix.of(h) if part is not None]
    least = FLOOR * max(float(part.max()) for part in parts)
    for part in parts:
        part[...] = part.clip(min=least)


def _eigenvectors(factor: Any) -> Any:
    """Of a factor, in its type; None if there are none."""
    library = _library(factor)
    largest = float(abs(factor).max())
    # torch.linalg.eigh of a matrix with a NaN may return finite, orthogonal vectors: look before.
    if not math.isfinite(largest):
        factor[...] = 0.0
    if not 0.0 < largest < math.inf:
        return None
    wide = factor.astype("float64") if library.__name__ == "numpy" else factor.double()
    try:
        vectors = library.linalg.eigh((wide + transposed(wide)) / 2.0)[1]
    except (ValueError, RuntimeError):  # LinAlgError of NumPy, of torch
        return None
    if not bool(library.isfinite(vectors).all()):
        return None
    if library.__name__ == "numpy":
        return vectors.astype(factor.dtype)
    return vectors.to(factor.dtype).contiguous()  # NCCL takes no columns, which they are
