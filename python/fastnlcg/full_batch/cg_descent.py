"""The torch optimizer for full-batch problems: :class:`CGDescent`. A class of its own beside ``NLCG``: it calls its
closure as often as its line search needs, has no learning rate, and shares neither state nor options with the
stochastic step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable without importing the compiler

from fastnlcg import _native
from fastnlcg.full_batch.hager_zhang import HagerZhang
from fastnlcg.full_batch.iteration import (
    NOT_FOUND,
    RESOLUTION,
    RESOLUTION_FLOAT32,
    Course,
    Descent,
    DescentOptions,
    Edited,
    Mark,
    OutOfBudget,
    Sums,
    check_count,
    check_positive,
)
from fastnlcg.options import check_real
from fastnlcg.tensors import groups
from fastnlcg.tensors.checks import (
    DTYPES,
    check_mixture,
    check_parameter,
    copy_in_order,
    dense_strides,
    is_dense,
    usable_gradient,
)
from fastnlcg.tensors.dtensor import as_like, is_sharded, memory, shard_like
from fastnlcg.tensors.ranks import Ranks, check_group, device_of, find_ranks, world_size
from fastnlcg.tensors.table import DLPACK_API, places
from fastnlcg.warn import warn

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

    The function must not change within a step, and its value must repeat: no mini-batches, no dropout. If it changes
    between two steps on purpose (new collocation points), call :meth:`restart`. A step that is not told notices when
    its first evaluation does not fit the last loss, or when the last step found nothing; it then evaluates the closure
    at the parameters once more and starts from -P g, with a warning, once.

    Parameters may be written between steps, in any way: the next step sees that, and starts from -P g. A parameter
    whose gradient the closure leaves at None takes no part, and not a bit of it moves; it keeps its state, and takes
    part again when it has a gradient.

    Over ranks: DTensor parameters (FSDP2, HSDP, tensor parallel) need no option; the closure returns each rank's own
    loss, whose mean over ranks is minimized, and every rank takes the same decisions, to the bit. Every rank has to
    call the same steps, and to raise alike. One exchange of 104 bytes per rank and evaluation, and two per iteration.

    Args:
        params: parameters, named or not, or groups, of float32 or float64, on one device. Groups have no options.
        lr: for trainers, which pass one and read ``group["lr"]``. Nothing reads it here; a scheduler on it gets a
            warning.
        beta: ``"hager_zhang"``, ``"polak_ribiere"`` (and 0 where that is negative), ``"fletcher_reeves"``,
            ``"dai_yuan"`` or ``"hestenes_stiefel"``.
        preconditioner: ``"bfgs"``, the diagonal h; or None.
        line_search: its constants, a :class:`HagerZhang`.
        max_iter: iterations per :meth:`step`.
        max_eval: calls of the closure per :meth:`step`; None: as many as it takes.
        maximize: maximize the objective.
        tolerance_grad: a step ends where the largest element of the gradient is at most this.
        tolerance_change: a step ends where an iteration changes the loss by at most this.
        average_loss: True: minimize the mean of all ranks' losses, which data-parallel replicas (DDP averages their
            gradients) need; one exchange per evaluation. False: ranks have nothing to do with each other, or the
            closure returns the mean. None: as False, with a warning where there are other ranks.
        process_group: the ranks over which plain parameters are spread; their losses are averaged.

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
        lr: float | Tensor = 1.0,
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
        maximize: bool = False,
        average_loss: bool | None = None,
        process_group: Any = None,
    ) -> None:
        if not isinstance(average_loss, bool | None):
            raise TypeError(f"average_loss must be None or a bool, got {average_loss!r}")
        if not isinstance(maximize, bool):
            raise TypeError(f"maximize must be a bool, got {maximize!r}")
        if process_group is not None:
            check_group(process_group)
        self._maximize, self._average_loss, self._process_group = maximize, average_loss, process_group
        self._options = DescentOptions(beta, preconditioner, line_search or HagerZhang())
        self._max_iter = check_count("max_iter", max_iter)
        self._max_eval = None if max_eval is None else check_count("max_eval", max_eval)
        self._tolerance_grad = check_positive("tolerance_grad", tolerance_grad)
        self._tolerance_change = check_positive("tolerance_change", tolerance_change)
        self._lrs: list[float] = []
        self._reset()
        super().__init__(params, {"lr": check_real("lr", lr, minimum=0.0)})

    def _reset(self) -> None:
        """Drops everything that can be rebuilt from ``state`` and ``param_groups``."""
        self._table: _Table | None = None
        self._warned = self._warned_of_lr = False
        self._advice: list[str] = []
        self._stepping = False
        self._lrs = [group.setdefault("lr", 1.0) for group in self.__dict__.get("param_groups", ())]
        self._message = ""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch's optimizers do; the next step begins anew. Raises like the constructor."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group["lr"] = check_real("lr", group["lr"], minimum=0.0)
            for p in group["params"]:
                if p.requires_grad and p.dtype not in (torch.float32, torch.float64):
                    raise TypeError(
                        f"parameter {self._all().index(p)} has dtype {p.dtype}; expected torch.float32 or "
                        "torch.float64, unless it is frozen: a line search compares losses to their last digits"
                    )
        except BaseException:
            self.param_groups.pop()
            raise
        self._lrs.append(group["lr"])
        self.restart()

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    # ---- the step ------------------------------------------------------------------------------------------------

    @_disable_dynamo
    def step(  # type: ignore[override]  # a closure is needed
        self, closure: Callable[[], float | Tensor], *, loss: Callable[[], float | Tensor] | None = None
    ) -> float | Tensor:
        """Takes ``max_iter`` iterations, or fewer if one of the limits ends them. Parameters are left at the lowest
        point that was evaluated; if no lower one is found, they are what they were, to the bit, and
        :meth:`diagnostics` says why. A step after one that found nothing, or that met ``tolerance_grad``, costs one
        evaluation, unless that shows that something has changed.

        Args:
            closure: evaluates the loss and calls ``backward()``, after zeroing the gradients; called with gradients
                enabled, also under ``no_grad`` and ``inference_mode``. Returns the loss.
            loss: evaluates the loss alone, if that is cheaper. It is called once an iteration.

        Returns:
            The loss at the parameters before the step, as ``torch.optim.LBFGS`` does: a tensor if the closure returns
            one, else a float. The loss after the step is ``diagnostics()["loss"]``.

        Raises:
            TypeError, ValueError: for a closure that is none, or returns no loss; a parameter or gradient that cannot
                be stepped, named by index.
            RuntimeError: inside its own closure.

        Exceptions of the closure leave the parameters where the search began.
        """
        if closure is None and self._makes_state_only():
            return math.nan
        for name, function in (("closure", closure), ("loss", loss)):
            if not callable(function) and not (name == "loss" and function is None):
                raise TypeError(
                    f"{name} must be callable, got {type(function).__name__}: every step evaluates the loss"
                )
        if self._stepping:
            raise RuntimeError("step() inside its own closure, or in another thread")
        self._stepping = True
        try:
            with torch.inference_mode(False):
                value = self._step(closure, loss)
        finally:
            self._stepping = False
        self._look_at_lr()
        while self._advice:
            warn(self._advice.pop())
        return value

    def _step(self, closure: Callable[[], float | Tensor], loss: Callable[[], float | Tensor] | None) -> float | Tensor:
        course = self._course()
        budget = math.inf if self._max_eval is None else course.evaluations + self._max_eval
        sign = -1.0 if self._maximize else 1.0
        returned: float | Tensor = 0.0
        set_is_known = False

        def full(start: bool) -> float:
            nonlocal returned, set_is_known
            if course.evaluations >= budget:
                raise OutOfBudget
            with torch.enable_grad():
                returned = closure()
            value = sign * _number("closure", returned)
            changed = self._table is None or self._table.set_has_changed()
            if changed and (start or self._table is None):
                self._table = self._new_table()
            elif changed and not set_is_known:
                course.evaluations += 1
                raise Edited
            # A later gradient of None is that of a branch not taken at a trial point: zeros.
            set_is_known = True
            return value

        def loss_alone() -> float:
            assert loss is not None
            return passes.mean(sign * _number("loss", loss()))

        usable = self._table is not None and self._table.covers(self._all())
        if not usable and not math.isnan(course.g_max):  # loaded, copied, or with other tensors of state
            self._table = self._new_table(course.active)
        passes = _Passes(self, course)
        run = Descent(
            passes,
            full,
            None if loss is None else loss_alone,
            self._options,
            x_max=passes.x_max,
            course=course,
            resolution=RESOLUTION if self._dtype() == torch.float64 else RESOLUTION_FLOAT32,
            trusted=self._max_eval is not None and self._max_eval < 3,  # too few to look at one point twice
            sign=sign,
        )
        try:
            self._message = self._iterate(run)
        except OutOfBudget:
            self._message = "max_eval is reached"
        except _native.RanksDisagree:
            assert self._table is not None
            assert self._table.ranks is not None
            self._table.ranks.explain("step()", course.evaluations, self._named(), [])
        finally:
            if self._table is not None:
                course.active = self._table.members
            self.param_groups[0]["course"] = course.as_dict()
        if run.warning:
            self._advice.append(run.warning)
        before = sign * run.f_before
        return torch.full_like(returned, before, requires_grad=False) if isinstance(returned, Tensor) else before

    def _iterate(self, run: Descent) -> str:
        """Takes the iterations of a step; why they ended early, or ""."""
        course = run.course
        if math.isnan(course.g_max):
            run.begin()
        elif course.stuck:
            if not run.look():
                return self._message or NOT_FOUND
        elif course.g_max <= self._tolerance_grad or (course.iterations and not course.repeats):
            run.look()
        for _ in range(self._max_iter):
            if course.g_max <= self._tolerance_grad:
                return "the largest element of the gradient is at most tolerance_grad"
            f = course.f
            if message := run.iterate():
                return message
            if abs(course.f - f) <= self._tolerance_change:
                return "the loss has changed by at most tolerance_change"
        return ""

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self._all() if p.requires_grad), torch.float32)

    def _look_at_lr(self) -> None:
        """A scheduler has written ``initial_lr`` or another ``lr`` into the groups: a warning, once."""
        scheduled = any(
            "initial_lr" in group or group.get("lr", lr) != lr
            for group, lr in zip(self.param_groups, self._lrs, strict=True)
        )
        if scheduled and not self._warned_of_lr:
            self._warned_of_lr = True
            self._advice.append(
                "a scheduler, or another writer, sets the lr of CGDescent's groups, which nothing reads: its line "
                "search finds the step lengths"
            )

    def _makes_state_only(self) -> bool:
        """torch.distributed.checkpoint makes the state it loads into by ``step(None)`` on gradients of zero."""
        gradients = [p.grad for p in self._all() if p.grad is not None]
        if self.state or not gradients or any(memory(g).any() for g in gradients):
            return False
        self._table = self._new_table()
        self.param_groups[0]["course"] = self._course().as_dict()
        return True

    def _named(self) -> dict[str, Any]:
        """What has to be the same on all ranks."""
        limits = ("max_iter", "max_eval", "tolerance_grad", "tolerance_change")
        named = {name: getattr(self, f"_{name}") for name in limits}
        return {**vars(self._options), **named, "maximize": self._maximize}

    def _new_table(self, members: list[int] | None = None) -> _Table:
        """Over these parameters; None: those with a gradient."""
        params = self._all()
        ranks = find_ranks(params, self._process_group, self._average_loss, line_search=True)
        if ranks is None and self._average_loss is None and world_size() > 1 and not self._warned:
            self._warned = True
            self._advice.append(
                "the line search sees this rank's loss alone, and torch.distributed has more ranks: pass "
                "average_loss=True, which data-parallel replicas need, or False where this is meant"
            )
        return _Table(params, members, self.state, self._options, ranks, repr(self._named()), self._maximize)

    def _course(self) -> Course:
        """As the groups have it: loaded, or left by the last step."""
        kept = self.param_groups[0].get("course")
        return Course() if kept is None else Course(**kept)

    def restart(self) -> None:
        """Forgets the direction and the loss, and keeps h: the next step evaluates the closure, and begins along -P g.
        For a function that has changed."""
        kept = self.param_groups[0].get("course")
        if kept is not None:
            self.param_groups[0]["course"] = {**kept, "f": math.nan, "g_max": math.nan}
        self._table = None

    def diagnostics(self) -> dict[str, Any]:
        """What the last step has come to: ``loss``, ``gradient_max``, ``alpha``, ``beta``; ``iterations``,
        ``evaluations`` (calls of the closure) and ``loss_evaluations`` since the beginning; ``message``, why it ended
        early, or ""."""
        at = self._course()
        return {
            "loss": -at.f if self._maximize else at.f,
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
        if self._process_group is not None:
            raise TypeError("an optimizer with process_group= cannot be pickled or copied; use its state_dict()")
        own = (
            *("_options", "_max_iter", "_max_eval", "_tolerance_grad", "_tolerance_change"),
            *("_maximize", "_average_loss"),
        )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_process_group", None)
        self.__dict__.setdefault("_maximize", False)
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
    if course is not None and not all(isinstance(i, int) and 0 <= i < len(params) for i in course["active"]):
        raise ValueError(f"param_groups[0]['course']['active'] is {course['active']!r}, of {len(params)} parameters")
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


def _make_state(p: Tensor, entry: dict[str, Any], options: DescentOptions) -> None:
    """What is missing in a parameter's state, or has to be another tensor: made, or converted."""
    here = memory(p)
    strides = dense_strides(here)
    for key, start in _streams(options).items():
        value = entry.get(key)
        held = None if value is None else shard_like(value, p)
        if (
            value is None
            or held is None
            or held is not memory(value)
            or is_sharded(value) != is_sharded(p)
            or (held.dtype, held.device, held.stride()) != (here.dtype, here.device, strides)
        ):
            room = torch.empty_strided(here.shape, strides, dtype=here.dtype, device=here.device)
            entry[key] = as_like(room.fill_(start) if held is None else room.copy_(held), p)


