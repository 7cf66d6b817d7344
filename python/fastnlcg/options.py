"""The options of a step, each defined once: default and check. The parameter groups, checkpoints, :mod:`fastnlcg.ops`,
the reference and the native module take them from this one. It needs neither torch nor the native module.

To add an option: a line of ``NLCG_OPTIONS`` in ``csrc/step_args.h``, a field of :class:`Options`, an argument of
:class:`fastnlcg.NLCG`, and the formula that uses it. To add a preconditioner: a header of its passes, a line of
``csrc/preconditioners.h``, a line of :data:`PRECONDITIONERS` and a class in :mod:`fastnlcg.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal

from fastnlcg.line_search import OnlineLineSearch

__all__ = [
    "PRECONDITIONERS",
    "Options",
    "Preconditioner",
    "check_below_one",
    "check_count",
    "check_positive",
    "check_real",
]

SMALLEST_EPS = 1.1754944e-38  # the smallest normal float32: anything smaller may be flushed to 0
LARGEST_COUNT = 2**53  # the largest step count: whole numbers up to this one are exact in a double


@dataclass(frozen=True)
class Preconditioner:
    """What Python needs to know about a preconditioner; its passes are in ``csrc/pass_*.h``."""

    native: str
    """its name in the native module"""
    diagonal: str | None = None
    """the state key of its own array"""
    start: float = 0.0
    """the value of that array before the first step"""
    keeps_gradient: bool = True
    """whether ``grad_prev`` is state even if no option needs it"""
    beta_max: float = 1.0
    """the default of the option ``beta_max``"""
    divides_by_eps: bool = False
    """whether the diagonal can be 0, so that eps must not be"""
    sums_last_move: bool = False
    """whether its decisions use the sums over the last move (``last_move`` of the native table)"""
    takes_bfloat16_state: bool = False
    """whether its state may be bfloat16"""
    of_matrices: bool = False
    """whether its parameters are matrices; another group of the optimizer may then have ``"adam"``"""


PRECONDITIONERS: dict[str | None, Preconditioner] = {
    "adam": Preconditioner(
        "adam", "exp_avg_sq", keeps_gradient=False, beta_max=0.9, divides_by_eps=True, takes_bfloat16_state=True
    ),
    "bfgs": Preconditioner("bfgs", "hessian_diag", start=1.0, sums_last_move=True),
    "muon": Preconditioner("muon", keeps_gradient=False, beta_max=0.95, takes_bfloat16_state=True, of_matrices=True),
    None: Preconditioner("none"),
}


def check_real(name: str, value: object, *, minimum: float = -math.inf) -> float:
    """``value`` as a float; TypeError unless it is a real number, ValueError unless it is finite and >= ``minimum``.
    Accepts NumPy's numbers, and its arrays of no dimension."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond the largest double
        number = math.inf
    if not (math.isfinite(number) and number >= minimum):
        bound = "" if minimum == -math.inf else f" and >= {minimum:g}"
        what = "Invalid learning rate" if name == "lr" else f"Invalid {name}"
        raise ValueError(f"{what}: {value!r}; expected a finite number{bound}")
    return number


