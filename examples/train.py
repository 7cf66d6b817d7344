"""Training with NLCG, alone or on many ranks, that resumes after a kill.

    python examples/train.py                                                      one process
    torchrun --nproc-per-node=2 examples/train.py                                 DDP
    torchrun --nproc-per-node=2 examples/train.py --parallel fsdp2                parameters and state in shards
    torchrun --nproc-per-node=2 examples/train.py --parallel fsdp2 --model transformer --preconditioner muon --lr 0.03

A perceptron learns scikit-learn's digits, or a transformer the characters of Python's own standard library. Every
optimizer step sees --batch samples, the ranks' shares together, each in micro-batches of --micro (virtual batching).
--out gets losses.csv and checkpoints by torch.distributed.checkpoint; a run that finds one there resumes from it, to
the same losses bit for bit, also after SIGKILL. --logdir adds TensorBoard.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fastnlcg import NLCG, OnlineLineSearch, muon_groups, warmup_cosine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

LENGTH = 64  # characters of a sample
FIELDS = ("step", "loss", "lr", "beta", "ls_scale", "grad_norm")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("perceptron", "transformer"), default="perceptron")
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp", help="on more than one rank")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=512, help="samples in an optimizer step, over all ranks")
    parser.add_argument("--micro", type=int, default=64, help="samples at a time on a rank, at most")
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--preconditioner", choices=("adam", "muon", "bfgs", "none"), default="adam")
    parser.add_argument("--line-search", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/train"))
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--logdir", type=Path, help="write TensorBoard events there")
    return parser.parse_args()


def start_ranks() -> torch.device:
    """Joins the ranks that torchrun has started, or makes a world of one."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if on_gpu else "gloo", **alone)
    return device


class Transformer(nn.Module):
    """Characters (n, length) to logits of the next ones (n, 128, length)."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(128, width), nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=x.device)
        x = self.embedding(x) + self.position(torch.arange(LENGTH, device=x.device))
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x)).transpose(1, 2).contiguous()


def make_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    torch.manual_seed(args.seed)  # the same weights on every rank
    net: nn.Module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    if args.model == "transformer":
        net = Transformer()
    net.to(device)
    if dist.get_world_size() == 1:
        return net
    if args.parallel == "ddp":
        return DistributedDataParallel(net)
    for layer in net.layers if isinstance(net, Transformer) else net:
        if not isinstance(layer, nn.ReLU):
            fully_shard(layer)
    return fully_shard(net)


@contextlib.contextmanager
def gradients_stay_here(net: nn.Module, here: bool) -> Iterator[None]:
    """Without the exchange of gradients, which only the last micro-batch of a step needs."""
    if isinstance(net, DistributedDataParallel) and here:
        with net.no_sync():
            yield
        return
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(not here)
    yield


def dataset(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    if args.model == "transformer":
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        codes = np.concatenate([np.frombuffer(path.read_bytes(), np.uint8) for path in files])
        codes = codes[codes < 128][: 2048 * LENGTH + 1].astype(np.int64)
        x, y = (torch.from_numpy(part).view(-1, LENGTH).to(device) for part in (codes[:-1], codes[1:]))
        return x, y
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images.astype(np.float32) / 16).to(device), torch.from_numpy(labels).to(device)


def train_step(net: nn.Module, optimizer: NLCG, x: Tensor, y: Tensor, micro: int) -> Tensor:
    """One optimizer step on this rank's share of a batch; the loss averaged over all ranks."""
    optimizer.zero_grad()
    parts = list(zip(x.split(micro), y.split(micro), strict=True))
    loss = torch.zeros((), device=x.device)
    for k, (inputs, targets) in enumerate(parts):
        with gradients_stay_here(net, k < len(parts) - 1):
            part = cross_entropy(net(inputs), targets) * (len(inputs) / len(x))
            part.backward()
        loss += part.detach()
    optimizer.step(loss=loss)  # the line search averages the loss over ranks itself
    dist.all_reduce(loss)  # for the log
    return loss / dist.get_world_size()


