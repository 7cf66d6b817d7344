"""The torch optimizer: which parameters move, where they lie, and what is saved. The step itself is native."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastnlcg import _native
from fastnlcg.line_search import OnlineLineSearch

__all__ = ["NLCG", "Diagnostics"]

_DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
# Options that hold for the whole optimizer, because its sums run over all groups. Every group carries them, so that
# checkpoints do.
_SHARED = (
    "update",
    "preconditioner",
    "line_search",
    "eps",
    "curvature_eps",
    "beta2",
    "beta_max",
    "restart",
    "nonfinite",
    "maximize",
    "capturable",
)
# Scalars of the native step that a checkpoint needs: in the first parameter group, as plain numbers.
_SCALARS = ("rz", "gs", "shs", "grad_max", "gg", "gd", "ls_scale", "loss_prev", "skipped_steps")
# What checkpoints of older versions lack, and what they mean.
_OPTIONS_SINCE_0_3 = {"beta2": 0.999, "beta_max": None}
_SCALARS_SINCE_0_3 = ("gg", "gd")
_DEFAULT_SCALARS = {**dict.fromkeys(_SCALARS, 0.0), "ls_scale": 1.0, "loss_prev": None}

_NUMBERS = ("step", "beta2_power")  # of a parameter: float64, whatever the dtype of its state

# torch >= 2.10 hands out tensors to native code in tens of nanoseconds; before, _Table.refresh compares in Python.
_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)


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
    """|g|, after L2 weight decay"""
    direction_norm: float
    """|d|"""
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
    describe the edit, and the clamp on beta and the gate on the sums keep that harmless. A gradient with other strides
    than its parameter is copied first; all else is read in place. ``p.grad`` is left as it was. A step without any
    gradient does nothing.

    On a GPU a step is enqueued on torch's current stream; it neither waits nor allocates, and whether it was skipped
    only the device knows. The first step, and the first with a new parameter, lay out the state, and cannot be captured
    into a CUDA graph; :meth:`diagnostics` and :meth:`state_dict` wait. CPU and GPU compute the same formulas on the
    same numbers, but add up in different orders, so their trajectories agree to rounding, not to the bit.

    A step in one thread at a time; a second gets a RuntimeError. Exceptions, interrupts and skipped steps leave
    parameters and state as they were.

    Args:
        params: parameters or groups. Groups may have their own ``lr`` and ``weight_decay``; everything else is shared.
        lr: learning rate, a float or one-element tensor >= 0; schedulers own it. With ``"adam"`` the best peak is a
            third to a tenth of AdamW's (a step is 1 / (1 - beta) times as long): 3e-3 to 1e-2 in the study, at every
            batch; the default is cautious. The others take the rates of SGD; the paper's peak is 0.1 * batch / 256.
        update: ``"fletcher_reeves"`` or ``"polak_ribiere"`` (Algorithm 1), or ``"heavy_ball"``, a constant beta: then
            ``preconditioner=None`` is SGD with momentum.
        preconditioner: ``"adam"``, the recommended; ``"bfgs"``, the paper's diagonal of Algorithm 2, for large batches
            only: at small ones the noise in y inflates h until the steps vanish; or None, plain NLCG.
        line_search: an :class:`OnlineLineSearch` to scale lr by the loss (section 3.2.2), which then comes from the
            closure or from ``step(loss=...)``. Under data parallelism pass the loss averaged over ranks.
        weight_decay: >= 0. Decoupled with ``"adam"``: p is multiplied by ``1 - alpha * weight_decay`` first. Else L2:
            the gradient seen is ``g + weight_decay * p``.
        eps: added to h where it divides, >= 0; > 0 with ``"adam"``. With ``"bfgs"`` and 0 a step with a curvature
            update moves 4 more bytes per parameter.
        curvature_eps: the curvature gate of ``"bfgs"``, >= 0.
        beta2: the decay of ``"adam"``'s v, in [0, 1).
        beta_max: upper bound of beta, in [0, 1]; None: the preconditioner's default.
        restart: when to forget the direction, beta = 0. None: never (the paper); ``"descent"``: where d would not
            descend, ``-rz + beta * sum(g d) >= 0``; ``"powell"``: where ``|rz_mid| >= 0.2 * rz``; N: every N steps.
        nonfinite: ``"skip"``: a step whose sums are not all finite changes nothing but a counter; ``"propagate"``: as
            torch's own optimizers.
        maximize: maximize the objective; the line search's comparison turns round too.
        capturable: for CUDA parameters: allows capturing a step into a ``torch.cuda.CUDAGraph``; lr may then be a
            tensor on the device (a step skips where it is negative or not finite), and a GradScaler leaves unscaling
            and the decision to skip to the step, without waiting.
        foreach, fused: accepted for compatibility; the step is always fused.
        differentiable: not supported.

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
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        if differentiable:
            raise ValueError("differentiable=True is not supported: the step is native and not recorded by autograd")
        defaults: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "update": update,
            "preconditioner": preconditioner,
            "line_search": line_search,
            "eps": eps,
            "curvature_eps": curvature_eps,
            "beta2": beta2,
            "beta_max": beta_max,
            "restart": restart,
            "nonfinite": nonfinite,
            "maximize": maximize,
            "capturable": capturable,
        }
        if not isinstance(line_search, OnlineLineSearch | None):
            raise TypeError(f"line_search must be None or an OnlineLineSearch, got {line_search!r}")
        defaults["line_search"] = None if line_search is None else line_search.as_tuple()
        _check_hyper_parameters(defaults)
        self._forget()
        self._group_count = 0
        super().__init__(params, defaults)
        self._step_supports_amp_scaling = capturable

    # ---- groups and their options --------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch's optimizers do. New parameters start with h = 1 and d = 0; the next step counts as
        one with a changed set of parameters. Raises like the constructor."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_hyper_parameters(group)
            first = sum(len(other["params"]) for other in self.param_groups[:-1])
            for index, p in enumerate(group["params"], start=first):
                _check_kind(index, p)
            _check_shared(self.param_groups)
        except BaseException:
            self.param_groups.pop()
            raise
        group.setdefault("alpha_prev", 0.0)
        for key, value in _DEFAULT_SCALARS.items():
            self.param_groups[0].setdefault(key, value)
        self._group_count = len(self.param_groups)

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
            TypeError, ValueError: for a wrong loss, hyper-parameter, parameter or gradient, named by index; nothing has
                changed then.
            RuntimeError: gradients that are sparse, on another device or of another dtype; fewer groups than before
                (an optimizer that is handed one group at a time cannot form global sums); a second thread.
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
                options, lr, weight_decay = self._hyper_parameters()
                now = _check_loss(loss if closure is None else value) if options["line_search"] else math.nan
                table = self._gather(options)
                if table.native is not None and table.moving:
                    if _on_gpu(table.moving[0].device):
                        moved = self._step_on_gpu(table, lr, weight_decay, now)
                    elif options["capturable"]:
                        raise RuntimeError("capturable=True needs CUDA parameters; these are on the CPU")
                    else:
                        rates = [float(rate) for rate in lr]
                        moved = table.native.step(rates, weight_decay, table.set, float(now), _native.num_threads())
                    if moved:
                        _increment_version(table.moving)
                table.gradients = []
            except BaseException:
                # GradScaler sets these for one call and removes them after it, unless the call raises; and it
                # multiplies with what it finds: the next step would divide by the scale squared.
                for name in ("grad_scale", "found_inf"):
                    self.__dict__.pop(name, None)
                raise
            finally:
                self._stepping = False
        return value

    def _step_on_gpu(
        self, table: _Table, lr: list[float | Tensor], weight_decay: list[float], loss: float | Tensor
    ) -> bool:
        """Enqueues the step on the current stream. Numbers that lie on the device are read there."""
        native, device = table.native, table.moving[0].device
        assert native is not None
        for name, x in (("loss", loss), *(("lr", rate) for rate in lr)):
            if isinstance(x, Tensor) and x.device != device:
                raise RuntimeError(f"{name} is on {x.device}, the parameters on {device}")
        if self._options["capturable"] is False and _native.capturing():
            raise RuntimeError("a step can be captured into a CUDA graph only with capturable=True")
        native.stream = _native.current_stream(str(device))
        return native.step(
            [math.nan if isinstance(rate, Tensor) else rate for rate in lr],
            weight_decay,
            table.set,
            math.nan if isinstance(loss, Tensor) else loss,
            1,
            lr_on_device=[_number(rate) for rate in lr],
            loss_on_device=_number(loss),
            # what GradScaler sets, where _step_supports_amp_scaling
            grad_scale=_number(getattr(self, "grad_scale", None)),
            found_inf=_number(getattr(self, "found_inf", None)),
        )

    def diagnostics(self) -> Diagnostics:
        """What the last step did. The norms are computed when asked for, from the state, by one pass over it. Waits for
        a step that is under way in another thread, or on a GPU."""
        with self._lock:
            native = self._table.native
            if native is None and any(self.state.values()):  # after a load
                params = self._parameters()
                stateful = [i for i, p in enumerate(params) if self.state.get(p)]
                native = self._flatten(params, stateful, _shared_options(self.param_groups[0]))
                (last_set,) = self._sets  # the only one that _flatten knows
                self._set_segments(native, params, stateful, list(last_set))
            if native is None:
                return Diagnostics(0, 0, 0.0, 0.0, 0.0, 0.0, False, 0.0, 0.0, math.nan, 1.0)
            self._use_stream(native)
            s = native.scalars
            gg, dd, gd = native.state_norms(_native.num_threads())
            if "grad_prev" not in _streams(self._options):  # the step has kept the sums instead
                gg, gd = s["gg"], s["gd"]
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

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's: tensors are references, everything else plain numbers, so ``torch.load(weights_only=True)`` takes
        it back. Resuming from it is bit-exact."""
        self._save_scalars()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, as torch's optimizers do: copies, and converts to the state's dtype.

        Raises:
            ValueError: for anything but a state dict of this optimizer over such parameters, naming key and parameter;
                the optimizer is unchanged then.
        """
        saved: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            _check_state_dict(self, given)
            saved.update(given)

        # The last of the pre-hooks: sees what the user's own made of it, before torch changes anything.
        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch has cast the state to the parameters' dtype, which would round float32 state to bfloat16. Again, from
        # the original:
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        for index, p in zip(indices, self._parameters(), strict=True):
            if index in saved["state"]:
                dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
                self.state[p] = {
                    key: torch.as_tensor(value).to(
                        device=p.device if key not in _NUMBERS else "cpu",
                        dtype=dtype if key not in _NUMBERS else torch.float64,
                        copy=True,
                    )
                    for key, value in saved["state"][index].items()
                }

    def __getstate__(self) -> dict[str, Any]:
        self._save_scalars()
        state: dict[str, Any] = super().__getstate__()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for options in (self.defaults, *self.param_groups):
            for key, value in _OPTIONS_SINCE_0_3.items():
                options.setdefault(key, value)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            group.setdefault("alpha_prev", 0.0)
        if self.param_groups:
            for key, value in _DEFAULT_SCALARS.items():
                self.param_groups[0].setdefault(key, value)
        self._group_count = len(self.param_groups)
        self._step_supports_amp_scaling = self.defaults.get("capturable", False)
        self._forget()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Drops everything that can be rebuilt from ``state`` and ``param_groups``."""
        self._lock = threading.Lock()
        self._table = _Table()
        self._checked: list[Any] = []
        self._sets: dict[tuple[int, ...], float] = {}
        self._set_names = itertools.count()
        self._options: dict[str, Any] = {}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _save_scalars(self) -> None:
        native = self._table.native
        if native is None:
            return
        self._use_stream(native)
        scalars = native.scalars
        for key in _SCALARS:
            value = scalars[key]
            self.param_groups[0][key] = None if key == "loss_prev" and math.isnan(value) else value
        for group, alpha_prev in zip(self.param_groups, native.alpha_prev, strict=False):
            group["alpha_prev"] = alpha_prev

    def _hyper_parameters(self) -> tuple[dict[str, Any], list[float | Tensor], list[float]]:
        """The shared options, and lr and weight_decay per group; all checked."""
        groups = self.param_groups
        if len(groups) != self._group_count:
            raise RuntimeError(
                f"{len(groups)} parameter groups, expected {self._group_count}: this optimizer's sums run over all "
                "groups, so it cannot be stepped one group at a time (use add_param_group to add one)"
            )
        lr = [_check_lr(group["lr"], capturable=group["capturable"]) for group in groups]
        weight_decay = [_native.check_real("weight_decay", group["weight_decay"], minimum=0.0) for group in groups]
        current = [group[key] for group in groups for key in _SHARED]
        if current != self._checked:
            for group in groups:
                _check_hyper_parameters(group)
            _check_shared(groups)
            options = _shared_options(groups[0])
            if self._table.native is not None:
                if options["preconditioner"] != self._options["preconditioner"]:
                    raise ValueError("preconditioner cannot change once there is state; make a new optimizer")
                if _streams(options) != _streams(self._options):
                    raise ValueError(
                        "update and restart cannot change to ones that need other state (grad_prev) once there is "
                        "some; make a new optimizer"
                    )
                self._table.native.set_options(**_native.native_options(options))
            self._options, self._checked = options, current
        return self._options, lr, weight_decay

    def _gather(self, options: Mapping[str, Any]) -> _Table:
        """The table of this step: pointers of the parameters that have gradients, and whether their set changed."""
        table = self._table
        params = self._parameters()
        if (
            len(self.param_groups) != table.groups
            or len(params) != len(table.params)
            or not all(map(is_, params, table.params))
            or len(self.state) != table.states
            or not table.refresh()
        ):
            self._rebuild(params, options)
        return self._table

    def _rebuild(self, params: list[Tensor], options: Mapping[str, Any]) -> None:
        """Checks every parameter and gradient, lays out the state where it has to grow, makes a new table."""
        native = self._table.native
        grads = [p.grad for p in params]
        stateful = [i for i, p in enumerate(params) if grads[i] is not None or self.state.get(p)]
        moved = False  # in memory, or to another order there
        for i in stateful:
            _check_parameter(i, params[i])
            held = self.state.get(params[i], {}).get("direction")
            if held is not None and held.shape != params[i].shape:
                raise RuntimeError(
                    f"parameter {i} has shape {tuple(params[i].shape)}, its state {tuple(held.shape)}: it was resized; "
                    "add the new parameter to a new optimizer"
                )
            moved |= held is not None and (held.stride() != params[i].stride() or held.device != params[i].device)
        moving, gradients = [], []
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if g is not None and p.numel():
                moving.append(i)
                gradients.append(_usable_gradient(i, p, g))
        _check_mixture(stateful, params)
        _check_devices(stateful, params)

        layout = [params[i] for i in stateful]
        old = self._table
        if not layout:  # no parameter has ever had a gradient: nothing to do
            self._table = _Table(params=params, groups=len(self.param_groups))
            return
        if (
            native is None
            or moved
            or len(self.param_groups) != old.groups
            or len(self.state) != old.states
            or len(layout) != len(old.layout)
            or not all(map(is_, layout, old.layout))
        ):
            native = self._flatten(params, stateful, options)
        self._set_segments(native, params, stateful, moving)
        self._table = _Table(
            native=native,
            params=params,
            layout=layout,
            states=len(self.state),
            groups=len(self.param_groups),
            moving=[params[i] for i in moving],
            resting=[p for p, g in zip(params, grads, strict=True) if g is None],
            set=self._name_set(moving),
            gradients=gradients,
            signatures=[] if _EXCHANGE is not None else [_signature(params[i]) for i in moving],
        )
        native.point([params[i].data_ptr() for i in moving], [g.data_ptr() for g in gradients])

    def _use_stream(self, native: _native.Step) -> None:
        """On a GPU: what the native side does next follows what torch's current stream holds."""
        device = self._table.layout[0].device
        if _on_gpu(device):
            native.stream = _native.current_stream(str(device))

    def _name_set(self, moving: list[int]) -> float:
        """A number for this set of parameters, the same as long as the layout of the state is. The native side compares
        it with that of the last step that was not skipped, which the host need not know."""
        if len(self._sets) > 100 and tuple(moving) not in self._sets:  # sets that come and go at random
            self._sets.clear()
        return self._sets.setdefault(tuple(moving), float(next(self._set_names)))

    def _set_segments(self, native: _native.Step, params: list[Tensor], stateful: list[int], moving: list[int]) -> None:
        """Tells the native side where in the flat state the parameters at ``moving`` lie."""
        offsets = _offsets([params[i] for i in stateful])
        places = {i: (slot, offset) for slot, (i, offset) in enumerate(zip(stateful, offsets, strict=False))}
        group_of = [k for k, group in enumerate(self.param_groups) for _ in group["params"]]
        table = []
        for i in moving:
            slot, offset = places[i]
            table.append((offset, group_of[i], slot, _DTYPES[params[i].dtype], params[i].shape, params[i].stride()))
        native.set_segments(table)

    def _flatten(self, params: list[Tensor], stateful: list[int], options: Mapping[str, Any]) -> _native.Step:
        """Allocates flat state for the parameters at ``stateful``, takes over what ``self.state`` holds, makes
        ``self.state`` views of it, and returns the native side over it."""
        layout = [params[i] for i in stateful]
        device = layout[0].device
        if _on_gpu(device) and _native.capturing():
            raise RuntimeError(
                "the state cannot be laid out while a CUDA graph is captured: take a step with these parameters first"
            )
        self._save_scalars()
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in layout) else torch.float32
        *offsets, n = _offsets(layout)
        preconditioner = _native.PRECONDITIONERS[options["preconditioner"]]
        fills = _streams(options)
        flat = {key: torch.empty(n, dtype=dtype, device=device) for key in fills}
        buffers = {key: _native.Buffer(whole) for key, whole in flat.items()}
        for key, fill in fills.items():
            if not _on_gpu(device):
                buffers[key].advise_huge_pages()
            flat[key].fill_(fill)
        of_param = {key: torch.zeros(len(layout), dtype=torch.float64, device=device) for key in _numbers(options)}
        if "beta2_power" in of_param:
            of_param["beta2_power"].fill_(1.0)
        placed: dict[str, Any] = {}
        if _on_gpu(device):
            doubles = _native.workspace_doubles(n, len(layout), len(self.param_groups))
            workspace = torch.zeros(doubles, dtype=torch.float64, device=device)
            placed = {"device": f"cuda:{device.index or 0}", "workspace": _native.Buffer(workspace)}
            placed["stream"] = _native.current_stream(str(device))
        native = _native.Step(
            _DTYPES[dtype],
            n,
            buffers.get("grad_prev"),
            buffers["direction"],
            buffers.get(preconditioner.diagonal or ""),
            _native.Buffer(of_param["step"]),
            _native.Buffer(of_param["beta2_power"]) if "beta2_power" in of_param else None,
            len(self.param_groups),
            **placed,
        )
        native.set_options(**_native.native_options(options))
        fresh: list[tuple[Tensor, dict[str, Tensor]]] = []
        for slot, (p, offset) in enumerate(zip(layout, offsets, strict=True)):
            views = {key: numbers[slot] for key, numbers in of_param.items()}
            for key, whole in flat.items():
                views[key] = whole[offset : offset + p.numel()].as_strided(p.shape, p.stride(), offset)
            for key, value in self.state.get(p, {}).items():
                views[key].copy_(value)
            fresh.append((p, views))
        if any(self.state.get(p) for p in layout):
            first = self.param_groups[0]
            scalars = {key: math.nan if first[key] is None else float(first[key]) for key in _SCALARS}
            counts = of_param["step"].tolist()
            # The set of the last step: what did not move in it has an older count, what is new here has none.
            self._sets.clear()
            last = [i for i, count in zip(stateful, counts, strict=True) if params[i].numel() and count == max(counts)]
            native.scalars = {**scalars, "step": max(counts), "set": self._name_set(last)}
            native.alpha_prev = [float(group["alpha_prev"]) for group in self.param_groups]
        for p, views in fresh:
            self.state[p] = views
        self._options = dict(options)
        self._table = _Table(native=native, layout=layout, states=len(self.state), groups=len(self.param_groups))
        return native


