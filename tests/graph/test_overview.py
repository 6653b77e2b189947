"""What `print(groups)` says: costs of units, and for every reason what would free the axis."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import networks
from secateur.graph.advice import ADVICE, LOOKUPS, UNRULED, advice, taken_apart
from secateur.graph.groups import find_groups
from secateur.graph.overview import WIDTH
from secateur.graph.products import KERNEL
from secateur.graph.rules import RULES
from sources import PACKAGE

IMAGE = torch.zeros(1, 3, 32, 32)


def reasons_given() -> Iterator[str]:
    """The reason at each place in the room that freezes units, as far as it is written out there."""
    for path in (PACKAGE / "graph").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "freeze"
            if is_call:
                yield from texts(node.args[-1])
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reason":
                yield from texts(node.value)


def texts(node: ast.expr) -> Iterator[str]:
    """The text of a string, or how an f-string starts."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) else node
    if isinstance(first, ast.Constant) and isinstance(first.value, str):
        yield first.value


def test_there_is_advice_for_every_reason_that_is_given() -> None:
    given = set(reasons_given())
    assert len(given) >= 10
    assert "reaches the model's output" in given
    assert UNRULED in given
    assert [reason for reason in given if reason != KERNEL and not advice(reason).text] == []


def test_every_advice_is_for_a_reason_that_is_given() -> None:
    source = "".join(path.read_text() for path in (PACKAGE / "graph").glob("*.py") if path.name != "advice.py")
    assert [start for start, _, _ in ADVICE if start not in source] == []


@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: net.make.__name__)
def test_every_frozen_axis_comes_with_advice(net: networks.Net) -> None:
    groups = find_groups(networks.build(net), net.inputs())
    assert groups.frozen
    assert all(advice(frozen.reason).text for frozen in groups.frozen)
    lines = str(groups).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert all(any(group.name in line for line in lines) for group in groups.groups)


def test_reasons_are_taken_apart() -> None:
    found = taken_apart("an integer does not follow a cut of this axis (aten.view.default in a.b: '[4, (6)]' is wrong)")
    assert found.text == "an integer does not follow a cut of this axis"
    assert (found.op, found.module, found.error) == ("view", "a.b", "'[4, (6)]' is wrong")
    assert taken_apart("a cut model stops before this: no (luck)").error == "no (luck)"
    found = taken_apart("the op's rule does not fit this call: index 4: too large (aten.cat.default in a)")
    assert (found.op, found.module, found.error) == ("cat", "a", "index 4: too large")
    assert "the rule of `cat`" in advice("the op's rule does not fit this call: no (aten.cat.default in a)").text
    assert taken_apart("meets it (aten._to_copy.default in the model itself)").op == "to_copy"


def test_ops_with_and_without_a_rule_are_told_apart() -> None:
    reason = UNRULED + " (aten.{}.default in block)"
    assert "add a line for `frobnicate` to graph/rules.py" in advice(reason.format("frobnicate")).text
    assert advice(reason.format("frobnicate")).possible
    assert "tells the indices along this axis apart" in advice(reason.format("embedding")).text
    assert not advice(reason.format("embedding")).possible
    assert "write it in another way" in advice(reason.format("view")).text
    assert LOOKUPS & set(RULES)


def test_what_cannot_change_is_listed_with_what_would_free_it() -> None:
    class Stuck(nn.Module):
        """An op without a rule, one whose strides nothing can replay, a look-up, and indices that nothing reads."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
            self.table, self.free = nn.Embedding(9, 8), nn.Linear(6, 6)
            self.long = nn.Parameter(torch.zeros(10, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.free(torch.cdist(self.a(x), x.new_zeros(2, 6, 6)))
            x = self.b(x) + self.long[x.shape[1] :] + self.table(torch.zeros(2, 5, dtype=torch.long))
            return self.d(self.c(x).as_strided((2, 5, 7), (35, 7, 1)))

    groups = find_groups(Stuck().eval(), torch.zeros(2, 5, 4))
    assert [group.size for group in groups.groups] == [8, 6]
    text = " ".join(str(groups).split())
    for line in (
        "no rule accounts for (cdist_forward in the model itself) a.weight axis 0, a.bias axis 0 "
        "to free it: add a line for `cdist_forward` to graph/rules.py",
        "(as_strided in the model itself) c.weight axis 0, c.bias axis 0, d.weight axis 1 to free it: write that size",
        "The error: ",
        "long axis 0 to free it: give example inputs that use them",
        "(embedding in table) table.weight axis 0 nothing frees it: `embedding` tells the indices",
        "d.weight axis 0, d.bias axis 0 nothing frees it: the caller reads it.",
    ):
        assert line in text, text
    assert text.rindex("to free it:") < text.index("nothing frees it:")


def test_alike_groups_are_one_line_and_the_most_expensive_come_first() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    groups = find_groups(nn.Sequential(nn.Linear(2, 4), Block(), Block(), Block(), nn.Linear(4, 2)), torch.zeros(1, 2))
    assert [group.name for group in groups.groups] == ["0", "1.up", "2.up", "3.up"]
    lines = str(groups).splitlines()
    assert lines[0] == "4 groups, 28 units; with them can shrink"
    first = next(i for i, line in enumerate(lines) if line.endswith("one unit costs"))
    assert lines[first + 1 : lines.index("", first)] == [
        "units  params  MACs  bytes  group + other modules that it is cut from",
        "    4      56    52    224  0 + 1.up, 1.down, 2.up, 2.down, 3.up, 3.down, 4",
        "3 x 8       9     8     36  *.up + *.down",
    ]


def test_a_long_list_of_modules_is_cut_off_at_the_width_of_the_page() -> None:
    net = nn.Sequential(nn.Linear(2, 4), *(nn.Linear(4, 4) for _ in range(40)), nn.Linear(4, 2))
    for layer in range(1, 41):
        net[layer].weight = net[1].weight
    lines = str(find_groups(net, torch.zeros(1, 2))).splitlines()
    assert any(line.endswith(" more") for line in lines)
    assert max(map(len, lines)) <= WIDTH


def test_inexact_groups_are_marked_and_explained() -> None:
    net = next(n for n in networks.NETWORKS if n.make is networks.Norms)
    text = str(find_groups(networks.build(net), net.inputs()))
    assert "b * + " in text
    assert "* the result is a statistic over these units" in text


def test_a_group_of_one_unit_is_listed_as_one_that_stays() -> None:
    text = str(find_groups(nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 2)), torch.zeros(1, 4)))
    assert "one unit costs" not in text
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelShuffle(2), nn.Conv2d(1, 2, 1))
    text = str(find_groups(net, IMAGE))
    assert text.startswith("0 groups, 0 units\n")
    assert "groups of one unit" in text
