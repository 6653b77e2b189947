"""What training keeps beside the model: after a cut it goes on as if it had always been that small."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timm.optim import Lookahead
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_leaves, tree_map

import networks
from secateur.allocate.plan import Plan
from secateur.graph.groups import find_groups
from secateur.graph.records import Groups
from secateur.surgery.cut import apply

CUTTABLE = {net.make.__name__: net for net in networks.NETWORKS if net.sizes}
Make = Callable[[Any], optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda p: optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, 0.05, initial_accumulator_value=0.1, lr_decay=0.01),
    "plain sgd": lambda p: optim.SGD(p, 0.05),
    "sgd, foreach": lambda p: optim.SGD(p, 0.05, momentum=0.9, dampening=0.1, foreach=True),
    "sgd, fused": lambda p: optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "adam": lambda p: optim.Adam(p, torch.tensor(0.01), maximize=True),
    "adam, fused": lambda p: optim.Adam(p, 0.01, fused=True),
    "adam, foreach": lambda p: optim.Adam(p, 0.01, foreach=True),
    "adagrad, fused": lambda p: optim.Adagrad(p, 0.05, fused=True),
    "adadelta": lambda p: optim.Adadelta(p, 0.5),
    "adamax": lambda p: optim.Adamax(p, 0.01),
    "nadam": lambda p: optim.NAdam(p, 0.01),
    "radam": lambda p: optim.RAdam(p, 0.01),
    "asgd": lambda p: optim.ASGD(p, 0.01, t0=2),
    "rprop": lambda p: optim.Rprop(p, 0.01),
}
MAIN = tuple(OPTIMIZERS)[:4]
CASES = [(net, name) for net in CUTTABLE for name in MAIN] + [
    (net, name) for net in ("Chain", "Residual", "TiedTwice") for name in OPTIMIZERS if name not in MAIN
]


@functools.cache
def groups_of(net: str) -> Groups:
    return find_groups(networks.build(CUTTABLE[net]), CUTTABLE[net].inputs())


def some(net: str) -> Plan:
    """Of group i every unit stays but those with a number that is i modulo 3."""
    groups = groups_of(net)
    return Plan(groups, tuple(tuple(u for u in range(g.size) if u % 3 != i % 3) for i, g in enumerate(groups.groups)))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def places(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Where each number of the cut model stood in the model's tensor: the cut of a model whose weights are numbered."""
    numbered = copy.deepcopy(model).double()
    for tensor in tensors(numbered).values():
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    return {name: tensor.long() for name, tensor in tensors(apply(numbered, plan)).items()}


def train(model: nn.Module, optimizer: optim.Optimizer, inputs: Any, steps: range, *after: AveragedModel) -> None:
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    model.train()
    for step in steps:
        torch.manual_seed(step)  # dropout
        optimizer.zero_grad()
        outputs = [out for out in tree_leaves(model(*args)) if isinstance(out, Tensor)]
        torch.stack([(out - 1).square().mean() for out in outputs]).sum().backward()
        optimizer.step()
        for ema in after:
            ema.update_parameters(model)


