"""NLCG with matrices, compared with the reference after every step: parameters, d, v and the scalars.

The reference starts each step from the native state. What differs is rounding: of sums and directions, as in
lockstep.py, and of Newton-Schulz, whose five iterations multiply a relative difference of u by at most 3.4445^5 = 485.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fastnlcg import NLCG, _native, reference
from torch import Tensor, nn

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
STORED = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass
class Matrices:
    """A parameter, and the index arrays of its matrices: ``places[k]`` has the shape of the matrix, and its elements'
    numbers in the parameter, row-major."""

    shape: tuple[int, ...]
    places: list[np.ndarray]
    sizes: list[float]
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    permuted: tuple[int, ...] | None = None
    gaps: bool = False

    def tensor(self, values: Tensor) -> Tensor:
        """``values`` in this memory order: dimensions from the outermost in."""
        if self.gaps:
            wide = torch.zeros(*self.shape[:-1], self.shape[-1] + 3, dtype=self.dtype)
            wide[..., : self.shape[-1]] = values
            return wide[..., : self.shape[-1]]
        if self.permuted is None:
            return values.to(self.dtype).contiguous()
        back = [self.permuted.index(k) for k in range(len(self.shape))]
        return values.to(self.dtype).permute(self.permuted).contiguous().permute(back)


def matrices(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Matrices:
    """A parameter of a "muon" group with these options."""
    kept = {"permuted": options.pop("permuted", None), "gaps": options.pop("gaps", False)}
    numbers = np.arange(math.prod(shape)).reshape(shape)
    stack = numbers.reshape(-1, *shape[-2:]) if options.get("stacked") else numbers.reshape(1, shape[0], -1)
    split = options.get("split")
    rows = stack.shape[1]
    parts = (rows,) if split is None else (rows // split,) * split if isinstance(split, int) else split
    places = [part for matrix in stack for part in np.split(matrix, np.cumsum(parts)[:-1])]
    original = options.get("adjust_lr_fn") == "original"
    sizes = [math.sqrt(max(1.0, len(x) / x.shape[1])) if original else 0.2 * math.sqrt(max(x.shape)) for x in places]
    return Matrices(shape, places, sizes, options, dtype, **kept)


class MuonLockstep:
    """``inside``: the parameters with matrices; ``rest``: the shapes of those with "adam"."""

    def __init__(
        self,
        inside: list[Matrices],
        rest: tuple[tuple[int, ...], ...] = ((17,), (5, 3)),
        *,
        lr: float = 0.02,
        weight_decay: float = 0.1,
        beta_max: float = 0.95,
        device: str = "cpu",
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        dtype = inside[0].dtype
        self.inside, self.device = inside, device
        self.params = [nn.Parameter(m.tensor(self._randn(m.shape)).to(device)) for m in inside]
        self.others = [nn.Parameter(self._randn(shape).to(dtype).to(device)) for shape in rest]
        groups = [
            {"params": [p], "preconditioner": "muon", "beta_max": beta_max, **m.options}
            for p, m in zip(self.params, inside, strict=True)
        ]
        if self.others:
            groups.insert(1, {"params": self.others, "lr": lr / 10})
        self.optimizer = NLCG(groups, lr=lr, weight_decay=weight_decay, **options)
        self.options = reference.Options(
            **{name: value for name, value in options.items() if name in ("update", "max_grad_norm", "maximize")}
        )
        self.beta_max = beta_max
        self.u = UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
        # In the reference: the matrices one after another, then the rest.
        self.order: list[tuple[nn.Parameter, np.ndarray]] = []
        self.of_reference: list[reference.Matrix] = []
        begin = 0
        for p, m in zip(self.params, inside, strict=True):
            for place, size in zip(m.places, m.sizes, strict=True):
                self.of_reference.append(reference.Matrix(begin, *place.shape, size))
                self.order.append((p, place.ravel()))
                begin += place.size
        self.n_matrices = begin
        self.order += [(p, np.arange(p.numel())) for p in self.others]
        self.n = begin + sum(p.numel() for p in self.others)

    def _randn(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def flat(self, of: Any) -> np.ndarray:
        """The values of ``of(parameter)``, in the reference's order."""
        values = {p: of(p).detach().double().cpu().reshape(-1).numpy() for p in (*self.params, *self.others)}
        return np.concatenate([values[p][place] for p, place in self.order])

    def set_gradients(self, scale: float = 1.0, without: tuple[int, ...] = ()) -> None:
        """Those of a quadratic, with noise; none for these matrices."""
        for k, p in enumerate((*self.params, *self.others)):
            noise = self._randn(tuple(p.shape)).to(self.device)
            if k in without:
                p.grad = None
            else:
                p.grad = (scale * (p.detach().double() + 0.5 * noise)).to(p.dtype)

    def state(self) -> reference.State:
        group = self.optimizer.param_groups[0]
        s = dict(zip(_native.SCALARS, group["scalars"].tolist(), strict=True))

        def array(key: str) -> np.ndarray:
            state = self.optimizer.state
            return self.flat(lambda p: state[p].get(key, torch.zeros_like(p)) if p in state else torch.zeros_like(p))

        def steps(p: Tensor) -> Tensor:
            entry = self.optimizer.state.get(p)
            return torch.full_like(p, float(entry["step"]) if entry else 0.0, dtype=torch.float64)

        return reference.State(
            g_prev=np.zeros(self.n),
            d=array("direction"),
            diagonal=array("exp_avg_sq"),
            alpha_prev=np.zeros(self.n),
            active=self.active,
            updates=self.flat(steps),
            step=int(s["step"]),
            skipped_steps=int(s["skipped_steps"]),
            rz=s["rz"],
            rz_matrices=s["rz_matrices"],
            grad_norm=s["grad_norm"],
            clip=s["clip"],
        )

    active = np.ones(0, dtype=bool)

    def checked_step(self) -> reference.State:
        """A step of both, compared. Returns the reference's new state."""
        has = self.flat(lambda p: torch.full_like(p, p.grad is not None, dtype=torch.float64)) != 0
        if not self.active.size:
            self.active = has
        before, p_before = self.state(), self.flat(lambda p: p)
        g = self.flat(lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
        of_parameter = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        per_element = {
            key: self.flat(lambda p, key=key: torch.full_like(p, of_parameter[p][key], dtype=torch.float64))
            for key in ("lr", "weight_decay")
        }
        active_matrices = [m for m in self.of_reference if has[m.begin]]
        p_new, new = reference.nlcg_step(
            p_before, g, before, self.options, **per_element, active=has, matrices=active_matrices,
            beta_max_matrices=self.beta_max,
        )  # fmt: skip
        self.optimizer.step()
        self.active = has
        after = self.state()
        scalars = dict(zip(_native.SCALARS, self.optimizer.param_groups[0]["scalars"].tolist(), strict=True))
        u, seen = self.u, np.abs(new.clip * g)
        tol_d = 16 * u * (seen + np.abs(before.d)) + (16 * u * np.abs(new.d))
        rest = np.arange(self.n) >= self.n_matrices
        tol_d[rest] += 64 * u * np.abs(new.d[rest] - new.beta * before.d[rest])
        _close("d", after.d, new.d, tol_d)
        _close("v", after.diagonal[rest], new.diagonal[rest], 32 * u * new.diagonal[rest])
        for key in ("rz", "beta", "rz_matrices", "beta_matrices", "grad_norm", "clip"):
            _close(key, scalars[key], getattr(new, key), 64 * u * abs(getattr(new, key)))
        assert after.step == new.step
        assert after.skipped_steps == new.skipped_steps
        np.testing.assert_array_equal(after.updates, new.updates)
        stored = np.concatenate([np.full(len(place), STORED[p.dtype]) for p, place in self.order])
        alpha = per_element["lr"]
        tol_p = (16 * u + stored) * (np.abs(p_before) + np.abs(p_new)) + alpha * (tol_d + 16 * u * np.abs(new.d))
        for m in active_matrices:
            # the largest element of a polar factor is at most its norm, 1.2
            tol_p[m.elements] += alpha[m.begin] * m.size * 485 * 16 * u
        _close("p", self.flat(lambda p: p), p_new, tol_p)
        return new


def _close(name: str, actual: Any, expected: Any, tolerance: Any) -> None:
    error = np.abs(np.asarray(actual, dtype=float) - np.asarray(expected, dtype=float))
    assert np.all(error <= tolerance), f"{name}: off by {np.max(error - tolerance)}"
