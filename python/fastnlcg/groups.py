"""What a parameter group holds: options, their checks, and the scalars of the method that a checkpoint needs.

Options in ``SHARED`` hold for the whole optimizer, because its sums run over all groups; every group carries them, so
that checkpoints do. ``lr``, ``weight_decay`` and ``maximize`` may differ. The scalars lie in one entry of a group,
``"scalars"``: those of the method in the first group's, ``alpha_prev`` in every group's. Between two steps the native
side holds them; :meth:`NLCG.state_dict` brings the entry up to date.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from fastnlcg import _native
from fastnlcg.line_search import OnlineLineSearch
from fastnlcg.parameters import DTYPES

SHARED = (
    "update",
    "preconditioner",
    "line_search",
    "eps",
    "curvature_eps",
    "beta2",
    "beta_max",
    "restart",
    "nonfinite",
    "stochastic_rounding",
    "capturable",
)
# What groups of older versions lack, and what they mean.
SINCE = {
    "beta2": 0.999,
    "beta_max": None,
    "stochastic_rounding": False,
    "foreach": None,
    "fused": None,
    "differentiable": False,
}
FORMAT = 2  # of the scalars; 1: versions up to 0.3, which had them among the options
SCALARS = {
    "format": FORMAT,
    "step": 0.0,
    "skipped_steps": 0.0,
    "rz": 0.0,
    "grad_max": 0.0,
    "gg": 0.0,
    "gd": 0.0,
    "ls_scale": 1.0,
    "loss_prev": None,
}
"""Of the first group, before the first step."""
OF_GROUP = {"alpha_prev": 0.0}
_FORMAT_1 = ("rz", "gs", "shs", "grad_max", "gg", "gd", "ls_scale", "loss_prev", "skipped_steps", "alpha_prev")


def scalars_of(k: int) -> dict[str, Any]:
    """The scalars of group ``k`` before the first step."""
    return {**SCALARS, **OF_GROUP} if k == 0 else dict(OF_GROUP)


def complete(groups: Sequence[MutableMapping[str, Any]], defaults: Mapping[str, Any]) -> None:
    """Brings groups of an older version up to this one's, in place."""
    for k, group in enumerate(groups):
        for key, value in {**defaults, **SINCE}.items():
            group.setdefault(key, value)
        if "scalars" not in group and any(key in group for key in _FORMAT_1):
            old = {key: group.pop(key) for key in _FORMAT_1 if key in group}
            group["scalars"] = {key: old[key] for key in scalars_of(k) if key in old}
            if k == 0:
                group["scalars"] = {"format": 1, "step": 0.0, "gg": 0.0, "gd": 0.0, **group["scalars"]}
        group.setdefault("scalars", scalars_of(k))


def size_of(group: Mapping[str, Any]) -> tuple[int, int]:
    """Of its parameters: how many tensors, how many elements."""
    return len(group["params"]), sum(p.numel() for p in group["params"])


