"""Takes a trained PyTorch model and gives back a smaller, faster one with the same accuracy, and the proof.

The verbs and records of all rooms, by their own names: `import secateur as sc; sc.find_groups(...)`. Each is
imported when it is first asked for, so that `secateur --help` need not wait for torch. The rooms `measure` and `score`
bear the names of their verbs, and importing a room puts it in the verb's place: such a room is called as its verb.
"""

from __future__ import annotations

import importlib
import sys
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.allocate.budget import Budget
    from secateur.allocate.depth import Drop, choose_blocks
    from secateur.allocate.knapsack import Knapsack
    from secateur.allocate.latency_knapsack import LatencyKnapsack
    from secateur.allocate.limits import Limits
    from secateur.allocate.plan import Plan, allocate
    from secateur.allocate.ranking import GlobalRanking
    from secateur.allocate.sensitivity import Sensitivity, SensitivityGuided, find_sensitivity
    from secateur.allocate.sparsity_guided import SparsityGuided
    from secateur.allocate.threshold import global_threshold
    from secateur.allocate.uniform import Uniform
    from secateur.codec.program import Program, load_program
    from secateur.errors import SecateurError
    from secateur.graph.blocks import Blocks
    from secateur.graph.groups import find_groups
    from secateur.graph.nested import Example
    from secateur.graph.records import Groups
    from secateur.graph.residual import find_blocks
    from secateur.measure.accuracy import Accuracy, accuracy
    from secateur.measure.latency import Latency, compare_latency, latency
    from secateur.measure.macs import count_macs
    from secateur.measure.measure_table import measure_table
    from secateur.measure.measurement import Measurement, measure
    from secateur.measure.params import count_params, file_bytes
    from secateur.measure.reasons import why_not_faster
    from secateur.measure.runtimes import compiled, eager, onnx_runtime
    from secateur.measure.sparsity import SparsityTable, sparsity
    from secateur.measure.table import LatencyTable
    from secateur.recipe.folder import load, save
    from secateur.recipe.launch import resume, run
    from secateur.recipe.reading import read_recipe
    from secateur.recipe.schema import Recipe
    from secateur.recover.distillation import Attention, Distillation, Features, teacher_logits
    from secateur.recover.history import History
    from secateur.recover.mixing import CutMix, Mixup, OneOf
    from secateur.recover.moving import ACDC, Gradual, RigL
    from secateur.recover.penalties import L1, L2, GroupLasso, Growing, Slimming
    from secateur.recover.place import norms_and_head
    from secateur.recover.prune import Pruned, prune_weights
    from secateur.recover.reconstruct import Solved, reconstruct
    from secateur.recover.statistics import reset_statistics
    from secateur.recover.train import Stage, fine_tune
    from secateur.report.ledger import Ledger, RunRecord
    from secateur.report.page import write_page
    from secateur.score.activation import Activation
    from secateur.score.batch_norm import BatchNormScale
    from secateur.score.blocks import BlockScores, score_blocks
    from secateur.score.brain_surgeon import BrainSurgeon
    from secateur.score.direction import Direction
    from secateur.score.energy import Energy
    from secateur.score.fisher import Fisher
    from secateur.score.magnitude import Magnitude
    from secateur.score.median import Median
    from secateur.score.random import Random
    from secateur.score.reconstruction import Reconstruction
    from secateur.score.relevance import Relevance
    from secateur.score.scaling import by_max, by_mean, gaussian, lamp
    from secateur.score.scoring import Scores, score
    from secateur.score.taylor import Taylor
    from secateur.search.compress import Compressed, compress
    from secateur.search.floor import Floor, Search, find_floor
    from secateur.search.schedule import cubic, geometric, linear, one_shot
    from secateur.surgery.certify import Certificate, certify
    from secateur.surgery.cut import Cut, apply
    from secateur.surgery.drop import DropCertificate, certify_drop, drop_blocks
    from secateur.surgery.export import Exported, export_program
    from secateur.surgery.masks import Masks, find_masks, find_zeros
    from secateur.surgery.pattern import find_pattern
    from secateur.surgery.simplification import Simplification
    from secateur.surgery.simplify import simplify
    from secateur.surgery.simulate import mask
    from secateur.surgery.tier import tier_of
    from secateur.zoo.data import Data, load_data
    from secateur.zoo.images import Images
    from secateur.zoo.models import build_model

__version__ = "0.1.0"

__all__ = [
    "ACDC",
    "L1",
    "L2",
    "Accuracy",
    "Activation",
    "Attention",
    "BatchNormScale",
    "BlockScores",
    "Blocks",
    "BrainSurgeon",
    "Budget",
    "Certificate",
    "Compressed",
    "Cut",
    "CutMix",
    "Data",
    "Direction",
    "Distillation",
    "Drop",
    "DropCertificate",
    "Energy",
    "Example",
    "Exported",
    "Features",
    "Fisher",
    "Floor",
    "GlobalRanking",
    "Gradual",
    "GroupLasso",
    "Groups",
    "Growing",
    "History",
    "Images",
    "Knapsack",
    "Latency",
    "LatencyKnapsack",
    "LatencyTable",
    "Ledger",
    "Limits",
    "Magnitude",
    "Masks",
    "Measurement",
    "Median",
    "Mixup",
    "OneOf",
    "Plan",
    "Program",
    "Pruned",
    "Random",
    "Recipe",
    "Reconstruction",
    "Relevance",
    "RigL",
    "RunRecord",
    "Scores",
    "Search",
    "SecateurError",
    "Sensitivity",
    "SensitivityGuided",
    "Simplification",
    "Slimming",
    "Solved",
    "SparsityGuided",
    "SparsityTable",
    "Stage",
    "Taylor",
    "Uniform",
    "__version__",
    "accuracy",
    "allocate",
    "apply",
    "build_model",
    "by_max",
    "by_mean",
    "certify",
    "certify_drop",
    "choose_blocks",
    "compare_latency",
    "compiled",
    "compress",
    "count_macs",
    "count_params",
    "cubic",
    "drop_blocks",
    "eager",
    "export_program",
    "file_bytes",
    "find_blocks",
    "find_floor",
    "find_groups",
    "find_masks",
    "find_pattern",
    "find_sensitivity",
    "find_zeros",
    "fine_tune",
    "gaussian",
    "geometric",
    "global_threshold",
    "lamp",
    "latency",
    "linear",
    "load",
    "load_data",
    "load_program",
    "mask",
    "measure",
    "measure_table",
    "norms_and_head",
    "one_shot",
    "onnx_runtime",
    "prune_weights",
    "read_recipe",
    "reconstruct",
    "reset_statistics",
    "resume",
    "run",
    "save",
    "score",
    "score_blocks",
    "simplify",
    "sparsity",
    "teacher_logits",
    "tier_of",
    "why_not_faster",
    "write_page",
]

