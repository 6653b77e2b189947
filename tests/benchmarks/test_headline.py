"""The headline benchmark runs through, goes on after a stop, and needs no more than it says."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = ("pydantic", "typer", "jinja2", "matplotlib", "rich", "sklearn", "timm", "transformers", "onnx", "ray")
STAGES = ["dense16", "shape16", "cut16", "trained16", "dense19", "cut19", "trained19"]


def test_all_stages_of_the_headline_run_on_a_cpu(tmp_path):
    script = str(ROOT / "benchmarks" / "vgg16_cifar100.py")

    def call(*given: str) -> str:
        code = f"import sys, runpy; sys.modules.update(dict.fromkeys({ABSENT})); sys.argv = {[script, *given]}; "
        command = [sys.executable, "-c", code + f"runpy.run_path({script!r}, run_name='__main__')"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "dense16 is not done yet" in call("--smoke", "--device", "cpu", "--out", "run", "--minutes", "0.001")
    assert "All stages are done" in call("--smoke", "--device", "cpu", "--out", "run")
    rows = {row["stage"]: row for row in map(json.loads, (tmp_path / "run" / "rows.jsonl").read_text().splitlines())}
    assert list(rows) == STAGES
    assert rows["cut16"]["certified"]
    assert rows["cut19"]["certified"]
    assert abs(rows["cut19"]["macs_times"] / 8.9 - 1) < 0.02
    assert "trained19: " in call("--out", "run", "--table")
