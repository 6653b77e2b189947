"""Is a run that is killed at any moment, and gone on with, the run that it would have been?

    python benchmarks/kill_and_resume.py --runs 30

A recipe with all that has a state of its own (dropout, crops, mixup, momentum, AdamW, averaged weights, a warm-up,
distillation) is run once without a break. Then it is run `--runs` times more; each is killed with SIGKILL at one to
three random moments, in the middle of whatever it does, and gone on with by `secateur resume`, or begun again if it had
come to nothing yet. Every file must be readable after each, and the final weights the same, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from secateur.codec.state import load_state
from secateur.recipe.folder import load

RECIPE = """
threads = 1

[data]
source = "digits"
validation = 0.1
batch_size = 64
augment = ["crop"]

[model]
source = "secateur:digits_vgg"

[[steps]]
kind = "train"
stages = [{lr = 0.05, epochs = 3}]
schedule = "cosine"
warmup = 1
mixup = 0.2
ema = 0.98

[[steps]]
kind = "cut"
guide = "ranking"
criterion = "magnitude"
p = 1
budget = {macs = 0.4}

[[steps]]
kind = "train"
stages = [{lr = 0.002, epochs = 4}]
optimizer = "adamw"
clip = 1.0
distill = {weight = 0.5}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        folder, recipe = Path(place), Path(place) / "recipe.toml"
        recipe.write_text(RECIPE)
        begun = time.perf_counter()
        go_on(folder / "whole", recipe)
        seconds = time.perf_counter() - begun
        wanted, same, kills = weights(folder / "whole"), 0, Counter[str]()
        print(f"unbroken: {seconds:.1f} s, weights {wanted[:12]}", flush=True)
        for number in range(1, options.runs + 1):
            run = folder / str(number)
            moments = [draw.uniform(0, seconds) for _ in range(draw.randint(1, 3))]
            for moment in moments:
                kills[go_on(run, recipe, kill=moment)] += 1
                check_readable(run)
            go_on(run, recipe)
            found = weights(run)
            same += found == wanted
            print(f"{number}: killed after {', '.join(f'{m:.1f}' for m in moments)} s; {found[:12]}", flush=True)
            shutil.rmtree(run)
        print(f"{same} of {options.runs} end with the weights of the unbroken run; killed: {dict(kills)}")
        sys.exit(same != options.runs)


def go_on(run: Path, recipe: Path, kill: float | None = None) -> str:
    """Begin a run, or go on with it; killed after so many seconds. Says how far it had come."""
    if (run / "run.json").exists():
        return "after it was done"
    verb = ["resume", run] if (run / "recipe.toml").exists() else ["compress", recipe, "--out", run]
    command = [sys.executable, "-m", "secateur", *map(str, verb)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=kill)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        done = list(run.glob("**/*.safetensors"))
        return f"with {len(done)} files of weights" if done else "before the first file of weights"
    if process.returncode:
        raise SystemExit(f"secateur {verb[0]} ended with {process.returncode}: {said}")
    return "after it was done"


def check_readable(run: Path) -> None:
    """Every file that has its name is whole; what was being written has another."""
    for path in run.glob("**/*.json"):
        json.loads(path.read_text())
    for path in run.glob("**/*.safetensors"):
        if not path.name.endswith(".next.safetensors"):
            load_state(path)


def weights(run: Path) -> str:
    """A hash of all parameters and buffers of a run's final model."""
    digest = hashlib.sha256()
    for name, tensor in load(run).state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
