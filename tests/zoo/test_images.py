"""Images: what a batch holds, that a seed decides it, and that the whole-batch arithmetic is the published one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.errors import DataError, UnknownName
from secateur.zoo.images import Images, normalise

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def some_images(n: int = 37, c: int = 3, h: int = 32, w: int = 32) -> Images:
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(1, 256, (n, c, h, w), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(n))


def whole(images: Images, batch_size: int = 8, **options: object) -> tuple[Tensor, Tensor]:
    settings = {"mean": MEAN, "std": STD, **options}
    pairs = list(images.batches(batch_size, **settings))  # type: ignore[arg-type]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def raw(images: Images, **options: object) -> tuple[Tensor, Tensor]:
    """A pass with the normalisation undone: the bytes that were cropped and flipped."""
    channels = images.pixels.shape[1]
    x, y = whole(images, mean=[0.0] * channels, std=[1.0] * channels, **options)
    return (x * 255).round().to(torch.uint8), y


def test_in_order_it_is_every_image_once_normalised():
    images = some_images()
    x, y = whole(images)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    expected = (images.pixels.double() / 255 - mean) / std
    assert x.dtype == torch.float32
    assert torch.equal(y, images.labels)
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-6)


def test_batch_size_sets_the_size_and_the_last_batch_is_what_is_left():
    sizes = [len(y) for _, y in some_images(37).batches(16, mean=MEAN, std=STD)]
    assert sizes == [16, 16, 5]


def test_mean_and_std_change_the_result():
    images = some_images(4)
    plain, _ = whole(images)
    assert not torch.equal(plain, whole(images, mean=(0.1, 0.1, 0.1))[0])
    assert not torch.equal(plain, whole(images, std=(1.0, 1.0, 1.0))[0])


def test_a_seed_decides_order_and_augmentation_bit_for_bit():
    images = some_images()
    first, again = (whole(images, shuffle=3, augment=("crop", "flip")) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    other = whole(images, shuffle=4, augment=("crop", "flip"))
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(first[0], other[0])


def test_shuffling_moves_each_image_with_its_label():
    images = some_images()
    x, y = raw(images, shuffle=0)
    assert y.tolist() != images.labels.tolist()
    assert sorted(y.tolist()) == images.labels.tolist()
    assert torch.equal(x, images.pixels[y])


def test_seed_zero_is_a_seed_and_not_none():
    assert whole(some_images(), shuffle=0)[1].tolist() != whole(some_images())[1].tolist()


def test_flip_mirrors_about_half_of_the_images_and_leaves_the_rest():
    images = some_images(400, 1, 4, 6)
    x, y = raw(images, shuffle=1, augment=["flip"])
    original = images.pixels[y]
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(x, original)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(x, original)])
    assert bool((mirrored ^ kept).all())
    assert 150 < int(mirrored.sum()) < 250


@pytest.mark.parametrize(("height", "width", "tall", "wide"), [(32, 32, 4, 4), (8, 8, 1, 1), (16, 24, 2, 3)])
def test_crop_is_a_window_of_the_zero_padded_image(height: int, width: int, tall: int, wide: int):
    images = some_images(60, 3, height, width)
    x, y = raw(images, shuffle=5, augment=["crop"])
    padded = torch.nn.functional.pad(images.pixels[y], (wide, wide, tall, tall))
    offsets = set()
    for cropped, source in zip(x, padded):
        windows = source.unfold(1, height, 1).unfold(2, width, 1).permute(1, 2, 0, 3, 4)
        matches = (windows == cropped).flatten(2).all(2).nonzero().tolist()
        assert len(matches) == 1
        offsets.add(tuple(matches[0]))
    rows, columns = {row for row, _ in offsets}, {column for _, column in offsets}
    assert {0, 2 * tall} <= rows <= set(range(2 * tall + 1))
    assert {0, 2 * wide} <= columns <= set(range(2 * wide + 1))


def test_crop_reads_a_view_as_it_reads_a_copy():
    images = some_images(40)
    view = Images(images.pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), images.labels)
    assert not view.pixels.is_contiguous()
    options = {"shuffle": 2, "augment": ("crop", "flip")}
    assert torch.equal(whole(images, **options)[0], whole(view, **options)[0])


def test_channels_last_changes_the_layout_and_not_the_values():
    images = some_images(8)
    plain, _ = next(images.batches(8, mean=MEAN, std=STD))
    last, _ = next(images.batches(8, mean=MEAN, std=STD, channels_last=True))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    assert torch.equal(plain, last)


def test_device_decides_where_the_batch_is():
    x, y = next(some_images(4).batches(4, mean=MEAN, std=STD, device="meta"))
    assert x.device.type == "meta"
    assert y.device.type == "meta"


def test_a_pass_leaves_the_images_as_they_were_and_shares_nothing_with_them():
    images = some_images(8)
    before = images.pixels.clone()
    for options in ({}, {"shuffle": 1, "augment": ("crop", "flip")}):
        for x, y in images.batches(8, mean=MEAN, std=STD, **options):
            x.zero_()
            y.zero_()
    assert torch.equal(images.pixels, before)
    assert images.labels.tolist() == list(range(8))


def test_take_gives_the_images_in_the_order_asked_for():
    images = some_images(9)
    taken = images.take(torch.tensor([5, 0, 5]))
    assert taken.labels.tolist() == [5, 0, 5]
    assert torch.equal(taken.pixels, images.pixels[[5, 0, 5]])
    assert len(taken) == 3


def test_normalise_is_per_channel():
    pixels = torch.full((1, 2, 1, 1), 51, dtype=torch.uint8)
    torch.testing.assert_close(normalise(pixels, (0.2, 0.0), (1.0, 0.5)).flatten(), torch.tensor([0.0, 0.4]))


def test_an_unknown_augmentation_lists_the_choices_at_once():
    with pytest.raises(UnknownName, match="unknown augmentation 'flop'; did you mean 'flip'"):
        some_images(4).batches(2, mean=MEAN, std=STD, shuffle=0, augment=["flop"])


def test_augmenting_without_a_seed_is_refused():
    with pytest.raises(DataError, match="give their seed as shuffle="):
        some_images(4).batches(2, mean=MEAN, std=STD, augment=["flip"])


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(DataError, match="batch_size is 0; it must be at least 1"):
        some_images(4).batches(0, mean=MEAN, std=STD)


def test_mean_must_have_a_value_per_channel():
    with pytest.raises(DataError, match="mean and std have 1 and 3 values and the images 3 channels"):
        some_images(4).batches(2, mean=[0.5], std=STD)


def test_pixels_and_labels_must_be_what_they_promise():
    with pytest.raises(DataError, match=r"pixels must be torch.uint8 .* these are torch.float32 \(2, 3, 4, 4\)"):
        Images(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match=r"labels must be torch.int64, one for each image"):
        Images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
