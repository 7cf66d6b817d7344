"""The contents of a parameter group: options, with their checks, and the scalars of the method that survive a step.

Those scalars are tensors, like the state: ``"scalars"``, float64, one tensor that all groups share (its order is
:data:`fastnlcg._native.SCALARS`), and ``"alpha_prev"``, one number per group. They are on the parameters' device, where
the step writes them, and there is no other copy: ``param_groups`` and ``state`` are the complete state of the method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from fastnlcg import _native
from fastnlcg.line_search import OnlineLineSearch
from fastnlcg.options import SHARED, Options, check_real
from fastnlcg.tensors.checks import DTYPES
from fastnlcg.tensors.matrices import shape_of

COUNTS = ("step", "skipped_steps", "disagreements")
"""The scalars that are whole numbers."""
NUMBERS = ("scalars", "alpha_prev")
"""The entries of a group that are float64 tensors."""


_ROUNDING = 1e-15  # of a schedule: torch's LinearLR(end_factor=0.0) may end at about -5e-17 times the peak
_EARLIER = (19,)  # the number of scalars in files of 0.8: without those of the matrices


def new_scalars() -> Tensor:
    """The scalars before the first step."""
    return torch.tensor(list(_native.SCALARS.values()), dtype=torch.float64, device="cpu")


def lengthen_scalars(group: MutableMapping[str, Any]) -> None:
    """Adds the scalars that files of earlier versions lack, with the values before the first step."""
    scalars = group.get("scalars")
    if isinstance(scalars, Tensor) and scalars.dim() == 1 and scalars.numel() in _EARLIER:
        more = new_scalars()[scalars.numel() :].to(scalars.device, scalars.dtype)
        group["scalars"] = torch.cat([scalars.detach(), more])


def named_scalars(group: Mapping[str, Any]) -> dict[str, float]:
    """The scalars by name. Waits for their device."""
    return dict(zip(_native.SCALARS, group["scalars"].tolist(), strict=True))


def complete(groups: Sequence[MutableMapping[str, Any]], defaults: Mapping[str, Any]) -> None:
    """Adds missing entries to groups, in place: defaults, ``"scalars"``, which all groups share with the first, and
    ``"alpha_prev"``."""
    for group in groups:
        for key, value in defaults.items():
            group.setdefault(key, value)
        group.setdefault("scalars", groups[0].get("scalars"))
        if group["scalars"] is None:
            group["scalars"] = new_scalars()
        lengthen_scalars(group)
        if group.get("alpha_prev") is None:
            group["alpha_prev"] = torch.zeros((), dtype=torch.float64, device="cpu")


def take_over(group: MutableMapping[str, Any], others: Sequence[Mapping[str, Any]], preconditioner: str | None) -> None:
    """Adds to a new group the missing options that it must share with ``others``, the optimizer's groups.
    ``preconditioner``: the constructor's, which a group has if one of the others has it."""
    kind = others[0]["preconditioner"]
    if any(other["preconditioner"] == preconditioner for other in others):
        kind = preconditioner
    is_muon = group.setdefault("preconditioner", kind) == "muon"
    alike = next((other for other in others if (other["preconditioner"] == "muon") == is_muon), None)
    if alike is not None:
        group.setdefault("beta_max", alike["beta_max"])
    for key in SHARED:
        if key != "beta_max":
            group.setdefault(key, others[0][key])


def move_numbers(groups: Sequence[MutableMapping[str, Any]], device: torch.device) -> None:
    """Moves ``"scalars"``, which all groups share, and each group's ``"alpha_prev"`` to the parameters' device."""
    if not groups:
        return
    scalars = _placed(groups[0]["scalars"], device)
    for group in groups:
        group["scalars"] = scalars
        group["alpha_prev"] = _placed(group["alpha_prev"], device)


def _placed(number: Tensor, device: torch.device) -> Tensor:
    fits = number.dtype == torch.float64 and number.device == device and number.is_contiguous()
    return number if fits else number.detach().to(device, torch.float64, copy=True).contiguous()


def check(group: MutableMapping[str, Any]) -> None:
    """Checks one group by itself; TypeError or ValueError for the first wrong entry. Makes its values plain."""
    plain_values(group)
    check_lr(group["lr"], capturable=group["capturable"] is True)
    check_real("weight_decay", group["weight_decay"], minimum=0.0)
    for name in ("capturable", "differentiable"):
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be a bool, got {group[name]!r}")
    for name in ("foreach", "fused"):
        if not isinstance(group[name], bool | None):
            raise TypeError(f"{name} must be None or a bool, got {group[name]!r}")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")  # torch's words
    if group["differentiable"]:
        raise ValueError("differentiable=True is not supported: the step is native and not recorded by autograd")
    group.update(Options.of_group(group).for_group())