class _Table:
    """Which parameters take part, their state, and the native side over both. ``everything``: what has to be the same
    on all ranks, in words."""

    def __init__(
        self,
        params: list[Tensor],
        members: list[int] | None,
        state: dict[Any, Any],
        options: DescentOptions,
        ranks: Ranks | None,
        everything: str,
        maximize: bool,
    ) -> None:
        with_gradient = _with_gradient(params) if members is None else list(members)
        if not with_gradient and ranks is None:
            raise RuntimeError("no parameter has a gradient: the closure must call backward()")
        for i in with_gradient:
            check_parameter(i, params[i])
            if params[i].dtype not in (torch.float32, torch.float64):
                raise TypeError(f"parameter {i} has dtype {params[i].dtype}; expected torch.float32 or torch.float64")
        check_mixture(with_gradient, params)
        self.members, self.maximize = list(with_gradient), maximize
        self.mark: Mark | None = None  # of this rank's elements; None after a load
        unowned = frozenset() if ranks is None else ranks.unowned
        with_gradient.sort(key=lambda i: i in unowned)
        self.all, self.options, self.state, self.ranks = list(params), options, state, ranks
        self.params = [params[i] for i in with_gradient]
        for p in self.params:
            _make_state(p, state.setdefault(p, {}), options)
        self.entries = [state[p] for p in self.params]
        offsets, owned, n = places(params, with_gradient, unowned)
        placed = [
            (i, offset)
            for i, offset in zip(with_gradient, offsets, strict=True)
            if memory(params[i]).numel()  # a shard may have none
        ]
        self.index = [i for i, _ in placed]
        # Parameters with gaps in memory are stepped in copies.
        here = [memory(params[i]) for i in self.index]
        self.stepped = [p if is_dense(p) and not p.is_neg() else copy_in_order(p, dense_strides(p)) for p in here]
        self.copies = [(p, stepped) for p, stepped in zip(here, self.stepped, strict=True) if p is not stepped]
        self.plain = all(params[i] is stepped for i, stepped in zip(self.index, self.stepped, strict=True))
        first = memory(params[with_gradient[0]]) if with_gradient else None
        self.dtype = DTYPES[torch.float32 if first is None else first.dtype]
        self.device = first.device if first is not None else device_of(ranks, params, torch.device("cpu"))
        self.on_gpu = _native.on_gpu(self.device)
        rows = [
            _native.SegmentSpec(
                offset=offset, group=0, index=i, dtype=self.dtype, shape=p.shape, strides=dense_strides(p)
            )
            for (i, offset), p in zip(placed, here, strict=True)
        ]
        self.native = self._make_native(n, rows)
        if ranks is not None:
            ranks.connect(self.native, owned, self.device)
        self.everything, self.alpha = everything, math.nan
        scalars = groups.new_scalars().to(self.device)
        alpha = torch.zeros((), dtype=torch.float64, device=self.device)
        held = [x for p, entry in state.items() if not isinstance(p, str) for x in (p, entry)]
        local = [state[params[i]] for i in self.index]
        if not self.plain:
            local = [
                {key: memory(value) for key, value in entry.items() if isinstance(value, Tensor)} for entry in local
            ]
        self._fixed: Any = {
            "params": self.stepped,
            "entries": local,
            "state": state,
            "expected_state": held,
            "scalars": scalars,
            "alpha_prev": [alpha],
        }
        self.at = _native.Tensors(**self._fixed)

    def _make_native(self, n: int, segments: list[_native.SegmentSpec]) -> _native.TensorTable:
        dtype, workspace = self.dtype, None
        diagonal = None if self.options.preconditioner is None else "hessian_diag"
        keys = _native.StateKeys(grad_prev="grad_prev", direction="direction", diagonal=diagonal, origin="origin")
        if self.on_gpu:
            stream = _native.current_stream(str(self.device))
            native = _native.TensorTable(dtype, f"cuda:{self.device.index or 0}", stream)
            doubles = _native.workspace_doubles(n, len(segments), 1)
            workspace = _native.Buffer(torch.zeros(doubles, dtype=torch.float64, device=self.device))
        else:
            native = _native.TensorTable(dtype)
        native.lay_out(n, segments, 1, keys, DLPACK_API, Tensor, workspace)
        return native

    def covers(self, params: list[Tensor]) -> bool:
        """Whether these are the parameters it was made of, with their state."""
        return _native.same_objects(params, self.all) and all(
            self.state.get(p) is entry for p, entry in zip(self.params, self.entries, strict=True)
        )

    def set_has_changed(self) -> bool:
        """Whether other parameters have a gradient than those that take part."""
        return _with_gradient(self.all) != self.members

    def run(self, kind: str, **numbers: Any) -> list[float]:
        """One pass."""
        trial = kind == "trial"
        if self.on_gpu:
            self.native.stream = _native.current_stream(str(self.device))
        preconditioned = self.options.preconditioner is not None
        pass_ = _native.DescentPass(kind, preconditioned=preconditioned, maximize=self.maximize, **numbers)
        threads = _native.num_threads()
        sums = self.native.descend(self.at, pass_, threads) if trial or self.plain else None
        if sums is None:
            at = self.at if trial else _native.Tensors(gradients=self._gradients(), **self._fixed)
            sums = self.native.descend(at, pass_, threads)
        if sums is None:
            raise RuntimeError("a parameter or a tensor of the state was replaced, moved or resized during a step")
        return sums

    def total(self, sums: list[float], step: int) -> list[float]:
        """These sums over all ranks."""
        if self.ranks is None or not self.ranks.every_decision:
            return sums
        return self.ranks.total(self.exchange(sums, step))

    def exchange(self, values: list[float], step: int) -> list[list[float]]:
        """Everybody's values, by rank. All must have come from the same length of the same trial."""
        assert self.ranks is not None
        digest = hashlib.blake2b(f"{self.everything} {self.alpha!r}".encode(), digest_size=6).digest()
        return self.ranks.exchange(values, float(step), "full_batch", float(int.from_bytes(digest, "little")))

    def _gradients(self) -> list[Tensor]:
        """Where they are not all plain: in the memory order of the parameters; zeros for one that is None."""
        found = []
        for i, stepped in zip(self.index, self.stepped, strict=True):
            p = self.all[i]
            if p.grad is None:
                found.append(
                    torch.empty_strided(stepped.shape, stepped.stride(), dtype=p.dtype, device=p.device).zero_()
                )
            else:
                g = usable_gradient(i, p, p.grad)
                found.append(g if g.stride() == stepped.stride() else copy_in_order(g, stepped.stride()))
        return found


