"""Conversion of the state dicts of torch.optim.Muon, with AdamW's for the other parameters, to NLCG's and back.

Muon's buffer is ``m = momentum m + (1 - momentum) g``, and ``d = beta d - g`` with beta = momentum gives
``d = -m / (1 - momentum)``; the polar factor does not depend on the scale.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from fastnlcg import _native
from fastnlcg.tensors import adamw_state, groups, state_dict
from fastnlcg.tensors.adamw_state import RATES, as_float
from fastnlcg.tensors.dtensor import as_like, shard_like
from fastnlcg.tensors.polar import COEFFICIENTS, STEPS
from fastnlcg.tensors.ranks import device_of, find_ranks
from fastnlcg.tensors.state import as_arithmetic, state_dtype
from fastnlcg.tensors.table import Groups, parameters

_MUONS_ALONE = {"nesterov": True, "ns_coefficients": COEFFICIENTS, "eps": 1e-7, "ns_steps": STEPS}
"""Options that only Muon has, with the values that go with NLCG's step; eps is Muon's default."""
_GROUP = ("lr", "weight_decay", "momentum", "adjust_lr_fn", *_MUONS_ALONE)
_SMALL = 1e-150
"""Stands for the sum of squares of the last gradients, which Muon does not keep. Every such sum of float32 gradients is
larger, so the first beta is beta_max, and the quotient of the two is finite."""


def from_muon(
    own_groups: Groups, process_group: Any, muon: Mapping[str, Any], adamw: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The two state dicts converted to one of an NLCG with these groups; see :meth:`NLCG.load_muon_state_dict`."""
    inside = [group for group in own_groups if group["preconditioner"] == "muon"]
    rest = [group for group in own_groups if group["preconditioner"] != "muon"]
    if not inside:
        raise ValueError("no parameter group has preconditioner='muon'; load_adamw_state_dict() takes AdamW's alone")
    if bool(rest) != (adamw is not None):
        given = "is needed for" if rest else "was given, but there are no"
        raise ValueError(f"adamw {given} groups with another preconditioner than 'muon': there are {len(rest)}")
    _check_ours(own_groups, maximize=False)
    state, saved = _checked(inside, muon)
    others: dict[str, Any] = {"state": {}, "param_groups": []}
    if adamw is not None:
        try:
            others = adamw_state.from_adamw(rest, process_group, adamw)
        except ValueError as error:
            raise ValueError(f"adamw: {error}") from error  # there are two files
    scalars = others["param_groups"][0]["scalars"] if rest else groups.new_scalars()
    shared = {key: others["param_groups"][0][key] for key in ("eps", "beta2")} if rest else {}
    at = list(_native.SCALARS).index
    steps = max(float(scalars[at("step")]), 1.0 if state else 0.0)

    # A file has indices of its own: those of NLCG's parameters replace both.
    index_of = {id(p): k for k, p in enumerate(parameters(own_groups))}
    entries: dict[int, dict[str, Any]] = {}
    largest = 0.0
    for theirs, ours in zip(saved, inside, strict=True):
        for i, p in zip(theirs["params"], ours["params"], strict=True):
            if i not in state:
                continue
            buffer = _in_shape(state[i]["momentum_buffer"], p)
            m = shard_like(buffer, p).detach().to(state_dtype(p))
            d = m / -(1.0 - theirs["momentum"])
            entries[index_of[id(p)]] = {
                "direction": as_like(d, p),
                "step": torch.tensor(steps, dtype=torch.float64),
            }
            largest = max(largest, float(d.abs().max()) if d.numel() else 0.0)
    for theirs, ours in zip(others["param_groups"], rest, strict=True):
        for i, p in zip(theirs["params"], ours["params"], strict=True):
            if i in others["state"]:
                entries[index_of[id(p)]] = others["state"][i]
    largest = _largest_over_ranks(own_groups, process_group, largest, steps)
    if steps:
        scalars[at("step")] = steps
        scalars[at("rz_matrices")] = _SMALL
        scalars[at("direction_max")] = max(largest, float(scalars[at("direction_max")]))
        scalars[at("active_set")] = 1.0
    converted = iter(others["param_groups"])
    new_groups = []
    from_file = iter(saved)
    for ours in own_groups:
        indices = [index_of[id(p)] for p in ours["params"]]
        if ours["preconditioner"] != "muon":
            new_groups.append({**next(converted), "params": indices, "scalars": scalars})
            continue
        theirs = next(from_file)
        kept = {key: value for key, value in ours.items() if key not in ("params", *groups.NUMBERS)}
        new_groups.append(
            {
                **kept,
                **shared,
                **{key: theirs[key] for key in ("lr", "weight_decay", *RATES) if key in theirs},
                "adjust_lr_fn": theirs["adjust_lr_fn"],
                "params": indices,
                "scalars": scalars,
                "alpha_prev": torch.tensor(theirs["lr"] if steps else 0.0, dtype=torch.float64),
            }
        )
    return {"state": entries, "param_groups": new_groups}


