"""Masked weights held at exactly zero through a run: in the model, in the averaged weights, and without momentum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import TrainingError
from secateur.recover.moving import Fixed, Moment, Moving, unpacked
from secateur.surgery.masks import Masks


class Keeping:
    """The masks in force in a run, and what they do to each step.

    A masked weight is trained as if it were not there: before the optimizer's step its gradient is set to zero, and so
    is all that the optimizer keeps for it (momentum, second moments) when it goes, so that one that comes back starts
    with none; after the step it is set to zero itself, for some optimizers move what has no gradient. Its average is
    set to zero too, however large the weight was before it went.

    Args:
        masks: that stay, or a way of moving them.
        model: where it is trained.
        steps: of the whole run; None if they are not known.

    Raises:
        TrainingError: masks are to move by the steps of a run, and these are not known or too few.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> from secateur.surgery.masks import find_masks
    >>> keeping = Keeping(find_masks(layer, 0.5), layer, sgd, steps=1)
    >>> keeping.begin()
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> keeping.before(0)
    >>> sgd.step()
    >>> keeping.after()
    >>> layer.weight.tolist()
    [[0.0, 0.8999999761581421]]
    """

    def __init__(self, masks: Masks | Moving, model: nn.Module, optimizer: Optimizer, steps: int | None) -> None:
        if steps is None and not isinstance(masks, Masks):
            raise TrainingError("masks move by the steps of the whole run; give batches_per_epoch.")
        self.moving: Moving = Fixed(masks) if isinstance(masks, Masks) else masks
        self.keeps: dict[str, Tensor] = {}
        self._model, self._optimizer, self._steps = model, optimizer, steps or 0
        self._gone: dict[str, Tensor] = {}
        self.settled(0)  # refuses a run with too few steps

    def begin(self) -> None:
        """Puts the first masks in force.

        Raises:
            PlanError: they are another model's.
        """
        masks = self.moving.start(self._model)
        masks.apply_(self._model)
        self.set(unpacked(masks, self._model))
        self._forget()

    def set(self, keeps: Mapping[str, Tensor]) -> None:
        """Takes the masks from a checkpoint, or from the way of moving."""
        self.keeps = {name: keep.to(self._model.get_parameter(name).device) for name, keep in keeps.items()}
        self._gone = {name: ~keep for name, keep in self.keeps.items()}

    def settled(self, step: int) -> bool:
        """Whether masks stay to the end, once so many steps are taken."""
        return self.moving.settled(step, self._steps)

    @torch.no_grad()
    def before(self, step: int) -> None:
        """To be called with gradients that are whole, before an optimizer step; so many were taken before."""
        moved = self.moving.move(Moment(self._model, step, self._steps, self.keeps))
        if moved is not None:
            self.set(moved)
            self.after()
            self._forget()
        for name, gone in self._gone.items():
            slope = self._model.get_parameter(name).grad
            if slope is not None:
                slope.masked_fill_(gone, 0.0)

    @torch.no_grad()
    def after(self) -> None:
        """To be called when weights have been changed."""
        for name, gone in self._gone.items():
            self._model.get_parameter(name).masked_fill_(gone, 0.0)

    def zero_(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets what belongs to masked weights to zero in tensors by the parameters' names."""
        for name, gone in self._gone.items():
            if name in tensors:
                tensors[name].masked_fill_(gone, 0.0)

    def _forget(self) -> None:
        """The optimizer's state of masked weights becomes zero."""
        for name, gone in self._gone.items():
            for value in self._optimizer.state.get(self._model.get_parameter(name), {}).values():
                if isinstance(value, Tensor) and value.shape == gone.shape:
                    value.masked_fill_(gone, 0)
