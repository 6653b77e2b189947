"""Global unstructured pruning of torchvision's VGG16: secateur against `torch.nn.utils.prune`, in one run.

    python benchmarks/global_threshold.py [--sparsity 0.8] [--threads 2] [--only secateur]

Each side starts in a process of its own, builds the network with random weights from the same seed, and is
timed from the dense model to the model with its masks made and its weights zeroed: by the clock, and by the
work of all threads, which a busy machine stretches less. The extra memory is the growth of the process's peak
resident set (`ru_maxrss`) over that span, so it needs Linux or macOS. Both must drop the same weights: the
number of zeros and a checksum over their positions are compared.

The bar is a twentieth of the time, and a tenth of the model's size in extra memory. The peer takes about a
minute and needs 7 GB of free memory. `--threads` is for torch; secateur uses one whatever it says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time

import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

from secateur.measure.sparsity import prunable_weights
from secateur.surgery.masks import find_masks


def peak() -> int:
    """The most memory in bytes that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def by_secateur(model: nn.Module, sparsity: float) -> None:
    find_masks(model, sparsity).apply_(model)


def by_torch(model: nn.Module, sparsity: float) -> None:
    layers = [(module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=sparsity)
    for layer, name in layers:
        prune.remove(layer, name)


def one_side(side: str, sparsity: float, threads: int) -> dict[str, object]:
    """Seconds, extra peak memory and what was dropped, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = torchvision.models.vgg16(weights=None, init_weights=False)
    # Warms the allocator and the thread pool, and loads what is imported late.
    prune_model = {"secateur": by_secateur, "torch": by_torch}[side]
    prune_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 4)), 0.5)
    before, start, worked = peak(), time.perf_counter(), time.process_time()
    prune_model(model, sparsity)
    seconds, worked, extra = time.perf_counter() - start, time.process_time() - worked, peak() - before
    digest, zeros = hashlib.sha256(), 0
    for weight in prunable_weights(model).values():
        zeros += weight.numel() - int(weight.count_nonzero())
        digest.update((weight == 0).numpy().tobytes())
    return {"seconds": seconds, "worked": worked, "extra": extra, "zeros": zeros, "digest": digest.hexdigest()[:16]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["secateur", "torch"])
    parser.add_argument("--side", choices=["secateur", "torch"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        print(json.dumps(one_side(chosen.side, chosen.sparsity, chosen.threads)))
        return
    with torch.device("meta"):
        size = sum(4 * p.numel() for p in torchvision.models.vgg16(init_weights=False).parameters())
    print(
        f"torchvision vgg16, random weights, {size / 1e6:.1f} MB of float32, sparsity {chosen.sparsity}, CPU,\n"
        f"{chosen.threads} threads of {os.cpu_count()} cores ({platform.machine()}), "
        f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, Python {platform.python_version()}, one run each"
    )
    results = {}
    for side in [chosen.only] if chosen.only else ["secateur", "torch"]:
        command = [sys.executable, __file__, "--side", side, "--sparsity", str(chosen.sparsity)]
        command += ["--threads", str(chosen.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[side] = result = json.loads(done.stdout)
        extra, share = result["extra"] / 1e6, result["extra"] / size
        times = f"{result['seconds']:7.2f} s, {result['worked']:7.2f} s of work"
        print(f"{side:>9}: {times}, {extra:7.1f} MB extra, {share:.3f} of the model")
    if len(results) == 2:
        ours, theirs = results["secateur"], results["torch"]
        same = (ours["zeros"], ours["digest"]) == (theirs["zeros"], theirs["digest"])
        clock, work = theirs["seconds"] / ours["seconds"], theirs["worked"] / ours["worked"]
        print(f"secateur is {clock:.0f} times faster by the clock, {work:.0f} times by the work of all threads")
        print(f"the same {ours['zeros']:,} weights were dropped: {same}")


if __name__ == "__main__":
    main()
