"""Duplicates: equal by construction, read once; and what looks like them and is not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks
from secateur.surgery.simplify import simplify


def check_same(model: nn.Module, smaller: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model).eval()(x), smaller.eval()(x))


class Embedded(nn.Module):
    """Token embeddings, tied with the layer that reads them or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(x)))


@pytest.mark.parametrize("tied", [False, True])
def test_columns_of_an_embedding(tied: bool) -> None:
    torch.manual_seed(0)
    model, x = Embedded(tied), torch.randint(0, 9, (2, 5))
    with torch.no_grad():
        model.tokens.weight[:, 1] = 0
        model.tokens.weight[:, 3] = model.tokens.weight[:, 2]
    smaller, record = simplify(model, x)
    assert record.count("dead units") == 1
    # Tied, the column that reads unit 2 also makes it: what it makes would change with what it reads.
    assert record.count("duplicate units") == (0 if tied else 1)
    assert smaller.tokens.weight.shape == (9, 5 if tied else 4)
    assert (smaller.head.weight is smaller.tokens.weight) == tied
    check_same(model, smaller, x)


def test_duplicates_that_one_tensor_makes_and_reads_stay() -> None:
    net = networks.NETWORKS[[n.make for n in networks.NETWORKS].index(networks.TiedTwice)]
    model = networks.build(net)
    with torch.no_grad():
        for tensor in (model.into.weight, model.into.bias, model.loop.weight, model.loop.bias):
            tensor[1] = tensor[0]
    _, record = simplify(model, net.inputs())
    assert record.found == ()


class Noisy(nn.Module):
    """Dropout that is never switched off: equal units get masks of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.5, training=True))


def test_dropout_that_stays_on_keeps_duplicates_and_constants() -> None:
    model, x = Noisy(), torch.randn(2, 4)
    with torch.no_grad():
        model.a.weight[:2] = 0
        model.a.weight[3], model.a.bias[3] = model.a.weight[2], model.a.bias[2]
        model.a.bias[0], model.a.bias[1] = 0, 1
    smaller, record = simplify(model, x)
    assert sum(item.count for item in record.found) <= 1
    assert record.count("duplicate units") == record.count("constant units") == 0
    assert smaller.a.out_features >= 5


def test_duplicates_through_dropout_that_is_off_in_eval_mode_go() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3)).train(), torch.randn(5, 4)
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = model[0].weight[2], model[0].bias[2]
    smaller, record = simplify(model, x)
    assert record.count("duplicate units") == 1
    assert smaller[1].training
    check_same(model, smaller, x)


def test_hidden_units_of_an_lstm() -> None:
    """What it computes from step to step counts as a reader."""
    torch.manual_seed(0)
    model, x = networks.Recurrent(), torch.randn(2, 5, 4)
    with torch.no_grad():
        model.out.weight[:, 1:3] = 0
        model.lstm.weight_hh_l0[:, 1] = 0  # neither the next layer nor the next step reads unit 1
    smaller, record = simplify(model, x)
    assert [(item.kind, item.count) for item in record.found] == [("dead units", 1)]
    assert record.left == ()
    assert smaller.lstm.hidden_size == 4
    check_same(model, smaller, x)


class QueriesKeys(nn.Module):
    """A product of two activations: equal units in it would have to count twice, and no weight says so."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).transpose(-2, -1) * 0.3).softmax(-1) @ self.v(x)


def test_duplicates_that_no_weight_reads_stay() -> None:
    torch.manual_seed(0)
    model, x = QueriesKeys(), torch.randn(2, 5, 4)
    with torch.no_grad():
        for layer in (model.q, model.k):
            layer.weight[1], layer.bias[1] = layer.weight[0], layer.bias[0]
    smaller, record = simplify(model, x)
    assert record.found == ()
    with torch.no_grad():
        model.k.weight[2] = model.k.bias[2] = 0
    smaller, record = simplify(model, x)
    assert record.count("dead units") == 1
    assert smaller.q.out_features == smaller.k.out_features == 5
    check_same(model, smaller, x)


def test_units_that_differ_in_one_weight_or_statistic_stay() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3)), torch.randn(2, 3, 7, 7)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        model[1].running_mean[1] = 1e-6
    assert simplify(model, x)[1].found == ()
    model[1].running_mean[1] = 0
    smaller, record = simplify(model, x)
    assert record.count("duplicate units") == 1
    check_same(model, smaller, x)


def test_copies_of_one_unit_are_all_read_by_the_first() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2)), torch.randn(3, 4)
    with torch.no_grad():
        model[0].weight[1:5], model[0].bias[1:5] = model[0].weight[0], model[0].bias[0]
        model[2].weight[3], model[2].bias[3] = model[2].weight[1], model[2].bias[1]
    columns = model[2].weight[:, :5].sum(1).detach()
    smaller, record = simplify(model, x)
    assert record.count("duplicate units") == 5
    assert smaller[2].weight.shape == (4, 2)
    torch.testing.assert_close(smaller[2].weight[:, 0].detach(), columns[[0, 1, 2, 4]])
    check_same(model, smaller, x)


def test_a_layer_that_reads_twice_takes_over_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y.relu()) + self.b(y.tanh())

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(3, 4)
    with torch.no_grad():
        model.a.weight[5], model.a.bias[5] = model.a.weight[2], model.a.bias[2]
    smaller, record = simplify(model, x)
    assert record.count("duplicate units") == 1
    check_same(model, smaller, x)


def test_duplicates_that_became_so_by_a_cut_go_in_the_next_round() -> None:
    """Two rows that differ only in the weight of a unit that is zero."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(3, 4)
    with torch.no_grad():
        model[0].weight[3] = model[0].bias[3] = 0
        model[2].weight[1], model[2].bias[1] = model[2].weight[0], model[2].bias[0]
        model[2].weight[1, 3] += 1
    smaller, record = simplify(model, x)
    assert (record.count("dead units"), record.count("duplicate units"), len(record.plans)) == (1, 1, 2)
    check_same(model, smaller, x)
