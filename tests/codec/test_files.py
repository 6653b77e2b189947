"""Files are written whole or not at all, and every refusal of the system is a sentence."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from secateur.codec.files import append_line, locked, read_json, replacing, write_bytes, write_json, write_text
from secateur.errors import RunError


def refusing(number: int) -> Any:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return refuse


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writers_leave_exactly_what_they_were_given(tmp_path: Path) -> None:
    write_bytes(tmp_path / "b", b"\x00\xff\n")
    write_text(tmp_path / "t", "a\r\nü\n")
    write_json(tmp_path / "j", {"z": 1, "a": [0.1, None, "×"]})
    assert (tmp_path / "b").read_bytes() == b"\x00\xff\n"
    assert (tmp_path / "t").read_bytes() == "a\r\nü\n".encode()
    assert (tmp_path / "j").read_text(encoding="utf-8").startswith('{\n  "z": 1,\n  "a": [')
    assert read_json(tmp_path / "j") == {"z": 1, "a": [0.1, None, "×"]}
    assert names(tmp_path) == ["b", "j", "t"]


def test_new_files_have_the_rights_of_any_other_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_bytes(tmp_path / "ours", b"")
    ours, plain = ((tmp_path / name).stat().st_mode for name in ("ours", "plain"))
    assert stat.S_IMODE(ours) == stat.S_IMODE(plain)


def test_what_was_there_is_replaced_only_on_success(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt("mine"), OSError(errno.EIO, "mine")])
def test_a_failing_body_changes_nothing_and_keeps_its_error(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "f"
    write_text(path, "old")
    with pytest.raises(type(error), match="mine"), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half of it")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["f"]


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "f")
    write_text(tmp_path / "link", "through")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "f").read_text() == "through"


def test_a_bare_file_name_is_written_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text("f", "here")
    append_line("l", "here")
    assert names(tmp_path) == ["f", "l"]


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, r"f: the disk is full \(2\.5 MB are needed, [0-9.]+ MB are free in .*\)\. What was"),
        (errno.EDQUOT, r"f: your disk quota is used up \(2\.5 MB are needed, .* free some space"),
        (errno.EFBIG, r"f: the file-size limit was reached \(2\.5 MB are needed"),
    ],
)
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str) -> None:
    path = tmp_path / "f"
    write_text(path, "old")
    monkeypatch.setattr(Path, "write_bytes", refusing(number))
    with pytest.raises(RunError, match=sentence):
        write_bytes(path, bytes(2_500_000))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["f"]


def test_a_disk_that_fills_up_while_flushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", refusing(errno.ENOSPC))
    with (
        pytest.raises(RunError, match=r"the disk is full \([0-9.]+ MB are free"),
        replacing(path) as temporary,
    ):
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["f"]


def test_needed_is_what_the_sentence_says(tmp_path: Path) -> None:
    for needed, said in ((1_000_000, "1.0 MB are needed"), (7_000_000, "7.0 MB are needed")):
        with pytest.raises(RunError, match=said), replacing(tmp_path / "f", needed=needed):
            raise OSError(errno.ENOSPC, "no space left on device")


def test_a_real_limit_of_the_system_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "old")
    write_text(tmp_path / "log", '{"epoch": 1}\n')
    program = """
