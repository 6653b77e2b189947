"""The headline: VGG16 and VGG19 on CIFAR-100, made 11 times smaller and 9 times faster, for one large GPU.

    python benchmarks/vgg16_cifar100.py --data parquet:DIR --out runs/vgg16   # until it says that all is done
    python benchmarks/vgg16_cifar100.py --out runs/vgg16 --table
    python benchmarks/vgg16_cifar100.py --smoke --out runs/smoke              # the same stages, tiny, on any CPU

A call goes on where the last one stopped, and stops by itself after `--minutes`, 8.5 unless said otherwise: between
epochs, each of which has its checkpoint. Needed: torch, torchvision, numpy, scipy, pyarrow, safetensors, this package.

Stages, one row each in `rows.jsonl`:

- dense16: VGG16 with batch norm from scratch. Bar: 74.4 %.
- shape16: the torchvision VGG16 of the report (134 million weights, no batch norm): dense16's convolutions with the
  batch norms folded in, and three new linear layers, trained for 10 epochs. It stands for the report's transfer.
- cut16: shape16 cut to 46.3 MiB by the report's rule: shares by the sparsity of global magnitude pruning at 0.8, L1
  within a layer. Accuracy as cut (report: 7.31 %), and after `reconstruct` on train images of which no label is read
  (aim: 3 points below dense). Beside it the same size by `Direction`, ranked per byte.
- trained16: the report's cut after 20 epochs with dense16 as a teacher (report: 74.15 %).
- dense19, cut19, trained19: VGG19 with batch norm from scratch, its MACs divided by 8.9 (`Direction`, ranked per MAC,
  then `reconstruct`), trained (DepGraph, Fang et al. 2023, table 3: 73.50 -> 70.39 %; aim: 72.5 %).

2 % of the train images are held out; the best epochs of shape16 and trained16 are chosen on them, the others keep their
last. Accuracy in a row is on the 10,000 test images, which nothing else sees; seconds are those of all epochs, with
validation, on the device that the row names.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import secateur as sc
from secateur.codec.state import load_state, save_state
from secateur.recover.mixing import Mixed
from secateur.zoo import vgg_cifar
from secateur.zoo.images import Images

MIB = 46.334
"""Of the report's file; the budget is in bytes of tensors."""
WHOLE = 134_670_244 * 4
"""Bytes of the report's network with 100 classes: a smaller one is cut to the same share."""
MACS = 8.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar100", help="a data set, as load_data takes it")
    parser.add_argument("--out", type=Path, default=Path("runs/vgg16_cifar100"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.5, help="of this call")
    parser.add_argument("--stages", nargs="*", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--epochs", type=float, default=1.0, help="of every stage, times this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny networks on images made up on the spot")
    parser.add_argument("--table", action="store_true", help="print the rows that there are, and run nothing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = read(options.out)
    if not options.table:
        bench = Bench(options, Clock(60 * options.minutes))
        for stage in options.stages:
            if stage in rows:
                continue
            try:
                found = STAGES[stage](bench)
            except OutOfTime:
                print(f"{stage} is not done yet; the same command goes on with it.", flush=True)
                break
            rows[stage] = {"stage": stage, "smoke": options.smoke, "seed": options.seed, **found, **bench.machine()}
            with (options.out / "rows.jsonl").open("a") as file:
                file.write(json.dumps(rows[stage]) + "\n")
            print(json.dumps(rows[stage]), flush=True)
        else:
            print("All stages are done.")
    report(list(rows.values()))


class OutOfTime(Exception):
    """This call's minutes are over."""


class Clock:
    def __init__(self, seconds: float) -> None:
        self._start = self._last = time.monotonic()
        self._end, self._longest = self._start + seconds, 0.0

    def half(self) -> None:
        """OutOfTime unless half of the time is left: for what cannot be broken off."""
        if time.monotonic() - self._start > (self._end - self._start) / 2:
            raise OutOfTime

    def check(self) -> None:
        """OutOfTime unless another stretch as long as the longest so far would fit."""
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        if now + 1.2 * self._longest > self._end:
            raise OutOfTime

    def begin(self) -> None:
        self._longest, self._last = 0.0, time.monotonic()
        self.check()


class Bench:
    """What the stages share."""

    def __init__(self, options: argparse.Namespace, clock: Clock) -> None:
        self.options, self.clock = options, clock
        self.data = made_up() if options.smoke else sc.load_data(options.data, validation=0.02)
        parts = {"train": self.data.train, "validation": self.data.validation, "test": self.data.test}
        place = options.device
        self.images = {name: Images(part.pixels.to(place), part.labels.to(place)) for name, part in parts.items()}

    def batches(self, part: str, size: int, **how: Any) -> Iterator[tuple[Tensor, Tensor]]:
        where = {"mean": self.data.mean, "std": self.data.std, "device": self.options.device}
        return self.images[part].batches(size, **where, **how)

    def unlabelled(self, count: int) -> list[Tensor]:
        """Train images on the CPU, drawn at random, in batches of 128."""
        random = torch.Generator().manual_seed(self.options.seed)
        chosen = self.data.train.take(torch.randperm(len(self.data.train), generator=random)[:count])
        return [x for x, _ in chosen.batches(128, mean=self.data.mean, std=self.data.std)]

    def test(self, model: nn.Module) -> float:
        """Top-1 in %, on the test images."""
        there = copy.deepcopy(model).to(self.options.device)
        return round(100 * sc.accuracy(there, self.batches("test", 500), device=self.options.device).top1, 2)

    def train(self, name: str, model: nn.Module, lr: float, epochs: int, **how: Any) -> dict[str, Any]:
        """Trains in place, with a checkpoint after each epoch; what it took."""
        smoke = self.options.smoke
        epochs, size = 2 if smoke else max(1, round(epochs * self.options.epochs)), 16 if smoke else 128
        seed = self.options.seed
        torch.manual_seed(seed)
        self.clock.begin()
        history = sc.fine_tune(
            model,
            lambda epoch: self.batches("train", size, shuffle=1000 * seed + epoch, augment=("crop", "flip")),
            lambda: self.batches("validation", 500),
            [sc.Stage(lr, epochs)],
            schedule="one-cycle",
            nesterov=True,
            batches_per_epoch=-(-len(self.images["train"]) // size),
            device=self.options.device,
            channels_last=True,
            bf16=self.options.device != "cpu",
            checkpoint=self.options.out / name,
            on_epoch=lambda row: self.clock.check(),
            **{"weight_decay": 5e-4, **how},
        )
        model.cpu()
        seconds = sum(row.seconds for row in history.rows)
        return {"epochs": epochs, "seconds": round(seconds, 1), "seconds_per_epoch": round(seconds / epochs, 2)}

    def keep(self, name: str, model: nn.Module) -> None:
        save_state(self.options.out / f"{name}.safetensors", model.cpu().state_dict(), {})

    def kept(self, name: str, model: nn.Module) -> nn.Module:
        model.load_state_dict(load_state(self.options.out / f"{name}.safetensors"))
        return model.eval()

    def machine(self) -> dict[str, Any]:
        cuda = self.options.device.startswith("cuda")
        device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
        return {"device": device, "torch": torch.__version__}

    def plain(self, depth: int) -> nn.Module:
        """With batch norm and one linear layer."""
        if not self.options.smoke:
            return {16: vgg_cifar.vgg16_bn, 19: vgg_cifar.vgg19_bn}[depth](100)
        stages = {16: vgg_cifar.VGG16, 19: vgg_cifar.VGG19}[depth]
        narrow = tuple(tuple(width // 16 for width in widths) for widths in stages)
        return vgg_cifar.VGG(vgg_cifar.features(3, narrow), nn.Linear(32, 100))

    def shape(self) -> nn.Module:
        """torchvision's VGG16, without values of its own in the convolutions."""
        model = torchvision.models.vgg16(weights=None, num_classes=100)
        if self.options.smoke:
            widths = [width // 16 if isinstance(width, int) else width for width in torchvision.models.vgg.cfgs["D"]]
            model.features = torchvision.models.vgg.make_layers(widths)
            head = [nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 100)]
            model.classifier = nn.Sequential(*head)
        return model


def dense(depth: int) -> Callable[[Bench], dict[str, Any]]:
    def stage(bench: Bench) -> dict[str, Any]:
        torch.manual_seed(bench.options.seed)
        model = bench.plain(depth)
        how = {"label_smoothing": 0.1, "ema": 0.999, "keep": "last", "mix": SOMETIMES}
        took = bench.train(f"dense{depth}", model, 0.1, 160, **how)
        bench.keep(f"dense{depth}", model)
        return {"accuracy": bench.test(model), **took}

    return stage


@dataclass(frozen=True)
class Sometimes:
    """A mix of every second batch."""

    mix: Any

    def __call__(self, images: Tensor) -> Mixed:
        if int(torch.randint(2, ())):
            return self.mix(images)
        return Mixed(images, torch.arange(len(images), device=images.device), 1.0)


SOMETIMES = Sometimes(sc.CutMix(1.0))


def shape16(bench: Bench) -> dict[str, Any]:
    source, model = bench.kept("dense16", bench.plain(16)), bench.shape()
    layers = list(source.features)
    pairs = [(layer, layers[i + 1]) for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    places = [layer for layer in model.features if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        for (conv, norm), place in zip(pairs, places, strict=True):
            folded = nn.utils.fuse_conv_bn_eval(conv, norm)
            place.weight.copy_(folded.weight)
            place.bias.copy_(folded.bias)
    teacher = sc.Distillation(source, temperature=2.0, weight=0.5)
    took = bench.train("shape16", model, 0.005, 10, distill=teacher, clip=1.0)
    bench.keep("shape16", model)
    return {"accuracy": bench.test(model), **size_of(model), **took}


def size_of(model: nn.Module) -> dict[str, Any]:
    return {"params": sc.count_params(model), "file_mib": round(sc.file_bytes(model) / 2**20, 2)}


def cut16(bench: Bench) -> dict[str, Any]:
    bench.clock.half()
    model = bench.kept("shape16", bench.shape())
    images = bench.unlabelled(64 if bench.options.smoke else 2048)
    groups = sc.find_groups(model, bench.data.example())
    budget = sc.Budget(bytes=MIB * 2**20 / WHOLE)
    begun = time.perf_counter()
    scores = sc.score(model, groups, sc.Magnitude(1))
    plan = sc.allocate(scores, sc.SparsityGuided(sc.find_masks(model, 0.8).table()), budget=budget)
    row = {"dense": bench.test(model), "planning": round(time.perf_counter() - begun, 1)}
    row |= recovered(bench, "report16", model, plan, images)
    scores = sc.score(model, groups, sc.Direction(images[:4]))
    ranked = sc.allocate(scores, sc.GlobalRanking(per_cost=True), budget=budget)
    other = recovered(bench, "ranked16", model, ranked, images)
    return row | {f"direction_{name}": value for name, value in other.items()}


def recovered(bench: Bench, name: str, model: nn.Module, plan: sc.Plan, images: list[Tensor]) -> dict[str, Any]:
    """Accuracy as cut, with batch norm's statistics anew, and after least squares; the plan and the model are kept."""
    smaller = sc.apply(model, plan)
    certificate = sc.certify(model, smaller, plan, bench.data.example(2))
    row = {"certified": certificate.ok, **size_of(smaller), "raw": bench.test(smaller)}
    row["macs_times"] = round(plan.groups.macs / plan.macs_left, 2)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        reset = copy.deepcopy(smaller)
        sc.reset_statistics(reset, images)
        row["reset"] = bench.test(reset)
    begun = time.perf_counter()
    sc.reconstruct(model, smaller, plan, images, held=len(images))
    row |= {"recovery_seconds": round(time.perf_counter() - begun, 1), "recovered": bench.test(smaller)}
    bench.keep(name, smaller)
    (bench.options.out / f"{name}.json").write_text(json.dumps(plan.to_json()))
    return row


def cut19(bench: Bench) -> dict[str, Any]:
    bench.clock.half()
    model = bench.kept("dense19", bench.plain(19))
    images = bench.unlabelled(64 if bench.options.smoke else 2048)
    scores = sc.score(model, sc.find_groups(model, bench.data.example()), sc.Direction(images[:4]))
    plan = sc.allocate(scores, sc.GlobalRanking(per_cost=True), budget=sc.Budget(macs=1 / MACS))
    return {"dense": bench.test(model), **recovered(bench, "ranked19", model, plan, images)}


Stage = Callable[[Bench], dict[str, Any]]


def trained(name: str, cut: str, whole: Callable[[Bench], nn.Module], how: dict[str, Any]) -> Stage:
    def stage(bench: Bench) -> dict[str, Any]:
        plan = sc.Plan.from_json(json.loads((bench.options.out / f"{cut}.json").read_text()))
        model = bench.kept(cut, sc.apply(whole(bench), plan))
        depth = name[-2:]
        teacher = bench.kept(f"dense{depth}", bench.plain(int(depth)))
        took = bench.train(name, model, distill=sc.Distillation(teacher, temperature=2.0, weight=0.7), **how)
        bench.keep(name, model)
        return {"accuracy": bench.test(model), **size_of(model), **took}

    return stage


LONG = {"lr": 0.05, "epochs": 120, "ema": 0.999, "keep": "last"}
STAGES: dict[str, Stage] = {
    "dense16": dense(16),
    "shape16": shape16,
    "cut16": cut16,
    "trained16": trained("trained16", "report16", Bench.shape, {"lr": 0.01, "epochs": 20, "clip": 1.0}),
    "dense19": dense(19),
    "cut19": cut19,
    "trained19": trained("trained19", "ranked19", lambda bench: bench.plain(19), LONG),
}


def made_up() -> sc.Data:
    """100 classes of small images, each a pattern and noise."""
    random = torch.Generator().manual_seed(0)
    patterns = torch.rand(100, 3, 32, 32, generator=random)
    parts = []
    for each in (3, 1, 1):
        labels = torch.arange(100).repeat(each)
        pixels = patterns[labels] * 200 + 55 * torch.rand(len(labels), 3, 32, 32, generator=random)
        parts.append(Images(pixels.to(torch.uint8), labels))
    names = tuple(map(str, range(100)))
    return sc.Data("made up", names, *parts, (0.5,) * 3, (0.25,) * 3, ())


def read(out: Path) -> dict[str, dict[str, Any]]:
    path = out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["stage"]: row for row in rows}


def report(rows: list[dict[str, Any]]) -> None:
    """A paragraph for each stage."""
    for row in rows:
        print(f"\n{row['stage']}: " + ", ".join(f"{name} {value}" for name, value in row.items() if name != "stage"))


if __name__ == "__main__":
    main()
