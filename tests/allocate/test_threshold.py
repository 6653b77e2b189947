"""The threshold is the k-th smallest magnitude, whatever the dtypes, layouts and ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.allocate import threshold as room
from secateur.allocate.threshold import chunks, global_threshold, keys
from secateur.errors import PlanError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CHUNK", 16)


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[Tensor]:
    """One to four tensors, with many ties or hardly any, of one dtype or mixed ones."""
    seed, spread = draw(st.integers(0, 10**6)), draw(st.sampled_from([0.0, 0.7, 3.0, 1e4, 1e-39]))
    generator = torch.Generator().manual_seed(seed)
    coarse = draw(st.booleans())
    tensors = []
    for size in draw(st.lists(st.integers(0, 50), min_size=1, max_size=4)):
        values = torch.randn(size, generator=generator, dtype=torch.float64) * spread
        tensors.append((values.round() if coarse else values).to(draw(st.sampled_from(FLOATS))))
    return tensors


@settings(deadline=None, max_examples=40)
@given(tensor_lists(), st.floats(0, 1))
def test_equals_sorting_everything(tensors: list[Tensor], share: float) -> None:
    magnitudes = torch.cat([tensor.double().abs() for tensor in tensors]).sort().values
    if not len(magnitudes):
        return
    count = round(share * len(magnitudes))
    found = global_threshold(tensors, count)
    value = float(magnitudes[max(count, 1) - 1])
    assert found.value == value
    assert found.below == int((magnitudes < value).sum())
    assert found.ties == int((magnitudes == value).sum())
    assert found.count == count
    assert found.below <= count <= found.below + found.ties


@pytest.mark.parametrize("dtype", FLOATS)
def test_keys_are_in_the_order_of_magnitudes(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 2
    values = torch.tensor([-0.0, tiny, -1e-3, 0.5, -2.0, torch.finfo(dtype).max, -torch.inf], dtype=dtype)
    found = keys(values, dtype).tolist()
    assert found[0] == 0
    assert found == sorted(set(found))


def test_count_moves_the_threshold() -> None:
    tensors = [torch.arange(50.0), -torch.arange(50.0, 100.0)]
    assert [global_threshold(tensors, count).value for count in (0, 1, 50, 51, 100)] == [0, 0, 49, 50, 99]


def test_infinity_is_the_largest_magnitude() -> None:
    tensors = [torch.tensor([1.0, -torch.inf, 3.0])]
    assert [global_threshold(tensors, count).value for count in (2, 3)] == [3.0, torch.inf]


def test_mixed_dtypes_are_not_rounded() -> None:
    tensors = [torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0 + 2**-20])]
    found = global_threshold(tensors, 1)
    assert (found.value, found.ties, found.dtype) == (1.0, 1, torch.float32)
    half = [torch.tensor([1.0], dtype=dtype) for dtype in (torch.bfloat16, torch.float16)]
    assert global_threshold(half, 1).dtype == torch.float32


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 6, 7, 3).to(memory_format=torch.channels_last),
        torch.randn(40, 9).t(),
        torch.randn(300)[::3],
        torch.tensor(2.5),
        torch.zeros(0, 4),
    ],
)
def test_chunks_are_the_elements_row_by_row(tensor: Tensor) -> None:
    pieces = list(chunks(tensor))
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces]), tensor.reshape(-1))
    assert all(piece.numel() % 8 == 0 for piece in pieces[:-1])
    assert all(piece.untyped_storage()._cdata == tensor.untyped_storage()._cdata for piece in pieces)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_is_refused_by_name(dtype: torch.dtype) -> None:
    tensors = [torch.zeros(40, dtype=dtype), torch.zeros(40, dtype=dtype)]
    tensors[1][33] = -torch.nan
    with pytest.raises(PlanError, match="tensor 1 holds NaN, which has no rank among weights"):
        global_threshold(tensors, 3)
    with pytest.raises(PlanError, match=r"'fc\.weight' holds NaN"):
        global_threshold(tensors, 3, names=["conv.weight", "fc.weight"])


def test_dtypes_without_an_order_are_refused() -> None:
    with pytest.raises(PlanError, match=r"tensor 1 is torch\.int8; weights are ranked in torch\.float16"):
        global_threshold([torch.zeros(3), torch.zeros(3, dtype=torch.int8)], 1)


@pytest.mark.parametrize("count", [-1, 7])
def test_a_count_that_cannot_be(count: int) -> None:
    with pytest.raises(PlanError, match=f"cannot prune {count} of 6 weights in 2 tensors; choose fewer"):
        global_threshold([torch.zeros(2, 2), torch.zeros(2)], count)


def test_nothing_to_rank() -> None:
    with pytest.raises(PlanError, match="cannot prune 0 of 0 weights in 0 tensors"):
        global_threshold([], 0)


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    assert global_threshold([torch.ones(3)], 1).value == 1.0
    assert torch.get_num_threads() == before
