"""Conversion of AdamW's state dicts to NLCG's and back, and the usual parameter groups.

With ``preconditioner="adam"`` both keep the same v. AdamW's first moment is, up to a change of h while it was summed
up, a direction: ``m = beta1 m + (1 - beta1) g`` and ``d = beta d - g / (h + eps)`` with beta = beta1 give
``d = -m / ((1 - beta1) (h + eps))``, so AdamW's step of ``lr`` is NLCG's of ``(1 - beta1) lr``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastnlcg import _native
from fastnlcg.options import Options, check_real
from fastnlcg.tensors import groups, state_dict
from fastnlcg.tensors.dtensor import as_like, shard_like
from fastnlcg.tensors.ranks import device_of, find_ranks
from fastnlcg.tensors.state import as_arithmetic, state_dtype
from fastnlcg.tensors.table import Groups, parameters
from fastnlcg.warn import warn

__all__ = ["decay_groups", "from_adamw", "to_adamw"]


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The two usual groups: parameters of two or more dimensions decay; biases, norms' weights and other vectors do
    not. Frozen parameters are left out, shared ones counted once.

    Args:
        module: the module with the parameters.
        weight_decay: weight decay of the first group, >= 0; checked by the optimizer.

    Returns:
        Groups for any torch optimizer: ``NLCG(decay_groups(model, 0.1), lr=3e-3)``. An empty group is left out.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    both = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in both if group["params"]]


_GROUP = ("lr", "betas", "eps", "weight_decay", "amsgrad")
"""The keys that a group has in every version of Adam and AdamW. RAdam, NAdam and similar optimizers have no
``amsgrad``."""
_ENTRY = {"step", "exp_avg", "exp_avg_sq"}
"""The keys of their state for a parameter; a state with other keys belongs to another method."""
RATES = ("initial_lr", "max_lr", "min_lr", "swa_lr")
"""Rates that torch's schedulers keep in a group."""