@dataclass
class _Table:
    """What one step hands to the native side, kept while parameters and gradients stay where they are."""

    native: _native.Step | None = None
    params: list[Tensor] = field(default_factory=list)
    """every parameter of every group"""
    layout: list[Tensor] = field(default_factory=list)
    """those with state, in the order of the flat state"""
    states: int = 0
    """len(optimizer.state) when the state was laid out"""
    groups: int = 0
    """len(optimizer.param_groups) then"""
    moving: list[Tensor] = field(default_factory=list)
    """those with a gradient and at least one element: one segment each"""
    resting: list[Tensor] = field(default_factory=list)
    """those without a gradient"""
    set: float = 0.0
    """names the set of ``moving``"""
    gradients: list[Tensor] = field(default_factory=list)
    """what the native side points at, copies among them: alive until the step is over"""
    signatures: list[tuple[object, ...]] = field(default_factory=list)
    """of ``moving``; for refresh() without the exchange API"""

    def refresh(self) -> bool:
        """Follows the parameters to new gradients, the usual case between two steps. False where anything but an
        address differs from the checked table: every property that was checked is compared, never an address alone."""
        if self.native is None:
            return False
        if _EXCHANGE is not None:
            return self.native.refresh(_EXCHANGE, self.moving, self.resting, Tensor)
        grads = [p.grad for p in self.moving]
        if any(p.grad is not None for p in self.resting):
            return False
        self.gradients = [g for g in grads if type(g) is Tensor]
        try:
            rows = zip(self.moving, self.gradients, self.signatures, strict=True)
            same = all(_signature(p) == signature == _signature(g) for p, g, signature in rows)
        except (RuntimeError, ValueError):  # a sparse gradient has no strides; one is missing or of another type
            return False
        if same:
            self.native.point([p.data_ptr() for p in self.moving], [g.data_ptr() for g in self.gradients])
        return same


