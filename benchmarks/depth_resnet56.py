"""How much accuracy is left when whole residual blocks of a trained ResNet are left out, and how much faster it is.

    python benchmarks/depth_resnet56.py --data parquet:DIR --weights resnet56_cifar10.safetensors

The blocks of one stage may go, and the first of the second and third stage may not, as they change the shape. They are
chosen on train images, by what they add to the stream ("energy"), by how far they turn it ("turning"), by how much the
loss rises without them ("damage"), or at random; "again" scores the rest anew after each block that has gone. Then the
batch norms take their statistics anew from `--images` train images; no training. Accuracy is on test images, which
nothing else sees: as dropped ("raw") and with these statistics ("reset"). Times are medians of a batch of one, the two
models by turns. The network has been trained on all of the train images.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.allocate.depth import Drop, choose_blocks
from secateur.graph.blocks import Blocks
from secateur.graph.residual import find_blocks
from secateur.score.blocks import BlockScores, added_energy, damage, score_blocks, turning
from secateur.surgery.drop import certify_drop, drop_blocks

Score = Callable[..., BlockScores]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="a data set, as load_data takes it")
    parser.add_argument("--normalise", default="imagenet", help="as the weights were trained; see load_data")
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--drop", type=int, nargs="*", default=[3, 6, 9], help="how many blocks go")
    parser.add_argument("--images", type=int, default=2048, help="train images for scores and statistics")
    parser.add_argument("--labelled", type=int, default=512, help="of these, how many for damage")
    parser.add_argument("--test", type=int, default=10000, help="test images, the first ones")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of random choices")
    parser.add_argument("--ways", nargs="*", help='only these, such as "energy" or "damage, again"')
    options = parser.parse_args()
    begun = time.perf_counter()
    data = sc.load_data(options.data, normalise=options.normalise)
    model = sc.build_model(f"secateur:{options.model}", classes=10, weights=options.weights).model.eval()
    blocks = find_blocks(model, data.example())
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: options.images]
    train = list(data.train.take(order).batches(256, mean=data.mean, std=data.std))
    test = list(data.test.take(range(options.test)).batches(250, mean=data.mean, std=data.std))
    single = [inner for inner in blocks.blocks if inner.inside == 1]
    print(f"{options.model}: {len(single)} blocks can go; {options.test} test images: {percent(model, test)} %")
    print("| way | blocks | params left | MACs left | raw | reset | faster | seconds to choose | dropped |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    labelled = train[: max(1, options.labelled // 256)]
    for way, count, drop, seconds in choices(model, blocks, train, labelled, options):
        small = drop_blocks(model, blocks, drop.names)
        assert certify_drop(model, small, drop, test[0][0][:2]).ok
        reset = copy.deepcopy(small)
        sc.reset_statistics(reset, [images for images, _ in train])
        faster = sc.compare_latency(model, small, data.example(), runs=60, warmup=10, threads=2)[2]
        shares = f"{drop.params_left / blocks.params:.3f} | {drop.macs_left / blocks.macs:.3f}"
        accuracies = f"{percent(small, test)} | {percent(reset, test)}"
        names = " ".join(name.removeprefix("layer") for name in drop.names)
        print(f"| {way} | {count} | {shares} | {accuracies} | {faster:.2f} | {seconds:.0f} | {names} |", flush=True)
    print(f"{time.perf_counter() - begun:.0f} s, {torch.get_num_threads()} threads, torch {torch.__version__}")


def choices(
    model: nn.Module,
    blocks: Blocks,
    train: list[tuple[Tensor, Tensor]],
    labelled: list[tuple[Tensor, Tensor]],
    options: argparse.Namespace,
) -> Iterator[tuple[str, int, Drop, float]]:
    """(way, how many, which, seconds for all of a way): each way is asked once, for the most, and gives the others."""
    images = [batch for batch, _ in train]
    ways: dict[str, Score] = {
        "energy": partial(score_blocks, model, blocks, images, added_energy),
        "turning": partial(score_blocks, model, blocks, images, partial(turning, axis=1)),
        "damage": partial(score_blocks, model, blocks, labelled, damage),
    }
    plain = [(name, way, None) for name, way in ways.items()]
    again = [(f"{name}, again", way, lambda gone, way=way: way(gone=gone)) for name, way in ways.items()]
    for name, way, rescore in plain + again:
        if options.ways is None or name in options.ways:
            start = time.perf_counter()
            most = choose_blocks(only_single(way()), max(options.drop), again=rescored(rescore))
            for count in options.drop:
                yield name, count, Drop(blocks, most.names[:count]), time.perf_counter() - start
    for seed in options.seeds if options.ways is None or "random" in options.ways else []:
        names = [block.name for block in blocks.blocks if block.inside == 1]
        names = random.Random(seed).sample(names, max(options.drop))
        for count in options.drop:
            yield f"random {seed}", count, Drop(blocks, tuple(names[:count])), 0.0


def only_single(scores: BlockScores) -> BlockScores:
    """Whole stages are left alone."""
    values = zip(scores.values, scores.blocks.blocks)
    return BlockScores(scores.blocks, tuple(v if block.inside == 1 else float("inf") for v, block in values))


def rescored(again: Score | None) -> Callable[[tuple[str, ...]], BlockScores] | None:
    return None if again is None else lambda gone: only_single(again(gone))


def percent(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> str:
    return f"{100 * sc.accuracy(model, batches).top1:.2f}"


if __name__ == "__main__":
    main()