def by_weight(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with options of their own."""
    wide, flat = ([p for p in model.parameters() if (p.ndim > 1) == which] for which in (True, False))
    return [{"params": wide}, {"params": flat, "lr": 0.02}]


def same(a: Any, b: Any) -> bool:
    """Whether two nestings are equal, their tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def set_by_hand(new: optim.Optimizer, old: optim.Optimizer, cut: nn.Module, model: nn.Module, plan: Plan) -> None:
    spots, parameters = places(model, plan), dict(model.named_parameters())
    for name, parameter in cut.named_parameters():
        for key, value in old.state.get(parameters[name], {}).items():
            value = value.detach().clone()
            new.state[parameter][key] = value.flatten()[spots[name]] if value.ndim else value


@pytest.mark.parametrize(("net", "name"), CASES, ids=[f"{net}-{name}" for net, name in CASES])
def test_training_goes_on_as_with_a_state_cut_by_hand(net: str, name: str) -> None:
    model, inputs, plan, make = networks.build(CUTTABLE[net]), CUTTABLE[net].inputs(), some(net), OPTIMIZERS[name]
    optimizer = make(by_weight(model))
    train(model, optimizer, inputs, range(3))
    cut, hand = apply(model, plan, optimizer=optimizer), apply(model, plan)
    theirs = make(by_weight(hand))
    set_by_hand(theirs, optimizer, hand, model, plan)
    assert type(cut.optimizer) is type(optimizer)
    assert same(cut.optimizer.state_dict(), theirs.state_dict())
    train(cut.model, cut.optimizer, inputs, range(3, 6))
    train(hand, theirs, inputs, range(3, 6))
    assert same(tensors(cut.model), tensors(hand))
    assert same(cut.optimizer.state_dict(), theirs.state_dict())
    assert not same(tensors(cut.model), tensors(apply(model, plan)))


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("net", CUTTABLE)
def test_an_averaged_model_goes_on_as_one_cut_by_hand(net: str, use_buffers: bool) -> None:
    model, inputs, plan = networks.build(CUTTABLE[net]), CUTTABLE[net].inputs(), some(net)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    train(model, optimizer, inputs, range(3), ema)
    cut = apply(model, plan, optimizer=optimizer, ema=ema)
    hand = apply(model, plan)
    theirs = OPTIMIZERS["sgd"](hand.parameters())
    set_by_hand(theirs, optimizer, hand, model, plan)
    average = AveragedModel(hand, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    average.n_averaged.fill_(3)
    spots = places(model, plan)
    for key, tensor in tensors(average.module).items():
        tensor.copy_(tensors(ema.module)[key].flatten()[spots[key]])
    train(cut.model, cut.optimizer, inputs, range(3, 6), cut.ema)
    train(hand, theirs, inputs, range(3, 6), average)
    assert int(cut.ema.n_averaged) == 6
    assert same(tensors(cut.ema), tensors(average))
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    assert same(cut.ema.eval()(*args), average.eval()(*args))
    assert not same(cut.ema(*args), cut.model.eval()(*args))


def silence(model: nn.Module, plan: Plan) -> None:
    """Make the units that the plan cuts dead: all that writes, scales and reads them is zero."""
    stays, kept = places(model, plan), plan.groups.kept(plan.keep)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in kept and not name.endswith("original1"):  # a direction of weight norm, which has no zero
                flat = torch.zeros(parameter.numel(), dtype=parameter.dtype)
                flat[stays[name].flatten()] = parameter.flatten()[stays[name].flatten()]
                parameter.copy_(flat.view(parameter.shape))


def exact(net: str) -> Plan:
    """The plan of `some`, but groups whose cut changes what the others compute stay whole."""
    groups = groups_of(net)
    pairs = zip(groups.groups, some(net).keep)
    return Plan(groups, tuple(tuple(range(g.size)) if g.inexact else units for g, units in pairs))


@pytest.mark.parametrize(("name", "most"), [("sgd", 1e-13), ("adamw", 1e-8)])  # Adam blows up a zero gradient's noise
@pytest.mark.parametrize("net", [net for net in CUTTABLE if any(not g.inexact for g in groups_of(net).groups)])
def test_without_dead_units_training_is_what_it_was_with_them(net: str, name: str, most: float) -> None:
    model = networks.build(CUTTABLE[net]).double()
    inputs = tree_map(Tensor.double, CUTTABLE[net].inputs())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # it would draw other numbers for another width
    plan = exact(net)
    silence(model, plan)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, inputs, range(3))
    cut = apply(model, plan, optimizer=optimizer)
    before = copy.deepcopy(tensors(cut.model))
    train(model, optimizer, inputs, range(3, 8))
    train(cut.model, cut.optimizer, inputs, range(3, 8))
    left = tensors(apply(model, plan))
    for key, tensor in tensors(cut.model).items():
        torch.testing.assert_close(tensor, left[key], rtol=0, atol=most)
    assert max(float((before[key] - tensor).abs().max()) for key, tensor in left.items()) > 1e-3


def test_without_dead_units_sgd_is_what_it_was_bit_for_bit_where_sums_are_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape))
    x = torch.randint(-2, 3, (4, 4)).double()
    plan = Plan(find_groups(model, x), ((1, 2, 5, 8), (0, 3, 6)))
    silence(model, plan)
    optimizer = optim.SGD(model.parameters(), 2.0**-8, momentum=0.5)

    def go(one: nn.Module, by: optim.Optimizer) -> None:
        for _ in range(4):  # numbers grow: in float64 the sums of four steps are exact
            by.zero_grad()
            one(x).sum(1).clamp(-4, 4).sum().backward()
            by.step()

    go(model, optimizer)
    cut = apply(model, plan, optimizer=optimizer)
    before = copy.deepcopy(tensors(cut.model))
    go(model, optimizer)
    go(cut.model, cut.optimizer)
    assert same(tensors(cut.model), tensors(apply(model, plan)))
    assert not same(tensors(cut.model), before)


def residual() -> tuple[nn.Module, Tensor, Plan]:
    return networks.build(CUTTABLE["Residual"]), CUTTABLE["Residual"].inputs(), some("Residual")


