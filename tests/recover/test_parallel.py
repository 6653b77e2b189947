"""Training in several processes against one: real ones, started by torchrun, that talk by gloo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional

import together
from secateur.errors import TrainingError
from secateur.recover.parallel import own_device
from secateur.recover.pooled import Pooled, Slice, whole
from secateur.recover.sharded import blocks, processes
from together import CASES, Result

NAMES = [case.__name__ for case in CASES]


def start(processes: int, *arguments: str) -> None:
    """Runs `together` in so many processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launch, together.__file__, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes and three leave of the cases."""
    out = tmp_path_factory.mktemp("together")
    with torch.random.fork_rng():
        together.broken_off(out / "alone")
    start(2, str(out))
    shutil.copytree(out / "two", out / "copy")
    start(3, str(out))
    return out


def read(path: Path) -> Result:
    with safe_open(f"{path}.safetensors", "pt") as file:
        said = json.loads(file.metadata()["result"])
        names = list(file.keys())
        return Result(said["losses"], said["rows"], said["best"], {name: file.get_tensor(name) for name in names})


def assert_alike(found: Result, alone: Result, within: float = 1e-9) -> None:
    """The curves, the rows and what is left of the model, to rounding."""
    assert len(found.losses) == len(alone.losses)
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(alone.losses), rtol=0, atol=within)
    torch.testing.assert_close(torch.tensor(found.rows), torch.tensor(alone.rows), rtol=0, atol=10 * within)
    assert found.best == alone.best
    assert list(found.state) == sorted(alone.state)
    for name, tensor in alone.state.items():
        torch.testing.assert_close(found.state[name], tensor, rtol=1e-6, atol=20 * within, msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_do_what_one_does(folder: Path, name: str) -> None:
    found, other = (read(folder / f"{name}-{number}") for number in (0, 1))
    alone = next(case for case in CASES if case.__name__ == name)()
    assert len(found.losses) == 50
    assert not other.losses
    assert_alike(found, alone)
    assert other.rows == found.rows
    assert other.best == found.best
    for key, tensor in found.state.items():
        assert torch.equal(tensor, other.state[key])


def test_a_batch_of_fewer_images_than_processes(folder: Path) -> None:
    assert_alike(read(folder / "few-0"), together.few())
    for number in (1, 2):
        for key, tensor in read(folder / f"few-{number}").state.items():
            assert torch.equal(tensor, read(folder / "few-0").state[key])


def test_all_processes_refuse_alike(folder: Path) -> None:
    said, other = (json.loads((folder / f"said-{number}.json").read_text()) for number in (0, 1))
    assert said == other
    assert "epoch 1: the processes have different first batches; train(epoch) must give the same" in said["other"]
    assert "epoch 1, step 1: the loss is nan" in said["endless"]


def test_a_run_goes_on_in_another_number_of_processes(folder: Path) -> None:
    unbroken = together.rich()
    rest = Result(unbroken.losses[20:], unbroken.rows, unbroken.best, unbroken.state)
    assert_alike(read(folder / "three-0"), rest)
    assert_alike(read(folder / "resumed-0"), rest)
    for left in ("copy", "shares"):
        here = together.rich(checkpoint=folder / left)
        assert_alike(Result(here.losses, here.rows, here.best, dict(sorted(here.state.items()))), rest)


def test_slices_cover_a_batch() -> None:
    for images in (1, 2, 7, 12):
        for size in (1, 2, 3):
            part, rows = Slice(), []
            for rank in range(size):
                part.of(images, rank, size)
                rows += range(images)[part.rows]
            times = 1 if images >= size else size
            assert rows == list(range(images)) * times


def test_one_process_is_left_as_it_is() -> None:
    net, images = together.Net().train(), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    there = net(images)
    torch.manual_seed(1)
    with Pooled(Slice()):
        assert torch.equal(net(images), there)
    assert whole(there, Slice()) is there
    together.train(together.Net(), until=5)
    assert not sys.modules.get("lightning_fabric")


def test_an_output_without_images_along_its_first_axis() -> None:
    part = Slice()
    part.of(8, 0, 2)
    with pytest.raises(TrainingError, match=r"an output .3, 4. for 4 images"):
        whole(torch.zeros(3, 4), part)


def test_blocks_are_parted_once() -> None:
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    tied[2].weight = tied[0].weight
    assert blocks(tied, 20) == [tied]
    net = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(8, 8)]), "b": nn.Linear(1, 1)})
    assert blocks(net, 20) == [net["a"][0], net]


def test_what_several_processes_need(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TrainingError, match=r"there are 1 GPUs here.*--nproc-per-node 1"):
        own_device("cuda")
    with pytest.raises(TrainingError, match="not on 'mps'"):
        own_device("mps")
    with pytest.raises(TrainingError, match="masks works on whole weights"):
        processes("sharded", "cpu", {"penalty": None, "masks": object()})
    with pytest.raises(TrainingError, match="give 'replicated' or 'sharded'"):
        processes("halved", "cpu", {})  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(TrainingError, match="secateur\\[parallel\\]"):
        processes("replicated", "cpu", {})


def test_batch_norm_in_a_mode_without_slices_is_torchs() -> None:
    part = Slice()
    part.of(4, 0, 2)
    images = torch.randn(2, 3, 4, 4)
    with Pooled(part):
        found = functional.batch_norm(images, torch.zeros(3), torch.ones(3))
    assert torch.equal(found, functional.batch_norm(images, torch.zeros(3), torch.ones(3)))
