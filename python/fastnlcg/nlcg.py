"""The torch optimizer: checks what it is given, gathers addresses, takes the native step, reports what it did."""

from __future__ import annotations

import math
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable without importing the compiler

from fastnlcg import _native, compiled, diagnostics
from fastnlcg.diagnostics import Diagnostics
from fastnlcg.line_search import OnlineLineSearch
from fastnlcg.losses import Losses, check_loss, warn_of_skip
from fastnlcg.options import SHARED, Options, check_real
from fastnlcg.tensors import adamw_state, groups
from fastnlcg.tensors.checks import DTYPES
from fastnlcg.tensors.dtensor import is_sharded
from fastnlcg.tensors.ranks import check_group, check_whole, shapes_of, world_size
from fastnlcg.tensors.state_dict import checked, entries_for
from fastnlcg.tensors.step_table import StepTable
from fastnlcg.tensors.table import parameters

__all__ = ["NLCG", "Diagnostics"]


_LOOKED_AT = (*SHARED, "capturable")


class NLCG(torch.optim.Optimizer):
    r"""Preconditioned nonlinear conjugate gradients as a fused native step.

    One step; all sums run over all parameters of all groups::

        z     = -g / (h + eps)
        beta  = clamp(sum(-g z) / rz, 0, beta_max)                fletcher_reeves
                clamp((sum(-g z) - rz_mid) / rz, 0, beta_max)     polak_ribiere
                beta_max                                          heavy_ball
        d     = z + beta d
        p     = p + alpha d,  alpha = lr * ls_scale

    where rz is sum(-g z) of the step before, and the preconditioner says what h is::

        "adam"    v = beta2 v + (1 - beta2) g^2,  h = sqrt(v / (1 - beta2^k)) after k updates of v
        "bfgs"    h = | h + y^2 / sum(y s) - (h s)^2 / sum(s h s) |  where both sums are > curvature_eps,
                  with y = g - g_prev, s = alpha_prev * d
        None      z = -g

    =========== ============================ ============= ================== ==================
    \           state per parameter element  bytes moved   weight decay       default beta_max
    =========== ============================ ============= ================== ==================
    ``"adam"``  exp_avg_sq, direction        36            decoupled (AdamW)  0.9
    ``"bfgs"``  hessian_diag, grad_prev,     56            L2                 1 (the paper)
                direction
    None        grad_prev, direction         28            L2                 1 (the paper)
    =========== ============================ ============= ================== ==================

    ``"adam"`` keeps grad_prev too where Polak-Ribiere needs it. State is float32 (float64 for float64 parameters);
    bytes are those of float32 parameters. It is allocated when a parameter first has a gradient, as tensors of its own,
    which may be moved, shared, off-loaded or replaced between steps: what ``state[p]`` holds is what the next step
    takes. ``state[p]["step"]`` counts the steps that moved ``p``.

    Parameters without a gradient take no part in a step. When their set changes, that step has beta = 0, and the BFGS h
    stays. Weights may be edited between steps (clipping, averaging, loading): the next curvature pair then does not
    describe the edit, and the clamp on beta and the curvature condition keep that harmless. A gradient with other
    strides than its parameter is copied first, and a parameter with gaps in memory is stepped in a copy; all else is
    read and written in place. ``p.grad`` is left as it was. A step without any gradient does nothing.

    On a GPU a step is enqueued on torch's current stream. It does not synchronize or allocate, and only the device
    knows whether it was skipped. The first step, and the first with a new parameter, allocate state and cannot be
    captured into a CUDA graph. :meth:`diagnostics` and :meth:`state_dict` synchronize. CPU and GPU evaluate the same
    formulas but sum in different orders, so their trajectories agree to rounding, not bitwise.

    Parameters may be spread over ranks: as DTensors (FSDP2, HSDP, tensor parallel), or as plain shards with
    ``process_group`` (FSDP1, ZeroRedundancyOptimizer). All sums then run over all ranks, in one
    exchange of 104 bytes per rank and step (two with ``"bfgs"``), and every rank takes the same decisions: all ranks
    must call :meth:`step`, and :meth:`diagnostics`, which sums too. Ranks that are about to take different steps (a
    checkpoint loaded on one of them, another lr) all raise, and change nothing. Under DDP gradients are equal on all
    ranks and nothing is exchanged.

    One thread steps at a time; another raises a RuntimeError. Exceptions, a failed exchange and skipped steps leave
    parameters and state unchanged; an interrupt lets the native step finish first. In a graph of ``torch.compile`` a
    step without a closure is one operator.

    Most users need ``lr`` and ``weight_decay`` only.

    Args:
        params: parameters, named or not, or groups. Groups may have their own ``lr``, ``weight_decay`` and
            ``maximize``; everything else is shared.
        lr: learning rate, a float or one-element tensor >= 0; schedulers own it. With ``"adam"`` the best peak is a
            third to a tenth of AdamW's (a step is 1 / (1 - beta) times as long): 3e-3 to 1e-2 in the study, at every
            batch; the default is cautious. The others take the rates of SGD; the paper's peak is 0.1 * batch / 256.
        update: ``"fletcher_reeves"`` or ``"polak_ribiere"`` (Algorithm 1), or ``"heavy_ball"``, a constant beta: then
            ``preconditioner=None`` is SGD with momentum.
        preconditioner: ``"adam"``, the recommended; ``"bfgs"``, the paper's diagonal of Algorithm 2, for large batches
            only: at small ones the noise in y inflates h until the steps vanish; or None, plain NLCG.
        line_search: an :class:`OnlineLineSearch` to scale lr by the loss (section 3.2.2), which then comes from the
            closure, from ``step(loss=...)``, or from :meth:`set_loss`.
        weight_decay: >= 0. Decoupled with ``"adam"``: p is multiplied by ``1 - alpha * weight_decay`` first. Else L2:
            the gradient seen is ``g + weight_decay * p``.
        eps: added to h where it divides, >= 0; > 0 with ``"adam"``. With ``"bfgs"`` and 0 a step with a curvature
            update moves 4 more bytes per parameter.
        curvature_eps: the curvature condition of ``"bfgs"``, >= 0.
        beta2: the decay of ``"adam"``'s v, in [0, 1).
        beta_max: upper bound of beta, in [0, 1]; None: the preconditioner's default.
        nonfinite: ``"skip"``: a step whose sums are not all finite changes nothing but a counter; nor does one whose
            gradient is finite, but too large for the float32 state (with ``"adam"`` above 1.8e19). ``"propagate"``:
            as torch's own optimizers.
        max_grad_norm: clip the gradient to this norm, as ``torch.nn.utils.clip_grad_norm_`` before the step would: over
            all groups and ranks, after AMP's unscaling, before weight decay; ``p.grad`` stays as it is. The first pass
            forms the norm beside its own sums, and is repeated where the gradient has to be clipped: 4 to 8 bytes per
            parameter more in such steps, where ``clip_grad_norm_`` takes 12 in all. > 0; inf: the norm is only
            measured. None: neither.
        skip_grad_norm: skip a step whose gradient has a larger norm than this (a spike), and count it. > 0.
        maximize: maximize the objective; the line search's comparison is reversed too.
        stochastic_rounding: for bfloat16 parameters: round up with the probability of what is cut off, so that updates
            below a parameter's resolution are kept on average instead of lost. The random bits depend on the step, the
            parameter's index and the element's place in the whole parameter, so replicas and resumed runs agree.
        average_loss: average the line search's loss over all ranks, which data-parallel training needs: replicas whose
            line searches see different losses drift apart. One exchange of 104 bytes per rank and step. If parameters
            are spread over ranks it is always done, at no extra cost. None: only then, with a warning otherwise.
        process_group: the ranks over which plain parameters are spread.
        capturable: for CUDA parameters: allows capturing a step into a ``torch.cuda.CUDAGraph``; lr may then be a
            tensor on the device (a step skips where it is negative or not finite), and a GradScaler leaves unscaling
            and the decision to skip to the step, without waiting.
        foreach, fused: accepted for compatibility; the step is always fused.
        differentiable: not supported; False.

    Raises:
        TypeError, ValueError: for a wrong kind or value of any of these, before anything is changed.

    Example::

        optimizer = fastnlcg.NLCG(model.parameters(), lr=3e-3, weight_decay=0.1)
        schedule = fastnlcg.warmup_cosine(optimizer, total_steps=len(loader) * epochs)
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = loss_function(model(inputs), targets)
            loss.backward()
            optimizer.step()
            schedule.step()

    Source: Adya et al., arXiv:1812.02886, Algorithms 1 and 2. The absolute value in h and the defaults of the two eps
    are those of the authors' TensorFlow code; ``"adam"`` (its diagonal: Kingma & Ba, arXiv:1412.6980), ``beta_max``,
    ``heavy_ball`` and ``nonfinite`` are additions.
    """

    _stepping = False
    _checked: list[Any]
    _skips: set[bool]  # reasons of which a warning has been given

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        *,
        update: Literal["fletcher_reeves", "polak_ribiere", "heavy_ball"] = "fletcher_reeves",
        preconditioner: Literal["adam", "bfgs"] | None = "adam",
        line_search: OnlineLineSearch | None = None,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        curvature_eps: float = 1e-8,
        beta2: float = 0.999,
        beta_max: float | None = None,
        max_grad_norm: float | None = None,
        skip_grad_norm: float | None = None,
        nonfinite: Literal["skip", "propagate"] = "skip",
        maximize: bool = False,
        stochastic_rounding: bool = False,
        average_loss: bool | None = None,
        process_group: Any = None,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        if not isinstance(average_loss, bool | None):
            raise TypeError(f"average_loss must be None or a bool, got {average_loss!r}")
        if process_group is not None:
            check_group(process_group)
        options = Options(
            update=update,
            preconditioner=preconditioner,
            line_search=line_search,
            eps=eps,
            curvature_eps=curvature_eps,
            beta2=beta2,
            beta_max=beta_max,
            max_grad_norm=max_grad_norm,
            skip_grad_norm=skip_grad_norm,
            nonfinite=nonfinite,
            stochastic_rounding=stochastic_rounding,
            maximize=maximize,
        )
        defaults: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            **options.for_group(),
            "capturable": capturable,
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
        }
        groups.check(defaults)
        self.average_loss = average_loss
        self._process_group = process_group
        self._shapes: list[list[Any]] = []
        self._n_params = 0
        self._reset_caches()
        super().__init__(params, defaults)
        self._step_supports_amp_scaling = capturable

    # ---- groups --------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch's optimizers do. New parameters start with h = 1 and d = 0; the next step counts as
        one with a changed set of parameters. Raises like the constructor."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            groups.check(group)
            for index, p in enumerate(group["params"], start=self._n_params):
                if p.requires_grad and p.dtype not in DTYPES:
                    raise TypeError(
                        f"parameter {index} has dtype {p.dtype}; expected one of {', '.join(map(str, DTYPES))}, "
                        "unless it is frozen"
                    )
            groups.check_together(self.param_groups, len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            raise
        group.setdefault("scalars", self.param_groups[0].get("scalars"))
        groups.complete(self.param_groups[-1:], {})
        self._n_params += len(group["params"])
        self._shapes.append(shapes_of(group))

    def _check_groups(self) -> tuple[Options, list[float | Tensor], list[float], list[bool]]:
        """The shared options; lr, weight_decay and maximize per group. All checked, where they have changed."""
        found = self.param_groups
        if not found:
            raise RuntimeError("no parameter groups are left to step")
        if self._shapes:
            check_whole(found, self._shapes, over_ranks=self._process_group is not None)
        lr: list[float | Tensor] = []
        for group in found:
            groups.plain_numbers(group)
            lr.append(groups.check_lr(group["lr"], capturable=group["capturable"]))
        weight_decay = [check_real("weight_decay", group["weight_decay"], minimum=0.0) for group in found]
        maximize = [group["maximize"] for group in found]
        current = [*maximize, *(group[key] for group in found for key in _LOOKED_AT)]
        if current != self._checked:
            for group in found:
                groups.check(group)
            groups.check_together(found)
            self._table.set_options(Options.of_group(found[0]))
            self._checked = current
        options = self._table.options
        assert options is not None
        return options, lr, weight_decay, maximize

    # ---- the step ------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None, *, loss: float | Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, loss: float | Tensor | None = None) -> float: ...

    def step(self, closure: Callable[[], float] | None = None, *, loss: float | Tensor | None = None) -> float | None:
        """Takes one step.

        Args:
            closure: evaluates the model and returns the loss; called once, with gradients enabled. Its value is
                returned, and serves the line search.
            loss: the loss at the current parameters, for the line search, where there is no closure. A number or a
                one-element tensor. None, or one that is not finite, leaves the line search alone.

        Raises:
            TypeError, ValueError: for a wrong loss, hyperparameter, parameter or gradient, named by index; nothing has
                changed then.
            RuntimeError: gradients that are sparse, on another device or of another dtype; fewer groups than before
                (an optimizer that is handed one group at a time cannot form global sums); a second thread. And what
                torch.distributed raises where ranks exchange sums.
        """
        if closure is None and torch.compiler.is_dynamo_compiling() and not self._has_sharded():
            compiled.traced(self, self._number, loss)
            return None
        return self._step(closure, loss)

    # A scheduler of torch's wraps a step without this mark, to set _opt_called, and no graph takes the wrapper.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    @_disable_dynamo  # native code and addresses
    def _step(self, closure: Callable[[], float] | None, loss: float | Tensor | None) -> float | None:
        if closure is not None and not callable(closure):
            raise TypeError(f"closure must be callable, got {type(closure).__name__}; did you mean step(loss=...)?")
        if closure is not None and loss is not None:
            raise ValueError("give a closure or loss=, not both: the closure returns the loss")
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        if self._stepping:
            raise RuntimeError("this optimizer is stepping in another thread")
        with self._lock:  # diagnostics and loads may hold it for a moment
            self._stepping = True
            self._opt_called = True  # for schedulers, which warn if they step first
            try:
                options, lr, weight_decay, maximize = self._check_groups()
                here = self._table
                if closure is None and loss is None and here.makes_state_only(self.param_groups, self.state, lr):
                    return None
                loss_seen: float | Tensor = math.nan
                if options.line_search is not None:
                    given = loss if closure is None else value
                    loss_seen = self._losses.take(given, one_of_many=self._one_of_many())
                moved = here.step(
                    self.param_groups,
                    self.state,
                    lr,
                    weight_decay,
                    maximize,
                    loss_seen,
                    capturable=self.param_groups[0]["capturable"],
                    # what GradScaler sets, where _step_supports_amp_scaling
                    amp=(getattr(self, "grad_scale", None), getattr(self, "found_inf", None)),
                )
                if here.ranks is not None:
                    here.watch()
                if not moved:
                    norm = groups.named_scalars(self.param_groups[0])["grad_norm"]
                    warn_of_skip(self._skips, norm, options.skip_grad_norm)
                self._losses.next = None
            except BaseException:
                # GradScaler sets these for one call and removes them after it, unless the call raises; and it
                # multiplies with what it finds: the next step would divide by the scale squared.
                for name in ("grad_scale", "found_inf"):
                    self.__dict__.pop(name, None)
                raise
            finally:
                self._stepping = False
        return value

    def set_loss(self, loss: float | Tensor) -> None:
        """The loss of the next step, for the line search, where a trainer calls ``step()`` without one. A closure's
        value or ``loss=`` goes before it."""
        check_loss(loss)
        self._losses.next = loss

    def _one_of_many(self) -> bool:
        """Whether other ranks have losses of their own, and nobody has said what to do about it."""
        if self.average_loss is not None or self._process_group is not None or world_size() == 1:
            return False
        return not self._has_sharded()

    def _has_sharded(self) -> bool:
        return any(map(is_sharded, parameters(self.param_groups)))

    # ---- what it did ---------------------------------------------------------------------------------------------

    @property
    def last_grad_norm(self) -> Tensor:
        """The norm of the last step's gradient before clipping, a float64 tensor of no dimension on the parameters'
        device: for loggers, without waiting for a GPU. Skipped steps count. 0 before the first step.

        Raises:
            RuntimeError: without ``max_grad_norm`` or ``skip_grad_norm``, when nobody forms it.
        """
        if not Options.of_group(self.param_groups[0]).measures_norm:
            raise RuntimeError("last_grad_norm needs max_grad_norm=; inf measures the norm and clips nothing")
        groups.complete(self.param_groups, {})
        self._table.join_stream()
        scalars: Tensor = self.param_groups[0]["scalars"]
        return scalars[list(_native.SCALARS).index("grad_norm")].clone()

    def diagnostics(self) -> Diagnostics:
        """What the last step did. The norms are computed when asked for, from the state, by one pass over it. Waits for
        a step that is under way in another thread, or on a GPU. Where parameters are spread over ranks, all have to
        call it; and after a load with ``"adam"`` there, the gradient's norm is NaN until the next step."""
        with self._lock:
            if self._stepping:  # the lock is this thread's: a signal handler, or a hook of the exchange
                raise RuntimeError("diagnostics() inside a step of the same thread")
            here = self._table
            if here.options is None:
                here.set_options(Options.of_group(self.param_groups[0]))
            return diagnostics.read(here, self.param_groups, self.state)

    def __repr__(self) -> str:
        text: str = super().__repr__()
        return re.sub(r"\n    (scalars|alpha_prev): .*(\n {8}.*)*", "", text)  # tensors, on lines of their own

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's: tensors are references, everything else plain numbers, so ``torch.load(weights_only=True)`` takes
        it back. Resuming from it is bit-exact. What the method knows beside the state is in every group: ``"scalars"``,
        one tensor for all, and ``"alpha_prev"``. On a GPU it follows the last step on torch's current stream."""
        for group in self.param_groups:
            groups.plain_numbers(group)
        self._table.join_stream()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, as torch's optimizers do: copies, and converts to the state's dtype and to the placements
        of DTensor parameters. Where both sides have ``param_names``, their order is checked. Entries of others in a
        parameter's state are kept.

        Raises:
            ValueError: for anything but a state dict of this optimizer over such parameters, naming key and parameter;
                the optimizer is unchanged then.
        """
        entries: dict[Tensor, dict[str, Any]] = {}

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            whole = checked(self, given)
            entries.update(entries_for(self, whole))
            return whole

        with self._lock:
            if self._stepping:
                raise RuntimeError("load_state_dict() inside a step of the same thread")
            # The last of the pre-hooks: sees what the user's own made of it, before torch changes anything.
            handle = self.register_load_state_dict_pre_hook(check)
            try:
                super().load_state_dict(state_dict)
            finally:
                handle.remove()
            for p, entry in entries.items():
                self.state[p] = {**self.state.get(p, {}), **entry}

    def load_adamw_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a run of ``torch.optim.AdamW`` (or Adam without weight decay) over the same parameters: v and
        the step counts are taken as they are, the direction is ``-exp_avg / ((1 - beta1) (h + eps))``. Of the groups,
        ``lr`` becomes ``(1 - beta1) lr`` and ``weight_decay`` ``weight_decay / (1 - beta1)``, which makes the same
        moves; the rates that a scheduler keeps there (``initial_lr``, ``max_lr``, ``min_lr``) are converted as ``lr``
        is; eps, beta2 and maximize are the file's, all other options this optimizer's. With
        ``update="heavy_ball", beta_max=beta1`` the steps are AdamW's up to changes of h. A scheduler's own state dict
        still has AdamW's rates; a file that was written under one warns, and says what to do. If both sides have
        names, they must be in the same order.

        Raises:
            ValueError: for another optimizer's state dict, amsgrad, L2 weight decay, or another preconditioner than
                ``"adam"``; the optimizer is unchanged then.
        """
        self.load_state_dict(adamw_state.from_adamw(self, state_dict))
        adamw_state.warn_of_scheduler(state_dict)

    def adamw_state_dict(self, beta1: float = 0.9) -> dict[str, Any]:
        """The way back: a state dict for ``torch.optim.AdamW`` over the same parameters, with
        ``exp_avg = -(1 - beta1) (h + eps) d``, rates and weight decay converted the other way. Those in a scheduler's
        own state dict are still NLCG's: its ``base_lrs`` become the ``initial_lr`` of AdamW's groups.

        Raises:
            TypeError, ValueError: for a beta1 outside [0, 1), or another preconditioner than ``"adam"``.
        """
        beta1 = check_real("beta1", beta1, minimum=0.0)
        if beta1 >= 1.0:
            raise ValueError(f"Invalid beta1: {beta1!r}; expected a number in [0, 1)")
        return adamw_state.to_adamw(self, beta1)

    def __getstate__(self) -> dict[str, Any]:
        if self._process_group is not None:
            raise TypeError("an optimizer with process_group= cannot be pickled or copied; use its state_dict()")
        state: dict[str, Any] = super().__getstate__()
        return {**state, "average_loss": self.average_loss}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("average_loss", None)
        self.__dict__.setdefault("_process_group", None)
        groups.complete(self.param_groups, self.defaults)
        self._shapes = list(map(shapes_of, self.param_groups))
        self._n_params = sum(len(group["params"]) for group in self.param_groups)
        self._step_supports_amp_scaling = self.defaults.get("capturable", False)
        self._reset_caches()

    def _reset_caches(self) -> None:
        """Drops everything that can be rebuilt from ``state`` and ``param_groups``."""
        if "_lock" not in self.__dict__:  # a load of a state dict holds it
            self._lock = threading.RLock()
            self._number = compiled.number_of(self)
        _LIVE.add(self)
        self._table = StepTable(self._process_group, self.average_loss)
        self._checked = []
        self._losses = Losses()
        self._skips = set()


# A child forked while another thread steps must not wait for that thread, which it does not have.
_LIVE: weakref.WeakSet[NLCG] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for optimizer in list(_LIVE):
        optimizer._lock, optimizer._stepping = threading.RLock(), False


os.register_at_fork(after_in_child=_after_fork_in_child)
