"""The table of an NLCG step: the parameters with a gradient, the inputs of the native step, and what it reports."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastnlcg import _native
from fastnlcg.options import Options, native_options
from fastnlcg.tensors import groups
from fastnlcg.tensors.checks import DTYPES, usable_gradient
from fastnlcg.tensors.dtensor import is_sharded, memory, place_of
from fastnlcg.tensors.matrices import Matrices, Shape, key_of, shape_of
from fastnlcg.tensors.ranks import Ranks, find_ranks
from fastnlcg.tensors.state import arithmetic_dtype, local_arrays, missing_arrays
from fastnlcg.tensors.table import (
    Groups,
    ParameterTable,
    State,
    check_parameters,
    expected_state,
    in_order,
    in_place,
    parameters,
    write_state,
)
from fastnlcg.warn import warn


@dataclass(frozen=True)
class Built:
    """What the table was made of. The next step compares it with what it finds, and uses the table again if nothing
    differs."""

    params: list[Tensor] = field(default_factory=list)
    """every parameter of every group"""
    groups: Groups = field(default_factory=list)
    group_params: list[list[Tensor]] = field(default_factory=list)
    options_of: dict[int, Options] = field(default_factory=dict)
    """by the id of the parameter"""
    active: list[int] = field(default_factory=list)
    """those with a gradient and at least one element: one segment each, in the order of the flat index"""
    active_set: float = 0.0
    """names the set of ``active``"""
    active_params: list[Tensor] = field(default_factory=list)
    order: dict[int, str] = field(default_factory=dict)
    """see :meth:`StepTable._order_of`"""
    everything: list[Tensor] = field(default_factory=list)
    """those with state and at least one element"""
    inactive: list[Tensor] = field(default_factory=list)
    """those without a gradient"""
    entries: list[dict[str, Tensor]] = field(default_factory=list)
    """the state of ``active``"""
    expected_state: list[Any] = field(default_factory=list)
    """see :func:`fastnlcg.tensors.table.expected_state`"""


_WINDOW = 50  # steps


class StepTable(ParameterTable):
    """The table of one NLCG's last step."""

    def __init__(self, process_group: Any, average_loss: bool | None, matrix_group: Any = None) -> None:
        super().__init__()
        self.process_group, self.average_loss, self.matrix_group = process_group, average_loss, matrix_group
        self.options: Options | None = None
        """the options of the groups that are not "muon"; those of the first if all are"""
        self.of_groups: list[Options] = []
        """the options of every group"""
        self.matrices: Matrices | None = None
        """those of the groups that are "muon", if there are any"""
        self.built = Built()
        self.plain = True
        """whether all of ``active``, and their gradients, are plain tensors that are used in place"""
        self.current = False
        """whether the table is that of a step, and may be used again"""
        self._at: Any = None
        self._ranks_known = self._sums_known = False
        self._amp: list[Tensor | None] = []
        self._raised: float | None = None  # disagreements of ranks that were reported, or were in the file
        self._disagreements: Tensor | None = None  # found by the device, in pinned memory
        self._set_changes = 0  # a bit for each of the last steps: whether others had taken part in the one before
        self._warned_of_set = False
        self._begun = False  # a step was taken, or the state made for one
        self._last_set: tuple[float, list[Tensor]] | None = None  # of the last step with gradients: name and members

    def set_options(self, param_groups: Groups) -> None:
        """Options of every group that may have changed since the last step. ValueError if a parameter needs another
        state than it has."""
        of_groups = [Options.of_group(group) for group in param_groups]
        options = next((o for o in of_groups if not o.kind.of_matrices), of_groups[0])
        if self.options is not None and self.native is not None:
            for new, old in self._changes(param_groups, of_groups):
                if new.preconditioner != old.preconditioner:
                    raise ValueError("preconditioner cannot change once there is state; make a new optimizer")
                if new.state_arrays() != old.state_arrays():
                    raise ValueError(
                        "update cannot change to one that needs other state (grad_prev) once there is some; make a new "
                        "optimizer"
                    )
            if (options.line_search is None) != (self.options.line_search is None):
                self.current, self._ranks_known = False, False  # other ranks may have a say in the loss
            rounding, last = ((o.state_dtype, o.stochastic_rounding) for o in (options, self.options))
            if any(o.kind.of_matrices for o in (*of_groups, *self.of_groups)) and of_groups != self.of_groups:
                self.current = False  # the matrices of a parameter may be others
            elif rounding != last:
                self.current = False  # the state has another dtype, or random bits need the places of shards
            else:
                self.native.set_options(native_options(of_groups))
        self.options, self.of_groups = options, of_groups
        self._agree()

    def _agree(self) -> None:
        """Tells the native table what all ranks must have alike, besides what it knows: the options of each group, the
        order of the parameters, and which matrices they share."""
        if self.native is not None and self.ranks is not None:
            self.native.agreed = _number_of((self.of_groups, self.built.order, self._shared_matrices()))

    def _order_of(self, param_groups: Groups, ranks: Ranks | None, shapes: Mapping[int, Shape]) -> dict[int, str]:
        """Names and shapes of the parameters that must have the same place on all ranks."""
        if ranks is None or self.process_group is not None:
            return {}
        names = [name for g in param_groups for name in g.get("param_names") or [""] * len(g["params"])]
        return {
            i: f"{name} {tuple(p.shape)}".strip()
            for i, (name, p) in enumerate(zip(names, parameters(param_groups), strict=True))
            if is_sharded(p) or (self.matrix_group is not None and i in shapes)
        }

    def _shared_matrices(self) -> tuple[int, ...]:
        return () if self.matrices is None else self.matrices.shared()

    def _changes(self, param_groups: Groups, of_groups: list[Options]) -> Iterator[tuple[Options, Options]]:
        """The present options of the table's parameters, and those that the table was made with. Groups may have been
        reordered, deleted and added since then."""
        for group, new in zip(param_groups, of_groups, strict=True):
            found = (self.built.options_of.get(id(p)) for p in group["params"])
            yield from ((new, old) for old in {id(old): old for old in found if old is not None}.values())

    # ---- the step ------------------------------------------------------------------------------------------------

    def step(
        self,
        param_groups: Groups,
        state: State,
        lr: list[float | Tensor],
        weight_decay: list[float],
        maximize: list[bool],
        loss: float | Tensor,
        *,
        capturable: bool,
        amp: tuple[float | Tensor | None, float | Tensor | None],
    ) -> bool:
        """Takes one step. False if it was skipped."""
        for attempt in range(2):
            if attempt or not self._fits(param_groups):
                self._rebuild(param_groups, state)
            native, ranks = self.native, self.ranks
            if native is None or not (self.built.active or ranks is not None):
                return True
            on_gpu = _native.on_gpu(self.device)
            if capturable and not on_gpu:
                raise RuntimeError("capturable=True needs CUDA parameters; these are on the CPU")
            if on_gpu and ranks is not None and not _native.capturing():
                self._raise_disagreement()
            at = self._tensors(param_groups, state)
            # Before the step: an interrupt in between must not leave a move that autograd has not heard of.
            torch.autograd.graph.increment_version(self.built.active_params)
            complete = self._complete if self.copies or self.matrices is not None else None
            try:
                if on_gpu:
                    moved = self._on_gpu(native, at, lr, weight_decay, maximize, loss, capturable, amp, complete)
                else:
                    rates = [float(rate) for rate in lr]
                    numbers = rates, weight_decay, maximize, self.built.active_set, float(loss), _native.num_threads()
                    moved = native.step(at, *numbers, complete=complete)
            except _native.RanksDisagree:
                self.explain("step()", param_groups)
            if moved is None:
                continue
            if not self._begun and self.process_group is not None and not on_gpu:
                self._warn_of_replicas()
            self._begun = True
            self.copies = []
            if moved and self.built.active:
                self._remember_set()
            return moved
        raise RuntimeError("a parameter, a gradient or a tensor of the state was changed while the step began")

    def _remember_set(self) -> None:
        """Of the parameters that took part in a step that was not skipped."""
        params, last = self.built.active_params, () if self._last_set is None else self._last_set[1]
        changed = params is not last and not _native.same_objects(params, list(last))
        self._set_changes = (self._set_changes << 1 | changed) % (1 << _WINDOW)
        self._last_set = self.built.active_set, params

    def warn_of_set(self) -> None:
        """Warns once if most steps have beta = 0 because gradients come and go."""
        changes = self._set_changes.bit_count()
        if changes > _WINDOW // 2 and not self._warned_of_set:
            self._warned_of_set = True
            warn(
                f"in {changes} of at most {_WINDOW} steps other parameters had gradients than in the step before, and "
                "beta is 0 in each such step; if experts or branches have gradients in some steps only, set theirs to "
                "zeros in the others"
            )

    def _warn_of_replicas(self) -> None:
        """Ranks whose sums are the same, to the bit, have the same gradients: there is nothing to add up."""
        assert self.ranks is not None
        rows = self.ranks.rows.view(len(self.ranks.owned), -1)[:, : _native.row_sums].tolist()
        if len(rows) > 1 and any(rows[0]) and all(row == rows[0] for row in rows):
            warn(
                "all ranks of process_group= have the same gradients: it is for plain shards (FSDP1, ZeRO), and adds "
                f"the ranks' sums, so the gradient's norm is sqrt({len(rows)}) times too large. Under DDP leave it out"
            )

    def _complete(self) -> None:
        """What follows a step of the native table, unless it was skipped. The table calls it again if it is
        interrupted."""
        try:
            if self.matrices is not None and self.native is not None and self.native.matrices_pending:
                self.matrices.finish(self.native, _native.num_threads())
        finally:
            self.write_back()

    def makes_state_only(self, param_groups: Groups, state: State, lr: list[float | Tensor]) -> bool:
        """Whether this is the step by which torch.distributed.checkpoint makes the state that it reads or loads into:
        the first, with rates of 0 and gradients of zero. The state is then made, and nothing is counted."""
        if self._begun or (any(isinstance(rate, Tensor) for rate in lr) and _native.capturing()):
            return False
        params = parameters(param_groups)
        if any(float(rate) != 0.0 for rate in lr) or any("direction" in (state.get(p) or ()) for p in params):
            return False
        groups.complete(param_groups, {})
        if groups.named_scalars(param_groups[0])["step"] != 0.0:
            return False  # a rank without any parameter has no state
        self._rebuild(param_groups, state)
        gradients = [memory(p.grad) for p in params if p.grad is not None]
        rows = [[float(bool(gradients)), float(any(bool(g.any()) for g in gradients))]]
        if self.ranks is not None and self.ranks.every_decision:
            try:
                rows = self.ranks.exchange(rows[0], 0.0, "make_state", 0.0)
            except _native.RanksDisagree:
                self.explain("step()", param_groups)
        self._begun = any(some for some, _ in rows) and not any(moves for _, moves in rows)
        return self._begun

    def _fits(self, param_groups: Groups) -> bool:
        """Whether the parameters and numbers are the ones of the table. The native side checks the tensors."""
        if not self.current or not _native.same_objects(param_groups, self.built.groups):
            return False
        scalars = param_groups[0].get("scalars")
        for group, params in zip(param_groups, self.built.group_params, strict=True):
            if group.get("scalars") is not scalars or not _native.same_objects(group["params"], params):
                return False
        return True

    def _tensors(self, param_groups: Groups, state: State) -> Any:
        """What the native side reads addresses of."""
        numbers = [group.get("alpha_prev") for group in param_groups]
        if self.plain:
            objects = [state, param_groups[0]["scalars"], *numbers]
            if self._at is None or not all(map(is_, self._at[1], objects)):
                at = _native.Tensors(
                    params=self.built.active_params,
                    entries=self.built.entries,
                    inactive_params=self.built.inactive,
                    state=state,
                    expected_state=self.built.expected_state,
                    scalars=objects[1],
                    alpha_prev=numbers,
                )
                self._at = at, objects
            return self._at[0]
        self._at = None
        if any(self.built.params[i].grad is None for i in self.built.active):
            return _native.Tensors()  # does not fit
        params, gradients, entries = self._prepared()
        return _native.Tensors(
            params=params,
            gradients=gradients,
            entries=entries,
            inactive_params=self.built.inactive,
            state=state,
            expected_state=self.built.expected_state,
            scalars=param_groups[0]["scalars"],
            alpha_prev=numbers,
        )

    def _prepared(self) -> tuple[list[Tensor], list[Tensor], list[dict[str, Tensor]]]:
        """This rank's memory of parameters, gradients and state, with copies of what has gaps."""
        params, gradients = self.memory_of(self.built.params, self.built.active), []
        for i, local in zip(self.built.active, params, strict=True):
            p = self.built.params[i]
            assert p.grad is not None
            g = usable_gradient(i, p, p.grad)
            gradients.append(g if g.numel() else torch.zeros_like(local))
        objects = zip(self.built.active, params, gradients, strict=True)
        self.plain = all(
            self.built.params[i] is p and self.built.params[i].grad is g for i, p, g in objects
        )  # from now on
        return params, gradients, self._local_entries()

    def _local_entries(self) -> list[dict[str, Tensor]]:
        """This rank's memory of the state; one element for a shard that has none."""
        assert self.options is not None
        start_of = {key: start for options in self.of_groups for key, start in options.state_arrays().items()}
        entries = []
        for entry in self.built.entries:
            local = local_arrays(entry)
            if "direction" in local and local["direction"].numel() == 0:
                for key in start_of.keys() & local.keys():
                    local[key] = torch.full((1,), start_of[key], dtype=local[key].dtype, device=local[key].device)
            entries.append(local)
        return entries

    def _on_gpu(
        self,
        native: _native.TensorTable,
        at: Any,
        lr: list[float | Tensor],
        weight_decay: list[float],
        maximize: list[bool],
        loss: float | Tensor,
        capturable: bool,
        amp: tuple[float | Tensor | None, float | Tensor | None],
        complete: Callable[[], None] | None,
    ) -> bool | None:
        """Enqueues the step on torch's current stream. The kernels read scalars that are on the device."""
        for name, x in (("loss", loss), *(("lr", rate) for rate in lr)):
            if isinstance(x, Tensor) and x.device != self.device:
                raise RuntimeError(f"{name} is on {x.device}, the parameters on {self.device}")
        if not capturable and _native.capturing():
            raise RuntimeError("a step can be captured into a CUDA graph only with capturable=True")
        self.use_stream()
        self._amp = [_float32_on(self.device, x) for x in amp]  # alive until the step has run
        return native.step(
            at,
            [math.nan if isinstance(rate, Tensor) else rate for rate in lr],
            weight_decay,
            maximize,
            self.built.active_set,
            math.nan if isinstance(loss, Tensor) else loss,
            1,
            lr_on_device=[_device_scalar(rate) for rate in lr],
            loss_on_device=_device_scalar(loss),
            grad_scale=_device_scalar(self._amp[0]),
            found_inf=_device_scalar(self._amp[1]),
            complete=complete,
        )

    # ---- ranks that disagree ---------------------------------------------------------------------------------------

    def explain(self, moment: str, param_groups: Groups) -> None:
        """Raises on every rank what differs between them."""
        assert self.ranks is not None
        assert self.options is not None
        step = groups.named_scalars(param_groups[0])["step"]
        more: dict[str, Any] = {"matrices with gradients": ", ".join(map(str, sorted(self._shared_matrices())))}
        more |= {f"parameter {i}": text for i, text in self.built.order.items()}
        for k, options in enumerate(self.of_groups):
            more |= {f"option {name} of group {k}": repr(value) for name, value in vars(options).items()}
        if self.ranks.replicas and moment == "step()":
            sums = self.ranks.mine[: _native.row_sums].tolist()
            more["gradients, or the order of parameters, differ between replicas: sums"] = sums
        self.ranks.explain(moment, step, vars(self.options), param_groups, more)

    def _raise_disagreement(self) -> None:
        """On a GPU only the device knows at once. That step has changed nothing; those since then were taken if the
        ranks agreed on them."""
        assert self.ranks is not None
        assert self._raised is not None
        if self._disagreements is not None and self._disagreements.item() > self._raised:
            self._raised = self._disagreements.item()
            raise RuntimeError(f"an earlier step was skipped on all ranks: {self.ranks.who_disagreed()}")

    def watch(self) -> None:
        """After a step over ranks on a GPU: lets the host hear of a disagreement without waiting."""
        if self.ranks is None or not _native.on_gpu(self.device) or _native.capturing():
            return
        counted = self.built.groups[0]["scalars"][list(_native.SCALARS).index("disagreements")]
        if self._disagreements is None:
            self._disagreements = torch.zeros((), dtype=torch.float64, device="cpu", pin_memory=counted.is_cuda)
        self._disagreements.copy_(counted, non_blocking=True)

    # ---- the table -------------------------------------------------------------------------------------------------

    def _rebuild(self, param_groups: Groups, state: State, *, to_look: bool = False) -> None:
        """Checks every parameter and gradient, makes the state that is missing, and a new table. ``to_look``: over all
        parameters with state, not for a step."""
        assert self.options is not None
        params = parameters(param_groups)
        grads = [None if to_look else p.grad for p in params]
        stateful = [i for i, p in enumerate(params) if grads[i] is not None or "direction" in (state.get(p) or ())]
        check_parameters(params, stateful)
        usable = {
            i: usable_gradient(i, p, g)
            for i, (p, g) in enumerate(zip(params, grads, strict=True))
            if g is not None and p.numel()
        }
        group_of = [k for k, group in enumerate(param_groups) for _ in group["params"]]
        # Groups may have been added, or reordered, since the last step.
        of_groups = [Options.of_group(group) for group in param_groups] if to_look else self.of_groups
        options_of = [of_groups[k] for k in group_of]
        shapes = {i: shape_of(i, params[i], options_of[i]) for i in stateful if options_of[i].kind.of_matrices}
        ranks = self.ranks
        if (
            not self._ranks_known
            or len(params) != len(self.built.params)
            or not all(map(is_, params, self.built.params))
        ):
            search = self.options.line_search is not None
            ranks = find_ranks(params, self.process_group, self.average_loss, search, self.matrix_group)
        if shapes:  # those of one batch one after another
            first: dict[Any, int] = {}
            keys = {i: (first.setdefault(key_of(params[i], shape), i), i) for i, shape in shapes.items()}
            stateful = [*(i for i in stateful if i not in shapes), *sorted(shapes, key=keys.__getitem__)]
        stateful = in_order(stateful, ranks)
        groups.complete(param_groups, {})
        if not stateful and ranks is None and self.native is None:
            return  # no parameter has ever had a gradient: nothing to do

        device = self.device_for(params, stateful, ranks)
        entries = {i: self._missing(i, params[i], state.get(params[i]) or {}, options_of[i]) for i in stateful}
        active = [i for i in stateful if (params[i].numel() if to_look else i in usable)]
        if _native.on_gpu(device) and _native.capturing() and any(new for new in entries.values()):
            raise RuntimeError(
                "state cannot be made while a CUDA graph is captured: take a step with these parameters first"
            )

        # Everything has been checked: from here on state and groups are written. If memory runs out, the next step
        # makes the table again.
        self.current, self._at = False, None
        groups.move_numbers(param_groups, device)
        self._rename_set(params, stateful, state, param_groups[0]["scalars"])
        write_state(state, params, entries)
        same_ranks = ranks is self.ranks
        rounding = self.options.stochastic_rounding or self.options.state_dtype is not None
        self.lay_out(
            params,
            stateful,
            active,
            ranks,
            _native.StateKeys(
                grad_prev="grad_prev" if self.options.keeps_gradient else None,
                direction="direction",
                diagonal=self.options.kind.diagonal,
                steps="step",
            ),
            options=native_options(of_groups),
            wanted_dtype=self.options.state_dtype,
            group_of=group_of,
            n_groups=len(param_groups),
            place=(lambda p: place_of(p, self.process_group)) if rounding else None,
            matrices=shapes,
            matrix_groups=[k for k, options in enumerate(of_groups) if options.kind.of_matrices],
        )
        assert self.native is not None
        self._lay_out_matrices(params, active, shapes)
        everything = _with_elements(params, stateful)
        self.built = Built(
            params=params,
            groups=list(param_groups),
            group_params=[list(group["params"]) for group in param_groups],
            options_of=dict(zip(map(id, params), options_of, strict=True)),
            active=active,
            active_set=name_of(active, everything),
            active_params=[params[i] for i in active],
            order=self._order_of(param_groups, ranks, shapes),
            everything=[params[i] for i in everything],
            inactive=[p for p, g in zip(params, grads, strict=True) if g is None],
            entries=[state[params[i]] for i in active],
            expected_state=expected_state(state),
        )
        self._agree()
        self._ranks_known = True
        self.plain = not to_look and all(
            memory(params[i]) is params[i] and in_place(params[i]) and usable[i] is grads[i] for i in active
        )
        # If nothing is active, the next step looks for gradients again.
        self.current = not to_look and bool(active or ranks is not None)
        if self._raised is None and ranks is not None and _native.on_gpu(device):
            self._raised = groups.named_scalars(param_groups[0])["disagreements"]
        self._sums_known = self._sums_known and same_ranks
        kept = param_groups[0]["scalars"][list(_native.SCALARS).index("active_set")]
        if (
            self.options.kind.sums_last_move
            and not (self._sums_known or to_look)
            and kept.item() == self.built.active_set
        ):
            # A file has one rank's share of these sums, and may come from other ranks.
            self._sums_known = True
            self.use_stream()
            numbers = [group["alpha_prev"] for group in param_groups]
            self.native.last_move(self.look_at(param_groups[0]["scalars"], numbers), _native.num_threads())

    def _lay_out_matrices(self, params: list[Tensor], active: list[int], shapes: dict[int, Shape]) -> None:
        """Batches of the matrices, and their workspace."""
        if not shapes:
            self.matrices = None
            return
        assert self.native is not None
        tile = _native.tile_elements
        ends = {i: self.offset_of[i] + max(memory(params[i]).numel(), 1) for i in shapes}
        tiles = {i: (self.offset_of[i] // tile, -(-end // tile)) for i, end in ends.items()}
        self.matrices = self.matrices or Matrices(self.matrix_group)
        parts = self.matrices.lay_out(params, active, shapes, tiles, arithmetic_dtype(self._dtype), self.device)
        self.native.set_origins(_native.Buffer(self.matrices.workspace), parts)

    @staticmethod
    def _missing(i: int, p: Tensor, entry: Mapping[str, Any], options: Options) -> dict[str, Tensor]:
        """The state that parameter ``i`` lacks, with its count of steps."""
        new = missing_arrays(i, p, entry, options.state_arrays(), options.state_dtype)
        step, device = entry.get("step"), memory(p).device
        fits = (
            isinstance(step, Tensor)
            and not (step.dim() or step.is_neg())
            and step.dtype == torch.float64
            and step.device == device
        )
        if not fits:
            new["step"] = torch.full((), 0.0 if step is None else float(step), dtype=torch.float64, device=device)
        return new

    def _rename_set(self, params: list[Tensor], stateful: list[int], state: State, scalars: Tensor) -> None:
        """The name of the last step's set, which goes by the order of the parameters and by which of them have state,
        in the new order. A set that is no longer whole is forgotten."""
        everything = _with_elements(params, stateful)
        place = {id(params[i]): i for i in everything if "direction" in (state.get(params[i]) or ())}
        # On a GPU only the device knows whether the last step was skipped, and the set is an older one.
        # Loaded, or copied: if it was all of them, it is now all that had state.
        known: dict[float, list[int | None]] = {1.0: list(place.values())}
        same_order = True
        if self.native is not None:
            known = {1.0: [place.get(id(p)) for p in self.built.everything]}
            if self._last_set is not None:
                name, members = self._last_set
                known[name] = [place.get(id(p)) for p in members]
            same_order = len(params) >= len(self.built.params) and all(map(is_, params, self.built.params))
        names = {
            then: -1.0 if None in members else name_of([i for i in members if i is not None], everything)
            for then, members in known.items()
        }
        if self._last_set is not None:
            self._last_set = names[self._last_set[0]], self._last_set[1]
        if all(then == now for then, now in names.items()) and same_order:
            return
        at = list(_native.SCALARS).index("active_set")
        old = scalars[at].clone()
        new = old if same_order else torch.full_like(old, -1.0)
        for then, now in names.items():
            new = torch.where(old == then, now, new)
        scalars[at].copy_(new)

    # ---- to look at it ---------------------------------------------------------------------------------------------

    def look_at(self, scalars: Tensor, alpha_prev: list[Tensor]) -> Any:
        """What the native side reads of the state alone."""
        return _native.Tensors(entries=self._local_entries(), scalars=scalars, alpha_prev=alpha_prev)

    def state_norms(self, param_groups: Groups, state: State) -> tuple[float, float, float]:
        """|g_prev|^2, |d|^2, g_prev . d over the parameters of the last step; after a load, over all."""
        for attempt in range(2):
            if attempt or self.native is None:
                self._rebuild(param_groups, state, to_look=True)
            if self.native is None:
                break
            self.join_stream()
            numbers = [group["alpha_prev"] for group in self.built.groups]
            norms = self.native.state_norms(self.look_at(param_groups[0]["scalars"], numbers), _native.num_threads())
            if norms is not None:
                return norms
        return 0.0, 0.0, 0.0

    def join_stream(self) -> None:
        """On a GPU: what torch's current stream does next follows the last step."""
        self.use_stream()
        if self.native is not None and _native.on_gpu(self.device):
            self.native.join_stream()


def _float32_on(device: torch.device, x: float | Tensor | None) -> Tensor | None:
    """What AMP sets, in a form that the kernels can read: GradScaler's own tensors may be on another GPU, and a user's
    value may have another dtype or be no tensor."""
    if x is None:
        return None
    return torch.as_tensor(x).detach().to(device, torch.float32, non_blocking=True)


def _device_scalar(x: float | Tensor | None) -> _native.DeviceScalar | None:
    """What the kernels read a tensor of one element through; None for a number of the host."""
    return _native.DeviceScalar(address=x.data_ptr(), dtype=DTYPES[x.dtype]) if isinstance(x, Tensor) else None


def name_of(active: Sequence[int], everything: Sequence[int]) -> float:
    """A number for this set of parameters, of those with state. The native side compares it with that of the last step
    that was not skipped, which on a GPU only the device knows; so it is a hash, and nothing has to be remembered: 53
    bits, exact in a double. All of them, the usual case, have one name on all ranks, whoever has which parameters."""
    if sorted(active) == sorted(everything):
        return 1.0
    return _number_of(tuple(sorted(active)))


def _number_of(x: object) -> float:
    """A hash of what ``repr`` shows, in 53 bits."""
    digest = hashlib.blake2b(repr(x).encode(), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11)


def _with_elements(params: Sequence[Tensor], stateful: Sequence[int]) -> list[int]:
    return [i for i in stateful if params[i].numel()]
