"""Taylor and Fisher against gates that really stand in the model; what they leave behind, and what they refuse."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import networks
from secateur.errors import PlanError, UnknownName
from secateur.graph.groups import find_groups
from secateur.graph.nested import Example, as_arguments, map_tensors, tensors_in
from secateur.graph.records import Groups
from secateur.score.fisher import Fisher
from secateur.score.scoring import score
from secateur.score.taylor import Taylor

Batch = tuple[Any, Any]
READ_BY_LAYERS = (
    networks.Chain, networks.Residual, networks.ZeroPadded, networks.Dense, networks.Depthwise, networks.SplitHalves,
    networks.Norms, networks.SqueezeExcite, networks.UNet, networks.Attention, networks.TwoInTwoOut, networks.FixedView,
    networks.PixelShuffle, networks.Strided, networks.Halves, networks.Normalised, networks.GroupedQueries,
)  # fmt: skip
NETS = {net.make: net for net in networks.NETWORKS}


def squared(outputs: Any, targets: Any) -> Tensor:
    """A loss for any outputs, with targets that are one number for each sample."""
    per_sample = sum((out * 0.7).sin().flatten(1).sum(1) for out in tensors_in(outputs))
    return (per_sample - targets).square().mean()


def setting(make: Callable[[], nn.Module], batches: int = 3) -> tuple[nn.Module, Groups, list[Batch]]:
    """The network in float64, its groups, and random batches of two samples."""
    net, random = NETS[make], torch.Generator().manual_seed(5)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=random, dtype=torch.float64)

    model, inputs = networks.build(net).double(), map_tensors(lambda t: t.double(), net.inputs())
    data = [(map_tensors(drawn, inputs), drawn(torch.empty(2))) for _ in range(batches)]
    return model, find_groups(model, inputs), data


def with_gates(model: nn.Module, groups: Groups, batch: Batch) -> list[Tensor]:
    """The loss's derivative by factors on the inputs of every layer that reads a group."""
    twin = copy.deepcopy(model)
    factors = [torch.ones(group.size, dtype=torch.float64, requires_grad=True) for group in groups.groups]
    for group, factor in zip(groups.groups, factors, strict=True):
        for slot in (slot for slot in group.slots if slot.role == "read"):
            layer = twin.get_submodule(slot.tensor.rpartition(".")[0])
            layer.register_forward_pre_hook(gate(factor, slot.index, 1 if isinstance(layer, nn.Conv2d) else -1))
    args, kwargs = as_arguments(batch[0])
    return list(torch.autograd.grad(squared(twin(*args, **kwargs), batch[1]), factors))


def gate(factor: Tensor, index: Sequence[Sequence[int]], dim: int) -> Callable[[nn.Module, Any], Any]:
    places = torch.tensor(index)

    def hook(module: nn.Module, args: Any) -> Any:
        along = torch.ones(args[0].shape[dim], dtype=factor.dtype)
        along = along.index_put((places,), factor[:, None].expand(places.shape))
        shape = [1] * args[0].ndim
        shape[dim] = -1
        return (args[0] * along.reshape(shape), *args[1:])

    return hook


def one_by_one(batches: list[Batch]) -> Iterator[Batch]:
    for inputs, targets in batches:
        for i in range(2):
            yield map_tensors(lambda t, i=i: t[i : i + 1], inputs), targets[i : i + 1]


@pytest.mark.parametrize("make", READ_BY_LAYERS)
def test_taylor_is_the_derivative_by_gates_in_front_of_the_layers(make: Callable[[], nn.Module]) -> None:
    model, groups, batches = setting(make)
    rows = [with_gates(model, groups, batch) for batch in batches]
    squares, sizes = (score(model, groups, Taylor(batches, squared, p=p)).values for p in (2.0, 1.0))
    for group in range(len(groups.groups)):
        gates = torch.stack([row[group] for row in rows])
        assert bool((gates.abs() > 0).any())
        torch.testing.assert_close(squares[group], gates.square().mean(0))
        torch.testing.assert_close(sizes[group], gates.abs().mean(0))


