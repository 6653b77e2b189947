"""How many test images a classifier gets right, and its loss: `accuracy(model, batches)`.

Plain counting: right answers over images, whatever the batch sizes. The model is run in eval mode and without
gradients, and handed back in the mode it came in (`evaluating`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import DataError, ModelError


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 as fractions in [0, 1], the mean cross entropy in nats, and over how many images.

    `top5` is None for fewer than six classes, where it says nothing. `nonfinite` counts the images for which
    the model gave a NaN or an infinity; a NaN is never a right answer, and makes the loss NaN. JSON has no
    number for a loss that is not finite: it is kept as null, and read as NaN.
    """

    top1: float
    top5: float | None
    loss: float
    images: int
    nonfinite: int = 0

    @property
    def note(self) -> str:
        """What a reader of the figures has to know; empty when all is well.

        >>> Accuracy(0.9, 0.99, 0.3, images=1000).note
        ''
        """
        if not self.nonfinite:
            return ""
        return f"{self.nonfinite} of {self.images} images have outputs that are not finite numbers"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "loss": self.loss if math.isfinite(self.loss) else None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**{**value, "loss": math.nan if value["loss"] is None else value["loss"]})


def accuracy(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: str | torch.device = "cpu"
) -> Accuracy:
    """Accuracy and loss of a classifier over all batches.

    Args:
        model: gives outputs (n, classes) for images (n, ...); is on `device`, and left as found.
        batches: pairs of images (n, ...) and labels (n,), integers from 0; read once.
        device: where the batches are sent.

    Raises:
        DataError: no images at all, or labels that are not one class number for each image.
        ModelError: outputs that are not (n, classes), fewer classes than the labels have, or a model that is
            on another device.

    >>> images, labels = torch.eye(2), torch.tensor([0, 0])
    >>> accuracy(nn.Identity(), [(images, labels)]).top1
    0.5
    """
    right1 = right5 = images = nonfinite = classes = 0
    loss = 0.0
    check_device(model, torch.device(device))
    with evaluating(model), torch.inference_mode():
        for x, y in batches:
            if not len(x):
                continue
            outputs = _checked(model(x.to(device)), len(x), y)
            y = y.to(device=outputs.device, dtype=torch.int64)
            classes = outputs.shape[1]
            best = outputs.topk(min(5, classes), dim=1).indices
            right = (best == y[:, None]) & ~outputs.isnan().any(1, keepdim=True)
            right1 += int(right[:, 0].sum())
            right5 += int(right.sum())
            nonfinite += int((~outputs.isfinite()).any(1).sum())
            losses = F.cross_entropy(outputs.float(), y, reduction="none")
            loss += float(losses.cpu().sum(dtype=torch.float64))
            images += len(y)
    if not images:
        raise DataError("the batches hold no images, so accuracy cannot be measured; check the data's split.")
    top5 = right5 / images if classes > 5 else None
    return Accuracy(right1 / images, top5, loss / images, images, nonfinite)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the block; afterwards each module is back in the mode it was in, also after an error.

    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3).eval())
    >>> with evaluating(model):
    ...     [module.training for module in model]
    [False, False]
    >>> [module.training for module in model]
    [True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_device(model: nn.Module, device: torch.device) -> None:
    """Nothing if all of the model is on `device`, else a `ModelError` that names a tensor which is not.

    >>> check_device(nn.Linear(3, 2), torch.device("cpu"))
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != device.type:
            raise ModelError(
                f"{name!r} is on {tensor.device} but the measurement was asked for on {device}; "
                f"call model.to({str(device)!r}) first, or measure where the model is."
            )


def _checked(outputs: Any, images: int, labels: Tensor) -> Tensor:
    """The outputs, once they and the labels are known to fit each other: on a GPU a wrong label is fatal."""
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != images:
        shown = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ModelError(
            f"the model gave {shown} for a batch of {images} images; accuracy needs a classifier, "
            f"with outputs ({images}, classes)."
        )
    if labels.shape != (images,) or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"the labels of a batch of {images} images are {labels.dtype} of shape {tuple(labels.shape)}; "
            f"give one class number for each image, an integer tensor of shape ({images},)."
        )
    if int(labels.min()) < 0:
        raise DataError(f"a label is {int(labels.min())}; class numbers start at 0.")
    if int(labels.max()) >= outputs.shape[1]:
        raise ModelError(
            f"the model has {outputs.shape[1]} outputs but a label is {int(labels.max())}: the class counts "
            f"do not match; build the model with {int(labels.max()) + 1} classes or more, or check the data."
        )
    return outputs
