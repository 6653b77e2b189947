"""Ops that move data, look it up or sample it: over places, where units stay what they are, and over units."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor, nn

from lanes import Family, Lane, conv1, conv2, conv3, each, noise

aten = torch.ops.aten

LINE = Family(conv1, noise(2, 4, 6), {
    **each({
        "reflection_pad1d": lambda x: F.pad(x, (1, 1), "reflect"),
        "replication_pad1d": lambda x: F.pad(x, (1, 1), "replicate"),
        "circular": lambda x: F.pad(x, (1, 1), "circular"),
        "nearest1d": lambda x: F.interpolate(x, scale_factor=2),
        "nearest_exact1d": lambda x: F.interpolate(x, 9, mode="nearest-exact"),
        "linear1d": lambda x: F.interpolate(x, 9, mode="linear"),
        "avg_pool1d": lambda x: F.avg_pool1d(x, 2),
        "max_pool1d": lambda x: F.max_pool1d(x, 2),
        "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x, 2),
        "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x, 2),
        "lp_pool1d": lambda x: F.lp_pool1d(x, 2, 2),
    }),
    "conv1d": Lane(lambda: nn.Conv1d(8, 6, 3, stride=2), 6, (8, 6)),
    "depthwise": Lane(lambda: nn.Conv1d(8, 8, 3, groups=8)),
    "grouped": Lane(lambda: nn.Conv1d(8, 12, 3, groups=4), 12, (4,)),
    "transposed": Lane(lambda: nn.ConvTranspose1d(8, 6, 3, stride=2), 6, (8, 6)),
    "batch_norm": Lane(lambda: nn.BatchNorm1d(8)),
    "instance_norm": Lane(lambda: nn.InstanceNorm1d(8)),
})  # fmt: skip

PLANE = Family(conv2, noise(2, 4, 8, 8), {
    **each({
        "reflection_pad2d": lambda x: F.pad(x, (1, 1, 2, 0), "reflect"),
        "replication_pad2d": lambda x: F.pad(x, (1, 1, 2, 0), "replicate"),
        "constant_pad": lambda x: F.pad(x, (1, 1, 2, 0)),
        "nearest2d": lambda x: F.interpolate(x, scale_factor=2),
        "nearest_exact2d": lambda x: F.interpolate(x, 9, mode="nearest-exact"),
        "bilinear2d": lambda x: F.interpolate(x, 9, mode="bilinear"),
        "bicubic2d": lambda x: F.interpolate(x, 9, mode="bicubic"),
        "bilinear2d_aa": lambda x: F.interpolate(x, 5, mode="bilinear", antialias=True),
        "bicubic2d_aa": lambda x: F.interpolate(x, 5, mode="bicubic", antialias=True),
        "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
        "max_pool2d": lambda x: F.max_pool2d(x, 2),
        "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 3),
        "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 3),
        "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(
            x, 2, output_size=3, _random_samples=torch.full((2, x.shape[1], 2), 0.5, dtype=x.dtype)),
        "grid_sample": lambda x: F.grid_sample(x, torch.full((2, 3, 3, 2), 0.3, dtype=x.dtype), align_corners=True),
        "flip": lambda x: x.flip(2, 3),
    }),
    "flip of units": Lane(lambda: lambda x: x + x.flip(1), sizes=(4,)),
    "fold": Lane(lambda: lambda x: F.fold(F.unfold(x, 3, padding=1), (8, 8), 3, padding=1)),
    "unfold": Lane(lambda: lambda x: F.unfold(x, 2, stride=2).unflatten(2, (4, 4)), 32),
    "windows": Lane(lambda: lambda x: x.unfold(2, 4, 2).amax(-1)),
    "channel_shuffle": Lane(lambda: nn.ChannelShuffle(2), sizes=(4,)),
    "pixel_shuffle": Lane(lambda: nn.PixelShuffle(2), 2, (2,)),
    "pixel_unshuffle": Lane(lambda: nn.PixelUnshuffle(2), 32),
    "prelu": Lane(lambda: nn.PReLU(8)),
    "glu": Lane(lambda: nn.GLU(1), 4, (4,)),
    "conv2d": Lane(lambda: nn.Conv2d(8, 6, 3, dilation=2, bias=False), 6, (8, 6)),
    "instance_norm": Lane(lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    "group_norm": Lane(lambda: nn.GroupNorm(4, 8), sizes=(4,)),
    "group_norm of one": Lane(lambda: nn.GroupNorm(1, 8), inexact=True),
    **each({
        "fft": lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real,
        "rfft": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2),
        "view_as_real": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2)))).flatten(-2),
    }),
    "local_response_norm": Lane(lambda: lambda x: F.local_response_norm(x, 3), sizes=()),
    "fft of units": Lane(lambda: lambda x: torch.fft.fft(x, dim=1).real, sizes=()),
    "fft of complex units": Lane(lambda: lambda x: torch.fft.fft(torch.fft.fft(x), dim=1).real, sizes=()),
})  # fmt: skip

SPACE = Family(conv3, noise(1, 4, 4, 4, 4), {
    **each({
        "reflection_pad3d": lambda x: F.pad(x, (1, 1, 1, 0, 0, 1), "reflect"),
        "replication_pad3d": lambda x: F.pad(x, (1, 1, 1, 0, 0, 1), "replicate"),
        "nearest3d": lambda x: F.interpolate(x, scale_factor=2),
        "nearest_exact3d": lambda x: F.interpolate(x, 5, mode="nearest-exact"),
        "trilinear3d": lambda x: F.interpolate(x, 5, mode="trilinear"),
        "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
        "max_pool3d": lambda x: F.max_pool3d(x, 2),
        "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, 3),
        "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x, 3),
        "grid_sample": lambda x: F.grid_sample(
            x, torch.full((1, 3, 3, 3, 3), 0.3, dtype=x.dtype), align_corners=False),
    }),
    "conv3d": Lane(lambda: nn.Conv3d(8, 6, 2), 6, (8, 6)),
    "transposed": Lane(lambda: nn.ConvTranspose3d(8, 6, 2, groups=2), 6, (2,)),
    "batch_norm": Lane(lambda: nn.BatchNorm3d(8)),
})  # fmt: skip


class Deformed(nn.Module):
    """A deformed convolution with places and weights of its own for every position."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.offset, self.mask = nn.Conv2d(8, 18, 3, padding=1), nn.Conv2d(8, 9, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(8, 6, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offset(x), self.mask(x).sigmoid())


