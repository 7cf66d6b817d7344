"""Functions of one array to minimize, and the ways to call ``minimize``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fastnlcg import minimize
from torch import Tensor

optimize = pytest.importorskip("scipy.optimize")


def rosenbrock(x: np.ndarray) -> tuple[float, np.ndarray]:
    t, g = x[1:] - x[:-1] ** 2, np.zeros_like(x)
    g[1:] = 200 * t
    g[:-1] -= 400 * x[:-1] * t + 2 * (1 - x[:-1])
    return float(np.sum(100 * t**2 + (1 - x[:-1]) ** 2)), g


def quartic(x: np.ndarray) -> tuple[float, np.ndarray]:
    """Its minimum is 0, at 1."""
    t = np.asarray(x) - 1.0
    return float(np.sum(t**2 + t**4)), 2 * t + 4 * t**3


def quartic_of_torch(x: Tensor) -> Tensor:
    return ((x - 1) ** 2 + (x - 1) ** 4).sum()


def direct(fun: Callable[..., Any], x0: Any, **options: Any) -> Any:
    return minimize(fun, x0, **options)


def through_scipy(fun: Callable[..., Any], x0: Any, **options: Any) -> Any:
    own = {k: options.pop(k) for k in ("callback", "bounds", "constraints", "tol", "hess", "hessp") if k in options}
    return optimize.minimize(fun, x0, jac=True, method=minimize, options=options, **own)


def of_torch(fun: Callable[..., Any], x0: Any, **options: Any) -> Any:
    return minimize(
        lambda x: tuple(torch.as_tensor(v, dtype=torch.float64) for v in fun(x.detach().numpy())),
        torch.as_tensor(x0, dtype=torch.float64),
        **options,
    )


WAYS = pytest.mark.parametrize("way", [direct, through_scipy, of_torch])
