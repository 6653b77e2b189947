"""What Python does with the counts of units: it checks them, steers by them, multiplies them with the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.allocate.plan import Plan
from secateur.errors import CaptureError
from secateur.graph.capture import capture, op_name
from secateur.graph.groups import find_groups
from secateur.graph.nested import Example
from secateur.graph.probe import random_keep
from secateur.graph.records import Groups
from secateur.surgery.certify import certify
from secateur.surgery.cut import apply
from secateur.surgery.simulate import mask


def cut(model: nn.Module, inputs: Any, keep: Callable[[Groups], Any] = lambda groups: random_keep(groups, 5)) -> Any:
    """The groups and the cut model, certified."""
    groups = find_groups(model.eval(), inputs)
    plan = Plan(groups, keep(groups))
    smaller = apply(model, plan)
    certificate = certify(model, smaller, plan, inputs)
    assert certificate.ok, certificate.sentence
    return groups, smaller


class Heads(nn.Module):
    """Attention over the channels, written for a batch that is folded into the heads and out again."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.qkv, self.out = nn.Linear(4, 12), nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(self.into(x))
        batch, length, _ = y.shape
        heads = y.view(batch, length, 4, 4).transpose(1, 2).reshape(batch * 4, length, 4)
        heads = (heads @ heads.mT).softmax(-1) @ heads
        y = heads.view(batch, 4, length, 4).transpose(1, 2).reshape(batch, length, 16)
        return self.out(y * torch.ones(x.shape[0], 1, 16))


def test_a_replayed_call_takes_the_batch_and_the_length_as_they_come() -> None:
    torch.manual_seed(0)
    model = Heads().eval()
    groups, smaller = cut(model, torch.randn(2, 5, 4), lambda g: tuple(tuple(range(q.size - 1)) for q in g.groups))
    assert [group.size for group in groups.groups] == [12, 4]
    assert not {("ones", ("size", 0)), ("view", ("size", 0)), ("view", ("size", 1))} & {
        (size.function, size.place) for size in groups.sizes if size.function == "ones" or size.ordinal == 0
    }
    x = torch.randn(7, 3, 4)
    torch.testing.assert_close(smaller(x)[4:5], smaller(x[4:5]))


class Steered(nn.Module):
    """Its width decides whether the shortcut is projected; a cut must not flip that, whatever it leaves."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.i, self.o, self.fc, self.proj = i, o, nn.Linear(i, o), nn.Linear(i, o)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.i != self.o:
            x = self.proj(x).view(len(x), 2, -1, self.o).sum(1).repeat(1, 2, 1)
        return x + y


def test_an_attribute_that_steers_python_is_not_bound() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 9), Steered(9, 16), nn.Linear(16, 2))
    coincides = lambda g: tuple(tuple(range(9 if q.size == 16 else 5)) for q in g.groups)  # noqa: E731
    groups, _ = cut(model, torch.randn(2, 6, 3), coincides)
    assert groups.prunable_params > 0.99 * groups.params
    assert not any(item.module == "1" for item in groups.ints)


class Checked(nn.Module):
    """Compares its input's width with an attribute of its own, which holds, and then uses the attribute."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.num_channels, self.projection = i, nn.Conv2d(i, o, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.num_channels:
            raise ValueError("the channels differ")
        return self.projection(x)


def test_an_attribute_that_checks_the_input_follows_it() -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, padding=1)
    model = nn.Sequential(first, Checked(8, 16), Checked(16, 16), nn.Flatten(), nn.Linear(64, 2))
    groups, smaller = cut(model, torch.randn(1, 3, 8, 8))
    assert [group.size for group in groups.groups] == [8, 16, 16]
    assert smaller[1].num_channels == smaller[0].out_channels


class Unused(nn.Module):
    """A head that is computed and thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.extra = nn.Linear(4, 16), nn.Linear(16, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        self.extra(x)
        return self.head(x)


def test_what_only_an_unused_head_reads_is_cut_along() -> None:
    groups, smaller = cut(Unused(), torch.randn(2, 4))
    assert {slot.tensor for slot in groups.groups[0].slots} >= {"head.weight", "extra.weight"}
    assert smaller.extra.in_features == smaller.head.in_features < 16


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.a(x).chunk(2, -1)
        return self.b(x * p * q)


def test_pieces_of_width_one_cannot_lose_it() -> None:
    groups = find_groups(Gates(), torch.randn(2, 4))
    assert not groups.groups
    assert any("is a piece of its own" in frozen.reason for frozen in groups.frozen)


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"hidden": x, "logits": self.head(x)}


def test_an_output_that_nobody_reads_need_not_stay() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    assert not find_groups(Hidden(), x).groups
    groups, smaller = cut(Hidden(), Example(x, lambda out: out["logits"]))
    assert [group.size for group in groups.groups] == [8]
    assert smaller(x)["hidden"].shape[1] == smaller.body.out_features < 8


def test_a_reader_that_fails_is_told_apart_from_the_model() -> None:
    with pytest.raises(CaptureError, match="KeyError"):
        find_groups(Hidden(), Example(torch.randn(3, 4), lambda out: out["other"]))


class Fails(nn.Module):
    """Accepts few widths only, and says so with an error of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b({8: x, 6: x}[x.shape[1]])


