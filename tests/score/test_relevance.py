"""Relevance of units: against slow sums of what `explain` gives, over all tiny networks; the model left as found."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks
from secateur.errors import CaptureError, PlanError
from secateur.graph.groups import find_groups
from secateur.graph.nested import Example, tensors_in
from secateur.graph.rebuild import rebuild
from secateur.score.lrp.composites import AllEpsilon, EpsilonAlphaBeta, EpsilonPlus, Layer
from secateur.score.lrp.explain import explain
from secateur.score.lrp.rules import Epsilon, Rule, ZPlus
from secateur.score.lrp.starts import absolute, logit, one_hot, signed, softmax_difference
from secateur.score.relevance import Relevance
from secateur.score.scoring import score


def residual() -> nn.Module:
    return networks.build(networks.NETWORKS[1]).double()


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """The same ten images with labels, in batches of these sizes."""
    random = torch.Generator().manual_seed(3)
    images = torch.randn(10, 3, 8, 8, dtype=torch.float64, generator=random)
    labels = torch.arange(10) % 5
    return list(zip(images.split(sizes), labels.split(sizes)))


def scores_of(model: nn.Module, criterion: Relevance) -> tuple[Tensor, ...]:
    example = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    return score(model, find_groups(model, example), criterion).values


def layers_of(model: nn.Module, composite: Any = None) -> dict[str, tuple[Tensor, Tensor]]:
    ((images, labels),) = batches(10)
    return {name: (read, made) for name, read, made in explain(model, images, labels, composite).layers}


def slowly(relevance: Tensor) -> Tensor:
    """The mean over images of the sum over positions, one number at a time."""
    units = relevance.shape[1]
    sums = [0.0] * units
    for image in relevance:
        for unit in range(units):
            sums[unit] += sum(float(value) for value in image[unit].flatten())
    return torch.tensor(sums, dtype=torch.float64) / len(relevance)


@pytest.mark.parametrize("composite", [EpsilonPlus(), EpsilonAlphaBeta(), AllEpsilon(0.01)])
def test_units_get_the_relevance_of_the_sums_they_end_in(composite: Any) -> None:
    model = residual()
    layers = layers_of(model, composite)
    stream, inner = scores_of(model, Relevance(batches(10), composite=composite))
    torch.testing.assert_close(inner, slowly(layers["b"][0]))
    torch.testing.assert_close(stream, slowly(layers["a"][0]) + slowly(layers["head"][0]))


def test_units_get_the_relevance_of_the_layers_that_make_them() -> None:
    model = residual()
    layers = layers_of(model)
    stream, inner = scores_of(model, Relevance(batches(10), made=True))
    torch.testing.assert_close(inner, slowly(layers["a"][1]))
    torch.testing.assert_close(stream, slowly(layers["stem"][1]) + slowly(layers["b"][1]))
    (halved, same) = scores_of(model, Relevance(batches(10), made=True, mean=True))
    torch.testing.assert_close(halved, stream / 2)
    torch.testing.assert_close(same, inner)


def test_units_of_a_flattened_map_get_all_their_columns() -> None:
    model = networks.build(networks.NETWORKS[0]).double()
    layers = layers_of(model)
    flat = layers["8"][0].sum(0).reshape(6, 4).sum(1) / 10
    torch.testing.assert_close(scores_of(model, Relevance(batches(10)))[1], flat)


def test_folds_starts_and_labels_are_the_callers_choice() -> None:
    model, ((images, _),) = residual(), batches(10)
    layers = layers_of(model)
    plain, added = (scores_of(model, Relevance(batches(10), fold=fold))[1] for fold in (signed, absolute))
    torch.testing.assert_close(added, layers["b"][0].abs().sum((0, 2, 3)) / 10)
    assert not torch.allclose(plain, added)
    largest = scores_of(model, Relevance(batches(10), fold=lambda rows: rows.amax(0)))[1]
    torch.testing.assert_close(largest, layers["b"][0].amax((0, 2, 3)) / 10)
    predicted = model.eval()(images).argmax(1)
    unlabelled = scores_of(model, Relevance([images], labelled=False))
    for got, want in zip(unlabelled, scores_of(model, Relevance([(images, predicted)]))):
        torch.testing.assert_close(got, want)
    assert not torch.allclose(unlabelled[1], plain)
    doubled = scores_of(model, Relevance(batches(10), start=lambda logits, labels: 2 * logit(logits, labels)))
    torch.testing.assert_close(doubled[1], 2 * plain)
    hot = scores_of(model, Relevance(batches(10), start=one_hot, composite=AllEpsilon()))
    assert not torch.allclose(hot[1], plain)


def test_softmax_difference_is_the_slope_of_the_softmax() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, 1])
    (slope,) = torch.autograd.grad(logits.softmax(1)[range(3), labels].sum(), logits)
    torch.testing.assert_close(softmax_difference(logits.detach(), labels), slope)


def test_a_map_of_logits_has_labels_at_each_place() -> None:
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    started = logit(logits, labels)
    assert started.count_nonzero() == labels.numel()
    torch.testing.assert_close(started.sum(1), logits.gather(1, labels[:, None])[:, 0])


@pytest.mark.parametrize("sizes", [(5, 5), (4, 4, 2), (1,) * 10])
def test_batches_make_no_difference(sizes: tuple[int, ...]) -> None:
    whole, split = (scores_of(residual(), Relevance(batches(*each))) for each in ((10,), sizes))
    for got, want in zip(split, whole):
        torch.testing.assert_close(got, want)


def test_no_batch_outlives_its_turn() -> None:
    model, made = residual(), []
    model.a.register_forward_hook(lambda module, inputs, output: made.append(weakref.ref(output)))

    class Stream:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in batches(2, 2, 2, 2, 2):
                assert [ref() for ref in made] == [None] * len(made)
                yield batch

    groups = find_groups(model, networks.image()().double())
    criterion = Relevance(Stream())
    made.clear()
    gc.disable()
    try:
        first = score(model, groups, criterion).values
        assert len(made) == 5
        again = score(model, groups, criterion).values  # they can be gone through again
    finally:
        gc.enable()
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_a_composite_of_the_callers_own_sees_every_layer() -> None:
    asked: set[Layer] = set()

    def mine(layer: Layer) -> Rule:
        asked.add(layer)
        return ZPlus() if layer.name in ("stem", "a", "b") else Epsilon()

    model = residual()
    got, want = (scores_of(model, Relevance(batches(10), composite=c)) for c in (mine, EpsilonPlus()))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert asked == {Layer(name, name == "head", name == "stem") for name in ("stem", "a", "b", "head")}


def test_scores_move_with_the_units() -> None:
    model = residual()
    groups = find_groups(model, networks.image()().double())
    order = torch.tensor([5, 2, 7, 0, 1, 4, 3, 6])
    tensors = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    for slot in groups.groups[0].slots:
        tensors[slot.tensor] = tensors[slot.tensor].index_select(slot.dim, order)
    moved = scores_of(rebuild(model, tensors, {}), Relevance(batches(10)))
    whole = scores_of(model, Relevance(batches(10)))
    torch.testing.assert_close(moved[0], whole[0][order])
    torch.testing.assert_close(moved[1], whole[1])


def first_output(outputs: Any) -> Tensor:
    return next(tensors_in(outputs)).flatten(1)


@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: net.make.__name__)
def test_every_network_and_each_group(net: networks.Net) -> None:
    model, inputs = networks.build(net), net.inputs()
    given = inputs.inputs if isinstance(inputs, Example) else inputs
    groups = find_groups(model, inputs)
    read = inputs.outputs if isinstance(inputs, Example) else lambda outputs: outputs
    batch = Example(given, lambda outputs: first_output(read(outputs)))
    values = score(model, groups, Relevance([batch], labelled=False, fold=absolute)).values
    assert [len(v) for v in values] == [group.size for group in groups.groups]
    assert all(bool(v.any()) for v in values)


class Transformer(nn.Module):
    """Patches, two encoder layers with attention, and a class token, as in a ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation=F.gelu, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.layers(x)[:, 0])


