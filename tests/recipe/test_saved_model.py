"""Models on disk and back: shapes, values, ties and outputs, and what is said when the code has changed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from secateur.allocate.plan import Plan
from secateur.codec.state import load_state, save_state
from secateur.errors import ModelError, PlanError, RunError
from secateur.graph.attention import HeadwiseAttention
from secateur.graph.groups import find_groups
from secateur.graph.probe import random_keep
from secateur.recipe.architecture import ARCHITECTURE, Architecture
from secateur.recipe.folder import load, save, save_model
from secateur.surgery.cut import apply
from secateur.zoo.models import build_model

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


RESIDUAL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem, self.a, self.head = nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 1), nn.Linear(width, 2)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.a(x)).mean((2, 3))
        return self.head(torch.cat(x.view(x.shape[0], 2, -1).unbind(1)[::-1], 1))

def make():
    return Net()

def wider():
    return Net(12)
"""


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 12)
        block = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.out = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.blocks(self.into(x)))


def randomly_cut(model: nn.Module, inputs: torch.Tensor, seed: int = 0) -> tuple[nn.Module, Plan]:
    groups = find_groups(model.eval(), inputs)
    plan = Plan(groups, random_keep(groups, seed))
    return apply(model, plan), plan


@pytest.fixture
def nets(tmp_path):
    (tmp_path / "nets.py").write_text(RESIDUAL)
    torch.manual_seed(0)
    return build_model("nets.py:make").model


def test_save_takes_a_source_and_a_plan(nets):
    x = torch.randn(2, 3, 6, 6)
    smaller, plan = randomly_cut(nets, x)
    save(smaller, "small", plan=plan, source="nets.py:make")
    back = load("small")
    assert torch.equal(back(x), smaller(x))
    assert str(back) == str(smaller)
    assert back.state_dict().keys() == smaller.state_dict().keys()
    assert not back.training


def test_a_source_is_found_from_another_folder(nets, tmp_path, monkeypatch):
    x = torch.randn(2, 3, 6, 6)
    smaller, plan = randomly_cut(nets, x)
    save(smaller, "small", plan=plan, source="nets.py:make")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(load(tmp_path / "small")(x), smaller(x))


def test_plans_in_sequence_and_training_in_between(nets):
    x = torch.randn(2, 3, 6, 6)
    once, first = randomly_cut(nets, x)
    with torch.no_grad():
        for parameter in once.parameters():
            parameter.mul_(1.5)
    twice, second = randomly_cut(once, x, 2)
    save(twice, "small", plan=[first, second], source="nets.py:make")
    assert torch.equal(load("small")(x), twice(x))
    with pytest.raises(PlanError, match=r"plan 1 leaves .* and plan 2 was made for .*in order"):
        save(twice, "other", plan=[second, first], source="nets.py:make")
    with pytest.raises(PlanError, match=r"plan 1 leaves .* and the model has .*give the model and the plans"):
        save(twice, "other", plan=first, source="nets.py:make")
    with pytest.raises(PlanError, match=r"plan 1 leaves stem\.weight"):
        save(nets, "other", plan=first, source="nets.py:make")
    assert not Path("other").exists()


def test_views_on_one_memory_come_back_as_the_source_has_them():
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 5))
        model[2].weight = nn.Parameter(model[0].weight.data.t())
        return model

    x = torch.randn(3, 5)
    smaller, plan = randomly_cut(make(), x)
    save(smaller, "small", plan=plan)
    back = load("small", factory=make)
    assert torch.equal(back(x), smaller(x))
    assert back[2].weight.data_ptr() == back[0].weight.data_ptr()
    assert back[2].weight.stride() == smaller[2].weight.stride()


def test_a_factory_stands_in_for_a_source(nets):
    x = torch.randn(2, 5, 4)
    torch.manual_seed(0)
    model = Attends()
    smaller, plan = randomly_cut(model, x)
    save(smaller, "small", plan=plan)
    with torch.no_grad():
        assert torch.equal(load("small", factory=Attends)(x), smaller(x))
    with pytest.raises(ModelError, match=r"saved without a source; give load a factory.*factory=make_model"):
        load("small")
    with pytest.raises(ModelError, match="the factory raised ZeroDivisionError: division by zero"):
        load("small", factory=lambda: 1 / 0)
    with pytest.raises(ModelError, match=r"the factory returned a int; it must return a torch.nn.Module"):
        load("small", factory=lambda: 3)
    with pytest.raises(ModelError, match="the factory's model builds another model than the one that was cut"):
        load("small", factory=lambda: nets)


