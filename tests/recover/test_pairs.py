"""Two convolutions solved together: the tangent, the step, and what is left of a model's error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import networks
import secateur as sc
from secateur.errors import PlanError
from secateur.recover import pairs, reconstruct
from secateur.recover.pairs import Convolution, Pair, Tangent
from solving import double, error, first_half, state

MAPS = Convolution((2, 1), (1, 1), (1, 1), 1), Convolution((1,), (0,), (1,), 2)


def weights(seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = ((4, 3, 3, 3), (4,), (6, 2, 1, 1), (6,))
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]


def sums(x: Tensor, w: list[Tensor]) -> Tensor:
    """S, with torch's own functions."""
    return F.conv2d(F.conv2d(x, w[0], w[1], (2, 1), 1).relu(), w[2], w[3], groups=2)


def problem(rectified: bool) -> tuple[Pair, list[Tensor]]:
    random = torch.Generator().manual_seed(7)
    x = torch.randn(5, 3, 6, 4, generator=random, dtype=torch.float64)
    targets = torch.randn(sums(x, weights(0)).shape, generator=random, dtype=torch.float64)
    return Pair(MAPS, x, 0.0, targets, rectified), weights(0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_the_tangent_is_the_derivative_and_its_transpose_is_adjoint() -> None:
    pair, at = problem(rectified=False)
    hidden = F.conv2d(pair.x, at[0], at[1], (2, 1), 1).relu()
    counts = (torch.rand_like(pair.targets) > 0.4).double()
    tangent = Tangent(MAPS, pair.x, hidden, counts, at, (True, True))
    change, values = weights(1), torch.randn_like(pair.targets)
    _, derivative = torch.func.jvp(lambda *w: sums(pair.x, list(w)), tuple(at), tuple(change))
    torch.testing.assert_close(tangent(change), derivative * counts)
    back = sum((a * b).sum() for a, b in zip(tangent.turned(values), change))
    torch.testing.assert_close((tangent(change) * values).sum(), back)
    still = Tangent(MAPS, pair.x, hidden, counts, at, (False, True)).turned(values)
    assert [bool(part.any()) for part in still] == [True, False, True, True]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_step_solves_the_linear_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "ROUNDS", 400)
    pair, at = problem(rectified=False)
    ridge, shapes = 0.1, [w.shape for w in at]

    def flat(w: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten() for part in w])

    def parted(v: Tensor) -> list[Tensor]:
        return [p.view(s) for p, s in zip(v.split([s.numel() for s in shapes]), shapes)]

    jacobian = torch.func.jacfwd(lambda v: sums(pair.x, parted(v)).flatten())(flat(at))
    hidden = F.conv2d(pair.x, at[0], at[1], (2, 1), 1).relu()
    places, reach = pair.targets[:, 0].numel(), at[2].square().sum() / 4 / 2
    scales = [reach * pair.x.square().mean(), reach, hidden.square().mean(), torch.ones(())]
    pulls = [places * s * r for s, r in zip(scales, (ridge, 1e-6, ridge, 1e-6))]
    pull = torch.cat([p.expand(s.numel()) for p, s in zip(pulls, shapes)])
    off = (sums(pair.x, at) - pair.targets).flatten()
    wanted = torch.linalg.solve(jacobian.T @ jacobian + pull.diag(), -jacobian.T @ off)
    found, before, after = pair.solve(at, (True, True), ridge, 1)
    step = flat(found) - flat(at)
    taken = next(k for k in (1, 2, 4, 8) if torch.allclose(step * k, wanted, atol=1e-8))
    assert after < before == pytest.approx(float(off.square().mean()))
    assert after == pytest.approx(float((sums(pair.x, found) - pair.targets).square().mean()))
    assert taken in (1, 2, 4, 8)


