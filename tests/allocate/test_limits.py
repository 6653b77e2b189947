"""Limits: which counts they leave, by themselves and by pattern, and what is refused."""

from __future__ import annotations

import functools
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import networks
from secateur.allocate.ladder import build
from secateur.allocate.limits import Limits
from secateur.allocate.plan import allocate
from secateur.allocate.uniform import Uniform
from secateur.errors import PlanError, UnknownName
from secateur.graph.groups import find_groups
from secateur.score.scoring import Scores


@functools.cache
def scores(*sizes: int) -> Scores:
    """A chain of linear layers whose groups, "0", "1" and so on, have these sizes; later units score higher."""
    widths = [3, *sizes, 2]
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    groups = find_groups(model, torch.zeros(1, 3))
    assert [group.size for group in groups.groups] == list(sizes)
    return Scores(groups, tuple(torch.arange(size, dtype=torch.float64) for size in sizes))


def counts(found: Scores, share: float, limits: Limits) -> list[int]:
    return [len(units) for units in allocate(found, Uniform(share), limits=limits).keep]


@settings(deadline=None, max_examples=100)
@given(
    st.integers(2, 40), st.integers(1, 45), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1, exclude_max=True)
)
def test_what_stays_is_the_least_that_the_limits_allow(size, least, multiple, cap, share):
    """By definition, from all counts."""
    allowed = [
        n
        for n in range(1, size + 1)
        if n == size or (n >= least and n % multiple == 0 and size - n <= size * cap + 1e-9)
    ]
    wanted = min(n for n in allowed if n >= size - int(size * share))
    assert counts(scores(size), share, Limits(least=least, multiple=multiple, cap=cap)) == [wanted]


def test_limits_by_pattern_and_the_last_that_matches_holds():
    found = scores(20, 20, 20)
    assert counts(found, 0.9, Limits(least={"0": 5, "2": 7})) == [5, 2, 7]
    assert counts(found, 0.9, Limits(least={"*": 5, "1": 3})) == [5, 3, 5]
    assert counts(found, 0.9, Limits(least={"1": 3, "*": 5})) == [5, 5, 5]
    assert counts(found, 0.9, Limits(multiple={"[01]": 8})) == [8, 8, 2]
    assert counts(found, 0.9, Limits(cap={"2": 0.25})) == [2, 2, 15]


def test_a_share_that_is_a_whole_number_of_units_is_one():
    assert counts(scores(100), 0.9, Limits(cap=0.29)) == [71]


def test_tied_groups_keep_the_same_count_and_of_other_sizes_the_same_share():
    found = scores(12, 12, 18)
    # 12 and 18 have 6 pieces of 2 and 3 in common.
    assert counts(found, 0.4, Limits(least={"1": 9}, tied=["[01]"])) == [9, 9, 11]
    assert counts(found, 0.4, Limits(tied=[["1", "2"]])) == [8, 8, 12]
    assert counts(found, 0.4, Limits(multiple={"0": 5}, tied=[["0", "1"], ["1", "2"]])) == [10, 10, 15]
    assert counts(found, 0.9, Limits(keep=["0"], tied=["*"])) == [12, 12, 18]
    assert counts(scores(7, 9), 0.9, Limits(tied=["*"])) == [7, 9]


def test_tied_groups_lose_their_own_lowest_units_in_one_step():
    found = scores(4, 4)
    found = Scores(found.groups, (torch.tensor([3.0, 0, 2, 1]).double(), torch.tensor([5.0, 6, 7, 8]).double()))
    ladder = build(found, Limits(tied=["*"]))
    assert ladder.values.tolist() == [0 + 5, 1 + 6, 2 + 7]
    assert ladder.step_of.tolist() == [-1, 0, 2, 1, 0, 1, 2, -1, -1]
    assert [ladder.counts(ladder.rope_of * 0 + range(3) < n) for n in range(4)] == [(4, 4), (3, 3), (2, 2), (1, 1)]


def test_a_multiple_makes_steps_of_several_units():
    ladder = build(scores(10), Limits(multiple=4))
    assert ladder.units.tolist() == [2, 4]
    assert ladder.values.tolist() == [0 + 1, 2 + 3 + 4 + 5]


def test_groups_are_named_by_what_makes_them_too():
    model = networks.build(networks.NETWORKS[1])
    groups = find_groups(model, networks.image()())
    found = Scores(groups, tuple(torch.zeros(g.size, dtype=torch.float64) for g in groups.groups))
    for name in ("stem", "b", "b.weight", "st?m"):
        assert counts(found, 0.9, Limits(keep=[name])) == [8, 1]


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"keep": ["layer9"]}, "unknown layer to keep 'layer9'"),
        ({"tied": ["0", "9"]}, "unknown layer to tie '9'"),
        ({"least": {"9": 1}}, "unknown layer in least '9'"),
        ({"multiple": {"9": 1}}, "unknown layer in multiple '9'"),
        ({"cap": {"9": 1}}, "unknown layer in cap '9'"),
    ],
)
def test_a_pattern_without_a_group_is_refused(limits, sentence):
    with pytest.raises(UnknownName, match=re.escape(sentence)):
        allocate(scores(4, 5), Uniform(0.5), limits=Limits(**limits))


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"least": 0}, "least is a number of units, 1 or more, and not 0"),
        ({"least": 2.5}, "least is a number of units, 1 or more, and not 2.5"),
        ({"multiple": {"a": 0}}, "multiple is a number of units, 1 or more, and not 0"),
        ({"cap": 1.5}, "cap is the share of a group that may go, from 0 to 1, and not 1.5"),
        ({"cap": {"a": -0.1}}, "cap is the share of a group that may go, from 0 to 1, and not -0.1"),
        ({"keep": "stem"}, "keep is a list of patterns, and not 'stem'"),
        ({"tied": "stem"}, "tied is a list whose elements are patterns or lists of them, and not 'stem'"),
        ({"keep": [3]}, "keep is a list of patterns, and not [3]"),
        ({"tied": [["a", 3]]}, "and not [['a', 3]]"),
    ],
)
def test_values_out_of_range_are_refused(limits, sentence):
    with pytest.raises(PlanError, match=re.escape(sentence)):
        Limits(**limits)