def _streams(options: Mapping[str, Any]) -> dict[str, float]:
    """The tensors of a parameter's state under these options, and what they hold before the first step."""
    preconditioner = _native.PRECONDITIONERS[options["preconditioner"]]
    streams = {"direction": 0.0}
    if preconditioner.keeps_gradient or _native.needs_rz_mid(options):
        streams["grad_prev"] = 0.0
    if preconditioner.diagonal is not None:
        streams[preconditioner.diagonal] = preconditioner.start
    return streams


def _numbers(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The numbers of a parameter's state, float64 on any device."""
    counts = _native.PRECONDITIONERS[options["preconditioner"]].counts_updates
    return _NUMBERS if counts else _NUMBERS[:1]


def _signature(t: Tensor) -> tuple[object, ...]:
    return t.dtype, t.device, t.shape, t.stride(), t.is_neg()


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _offsets(layout: list[Tensor]) -> list[int]:
    """Where in the flat state each parameter begins, and at last its length. On a GPU at multiples of four elements, so
    that 16-byte loads of the state and of parameters go together."""
    unit = 4 if layout and _on_gpu(layout[0].device) else 1
    return list(itertools.accumulate((-(-p.numel() // unit) * unit for p in layout), initial=0))


def _number(x: float | Tensor | None) -> tuple[int, str] | None:
    """Address and type of a number on the device; None for one that is not."""
    return (x.data_ptr(), _DTYPES[x.dtype]) if isinstance(x, Tensor) else None


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_lr(lr: object, *, capturable: bool = False) -> float | Tensor:
    """lr as a number; as it is where the step will read it on the device."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Invalid learning rate: expected one element, got a tensor of shape {tuple(lr.shape)}")
        if capturable and _on_gpu(lr.device):
            if lr.dtype not in _DTYPES:
                raise TypeError(f"lr must be a real number, got a tensor of {lr.dtype}")
            return lr
        lr = lr.item()
    return _native.check_real("lr", lr, minimum=0.0)


def _check_loss(loss: object) -> float | Tensor:
    """The loss as a number; as it is where it lies on a GPU."""
    if isinstance(loss, Tensor) and _on_gpu(loss.device) and loss.dtype in _DTYPES:
        if loss.numel() != 1:
            raise ValueError(f"loss must have one element, got shape {tuple(loss.shape)}")
        return loss.detach()
    return _native.check_loss(loss)


def _shared_options(group: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: group[key] for key in _SHARED}
    line_search = options["line_search"]
    options["line_search"] = None if line_search is None else OnlineLineSearch(*line_search)
    return options


def _check_hyper_parameters(group: Mapping[str, Any]) -> None:
    _check_lr(group["lr"], capturable=group.get("capturable", False) is True)
    _native.check_real("weight_decay", group["weight_decay"], minimum=0.0)
    line_search = group["line_search"]
    if line_search is not None and not (isinstance(line_search, tuple | list) and len(line_search) == 4):
        raise TypeError(f"line_search must be None or OnlineLineSearch(...).as_tuple() in a group, got {line_search!r}")
    _native.check_options(_shared_options(group))


def _check_shared(groups: list[dict[str, Any]]) -> None:
    for k, group in enumerate(groups[1:], start=1):
        for key in _SHARED:
            if group[key] != groups[0][key]:
                raise ValueError(
                    f"{key} is {group[key]!r} in parameter group {k} and {groups[0][key]!r} in group 0: only lr and "
                    "weight_decay may differ, because the sums run over all groups"
                )


def _check_kind(index: int, p: Tensor) -> None:
    """What can be said of a parameter before it has a gradient."""
    if p.dtype not in _DTYPES:
        raise TypeError(f"parameter {index} has dtype {p.dtype}; expected one of {', '.join(map(str, _DTYPES))}")


def _check_parameter(index: int, p: Tensor) -> None:
    _check_kind(index, p)
    what = f"parameter {index} of shape {tuple(p.shape)}, {p.dtype}, on {p.device},"
    if type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(f"{what} is a {type(p).__name__}, a tensor without storage of its own; expected a plain tensor")
    if p.layout is not torch.strided:
        raise RuntimeError(f"{what} has layout {p.layout}; expected torch.strided")
    if p.device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"{what} cannot be stepped; expected cpu or cuda")
    if _on_gpu(p.device) and _native.cuda_off():
        raise RuntimeError(f"{what} cannot be stepped; expected cpu: {_native.cuda_off()}")
    if not _is_dense(p):
        raise ValueError(f"{what} has strides {p.stride()}: expanded, overlapping or with gaps; expected dense memory")


def _check_mixture(stateful: list[int], params: list[Tensor]) -> None:
    kinds = {params[i].dtype == torch.float64 for i in stateful}
    if len(kinds) > 1:
        double = next(i for i in stateful if params[i].dtype == torch.float64)
        single = next(i for i in stateful if params[i].dtype != torch.float64)
        raise TypeError(
            f"parameter {double} is torch.float64 and parameter {single} is {params[single].dtype}: float64 cannot be "
            "mixed with other dtypes in one optimizer; use one for each"
        )


def _check_devices(stateful: list[int], params: list[Tensor]) -> None:
    for i in stateful:
        first = params[stateful[0]]
        if params[i].device != first.device:
            raise RuntimeError(
                f"parameter {i} is on {params[i].device}, parameter {stateful[0]} on {first.device}: one optimizer "
                "steps one device; use one for each"
            )


def _is_dense(p: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size != 1):
        if stride != expected:
            return p.numel() == 0
        expected *= size
    return True


def _usable_gradient(index: int, p: Tensor, g: Tensor) -> Tensor:
    """The gradient in p's memory order: g itself, or a copy."""
    what = f"gradient of parameter {index}, shape {tuple(g.shape)}, {g.dtype}, on {g.device},"
    if g.layout is not torch.strided or g.is_nested:
        raise RuntimeError(f"{what} has layout {g.layout}; sparse and nested gradients are not supported")
    if type(g).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(f"{what} is a {type(g).__name__}, a tensor without storage of its own; expected a plain tensor")
    if g.dtype != p.dtype:
        raise RuntimeError(f"{what} has another dtype than its parameter, {p.dtype}")
    if g.device != p.device:
        raise RuntimeError(f"{what} is on another device than its parameter, {p.device}")
    if g.shape != p.shape:
        raise RuntimeError(f"{what} has another shape than its parameter, {tuple(p.shape)}")
    strides = ((a, b) for a, b, size in zip(g.stride(), p.stride(), p.shape, strict=True) if size != 1)
    if g.is_neg() or any(a != b for a, b in strides):
        with torch.no_grad():
            g = torch.empty_strided(p.shape, p.stride(), dtype=g.dtype, device=g.device).copy_(g)
    return g


def _increment_version(params: list[Tensor]) -> None:
    try:
        torch.autograd.graph.increment_version(params)
    except TypeError:  # torch < 2.5 takes one tensor
        for p in params:
            torch.autograd.graph.increment_version(p)


def _check_state_dict(optimizer: NLCG, given: object) -> None:
    """Raises ValueError unless ``given`` can be loaded into ``optimizer`` whole."""
    if not isinstance(given, Mapping) or not {"state", "param_groups"} <= set(given):
        raise ValueError("not a state dict: expected a mapping with the keys 'state' and 'param_groups'")
    state, groups = given["state"], given["param_groups"]
    own = optimizer.param_groups
    if not isinstance(groups, list) or not all(isinstance(g, Mapping) and "params" in g for g in groups):
        raise ValueError("param_groups must be a list of mappings with the key 'params'")
    sizes, own_sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in own]
    if sizes != own_sizes:
        raise ValueError(f"param_groups have {sizes} parameters, expected {own_sizes}")
    if not isinstance(state, Mapping):
        raise ValueError(f"state must be a mapping, got {type(state).__name__}")
    complete = [{**optimizer.defaults, **_OPTIONS_SINCE_0_3, **group} for group in groups]
    for k, group in enumerate(complete):
        try:
            _check_hyper_parameters(group)
        except (TypeError, ValueError) as error:
            raise ValueError(f"param_groups[{k}]: {error}") from error
    _check_shared(complete)
    if state:
        for k, group in enumerate(groups):
            for key in ("alpha_prev", *(_SCALARS if k == 0 else ())):
                if key not in _SCALARS_SINCE_0_3 or key in group:
                    _check_saved_scalar(k, key, group)
    parameters = dict(zip((i for g in groups for i in g["params"]), optimizer._parameters(), strict=True))
    keys = {*_numbers(complete[0]), *_streams(complete[0])}
    for index, entry in state.items():
        if index not in parameters:
            raise ValueError(f"state has an entry for parameter {index!r}, which no group names")
        _check_saved_state(index, parameters[index], entry, keys, finite=complete[0]["nonfinite"] == "skip")


def _check_saved_scalar(k: int, key: str, group: Mapping[str, Any]) -> None:
    if key not in group:
        raise ValueError(f"param_groups[{k}] lacks the key {key!r}")
    value = group[key]
    if value is None and key == "loss_prev":
        return
    number = isinstance(value, float | int) and not isinstance(value, bool)
    if not (number and math.isfinite(value)):
        raise ValueError(f"param_groups[{k}][{key!r}] is {value!r}, expected a finite number")
    if key == "ls_scale" and not 0.0 < value <= 1.0:
        raise ValueError(f"param_groups[{k}]['ls_scale'] is {value!r}, expected 0 < ls_scale <= 1")


def _check_saved_state(index: int, p: Tensor, entry: object, keys: set[str], *, finite: bool) -> None:
    where = f"state of parameter {index}"
    if not isinstance(entry, Mapping) or set(entry) != keys:
        got = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
        raise ValueError(f"{where} has {got}, expected the keys {sorted(keys)}")
    for key, value in entry.items():
        if key == "step":
            number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            if not isinstance(number, float | int) or not (number >= 0 and float(number).is_integer()):
                raise ValueError(f"{where}: 'step' is {value!r}, expected a whole number >= 0")
            continue
        if key == "beta2_power":
            number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            if not isinstance(number, float | int) or not 0.0 <= number <= 1.0:
                raise ValueError(f"{where}: 'beta2_power' is {value!r}, expected a number in [0, 1]")
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{where}: {key!r} is {kind}, expected a floating-point tensor")
        if value.shape != p.shape:
            raise ValueError(f"{where}: {key!r} has shape {tuple(value.shape)}, expected {tuple(p.shape)}")
        if finite and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{where}: {key!r} has values that are not finite")
        if finite and key in ("hessian_diag", "exp_avg_sq") and value.numel() and bool((value < 0).any()):
            raise ValueError(f"{where}: {key!r} has negative values")
