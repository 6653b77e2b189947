"""How a saved model is built: the source that its class comes from, and what cuts and simplifications did to it.

The shapes need no telling: the tensors have them. What is told is names and numbers alone, in JSON: for each module
that a cut has changed the attributes that are other than the source's (`out_channels`, `in_features`, ...), the sizes
that its calls are given (`graph.replay`), which modules an `nn.Identity` stands for now, which biases are new, and what
stands in the place of blocks that were left out (`graph.passing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ModelError, RunError
from secateur.graph import replay
from secateur.graph.blocks import form_from_json, form_to_json
from secateur.graph.passing import Forms, Renumbered, goes, leave_out
from secateur.graph.rebuild import (
    Attributes,
    Shapes,
    attributes_from_json,
    attributes_to_json,
    rebuild,
    share,
    tensor_shapes,
)
from secateur.graph.replay import Change
from secateur.graph.sharing import share_like
from secateur.graph.twin import tensors_of
from secateur.surgery.fold_bn import drop_norms
from secateur.zoo.models import build_model

FORMAT = 1
ARCHITECTURE = "architecture.json"

Factory = Callable[[], nn.Module]


@dataclass(frozen=True)
class Architecture:
    """How to build a module: its source, the class count of its head, and what cuts have set on its modules.

    `source` is None where a function of the caller builds the module, `classes` where the source's own count holds,
    and `uncut`, the shapes of the source's tensors, is empty where they were not noted. `identities` are modules that
    went, `biases` parameters that layers got (`surgery.fold_bn`), `forms` what blocks that went pass on.

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
    identities: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    forms: Forms = field(default_factory=dict)

    def after(
        self,
        attributes: Attributes,
        replays: Mapping[str, Change] = MappingProxyType({}),
        identities: Sequence[str] = (),
        biases: Sequence[str] = (),
    ) -> Architecture:
        """The architecture after one more cut or simplification, which sets, replays, takes out and adds these."""
        gone = (*self.identities, *identities)
        names = [name for name in dict.fromkeys((*self.attributes, *attributes)) if name not in gone]
        return replace(
            self,
            attributes={name: {**self.attributes.get(name, {}), **attributes.get(name, {})} for name in names},
            replays=replay.merged(self.replays, replays),
            identities=gone,
            biases=(*self.biases, *biases),
        )

    def after_drop(self, forms: Forms, renumbered: Renumbered) -> Architecture:
        """The architecture once these blocks have gone."""
        replays = {
            name: {(f, renumbered.get(name, {}).get((f, n), n)): sizes for (f, n), sizes in change.items()}
            for name, change in self.replays.items()
            if name not in forms and not goes(name, forms)
        }
        return replace(
            self,
            attributes={name: held for name, held in self.attributes.items() if not goes(name, forms)},
            replays=replays,
            forms={**{name: form for name, form in self.forms.items() if not goes(name, forms)}, **forms},
        )

    def to_json(self) -> dict[str, Any]:
        """The architecture as JSON values."""
        return {
            "format": FORMAT,
            "source": self.source,
            "classes": self.classes,
            "attributes": attributes_to_json(self.attributes),
            "replays": replay.to_json(self.replays),
            "identities": list(self.identities),
            "biases": list(self.biases),
            "forms": {name: form_to_json(form) for name, form in self.forms.items()},
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
        return cls(
            value["source"],
            value["classes"],
            attributes_from_json(value["attributes"]),
            replay.from_json(value["replays"]),
            {name: tuple(shape) for name, shape in value.get("uncut", {}).items()},
            tuple(value.get("identities", ())),
            tuple(value.get("biases", ())),
            {name: form_from_json(form) for name, form in value.get("forms", {}).items()},
        )

    def build(self, state: Mapping[str, Tensor], factory: Factory | None = None) -> nn.Module:
        """The module, in eval mode, with the tensors `state`: neither more nor fewer than it has.

        Args:
            state: by name.
            factory: builds the uncut module, in place of the source.
        """
        with torch.random.fork_rng(devices=[]):  # the source draws weights, which nobody will see
            model = self._uncut_model(factory)
        what = str(self.source) if factory is None else "the factory's model"
        check_source(what, model, self.uncut)
        try:
            twin = share(model)  # the factory may keep its model
            drop_norms(twin, self.identities, self.biases)
            leave_out(twin, self.forms)
            _check_state(what, all_tensors(twin), state)
            return rebuild(twin, share_like(tensors_of(twin), state), self.attributes, self.replays).eval()
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


def check_source(source: str, model: nn.Module, uncut: Shapes) -> None:
    """ModelError unless `model`, which `source` built, has the tensors `uncut`; if that is empty, all is well."""
    have = tensor_shapes(model)
    odd = [name for name in [*uncut, *have] if have.get(name) != uncut.get(name)] if uncut else []
    if odd:
        raise ModelError(
            f"{source} builds another model than the one that was cut: {odd[0]} is {have.get(odd[0], 'missing')} there "
            f"and was {uncut.get(odd[0], 'missing')} ({len(set(odd))} tensors differ). "
            "Give the source and the class count that the model was made from."
        )


def _check_state(what: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """ModelError unless the saved tensors can be cuts of the source's own."""
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


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, and the buffers that it leaves out: a cut may have changed these too."""
    return {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}
