"""A model on disk without pickle: its tensors as safetensors, and how to build the module that they fit.

`architecture.json` names the source that `zoo.models.build_model` builds, or none where the caller has a function that
does, and what was done to it (`recipe.architecture`). It also says which tensors lie in memory channel by channel last,
the model's tier (`surgery.tier`), and the SHA-256 of the weights' file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.allocate.depth import Drop
from secateur.allocate.plan import Plan
from secateur.codec.files import read_json, write_json
from secateur.codec.state import load_state, save_state
from secateur.errors import PlanError, RunError
from secateur.graph.rebuild import LAYOUTS, Shapes, layout_of, tensor_shapes
from secateur.recipe.architecture import ARCHITECTURE, Architecture, Factory, all_tensors, check_source
from secateur.surgery.cut import shapes_before
from secateur.surgery.simplification import Simplification
from secateur.surgery.tier import tier_of
from secateur.zoo.models import build_model

WEIGHTS = "model.safetensors"

Reduction = Plan | Simplification | Drop
"""One thing that made a model smaller."""


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    plan: Reduction | Sequence[Reduction] = (),
    source: str | None = None,
    classes: int | None = None,
) -> None:
    """Writes a smaller model into `folder`, without pickle: weights, where its class comes from, and what was cut.

    Args:
        model: what `apply`, `simplify` or `drop_blocks` gave, fine-tuned or not.
        folder: made if missing.
        plan: the plan that it was cut by, the record that `simplify` gave, or the `Drop` of the blocks that were left
            out; after several all of them, in order.
        source: builds the model as it was before the first cut, as `build_model` reads it: `torchvision:NAME`,
            `timm:NAME`, `secateur:NAME` or `path/to/file.py:factory`. None if `load` will be given a factory.
        classes: the class count that the source is built with; None for its own.

    Raises:
        PlanError: the model is not what these leave, or one does not follow on the other.
        ModelError: the source cannot be built or builds another model. Nothing has been written then.
        RunError: the folder cannot be made or written, or the disk is full.

    >>> import secateur as sc
    >>> net = sc.build_model("secateur:resnet20").model.eval()
    >>> groups = sc.find_groups(net, torch.zeros(1, 3, 32, 32))
    >>> plan = sc.allocate(sc.score(net, groups, sc.Magnitude()), sc.Uniform(0.5))
    >>> smaller = sc.apply(net, plan)
    >>> save(smaller, "small", plan=plan, source="secateur:resnet20")
    >>> x = torch.randn(2, 3, 32, 32)
    >>> torch.equal(load("small")(x), smaller(x))
    True
    >>> smallest, record = sc.simplify(smaller, x, batch_norm=True)
    >>> save(smallest, "small", plan=[plan, record], source="secateur:resnet20")
    >>> torch.equal(load("small")(x), smallest(x))
    True
    >>> import shutil; shutil.rmtree("small")
    """
    steps = (plan,) if isinstance(plan, Plan | Simplification | Drop) else tuple(plan)
    before = _check_steps(model, steps)
    file, colon, factory = (source or "").rpartition(":")
    if colon and file.endswith(".py"):
        source = f"{Path(file).expanduser().absolute()}:{factory}"
    architecture = Architecture(source, classes, {}, uncut=before)
    for step in steps:
        architecture = _after(architecture, step)
    if source is not None:
        with torch.random.fork_rng(devices=[]):
            check_source(source, build_model(source, classes=classes, device="meta").model, before)
    save_model(folder, model, architecture)


def save_model(folder: str | Path, model: nn.Module, architecture: Architecture) -> None:
    """Writes `model` into `folder` (made if missing) as `model.safetensors` and `architecture.json`."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RunError(f"could not make the folder {folder}: {reason}; choose another.") from error
    tensors = all_tensors(model)
    save_state(folder / WEIGHTS, tensors)
    last = [name for name, tensor in tensors.items() if layout_of(tensor) is not None]
    more = {"channels_last": last, "tier": tier_of(model), "weights": _fingerprint(folder / WEIGHTS)}
    write_json(folder / ARCHITECTURE, {**architecture.to_json(), **more})


