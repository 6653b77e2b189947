"""Programs: what a cut model computes, from one file, without its class, its code or pickle."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.models import SwinTransformer, VisionTransformer, resnet18, shufflenet_v2_x1_0

import networks
from secateur.allocate.plan import Plan
from secateur.codec.ops import FUNCTIONS, find_op, op_name
from secateur.codec.program import ENTRY, load_program
from secateur.codec.state import load_state, read_metadata, save_state
from secateur.errors import CaptureError, ModelError, ProofError, RunError
from secateur.graph.attention import HeadwiseAttention
from secateur.graph.groups import find_groups
from secateur.graph.nested import as_arguments
from secateur.graph.probe import random_keep
from secateur.surgery.cut import apply
from secateur.surgery.export import export_program
from secateur.surgery.tier import tier_of

PATH = Path("net.safetensors")


def swin() -> nn.Module:
    return SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=3)


def vit() -> nn.Module:
    return VisionTransformer(32, 8, 2, 2, 24, 32, num_classes=3)


LARGER: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: resnet18(num_classes=3),
    "shufflenet": lambda: shufflenet_v2_x1_0(num_classes=3),
    "swin": swin,
    "vit": vit,
}


class Calls(nn.Module):
    """A layer, a function in the middle, a layer."""

    def __init__(self, function: Callable[[Tensor], Any] = torch.relu) -> None:
        super().__init__()
        self.into, self.out, self.function = nn.Linear(4, 8), nn.Linear(8, 3), function

    def forward(self, x: Tensor) -> Any:
        return self.out(self.function(self.into(x)))


def cut(model: nn.Module, inputs: Any, seed: int = 0) -> tuple[nn.Module, Plan]:
    groups = find_groups(model, inputs)
    plan = Plan(groups, random_keep(groups, seed))
    return apply(model, plan).eval(), plan


def doubled(nested: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.double() if isinstance(leaf, Tensor) else leaf, nested)


def assert_computes_the_same(model: nn.Module, inputs: Any, batches: tuple[int, ...]) -> None:
    program = load_program(PATH)
    for batch in batches:
        some = pytree.tree_map(lambda leaf, n=batch: torch.randn(n, *leaf.shape[1:], dtype=leaf.dtype), inputs)
        args, kwargs = as_arguments(some)
        torch.testing.assert_close(program(*args, **kwargs), model(*args, **kwargs), rtol=1e-12, atol=1e-12)
    assert program.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("net", networks.NETWORKS, ids=[net.make.__name__ for net in networks.NETWORKS])
def test_every_network_cut_and_exported(net: networks.Net) -> None:
    inputs = doubled(net.inputs())
    model, _ = cut(networks.build(net).double(), inputs)
    exported = export_program(model, inputs, PATH)
    assert exported.sentence == "net.safetensors takes batches of 1 or more."
    assert_computes_the_same(model, inputs, (2, 1, 5))


@pytest.mark.parametrize("name", LARGER)
def test_larger_networks_cut_and_exported(name: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 32, 32).double()
    model, plan = cut(LARGER[name]().double().eval(), inputs)
    exported = export_program(model, inputs, PATH)
    assert exported.batch is None, exported.sentence
    assert_computes_the_same(model, inputs, (2, 1, 5))
    assert bool(plan.replays()) == (name in ("shufflenet", "swin"))
    assert any(isinstance(module, HeadwiseAttention) for module in model.modules()) == (name == "vit")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(x.shape[0], 2, 4).flatten(1),
        lambda x: x.reshape(-1, 8),
        lambda x: x.unflatten(1, (2, 4)).flatten(1),
        lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1),
    ],
    ids=["view", "minus one", "unflatten", "split"],
)
def test_sizes_that_are_replayed_stay_and_the_batch_varies(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, plan = cut(Calls(function).eval(), torch.randn(3, 4), 3)
    assert plan.replays()
    exported = export_program(model, torch.randn(3, 4), PATH)
    assert exported.batch is None, exported.sentence
    assert_computes_the_same(model, torch.randn(3, 4), (3, 1, 7))


def test_a_batch_of_one_as_the_example_will_do() -> None:
    model = Calls().eval()
    assert export_program(model, torch.randn(1, 4), PATH).batch is None
    assert_computes_the_same(model, torch.randn(1, 4), (1, 6))


def test_a_program_for_one_batch_size_if_asked_for() -> None:
    model = Calls().eval()
    exported = export_program(model, torch.randn(3, 4), PATH, dynamic_batch=False)
    assert exported.sentence == "net.safetensors takes batches of 3 alone."
    assert_computes_the_same(model, torch.randn(3, 4), (3,))
    with pytest.raises(ModelError, match=r"input 0 has shape \(2, 4\), and the program takes \(3, 4\); export another"):
        load_program(PATH)(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x.view(4, 8), "the model itself does not run on a batch of 5 .*shape '.*' is invalid"),
        (lambda x: x if x.shape[0] % 2 else x.tanh(), r"torch.export could not let .*%.* 2\) == 0"),
        (lambda x: x if x.shape[0] < 9 else x.tanh(), "torch.export could not let .* <= 8"),
        (lambda x: x * 2 if x.shape[0] == 4 else x, "torch.export could not let .*"),
    ],
    ids=["a size in the code", "odd and even", "few and many", "one size alone"],
)
def test_where_the_batch_cannot_vary_it_is_fixed_and_told(function: Callable[[Tensor], Tensor], why: str) -> None:
    model = Calls(function).eval()
    exported = export_program(model, torch.randn(4, 4), PATH)
    assert exported.batch == 4
    assert re.search(why, exported.note), exported.note
    assert_computes_the_same(model, torch.randn(4, 4), (4,))


def test_a_batch_of_one_that_is_another_case_is_left_out() -> None:
    model = Calls(lambda x: x.squeeze(0).unsqueeze(0) if x.shape[0] == 1 else x * 2).eval()
    exported = export_program(model, torch.randn(3, 4), PATH)
    assert exported.least == 2
    assert_computes_the_same(model, torch.randn(3, 4), (2, 5))
    with pytest.raises(ModelError, match=r"input 0 has shape \(1, 4\).*takes \(batch, 4\) with batch at least 2"):
        load_program(PATH)(torch.randn(1, 4))


class Options(nn.Module):
    """Positional and named arguments, a number, nested inputs and outputs, constants, blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.attend = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.register_buffer("hidden", torch.arange(4.0), persistent=False)
        self.fixed = nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, x: Tensor, power: int = 2, *, more: dict[str, list[Tensor]], mask: Tensor | None = None) -> Any:
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            y = self.norm(self.a(x) ** power + self.hidden * self.fixed)
        with torch.no_grad():
            y = y + torch.tensor([1.0, 2.0, 3.0, float("inf")]).clamp(max=9.0)
        z = self.attend((y + more["b"][0]).unsqueeze(1)).squeeze(1).masked_fill(x > 1, -float("inf"))
        return {"z": (z.to(torch.float64), [y]), "rows": x.shape[0], "power": power, "none": mask}


