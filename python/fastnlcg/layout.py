"""Where parameters, gradients and state lie in memory, and what of that the native step is told.

The state is flat: one buffer a stream, in which every parameter that ever had a gradient has its place.
``optimizer.state`` holds views of it. A :class:`Table` is one step's list of addresses. It is kept while parameters and
gradients are what they were when they were checked; :meth:`Table.refresh` compares every property that was checked,
never an address alone.

A DTensor stands for its shard. A parameter with gaps in memory (a slice of a larger tensor) is stepped in a copy, and
copied back. A parameter of which another rank has everything takes part with one element that is always zero, so that
all ranks count the same steps of it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastnlcg import _native, distributed, groups
from fastnlcg.distributed import as_like, is_sharded, memory
from fastnlcg.parameters import (
    DTYPES,
    check_mixture,
    check_parameter,
    copy_in_order,
    dense_strides,
    is_dense,
    usable_gradient,
)

# torch >= 2.10 hands out tensors to native code in tens of nanoseconds; before, Table.refresh compares in Python.
EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)

Groups = list[dict[str, Any]]
State = MutableMapping[Tensor, Any]


def parameters(param_groups: Groups) -> list[Tensor]:
    """Of all groups, in their order."""
    return [p for group in param_groups for p in group["params"]]


def streams(options: Mapping[str, Any]) -> dict[str, float]:
    """The tensors of a parameter's state under these options, and what they hold before the first step."""
    preconditioner = _native.PRECONDITIONERS[options["preconditioner"]]
    found = {"direction": 0.0}
    if preconditioner.keeps_gradient or _native.needs_rz_mid(options):
        found["grad_prev"] = 0.0
    if preconditioner.diagonal is not None:
        found[preconditioner.diagonal] = preconditioner.start
    return found


NUMBERS = {"step": 0.0, "beta2_power": 1.0}
"""Of a parameter's state: float64 whatever the dtype of its streams, and what they are before the first step."""


