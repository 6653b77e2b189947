"""Tiny networks, one for each way in which channels depend on each other; tests draw plans over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Net:
    """A network, inputs for it, and the sizes of the groups that it has."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    sizes: tuple[int, ...]


def image(channels: int = 3, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def conv(i: int, o: int, k: int = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **kwargs)


class Chain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 6), nn.Hardswish(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(24, 7), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(7, 5),
        )  # fmt: skip


class Winding(nn.Module):
    """Its path depends on the values: what has to run the same ops on all batches refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.relu(y) if x[0, 0] > 0 else torch.tanh(y))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 8), conv(8, 6), conv(6, 8), nn.Linear(8, 5)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.norm(self.b(F.relu(self.a(x)))))
        return self.head(x.mean((2, 3)))


class ZeroPadded(nn.Module):
    """Option A of He et al.: the shortcut into a wider stage is padded with zeros on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 4), conv(4, 5, stride=2), conv(5, 8), nn.Linear(8, 5)
        self.padding = (0, 0, 0, 0, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.pad(x[:, :, ::2, ::2], self.padding) + self.b(F.relu(self.a(x)))
        return self.head(x.amax((2, 3)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(4, 5), conv(9, 6)
        self.norm, self.head = nn.BatchNorm2d(9), conv(15, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat([x, self.b(x)], 1)
        x = torch.cat([x, self.c(F.relu(self.norm(x)))], 1)
        return self.head(x)


class Depthwise(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 8, 1), conv(8, 16, groups=8), nn.ReLU6(), conv(16, 16, groups=16), conv(16, 4, 1))


class Grouped(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 12, 1), nn.ReLU(), conv(12, 8, groups=4), nn.ReLU(), conv(8, 4, 1))


class Transposed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 6), nn.ConvTranspose2d(6, 4, 2, 2), nn.ConvTranspose2d(4, 8, 2, 2, groups=2), conv(8, 3)
        )


class SplitHalves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.widths = [4, 6]
        self.a, self.b, self.c = conv(3, 10), conv(4, 5), conv(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).split([self.b.in_channels, self.c.in_channels - self.b.out_channels], 1)
        return self.c(torch.cat([self.b(left), right], 1))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        return self.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.b = conv(3, 8), nn.GroupNorm(4, 8), conv(8, 6)
        self.i, self.l, self.head = nn.InstanceNorm2d(6, affine=True), nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(self.b(F.silu(self.g(self.a(x)))))
        return self.head(self.l((x * x.sigmoid()).sum((2, 3))))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up, self.b = conv(3, 8), conv(8, 4, 1), conv(4, 8, 1), conv(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return self.b(x * gate)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 4), conv(4, 6), conv(10, 5), conv(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.a(x))
        deep = F.interpolate(self.b(F.max_pool2d(skip, 2)), scale_factor=2, mode="bilinear")
        return self.head(self.c(torch.cat([skip, deep], 1)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.scale = 4, 0.5
        self.qkv, self.out, self.head = nn.Linear(6, 48), nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, -1, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.head(x + self.out(mixed.transpose(1, 2).reshape(n, t, -1)))


class TiedTwice(nn.Module):
    """One module called twice, and its weight used once more as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.loop, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.loop(torch.tanh(self.loop(self.into(x))))
        return self.out(x @ self.loop.weight)


class RawParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.full((6,), 1e-6))
        self.into, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.into(x)], 1)
        return self.out((x + x * self.scale).mean(1))


class TwoInTwoOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both, self.other = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, a: Tensor, extra: dict[str, Tensor]) -> dict[str, Any]:
        x = self.a(a) * self.b(extra["b"])
        return {"first": self.both(x), "rest": [self.other(x)]}


class FixedView(nn.Module):
    """An integer that cannot follow: the width is written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), nn.Linear(256, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).view(-1, 256)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.lstm, self.out = nn.Linear(4, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.lstm(self.into(x))[0]))


class PixelShuffle(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 16), nn.PixelShuffle(2), conv(4, 6), nn.PixelUnshuffle(2), conv(24, 3))


class Strided(nn.Module):
    """Every second channel gates the one before it: pairs go together; a roll over space is harmless."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).roll(1, 2)
        return self.b(x[:, ::2] * x[:, 1::2].sigmoid())


class Rolled(nn.Module):
    """A roll over channels: how far it goes would depend on which are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 4, groups=2), conv(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).roll(1, 1)))


class RunningSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).cumsum(-1)).cumsum(1))


class Counted(nn.Module):
    """Divided by the number of channels: as an integer, and as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x / x.shape[-1])
        return self.d(self.c(x / torch.tensor(x.shape[-1])))


class Halves(nn.Module):
    """Two small halves by number, that often lose the same number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, -1)
        return self.b(left) + self.c(right)


class Normalised(nn.Module):
    """A length that is expanded over the channels; a root mean square that casts to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.RMSNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.b(F.normalize(self.a(x), dim=-1)))
        wide = x.float()
        return self.c((wide * wide.pow(2).mean(-1, keepdim=True).rsqrt()).to(x.dtype))


class GroupedQueries(nn.Module):
    """Two heads of keys and values for four of queries: a pair of queries goes with its key."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 16), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x)))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class PointNet(nn.Module):
    """Batch norm between transposes: on fake tensors the strides, and so the ops of the next layer, are others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x).transpose(1, 2)).transpose(1, 2))


def weight_normed() -> nn.Module:
    normed = torch.nn.utils.parametrizations.weight_norm
    return nn.Sequential(nn.Linear(4, 8), normed(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 3))


def tokens(width: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 5, width, generator=torch.Generator().manual_seed(2))


def two_inputs() -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(2, 3), {"b": torch.randn(2, 4)}


NETWORKS = (
    Net(Chain, image(), (8, 6, 7)),
    Net(Residual, image(), (8, 6)),
    Net(ZeroPadded, image(), (4, 5, 4)),
    Net(Dense, image(), (4, 5, 6)),
    Net(Depthwise, image(), (8,)),
    Net(Grouped, image(), (4,)),
    Net(Transposed, image(), (6, 2)),
    Net(SplitHalves, image(), (4, 6, 5)),
    Net(Shuffle, image(), (4,)),
    Net(Norms, image(), (4, 6)),
    Net(SqueezeExcite, image(), (8, 4)),
    Net(UNet, image(), (4, 6, 5)),
    Net(Attention, tokens(6), (4,)),
    Net(TiedTwice, tokens(4), (6,)),
    Net(RawParameter, tokens(4), (6,)),
    Net(TwoInTwoOut, two_inputs, (6,)),
    Net(FixedView, image(), (4, 6)),
    Net(Recurrent, tokens(4), (6, 5)),
    Net(PixelShuffle, image(), (4, 6)),
    Net(Strided, image(), (4,)),
    Net(Rolled, image(), ()),
    Net(RunningSum, tokens(4), (5,)),
    Net(Counted, tokens(4), (7,)),
    Net(Halves, tokens(4), (2, 2)),
    Net(Normalised, tokens(4), (6, 5)),
    Net(GroupedQueries, tokens(6), (2,)),
    Net(PointNet, tokens(4), (6,)),
    Net(weight_normed, tokens(4), (8, 6)),
)


def build(net: Net) -> nn.Module:
    """The network with seeded weights, batch norm away from its fresh state."""
    torch.manual_seed(0)
    model = net.make()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model.eval()