SAMPLED = Family(conv2, noise(2, 4, 8, 8), {
    **each({
        "roi_align": lambda x: torchvision.ops.roi_align(x, [torch.tensor([[0.0, 1, 5, 6]], dtype=x.dtype)] * 2, 3),
        "roi_pool": lambda x: torchvision.ops.roi_pool(x, [torch.tensor([[0.0, 1, 5, 6]], dtype=x.dtype)] * 2, 3),
    }),
    "mask": Lane(lambda: lambda x: x + x[x > 0].sum(), sizes=()),
    "deform_conv2d": Lane(lambda: Deformed(), 6, (8, 6)),
    "deform_conv2d in groups": Lane(lambda: Deformed(groups=2), 6, ()),
})  # fmt: skip


def halves(x: Tensor) -> Tensor:
    """A sum of both halves of the units, apart by a factor."""
    first, second = x.unsafe_split(x.shape[-1] // 2, -1)
    return first + 2 * second


MOVES = Family(nn.Linear, noise(2, 6, 4), {
    **each({
        "view": lambda x: x.view(12, -1),
        "reshape": lambda x: x.transpose(0, 1).reshape(3, 4, -1),
        "reshape_alias": lambda x: aten._reshape_alias(x, [12, x.shape[-1]], [x.shape[-1], 1]),
        "as_strided": lambda x: x.sum(0).as_strided((6, x.shape[-1]), (x.shape[-1], 1)),
        "expand": lambda x: x[:, :1].expand(-1, 3, -1),
        "broadcast": lambda x: torch.broadcast_to(x[0], (2, 6, x.shape[-1])),
        "permute": lambda x: x.permute(1, 0, 2),
        "transpose": lambda x: x.transpose(-1, 1).transpose(1, 2),
        "movedim": lambda x: x.movedim(-1, 0).swapaxes(0, 2),
        "t of two": lambda x: x[0].t().t(),
        "einops": lambda x: torch.einsum("nlc->lnc", x),
        "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
        "squeeze": lambda x: x[:1, :1].squeeze(),
        "slice": lambda x: x[:, 1:5:2],
        "select": lambda x: x[:, 2],
        "unbind": lambda x: x.unbind(1)[1] + x.unbind(1)[2],
        "split of places": lambda x: x.split(2, 1)[2] + x.chunk(3, 1)[0],
        "split_with_sizes of places": lambda x: x.split([2, 4], 1)[0] + x.tensor_split([2], 1)[0],
        "cat of places": lambda x: torch.cat([x, x.sin()], 1),
        "stack": lambda x: torch.stack([x, x.sin()], 1).flatten(0, 1),
        "pad of places": lambda x: F.pad(x, (0, 0, 1, 2)),
        "flip of places": lambda x: x.flip(1),
        "roll of places": lambda x: x.roll((1, 2), (0, 1)),
        "repeat of places": lambda x: x.repeat(1, 3, 1),
        "repeat_interleave of places": lambda x: x.repeat_interleave(2, 1),
        "tile": lambda x: x.tile(2, 1, 1),
        "unfold of places": lambda x: x.unfold(1, 3, 1).mean(-1),
        "diagonal": lambda x: x * torch.eye(6, dtype=x.dtype).diagonal()[:, None],
    }),
    "cat": Lane(lambda: lambda x: torch.cat([x, x.sin()], -1), 16),
    "repeat": Lane(lambda: lambda x: x.repeat(1, 1, 3), 24),
    "repeat_interleave": Lane(lambda: lambda x: x.repeat_interleave(3, -1), 24),
    "flip": Lane(lambda: lambda x: x.flip(-1) * x.sin(), sizes=(4,)),
    "pad": Lane(lambda: lambda x: F.pad(x, (2, 3)), 13, (5, 8)),
    "split": Lane(lambda: lambda x: sum(x.split(x.shape[-1] // 2, -1)), 4, (4,)),
    "unsafe_split": Lane(lambda: halves, 4, (4,)),
    "unsafe_chunk": Lane(lambda: lambda x: sum(torch.unsafe_chunk(x, 2, -1)), 4, (4,)),
    "two slices": Lane(lambda: lambda x: torch.cat([x[..., :4] * 2, x[..., 4:].sin()], -1), sizes=(4, 4)),
    "rotated": Lane(lambda: lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1) * x.cos(), sizes=(4,)),
    "strided": Lane(lambda: lambda x: x[..., ::2] * x[..., 1::2], 4, (4,)),
    "narrow": Lane(lambda: lambda x: x.narrow(-1, 0, 4), 4, (4, 4)),
    "heads": Lane(
        lambda: lambda x: x.unflatten(-1, (2, 4)).transpose(1, 2).exp().transpose(1, 2).flatten(2), sizes=(4,)),
    "select of units": Lane(lambda: lambda x: x.unflatten(-1, (2, 4))[..., 1, :], 4, (4,)),
    "unbind of units": Lane(lambda: lambda x: torch.cat(x.unflatten(-1, (2, 4)).unbind(-2), -1), sizes=(4,)),
    "flatten": Lane(lambda: nn.Flatten(), 48),
    "roll": Lane(lambda: lambda x: x.roll(1, -1), sizes=()),
    "unfold": Lane(lambda: lambda x: x.unfold(-1, 2, 2).sum(-1), 4, ()),
})  # fmt: skip

def put(x: Tensor, places: Any, value: Any) -> Tensor:
    x = x.clone()
    x[places] = value
    return x


MASK = torch.tensor([[True, False, True, True, False, False], [False, True, False, True, True, False]])

LOOKUPS = Family(nn.Linear, noise(2, 6, 4), {
    **each({
        "index of places": lambda x: x[:, torch.tensor([0, 2, 1])],
        "index of two": lambda x: x[torch.tensor([0, 1]), torch.tensor([3, 5])],
        "index apart": lambda x: x[:, None][torch.tensor([0, 1]), :, torch.tensor([3, 5])],
        "index by a mask": lambda x: x[MASK],
        "index by a mask of places": lambda x: x[:, MASK[0]],
        "index_put": lambda x: put(x, (torch.tensor([0, 1]), torch.tensor([3, 5])), x[:, 0] * 2),
        "index_put apart": lambda x: put(
            x[:, None], (torch.tensor([0, 1]), slice(None), torch.tensor([3, 5])), x[:, :1] * 2)[:, 0],
        "index_put by a mask": lambda x: put(x, MASK, x[0, 0] * 2),
        "index_put of a number": lambda x: put(x, MASK[..., None].repeat(1, 1, x.shape[-1]), 0),
        "masked_scatter": lambda x: x.masked_scatter(MASK[..., None].expand_as(x), x[:, 3:].exp().flatten(0, 1)),
        "index_select of places": lambda x: x.index_select(1, torch.tensor([0, 2, 1])),
        "gather of places": lambda x: x.gather(1, torch.tensor([[[0], [2]]] * 2).expand(-1, -1, x.shape[-1])),
        "take_along_dim": lambda x: x.take_along_dim(torch.tensor([[[0], [2]]] * 2), 1),
        "scatter of places": lambda x: x.scatter(1, torch.tensor([[[0], [2]]] * 2).expand_as(x[:, :2]), x[:, :2]),
        "scatter_add of places": lambda x: x.scatter_add(
            1, torch.tensor([[[0], [2]]] * 2).expand_as(x[:, :2]), x[:, :2]),
        "topk of places": lambda x: x.topk(2, 1).values,
        "kthvalue of places": lambda x: x.kthvalue(2, 1, keepdim=True).values,
        "sort of places": lambda x: x.sort(1).values,
        "argsort of places": lambda x: x.gather(1, x.argsort(1)),
        "tril of places": lambda x: x.unflatten(1, (2, 3)).permute(0, 3, 1, 2).tril().sum((2, 3)),
        "triu of places": lambda x: x.unflatten(1, (2, 3)).permute(0, 3, 1, 2).triu().sum((2, 3)),
        "embedding": lambda x: F.embedding(torch.tensor([0, 2, 1]), x[0]),
    }),
    **each({
        "masked_scatter of some units": lambda x: x.masked_scatter(x > 0, torch.ones(96, dtype=x.dtype)),
        "index_put along units": lambda x: put(x, (..., torch.tensor([0, 2])), 0),
    }, sizes=()),
    **each({
        "index": lambda x: x[..., torch.tensor([0, 2, 1])],
        "index_select": lambda x: x.index_select(-1, torch.tensor([0, 2, 1])),
        "gather": lambda x: x.gather(-1, torch.tensor([[[0, 2, 1]]])),
        "topk": lambda x: x.topk(3).values,
        "sort": lambda x: x.sort().values[..., :3],
    }, read=3, sizes=()),
    **each({
        "index_add of places": lambda x: x[..., :4].index_add(1, torch.tensor([0, 2]), x[:, :2, 4:]),
        "index_copy of places": lambda x: x[..., :4].index_copy(1, torch.tensor([0, 2]), x[:, :2, 4:]),
        "index_reduce of places": lambda x: x[..., :4].index_reduce(1, torch.tensor([0, 2]), x[:, :2, 4:], "amax"),
    }, read=4, sizes=(4,)),
    **each({
        "kthvalue": lambda x: x.kthvalue(2, -1, keepdim=True).values,
    }, read=1, sizes=()),
    **each({
        "tril of units": lambda x: x.tril(),
        "triu of units": lambda x: x.triu(1),
        "scatter": lambda x: x.scatter(-1, torch.tensor([[[0, 2]]]), 1.0),
    }, sizes=()),
})  # fmt: skip

PLACES = MappingProxyType({
    "line": LINE, "plane": PLANE, "space": SPACE, "sampled": SAMPLED, "moves": MOVES, "lookups": LOOKUPS,
})  # fmt: skip
