"""A native step on the backend of the test, compared with the reference: every buffer and scalar, after every step.

The reference starts each step from the native state, so differences do not accumulate, and a tolerance can be derived:
``K * u`` times the magnitude of what was added up, u being the state's unit roundoff. K = 16 covers the dozen roundings
from a gradient to a direction. If h nearly cancels, w = g / (h + eps) is ill-conditioned, and the bound says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import backends
import numpy as np
import torch
from fastnlcg import _native, reference
from fastnlcg.tensors.table import DLPACK_API
from torch import Tensor

K = 16
SUM_ROUNDING = 64 * 2.0**-53  # sums in double: 256 additions a lane, errors of random sign
RUN = 17  # roundings of a term in the state's type, before its run is added in double: a product, sixteen additions
TORCH = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Half a unit in the last place of the parameter, if its type is narrower than the state's.
STORE_ROUNDING = {"float64": 0.0, "float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALLEST = {"float64": 0.0, "float32": 1e-45, "bfloat16": 1e-40, "float16": 6e-8}


@dataclass
class Cut:
    """One parameter: a stretch of the flat state."""

    n: int
    dtype: str
    group: int = 0


class Lockstep:
    """``cuts`` lays out the parameters; ``shift`` moves each by so many elements from its allocation's start."""

    def __init__(
        self,
        cuts: list[Cut],
        options: reference.Options,
        *,
        lr: tuple[float, ...] = (0.05,),
        weight_decay: tuple[float, ...] = (0.0,),
        shift: int = 0,
        threads: int = 1,
        seed: int = 0,
        stochastic_rounding: bool = False,
        shard: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        backend = self.backend = backends.current
        self.cuts, self.options, self.lr, self.weight_decay, self.threads = cuts, options, lr, weight_decay, threads
        self.rng, self.shard = np.random.default_rng(seed), shard
        self.n = sum(cut.n for cut in cuts)
        self.state_type = options.state_dtype or ("float64" if cuts[0].dtype == "float64" else "float32")
        self.u = 2.0**-53 if self.state_type == "float64" else 2.0**-24
        self.state_rounding = 2.0**-7 if self.state_type == "bfloat16" else 0.0  # to either neighbour
        values = self.rng.standard_normal(self.n)
        self.curvature = self.rng.uniform(0.1, 3.0, self.n)
        self.p, self.g, self.begin = [], [], []
        self.guards: list[tuple[Tensor, Tensor]] = []
        offset = 0
        for cut in cuts:
            room = [self.guarded(cut.n, TORCH[cut.dtype], shift) for _ in range(2)]
            room[0].copy_(torch.from_numpy(values[offset : offset + cut.n]))
            self.p.append(room[0])
            self.g.append(room[1])
            self.begin.append(offset)
            offset += cut.n
        kind = TORCH[self.state_type]
        self.native_options = replace(options, stochastic_rounding=stochastic_rounding)
        arrays = self.native_options.state_arrays()
        self.diagonal_key = options.kind.diagonal or ""
        self.state = {key: self.guarded(self.n, kind).fill_(start) for key, start in arrays.items()}
        self.state["step"] = self.guarded(len(cuts), torch.float64)
        self.numbers = self.guarded(len(_native.SCALARS), torch.float64)
        self.numbers.copy_(torch.tensor(list(_native.SCALARS.values()), dtype=torch.float64))
        self.alpha_prev = self.guarded(len(lr), torch.float64)
        self.native = backend.step(self.state_type)
        self.native.set_options(self.native_options.native())
        # to one of the two neighbours, not to the nearer
        self.store_rounding = {k: 2 * x if stochastic_rounding else x for k, x in STORE_ROUNDING.items()}
        self.active: list[int] = []
        self.use(list(range(len(cuts))))

    def guarded(self, n: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
        """Zeros, `shift` elements behind a cache line, between guard words that must not change."""
        around = 64 // dtype.itemsize
        whole = torch.zeros(n + 2 * around + shift, dtype=dtype, device=self.backend.device)
        inside = whole[around + shift : around + shift + n]
        for guard in (whole[: around + shift], whole[around + shift + n :]):
            guard.fill_(-1234.5)
            self.guards.append((guard, guard.clone()))
        return inside

    g_prev = property(lambda self: self.array("grad_prev") if "grad_prev" in self.state else None)
    d = property(lambda self: self.array("direction"))
    diagonal = property(lambda self: self.array(self.diagonal_key) if self.diagonal_key else None)
    scalars = property(lambda self: dict(zip(_native.SCALARS, self.numbers.tolist(), strict=True)))

    def array(self, key: str) -> np.ndarray:
        x = self.state[key].cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()

    def use(self, active: list[int]) -> None:
        """From now on only these parameters have gradients."""
        self.active = [i for i in active if self.cuts[i].n]
        self.set = float(sum(1 << i for i, cut in enumerate(self.cuts) if cut.n and i not in self.active) % (1 << 52))
        keys = _native.StateKeys(
            grad_prev="grad_prev" if "grad_prev" in self.state else None,
            direction="direction",
            diagonal=self.diagonal_key or None,
            steps="step",
        )
        workspace = self.backend.workspace(self.n, len(self.active), len(self.lr))
        segments = [
            _native.SegmentSpec(
                offset=self.begin[i],
                group=self.cuts[i].group,
                index=i,
                dtype=self.cuts[i].dtype,
                shape=(self.cuts[i].n,),
                strides=(1,),
                begin=self.shard[0],
                run=self.shard[1],
                skip=self.shard[2],
            )
            for i in self.active
        ]
        self.native.lay_out(self.n, segments, len(self.lr), keys, DLPACK_API, Tensor, workspace)

    def tensors(self) -> object:
        """The objects whose addresses the native side reads."""
        entries = [
            {
                key: whole[i] if key == "step" else whole[self.begin[i] : self.begin[i] + self.cuts[i].n]
                for key, whole in self.state.items()
            }
            for i in self.active
        ]
        p, g = [self.p[i] for i in self.active], [self.g[i] for i in self.active]
        return _native.Tensors(
            params=p, gradients=g, entries=entries, scalars=self.numbers, alpha_prev=list(self.alpha_prev)
        )

    def flat(self, tensors: list[Tensor]) -> np.ndarray:
        return torch.cat([t.double() for t in tensors]).cpu().numpy() if tensors else np.zeros(0)

    def per_element(self, per_group: list[float] | tuple[float, ...]) -> np.ndarray:
        return np.concatenate([np.full(cut.n, per_group[cut.group]) for cut in self.cuts])

    def set_gradients(self, values: np.ndarray) -> None:
        for begin, g in zip(self.begin, self.g, strict=True):
            g.copy_(torch.from_numpy(values[begin : begin + g.numel()]))

    def noisy_gradients(self) -> None:
        """Those of a diagonal quadratic, with more or less noise: beta is then at 0, between, and at 1."""
        noise = self.rng.uniform(0.0, 20.0) * self.rng.standard_normal(self.n)
        self.set_gradients(self.curvature * self.flat(self.p) + 0.1 * noise)

    def run(self, loss: float = math.nan) -> bool:
        moved = self.native.step(
            self.tensors(),
            list(self.lr),
            list(self.weight_decay),
            [self.options.maximize] * len(self.lr),
            self.set,
            loss,
            self.threads,
        )
        assert moved is not None, "the tensors do not fit the table"
        assert all(torch.equal(guard, before) for guard, before in self.guards), "written outside a buffer"
        return moved

    def snapshot(self) -> dict[str, bytes]:
        """Everything a step may write, as bytes."""
        parts = {key: tensor.cpu().view(torch.uint8).numpy().tobytes() for key, tensor in self.state.items()}
        parts["p"] = b"".join(p.contiguous().view(torch.uint8).cpu().numpy().tobytes() for p in self.p if p.numel())
        parts["scalars"] = repr((sorted(self.scalars.items()), self.alpha_prev.tolist())).encode()
        return parts

    def checked_step(self, loss: float = math.nan) -> reference.State:
        """One native step, compared with one of the reference. Returns the reference's new state."""
        o, u = self.options, self.u
        before = self.scalars
        alpha_prev = self.per_element(self.alpha_prev.tolist())
        mask = np.concatenate([np.full(cut.n, i in self.active) for i, cut in enumerate(self.cuts)])
        last = mask if before["active_set"] == self.set or not before["step"] else ~mask
        p, g = self.flat(self.p), self.flat(self.g)
        state = reference.State(
            g_prev=np.zeros(self.n) if self.g_prev is None else self.g_prev.astype(float),
            d=self.d.astype(float),
            diagonal=None if self.diagonal is None else self.diagonal.astype(float),
            alpha_prev=alpha_prev,
            active=last,
            updates=self.per_element_steps(),
            step=int(before["step"]),
            skipped_steps=int(before["skipped_steps"]),
            rz=before["rz"],
            ls_scale=before["ls_scale"],
            loss_prev=before["loss_prev"] if math.isfinite(before["loss_prev"]) else None,
            grad_norm=before["grad_norm"],
            clip=before["clip"],
        )
        lr, wd = self.per_element(self.lr), self.per_element(self.weight_decay)
        p_new, new = reference.nlcg_step(p, g, state, o, lr=lr, weight_decay=wd, loss=loss, active=mask)
        moved = self.run(loss)
        after = self.scalars
        assert moved == (new.skipped_steps == state.skipped_steps) or self.backend.on_gpu

        # how far rounding can be amplified
        l2 = 0.0 * wd if reference.PRECONDITIONERS[o.preconditioner].decoupled else wd
        clipped = o.measures_norm and new.clip != 1.0
        seen = np.where(clipped, new.clip, 1.0) * g
        eff = np.where(mask, reference.effective_gradient(seen, p, l2, o.maximize), 0.0)
        d_old, gp_old = np.where(mask, state.d, 0.0), np.where(mask, state.g_prev, 0.0)
        y, s = eff - gp_old, alpha_prev * d_old
        tol_g = np.where((l2 != 0.0) | clipped, K * u * (np.abs(seen) + np.abs(l2 * p)), 0.0)
        tol_ys = (
            SUM_ROUNDING * np.sum(np.abs(eff * s) + np.abs(gp_old * s))
            + K * u * np.sum(np.abs(y * s))
            + np.sum(tol_g * np.abs(s))
        )
        eps, tol_h, tol_diagonal = 0.0, np.zeros(self.n), np.zeros(self.n)
        if o.preconditioner == "bfgs":
            h, h_new = state.diagonal, new.diagonal
            eps = 0.0 if state.step == 0 else o.eps
            tol_shs = (SUM_ROUNDING + K * u) * new.shs
            if new.updated:
                gain, loss_term = y**2 / new.ys, (h * s) ** 2 / new.shs
                tol_h = K * u * (h + gain + loss_term) + 4 * np.abs(y) * tol_g / new.ys
                tol_h += gain * tol_ys / new.ys + loss_term * tol_shs / new.shs
            tol_diagonal = tol_h
        elif o.preconditioner == "adam":  # sums and products of positive numbers
            eps = o.eps
            h = reference.adam_diagonal(state.diagonal, o.beta2, state.updates)
            h_new = reference.adam_diagonal(new.diagonal, o.beta2, new.updates)
            tol_h = K * u * h_new
            tol_diagonal = K * u * new.diagonal
        else:
            h, h_new = np.ones(self.n), np.ones(self.n)
        w = eff / (h_new + eps)
        tol_w = np.abs(w) * (K * u + tol_h / (h_new + eps)) + tol_g / (h_new + eps)
        w_prev = gp_old / (h + eps)
        sum_rounding = SUM_ROUNDING + (RUN * u if o.preconditioner == "adam" else 0.0)
        sum_gw, sum_mid = np.sum(np.abs(eff * w)), np.sum(np.abs(eff * w_prev))
        tol_rz = sum_rounding * sum_gw + np.sum(np.abs(eff) * tol_w + tol_g * np.abs(w))
        tol_mid = (sum_rounding + K * u) * sum_mid + np.sum(tol_g * np.abs(w_prev))
        tol_beta = (tol_rz + tol_mid) / state.rz + K * u if state.rz else 0.0
        tol_d = tol_w + tol_beta * np.abs(d_old) + K * u * np.abs(new.beta * d_old)
        alpha = lr * new.ls_scale
        rounding = np.concatenate([np.full(cut.n, self.store_rounding[cut.dtype]) for cut in self.cuts])
        smallest = np.concatenate([np.full(cut.n, SMALLEST[cut.dtype]) for cut in self.cuts])
        tol_p = alpha * tol_d + (K * u + 2 * rounding) * (np.abs(p) + alpha * np.abs(new.d)) + smallest

        if self.n > 100 and not o.maximize:  # the bound must not let everything pass
            assert np.mean(tol_d <= 1e-3 * (np.abs(new.d) + np.abs(w) + 1e-30)) > 0.8

        def stored(x: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
            return tolerance + self.state_rounding * (np.abs(x) + tolerance)

        def close(name: str, actual: object, expected: object, tolerance: object) -> None:
            error = np.abs(np.asarray(actual, dtype=float) - np.asarray(expected, dtype=float))
            assert np.all(error <= tolerance), f"{name} at step {after['step']}: off by {np.max(error - tolerance)}"

        if self.g_prev is not None:
            close("g_prev", self.g_prev, new.g_prev, stored(new.g_prev, tol_g))
        close("d", self.d, new.d, stored(new.d, tol_d))
        if self.diagonal is not None:
            close("diagonal", self.diagonal, new.diagonal, stored(new.diagonal, tol_diagonal))
        assert bool(after["updated"]) == new.updated
        if o.preconditioner == "bfgs":
            close("ys", after["ys"], new.ys, tol_ys)
            close("shs", after["shs_used"], new.shs, (SUM_ROUNDING + K * u) * new.shs)
            # what the next step will use: sums over the last move
            s_new = np.where(mask, alpha * self.d, 0.0)
            close("gs", after["gs"], np.sum(self.g_prev * s_new), K * u * np.sum(np.abs(self.g_prev * s_new)))
            close(
                "shs'",
                after["shs"],
                np.sum(s_new * self.diagonal * s_new),
                K * u * np.sum(s_new * self.diagonal * s_new),
            )
            assert after["grad_max"] == np.max(np.abs(np.where(mask, self.g_prev, 0.0)), initial=0.0)
        if o.preconditioner == "adam":
            d_new = np.where(mask, self.d, 0.0).astype(float)
            tol_gg = sum_rounding * np.sum(eff**2) + 2 * np.sum(np.abs(eff) * tol_g)
            close("gg", after["gg"], np.sum(eff**2), tol_gg)
            tol_gd = sum_rounding * np.sum(np.abs(eff * d_new)) + np.sum(tol_g * np.abs(d_new))
            tol_gd += 2 * self.state_rounding * np.sum(np.abs(eff * d_new))  # formed from d before it is rounded
            close("gd", after["gd"], np.sum(eff * d_new), tol_gd)
        close("p", self.flat(self.p), p_new, np.where(mask, tol_p, 0.0))
        close("rz", after["rz"], new.rz, tol_rz)
        close("beta", after["beta"], new.beta, tol_beta)
        close("grad_norm", after["grad_norm"], new.grad_norm, SUM_ROUNDING * new.grad_norm)
        close("clip", after["clip"], new.clip, SUM_ROUNDING * new.clip if o.measures_norm else 0.0)
        close("ls_scale", after["ls_scale"], new.ls_scale, 1e-15)
        assert after["step"] == new.step
        assert after["skipped_steps"] == new.skipped_steps
        assert after["loss_prev"] == new.loss_prev or (new.loss_prev is None and math.isinf(after["loss_prev"]))
        close("alpha_prev", self.per_element(self.alpha_prev.tolist()), alpha, 1e-15 * alpha)
        np.testing.assert_array_equal(self.per_element_steps(), new.updates)
        return new

    def per_element_steps(self) -> np.ndarray:
        numbers = self.state["step"].cpu().numpy()
        return np.concatenate([np.full(cut.n, number) for cut, number in zip(self.cuts, numbers, strict=True)])
