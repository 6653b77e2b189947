"""Models on disk and back: shapes, values, ties and outputs, and what is said when the code has changed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from secateur.errors import ModelError, RunError
from secateur.recipe.folder import ARCHITECTURE, Architecture, load, save_model

TIED = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("scale", nn.init.ones_(nn.Linear(1, 4).weight.detach()), persistent=False)

    def forward(self, x):
        return self.b(self.a(x)) * self.scale.T

def make():
    return Net()
"""


@pytest.fixture
def saved(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 2))
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def make(classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, classes))\n"
    )
    attributes = {"0": {"out_channels": 5}, "1": {"num_features": 5}, "3": {"in_features": 20}}
    save_model(tmp_path / "model", model, Architecture(f"{tmp_path / 'nets.py'}:make", 2, attributes))
    return tmp_path, model.eval()


def test_a_cut_model_comes_back_bit_for_bit(saved):
    folder, model = saved
    images = torch.randn(3, 3, 4, 4)
    assert torch.equal(load(folder)(images), model(images))
    assert torch.equal(load(folder / "model")(images), model(images))
    assert str(load(folder)) == str(model)


def test_loading_leaves_the_random_state_alone(saved):
    folder, _ = saved
    state = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_weights_stay_tied_and_hidden_buffers_come_along(tmp_path):
    (tmp_path / "nets.py").write_text(TIED)
    namespace: dict[str, type] = {}
    exec(TIED, namespace)
    model = namespace["make"]()
    with torch.no_grad():
        model.scale.fill_(3.0)
    save_model(tmp_path, model, Architecture(f"{tmp_path / 'nets.py'}:make", 4, {}))
    loaded, x = load(tmp_path), torch.randn(2, 4)
    assert loaded.a.weight is loaded.b.weight
    assert torch.equal(loaded(x), model(x))


def test_code_that_has_changed_is_told(saved):
    folder, _ = saved
    code = (folder / "nets.py").read_text()
    (folder / "nets.py").write_text(code.replace("nn.BatchNorm2d(8), ", ""))
    with pytest.raises(ModelError, match=r"differ in .* tensors, such as .* was the model's code changed"):
        load(folder)


def test_an_attribute_that_is_gone_is_told(saved):
    folder, _ = saved
    value = json.loads((folder / "model" / ARCHITECTURE).read_text())
    value["attributes"]["7"] = {"out_channels": 3}
    (folder / "model" / ARCHITECTURE).write_text(json.dumps(value))
    with pytest.raises(ModelError, match="has no longer what the run cut"):
        load(folder)


def test_another_format_is_told(saved):
    folder, _ = saved
    value = json.loads((folder / "model" / ARCHITECTURE).read_text())
    (folder / "model" / ARCHITECTURE).write_text(json.dumps(value | {"format": 99}))
    with pytest.raises(RunError, match="has format 99, and this secateur reads format 1"):
        load(folder)


def test_a_folder_without_a_model_is_told(tmp_path):
    with pytest.raises(RunError, match="holds no saved model"):
        load(tmp_path)


def test_several_cuts_leave_the_last_value():
    first = Architecture("x", 2, {"a": {"out_channels": 9, "groups": 3}})
    second = first.after({"a": {"out_channels": 5}, "b": {"shape": (1, 2)}})
    assert second.attributes == {"a": {"out_channels": 5, "groups": 3}, "b": {"shape": (1, 2)}}
    assert Architecture.from_json(json.loads(json.dumps(second.to_json()))) == second