import resource
from secateur.codec.files import append_line, write_bytes
from secateur.errors import RunError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for write in (lambda: write_bytes("f", bytes(5000)), lambda: append_line("log", "x" * 2000)):
    try:
        write()
    except RunError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("could not write f: the file-size limit was reached (0.0 MB are needed")
    assert second.startswith("could not write log: the file-size limit was reached")
    assert (tmp_path / "f").read_text() == "old"
    assert (tmp_path / "log").read_text() == '{"epoch": 1}\n'
    assert names(tmp_path) == ["f", "log"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(Path, "open", refusing(number))
    with pytest.raises(RunError, match=r"f: you may not write in .* \(.*\)\. .*change its rights or choose"):
        write_text(tmp_path / "f", "new")
    assert names(tmp_path) == []


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"write .*none/f: there is no folder .*none\. .*make it first"):
        write_text(tmp_path / "none" / "f", "new")
    with pytest.raises(RunError, match=r"there is no folder .*none\. .*make it first"):
        append_line(tmp_path / "none" / "f", "new")


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "old")
    with pytest.raises(RunError, match=r"there is no folder .*f\."):
        write_text(tmp_path / "f" / "g", "new")
    assert (tmp_path / "f").read_text() == "old"


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(RunError, match=r"f: it is a folder\. .*choose another name"):
        write_text(tmp_path / "f", "new")
    with pytest.raises(RunError, match=r"f: it is a folder\. .*choose another name"):
        append_line(tmp_path / "f", "new")
    assert names(tmp_path) == ["f"]


def test_a_name_that_is_too_long_is_told_as_the_system_tells_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="file name too long"):
        write_text(tmp_path / ("x" * 300), "new")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (float("nan"), "the top"),
        ({"rows": [{"loss": 1.0}, {"loss": float("inf")}]}, r"rows\[1\]\.loss"),
        ({"a": {"b": (0.0, float("-inf"))}}, r"a\.b\[1\]"),
    ],
)
def test_json_refuses_what_is_not_finite_and_says_where(tmp_path: Path, value: object, where: str) -> None:
    write_text(tmp_path / "j", "old")
    with pytest.raises(RunError, match=rf"j: the number at {where} is NaN or infinite"):
        write_json(tmp_path / "j", value)
    assert (tmp_path / "j").read_text() == "old"


@pytest.mark.parametrize(
    "content", [b"", b'{"a": 1', b"\xff\xfe", b'{"a": NaN}', b'{"a": 1} x', b"[" * 200_000]
)
def test_what_is_not_json_is_told_with_its_path_and_size(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(RunError, match=rf"j is not a JSON file .*{len(content)} bytes\); it may have been"):
        read_json(tmp_path / "j")


def test_a_missing_json_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"could not read .*none\.json: no such file"):
        read_json(tmp_path / "none.json")


def test_lines_are_appended_and_a_torn_one_is_closed_first(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_line(path, '{"epoch": 1}')
    with path.open("a") as file:
        file.write('{"epo')
    append_line(path, '{"epoch": "ü"}')
    assert path.read_text(encoding="utf-8") == '{"epoch": 1}\n{"epo\n{"epoch": "ü"}\n'
    assert json.loads(path.read_bytes().splitlines()[-1]) == {"epoch": "ü"}


def test_a_line_that_could_not_reach_the_disk_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    append_line(path, "one")
    monkeypatch.setattr(os, "fsync", refusing(errno.ENOSPC))
    with pytest.raises(RunError, match=r"log: the disk is full \(0\.0 MB are needed"):
        append_line(path, "two")
    assert path.read_text() == "one\n"


@pytest.mark.parametrize("text", ["a\nb", "a\r", "\n"])
def test_a_line_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="one line was expected, but the text has a line end in it"):
        append_line(tmp_path / "log", text)
    assert names(tmp_path) == []


HOLD = """
import sys, time
from secateur.codec.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_until_that_ends_however_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=r"another process is at work in .*run'; wait until it has ended"):
            locked(folder).__enter__()
        other.kill()
    with locked(folder):
        assert names(folder) == []
    with locked(folder), locked(tmp_path):
        assert names(tmp_path) == ["run"]


def test_a_folder_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="oh"), locked(tmp_path):
        raise KeyError("oh")
    with locked(tmp_path):
        assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"could not write .*there is no folder"):
        locked(tmp_path / "file" / "run").__enter__()


def test_a_file_system_without_locks_does_not_stop_anyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", refusing(errno.ENOLCK))
    with locked(tmp_path), locked(tmp_path):
        assert names(tmp_path) == []
