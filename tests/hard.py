"""Checks that take too long for every commit: fuzzing, kills, mutations, a soak. Prints a table of figures; on a
finding it prints the seed or the input that shows it, and exits with status 1.

    make hard                                       everything, an hour and a half on two cores
    python tests/hard.py --only kills soak          some of it
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import datetime
import itertools
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import torch
from fastnlcg import NLCG, OnlineLineSearch, _native
from stateful_run import DTYPES, StatefulRun, random_options
from torch import nn

ROOT = Path(__file__).parent.parent
SANITIZED = ROOT / "build" / "sanitized"


class Lost(Exception):  # noqa: N818
    """A finding."""


def sanitizers() -> dict[str, str]:
    """The environment of a process whose fastnlcg is built with sanitizers (make sanitize)."""
    libraries = [
        subprocess.run(["gcc", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    path = os.pathsep.join([str(SANITIZED), str(ROOT / "tests")])
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": path}


def this_script(*arguments: object, **environment: str) -> str:
    """The last line of a process that does one job of JOBS."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise Lost(f"{' '.join(map(str, arguments))}: status {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout.strip().split("\n")[-1]


def with_and_without_sanitizers(job: str, seconds: int) -> list[int]:
    """What two processes side by side counted, the second under sanitizers where they are built."""
    environments = [{}, sanitizers()] if SANITIZED.exists() else [{}]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = [pool.submit(this_script, "--job", job, k, seconds, **e) for k, e in enumerate(environments)]
        return [int(f.result()) for f in found]


# ---- fuzzing ---------------------------------------------------------------------------------------------------------


def job_stateful_runs(worker: int, seconds: int) -> int:
    """Steps of random training runs, each compared with the reference."""
    steps, end = 0, time.monotonic() + seconds
    for seed in itertools.count(1_000_000 * (worker + 1)):
        if time.monotonic() > end:
            return steps
        rng = np.random.default_rng(seed)
        options = random_options(lambda choices, rng=rng: choices[rng.integers(len(choices))])
        run = StatefulRun(seed, DTYPES[seed % 2], options)
        try:
            for k in rng.integers(2 * len(StatefulRun.OPERATIONS), size=60):  # half of them are steps
                StatefulRun.OPERATIONS[k if k < len(StatefulRun.OPERATIONS) else 0](run)
        except Exception as error:
            raise Lost(f"StatefulRun(seed={seed}): {error!r}") from error
        steps += run.steps + run.skipped
    return steps


def job_arguments(worker: int, seconds: int) -> int:
    """Random calls of ops, loads of state dicts, and sequences of native calls."""
    calls, end = 0, time.monotonic() + seconds
    source = random.Random(worker + 10)
    while time.monotonic() < end:
        data = source.randbytes(source.choice([20, 60, 120]))
        try:
            fuzz.one_input(data)
        except Exception as error:
            raise Lost(f"fuzz.one_input(bytes.fromhex({data.hex()!r})): {error!r}") from error
        calls += 1
    return calls


def fuzz_steps(scale: float) -> dict[str, Any]:
    plain, *checked = with_and_without_sanitizers("stateful_runs", int(300 * scale))
    return {"steps compared with the reference": plain + sum(checked), "of them under sanitizers": sum(checked)}


def fuzz_arguments(scale: float) -> dict[str, Any]:
    plain, *checked = with_and_without_sanitizers("arguments", int(240 * scale))
    return {"calls": plain + sum(checked), "of them under sanitizers": sum(checked)}


def fuzz_guided(scale: float) -> dict[str, Any]:
    """Ten minutes of atheris, which looks for inputs that reach new lines."""
    seconds = int(600 * scale)
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.mkdtemp())
    if "No module named 'atheris'" in done.stderr:
        return {"not run": "atheris is not installed"}
    if done.returncode:
        raise Lost((done.stdout + done.stderr)[-3000:])
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr + done.stdout)
    return {"inputs": int(runs[1]) if runs else 0, "seconds": seconds}