@pytest.mark.parametrize("gates", [0.0, 0.5])
def test_a_transformer(gates: float) -> None:
    torch.manual_seed(0)
    model = Transformer().double()
    values = scores_of(model, Relevance(batches(5, 5), gates=gates, fold=absolute))
    assert len(values) >= 5  # the stream, and in each layer the heads and the hidden units
    assert all(bool((v > 0).all()) for v in values)


def test_a_part_that_runs_in_training_only_is_of_no_relevance() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
            self.aside = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5))

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.body(x)).mean((2, 3))
            return (self.head(x), self.aside(x)) if self.training else self.head(x)

    torch.manual_seed(0)
    model = Aside().double().train()
    groups = find_groups(model, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    values = score(model, groups, Relevance(batches(10))).values
    by_size = {len(v): v for v in values}
    assert bool(by_size[6].all())
    assert not by_size[7].any()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_found(training: bool) -> None:
    model = networks.build(networks.NETWORKS[0]).double().train(training)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[3].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    given = batches(5, 5)
    kept = copy.deepcopy(given)
    scores_of(model, Relevance(given))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training is training for module in model.modules())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["0.weight"]
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("3."))
    assert bool((model[0].weight.grad == 1).all())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(a, b) for old, new in zip(kept, given) for a, b in zip(old, new))


