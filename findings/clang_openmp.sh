#!/usr/bin/env bash
# A module compiled by clang brings libomp beside the libgomp of torch's wheel: two teams, and torch.set_num_threads()
# reaches one. -fopenmp=libgomp links gcc's runtime and compiles no OpenMP, in silence (clang/lib/Driver/ToolChains/Clang.cpp
# hands the flag on for libomp and libiomp5 only). libomp preloaded serves all: it has libgomp's entry points (kmp_gsupport.cpp).
# It hurts whoever builds an extension with clang and sizes its threads by torch.
set -euo pipefail
for tool in gcc clang; do command -v "$tool" > /dev/null || { echo "needs $tool (Debian: gcc clang libomp-dev)" >&2; exit 2; }; done
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cat > "$tmp/team.c" <<'C'
int omp_get_max_threads(void);
int most(void) { return omp_get_max_threads(); }
int team(void) {
  int n = 0;
#pragma omp parallel reduction(+ : n)
  n += 1;
  return n;
}
C
cd "$tmp"
gcc -O1 -fPIC -shared -fopenmp team.c -o gcc.so
clang -O1 -fPIC -shared -fopenmp team.c -o clang.so || { echo "needs libomp (Debian: libomp-dev)" >&2; exit 2; }
clang -O1 -fPIC -shared -fopenmp=libgomp team.c -o clang_libgomp.so
libomp=$(ldd clang.so | sed -n 's/.*=> \(.*libomp.*\) .*/\1/p')
python3 -m pip install -qq --disable-pip-version-check --target "$tmp/site" torch==2.13.0 numpy==2.4.6
cat > run.py <<'PY'
import ctypes
import re
import sys

import torch

module = ctypes.CDLL(f"./{sys.argv[1]}.so")
torch.set_num_threads(3)
torch.ones(1 << 20).mul_(2)
runtimes = set(re.findall(r"/(libg?omp)[-.\w]*\n", open("/proc/self/maps").read()))
print(f"{sys.argv[1]}{sys.argv[2]}: {'+'.join(sorted(runtimes))}, at most {module.most()}, team of {module.team()}")
PY
export PYTHONPATH="$tmp/site" OMP_NUM_THREADS=4
gcc --version | head -1
clang --version | head -1
python3 -c 'import torch; print("torch", torch.__version__)'
echo "expected: OMP_NUM_THREADS=4, torch.set_num_threads(3): teams of 3 from every module"
found="$(python3 run.py gcc "")
$(python3 run.py clang "")
$(python3 run.py clang_libgomp "")
$(LD_PRELOAD=$libomp python3 run.py clang ", libomp preloaded")"
echo "found: ${found//$'\n'/$'\n'found: }"
truth='gcc: libgomp, at most 3, team of 3
clang: libgomp+libomp, at most 4, team of 4
clang_libgomp: libgomp, at most 3, team of 1
clang, libomp preloaded: libgomp+libomp, at most 3, team of 3'
[[ $found == "$truth" ]] || { echo "CHANGED" >&2; exit 1; }
echo "as recorded"
