"""Mixup and cutmix against their formulas: images, shares, soft labels, and the loss of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from secateur.errors import TrainingError
from secateur.recover.mixing import CutMix, Mixed, Mixup, OneOf
from secateur.recover.objective import label_loss
from training import assert_same_weights, network, one_epoch, plain_epoch


def images(count: int = 6, size: int = 12) -> Tensor:
    """Image i is i everywhere: a pixel tells where it comes from."""
    return torch.arange(float(count)).view(count, 1, 1, 1).expand(count, 2, size, size + 3).contiguous()


@pytest.mark.parametrize("seed", range(5))
def test_mixup_is_the_weighted_mean(seed: int) -> None:
    torch.manual_seed(seed)
    given = torch.randn(6, 2, 4, 4)
    mixed = Mixup(0.4)(given)
    for i, other in enumerate(mixed.other.tolist()):
        expected = mixed.share * given[i] + (1 - mixed.share) * given[other]
        torch.testing.assert_close(mixed.images[i], expected, rtol=1e-6, atol=1e-6)
    assert sorted(mixed.other.tolist()) == list(range(6))


def test_shares_are_drawn_from_beta() -> None:
    torch.manual_seed(0)
    for alpha in (0.2, 1.0, 4.0):
        shares = torch.tensor([Mixup(alpha)(torch.zeros(1, 1)).share for _ in range(4000)])
        assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
        assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_pastes_one_box_and_counts_its_pixels(seed: int) -> None:
    torch.manual_seed(seed)
    given = images()
    mixed = CutMix(1.0)(given)
    boxes = set()
    for i, other in enumerate(mixed.other.tolist()):
        pasted = (mixed.images[i] != i).any(0)
        assert set(mixed.images[i].unique().tolist()) <= {float(i), float(other)}
        if other == i or not pasted.any():
            continue
        rows, columns = (pasted.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
        assert pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        boxes.add((rows[0], rows[-1], columns[0], columns[-1]))
        assert mixed.share == pytest.approx((mixed.images[i] == i).float().mean().item(), abs=1e-6)
    assert len(boxes) <= 1
    assert torch.equal(given, images())


def test_boxes_fall_everywhere_and_cover_the_share_that_is_drawn() -> None:
    torch.manual_seed(0)
    shares = [CutMix(1.0)(images(2)).share for _ in range(500)]
    # Boxes that reach beyond the edge are cut off there, so more than a half stays on the average.
    assert min(shares) < 0.4 < 0.6 < sum(shares) / 500 < 0.8
    hits = sum((CutMix(1.0)(images(2)).images[0] != 0).any(0).float() for _ in range(500))
    assert hits.min() > 10


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_both_labels_have_their_shares_in_the_loss(smoothing: float) -> None:
    mixed = Mixed(torch.zeros(3, 1), torch.tensor([1, 2, 0]), 0.7)
    labels, outputs = torch.tensor([0, 3, 0]), torch.randn(3, 4)
    shares = torch.tensor([[0.7, 0, 0, 0.3], [0.3, 0, 0, 0.7], [1.0, 0, 0, 0]])
    expected = functional.cross_entropy(outputs, shares, label_smoothing=smoothing)
    torch.testing.assert_close(label_loss(outputs, labels, smoothing, mixed), expected)
    assert mixed.main(labels).tolist() == [0, 3, 0]
    assert Mixed(mixed.images, mixed.other, 0.2).main(labels).tolist() == [3, 0, 0]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("mix", [Mixup(0.5), CutMix(1.0), OneOf((Mixup(0.5), CutMix(1.0)))])
def test_a_run_takes_the_shares_of_two_losses(mix: Any, smoothing: float) -> None:
    model, replica = network(), network()

    def loss(given: Tensor, labels: Tensor) -> Tensor:
        mixed = mix(given)
        outputs = replica(mixed.images)
        targets = (labels, labels[mixed.other])
        own, other = (functional.cross_entropy(outputs, target, label_smoothing=smoothing) for target in targets)
        return mixed.share * own + (1 - mixed.share) * other

    plain = plain_epoch(replica, torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9), loss)
    assert one_epoch(model, mix=mix, label_smoothing=smoothing) == pytest.approx(plain, rel=1e-6)
    assert_same_weights(model, replica, 1e-5)
    assert plain != pytest.approx(one_epoch(network(), label_smoothing=smoothing), rel=1e-4)


@pytest.mark.parametrize("make", [Mixup, CutMix])
def test_an_alpha_out_of_range(make: Any) -> None:
    with pytest.raises(TrainingError, match=r"alpha of (mixup|cutmix) is 0\.0; give a number above 0"):
        make(0.0)
