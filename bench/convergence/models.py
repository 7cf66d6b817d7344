"""The CIFAR ResNets of He et al. (arXiv:1512.03385, section 4.2): three stages of 16, 32 and 64 channels; and a small
transformer for text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu, scaled_dot_product_attention


class Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.stride, self.grow = stride, width - channels
        self.projection = None
        if self.grow and projection:  # option B
            self.projection = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        if self.projection is not None:
            x = self.projection(x)
        elif self.grow:  # option A: subsampled, with zeros for the new channels
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grow))
        return relu(x + y)


class CifarResNet(nn.Module):
    """``depth`` = 6 k + 2 layers: k blocks a stage; 8 and 32 here. As published: shortcuts of option A,
    their initialization. ``projections``: as in many implementations, option B and torch's initialization."""

    def __init__(self, depth: int, classes: int, projections: bool = False) -> None:
        super().__init__()
        if depth % 6 != 2:
            raise ValueError(f"depth must be 6 k + 2, got {depth}")
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        blocks, channels = [], 16
        for width in (16, 32, 64):
            for k in range((depth - 2) // 6):
                blocks.append(Block(channels, width, 2 if k == 0 and width > 16 else 1, projections))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not projections:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(relu(self.stem_norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class TransformerBlock(nn.Module):
    """Causal attention and a perceptron, each after its normalization (pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.first_norm(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.second_norm(x))


class Transformer(nn.Module):
    """Next-character prediction: sequences (n, length) to logits (n, classes, length). Initialized as torch does;
    ``small``: embeddings of deviation 0.02, as GPT-2's."""

    def __init__(
        self, classes: int, length: int, small: bool = False, width: int = 64, heads: int = 4, blocks: int = 2
    ) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(classes, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        if small:
            for table in (self.embedding, self.position):
                nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.embedding(x) + self.position(places)))).transpose(1, 2)


def make(name: str, classes: int) -> nn.Module:
    """``resnet8``, ``resnet32``, ...; ``resnet8p``, ... with projections; ``resnet50`` is torchvision's;
    ``transformer``, or ``transformer02`` with small embeddings."""
    if name.startswith("transformer"):
        from text import LENGTH

        return Transformer(classes, LENGTH, name == "transformer02")
    if name == "resnet50":
        import torchvision

        return torchvision.models.resnet50(num_classes=classes)
    return CifarResNet(int(name.removeprefix("resnet").removesuffix("p")), classes, name.endswith("p"))


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
