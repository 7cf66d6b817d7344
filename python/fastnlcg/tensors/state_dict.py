"""Checks of a state dict: it is loaded as a whole, or refused before anything has changed.

A missing or damaged entry is a ValueError. Entries that other code has put into a parameter's state are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastnlcg.options import Options
from fastnlcg.tensors import groups
from fastnlcg.tensors.checks import has_storage
from fastnlcg.tensors.dtensor import as_like, memory, shard_like
from fastnlcg.tensors.state import state_dtype
from fastnlcg.tensors.table import parameters
from fastnlcg.warn import warn

if TYPE_CHECKING:
    from fastnlcg.nlcg import NLCG

WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"))
"""Parts that wrappers of a module add to its parameters' names: torch.compile, FSDP1, activation checkpointing,
Fabric."""


def structure(given: object, own: list[dict[str, Any]]) -> tuple[dict[Any, Any], list[Mapping[str, Any]]]:
    """State and groups of a state dict of any optimizer. ValueError unless its groups have as many parameters as the
    groups ``own``, in the same order. Empty entries are left out: reading ``optimizer.state[p]`` makes them."""
    if not isinstance(given, Mapping) or not {"state", "param_groups"} <= set(given):
        keys = f"the keys {sorted(map(str, given))[:4]}" if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"not a state dict: got {keys}, expected a mapping with the keys 'state' and 'param_groups'")
    state, saved = given["state"], given["param_groups"]
    if not isinstance(saved, list) or not all(isinstance(g, Mapping) and "params" in g for g in saved):
        raise ValueError("param_groups must be a list of mappings with the key 'params'")
    sizes, own_sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in own]
    if sizes != own_sizes:
        raise ValueError(f"param_groups have {sizes} parameters, expected {own_sizes}")
    indices = {index for g in saved for index in g["params"]}
    if len(indices) != sum(sizes):
        raise ValueError(f"param_groups name a parameter twice: {[list(g['params']) for g in saved]}")
    if not isinstance(state, Mapping):
        raise ValueError(f"state must be a mapping, got {type(state).__name__}")
    _check_names(saved, own)
    entries = {index: entry for index, entry in state.items() if not (isinstance(entry, Mapping) and not entry)}
    for index in entries:
        if index not in indices and not isinstance(index, str):  # a string may be an entry of a hook
            raise ValueError(f"state has an entry for parameter {index!r}, which no group names")
    return entries, saved


def checked(optimizer: NLCG, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` in the form in which it will be loaded. ValueError unless ``optimizer`` can load all of it."""
    own = optimizer.param_groups
    entries, saved = structure(given, own)
    for k, group in enumerate(saved):
        if not {"update", "preconditioner"} <= set(group):
            raise ValueError(
                f"param_groups[{k}] has {sorted(map(str, group))}, expected the keys of NLCG's, 'update' and "
                "'preconditioner' among them; is it another optimizer's? load_adamw_state_dict() takes AdamW's"
            )
    whole = [dict(group) for group in saved]
    if not any(_is_ours(entry) for entry in entries.values()) and not any("scalars" in group for group in whole):
        # Saved by an optimizer that has never stepped: the scalars are those before the first step.
        groups.complete(whole, optimizer.defaults)
    for group, ours in zip(whole, own, strict=True):
        if "param_names" in group and "param_names" in ours:
            group["param_names"] = ours["param_names"]  # this model's wrappers may differ from those of the saved one
    for group in whole:
        for key, value in optimizer.defaults.items():
            group.setdefault(key, value)
        groups.lengthen_scalars(group)
    for k, group in enumerate(whole):
        try:
            groups.check(group)
        except (TypeError, ValueError) as error:
            raise ValueError(f"param_groups[{k}]: {error}") from error
        groups.check_numbers(k, group, finite=group["nonfinite"] == "skip")
    if whole:
        groups.check_together(whole)
        _share_scalars(whole)
    options_of = _options_of(whole)
    for i, (index, p) in enumerate(named(whole, own).items()):
        options = options_of[index]
        groups.check_matrices(i, p, options)
        if p.requires_grad or index in entries:
            state_dtype(p, options.state_dtype, f"parameter {i}")
        if index in entries:
            _check_entry(index, p, entries[index], options)
    return {**given, "state": entries, "param_groups": whole}


def warn_of_changes(own: list[dict[str, Any]], whole: list[Mapping[str, Any]]) -> None:
    """Warns if the file of ``whole`` brings another method or another dtype of the state than the groups have."""
    changes: dict[str, str] = {}
    for k, (ours, theirs) in enumerate(zip(own, whole, strict=True)):
        for key in ("preconditioner", "state_dtype"):
            if theirs[key] != ours[key]:
                changes.setdefault(key, f"{key} of parameter group {k} from {ours[key]!r} to {theirs[key]!r}")
    if changes:
        warn(
            f"load_state_dict() changes {' and '.join(changes.values())}: the options of the state dict replace "
            "those of the optimizer, as in torch's optimizers"
        )


def named(saved: list[Any], own: list[dict[str, Any]]) -> dict[Any, Tensor]:
    """The parameters by the keys that a state dict has for them."""
    return dict(zip(parameters(saved), parameters(own), strict=True))


def _options_of(saved: list[Any]) -> dict[Any, Options]:
    """The options of every parameter, by the keys that a state dict has for them."""
    of_groups = [(group, Options.of_group(group)) for group in saved]
    return {index: options for group, options in of_groups for index in group["params"]}


def _share_scalars(whole: list[dict[str, Any]]) -> None:
    scalars = whole[0]["scalars"].detach().to("cpu", torch.float64, copy=True).contiguous()
    for group in whole:
        group["scalars"] = scalars
        group["alpha_prev"] = group["alpha_prev"].detach().to("cpu", torch.float64, copy=True)