def checkpoints(folder: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted(folder.glob("step-*"))


def save(folder: Path, step: int, net: nn.Module, optimizer: NLCG, schedule: Any) -> None:
    """Writes under another name first, so that every checkpoint under its own name is complete."""
    weights, state = get_state_dict(net, optimizer)
    unfinished, done = folder / "unfinished", folder / f"step-{step:08}"
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    dist.barrier()
    saved = {"model": weights, "optimizer": state, "schedule": schedule.state_dict(), "step": step}
    dcp.save(saved, checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        unfinished.rename(done)
        for old in checkpoints(folder)[:-2]:
            shutil.rmtree(old)
    dist.barrier()


def resume(folder: Path, net: nn.Module, optimizer: NLCG, schedule: Any) -> int:
    """Loads the newest checkpoint; returns its number of steps."""
    found = checkpoints(folder)
    if not found:
        return 0
    weights, state = get_state_dict(net, optimizer)
    saved = {"model": weights, "optimizer": state, "schedule": schedule.state_dict(), "step": 0}
    dcp.load(saved, checkpoint_id=found[-1])
    set_state_dict(net, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    return int(saved["step"])


class Log:
    """losses.csv, TensorBoard if asked for, and a progress bar; on rank 0."""

    def __init__(self, args: argparse.Namespace, begin: int, end: int) -> None:
        self.file, self.events = None, None
        if dist.get_rank() != 0:
            return
        path = args.out / "losses.csv"
        before = list(csv.DictReader(path.open())) if begin and path.exists() else []
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, FIELDS)
        self.writer.writeheader()
        self.writer.writerows(
            row for row in before if int(row["step"]) < begin
        )  # without the rows after the checkpoint
        if args.logdir:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(args.logdir, purge_step=begin)
        self.bar = tqdm(total=end, initial=begin, unit="step")

    def write(self, row: dict[str, Any]) -> None:
        if self.file is None:
            return
        self.writer.writerow(row)
        self.file.flush()
        if self.events:
            for name in FIELDS[1:]:
                self.events.add_scalar(name, row[name], row["step"])
        self.bar.set_postfix(loss=f"{row['loss']:.4f}", beta=f"{row['beta']:.2f}")
        self.bar.update()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.bar.close()
        if self.events:
            self.events.close()


def main() -> None:
    args = arguments()
    device = start_ranks()
    world, rank = dist.get_world_size(), dist.get_rank()
    x, y = dataset(args, device)
    steps_per_epoch = len(x) // args.batch
    if args.batch % world or steps_per_epoch == 0:
        raise SystemExit(f"--batch {args.batch}: expected a multiple of {world} ranks, at most {len(x)}")
    args.out.mkdir(parents=True, exist_ok=True)
    net = make_model(args, device)
    muon = args.preconditioner == "muon"
    optimizer = NLCG(
        muon_groups(net, lr=args.lr, weight_decay=0.1) if muon else net.parameters(),
        args.lr,
        preconditioner=None if args.preconditioner == "none" else "adam" if muon else args.preconditioner,
        line_search=OnlineLineSearch() if args.line_search else None,
        average_loss=True,
    )
    end = args.epochs * steps_per_epoch
    schedule = warmup_cosine(optimizer, end)
    begin = resume(args.out, net, optimizer, schedule)
    if rank == 0 and begin >= end:
        print(f"{args.out} has a run of {begin} steps: nothing to train; another --out starts a new one")
    log = Log(args, begin, end)
    for step in range(begin, end):
        epoch, k = divmod(step, steps_per_epoch)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed * 1_000_003 + epoch))
        mine = order[k * args.batch : (k + 1) * args.batch].chunk(world)[rank].to(device)
        lr = optimizer.param_groups[0]["lr"]
        loss = train_step(net, optimizer, x[mine], y[mine], args.micro)
        schedule.step()
        did = optimizer.diagnostics()  # over shards, all ranks have to ask
        beta = did.beta if did.beta_matrices is None else did.beta_matrices
        numbers = {"beta": beta, "ls_scale": did.ls_scale, "grad_norm": did.grad_norm}
        log.write({"step": step, "loss": loss.item(), "lr": lr, **numbers})
        if (step + 1) % args.save_every == 0 or step + 1 == end:
            save(args.out, step + 1, net, optimizer, schedule)
    log.close()
    with torch.no_grad():
        accuracy = (net(x).argmax(1) == y).double().mean().item()
    if rank == 0:
        print(
            f"{end} steps on {world} ranks: training accuracy {100 * accuracy:.1f} %, losses in {args.out}/losses.csv"
        )
    del net, optimizer, schedule
    gc.collect()  # torch 2.13 sometimes aborts if a DDP outlives the process group
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
