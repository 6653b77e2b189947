"""Networks by name: `torchvision:NAME`, `timm:NAME`, `secateur:NAME` or `path/to/file.py:factory`.

`build_model` is the one verb. It builds the network with the class count of the data, loads weights that fit or says
which tensors do not, and notes in words whatever it did that was not asked for. Each source has its own file.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable
from types import MappingProxyType

import torch
import torchvision
from torch import nn

from secateur.errors import ModelError, UnknownName
from secateur.zoo import resnet_cifar, vgg_cifar
from secateur.zoo.built import Built
from secateur.zoo.factory import build_from_file
from secateur.zoo.libraries import build_timm, build_torchvision
from secateur.zoo.weights import load_weights

__all__ = ["Built", "build_model", "list_models"]

NETWORKS: MappingProxyType[str, Callable[[int], nn.Module]] = MappingProxyType(
    {
        "resnet20": resnet_cifar.resnet20,
        "resnet32": resnet_cifar.resnet32,
        "resnet44": resnet_cifar.resnet44,
        "resnet56": resnet_cifar.resnet56,
        "resnet110": resnet_cifar.resnet110,
        "vgg16_bn": vgg_cifar.vgg16_bn,
        "vgg19_bn": vgg_cifar.vgg19_bn,
        "digits_vgg": vgg_cifar.digits_vgg,
    }
)
SOURCES = ("torchvision", "timm", "secateur")


def build_model(
    spec: str,
    *,
    classes: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    device: str | torch.device = "cpu",
) -> Built:
    """The network that `spec` names, with `classes` outputs, on `device`, and notes on how it came about.

    Args:
        spec: `torchvision:NAME`, `timm:NAME`, `secateur:NAME` or `path/to/file.py:factory`.
        classes: outputs of the head; None leaves the network's own count.
        weights: a .safetensors, .pt or .pth file of tensors by name; every tensor has to fit.
        pretrained: fetch the library's own weights (torchvision and timm alone).
        device: where the network goes; "meta" for shapes without values.

    Raises:
        UnknownName: no such source or network; lists the nearest.
        ModelError: it cannot be built, or the weights do not fit.
        RunError: a safetensors file that is missing or damaged.

    >>> built = build_model("secateur:resnet20", classes=100)
    >>> built.model.linear, built.notes
    (Linear(in_features=64, out_features=100, bias=True), ('all weights are freshly initialised',))
    """
    if classes is not None and classes < 1:
        raise ModelError(f"a network needs at least 1 class, and {spec} was asked for {classes}.")
    if pretrained and weights is not None:
        raise ModelError(f"{spec} cannot take both its pretrained weights and {weights}; choose one.")
    place = _device(device)
    if place.type == "meta" and (pretrained or weights is not None):
        raise ModelError(f"the meta device holds no values, so {spec} cannot take weights there; build it on cpu.")
    built = _build(spec, classes, pretrained, place)
    notes = built.notes
    if weights is not None:
        notes += load_weights(built.model, os.fspath(weights), spec, built.classes)
    elif not pretrained and not _is_file(spec):
        notes += ("all weights are freshly initialised",)
    return Built(built.model.to(place), spec, built.classes, notes)


def list_models() -> tuple[str, ...]:
    """The specs of all networks of this package and of torchvision; timm's are left out, it is slow to ask.

    >>> "secateur:resnet56" in list_models(), "torchvision:vgg16" in list_models()
    (True, True)
    """
    own = (f"secateur:{name}" for name in NETWORKS)
    return (*own, *(f"torchvision:{name}" for name in torchvision.models.list_models()))


def _build(spec: str, classes: int | None, pretrained: bool, place: torch.device) -> Built:
    build = _source(spec, classes, pretrained)
    if place.type == "meta":
        # Some constructors compute with values; those fail there and are built in full first.
        with contextlib.suppress(ModelError), place:
            return build()
    return build()


def _source(spec: str, classes: int | None, pretrained: bool) -> Callable[[], Built]:
    source, colon, name = spec.partition(":")
    if _is_file(spec):
        if pretrained:
            raise ModelError(f"{spec} has no pretrained weights to fetch; pass a file as weights.")
        return lambda: build_from_file(spec, classes)
    if source == "torchvision":
        return lambda: build_torchvision(spec, name, classes, pretrained)
    if source == "timm":
        return lambda: build_timm(spec, name, classes, pretrained)
    if source == "secateur":
        return lambda: _build_own(spec, name, classes, pretrained)
    if colon:
        hint = "A network of your own is path/to/file.py:factory."
        raise UnknownName("model source", source, SOURCES, hint=hint)
    raise _bare(spec)


def _build_own(spec: str, name: str, classes: int | None, pretrained: bool) -> Built:
    if name not in NETWORKS:
        raise UnknownName("secateur model", name, NETWORKS)
    if pretrained:
        raise ModelError(f"{spec} has no pretrained weights to fetch; pass a file as weights.")
    count = 10 if classes is None else classes
    return Built(NETWORKS[name](count), spec, count, ())


def _bare(name: str) -> UnknownName:
    """A name without its source: the networks of that name or nearly so, wherever they come from."""
    known = list_models()
    tails = {spec.partition(":")[2] for spec in known}
    close = difflib.get_close_matches(name, tails, n=5, cutoff=0.6)
    choices = [spec for spec in known if spec.partition(":")[2] in close]
    example = next((spec for spec in known if spec.endswith(f":{name}")), "torchvision:resnet18")
    hint = f"Say where it comes from, as in {example}, timm:NAME or path/to/file.py:factory."
    return UnknownName("model", name, choices, hint=hint)


def _is_file(spec: str) -> bool:
    return spec.endswith(".py") or ".py:" in spec


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UnknownName("device", str(device), ("cpu", "cuda", "mps", "meta")) from error
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(place.type, False):
        raise ModelError(f"there is no device {place} on this machine, or this torch was built without it; use cpu.")
    return place
