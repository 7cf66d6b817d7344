"""The polar factor of matrices, by Newton-Schulz: torch's products, in workspace that is kept between steps.

Muon's iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for X of norm at most 1, with the
coefficients of torch.optim.Muon, five times::

    A = X X^T      X = a X + (b A + c A^2) X

takes its singular values near 1. Every iterate is a polynomial in the first A times the first X. So for wide matrices
the n x n polynomial Q is formed from A alone, and X is multiplied once, at the end (Gram form; Zhang et al. 2026,
https://github.com/Dao-AILab/gram-newton-schulz): two wide products in place of ten.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastnlcg.tensors.matrix_ranks import Buffers

COEFFICIENTS = (3.4445, -4.775, 2.0315)
STEPS = 5
GRAM_FROM = 2.0
"""The ratio of the sides from which the Gram form is taken. It costs (38 n + 4 m) n^2 and the other form
(10 n + 20 m) n^2: equal at m = 1.75 n."""


@functools.cache
def product_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products for state of ``dtype``: float64 for float64; bfloat16 on a GPU, and on a processor that
    multiplies in it; else float32."""
    if dtype == torch.float64:
        return dtype
    if device_type == "cpu":
        has = (
            getattr(torch.cpu, "_is_amx_tile_supported", bool)()
            or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        )
        return torch.bfloat16 if has else dtype
    return torch.bfloat16


class NewtonSchulz:
    """Polar factors of batches of matrices. Their buffers are kept."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers

    def polar_(self, x: Tensor, size: float, dtype: torch.dtype) -> None:
        """Replaces each matrix of ``x``, shape (count, rows, columns), contiguous, of norm 1 or zero, by ``size`` times
        its polar factor. ``dtype``: of the products."""
        count, rows, columns = x.shape
        n, m = min(rows, columns), max(rows, columns)
        given = x if x.dtype == dtype else self._buffers.take("x", x.shape, dtype, x.device).copy_(x)
        # bfloat16 makes small eigenvalues of the Gram matrix negative, which the iteration then enlarges.
        gram = m >= GRAM_FROM * n and dtype != torch.bfloat16
        spare = self._buffers.take("spare", x.shape, dtype, x.device)
        squares = [self._buffers.take(k, (count, n, n), dtype, x.device) for k in range(4 if gram else 2)]
        result = (self._gram if gram else self._plain)(given, spare, squares, size, rows <= columns)
        x.copy_(result)

    @staticmethod
    def _plain(x: Tensor, spare: Tensor, squares: list[Tensor], size: float, wide: bool) -> Tensor:
        a, b, c = COEFFICIENTS
        gram, polynomial = squares
        for step in range(STEPS):
            scale = size if step == STEPS - 1 else 1.0
            torch.bmm(*((x, x.mT) if wide else (x.mT, x)), out=gram)
            torch.baddbmm(gram, gram, gram, beta=b * scale, alpha=c * scale, out=polynomial)
            torch.baddbmm(x, *((polynomial, x) if wide else (x, polynomial)), beta=a * scale, out=spare)
            x, spare = spare, x
        return x

    @staticmethod
    def _gram(x: Tensor, spare: Tensor, squares: list[Tensor], size: float, wide: bool) -> Tensor:
        a, b, c = COEFFICIENTS
        gram, polynomial, q, other = squares
        torch.bmm(*((x, x.mT) if wide else (x.mT, x)), out=gram)
        for step in range(STEPS):
            scale = size if step == STEPS - 1 else 1.0
            torch.baddbmm(gram, gram, gram, beta=b * scale, alpha=c * scale, out=polynomial)
            polynomial.diagonal(dim1=-2, dim2=-1).add_(a * scale)
            if step == 0:
                q.copy_(polynomial)
            else:
                torch.bmm(polynomial, q, out=other)
                q, other = other, q
            if step < STEPS - 1:
                torch.bmm(polynomial, gram, out=other)
                torch.bmm(other, polynomial, out=gram)
        return torch.bmm(*((q, x) if wide else (x, q)), out=spare)
