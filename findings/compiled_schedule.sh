#!/usr/bin/env bash
# A schedule under torch.compile: SGD's step is compiled for every rate up to the limit of 8, then runs uncompiled, for
# a float that scales a foreach operation becomes a constant (torch/fx/passes/_tensorify_python_scalars.py); AdamW's rate
# becomes a symbol. fullgraph=True compiles neither: step's own wrapper (optimizer.py, _use_grad_for_differentiable) breaks
# the graph, a scheduler's (lr_scheduler.py, patch_track_step_called) too. It hurts compiled training with a schedule.
set -euo pipefail
command -v g++ > /dev/null || { echo "needs g++, for inductor" >&2; exit 2; }
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --target "$tmp/site" torch==2.13.0 numpy==2.4.6
cat > "$tmp/run.py" <<'PY'
import logging
import sys

import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

logging.disable(logging.WARNING)


def run(kind, lr=0.1, *, scheduled=True, **options):
    """Graphs compiled in twelve steps, or why there are none."""
    torch._dynamo.reset()
    counters.clear()
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = kind([p], lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if scheduled else None
    step = torch.compile(lambda: optimizer.step(), **options)
    try:
        for _ in range(12):
            step()
            if schedule:
                schedule.step()
    except Unsupported as error:
        return str(error).splitlines()[0]
    return counters["stats"]["unique_graphs"]


SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
found = {
    "SGD": run(SGD),
    "SGD, lr a tensor": run(SGD, torch.tensor(0.1)),
    "AdamW": run(AdamW),
    "SGD, fullgraph, no schedule": run(SGD, scheduled=False, fullgraph=True),
    "SGD, fullgraph": run(SGD, fullgraph=True),
}
print("torch", torch.__version__)
print("expected: the same for both: a graph, one more when the rate moves; fullgraph=True works")
for key, value in found.items():
    print(f"found: {key}: {value}")
words = ["Call to `torch._dynamo.graph_break()`", "Attempted to call function marked as skipped"]
if list(found.values()) != [8, 1, 2, *words]:
    sys.exit("CHANGED")
print("as recorded")
PY
PYTHONPATH="$tmp/site" TORCHINDUCTOR_CACHE_DIR="$tmp/cache" python3 "$tmp/run.py"
