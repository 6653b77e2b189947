"""imagefolder:DIR: resized as torchvision does, classes matched by name, and bad folders refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as transforms

from pictures import everything, rows, write_images
from secateur.errors import DataError
from secateur.zoo import decode
from secateur.zoo.data import load_data


def test_a_flat_tree_is_resized_as_torchvision_does_and_split_in_three(tmp_path: Path):
    data = load_data(f"imagefolder:{write_images(tmp_path)}", image_size=10)
    assert data.classes == ("cat", "dog")
    assert [len(part) for part in everything(data)] == [14, 2, 4]
    expected = set()
    for path in tmp_path.rglob("*.png"):
        image = transforms.center_crop(transforms.resize(Image.open(path), 10), [10, 10])
        expected.add(np.asarray(image).transpose(2, 0, 1).tobytes())
    assert rows(data.train) | rows(data.validation) | rows(data.test) == expected
    assert "Images are resized to 10 pixels on the shorter side and cut to 10 x 10 at the centre." in data.notes


def test_image_size_is_224_unless_given(tmp_path: Path):
    write_images(tmp_path, per_class=4)
    assert load_data(f"imagefolder:{tmp_path}").train.pixels.shape[1:] == (3, 224, 224)


def test_published_parts_are_kept_and_classes_go_by_name(tmp_path: Path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", 3, first=300)
    write_images(tmp_path / "test", 2, first=600, classes=["dog"])
    data = load_data(f"imagefolder:{tmp_path}", image_size=8)
    assert [len(part) for part in everything(data)] == [20, 6, 2]
    assert data.test.labels.tolist() == [1, 1]
    write_images(tmp_path / "test", 2, first=600, classes=["emu"])
    with pytest.raises(DataError, match="the test part has class 'emu', which is not among those of train"):
        load_data(f"imagefolder:{tmp_path}", image_size=8)


def test_image_folders_of_another_layout_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load_data(f"imagefolder:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="should hold one folder of images per class: Couldn't find any class"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="Found no valid file for the classes cat"):
        load_data(f"imagefolder:{tmp_path}")
    write_images(tmp_path / "test")
    with pytest.raises(DataError, match="has a test folder but no train folder"):
        load_data(f"imagefolder:{tmp_path}")


def test_a_broken_file_is_named(tmp_path: Path):
    write_images(tmp_path)
    (tmp_path / "dog" / "004.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"dog/004.png: this image cannot be decoded \(cannot identify image file"):
        load_data(f"imagefolder:{tmp_path}", image_size=8)


def test_more_than_half_of_the_memory_is_refused_with_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_images(tmp_path)
    monkeypatch.setattr(decode, "free_memory", lambda: 5_000_000)
    with pytest.raises(DataError, match=r"20 images of 3 x 224 x 224 would take 3 MB .* half of the 5 MB"):
        load_data(f"imagefolder:{tmp_path}")
    assert len(load_data(f"imagefolder:{tmp_path}", image_size=100).train) == 14


def test_the_free_memory_is_known_here():
    free = decode.free_memory()
    assert free is None or free > 1_000_000
