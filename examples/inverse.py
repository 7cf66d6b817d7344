"""An inverse problem without a learning rate: an image from its blurred, noisy picture, with total variation.

    python examples/inverse.py     some seconds; draws inverse.png

Needs matplotlib and tqdm. fastnlcg.minimize takes a function of one tensor, and torch differentiates it.
"""

from __future__ import annotations

import argparse

import torch
from fastnlcg import minimize
from torch import Tensor
from torch.nn.functional import conv2d

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--out", default="inverse.png")
arguments = parser.parse_args()

torch.manual_seed(0)
n = 96
i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
image = ((i - 30) ** 2 + (j - 36) ** 2 < 340).double() + 0.6 * (((i - 66).abs() < 14) & ((j - 60).abs() < 20)).double()
kernel = torch.exp(-((torch.arange(13.0, dtype=torch.float64) - 6) ** 2) / 10)
kernel /= kernel.sum()


def blur(x: Tensor) -> Tensor:
    rows = conv2d(x[None, None], kernel.view(1, 1, 1, -1), padding=(0, 6))
    return conv2d(rows, kernel.view(1, 1, -1, 1), padding=(6, 0))[0, 0]


data = blur(image) + 0.01 * torch.randn(n, n, dtype=torch.float64)


def loss(x: Tensor) -> Tensor:
    down, right = x[1:, :-1] - x[:-1, :-1], x[:-1, 1:] - x[:-1, :-1]
    return ((blur(x) - data) ** 2).sum() / 2 + 2e-3 * torch.sqrt(down**2 + right**2 + 1e-6).sum()


result = minimize(loss, data, gtol=1e-5, progress=True)
print(f"{result.message}: {result.nit} iterations, {result.nfev} evaluations, loss {result.fun:.6f}")
for name, x in (("blurred", data), ("restored", result.x)):
    print(f"{name}: root mean square error {(x - image).square().mean().sqrt():.4f}")

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), constrained_layout=True)
for one, (title, x) in zip(axes, {"image": image, "data": data, "restored": result.x}.items(), strict=True):
    one.imshow(x.numpy(), vmin=0, vmax=1, cmap="gray")
    one.set_title(title)
    one.axis("off")
figure.savefig(arguments.out, dpi=120)
print(f"drawn: {arguments.out}")
