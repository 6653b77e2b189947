"""An average of the weights along the way, which is often better than the weights at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from secateur.recover.checkpoint import model_state, set_model_state


class Average:
    """The exponential moving average of a model's parameters and of its buffers of real numbers.

    After step n, counted from 1, each is a + (1 - d) (w - a) with d = min(decay, n / (n + 9)): at first the average is
    young and forgets fast, as TensorFlow's ExponentialMovingAverage with num_updates does. Other buffers are those of
    the model.

    Args:
        model: whose values at this moment begin the average.
        decay: in (0, 1).

    >>> model = nn.Linear(1, 1, bias=False)
    >>> average = Average(model, 0.999)
    >>> _ = nn.init.constant_(model.weight, 5.0), nn.init.zeros_(average.tensors["weight"])
    >>> average.update(1)
    >>> average.tensors["weight"].item()
    4.5
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self._model = decay, model
        self.tensors = {name: t.clone() for name, t in model_state(model).items() if t.is_floating_point()}
        # By the dictionaries that hold them, for a module may put another tensor in a buffer's place.
        self._places = [_place(model, name) for name in self.tensors]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step number `step`."""
        share = 1 - min(self.decay, step / (step + 9))
        pairs = [(average, held[name]) for average, (held, name) in zip(self.tensors.values(), self._places)]
        for kind in {type(average) for average, _ in pairs}:  # of parted weights, torch takes none with whole ones
            averages, now = zip(*(pair for pair in pairs if type(pair[0]) is kind))
            torch._foreach_lerp_(averages, now, share)

    def set(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the average from a checkpoint."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the average's values; its own come back afterwards."""
        own = {name: tensor.clone() for name, tensor in model_state(self._model).items()}
        set_model_state(self._model, {**own, **self.tensors})
        try:
            yield
        finally:
            set_model_state(self._model, own)


def _place(model: nn.Module, name: str) -> tuple[dict[str, Tensor], str]:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    held = module._parameters if own in module._parameters else module._buffers
    return held, own  # type: ignore[return-value]
