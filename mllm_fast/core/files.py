"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import stat
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError

TEMPORARY = ".mllm-fast-"  # prefix of the names of unfinished files


def check_target(target: Path, endings: Sequence[str]) -> None:
    """Raise InputError if nothing can be saved under this path, before any work is done for it."""
    if target.suffix.lower() not in endings:
        raise InputError(f"{target}: the file's ending is one of {', '.join(endings)}, got {target.suffix or 'none'!r}")
    if target.is_dir():
        raise InputError(f"{target}: is a folder; give a file in it")
    if not target.parent.is_dir():
        raise InputError(f"{target}: the folder {target.parent} does not exist; make it first")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"{target}: the folder {target.parent} cannot be written to; choose another")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all."""
    with whole_file(path) as name:
        Path(name).write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[str]:
    """Yield the name of a temporary file beside the target, which takes the target's place when the block ends.

    Write the file inside the block. On leaving, it is flushed to the disk and replaces the target. If an exception is
    raised, it is removed. So no reader ever sees half a file.
    """
    name = str(path.parent / f"{TEMPORARY}{uuid.uuid4().hex}")
    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # with the permissions of any other new file
    try:
        yield name
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        with _replaced(path):
            os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


@contextmanager
def _replaced(path: Path) -> Iterator[None]:
    """Free the file that is replaced inside the block on a separate thread.

    Freeing a large file takes as long as writing it.
    """
    old = None
    with suppress(OSError):
        if os.name == "posix" and stat.S_ISREG(os.lstat(path).st_mode):  # elsewhere an open file cannot be replaced
            old = os.open(path, os.O_RDONLY)
    try:
        yield
    finally:
        if old is not None:  # the file has no name any more, so closing it frees it
            threading.Thread(target=os.close, args=(old,), name="mllm-fast-free").start()
