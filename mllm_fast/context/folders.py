"""Folders of files that several processes write and read, on this machine or behind any URL that fsspec knows."""

from __future__ import annotations

import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from ..core.errors import InputError
from ..core.files import TEMPORARY

_ENDING = ".safetensors"
_LOCKS = 256
_OURS = re.compile(r"[0-9a-f]{64}\.safetensors")  # other files in a folder are neither counted nor removed
_LISTING = 20  # a listing is repeated after so many times its own duration
_SLOW, _LOWERED = 0.1, 0.95  # where a listing takes so many seconds, room is made for many files at once
_FORGOTTEN = 24 * 3600  # age in seconds at which a remote folder's unfinished file counts as abandoned


class Folder(Protocol):
    """Files by key (hexadecimal digits), with a budget in bytes.

    Over the budget, the least recently used files are removed first.
    """

    def locked(self, key: str) -> Any:
        """Return a context manager that gives exclusive use of the key, as far as the folder can tell."""

    def reading(self, key: str) -> Any:
        """Return a context manager that yields the path of the key's file, to be read inside, or None."""

    def write(self, key: str, make: Callable[[Path], object]) -> None:
        """Store the file that `make` writes to a path, unless it is larger than the budget."""

    def drop(self, key: str) -> None:
        """Remove a key's file."""

    def keys(self) -> list[str]:
        """Return the keys of all files."""


def open_folder(url: str, budget: int) -> Folder:
    """Open the folder at a path or a URL, and create it if it does not exist.

    Raises:
        InputError: the folder cannot be created or written to, or fsspec does not know the URL.
    """
    if "://" not in url or url.startswith("file://"):
        return LocalFolder(Path(url.removeprefix("file://")), budget)
    return RemoteFolder(url, budget)


