"""A model is run on a copy: what it caches, writes and holds is as before, and its weights are not copied for it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secateur.graph.capture import capture
from secateur.graph.twin import Untouched, Writing


class Normalised(nn.Module):
    """Keeps its weights at length 1, as cosine classifiers do, and decides by values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            self.weight.data.div_(self.weight.norm())
        return x @ self.weight.T


def test_weights_that_a_forward_pass_changes_are_left_as_they_were() -> None:
    net = Normalised()
    trace = capture(net, torch.ones(1, 2))
    assert net.weight.tolist() == [[3.0, 4.0]]
    assert [str(call.op) for call in trace.calls].count("aten.div_.Tensor") == 1
    assert not trace.fake


def test_a_run_on_values_reads_the_weights_where_they_are() -> None:
    seen: list[int] = []
    net = nn.Linear(2, 2)
    net.register_forward_pre_hook(lambda module, _: seen.append(module.weight.data_ptr()))
    capture(net, torch.ones(1, 2), fake=False)
    assert seen == [net.weight.data_ptr()]


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: x.view(-1)[:1].zero_(),
        lambda x: torch.abs(torch.full((2,), -3.0), out=x),
        lambda x: torch._foreach_mul_([x], 2.0),
    ],
)
def test_a_write_is_stopped_before_it_is_done(write: Callable[[Tensor], object]) -> None:
    held, other = torch.ones(2), torch.ones(2)
    with Untouched([held]), pytest.raises(Writing, match=r"^$"):
        write(held)
    assert held.tolist() == [1, 1]
    with Untouched([held]):
        write(other)
    assert other.tolist() != [1, 1]


def caching() -> nn.Module:
    """A model with a cached function of its own, made with it and not on import."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)
            self.table = functools.lru_cache(lambda n: torch.arange(n, dtype=torch.float32))

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) + self.table(x.shape[1])

    return Net()


def test_caches_hold_nothing_of_ours_though_functions_come_and_go() -> None:
    for _ in range(3):  # the first is gone when the second, of the same kind, is met
        net, x = caching(), torch.randn(2, 3)
        expected = net(x)
        capture(net, x)
        assert net.table.cache_info().currsize == 0
        assert torch.equal(net(x), expected)
        del net
