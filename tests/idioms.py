"""Small networks that do what real ones do: gates, heads, windows, tables, rotations, ties, rankings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from networks import Net, image, tokens

Mix = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Queries, keys, values, bias -> what the heads give."""


class Recurrent(nn.Module):
    """Layers before and after a recurrent one."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.into, self.layer, self.out = nn.Linear(4, 6), layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.into(x))[0])


class LastState(Recurrent):
    """Reads the state after the last token, of the last layer."""

    def forward(self, x: Tensor) -> Tensor:
        states = self.layer(self.into(x))[1]
        return self.out((states[0] if isinstance(states, tuple) else states)[-1])


class Attends(nn.Module):
    """Attention over tokens; `given` are the arguments of the call."""

    def __init__(self, given: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__()
        self.into, self.out, self.given = nn.Linear(4, 12), nn.Linear(12, 3), dict(given)
        self.keys, self.values = (nn.Linear(4, kwargs.get(name) or 12) for name in ("kdim", "vdim"))
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, **kwargs)

    def forward(self, x: Tensor) -> Any:
        y, weights = self.attention(self.into(x), self.keys(x), self.values(x), **self.given)
        return (self.out(y), weights) if weights is not None else self.out(y)


class Heads(nn.Module):
    """Heads of four, half as many for keys and values if so wanted; a bias for each head and pair of places."""

    def __init__(self, mix: Mix, key_heads: int = 4, biased: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 16), nn.Linear(6, 4 * key_heads), nn.Linear(6, 4 * key_heads)
        self.out, self.mix = nn.Linear(16, 3), mix
        self.bias = nn.Parameter(torch.randn(1, 4, 5, 5)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x)))
        return self.out(self.mix(q, k, v, self.bias).transpose(1, 2).flatten(2))


def fused(**kwargs: Any) -> Mix:
    return lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **kwargs)


def device(name: str, *flags: bool) -> Mix:
    """The op that other devices call; `flags` follow the bias, which not all take."""
    op = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention{'_overrideable' * (name == 'fused')}")
    return lambda q, k, v, bias: op(q, k, v, *((bias, *flags) if name != "flash" else ()))[0]


def rotary(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Su et al. 2021, in halves, as Llama does it."""
    angles = torch.arange(q.shape[2])[:, None] * torch.tensor([1.0, 0.1])
    angles = torch.cat([angles, angles], -1).to(q.dtype)

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * angles.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angles.sin()

    return F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)