def test_what_was_given_is_untouched() -> None:
    model, x, plan = residual()
    optimizer = OPTIMIZERS["adamw"](by_weight(model))
    ema = AveragedModel(model)
    train(model, optimizer, x, range(3), ema)
    held = [list(group["params"]) for group in optimizer.param_groups]
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), ema.state_dict()))
    cut = apply(model, plan, optimizer=optimizer, ema=ema)
    train(cut.model, cut.optimizer, x, range(3), cut.ema)
    assert same(before, (model.state_dict(), optimizer.state_dict(), ema.state_dict()))
    assert all(a is b for ours, group in zip(held, optimizer.param_groups) for a, b in zip(ours, group["params"]))
    after = copy.deepcopy((cut.model.state_dict(), cut.optimizer.state_dict(), cut.ema.state_dict()))
    train(model, optimizer, x, range(3, 6), ema)
    assert same(after, (cut.model.state_dict(), cut.optimizer.state_dict(), cut.ema.state_dict()))


def test_a_second_cut_goes_on_from_the_first() -> None:
    model, x, plan = residual()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, x, range(3), ema)
    once = apply(model, plan, optimizer=optimizer, ema=ema)
    groups = find_groups(once.model, x)
    then = Plan(groups, tuple(tuple(range(1, group.size)) for group in groups.groups))
    twice = apply(once.model, then, optimizer=once.optimizer, ema=once.ema)
    both = Plan(plan.groups, tuple(tuple(units[i] for i in more) for units, more in zip(plan.keep, then.keep)))
    at_once = apply(model, both, optimizer=optimizer, ema=ema)
    for one in (twice, at_once):
        train(one.model, one.optimizer, x, range(3, 6), one.ema)
    assert same(tensors(twice.ema), tensors(at_once.ema))
    assert same(twice.optimizer.state_dict(), at_once.optimizer.state_dict())


def test_an_optimizer_of_some_parameters_of_which_some_have_no_state() -> None:
    model, x, plan = residual()
    model.a.requires_grad_(False)
    optimizer = optim.Adam([*model.a.parameters(), *model.b.parameters()])
    train(model, optimizer, x, range(2))
    cut = apply(model, plan, optimizer=optimizer)
    assert [len(group["params"]) for group in cut.optimizer.param_groups] == [4]
    assert cut.optimizer.param_groups[0]["params"][0] is cut.model.a.weight
    assert set(cut.optimizer.state) == {cut.model.b.weight, cut.model.b.bias}
    fresh = apply(model, plan, optimizer=optim.Adam(model.parameters()))
    assert not fresh.optimizer.state
    train(fresh.model, fresh.optimizer, x, range(2))
    assert fresh.optimizer.state[fresh.model.b.weight]["exp_avg"].shape == fresh.model.b.weight.shape


def test_options_of_groups_names_and_tensors_come_along() -> None:
    model, x, plan = residual()
    rate = torch.tensor(0.01)
    named = [*model.named_parameters()]
    groups = [{"params": named[:3], "lr": rate, "note": "stem"}, {"params": named[3:], "betas": (0.5, 0.6)}]
    optimizer = optim.Adam(groups, foreach=False)
    train(model, optimizer, x, range(2))
    new = apply(model, plan, optimizer=optimizer).optimizer
    for ours, theirs in zip(new.param_groups, optimizer.param_groups):
        options = [{key: value for key, value in group.items() if key != "params"} for group in (ours, theirs)]
        assert options[0] == options[1]
    assert new.param_groups[0]["lr"] is not rate
    assert new.param_groups[0]["param_names"] == [name for name, _ in named[:3]]
    new.add_param_group({"params": [("more", nn.Parameter(torch.ones(2)))]})
    assert len(optimizer.param_groups) == 2


def test_hooks_and_closures_serve_the_new_optimizer() -> None:
    class Counting(optim.SGD):
        def count(self, *_: Any) -> None:
            self.steps = getattr(self, "steps", 0) + 1

    class Log(list[optim.Optimizer]):
        def note(self, which: optim.Optimizer, *_: Any) -> None:
            self.append(which)

    model, x, plan = residual()
    optimizer, stepped = Counting(model.parameters(), 0.1), Log()
    optimizer.register_step_post_hook(stepped.note)
    optimizer.register_step_pre_hook(optimizer.count)
    cut = apply(model, plan, optimizer=optimizer)

    def closure() -> Tensor:
        cut.optimizer.zero_grad()
        loss = cut.model(x).square().sum()
        loss.backward()
        return loss.detach()

    assert cut.optimizer.step(closure) != cut.optimizer.step(closure)
    assert [which is cut.optimizer for which in stepped] == [True, True]
    assert (cut.optimizer.steps, hasattr(optimizer, "steps")) == (2, False)


