"""Networks in the style of VGG (Simonyan & Zisserman 2015) for small images, with batch norm.

`vgg16_bn` and `vgg19_bn` are the usual variants for 32 x 32 images: the convolutions of configurations D and E, five
poolings down to one pixel, and one linear layer in place of three. `digits_vgg` is small enough to be trained in
seconds on a CPU, and keeps three linear layers, which is where a VGG has most of its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

VGG16 = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
VGG19 = ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)


class VGG(nn.Module):
    """Convolutional `features` of an image (n, c, h, w), flattened for the `classifier`, to logits (n, classes)."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits


def features(channels: int, stages: tuple[tuple[int, ...], ...]) -> nn.Sequential:
    """3 x 3 convolution, batch norm and ReLU for each width, and a pooling that halves the image after each stage."""
    layers: list[nn.Module] = []
    for widths in stages:
        for width in widths:
            # No bias: the batch norm that follows would take it away again.
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def vgg16_bn(classes: int = 10) -> VGG:
    """VGG16 with batch norm for images (n, 3, 32, 32): 14.7 M parameters.

    >>> sum(p.numel() for p in vgg16_bn(100).parameters())
    14770212
    """
    return VGG(features(3, VGG16), nn.Linear(512, classes))


def vgg19_bn(classes: int = 10) -> VGG:
    """VGG19 with batch norm for images (n, 3, 32, 32): 20.0 M parameters.

    >>> sum(p.numel() for p in vgg19_bn(100).parameters())
    20081188
    """
    return VGG(features(3, VGG19), nn.Linear(512, classes))


def digits_vgg(classes: int = 10) -> VGG:
    """A small VGG for grey images (n, 1, 8, 8), with three linear layers: 0.79 M parameters.

    >>> sum(p.numel() for p in digits_vgg().parameters())
    789834
    """
    classifier = nn.Sequential(
        nn.Linear(128 * 2 * 2, 512),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(512, classes),
    )
    return VGG(features(1, ((64, 64), (128, 128))), classifier)
