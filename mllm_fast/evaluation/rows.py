"""The rows of an evaluation on disk, with one line of JSON for each sample. The file survives a kill at any moment.

Only one process writes, and it writes a sample's whole line at once. A kill can leave a last line without its end. That
line is dropped before the file is used again, and every other sample is there once. `run.json` holds the settings that
the rows were made with. A folder with other settings is refused, so that rows are never mixed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.extras import install_command
from ..core.files import whole_file, write_whole

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing stops two runs from writing to one folder
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]
SETTINGS, ROWS = "run.json", "rows.jsonl"


class Rows:
    """The rows of one run in a folder.

    Args:
        folder: The folder of the run. `open` creates it if it does not exist.
        settings: The settings that decide the rows, as plain JSON.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lock the folder for one run, as a context manager. Other runs cannot use it until the end.

        Raises:
            InputError: Another run holds the folder, or the folder has rows of other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as lock:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise InputError(f"{self.folder}: another run writes there; wait for it, or give another") from None
            self._check()
            _mend(self.folder / ROWS)
            yield

    def append(self, sample: str, rows: Sequence[Row]) -> None:
        """Append a sample's rows to the file. They are stored once this returns."""
        line = json.dumps({"sample": sample, "rows": list(rows)}, ensure_ascii=False, allow_nan=False) + "\n"
        path = self.folder / ROWS
        with open(path, "ab", buffering=0) as file:
            before = file.tell()
            if file.write(line.encode()) < len(line.encode()):  # a full disk
                file.truncate(before)
                raise OSError(f"{path}: the disk is full; run again when there is room")

    def read(self) -> dict[str, list[Row]]:
        """Return a dictionary from each sample's name to its rows."""
        try:
            lines = (self.folder / ROWS).read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        entries = [json.loads(line) for line in lines]
        return {entry["sample"]: entry["rows"] for entry in entries}

    def forget(self, samples: Collection[str]) -> None:
        """Take out the rows of some samples; the file is the old or the new one, whole, at any moment."""
        path = self.folder / ROWS
        lines = [line for line in path.read_bytes().splitlines(True) if json.loads(line)["sample"] not in samples]
        write_whole(path, b"".join(lines))

    def _check(self) -> None:
        path = self.folder / SETTINGS
        if not path.exists():
            if (self.folder / ROWS).exists():
                raise InputError(
                    f"{self.folder}: holds rows without the settings they were made with; give another folder"
                )
            write_whole(path, (json.dumps(self.settings, indent=1) + "\n").encode())
            return
        try:
            found = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise InputError(f"{path}: not the settings of a run; give another folder") from None
        if found != self.settings:
            shown = lambda one, name: repr(one[name]) if name in one else "absent"  # noqa: E731
            both = sorted(found.keys() | self.settings.keys())
            names = [name for name in both if shown(found, name) != shown(self.settings, name)]
            said = "; ".join(f"{name} was {shown(found, name)}, is {shown(self.settings, name)}" for name in names)
            raise InputError(
                f"{self.folder}: holds a run of other settings ({said}); give another folder, or remove it"
            )


def write_parquet(rows: dict[str, list[Row]], path: Path) -> None:
    """Write all rows as one Parquet table, with "sample" as its first column.

    The file appears only once it is complete.

    Raises:
        InputError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"Parquet needs pyarrow: {install_command('parquet')}") from None
    flat = [{"sample": sample, **row} for sample, several in rows.items() for row in several]
    columns = dict.fromkeys(name for row in flat for name in row)  # including those of rows that failed
    table = pyarrow.Table.from_pylist([{name: row.get(name) for name in columns} for row in flat])
    with whole_file(path) as name:
        parquet.write_table(table, name)


def _mend(path: Path) -> None:
    """Cut off the last line if a kill left it without its end."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
