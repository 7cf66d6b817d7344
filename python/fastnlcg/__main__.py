"""``python -m fastnlcg [--json]``: describes this installation, and checks its native step against the definition.

The exit status is 0 if they agree, else 1. Works without torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from fastnlcg import __version__, _native, ops, reference
from fastnlcg.options import PRECONDITIONERS

STEPS = 20
N = 4097  # one tile and a tail


def self_check(device: str = "cpu") -> dict[str, Any]:
    """Takes 20 steps in native float64 and float32 and with the reference; returns the largest relative differences.
    Works without torch on the CPU only."""
    worst = {"float64": 0.0, "float32": 0.0}
    forms: list[tuple[Any, Any]] = [
        (name, update)
        for name, kind in PRECONDITIONERS.items()
        for update in ("fletcher_reeves", "polak_ribiere")
        if not kind.of_matrices
    ]
    for preconditioner, update in forms:
        rng = np.random.default_rng(0)
        curvature, start = rng.uniform(0.1, 3.0, N), rng.standard_normal(N)
        options = reference.Options(update=update, preconditioner=preconditioner)
        for dtype in worst:
            p, expected = start.astype(dtype), start.astype(dtype).astype(np.float64)
            place, fetch = _transport(device)
            scalars, state = ops.Scalars(), reference.initial_state(N, options)
            p, g_prev, d = place(p), place(np.zeros(N, dtype)), place(np.zeros(N, dtype))
            diagonal = None if state.diagonal is None else place(state.diagonal.astype(dtype))
            for _ in range(STEPS):
                gradient = (curvature * expected).astype(dtype)  # both take the same gradient
                ops.nlcg_step(
                    *(p, place(gradient), g_prev, d, diagonal, scalars),
                    lr=0.05,
                    update=update,
                    preconditioner=preconditioner,
                )
                expected, state = reference.nlcg_step(expected, gradient.astype(np.float64), state, options, lr=0.05)
            error = float(np.max(np.abs(fetch(p) - expected)) / np.max(np.abs(expected)))
            worst[dtype] = max(worst[dtype], error)
    # float64: rounding of 20 steps; float32: 20 steps of 2^-24 each, amplified by the quotients in h.
    return {"differences": worst, "passed": worst["float64"] < 1e-12 and worst["float32"] < 1e-4}


def _transport(device: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Two functions: one copies an array to the device, the other back."""
    if device == "cpu":
        return np.asarray, np.asarray
    import torch

    return lambda array: torch.from_numpy(array).to(device), lambda tensor: tensor.cpu().numpy()


def report() -> dict[str, Any]:
    """Everything that ``python -m fastnlcg`` prints."""
    torch_version = None
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch_version = torch.__version__
    try:
        instruction_set, unavailable_reason = _native.instruction_set(), ""
    except ValueError as error:  # FASTNLCG_ISA names one that this processor lacks
        instruction_set, unavailable_reason = None, str(error)
    cuda = _native.cuda_status()
    checked: dict[str, Any] = self_check() if instruction_set else {"differences": {}, "passed": False}
    if torch_version is not None and not cuda["unavailable_reason"] and torch.cuda.is_available():
        on_gpu = self_check("cuda")
        differences = {f"{key} on the GPU": error for key, error in on_gpu["differences"].items()}
        checked = {
            "differences": {**checked["differences"], **differences},
            "passed": checked["passed"] and on_gpu["passed"],
        }
    return {
        "version": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch_version,
        "compiler": _native.compiler,
        "cpu": {
            "architecture": platform.machine(),
            "instruction_sets": _native.instruction_sets(),
            "instruction_set": instruction_set,
            "threads": _native.num_threads(),
            "openmp": _native.openmp,
            "unavailable_reason": unavailable_reason,
        },
        "cuda": cuda,
        "self_check": checked,
    }


def main(argv: list[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastnlcg", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    facts = report()
    check = facts["self_check"]
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0 if check["passed"] else 1
    cpu, cuda = facts["cpu"], facts["cuda"]
    built = f"built for sm {cuda['architectures'].replace('-real', '')}; " if cuda["built"] else ""
    print(f"fastnlcg     {facts['version']} ({facts['compiler']})")
    print(f"python       {facts['python']}, numpy {facts['numpy']}, torch {facts['torch'] or 'not installed'}")
    chosen = cpu["unavailable_reason"] or cpu["instruction_set"]
    print(f"cpu          {cpu['architecture']}: {chosen} (of {', '.join(cpu['instruction_sets'])})")
    print(f"threads      {cpu['threads']}{'' if cpu['openmp'] else ' (built without OpenMP)'}")
    print(
        f"cuda         off: {built}{cuda['unavailable_reason']}"
        if cuda["unavailable_reason"]
        else f"cuda         {', '.join(cuda['devices'])}"
    )
    differences = ", ".join(f"{dtype} {error:.1e}" for dtype, error in check["differences"].items()) or "none"
    print(f"self-check   {'passed' if check['passed'] else 'FAILED'} (largest relative difference: {differences})")
    return 0 if check["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