@pytest.mark.parametrize("free", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("seed", range(3))
def test_moments_make_a_few_rounds_do(monkeypatch: pytest.MonkeyPatch, free: tuple[bool, bool], seed: int) -> None:
    random, own = torch.Generator().manual_seed(seed), Convolution((1, 1), (1, 1), (1, 1), 1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    spread = torch.logspace(0, -1.5, 8, dtype=torch.float64)  # channels that are alike, and whose mean is not 0
    x = 2 + torch.einsum("nihw,i,io->nohw", drawn(48, 8, 6, 6), spread, drawn(8, 8))
    whole = [drawn(12, 8, 3, 3) / 9, drawn(12), drawn(6, 12, 3, 3) / 10, drawn(6)]
    targets = F.conv2d(F.conv2d(x, whole[0], whole[1], padding=1).relu(), whole[2], whole[3], padding=1)
    start = [w + 0.3 * w.std() * drawn(*w.shape) for w in whole]
    pair = Pair((own, own), x, 0.0, targets, rectified=False)
    found, before, after = pair.solve(start, free, 1e-4, 2)
    assert [torch.equal(found[i], start[i]) for i in (1, 3)] == [not f for f in free]
    monkeypatch.setattr(pairs.Moments, "step", lambda self, weight, offset: [weight, offset])
    _, _, without = pair.solve(start, free, 1e-4, 2)
    assert after < without / 3 < before / 9


@pytest.mark.parametrize("free", [(True, True), (False, False)])
def test_layers_that_take_in_nothing_are_left_as_they_are(free: tuple[bool, bool]) -> None:
    pair, at = problem(rectified=False)
    pair.x = torch.zeros_like(pair.x)
    at = [at[0], torch.zeros_like(at[1]), at[2], at[3]]
    found, before, after = pair.solve(at, free, 0.0, 1)
    assert all(w.isfinite().all() for w in found)
    assert after <= before
    assert torch.equal(found[0], at[0])
    assert torch.equal(found[3], at[3]) != free[1]


def test_below_a_rectifier_all_is_alike() -> None:
    pair, at = problem(rectified=True)
    found, before, after = pair.solve(at, (True, True), 0.01, 3)
    assert after < before == pytest.approx(float((sums(pair.x, at).relu() - pair.targets.relu()).square().mean()))
    lower = Pair(MAPS, pair.x, 0.0, torch.where(pair.targets < 0, pair.targets * 9, pair.targets), rectified=True)
    for one, other in zip(found, lower.solve(at, (True, True), 0.01, 3)[0]):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: net.make.__name__)
def test_no_pair_has_a_larger_error_than_before(net: networks.Net) -> None:
    model, x = double(net)
    plan = first_half(sc.find_groups(model, x))
    smaller, before = sc.apply(model, plan), state(model)
    for each in sc.reconstruct(model, smaller, plan, [x], positions=None, together=1):
        assert each.after <= each.before * (1 + 1e-9) + 1e-12
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def block(norm: bool) -> tuple[nn.Module, Tensor, sc.Plan]:
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(12), nn.ReLU()] if norm else [nn.ReLU()]
    end = [nn.BatchNorm2d(5)] if norm else []
    layers = [nn.Conv2d(3, 12, 3), *middle, nn.Conv2d(12, 5, 3, bias=not norm), *end, nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(80, 4)).double()
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    model.train()(x)
    groups = sc.find_groups(model.eval(), x)
    keep = tuple(tuple(range(4 if group.size == 12 else group.size)) for group in groups.groups)
    return model, x, sc.Plan(groups, keep)


@pytest.mark.parametrize("norm", [True, False])
def test_together_is_better_than_one_by_one(norm: bool) -> None:
    model, x, plan = block(norm)
    smaller = {steps: sc.apply(model, plan) for steps in (0, 1, 3)}
    left = {}
    for steps, each in smaller.items():
        solved = sc.reconstruct(model, each, plan, x.split(16), positions=None, ridge=1e-3, together=steps)
        left[steps] = error(model[:-2], each[:-2], x)  # what the pair gives
        assert [" and " in layer.layer for layer in solved].count(True) == bool(steps)
    assert left[3] < left[1] < 0.9 * left[0]
    if norm:  # statistics are those of what the layers now give
        for conv, bn in ((0, 1), (3, 4)):
            given = smaller[3][: conv + 1](x)
            torch.testing.assert_close(smaller[3][bn].running_mean, given.mean((0, 2, 3)))
            torch.testing.assert_close(smaller[3][bn].running_var, given.transpose(0, 1).flatten(1).var(1))


@pytest.mark.parametrize(("sizes", "held"), [((16,) * 4, 8), ((40, 24), 1), ((64,), 0)])
def test_how_inputs_are_batched_does_not_matter(sizes: tuple[int, ...], held: int) -> None:
    model, x, plan = block(norm=True)
    one, other = sc.apply(model, plan), sc.apply(model, plan)
    options: dict[str, Any] = {"positions": None, "together": 2}
    sc.reconstruct(model, one, plan, [x], **options)
    sc.reconstruct(model, other, plan, x.split(sizes), held=held, **options)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_steps_that_cannot_be_taken_are_refused() -> None:
    model, x, plan = block(norm=True)
    with pytest.raises(PlanError, match="together is -1; give a number of steps"):
        sc.reconstruct(model, sc.apply(model, plan), plan, [x], together=-1)
    masks = sc.find_masks(model, 0.5)
    with pytest.raises(PlanError, match="behind masks layers are solved one by one"):
        sc.reconstruct(model, model, masks, [x], together=1)


def test_what_fails_in_the_second_pass_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, plan = block(norm=True)
    smaller = sc.apply(model, plan)
    before = state(smaller)

    def fail(*_: object) -> None:
        raise MemoryError("full")

    monkeypatch.setattr(reconstruct, "solve_pair", fail)
    with pytest.raises(MemoryError, match="full"):
        reconstruct.reconstruct(model, smaller, plan, [x], together=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in smaller.state_dict().items())
