"""How large a model is: parameters, buffers, and the bytes of the file that it is saved in."""

from __future__ import annotations

from torch import nn

from secateur.codec.state import file_size


def count_params(model: nn.Module, *, trainable_only: bool = False) -> int:
    """The number of parameters; tied ones count once, and buffers (the statistics of BatchNorm) not at all.

    Args:
        model: any module.
        trainable_only: leave out what does not require gradients.

    >>> count_params(nn.Linear(3, 2)), count_params(nn.BatchNorm2d(4))
    (8, 8)
    """
    return sum(
        parameter.numel()
        for parameter in model.parameters()
        if parameter.requires_grad or not trainable_only
    )


def count_buffers(model: nn.Module) -> int:
    """The number of values in buffers, shared ones once; what `persistent=False` keeps from files counts too.

    >>> count_buffers(nn.BatchNorm2d(4))  # mean and variance of 4 channels, batches seen
    9
    """
    return sum(buffer.numel() for buffer in model.buffers())


def file_bytes(model: nn.Module) -> int:
    """The exact size in bytes of the safetensors file that holds the model's state dict; nothing is written.

    >>> file_bytes(nn.Linear(25, 40)) - 4 * count_params(nn.Linear(25, 40))  # the header
    136
    """
    # keep_vars, for the detached tensors of a plain state dict no longer show which parameters are tied.
    return file_size(model.state_dict(keep_vars=True))
