"""Latency tables: what is timed, what is read off them, and that they survive on disk."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.graph.costs import Product
from secateur.graph.groups import find_groups
from secateur.graph.records import Groups
from secateur.measure import measure_table as room
from secateur.measure.latency import latency
from secateur.measure.layers import Alone, Layer
from secateur.measure.measure_table import likely_widths, measure_table
from secateur.measure.runtimes import compiled, eager, onnx_runtime
from secateur.measure.table import Check, Conditions, Fit, LatencyTable, LayerTimes, TimedCall

CONDITIONS = Conditions("eager", "eager", "cpu", "test", 1, 2, "float32", "2", 10.0, 0.001)
PLAIN = (0.0,) * 5
EVEN = (1.0,) * 5


class Mixed(nn.Module):
    """Two equal convolutions, one of a single pixel, depthwise, grouped and transposed ones, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 32, 1, groups=4)
        self.up = nn.ConvTranspose2d(32, 8, 2, stride=2)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(8 * 256, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.depth(self.c(self.b(F.relu(self.a(x)))))
        return self.head(self.up(self.grouped(x)).flatten(1))


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, Tensor, Groups]:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 3, 8, 8)
    return model, x, find_groups(model, x)


def by_work(calls, turns, device):
    """In place of a clock: the numbers that a call reads and writes."""

    def work(module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
        out = module(*inputs)
        return float(sum(t.numel() for t in (*module.operands(inputs), out)))

    return [[work(module, inputs)] * turns for module, inputs in calls]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_by_turns", by_work)


@pytest.mark.usefixtures("counted")
def test_each_layer_is_timed_once_at_all_its_widths(mixed) -> None:
    model, x, groups = mixed
    table = measure_table(model, x, groups, turns=1)
    assert [call.module for call in table.calls] == ["stem", "a", "b", "c", "depth", "grouped", "up", "head"]
    assert table.calls[1].layer == table.calls[2].layer
    assert len(table.layers) == 7
    stem, inner = (table.layers[call.layer] for call in table.calls[:2])
    assert (stem.sizes, stem.widths) == ((16,), ((4, 8, 16),))
    assert (inner.sizes, inner.widths) == ((16, 16), ((4, 8, 16), (4, 8, 16)))
    # Images of 2 x 8 x 8, read with 4 and written with 8 channels, and the weights; relu's two numbers are taken off.
    assert inner.at(np.array([[4, 8]])) + 2 in [128 * 12 + 9 * 32 + 4, 128 * 12 + 9 * 32 + 8]
    assert table.units == groups.offsets[-1]


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_lengths_are_those_of_the_cut_model(mixed, share) -> None:
    model, x, groups = mixed
    table = measure_table(model, x, groups, turns=1)
    keep = [range(max(1, round(group.size * share))) for group in groups.groups]
    lengths = table.clock.lengths(groups.stays(keep))
    shapes = groups.shapes(keep)
    for number in (0, 1, 2):
        call = table.calls[number]
        asked = [int(n) for n in lengths[table.clock.calls[number]]]
        assert sorted(asked) == sorted(n for n in shapes[f"{call.module}.weight"][:2] if n not in (3, 5))


@pytest.mark.usefixtures("counted")
def test_what_is_written_is_counted(mixed) -> None:
    model, x, groups = mixed
    table = measure_table(model, x, groups, turns=1)
    # The norm and two activations, on 2 x 16 x 8 x 8: views and convolutions are not among them.
    assert sum(p.constant * len(p.axes[0]) for p in table.written) == 3 * 2 * 16 * 64


def test_widths_off_the_step_are_timed(mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[tuple[int, ...]] = set()

    def note(calls, turns, device):
        asked.update(
            tuple(module.static[1].shape[:2]) for module, _ in calls if module.op is torch.ops.aten.convolution.default
        )
        return by_work(calls, turns, device)

    monkeypatch.setattr(room, "_by_turns", note)
    model, x, groups = mixed
    measure_table(model, x, groups, turns=1)
    assert {(16, 12), (16, 14), (16, 15), (12, 16), (14, 16), (15, 16)} <= asked


def layer(ms: tuple[float, ...], pulls=(PLAIN, PLAIN), slower=(EVEN, EVEN)) -> LayerTimes:
    widths = ((8, 16, 64), (16, 64))
    return LayerTimes("convolution", (), (64, 64), (1, 1), widths, False, ms, pulls, slower, ())


def test_between_the_measured_widths_time_is_linear() -> None:
    times = layer((1.0, 3.0, 2.0, 4.0, 8.0, 10.0))
    found = times.at(np.array([[8, 16], [12, 16], [40, 40], [64, 64], [1, 1]]))
    assert found.tolist() == [1.0, 1.5, 5.0 + 1.0, 10.0, 1.0]


def test_a_width_counts_as_rounded_up_or_as_another_kernels() -> None:
    times = layer((1.0, 1.0, 2.0, 2.0, 8.0, 8.0), pulls=((0.0, 1.0, 0.5, 0.0, 1.0), PLAIN))
    eight, four, two, odd = times.at(np.array([[24, 64], [28, 64], [30, 64], [31, 64]]))
    linear = {n: 2.0 + 6.0 * (n - 16) / 48 for n in (28, 30, 32)}
    assert (eight, odd) == (linear[32], linear[32])
    assert (four, two) == (linear[30], linear[30])
    dear = layer((1.0, 1.0, 2.0, 2.0, 8.0, 8.0), slower=((1.0, 1.0, 1.0, 1.0, 3.0), (1.0, 1.0, 1.0, 1.0, 2.0)))
    assert dear.at(np.array([[63, 63], [64, 63], [64, 64]])).tolist() == [3 * (2 + 6 * 47 / 48), 16.0, 8.0]


def by_hand(joint: bool = False) -> LatencyTable:
    """Groups of 64 and 64 units: a layer that reads the first and writes the second, one of the first, one of none."""
    fit, one, two = Fit(2.0, 1e6, 5.0), tuple(range(64)), tuple(range(64, 128))
    pair = layer((1.0, 3.0, 2.0, 4.0, 8.0, 10.0))
    single = dataclasses.replace(pair, sizes=(64,), repeats=(1,), widths=((32, 64),), ms=(1.0, 2.0))
    single = dataclasses.replace(single, pulls=(PLAIN,), slower=(EVEN,))
    fixed = dataclasses.replace(pair, sizes=(), repeats=(), widths=(), ms=(7.0,), pulls=(), slower=())
    both = dataclasses.replace(pair, widths=((50, 100),), joint=True, ms=(3.0, 6.0))
    layers = (pair, single, fixed, both) if joint else (pair, single, fixed)
    calls = [TimedCall("pair", 0, (one, two)), TimedCall("single", 1, (one,)), TimedCall("fixed", 2, ())]
    calls += [TimedCall("both", 3, (one, two))] if joint else []
    return LatencyTable(CONDITIONS, 128, layers, tuple(calls), (Product("", 2, (one,)),), fit, (Check(1.0, 3.0, 3.1),))


def stays(first: int, second: int) -> np.ndarray:
    return np.array([*(i < first for i in range(64)), *(i < second for i in range(64)), True])


@pytest.mark.parametrize("joint", [False, True])
def test_the_prediction_is_the_fit_over_the_layers(joint: bool) -> None:
    table = by_hand(joint=joint)
    pair, single, fixed = 8.0, 1.5, 7.0
    both = 6.0 * np.sqrt(0.75) if joint else 0.0
    assert table.predict(stays(48, 64)) == pytest.approx(2 * (pair + single + fixed + both) + 2 * 48 + 5)
    assert table.whole_ms == pytest.approx(2 * (10.0 + 2.0 + 7.0 + (6.0 if joint else 0.0)) + 2 * 64 + 5)


@pytest.mark.parametrize("joint", [False, True])
def test_a_curve_is_the_same_as_asking_one_by_one(joint: bool) -> None:
    table, clock = by_hand(joint=joint), by_hand(joint=joint).clock
    lengths = np.array([clock.lengths(stays(n, 40)) for n in range(1, 65)])
    changing = (lengths != lengths[0]).any(0)
    assert np.allclose(clock.curve(changing)(lengths), [table.predict(stays(n, 40)) for n in range(1, 65)])
    assert np.allclose(clock.curve(changing & False)(lengths[:1]), clock.ms(lengths[:1]))


def test_falls_are_the_differences_of_lengths() -> None:
    clock = by_hand().clock
    step_of = np.array([*np.repeat([0, 1, -1, 2], 16), *[3] * 64, -1])
    falls = clock.falls(step_of, 4)
    whole = clock.lengths(stays(64, 64))
    for step, row in enumerate(falls):
        assert (whole - clock.lengths(step_of != step) == row).all()


def test_a_table_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="a model with 128 units, and the plan's has 3"):
        by_hand().predict(np.ones(4, np.bool_))


def test_other_groups_are_refused(mixed) -> None:
    model, x, groups = mixed
    with pytest.raises(PlanError, match="the groups are not those of this model on these inputs"):
        measure_table(model, x[:1], groups)


def test_json_round_trip(mixed) -> None:
    model, x, groups = mixed
    for table in (by_hand(joint=True), measure_table(model, x, groups, turns=1, threads=1)):
        again = LatencyTable.from_json(json.loads(json.dumps(table.to_json())))
        assert again == table
        assert again.whole_ms == table.whole_ms


def test_the_conditions_are_written_down(mixed) -> None:
    model, x, groups = mixed
    found = measure_table(model, x, groups, turns=1, threads=1).conditions
    assert (found.runtime, found.layers, found.device, found.threads) == ("eager", "eager", "cpu", 1)
    assert (found.batch, found.dtype, found.torch) == (2, "float32", torch.__version__)
    assert found.copied_gb_s > 0.1


def test_the_model_is_left_as_found(mixed) -> None:
    model, x, groups = mixed
    before, training = {k: v.clone() for k, v in model.state_dict().items()}, model.train().training
    measure_table(model, x, groups, turns=1)
    assert model.training == training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("rates", [(1.5, 300.0, 40.0), (0.7, 0.0, 2.0)])
def test_the_fit_finds_the_rates_in_spite_of_an_odd_timing(mixed, monkeypatch: pytest.MonkeyPatch, rates) -> None:
    model, x, groups = mixed
    plain = measure_table(model, x, groups, turns=1)
    truth = dataclasses.replace(plain, fit=Fit(*rates))

    def timed(models, *_):
        sizes = [{n: tuple(t.shape) for n, t in m.named_parameters()} for m in models]
        keeps = [[range(_left(group, found)) for group in groups.groups] for found in sizes]
        ms = [truth.predict(groups.stays(keep)) for keep in keeps]
        ms[2] *= 3
        return [(None, [value]) for value in ms]

    monkeypatch.setattr(room, "_time", timed)
    found = measure_table(model, x, groups, turns=1).fit
    assert (found.scale, found.per_million, found.constant) == pytest.approx(rates, rel=1e-3, abs=1e-3)


def _left(group, shapes) -> int:
    slot = next(slot for slot in group.slots if slot.tensor in shapes)
    return shapes[slot.tensor][slot.dim] // len(slot.index[0])


@pytest.mark.parametrize("runtime", [eager, compiled, onnx_runtime])
@pytest.mark.filterwarnings("ignore")
def test_every_runtime_computes_what_the_model_does(mixed, runtime) -> None:
    model, x, _ = mixed
    with torch.inference_mode(False), torch.no_grad():
        found = runtime(model, x)(x)
    found = found[0] if isinstance(found, tuple) else found
    assert torch.allclose(found, model(x), atol=1e-4)
    assert latency(runtime(model, x), x, runs=2, warmup=1).median_ms > 0


def alone(op, args, operands) -> Layer:
    return Layer(op, args, (), operands, (), ())


def test_a_layer_in_onnx_computes_what_the_op_does(mixed) -> None:
    model, x, groups = mixed
    trace_layers: list[Layer] = []
    original = room._alone

    def note(layers, *rest):
        trace_layers.extend(layers)
        return original(layers, *rest)

    room._alone, kept = note, room._alone
    try:
        measure_table(model, x, groups, turns=1)
    finally:
        room._alone = kept
    assert len(trace_layers) == 7
    for found in trace_layers:
        module, inputs = found.alone(found.sizes, torch.device("cpu"))
        with torch.no_grad():
            assert torch.allclose(onnx_runtime(module, inputs)(*inputs)[0], module(*inputs), rtol=1e-4)
            assert isinstance(module, Alone)


@pytest.mark.parametrize("units", [1, 2, 3, 10, 16, 40, 64, 100, 512, 2048])
def test_likely_widths_end_in_the_whole(units: int) -> None:
    widths = likely_widths(units)
    assert widths[-1] == units
    assert all(low < high for low, high in itertools.pairwise((0, *widths)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm, self.b = nn.Linear(4, 8), nn.LSTM(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.lstm(self.a(x))[0])


def test_what_cannot_be_timed_alone_is_part_of_the_rest() -> None:
    model, x = Recurrent().eval(), torch.randn(3, 2, 4)
    table = measure_table(model, x, find_groups(model, x), turns=1)
    assert [call.module for call in table.calls] == ["a", "b"]
    assert table.whole_ms > 0