def check_count(name: str, value: object, *, minimum: int = 1) -> int:
    """``value`` as an int; TypeError or ValueError unless it is a whole number >= ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"Invalid {name}: {value!r}; expected at least {minimum}")
    return int(value)


def check_positive(name: str, value: object) -> float:
    """``value`` as a float; TypeError or ValueError unless it is a finite number >= 0."""
    return check_real(name, value, minimum=0.0)


Check = Callable[[str, Any], object]


def _one_of(*choices: object) -> Check:
    def check(name: str, value: object) -> object:
        if isinstance(value, str | None) and value in choices:
            return value
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")

    return check


def _bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def _non_negative(name: str, value: object) -> float:
    return check_real(name, value, minimum=0.0)


def check_below_one(name: str, value: object) -> float:
    """``value`` as a float; TypeError or ValueError unless it is a real number in [0, 1)."""
    number = check_real(name, value, minimum=0.0)
    if number >= 1.0:
        raise ValueError(f"Invalid {name}: {value!r}; expected a number in [0, 1)")
    return number


def _at_most_one_or_none(name: str, value: object) -> float | None:
    if value is None:
        return None
    number = check_real(name, value, minimum=0.0)
    if number > 1.0:
        raise ValueError(f"Invalid {name}: {value!r}; expected None or a number in [0, 1]")
    return number


def _norm_or_none(name: str, value: object) -> float | None:
    if value is None:
        return None
    number = math.inf if value == math.inf else check_real(name, value)
    if number <= 0.0:
        raise ValueError(
            f"Invalid {name}: {value!r}; expected None or a number > 0; inf measures the norm and does nothing else"
        )
    return number


def _line_search(name: str, value: object) -> object:
    if not isinstance(value, OnlineLineSearch | None):
        raise TypeError(f"{name} must be None or an OnlineLineSearch(), got {value!r}")
    return value


def _split(name: str, value: object) -> int | tuple[int, ...] | None:
    if value is None:
        return None
    parts = (value,) if isinstance(value, Integral) else value
    if (
        not isinstance(parts, Sequence)
        or isinstance(parts, str | bytes)
        or not parts
        or any(isinstance(part, bool) or not isinstance(part, Integral) for part in parts)
    ):
        raise TypeError(f"{name} must be None, an int or a sequence of ints, got {value!r}")
    if any(part < 1 for part in parts):
        raise ValueError(f"Invalid {name}: {value!r}; expected ints >= 1")
    return int(value) if isinstance(value, Integral) else tuple(map(int, parts))


def _state_dtype(name: str, value: object) -> str | None:
    text = str(value).removeprefix("torch.")  # this module does without torch
    if value is None or text == "bfloat16":
        return None if value is None else text
    raise (ValueError if isinstance(value, str) or "torch." in str(value) else TypeError)(
        f"{name} must be None (the parameters' float64, or else float32) or torch.bfloat16, got {value!r}"
    )


def _option(default: object, check: Check, *, of_group: bool = False, native: bool = True) -> Any:
    """``of_group``: may differ between parameter groups; ``native``: the native step has it too."""
    return field(default=default, metadata={"check": check, "of_group": of_group, "native": native})


@dataclass(frozen=True)
class Options:
    """The options of a step, other than lr and weight_decay; see :class:`fastnlcg.NLCG` for the meaning of each.

    Raises:
        TypeError, ValueError: for the first option of the wrong kind or value.
    """

    update: Literal["fletcher_reeves", "polak_ribiere", "heavy_ball"] = _option(
        "fletcher_reeves", _one_of("fletcher_reeves", "polak_ribiere", "heavy_ball")
    )
    preconditioner: Literal["adam", "bfgs", "muon"] | None = _option("adam", _one_of(*PRECONDITIONERS))
    line_search: OnlineLineSearch | None = _option(None, _line_search)  # noqa: RUF009
    eps: float = _option(1e-8, _non_negative)
    curvature_eps: float = _option(1e-8, _non_negative)
    beta2: float = _option(0.999, check_below_one)
    beta_max: float | None = _option(None, _at_most_one_or_none)
    max_grad_norm: float | None = _option(None, _norm_or_none)
    skip_grad_norm: float | None = _option(None, _norm_or_none)
    nonfinite: Literal["skip", "propagate"] = _option("skip", _one_of("skip", "propagate"))
    stochastic_rounding: bool = _option(False, _bool)
    state_dtype: str | None = _option(None, _state_dtype, native=False)
    maximize: bool = _option(False, _bool, of_group=True)
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = _option(
        "match_rms_adamw", _one_of("match_rms_adamw", "original"), of_group=True, native=False
    )
    stacked: bool = _option(False, _bool, of_group=True, native=False)
    split: int | tuple[int, ...] | None = _option(None, _split, of_group=True, native=False)

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, option.metadata["check"](option.name, getattr(self, option.name)))
        if self.kind.divides_by_eps and self.eps < SMALLEST_EPS:
            raise ValueError(
                f"Invalid eps: {self.eps!r}; expected at least {SMALLEST_EPS:g} with preconditioner="
                f"{self.preconditioner!r}, whose diagonal is 0 for elements whose gradients were all 0"
            )
        if self.update == "heavy_ball" and self.largest_beta >= 1.0:
            raise ValueError("expected beta_max < 1 with update='heavy_ball', which sets beta = beta_max; got 1")
        if self.state_dtype is not None and not self.kind.takes_bfloat16_state:
            raise ValueError(
                f"state_dtype is {self.state_dtype!r} with preconditioner={self.preconditioner!r}; expected None: only "
                "'adam' and 'muon' take state in bfloat16"
            )
        if not self.kind.of_matrices:
            for name in ("adjust_lr_fn", "stacked", "split"):
                if getattr(self, name) != getattr(Options, name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r} with preconditioner={self.preconditioner!r}; it is an "
                        "option of preconditioner='muon'"
                    )
        elif self.update == "polak_ribiere":
            raise ValueError(
                "update is 'polak_ribiere' with preconditioner='muon'; expected 'fletcher_reeves' or 'heavy_ball', "
                "which need no grad_prev: its state is the direction alone"
            )

    @property
    def kind(self) -> Preconditioner:
        """The preconditioner."""
        return PRECONDITIONERS[self.preconditioner]

    @property
    def largest_beta(self) -> float:
        """``beta_max``, or the preconditioner's default."""
        return self.kind.beta_max if self.beta_max is None else self.beta_max

    @property
    def keeps_gradient(self) -> bool:
        """Whether the state has ``grad_prev``: the preconditioner or ``rz_mid`` needs it."""
        return self.kind.keeps_gradient or self.update == "polak_ribiere"

    @property
    def measures_norm(self) -> bool:
        """Whether a step forms the norm of the gradient."""
        return self.max_grad_norm is not None or self.skip_grad_norm is not None

    def state_arrays(self) -> dict[str, float]:
        """The tensors of a parameter's state by key, with their value before the first step."""
        start_values = {"direction": 0.0}
        if self.keeps_gradient:
            start_values["grad_prev"] = 0.0
        if self.kind.diagonal is not None:
            start_values[self.kind.diagonal] = self.kind.start
        return start_values

    def native(self) -> dict[str, Any]:
        """The options by the names of ``NLCG_OPTIONS`` in ``csrc/step_args.h``."""
        values = {option.name: getattr(self, option.name) for option in fields(self) if option.metadata["native"]}
        search = values["line_search"]
        return {
            **{name: value for name, value in values.items() if name != "nonfinite"},
            **asdict(search or OnlineLineSearch()),
            "line_search": search is not None,
            "preconditioner": self.kind.native,
            "beta_max": self.largest_beta,
            "beta_max_matrices": self.largest_beta,
            "measure_norm": self.measures_norm,
            "max_grad_norm": math.inf if self.max_grad_norm is None else self.max_grad_norm,
            "skip_grad_norm": math.inf if self.skip_grad_norm is None else self.skip_grad_norm,
            "skip_nonfinite": self.nonfinite == "skip",
        }

    # ---- in a parameter group, whose values torch.load(weights_only=True) must accept ----

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> Options:
        """The options in a parameter group."""
        values = {option.name: group[option.name] for option in fields(cls)}
        search = values["line_search"]
        if not isinstance(search, OnlineLineSearch | None):
            if not (isinstance(search, tuple | list) and len(search) == 4):
                raise TypeError(
                    f"line_search must be None, an OnlineLineSearch() or its as_tuple() in a group, got {search!r}"
                )
            values["line_search"] = OnlineLineSearch(*search)
        return cls(**values)

    def for_group(self) -> dict[str, Any]:
        """The entries of a parameter group for these options."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {**values, "line_search": None if self.line_search is None else self.line_search.as_tuple()}


def native_options(of_groups: Sequence[Options]) -> dict[str, Any]:
    """The options of the native step of an optimizer with these groups, which :func:`fastnlcg.tensors.groups` has
    checked together: some may be ``"muon"``, the others are then ``"adam"``."""
    rest = [options for options in of_groups if not options.kind.of_matrices]
    matrices = [options for options in of_groups if options.kind.of_matrices]
    native = (rest or matrices)[0].native()
    if matrices:
        native |= {"preconditioner": matrices[0].kind.native, "beta_max_matrices": matrices[0].largest_beta}
    return native


SHARED = tuple(option.name for option in fields(Options) if not option.metadata["of_group"])
"""The options that all groups of an optimizer share, because its sums run over all groups; preconditioner and beta_max
only those that are ``"muon"``, and those that are not."""
NAMES = tuple(option.name for option in fields(Options))
