"""The command line as a user meets it: what it prints, and for each bad input one sentence and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import save_file

from secateur.cli import main
from secateur.codec.files import locked
from secateur.graph.records import Groups
from secateur.recipe.run import read_record

NETWORK = """
from torch import nn

def make(classes=10):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(32, classes)
    )
"""
RECIPE = """
threads = 1
[data]
source = "digits"
batch_size = 256
[model]
source = "nets.py:make"
[[steps]]
kind = "train"
stages = [{lr = 0.1, epochs = 2}]
[[steps]]
kind = "cut"
sparsity = 0.5
"""


@pytest.fixture(autouse=True)
def files(empty_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe and its network in the working directory; no pictures, which take seconds."""
    Path("nets.py").write_text(NETWORK)
    Path("mine.toml").write_text(RECIPE)
    monkeypatch.setattr("secateur.recipe.run.save_plots", lambda record, folder: ())
    monkeypatch.setattr("secateur.recipe.run.write_page", lambda record, path: None)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence with which a command is refused."""
    code = main(arguments)
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert "Traceback" not in error
    lines = error.splitlines()
    assert lines[-1].startswith("secateur: ")
    return lines[-1].removeprefix("secateur: ")


def changed(old: str, new: str) -> str:
    assert old in RECIPE
    Path("changed.toml").write_text(RECIPE.replace(old, new))
    return "changed.toml"


def test_compress_to_a_budget(capsys):
    command = ["compress", "--model", "nets.py:make", "--data", "digits", "--epochs", "1", "--force"]
    for words, rate in ((["--budget", "macs=0.5"], 0.5), (["--sparsity", "0.1", "--budget", "params=0.25"], 0.25)):
        assert main([*command, *words]) == 0
        first, *_, last = [row.measurement for row in read_record(Path("runs/make")).ledger.rows]
        measure = "params" if rate == 0.25 else "macs"
        before, after = ((m.params, m.macs.total)[measure == "macs"] for m in (first, last))
        # One of eight channels more would be over it.
        assert rate - 1 / 8 < after / before <= rate


def test_compress_then_report_measure_and_load(capsys):
    assert main(["compress", "mine.toml"]) == 0
    out = capsys.readouterr().out
    assert "smaller file" in out
    assert out.splitlines()[-1] == f"report: {Path('runs/mine/report.html')}"
    assert main(["report", "runs/mine"]) == 0
    out = capsys.readouterr().out
    assert "Channels before and after" in out
    assert "Sparsity of each layer" in out
    assert Path("runs/mine/report.html").read_text().startswith("<!")
    assert main(["measure", "--model", "runs/mine", "--data", "digits"]) == 0
    assert "Accuracy (top-1) and loss on 359 images" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", "--model", "runs/mine", "--input", "1,1,8,8"]) == 0
    assert "reaches the model's output" in capsys.readouterr().out


def test_inspect_shows_shares_costs_and_what_would_free_an_axis(capsys):
    assert main(["inspect", "--model", "nets.py:make", "--input", "1,1,8,8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "1 group, 8 units; with them can shrink",
        "  400 of 410 parameters (97.6 %)",
        "  4,928 of 4,928 MACs on the example inputs (100.0 %)",
    ]
    assert "    8      50   616    200  0 + 4" in lines
    at = lines.index("  reaches the model's output")
    assert lines[at + 1] == "    4.weight axis 0, 4.bias axis 0"
    assert lines[at + 2] == "    nothing frees it: the caller reads it."
    assert max(map(len, lines)) <= 100


def test_inspect_as_json_is_the_groups_with_shares_and_costs(capsys):
    assert main(["inspect", "--model", "nets.py:make", "--input", "1,1,8,8", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["params"], value["prunable_params"]) == (410, 400)
    assert (value["macs"], value["prunable_macs"]) == (4928, 4928)
    assert value["unit_costs"] == [{"params": 50, "macs": 616, "bytes": 200}]
    groups = Groups.from_json(value)
    assert groups.params_left([[0, 3]]) == 2 * 10 + 2 * 4 * 10 + 10
    assert groups.macs_left([[0, 3]]) == 4928 // 4


def test_progress_goes_to_stderr_line_by_line_where_there_is_no_terminal(capsys):
    assert main(["compress", "mine.toml"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 1 of 2: train (0 of 2 epochs)"
    assert [line.partition(" (")[2] for line in lines[1:3]] == ["1 of 2 epochs)", "2 of 2 epochs)"]
    assert lines[-1] == "writing the report (2 of 2 epochs)"


def test_a_bar_with_the_time_that_is_left_moves_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    completed = []
    update = Progress.update

    def noted(bar, task, **fields):
        completed.append(fields["completed"])
        update(bar, task, **fields)
        bar.refresh()

    monkeypatch.setattr(Progress, "update", noted)
    assert main(["compress", "mine.toml"]) == 0
    assert completed == sorted(completed)
    assert len([done for done in completed if 0 < done < 1]) == 5
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    for part in ("step 1 of 2: train ━", "step 1 of 2: validation", "step 2 of 2: cut ━", "1/2 epochs 0:00:0"):
        assert part in shown
    assert "epochs)" not in shown


def test_options_change_the_recipe():
    assert main(["compress", "mine.toml", "--sparsity", "0.25", "--epochs", "1", "--out", "out"]) == 0
    text = Path("out/recipe.toml").read_text()
    assert "sparsity = 0.25" in text
    assert "stages = [{lr = 0.1, epochs = 1}]" in text


def test_options_alone_are_a_recipe():
    options = ["--model", "nets.py:make", "--data", "digits", "--sparsity", "0.25", "--epochs", "1"]
    options += ["--normalise", "data"]
    assert main(["compress", *options]) == 0
    text = Path("runs/make/recipe.toml").read_text()
    assert "sparsity = 0.25" in text
    assert "epochs = 1}" in text
    assert f'source = "{Path("nets.py").absolute()}:make"' in text


def test_sparsity_prints_the_table_and_draws_the_plot(capsys):
    assert main(["sparsity", "--model", "nets.py:make", "--sparsity", "0.5", "--plot", "layers.png"]) == 0
    out = capsys.readouterr().out
    assert "196" in out
    assert "50.00 %" in out
    assert Path("layers.png").read_bytes().startswith(b"\x89PNG")
    assert main(["sparsity", "--model", "nets.py:make", "--sparsity", "0.5", "--plot", "layers.svg"]) == 0
    # In the report's style, whatever the user's matplotlib is set to.
    assert 'width="547.2pt"' in Path("layers.svg").read_text()


@pytest.mark.parametrize("command", ["demo", "compress", "resume", "report", "sparsity", "measure", "inspect"])
def test_every_command_has_an_example(capsys, command):
    assert main([command, "--help"]) == 0
    assert f"secateur {command} " in capsys.readouterr().out.partition("Example")[2]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"digits"', '"digts"', "unknown data set 'digts'; did you mean 'digits'?"),
        ('"nets.py:make"', '"secateur:resnet65"', "unknown secateur model 'resnet65'; did you mean 'resnet56'?"),
        ('"nets.py:make"', '"gone.py:make"', "gone.py"),
        ("sparsity = 0.5", 'sparsity = 0.5\nlimits = {keep = ["conv9"]}', "unknown layer to keep 'conv9'"),
        ("sparsity = 0.5", 'sparsity = 0.5\ncriterion = "magnitud"', "line 14: unknown criterion 'magnitud'"),
        ("sparsity = 0.5", "guide = 'ranking'\nbudget = {macs = 1}", "the budget of 1 (0.0 %) of"),
        ("sparsity = 0.5", "guide = 'ranking'\nbudget = {macs = 2.0}", "line 14: in step 2 (cut), the budget for macs"),
        ("sparsity = 0.5", "sparsity = 1.0", "line 13: sparsity in step 2 (cut) must be less than 1, and is 1.0."),
        ("epochs = 2", "epoch = 2", "line 10: unknown key 'epoch'"),
        ("lr = 0.1", 'lr = "fast"', "line 10: lr in a stage of step 1 (train) must be a number"),
        ("[data]", "[data", "is not TOML: "),
        ("lr = 0.1", "lr = 1e38", "start again with a lower one"),
        ("threads = 1", 'device = "mps"', "has no device 'mps' that torch can use"),
        ('"digits"', '"parquet:empty"', "empty"),
        ('"digits"', '"imagefolder:nowhere"', "nowhere"),
    ],
)
def test_bad_recipes_end_in_a_sentence(capsys, old, new, sentence):
    Path("empty").mkdir()
    assert sentence in refused(capsys, "compress", changed(old, new))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("compress",), "there is no recipe and no --model and --data"),
        (("compress", "--model", "nets.py:make"), "there is no recipe and no --data"),
        (("compress", "gone.toml"), "there is no recipe 'gone.toml'"),
        (("compress", "mine.toml", "--sparsity", "1.2"), "sparsity in step 2 (cut) must be less than 1, and is 1.2."),
        (("compress", "mine.toml", "--sparsity", "-0.1"), "must be at least 0, and is -0.1."),
        (("compress", "mine.toml", "--epochs", "0"), "epochs in the recipe must be at least 1, and is 0."),
        (("compress", "mine.toml", "--normalise", "imagnet"), "unknown normalise 'imagnet'; did you mean 'imagenet'?"),
        (("measure", "--model", "nets.py:make", "--data", "digits", "--normalise", "x"), "unknown normalisation 'x'"),
        (("compress", "mine.toml", "--weights", "gone.safetensors"), "gone.safetensors"),
        (("compress", "mine.toml", "--budget", "macs=half"), "--budget 'macs=half' says no number; write macs=0.5"),
        (("compress", "mine.toml", "--budget", "macs"), "--budget 'macs' says no number"),
        (("compress", "mine.toml", "--budget", "mac=0.5"), "unknown key 'mac' in step 2 (cut); did you mean 'macs'?"),
        (("compress", "mine.toml", "--budget", "macs=2.0"), "in step 2 (cut), the budget for macs is 2.0; give a"),
        (("sparsity", "--model", "nets.py:make", "--sparsity", "1"), "sparsity 1.0 is out of range"),
        (("sparsity", "--model", "nets.py:make", "--sparsity", "0.5", "--plot", "x.jpg"), "unknown kind of picture"),
        (("sparsity", "--model", "nets.py:make", "--sparsity", "0.5", "--plot", "no/x.png"), "there is no folder no"),
        (("measure", "--model", "torchvision:resnet81"), "did you mean 'resnet18'?"),
        (("measure", "--model", "nets.py:make", "--input", "1;2"), "--input '1;2' is not a shape"),
        (("measure", "--model", "nets.py:make", "--data", "digits", "--classes", "4"), "class counts do not match"),
        (("inspect", "--model", "nowhere"), "unknown model 'nowhere'"),
        (("resume", "nowhere"), "'nowhere' holds no run"),
        (("report", "nowhere"), "'nowhere' holds no run"),
    ],
)
def test_bad_arguments_end_in_a_sentence(capsys, arguments, sentence):
    assert sentence in refused(capsys, *arguments)


def test_weights_that_do_not_fit_are_named(capsys):
    save_file({"0.weight": torch.zeros(9, 1, 3, 3), "0.bias": torch.zeros(9)}, "other.safetensors")
    assert "0.weight" in refused(capsys, "compress", "mine.toml", "--weights", "other.safetensors")


def test_a_run_folder_that_exists_is_left_alone(capsys):
    assert main(["compress", "mine.toml", "--out", "out"]) == 0
    before = Path("out/journal.jsonl").read_bytes()
    capsys.readouterr()
    assert "secateur resume out), replace it (--force)" in refused(capsys, "compress", "mine.toml", "--out", "out")
    assert Path("out/journal.jsonl").read_bytes() == before
    assert main(["compress", "mine.toml", "--out", "out", "--force"]) == 0


def test_a_run_folder_in_use_is_left_alone(capsys):
    with locked("out"):
        assert "another process is at work in 'out'" in refused(capsys, "compress", "mine.toml", "--out", "out")
    assert list(Path("out").iterdir()) == []


def test_a_run_folder_that_cannot_be_made_ends_in_a_sentence(capsys):
    assert "could not write nets.py/out" in refused(capsys, "compress", "mine.toml", "--out", "nets.py/out")


def test_a_full_disk_ends_in_a_sentence(capsys, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "full" in refused(capsys, "compress", "mine.toml")


def test_a_full_disk_anywhere_else_ends_in_a_sentence(capsys, monkeypatch):
    def full(record: object, path: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "report.html")

    monkeypatch.setattr("secateur.recipe.run.write_page", full)
    assert "the disk is full (report.html)" in refused(capsys, "compress", "mine.toml")


def test_other_faults_keep_their_traceback(monkeypatch):
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr("secateur.recipe.run.write_page", broken)
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        main(["compress", "mine.toml"])


def test_ctrl_c_says_how_to_go_on_and_resume_does(capsys, monkeypatch):
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("secateur.recipe.steps.cut", stop)
        assert main(["compress", "mine.toml", "--out", "out"]) == 130
    assert "interrupted; go on with: secateur resume out" in capsys.readouterr().err
    assert main(["resume", "out"]) == 0
    assert "smaller file" in capsys.readouterr().out


def test_ctrl_c_before_anything_is_written(capsys, monkeypatch):
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.recipe.run.prepare", stop)
    assert main(["compress", "mine.toml", "--out", "out"]) == 130
    assert "interrupted; nothing was written." in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_unknown_option_is_a_usage_error(capsys):
    assert main(["compress", "--sparcity", "0.5"]) == 2
    assert "--sparsity" in capsys.readouterr().err


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "secateur", "resume", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "secateur: 'nowhere' holds no run; give the folder that was made by `secateur compress`.\n"
