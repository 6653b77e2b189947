"""Networks from torchvision and timm, with the number of classes that the data has."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torchvision
from torch import nn

from secateur.errors import ModelError, UnknownName
from secateur.zoo.built import Built
from secateur.zoo.heads import adapt_head

# Heads that only help training; in training mode they change what the network returns.
AUXILIARY = ("googlenet", "inception_v3")


def build_torchvision(spec: str, name: str, classes: int | None, pretrained: bool) -> Built:
    """`torchvision.models` by name; with pretrained weights the head is replaced if the class count differs.

    Auxiliary classifiers are left off. Nothing is downloaded unless `pretrained`.

    Raises:
        UnknownName: torchvision has no network of this name.
        ModelError: it cannot be built with so many classes, has no weights, or they cannot be fetched.

    >>> build_torchvision("torchvision:squeezenet1_1", "squeezenet1_1", classes=7, pretrained=False).notes
    ('built with 7 classes instead of 1000',)
    """
    models = torchvision.models
    if name not in models.list_models():
        raise UnknownName("torchvision model", name, models.list_models())
    builder = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    notes = []
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # its default is a download
    if name.removeprefix("quantized_") in AUXILIARY:
        options |= {"aux_logits": False} | ({} if pretrained else {"init_weights": True})
        notes.append("auxiliary classifiers are left off, so that it returns one tensor in training as well")
    width = _default_classes(name)
    if pretrained:
        weights = options["weights"] = _default_weights(name)
        if weights is None:
            raise ModelError(f"torchvision has no pretrained weights for {name}; pass a file as weights instead.")
        notes.append(f"pretrained weights {weights}")
    elif classes not in (None, width):
        options["num_classes"] = classes
        notes.append(f"built with {classes} classes instead of {width}")
    model = _attempt(spec, classes, lambda: builder(**options))
    if pretrained and classes is not None and classes != width:
        if width is None or name not in models.list_models(module=models):
            raise ModelError(
                f"{spec} is pretrained on {width or 'no'} classes and only the heads of classifiers can be adapted to "
                f"{classes}; build it without pretrained weights, or leave the class count alone."
            )
        notes.append(adapt_head(model, width, classes))
    return Built(model, spec, width if classes is None else classes, tuple(notes))


def build_timm(spec: str, name: str, classes: int | None, pretrained: bool) -> Built:
    """`timm.create_model` by name; timm itself adapts the head to `classes`.

    Raises:
        UnknownName: timm has no network of this name.
        ModelError: timm is not installed, or fails to build or fetch.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModelError(f"{spec} needs timm, which is not installed: pip install 'secateur[timm]'.") from error
    if not timm.is_model(name):
        raise UnknownName("timm model", name, timm.list_models())
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    model: Any = _attempt(spec, classes, lambda: timm.create_model(name, pretrained=pretrained, **options))
    default = model.default_cfg.get("num_classes")
    notes = [f"pretrained weights {name} of timm"] if pretrained else []
    if classes not in (None, default):
        notes.append(f"built with {classes} classes instead of {default}")
    return Built(model, spec, model.num_classes, tuple(notes))


def _attempt(spec: str, classes: int | None, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # Deprecations inside the libraries are no news to our user.
            warnings.simplefilter("ignore")
            return build()
    except OSError as error:  # urllib's errors are among them
        raise ModelError(
            f"could not fetch the pretrained weights of {spec} ({error}); check the connection, or download them "
            "and pass the file as weights."
        ) from error
    except Exception as error:  # a library may raise whatever it likes
        asked = "" if classes is None else f" with {classes} classes"
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise ModelError(f"{spec} could not be built{asked}: {reason}.") from error


def _default_weights(name: str) -> Any:
    """Torchvision's recommended weights for a network; None where it has none."""
    return torchvision.models.get_model_weights(name).__members__.get("DEFAULT")


def _default_classes(name: str) -> int | None:
    """How many classes a network has unless told otherwise: those of its weights; None for no classifier."""
    weights = _default_weights(name)
    categories = weights.meta.get("categories") if weights is not None else None
    return None if categories is None else len(categories)
