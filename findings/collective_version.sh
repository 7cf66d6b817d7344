#!/usr/bin/env bash
# Collectives write into a tensor without raising its version counter: the operators c10d::allreduce_ and broadcast_
# (torch/csrc/distributed/c10d/Ops.cpp) take Tensor[] without an alias annotation. Autograd's check for values changed
# between forward and backward sees nothing, and the gradient is wrong without a word.
# It hurts an all_reduce into something autograd has saved, and caches that compare `_version`.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --target "$tmp/site" torch==2.13.0 numpy==2.4.6
cat > "$tmp/run.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


def gradient(change):
    """Of b * b at a = 2 for b = 1 * a, b changed behind the forward pass."""
    a = torch.tensor([2.0], requires_grad=True)
    b = a * 1
    loss = b * b
    version = b._version
    change(b.detach())
    raised = b._version - version
    try:
        loss.backward()
    except RuntimeError:
        return raised, "RuntimeError"
    return raised, a.grad.item()


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = {
        "b.mul_(2)": gradient(lambda b: b.mul_(2)),
        "all_reduce(b)": gradient(dist.all_reduce),
        "broadcast(b, 0)": gradient(lambda b: dist.broadcast(b, 0))[0],
    }
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (sys.argv[1],), nprocs=RANKS)
    found = torch.load(f"{sys.argv[1]}/found.pt")
    print("torch", torch.__version__, "|", torch.ops.c10d.allreduce_.default._schema)
    print("expected: as b.mul_(2): the version rises and backward raises")
    print(f"found on rank 0, rise of the version and gradient: {found}")
    if found != {"b.mul_(2)": (1, "RuntimeError"), "all_reduce(b)": (0, 8.0), "broadcast(b, 0)": 0}:
        sys.exit("CHANGED")
    print("as recorded: no rise, and a gradient of 8 for b * b at 2, which is 4")
PY
PYTHONPATH="$tmp/site" python3 "$tmp/run.py" "$tmp"
