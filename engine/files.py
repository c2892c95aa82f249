"""Files that are whole or not there, and rows that are: a full disk is one line, and loses nothing written before."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine.errors import OutputError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into the one line that names what was being written.

    Raises:
      OutputError: the disk is full, a limit was reached, or the file cannot be written for another reason.
    """
    try:
        yield
    except OSError as e:
        raise OutputError(f"{path} cannot be written: {e.strerror}") from e


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the name `path` when the block ends without an exception; until then what was there
    stays. A device is written to as it is.

    Raises:
      OutputError: as `writing`.
    """
    target = path.resolve()  # a link goes on leading there
    is_device = target.exists() and not target.is_file()
    partial = target if is_device else target.with_name(f"{target.name}.partial")
    try:
        with writing(path):
            yield partial
            if not is_device:
                partial.replace(target)
    finally:
        if not is_device:
            with contextlib.suppress(OSError):  # it has its new name, or was never made
                partial.unlink()


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8; until it is complete, what was there under its name stays.

    Raises:
      OutputError: as `writing`.
    """
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which takes the name `path` when the block ends without an exception.

    Raises:
      OutputError: `path` is there and not empty, or as `writing`.
    """
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    with writing(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"{path} is there already: name another directory")
        try:
            partial.mkdir(parents=True)
            yield partial
            partial.replace(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class RowFile:
    """A file of lines, each of which reaches the disk at once and whole, or not at all.

    Raises:
      OutputError: as `writing`.
    """

    def __init__(self, path: Path):
        self._path = path
        with writing(path):
            self._file = path.open("wb", buffering=0)

    def add(self, line: str) -> None:
        """Writes a line; a part of one that the disk had no room for is taken back."""
        data, start = f"{line}\n".encode(), self._file.tell()
        with writing(self._path):
            try:
                while data:
                    data = data[self._file.write(data) :]
            except OSError:
                with contextlib.suppress(OSError):  # a device, which has nothing to take back
                    self._file.truncate(start)
                raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
