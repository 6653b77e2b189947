"""A model on disk without pickle: its tensors as safetensors, and how to build the module that they fit.

`architecture.json` names the source that `zoo.models.build_model` builds and, for each module that a cut has
changed, the attributes that are other than the source's (`out_channels`, `in_features`, ...) and the sizes that its
calls are given (`graph.replay`). The shapes need no telling: the tensors have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.codec.files import read_json, write_json
from secateur.codec.state import load_state, save_state
from secateur.errors import ModelError, RunError
from secateur.graph import replay
from secateur.graph.rebuild import Attributes, rebuild
from secateur.graph.replay import Change
from secateur.zoo.models import build_model

FORMAT = 1
WEIGHTS = "model.safetensors"
ARCHITECTURE = "architecture.json"


@dataclass(frozen=True)
class Architecture:
    """How to build a module: its source, the class count of its head, and what cuts have set on its modules.

    >>> architecture = Architecture("secateur:resnet20", 10, {"conv1": {"out_channels": 12}})
    >>> Architecture.from_json(architecture.to_json()) == architecture
    True
    >>> architecture.after({"conv1": {"out_channels": 9}}).attributes
    {'conv1': {'out_channels': 9}}
    """

    source: str
    classes: int
    attributes: Attributes
    replays: Mapping[str, Change] = field(default_factory=dict)

    def after(self, attributes: Attributes, replays: Mapping[str, Change] = MappingProxyType({})) -> Architecture:
        """The architecture after one more cut, which sets `attributes` and has its calls given `replays`."""
        names = [*self.attributes, *(name for name in attributes if name not in self.attributes)]
        merged = {name: {**self.attributes.get(name, {}), **attributes.get(name, {})} for name in names}
        return Architecture(self.source, self.classes, merged, replay.merged(self.replays, replays))

    def to_json(self) -> dict[str, Any]:
        """The architecture as JSON values."""
        attributes = {name: dict(values) for name, values in self.attributes.items()}
        return {
            "format": FORMAT,
            "source": self.source,
            "classes": self.classes,
            "attributes": attributes,
            "replays": replay.to_json(self.replays),
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
        return cls(value["source"], value["classes"], attributes, replay.from_json(value["replays"]))

    def build(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The module, in eval mode, with the tensors `state`: neither more nor fewer than it has."""
        with torch.random.fork_rng(devices=[]):  # the source draws weights, which nobody will see
            model = build_model(self.source, classes=self.classes).model
        own = _tensors(model).keys()
        if own != state.keys():
            odd = sorted(own ^ state.keys())
            raise ModelError(
                f"{self.source} and the saved weights differ in {len(odd)} tensors, such as {odd[0]!r}; "
                "was the model's code changed after the run?"
            )
        try:
            return rebuild(model, state, self.attributes, self.replays).eval()
        except AttributeError as error:
            raise ModelError(
                f"{self.source} has no longer what the run cut ({error}); was its code changed after the run?"
            ) from error


def save_model(folder: str | Path, model: nn.Module, architecture: Architecture) -> None:
    """Writes `model` into `folder` (made if missing) as `model.safetensors` and `architecture.json`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_state(folder / WEIGHTS, _tensors(model))
    write_json(folder / ARCHITECTURE, architecture.to_json())


def load(folder: str | Path) -> nn.Module:
    """The model of a run folder, or of a folder that `save_model` wrote, in eval mode on the CPU.

    Its outputs are those of the saved model bit for bit. The caller's random state is left alone.
    Raises `RunError` where there is no saved model, `ModelError` where its source builds something else now.
    """
    architecture, state = read_model(folder)
    return architecture.build(state)


def read_model(folder: str | Path) -> tuple[Architecture, dict[str, Tensor]]:
    """What `save_model` wrote: how to build the module, and its tensors by name."""
    folder = Path(folder)
    inner = folder / "model"
    place = inner if (inner / ARCHITECTURE).exists() else folder
    if not (place / ARCHITECTURE).exists():
        raise RunError(f"{str(folder)!r} holds no saved model; give a run folder whose run has finished.")
    return Architecture.from_json(read_json(place / ARCHITECTURE)), load_state(place / WEIGHTS)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, and the buffers that it leaves out: a cut may have changed these too."""
    return {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}
