"""An optimizer of your own from the parts of a step, over NumPy arrays: no torch.

    python examples/own_optimizer.py

The same functions take torch tensors, on a CPU or a GPU, and anything with the buffer protocol or DLPack. This is the
paper's step, diagonal BFGS with Fletcher-Reeves, on a badly scaled quadratic; ops.nlcg_step does it all in one call.
"""

import numpy as np
from fastnlcg import ops

n, lr, eps = 1000, 0.05, 1e-8
curvature = np.logspace(-1, 1, n).astype(np.float32)


def gradient(p: np.ndarray) -> np.ndarray:
    return curvature * p


p = np.ones(n, np.float32)
g = gradient(p)
h, d, g_prev = np.ones(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32)
rz = 0.0
for step in range(100):
    if step > 0:  # h from how the gradient has changed along the last move, alpha_prev * d
        ops.bfgs_diag_update(h, g, g_prev, d, alpha_prev=lr)
    rz_new = ops.preconditioned_dots(g, None, h, eps=eps).rz
    beta = min(rz_new / rz, 1.0) if rz else 0.0
    rz = rz_new
    # d = -g / (h + eps) + beta d, then p += lr d and g_prev = g
    ops.direction_update(d, g, h, beta=beta, eps=eps, p=p, alpha=lr, g_prev=g_prev)
    g = gradient(p)

print(f"loss {0.5 * float(np.sum(curvature * p * p)):.3g}, of {0.5 * float(curvature.sum()):.3g} at the start")
