"""load_data: split without leaks, normalised as said, CIFAR read as torchvision keeps it, bad input in a sentence."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import functional as transforms

from pictures import array, encoded, everything, folder_of, parity, rows, write_parquet
from secateur.errors import DataError, UnknownName
from secateur.zoo.data import load_data
from secateur.zoo.images import Images
from secateur.zoo.split import hold_out


def test_digits_are_the_bundled_images_split_in_three():
    from sklearn.datasets import load_digits

    data, bundle = load_data("digits"), load_digits()
    assert data.classes == tuple("0123456789")
    assert [len(part) for part in everything(data)] == [1295, 143, 359]
    found = sorted((int(y), x.numpy().tobytes()) for part in everything(data) for x, y in zip(part.pixels, part.labels))
    scaled = np.round(bundle.images * 255 / 16).astype(np.uint8)
    assert found == sorted((int(y), x.tobytes()) for x, y in zip(scaled, bundle.target))
    assert any("test part" in note for note in data.notes)
    assert any("143 of 1,438 train images" in note for note in data.notes)


def test_every_class_gives_its_share():
    data = load_data("digits", validation=0.25)
    held, rest = data.validation.labels.bincount(), data.train.labels.bincount()
    assert torch.equal(held, ((held + rest) * 0.25).round().long())


def test_seed_and_validation_change_the_split_and_the_same_seed_does_not():
    first, again, other = (load_data("digits", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.validation.pixels, again.validation.pixels)
    assert torch.equal(first.train.labels, again.train.labels)
    assert not torch.equal(first.validation.pixels, other.validation.pixels)
    assert not torch.equal(first.test.pixels, other.test.pixels)
    assert len(load_data("digits", validation=0.3).validation) > len(first.validation)


def test_hold_out_loses_and_repeats_no_image_and_needs_no_second_copy():
    pixels = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 3, 2, 2).contiguous()
    images = Images(pixels.clone(), torch.arange(50) % 3)
    rest, held = hold_out(images, 0.3, 5, ("a", "b", "c"))
    assert sorted([*rest.pixels[:, 0, 0, 0].tolist(), *held.pixels[:, 0, 0, 0].tolist()]) == list(range(50))
    for part in (rest, held):
        assert torch.equal(part.labels, part.pixels[:, 0, 0, 0].long() % 3)
        assert part.pixels.untyped_storage().data_ptr() == images.pixels.untyped_storage().data_ptr()
    assert held.labels.bincount().tolist() == [5, 5, 5]


def test_a_class_with_one_image_cannot_be_split(tmp_path: Path):
    images = [encoded(array(i)) for i in range(5)]
    write_parquet(tmp_path / "train.parquet", images, label=[0, 0, 0, 0, 1])
    write_parquet(tmp_path / "test.parquet", images, label=[0, 0, 0, 0, 1])
    with pytest.raises(DataError, match="class '1' has 1 image, and a split needs at least 2"):
        load_data(f"parquet:{tmp_path}")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_validation_outside_0_to_1_is_refused(share: float):
    with pytest.raises(DataError, match=f"validation is {share}; it is the share of train"):
        load_data("digits", validation=share)


# what Data gives


def test_mean_and_std_are_those_of_train_alone():
    data = load_data("digits")
    pixels = data.train.pixels.double() / 255
    assert data.mean == pytest.approx([pixels.mean().item()])
    assert data.std == pytest.approx([pixels.std(correction=0).item()])
    x = torch.cat([x for x, _ in data.batches("train", 256)])
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std().item() == pytest.approx(1, abs=1e-3)


def test_a_channel_that_never_varies_stays_finite(tmp_path: Path):
    black = encoded(np.zeros((8, 8, 3), dtype=np.uint8))
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", [black] * 6, label=parity(6))
    assert load_data(f"parquet:{tmp_path}").example(6).abs().max() == 0


def test_normalise_takes_the_constants_of_imagenet(tmp_path: Path):
    data = load_data(f"parquet:{folder_of(tmp_path)}", normalise="imagenet")
    assert data.mean == (0.485, 0.456, 0.406)
    assert data.std == (0.229, 0.224, 0.225)
    assert data.mean != load_data(f"parquet:{tmp_path}").mean
    assert "of ImageNet" in data.notes[-1]


def test_normalise_is_refused_where_it_cannot_be():
    with pytest.raises(DataError, match="normalise='imagenet' is for colour images; digits is grey"):
        load_data("digits", normalise="imagenet")
    with pytest.raises(UnknownName, match="unknown normalisation 'imagnet'; did you mean 'imagenet'"):
        load_data("digits", normalise="imagnet")


def test_batches_reads_the_split_asked_for_with_the_options_given():
    data = load_data("digits")
    for split, part in zip(("train", "validation", "test"), everything(data)):
        assert torch.equal(torch.cat([y for _, y in data.batches(split, 100)]), part.labels)  # type: ignore[arg-type]
    options = {"shuffle": 1, "augment": ("crop", "flip"), "channels_last": True}
    ours = next(data.batches("test", 9, **options))
    plain = next(data.test.batches(9, mean=data.mean, std=data.std, **options))
    assert torch.equal(ours[0], plain[0])
    assert next(data.batches("test", 9, device="meta"))[0].device.type == "meta"
    with pytest.raises(UnknownName, match="unknown split 'tests'; did you mean 'test'"):
        data.batches("tests", 9)  # type: ignore[arg-type]


def test_example_is_the_first_training_images():
    data = load_data("digits")
    assert torch.equal(data.example(3), next(data.batches("train", 3))[0])
    assert data.example().shape == (1, 1, 8, 8)
    assert data.example(device="meta").device.type == "meta"


def test_an_unknown_data_set_lists_the_choices():
    with pytest.raises(UnknownName, match="unknown data set 'cifar11'; did you mean 'cifar10'"):
        load_data("cifar11")
    with pytest.raises(UnknownName, match="unknown data set 'parquet'"):
        load_data("parquet")
    with pytest.raises(DataError, match="'parquet:' names no folder; write parquet:DIR"):
        load_data("parquet:")
    with pytest.raises(DataError, match="label='label' is for a parquet folder; digits has no columns"):
        load_data("digits", label="label")


def test_image_size_resizes_digits_as_pillow_does():
    plain, large = load_data("digits"), load_data("digits", image_size=20)
    assert large.train.pixels.shape == (1295, 1, 20, 20)
    for small, big in zip(plain.train.pixels[:50, 0], large.train.pixels[:50, 0]):
        assert np.array_equal(big, transforms.resize(Image.fromarray(small.numpy()), [20, 20]))
    assert "Images are resized to 20 x 20 pixels." in large.notes
    with pytest.raises(DataError, match="image_size is 0; it is a side in pixels"):
        load_data("digits", image_size=0)


# cifar10 and cifar100 through torchvision


def fake_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """CIFAR-10's own layout with 20 + 5 images, and torchvision told their checksums."""
    base, sums, pixels = root / "cifar-10-batches-py", {}, {}
    base.mkdir()
    for name, count in (("data_batch_1", 20), ("test_batch", 5)):
        pixels[name] = np.stack([array(i + 100 * count).transpose(2, 0, 1) for i in range(count)])
        pixels[name] = np.ascontiguousarray(np.tile(pixels[name], (1, 1, 4, 4)))
        labels = parity(count)
        content = pickle.dumps({"data": pixels[name].reshape(count, -1), "labels": labels})
        (base / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({"label_names": ["even", "odd"]})
    (base / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    checksum = hashlib.md5(meta).hexdigest()
    names = {"filename": "batches.meta", "key": "label_names", "md5": checksum}
    monkeypatch.setattr(datasets.CIFAR10, "meta", names)
    return pixels


def test_cifar10_is_read_as_torchvision_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pixels = fake_cifar(tmp_path, monkeypatch)
    data = load_data("cifar10", folder=tmp_path)
    assert data.classes == ("even", "odd")
    assert np.array_equal(data.test.pixels.numpy(), pixels["test_batch"])
    assert data.test.labels.tolist() == parity(5)
    assert rows(data.train) | rows(data.validation) == {image.tobytes() for image in pixels["data_batch_1"]}
    assert load_data("cifar10", folder=tmp_path, image_size=48).train.pixels.shape[2:] == (48, 48)


def test_a_missing_or_damaged_cifar_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"cifar100 is not in .*secateur, or not whole; fetch it .* download=True"):
        load_data("cifar100")
    fake_cifar(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"cut short")
    with pytest.raises(DataError, match=r"cifar10 is not in .*, or not whole"):
        load_data("cifar10", folder=tmp_path)


def test_download_asks_torchvision_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", refuse)
    with pytest.raises(DataError, match=r"cifar10 could not be fetched to .* \(no route to host\)"):
        load_data("cifar10", folder=tmp_path, download=True)