class LocalFolder:
    """A folder on this machine.

    Files appear by renaming. Locks are the kernel's (flock), so a killed process leaves no lock behind. It can only
    leave an unfinished file, which the next process that tidies up removes.
    """

    def __init__(self, path: Path, budget: int):
        self.path = path = path.absolute()
        self.budget = budget
        self._latest = 0  # the latest time stamp given: the order stays right if the clock is set back
        self._total = budget + 1  # bytes at the last listing and those written since
        self._listed = self._took = 0.0  # when the folder was last listed, and for how long
        try:
            (path / "locks").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise InputError(f"{path}: no folder that can be written to ({error.strerror}); choose another") from None

    def __str__(self) -> str:
        return str(self.path)

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """See `Folder`; keys share 256 locks."""
        with self._flock(f"{int(key[:8], 16) % _LOCKS:02x}"):
            yield

    @contextmanager
    def reading(self, key: str) -> Iterator[Path | None]:
        """See `Folder`. A file that is removed meanwhile can still be read to its end."""
        path = self._file(key)
        try:
            self._stamp(path)
        except FileNotFoundError:
            yield None
            return
        except OSError:
            pass  # a file that another user owns cannot be stamped, but can be read
        yield path

    def write(self, key: str, make: Callable[[Path], object]) -> None:
        """See `Folder`. Only the holder of the key's lock may call this."""
        path = self._file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        if path.stat().st_size > self.budget:
            self.drop(key)
            return
        self._stamp(path)
        self._total += path.stat().st_size
        # a long listing is not repeated for each file, unless the budget may be reached
        if self._total > self.budget or time.monotonic() - self._listed > _LISTING * self._took:
            self._tidy(keep=path)

    def drop(self, key: str) -> None:
        """See `Folder`."""
        with suppress(OSError):
            self._file(key).unlink()

    def keys(self) -> list[str]:
        """See `Folder`."""
        found = []
        for folder in sorted(self.path.glob("[0-9a-f][0-9a-f]")):
            with suppress(OSError):
                found += [name.removesuffix(_ENDING) for name in os.listdir(folder) if _OURS.fullmatch(name)]
        return found

    def files(self) -> list[tuple[int, int, Path]]:
        """Return (time of last use, bytes, path) of each file, least recently used first."""
        found = []
        for path in self.path.glob(f"[0-9a-f][0-9a-f]/*{_ENDING}"):
            if not _OURS.fullmatch(path.name):
                continue
            with suppress(FileNotFoundError):  # removed meanwhile
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    def _tidy(self, keep: Path) -> None:
        """Remove the least recently used files over the budget, and the unfinished files of killed processes."""
        with self._flock("tidy"):
            began = time.monotonic()
            files = self.files()
            self._latest = max([self._latest, *(stamp for stamp, _, _ in files)])
            total = sum(size for _, size, _ in files)
            slow = total > self.budget and time.monotonic() - began > _SLOW
            for _, size, path in files:
                if total <= self.budget * (_LOWERED if slow else 1):
                    break
                if path != keep:
                    with suppress(OSError):
                        path.unlink()
                        total -= size
            self._total, self._listed = total, time.monotonic()
            self._took = self._listed - began
        for path in self.path.glob(f"[0-9a-f][0-9a-f]/{TEMPORARY}*"):
            # a living writer still holds the key's lock
            with self._flock(f"{int(path.parent.name, 16):02x}", wait=False) as free:
                if free:
                    with suppress(OSError):
                        path.unlink()

    def _stamp(self, path: Path) -> None:
        self._latest = max(time.time_ns(), self._latest + 1)
        os.utime(path, ns=(self._latest, self._latest))

    def _file(self, key: str) -> Path:
        return self.path / f"{int(key[:8], 16) % _LOCKS:02x}" / f"{key}{_ENDING}"

    @contextmanager
    def _flock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a lock and yield True; with `wait=False`, yield False if somebody else holds it."""
        import fcntl

        path = self.path / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)  # another process may have emptied the folder
        handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)  # read permission is enough to lock it
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough if a child process was forked meanwhile
            os.close(handle)


class RemoteFolder:
    """A folder behind an fsspec URL.

    There are no locks: two processes may make the same file at once, and then both write the same content. A file is
    uploaded under a temporary name and then moved to its place. Over the budget, the files written first are removed
    first.
    """

    def __init__(self, url: str, budget: int):
        import fsspec

        self.budget = budget
        self.url = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
            self._fs.makedirs(self._root, exist_ok=True)
        except (ValueError, ImportError, OSError) as error:
            raise InputError(f"{url}: no store can be opened there: {error}") from None

    def __str__(self) -> str:
        return self.url

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """See `Folder`."""
        yield

    @contextmanager
    def reading(self, key: str) -> Iterator[Path | None]:
        """See `Folder`. The path is that of a temporary copy on this machine."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{key}{_ENDING}"
            try:
                self._fs.get_file(self._file(key), str(path))
            except (FileNotFoundError, KeyError):
                yield None
                return
            yield path

    def write(self, key: str, make: Callable[[Path], object]) -> None:
        """See `Folder`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{key}{_ENDING}"
            make(path)
            if path.stat().st_size > self.budget:
                return
            unfinished = f"{self._root}/{TEMPORARY}{uuid.uuid4().hex}"
            try:
                self._fs.put_file(str(path), unfinished)
                self._fs.mv(unfinished, self._file(key))
            except BaseException:
                with suppress(Exception):  # remote file systems raise errors of any type
                    self._fs.rm_file(unfinished)
                raise
        self._tidy(keep=key)

    def _tidy(self, keep: str) -> None:
        """Remove the oldest files over the budget, and the unfinished files of killed processes."""
        self._fs.invalidate_cache()
        found = [(one["name"].rpartition("/")[2], one) for one in self._fs.ls(self._root, detail=True)]
        files = sorted((one for name, one in found if _OURS.fullmatch(name)), key=_written)
        total = sum(one["size"] or 0 for one in files)
        for one in files:
            if total <= self.budget:
                break
            if keep not in one["name"]:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(one["name"])
                    total -= one["size"] or 0
        for name, one in found:
            if name.startswith(TEMPORARY) and time.time() - self._fs.modified(one["name"]).timestamp() > _FORGOTTEN:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(one["name"])

    def drop(self, key: str) -> None:
        """See `Folder`."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._file(key))

    def keys(self) -> list[str]:
        """See `Folder`."""
        self._fs.invalidate_cache()
        names = [one.rpartition("/")[2] for one in self._fs.ls(self._root, detail=False)]
        return [name.removesuffix(_ENDING) for name in names if _OURS.fullmatch(name)]

    def _file(self, key: str) -> str:
        return f"{self._root}/{key}{_ENDING}"


def _written(info: dict[str, Any]) -> str:
    """Return the time a file was written, under the first name that the file system reports it by."""
    return next(
        (str(info[name]) for name in ("LastModified", "last_modified", "mtime", "created") if info.get(name)), ""
    )
