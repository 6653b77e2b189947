"""Tiny residual networks, one for each way in which a module adds to what it is given; and some that only seem to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network, inputs for it, and what stays of each of its blocks."""

    make: Callable[[], nn.Module]
    keeps: dict[str, tuple[str, ...]]
    inputs: Callable[[], Any] = lambda: torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))


def conv(width: int = 4) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1)


class Block(nn.Module):
    """A block around one branch, by any function of (x, branch)."""

    def __init__(self, join: Callable[[Tensor, nn.Module], Any], branch: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch or nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv())
        self.join, self.width = join, 4

    def forward(self, x: Tensor) -> Any:
        return self.join(x, self.branch)


class Net(nn.Module):
    """A stem, blocks and a head."""

    def __init__(self, *blocks: nn.Module, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = stem or conv()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def net(join: Callable[[Tensor, nn.Module], Any], stem: nn.Module | None = None) -> Callable[[], nn.Module]:
    return lambda: Net(Block(join), Block(join), stem=stem)


def relued() -> nn.Module:
    return nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(3, 1, 1))


def in_place(x: Tensor, f: nn.Module) -> Tensor:
    out = f(x)
    out += x
    return F.relu(out, inplace=True)


def through_views(x: Tensor, f: nn.Module) -> Tensor:
    flat = x.flatten(2).transpose(1, 2).roll(1, 1)
    flat = flat + f(x).flatten(2).transpose(1, 2)
    return flat.roll(-1, 1).transpose(1, 2).reshape(x.shape)


def written_into(x: Tensor, f: nn.Module) -> Tensor:
    x.relu_()
    return x + f(x)


class Hidden(nn.Module):
    """As in transformers: takes keywords, gives a tuple; the network reads an attribute of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(4), nn.Linear(4, 4)
        self.kind = "full"

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, *, weights: bool = False) -> Any:
        inner = self.inner(self.norm(hidden_states))
        seen = inner if mask is None else inner * mask
        return hidden_states + seen, (seen if weights else None)


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(4, 4), nn.ModuleList(Hidden() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, mask = self.embed(x), torch.ones(4)
        for number, layer in enumerate(self.layers):
            given = mask if layer.kind == "full" else None
            x, _ = layer(hidden_states=x, mask=given) if number else layer(x, given, weights=True)
        return x


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Linear(4, 4), nn.LayerNorm(4)
        self.second, self.norm2 = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.first(x))
        return self.norm2(x + self.second(x).relu())


class TwoStreams(nn.Module):
    """Takes a dict of a list, gives a dict of a tuple, and mixes the streams in its branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, streams: dict[str, list[Tensor]]) -> dict[str, Any]:
        a, b = streams["both"]
        return {"both": [a + self.a(b), b + self.b(a)], "count": 2}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(4, 8), nn.ModuleList(TwoStreams() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        streams: dict[str, Any] = {"both": list(self.embed(x).chunk(2, -1))}
        for layer in self.layers:
            streams = layer(streams)
        return streams["both"][0] * streams["both"][1] * streams["count"]


class Shared(nn.Module):
    """One block under two names, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.one = Block(lambda x, f: x + f(x))
        self.two, self.head = self.one, conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(self.two(self.one(self.head(x)))))


class Features(nn.Module):
    """Keeps what goes into a block, and then writes into what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = conv(), Block(lambda x, f: x + f(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.stem(x)
        return kept, self.block(kept).mul_(2)


CASES = (
    Case(net(lambda x, f: F.relu(x + f(x)), relued()), {"blocks.0": (), "blocks.1": ()}),
    Case(net(in_place, relued()), {"blocks.0": (), "blocks.1": ()}),
    Case(net(lambda x, f: F.relu(x + f(x))), {"blocks.0": ("relu",), "blocks.1": ()}),
    Case(net(lambda x, f: F.relu6(x + f(x)), relued()), {"blocks.0": ("hardtanh",), "blocks.1": ()}),
    Case(net(lambda x, f: F.gelu(x + f(x), approximate="tanh")), {"blocks.0": ("gelu",), "blocks.1": ("gelu",)}),
    Case(net(lambda x, f: f(F.relu(x)) + x), {"blocks.0": (), "blocks.1": ()}),
    Case(net(lambda x, f: F.dropout(0.5 * x - f(x), 0.3, False)), {"blocks.0": ("mul",), "blocks.1": ("mul",)}),
    Case(net(through_views), {"blocks.0": (), "blocks.1": ()}),
    Case(net(written_into), {"blocks.0": ("relu",), "blocks.1": ("relu",)}),
    Case(net(lambda x, f: torch.add(x, f(x), alpha=3)), {"blocks.0": (), "blocks.1": ()}),
    Case(net(lambda x, f: x + F.avg_pool2d(f(x), 3, 1, 1) - x.mean()), {"blocks.0": (), "blocks.1": ()}),
    Case(lambda: Net(nn.Sequential(Block(in_place), Block(in_place)), stem=relued()),
         {"blocks.0": (), "blocks.0.0": (), "blocks.0.1": ()}),
    Case(lambda: Net(nn.Sequential(Block(lambda x, f: x + f(x)))), {"blocks.0.0": ()}),
    Case(Layered, {"layers.0": (), "layers.1": (), "layers.2": ()}, tokens),
    Case(lambda: nn.Sequential(nn.Linear(4, 4), PostNorm(), PostNorm()),
         {"1": ("norm1", "norm2"), "2": ("norm1", "norm2")}, tokens),
    Case(Mixed, {"layers.0": (), "layers.1": ()}, tokens),
    Case(Shared, {"one": ()}),
    Case(Features, {"block": ("clone",)}),
)  # fmt: skip


@dataclass(frozen=True)
class Boxed:
    """A record that a layer gives."""

    value: Tensor


class Telling(nn.Module):
    """Its block leaves what it has computed where the network finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(self.join)

    def join(self, x: Tensor, f: nn.Module) -> Tensor:
        self.told = f(x)
        return x + self.told

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * self.told


class Apart(nn.Module):
    """As in BERT: what is added is computed outside of the module that adds."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(4, 8), Narrow()

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.relu(self.wide(x)), x)


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 4), nn.LayerNorm(4)

    def forward(self, wide: Tensor, x: Tensor) -> Tensor:
        return self.norm(x + self.linear(wide))


class Unlike(nn.Module):
    """Its block passes now the first and now the second of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.swap = Swapping(), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.swap(x)
        return self.block(x, self.block(x, x.exp(), True), False)


class Swapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = conv()

    def forward(self, a: Tensor, b: Tensor, first: bool) -> Tensor:
        return a + self.branch(b) if first else b + self.branch(a)


def projected(x: Tensor, f: nn.Module) -> Tensor:
    return F.relu(f(x) + f(x.flip(1)))


REFUSED = (
    (net(projected), "blocks.0", r"on both sides of the addition in blocks\.0 stands a layer"),
    (lambda: nn.Sequential(conv(), Block(lambda x, f: projected(x[:, :, ::2, ::2], f))), "1", "changes the shape"),
    (net(lambda x, f: x + x), "blocks.0", "adds two of its inputs, or one to itself"),
    (net(lambda x, f: (x + f(x)).flip(1)), "blocks.0", "the views on its way do not come back"),
    (Telling, "block", "what convolution makes inside is read outside"),
    (Unlike, "block", "it is called 2 times, and not alike"),
)
