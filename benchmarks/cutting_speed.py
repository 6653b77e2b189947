"""Seconds to capture, group, score and cut, ours and Torch-Pruning's by turns in one process, medians and their ratio.

    python benchmarks/cutting_speed.py --rounds 3
    python benchmarks/cutting_speed.py --names resnet50 vgg16

Half of every group by L2 magnitude, no configuration, on float torchvision models of many families. Both get a fresh
copy of the model each time, and a first model, which imports and warms up, does not count. For a quiet machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from models import build

import secateur as sc

NAMES = (
    "alexnet convnext_tiny deeplabv3_mobilenet_v3_large densenet121 efficientnet_b0 efficientnet_b4 fcn_resnet50 "
    "inception_v3 lraspp_mobilenet_v3_large mnasnet1_0 mobilenet_v2 mobilenet_v3_small r3d_18 regnet_x_1_6gf "
    "regnet_y_800mf resnet18 resnet50 resnet152 resnext50_32x4d squeezenet1_0 vgg11_bn wide_resnet50_2"
).split()


def ours(model: Any, inputs: Any) -> int:
    groups = sc.find_groups(model, inputs)
    plan = sc.allocate(sc.score(model, groups, sc.Magnitude(2)), sc.Uniform(0.5))
    return sum(p.numel() for p in sc.apply(model, plan).parameters())


def peer(model: Any, inputs: Any) -> int:
    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1:]
    importance = tp.importance.MagnitudeImportance(p=2)
    pruner = tp.pruner.MagnitudePruner(model, inputs, importance=importance, pruning_ratio=0.5, ignored_layers=last)
    pruner.step()
    return sum(p.numel() for p in model.parameters())


def timed(cut: Callable[[Any, Any], int], model: Any, inputs: Any) -> float:
    own = copy.deepcopy(model)
    start = time.perf_counter()
    cut(own, inputs)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", default=NAMES)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    ratios = []
    print(f"{'model':32} {'ours s':>8} {'peer s':>8} {'ratio':>6}")
    for name in ("squeezenet1_1", *options.names):
        model, inputs = build("torchvision", name)
        model.eval()
        try:
            times = [(timed(ours, model, inputs), timed(peer, model, inputs)) for _ in range(options.rounds)]
        except Exception as error:  # the peer's, on what it cannot cut
            print(f"{name:32} {type(error).__name__}: {str(error)[:60]}")
            continue
        if name == "squeezenet1_1":  # warms up
            continue
        mine, theirs = (statistics.median(column) for column in zip(*times))
        ratios.append(mine / theirs)
        print(f"{name:32} {mine:8.2f} {theirs:8.2f} {ratios[-1]:6.2f}", flush=True)
    print(f"median ratio of {len(ratios)}: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