def _checked(own_groups: Groups, given: Mapping[str, Any]) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """State and groups of a state dict of Adam or AdamW, with numbers as floats. ValueError for a state dict of another
    optimizer, or an option without a counterpart."""
    state, saved = state_dict.structure(given, own_groups)
    converted = []
    for k, group in enumerate(saved):
        where = f"param_groups[{k}]"
        if missing := [key for key in _GROUP if key not in group]:
            raise ValueError(f"{where} lacks {', '.join(missing)}: not the state dict of torch.optim.AdamW")
        betas = group["betas"]
        if not (isinstance(betas, tuple | list) and len(betas) == 2):
            raise ValueError(f"{where} has betas {betas!r}: not the state dict of torch.optim.AdamW")
        if group["amsgrad"]:
            raise ValueError(f"{where} has amsgrad=True, which has no counterpart")
        numbers = {
            key: as_float(where, key, group[key]) for key in ("lr", "eps", "weight_decay", *RATES) if key in group
        }
        betas = [as_float(where, f"betas[{j}]", beta, below=1.0) for j, beta in enumerate(betas)]
        converted.append({**group, **numbers, "betas": betas})
        if group.get("decoupled_weight_decay") is False and numbers["weight_decay"] != 0.0:
            raise ValueError(
                f"{where} is Adam's with L2 weight decay {group['weight_decay']!r}; NLCG's is decoupled: set it to 0 "
                "in the file, and choose NLCG's own"
            )
    finite = own_groups[0]["nonfinite"] == "skip"
    for i, p in state_dict.named(saved, own_groups).items():
        if i not in state:
            continue
        where, entry = f"state of parameter {i}", state[i]
        if not isinstance(entry, Mapping) or set(entry) != _ENTRY:
            got = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
            raise ValueError(f"{where} has {got}, expected AdamW's {sorted(_ENTRY)}")
        state_dict.check_step(where, entry["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            state_dict.check_tensor(where, key, entry[key], p, finite=finite)
    return state, converted


def as_float(where: str, key: str, value: object, *, below: float = math.inf) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        number = check_real(key, value, minimum=0.0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if number >= below:
        raise ValueError(f"{where}: Invalid {key}: {value!r}; expected a number in [0, {below:g})")
    return number


def from_adamw(own_groups: Groups, process_group: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """AdamW's state dict converted to one of an NLCG with these groups; see :meth:`NLCG.load_adamw_state_dict`."""
    own = [Options.of_group(group) for group in own_groups]
    _check_preconditioner(own)
    state, saved = _checked(own_groups, given)
    adamw_group = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
    new_groups: list[dict[str, Any]] = []
    entries: dict[Any, dict[str, Any]] = {}
    params = parameters(own_groups)
    ranks = find_ranks(params, process_group, None, line_search=False)
    copies = set() if ranks is None else {id(params[k]) for k in ranks.unowned}
    rz = largest = steps = 0.0
    for theirs, ours, options in zip(saved, own_groups, own, strict=True):
        (beta1, beta2), eps = theirs["betas"], theirs["eps"]
        rest = {key: value for key, value in ours.items() if key not in ("params", "scalars", "alpha_prev")}
        new_groups.append(
            {
                **{key: value for key, value in theirs.items() if key not in adamw_group},
                **rest,
                **{key: (1.0 - beta1) * theirs[key] for key in ("lr", *RATES) if key in theirs},
                "params": list(theirs["params"]),
                "weight_decay": theirs["weight_decay"] / (1.0 - beta1),
                "eps": eps,
                "beta2": beta2,
                "maximize": bool(theirs.get("maximize", False)),
            }
        )
        for i, p in zip(theirs["params"], ours["params"], strict=True):
            if i not in state:
                continue
            t = float(state[i]["step"])
            m, v = (shard_like(state[i][key], p).detach().to(state_dtype(p)) for key in ("exp_avg", "exp_avg_sq"))
            h = _diagonal(v, beta2, t)
            d = m / (-(1.0 - beta1) * (h + eps))
            tensors = {"direction": d, "exp_avg_sq": v}
            if options.keeps_gradient:
                tensors["grad_prev"] = torch.zeros_like(v)
            entries[i] = {key: as_like(value, p) for key, value in tensors.items()}
            entries[i]["step"] = torch.tensor(t, dtype=torch.float64)
            if id(p) not in copies:
                rz += float((h * h / (h + eps)).double().sum())  # rz with h^2, the mean of g^2, for g^2
            largest = max(largest, float(d.abs().max()) if d.numel() else 0.0)
            steps = max(steps, t)
    if ranks is not None:
        ranks.prepare(device_of(ranks, params, torch.device("cpu")))
        rows = ranks.exchange([rz, largest], steps, "load", 0.0)
        rz, largest = ranks.total(rows)[0], max(row[1] for row in rows)
    scalars = groups.new_scalars()
    if steps:
        at = list(_native.SCALARS).index
        scalars[at("step")] = steps
        scalars[at("rz")] = rz
        scalars[at("direction_max")] = largest
        scalars[at("active_set")] = 1.0
    for group in new_groups:
        group["scalars"] = scalars
        group["alpha_prev"] = torch.tensor(group["lr"] if steps else 0.0, dtype=torch.float64)
    return {"state": entries, "param_groups": new_groups}


def warn_of_scheduler(given: Mapping[str, Any]) -> None:
    """Warns after the load of a file that was written under a scheduler: the scheduler's own state dict still has
    AdamW's rates."""
    if any("initial_lr" in group for group in given["param_groups"]):
        warn(
            "AdamW's run had a learning-rate scheduler: lr and initial_lr are converted, but the scheduler's own state "
            "dict still has AdamW's rates. After scheduler.load_state_dict(...), set scheduler.base_lrs = "
            "[group['initial_lr'] for group in optimizer.param_groups], or its next step sets AdamW's rates",
        )


def _diagonal(v: Tensor, beta2: float, steps: float) -> Tensor:
    """h, from v after ``steps`` updates."""
    return (v / -math.expm1(steps * math.log(beta2))).sqrt() if steps and beta2 else v.sqrt()


def to_adamw(whole: Mapping[str, Any], own_keys: Collection[str], beta1: float) -> dict[str, Any]:
    """An NLCG's state dict converted to AdamW's; see :meth:`NLCG.adamw_state_dict`. ``own_keys``: of NLCG's groups."""
    _check_preconditioner([Options.of_group(group) for group in whole["param_groups"]])
    defaults = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
    state: dict[Any, dict[str, Any]] = {}
    new_groups: list[dict[str, Any]] = []
    for group in whole["param_groups"]:
        beta2, eps = group["beta2"], group["eps"]
        new_groups.append(
            {
                **{key: value for key, value in group.items() if key not in ("scalars", "alpha_prev", *own_keys)},
                **{key: value for key, value in defaults.items() if key != "params"},
                **{key: float(group[key]) / (1.0 - beta1) for key in ("lr", *RATES) if key in group},
                "params": list(group["params"]),
                "weight_decay": float(group["weight_decay"]) * (1.0 - beta1),
                "betas": (beta1, beta2),
                "eps": eps,
                "maximize": group["maximize"],
            }
        )
        for i in group["params"]:
            entry = whole["state"].get(i) or {}
            if "direction" not in entry:
                continue
            t, v, d = float(entry["step"]), *(as_arithmetic(entry[key]) for key in ("exp_avg_sq", "direction"))
            state[i] = {
                "step": torch.tensor(t, dtype=torch.float32),
                "exp_avg": d * (-(1.0 - beta1) * (_diagonal(v, beta2, t) + eps)),
                "exp_avg_sq": v.clone(),
            }
    return {"state": state, "param_groups": new_groups}


def _check_preconditioner(options: list[Options]) -> None:
    for k, group_options in enumerate(options):
        if group_options.preconditioner != "adam":
            raise ValueError(
                f"preconditioner is {group_options.preconditioner!r} in parameter group {k}; expected 'adam', whose "
                "state has the counterpart of AdamW's"
            )
