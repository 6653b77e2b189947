"""Files that are written whole or not at all.

`replacing` is the one mechanism: a temporary file beside the target, flushed to the disk and then renamed
over it, so a crash, a full disk or Ctrl-C leaves what was there before. The other writers use it.
Whatever the operating system refuses becomes a `RunError` that names the file and says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

from secateur.errors import RunError

if sys.platform != "win32":
    import fcntl

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], needed: int | None = None) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; on success that file takes the place of `path`.

    The file is flushed to the disk before it is renamed, and the folder after. If the body raises anything at
    all, the temporary file is removed and `path` is as it was. A symbolic link is followed, not replaced.

    Args:
        path: the file to write; its folder must exist.
        needed: size in bytes that will be written, where it is known; only for the message of a full disk.

    Raises:
        RunError: the folder is missing or may not be written, or the disk is full.

    >>> with replacing("settings.txt") as temporary:
    ...     _ = temporary.write_text("depth = 20")
    >>> Path("settings.txt").read_text()
    'depth = 20'
    >>> Path("settings.txt").unlink()
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".{secrets.token_hex(6)}.tmp"
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        temporary.open("xb").close()
    except OSError as error:
        _refuse(path, error, needed)
    try:
        try:
            yield temporary
        except OSError as error:
            # Only a refused write is ours to explain: the body may have failed at reading something else.
            if error.errno in FULL:
                _refuse(path, error, needed)
            raise
        try:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            _refuse(path, error, needed)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` to `path`, whole or not at all; raises `RunError` as `replacing` does.

    >>> write_bytes("two.bin", b"12")
    >>> Path("two.bin").stat().st_size
    2
    >>> Path("two.bin").unlink()
    """
    with replacing(path, needed=len(data)) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` to `path` as UTF-8, line ends untouched, whole or not at all; raises as `replacing` does.

    >>> write_text("note.txt", "3 × 3")
    >>> Path("note.txt").read_bytes()
    b'3 \\xc3\\x97 3'
    >>> Path("note.txt").unlink()
    """
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` to `path` as JSON, indented by 2, keys in the order given, whole or not at all.

    Raises:
        RunError: a number in it is NaN or infinite (JSON has neither), or as for `replacing`.

    >>> write_json("row.json", {"name": "fc", "sparsity": 0.5})
    >>> print(Path("row.json").read_text(), end="")
    {
      "name": "fc",
      "sparsity": 0.5
    }
    >>> Path("row.json").unlink()
    """
    for where in _not_finite(value):
        raise RunError(f"could not write {path}: the number at {where} is NaN or infinite; JSON has neither.")
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value that the JSON file `path` holds.

    Raises:
        RunError: no such file, or its content is not JSON; names the line.

    >>> write_json("row.json", [1, 2.5])
    >>> read_json("row.json")
    [1, 2.5]
    >>> Path("row.json").unlink()
    """
    try:
        return json.loads(Path(path).read_bytes().decode(), parse_constant=_refuse_constant)
    except OSError as error:
        raise RunError(f"could not read {path}: {_reason(error)}.") from error
    except (ValueError, RecursionError) as error:
        size = Path(path).stat().st_size
        raise RunError(
            f"{path} is not a JSON file that can be read ({error}; {size} bytes); "
            "it may have been cut off or edited: restore it, or remove it and make it again."
        ) from error


def append_line(path: str | os.PathLike[str], text: str) -> None:
    """Appends `text` and a line end to `path` (made if missing), and returns once it is on the disk.

    A last line that a crash left without its end is closed first, so the new line always stands alone. If the
    line cannot be written whole, the file is cut back to what it was.

    Raises:
        ValueError: `text` holds a line end itself.
        RunError: the folder is missing or may not be written, or the disk is full.

    >>> append_line("log.jsonl", '{"epoch": 1}')
    >>> append_line("log.jsonl", '{"epoch": 2}')
    >>> Path("log.jsonl").read_text().splitlines()
    ['{"epoch": 1}', '{"epoch": 2}']
    >>> Path("log.jsonl").unlink()
    """
    if "\n" in text or "\r" in text:
        raise ValueError(f"one line was expected, but the text has a line end in it: {text!r}")
    line = text.encode() + b"\n"
    try:
        with open(path, "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            _append(file, line, size)
        if size == 0:
            _flush_folder(Path(path).parent)
    except OSError as error:
        _refuse(path, error, len(line))


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Holds `folder`, made if missing, for this process within the block: no other may enter a block of its own.

    The system gives the folder free when the process ends, however it ends, so no lock is ever left over. Where the
    system has no such locks (Windows, some network file systems) the folder is not held.

    Raises:
        RunError: another process holds the folder, or it cannot be made.

    >>> with locked("."), locked("."):
    ...     pass
    Traceback (most recent call last):
    secateur.errors.RunError: another process is at work in '.'; wait until it has ended, or give another folder.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        _refuse(folder, error, None)
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = f"another process is at work in {os.fspath(folder)!r}"
            raise RunError(f"{what}; wait until it has ended, or give another folder.") from error
        except OSError as error:
            # A file system without locks cannot protect the folder, but need not stop the work.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield
    finally:
        os.close(handle)


def _append(file: FileIO, line: bytes, size: int) -> None:
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            line = b"\n" + line
    try:
        _write_all(file, line)
        os.fsync(file.fileno())
    except BaseException:
        file.truncate(size)
        raise


def _write_all(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # a raw write may take only a part
        rest = rest[file.write(rest) :]


def _refuse(path: str | os.PathLike[str], error: OSError, needed: int | None) -> NoReturn:
    folder = Path(path).parent
    kept = "What was there before is untouched"
    if error.errno in FULL:
        free = ""
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free in {folder}"
        wanted = "" if needed is None else f"{needed / 1e6:.1f} MB are needed"
        figures = ", ".join(part for part in (wanted, free) if part)
        what = {errno.EDQUOT: "your disk quota is used up", errno.EFBIG: "the file-size limit was reached"}
        why = f"{what.get(error.errno or 0, 'the disk is full')}{f' ({figures})' if figures else ''}"
        todo = "free some space or choose another folder, then run it again"
    elif isinstance(error, IsADirectoryError):
        why, todo = "it is a folder", "choose another name"
    elif isinstance(error, FileNotFoundError | NotADirectoryError):
        why, todo = f"there is no folder {folder}", "make it first, or choose another"
    elif error.errno in UNWRITABLE:
        why = f"you may not write in {folder} ({_reason(error)})"
        todo = "change its rights or choose another folder"
    else:
        why, todo = _reason(error), "put that right or choose another folder, then run it again"
    raise RunError(f"could not write {path}: {why}. {kept}; {todo}.") from error


def _reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()


def _flush_folder(folder: Path) -> None:
    # Some systems cannot open or flush a folder; the file itself is complete and in place by now.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _not_finite(value: Any, where: str = "") -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield where or "the top"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{where}[{index}]")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