def complex_rotary(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The same in pairs, as complex numbers."""
    angles = torch.arange(q.shape[2])[:, None] * torch.tensor([1.0, 0.1])
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex(q.new_zeros(1), q.new_zeros(1)).dtype)
    q, k = (torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(3) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v)


class Windows(nn.Module):
    """Swin's attention (Liu et al. 2021): shifted windows, and a table of biases for relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.window, self.shift = 3, 2, 1
        self.into, self.qkv, self.mixed = nn.Linear(5, 12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.out = nn.Linear(12, 3)
        self.table = nn.Parameter(torch.randn(9, 3))
        at = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None] + 1) * torch.tensor([3, 1])[:, None, None]
        self.register_buffer("index", apart.sum(0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x.permute(0, 2, 3, 1))
        n, h, w, c = x.shape
        y = x.roll((-self.shift, -self.shift), (1, 2))
        y = y.view(n, h // self.window, self.window, w // self.window, self.window, c)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window**2, c)
        q, k, v = self.qkv(y).reshape(len(y), -1, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q * (c // self.heads) ** -0.5 @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        y = ((scores + bias).softmax(-1) @ v).transpose(1, 2).reshape(len(y), -1, c)
        y = self.mixed(y).view(n, h // self.window, w // self.window, self.window, self.window, c)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c).roll((self.shift, self.shift), (1, 2))
        return self.out(x + y)


class Buckets(nn.Module):
    """T5's bias (Raffel et al. 2020): an embedding of buckets of distances, one number for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out, self.table = 4, nn.Linear(6, 48), nn.Linear(16, 3), nn.Embedding(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (p.view(n, t, self.heads, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        places = torch.arange(t)
        bias = self.table((places[:, None] - places).abs().clamp(max=4)).permute(2, 0, 1).unsqueeze(0)
        return self.out(((q @ k.transpose(2, 3) + bias).softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1))


class Language(nn.Module):
    """Token and position tables, a norm, and a head that is the token table."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(20, 8), nn.Embedding(9, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


class Patches(nn.Module):
    """A class token, a table of positions of which not all are read, and a scale for each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 9, 8))
        self.scale, self.mlp = nn.Parameter(torch.full((8,), 1e-4)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.places[:, : x.shape[1]]
        return self.head((x + self.scale * F.gelu(self.mlp(x))).mean(1))


class Merged(nn.Module):
    """A view makes one axis of two that both carry units: the channels of a template, and those that fill it in."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.a(x).unsqueeze(-1) * self.b(x).unsqueeze(-2)).flatten(-2))


class DeadCalls(nn.Module):
    """What is worked out and thrown away: an auxiliary head, and a tensor of which only the shape is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aside = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.aside(x).softmax(-1)
        return self.b(x[..., : x.cumsum(-1).shape[-1]])


class Ranking(nn.Module):
    """A detector in small: anchors over a pyramid, the best by score, their boxes, suppression of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, 2, 1)
        self.hidden = nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(6, 4, 1)])
        self.score, self.box = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = F.relu(self.stem(x))
        levels = [F.relu(layer(y)) for layer, y in zip(self.hidden, (first, F.relu(self.deep(first))))]
        scores = torch.cat([self.score(y).permute(0, 2, 3, 1).reshape(len(x), -1) for y in levels], 1)
        boxes = torch.cat([self.box(y).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for y in levels], 1)
        best, order = scores[0].topk(6)
        corners = boxes[0][order]
        kept = best.sigmoid() > 0.5
        corners = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:].exp()], 1)
        return {"scores": best[kept], "boxes": corners[kept]}


class Guess(nn.Module):
    """A width that is written into the code, and an attribute that has its value and counts something else."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.a, self.b = 8, nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(-1, 5, 8)
        for _ in range(self.steps):
            x = torch.tanh(x)
        return self.b(x)


@functools.lru_cache
def steps(length: int) -> Tensor:
    return torch.linspace(0, 1, length)


class Cached(nn.Module):
    """A tensor that a function keeps for the next time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * steps(x.shape[1]).to(x.dtype)[:, None])


class Experts(nn.Module):
    """Tokens sorted by expert, each expert's matrix applied to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 16)), nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([2, 8, 10], dtype=torch.int32)
        x = F.relu(torch._grouped_mm(self.into(x).flatten(0, 1), self.up, ends))
        return self.out(torch._grouped_mm(x, self.down, ends))


class Chunked(nn.Module):
    """Two halves of one layer change places; `before` is a number of groups that come first in the plans."""

    def __init__(self, before: int = 0) -> None:
        super().__init__()
        self.before = nn.Sequential(*[nn.Linear(4, 4) for _ in range(before)])
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cat(self.a(self.before(x)).chunk(2, -1)[::-1], -1))


class SecondLeast(nn.Module):
    """The place that is ranked is gone afterwards, as with `median`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).kthvalue(2, 1).values)


def spectral() -> nn.Module:
    normed = parametrizations.spectral_norm(nn.Linear(8, 6))
    return nn.Sequential(nn.Linear(4, 8), normed, nn.ReLU(), nn.Linear(6, 3))


CAUSAL = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
QUIET = MappingProxyType({"need_weights": False})
PADDING = torch.tensor([[False, False, False, True, True], [False] * 5])


def recurrent(layer: Callable[[], nn.Module], width: int, *sizes: int) -> Net:
    return Net(lambda: Recurrent(layer(), width), tokens(4), sizes)


def heads(mix: Mix, *sizes: int, **kwargs: Any) -> Net:
    return Net(lambda: Heads(mix, **kwargs), tokens(6), sizes)


def attends(*sizes: int, given: Mapping[str, Any] = QUIET, **kwargs: Any) -> Net:
    return Net(lambda: Attends(given, **kwargs), tokens(4), sizes)


