"""What may be loaded into an optimizer: a state dict is taken whole, or refused before anything has changed.

Files of older versions are brought up to this one's form (:func:`fastnlcg.groups.complete`); what a later version has
added is left out, with a warning that names it; what is missing or damaged is a ValueError.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastnlcg import _native, groups, layout
from fastnlcg.distributed import as_like, memory, shard_like

if TYPE_CHECKING:
    from fastnlcg.nlcg import NLCG


def check(optimizer: NLCG, given: object) -> None:
    """Raises ValueError unless ``given`` can be loaded into ``optimizer`` whole."""
    if not isinstance(given, Mapping) or not {"state", "param_groups"} <= set(given):
        raise ValueError("not a state dict: expected a mapping with the keys 'state' and 'param_groups'")
    state, saved = given["state"], given["param_groups"]
    own = optimizer.param_groups
    if not isinstance(saved, list) or not all(isinstance(g, Mapping) and "params" in g for g in saved):
        raise ValueError("param_groups must be a list of mappings with the key 'params'")
    sizes, own_sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in own]
    if sizes != own_sizes:
        raise ValueError(f"param_groups have {sizes} parameters, expected {own_sizes}")
    indices = [index for g in saved for index in g["params"]]
    if len(set(indices)) != len(indices):
        raise ValueError(f"param_groups name a parameter twice: {indices}")
    if not isinstance(state, Mapping):
        raise ValueError(f"state must be a mapping, got {type(state).__name__}")
    _check_names(saved, own)
    whole = [dict(group) for group in saved]
    groups.complete(whole, optimizer.defaults)
    unknown: list[str] = []
    for k, group in enumerate(whole):
        try:
            groups.check(group)
        except (TypeError, ValueError) as error:
            raise ValueError(f"param_groups[{k}]: {error}") from error
        unknown += groups.check_scalars(k, group, finite=group["nonfinite"] == "skip")
    groups.check_together(whole)
    if whole[0]["scalars"].get("format", groups.FORMAT) > groups.FORMAT:
        unknown += [f"param_groups[0][{key!r}]" for key in whole[0] if key not in own[0]]
    own_parameters = layout.parameters(own)
    parameters = dict(zip((i for g in saved for i in g["params"]), own_parameters, strict=True))
    finite = whole[0]["nonfinite"] == "skip"
    for index, entry in state.items():
        if isinstance(index, str) and index not in parameters:
            continue  # not of a parameter: a hook's
        if index not in parameters:
            raise ValueError(f"state has an entry for parameter {index!r}, which no group names")
        unknown += _check_entry(index, parameters[index], entry, whole[0], finite=finite)
    if unknown:
        warnings.warn(
            f"the state dict has what this version of fastnlcg does not know, and leaves out: {', '.join(unknown)}",
            UserWarning,
            stacklevel=2,
        )


def _check_names(saved: list[Mapping[str, Any]], own: list[dict[str, Any]]) -> None:
    """Parameters are matched by their order: where both sides know the names, they must be in the same one."""
    for k, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
        if "param_names" not in theirs or "param_names" not in ours:
            continue
        for i, (name, expected) in enumerate(zip(theirs["param_names"], ours["param_names"], strict=False)):
            if name != expected:
                raise ValueError(
                    f"param_groups[{k}]['param_names'][{i}] is {name!r}, expected {expected!r}: state is matched to "
                    "parameters by their order, and this one is another"
                )


def _check_entry(index: Any, p: Tensor, entry: object, options: Mapping[str, Any], *, finite: bool) -> list[str]:
    """One parameter's state. Returns the names that this version does not know."""
    where = f"state of parameter {index}"
    keys = {*layout.numbers(options), *layout.streams(options)}
    if not isinstance(entry, Mapping) or not keys <= set(entry):
        got = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
        whose = "" if isinstance(entry, Mapping) and "direction" in entry else "; is it another optimizer's?"
        raise ValueError(f"{where} has {got}, expected the keys {sorted(keys)}{whose}")
    for key in sorted(keys):
        value = entry[key]
        if key in layout.NUMBERS:
            _check_number(where, key, value)
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{where}: {key!r} is {kind}, expected a floating-point tensor")
        if value.shape != p.shape:
            raise ValueError(f"{where}: {key!r} has shape {tuple(value.shape)}, expected {tuple(p.shape)}")
        here = memory(value)
        as_kept = here if p.dtype == torch.float64 else here.float()
        sound = torch.isfinite(as_kept)
        if key == "direction":  # infinite is what gradients near float32's largest leave behind (docs/limits.md)
            sound |= torch.isinf(here)
        if finite and not bool(sound.all()):
            raise ValueError(f"{where}: {key!r} has values that are not finite")
        if finite and key in ("hessian_diag", "exp_avg_sq") and here.numel() and bool((here < 0).any()):
            raise ValueError(f"{where}: {key!r} has negative values")
    return [f"{where}: {key!r}" for key in entry if key not in keys]


def _check_number(where: str, key: str, value: object) -> None:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    real = isinstance(number, float | int) and not isinstance(number, bool)
    if key == "step" and not (real and 0 <= number <= _native.LARGEST_COUNT and int(number) == number):  # type: ignore
        raise ValueError(f"{where}: 'step' is {value!r}, expected a whole number from 0 to 2**53")
    if key == "beta2_power" and not (real and 0.0 <= number <= 1.0):  # type: ignore[operator]
        raise ValueError(f"{where}: 'beta2_power' is {value!r}, expected a number in [0, 1]")


def entry_for(p: Tensor, saved: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """A parameter's state as it was saved: copies, on the parameter's device, in the state's dtype. torch has cast it
    to the parameter's dtype, which would round float32 state to bfloat16."""
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    entry = {}
    for key in (*layout.numbers(options), *layout.streams(options)):
        if key in layout.NUMBERS:
            entry[key] = torch.as_tensor(saved[key]).detach().to("cpu", torch.float64, copy=True).reshape(())
        else:
            here = memory(p)
            shard = shard_like(saved[key], p).detach().to(here.device, dtype, copy=True)
            entry[key] = as_like(shard, p)
    return entry
