"""NLCG and its rivals, tuned alike: which runs, in which order.

For each setting and optimizer, by training loss, so that the test data has no influence:

    grid       seed 0 at every pair of a peak (factors of 3) and beta1; peaks, then beta1, are added until the best pair
               is inside
    seeds      seed 1 at the four best pairs; then the peaks next to the best of them, a factor of sqrt(3) away, until
               the mean of two seeds is lower than on either side: so no best is missed between two points of a grid
    decay      the best pair again, with weight decay, both seeds
    more       three more seeds at the best of all these

This is done on the transformer and, without two of the optimizers, on the small images. Then follow, on the
transformer, the rules for beta, and other batches with as many steps at the beta1 and decay chosen above; and images of
full size with the choices of the small ones.

Last, without any search of their own: NLCG with Muon's direction and Muon itself, both at the peak and decay that were
chosen for Muon, each at its own default cap or momentum, and with constant momenta; also in four times as many steps.
And NLCG at its choices with the state in bfloat16, and with everything in bfloat16.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from optimizers import VARIANTS
from train import Run

Rows = list[dict[str, object]]
SEEDS = (0, 1, 2, 3, 4)
SEEDS_OF_FULL = SEEDS[:3]
BETAS = (0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
BETAS_AT_FIRST = BETAS[2:5]
DECAY = 0.1
PEAKS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
BETWEEN = (0.00017, 0.00055, 0.0017, 0.0055, 0.017, 0.055, 0.17, 0.55, 1.7, 5.5)
FINE = tuple(sorted((*PEAKS, *BETWEEN)))
# Where each grid starts
START = {
    "nlcg_muon": (0.03, 0.1),
    "nlcg": (0.003, 0.01),
    "nlcg_constant": (0.003, 0.01),
    "adamw": (0.01, 0.03),
    "nadamw": (0.01, 0.03),
    "muon": (0.01, 0.03),
    "soap": (0.01, 0.03),
    "schedule_free": (0.01, 0.03),
    "lamb": (0.03, 0.1),
}
TEXT = Run(
    "",
    384,
    model="transformer",
    schedule="cosine",
    train_images=11520,
    test_images=1024,
    epochs=4,
    micro=96,
    clip=1.0,
)
IMAGES = Run("", 1024, schedule="cosine", side=16, train_images=8192, epochs=12)  # 96 steps, as FULL
FULL = Run("", 4096, schedule="cosine")
NAMES = ("nlcg_muon", "nlcg", "nlcg_constant", "adamw", "nadamw", "muon", "soap", "schedule_free", "lamb")
# Without NAdamW and LAMB, for time: all parts take five hours on two cores
OF_IMAGES = ("nlcg_muon", "nlcg", "nlcg_constant", "adamw", "muon", "soap", "schedule_free")
OF_BATCHES = ("nlcg_muon", "nlcg", "nlcg_constant", "adamw", "muon", "soap")
OF_FULL = ("nlcg_muon", "nlcg", "nlcg_constant", "adamw", "muon")
# Sequences of 64 characters a batch, and 120 steps as at 384.
BATCHES = (96, 1024)

Choice = tuple[float, float, float]
"""peak, beta1, weight decay"""


def at(config: Run, name: str, choice: Choice, seed: int) -> Run:
    peak, beta1, decay = choice
    return dataclasses.replace(config, optimizer=name, peak=peak, beta1=beta1, weight_decay=decay, seed=seed)


class Losses:
    """Of one optimizer in one setting: training losses by choice and seed."""

    def __init__(self, rows: Rows, config: Run, name: str) -> None:
        free = {"optimizer", "peak", "beta1", "weight_decay", "seed"}
        fixed = [field.name for field in dataclasses.fields(Run) if field.name not in free]
        self.found: dict[Choice, dict[int, float]] = {}
        for row in rows:
            if row["optimizer"] == name and all(row[key] == getattr(config, key) for key in fixed):
                loss = row["final_loss"]
                choice = (row["peak"], row["beta1"], row["weight_decay"])
                self.found.setdefault(choice, {})[row["seed"]] = loss if math.isfinite(loss) else math.inf

    def mean(self, choice: Choice, seeds: int) -> float | None:
        """Over the first seeds; None if one is missing."""
        of = self.found.get(choice, {})
        return sum(of[seed] for seed in range(seeds)) / seeds if all(seed in of for seed in range(seeds)) else None

    def ranked(self, seeds: int, decay: float | None = 0.0) -> list[Choice]:
        """Choices with that many seeds, the best first; of that decay, or of any."""
        means = {c: self.mean(c, seeds) for c in self.found if decay is None or c[2] == decay}
        return sorted((c for c, mean in means.items() if mean is not None), key=lambda c: means[c])

    def betas(self) -> list[float]:
        """Of the grid: the first three, and one more next to the best by seed 0 if that is at an edge."""
        tried = sorted({*BETAS_AT_FIRST, *(c[1] for c in self.found)})
        k = BETAS.index(self.ranked(1)[0][1])
        return sorted({*tried, *BETAS[max(k - 1, 0) : k + 2]})

    def edges(self, beta1: float, decay: float = 0.0, peaks: tuple[float, ...] = PEAKS) -> list[Choice]:
        """What to add next to the best peak that seed 0 has with this beta1: nothing if it is inside the grid."""
        tried = [c for c in self.ranked(1, decay) if c[1] == beta1 and c[0] in peaks]
        return [c for c in neighbours(tried[0], peaks) if self.mean(c, 1) is None] if tried else []


def neighbours(choice: Choice, peaks: tuple[float, ...] = FINE) -> list[Choice]:
    k = peaks.index(choice[0])
    return [(peaks[j], *choice[1:]) for j in (k - 1, k + 1) if 0 <= j < len(peaks)]


def chosen(rows: Rows, config: Run, name: str) -> Choice | None:
    """The best by the mean of two seeds, once it is bracketed and was tried with weight decay."""
    losses = Losses(rows, config, name)
    pairs = losses.ranked(2)
    if not pairs or any(losses.mean(c, 2) is None for c in (*neighbours(pairs[0]), (*pairs[0][:2], DECAY))):
        return None
    return losses.ranked(2, decay=None)[0]


def tuning(rows: Rows, config: Run, names: tuple[str, ...]) -> Iterator[Run]:
    """What is to be run next, as far as the rows tell."""
    for name in names:
        losses = Losses(rows, config, name)
        grid = [(peak, beta1, 0.0) for beta1 in BETAS_AT_FIRST for peak in START[name]]
        wanted = [(c, 0) for c in grid if losses.mean(c, 1) is None]
        wanted = wanted or [(c, 0) for beta1 in BETAS_AT_FIRST for c in losses.edges(beta1)]
        if not wanted:  # the best beta1 is bracketed too: others begin at the best peak of all
            betas, peak = losses.betas(), losses.ranked(1)[0][0]
            new = [beta1 for beta1 in betas if not any(c[1] == beta1 for c in losses.found)]
            wanted = [((peak, beta1, 0.0), 0) for beta1 in new] or [(c, 0) for b in betas for c in losses.edges(b)]
        if not wanted:
            best = [c for c in losses.ranked(1) if c[0] in PEAKS][:4]
            wanted = [(c, 1) for c in best if losses.mean(c, 2) is None]
        if not wanted:
            pair = losses.ranked(2)[0]
            wanted = [(c, seed) for c in neighbours(pair) for seed in (0, 1) if seed not in losses.found.get(c, {})]
        if not wanted:
            decayed = (*pair[:2], DECAY)
            wanted = [(decayed, seed) for seed in (0, 1) if seed not in losses.found.get(decayed, {})]
        if not wanted:
            wanted = [(losses.ranked(2, decay=None)[0], seed) for seed in SEEDS[2:]]
        yield from (at(config, name, choice, seed) for choice, seed in wanted)


def text(rows: Rows, precision: str) -> Iterator[Run]:
    return tuning(rows, dataclasses.replace(TEXT, precision=precision), NAMES)


def images(rows: Rows, precision: str) -> Iterator[Run]:
    return tuning(rows, dataclasses.replace(IMAGES, precision=precision), OF_IMAGES)


def rules(rows: Rows, precision: str) -> Iterator[Run]:
    """Each rule for beta at NLCG's cap, at peaks around NLCG's until the best is bracketed; five seeds there."""
    config = dataclasses.replace(TEXT, precision=precision)
    choice = chosen(rows, config, "nlcg")
    for name in () if choice is None else (f"nlcg_{rule}" for rule in VARIANTS):
        losses = Losses(rows, config, name)
        wanted = [(choice, 0)] if losses.mean(choice, 1) is None else [(c, 0) for c in losses.edges(*choice[1:], FINE)]
        wanted = wanted or [(losses.ranked(1, decay=None)[0], seed) for seed in SEEDS[1:]]
        yield from (at(config, name, c, seed) for c, seed in wanted)


def batches(rows: Rows, precision: str) -> Iterator[Run]:
    """With the beta1 and decay of the middle batch; the peak is searched again: seed 1 at the two best of seed 0,
    seed 2 at the better of them."""
    middle = dataclasses.replace(TEXT, precision=precision)
    for batch in BATCHES:
        config = at_batch(middle, batch)
        for name in OF_BATCHES:
            choice = chosen(rows, middle, name)
            if choice is None:
                continue
            losses = Losses(rows, config, name)
            wanted = [choice] if losses.mean(choice, 1) is None else []
            wanted = wanted or losses.edges(*choice[1:], FINE)
            runs = [(c, 0) for c in wanted]
            runs = runs or [(c, 1) for c in losses.ranked(1, decay=None)[:2] if losses.mean(c, 2) is None]
            runs = runs or [(losses.ranked(2, decay=None)[0], 2)]
            yield from (at(config, name, c, seed) for c, seed in runs)


def at_batch(config: Run, batch: int) -> Run:
    return dataclasses.replace(config, batch=batch, train_images=config.train_images * batch // config.batch)


def full(rows: Rows, precision: str) -> Iterator[Run]:
    """With what was chosen on the small images; three seeds."""
    small, config = (dataclasses.replace(c, precision=precision) for c in (IMAGES, FULL))
    choices = {name: choice for name in OF_FULL if (choice := chosen(rows, small, name)) is not None}
    yield from (at(config, name, choice, seed) for seed in SEEDS_OF_FULL for name, choice in choices.items())


def matrices(rows: Rows, precision: str) -> Iterator[Run]:
    """Without any search of their own: five seeds of the two defaults; of each constant momentum, and in 480 steps, the
    first two seeds."""
    for middle in (TEXT, IMAGES):
        config = dataclasses.replace(middle, precision=precision)
        muon = chosen(rows, config, "muon")
        if muon is None:
            continue
        peak, _, decay = muon
        for seed in SEEDS:
            yield from (at(config, name, (peak, 0.95, decay), seed) for name in ("nlcg_muon", "muon"))
        for seed in SEEDS[:2]:
            yield from (at(config, "nlcg_muon_constant", (peak, beta1, decay), seed) for beta1 in (0.8, 0.9, 0.95))
    config = dataclasses.replace(TEXT, precision=precision)
    muon = chosen(rows, config, "muon")
    if muon is not None:
        peak, _, decay = muon
        longer = dataclasses.replace(config, epochs=4 * config.epochs)
        for seed in SEEDS[:2]:
            yield from (at(longer, "nlcg_muon", (peak, beta1, decay), seed) for beta1 in (0.9, 0.95))
            yield from (at(longer, "muon", (peak, beta1, decay), seed) for beta1 in (0.8, 0.9, 0.95))


def state16(rows: Rows, precision: str) -> Iterator[Run]:
    """The state in bfloat16 at the choices above, and everything in bfloat16, rounded stochastically; five seeds."""
    for middle in (TEXT, IMAGES):
        config = dataclasses.replace(middle, precision=precision)
        pure = dataclasses.replace(config, precision="pure_bfloat16")
        for name in ("nlcg", "nlcg_muon"):
            choice = chosen(rows, config, name)
            if choice is None:
                continue
            yield from (at(config, f"{name}_state16", choice, seed) for seed in SEEDS)
            if name == "nlcg":
                yield from (at(pure, "nlcg_all16", choice, seed) for seed in SEEDS)


PARTS = {
    "text": text,
    "rules": rules,
    "batches": batches,
    "images": images,
    "full32": full,
    "matrices": matrices,
    "state16": state16,
}