class OneWideHead(nn.Module):
    """A single head in windows, whose width is cut; with five axes torch takes attention apart, scale and all."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.heads, self.width = 1, width
        self.qkv, self.out = nn.Linear(4, 3 * width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).reshape(len(x), -1, 2, 3, self.heads, self.width).permute(3, 0, 4, 2, 1, 5)
        q, k, v = parts.unbind(0)
        seen = F.scaled_dot_product_attention(q, k, v)
        return self.out(seen.transpose(1, 3).reshape(len(x), -1, self.width))


IDIOMS = MappingProxyType({
    "lstm": recurrent(lambda: nn.LSTM(6, 5), 5, 6, 5),
    "lstm of both ways": recurrent(lambda: nn.LSTM(6, 5, bidirectional=True, batch_first=True), 10, 6, 5),
    "lstm of two layers": recurrent(lambda: nn.LSTM(6, 5, num_layers=2), 5, 6, 5),
    "lstm with projection": recurrent(lambda: nn.LSTM(6, 5, proj_size=3), 3),  # equal sizes are none to torch
    "lstm's last state": Net(lambda: LastState(nn.LSTM(6, 5, batch_first=True), 5), tokens(4), (6, 5)),
    "gru": recurrent(lambda: nn.GRU(6, 5), 5, 6, 5),
    "gru of both ways": recurrent(lambda: nn.GRU(6, 5, bidirectional=True), 10, 6, 5),
    "gru of two layers": recurrent(lambda: nn.GRU(6, 5, num_layers=2, batch_first=True), 5, 6, 5),
    "gru's last state": Net(lambda: LastState(nn.GRU(6, 5), 5), tokens(4), (6, 5)),
    "rnn": recurrent(lambda: nn.RNN(6, 5), 5, 6, 5),
    "attention": attends(12, 12, 3),
    "attention with weights": attends(12, 12, 3, given={"attn_mask": CAUSAL}),
    "attention, padded": attends(12, 12, 3, given={"key_padding_mask": PADDING, **QUIET}),
    "attention of other widths": attends(12, 12, 7, 8, 3, kdim=7, vdim=8),
    "attention with keys of its own": attends(12, add_bias_kv=True),
    "fused": heads(fused(scale=0.5), 4),
    "fused, scale by width": heads(fused(is_causal=True), 4),
    "fused, bias of heads": heads(fused(), 4, biased=True),
    "grouped queries": heads(fused(enable_gqa=True), 2, key_heads=2),
    "rotary": heads(rotary, 4),
    "complex rotary": heads(complex_rotary, 4),
    "windows": Net(Windows, image(5, 4), (3, 12)),
    "buckets": Net(Buckets, tokens(6), (4,)),
    "language": Net(Language, lambda: torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(0)), (8, 12)),
    "patches": Net(Patches, image(), (8,)),
    "merged": Net(Merged, tokens(4), (6,)),
    "dead calls": Net(DeadCalls, tokens(4), (8, 2)),
    "ranking": Net(Ranking, image(), (8, 6, 4)),
    "guess": Net(Guess, tokens(4), (8,)),
    "cached": Net(Cached, tokens(4), (8,)),
    "chunked": Net(Chunked, tokens(4), (4, 4)),
    "second least": Net(SecondLeast, tokens(4), (8,)),
    "one wide head": Net(OneWideHead, lambda: torch.randn(2, 6, 4), (96,)),
    "spectral norm": Net(spectral, tokens(4), (8, 6)),
})  # fmt: skip

ELSEWHERE = MappingProxyType({
    "flash": heads(device("flash"), 4),
    "efficient": heads(device("efficient", False), 4),
    "efficient, bias of heads": heads(device("efficient", False), 4, biased=True),
    "cudnn": heads(device("cudnn", False), 4),
    "cudnn, bias of heads": heads(device("cudnn", False), 4, biased=True),
    "overrideable": heads(device("fused"), 4),
    "overrideable, bias of heads": heads(device("fused"), 4, biased=True),
})  # fmt: skip
"""What runs on other devices only: here the shapes are known, and no more."""
