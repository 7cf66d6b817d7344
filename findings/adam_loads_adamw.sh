#!/usr/bin/env bash
# torch.optim.Adam becomes AdamW by loading its file: AdamW is a subclass whose decay is a flag of each parameter group,
# decoupled_weight_decay (torch/optim/adam.py and adamw.py), and load_state_dict takes all of a group's options over.
# No word is said, `isinstance` sees an Adam either way, and the flag is saved on.
# It hurts whoever moves a run between the two, and code that tells them apart by class.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --target "$tmp/site" torch==2.13.0 numpy==2.4.6
cat > "$tmp/run.py" <<'PY'
import sys

import torch


def begin(kind, start):
    p = torch.nn.Parameter(start.clone())
    return p, kind([p], lr=0.1, weight_decay=0.5)


def step(p, optimizer):
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    return p.detach().clone()


p, adamw = begin(torch.optim.AdamW, torch.ones(3))
q, adam = begin(torch.optim.Adam, step(p, adamw))
adam.load_state_dict(adamw.state_dict())
r, plain = begin(torch.optim.Adam, p.detach())
for state in (file := adamw.state_dict())["param_groups"]:
    state["decoupled_weight_decay"] = False
plain.load_state_dict(file)
after = [step(p, adamw), step(q, adam), step(r, plain)]
found = {
    "the step of Adam with AdamW's file is AdamW's": torch.equal(after[0], after[1]),
    "without the flag": torch.equal(after[0], after[2]),
    "isinstance(AdamW, Adam)": isinstance(adamw, torch.optim.Adam),
    "type": type(adam).__name__,
    "its own file says decoupled": adam.state_dict()["param_groups"][0]["decoupled_weight_decay"],
}
print("torch", torch.__version__)
print("expected: the class is the method: an Adam adds its decay to the gradient, whatever it loads")
print(f"found: {found}")
if list(found.values()) != [True, False, True, "Adam", True]:
    sys.exit("CHANGED")
print("as recorded")
PY
PYTHONPATH="$tmp/site" python3 "$tmp/run.py"
