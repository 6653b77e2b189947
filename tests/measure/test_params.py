"""Parameters, buffers and bytes on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from secateur.codec.state import save_state
from secateur.measure.params import count_buffers, count_params, file_bytes


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight


def test_closed_forms() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Linear(6, 5))
    assert count_params(model) == (6 * 2 * 9 + 6) + (6 + 6) + (6 * 5 + 5)
    assert count_buffers(model) == 6 + 6 + 1


def test_frozen_parameters_are_not_trainable() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert (count_params(model), count_params(model, trainable_only=True)) == (8, 6)


def test_tied_parameters_count_once() -> None:
    assert count_params(Tied()) == 35


def test_bytes_are_those_of_the_file() -> None:
    for model in (Tied(), nn.BatchNorm2d(3), nn.Linear(9, 2).to(torch.bfloat16)):
        save_state("model.safetensors", model.state_dict())
        assert file_bytes(model) == Path("model.safetensors").stat().st_size
