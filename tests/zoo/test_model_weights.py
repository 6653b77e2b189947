"""Weights from files: they all fit, or a sentence names the tensors that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.codec.state import save_state
from secateur.errors import ModelError, RunError
from secateur.zoo import resnet_cifar
from secateur.zoo.models import build_model


def saved(path: Path, held: object) -> Path:
    if path.suffix == ".safetensors":
        assert isinstance(held, dict)
        save_state(path, held)
    else:
        torch.save(held, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_from_each_kind_of_file(tmp_path: Path, suffix: str, prefix: str) -> None:
    source = resnet_cifar.resnet20(4)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    built = build_model("secateur:resnet20", classes=4, weights=saved(tmp_path / f"w{suffix}", state))
    assert all(torch.equal(value, built.model.state_dict()[key]) for key, value in source.state_dict().items())
    taken = [note for note in built.notes if "taken off" in note]
    assert len(taken) == prefix.count(".")
    assert all(f"'{part}.'" in " ".join(taken) for part in prefix.split(".")[:-1])


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_weights_inside_a_checkpoint(tmp_path: Path, key: str) -> None:
    source = resnet_cifar.resnet20()
    path = saved(tmp_path / "w.pt", {"epoch": 3, key: source.state_dict()})
    model = build_model("secateur:resnet20", weights=str(path)).model
    assert torch.equal(model.get_parameter("linear.weight"), source.linear.weight)


def test_weights_of_auxiliary_classifiers_are_left_out(tmp_path: Path) -> None:
    state = nn.Linear(2, 2).state_dict() | {"aux1.fc.weight": torch.ones(1), "AuxLogits.fc.bias": torch.ones(1)}
    (tmp_path / "m.py").write_text("from torch import nn\ndef make(): return nn.Linear(2, 2)")
    built = build_model(f"{tmp_path / 'm.py'}:make", weights=saved(tmp_path / "w.pt", state))
    assert built.notes[-1] == "2 tensors of auxiliary classifiers in it were left out"


def test_another_class_count_is_told_as_such(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", resnet_cifar.resnet20(10).state_dict())
    sentence = r"w\.pt have 10 classes, secateur:resnet20 was to have 100 \(linear\.weight, linear\.bias\); take"
    with pytest.raises(ModelError, match=sentence):
        build_model("secateur:resnet20", classes=100, weights=path)


def test_weights_that_do_not_fit_name_the_tensors(tmp_path: Path) -> None:
    state = resnet_cifar.resnet20().state_dict()
    del state["conv1.weight"]
    state |= {"extra": torch.zeros(1), "bn1.weight": torch.zeros(8), "bn1.bias": torch.zeros(())}
    path = saved(tmp_path / "w.safetensors", state)
    with pytest.raises(ModelError, match=r"w\.safetensors do not fit secateur:resnet20") as caught:
        build_model("secateur:resnet20", weights=path)
    assert caught.match(r"of its tensors, 1 missing \(conv1\.weight\); 1 unexpected \(extra\); 2 of another shape")
    assert caught.match(r"\(bn1\.weight is 8, not 16, bn1\.bias is a single number, not 16\): name the model they")


def test_weights_of_another_network_are_counted(tmp_path: Path) -> None:
    deep, shallow = resnet_cifar.resnet56(), resnet_cifar.resnet20()
    keys = {key for key in deep.state_dict() if "num_batches" not in key}
    rest = len(keys) - sum("num_batches" not in key for key in shallow.state_dict())
    with pytest.raises(ModelError, match=rf"{rest} missing \(layer1\.3\.conv1\.weight, .* and {rest - 3} more\): name"):
        build_model("secateur:resnet56", weights=saved(tmp_path / "w.pt", shallow.state_dict()))
    with pytest.raises(ModelError, match=r"unexpected \(layer1\.3\.conv1\.weight, .* more\): name"):
        build_model("secateur:resnet20", weights=saved(tmp_path / "w.pt", deep.state_dict()))


def test_weights_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pt", nn.Linear(2, 2))
    cut = saved(tmp_path / "cut.pth", nn.Linear(2, 2).state_dict())
    cut.write_bytes(cut.read_bytes()[:300])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00")
    for path in (whole, cut, tmp_path / "text.pt"):
        with pytest.raises(ModelError, match=rf"{path.name} could not be read as tensors by name \(.*save model\.st"):
            build_model("secateur:resnet20", weights=path)
    with pytest.raises(RunError, match=r"cut\.safetensors is not a whole safetensors file"):
        build_model("secateur:resnet20", weights=tmp_path / "cut.safetensors")
    with pytest.raises(RunError, match=r"none\.safetensors is not there"):
        build_model("secateur:resnet20", weights="none.safetensors")
    with pytest.raises(ModelError, match=r"there is no weights file none\.pt; check the path"):
        build_model("secateur:resnet20", weights="none.pt")
    with pytest.raises(ModelError, match=r"read from \.safetensors, \.pt and \.pth files; model\.onnx is none"):
        build_model("secateur:resnet20", weights="model.onnx")


@pytest.mark.parametrize(
    ("held", "sentence"),
    [
        ([torch.zeros(2)], "holds a list, not tensors by name; save model"),
        ({"weight": torch.zeros(2), "epoch": 3}, r"holds more than tensors \(epoch\); save model"),
        ({"state_dict": {"lr": 0.1}}, r"holds more than tensors \(lr\)"),
        ({"net": {"w": torch.zeros(1)}}, r"\(net\); .*nest it under one of state_dict, model, model_state_dict"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, held: object, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        build_model("secateur:resnet20", weights=saved(tmp_path / "w.pt", held))
