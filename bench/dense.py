"""Dense quasi-Newton methods for comparison: BFGS, self-scaled BFGS and self-scaled Broyden updates of an n x n matrix,
with SciPy's strong-Wolfe search (c1 = 1e-4, c2 = 0.9).

Sources: Al-Baali, Comput. Optim. Appl. 9 (1998) 191; Urban et al., arXiv:2405.04230; Kiyani et al., arXiv:2501.16371.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy
from scipy.linalg.blas import dger

__all__ = ["quasi_newton"]


def quasi_newton(meter: Any, kind: str) -> None:
    """Runs until the meter ends it. ``kind``: "bfgs", "ssbfgs" or "ssbroyden"."""
    x = meter.problem.x0.copy()
    known: dict[str, Any] = {}

    def both(z: np.ndarray) -> tuple[float, np.ndarray]:
        key = z.tobytes()
        if known.get("key") != key:
            known.update(key=key, value=meter.both(z))
        return known["value"]

    f, g = both(x)
    before, fresh = f + float(np.linalg.norm(g)) / 2, True
    inverse = np.asfortranarray(np.eye(x.size))
    while True:
        d = -inverse @ g
        alpha = None
        if d @ g < 0:
            alpha = scipy.optimize.line_search(
                lambda z: both(z)[0], lambda z: both(z)[1], x, d, g, f, before, c1=1e-4, c2=0.9, maxiter=30
            )[0]
        if alpha is None:
            if fresh:
                return
            inverse, fresh = np.asfortranarray(np.eye(x.size)), True
            continue
        s = alpha * d
        before, (f, g_new) = f, both(x + s)
        y, x = g_new - g, x + s
        if (ys := float(y @ s)) > 0:
            if fresh:
                inverse *= ys / float(y @ y)
            inverse = updated(inverse, s, y, ys, 1.0 if fresh else -alpha * float(s @ g) / ys, kind)
            fresh = False
        g = g_new


def updated(inverse: np.ndarray, s: np.ndarray, y: np.ndarray, ys: float, b: float, kind: str) -> np.ndarray:
    """The inverse after an update with the pair (s, y), in place; ``b`` = s B s / ys."""
    hy = inverse @ y
    yhy = float(y @ hy)
    h, tau, phi = yhy / ys, 1.0, 1.0
    if kind != "bfgs":
        tau = min(1.0, 1.0 / b)
    if kind == "ssbroyden":
        a = h * b - 1.0
        if a > 0.0:
            rho = min(1.0, h * (1.0 - math.sqrt(a / (1.0 + a))))
            theta = max((rho - 1.0) / a, min(1.0 / rho, (1.0 - b) / b))
            sigma = 1.0 + theta * a
            root = sigma ** (1.0 / (1.0 - s.size))
            phi = (1.0 - theta) / (1.0 + a * theta)
            tau = tau * min(root, 1.0 / theta) if theta > 0.0 else min(tau * root, sigma)
    v = math.sqrt(yhy) * (s / ys - hy / yhy)
    inverse = dger(-1.0 / yhy, hy, hy, a=inverse, overwrite_a=1)
    inverse = dger(phi, v, v, a=inverse, overwrite_a=1)
    if tau != 1.0:
        inverse *= 1.0 / tau
    return dger(1.0 / ys, s, s, a=inverse, overwrite_a=1)