def test_it_works_within_inference_mode() -> None:
    model = residual()
    groups = find_groups(model, networks.image()().double())
    want = score(model, groups, Relevance(batches(10))).values
    with torch.inference_mode():
        got = score(model, groups, Relevance(batches(10))).values
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_what_the_caller_can_put_right() -> None:
    model, ((images, labels),) = residual(), batches(10)
    with pytest.raises(PlanError, match="there are no batches"):
        scores_of(model, Relevance([]))
    with pytest.raises(PlanError, match="not a pair of inputs and a tensor of labels; give labelled=False"):
        scores_of(model, Relevance([images]))
    with pytest.raises(CaptureError, match=r"did not run on a batch.*with labels, a pair of both"):
        scores_of(model, Relevance([(images, labels)], labelled=False))
    with pytest.raises(PlanError, match=r"a share from 0 to 1 of the relevance, and not 1\.5"):
        Relevance([], gates=1.5)
    with pytest.raises(PlanError, match=r"relevance starts as \(10,\), and the logits are \(10, 5\)"):
        scores_of(model, Relevance(batches(10), start=lambda logits, labels: logits[:, 0]))


def test_a_model_with_several_outputs_needs_to_be_told() -> None:
    class Two(nn.Sequential):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": (hidden := self[0](x)), "logits": self[2](self[1](hidden))}

    torch.manual_seed(0)
    model, x = Two(nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(5, 3)
    groups = find_groups(model, x)
    with pytest.raises(PlanError, match=r"has 2 outputs that depend on its inputs; say which one"):
        score(model, groups, Relevance([x], labelled=False))
    (values,) = score(model, groups, Relevance([Example(x, lambda out: out["logits"])], labelled=False)).values
    assert bool(values.all())


def test_a_group_that_no_layer_makes_is_named() -> None:
    net = next(net for net in networks.NETWORKS if net.make.__name__ == "Recurrent")
    model, inputs = networks.build(net), net.inputs()
    batch = Example(inputs, first_output)
    with pytest.raises(PlanError, match=r"no relevance comes to group 'lstm'.*Try made=False"):
        score(model, find_groups(model, inputs), Relevance([batch], labelled=False, made=True))
