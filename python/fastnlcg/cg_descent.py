"""The torch optimizer for full-batch problems: :class:`CGDescent`. A class of its own beside ``NLCG``: it calls its
closure as often as its line search needs, has no learning rate, and shares neither state nor options with the
stochastic step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable without importing the compiler

from fastnlcg import _native, groups
from fastnlcg.descent import Course, Descent, DescentOptions, OutOfBudget, Sums, check_count, check_positive
from fastnlcg.distributed import is_sharded
from fastnlcg.layout import EXCHANGE
from fastnlcg.parameters import (
    DTYPES,
    check_mixture,
    check_parameter,
    copy_in_order,
    dense_strides,
    is_dense,
    usable_gradient,
)
from fastnlcg.wolfe import HagerZhang

__all__ = ["CGDescent"]


class CGDescent(torch.optim.Optimizer):
    r"""Nonlinear conjugate gradients with the line search of Hager and Zhang, for a loss that is evaluated whole: what
    ``torch.optim.LBFGS(line_search_fn="strong_wolfe")`` is used for. There is no learning rate.

    One iteration, with P = 1/h; all sums run over all parameters of all groups::

        p     = p + alpha d                        alpha satisfies the (approximate) Wolfe conditions
        y     = g - g_prev,  s = alpha d
        h     = L h + y^2 / sum(y s) - (L h s)^2 / sum(s L h s)
        beta  = max((sum(y P g) - 2 sum(y P y) sum(d g) / sum(d y)) / sum(d y), 0.4 sum(d g_prev) / sum(d h d))
        d     = beta d - P g

    h begins at a thousandth of the first curvature. L is 1, and lowers h where it has overstated the curvature along d
    tenfold in the median of the last eleven iterations. The first length of a search comes from a parabola through a
    tenth of the last length, which is an evaluation more.

    State is four tensors per parameter in its dtype (``direction``, ``grad_prev``, ``hessian_diag``, ``origin``), made
    at the first step: 16 bytes per float32 parameter, 12 without a preconditioner, whatever the number of steps. An
    iteration moves about 80 bytes per float32 parameter outside the closure; L-BFGS some 400 with a history of 10.

    The function must not change between two steps, and its value must repeat: no mini-batches, no dropout. Where it
    does change on purpose (new collocation points), call :meth:`restart`. Edits of parameters between steps are seen,
    and begin anew from -P g. On data-parallel ranks the closure must return the loss averaged over all ranks (DDP
    averages the gradients); every rank then takes the same decisions. Parameters that are spread over ranks are
    refused.

    Args:
        params: parameters, named or not, or groups, of float32 or float64, on one device. Groups have no options.
        beta: ``"hager_zhang"``, ``"polak_ribiere"`` (and 0 where that is negative), ``"fletcher_reeves"``,
            ``"dai_yuan"`` or ``"hestenes_stiefel"``.
        preconditioner: ``"bfgs"``, the diagonal h; or None.
        line_search: its constants, a :class:`HagerZhang`.
        max_iter: iterations per :meth:`step`.
        max_eval: calls of the closure per :meth:`step`; None: as many as it takes.
        tolerance_grad: a step ends where the largest element of the gradient is at most this.
        tolerance_change: a step ends where an iteration changes the loss by at most this.

    Raises:
        TypeError, ValueError: for a wrong kind or value of any of these.

    Example::

        optimizer = fastnlcg.CGDescent(model.parameters())
        def closure():
            optimizer.zero_grad()
            loss = loss_function(model(inputs), targets)
            loss.backward()
            return loss
        for _ in range(1000):
            optimizer.step(closure)

    Source: Hager & Zhang, SIAM J. Optim. 16 (2005) 170, and 23 (2013) 2150; the diagonal: Adya et al.,
    arXiv:1812.02886, Algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        *,
        beta: Literal[
            "hager_zhang", "polak_ribiere", "fletcher_reeves", "dai_yuan", "hestenes_stiefel"
        ] = "hager_zhang",
        preconditioner: Literal["bfgs"] | None = "bfgs",
        line_search: HagerZhang | None = None,
        max_iter: int = 1,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 0.0,
    ) -> None:
        self._options = DescentOptions(beta, preconditioner, line_search or HagerZhang())
        self._max_iter = check_count("max_iter", max_iter)
        self._max_eval = None if max_eval is None else check_count("max_eval", max_eval)
        self._tolerance_grad = check_positive("tolerance_grad", tolerance_grad)
        self._tolerance_change = check_positive("tolerance_change", tolerance_change)
        self._reset()
        super().__init__(params, {})

    def _reset(self) -> None:
        """Drops everything that can be rebuilt from ``state`` and ``param_groups``."""
        self._table: _Table | None = None
        self._versions: list[int] | None = None
        self._stepping = False
        self._message = ""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch's optimizers do; the next step begins anew. Raises like the constructor."""
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                if p.requires_grad and p.dtype not in (torch.float32, torch.float64):
                    raise TypeError(
                        f"parameter {self._all().index(p)} has dtype {p.dtype}; expected torch.float32 or "
                        "torch.float64, unless it is frozen: a line search compares losses to their last digits"
                    )
        except BaseException:
            self.param_groups.pop()
            raise
        self.restart()

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    # ---- the step ------------------------------------------------------------------------------------------------

    @_disable_dynamo
    def step(  # type: ignore[override]  # a closure is needed
        self, closure: Callable[[], float | Tensor], *, loss: Callable[[], float | Tensor] | None = None
    ) -> float:
        """Takes ``max_iter`` iterations, or fewer where one of the limits ends them. Parameters are left at the best
        point; where no lower one is found, they are what they were, to the bit, and :meth:`diagnostics` says why.

        Args:
            closure: evaluates the loss and calls ``backward()``, after zeroing the gradients; called with gradients
                enabled. Returns the loss.
            loss: evaluates the loss alone, where that is cheaper. It is called once an iteration.

        Returns:
            The loss at the new parameters.

        Raises:
            TypeError, ValueError: for a closure that is none, or returns no loss; a parameter or gradient that cannot
            be
                stepped, named by index.
            RuntimeError: inside its own closure.

        Exceptions of the closure leave the parameters where the search began.
        """
        for name, function in (("closure", closure), ("loss", loss)):
            if not callable(function) and not (name == "loss" and function is None):
                raise TypeError(
                    f"{name} must be callable, got {type(function).__name__}: every step evaluates the loss"
                )
        if self._stepping:
            raise RuntimeError("step() inside its own closure, or in another thread")
        self._stepping = True
        try:
            value, warning = self._step(closure, loss)
        finally:
            self._stepping = False
        if warning:
            warnings.warn(warning, UserWarning, stacklevel=5)  # of step(), behind three wrappers of torch
        return value

    def _step(
        self, closure: Callable[[], float | Tensor], loss: Callable[[], float | Tensor] | None
    ) -> tuple[float, str]:
        course = self._course()
        budget = math.inf if self._max_eval is None else course.evaluations + self._max_eval

        def full() -> float:
            if course.evaluations >= budget:
                raise OutOfBudget
            with torch.enable_grad():
                value = _number("closure", closure())
            if self._table is None:
                self._table = _Table(self._all(), self.state, self._options)
            return value

        def loss_alone() -> float:
            assert loss is not None
            return _number("loss", loss())

        passes = _Passes(self)
        run = Descent(
            passes, full, None if loss is None else loss_alone, self._options, x_max=passes.x_max, course=course
        )
        seen = course.f
        try:
            if math.isnan(course.g_max) or self._edited():
                run.begin()
            elif course.iterations == 1:  # once: does the loss repeat?
                f = full()
                course.evaluations += 1
                run.compare(seen, f)
            self._message = ""
            for _ in range(self._max_iter):
                if course.g_max <= self._tolerance_grad:
                    self._message = "the largest element of the gradient is at most tolerance_grad"
                    break
                f = course.f
                self._message = run.iterate()
                if self._message:
                    break
                if abs(course.f - f) <= self._tolerance_change:
                    self._message = "the loss has changed by at most tolerance_change"
                    break
        except OutOfBudget:
            self._message = "max_eval is reached"
        finally:
            self.param_groups[0]["course"] = course.as_dict()
            if self._table is not None:
                self._versions = [p._version for p in self._table.params]
        return course.f, run.warning

    def _course(self) -> Course:
        """As the groups have it: loaded, or left by the last step."""
        kept = self.param_groups[0].get("course")
        return Course() if kept is None else Course(**kept)

    def _edited(self) -> bool:
        """Whether parameters were written since the last step, or others take part; a table then has to be made
        anew."""
        if self._table is None:  # after a load: the parameters are those of the file
            self._table = _Table(self._all(), self.state, self._options)
            return False
        params = self._all()
        if any(p.grad is not None and p.numel() for p in self._table.resting) or not self._table.covers(params):
            self._table = None
            return True
        return self._versions is not None and [p._version for p in self._table.params] != self._versions

    def restart(self) -> None:
        """Forgets the direction and the loss, and keeps h: the next step evaluates the closure, and begins along -P g.
        For a function that has changed."""
        kept = self.param_groups[0].get("course")
        if kept is not None:
            self.param_groups[0]["course"] = {
                **kept,
                "f": math.nan,
                "g_max": math.nan,
                "iterations": kept["iterations"],
            }
        self._table = None

    def diagnostics(self) -> dict[str, Any]:
        """What the last step has come to: ``loss``, ``gradient_max``, ``alpha``, ``beta``; ``iterations``,
        ``evaluations`` (calls of the closure) and ``loss_evaluations`` since the beginning; ``message``, why it ended
        early, or ""."""
        at = self._course()
        return {
            "loss": at.f,
            "gradient_max": at.g_max,
            "alpha": at.alpha,
            "beta": at.beta,
            "iterations": at.iterations,
            "evaluations": at.evaluations,
            "loss_evaluations": at.loss_evaluations,
            "message": self._message,
        }

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, as torch's optimizers do. A run that goes on from it, with the parameters of the same
        moment, has the bits of one that was not interrupted.

        Raises:
            ValueError: for one that is not of this optimizer over such parameters; it is unchanged then.
        """
        _check_state(state_dict, self._all(), self._options)
        super().load_state_dict(state_dict)
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_options", "_max_iter", "_max_eval", "_tolerance_grad", "_tolerance_change")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()


def _number(name: str, value: object) -> float:
    if value is None:
        raise TypeError(f"{name} must return the loss, got None")
    return _native.check_loss(value)


def _streams(options: DescentOptions) -> dict[str, float]:
    """The tensors of a parameter's state, and what they hold at first."""
    found = {"direction": 0.0, "grad_prev": 0.0, "origin": 0.0}
    return found if options.preconditioner is None else {**found, "hessian_diag": 1.0}


