"""Distillation against its formulas and hand-made hooks: logits, features of units that stay, attention, tables."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur as sc
from secateur.allocate.plan import Plan
from secateur.errors import TrainingError, UnknownName
from secateur.recover.distillation import Attention, Distillation, Features, teacher_logits
from secateur.recover.mixing import Mixup
from secateur.recover.objective import UNLABELLED
from training import assert_same_weights, batches, one_epoch, plain_epoch, tune


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.block = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.hidden, self.head = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.norm(self.one(x)).relu()).mean((2, 3))
        return self.head(self.hidden(x).relu())


KEPT = {"one": [0, 2, 5], "block.0": [1, 2, 3, 6], "hidden": [0, 4]}


def cut() -> tuple[Net, Net, Plan]:
    """A teacher, a student that was cut from it, and the plan."""
    torch.manual_seed(0)
    teacher = Net()
    groups = sc.find_groups(teacher, torch.zeros(2, 1, 6, 6))
    keep = tuple(tuple(next(KEPT[m] for m in g.modules if m in KEPT)) for g in groups.groups)
    plan = Plan(groups, keep)
    return teacher, sc.apply(teacher, plan), plan


def watched(model: nn.Module, names: list[str], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what some modules gave."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: found.update({name: out}))
        for name in names
    ]
    outputs = model(images)
    for handle in handles:
        handle.remove()
    return outputs, [found[name] for name in names]


def kl(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """T^2 times the sum of p log(p / q) over classes, the mean over images."""
    p, q = (torch.softmax(logits / t, 1) for logits in (teacher, student))
    return t * t * (p * (p / q).log()).sum(1).mean()


@pytest.mark.parametrize(("temperature", "weight"), [(4.0, 0.9), (1.0, 0.5), (2.0, 0.0), (3.0, 1.0)])
def test_logits(temperature: float, weight: float) -> None:
    teacher, student, _ = cut()
    replica, frozen = copy.deepcopy(student), copy.deepcopy(teacher).eval()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        outputs = replica(images)
        with torch.no_grad():
            taught = frozen(images)
        own = functional.cross_entropy(outputs, labels, label_smoothing=0.1)
        return (1 - weight) * own + weight * kl(outputs, taught, temperature)

    plain = plain_epoch(replica, torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9), loss)
    teacher.train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    found = one_epoch(student, distill=Distillation(teacher, temperature, weight), label_smoothing=0.1)
    assert found == pytest.approx(plain, abs=1e-6)
    assert_same_weights(student, replica, 1e-5)
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert not any(module._forward_hooks for module in student.modules())


@pytest.mark.parametrize("mix", [None, Mixup(0.4)])
def test_images_without_a_label_are_judged_by_the_teacher_alone(mix: Any) -> None:
    teacher, student, _ = cut()
    replica, frozen = copy.deepcopy(student), copy.deepcopy(teacher).eval()
    hidden = [(images, labels.index_fill(0, torch.arange(4, 16), UNLABELLED)) for images, labels in batches(100)]

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        mixed = None if mix is None else mix(images)
        outputs = replica(images if mixed is None else mixed.images)
        with torch.no_grad():
            taught = frozen(images if mixed is None else mixed.images)
        logs = torch.log_softmax(outputs, 1)
        other, share = (range(16), 1.0) if mixed is None else (mixed.other.tolist(), mixed.share)
        own = sum(-share * logs[i, labels[i]] for i in range(4))
        own = own + sum(-(1 - share) * logs[i, labels[j]] for i, j in enumerate(other) if j < 4)
        return 0.4 * own / 16 + 0.6 * kl(outputs, taught, 4.0)

    plain = plain_epoch(replica, torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9), loss)
    torch.manual_seed(3)
    lesson = Distillation(teacher, weight=0.6)
    (row,) = tune(student, train=lambda epoch: hidden, stages=[sc.Stage(0.1, 1)], distill=lesson, mix=mix).rows
    assert row.train_loss == pytest.approx(plain, rel=1e-6)
    assert_same_weights(student, replica, 1e-5)
    assert row.train_accuracy * 16 == round(row.train_accuracy * 16)  # 4 of each batch have a label
    with pytest.raises(TrainingError, match="there is the label -100, and the model has 3 outputs"):
        tune(student, train=lambda epoch: hidden)


@pytest.mark.parametrize("mix", [None, Mixup(0.4)])
def test_features_of_the_units_that_stay(mix: Any) -> None:
    teacher, student, plan = cut()
    replica, frozen = copy.deepcopy(student), copy.deepcopy(teacher).eval()
    names = ["one", "block.0", "hidden"]

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        mixed = None if mix is None else mix(images)
        images = images if mixed is None else mixed.images
        outputs, own = watched(replica, names, images)
        with torch.no_grad():
            taught, seen = watched(frozen, names, images)
        targets = functional.one_hot(labels, 3).float()
        if mixed is not None:
            targets = mixed.share * targets + (1 - mixed.share) * targets[mixed.other]
        total = 0.5 * functional.cross_entropy(outputs, targets) + 0.5 * kl(outputs, taught, 4.0)
        for name, one, other in zip(names, own, seen, strict=True):
            other = other[:, KEPT[name]]
            total = total + 2.0 * ((one - other) ** 2).mean() / (other**2).mean()
        return total

    plain = plain_epoch(replica, torch.optim.SGD(replica.parameters(), lr=0.05, momentum=0.9), loss)
    features = Features(plan, weight=2.0)
    assert list(features.layers) == names
    given = Distillation(teacher, weight=0.5, matches=(features,))
    found = one_epoch(student, distill=given, mix=mix, stages=[sc.Stage(0.05, 1)])
    assert found == pytest.approx(plain, rel=1e-6)
    assert_same_weights(student, replica, 1e-5)
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())


def test_a_cut_student_that_was_not_trained_has_its_teachers_features_in_the_first_layer() -> None:
    teacher, student, plan = cut()
    images = batches(1, 1)[0][0]
    _, ((one,), (other,)) = zip(*(watched(net.eval(), ["one"], images) for net in (student, teacher)))
    assert Features(plan, ["one"]).loss("one", one, other).item() == 0


def test_a_block_has_the_units_of_a_layer_that_is_named() -> None:
    teacher, student, plan = cut()
    images = batches(1, 1)[0][0]
    _, ((one,), (other,)) = zip(*(watched(net.eval(), ["block"], images) for net in (student, teacher)))
    match = Features(plan, {"block": "block.1"})
    kept = other[:, KEPT["block.0"]]
    expected = ((one - kept) ** 2).mean() / (kept**2).mean()
    assert match.loss("block", one, other).item() == pytest.approx(expected.item(), rel=1e-6)
    wrong = Features(plan, {"block": "one"})
    with pytest.raises(
        TrainingError, match=r"layer 'block' gives \(16, 4, 6, 6\) .* keeps 3 of 6 units; name the layer"
    ):
        wrong.loss("block", one, other)


def test_attention() -> None:
    teacher, student, _ = cut()
    replica, frozen = copy.deepcopy(student), copy.deepcopy(teacher).eval()

    def look(x: Tensor) -> Tensor:
        flat = (x**2).sum(1).flatten(1)
        return flat / (flat**2).sum(1, keepdim=True).sqrt()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        outputs, own = watched(replica, ["norm", "block"], images)
        with torch.no_grad():
            taught, seen = watched(frozen, ["norm", "block"], images)
        total = 0.1 * functional.cross_entropy(outputs, labels) + 0.9 * kl(outputs, taught, 4.0)
        for one, other in zip(own, seen, strict=True):
            total = total + 30.0 * ((look(one) - look(other)) ** 2).mean()
        return total

    plain = plain_epoch(replica, torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9), loss)
    given = Distillation(teacher, matches=(Attention(("norm", "block"), 30.0),))
    assert one_epoch(student, distill=given) == pytest.approx(plain, rel=1e-6)
    assert_same_weights(student, replica, 1e-5)


def test_a_table_of_logits_teaches_as_the_teacher_does() -> None:
    teacher, student, _ = cut()
    other = copy.deepcopy(student)
    data = batches(100)
    table = teacher_logits(teacher, data)
    assert table.shape == (64, 3)
    assert teacher.training

    def numbered(epoch: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
        order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch))
        return [(images[part], labels[part], part) for part in order.split(16)]

    taught = [
        one_epoch(net, train=numbered, distill=Distillation(held)) for net, held in ((student, teacher), (other, table))
    ]
    assert taught[0] == pytest.approx(taught[1], rel=1e-6)
    assert_same_weights(student, other, 1e-5)
    for changes in ({}, {"train": numbered, "mix": Mixup(1.0)}):
        with pytest.raises(TrainingError, match=r"table of logits, so each image's number in it is needed"):
            one_epoch(student, distill=Distillation(table), **changes)


def test_units_that_give_nothing_in_the_teacher_are_no_features() -> None:
    teacher = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    plan = Plan(sc.find_groups(teacher, torch.zeros(1, 4)), keep=((0, 2),))
    student = torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss = Features(plan).loss("0", student, torch.tensor([[0.0, 9.0, 0.0]]))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros(1, 2))


def test_bf16_and_channels_last_reach_the_teacher_and_its_features() -> None:
    teacher, student, plan = cut()
    dtypes: list[tuple[torch.dtype, bool]] = []

    class Noted(Features):
        def loss(self, layer: str, student: Tensor, teacher: Tensor) -> Tensor:
            dtypes.append((teacher.dtype, teacher.is_contiguous(memory_format=torch.channels_last)))
            return super().loss(layer, student, teacher)

    given = Distillation(teacher, matches=(Noted(plan, ("one",)),))
    assert one_epoch(student, distill=given, bf16=True, channels_last=True) > 0
    assert set(dtypes) == {(torch.float32, True)}
    assert teacher.one.weight.is_contiguous()


def test_compile_keeps_what_layers_give(monkeypatch: pytest.MonkeyPatch) -> None:
    really = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: really(model, backend="aot_eager"))
    teacher, student, plan = cut()
    other = copy.deepcopy(student)
    given = Distillation(teacher, matches=(Features(plan), Attention(("block",))))
    assert one_epoch(student, distill=given, compile=True) == pytest.approx(one_epoch(other, distill=given), rel=1e-5)
    assert_same_weights(student, other, 1e-5)


def test_what_cannot_teach() -> None:
    teacher, student, plan = cut()
    with pytest.raises(TrainingError, match=r"temperature of a distillation is 0\.0; give one above 0"):
        Distillation(teacher, 0.0)
    with pytest.raises(TrainingError, match=r"weight of a distillation is 1\.5; give a number in \[0, 1\]"):
        Distillation(teacher, weight=1.5)
    with pytest.raises(TrainingError, match="matching layers needs a teacher that runs"):
        Distillation(torch.zeros(1, 3), matches=(Attention(("one",)),))
    with pytest.raises(UnknownName, match=r"unknown layer 'blok\.0'; did you mean 'block\.0'"):
        Features(plan, ("blok.0",))
    with pytest.raises(UnknownName, match="unknown layer 'blocks'; did you mean 'block'"):
        tune(student, distill=Distillation(teacher, matches=(Attention(("blocks",)),)))
    with pytest.raises(TrainingError, match=r"the teacher's logits are \(16, 4\) and the model's are \(16, 3\)"):
        tune(student, distill=Distillation(nn.Sequential(nn.Flatten(), nn.Linear(36, 4))))
    with pytest.raises(TrainingError, match="shares weights with the model that is trained; give a copy"):
        tune(student, distill=Distillation(student))
    with pytest.raises(TrainingError, match=r"layer 'hidden' gives \(16, 2\) .* needs images of channels"):
        tune(student, distill=Distillation(teacher, matches=(Attention(("hidden",)),)))
