"""Tensors come back bit for bit, tied ones tied; the size is known beforehand; damaged files are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.codec import state
from secateur.codec.state import CODES, file_size, load_state, read_metadata, save_state, state_shapes
from secateur.errors import ModelError, RunError

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
shapes = st.lists(st.integers(0, 4), max_size=4)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def drawn(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """Random bits, so that NaN payloads, infinities and minus zero take part; booleans only hold 0 and 1."""
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


tensors = st.builds(
    drawn,
    st.sampled_from([dtype for dtype in CODES if dtype != torch.float4_e2m1fn_x2]),
    shapes,
    st.integers(0, 999),
)
states = st.dictionaries(texts.filter(lambda name: name != "__metadata__"), tensors, max_size=6)


@few
@given(given=states, metadata=st.dictionaries(texts, texts, max_size=3))
def test_round_trip_and_size_for_any_state(
    tmp_path: Path, given: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    path = tmp_path / "s"
    save_state(path, given, metadata)
    back = load_state(path)
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(back[name]) == bits(tensor)
    assert read_metadata(path) == metadata
    assert state_shapes(path) == {name: tuple(tensor.shape) for name, tensor in given.items()}
    assert file_size(given, metadata) == path.stat().st_size
    assert os.listdir(tmp_path) == ["s"]


@few
@given(
    given=st.dictionaries(
        texts.filter(lambda name: name != "__metadata__"),
        st.builds(drawn, st.sampled_from([torch.float32, torch.int64]), shapes, st.integers(0, 9)),
        max_size=5,
    ),
    metadata=st.dictionaries(texts, texts, min_size=1, max_size=1),
)
def test_the_bytes_are_those_of_the_safetensors_library(
    tmp_path: Path, given: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    save_state(tmp_path / "s", given, metadata)
    assert (tmp_path / "s").read_bytes() == safetensors.torch.save(given, metadata)


@pytest.mark.parametrize("dtype", list(CODES))
def test_every_dtype_scalars_and_empty_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    given = {"some": drawn(dtype, [3, 2], 1), "none": drawn(dtype, [2, 0], 1), "one": drawn(dtype, [1], 1)}
    if dtype != torch.float4_e2m1fn_x2:  # it packs two values along the last dimension, so it needs one
        given["scalar"] = drawn(dtype, [], 1)
    save_state(tmp_path / "s", given)
    back = load_state(tmp_path / "s")
    assert {name: (t.dtype, tuple(t.shape), bits(t)) for name, t in back.items()} == {
        name: (t.dtype, tuple(t.shape), bits(t)) for name, t in given.items()
    }
    assert state_shapes(tmp_path / "s") == {name: tuple(t.shape) for name, t in given.items()}
    assert file_size(given) == (tmp_path / "s").stat().st_size


def test_the_size_is_the_formula() -> None:
    # {"w":{"dtype":"F32","shape":[10],"data_offsets":[0,40]}} is 56 characters, a multiple of 8.
    assert file_size({"w": torch.zeros(10)}) == 8 + 56 + 40
    # Four characters more are padded to 64.
    assert file_size({"wwwww": torch.zeros(10)}) == 8 + 64 + 40
    assert file_size({"w": torch.zeros(10)}, {"k": "v" * 100}) - file_size({"w": torch.zeros(10)}) == 128


def test_the_size_needs_no_values() -> None:
    real = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with torch.device("meta"):
        meta = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert file_size(meta.state_dict()) == file_size(real.state_dict())


def test_tied_tensors_are_stored_once_and_come_back_as_one(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    given = model.state_dict()
    save_state(tmp_path / "s", given, {"epoch": "2"})
    back = load_state(tmp_path / "s")
    assert back["1.weight"] is back["0.weight"]
    assert back["1.bias"] is not back["0.bias"]
    assert torch.equal(back["1.weight"], given["1.weight"])
    assert (tmp_path / "s").stat().st_size == file_size(given, {"epoch": "2"}) < 3 * 8 * 8 * 4
    assert read_metadata(tmp_path / "s") == {"epoch": "2"}
    assert state_shapes(tmp_path / "s") == {name: tuple(t.shape) for name, t in given.items()}


def test_tied_tensors_on_the_meta_device_have_the_size_of_one() -> None:
    tied, twins = torch.empty(100, device="meta"), [torch.empty(100, device="meta") for _ in range(2)]
    assert file_size(dict(zip("ab", twins))) - file_size({"a": tied, "b": tied}) > 300


def test_views_that_only_overlap_are_kept_whole_and_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    given = {"all": base, "part": base[2:5], "shaped": base.view(3, 4), "turned": base.view(3, 4).T}
    given["wide"] = base[:1].expand(5)
    save_state(tmp_path / "s", given)
    back = load_state(tmp_path / "s")
    assert all(torch.equal(back[name], given[name]) for name in given)
    assert len({t.untyped_storage().data_ptr() for t in back.values()}) == 5


@pytest.mark.parametrize("view", ["conj", "neg", "parameter"])
def test_lazy_views_and_parameters_keep_their_values(tmp_path: Path, view: str) -> None:
    value = torch.tensor([1 + 2j, 3 - 1j])
    given = {"conj": value.conj(), "neg": value.conj().imag, "parameter": nn.Parameter(torch.ones(2))}[view]
    save_state(tmp_path / "s", {"x": given, "value": value})
    assert torch.equal(load_state(tmp_path / "s")["x"], given.detach())


def test_loaded_tensors_own_their_memory(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"a": torch.zeros(3), "b": torch.ones(2)})
    before = (tmp_path / "s").read_bytes()
    back = load_state(tmp_path / "s")
    back["a"].fill_(7)
    (tmp_path / "s").write_bytes(b"")
    assert back["b"].tolist() == [1, 1]
    assert back["b"].untyped_storage().nbytes() == 8
    (tmp_path / "s").write_bytes(before)
    assert load_state(tmp_path / "s")["a"].tolist() == [0, 0, 0]


def test_the_device_is_where_they_come_to(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"a": torch.zeros(3)})
    assert load_state(tmp_path / "s")["a"].device.type == "cpu"
    assert load_state(tmp_path / "s", device="meta")["a"].device.type == "meta"


def test_the_same_state_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    a, b = torch.ones(3), torch.zeros(2, dtype=torch.int64)
    save_state(tmp_path / "1", {"a": a, "b": b}, {"x": "1", "y": "2"})
    save_state(tmp_path / "2", {"b": b, "a": a}, {"x": "1", "y": "2"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (torch.zeros(2, device="meta"), "tensor 'x' is on the meta device: it has no values yet"),
        (torch.eye(2).to_sparse(), r"tensor 'x' has layout torch.sparse_coo; call \.to_dense\(\)"),
        (torch.zeros(2, dtype=torch.complex128), "tensor 'x' is torch.complex128, which safetensors has not"),
        ([1.0], "'x' is a list; a safetensors file holds tensors alone"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, tensor: Tensor, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        save_state(tmp_path / "s", {"ok": torch.zeros(1), "x": tensor})
    assert os.listdir(tmp_path) == []


def test_names_that_are_taken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are taken; choose another"):
        save_state(tmp_path / "s", {}, {state.TIED: "{}"})
    with pytest.raises(ValueError, match="are taken; choose another"):
        file_size({"__metadata__": torch.zeros(1)})
    with pytest.raises(TypeError, match="metadata are texts, but 'epoch' is 3"):
        save_state(tmp_path / "s", {}, {"epoch": 3})  # type: ignore[dict-item]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path / "s", {"a": torch.zeros(3)})
    before = (tmp_path / "s").read_bytes()

    def refuse(_: Tensor) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "_raw", refuse)
    with pytest.raises(RunError, match=r"s: the disk is full \(4\.0 MB are needed, .*What was there before"):
        save_state(tmp_path / "s", {"a": torch.ones(1_000_000)})
    assert (tmp_path / "s").read_bytes() == before
    assert os.listdir(tmp_path) == ["s"]


def packed(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


WHOLE = packed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))


@pytest.mark.parametrize(
    ("attack", "sentence"),
    [
        (b"", "header too small; 0 bytes"),
        (b"\x08\x00", "header too small; 2 bytes"),
        (b"\xff" * 8 + b"{}", "header too large; 10 bytes"),
        (WHOLE[:30], "invalid header length|header too|incomplete"),
        (WHOLE[:-1], "incomplete metadata, file not fully covered"),
        (WHOLE + b"\x00", "incomplete metadata, file not fully covered"),
        (b"PK\x03\x04" + bytes(200), "not a whole safetensors file"),
        (b"\x80\x02}q\x00." * 20, "header too large"),
        (packed([]), "invalid JSON|invalid header"),
        (packed({"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "unknown variant"),
        (packed({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)), "invalid shape"),
        (packed({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)), "invalid"),
        (packed({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}, bytes(8)), "overflow"),
        (packed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)), "nvalid"),
        (packed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 60]}}, bytes(8)), "nvalid"),
        (packed({"__metadata__": {"epoch": 3}}), "invalid type"),
    ],
)
@pytest.mark.parametrize("verb", [load_state, read_metadata, state_shapes])
def test_attack_files_are_refused(tmp_path: Path, verb: object, attack: bytes, sentence: str) -> None:
    assert callable(verb)
    (tmp_path / "s.safetensors").write_bytes(attack)
    with pytest.raises(RunError, match=r"s\.safetensors is not a whole safetensors file \(.*") as caught:
        verb(tmp_path / "s.safetensors")
    assert caught.match(sentence)
    assert str(caught.value).endswith("fetch or save it again.")


@pytest.mark.parametrize(
    "tied", ["{", "[]", '{"b": "none"}', '{"a": "a"}', '{"b": 3}', '{"b": ["a"]}', "[" * 100_000]
)
def test_ties_that_do_not_fit_are_refused(tmp_path: Path, tied: str) -> None:
    header = {
        "__metadata__": {state.TIED: tied},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    (tmp_path / "s").write_bytes(packed(header, bytes(8)))
    for verb in (load_state, state_shapes):
        with pytest.raises(RunError, match=r"s says .* of tied tensors, which does not fit .* \(1\)"):
            verb(tmp_path / "s")


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"could not read the weights: .*none is not there; check the path"):
        load_state(tmp_path / "none")
    with pytest.raises(RunError, match="is a folder, not a file; check the path"):
        state_shapes(tmp_path)
