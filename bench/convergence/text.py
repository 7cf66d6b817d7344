"""Characters to predict: the source of Python's own standard library, which is always there.

Which characters depends on the Python version; a row names it, and the text's hash.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LENGTH = 64  # characters a sequence


class Text:
    """The modules ``*.py`` at the top of the standard library, as ASCII codes (0 for any other character). Every tenth
    file is for validation. A sample is a sequence x and the same one character on, y; both (n, LENGTH)."""

    classes = 128

    def __init__(self, train_sequences: int | None, test_sequences: int | None, device: str = "cpu") -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        codes = [np.frombuffer(path.read_bytes(), np.uint8) for path in files]
        parts = [[c for k, c in enumerate(codes) if (k % 10 == 9) == validation] for validation in (False, True)]
        train, test = (np.concatenate(part) for part in parts)
        digest = hashlib.sha256(train.tobytes() + test.tobytes()).hexdigest()[:12]
        self.name = f"standard library of Python {platform.python_version()}, {digest}"
        self.device = device
        self.train, self.validation = (
            torch.from_numpy(np.where(part < 128, part, 0).astype(np.int64)).to(device) for part in (train, test)
        )
        self.sequences = train_sequences or len(train) // LENGTH
        self.test_sequences = test_sequences or len(test) // LENGTH - 1

    def __len__(self) -> int:
        """Sequences an epoch draws, anywhere in the text."""
        return self.sequences

    def at(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        windows = text[starts[:, None] + torch.arange(LENGTH + 1, device=self.device)]
        return windows[:, :-1], windows[:, 1:]

    def epoch(
        self, batch: int, micro: int, generator: torch.Generator, augment: bool = True
    ) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """Every batch, as its micro-batches."""
        for _ in range(self.sequences // batch):
            starts = torch.randint(len(self.train) - LENGTH, (batch,), generator=generator, device=self.device)
            yield (self.at(self.train, part) for part in starts.split(micro))

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Sequences at equal distances in the validation text: the same for every run."""
        starts = torch.linspace(0, len(self.validation) - LENGTH - 1, self.test_sequences, device=self.device).long()
        for part in starts.split(256):
            yield self.at(self.validation, part)
