#!/usr/bin/env bash
# torch.set_num_threads() holds for the calling thread and for threads that have not asked yet: every thread fixes its
# count at its first use (ATen/ParallelOpenMP.cpp: lazy_init_num_threads, omp_set_num_threads, which OpenMP keeps per
# thread). A thread that has computed before never hears of a later call elsewhere.
# It hurts servers and data loaders that set the count in one place, and code that reads it to size its own team.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --target "$tmp/site" torch==2.13.0 numpy==2.4.6
cat > "$tmp/run.py" <<'PY'
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

with ThreadPoolExecutor(1) as old, ThreadPoolExecutor(1) as new:
    torch.set_num_threads(3)
    found = {
        "main before": torch.get_num_threads(),
        "worker before": old.submit(torch.get_num_threads).result(),
    }
    old.submit(torch.set_num_threads, 5).result()
    found |= {
        "worker, which called set_num_threads(5)": old.submit(torch.get_num_threads).result(),
        "main after that": torch.get_num_threads(),
        "a new thread": new.submit(torch.get_num_threads).result(),
    }
print("torch", torch.__version__)
print("expected: a number of the process, 5 everywhere at the end")
print(f"found: {found}")
if list(found.values()) != [3, 3, 5, 3, 5]:
    sys.exit("CHANGED")
print("as recorded: 3 and 5 in one process, by each thread's history")
PY
PYTHONPATH="$tmp/site" python3 "$tmp/run.py"
