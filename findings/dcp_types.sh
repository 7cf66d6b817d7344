#!/usr/bin/env bash
# torch.distributed.checkpoint.load() checks shapes and not types: a float32 file fills an integer tensor (3.7 becomes 3),
# a bool or a bfloat16 one by a plain copy_ (default_planner.py: the plan compares sizes; filesystem.py copies). A number
# of the file replaces a tensor in its place; a tensor of the file in the place of a number is refused.
# It hurts resuming with state of another dtype: torch.load and load_state_dict of an optimizer would keep or convert it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --target "$tmp/site" torch==2.13.0 numpy==2.4.6
cat > "$tmp/run.py" <<'PY'
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp

warnings.simplefilter("ignore")
folder = sys.argv[1] + "/file"
dcp.save({"x": torch.tensor([1.001, 257.0, 3.7]), "n": 5}, checkpoint_id=folder)


def load(place, key="x"):
    state = {key: place}
    try:
        dcp.load(state, checkpoint_id=folder)
    except dcp.api.CheckpointException:
        return "refused"
    value = state[key]
    return value.tolist() if isinstance(value, torch.Tensor) else value


found = {
    "int64": load(torch.zeros(3, dtype=torch.int64)),
    "bool": load(torch.zeros(3, dtype=torch.bool)),
    "bfloat16": load(torch.zeros(3, dtype=torch.bfloat16)),
    "another shape": load(torch.zeros(4)),
    "a tensor where the file has 5": load(torch.tensor(0), "n"),
    "a number where the file has a tensor": load(0),
}
print("torch", torch.__version__)
print("expected: an error for every other type, as for another shape")
for key, value in found.items():
    print(f"found: {key}: {value}")
if list(found.values()) != [[1, 257, 3], [True] * 3, [1.0, 256.0, 3.703125], "refused", 5, "refused"]:
    sys.exit("CHANGED")
print("as recorded: cut off, rounded or swapped in silence")
PY
PYTHONPATH="$tmp/site" python3 "$tmp/run.py" "$tmp"
