"""How long it takes to score every unit of a model by L1 magnitude, with Torch-Pruning beside it; and what data cost.

    python benchmarks/scoring_speed.py --models vgg16 resnet50 --rounds 15
    python benchmarks/scoring_speed.py --data --images 256

Without `--data`: torchvision models with random weights, both in one process, by turns; medians of wall and of
processor time. Graphs and groups are there beforehand; the peer's pass is `importance(group)` over all groups of its
graph, once with the groups ready in a list and once with `get_all_groups`, as its pruners call it. Each scores as its
users would: ours the layers that make the units, the peer's `MagnitudeImportance(p=1)` all layers of a group.

With `--data`: the criteria that look at images, on ResNet-20 and random images of CIFAR's size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision

import secateur as sc
from secateur.score.fisher import Fisher
from secateur.score.taylor import Taylor

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["vgg16", "resnet50"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", action="store_true", help="time Taylor and Fisher instead")
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.rounds} rounds by turns")
    for name in () if options.data else options.models:
        against_peer(name, options.rounds)
    if options.data:
        with_images(options.images, options.rounds)


def against_peer(name: str, rounds: int) -> None:
    """L1 scores of one torchvision model, and the peer's."""
    import torch_pruning as tp

    model, example = torchvision.models.get_model(name).eval(), torch.randn(1, 3, 224, 224)
    groups = sc.find_groups(model, example)
    graph = tp.DependencyGraph().build_dependency(model, example)
    head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1:]
    ready, importance = list(graph.get_all_groups(ignored_layers=head)), tp.importance.MagnitudeImportance(p=1)
    took = by_turns(
        {
            "secateur": lambda: sc.score(model, groups, sc.Magnitude(1)),
            "peer": lambda: [importance(group) for group in ready],
            "peer, with its groups": lambda: [importance(group) for group in graph.get_all_groups(ignored_layers=head)],
        },
        rounds,
    )
    print(f"{name}: {len(groups.groups)} groups, the peer's {len(ready)}")
    for who, (wall, processor) in took.items():
        shares = f"ours is {took['secateur'][0] / wall:.3f} of it (processor {took['secateur'][1] / processor:.3f})"
        said = "" if who == "secateur" else f"; {shares}"
        print(f"  {who}: {1e3 * wall:.1f} ms wall, {1e3 * processor:.1f} ms processor{said}")


def with_images(count: int, rounds: int) -> None:
    """Taylor and Fisher on ResNet-20."""
    model = sc.build_model("secateur:resnet20", classes=10).model.eval()
    images, labels = torch.randn(count, 3, 32, 32), torch.randint(0, 10, (count,))
    groups = sc.find_groups(model, images[:2])
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    took = by_turns(
        {
            f"taylor, batches of {BATCH}": lambda: sc.score(model, groups, Taylor(batches)),
            "fisher, one image at a time": lambda: sc.score(model, groups, Fisher(batches)),
        },
        rounds,
    )
    for what, (wall, processor) in took.items():
        print(f"  {what}, {count} images: {wall:.2f} s wall, {processor:.2f} s processor")


def by_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median wall and processor seconds of each."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            wall, processor = time.perf_counter(), time.process_time()
            function()
            if turn:  # the first warms up
                seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {
        name: (statistics.median(w for w, _ in pairs), statistics.median(p for _, p in pairs))
        for name, pairs in seconds.items()
    }


if __name__ == "__main__":
    main()
