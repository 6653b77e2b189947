"""The residual networks for 32 x 32 images of He et al. 2016, "Deep Residual Learning", section 4.2.

6 n + 2 layers: a 3 x 3 convolution, three stages of n blocks with 16, 32 and 64 channels, and one linear layer.
Shortcuts between stages are option A: every second pixel, and zeros for the new channels, so without parameters.
Names of the tensors are the usual ones (`conv1.weight`, `layer1.0.conv1.weight`, ..., `linear.weight`), so that
published weights load.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ZeroPaddedShortcut(nn.Module):
    """Every second row and column of (n, c, h, w), with channels of zeros before and after.

    `padding` goes to `torch.nn.functional.pad` whole, so another padding may be set on a network that was cut.

    >>> import torch
    >>> ZeroPaddedShortcut(8, 8)(torch.ones(1, 16, 32, 32)).shape
    torch.Size([1, 32, 16, 16])
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.padding = (0, 0, 0, 0, before, after)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], self.padding)

    def extra_repr(self) -> str:
        return f"padding={self.padding}"


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, added to the shortcut; the first one has the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        new = outputs - inputs
        self.shortcut = ZeroPaddedShortcut(new // 2, new - new // 2) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNetCifar(nn.Module):
    """A network of 6 * `blocks` + 2 layers: images (n, 3, h, w) to logits (n, `classes`).

    Convolutions start as in He et al. 2015 ("Delving Deep into Rectifiers", eq. 10 with the fan-out of section 2.2,
    backward propagation).
    """

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


def resnet20(classes: int = 10) -> ResNetCifar:
    """ResNet-20 for CIFAR: 0.27 M parameters.

    >>> sum(p.numel() for p in resnet20().parameters())
    269722
    """
    return ResNetCifar(3, classes)


def resnet32(classes: int = 10) -> ResNetCifar:
    """ResNet-32 for CIFAR: 0.46 M parameters.

    >>> sum(p.numel() for p in resnet32().parameters())
    464154
    """
    return ResNetCifar(5, classes)


def resnet44(classes: int = 10) -> ResNetCifar:
    """ResNet-44 for CIFAR: 0.66 M parameters.

    >>> sum(p.numel() for p in resnet44().parameters())
    658586
    """
    return ResNetCifar(7, classes)


def resnet56(classes: int = 10) -> ResNetCifar:
    """ResNet-56 for CIFAR: 0.85 M parameters.

    >>> sum(p.numel() for p in resnet56().parameters())
    853018
    """
    return ResNetCifar(9, classes)


def resnet110(classes: int = 10) -> ResNetCifar:
    """ResNet-110 for CIFAR: 1.7 M parameters.

    >>> sum(p.numel() for p in resnet110().parameters())
    1727962
    """
    return ResNetCifar(18, classes)
