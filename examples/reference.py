"""Minimizing a function with NLCG's reference, fastnlcg.reference.minimize: NumPy float64, no torch, no native code.

    python examples/reference.py

fastnlcg.reference defines the step of NLCG. Every kernel is tested against it, and it can be used by itself. For
fastnlcg.minimize, the full-batch method without a learning rate, see inverse.py.
"""

import numpy as np
from fastnlcg import reference


def rosenbrock(x: np.ndarray) -> tuple[float, np.ndarray]:
    """The chain of n = 64, and its gradient."""
    a, b = x[1:] - x[:-1] ** 2, 1.0 - x[:-1]
    gradient = np.zeros_like(x)
    gradient[1:] += 200.0 * a
    gradient[:-1] += -400.0 * x[:-1] * a - 2.0 * b
    return float(np.sum(100.0 * a**2 + b**2)), gradient


start = np.linspace(-1.0, 1.0, 64)
for preconditioner, lr in (("adam", 0.01), ("bfgs", 2e-4), (None, 2e-4)):
    run = reference.minimize(rosenbrock, start, steps=300, lr=lr, preconditioner=preconditioner)
    print(f"{preconditioner!s:<5} loss {run.losses[0]:8.2f} -> {run.losses[-1]:8.4f}")