def configurations(scale: float) -> dict[str, Any]:
    """Instruction sets, threads and addresses change no bit of a random training run."""
    seeds, sets = range(int(100 * scale) + 1), _native.instruction_sets()
    for seed in seeds:
        ends = set()
        for isa, threads in itertools.product(sets, (1, 2)):
            os.environ["FASTNLCG_ISA"] = isa
            torch.set_num_threads(threads)
            rng = np.random.default_rng(seed)
            options = random_options(lambda choices, rng=rng: choices[rng.integers(len(choices))])
            run = StatefulRun(seed, DTYPES[seed % 2], options, check=False)
            for k in rng.integers(len(StatefulRun.OPERATIONS), size=60):
                StatefulRun.OPERATIONS[k](run)
            ends.add(run.bits())
        if len(ends) > 1:
            raise Lost(f"seed {seed}, {options}: {len(ends)} results")
    del os.environ["FASTNLCG_ISA"]
    return {"configurations": len(seeds) * len(sets) * 2, "training runs": len(seeds)}


# ---- kills -----------------------------------------------------------------------------------------------------------


def train(folder: Path, kind: str | None, steps: int, pause: float) -> str:
    """Goes on from the checkpoint, writes one after every step; the parameters' bytes at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = NLCG(
        model.parameters(), 0.02, preconditioner=kind, update="polak_ribiere", line_search=OnlineLineSearch()
    )
    file = folder / "checkpoint.pt"
    begin = 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        begin = saved["step"]
    for t in range(begin, steps):
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        loss = (model(x) - x.prod(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step(loss=loss.detach())
        new = folder / "new.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": t + 1}, new)
        os.replace(new, file)
        time.sleep(pause)
    return "".join(p.detach().numpy().tobytes().hex() for p in model.parameters())


def kills(scale: float) -> dict[str, Any]:
    """SIGKILL at random moments of training and saving, until the run has ended; it has the bits of a run without."""
    source, killed, resumed = random.Random(0), 0, 0
    wanted = int(540 * scale)
    torch.set_num_threads(1)
    for kind in itertools.cycle(["adam", "bfgs", None]):
        with tempfile.TemporaryDirectory() as calm, tempfile.TemporaryDirectory() as rough:
            expected = train(Path(calm), kind, 40, 0.0)
            finished = False
            while not finished:
                child = os.fork()
                if child == 0:
                    try:
                        same = train(Path(rough), kind, 40, 0.001) == expected
                        os._exit(0 if same else 3)
                    except BaseException as error:
                        print(repr(error), file=sys.stderr, flush=True)
                        os._exit(4)
                time.sleep(source.uniform(0.0, 0.03))
                os.kill(child, signal.SIGKILL)
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                if status > 0:
                    raise Lost(f"{kind}, resumed after {killed} kills: status {status}")
                finished = status == 0
                killed += not finished
            resumed += 1
        if killed >= wanted:
            return {"kills": killed, "runs that ended with the same bits": resumed}
    raise AssertionError


# ---- soak ------------------------------------------------------------------------------------------------------------


def job_soak(worker: int, steps: int) -> int:
    """A small model with every option in turn. Prints a digest; memory may not grow."""
    import hashlib

    torch.set_num_threads(1 + worker)
    digest = hashlib.sha256()
    source = np.random.default_rng(0)
    taken, resident = 0, 0
    for round_ in itertools.count():
        options = random_options(lambda choices: choices[source.integers(len(choices))])
        ps = [nn.Parameter(torch.from_numpy(source.standard_normal(n)).float()) for n in (3, 40, 5000)]
        optimizer = NLCG(ps, 1e-3, **options)
        target = [torch.from_numpy(source.standard_normal(p.shape)).float() for p in ps]
        sign = -1.0 if options["maximize"] else 1.0
        for t in range(500):
            for p, goal in zip(ps, target, strict=True):
                p.grad = sign * (p.detach() - goal) * (1.0 + 0.1 * (t % 7))
            if t % 97 == 5:
                ps[1].grad[3] = float("nan")
            optimizer.step(loss=float(t % 11))
            if t % 50 == 0:
                optimizer.diagnostics()
            if t % 100 == 99:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        taken += 500
        for p in ps:
            if not bool(torch.isfinite(p).all()):
                raise Lost(f"round {round_}, {options}: a parameter is not finite")
            digest.update(p.detach().numpy().tobytes())
        if round_ == 20:
            resident = memory()
        if taken >= steps:
            grown = memory() - resident
            if grown > 8e6:
                raise Lost(f"resident memory grew by {grown / 1e6:.1f} MB")
            print(digest.hexdigest(), int(grown))
            return taken
    raise AssertionError


def memory() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def soak(scale: float) -> dict[str, Any]:
    """Twice, with one thread and with two: the same bits."""
    steps = max(500 * 25, int(100_000 * scale))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(this_script, "--job", "soak", k, steps) for k in (0, 1)]
        ends = [run.result().split() for run in runs]
    if ends[0][0] != ends[1][0]:
        raise Lost("two identical runs differ")
    return {"steps, twice": steps, "kB more memory": max(int(end[1]) for end in ends) // 1000}


# ---- mutation --------------------------------------------------------------------------------------------------------

FORMULAS, DECISIONS, ADAM = "csrc/elementwise.h", "csrc/decisions.h", "csrc/pass_adam.h"
HALF, ARGS = "csrc/half.h", "csrc/step_args.h"
MUON, PAIRS, ROTATION = "csrc/pass_muon.h", "csrc/pass_pairs.h", "python/fastnlcg/full_batch/rotation.py"
MUTANTS: dict[str, tuple[str, str, str]] = {
    "a dropped store: d": (ADAM, "    at.set_diagonal(v);\n    at.set_d(d);\n", "    at.set_diagonal(v);\n"),
    "a wrong sign: d_new = w + beta d": (FORMULAS, "return beta * d - w;", "return beta * d + w;"),
    "the new h for the old": (
        ADAM,
        "const T h_old = adam_diagonal(v_old, at.inv_sqrt_bias_prev());",
        "const T h_old = h;",
    ),
    "a float sum": (
        "csrc/cpu_passes.h",
        "sums[j] += partial[j];",
        "sums[j] = static_cast<float>(sums[j] + partial[j]);",
    ),
    "a lost run": ("csrc/cpu_tile.h", "  sums.end_run();\n  for (int j = 0;", "  for (int j = 0;"),
    "state in bfloat16: one array's random bits for another": (
        "csrc/cpu_tile.h",
        "store_state(arrays.diagonal + i, x, flags.of_diagonal.shift)",
        "store_state(arrays.diagonal + i, x, 0)",
    ),
    "a lost tail": (ARGS, "n / kTile + (n % kTile != 0)", "n / kTile + (n % kTile > 1)"),
    "a stale scalar: rz": (DECISIONS, "  plan.next.rz = rz_new;\n", ""),
    "the curvature condition without y s": (
        DECISIONS,
        "ys > curvature_eps && shs > curvature_eps",
        "shs > curvature_eps",
    ),
    "the curvature condition without s h s": (
        DECISIONS,
        "ys > curvature_eps && shs > curvature_eps",
        "ys > curvature_eps",
    ),
    "a NaN in the second sum is not seen": (
        DECISIONS,
        "plan.skip = plan.skip || (o.skip_nonfinite && !(is_finite(rz_new) && is_finite(rz_mid)));",
        "(void)o;",
    ),
    "bfloat16 rounds ties up": (HALF, "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "(u + 0x8000u) >> 16"),
    "no decoupled weight decay": (
        FORMULAS,
        "return p * decay_factor;",
        "return decay_factor == decay_factor ? p : p * decay_factor;",
    ),
    "the step forgets nothing": (
        DECISIONS,
        "plan.history_valid = now.step != 0.0 && row.column[kChanged] == 0.0;",
        "plan.history_valid = now.step != 0.0;",
    ),
    "clipping by the norm of decayed gradients": (
        "csrc/clipping.h",
        "const auto wide_g = at.wide(at.undecayed());",
        "const auto wide_g = at.wide(at.g());",
    ),
    "Muon: u without Nesterov's step": (
        MUON,
        "at.set_origin(conjugate_direction(at.g(), beta, at.d()));",
        "at.set_origin(at.d());",
    ),
    "Muon: the other parameters' beta": (MUON, "broadcast(plan.next.beta_matrices)", "broadcast(plan.next.beta)"),
    "full batch: h keeps its scale": (
        "csrc/pass_full_batch.h",
        "updated(scaled_diagonal(updated.scale, h), y,",
        "updated(h, y,",
    ),
    "pairs: P before its update": (PAIRS, "after = preconditioned_gradient(y, h, T{});", "after = before;"),
    "pairs: a lost row": (
        PAIRS,
        "for (int k = 0; k < count; ++k) w = with",
        "for (int k = 1; k < count; ++k) w = with",
    ),
    "CUDA: a lane less": (
        "cuda/reduce.cuh",
        "lane < kWarps ? of_warp.sum[j][lane]",
        "lane < kWarps - 1 ? of_warp.sum[j][lane]",
    ),
    "CUDA: a lost run": (
        "cuda/tile.cuh",
        "sums.sum[j] += static_cast<double>(run[j]);",
        "sums.sum[j] += 0.0;",
    ),
    "CUDA: four elements across an end": (
        "cuda/tile.cuh",
        "here.offset + here.n >= at + kQuad",
        "here.offset + here.n > at",
    ),
    "CUDA: a stream not kept on chip": (
        "cuda/tile.cuh",
        "      store_resident(to + kTile, Pass::kKeptInSharedMemory == kD ? d : diagonal);\n",
        "",
    ),
    "Python: a pair's sum with a later one": (
        "python/fastnlcg/full_batch/pairs.py",
        "c[j] * self.gram[j][i] for j in order[:k]",
        "c[j] * self.gram[i][j] for j in order[:k]",
    ),
    "Python: a bias is not rotated": (
        ROTATION,
        "here[...], bias[...] = (product[..., :-1], product[..., -1:]) if other[0] is None else other[1:]",
        "here[...] = product[..., :-1]",
    ),
    "Python: h stays in the old basis": (
        ROTATION,
        "    matrix.multiply(h, None if left is None else left * left, None if right is None else "
        "transposed(right * right))\n",
        "",
    ),
    "Python: matrices without their size": (
        "python/fastnlcg/tensors/polar.py",
        "scale = size if step == STEPS - 1 else 1.0\n            torch.bmm(",
        "scale = 1.0\n            torch.bmm(",
    ),
    "Python: one lr for all groups": (
        "python/fastnlcg/tensors/step_table.py",
        "rates = [float(rate) for rate in lr]",
        "rates = [float(lr[0]) for rate in lr]",
    ),
    "Python: alpha_prev is not loaded": (
        "python/fastnlcg/tensors/state_dict.py",
        'group["alpha_prev"].detach().to("cpu", torch.float64, copy=True)',
        'torch.zeros_like(group["alpha_prev"])',
    ),
}
CATCHES = [
    "test_step.py",
    "test_state_dtype.py",
    "test_muon.py",
    "test_clipping.py",
    "test_descent.py",
    "test_pairs.py",
    "test_ops.py",
    "test_cuda.py",
    "test_properties.py",
    "test_nlcg.py",
    "test_checkpoints.py",
    "test_cg_descent_pairs.py",
]  # of make test


def mutants(scale: float) -> dict[str, Any]:
    """Each mutation by itself, in a copy of the sources: built, and tested until a test fails."""
    tree, site = ROOT / "build" / "mutants" / "tree", ROOT / "build" / "mutants" / "site"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for name in ("csrc", "cuda", "python", "tests", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        shutil.copytree(source, tree / name) if source.is_dir() else shutil.copy2(source, tree / name)
    caught: dict[str, str] = {}
    chosen = dict(list(MUTANTS.items())[:: max(1, round(1 / scale))])
    for title, (file, old, new) in {"": ("README.md", "", ""), **chosen}.items():  # the first is no mutation
        text = (tree / file).read_text()
        if title and text.count(old) != 1:
            raise Lost(f"{title}: {text.count(old)} places in {file}, expected 1")
        (tree / file).write_text(text.replace(old, new) if title else text)
        emulation = "ON" if title.startswith("CUDA") else "OFF"  # half the time to build
        options = ["-C", f"build-dir={tree.parent}/cmake", "-C", f"cmake.define.FASTNLCG_EMULATION={emulation}"]
        options += ["-C", "cmake.build-type=Debug", "-C", "cmake.define.FASTNLCG_CUDA=OFF"]
        options += ["--target", str(site), "--upgrade"]
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            *options,
            str(tree),
        ]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            raise Lost(f"{title} does not build: {built.stderr[-2000:]}")
        tests = [str(tree / "tests" / name) for name in (CATCHES if title else CATCHES[:1])]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n2", "-m", "not thorough", "-p", "no:cacheprovider"]
        command += tests
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(site), str(tree / "tests")]),
        }
        done = subprocess.run(command, capture_output=True, text=True, cwd=tree, env=environment)
        (tree / file).write_text(text)
        found = re.search(r"FAILED \S*?(\w+\.py::\w+)", done.stdout)
        by = found[1] if found else f"a crash, {done.returncode}" if done.returncode else ""
        if by and not title:
            raise Lost(f"the suite fails without mutation\n{done.stdout[-2000:]}")
        if title:
            print(f"    {title}: {by or 'survived'}", flush=True)
            caught |= {title: by} if by else {}
    if len(caught) < len(chosen):
        raise Lost(f"survived: {', '.join(set(chosen) - set(caught))}")
    return {"mutants": len(chosen), "caught": len(caught), "by": caught}


# ---- the table -------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[float], dict[str, Any]]] = {
    "fuzz_steps": fuzz_steps,
    "fuzz_arguments": fuzz_arguments,
    "fuzz_guided": fuzz_guided,
    "configurations": configurations,
    "kills": kills,
    "soak": soak,
    "mutants": mutants,
}


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row a part, in markdown; then what caught each mutation."""
    rows = ["| part | figures | minutes | on |", "|---|---|---|---|"]
    for name, row in results.items():
        figures = [f"{value:,} {key}" for key, value in row.items() if isinstance(value, int)]
        figures += [f"{key}: {row[key]}" for key in ("LOST", "not run") if key in row]
        rows.append(f"| `{name}` | {', '.join(figures)} | {row['minutes']} | {row['on']} |")
    caught = results.get("mutants", {}).get("by", {})
    return "\n".join(
        [*rows, "", "| mutation | caught by |", "|---|---|", *(f"| {k} | `{v}` |" for k, v in caught.items())]
    )


JOBS = {"stateful_runs": job_stateful_runs, "arguments": job_arguments, "soak": job_soak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="of time and numbers; default 1")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.job:
        name, worker, amount = arguments.job
        result = JOBS[name](int(worker), int(amount))
        if name != "soak":
            print(result)
        return 0
    file = ROOT / "build" / "hard.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    lost = 0
    for name in arguments.only:
        begin = time.monotonic()
        try:
            row = PARTS[name](arguments.scale)
        except Lost as finding:
            row, lost = {"LOST": str(finding)}, lost + 1
        row["minutes"] = round((time.monotonic() - begin) / 60, 1)
        row["on"] = f"{datetime.date.today()}, torch {torch.__version__}, Python {platform.python_version()}"
        results[name] = row
        print(f"{name}: {row}", flush=True)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