def options(rows: int) -> dict[str, Any]:
    return {"x": torch.randn(rows, 4), "power": 3, "more": {"b": [torch.randn(rows, 4)]}}


def test_arguments_by_name_numbers_and_nested_outputs() -> None:
    torch.manual_seed(0)
    model = Options().eval()
    export_program(model, options(2), PATH)
    program, inputs = load_program(PATH), options(5)
    torch.testing.assert_close(program(**inputs), model(**inputs))
    torch.testing.assert_close(program(inputs["x"], 3, more=inputs["more"]), model(**inputs))
    assert program.state_dict().keys() == model.state_dict().keys()
    assert [p.requires_grad for p in program.parameters()].count(False) == 1
    assert torch.equal(program.hidden, model.hidden)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"power": 2}, "is 2, and the program was made for 3; export another"),
        ({"power": 3.0}, "is 3.0, and the program was made for 3"),
        ({"x": 3.0}, "input 0 of the program is a tensor, and was given a float"),
        ({"x": torch.zeros(2, 5)}, r"has shape \(2, 5\), and the program takes \(batch, 4\)"),
        ({"x": torch.zeros(4)}, r"has shape \(4,\), and the program takes \(batch, 4\)"),
        ({"more": {"b": [torch.zeros(3, 4)]}}, r"with batch = 2 by another input"),
        ({"more": {"c": []}}, "takes as more a dict of keys b, and was given a dict"),
        ({"more": {"b": []}}, r"takes as more\['b'\] a list of length 1, and was given a list"),
        ({"other": 1}, "takes the arguments x, power, more, and was given 0 without a name and x, power, more, other"),
    ],
)
def test_other_arguments_are_refused(change: dict[str, Any], sentence: str) -> None:
    export_program(Options().eval(), options(2), PATH)
    program = load_program(PATH)
    with pytest.raises(ModelError, match=sentence):
        program(**(options(2) | change))