def load(folder: str | Path, *, factory: Factory | None = None) -> nn.Module:
    """The model of a run folder, or of a folder that `save` wrote, in eval mode on the CPU.

    Its outputs are those of the saved model bit for bit. The caller's random state is left alone.

    Args:
        folder: as given to `save` or `run`.
        factory: a function without arguments that builds the model as it was before any cut, where no source was
            saved, or in its place.

    Raises:
        RunError: there is no saved model, it is of another format, or its weights were changed.
        ModelError: there is neither source nor factory, or what they build now is another model.
    """
    architecture, state = read_model(folder)
    return architecture.build(state, factory)


def read_model(folder: str | Path) -> tuple[Architecture, dict[str, Tensor]]:
    """What `save_model` wrote: how to build the module, and its tensors by name."""
    folder = Path(folder)
    if folder.is_file():
        raise RunError(f"{str(folder)!r} is a file; give a folder. What export_program wrote, load_program reads.")
    inner = folder / "model"
    place = inner if (inner / ARCHITECTURE).exists() else folder
    if not (place / ARCHITECTURE).exists():
        raise RunError(f"{str(folder)!r} holds no saved model; give a run folder whose run has finished.")
    value = read_json(place / ARCHITECTURE)
    architecture, tensors = Architecture.from_json(value), load_state(place / WEIGHTS)
    if value.get("weights") not in (None, _fingerprint(place / WEIGHTS)):
        raise RunError(
            f"{place / WEIGHTS} is not the file that {ARCHITECTURE} was written with: it was changed since, or saving "
            "was broken off; save the model again."
        )
    moved: dict[int, Tensor] = {}  # tied tensors stay one object
    for name in value.get("channels_last", ()):
        old = tensors[name]
        tensors[name] = moved.setdefault(id(old), old.contiguous(memory_format=LAYOUTS[old.ndim]))
    return architecture, tensors


def _check_steps(model: nn.Module, steps: Sequence[Reduction]) -> Shapes:
    """The shapes before the first step; PlanError unless each follows on the one before, and the model on all."""
    now = tensor_shapes(model)
    shapes = [_shapes(step) for step in steps]
    kinds = {Plan: "plan", Simplification: "simplification", Drop: "drop"}
    names = [f"{kinds[type(step)]} {n}" for n, step in enumerate(steps, 1)]
    starts = [*(before for before, _ in shapes), now]
    for number, (_, left) in enumerate(shapes):
        after = starts[number + 1]
        odd = [name for name in [*left, *after] if left.get(name) != after.get(name)]
        if odd:
            what = "the model has" if number + 1 == len(steps) else f"{names[number + 1]} was made for"
            raise PlanError(
                f"{names[number]} leaves {odd[0]} as {left.get(odd[0], 'missing')}, and {what} "
                f"{after.get(odd[0], 'missing')}; give the model and the plans, simplifications and drops that made "
                "it, in order."
            )
    return starts[0]


def _shapes(step: Reduction) -> tuple[Shapes, Shapes]:
    """Those of all tensors before and after a step."""
    if isinstance(step, Plan):
        return shapes_before(step), step.groups.shapes(step.keep)
    if isinstance(step, Drop):
        return step.blocks.shapes, step.shapes_left
    return step.shapes, step.shapes_left


def _after(architecture: Architecture, step: Reduction) -> Architecture:
    if isinstance(step, Plan):
        return architecture.after(step.attributes(), step.replays())
    if isinstance(step, Drop):
        return architecture.after_drop(step.forms, step.renumbered)
    return architecture.after(step.attributes, step.replays, step.identities, step.biases)


def _fingerprint(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
