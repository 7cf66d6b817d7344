#!/usr/bin/env bash
# Under jax.jit on a CPU with FMA, a * b + c is one fused operation, whatever statements or Python variables lie between:
# XLA lets LLVM fuse any product into any sum (AllowFPOpFusion = Fast in XLA's CPU compiler), with "fast math" off. The
# same function without jit rounds twice; x * x - y * y for y equal to x is then not 0. torch.compile fuses none of it.
# It hurts line searches and convergence tests that compare a jitted loss with one evaluated without jit.
set -euo pipefail
if ! grep -qw fma /proc/cpuinfo; then echo "needs a processor with FMA" >&2; exit 2; fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --target "$tmp/site" numpy==2.4.6 jax==0.10.2
cat > "$tmp/run.py" <<'PY'
import sys

import jax
import numpy as np


def multiply_add(a, b, c):
    product = a * b
    return product + c


def difference(a, b):
    return a * a - b * b


a, b, c = (jax.numpy.asarray(x) for x in np.random.default_rng(0).standard_normal((3, 10000)).astype(np.float32))
found = {
    "a * b + c: elements with other bits": int((jax.jit(multiply_add)(a, b, c) != multiply_add(a, b, c)).sum()),
    "a * a - a * a: elements that are not 0, without jit": int((difference(a, a) != 0).sum()),
    "with jit": int((jax.jit(difference)(a, a) != 0).sum()),
}
print("jax", jax.__version__)
print("expected: jit changes speed, not values: 0, 0 and 0")
print(f"found, of {a.size}: {found}")
other, without, with_jit = found.values()
if not (other > 1000 and without == 0 and with_jit > 9000):
    sys.exit("CHANGED")
print("as recorded: jit rounds once where the same code without it rounds twice")
PY
JAX_PLATFORMS=cpu PYTHONPATH="$tmp/site" python3 "$tmp/run.py"