def _with_gradient(params: list[Tensor]) -> list[int]:
    return [i for i, p in enumerate(params) if p.grad is not None and p.numel()]


def _same(a: float, b: float, rtol: float) -> bool:
    return abs(a - b) <= rtol * abs(b) or (math.isnan(a) and math.isnan(b)) or a == b


class _Passes:
    """Of the optimizer's table, which a closure's first gradients make."""

    def __init__(self, owner: CGDescent, course: Course) -> None:
        self.owner, self.course = owner, course
        self.edited, self.unchecked = False, 0.0

    @property
    def table(self) -> _Table:
        table = self.owner._table
        assert table is not None
        return table

    def _over_ranks(self, values: list[float]) -> list[list[float]]:
        """Everybody's values, by rank. Edited if x was edited on one of them."""
        ranks = self.table.ranks
        assert ranks is not None
        rows = self.table.exchange([*values, self.unchecked, float(self.edited)], self.course.evaluations)
        edited = any(row[-1] for row in rows)
        edited = edited or (self.unchecked > 0.0 and self._is_another(ranks.total(rows)[-2]))
        self.edited, self.unchecked = False, 0.0
        if edited:
            raise Edited
        return rows

    def _is_another(self, xx: float) -> bool:
        """After a load: whether x is not that of the file, up to the order in which its devices and ranks add up."""
        return not _same(xx, self.course.mark[1], 1e-9)

    def mean(self, f: float) -> float:
        """The loss alone, over ranks."""
        if self.table.ranks is None:
            return f
        return _mean(row[0] for row in self._over_ranks([f]))

    def trial(self, alpha: float, *, first: Mark | None) -> None:
        table = self.table
        table.alpha = alpha
        torch.autograd.graph.increment_version(table.params)
        with torch.no_grad():
            if first is not None:
                for p, here in table.copies:
                    here.copy_(p)
            xd, xx, *_ = table.run("trial", alpha=alpha, first=first is not None)
            for p, here in table.copies:
                p.copy_(here)
        if first is None:
            return
        if table.mark is not None:
            self.edited = not (_same(xd, table.mark[0], 0.0) and _same(xx, table.mark[1], 0.0))
        elif table.ranks is None:
            self.edited = self._is_another(xx)
        else:
            self.unchecked = xx
        if self.edited and table.ranks is None:
            self.edited = False
            raise Edited

    def slope(self, f: float) -> tuple[float, float, float]:
        slope, largest, *_ = self.table.run("slope")
        ranks = self.table.ranks
        if ranks is None:
            return f, slope, largest
        rows = self._over_ranks([f, slope, largest])
        return _mean(row[0] for row in rows), ranks.total(rows)[1], max(row[2] for row in rows)

    def curvature(self, update: tuple[float, float, float, float] | None) -> Sums:
        alpha, scale, ys, shs = update or (0.0, 1.0, 0.0, 0.0)
        numbers = {"alpha": alpha, "scale": scale, "ys": ys, "shs": shs}
        sums = self.table.run("curvature", update=update is not None, **numbers)
        return Sums(*self.table.total(sums[:3], self.course.evaluations))

    def direction(self, beta: float) -> tuple[float, float, Mark]:
        sums = self.table.run("direction", beta=beta)[:4]
        self.table.mark = sums[2], sums[3]
        slope, dhd, xd, xx = self.table.total(sums, self.course.evaluations)
        return slope, dhd, (xd, xx)

    def forget(self) -> None:
        for entry in self.table.entries:
            if "hessian_diag" in entry:
                entry["hessian_diag"].fill_(1.0)

    def x_max(self) -> float:
        with torch.no_grad():
            largest = max((float(p.abs().max()) for p in self.table.stepped), default=0.0)
        if self.table.ranks is None:
            return largest
        return max(row[0] for row in self._over_ranks([largest]))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
