"""What a step did: numbers that the step has formed, and three norms that are computed when the caller reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastnlcg import _native
from fastnlcg.tensors import groups

if TYPE_CHECKING:
    from fastnlcg.tensors.step_table import StepTable


@dataclass(frozen=True)
class Diagnostics:
    """What the last step did; see :meth:`NLCG.diagnostics`."""

    step: int
    """completed steps"""
    skipped_steps: int
    """steps that changed nothing because a sum was not finite, or the gradient's norm was above ``skip_grad_norm``"""
    beta: float
    """conjugacy coefficient after clamping and restarts"""
    rz: float
    """sum(g g / (h + eps))"""
    ys: float
    """sum(y s): 0 if no curvature pair was formed (first step, changed set of parameters, not ``"bfgs"``)"""
    shs: float
    """sum(s h s): 0 as for ``ys``"""
    updated: bool
    """whether the preconditioner's diagonal was updated"""
    grad_norm: float
    """norm of g, after clipping and L2 weight decay"""
    direction_norm: float
    """norm of d"""
    cosine: float
    """cos(g, -d): 1 is steepest descent; NaN if g or d is zero"""
    ls_scale: float
    """line-search scale, in (0, 1]"""
    total_norm: float | None = None
    """norm of the gradient before clipping and weight decay, also of a step that was skipped; None if neither
    ``max_grad_norm`` nor ``skip_grad_norm`` is set"""
    clip: float = 1.0
    """the factor that clipping has multiplied the gradient by, in (0, 1]"""
    launches: int = 0
    """CUDA launches of the step's passes: 1 (cooperative), or one per pass; 0 on the CPU"""
    beta_matrices: float | None = None
    """with ``"muon"``, the beta of the matrices; ``beta`` and ``rz`` are then those of the other parameters"""
    rz_matrices: float | None = None
    """with ``"muon"``, sum(g g) over the matrices"""


def read(table: StepTable, param_groups: list[dict[str, Any]], state: Any) -> Diagnostics:
    """The diagnostics of the last step. Waits for the device; if parameters are spread over ranks, all ranks have to
    call it."""
    gg, dd, gd = table.state_norms(param_groups, state)
    if table.native is None or table.options is None:
        return Diagnostics(0, 0, 0.0, 0.0, 0.0, 0.0, False, 0.0, 0.0, math.nan, 1.0)
    table.join_stream()
    s = groups.named_scalars(param_groups[0])
    if not table.options.keeps_gradient:  # grad_prev is not state; the step has kept the sums over g
        gg, gd = s["gg"], s["gd"]
    if table.ranks is not None and table.ranks.every_decision:
        try:
            gg, dd, gd = table.ranks.total(table.ranks.exchange([gg, dd, gd], s["step"], "diagnostics", 0.0))
        except _native.RanksDisagree:
            table.explain("diagnostics()", param_groups)
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
        total_norm=s["grad_norm"] if table.options.measures_norm else None,
        clip=s["clip"] if table.options.measures_norm else 1.0,
        launches=table.native.launches,
        beta_matrices=s["beta_matrices"] if table.matrices is not None else None,
        rz_matrices=s["rz_matrices"] if table.matrices is not None else None,
    )
