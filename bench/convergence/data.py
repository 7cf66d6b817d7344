"""Images, in batches of micro-batches.

Small ones stay on the device as uint8 tensors, and are augmented there. Two layouts: an image folder,
``train/<class>/*.jpg`` and ``test/<class>/*.jpg`` (or ``val``), whose images have one size; and the python files that
CIFAR-10 and CIFAR-100 are published as. ImageNet, a folder of images of all sizes, is decoded by worker processes.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

Pairs = Iterator[tuple[Tensor, Tensor]]
CACHE = Path(__file__).parent.parent.parent / "build" / "images"


@dataclass
class Images:
    """``x`` is uint8, (n, 3, height, width); ``y`` int64, (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    mean: Tensor
    std: Tensor

    def to(self, device: str) -> Images:
        parts = (self.train_x, self.train_y, self.test_x, self.test_y)
        moved = [part.to(device) for part in parts]
        return Images(*moved, self.classes, self.mean.to(device), self.std.to(device))

    def __len__(self) -> int:
        return len(self.train_y)

    def epoch(self, batch: int, micro: int, generator: torch.Generator, augment: bool = True) -> Iterator[Pairs]:
        """Every batch, as its micro-batches, each drawn from ``generator`` when its turn comes. An incomplete
        last batch is left out."""
        drawn = self.augmented if augment else lambda x, _: x
        order = torch.randperm(len(self), generator=generator, device=self.train_x.device)
        for indices in order[: len(self) // batch * batch].split(batch):
            yield (
                (self.normalized(drawn(self.train_x[part], generator)), self.train_y[part])
                for part in indices.split(micro)
            )

    def test(self) -> Pairs:
        for x, y in zip(self.test_x.split(1000), self.test_y.split(1000), strict=True):
            yield self.normalized(x), y

    def normalized(self, x: Tensor) -> Tensor:
        return ((x.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random crop of the image padded by an eighth of zeros (four at 32 pixels), flipped or not: as (He et al.,
        2015)."""
        n, _, height, width = x.shape
        margin = height // 8
        x = pad(x, (margin, margin, margin, margin))
        draw = {"generator": generator, "device": x.device}
        top, left = (torch.randint(2 * margin + 1, (n, 1, 1), **draw) for _ in range(2))
        flip = torch.randint(2, (n, 1, 1), **draw).bool()
        rows = top + torch.arange(height, device=x.device)[:, None]
        columns = torch.arange(width, device=x.device)[None, :]
        columns = left + torch.where(flip, width - 1 - columns, columns)
        return x[torch.arange(n, device=x.device)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    from PIL import Image

    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [(path, label) for label, name in enumerate(names) for path in sorted((folder / name).iterdir())]
    images = [np.asarray(Image.open(path).convert("RGB")) for path, _ in files]
    if len({image.shape for image in images}) != 1:
        raise ValueError(f"the images in {folder} have different sizes; expected one")
    return np.stack(images).transpose(0, 3, 1, 2), np.array([label for _, label in files]), names


def read_pickles(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    hundred = (folder / "train").is_file()
    parts = [["train"], ["test"]] if hundred else [[f"data_batch_{k}" for k in range(1, 6)], ["test_batch"]]
    found = []
    for files in parts:
        batches = [pickle.loads((folder / file).read_bytes(), encoding="bytes") for file in files]
        labels = [batch[b"fine_labels" if hundred else b"labels"] for batch in batches]
        x = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        found.append((x, np.concatenate(labels)))
    return found


def sized(images: np.ndarray, side: int | None) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(images))
    if side is None or x.shape[-1] == side:
        return x
    return torch.cat([adaptive_avg_pool2d(part.float(), side).round().to(torch.uint8) for part in x.split(1000)])


def load(
    folder: Path, train_images: int | None = None, test_images: int | None = None, side: int | None = None
) -> Images:
    """The images of a folder in either layout. ``train_images`` and ``test_images`` take so many, drawn once and for
    all (the same for every seed); ``side`` averages them down to so many pixels. Decoded images are kept in
    build/images."""
    folder = folder.resolve()
    cache = CACHE / f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}.npz"
    if cache.exists():
        kept = np.load(cache)
        (train_x, train_y), (test_x, test_y) = ((kept[f"{part}_x"], kept[f"{part}_y"]) for part in ("train", "test"))
    else:
        if (folder / "train").is_dir():
            train_x, train_y, names = read_folder(folder / "train")
            test_x, test_y, test_names = read_folder(folder / ("test" if (folder / "test").is_dir() else "val"))
            if names != test_names:
                raise ValueError(f"train and test of {folder} have different classes")
        else:
            (train_x, train_y), (test_x, test_y) = read_pickles(folder)
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.npz")  # two runs may begin at once
        np.savez(partial, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)
        partial.rename(cache)
    classes = int(train_y.max()) + 1
    draw = np.random.default_rng(0)
    for count, size in ((train_images, len(train_y)), (test_images, len(test_y))):
        if count is not None and not 0 < count <= size:
            raise ValueError(f"{count} images of {size}")
    train = np.sort(draw.permutation(len(train_y))[:train_images])
    test = np.sort(draw.permutation(len(test_y))[:test_images])
    x, test_x = (sized(part, side) for part in (train_x[train], test_x[test]))
    flat = x.permute(1, 0, 2, 3).reshape(3, -1).double() / 255
    mean, std = (t.float().view(1, 3, 1, 1) for t in (flat.mean(1), flat.std(1)))
    return Images(
        x,
        torch.from_numpy(train_y[train].astype(np.int64)),
        test_x,
        torch.from_numpy(test_y[test].astype(np.int64)),
        classes,
        mean,
        std,
    )


class ImageNet:
    """``train/<class>/*`` and ``val/<class>/*`` of any size, by torchvision: crops of random scale and place made
    224 x 224, flipped or not; for the test, the centre. Workers decode, crop and flip; the device normalizes."""

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, folder: Path, device: str, train_images: int | None = None, test_images: int | None = None):
        from torchvision import datasets, transforms

        crop = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
        centre = [transforms.Resize(256), transforms.CenterCrop(224)]
        self.parts = []
        for name, first, count in (("train", crop, train_images), ("val", centre, test_images)):
            part = datasets.ImageFolder(folder / name, transforms.Compose([*first, transforms.PILToTensor()]))
            self.classes = len(part.classes)
            drawn = np.sort(np.random.default_rng(0).permutation(len(part))[:count])
            self.parts.append(torch.utils.data.Subset(part, drawn.tolist()))
        self.device = device
        self.mean, self.std = (torch.tensor(t, device=device).view(1, 3, 1, 1) for t in (self.MEAN, self.STD))

    def __len__(self) -> int:
        return len(self.parts[0])

    def loaded(self, part: int, size: int, order: Tensor | None, generator: torch.Generator | None) -> Pairs:
        loader = torch.utils.data.DataLoader(
            self.parts[part],
            size,
            sampler=None if order is None else order.tolist(),
            generator=generator,
            num_workers=len(os.sched_getaffinity(0)),
            pin_memory=self.device != "cpu",
        )
        for x, y in loader:
            moved = x.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            yield (moved.float() / 255 - self.mean) / self.std, y.to(self.device, non_blocking=True)

    def epoch(self, batch: int, micro: int, generator: torch.Generator, augment: bool = True) -> Iterator[Pairs]:
        """As of :class:`Images`. The workers draw from seeds of their own, which ``generator`` gives."""
        if not augment:
            raise ValueError("images of all sizes are trained on by random crops only, got augment=False")
        if batch % micro:
            raise ValueError(f"a batch of {batch} in micro-batches of {micro}")
        draws = torch.Generator().manual_seed(
            int(torch.randint(2**62, (), generator=generator, device=generator.device))
        )
        order = torch.randperm(len(self), generator=draws)[: len(self) // batch * batch]
        pairs = self.loaded(0, micro, order, draws)
        for _ in range(len(order) // batch):
            yield itertools.islice(pairs, batch // micro)

    def test(self) -> Pairs:
        return self.loaded(1, 250, None, None)