def _checked(inside: Groups, given: Mapping[str, Any]) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """State and groups of Muon's state dict, in the groups of ``inside``. ValueError for another optimizer's, or an
    option without a counterpart."""
    state, saved = state_dict.structure(_regrouped(given, inside), inside)
    converted = []
    for k, group in enumerate(saved):
        where = f"param_groups[{k}]"
        if missing := [key for key in _GROUP if key not in group]:
            raise ValueError(f"{where} lacks {', '.join(missing)}: not the state dict of torch.optim.Muon")
        _check_counterparts(where, group, _MUONS_ALONE)
        numbers = {key: as_float(where, key, group[key]) for key in ("lr", "weight_decay", *RATES) if key in group}
        momentum = as_float(where, "momentum", group["momentum"], below=1.0)
        adjust = group["adjust_lr_fn"] or "original"
        converted.append({**group, **numbers, "momentum": momentum, "adjust_lr_fn": adjust})
    for i, p in state_dict.named(saved, inside).items():
        if i not in state:
            continue
        where, entry = f"state of parameter {i}", state[i]
        if not isinstance(entry, Mapping) or set(entry) != {"momentum_buffer"}:
            got_keys = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
            raise ValueError(f"{where} has {got_keys}, expected Muon's ['momentum_buffer']")
        value = _in_shape(entry["momentum_buffer"], p)
        state_dict.check_tensor(where, "momentum_buffer", value, p, finite=inside[0]["nonfinite"] == "skip")
    return state, converted


def _check_ours(own_groups: Groups, **expected: Any) -> None:
    """ValueError unless the groups of matrices have these options."""
    for k, group in enumerate(own_groups):
        if group["preconditioner"] == "muon":
            _check_counterparts(f"parameter group {k}", group, expected)


