"""The vectors of :func:`fastnlcg.minimize`: flat arrays, NumPy's or torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastnlcg import _native
from fastnlcg.full_batch.iteration import DescentOptions
from fastnlcg.full_batch.passes import Mark, Sums
from fastnlcg.full_batch.quasi_newton import OverVectors, Vectors
from fastnlcg.full_batch.rotation import flat_matrices


class _OnFlat:
    """A flat array x, and what moves it along d."""

    g: Any = None
    """the gradient at x"""
    _g_origin: Any = None

    def __init__(self, x: Any, device: str, *, preconditioned: bool) -> None:
        self.x, self.threads, self.preconditioned = x, _native.num_threads(), preconditioned
        self.dtype = str(x.dtype).removeprefix("torch.")
        self.stream = _native.current_stream(device, x) if device != "cpu" else 0
        self._step = _native.FlatStep(self.dtype, device, self.stream)
        self._buffers: dict[str, Any] = {}

    def _hold(self, **arrays: Any) -> None:
        """Arrays that every pass is given, by the names of :meth:`FlatStep.bind`."""
        self._buffers = {name: _native.Buffer(array) for name, array in arrays.items() if array is not None}

    def set_gradient(self, g: Any) -> None:
        """Takes the gradient at x, without a copy: a search that begins here may come back to it."""
        self.g = g
        self._step.bind(g=_native.Buffer(g), **self._buffers)

    def _run(self, kind: str, **numbers: Any) -> list[float]:
        return self._step.descend(
            _native.DescentPass(kind, preconditioned=self.preconditioned, **numbers), self.threads
        )

    def trial(self, alpha: float, *, first: Mark | None) -> None:
        # fun gets copies, so x still has the mark ``first``.
        if first is not None:
            self._g_origin = self.g
        self._run("trial", alpha=alpha, first=first is not None)
        if alpha == 0.0:
            self.g = self._g_origin

    def slope(self, f: float) -> tuple[float, float, float]:
        slope, largest, *_ = self._run("slope")
        return f, slope, largest


class Flat(_OnFlat):
    """:class:`Passes` over flat arrays of one dtype and device: conjugate gradients without rotations."""

    def __init__(self, x: Any, zeros: Callable[[], Any], device: str, *, preconditioned: bool) -> None:
        super().__init__(x, device, preconditioned=preconditioned)
        self.g_prev, self.d, self.origin = zeros(), zeros(), zeros()
        self.h = zeros() if preconditioned else None
        self.forget()
        self._hold(p=x, grad_prev=self.g_prev, direction=self.d, diagonal=self.h, origin=self.origin)

    def curvature(self, update: tuple[float, float, float, float] | None) -> Sums:
        alpha, scale, ys, shs = update or (0.0, 1.0, 0.0, 0.0)
        sums = self._run("curvature", update=update is not None, alpha=alpha, scale=scale, ys=ys, shs=shs)
        return Sums(*sums[:3])

    def direction(self, beta: float) -> tuple[float, float, Mark]:
        slope, dhd, xd, xx, *_ = self._run("direction", beta=beta)
        return slope, dhd, (xd, xx)

    def forget(self) -> None:
        if self.h is not None:
            self.h[:] = 1.0


class FlatVectors(OverVectors, _OnFlat):
    """:class:`PairPasses` over flat arrays."""

    def __init__(
        self,
        x: Any,
        make: Callable[[tuple[int, ...]], Any],
        device: str,
        options: DescentOptions,
        shapes: Sequence[tuple[int, ...]],
    ) -> None:
        super().__init__(x, device, preconditioned=options.preconditioner is not None)
        (self.n,) = x.shape
        unit = _native.block_elements
        self.vectors = Vectors(
            -(-self.n // unit) * unit,
            make,
            self.dtype,
            device,
            self.stream,
            history=options.history,
            preconditioned=self.preconditioned,
            matrices=flat_matrices(shapes) if options.preconditioner == "kronecker" else [],
            load=self._load,
        )
        self.g, self.origin = x, make((self.n,))
        self._hold(p=x, direction=self.vectors.out[: self.n], origin=self.origin)

    def _load(self, buffer: Any) -> None:
        buffer[: self.n] = self.g

    def set_gradient(self, g: Any) -> None:
        super().set_gradient(g)
        self.vectors.fresh = False

    def _marked(self, dhd: float) -> tuple[float, float, Mark]:
        slope, xd, xx, *_ = self._run("mark")
        return slope, dhd, (xd, xx)

    def forget(self) -> None:
        self.vectors.forget()