def _check_state(given: Mapping[str, Any], params: list[Tensor], options: DescentOptions) -> None:
    """ValueError for a state dict that does not fit."""
    if not isinstance(given, Mapping) or not isinstance(given.get("param_groups"), list) or "state" not in given:
        raise ValueError("expected a state dict with 'state' and 'param_groups'")
    course = given["param_groups"][0].get("course") if given["param_groups"] else None
    names = {one.name for one in fields(Course)}
    if course is not None and not (isinstance(course, Mapping) and set(course) == names):
        raise ValueError("param_groups[0]['course'] is not that of a CGDescent")
    for i, entry in given["state"].items():
        if not isinstance(i, int) or not 0 <= i < len(params):
            continue
        keys = set(_streams(options))
        if not isinstance(entry, Mapping) or not keys <= set(entry):
            raise ValueError(f"the state of parameter {i} lacks {sorted(keys - set(entry))}: another preconditioner?")
        for key in keys:
            if not isinstance(entry[key], Tensor) or entry[key].shape != params[i].shape:
                raise ValueError(
                    f"state {key!r} of parameter {i} is {tuple(getattr(entry[key], 'shape', ()))}, expected "
                    f"{tuple(params[i].shape)}"
                )


class _Table:
    """Which parameters take part, their state, and the native side over both."""

    def __init__(self, params: list[Tensor], state: dict[Any, Any], options: DescentOptions) -> None:
        active = [i for i, p in enumerate(params) if p.numel() and (p.grad is not None or state.get(p))]
        if not active:
            raise RuntimeError("no parameter has a gradient: the closure must call backward()")
        for i in active:
            p = params[i]
            if is_sharded(p):
                raise TypeError(f"parameter {i} is a DTensor: CGDescent does not step parameters spread over ranks")
            check_parameter(i, p)
            if p.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"parameter {i} has dtype {p.dtype}; expected torch.float32 or torch.float64")
        check_mixture(active, params)
        self.all, self.index, self.options, self.state = list(params), active, options, state
        self.params = [params[i] for i in active]
        self.resting = [p for i, p in enumerate(params) if i not in set(active)]
        for p in self.params:
            strides, entry = dense_strides(p), state.setdefault(p, {})
            for key, start in _streams(options).items():
                value = entry.get(key)
                if value is None or value.dtype != p.dtype or value.device != p.device or value.stride() != strides:
                    room = torch.empty_strided(p.shape, strides, dtype=p.dtype, device=p.device)
                    entry[key] = room.fill_(start) if value is None else room.copy_(value)
        self.entries = [state[p] for p in self.params]
        # Parameters with gaps in memory are stepped in copies.
        self.stepped = [
            p if is_dense(p) and not p.is_neg() else copy_in_order(p, dense_strides(p)) for p in self.params
        ]
        self.copies = [(p, here) for p, here in zip(self.params, self.stepped, strict=True) if p is not here]
        self.device = self.params[0].device
        self.on_gpu = _native.on_gpu(self.device)
        unit = _native.block_elements
        rows, offset = [], 0
        for i, p in zip(active, self.params, strict=True):
            rows.append((offset, 0, i, DTYPES[p.dtype], p.shape, dense_strides(p), (0, 0, 0)))
            offset += -(-p.numel() // unit) * unit
        diagonal = "" if options.preconditioner is None else "hessian_diag"
        self.passes = self._native(offset, rows, ["grad_prev", "direction", diagonal, ""])
        self.trial = self._native(offset, rows, ["origin", "direction", "", ""])
        scalars = groups.new_scalars().to(self.device)
        alpha = torch.zeros((), dtype=torch.float64, device=self.device)
        held = [x for p, entry in state.items() if not isinstance(p, str) for x in (p, entry)]
        fixed: Any = (self.entries, [], state, held, scalars, [alpha])
        self.at = _native.Tensors(self.stepped, None, *fixed)
        self._fixed = fixed

    def _native(self, n: int, rows: list[Any], keys: list[str]) -> _native.Step:
        dtype, workspace = DTYPES[self.params[0].dtype], None
        if self.on_gpu:
            stream = _native.current_stream(str(self.device))
            native = _native.Step(dtype, f"cuda:{self.device.index or 0}", stream)
            doubles = _native.workspace_doubles(n, len(rows), 1)
            workspace = _native.Buffer(torch.zeros(doubles, dtype=torch.float64, device=self.device))
        else:
            native = _native.Step(dtype)
        native.lay_out(n, rows, 1, keys, EXCHANGE, Tensor, workspace)
        return native

    def covers(self, params: list[Tensor]) -> bool:
        """Whether these are the parameters it was made of, with their state."""
        return _native.same_objects(params, self.all) and all(
            self.state.get(p) is entry for p, entry in zip(self.params, self.entries, strict=True)
        )

    def run(self, kind: str, **numbers: Any) -> list[float]:
        """One pass."""
        trial = kind == "trial"
        native = self.trial if trial else self.passes
        if self.on_gpu:
            native.stream = _native.current_stream(str(self.device))
        numbers["preconditioned"] = self.options.preconditioner is not None
        threads = _native.num_threads()
        sums = native.descend(self.at, kind, threads, **numbers) if trial or not self.copies else None
        if sums is None:
            at = self.at if trial else _native.Tensors(self.stepped, self._gradients(), *self._fixed)
            sums = native.descend(at, kind, threads, **numbers)
        if sums is None:
            raise RuntimeError("a parameter or a tensor of the state was replaced, moved or resized during a step")
        return sums

    def _gradients(self) -> list[Tensor]:
        """Where they are not all plain: in the memory order of the parameters; zeros for one that is None."""
        found = []
        for i, p in zip(self.index, self.params, strict=True):
            if p.grad is None:
                found.append(torch.zeros_like(p, memory_format=torch.preserve_format))
            else:
                found.append(usable_gradient(i, p, p.grad))
        return [copy_in_order(g, dense_strides(p)) if g.stride() != dense_strides(p) else g
                for g, p in zip(found, self.params, strict=True)]  # fmt: skip


class _Passes:
    """Of the optimizer's table, which a closure's first gradients make."""

    def __init__(self, owner: CGDescent) -> None:
        self.owner = owner

    @property
    def table(self) -> _Table:
        table = self.owner._table
        assert table is not None
        return table

    def trial(self, alpha: float, *, first: bool) -> None:
        table = self.table
        torch.autograd.graph.increment_version(table.params)
        with torch.no_grad():
            if first:
                for p, here in table.copies:
                    here.copy_(p)
            table.run("trial", alpha=alpha, first=first)
            for p, here in table.copies:
                p.copy_(here)

    def slope(self) -> tuple[float, float]:
        slope, largest, *_ = self.table.run("slope")
        return slope, largest

    def curvature(self, update: tuple[float, float, float, float] | None) -> Sums:
        alpha, scale, ys, shs = update or (0.0, 1.0, 0.0, 0.0)
        sums = self.table.run("curvature", update=update is not None, alpha=alpha, scale=scale, ys=ys, shs=shs)
        return Sums(*sums[:3])

    def direction(self, beta: float) -> tuple[float, float]:
        slope, dhd, *_ = self.table.run("direction", beta=beta)
        return slope, dhd

    def forget(self) -> None:
        for entry in self.table.entries:
            if "hessian_diag" in entry:
                entry["hessian_diag"].fill_(1.0)

    def x_max(self) -> float:
        with torch.no_grad():
            return max(float(p.abs().max()) for p in self.table.params)
