"""A model on disk without pickle: its tensors as safetensors, and how to build the module that they fit.

`architecture.json` names the source that `zoo.models.build_model` builds, or none where the caller has a function that
does, and for each module that a cut has changed, the attributes that are other than the source's (`out_channels`,
`in_features`, ...) and the sizes that its calls are given (`graph.replay`). The shapes need no telling: the tensors
have them. It also says which tensors lie in memory channel by channel last, the model's tier (`surgery.tier`), and the
SHA-256 of the weights' file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocate.plan import Plan
from secateur.codec.files import read_json, write_json
from secateur.codec.state import load_state, save_state
from secateur.errors import ModelError, PlanError, RunError
from secateur.graph import replay
from secateur.graph.rebuild import Attributes, rebuild
from secateur.graph.replay import Change
from secateur.surgery.tier import tier_of
from secateur.zoo.models import build_model

FORMAT = 1
WEIGHTS = "model.safetensors"
ARCHITECTURE = "architecture.json"

Factory = Callable[[], nn.Module]
Shapes = Mapping[str, tuple[int, ...]]
LAYOUTS = MappingProxyType({4: torch.channels_last, 5: torch.channels_last_3d})


@dataclass(frozen=True)
class Architecture:
    """How to build a module: its source, the class count of its head, and what cuts have set on its modules.

    `source` is None where a function of the caller builds the module, `classes` where the source's own count holds,
    and `uncut`, the shapes of the source's tensors, is empty where they were not noted.

    >>> architecture = Architecture("secateur:resnet20", 10, {"conv1": {"out_channels": 12}})
    >>> Architecture.from_json(architecture.to_json()) == architecture
    True
    >>> architecture.after({"conv1": {"out_channels": 9}}).attributes
    {'conv1': {'out_channels': 9}}
    """

    source: str | None
    classes: int | None
    attributes: Attributes
    replays: Mapping[str, Change] = field(default_factory=dict)
    uncut: Shapes = field(default_factory=dict)

    def after(self, attributes: Attributes, replays: Mapping[str, Change] = MappingProxyType({})) -> Architecture:
        """The architecture after one more cut, which sets `attributes` and has its calls given `replays`."""
        names = [*self.attributes, *(name for name in attributes if name not in self.attributes)]
        merged = {name: {**self.attributes.get(name, {}), **attributes.get(name, {})} for name in names}
        return replace(self, attributes=merged, replays=replay.merged(self.replays, replays))

    def to_json(self) -> dict[str, Any]:
        """The architecture as JSON values."""
        attributes = {name: dict(values) for name, values in self.attributes.items()}
        return {
            "format": FORMAT,
            "source": self.source,
            "classes": self.classes,
            "attributes": attributes,
            "replays": replay.to_json(self.replays),
            "uncut": {name: list(shape) for name, shape in self.uncut.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Architecture:
        """The architecture that `to_json` gave; raises `RunError` for another format."""
        if value.get("format") != FORMAT:
            raise RunError(
                f"{ARCHITECTURE} has format {value.get('format')!r}, and this secateur reads format {FORMAT}; "
                "load it with the version that wrote it."
            )
        attributes = {
            name: {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}
            for name, values in value["attributes"].items()
        }
        uncut = {name: tuple(shape) for name, shape in value.get("uncut", {}).items()}
        return cls(value["source"], value["classes"], attributes, replay.from_json(value["replays"]), uncut)

    def build(self, state: Mapping[str, Tensor], factory: Factory | None = None) -> nn.Module:
        """The module, in eval mode, with the tensors `state`: neither more nor fewer than it has.

        Args:
            state: by name.
            factory: builds the uncut module, in place of the source.
        """
        with torch.random.fork_rng(devices=[]):  # the source draws weights, which nobody will see
            model = self._uncut_model(factory)
        what = self.source if factory is None else "the factory's model"
        check_source(str(what), model, self.uncut)
        own = _tensors(model)
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise ModelError(
                f"{what} and the saved weights differ in {len(odd)} tensors, such as {odd[0]!r}; "
                "was the model's code changed after the run?"
            )
        for name, tensor in state.items():
            if tensor.ndim != own[name].ndim or any(left > had for left, had in zip(tensor.shape, own[name].shape)):
                raise ModelError(
                    f"{what} has {name} of shape {tuple(own[name].shape)}, and {tuple(tensor.shape)} was saved, which "
                    "is no cut of it; give the source and the class count that the model was made from."
                )
        try:
            return rebuild(model, state, self.attributes, self.replays).eval()
        except AttributeError as error:
            raise ModelError(
                f"{what} has no longer what the run cut ({error}); was its code changed after the run?"
            ) from error

    def _uncut_model(self, factory: Factory | None) -> nn.Module:
        if factory is None:
            if self.source is None:
                raise ModelError(
                    "the model was saved without a source; give load a factory, which builds it as it was before "
                    "the cut: load(folder, factory=make_model)."
                )
            return build_model(self.source, classes=self.classes).model
        try:
            model = factory()
        except Exception as error:  # the user's code may raise whatever it likes
            raise ModelError(f"the factory raised {type(error).__name__}: {error}.") from error
        if not isinstance(model, nn.Module):
            raise ModelError(f"the factory returned a {type(model).__name__}; it must return a torch.nn.Module.")
        return model


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    plan: Plan | Sequence[Plan] = (),
    source: str | None = None,
    classes: int | None = None,
) -> None:
    """Writes a cut model into `folder`, without pickle: weights, where its class comes from, and what was cut.

    Args:
        model: what `apply` gave, fine-tuned or not.
        folder: made if missing.
        plan: the plan that it was cut by; after several cuts all of them, in order.
        source: builds the model as it was before the first cut, as `build_model` reads it: `torchvision:NAME`,
            `timm:NAME`, `secateur:NAME` or `path/to/file.py:factory`. None if `load` will be given a factory.
        classes: the class count that the source is built with; None for its own.

    Raises:
        PlanError: the model is not what the plans leave, or one does not follow on the other.
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
    >>> import shutil; shutil.rmtree("small")
    """
    plans = (plan,) if isinstance(plan, Plan) else tuple(plan)
    before = _check_plans(model, plans)
    file, colon, factory = (source or "").rpartition(":")
    if colon and file.endswith(".py"):
        source = f"{Path(file).expanduser().absolute()}:{factory}"
    architecture = Architecture(source, classes, {}, {}, before)
    for one in plans:
        architecture = architecture.after(one.attributes(), one.replays())
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
    tensors = _tensors(model)
    save_state(folder / WEIGHTS, tensors)
    last = [name for name, tensor in tensors.items() if _channels_last(tensor)]
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


def check_source(source: str, model: nn.Module, uncut: Shapes) -> None:
    """ModelError unless `model`, which `source` built, has the tensors `uncut`; if that is empty, all is well."""
    have = _shapes(model)
    odd = [name for name in [*uncut, *have] if have.get(name) != uncut.get(name)] if uncut else []
    if odd:
        raise ModelError(
            f"{source} builds another model than the one that was cut: {odd[0]} is {have.get(odd[0], 'missing')} there "
            f"and was {uncut.get(odd[0], 'missing')} ({len(set(odd))} tensors differ). "
            "Give the source and the class count that the model was made from."
        )


def _check_plans(model: nn.Module, plans: Sequence[Plan]) -> Shapes:
    """The shapes before the first cut; PlanError unless each plan follows on the one before, and the model on all."""
    now = _shapes(model)
    starts: list[Shapes] = [{info.name: info.shape for info in plan.groups.tensors} for plan in plans]
    for number, (plan, after) in enumerate(zip(plans, [*starts[1:], now]), 1):
        left = plan.groups.shapes(plan.keep)
        odd = [name for name in [*left, *after] if left.get(name) != after.get(name)]
        if odd:
            what = "the model has" if number == len(plans) else f"plan {number + 1} was made for"
            raise PlanError(
                f"plan {number} leaves {odd[0]} as {left.get(odd[0], 'missing')}, and {what} "
                f"{after.get(odd[0], 'missing')}; give the cut model and the plans that it was cut by, in order."
            )
    return starts[0] if starts else now


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def _channels_last(tensor: Tensor) -> bool:
    layout = LAYOUTS.get(tensor.ndim)
    return layout is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout)


def _fingerprint(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, and the buffers that it leaves out: a cut may have changed these too."""
    return {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}