@pytest.mark.parametrize("make", READ_BY_LAYERS)
def test_fisher_is_the_mean_of_the_squares_of_each_sample(make: Callable[[], nn.Module]) -> None:
    model, groups, batches = setting(make, 2)
    rows = [with_gates(model, groups, sample) for sample in one_by_one(batches)]
    values = score(model, groups, Fisher(batches, squared)).values
    for group in range(len(groups.groups)):
        torch.testing.assert_close(values[group], torch.stack([row[group] for row in rows]).square().mean(0))
    batchwise = score(model, groups, Taylor(batches, squared)).values
    assert not any(torch.allclose(a, b) for a, b in zip(values, batchwise, strict=True))


def test_what_an_lstm_reads_is_gated_on_its_way_in() -> None:
    model, groups, batches = setting(networks.Recurrent)
    gradients = []
    for inputs, targets in batches:
        factor = torch.ones(6, dtype=torch.float64, requires_grad=True)
        hidden = model.lstm(model.into(inputs) * factor)[0]
        gradients += torch.autograd.grad(squared(model.out(hidden.relu()), targets), factor)
    values = score(model, groups, Taylor(batches, squared)).values[0]
    torch.testing.assert_close(values, torch.stack(gradients).square().mean(0))


def test_what_an_lstm_hands_on_is_gated_in_its_loop_and_behind_it() -> None:
    model, groups, batches = setting(networks.Recurrent, 1)
    factor = torch.ones(5, dtype=torch.float64, requires_grad=True)
    bias = model.lstm.bias_ih_l0 + model.lstm.bias_hh_l0
    hidden, cell, handed = torch.zeros(2, 5).double(), torch.zeros(2, 5).double(), []
    for step in model.into(batches[0][0]).unbind(1):
        gates = step @ model.lstm.weight_ih_l0.T + (hidden * factor) @ model.lstm.weight_hh_l0.T + bias
        i, f, g, o = gates.chunk(4, 1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        handed.append(hidden)
    outputs = model.out((torch.stack(handed, 1) * factor).relu())
    (gradient,) = torch.autograd.grad(squared(outputs, batches[0][1]), factor)
    torch.testing.assert_close(score(model, groups, Taylor(batches, squared)).values[1], gradient.square())


def test_gates_behind_a_layer_are_its_weights_and_bias() -> None:
    model, groups, batches = setting(networks.Chain, 1)
    factor = torch.ones(6, dtype=torch.float64, requires_grad=True)
    twin = copy.deepcopy(model)
    twin[4].register_forward_hook(lambda module, args, out: out * factor[:, None, None])
    (gradient,) = torch.autograd.grad(squared(twin(batches[0][0]), batches[0][1]), factor)
    behind = score(model, groups, Taylor(batches, squared, roles=("write", "scale"))).values[1]
    torch.testing.assert_close(behind, gradient.square())
    assert not torch.allclose(behind, score(model, groups, Taylor(batches, squared)).values[1])


def test_gates_behind_batch_norm_are_its_scale_and_shift() -> None:
    model, _, batches = setting(networks.PointNet, 1)
    factor = torch.ones(6, dtype=torch.float64, requires_grad=True)
    twin = copy.deepcopy(model)
    twin.a.bias = None  # no bias of the layer's own: all that is scaled is batch norm's
    twin.norm.running_mean -= model.a.bias.detach()
    bare = copy.deepcopy(twin)
    bare.norm.register_forward_hook(lambda module, args, out: out * factor[:, None])
    (gradient,) = torch.autograd.grad(squared(bare(batches[0][0]), batches[0][1]), factor)
    found = find_groups(twin, batches[0][0])
    values = score(twin, found, Taylor(batches, squared, roles=("scale",))).values[0]
    torch.testing.assert_close(values, gradient.square())


def test_cross_entropy_is_the_loss_unless_another_is_given() -> None:
    model, groups, batches = setting(networks.Chain)
    labelled = [(inputs, torch.tensor([1, 4])) for inputs, _ in batches]
    named = Taylor(labelled, lambda out, labels: -out.log_softmax(1)[torch.arange(2), labels].mean())
    for one, other in zip(score(model, groups, Taylor(labelled)).values, score(model, groups, named).values):
        torch.testing.assert_close(one, other)
    model, groups, batches = setting(networks.TwoInTwoOut)
    with pytest.raises(PlanError, match=r"the model returns a dict, .* give loss=, such as lambda outputs, targets"):
        score(model, groups, Taylor(batches))


def test_example_says_which_outputs_the_loss_sees() -> None:
    model, groups, batches = setting(networks.TwoInTwoOut)
    first = [(Example(inputs, lambda out: out["first"]), targets) for inputs, targets in batches]
    for kind in (Taylor, Fisher):
        values = score(model, groups, kind(first, squared)).values[0]
        wanted = score(model, groups, kind(batches, lambda out, targets: squared(out["first"], targets))).values[0]
        torch.testing.assert_close(values, wanted)


def traces(model: nn.Module) -> list[Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    states = [(name, tensor.requires_grad, tensor.grad, tensor.data_ptr()) for name, tensor in tensors]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    return [states, hooks, [m.training for m in model.modules()], torch.get_rng_state().tolist()]


@pytest.mark.parametrize("kind", [Taylor, Fisher])
def test_the_model_is_left_as_found(kind: Any) -> None:
    model, groups, batches = setting(networks.Residual)
    model.train()
    model.a.eval()
    model.b.weight.requires_grad_(False)
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    before, values = traces(model), copy.deepcopy(model.state_dict())
    found = score(model, groups, kind(batches, squared)).values
    assert traces(model) == before
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())
    with torch.inference_mode():
        again = score(model.eval(), groups, kind(batches, squared)).values
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("kind", [Taylor, Fisher])
def test_one_batch_is_held_at_a_time(kind: Any) -> None:
    model, groups, batches = setting(networks.Chain)

    class Stream:
        """Makes its batches anew, and looks whether the last one is still there."""

        alive: list[int]

        def __iter__(self) -> Iterator[Batch]:
            self.alive, made = [], []
            for inputs, targets in batches:
                gc.collect()
                self.alive.append(sum(ref() is not None for ref in made))
                batch = (inputs.clone(), targets.clone())
                made += map(weakref.ref, batch)
                yield batch
                del batch

    stream = Stream()
    streamed, listed = (score(model, groups, kind(given, squared)).values for given in (stream, batches))
    assert stream.alive == [0, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(streamed, listed, strict=True))


def test_weights_that_the_loss_does_not_see_add_nothing() -> None:
    model, groups, batches = setting(networks.TwoInTwoOut, 1)
    loss = squared({"first": model(*batches[0][0])["first"]}, batches[0][1])
    (gradient,) = torch.autograd.grad(loss, model.both.weight)
    seen = score(model, groups, Taylor(batches, lambda out, targets: squared(out["first"], targets))).values[0]
    torch.testing.assert_close(seen, (model.both.weight * gradient).sum(0).square().detach())


def test_a_model_without_groups_is_not_run() -> None:
    model, groups, _ = setting(networks.Rolled)
    assert score(model, groups, Taylor([])).values == ()


@pytest.mark.parametrize(
    ("batches", "loss", "match"),
    [
        ([], squared, r"there are no batches; give a list of \(inputs, targets\), .* an iterator is empty once"),
        ([torch.zeros(2, 3, 8, 8)], squared, r"a batch is a pair \(inputs, targets\), and this one is a Tensor\."),
        ([(1, 2, 3)], squared, r"a batch is a pair .* this one is a tuple"),
        (None, lambda out, targets: out[0], r"the loss is a tensor of shape \(5,\), and one number is needed"),
        (None, lambda out, targets: 3.0, r"the loss is float, and one number is needed"),
        (None, lambda out, targets: out.detach().sum(), r"the loss depends on no weight .* torch\.no_grad and detach"),
    ],
)
@pytest.mark.parametrize("kind", [Taylor, Fisher])
def test_what_cannot_be_derived_is_refused(kind: Any, batches: Any, loss: Any, match: str) -> None:
    model, groups, good = setting(networks.Chain)
    with pytest.raises(PlanError, match=match):
        score(model, groups, kind(good if batches is None else batches, loss))


def test_knobs_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlanError, match="the power must be above 0 and finite, and 0 is not"):
        Taylor([], p=0)
    for kind in (Taylor, Fisher):
        with pytest.raises(UnknownName, match="unknown role 'input'"):
            kind([], roles=("input",))


def test_fisher_needs_to_know_its_samples() -> None:
    model, groups, _ = setting(networks.Chain)
    odd = [(torch.zeros(4, 3, 8, 8), torch.zeros(2))]
    with pytest.raises(PlanError, match=r"shapes \[\(4, 3, 8, 8\), \(2,\)\], .* batches of one sample to Taylor"):
        score(model, groups, Fisher(odd, squared))
    with pytest.raises(PlanError, match=r"shapes \[\], and the samples are those along a first axis"):
        score(model, groups, Fisher([(1, 2)], squared))