def check_matrices(index: int, p: Tensor, options: Options) -> None:
    """ValueError if the options need matrices and parameter ``index`` has none. A lazy parameter has no shape yet; its
    first step checks it."""
    if options.kind.of_matrices and not isinstance(p, UninitializedTensorMixin):
        shape_of(index, p, options)


def plain_values(group: MutableMapping[str, Any]) -> None:
    """Replaces what ``torch.load(weights_only=True)`` refuses: NumPy's numbers as lr and weight_decay, and an
    OnlineLineSearch."""
    for name in ("lr", "weight_decay"):
        value = group[name]
        if type(value) not in (float, int) and not isinstance(value, Tensor):
            group[name] = check_real(name, value)
    if isinstance(group.get("line_search"), OnlineLineSearch):
        group["line_search"] = group["line_search"].as_tuple()


def check_together(groups: Sequence[Mapping[str, Any]], begin: int = 1) -> None:
    """ValueError if a shared option of group ``begin`` or a later group differs from the first group's."""
    first = groups[0]
    for k, group in enumerate(groups[begin:], start=begin):
        is_muon = group["preconditioner"] == "muon"
        other, alike = next((j, g) for j, g in enumerate(groups) if (g["preconditioner"] == "muon") == is_muon)
        kinds = {group["preconditioner"], first["preconditioner"]}
        if "muon" in kinds and len(kinds) == 2 and kinds != {"adam", "muon"}:
            raise ValueError(
                f"preconditioner is {group['preconditioner']!r} in parameter group {k} and {first['preconditioner']!r} "
                "in group 0: if some groups have 'muon', the others must have 'adam'"
            )
        for key in ("preconditioner", "beta_max"):
            if group[key] != alike[key]:
                raise ValueError(
                    f"{key} is {group[key]!r} in parameter group {k} and {alike[key]!r} in group {other}: it may "
                    "differ only between groups with preconditioner='muon' and the others, because the sums of beta "
                    "run over all groups of either kind"
                )
        for key in SHARED:
            if key not in ("preconditioner", "beta_max") and group[key] != first[key]:
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
    """lr as a float, 0 if it is below 0 by rounding; or the tensor if it is on a GPU and ``capturable``: then the step
    reads it on the device."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")  # torch's words
        if capturable and _native.on_gpu(lr.device):
            if lr.dtype not in DTYPES:
                raise TypeError(f"lr must be a real number, got a tensor of {lr.dtype}")
            return lr
        lr = lr.item()
    if isinstance(lr, float) and -_ROUNDING < lr < 0.0:
        return 0.0
    return check_real("lr", lr, minimum=0.0)


def check_numbers(k: int, group: Mapping[str, Any], *, finite: bool = True) -> None:
    """Checks the scalars of group ``k`` of a state dict. ValueError for one that is missing or damaged; ``finite``: NaN
    and Inf count as damage."""
    for key in NUMBERS:
        where, value = f"param_groups[{k}][{key!r}]", group.get(key)
        if not isinstance(value, Tensor) or value.is_quantized or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else "missing" if key not in group else type(value).__name__
            raise ValueError(f"{where} is {got}, expected a floating-point tensor")
        if key == "scalars" and (value.dim() != 1 or value.numel() != len(_native.SCALARS)):
            raise ValueError(f"{where} has shape {tuple(value.shape)}, expected ({len(_native.SCALARS)},)")
        if key == "alpha_prev" and value.dim():
            raise ValueError(f"{where} has shape {tuple(value.shape)}, expected ()")
    if finite and not math.isfinite(group["alpha_prev"].item()):
        raise ValueError(f"param_groups[{k}]['alpha_prev'] is {group['alpha_prev'].item()!r}, expected a finite number")
    for key, value in zip(_native.SCALARS, group["scalars"].tolist(), strict=False):
        where = f"param_groups[{k}]['scalars'], {key!r},"
        if (key == "loss_prev" and not math.isnan(value)) or key == "grad_norm":
            continue  # an infinite loss_prev: no loss yet; grad_norm may be that of a step skipped because of it
        if not math.isfinite(value) and (finite or key in COUNTS):
            raise ValueError(f"{where} is {value!r}, expected a finite number")
        if key == "ls_scale" and not 0.0 < value <= 1.0:
            raise ValueError(f"{where} is {value!r}, expected 0 < ls_scale <= 1")
        if key in COUNTS and not (0 <= value <= 2**53 and int(value) == value):
            raise ValueError(f"{where} is {value!r}, expected a whole number from 0 to 2**53")