def test_a_program_trains_copies_and_changes_its_dtype() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).eval()
    export_program(model, torch.randn(2, 4), PATH)
    program, x = load_program(PATH), torch.randn(3, 4)
    twin = copy.deepcopy(program).double()
    program.train()(x).sum().backward()
    model(x).sum().backward()
    assert not program.training
    torch.testing.assert_close(program.get_parameter("0.weight").grad, model[0].weight.grad)
    torch.testing.assert_close(twin(x.double()), model.double()(x.double()))
    with torch.no_grad():
        program.get_parameter("3.bias").add_(1)
    torch.testing.assert_close(program(x).double() - 1, twin(x.double()), atol=1e-5, rtol=1e-5)


def test_tied_tensors_come_back_tied_and_are_stored_once() -> None:
    model = nn.Sequential(nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 50)).eval()
    model[2].weight = model[0].weight
    export_program(model, torch.randn(2, 50), PATH)
    program = load_program(PATH)
    assert program.get_parameter("0.weight") is program.get_parameter("2.weight")
    assert PATH.stat().st_size < 2 * 50 * 50 * 4


def test_the_model_is_left_alone() -> None:
    torch.manual_seed(0)
    model = Calls(lambda x: torch.relu(x) + torch.rand(x.shape[0], 1)).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    export_program(model, torch.randn(2, 4, generator=torch.Generator()), PATH)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