def test_a_cut_model_that_does_not_run_is_reported_not_raised() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Identity(), nn.Linear(8, 2))
    plan = Plan(find_groups(net, torch.randn(1, 4)), ((0, 1, 2),))
    smaller = apply(net, plan)
    smaller[1] = Fails()
    certificate = certify(net, smaller, plan, torch.randn(1, 4))
    assert not certificate.ok
    assert "does not run" in certificate.sentence


def test_widths_that_python_does_not_know_are_frozen() -> None:
    groups = find_groups(Fails(), torch.randn(2, 4))
    assert not groups.groups
    assert any("an integer in Python does not follow" in frozen.reason for frozen in groups.frozen)


class Grouped(nn.Module):
    """Four heads of queries on two of keys and values, by torch's fused attention with its default scale."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.q, self.kv, self.out = nn.Linear(4, 12), nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        q = self.q(x).unflatten(-1, (4, 6)).transpose(1, 2)
        k, v = (part.unflatten(-1, (2, 6)).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


def test_the_caller_chooses_between_heads_and_their_width() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4)
    groups, heads = cut(Grouped(), x, lambda g: tuple(tuple(range(q.size // 2)) for q in g.groups))
    assert sorted(group.size for group in groups.groups) == [2, 12]
    assert (heads.q.out_features, heads.kv.out_features) == (12, 12)  # two heads on one
    model = Grouped().eval()
    inner = find_groups(model, x, split="inner")
    assert sorted(group.size for group in inner.groups) == [6, 6, 12]
    assert Groups.from_json(inner.to_json()) == inner
    plan = Plan(inner, tuple(tuple(range(group.size // 2)) for group in inner.groups))
    width = apply(model, plan)
    assert (width.q.out_features, width.kv.out_features) == (12, 12)  # four heads of half the width on two
    certificate = certify(model, width, plan, x)
    assert certificate.ok, certificate.sentence
    assert ("scale", 0) in {size.place for size in inner.sizes}
    with mask(model, plan, x) as masked:
        torch.testing.assert_close(masked(x), width(x))


class Auxiliary(nn.Module):
    """A second head that runs in training only, as GoogLeNet's do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.extra = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(x)
        return (self.head(x), self.extra(x)) if self.training else self.head(x)


def test_a_head_that_runs_in_training_only_is_cut_along_and_trains() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 4)
    groups, smaller = cut(Auxiliary(), x)
    assert sorted(group.size for group in groups.groups) == [6, 8]
    assert smaller.extra[0].in_features == smaller.head.in_features < 8
    assert smaller.extra[1].num_features == smaller.extra[4].in_features < 6
    first, second = smaller.train()(x)
    (first.sum() + second.sum()).backward()
    assert smaller.extra[0].weight.grad.shape == smaller.extra[0].weight.shape


class Stubborn(Auxiliary):
    """The same, with a width written down in the part that runs in training."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(x)
        return (self.head(x), self.extra(x.view(-1, 2, 4).flatten(1))) if self.training else self.head(x)


def test_what_does_not_follow_in_training_is_frozen() -> None:
    groups = find_groups(Stubborn().eval(), torch.randn(4, 4))
    assert not groups.groups
    assert any("runs in training only" in frozen.reason for frozen in groups.frozen)


class Counted(nn.Module):
    """Puts rows of one width where tokens stand for them, and checks that there are as many numbers as places."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.words, self.rows, self.out, self.right = nn.Embedding(9, 8), nn.Linear(4, 8), nn.Linear(8, 3), right

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        words, rows = self.words(ids), self.rows(x)
        places = (ids == 7).unsqueeze(-1)
        wanted = places.sum() * (words.shape[-1] if self.right else 8)
        if wanted != rows.numel():
            raise ValueError(f"{rows.numel()} numbers for other places")
        return self.out(words.masked_scatter(places.expand_as(words), rows))


@pytest.mark.parametrize("right", [True, False])
def test_a_number_that_is_only_checked_may_follow_the_cut(right: bool) -> None:
    inputs = torch.tensor([[1, 7, 7, 2], [7, 3, 4, 5]]), torch.randn(3, 4)
    groups = find_groups(model := Counted(right), inputs)
    assert [group.size for group in groups.groups] == ([8] if right else [])
    if right:
        plan = Plan(groups, ((0, 2, 3, 7),))
        assert certify(model, apply(model, plan), plan, inputs).ok


class Asking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x if bool(x.mean() > 0) and bool(((x > 0).sum() * 2) < 9) else x


def test_of_what_python_asks_for_whole_numbers_alone_do_not_count() -> None:
    trace = capture(Asking(), torch.ones(2, 2))
    kinds = {op_name(call): call.dead for call in trace.calls}
    assert kinds == {
        "mean": False, "gt": True, "local_scalar_dense": False, "sum": True, "mul": True, "lt": True, "neg": False,
    }  # fmt: skip
