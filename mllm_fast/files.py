"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .errors import InputError


def check_target(target: Path, endings: Sequence[str]) -> None:
    """Raise InputError if nothing could be saved under this path, before any work is done for it."""
    if target.suffix.lower() not in endings:
        raise InputError(f"{target}: the file's ending is one of {', '.join(endings)}, got {target.suffix or 'none'!r}")
    if target.is_dir():
        raise InputError(f"{target}: is a folder; give a file in it")
    if not target.parent.is_dir():
        raise InputError(f"{target}: the folder {target.parent} does not exist; make it first")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"{target}: the folder {target.parent} cannot be written to; choose another")


def write_whole(path: Path, content: bytes) -> None:
    """Write by way of a temporary file beside the target, so that no reader ever sees half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".mllm-fast-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mode = os.umask(0)
        os.umask(mode)
        os.chmod(name, 0o666 & ~mode)  # mkstemp's files are private, a saved one should be as any other
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
