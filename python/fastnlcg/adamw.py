"""Coming from AdamW, and going back: its checkpoints as NLCG's, its parameter groups.

With ``preconditioner="adam"`` both keep the same v. AdamW's first moment is, up to a change of h while it was summed
up, a direction: ``m = beta1 m + (1 - beta1) g`` and ``d = beta d - g / (h + eps)`` with beta = beta1 give
``d = -m / ((1 - beta1) (h + eps))``, so AdamW's step of ``lr`` is NLCG's of ``(1 - beta1) lr``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastnlcg import _native, groups, layout
from fastnlcg.distributed import as_like, device_of, find_ranks, shard_like
from fastnlcg.options import Options

if TYPE_CHECKING:
    from fastnlcg.nlcg import NLCG

__all__ = ["decay_groups", "from_adamw", "to_adamw"]


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The two usual groups: parameters of two or more dimensions decay; biases, norms' weights and other vectors do
    not. Frozen parameters are left out, shared ones counted once.

    Args:
        module: whose parameters.
        weight_decay: of the first group, >= 0.

    Returns:
        For any torch optimizer: ``NLCG(decay_groups(model, 0.1), lr=3e-3)``. An empty group is left out.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    found = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in found if group["params"]]


def _checked(given: Mapping[str, Any]) -> tuple[Mapping[Any, Any], list[Mapping[str, Any]]]:
    """State and groups of an Adam's or AdamW's state dict. ValueError for another, or what has no counterpart."""
    if not isinstance(given, Mapping) or not {"state", "param_groups"} <= set(given):
        raise ValueError("not a state dict: expected a mapping with the keys 'state' and 'param_groups'")
    state, saved = given["state"], given["param_groups"]
    for k, group in enumerate(saved):
        where = f"param_groups[{k}]"
        betas = group.get("betas")
        if not (isinstance(betas, tuple | list) and len(betas) == 2 and 0.0 <= float(betas[0]) < 1.0):
            raise ValueError(f"{where} has betas {betas!r}: not the state dict of torch.optim.AdamW")
        if group.get("amsgrad"):
            raise ValueError(f"{where} has amsgrad=True, which has no counterpart")
        if group.get("decoupled_weight_decay") is False and float(group["weight_decay"]) != 0.0:
            raise ValueError(
                f"{where} is Adam's with L2 weight decay {group['weight_decay']!r}, and NLCG's is decoupled: set it to "
                "0 in the file, and choose NLCG's"
            )
    for i, entry in state.items():
        if not {"step", "exp_avg", "exp_avg_sq"} <= set(entry):
            raise ValueError(f"state of parameter {i} has {sorted(map(str, entry))}, expected AdamW's")
    return state, saved


def from_adamw(optimizer: NLCG, given: Mapping[str, Any]) -> dict[str, Any]:
    """An AdamW's state dict as one of ``optimizer``'s; see :meth:`NLCG.load_adamw_state_dict`."""
    state, saved = _checked(given)
    own = [Options.of_group(group) for group in optimizer.param_groups]
    if any(options.preconditioner != "adam" for options in own):
        raise ValueError("AdamW's state is that of preconditioner='adam'; this optimizer has another")
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in optimizer.param_groups]:
        sizes = [[len(group["params"]) for group in x] for x in (saved, optimizer.param_groups)]
        raise ValueError(f"param_groups have {sizes[0]} parameters, expected {sizes[1]}")
    new_groups: list[dict[str, Any]] = []
    entries: dict[Any, dict[str, Any]] = {}
    params = layout.parameters(optimizer.param_groups)
    ranks = find_ranks(params, optimizer._process_group, None, line_search=False)
    copies = set() if ranks is None else {id(params[k]) for k in ranks.unowned}
    rz = largest = steps = 0.0
    for theirs, ours, options in zip(saved, optimizer.param_groups, own, strict=True):
        beta1, beta2 = (float(beta) for beta in theirs["betas"])
        eps = float(theirs["eps"])
        rest = {key: value for key, value in ours.items() if key not in ("params", "scalars", "alpha_prev")}
        new_groups.append(
            {
                **rest,
                "params": list(theirs["params"]),
                "lr": (1.0 - beta1) * float(theirs["lr"]),
                "weight_decay": float(theirs["weight_decay"]) / (1.0 - beta1),
                "eps": eps,
                "beta2": beta2,
                "maximize": bool(theirs.get("maximize", False)),
            }
        )
        for i, p in zip(theirs["params"], ours["params"], strict=True):
            if i not in state:
                continue
            t = float(state[i]["step"])
            m, v = (
                shard_like(state[i][key], p).detach().to(layout.state_dtype(p)) for key in ("exp_avg", "exp_avg_sq")
            )
            h = _diagonal(v, beta2, t)
            d = m / (-(1.0 - beta1) * (h + eps))
            made = {"direction": d, "exp_avg_sq": v}
            if options.keeps_gradient:
                made["grad_prev"] = torch.zeros_like(v)
            entries[i] = {key: as_like(value, p) for key, value in made.items()}
            entries[i]["step"] = torch.tensor(t, dtype=torch.float64)
            if id(p) not in copies:
                rz += float((h * h / (h + eps)).double().sum())  # what v expects of a gradient
            largest = max(largest, float(d.abs().max()) if d.numel() else 0.0)
            steps = max(steps, t)
    if ranks is not None:
        ranks.prepare(device_of(ranks, params, torch.device("cpu")))
        rows = ranks.exchange([rz, largest], steps, "diagnostics", 0.0)
        rz, largest = ranks.total(rows)[0], max(row[1] for row in rows)
    scalars = groups.new_scalars()
    at = list(_native.SCALARS).index
    scalars[at("step")] = steps
    scalars[at("rz")] = rz
    scalars[at("direction_max")] = largest
    scalars[at("active_set")] = 1.0
    for group in new_groups:
        group["scalars"] = scalars
        group["alpha_prev"] = torch.tensor(group["lr"], dtype=torch.float64)
    return {"state": entries, "param_groups": new_groups}


def _diagonal(v: Tensor, beta2: float, steps: float) -> Tensor:
    """h"""
    return (v / -math.expm1(steps * math.log(beta2))).sqrt() if steps and beta2 else v.sqrt()


def to_adamw(optimizer: NLCG, beta1: float) -> dict[str, Any]:
    """``optimizer``'s state as an AdamW's; see :meth:`NLCG.adamw_state_dict`."""
    whole = optimizer.state_dict()
    if any(Options.of_group(group).preconditioner != "adam" for group in optimizer.param_groups):
        raise ValueError("AdamW's state is that of preconditioner='adam'; this optimizer has another")
    defaults = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
    state: dict[Any, dict[str, Any]] = {}
    found: list[dict[str, Any]] = []
    for group in whole["param_groups"]:
        beta2, eps = group["beta2"], group["eps"]
        found.append(
            {
                **{key: value for key, value in defaults.items() if key != "params"},
                **({"param_names": group["param_names"]} if "param_names" in group else {}),
                "params": list(group["params"]),
                "lr": float(group["lr"]) / (1.0 - beta1),
                "weight_decay": float(group["weight_decay"]) * (1.0 - beta1),
                "betas": (beta1, beta2),
                "eps": eps,
                "maximize": group["maximize"],
            }
        )
        for i in group["params"]:
            if i not in whole["state"]:
                continue
            entry = whole["state"][i]
            t, v, d = float(entry["step"]), entry["exp_avg_sq"], entry["direction"]
            state[i] = {
                "step": torch.tensor(t, dtype=torch.float32),
                "exp_avg": d * (-(1.0 - beta1) * (_diagonal(v, beta2, t) + eps)),
                "exp_avg_sq": v.clone(),
            }
    return {"state": state, "param_groups": found}