def _is_ours(entry: object) -> bool:
    return isinstance(entry, Mapping) and "direction" in entry


def _check_names(saved: list[Mapping[str, Any]], own: list[dict[str, Any]]) -> None:
    """Parameters are matched by their order: ValueError if both sides have names, in different orders."""
    places, theirs, ours = [], [], []
    for k, (group, mine) in enumerate(zip(saved, own, strict=True)):
        names = names_of(group)
        if names is None or "param_names" not in mine:
            continue
        if len(names) != len(mine["param_names"]):
            raise ValueError(
                f"param_groups[{k}]['param_names'] has {len(names)} names, expected {len(mine['param_names'])}, one "
                "per parameter"
            )
        places += [(k, i) for i in range(len(names))]
        theirs += names
        ours += mine["param_names"]
    for (k, i), name, expected, a, b in zip(places, theirs, ours, bare_names(theirs), bare_names(ours), strict=True):
        if a != b:
            raise ValueError(
                f"param_groups[{k}]['param_names'][{i}] is {name!r}, expected {expected!r}: state is matched to "
                "parameters by their order, and the orders differ"
            )


def names_of(group: Mapping[str, Any]) -> list[str] | None:
    """The names of the parameters of a saved group, which FSDP and torch.distributed.checkpoint put in the place of
    indices; None if it has none."""
    names: list[str] = group.get("param_names", group["params"])
    return names if names and all(isinstance(name, str) for name in names) else None


def bare_names(names: list[str]) -> list[tuple[str, ...]]:
    """Names without the parts that wrappers have added. DDP adds ``module``, which may also be the name of one of the
    user's modules: it is left out if all names begin with it, and elsewhere only if all names stay different."""
    parts = [tuple(part for part in name.split(".") if part not in WRAPPERS) for name in names]
    while parts and all(len(x) > 1 and x[0] == "module" for x in parts):
        parts = [x[1:] for x in parts]
    short = [tuple(part for part in x if part != "module") for x in parts]
    return short if len(set(short)) == len(short) else parts


def _check_entry(index: Any, p: Tensor, entry: object, options: Options) -> None:
    where = f"state of parameter {index}"
    keys = {"step", *options.state_arrays()}
    if not isinstance(entry, Mapping) or not keys <= set(entry):
        got = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
        whose = "" if _is_ours(entry) else "; is it another optimizer's?"
        raise ValueError(f"{where} has {got}, expected the keys {sorted(keys)}{whose}")
    for key in sorted(keys):
        if key == "step":
            check_step(where, entry[key])
        else:
            check_tensor(where, key, entry[key], p, finite=options.nonfinite == "skip")


def check_tensor(where: str, key: str, value: object, p: Tensor, *, finite: bool) -> None:
    """ValueError unless ``value`` can be state of ``p``. ``finite``: NaN, Inf and negative diagonals count as
    damage."""
    if not isinstance(value, Tensor) or value.is_quantized or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where}: {key!r} is {kind}, expected a floating-point tensor")
    if value.shape != p.shape:
        raise ValueError(f"{where}: {key!r} has shape {tuple(value.shape)}, expected {tuple(p.shape)}")
    local = memory(value)
    if not has_storage(local) or local.is_meta:
        kind = f"{type(local).__name__} on {local.device}"
        raise ValueError(f"{where}: {key!r} is a {kind}, without values; expected a plain tensor or a DTensor")
    converted = local if p.dtype == torch.float64 else local.float()
    if finite and not bool(torch.isfinite(converted).all()):
        raise ValueError(f"{where}: {key!r} has values that are not finite")
    if finite and key in ("hessian_diag", "exp_avg_sq") and local.numel() and bool((local < 0).any()):
        raise ValueError(f"{where}: {key!r} has negative values")


def check_step(where: str, value: object) -> None:
    """ValueError unless ``value`` is a whole number of steps."""
    number = value
    if isinstance(value, Tensor):
        number = value.item() if value.numel() == 1 and not value.is_quantized else None
    if (
        not isinstance(number, float | int)
        or isinstance(number, bool)
        or not 0 <= number <= 2**53
        or int(number) != number
    ):
        raise ValueError(f"{where}: 'step' is {value!r}, expected a whole number from 0 to 2**53")


def without(
    whole: Mapping[str, Any], own: list[dict[str, Any]], entries: Mapping[Tensor, Mapping[str, Any]]
) -> dict[Any, Any]:
    """The state of ``whole`` without what ``entries`` has."""
    known = {index: entries.get(p, {}) for index, p in named(whole["param_groups"], own).items()}
    return {
        index: {key: value for key, value in entry.items() if key not in known.get(index, {})}
        if isinstance(entry, Mapping)
        else entry
        for index, entry in whole["state"].items()
    }


def entries_for(optimizer: NLCG, whole: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """Every parameter's state as it was saved: copies, on the parameter's device, in the state's dtype. torch's own
    load would cast to the parameter's dtype, which would round float32 state to bfloat16."""
    entries = {}
    options_of = _options_of(whole["param_groups"])
    for index, p in named(whole["param_groups"], optimizer.param_groups).items():
        if index not in whole["state"]:
            continue
        saved = whole["state"][index]
        device = memory(p).device
        dtype, arrays = state_dtype(p, options_of[index].state_dtype), options_of[index].state_arrays()
        entries[p] = {
            key: torch.tensor(float(value), dtype=torch.float64, device=device)
            if key == "step"
            else as_like(shard_like(value, p).detach().to(device, dtype, copy=True), p)
            for key, value in saved.items()
            if key == "step" or key in arrays
        }
    return entries
