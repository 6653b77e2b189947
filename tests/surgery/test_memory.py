"""Where tensors lie: a cut keeps views on one memory together, or says that it cannot, and channels last."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn, optim

from secateur.allocate.plan import Plan
from secateur.errors import PlanError
from secateur.graph.groups import find_groups
from secateur.graph.sharing import overlapping, share_like
from secateur.surgery.certify import certify
from secateur.surgery.cut import apply
from secateur.surgery.simplify import simplify


class Language(nn.Module):
    """An embedding and a head of one memory, as `head.weight.data = embed.weight.data` makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.head.weight.data = self.embed.weight.data

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.mlp(x).relu())


class Autoencoder(nn.Module):
    """The decoder's weight is the transpose of the encoder's, the encoder's order first or last."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(5, 8), nn.Linear(8, 5)
        first, second = (self.decode, self.encode) if turned else (self.encode, self.decode)
        second.weight = nn.Parameter(first.weight.data.t())

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x).relu())


class Pointwise(nn.Module):
    """A linear layer and a convolution of 1 x 1 with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.head = nn.Linear(3, 8), nn.Conv2d(3, 8, 1), nn.Linear(8, 2)
        self.conv.weight = nn.Parameter(self.linear.weight.data.view(8, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.linear(x.mean((2, 3))) + self.conv(x).amax((2, 3)))


class Partly(nn.Module):
    """A part of one weight is another, flat; besides there is a layer to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(self.c.weight.data[1:3].view(-1)[:4])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) * self.scale + self.c(x)


def halved(model: nn.Module, x: Tensor) -> Plan:
    groups = find_groups(model, x)
    return Plan(groups, tuple(tuple(range(0, group.size, 2)) for group in groups.groups))


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
VECTORS = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
SHARING: tuple[tuple[Callable[[], nn.Module], Tensor, str, str], ...] = (
    (Language, torch.tensor([[0, 3, 5], [6, 1, 1]]), "embed.weight", "head.weight"),
    (Autoencoder, VECTORS, "encode.weight", "decode.weight"),
    (lambda: Autoencoder(True), VECTORS, "decode.weight", "encode.weight"),
    (Pointwise, IMAGES, "linear.weight", "conv.weight"),
    (Partly, VECTORS[:, :4], "c.weight", "scale"),
)


@pytest.mark.parametrize(("make", "x", "first", "second"), SHARING)
def test_views_on_one_memory_are_so_after_the_cut(
    make: Callable[[], nn.Module], x: Tensor, first: str, second: str
) -> None:
    torch.manual_seed(0)
    model = make()
    plan = halved(model, x)
    smaller = apply(model, plan)
    a, b = smaller.get_parameter(first), smaller.get_parameter(second)
    assert plan.groups.groups
    assert a is not b
    assert memory(a) == memory(b)
    assert memory(a) != memory(model.get_parameter(first)) == memory(model.get_parameter(second))
    assert a.is_contiguous()
    assert certify(model, smaller, plan, x).ok
    assert {n: tuple(p.shape) for n, p in smaller.named_parameters()} == plan.groups.shapes(plan.keep)
    with torch.no_grad():
        a.fill_(7.0)
    assert bool((b == 7).all())


def test_what_trains_beside_the_model_is_cut_along() -> None:
    torch.manual_seed(0)
    model = Autoencoder()
    optimizer, ema = optim.SGD(model.parameters(), 0.1, momentum=0.9), ModelEmaV3(model)
    model(VECTORS).square().sum().backward()
    optimizer.step()
    cut = apply(model, halved(model, VECTORS), optimizer=optimizer, ema=ema)
    cut.model(VECTORS).square().sum().backward()
    cut.optimizer.step()
    assert torch.equal(cut.model.encode.weight, cut.model.decode.weight.t())
    assert torch.equal(cut.ema.module.encode.weight, ema.module.encode.weight[::2])


class Twins(nn.Module):
    """Two layers of one memory, and nothing that says that their units go together."""

    def __init__(self, weight: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(16, 2)
        self.b.weight = nn.Parameter(weight(self.a.weight.data))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([F.linear(x, self.a.weight), F.linear(x, self.b.weight.view(8, 4))], 1))


UNLIKE = r"a\.weight and b\.weight are two tensors on one memory, and the plan does not cut both alike\. Make them one"


@pytest.mark.parametrize("keep", [((0, 1), (2, 3)), ((0, 1), tuple(range(8))), ((0, 1), (0, 1, 2))])
def test_a_cut_that_takes_them_apart_is_refused(keep: tuple[tuple[int, ...], ...]) -> None:
    model, x = Twins(lambda weight: weight[:]), torch.randn(2, 4)
    groups = find_groups(model, x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match=UNLIKE):
        apply(model, Plan(groups, keep))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert memory(model.a.weight) == memory(model.b.weight)
    smaller = apply(model, Plan(groups, ((0, 5), (0, 5))))
    assert memory(smaller.a.weight) == memory(smaller.b.weight)


def test_a_view_of_another_shape_is_refused_where_it_is_cut() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
    model.flat = nn.Parameter(model[0].weight.data.view(-1))
    plan = Plan(find_groups(model, x), ((1, 2),))
    with pytest.raises(PlanError, match=r"0\.weight.* flat|flat and 0\.weight"):
        apply(model, plan)


def test_what_only_lies_side_by_side_is_cut_freely() -> None:
    """As the flat weights of an LSTM do, and the columns of a fused weight."""
    model, x = Twins(torch.clone), torch.randn(2, 4)
    flat, wide = torch.randn(64), torch.randn(8, 8)
    for a, b in (
        (flat[:32].view(8, 4), flat[32:].view(8, 4)),
        (wide[:, :4], wide[:, 4:]),
        (wide[:, ::2], wide[:, 1::2]),
    ):
        model.a.weight.data, model.b.weight.data = a, b
        plan = Plan(find_groups(model, x), ((0, 1), (2, 3, 4)))
        smaller = apply(model, plan)
        assert memory(smaller.a.weight) != memory(smaller.b.weight)
        assert certify(model, smaller, plan, x).ok


def test_overlaps_are_found_whatever_the_type_and_wherever() -> None:
    whole = torch.zeros(4, 6)
    tensors = {
        "whole": whole,
        "other": torch.zeros(4, 6),
        "column": whole[:, 1],
        "as integers": whole.view(torch.int32)[2],
        "spread": whole[:1].expand(3, 6),
        "empty": whole[:0],
        "nowhere": torch.zeros(4, 6, device="meta"),
        "elsewhere": torch.zeros(4, 6, device="meta"),
    }
    assert overlapping(tensors) == (("whole", "column", "as integers", "spread"),)
    corners = {"left": whole[:, :2], "right": whole[:, 4:], "bridge": whole[0, 1:5]}
    assert overlapping(corners) == (("left", "right", "bridge"),)


def test_a_memory_is_shared_only_by_values_that_agree() -> None:
    model = Autoencoder()
    old = dict(model.named_parameters())
    alike = {name: tensor.detach().clone() for name, tensor in old.items()}
    apart = {**alike, "decode.weight": alike["decode.weight"] + 1}
    half = {name: tensor.bfloat16() for name, tensor in alike.items()}
    for given, shared in ((alike, True), (apart, False), (half, True)):
        new = share_like(old, given)
        assert (memory(new["encode.weight"]) == memory(new["decode.weight"])) is shared
        assert all(torch.equal(new[name], given[name]) for name in given)


def test_simplifying_gives_each_a_memory_of_its_own() -> None:
    torch.manual_seed(0)
    model = Autoencoder()
    with torch.no_grad():
        model.encode.weight[3], model.encode.bias[3] = 0, -1
    smaller, record = simplify(model, VECTORS)
    assert record.count("dead units") == 1
    assert memory(smaller.encode.weight) != memory(smaller.decode.weight)
    torch.testing.assert_close(smaller(VECTORS), model(VECTORS))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("conv", "norm", "side", "layout"),
    [
        (nn.Conv2d, nn.BatchNorm2d, (4, 4), torch.channels_last),
        (nn.Conv3d, nn.BatchNorm3d, (4, 4, 4), torch.channels_last_3d),
    ],
)
def test_channels_stay_last_or_first(
    conv: type[nn.Module], norm: type[nn.Module], side: tuple[int, ...], layout: torch.memory_format, last: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8, 3, padding=1), norm(8), nn.ReLU(), conv(8, 6, 2), nn.Flatten())
    if last:
        model = model.to(memory_format=layout)
    x = torch.randn(2, 3, *side)
    plan = Plan(find_groups(model, x), ((0, 1, 6),))
    smaller = apply(model, plan)
    for layer in (smaller[0], smaller[3]):
        assert layer.weight.is_contiguous(memory_format=layout) is last
        assert layer.weight.is_contiguous() is not last
    assert certify(model, smaller, plan, x).ok