def numbers(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The numbers of a parameter's state under these options."""
    counts = _native.PRECONDITIONERS[options["preconditioner"]].counts_updates
    return ("step", "beta2_power") if counts else ("step",)


# ---- one step's table ------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """What one step hands to the native side, kept while parameters and gradients stay what they are."""

    native: _native.Step | None = None
    ranks: distributed.Ranks | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    params: list[Tensor] = field(default_factory=list)
    """every parameter of every group"""
    layout: list[Tensor] = field(default_factory=list)
    """those with state, in the order of the flat state"""
    state: list[object] = field(default_factory=list)
    """what optimizer.state held when it was laid out: the views of every parameter, one after another"""
    groups: int = 0
    """len(optimizer.param_groups) then"""
    moving: list[Tensor] = field(default_factory=list)
    """those with a gradient and at least one element: one segment each, in the order of the flat state"""
    resting: list[Tensor] = field(default_factory=list)
    """those without a gradient"""
    set: float = 0.0
    """names the set of ``moving``"""
    stepped: list[Tensor] = field(default_factory=list)
    """what the native side moves, of ``moving``: the memory of each, or a copy without gaps"""
    gradients: list[Tensor] = field(default_factory=list)
    """what it reads, copies among them: alive until the step is over"""
    amp: list[Tensor | None] = field(default_factory=list)
    """what the last step was told by AMP: alive until it has run"""
    plain: bool = True
    """whether all of ``moving`` are plain tensors that are stepped in place"""
    signatures: list[tuple[object, ...]] = field(default_factory=list)
    """of ``stepped``; for refresh() where not all are plain, or without the exchange API"""

    @property
    def takes_part(self) -> bool:
        """Whether there is anything to do, here or on the other ranks."""
        return self.native is not None and (bool(self.moving) or self.ranks is not None)

    def holds(self, state: State) -> bool:
        """Whether optimizer.state is what was laid out, and nobody has put another tensor there, or taken one away."""
        found = _entries(state)
        return len(found) == len(self.state) and all(map(is_, found, self.state))

    def refresh(self) -> bool:
        """Follows the parameters to new gradients, the usual case between two steps. False where anything but an
        address differs from the checked table."""
        if self.native is None:
            return False
        if self.plain and EXCHANGE is not None:
            return self.native.refresh(EXCHANGE, self.moving, self.resting, Tensor)
        if any(p.grad is not None for p in self.resting):
            return False
        stepped, gradients = [], []
        try:
            for p, old, signature in zip(self.moving, self.stepped, self.signatures, strict=True):
                grad = p.grad
                if grad is None or is_sharded(grad) != is_sharded(p):
                    return False
                here, g = memory(p), memory(grad)
                if here.numel() == 0:
                    here = g = old
                if type(g) is not Tensor and g is not old:
                    return False
                if _signature(here) != signature or _signature(g) != signature:
                    return False
                stepped.append(here)
                gradients.append(g)
        except RuntimeError:  # a sparse gradient has no strides
            return False
        self.stepped, self.gradients = stepped, gradients
        self._point()
        return True

    def _point(self) -> None:
        assert self.native is not None
        self.native.point([p.data_ptr() for p in self.stepped], [g.data_ptr() for g in self.gradients])

    def step_on_cpu(
        self, lr: list[float | Tensor], weight_decay: list[float], maximize: list[bool], loss: float | Tensor
    ) -> bool:
        """Takes the step. False where it was skipped."""
        assert self.native is not None
        rates = [float(rate) for rate in lr]
        return self.native.step(rates, weight_decay, maximize, self.set, float(loss), _native.num_threads())

    def step_on_gpu(
        self,
        lr: list[float | Tensor],
        weight_decay: list[float],
        maximize: list[bool],
        loss: float | Tensor,
        capturable: bool,
        grad_scale: float | Tensor | None,
        found_inf: float | Tensor | None,
    ) -> bool:
        """Enqueues the step on torch's current stream. Numbers that lie on the device are read there."""
        native, device = self.native, self.device
        assert native is not None
        for name, x in (("loss", loss), *(("lr", rate) for rate in lr)):
            if isinstance(x, Tensor) and x.device != device:
                raise RuntimeError(f"{name} is on {x.device}, the parameters on {device}")
        if not capturable and _native.capturing():
            raise RuntimeError("a step can be captured into a CUDA graph only with capturable=True")
        native.stream = _native.current_stream(str(device))
        self.amp = [_float32_on(device, x) for x in (grad_scale, found_inf)]
        return native.step(
            [math.nan if isinstance(rate, Tensor) else rate for rate in lr],
            weight_decay,
            maximize,
            self.set,
            math.nan if isinstance(loss, Tensor) else loss,
            1,
            lr_on_device=[_number(rate) for rate in lr],
            loss_on_device=_number(loss),
            grad_scale=_number(self.amp[0]),
            found_inf=_number(self.amp[1]),
        )

    def announce(self) -> None:
        """Tells autograd of the native writes to come."""
        _increment_version(self.moving)

    def bring_back(self) -> None:
        """After a step that was taken: what was stepped in a copy."""
        if not self.plain:
            with torch.no_grad():
                for p, stepped in zip(self.moving, self.stepped, strict=True):
                    here = memory(p)
                    if here.numel() and here.data_ptr() != stepped.data_ptr():
                        here.copy_(stepped)


def _entries(state: State) -> list[object]:
    return [value for entry in state.values() if isinstance(entry, dict) for value in entry.values()]


def _float32_on(device: torch.device, x: float | Tensor | None) -> Tensor | None:
    """What AMP sets, where the kernels can read it: GradScaler's own tensors may lie on another GPU, a user's be of
    another dtype, or no tensor."""
    if x is None:
        return None
    return torch.as_tensor(x).detach().to(device, torch.float32, non_blocking=True)


def _number(x: float | Tensor | None) -> tuple[int, str] | None:
    """Address and type of a number on the device; None for one that is not."""
    return (x.data_ptr(), DTYPES[x.dtype]) if isinstance(x, Tensor) else None


def _signature(t: Tensor) -> tuple[object, ...]:
    return t.dtype, t.device, t.shape, t.stride(), t.is_neg()


def _increment_version(params: list[Tensor]) -> None:
    try:
        torch.autograd.graph.increment_version(params)
    except TypeError:  # torch < 2.5 takes one tensor
        for p in params:
            torch.autograd.graph.increment_version(p)


# ---- the flat state --------------------------------------------------------------------------------------------------


class Layout:
    """The flat state of one optimizer, and the table of its last step."""

    def __init__(self) -> None:
        self.table = Table()
        self.options: dict[str, Any] = {}
        self.device = torch.device("cpu")

    @property
    def native(self) -> _native.Step | None:
        return self.table.native

    def set_options(self, options: dict[str, Any]) -> None:
        """Checked options, which may have changed since the last step. ValueError where the state would have to be
        another."""
        if self.native is not None:
            if options["preconditioner"] != self.options["preconditioner"]:
                raise ValueError("preconditioner cannot change once there is state; make a new optimizer")
            if streams(options) != streams(self.options):
                raise ValueError(
                    "update and restart cannot change to ones that need other state (grad_prev) once there is "
                    "some; make a new optimizer"
                )
            self.native.set_options(**_native.native_options(options))
            if (options["line_search"] is None) != (self.options["line_search"] is None):
                self.table.params = []  # other ranks may have a say in the loss: look for them again
        self.options = options

    def gather(
        self, param_groups: Groups, state: State, process_group: Any = None, average_loss: bool | None = None
    ) -> Table:
        """The table of this step: addresses of the parameters that have gradients, and whether their set changed."""
        table = self.table
        params = parameters(param_groups)
        if (
            len(param_groups) != table.groups
            or len(params) != len(table.params)
            or not all(map(is_, params, table.params))
            or not table.holds(state)
            or not table.refresh()
        ):
            self._rebuild(params, param_groups, state, process_group, average_loss)
        return self.table

    def _rebuild(
        self, params: list[Tensor], param_groups: Groups, state: State, process_group: Any, average_loss: bool | None
    ) -> None:
        """Checks every parameter and gradient, lays out the state where it has to grow, makes a new table."""
        old = self.table
        grads = [p.grad for p in params]
        stateful = [i for i, p in enumerate(params) if grads[i] is not None or state.get(p)]
        relocated = False  # in memory, or to another order there
        for i in stateful:
            check_parameter(i, params[i])
            held = state.get(params[i], {}).get("direction")
            if held is not None and held.shape != params[i].shape:
                raise RuntimeError(
                    f"parameter {i} has shape {tuple(params[i].shape)}, its state {tuple(held.shape)}: it was resized; "
                    "add the new parameter to a new optimizer"
                )
            relocated |= held is not None and (
                memory(held).stride() != dense_strides(memory(params[i]))
                or held.device != params[i].device
                or (held.dtype == torch.float64) != (params[i].dtype == torch.float64)
            )
        check_mixture(stateful, params)
        with_gradient = {
            i: usable_gradient(i, p, g)
            for i, (p, g) in enumerate(zip(params, grads, strict=True))
            if g is not None and p.numel()
        }
        ranks = old.ranks
        if len(params) != len(old.params) or not all(map(is_, params, old.params)):
            line_search = self.options["line_search"] is not None
            ranks = distributed.find_ranks(params, process_group, average_loss, line_search)
        uncounted = frozenset() if ranks is None else ranks.uncounted
        stateful.sort(key=lambda i: i in uncounted)  # stable: the order of the groups, copies last

        layout = [params[i] for i in stateful]
        if not layout and ranks is None:  # no parameter has ever had a gradient: nothing to do
            self.table = Table(params=params, groups=len(param_groups))
            return
        native = old.native
        if (
            native is None
            or relocated
            or ranks is not old.ranks
            or len(param_groups) != old.groups
            or not old.holds(state)
            or len(layout) != len(old.layout)
            or not all(map(is_, layout, old.layout))
        ):
            native = self._flatten(params, stateful, param_groups, state, ranks)
        moving = [i for i in stateful if i in with_gradient]
        stepped, gradients = [], []
        for i in moving:
            here, g = memory(params[i]), with_gradient[i]
            if here.numel() == 0:
                here = g = torch.zeros(1, dtype=here.dtype, device=here.device)
            elif not is_dense(here):
                here = copy_in_order(here, dense_strides(here))
            stepped.append(here)
            gradients.append(g)
        self._set_segments(native, params, stateful, moving, param_groups, uncounted)
        self.table = Table(
            native=native,
            ranks=ranks,
            device=self.device,
            params=params,
            layout=layout,
            state=old.state if native is old.native else self.table.state,
            groups=len(param_groups),
            moving=[params[i] for i in moving],
            resting=[p for p, g in zip(params, grads, strict=True) if g is None],
            set=_name_of(moving),
            stepped=stepped,
            gradients=gradients,
            plain=all(here is params[i] for i, here in zip(moving, stepped, strict=True)),
            signatures=[_signature(here) for here in stepped],
        )
        self.table._point()

    def _set_segments(
        self,
        native: _native.Step,
        params: list[Tensor],
        stateful: list[int],
        moving: list[int],
        param_groups: Groups,
        uncounted: frozenset[int],
    ) -> None:
        """Tells the native side where in the flat state the parameters at ``moving`` lie."""
        offsets, _, _ = _places(params, stateful, uncounted)
        places = {i: (slot, offset) for slot, (i, offset) in enumerate(zip(stateful, offsets, strict=True))}
        group_of = [k for k, group in enumerate(param_groups) for _ in group["params"]]
        rows = []
        for i in moving:
            here, (slot, offset) = memory(params[i]), places[i]
            shape, strides = ((1,), (1,)) if here.numel() == 0 else (here.shape, dense_strides(here))
            rows.append((offset, group_of[i], slot, DTYPES[here.dtype], shape, strides))
        native.set_segments(rows)

    def _flatten(
        self,
        params: list[Tensor],
        stateful: list[int],
        param_groups: Groups,
        state: State,
        ranks: distributed.Ranks | None,
    ) -> _native.Step:
        """Allocates flat state for the parameters at ``stateful``, takes over what ``state`` holds, makes ``state``
        views of it, and returns the native side over it."""
        options = self.options
        layout = [params[i] for i in stateful]
        first = memory((layout or params)[0]) if params else None
        device = first.device if first is not None else distributed.device_of(ranks)
        self.device = device
        if _native.on_gpu(device) and _native.capturing():
            raise RuntimeError(
                "the state cannot be laid out while a CUDA graph is captured: take a step with these parameters first"
            )
        self.save_scalars(param_groups)
        dtype = torch.float64 if first is not None and first.dtype == torch.float64 else torch.float32
        uncounted = frozenset() if ranks is None else ranks.uncounted
        offsets, counted, n = _places(params, stateful, uncounted)
        preconditioner = _native.PRECONDITIONERS[options["preconditioner"]]
        flat, buffers = {}, {}
        for key, fill in streams(options).items():
            flat[key] = torch.empty(n, dtype=dtype, device=device)
            buffers[key] = _native.Buffer(flat[key])
            if not _native.on_gpu(device):
                buffers[key].advise_huge_pages()
            flat[key].fill_(fill)
        of_param = {
            key: torch.full((len(layout),), NUMBERS[key], dtype=torch.float64, device=device)
            for key in numbers(options)
        }
        placed: dict[str, Any] = {}
        if _native.on_gpu(device):
            doubles = _native.workspace_doubles(n, len(layout), len(param_groups))
            workspace = torch.zeros(doubles, dtype=torch.float64, device=device)
            placed = {"device": f"cuda:{device.index or 0}", "workspace": _native.Buffer(workspace)}
            placed["stream"] = _native.current_stream(str(device))
        native = _native.Step(
            DTYPES[dtype],
            n,
            buffers.get("grad_prev"),
            buffers["direction"],
            buffers.get(preconditioner.diagonal or ""),
            _native.Buffer(of_param["step"]),
            _native.Buffer(of_param["beta2_power"]) if "beta2_power" in of_param else None,
            len(param_groups),
            **placed,
        )
        native.set_options(**_native.native_options(options))
        if ranks is not None:
            ranks.connect(native, counted, device)
        fresh: list[tuple[Tensor, dict[str, Tensor]]] = []
        for slot, (p, offset) in enumerate(zip(layout, offsets, strict=True)):
            here = memory(p)
            views = {key: values[slot] for key, values in of_param.items()}
            for key, whole in flat.items():
                place = whole[offset : offset + here.numel()].as_strided(here.shape, dense_strides(here), offset)
                views[key] = as_like(place, p)
            for key, value in state.get(p, {}).items():
                if key in views:
                    memory(views[key]).copy_(memory(value))
            fresh.append((p, views))
        scalars = dict(param_groups[0]["scalars"])
        if any(state.get(p) for p in layout) or (ranks is not None and scalars["step"]):
            if scalars["loss_prev"] is None:
                scalars["loss_prev"] = math.nan
            counts = of_param["step"].tolist()
            step = max([scalars["step"], *counts])  # files of format 1 have only the parameters'
            # The set of the last step: what did not move in it has an older count, what is new here has none.
            last = [i for i, count in zip(stateful, counts, strict=True) if params[i].numel() and count == step]
            native.scalars = {**scalars, "step": step, "set": _name_of(last)}
            native.alpha_prev = [float(group["scalars"]["alpha_prev"]) for group in param_groups]
            self._set_segments(native, params, stateful, last, param_groups, uncounted)
            if options["preconditioner"] == "bfgs":
                native.last_move(_native.num_threads())
        for p, views in fresh:
            state[p] = views
        held = _entries(state)
        self.table = Table(native=native, ranks=ranks, layout=layout, state=held, groups=len(param_groups))
        return native

    def restore(self, param_groups: Groups, state: State, process_group: Any, average_loss: bool | None) -> None:
        """After a load: lays out the state, so that it can be looked at before the next step."""
        params = parameters(param_groups)
        self.options = groups.options_of(param_groups[0])
        ranks = distributed.find_ranks(params, process_group, average_loss, self.options["line_search"] is not None)
        uncounted = frozenset() if ranks is None else ranks.uncounted
        stateful = sorted((i for i, p in enumerate(params) if state.get(p)), key=lambda i: i in uncounted)
        self._flatten(params, stateful, param_groups, state, ranks)

    # ---- scalars ----------------------------------------------------------------------------------------------------

    def save_scalars(self, param_groups: Groups) -> None:
        """Brings the scalars in the groups up to date, in place: who wraps the optimizer may hold the same dict
        (ZeroRedundancyOptimizer does)."""
        native = self.native
        if native is None:
            return
        self.use_stream()
        scalars = native.scalars
        param_groups[0]["scalars"].update(
            (key, None if key == "loss_prev" and math.isnan(scalars[key]) else scalars.get(key, value))
            for key, value in groups.SCALARS.items()
        )
        for group, alpha_prev in zip(param_groups, native.alpha_prev, strict=False):
            group["scalars"]["alpha_prev"] = alpha_prev

    def use_stream(self) -> None:
        """On a GPU: what the native side does next follows what torch's current stream holds."""
        native, layout = self.native, self.table.layout
        if native is not None and layout and _native.on_gpu(layout[0].device):
            native.stream = _native.current_stream(str(layout[0].device))


def _name_of(active: Sequence[int]) -> float:
    """A number for this set of parameters. The native side compares it with that of the last step that was not skipped,
    which on a GPU only the device knows; so it is a hash, and nothing has to be remembered: 53 bits, exact in a double.
    """
    digest = hashlib.blake2b(repr(tuple(active)).encode(), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11)


def _places(params: Sequence[Tensor], stateful: Sequence[int], uncounted: frozenset[int]) -> tuple[list[int], int, int]:
    """Where in the flat state each parameter begins; how much of it this rank adds to sums; its length. On a GPU at
    multiples of four elements, so that 16-byte loads of the state and of parameters go together."""
    if not stateful:
        return [], 0, 0
    unit = 4 if _native.on_gpu(params[stateful[0]].device) else 1
    sizes = [-(-max(memory(params[i]).numel(), is_sharded(params[i])) // unit) * unit for i in stateful]
    counted = sum(size for i, size in zip(stateful, sizes, strict=True) if i not in uncounted)
    copies = sum(sizes) - counted
    if not copies:
        offsets = list(itertools.accumulate(sizes, initial=0))
        return offsets[:-1], counted, counted
    # The copies begin a span, so that the partial sums before them are those that count.
    span = _native.chunk_elements(counted + copies)
    begin = -(-counted // span) * span
    while _native.chunk_elements(begin + copies) != span:
        span = _native.chunk_elements(begin + copies)
        begin = -(-counted // span) * span
    split = sum(i not in uncounted for i in stateful)
    offsets = [
        *list(itertools.accumulate(sizes[:split], initial=0))[:-1],
        *list(itertools.accumulate(sizes[split:], initial=begin))[:-1],
    ]
    return offsets, begin, begin + copies
