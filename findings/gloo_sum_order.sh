#!/usr/bin/env bash
# gloo's all_reduce adds in an order that depends on the element's place: its ring (gloo/allreduce.cc) cuts the tensor
# into one chunk a rank and starts each chunk's sum at another rank. Equal addends give other sums in other chunks, and a
# slice reduced alone gives other bits than the same slice reduced within its tensor.
# It hurts whoever compares runs whose buckets differ, or trusts that groups of other sizes form the same sums.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --target "$tmp/site" torch==2.13.0 numpy==2.4.6
cat > "$tmp/run.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 3


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    x = torch.full((6,), [1e8, 1.0, -1e8][rank])
    part = x[2:4].clone()
    dist.all_reduce(x)
    dist.all_reduce(part)
    if rank == 0:
        torch.save((x, part), f"{folder}/sums.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (sys.argv[1],), nprocs=RANKS)
    x, part = torch.load(f"{sys.argv[1]}/sums.pt")
    print("torch", torch.__version__)
    print("expected: 1e8 + 1 - 1e8 in float32 is the same in all six elements")
    print(f"found: {x.tolist()}; elements 2 and 3 reduced alone: {part.tolist()}")
    if x.unique().tolist() != [0.0, 1.0] or part.tolist() == x[2:4].tolist():
        sys.exit("CHANGED")
    print("as recorded: the same three numbers add up to 0 or 1, by their place in the tensor")
PY
PYTHONPATH="$tmp/site" python3 "$tmp/run.py" "$tmp"
