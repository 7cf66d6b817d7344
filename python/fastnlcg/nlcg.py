"""The torch optimizer: checks what it is given, gathers addresses, takes the native step, reports what it did."""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable without importing the compiler

from fastnlcg import _native, checkpoint, distributed, groups, layout
from fastnlcg.line_search import OnlineLineSearch
from fastnlcg.parameters import DTYPES, check_kind

__all__ = ["NLCG", "Diagnostics"]

_CALLER = 6  # of step(), for warnings: behind a method of ours, step(), and three wrappers of torch


@dataclass(frozen=True)
class Diagnostics:
    """What the last step did; see :meth:`NLCG.diagnostics`."""

    step: int
    """completed steps"""
    skipped_steps: int
    """steps that changed nothing because a sum was not finite"""
    beta: float
    """conjugacy coefficient after clamping and restarts"""
    rz: float
    """sum(g g / (h + eps))"""
    ys: float
    """sum(y s): 0 where no curvature pair was formed (first step, changed parameters, not ``"bfgs"``)"""
    shs: float
    """sum(s h s), likewise"""
    updated: bool
    """whether the preconditioner's diagonal was updated"""
    grad_norm: float
    """norm of g, after L2 weight decay"""
    direction_norm: float
    """norm of d"""
    cosine: float
    """cos(g, -d): 1 is steepest descent; NaN where one of them is zero"""
    ls_scale: float
    """line-search scale, in (0, 1]"""
    launches: int = 0
    """CUDA launches of the step's passes: 1 (cooperative), or one for each; 0 on the CPU"""


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

    ``"adam"`` keeps grad_prev too where Polak-Ribiere or Powell restarts need it. State is float32 (float64 for float64
    parameters); bytes are those of float32 parameters. It is allocated when a parameter first has a gradient.
    ``state[p]["step"]`` is the optimizer's step count when ``p`` last moved.

    Parameters without a gradient take no part in a step. When their set changes, that step has beta = 0, and the BFGS h
    stays. Weights may be edited between steps (clipping, averaging, loading): the next curvature pair then does not
    describe the edit, and the clamp on beta and the condition on the sums keep that harmless. A gradient with other strides
    than its parameter is copied first, and a parameter with gaps in memory is stepped in a copy; all else is read and
    written in place. ``p.grad`` is left as it was. A step without any gradient does nothing.

    On a GPU a step is enqueued on torch's current stream; it neither waits nor allocates, and whether it was skipped
    only the device knows. The first step, and the first with a new parameter, lay out the state, and cannot be captured
    into a CUDA graph; :meth:`diagnostics` and :meth:`state_dict` wait. CPU and GPU compute the same formulas on the
    same numbers, but add up in different orders, so their trajectories agree to rounding, not to the bit.

    Parameters may be spread over ranks: as DTensors (FSDP2, HSDP, tensor parallel), or as plain shards with
    ``process_group`` (FSDP1, ZeroRedundancyOptimizer). All sums then run over all ranks, by one exchange of 80 bytes a
    rank in each step (two with ``"bfgs"``), and every rank takes the same decisions: all have to call :meth:`step`, and
    :meth:`diagnostics`, which sums too. Under DDP gradients are equal and nothing is exchanged.

    A step in one thread at a time; a second gets a RuntimeError. Exceptions, interrupts, a failed exchange and skipped
    steps leave parameters and state as they were. ``torch.compile`` leaves the step out of its graphs.

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
        restart: when to forget the direction, beta = 0. None: never (the paper); ``"descent"``: where d would not
            descend, ``-rz + beta * sum(g d) >= 0``; ``"powell"``: where ``|rz_mid| >= 0.2 * rz``; N: every N steps.
        nonfinite: ``"skip"``: a step whose sums are not all finite changes nothing but a counter; ``"propagate"``: as
            torch's own optimizers.
        maximize: maximize the objective; the line search's comparison turns round too.
        stochastic_rounding: for bfloat16 parameters: round up with the probability of what is cut off, so that updates
            below a parameter's resolution are kept on average instead of lost. The random bits depend on the step and
            the element's place alone: replicas and resumed runs have the same.
        average_loss: average the line search's loss over all ranks, which data-parallel training needs: ranks that
            decide by losses of their own drift apart. One exchange of 80 bytes a rank in each step. Where parameters
            are spread over ranks it is always done, and costs nothing. None: then only, and a warning else.
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
    ``heavy_ball``, ``restart`` and ``nonfinite`` are additions.
    """

    _stepping = False
    _checked: list[Any]
    _next_loss: float | Tensor | None
    _without_loss: int
    _warned: bool

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
        restart: Literal["descent", "powell"] | int | None = None,
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
        if not isinstance(line_search, OnlineLineSearch | None):
            raise TypeError(f"line_search must be None or an OnlineLineSearch, got {line_search!r}")
        if not isinstance(average_loss, bool | None):
            raise TypeError(f"average_loss must be None or a bool, got {average_loss!r}")
        defaults: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "update": update,
            "preconditioner": preconditioner,
            "line_search": None if line_search is None else line_search.as_tuple(),
            "eps": eps,
            "curvature_eps": curvature_eps,
            "beta2": beta2,
            "beta_max": beta_max,
            "restart": restart,
            "nonfinite": nonfinite,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "capturable": capturable,
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
        }
        groups.check(defaults)
        self.average_loss = average_loss
        self._process_group = process_group
        self._sizes: list[tuple[int, int]] = []
        self._forget()
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
            first = sum(len(other["params"]) for other in self.param_groups[:-1])
            for index, p in enumerate(group["params"], start=first):
                check_kind(index, p)
            groups.check_together(self.param_groups)
        except BaseException:
            self.param_groups.pop()
            raise
        group.setdefault("scalars", groups.scalars_of(len(self.param_groups) - 1))
        self._sizes.append(_size(group))

    def _check_groups(self) -> tuple[dict[str, Any], list[float | Tensor], list[float], list[bool]]:
        """The shared options; lr, weight_decay and maximize per group. All checked, where they have changed."""
        found = self.param_groups
        if len(found) != len(self._sizes):
            raise RuntimeError(
                f"{len(found)} parameter groups, expected {len(self._sizes)}: this optimizer's sums run over all "
                "groups, so it cannot be stepped one group at a time, as DeepSpeed's ZeRO does (use add_param_group to "
                "add one)"
            )
        if "deepspeed" in sys.modules and self._process_group is None and list(map(_size, found)) != self._sizes:
            raise RuntimeError(
                "the groups hold other parameters than were added: DeepSpeed's ZeRO has put this rank's share in their "
                "place, and the sums would miss the rest; give process_group= (with one group), or use FSDP2"
            )
        lr = [groups.check_lr(group["lr"], capturable=group["capturable"]) for group in found]
        weight_decay = [_native.check_real("weight_decay", group["weight_decay"], minimum=0.0) for group in found]
        maximize = [group["maximize"] for group in found]
        current = [*maximize, *(group[key] for group in found for key in groups.SHARED)]
        if current != self._checked:
            for group in found:
                groups.check(group)
            groups.check_together(found)
            self._layout.set_options(groups.options_of(found[0]))
            self._checked = current
        return self._layout.options, lr, weight_decay, maximize

    # ---- the step ------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None, *, loss: float | Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, loss: float | Tensor | None = None) -> float: ...

    @_disable_dynamo  # native code and addresses: a graph break, on purpose
    def step(self, closure: Callable[[], float] | None = None, *, loss: float | Tensor | None = None) -> float | None:
        """Takes one step.

        Args:
            closure: evaluates the model and returns the loss; called once, with gradients enabled. Its value is
                returned, and serves the line search.
            loss: the loss at the current parameters, for the line search, where there is no closure. A number or a
                one-element tensor. None, or one that is not finite, leaves the line search alone.

        Raises:
            TypeError, ValueError: for a wrong loss, hyper-parameter, parameter or gradient, named by index; nothing has
                changed then.
            RuntimeError: gradients that are sparse, on another device or of another dtype; fewer groups than before
                (an optimizer that is handed one group at a time cannot form global sums); a second thread. And what
                torch.distributed raises where ranks exchange sums.
        """
        if closure is not None and loss is not None:
            raise ValueError("give a closure or loss=, not both: the closure returns the loss")
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        if self._stepping:
            raise RuntimeError("this optimizer is stepping in another thread")
        with self._lock:  # diagnostics may hold it for a moment
            self._stepping = True
            try:
                options, lr, weight_decay, maximize = self._check_groups()
                now: float | Tensor = math.nan
                if options["line_search"] is not None:
                    given = loss if closure is None else value
                    now = _check_loss(self._next_loss if given is None else given)
                    self._warn_of_losses(now)
                table = self._layout.gather(self.param_groups, self.state, self._process_group, self.average_loss)
                if table.takes_part:
                    if _native.on_gpu(self._layout.device):
                        moved = self._step_on_gpu(table, lr, weight_decay, maximize, now)
                    else:
                        moved = self._step_on_cpu(table, lr, weight_decay, maximize, now)
                    if moved:
                        table.moved()
                table.gradients = []
                self._next_loss = None
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
        _check_loss(loss)
        self._next_loss = loss

    def _step_on_cpu(
        self,
        table: layout.Table,
        lr: list[float | Tensor],
        weight_decay: list[float],
        maximize: list[bool],
        loss: float | Tensor,
    ) -> bool:
        if self._layout.options["capturable"]:
            raise RuntimeError("capturable=True needs CUDA parameters; these are on the CPU")
        assert table.native is not None
        rates = [float(rate) for rate in lr]
        return table.native.step(rates, weight_decay, maximize, table.set, float(loss), _native.num_threads())

    def _step_on_gpu(
        self,
        table: layout.Table,
        lr: list[float | Tensor],
        weight_decay: list[float],
        maximize: list[bool],
        loss: float | Tensor,
    ) -> bool:
        """Enqueues the step on the current stream. Numbers that lie on the device are read there."""
        native, device = table.native, self._layout.device
        assert native is not None
        for name, x in (("loss", loss), *(("lr", rate) for rate in lr)):
            if isinstance(x, Tensor) and x.device != device:
                raise RuntimeError(f"{name} is on {x.device}, the parameters on {device}")
        if self._layout.options["capturable"] is False and _native.capturing():
            raise RuntimeError("a step can be captured into a CUDA graph only with capturable=True")
        native.stream = _native.current_stream(str(device))
        return native.step(
            [math.nan if isinstance(rate, Tensor) else rate for rate in lr],
            weight_decay,
            maximize,
            table.set,
            math.nan if isinstance(loss, Tensor) else loss,
            1,
            lr_on_device=[_number(rate) for rate in lr],
            loss_on_device=_number(loss),
            # what GradScaler sets, where _step_supports_amp_scaling
            grad_scale=_number(getattr(self, "grad_scale", None)),
            found_inf=_number(getattr(self, "found_inf", None)),
        )

    def _warn_of_losses(self, loss: float | Tensor) -> None:
        """Gives a voice to a line search that cannot work."""
        if self.average_loss is None and not self._warned and distributed.world_size() > 1:
            params = layout.parameters(self.param_groups)
            if self._process_group is None and not any(map(distributed.is_sharded, params)):
                self._warned = True
                warnings.warn(
                    "the line search sees this rank's loss alone, and torch.distributed has more ranks: pass "
                    "average_loss=True, which data-parallel replicas need to stay equal, or False where this is meant",
                    UserWarning,
                    stacklevel=_CALLER,
                )
        if not isinstance(loss, Tensor) and math.isnan(loss):
            self._without_loss += 1
            if self._without_loss == 10:
                warnings.warn(
                    "line_search is on, and ten steps have seen no loss: pass step(loss=...), a closure, or set_loss()",
                    UserWarning,
                    stacklevel=_CALLER,
                )
        else:
            self._without_loss = -(10**9)  # it has seen one

    # ---- what it did ---------------------------------------------------------------------------------------------

    def diagnostics(self) -> Diagnostics:
        """What the last step did. The norms are computed when asked for, from the state, by one pass over it. Waits for
        a step that is under way in another thread, or on a GPU. Where parameters are spread over ranks, all have to
        call it; and after a load with ``"adam"`` there, the gradient's norm is NaN until the next step."""
        with self._lock:
            here = self._layout
            if here.native is None and any(isinstance(p, Tensor) and entry for p, entry in self.state.items()):
                here.restore(self.param_groups, self.state, self._process_group, self.average_loss)  # after a load
            native, ranks = here.native, here.table.ranks
            if native is None:
                return Diagnostics(0, 0, 0.0, 0.0, 0.0, 0.0, False, 0.0, 0.0, math.nan, 1.0)
            here.use_stream()
            s = native.scalars
            gg, dd, gd = native.state_norms(_native.num_threads())
            if "grad_prev" not in layout.streams(here.options):  # the step has kept the sums instead
                gg, gd = s["gg"], s["gd"]
            if ranks is not None and ranks.every_decision:
                gg, dd, gd = ranks.total([gg, dd, gd], here.device)
        norms = math.sqrt(gg) * math.sqrt(dd)
        return Diagnostics(
            step=int(s["step"]),
            skipped_steps=int(s["skipped_steps"]),
            beta=s["beta"],
            rz=s["rz"],
            ys=s["ys"],
            shs=s["shs_used"],
            updated=bool(s["updated"]),
            grad_norm=math.sqrt(gg),
            direction_norm=math.sqrt(dd),
            cosine=-gd / norms if norms else math.nan,
            ls_scale=s["ls_scale"],
            launches=native.launches,
        )

    def __repr__(self) -> str:
        lines: list[str] = super().__repr__().splitlines()
        return "\n".join(line for line in lines if not line.startswith("    scalars: "))

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's: tensors are references, everything else plain numbers, so ``torch.load(weights_only=True)`` takes
        it back. Resuming from it is bit-exact. The scalars of the method are one entry of each group, ``"scalars"``."""
        self._layout.save_scalars(self.param_groups)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, as torch's optimizers do: copies, and converts to the state's dtype and to the placements
        of DTensor parameters. Files of older versions are taken; where both sides have ``param_names``, their order is
        checked. Warns of what a later version has added, and goes on without it.

        Raises:
            ValueError: for anything but a state dict of this optimizer over such parameters, naming key and parameter;
                the optimizer is unchanged then.
        """
        saved: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            checkpoint.check(self, given)
            saved.update(given)

        # The last of the pre-hooks: sees what the user's own made of it, before torch changes anything.
        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        for index, p in zip(indices, layout.parameters(self.param_groups), strict=True):
            if index in saved["state"]:
                self.state[p] = checkpoint.entry_for(p, saved["state"][index], self.param_groups[0])

    def __getstate__(self) -> dict[str, Any]:
        if self._process_group is not None:
            raise TypeError("an optimizer with process_group= cannot be pickled or copied; use its state_dict()")
        self._layout.save_scalars(self.param_groups)
        state: dict[str, Any] = super().__getstate__()
        return {**state, "average_loss": self.average_loss}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("average_loss", None)
        self.__dict__.setdefault("_process_group", None)
        for key, value in groups.SINCE.items():
            self.defaults.setdefault(key, value)
        groups.complete(self.param_groups, self.defaults)
        for k, group in enumerate(self.param_groups):
            known = groups.scalars_of(k)
            group["scalars"] = {key: group["scalars"].get(key, value) for key, value in known.items()}
        self._sizes = list(map(_size, self.param_groups))
        self._step_supports_amp_scaling = self.defaults.get("capturable", False)
        self._forget()

    def _forget(self) -> None:
        """Drops everything that can be rebuilt from ``state`` and ``param_groups``."""
        self._lock = threading.Lock()
        self._layout = layout.Layout()
        self._checked = []
        self._next_loss = None
        self._without_loss = 0
        self._warned = False


def _size(group: dict[str, Any]) -> tuple[int, int]:
    return len(group["params"]), sum(p.numel() for p in group["params"])


def _number(x: float | Tensor | None) -> tuple[int, str] | None:
    """Address and type of a number on the device; None for one that is not."""
    return (x.data_ptr(), DTYPES[x.dtype]) if isinstance(x, Tensor) else None


def _check_loss(loss: object) -> float | Tensor:
    """The loss as a number; as it is where it lies on a GPU."""
    if isinstance(loss, Tensor) and _native.on_gpu(loss.device) and loss.dtype in DTYPES:
        if loss.numel() != 1:
            raise ValueError(f"loss must have one element, got shape {tuple(loss.shape)}")
        return loss.detach()
    return _native.check_loss(loss)