def _check_counterparts(where: str, group: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        got = tuple(group[name]) if isinstance(group[name], list) else group[name]
        if got != value:
            raise ValueError(f"{where} has {name}={got!r}, which has no counterpart; expected {value!r}")


def _regrouped(given: Mapping[str, Any], inside: Groups) -> Mapping[str, Any]:
    """``given``, with its only group divided into those of ``inside`` if they have as many parameters together: by
    names if both sides have the same, else in their order. ValueError if the order could mistake a parameter for
    one of another group."""
    saved = given.get("param_groups") if isinstance(given, Mapping) else None
    if not isinstance(saved, list) or len(saved) != 1 or not isinstance(saved[0], Mapping) or len(inside) == 1:
        return given
    whole, sizes = saved[0], [len(group["params"]) for group in inside]
    if len(whole.get("params", ())) != sum(sizes):
        return given
    lists = {key: whole[key] for key in ("params", "param_names") if key in whole}
    names = state_dict.names_of(whole)
    if names is not None and all("param_names" in group for group in inside):
        theirs = state_dict.bare_names(names)
        ours = state_dict.bare_names([name for group in inside for name in group["param_names"]])
        if sorted(theirs) == sorted(ours):  # if not, structure() says which differ
            place = {name: k for k, name in enumerate(theirs)}
            lists = {key: [values[place[name]] for name in ours] for key, values in lists.items()}
    else:
        _check_shapes_differ(inside)
    parts, begin = [], 0
    for size in sizes:
        parts.append({**whole, **{key: values[begin : begin + size] for key, values in lists.items()}})
        begin += size
    return {**given, "param_groups": parts}


def _check_shapes_differ(inside: Groups) -> None:
    """ValueError if two of these groups have parameters of the same shape."""
    seen: set[tuple[int, int]] = set()
    for group in inside:
        shapes = {_two_dimensions(p) for p in group["params"]}
        if both := seen & shapes:
            raise ValueError(
                "muon has one group, and this optimizer has parameters of shape "
                f"{' x '.join(map(str, min(both)))} in several groups with preconditioner='muon', maybe in another "
                "order: expected names on both sides, or the groups of this optimizer"
            )
        seen |= shapes


def _two_dimensions(p: Tensor) -> tuple[int, int]:
    """The shape in which Muon, which takes two dimensions only, is given a convolution: out, and the rest."""
    return p.shape[0], math.prod(p.shape[1:])


def _in_shape(buffer: object, p: Tensor) -> Any:
    """Muon's buffer in the shape of ``p``."""
    if isinstance(buffer, Tensor) and buffer.shape == _two_dimensions(p):
        return buffer.reshape(p.shape)
    return buffer


def _largest_over_ranks(own_groups: Groups, process_group: Any, largest: float, steps: float) -> float:
    """Over the ranks that step together."""
    params = parameters(own_groups)
    ranks = find_ranks(params, process_group, None, line_search=False)
    if ranks is None:
        return largest
    ranks.prepare(device_of(ranks, params, torch.device("cpu")))
    return max(row[0] for row in ranks.exchange([largest], steps, "load", 0.0))


def to_muon(
    whole: Mapping[str, Any], own_keys: Collection[str], momentum: float, beta1: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """An NLCG's state dict converted to Muon's and AdamW's; see :meth:`NLCG.muon_state_dict`."""
    inside, rest = (
        [g for g in whole["param_groups"] if (g["preconditioner"] == "muon") == wanted] for wanted in (True, False)
    )
    if not inside:
        raise ValueError("no parameter group has preconditioner='muon'; adamw_state_dict() writes AdamW's alone")
    _check_ours(whole["param_groups"], maximize=False, stacked=False, split=None)
    defaults = torch.optim.Muon([torch.zeros(1, 1)], momentum=momentum).param_groups[0]
    state: dict[int, dict[str, Any]] = {}
    new_groups, number = [], 0
    for group in inside:
        kept = {key: value for key, value in group.items() if key not in (*groups.NUMBERS, *own_keys, "params")}
        indices = list(range(number, number + len(group["params"])))
        number += len(indices)
        new_groups.append(
            {
                **kept,
                **{key: value for key, value in defaults.items() if key != "params"},
                **{key: float(group[key]) for key in ("lr", "weight_decay", *RATES) if key in group},
                "adjust_lr_fn": group["adjust_lr_fn"],
                "params": indices,
            }
        )
        for new, old in zip(indices, group["params"], strict=True):
            entry = whole["state"].get(old) or {}
            if "direction" in entry:
                m = as_arithmetic(entry["direction"]) * -(1.0 - momentum)
                state[new] = {"momentum_buffer": m.flatten(1)}
    renumbered: dict[str, Any] = {"state": {}, "param_groups": []}
    number = 0
    for group in rest:
        indices = list(range(number, number + len(group["params"])))
        number += len(indices)
        renumbered["param_groups"].append({**group, "params": indices})
        for new, old in zip(indices, group["params"], strict=True):
            if old in whole["state"]:
                renumbered["state"][new] = whole["state"][old]
    adamw = adamw_state.to_adamw(renumbered, own_keys, beta1) if rest else {"state": {}, "param_groups": []}
    return {"state": state, "param_groups": new_groups}, adamw
