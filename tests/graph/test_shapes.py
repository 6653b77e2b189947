"""What `QuickFakes` does at once is what torch's own mode makes, and what is not plain is left to it."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.graph.shapes import FORMULAS, KERNELS, QuickFakes
from secateur.graph.twin import duplicate

CALLS = (
    lambda x, y: F.conv2d(x, x.new_zeros(8, 2, 3, 3), x.new_zeros(8), (2, 1), (1, 0), 1, 2),
    lambda x, y: F.conv_transpose2d(x, x.new_zeros(4, 2, 3, 3)),
    lambda x, y: F.batch_norm(x, y, y, y, y),
    lambda x, y: F.batch_norm(x, y, y, training=True),
    lambda x, y: F.batch_norm(x, None, None, y, y, training=True),
    lambda x, y: F.layer_norm(x, (6, 5), x[0, 0]),
    lambda x, y: F.linear(x, x.new_zeros(7, 5), x.new_zeros(7)),
    lambda x, y: F.linear(x.flatten(1), x.new_zeros(7, 120), x.new_zeros(7)),
    lambda x, y: torch.cat([x, x[:, :1]], 1).relu_().add_(1),
    lambda x, y: torch.cat([x, x.new_zeros(0)], 1),
    lambda x, y: x * y[:, None, None] + x.mean((2, 3), keepdim=True) - 2.5,
    lambda x, y: x.mean(1, dtype=torch.float64) / 3,
    lambda x, y: F.gelu(x.permute(0, 2, 3, 1)).contiguous().view(2, -1).unbind(),
    lambda x, y: (x.to(memory_format=torch.channels_last) + 1).sigmoid(),
    lambda x, y: x.double() * x,
    lambda x, y: x * torch.tensor(2.0),
    lambda x, y: torch.arange(4) / 2,
    lambda x, y: F.max_pool2d(x, 2).softmax(1).split(1, 1),
    lambda x, y: (x > 0) * x.pow(2),
    lambda x, y: y.expand(3, 4) @ y[:, None],
)

WRONG = (
    lambda x, y: F.conv2d(x, x.new_zeros(8, 3, 3, 3)),
    lambda x, y: F.batch_norm(x, y[:2], y[:2]),
    lambda x, y: F.layer_norm(x, (4, 5)),
    lambda x, y: x + y,
    lambda x, y: torch.cat([x, x[:1]], 1),
    lambda x, y: x.view(7, -1),
    lambda x, y: torch.addmm(y, x[0, 0], x[0, 0]),
    lambda x, y: x[:, :1].mul_(x),
)


class Seen(TorchDispatchMode):
    """Notes what each op makes: its shape, strides, dtype and device."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.made.append((str(func), tensor.shape, tensor.stride(), tensor.dtype, tensor.fake_device))
        return result


def made(mode, call):
    with mode, torch.no_grad(), Seen() as seen:
        call(torch.zeros(2, 4, 6, 5), torch.zeros(4))
    return seen.made


@pytest.mark.parametrize("call", CALLS)
def test_every_op_makes_what_torch_makes(call):
    assert made(QuickFakes(), call) == made(FakeTensorMode(), call)


def error(mode, call):
    try:
        made(mode, call)
    except (RuntimeError, ValueError) as stopped:
        return f"{type(stopped).__name__}: {stopped}"
    return ""


@pytest.mark.parametrize("call", WRONG)
def test_errors_are_torchs_own(call):
    own = error(FakeTensorMode(), call)
    assert own
    assert error(QuickFakes(), call) == own


def test_a_new_tensor_is_what_torch_would_make():
    mode = QuickFakes()
    for like in (None, nn.Parameter(torch.zeros(3))):
        new = mode.new((3, 2), torch.float16, torch.device("cpu"), like)
        own = FakeTensor(mode, torch.empty(3, 2, dtype=torch.float16, device="meta"), torch.device("cpu"))
        noted = {name: value for name, value in vars(new).items() if name != "_is_param"}
        assert noted == vars(own)
        assert isinstance(new, nn.Parameter) is new.requires_grad is (like is not None)
        assert (new.shape, new.dtype, new.device) == (own.shape, own.dtype, own.device)


def test_the_table_is_used(monkeypatch):
    own = []
    torchs = FakeTensorMode.__torch_dispatch__

    def slow(self, func, *rest):
        own.append(func)
        return torchs(self, func, *rest)

    monkeypatch.setattr(FakeTensorMode, "__torch_dispatch__", slow)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 5))
    mode = QuickFakes()
    tensors = {id(t): mode.new(t.shape, t.dtype, t.device, t) for t in net.parameters()}
    tensors |= {id(t): mode.new(t.shape, t.dtype, t.device) for t in net.buffers()}
    with mode, torch.no_grad():
        duplicate(net, tensors).eval()(mode.new((2, 4, 6, 5), torch.float32, torch.device("cpu")))
    assert not set(own) & (set(FORMULAS) | KERNELS)


class Odd(nn.Module):
    """Holds what a copy must keep apart, together, or ask for."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(2, 2)
        self.again = self.part
        self.table = {"part": self.part, "sizes": [1, 2]}
        self.same = self.table
        self.order = OrderedDict(a=1)
        self.kept = torch.ones(2, requires_grad=True) * 2
        self.register_forward_hook(self.hook)

    def hook(self, module, args, output):
        return output

    def forward(self, x):
        return self.again(self.part(x))


class Own(nn.Linear):
    def __deepcopy__(self, memo):
        return Own(self.in_features, 1)


def test_a_duplicate_is_a_deep_copy():
    net = nn.Sequential(Odd(), Own(2, 3))
    twin = duplicate(net)
    odd, old = twin[0], net[0]
    assert odd is not old
    assert odd.part is odd.again is odd.table["part"]
    assert odd.table is odd.same
    assert all(a is not b for a, b in ((odd.part, old.part), (odd.kept, old.kept), (odd.table, old.table)))
    assert odd.table["sizes"] is not old.table["sizes"]
    assert odd.order == {"a": 1}
    assert next(iter(odd._forward_hooks.values())).__self__ is odd
    assert torch.equal(odd.kept, old.kept)
    assert twin[1].out_features == 1
    del net[0].kept
    assert all(list(vars(a)) == list(vars(b)) for a, b in zip(duplicate(net).modules(), copy.deepcopy(net).modules()))
