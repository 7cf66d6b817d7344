#!/usr/bin/env bash
# torch.set_flush_denormal() sets the floating-point mode of the calling thread, which threads made later inherit
# (ATen/cpu/FlushDenormal.cpp), but not OpenMP's workers that are there already. One result then has flushed and unflushed
# elements, by their place, and its bits depend on the number of threads.
# It hurts whoever switches in a process that has computed before, or switches back.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --target "$tmp/site" torch==2.13.0 numpy==2.4.6
cat > "$tmp/run.py" <<'PY'
import sys

import torch

torch.set_num_threads(2)


def zeros():
    """How many of each half of x / 2 are 0, for a denormal x; all looked at as integers."""
    x = torch.full((1 << 20,), 1 << 20, dtype=torch.int32).view(torch.float32)
    halves = (x * 0.5).view(torch.int32).chunk(2)
    return [(half == 0).sum().item() for half in halves]


found = {}
if sys.argv[1] == "pool first":
    found["before"] = zeros()
torch.set_flush_denormal(True)
found["on"] = zeros()
torch.set_flush_denormal(False)
found["off again"] = zeros()
half = 1 << 19
print(f"found: {sys.argv[1]}: zeros in the first and the second half of {2 * half} elements: {found}")
truth = {
    "pool first": {"before": [0, 0], "on": [half, 0], "off again": [0, 0]},
    "mode first": {"on": [half, half], "off again": [0, half]},
}
sys.exit(found != truth[sys.argv[1]])
PY
export PYTHONPATH="$tmp/site"
python3 -c 'import torch; print("torch", torch.__version__)'
echo "expected: a switch of the process; all elements flushed while it is on, none while it is off"
if ! { python3 "$tmp/run.py" "pool first" && python3 "$tmp/run.py" "mode first"; }; then
  echo "CHANGED" >&2
  exit 1
fi
echo "as recorded: elements of one tensor are treated differently, by the thread that computes them"
