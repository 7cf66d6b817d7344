"""The torch optimizer for full-batch problems: :class:`CGDescent`. A class of its own, next to ``NLCG``: it calls its
closure as often as its line search needs, has no learning rate, and shares neither state nor options with the
stochastic step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable without importing the compiler

from fastnlcg import _native
from fastnlcg.full_batch.descent_table import DescentTable, TablePasses, state_arrays
from fastnlcg.full_batch.hager_zhang import HagerZhang
from fastnlcg.full_batch.iteration import (
    NOT_FOUND,
    RESOLUTION,
    RESOLUTION_FLOAT32,
    Course,
    Descent,
    DescentOptions,
    OutOfBudget,
)
from fastnlcg.full_batch.passes import Edited
from fastnlcg.full_batch.vector_table import VectorPasses, VectorTable, basis_keys, keep_bases, leave_bases
from fastnlcg.losses import unaveraged_loss
from fastnlcg.options import check_count, check_positive, check_real
from fastnlcg.tensors.dtensor import memory
from fastnlcg.tensors.ranks import check_group, find_ranks, world_size
from fastnlcg.tensors.state_dict import named, structure
from fastnlcg.tensors.table import parameters
from fastnlcg.warn import warn

__all__ = ["CGDescent"]

BASES = "bases"
"""the key, in a saved course, of :func:`basis_keys`"""


class CGDescent(torch.optim.Optimizer):
    r"""Minimizes a full-batch loss without a learning rate, as a replacement for
    ``torch.optim.LBFGS(line_search_fn="strong_wolfe")``. It is L-BFGS, or nonlinear conjugate gradients if ``history``
    is 0, with the line search of Hager and Zhang. The initial matrix of L-BFGS is a diagonal that BFGS updates, in a
    rotated basis of each weight matrix.

    One iteration, with P = 1/h; all sums run over all parameters of all groups::

        p     = p + alpha d                        alpha satisfies the (approximate) Wolfe conditions
        y     = g - g_prev,  s = alpha d
        h     = L h + y^2 / sum(y s) - (L h s)^2 / sum(s L h s)
        d     = -H g,  H by L-BFGS from the last ``history`` pairs (s, y) and gamma P, gamma = sum(y s) / sum(y P y)

    and without pairs::

        beta  = max((sum(y P g) - 2 sum(y P y) sum(d g) / sum(d y)) / sum(d y), 0.4 sum(d g_prev) / sum(d h d))
        d     = beta d - P g

    With ``preconditioner="kronecker"`` all of this is in a basis in which each weight matrix W (a x b, with its bias as
    the last column) is QL^T W QR: QL and QR are the eigenvectors of running means (0.95) of Y DR Y^T / sum(y s) and
    Y^T DL Y / sum(y s), taken again with every tenth pair; DL and DR weight the eigenvectors of the other side by the
    inverse of their eigenvalues. Matrices are parameters of two dimensions, convolutions as out x (in k k), and stacks
    of matrices (three dimensions, if the sides are within a factor of 4 of each other); a bias is the vector behind a
    matrix. A side longer than 512 is not rotated, nor is a matrix whose elements are not row-major in memory, or that
    is sharded over ranks.

    h begins at a thousandth of the first curvature. L is 1, and lowers h if it has overstated the curvature along d
    tenfold in the median of the last eleven iterations. When bases change, h is at least 1e-18 of the largest of its
    matrix. If the identity has predicted the pairs better than P, gamma times the identity takes the place of gamma P.
    With pairs the first length of a search is 1, or less if a step of 1 at half the initial slope would lower f by more
    than the last iteration did; without, it comes from a parabola through a tenth of the last length, which takes one
    more evaluation.

    State is 4 + 2 ``history`` tensors per parameter in its dtype (one more if the optimizer rotates any matrix), and
    2 (a^2 + b^2) elements for each rotated matrix, made at the first step. Without pairs and rotations it is 16 bytes
    per float32 parameter.

    The loss must be deterministic, and must not change within a step: no mini-batches, no dropout. If it changes
    between two steps on purpose (new collocation points), call :meth:`restart`. If you do not, a step detects the
    change when its first evaluation does not fit the last loss, or when the last step found nothing; it then evaluates
    the closure at the parameters once more and starts from -P g, with a warning, once. If ``max_eval`` is 1 or 2, the
    next step does so.

    Parameters may be written, converted or moved between steps, in any way, and groups edited: the next step sees that,
    and starts from -P g. If state is missing, it starts with h = 1 too. A parameter that is frozen, or whose gradient
    the closure leaves at None, takes no part, and not a bit of it moves; it keeps its state, and takes part again when
    it has a gradient.

    Over ranks: DTensor parameters (FSDP2, HSDP, tensor parallel) need no option; the closure returns each rank's own
    loss, whose mean over ranks is minimized, and every rank takes the same decisions, to the bit. All ranks have to
    call the same steps; if a closure raises on one rank, it has to raise on all. Each evaluation takes one exchange of
    104 bytes per rank; with shards each iteration takes nine more with ten pairs, or two more without pairs.

    Args:
        params: parameters, named or not, or groups, of float32 or float64, on one device. Groups have no options.
        lr: for trainers, which pass one and read ``group["lr"]``. Nothing reads it here; a scheduler on it gets a
            warning.
        beta: of runs without pairs: ``"hager_zhang"``, ``"polak_ribiere"`` (or 0 if that is negative),
            ``"fletcher_reeves"``, ``"dai_yuan"`` or ``"hestenes_stiefel"``.
        history: the number of pairs, 0 to 32; 0: conjugate gradients.
        preconditioner: ``"kronecker"``, the diagonal h in rotated bases; ``"bfgs"``, h without rotations; or None.
        line_search: its constants, a :class:`HagerZhang`.
        max_iter: iterations per :meth:`step`.
        max_eval: calls of the closure per :meth:`step`; None: as many as it takes.
        maximize: maximize the objective.
        tolerance_grad: a step ends when the largest element of the gradient is at most this.
        tolerance_change: a step ends when an iteration changes the loss by at most this.
        average_loss: True: minimize the mean of all ranks' losses, which data-parallel replicas (DDP averages their
            gradients) need; one exchange per evaluation. False: ranks have nothing to do with each other, or the
            closure returns the mean. None: as False, with a warning if there are other ranks.
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

    Source: Hager & Zhang, SIAM J. Optim. 16 (2005) 170, and 23 (2013) 2150; the pairs: Nocedal, Math. Comp. 35 (1980)
    773; the first length: Nocedal & Wright, Numerical Optimization (2006), section 3.5; the diagonal: Adya et al.,
    arXiv:1812.02886, Algorithm 2. The rotated diagonal is this library's; the bases are those of Shampoo and SOAP
    (arXiv:1802.09568, 2409.11321), weighted as in KL-Shampoo (2509.03378), there from gradients.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1.0,
        *,
        beta: Literal[
            "hager_zhang", "polak_ribiere", "fletcher_reeves", "dai_yuan", "hestenes_stiefel"
        ] = "hager_zhang",
        history: int = 10,
        preconditioner: Literal["kronecker", "bfgs"] | None = "kronecker",
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
            check_group("process_group", process_group)
        self._maximize, self._average_loss, self._process_group = maximize, average_loss, process_group
        self._options = DescentOptions(beta, preconditioner, line_search or HagerZhang(), history)
        self._max_iter = check_count("max_iter", max_iter)
        self._max_eval = None if max_eval is None else check_count("max_eval", max_eval)
        self._tolerance_grad = check_positive("tolerance_grad", tolerance_grad)
        self._tolerance_change = check_positive("tolerance_change", tolerance_change)
        self._lrs: dict[int, float] = {}
        self._reset()
        super().__init__(params, {"lr": check_real("lr", lr, minimum=0.0)})

    def _reset(self) -> None:
        """Drops everything that can be rebuilt from ``state`` and ``param_groups``."""
        self._table: DescentTable | None = None
        self._warned = self._warned_of_lr = False
        self._advice: list[str] = []
        self._stepping = False
        self._lrs = {id(group): group.setdefault("lr", 1.0) for group in self.__dict__.get("param_groups", ())}
        self._message = ""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch's optimizers do; the next step starts again from -P g. Raises like the constructor."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group["lr"] = check_real("lr", group["lr"], minimum=0.0)
            first = len(self._all()) - len(group["params"])
            for index, p in enumerate(group["params"], first):
                if p.requires_grad and p.dtype not in (torch.float32, torch.float64):
                    raise TypeError(
                        f"parameter {index} has dtype {p.dtype}; expected torch.float32 or "
                        "torch.float64, unless it is frozen: a line search compares losses to their last digits"
                    )
        except BaseException:
            self.param_groups.pop()
            raise
        self._lrs[id(group)] = group["lr"]
        self.restart()

    def _all(self) -> list[Tensor]:
        return parameters(self.param_groups)

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
            loss: evaluates the loss alone, if that is cheaper. It is called once an iteration without pairs, and never
                with pairs.

        Returns:
            The loss at the parameters before the step, as ``torch.optim.LBFGS`` does: a tensor if the closure returns
            one, else a float. The loss after the step is ``diagnostics()["loss"]``.

        Raises:
            TypeError, ValueError: for a closure that is not callable, or does not return a loss; a parameter or
                gradient that cannot be stepped, named by index.
            RuntimeError: inside its own closure.

        If the closure raises, the parameters are those with which the search began.
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
        try:
            self._stepping = True
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
            value = sign * _as_loss("closure", returned)
            changed = self._table is None or self._table.set_has_changed()
            if changed and (start or self._table is None):
                self._table = self._new_table(course)
            elif changed and not set_is_known:
                course.evaluations += 1
                raise Edited
            # A later gradient of None is that of a branch not taken at a trial point: zeros.
            set_is_known = True
            return value

        def loss_alone() -> float:
            assert loss is not None
            return passes.mean(sign * _as_loss("loss", loss()))

        params = self._all()
        edited = self._table is not None and not self._table.is_of(params)  # groups, or the kind of a parameter
        if self._table is None or edited or not self._table.has_state(self.state):
            self._table = None
            if edited or any(i >= len(params) for i in course.active):
                course.f = course.g_max = math.nan
            if leave_bases(self.state, self._options):  # of other options: h, d and the pairs say nothing in these
                course.f = course.g_max = math.nan
                course.forget()
            if not math.isnan(course.g_max):
                self._table = self._new_table(course, course.active)
        kind = VectorPasses if self._options.in_vectors else TablePasses
        passes = kind(lambda: self._table, course)
        run = Descent(
            passes,
            full,
            None if loss is None else loss_alone,
            self._options,
            x_max=passes.x_max,
            course=course,
            resolution=RESOLUTION if self._dtype() == torch.float64 else RESOLUTION_FLOAT32,
            trusted=False,
            defers=self._max_eval is not None and self._max_eval < 3,
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
            self._keep(course)
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
        elif course.suspect or course.g_max <= self._tolerance_grad or (course.iterations and not course.repeats):
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
        lrs = {id(group): group.get("lr", 1.0) for group in self.param_groups}
        self._lrs = {key: self._lrs.get(key, lr) for key, lr in lrs.items()}  # groups may come and go
        scheduled = self._lrs != lrs or any("initial_lr" in group for group in self.param_groups)
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
        course = self._course()
        self._table = self._new_table(course)
        self._keep(course)
        return True

    def _named(self) -> dict[str, Any]:
        """What has to be the same on all ranks."""
        limits = ("max_iter", "max_eval", "tolerance_grad", "tolerance_change")
        named = {name: getattr(self, f"_{name}") for name in limits}
        return {**vars(self._options), **named, "maximize": self._maximize}

    def _new_table(self, course: Course, members: list[int] | None = None) -> DescentTable:
        """Over these parameters, with what their state has for ``course``; None: those with a gradient."""
        params = self._all()
        ranks = find_ranks(params, self._process_group, self._average_loss, line_search=True)
        if ranks is None and self._average_loss is None and world_size() > 1 and not self._warned:
            self._warned = True
            self._advice.append(unaveraged_loss())
        agreed = repr(self._named())
        kind = VectorTable if self._options.in_vectors else DescentTable
        table = kind(
            params,
            members,
            self.state,
            self._options,
            ranks,
            agreed=agreed,
            maximize=self._maximize,
            plain_shards=self._process_group is not None,
        )
        table.fit(course)
        return table

    def _course(self) -> Course:
        """As the groups have it: loaded, or left by the last step, in the first group unless groups were moved."""
        kept = _course_of(self.param_groups)
        return Course() if kept is None else Course(**kept)

    def _keep(self, course: Course) -> None:
        for group in self.param_groups[1:]:
            group.pop("course", None)
        self.param_groups[0]["course"] = course.as_dict()

    def restart(self) -> None:
        """Tells the optimizer that the function has changed. It forgets the direction, the pairs and the loss, and
        keeps h: the next step evaluates the closure, and begins along -P g."""
        course = self._course()
        course.f = course.g_max = math.nan
        if course.evaluations:
            self._keep(course)
        self._table = None

    def diagnostics(self) -> dict[str, Any]:
        """The outcome of the last step: ``loss``, ``gradient_max``, ``alpha``, ``beta``; ``iterations``,
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

    def state_dict(self) -> dict[str, Any]:
        """As torch's optimizers. The numbers of the run, which differ in count from step to step, are one string:
        torch.distributed.checkpoint would take lists and mappings apart, and match their parts to those of the
        reader."""

        def as_text(_: torch.optim.Optimizer, whole: dict[str, Any]) -> None:
            for group in whole["param_groups"]:  # torch's copies
                if "course" in group:
                    group["course"] = json.dumps({**group["course"], BASES: basis_keys(self._all(), self.state)})

        handle = self.register_state_dict_post_hook(as_text, prepend=True)  # the user's own see the result
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a copy of a state dict. A run that continues from it, with the parameters of the same moment, has the
        bits of one that was not interrupted.

        Raises:
            ValueError: for one that is not of this optimizer over such parameters; it is unchanged then.
        """

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            return _checked(given, self.param_groups, self._options)

        def own(_: torch.optim.Optimizer) -> None:
            for entry in self.state.values():  # torch takes the file's own tensors if they fit
                if isinstance(entry, dict):
                    entry.update({key: value.clone() for key, value in entry.items() if isinstance(value, Tensor)})

        # The last of the pre-hooks and the first of the post-hooks: the user's own see what is given, and what results.
        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(own, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
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


def _course_of(groups: Iterable[Mapping[str, Any]]) -> Any:
    return next((group["course"] for group in groups if "course" in group), None)


def _as_loss(name: str, value: object) -> float:
    if value is None:
        raise TypeError(f"{name} must return the loss, got None")
    return _native.check_loss(value)


def _checked(given: Mapping[str, Any], own: list[dict[str, Any]], options: DescentOptions) -> dict[str, Any]:
    """``given`` in the form in which it will be loaded. ValueError, by number, name and shape of the parameters, unless
    it fits the groups ``own``."""
    state, saved = structure(given, own)
    whole, params = [dict(group) for group in saved], parameters(own)
    bases = None
    for group in whole:
        if "course" in group:
            group["course"], bases = _check_course(group["course"], len(params))
    keys = set(state_arrays(options))
    if not any("hessian_diag" in entry for entry in state.values() if isinstance(entry, Mapping)):
        keys.discard("hessian_diag")  # of a run without a preconditioner
    in_order = named(saved, own)
    for i, p in in_order.items():
        if i not in state:
            continue
        entry = state[i]
        if not isinstance(entry, Mapping) or not keys <= set(entry):
            raise ValueError(f"the state of parameter {i} lacks {sorted(keys - set(entry))}: another preconditioner?")
        for key in keys:
            if not isinstance(entry[key], Tensor) or entry[key].shape != p.shape:
                raise ValueError(
                    f"state {key!r} of parameter {i} is {tuple(getattr(entry[key], 'shape', ()))}, expected "
                    f"{tuple(p.shape)}"
                )
    if bases is not None:
        state = {i: dict(entry) if i in in_order else entry for i, entry in state.items()}
        keep_bases([(p, state.get(i, {}), keys) for (i, p), keys in zip(in_order.items(), bases, strict=True)])
    return {**given, "state": state, "param_groups": whole}


def _check_course(given: object, n: int) -> tuple[dict[str, Any], list[list[str]] | None]:
    """The course, of a run over ``n`` parameters, and the keys of their bases; before 0.9 it was a mapping without
    them."""
    try:
        course = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        course = None
    names = {one.name for one in fields(Course)}
    since = {"pairs", "next_length", "suspect"}  # files of 0.6 to 0.8 are without
    if not (isinstance(course, Mapping) and names - since <= set(course) <= names | {BASES}):
        raise ValueError("'course' in param_groups is not that of a CGDescent")
    course = dict(course)
    bases = course.pop(BASES, None)
    if not all(isinstance(i, int) and 0 <= i < n for i in course["active"]):
        raise ValueError(f"'course' in param_groups has the active parameters {course['active']!r}, of {n} parameters")
    if bases is not None and len(bases) != n:
        raise ValueError(f"'course' in param_groups has the bases of {len(bases)} parameters, expected {n}")
    return course, bases
