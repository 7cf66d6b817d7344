#!/usr/bin/env bash
# One glibc, one argument, two results: exp, log, sin, cos, pow and others exist twice in libm for x86-64, compiled with
# and without FMA, and the loader picks by the processor (sysdeps/x86_64/fpu/multiarch/ifunc-fma.h). Both are within
# an ulp, and they are not the same ulp. GLIBC_TUNABLES hides the processor's FMA here, as an older one lacks it.
# It hurts learning rates from math.cos, and everything else that is to have the same bits on another machine.
set -euo pipefail
if ! grep -qw fma /proc/cpuinfo; then echo "needs a processor with FMA" >&2; exit 2; fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cat > "$tmp/run.py" <<'PY'
import math
import random

random.seed(0)
for _ in range(100_000):
    x = random.uniform(0.1, math.pi)
    print(*(f.hex() for f in (math.exp(-x), math.log(x), math.sin(x), math.cos(x), math.pow(x, 0.75), math.sqrt(x))))
PY
cat > "$tmp/compare.py" <<'PY'
import platform
import sys

rows = [[line.split() for line in open(name)] for name in sys.argv[1:]]
names = ["exp", "log", "sin", "cos", "pow", "sqrt"]
found = {name: sum(a[k] != b[k] for a, b in zip(*rows)) for k, name in enumerate(names)}
print(*platform.libc_ver(), "| Python", platform.python_version())
print("expected: a function of its argument: 0 everywhere")
print(f"found, results of {len(rows[0])} that differ with and without FMA: {found}")
if not all(found[name] > 0 for name in ("exp", "sin", "cos", "pow")) or found["sqrt"] != 0:
    sys.exit("CHANGED")
print("as recorded: the last bit depends on the processor")
PY
python3 "$tmp/run.py" > "$tmp/with"
GLIBC_TUNABLES=glibc.cpu.hwcaps=-FMA,-AVX2,-FMA4 python3 "$tmp/run.py" > "$tmp/without"
python3 "$tmp/compare.py" "$tmp/with" "$tmp/without"
