"""The torch optimizer: checks its arguments and tensors, takes the native step, and reports what the step did."""

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
from fastnlcg.options import NAMES, Options, check_below_one, check_real
from fastnlcg.tensors import adamw_state, groups, muon_state
from fastnlcg.tensors.checks import DTYPES
from fastnlcg.tensors.dtensor import is_sharded
from fastnlcg.tensors.ranks import check_group, check_whole, shapes_of, world_size
from fastnlcg.tensors.state_dict import checked, entries_for, warn_of_changes, without
from fastnlcg.tensors.step_table import StepTable
from fastnlcg.tensors.table import parameters
from fastnlcg.warn import warn

__all__ = ["NLCG", "Diagnostics"]


_COMPARED = (*NAMES, "capturable")  # the entries of a group whose change makes a step check the group again


class NLCG(torch.optim.Optimizer):
    r"""Preconditioned nonlinear conjugate gradients as a fused native step.

    Most users only need to set ``lr`` and ``weight_decay``, and to make the groups with :func:`fastnlcg.muon_groups` if
    the network consists of matrices.

    One step computes the following; all sums run over all parameters of all groups::

        z     = -g / (h + eps)
        beta  = clamp(sum(-g z) / rz, 0, beta_max)                fletcher_reeves
                clamp((sum(-g z) - rz_mid) / rz, 0, beta_max)     polak_ribiere
                beta_max                                          heavy_ball
        d     = z + beta d
        p     = p + alpha d,  alpha = lr * ls_scale

    where rz is sum(-g z) of the step before, and the preconditioner defines h::

        "adam"    v = beta2 v + (1 - beta2) g^2,  h = sqrt(v / (1 - beta2^k)) after k updates of v
        "bfgs"    h = | h + y^2 / sum(y s) - (h s)^2 / sum(s h s) |  if both sums are > curvature_eps,
                  with y = g - g_prev, s = alpha_prev * d
        None      z = -g

    and the parameters of groups with ``preconditioner="muon"`` are matrices, which have a beta of their own, from the
    sums of ``g g`` over all of them, and move along a polar factor::

        "muon"    d = beta d - g,  u = beta d - g
                  p = (1 - alpha weight_decay) p + alpha 0.2 sqrt(max(rows, columns)) polar(u)

    =========== ============================ ============= ================== ==================
    \           state per parameter element  bytes moved   weight decay       default beta_max
    =========== ============================ ============= ================== ==================
    ``"adam"``  exp_avg_sq, direction        36            decoupled (AdamW)  0.9
    ``"bfgs"``  hessian_diag, grad_prev,     56            L2                 1 (the paper)
                direction
    None        grad_prev, direction         28            L2                 1 (the paper)
    ``"muon"``  direction                    52, products  decoupled          0.95
    =========== ============================ ============= ================== ==================

    ``"adam"`` keeps grad_prev too if ``update="polak_ribiere"`` needs it. State is float32 (float64 for float64
    parameters, bfloat16 with ``state_dtype=torch.bfloat16``); bytes are those of float32 parameters and state. It is
    allocated when a parameter first has a gradient, as separate tensors, which may be moved, shared, off-loaded or
    replaced between steps: the next step takes what ``state[p]`` then contains. ``state[p]["step"]`` counts the steps
    that moved ``p``.

    ``polar(u)`` is five steps of Muon's Newton-Schulz iteration: torch's products, of batches of matrices of one shape,
    in bfloat16 on a GPU and on processors that multiply in it, else in the state's dtype. Their workspace is kept
    between steps. If a product fails (out of memory), or an exchange of matrices between ranks, everything but the
    matrices of that batch and of later ones has moved.

    Parameters without a gradient take no part in a step. When their set changes, that step has beta = 0 and keeps the
    BFGS h. Weights may be edited between steps (clipping, averaging, loading): the next curvature pair then does not
    describe the edit, and the clamp on beta and the curvature condition keep that harmless. A gradient with other
    strides than its parameter is copied first, and a parameter with gaps in memory is stepped in a copy; everything
    else is read and written in place. A step leaves ``p.grad`` unchanged. A step without any gradient does nothing.

    On a GPU a step is enqueued on torch's current stream. It does not synchronize or allocate, and only the device
    knows whether it was skipped. The first step, and the first with a new parameter, allocate state and cannot be
    captured into a CUDA graph. :meth:`diagnostics` waits for the device; :meth:`state_dict` does not. CPU and GPU
    evaluate the same formulas but sum in different orders, so their trajectories agree up to rounding, not bit for bit.

    Parameters may be spread over ranks: as DTensors (FSDP2, HSDP, tensor parallel), or as plain shards with
    ``process_group`` (FSDP1, ZeroRedundancyOptimizer). All sums then run over all ranks, in one exchange of 104 bytes
    per rank and step (two with ``"bfgs"``; one more in a step that clips, and on a GPU in every step with
    ``max_grad_norm`` or ``skip_grad_norm``), and every rank takes the same decisions: all ranks must call :meth:`step`,
    and :meth:`diagnostics`, which sums too. If ranks are about to take different steps (one of them has loaded a
    checkpoint, or has another lr), all of them raise, and nothing changes. Under DDP gradients are equal on all ranks
    and nothing is exchanged.

    One thread steps at a time; a second one gets a RuntimeError. Exceptions, a failed exchange of sums and skipped
    steps leave parameters and state unchanged; the step is completed before an interrupt is raised, unless ranks
    exchange matrices at that moment. In a graph of ``torch.compile`` a step without a closure is one operator.

    Args:
        params: parameters, named or not, or groups. Groups may have their own ``lr``, ``weight_decay`` and
            ``maximize``; everything else is shared, but some groups may have ``preconditioner="muon"``, with a
            ``beta_max`` of their own, and the others ``"adam"``: :func:`fastnlcg.muon_groups` makes such groups. Three
            more entries of a ``"muon"`` group say what its matrices are: ``stacked=True``, the last two dimensions of
            each parameter (experts) instead of the first and all others (convolutions); ``split=3`` or
            ``split=(4096, 1024, 1024)``, parts of fused projections, in rows; and ``adjust_lr_fn="original"``, a step
            of ``sqrt(max(1, rows / columns))`` as in torch.optim.Muon's default.
        lr: learning rate, a float or one-element tensor >= 0, which schedulers may change. With ``"adam"`` the best
            peak is a third to a tenth of AdamW's (a step is 1 / (1 - beta) times as long): 3e-3 to 1e-2 in the study,
            at every batch size; the default is cautious. The other preconditioners take the rates of SGD; the paper's
            peak is 0.1 * batch / 256.
        update: ``"fletcher_reeves"`` or ``"polak_ribiere"`` (Algorithm 1; not with ``"muon"``), or ``"heavy_ball"``, a
            constant beta: then ``preconditioner=None`` is SGD with momentum, and ``"muon"`` is torch.optim.Muon as long
            as the same parameters have gradients. When that set changes, NLCG takes one step with beta = 0, whereas
            Muon keeps each parameter's momentum.
        preconditioner: ``"adam"``, the recommended one; ``"bfgs"``, the paper's diagonal of Algorithm 2, for large
            batches only: at small ones the noise in y inflates h until the steps vanish; None, plain NLCG; or
            ``"muon"``, for matrices alone, which takes Muon's learning rates: 0.1 was best in the study.
        line_search: an :class:`OnlineLineSearch` to scale lr by the loss (section 3.2.2), which then comes from the
            closure, from ``step(loss=...)``, or from :meth:`set_loss`.
        weight_decay: >= 0. With ``"adam"`` and ``"muon"`` it is decoupled: the step first multiplies p by
            ``1 - alpha * weight_decay``. Otherwise it is L2: the step uses the gradient ``g + weight_decay * p``.
        eps: added to h in every division by h, >= 0; > 0 with ``"adam"``. With ``"bfgs"`` and 0 a step with a curvature
            update moves 4 more bytes per parameter.
        curvature_eps: bound of the curvature condition of ``"bfgs"``, >= 0.
        beta2: the decay of ``"adam"``'s v, in [0, 1).
        beta_max: upper bound of beta, in [0, 1]; None: the preconditioner's default.
        nonfinite: ``"skip"``: a step whose sums are not all finite changes only a counter, and so does one whose
            gradient is finite but too large for the float32 state (with ``"adam"`` above 1.8e19). ``"propagate"``:
            NaN and Inf reach the parameters, as in torch's own optimizers.
        max_grad_norm: clip the gradient to this norm, as ``torch.nn.utils.clip_grad_norm_`` before the step would: over
            all groups and ranks, after AMP's unscaling, before weight decay; ``p.grad`` is unchanged. The first pass
            forms the norm together with its own sums, and is repeated if the gradient has to be clipped: that costs 4
            to 8 bytes per parameter in such steps, compared with 12 for ``clip_grad_norm_``. > 0; inf: the norm is
            measured, but nothing is clipped. None: the norm is not measured either.
        skip_grad_norm: skip a step whose gradient has a larger norm than this (a spike), and count it. > 0; None: off.
        maximize: maximize the objective; the line search's comparison is reversed too.
        stochastic_rounding: for bfloat16 parameters: round up with a probability equal to the fraction cut off, so that
            updates below a parameter's resolution are kept on average instead of lost. The random bits depend on the
            step, the parameter's index and the element's place in the whole parameter, so replicas and resumed runs
            agree.
        state_dtype: ``torch.bfloat16``, with ``"adam"`` and ``"muon"``: keep the state in bfloat16, half of its bytes,
            and evaluate all formulas in float32. State is rounded as ``stochastic_rounding`` rounds parameters; those
            may be of any dtype but float64. In a group and in checkpoints it is the string ``"bfloat16"``; if it
            changes, the next step converts the state. None: float32, and float64 for float64 parameters.
        average_loss: average the line search's loss over all ranks, which data-parallel training needs: replicas whose
            line searches see different losses drift apart. One exchange of 104 bytes per rank and step. If parameters
            are spread over ranks, the loss is always averaged, at no extra cost. None: it is averaged only then, and
            there is a warning if there are other ranks.
        process_group: the process group whose ranks hold the shards of plain parameters.
        matrix_group: for ``"muon"`` under DDP: a process group of ranks with equal parameters, each of which forms the
            polar factors of its share of the matrices. The ranks must take the same steps, which one exchange of 104
            bytes per rank and step checks; it also averages the line search's loss. None: every rank forms all of
            them. Matrices that are DTensors are always shared. Not together with ``process_group``.
        capturable: for CUDA parameters: allows capturing a step into a ``torch.cuda.CUDAGraph``; lr may then be a
            tensor on the device (a step is skipped if it is negative or not finite), and a GradScaler leaves unscaling
            and the decision to skip to the step, without waiting.
        foreach, fused: accepted for compatibility; the step is always fused.
        differentiable: not supported; False.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or has a wrong value, before anything is changed.

    Example::

        optimizer = fastnlcg.NLCG(model.parameters(), lr=3e-3, weight_decay=0.1)
        schedule = fastnlcg.warmup_cosine(optimizer, total_steps=len(loader) * epochs)
        for _ in range(epochs):
            for inputs, targets in loader:
                optimizer.zero_grad()
                loss = loss_function(model(inputs), targets)
                loss.backward()
                optimizer.step()
                schedule.step()

    Source: Adya et al., arXiv:1812.02886, Algorithms 1 and 2. The absolute value in h and the defaults of the two eps
    are those of the authors' TensorFlow code; ``"adam"`` (its diagonal: Kingma & Ba, arXiv:1412.6980), ``beta_max``,
    ``heavy_ball`` and ``nonfinite`` are additions. ``"muon"``: Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon, with a conjugate beta in place of its momentum.
    """

    _stepping = False
    _constructing = False
    _checked: list[Any]
    _skips: set[bool]  # the reasons for skipped steps that have been warned of; see warn_of_skip

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        *,
        update: Literal["fletcher_reeves", "polak_ribiere", "heavy_ball"] = "fletcher_reeves",
        preconditioner: Literal["adam", "bfgs", "muon"] | None = "adam",
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
        state_dtype: torch.dtype | None = None,
        average_loss: bool | None = None,
        process_group: Any = None,
        matrix_group: Any = None,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        if not isinstance(average_loss, bool | None):
            raise TypeError(f"average_loss must be None or a bool, got {average_loss!r}")
        if process_group is not None:
            check_group("process_group", process_group)
        if matrix_group is not None:
            check_group("matrix_group", matrix_group)
            if process_group is not None:
                raise ValueError(
                    "matrix_group is for ranks with equal parameters, process_group for ranks with different ones; "
                    "expected one of them"
                )
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
            state_dtype=state_dtype,  # type: ignore[arg-type]
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
        self._matrix_group = matrix_group
        self._shapes: list[dict[int, Any]] = []
        self._n_params = 0
        self._reset_caches()
        self._constructing = True
        super().__init__(params, defaults)
        self._constructing = False
        self._step_supports_amp_scaling = capturable
        if weight_decay and all(group["weight_decay"] != weight_decay for group in self.param_groups):
            warn(f"weight_decay={weight_decay!r} has no effect: every parameter group has one of its own")

    # ---- groups --------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch's optimizers do. New parameters start with d = 0 and h = 1 (v = 0 with ``"adam"``);
        the next step counts as one with a changed set of parameters. Options that the groups share default to theirs,
        which a file may have brought; the others to the constructor's. Raises as the constructor does."""
        if self.param_groups and not self._constructing and isinstance(param_group, dict):
            groups.take_over(param_group, self.param_groups, self.defaults["preconditioner"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            groups.check(group)
            options = Options.of_group(group)
            for index, p in enumerate(group["params"], start=self._n_params):
                if p.requires_grad and p.dtype not in DTYPES:
                    raise TypeError(
                        f"parameter {index} has dtype {p.dtype}; expected one of {', '.join(map(str, DTYPES))}, "
                        "unless it is frozen"
                    )
                groups.check_matrices(index, p, options)
            groups.check_together(self.param_groups, len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            raise
        group.setdefault("scalars", self.param_groups[0].get("scalars"))
        groups.complete(self.param_groups[-1:], {})
        self._n_params += len(group["params"])
        self._shapes.append(shapes_of(group))

    def _check_groups(self) -> tuple[Options, list[float | Tensor], list[float], list[bool]]:
        """The shared options; lr, weight_decay and maximize per group. Everything that has changed is checked."""
        param_groups = self.param_groups
        if not param_groups:
            raise RuntimeError("param_groups is empty: there are no parameter groups to step")
        if self._shapes:
            check_whole(param_groups, self._shapes, over_ranks=self._process_group is not None)
        lr: list[float | Tensor] = []
        for group in param_groups:
            groups.plain_values(group)
            lr.append(groups.check_lr(group["lr"], capturable=group["capturable"]))
        weight_decay = [check_real("weight_decay", group["weight_decay"], minimum=0.0) for group in param_groups]
        maximize = [group["maximize"] for group in param_groups]
        current = [*maximize, *(group[key] for group in param_groups for key in _COMPARED)]
        if current != self._checked:
            for group in param_groups:
                groups.check(group)
            groups.check_together(param_groups)
            self._table.set_options(param_groups)
            self._checked = current
        options = self._table.options
        assert options is not None
        return options, lr, weight_decay, maximize

    def _capturable(self) -> bool:
        """Whether a step may be captured. torch.compile sets the entry of groups that a graph changes, of some groups
        only, and on the CPU too: there it counts if the constructor was given it."""
        if not any(group["capturable"] is True for group in self.param_groups):
            return False
        first = (p for group in self.param_groups for p in group["params"][:1])
        return self.defaults["capturable"] or any(_native.on_gpu(p.device) for p in first)

    # ---- the step ------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None, *, loss: float | Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, loss: float | Tensor | None = None) -> float: ...

    def step(self, closure: Callable[[], float] | None = None, *, loss: float | Tensor | None = None) -> float | None:
        """Takes one step.

        Args:
            closure: evaluates the model and returns the loss; called once, with gradients enabled. Its value is
                returned, and is the loss for the line search.
            loss: the loss at the current parameters, for the line search, if there is no closure. A number or a
                one-element tensor. None or a value that is not finite leaves the line-search scale unchanged.

        Returns:
            What the closure returned; None without one.

        Raises:
            TypeError, ValueError: for a wrong loss, hyperparameter, parameter or gradient, named by index; nothing has
                changed then.
            RuntimeError: if a gradient is sparse, on another device or of another dtype; if there are fewer groups than
                before (an optimizer that is handed one group at a time cannot form global sums); or if another thread
                is stepping. If ranks exchange sums, also what torch.distributed raises.
        """
        if closure is None and torch.compiler.is_dynamo_compiling() and not self._has_sharded():
            compiled.traced(self, self._number, loss)
            return None
        return self._step(closure, loss)

    # torch's schedulers wrap a step without this mark, to set _opt_called, and torch.compile cannot trace the wrapper.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    @_disable_dynamo  # native code and addresses
    def _step(self, closure: Callable[[], float] | None, loss: float | Tensor | None) -> float | None:
        if closure is not None and not callable(closure):
            raise TypeError(f"closure must be callable, got {type(closure).__name__}; did you mean step(loss=...)?")
        if closure is not None and loss is not None:
            raise ValueError("give a closure or loss=, not both: step() got both, and the closure returns the loss")
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        if self._stepping:
            raise RuntimeError("this optimizer is stepping in another thread")
        with self._lock:  # waits for diagnostics() or a load in another thread
            self._stepping = True
            self._opt_called = True  # read by schedulers, which warn if they step before the optimizer
            try:
                options, lr, weight_decay, maximize = self._check_groups()
                table = self._table
                if closure is None and loss is None and table.makes_state_only(self.param_groups, self.state, lr):
                    return None
                checked_loss: float | Tensor = math.nan
                if options.line_search is not None:
                    given = loss if closure is None else value
                    checked_loss = self._losses.take(given, one_of_many=self._one_of_many())
                moved = table.step(
                    self.param_groups,
                    self.state,
                    lr,
                    weight_decay,
                    maximize,
                    checked_loss,
                    capturable=self._capturable(),
                    # set by GradScaler if _step_supports_amp_scaling
                    amp=(getattr(self, "grad_scale", None), getattr(self, "found_inf", None)),
                )
                if table.ranks is not None:
                    table.watch()
                if not moved:
                    norm = groups.named_scalars(self.param_groups[0])["grad_norm"]
                    warn_of_skip(self._skips, norm, options.skip_grad_norm)
                self._losses.next = None
                table.warn_of_set()
            except BaseException:
                # GradScaler sets these for one call and removes them after it, unless the call raises. It multiplies
                # what is already set, so the next step would divide by the scale squared.
                for name in ("grad_scale", "found_inf"):
                    self.__dict__.pop(name, None)
                raise
            finally:
                self._stepping = False
        return value

    @_disable_dynamo  # a compiled step in the same graph would not see what this one sets
    def set_loss(self, loss: float | Tensor) -> None:
        """Sets the loss of the next step, for the line search, if a trainer calls ``step()`` without one. A closure's
        value or ``loss=`` takes precedence.

        Raises:
            TypeError, ValueError: unless ``loss`` is a real number or a one-element tensor.
        """
        check_loss(loss)
        self._losses.next = loss

    def _one_of_many(self) -> bool:
        """Whether other ranks have losses of their own, and the user has not chosen ``average_loss``."""
        groups_of_ranks = self._process_group, self._matrix_group
        if self.average_loss is not None or any(g is not None for g in groups_of_ranks) or world_size() == 1:
            return False
        return not self._has_sharded()

    def _has_sharded(self) -> bool:
        return any(map(is_sharded, parameters(self.param_groups)))

    # ---- what it did ---------------------------------------------------------------------------------------------

    @property
    def last_grad_norm(self) -> Tensor:
        """The norm of the last step's gradient before clipping, a float64 tensor of no dimension on the parameters'
        device: for loggers, without waiting for a GPU. A skipped step counts as the last step. 0 before the first step.

        Raises:
            RuntimeError: without ``max_grad_norm`` or ``skip_grad_norm``, because then a step does not form the norm.
        """
        if not Options.of_group(self.param_groups[0]).measures_norm:
            raise RuntimeError(
                "last_grad_norm needs max_grad_norm= or skip_grad_norm=, and both are None; max_grad_norm=inf measures "
                "the norm and clips nothing"
            )
        groups.complete(self.param_groups, {})
        self._table.join_stream()
        scalars: Tensor = self.param_groups[0]["scalars"]
        return scalars[list(_native.SCALARS).index("grad_norm")].clone()

    def diagnostics(self) -> Diagnostics:
        """What the last step did. The norms are computed by this call, in one pass over the state. Waits for a step
        that is under way in another thread or on a GPU. If parameters are spread over ranks, all ranks have to call it;
        after a load with ``"adam"``, the gradient's norm is then NaN until the next step.

        Raises:
            RuntimeError: inside a step of the same thread; or on all ranks, if they have taken different steps.
        """
        with self._lock:
            if self._stepping:  # this thread has the lock: a signal handler, or a hook of the exchange
                raise RuntimeError("diagnostics() was called inside a step of the same thread")
            table = self._table
            if table.options is None:
                table.set_options(self.param_groups)
            return diagnostics.read(table, self.param_groups, self.state)

    def __repr__(self) -> str:
        text: str = super().__repr__()
        return re.sub(r"\n    (scalars|alpha_prev): .*(\n {8}.*)*", "", text)  # tensors, on lines of their own

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A state dict in torch's form: its tensors are references, everything else is plain numbers, so
        ``torch.load(weights_only=True)`` can read it. Resuming from it is bit-exact. The scalars that the method keeps
        in addition to the state of parameters are in every group: ``"scalars"``, one tensor shared by all groups, and
        ``"alpha_prev"``. On a GPU, work on torch's current stream waits for the last step."""
        for group in self.param_groups:
            groups.plain_values(group)
        self._table.join_stream()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, as torch's optimizers do: copies, and converts to the state's dtype and to the placements
        of DTensor parameters. If both sides have ``param_names``, their order is checked. Entries that other code has
        put into a parameter's state are kept.

        The file's options replace this optimizer's, ``preconditioner`` and ``state_dtype`` too; if these two change,
        there is a warning. If you want bfloat16 state after loading a file without it, set ``group["state_dtype"]`` to
        ``"bfloat16"`` in all groups: the next step converts the state. Options that a file of an earlier version lacks
        are those given to the constructor.

        Raises:
            ValueError: for anything but a state dict of an NLCG over parameters of the same number and shapes, naming
                key and parameter; the optimizer is unchanged then.
        """
        entries: dict[Tensor, dict[str, Any]] = {}

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            whole = checked(self, given)
            entries.update(entries_for(self, whole))
            warn_of_changes(self.param_groups, whole["param_groups"])  # if that raises, nothing has changed
            # Without what is written below, which torch would copy and cast first.
            return {**whole, "state": without(whole, self.param_groups, entries)}

        def write(_: torch.optim.Optimizer) -> None:
            for p, entry in entries.items():
                self.state[p] = {**self.state.get(p, {}), **entry}

        with self._lock:
            if self._stepping:
                raise RuntimeError("load_state_dict() was called inside a step of the same thread")
            # The last of the pre-hooks: it sees the result of the user's own hooks, before torch changes anything. The
            # first of the post-hooks: the user's own see the state as it is.
            handles = (
                self.register_load_state_dict_pre_hook(check),
                self.register_load_state_dict_post_hook(write, prepend=True),
            )
            try:
                super().load_state_dict(state_dict)
            finally:
                for handle in handles:
                    handle.remove()

    def load_adamw_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues a run of ``torch.optim.AdamW`` (or Adam without weight decay) over the same parameters. v and the
        step counts are taken as they are; the direction is ``-exp_avg / ((1 - beta1) (h + eps))``. In the groups,
        ``lr`` becomes ``(1 - beta1) lr`` and ``weight_decay`` becomes ``weight_decay / (1 - beta1)``, which makes the
        same moves; the rates that a scheduler keeps there (``initial_lr``, ``max_lr``, ``min_lr``) are converted as
        ``lr`` is; eps, beta2 and maximize come from the file, all other options from this optimizer. With
        ``update="heavy_ball", beta_max=beta1`` the steps are AdamW's up to changes of h. A scheduler's own state dict
        still has AdamW's rates; if the file was written under a scheduler, a warning explains what to set. If both
        sides have parameter names, they must be in the same order.

        Args:
            state_dict: what ``torch.optim.AdamW.state_dict()`` returned.

        Raises:
            ValueError: for another optimizer's state dict, amsgrad, L2 weight decay, or another preconditioner than
                ``"adam"``; the optimizer is unchanged then.
        """
        self.load_state_dict(adamw_state.from_adamw(self.param_groups, self._process_group, state_dict))
        adamw_state.warn_of_scheduler(state_dict)

    def adamw_state_dict(self, beta1: float = 0.9) -> dict[str, Any]:
        """The inverse of :meth:`load_adamw_state_dict`: a state dict for ``torch.optim.AdamW`` over the same
        parameters, with ``exp_avg = -(1 - beta1) (h + eps) d``, and with rates and weight decay converted back. A
        scheduler's own state dict still has NLCG's rates: replace its ``base_lrs`` by the ``initial_lr`` of AdamW's
        groups.

        Args:
            beta1: AdamW's, in [0, 1).

        Raises:
            TypeError, ValueError: for a beta1 outside [0, 1), or another preconditioner than ``"adam"``.
        """
        return adamw_state.to_adamw(self.state_dict(), self.defaults, check_below_one("beta1", beta1))

    def load_muon_state_dict(self, muon: Mapping[str, Any], adamw: Mapping[str, Any] | None = None) -> None:
        """Continues a run of ``torch.optim.Muon``, with ``torch.optim.AdamW`` for the other parameters. The direction
        of a matrix is ``-momentum_buffer / (1 - momentum)``; lr, weight decay and ``adjust_lr_fn`` are taken as they
        are. The other groups are converted as by :meth:`load_adamw_state_dict`; eps and beta2 of AdamW's file become
        those of all groups. All other options, ``stacked`` and ``split`` among them, are this optimizer's. With
        ``update="heavy_ball"`` and the momentum as the matrices' beta_max the steps are Muon's while the same
        parameters have gradients. With ``"fletcher_reeves"`` the first beta of the matrices is beta_max, whatever
        the gradient, because Muon does not keep the last one.

        Args:
            muon: what ``torch.optim.Muon.state_dict()`` returned, over the parameters of the ``"muon"`` groups, in the
                same groups and order; or in one group, which is divided by the names if both sides have them, else in
                the order of these groups. A convolution may be (out, the rest).
            adamw: that of AdamW over the parameters of the other groups; None if there are none.

        Raises:
            ValueError: for other state dicts; for options without a counterpart (``nesterov=False``, another eps than
                Muon's default, other coefficients or numbers of Newton-Schulz steps, and ``maximize=True`` of this
                optimizer's groups of matrices); and for one group without names, if parameters of one shape are in
                several groups here, because their order may differ. The optimizer is unchanged then.
        """
        self.load_state_dict(muon_state.from_muon(self.param_groups, self._process_group, muon, adamw))
        if adamw is not None:
            adamw_state.warn_of_scheduler(adamw)

    def muon_state_dict(self, momentum: float = 0.95, beta1: float = 0.9) -> tuple[dict[str, Any], dict[str, Any]]:
        """The inverse of :meth:`load_muon_state_dict`: state dicts for ``torch.optim.Muon`` over the matrices, and for
        ``torch.optim.AdamW`` over the other parameters, both in the order of the groups. Muon takes two dimensions:
        the buffer of a convolution is (out, the rest).

        Args:
            momentum: Muon's, in [0, 1).
            beta1: AdamW's, in [0, 1).

        Raises:
            TypeError, ValueError: for a number outside [0, 1), or groups of matrices with ``maximize``, ``stacked`` or
                ``split``, which Muon lacks. If Muon is to take such parameters whole, set the group's ``split`` to None
                first.
        """
        return muon_state.to_muon(
            self.state_dict(), self.defaults, check_below_one("momentum", momentum), check_below_one("beta1", beta1)
        )

    def __getstate__(self) -> dict[str, Any]:
        for name, group in (("process_group", self._process_group), ("matrix_group", self._matrix_group)):
            if group is not None:
                raise TypeError(f"an NLCG with {name}= cannot be pickled or copied; use its state_dict()")
        state: dict[str, Any] = super().__getstate__()
        return {**state, "average_loss": self.average_loss}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("average_loss", None)
        self.__dict__.setdefault("_process_group", None)
        self.__dict__.setdefault("_matrix_group", None)
        groups.complete(self.param_groups, self.defaults)
        self._shapes = list(map(shapes_of, self.param_groups))
        self._n_params = sum(len(group["params"]) for group in self.param_groups)
        self._step_supports_amp_scaling = self.defaults.get("capturable", False)
        self._reset_caches()

    def _reset_caches(self) -> None:
        """Drops everything that can be rebuilt from ``state`` and ``param_groups``."""
        if "_lock" not in self.__dict__:  # __setstate__ in load_state_dict must keep the lock that it has taken
            self._lock = threading.RLock()
            self._number = compiled.number_of(self)
        _LIVE.add(self)
        self._table = StepTable(self._process_group, self.average_loss, self._matrix_group)
        self._checked = []
        self._losses = Losses()
        self._skips = set()


# A child that is forked while another thread steps does not have that thread, and must not wait for it.
_LIVE: weakref.WeakSet[NLCG] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for optimizer in list(_LIVE):
        optimizer._lock, optimizer._stepping = threading.RLock(), False


os.register_at_fork(after_in_child=_after_fork_in_child)