_HOMES = MappingProxyType(
    {
        "allocate.budget": ("Budget",),
        "allocate.depth": ("Drop", "choose_blocks"),
        "allocate.knapsack": ("Knapsack",),
        "allocate.latency_knapsack": ("LatencyKnapsack",),
        "allocate.limits": ("Limits",),
        "allocate.plan": ("Plan", "allocate"),
        "allocate.ranking": ("GlobalRanking",),
        "allocate.sensitivity": ("Sensitivity", "SensitivityGuided", "find_sensitivity"),
        "allocate.sparsity_guided": ("SparsityGuided",),
        "allocate.threshold": ("global_threshold",),
        "allocate.uniform": ("Uniform",),
        "codec.program": ("Program", "load_program"),
        "errors": ("SecateurError",),
        "graph.blocks": ("Blocks",),
        "graph.groups": ("find_groups",),
        "graph.nested": ("Example",),
        "graph.records": ("Groups",),
        "graph.residual": ("find_blocks",),
        "measure.accuracy": ("Accuracy", "accuracy"),
        "measure.latency": ("Latency", "compare_latency", "latency"),
        "measure.macs": ("count_macs",),
        "measure.measure_table": ("measure_table",),
        "measure.measurement": ("Measurement", "measure"),
        "measure.params": ("count_params", "file_bytes"),
        "measure.reasons": ("why_not_faster",),
        "measure.runtimes": ("compiled", "eager", "onnx_runtime"),
        "measure.sparsity": ("SparsityTable", "sparsity"),
        "measure.table": ("LatencyTable",),
        "recipe.folder": ("load", "save"),
        "recipe.launch": ("resume", "run"),
        "recipe.reading": ("read_recipe",),
        "recipe.schema": ("Recipe",),
        "recover.distillation": ("Attention", "Distillation", "Features", "teacher_logits"),
        "recover.history": ("History",),
        "recover.mixing": ("CutMix", "Mixup", "OneOf"),
        "recover.moving": ("ACDC", "Gradual", "RigL"),
        "recover.penalties": ("GroupLasso", "Growing", "L1", "L2", "Slimming"),
        "recover.place": ("norms_and_head",),
        "recover.prune": ("Pruned", "prune_weights"),
        "recover.reconstruct": ("Solved", "reconstruct"),
        "recover.statistics": ("reset_statistics",),
        "recover.train": ("Stage", "fine_tune"),
        "report.ledger": ("Ledger", "RunRecord"),
        "report.page": ("write_page",),
        "score.activation": ("Activation",),
        "score.batch_norm": ("BatchNormScale",),
        "score.blocks": ("BlockScores", "score_blocks"),
        "score.brain_surgeon": ("BrainSurgeon",),
        "score.direction": ("Direction",),
        "score.energy": ("Energy",),
        "score.fisher": ("Fisher",),
        "score.magnitude": ("Magnitude",),
        "score.median": ("Median",),
        "score.random": ("Random",),
        "score.reconstruction": ("Reconstruction",),
        "score.relevance": ("Relevance",),
        "score.scaling": ("by_max", "by_mean", "gaussian", "lamp"),
        "score.scoring": ("Scores", "score"),
        "score.taylor": ("Taylor",),
        "search.compress": ("Compressed", "compress"),
        "search.floor": ("Floor", "Search", "find_floor"),
        "search.schedule": ("cubic", "geometric", "linear", "one_shot"),
        "surgery.certify": ("Certificate", "certify"),
        "surgery.cut": ("Cut", "apply"),
        "surgery.drop": ("DropCertificate", "certify_drop", "drop_blocks"),
        "surgery.export": ("Exported", "export_program"),
        "surgery.masks": ("Masks", "find_masks", "find_zeros"),
        "surgery.pattern": ("find_pattern",),
        "surgery.simplification": ("Simplification",),
        "surgery.simplify": ("simplify",),
        "surgery.simulate": ("mask",),
        "surgery.tier": ("tier_of",),
        "zoo.data": ("Data", "load_data"),
        "zoo.images": ("Images",),
        "zoo.models": ("build_model",),
    }
)


class _Room(ModuleType):
    """A room that is called as the verb of its name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _found(self.__name__.rpartition(".")[2])(*arguments, **options)


class _Package(ModuleType):
    """The package, which sees each room as the import system hangs it in."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in __all__:
            value.__class__ = _Room
        super().__setattr__(name, value)


def _found(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"secateur.{home}"), name)
    raise AttributeError(f"module 'secateur' has no attribute {name!r}")


def __getattr__(name: str) -> Any:
    return _found(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
