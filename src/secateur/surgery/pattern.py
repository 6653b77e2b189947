"""Masks of a fixed pattern: of every so many weights that a unit reads in a row, so many stay (N:M sparsity)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from secateur.errors import PlanError
from secateur.measure.sparsity import find_weights
from secateur.surgery.masks import Mask, Masks


def find_pattern(model: nn.Module, keep: int = 2, of: int = 4, *, names: str | Iterable[str] | None = None) -> Masks:
    """Masks that keep the `keep` largest of every `of` weights in a row along the inputs; the model is not touched.

    The rows are those of the matrix (outputs, inputs); a convolution's inputs at one place of its kernel follow one
    another, as sparse tensor cores read them (Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, section
    3). Of equal magnitudes the first stay. Held in training as other masks are, by `enforcer`.

    Args:
        model: any module.
        keep: how many stay, from 1.
        of: in groups of how many.
        names: which tensors, as `find_masks` reads them; all if left out. One whose inputs `of` does not divide is left
            out, unless it is named.

    Raises:
        PlanError: not 1 <= keep < of, inputs that cannot be divided, a weight that is not finite, or nothing to mask.
        UnknownName: a name or pattern that fits no tensor.

    >>> layer = nn.Linear(4, 1)
    >>> layer.weight.data = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
    >>> find_pattern(layer).keep("weight")
    tensor([[False,  True,  True, False]])
    """
    if not 1 <= keep < of:
        raise PlanError(f"{keep} of every {of} weights is no pattern; give 1 <= keep < of, such as 2 of 4.")
    found: list[Mask] = []
    for name, weight in find_weights(model, names).items():
        axis = 0 if isinstance(model.get_submodule(name.rpartition(".")[0]), _ConvTransposeNd) else 1
        if weight.ndim > 1 and weight.shape[axis] % of == 0:
            found.append(_mask(name, weight, axis, keep, of))
        elif names is not None:
            what = f"groups of {of} do not divide the inputs of {name!r}, {tuple(weight.shape)}"
            raise PlanError(f"{what}; leave it out.")
    if not found:
        raise PlanError(f"no layer has inputs that groups of {of} divide; give another pattern, such as 1 of 2.")
    return Masks(tuple(found))


def _mask(name: str, weight: Tensor, axis: int, keep: int, of: int) -> Mask:
    """The mask of one tensor, whose inputs are along `axis`."""
    if not bool(weight.isfinite().all()):
        raise PlanError(f"{name!r} has weights that are not finite, which have no order; train it again.")
    last = weight.movedim(axis, -1)
    order = last.abs().unflatten(-1, (-1, of)).argsort(dim=-1, descending=True, stable=True)
    stays = torch.zeros(order.shape, dtype=torch.bool, device=weight.device)
    stays.scatter_(-1, order[..., :keep], True)
    bits = stays.flatten(-2).movedim(-1, axis)
    return Mask(name, tuple(weight.shape), numpy.packbits(bits.cpu().numpy()).tobytes())
