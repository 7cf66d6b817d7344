#!/usr/bin/env bash
# In pytorch-optimizer 4.1.0 the first steps of some move nothing: SOAP's first only starts its statistics (soap.py, at
# step 1), RAdam's first five wait for a variance (degenerated_to_sgd=False); torch's RAdam moves from the first. Others
# write into p.grad: ScheduleFreeAdamW divides it by its denominator (schedulefree.py), Ranger centres it.
# It hurts comparisons at equal step counts, short warm-ups, and gradients that are logged or kept after a step.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --target "$tmp/site" torch==2.13.0 numpy==2.4.6
python3 -m pip install -qq --disable-pip-version-check --no-deps --target "$tmp/site" pytorch-optimizer==4.1.0
cat > "$tmp/run.py" <<'PY'
import importlib.metadata
import sys
import warnings

import pytorch_optimizer
import torch

warnings.simplefilter("ignore")


def first_steps(kind):
    """How many steps move nothing, and whether the first changes the gradient."""
    p, gradient = torch.nn.Parameter(torch.ones(3, 3)), torch.arange(1.0, 10.0).view(3, 3)
    optimizer = kind([p], lr=0.01)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for steps in range(20):
        p.grad = gradient.clone()
        optimizer.step()
        if steps == 0:
            kept = torch.equal(p.grad, gradient)
        if not (p == 1).all():
            return steps, kept
    return None


peers = [getattr(pytorch_optimizer, name) for name in ("SOAP", "RAdam", "Ranger", "ScheduleFreeAdamW")]
found = {kind.__module__.split(".")[0] + "." + kind.__name__: first_steps(kind) for kind in (*peers, torch.optim.RAdam)}
print("torch", torch.__version__, "pytorch-optimizer", importlib.metadata.version("pytorch-optimizer"))
print("expected: (0, True) from all: the first step moves the parameter and reads the gradient")
print(f"found, steps that move nothing and whether p.grad is kept: {found}")
truth = [(1, True), (5, True), (0, False), (0, False), (0, True)]
if list(found.values()) != truth:
    sys.exit("CHANGED")
print("as recorded")
PY
PYTHONPATH="$tmp/site" python3 "$tmp/run.py"