class Gaps(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {1: x * 2}


@pytest.mark.parametrize(
    ("model", "error", "sentence"),
    [
        (Calls(lambda x: x * random.random()), ProofError, "does not compute what the model does"),
        (Calls(lambda x: x * 2 if x.sum() > 0 else x), CaptureError, "torch.export cannot follow the model"),
        (Calls(lambda x: x[:, :5]), CaptureError, "the model did not run on the inputs: .*mat1 and mat2 .*Check their"),
        (Gaps(), ModelError, "takes and gives tuples, lists and dicts with names, and this model has a dict"),
    ],
    ids=["chance", "a branch on values", "a wrong shape", "a key that is no name"],
)
def test_what_cannot_be_a_program_is_told_and_nothing_written(
    model: nn.Module, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        export_program(model.eval(), torch.randn(2, 4), PATH)
    assert not PATH.exists()


def test_a_missing_folder_and_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"could not write none/p: there is no folder none\. .*make it first"):
        export_program(Calls(), torch.randn(2, 4), "none/p")
    code = """
import resource, torch
from secateur.errors import RunError
from secateur.surgery.export import export_program
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    export_program(torch.nn.Linear(40, 40), torch.randn(2, 40), "p")
except RunError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("could not write p: the file-size limit was reached (0.0 MB are needed")
    assert list(tmp_path.iterdir()) == []


READ = """
import pickle, sys, torch
from secateur.codec.program import load_program
from secateur.codec.state import load_state
def refuse(*args, **kwargs):
    raise AssertionError("unpickled")
torch.load = torch.export.load = pickle.load = pickle.loads = pickle.Unpickler = refuse
tensors = load_state("tensors")
program = load_program("net.safetensors")
with torch.no_grad():
    print(torch.equal(program(tensors["x"]), tensors["y"]), program(tensors["x"][:1]).shape[0])
print("torchvision" in sys.modules, "test_export" in sys.modules)
"""


def test_a_fresh_process_without_the_class_and_without_pickle() -> None:
    torch.manual_seed(0)
    model, _ = cut(vit().eval(), torch.randn(2, 3, 32, 32))
    export_program(model, torch.randn(2, 3, 32, 32), PATH)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        save_state("tensors", {"x": x, "y": model(x)})
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["True 1", "False False"]


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Path:
    export_program(Calls(), torch.randn(2, 4), PATH)
    value = json.loads(read_metadata(PATH)[ENTRY])
    change(value)
    save_state(PATH, load_state(PATH), {ENTRY: json.dumps(value)})
    return PATH


def put(step: list[Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda value: value["steps"].append(step)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put(["os.system", ["true"], {}]), "uses 'os.system', which is no op of torch or torchvision that it may use"),
        (put(["operator.attrgetter", ["x"], {}]), "uses 'operator.attrgetter', which is no op"),
        (put(["torch.load", ["x"], {}]), "uses 'torch.load', which is no op"),
        (put(["aten.from_file.default", ["/etc/passwd", False, 4], {}]), "uses 'aten.from_file.default'"),
        (put(["aten.save.default", [1, "x"], {}]), "uses 'aten.save.default', which is no op"),
        (put(["aten.__class__.mro", [], {}]), "uses 'aten.__class__.mro', which is no op"),
        (put(["load_library.x.y", [], {}]), "uses 'load_library.x.y', which is no op"),
        (put(["inductor.accumulate_grad_.default", [], {}]), "uses 'inductor.accumulate_grad_.default'"),
        (put(["aten.relu.default", [], {"x=print('hello')": 1}]), "arguments of odd names"),
        (put(["aten.relu.default", [{"ref": 99}], {}]), "program in .* is damaged .*index out of range"),
        (put(["aten.relu.default", [{"ref": -1}], {}]), "is damaged .*there is no value -1"),
        (put(["aten.relu.default", [{"torch": "load"}], {}]), "is damaged .*is no argument"),
        (put(["aten.relu.default", [{"odd": 1}], {}]), "is damaged"),
        (lambda value: value["tensors"].pop(), "is damaged"),
        (lambda value: value["tensors"][0].__setitem__(1, "code"), "'code' is no kind of tensor"),
        (lambda value: value.pop("outputs"), "is damaged"),
        (lambda value: value.update(format=99), "of another format than this secateur reads"),
    ],
)
def test_files_that_were_tampered_with_are_refused(change: Callable[[dict[str, Any]], Any], sentence: str) -> None:
    with pytest.raises(RunError, match=sentence):
        load_program(rewritten(change))


def test_a_file_of_tensors_alone_and_no_file() -> None:
    save_state(PATH, {"x": torch.ones(2)})
    with pytest.raises(RunError, match="holds tensors but no program; load it into a model"):
        load_program(PATH)
    with pytest.raises(RunError, match="is not there; check the path"):
        load_program("none")


def test_every_function_is_found_by_its_name() -> None:
    assert all(find_op(op_name(function)) is function for function in FUNCTIONS.values())
    assert find_op("torchvision.nms.default") is torch.ops.torchvision.nms.default
    with pytest.raises(ModelError, match="ops of torch and torchvision alone, and this model uses prims"):
        op_name(torch.ops.prims.sin.default)


def test_tiers() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    plain, _ = cut(Calls().eval(), x)
    replayed, _ = cut(Calls(lambda x: x.view(2, 2, 4).transpose(1, 2).flatten(1)).eval(), x)
    headed, _ = cut(vit().eval(), torch.randn(2, 3, 32, 32))
    export_program(plain, x, PATH)
    assert [tier_of(model) for model in (plain, replayed, headed, load_program(PATH))] == ["a", "b", "b", "c"]
    assert tier_of(replayed, x) == "b"


def test_replays_that_repeat_what_the_model_computes_do_not_count() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    model = Calls(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)).eval()
    groups = find_groups(model, x)
    whole = apply(model, Plan(groups, tuple(tuple(range(group.size)) for group in groups.groups)))
    assert tier_of(whole) == "b"
    assert tier_of(whole, x) == "a"
    assert whole(x).shape == (2, 3)