def test_momentum_keeps_the_memory_format_of_its_weight() -> None:
    model, x, plan = residual()
    model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, x, range(2))
    cut = apply(model, plan, optimizer=optimizer)
    for parameter, held in cut.optimizer.state.items():
        assert held["momentum_buffer"].stride() == parameter.stride()
    assert not cut.model.b.weight.is_contiguous()


def test_a_state_that_was_computed_with_gradients_is_carried_without_them() -> None:
    model, x, plan = residual()
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9, foreach=False)
    train(model, optimizer, x, range(2))
    for parameter, held in optimizer.state.items():
        held["momentum_buffer"] = held["momentum_buffer"] + parameter  # as with `differentiable`
    new = apply(model, plan, optimizer=optimizer).optimizer
    assert len(new.state) == len(optimizer.state) == len(list(model.parameters()))
    assert not any(held["momentum_buffer"].requires_grad for held in new.state.values())


def test_muon_is_carried() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)), torch.randn(5, 4)
    plan = Plan(find_groups(model, x), ((0, 2, 3, 7),))
    optimizer = optim.Muon(model.parameters())
    train(model, optimizer, x, range(2))
    cut = apply(model, plan, optimizer=optimizer)
    buffer = optimizer.state[model[2].weight]["momentum_buffer"]
    assert torch.equal(cut.optimizer.state[cut.model[2].weight]["momentum_buffer"], buffer[:, [0, 2, 3, 7]])
    train(cut.model, cut.optimizer, x, range(2))
    assert cut.model[2].weight.isfinite().all()


def test_an_optimizer_that_holds_another_is_carried_whole() -> None:
    model, x, plan = residual()
    optimizer = Lookahead(OPTIMIZERS["adamw"](model.parameters()), k=2)
    train(model, optimizer, x, range(3))
    cut, hand = apply(model, plan, optimizer=optimizer), apply(model, plan)
    theirs = Lookahead(OPTIMIZERS["adamw"](hand.parameters()), k=2)
    set_by_hand(theirs._base_optimizer, optimizer._base_optimizer, hand, model, plan)
    theirs.param_groups[0]["lookahead_step"] = 3
    train(cut.model, cut.optimizer, x, range(3, 6))
    train(hand, theirs, x, range(3, 6))
    assert cut.optimizer.param_groups is cut.optimizer._base_optimizer.param_groups
    assert same(tensors(cut.model), tensors(hand))


def schedulers() -> Iterator[tuple[str, Callable[[optim.Optimizer], Any]]]:
    s = lr_scheduler
    yield "lambda", lambda o: s.LambdaLR(o, lambda step: 0.9**step)
    yield "multiplicative", lambda o: s.MultiplicativeLR(o, lambda step: 0.9)
    yield "step", lambda o: s.StepLR(o, 2)
    yield "multistep", lambda o: s.MultiStepLR(o, [2, 6])
    yield "linear", lambda o: s.LinearLR(o, 0.1, total_iters=9)
    yield "exponential", lambda o: s.ExponentialLR(o, 0.8)
    yield "cosine", lambda o: s.CosineAnnealingLR(o, 9)
    yield "restarts", lambda o: s.CosineAnnealingWarmRestarts(o, 4)
    yield "one cycle", lambda o: s.OneCycleLR(o, 0.1, total_steps=20)
    yield "cyclic", lambda o: s.CyclicLR(o, 0.01, 0.1, step_size_up=3)
    yield "polynomial", lambda o: s.PolynomialLR(o, 9)
    yield "sequential", lambda o: s.SequentialLR(o, [s.ConstantLR(o, 0.1, 4), s.ExponentialLR(o, 0.9)], [4])
    yield "chained", lambda o: s.ChainedScheduler([s.ConstantLR(o, 0.1, 4), s.ExponentialLR(o, 0.9)])


@pytest.mark.parametrize("make", [make for _, make in schedulers()], ids=[name for name, _ in schedulers()])
def test_a_scheduler_is_copied_onto_the_new_optimizer(make: Callable[[optim.Optimizer], Any]) -> None:
    model, x, plan = residual()
    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scheduler = make(optimizer)
    for step in range(3):
        train(model, optimizer, x, range(step, step + 1))
        scheduler.step()
    weights = copy.deepcopy(model.state_dict())
    cut = apply(model, plan, optimizer=optimizer)
    then = copy.deepcopy(scheduler, {id(optimizer): cut.optimizer})
    rates: list[list[float]] = [[], []]
    for step in range(3, 8):
        train(cut.model, cut.optimizer, x, range(step, step + 1))
        then.step()
        rates[1].append(cut.optimizer.param_groups[0]["lr"])
    assert same(weights, model.state_dict())
    for step in range(3, 8):
        train(model, optimizer, x, range(step, step + 1))
        scheduler.step()
        rates[0].append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
