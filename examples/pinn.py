"""A physics-informed network, full batch, without a learning rate: Poisson's equation on the unit square.

    python examples/pinn.py [--iterations 1500]     two minutes on one core; draws pinn.png

Needs matplotlib. The solution is known, sin(pi x) sin(pi y), so the error is too.
"""

from __future__ import annotations

import argparse
import math

import torch
from fastnlcg import CGDescent
from torch import Tensor, nn

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--iterations", type=int, default=1500)
parser.add_argument("--out", default="pinn.png")
arguments = parser.parse_args()

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
inside = torch.rand(500, 2, requires_grad=True)
along, zero = torch.rand(50, 1), torch.zeros(50, 1)
border = torch.cat(
    [torch.cat(side, 1) for side in [(along, zero), (along, zero + 1), (zero, along), (zero + 1, along)]]
)


def exact(points: Tensor) -> Tensor:
    return torch.sin(math.pi * points[:, :1]) * torch.sin(math.pi * points[:, 1:])


source = 2 * math.pi**2 * exact(inside.detach())


def loss() -> Tensor:
    gradient = torch.autograd.grad(net(inside).sum(), inside, create_graph=True)[0]
    laplacian = sum(
        torch.autograd.grad(gradient[:, i].sum(), inside, create_graph=True)[0][:, i : i + 1] for i in range(2)
    )
    return ((laplacian + source) ** 2).mean() + 100 * (net(border) ** 2).mean()


optimizer = CGDescent(net.parameters())


def closure() -> Tensor:
    optimizer.zero_grad()
    value = loss()
    value.backward()
    return value


print("iteration  evaluations        loss  largest error")
axis = torch.linspace(0, 1, 65)
grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2)
for i in range(1, arguments.iterations + 1):
    value = optimizer.step(closure)
    if i in (1, 10, 100) or i % 500 == 0 or i == arguments.iterations:
        with torch.no_grad():
            error = (net(grid) - exact(grid)).abs().max().item()
        seen = optimizer.diagnostics()
        print(f"{i:9d}  {seen['evaluations']:11d}  {value:10.3e}  {error:13.3e}", flush=True)
    if message := optimizer.diagnostics()["message"]:
        print(message)
        break

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

with torch.no_grad():
    u = net(grid)
    pictures = {"the network": u.view(65, 65), "its error": (u - exact(grid)).view(65, 65)}
figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), constrained_layout=True)
for one, (title, picture) in zip(axes, pictures.items(), strict=True):
    figure.colorbar(one.imshow(picture.T.numpy(), origin="lower", extent=(0, 1, 0, 1)))
    one.set_title(title)
figure.savefig(arguments.out, dpi=120)
print(f"drawn: {arguments.out}")