def check_whole(groups: Sequence[Mapping[str, Any]], sizes: Sequence[tuple[int, int]], process_group: object) -> None:
    """RuntimeError where the groups are not all there, or hold other parameters than were added: DeepSpeed's ZeRO puts
    this rank's share in the place of a group's parameters, and steps one group at a time."""
    if len(groups) != len(sizes):
        raise RuntimeError(
            f"{len(groups)} parameter groups, expected {len(sizes)}: this optimizer's sums run over all groups, so it "
            "cannot be stepped one group at a time, as DeepSpeed's ZeRO does (use add_param_group to add one)"
        )
    if "deepspeed" in sys.modules and process_group is None and list(map(size_of, groups)) != list(sizes):
        raise RuntimeError(
            "the groups hold other parameters than were added: DeepSpeed's ZeRO has put this rank's share in their "
            "place, and the sums would miss the rest; give process_group= (with one group), or use FSDP2"
        )


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The shared options of a group, as the native side and the reference take them."""
    options = {key: group[key] for key in SHARED}
    line_search = options["line_search"]
    options["line_search"] = None if line_search is None else OnlineLineSearch(*line_search)
    options["maximize"] = group["maximize"]
    return options


def check(group: Mapping[str, Any]) -> None:
    """Checks one group by itself. TypeError or ValueError for the first option that is wrong."""
    check_lr(group["lr"], capturable=group["capturable"] is True)
    _native.check_real("weight_decay", group["weight_decay"], minimum=0.0)
    for name in ("foreach", "fused"):
        if not isinstance(group[name], bool | None):
            raise TypeError(f"{name} must be None or a bool, got {group[name]!r}")
    if group["foreach"] and group["fused"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")  # torch's words
    if group["differentiable"]:
        raise ValueError("differentiable=True is not supported: the step is native and not recorded by autograd")
    line_search = group["line_search"]
    if line_search is not None and not (isinstance(line_search, tuple | list) and len(line_search) == 4):
        raise TypeError(f"line_search must be None or OnlineLineSearch(...).as_tuple() in a group, got {line_search!r}")
    _native.check_options(options_of(group))


def check_together(groups: Sequence[Mapping[str, Any]]) -> None:
    """ValueError where a shared option differs between groups."""
    first = groups[0]
    for k, group in enumerate(groups[1:], start=1):
        for key in SHARED:
            if group[key] != first[key]:
                raise ValueError(
                    f"{key} is {group[key]!r} in parameter group {k} and {first[key]!r} in group 0: only lr, "
                    "weight_decay and maximize may differ, because the sums run over all groups"
                )
        if group["maximize"] != first["maximize"] and first["line_search"] is not None:
            raise ValueError(
                f"maximize is {group['maximize']!r} in parameter group {k} and {first['maximize']!r} in group 0: with "
                "a line search it must not differ, because there is one loss"
            )


def check_lr(lr: object, *, capturable: bool = False) -> float | Tensor:
    """lr as a number; as it is where the step will read it on the device."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        if capturable and _native.on_gpu(lr.device):
            if lr.dtype not in DTYPES:
                raise TypeError(f"lr must be a real number, got a tensor of {lr.dtype}")
            return lr
        lr = lr.item()
    return _native.check_real("lr", lr, minimum=0.0)


def check_scalars(k: int, group: Mapping[str, Any], *, finite: bool = True) -> list[str]:
    """Checks the scalars of a group that was saved, and returns the names that this version does not know. ValueError
    for what is missing or damaged; ``finite``: NaN and Inf are damage."""
    where, scalars = f"param_groups[{k}]", group["scalars"]
    if not isinstance(scalars, Mapping):
        raise ValueError(f"{where}['scalars'] is {type(scalars).__name__}, expected a mapping")
    for key in scalars_of(k):
        if key in ("format", "step") and key not in scalars:
            continue  # of an older version
        if key not in scalars:
            raise ValueError(f"{where}['scalars'] lacks the key {key!r}")
        value = scalars[key]
        if value is None and key == "loss_prev":
            continue
        number = isinstance(value, float | int) and not isinstance(value, bool)
        if isinstance(value, int) and number and abs(value) > sys.float_info.max:
            number = False
        if not number or (not math.isfinite(value) and (finite or key in ("format", "step", "skipped_steps"))):
            raise ValueError(f"{where}['scalars'][{key!r}] is {value!r}, expected a finite number")
        if key == "ls_scale" and not 0.0 < value <= 1.0:
            raise ValueError(f"{where}['scalars']['ls_scale'] is {value!r}, expected 0 < ls_scale <= 1")
        if key in ("step", "skipped_steps", "format") and not (
            0 <= value <= _native.LARGEST_COUNT and int(value) == value
        ):
            raise ValueError(f"{where}['scalars'][{key!r}] is {value!r}, expected a whole number from 0 to 2**53")
    return [f"{where}['scalars'][{key!r}]" for key in scalars if key not in scalars_of(k)]
