"""parquet:DIR: read exactly, what is inferred is right and said, and each bad file is named in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pictures import array, encoded, everything, folder_of, parity, rows, write_parquet
from secateur.errors import DataError
from secateur.zoo.data import load_data
from secateur.zoo.parquet import read_parquet

SHARED = Path(__file__).parents[2].parent / "shared"


def test_parquet_is_read_exactly_over_files_row_groups_and_sub_folders(tmp_path: Path):
    images = [array(i) for i in range(300)]
    kinds = ["PNG", "WEBP", "BMP"]
    content = [encoded(image, kinds[i % 2 * 2]) for i, image in enumerate(images)]
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", content[:200], label=parity(200))
    write_parquet(tmp_path / "train" / "0001.parquet", content[200:], label=parity(100))
    write_parquet(tmp_path / "data" / "test-00000.parquet", content[:11], column="image", label=parity(11))
    with pytest.raises(DataError, match=r"test-00000.parquet has no column 'img', unlike the first train file"):
        load_data(f"parquet:{tmp_path}")
    write_parquet(tmp_path / "data" / "test-00000.parquet", content[:11], label=parity(11))
    data = load_data(f"parquet:{tmp_path}")
    assert [len(part) for part in everything(data)] == [270, 30, 11]
    assert np.array_equal(data.test.pixels.numpy(), np.stack(images[:11]).transpose(0, 3, 1, 2))
    assert data.test.labels.tolist() == parity(11)
    number = {image.transpose(2, 0, 1).tobytes(): i for i, image in enumerate(images)}
    for part in (data.train, data.validation):
        order = [number[image.numpy().tobytes()] for image in part.pixels]
        assert part.labels.tolist() == [i % 2 for i in order]
    assert len(rows(data.train) | rows(data.validation)) == 300


def test_a_published_validation_part_is_used_and_a_lone_held_out_part_is_the_test(tmp_path: Path):
    folder_of(tmp_path)
    held = [encoded(array(500 + i)) for i in range(4)]
    write_parquet(tmp_path / "validation-0.parquet", held, label=parity(4))
    data = load_data(f"parquet:{tmp_path}")
    assert [len(part) for part in everything(data)] == [20, 4, 6]
    assert any("nothing is split off train" in note for note in data.notes)
    (tmp_path / "test-0.parquet").unlink()
    data = load_data(f"parquet:{tmp_path}")
    assert [len(part) for part in everything(data)] == [18, 2, 4]
    assert any("taken as the test part" in note for note in data.notes)
    (tmp_path / "validation-0.parquet").unlink()
    assert [len(part) for part in everything(load_data(f"parquet:{tmp_path}"))] == [14, 2, 4]


def test_the_label_column_is_inferred_or_named(tmp_path: Path):
    images = [encoded(array(i)) for i in range(12)]
    columns = {"coarse_label": [0] * 12, "fine_label": parity(12), "size": [i % 3 for i in range(12)]}
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", images, **columns)
    data = load_data(f"parquet:{tmp_path}")
    assert len(data.classes) == 2
    assert "'fine_label'" in data.notes[0]
    assert "label='coarse_label' would take" in data.notes[0]
    assert load_data(f"parquet:{tmp_path}", label="size").classes == ("0", "1", "2")
    with pytest.raises(DataError, match=r"no column 'coarse', so .* integer columns: coarse_label, "):
        load_data(f"parquet:{tmp_path}", label="coarse")
    with pytest.raises(DataError, match=r"column 'img' is not integer, so it cannot be the label"):
        load_data(f"parquet:{tmp_path}", label="img")


def test_the_only_integer_column_is_the_label_and_two_are_a_question(tmp_path: Path):
    images = [encoded(array(i)) for i in range(8)]
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", images, kind=parity(8), note=["x"] * 8)
    assert load_data(f"parquet:{tmp_path}").test.labels.tolist() == parity(8)
    write_parquet(tmp_path / "train.parquet", images, kind=parity(8), sort=parity(8))
    with pytest.raises(DataError, match="no column 'label' or 'fine_label', and 2 integer columns; name one"):
        load_data(f"parquet:{tmp_path}")


def test_class_names_come_from_the_schema(tmp_path: Path):
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    folder_of(tmp_path, metadata={"huggingface": json.dumps(features)})  # type: ignore[arg-type]
    assert load_data(f"parquet:{tmp_path}").classes == ("cat", "dog")
    folder_of(tmp_path, metadata={"class_names": "ant,bee"}, other=[0] * 20)  # type: ignore[arg-type]
    assert load_data(f"parquet:{tmp_path}").classes == ("ant", "bee")
    folder_of(tmp_path)
    data = load_data(f"parquet:{tmp_path}")
    assert data.classes == ("0", "1")
    assert any("they are numbered" in note for note in data.notes)


def test_labels_outside_the_class_list_are_named(tmp_path: Path):
    folder_of(tmp_path)
    write_parquet(tmp_path / "test-0.parquet", [encoded(array(i)) for i in range(3)], label=[0, 7, 1])
    with pytest.raises(DataError, match=r"test files .* hold label 7 in column 'label' \(1 such rows\).* 0 to 1"):
        load_data(f"parquet:{tmp_path}")
    write_parquet(tmp_path / "test-0.parquet", [encoded(array(i)) for i in range(3)], label=[-1, -1, -1])
    with pytest.raises(DataError, match=r"hold label -1 in column 'label' \(3 such rows\)"):
        load_data(f"parquet:{tmp_path}")
    write_parquet(tmp_path / "test-0.parquet", [encoded(array(0))] * 2, label=[0, None])
    with pytest.raises(DataError, match="column 'label' has rows without a label"):
        load_data(f"parquet:{tmp_path}")


def test_all_grey_is_one_channel_and_some_grey_is_three(tmp_path: Path):
    grey = [encoded(array(i, channels=1)) for i in range(6)]
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", grey, label=parity(6))
    data = load_data(f"parquet:{tmp_path}")
    assert data.test.pixels.shape == (6, 1, 8, 8)
    assert np.array_equal(data.test.pixels[4, 0].numpy(), array(4, channels=1))
    write_parquet(tmp_path / "train.parquet", [*grey, encoded(array(9))], label=parity(7))
    data = load_data(f"parquet:{tmp_path}")
    assert np.array_equal(data.test.pixels[4].numpy(), np.stack([array(4, channels=1)] * 3))


def test_images_of_different_sizes_need_image_size(tmp_path: Path):
    images = [encoded(array(i, 8 + i % 2, 12)) for i in range(8)]
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", images, label=parity(8))
    with pytest.raises(DataError, match=r"train.parquet, row 1: .* 9 x 12 pixels and the first is 8 x 12; give image_"):
        load_data(f"parquet:{tmp_path}")
    assert load_data(f"parquet:{tmp_path}", image_size=6).test.pixels.shape == (8, 3, 6, 6)


@pytest.mark.parametrize("content", [b"not an image", b"", None, encoded(array(0))[:90]])
def test_an_image_that_cannot_be_decoded_is_named_by_file_and_row(tmp_path: Path, content: bytes | None):
    folder_of(tmp_path)
    images = [*(encoded(array(i)) for i in range(300)), content]
    write_parquet(tmp_path / "data" / "train-1.parquet", images, label=parity(301))
    with pytest.raises(DataError, match=r"data/train-1.parquet, row 300: this image cannot be decoded"):
        load_data(f"parquet:{tmp_path}")


def test_sixteen_bit_images_are_refused_rather_than_clipped(tmp_path: Path):
    folder_of(tmp_path)
    deep = encoded(np.full((8, 8), 40000, dtype=np.uint16))
    write_parquet(tmp_path / "test-0.parquet", [deep], label=[0])
    with pytest.raises(DataError, match=r"test-0.parquet, row 0: this image has more than 8 bits a channel"):
        load_data(f"parquet:{tmp_path}")


def test_a_folder_without_train_files_says_what_it_holds(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load_data(f"parquet:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match=r"holds no \*.parquet files"):
        load_data(f"parquet:{tmp_path}")
    write_parquet(tmp_path / "trainable.parquet", [encoded(array(0))], label=[0])
    with pytest.raises(DataError, match=r"name starts with 'train'; it holds trainable.parquet"):
        load_data(f"parquet:{tmp_path}")


def test_a_truncated_file_is_named(tmp_path: Path):
    path = folder_of(tmp_path) / "train-0.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"train-0.parquet cannot be read as parquet, perhaps cut short"):
        load_data(f"parquet:{tmp_path}")


def test_a_file_damaged_inside_is_named(tmp_path: Path):
    path = folder_of(tmp_path) / "train-0.parquet"
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-0.parquet cannot be read as parquet"):
        load_data(f"parquet:{tmp_path}")


def test_a_file_without_images_or_rows_lists_its_columns(tmp_path: Path):
    pq.write_table(pa.table({"label": [0, 1], "text": ["a", "b"]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"no image column, .* it has label \(int64\), text \(string\)"):
        load_data(f"parquet:{tmp_path}")
    write_parquet(tmp_path / "train.parquet", [encoded(array(0))], label=[0])
    table = pq.read_table(tmp_path / "train.parquet").slice(0, 0)
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train.parquet holds no rows"):
        load_data(f"parquet:{tmp_path}")


def test_cifar10_test_images_are_the_published_ones():
    if not SHARED.is_dir():
        pytest.skip("reading CIFAR-10 from parquet: there is no shared data folder beside the repository")
    parts = read_parquet(SHARED / "data" / "cifar10")
    assert parts.test is not None
    assert len(parts.classes) == 10
    assert parts.test.pixels.shape == (10000, 3, 32, 32)
    assert parts.test.labels.bincount().tolist() == [1000] * 10