def test_heads_that_were_cut_come_back_as_headwise_attention():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4)
    smaller, plan = randomly_cut(Attends(), x)
    attention = [name for name, module in smaller.named_modules() if isinstance(module, HeadwiseAttention)]
    save(smaller, "small", plan=plan)
    back = load("small", factory=Attends)
    assert attention
    assert [name for name, module in back.named_modules() if isinstance(module, HeadwiseAttention)] == attention
    assert [m.num_heads for m in back.modules() if isinstance(m, HeadwiseAttention)] != [3, 3]
    assert str(back) == str(smaller)
    assert json.loads(Path("small/architecture.json").read_text())["tier"] == "b"


def test_another_source_is_refused_when_saving_and_when_loading(nets):
    x = torch.randn(2, 3, 6, 6)
    smaller, plan = randomly_cut(nets, x)
    with pytest.raises(ModelError, match=r"nets.py:wider builds another model .*: stem.weight is \(12, 3, 3, 3\)"):
        save(smaller, "small", plan=plan, source="nets.py:wider")
    assert not Path("small").exists()
    save(smaller, "small", plan=plan, source="nets.py:make")
    Path("nets.py").write_text(RESIDUAL.replace("width=8", "width=10"))
    with pytest.raises(ModelError, match=r"nets.py:make builds another model .*was \(8, 3, 3, 3\)"):
        load("small")


def test_a_source_with_fewer_channels_than_were_saved_is_refused(saved):
    folder, _ = saved
    code = (folder / "nets.py").read_text()
    (folder / "nets.py").write_text(code.replace("8", "4").replace("32", "16"))
    with pytest.raises(ModelError, match=r"has 0.bias of shape \(4,\), and \(5,\) was saved"):
        load(folder)


def test_weights_that_were_changed_are_refused(nets):
    save(nets, "small", source="nets.py:make")
    tensors = load_state("small/model.safetensors")
    save_state("small/model.safetensors", {name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(RunError, match=r"is not the file that architecture.json was written with: it was changed"):
        load("small")


def test_weights_that_lie_channels_last_do_so_again(nets):
    torch.manual_seed(0)
    model = resnet18(num_classes=3).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64)
    smaller, plan = randomly_cut(model, x)
    save(smaller, "small", plan=plan, source="torchvision:resnet18", classes=3)
    back = load("small")
    assert back.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(back(x), smaller(x))


def test_the_tier_is_written_down(nets):
    x = torch.randn(2, 3, 6, 6)
    smaller, plan = randomly_cut(nets, x)
    save(nets, "whole", source="nets.py:make")
    save(smaller, "small", plan=plan, source="nets.py:make")
    tiers = [json.loads(Path(folder, ARCHITECTURE).read_text())["tier"] for folder in ("whole", "small")]
    assert tiers == ["a", "b" if plan.replays() else "a"]


def test_a_folder_that_cannot_be_made_a_full_disk_and_a_file(nets, monkeypatch):
    Path("taken").write_text("x")
    with pytest.raises(RunError, match="could not make the folder taken: file exists; choose another"):
        save(nets, "taken", source="nets.py:make")
    with pytest.raises(RunError, match=r"'taken' is a file; give a folder. What export_program wrote, load_program"):
        load("taken")
    Path("full").mkdir()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError, match=r"could not write full.model.safetensors: the disk is full \(.* MB are needed"):
        save(nets, "full", source="nets.py:make")
    assert list(Path("full").iterdir()) == []


READ = """
import pickle, sys, torch
import secateur as sc
from secateur.recipe.folder import load
from secateur.codec.state import load_state
def refuse(*args, **kwargs):
    raise AssertionError("unpickled")
torch.load = pickle.load = pickle.loads = pickle.Unpickler = refuse
tensors = load_state("tensors")
with torch.no_grad():
    print(torch.equal(load("small")(tensors["x"]), tensors["y"]))
"""


def test_a_fresh_process_reads_it_without_pickle(nets):
    x = torch.randn(2, 3, 6, 6)
    smaller, plan = randomly_cut(nets, x)
    save(smaller, "small", plan=plan, source="nets.py:make")
    with torch.no_grad():
        save_state("tensors", {"x": x, "y": smaller(x)})
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
