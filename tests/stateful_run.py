"""A training run with random operations between steps, each step checked against the float64 reference.

``StatefulRun`` holds an ``NLCG`` and does one operation a call; ``check`` compares every step with one of the reference
that starts from the state before it. ``stateful_run_on_ranks`` compares several ranks with one process that has all
parameters. Hypothesis (test_properties.py) and the fuzzer (hard.py) choose the operations.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fastnlcg import NLCG, OnlineLineSearch, reference
from fastnlcg.tensors import groups
from torch import Tensor, nn

SHAPES = [(1,), (7,), (3, 5), (16,), (65,), (2, 3, 4), (4097,), (0,)]
DTYPES = [torch.float64, torch.float32]
DIAGONAL = {"adam": "exp_avg_sq", "bfgs": "hessian_diag"}


def random_options(choose: Callable[[list[Any]], Any]) -> dict[str, Any]:
    options = {
        "preconditioner": choose(["adam", "bfgs", None]),
        "update": choose(["fletcher_reeves", "polak_ribiere", "heavy_ball"]),
        "weight_decay": choose([0.0, 0.1]),
        "line_search": choose([None, OnlineLineSearch()]),
        "maximize": choose([False, True]),
        "beta2": choose([0.999, 0.5]),
        "max_grad_norm": choose([None, 1.0, 4.0]),
    }
    return options | ({"beta_max": 0.9} if options["update"] == "heavy_ball" else {})


class StatefulRun:
    """``check`` is False for runs that are compared with each other instead of the reference."""

    def __init__(self, seed: int, dtype: torch.dtype, options: dict[str, Any], *, check: bool = True) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype, self.options, self.check = dtype, options, check
        self.params: list[nn.Parameter] = []
        self.dropped: set[int] = set()
        self.last: set[int] = set()  # what moved in the last step that was taken
        self.optimizer = NLCG([self.new_parameter() for _ in range(self.rng.integers(1, 5))], 0.05, **options)
        self.steps = self.skipped = 0

    def new_parameter(self) -> nn.Parameter:
        shape = SHAPES[self.rng.integers(len(SHAPES) - (1 if not self.params else 0))]
        p = nn.Parameter(torch.from_numpy(self.rng.standard_normal(shape)).to(self.dtype))
        if p.ndim == 2 and self.rng.random() < 0.5:
            p = nn.Parameter(p.detach().t().contiguous().t())  # another memory order
        self.params.append(p)
        return p

    # ---- operations ----

    def set_gradients(self) -> None:
        """A noisy quadratic's; sometimes unchanged, sometimes zero."""
        kind = self.rng.random()
        for i, p in enumerate(self.params):
            if i in self.dropped:
                p.grad = None
            elif kind < 0.05:
                p.grad = torch.zeros_like(p)
            elif kind > 0.1 or p.grad is None:
                noise = torch.from_numpy(self.rng.standard_normal(p.shape)).to(self.dtype)
                p.grad = (0.5 + i % 3) * p.detach() + 0.3 * noise
                if p.ndim == 2 and self.rng.random() < 0.5:
                    p.grad = p.grad.t().contiguous().t()

    def step(self) -> None:
        self.set_gradients()
        loss = float(self.rng.standard_normal()) + 1.0
        moving = [i for i, p in enumerate(self.params) if i not in self.dropped and p.numel()]
        if not self.check:
            self.optimizer.step(loss=loss)
            self.last = set(moving) or self.last
        else:
            before = self.now()
            expected = self.expected(before, loss)
            self.optimizer.step(loss=loss)
            if moving:
                if expected[1].step > before.step:  # else an old gradient, not finite, was still there
                    self.last = set(moving)
                self.compare(before, *expected)
        self.steps += bool(moving)

    def nan_step(self) -> None:
        """A step with a NaN or an infinity changes nothing but a counter."""
        self.set_gradients()
        moving = [p for p in self.params if p.grad is not None and p.numel()]
        if not moving:
            return
        victim = moving[self.rng.integers(len(moving))]
        g = victim.grad
        assert g is not None
        values = g.reshape(-1).clone()
        values[int(self.rng.integers(g.numel()))] = [math.nan, math.inf, -math.inf][self.rng.integers(3)]
        victim.grad = values.view(g.shape)
        before = self.bits()
        self.optimizer.step()
        assert self.bits() == before, "a step that was skipped has changed something"
        self.skipped += 1

    def add_group(self) -> None:
        if len(self.params) < 8:
            self.optimizer.add_param_group({"params": [self.new_parameter()], "lr": 0.02})

    def drop(self) -> None:
        self.dropped ^= {int(self.rng.integers(len(self.params)))}

    def save_and_load(self) -> None:
        """Into a new optimizer over copies, as another process would; through a file."""
        before = self.bits()
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        fresh, new_groups = [], []
        place = {id(p): i for i, p in enumerate(self.params)}
        copies = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in self.params]
        for group in self.optimizer.param_groups:
            fresh = [copies[place[id(p)]] for p in group["params"]]
            new_groups.append({"params": fresh, "lr": group["lr"]})
        for p, q in zip(self.params, copies, strict=True):
            q.grad = p.grad
        self.params = copies
        self.optimizer = NLCG(new_groups, 0.05, **self.options)
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))
        assert self.bits() == before, "a checkpoint has lost something"

    def load_in_place(self) -> None:
        before = self.bits()
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        assert self.bits() == before, "a checkpoint has lost something"

    def swap_data(self) -> None:
        p = self.params[self.rng.integers(len(self.params))]
        room = torch.empty(p.numel() + 9, dtype=self.dtype)
        shift = int(self.rng.integers(9))
        new = room[shift : shift + p.numel()].as_strided(p.shape, p.stride()) if p.numel() else p.data
        p.data = new.copy_(p.detach()) if p.numel() else new

    def change_lr(self) -> None:
        group = self.optimizer.param_groups[self.rng.integers(len(self.optimizer.param_groups))]
        group["lr"] = [0.0, 0.01, 0.1][self.rng.integers(3)]

    def look(self) -> None:
        self.optimizer.diagnostics()
        self.optimizer.state_dict()

    OPERATIONS = (step, nan_step, add_group, drop, save_and_load, load_in_place, swap_data, change_lr, look)

    # ---- the reference ----

    def bits(self) -> bytes:
        """Parameters, state, and the scalars but for what counts skipped steps."""
        parts: list[bytes] = []
        for p in self.params:
            parts.append(p.detach().contiguous().view(torch.uint8).numpy().tobytes() if p.numel() else b"")
        saved = self.optimizer.state_dict()
        for i in sorted(saved["state"]):
            if int(saved["state"][i]["step"]) == 0:
                continue  # made by a step that was skipped
            for key in sorted(saved["state"][i]):
                parts.append(saved["state"][i][key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        scalars = groups.named_scalars(saved["param_groups"][0])
        if scalars["step"]:
            alpha_prev = [group["alpha_prev"].item() for group in saved["param_groups"]]
            parts.append(
                repr(
                    (
                        [v for k, v in scalars.items() if k not in ("skipped_steps", "active_set", "grad_norm")],
                        alpha_prev,
                    )
                ).encode()
            )
        return b"|".join(parts)

    def flat(self, tensors: list[Tensor | None]) -> np.ndarray:
        pieces = [
            np.zeros(p.numel()) if t is None else t.detach().double().reshape(-1).numpy()
            for p, t in zip(self.params, tensors, strict=True)
        ]
        return np.concatenate([*pieces, np.zeros(0)])

    def per_element(self, numbers: list[float]) -> np.ndarray:
        return np.concatenate([np.full(p.numel(), x) for p, x in zip(self.params, numbers, strict=True)])

    def entry(self, key: str) -> list[Tensor | None]:
        return [self.optimizer.state[p].get(key) if p in self.optimizer.state else None for p in self.params]

    def number(self, key: str, start: float) -> np.ndarray:
        return self.per_element([start if x is None else float(x) for x in self.entry(key)])

    def of_groups(self, key: str) -> list[float]:
        found = {id(p): group[key] for group in self.optimizer.param_groups for p in group["params"]}
        return [float(found[id(p)]) for p in self.params]

    def now(self) -> reference.State:
        """The optimizer's state as the reference's."""
        saved = self.optimizer.state_dict()["param_groups"]
        scalars = groups.named_scalars(saved[0])
        alpha = {i: group["alpha_prev"].item() for group in saved for i in group["params"]}
        order = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        place = {of: i for i, of in enumerate(order)}
        diagonal = None
        if (kind := self.options["preconditioner"]) is not None:
            start = 1.0 if kind == "bfgs" else 0.0
            found = self.entry(DIAGONAL[kind])
            diagonal = self.flat(
                [torch.full_like(p, start) if x is None else x for p, x in zip(self.params, found, strict=True)]
            )
        active = self.per_element([float(i in self.last) for i in range(len(self.params))]) > 0
        return reference.State(
            g_prev=self.flat(self.entry("grad_prev")),
            d=self.flat(self.entry("direction")),
            diagonal=diagonal,
            alpha_prev=self.per_element([alpha[place[id(p)]] for p in self.params]),
            active=active if scalars["step"] else np.ones(active.size, dtype=bool),
            updates=self.number("step", 0.0),
            step=int(scalars["step"]),
            skipped_steps=int(scalars["skipped_steps"]),
            rz=scalars["rz"],
            ls_scale=scalars["ls_scale"],
            loss_prev=scalars["loss_prev"] if math.isfinite(scalars["loss_prev"]) else None,
            grad_norm=scalars["grad_norm"],
            clip=scalars["clip"],
        )

    def expected(self, before: reference.State, loss: float) -> tuple[np.ndarray, reference.State]:
        o = self.options
        search = o["line_search"]
        options = reference.Options(
            **{
                k: o[k]
                for k in ("preconditioner", "update", "maximize", "beta2", "beta_max", "max_grad_norm")
                if k in o
            },
            line_search=search,
        )
        mask = self.per_element([float(i not in self.dropped) for i in range(len(self.params))]) > 0
        return reference.nlcg_step(
            self.flat(list(self.params)),
            self.flat([p.grad for p in self.params]),
            before,
            options,
            lr=self.per_element(self.of_groups("lr")),
            weight_decay=self.per_element(self.of_groups("weight_decay")),
            loss=loss,
            active=mask,
        )

    def compare(self, before: reference.State, p: np.ndarray, state: reference.State) -> None:
        """Within the rounding of one step, amplified by bfgs as ``amplified`` says."""
        found = self.now()
        tolerance = 1e-7 if self.dtype == torch.float64 else 2e-3
        more_h, more_w, more_beta = self.amplified(before, state)
        more_d = more_w + more_beta * np.abs(before.d)
        assert (found.step, found.skipped_steps) == (state.step, state.skipped_steps)
        if not np.all(np.isfinite(more_d)):
            return  # whether h is updated depends on rounding

        def close(name: str, a: Any, b: Any, more: Any = 0.0) -> None:
            scale = np.max(np.abs(b), initial=1e-30)
            error = np.max(np.abs(np.asarray(a) - np.asarray(b)) - more, initial=0.0)
            assert error <= tolerance * scale, f"{name}: off by {error} of {scale} after step {state.step}"

        close("p", self.flat(list(self.params)), p, state.alpha_prev * more_d)
        close("d", found.d, state.d, more_d)
        if state.diagonal is not None:
            close("diagonal", found.diagonal, state.diagonal, more_h)
        if any(x is not None for x in self.entry("grad_prev")):
            close("g_prev", found.g_prev, state.g_prev)
        close("rz", found.rz, state.rz, more_beta * max(before.rz, state.rz))
        close("ls_scale", found.ls_scale, state.ls_scale)
        if math.isfinite(state.grad_norm):  # else an old gradient was still there
            close("grad_norm", found.grad_norm, state.grad_norm)
        close("clip", found.clip, state.clip)
        np.testing.assert_array_equal(found.updates, state.updates)

    def amplified(self, before: reference.State, state: reference.State) -> tuple[np.ndarray, np.ndarray, float]:
        """How far roundings may move h, w = g / (h + eps) and beta in bfgs, if ys is a small difference of sums or h
        nearly cancels: the bounds of lockstep.py. Infinite if ys may be on either side of the curvature condition."""
        nothing = np.zeros_like(before.d)
        if self.options["preconditioner"] != "bfgs":
            return nothing, nothing, 0.0
        u = 16 * (2.0**-53 if self.dtype == torch.float64 else 2.0**-24)
        assert before.diagonal is not None
        assert state.diagonal is not None
        g, s = np.where(state.active, state.g_prev, 0.0), before.alpha_prev * np.where(state.active, before.d, 0.0)
        g_prev = np.where(state.active, before.g_prev, 0.0)
        h, y = before.diagonal, g - g_prev
        more_ys = u * float(np.sum(np.abs(g * s) + np.abs(g_prev * s)))
        if state.step > 1 and abs(state.ys - 1e-8) <= more_ys:
            return nothing, nothing + np.inf, 0.0
        more_h = u * h
        if state.updated:
            gain, loss = y**2 / state.ys, (h * s) ** 2 / state.shs
            more_h = u * (h + gain + 2 * loss) + gain * more_ys / state.ys
        room = np.maximum(state.diagonal - more_h, 0.0) + 1e-8
        more_w = np.abs(g) * (more_h / room / (state.diagonal + 1e-8))
        more_rz = float(np.sum(np.abs(g) * more_w)) + u * abs(state.rz)
        return more_h, more_w, more_rz / before.rz if before.rz else 0.0


# ---- several ranks ---------------------------------------------------------------------------------------------------


def move_state(optimizer: NLCG, how: int) -> None:
    """What users and wrappers do to state between two steps."""
    for p, entry in list(optimizer.state.items()):
        for value in entry.values():
            if how == 4:
                value.data = value.clone()
            elif how == 5:
                value.share_memory_()
            elif how == 6:
                torch.utils.swap_tensors(value, value.clone())
        if how == 7:
            optimizer.state[p] = {key: value.clone() for key, value in entry.items()} | {"theirs": torch.ones(2)}


def stateful_run_on_ranks(seed: int, operations: int) -> int:
    """On every rank: one optimizer with a share of each parameter, whose state is moved, and one with all of each.
    Skips, changing sets of parameters, new groups and checkpoints are included. Returns the number of steps."""
    rng = np.random.default_rng(seed)
    rank, world = dist.get_rank(), dist.get_world_size()
    options = random_options(lambda choices: choices[rng.integers(len(choices))])
    options |= {"line_search": None}
    whole: list[nn.Parameter] = []
    mine: list[nn.Parameter] = []

    def add() -> tuple[nn.Parameter, nn.Parameter]:
        p = torch.from_numpy(rng.standard_normal(int(rng.integers(1, 40))))
        whole.append(nn.Parameter(p.clone()))
        mine.append(nn.Parameter(p.tensor_split(world)[rank].clone()))
        return whole[-1], mine[-1]

    pairs = [add() for _ in range(3)]
    alone = NLCG([p for p, _ in pairs], 0.05, **options)
    spread = NLCG([q for _, q in pairs], 0.05, process_group=dist.group.WORLD, **options)
    dropped: set[int] = set()
    steps = 0
    for _ in range(operations):
        what = rng.integers(8)
        if what >= 4:
            move_state(spread, int(what))
        if what == 0 and len(whole) < 6:
            p, q = add()
            alone.add_param_group({"params": [p], "lr": 0.02})
            spread.add_param_group({"params": [q], "lr": 0.02})
        elif what == 1:
            dropped ^= {int(rng.integers(len(whole)))}
        elif what == 2:
            for optimizer in (alone, spread):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        bad = int(rng.integers(len(whole))) if what == 3 else None
        for i, (p, q) in enumerate(zip(whole, mine, strict=True)):
            g = (0.5 + i % 3) * p.detach() + 0.3 * torch.from_numpy(rng.standard_normal(p.numel()))
            if i == bad:
                g[0] = math.nan  # rank 0's
            p.grad = None if i in dropped else g
            q.grad = None if i in dropped else g.tensor_split(world)[rank].clone()
        alone.step()
        spread.step()
        a, b = alone.diagnostics(), spread.diagnostics()
        assert (a.step, a.skipped_steps) == (b.step, b.skipped_steps), (a, b)
        assert math.isclose(a.rz, b.rz, rel_tol=1e-6, abs_tol=1e-12), (a, b)
        for p, q in zip(whole, mine, strict=True):
            part = p.detach().tensor_split(world)[rank]
            assert torch.allclose(part, q.detach(), rtol=1e-6, atol=1e-9), (part, q)
        with torch.no_grad():  # differences of rounding do not add up
            for p, q in zip(whole, mine, strict=True):
                q.copy_(p.tensor_split(world)[rank])
        steps += 1
    return steps
